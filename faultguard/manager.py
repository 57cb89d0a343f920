RecoveryManager = None
def find_or_make(s): raise RuntimeError
