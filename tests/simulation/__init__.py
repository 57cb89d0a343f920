"""The library under one thread, a seeded scheduler, a fake clock and a faulty store. `tests.simulate` is the way in."""
