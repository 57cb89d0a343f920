WorkerState = manager = workers = None
