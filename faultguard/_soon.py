"""One thread per process for what is due in a moment, unless it is over by then.

Nobody wakes it: it looks now and then, and ends itself when nothing has come for a while. So what is over in a moment pays for an
entry in a dict, and not for a thread.
"""

from __future__ import annotations

import os
import threading
import time
from typing import Protocol

__all__ = ["NAME", "add", "is_running", "remove", "waits"]

NAME = "faultguard-soon"
LOOK_S = 0.05
PARK_S = 2.0


class Due(Protocol):
    """Something that is due at some time; it removes itself when it is done."""

    def tick(self, now: float) -> None:
        """Called now and then, on the thread; must not raise."""


class _Soon:
    """What is due, and the thread that looks."""

    def __init__(self) -> None:
        self._reset()
        os.register_at_fork(after_in_child=self._reset)  # a child has none of its parent's threads

    def _reset(self) -> None:
        self._lock = threading.Lock()
        self.waiting: dict[int, Due] = {}
        self.thread: threading.Thread | None = None
        self._used = 0.0

    def add(self, due: Due) -> None:
        with self._lock:
            self.waiting[id(due)] = due
            self._start()

    def is_running(self) -> bool:
        with self._lock:
            try:
                self._start()
            except RuntimeError:  # no thread can be started now
                return False
        return True

    def _start(self) -> None:
        self._used = time.monotonic()
        if self.thread is None:
            thread = threading.Thread(target=self._run, name=NAME, daemon=True)
            thread.start()
            self.thread = thread

    def _run(self) -> None:
        while True:
            time.sleep(LOOK_S)
            now = time.monotonic()
            for due in list(self.waiting.values()):
                due.tick(now)
            with self._lock:
                if not self.waiting and now - self._used > PARK_S:
                    self.thread = None
                    return


def add(due: Due) -> None:
    """Let it be looked at from now on.

    Raises:
        RuntimeError: no thread can be started.
    """
    _soon.add(due)


def remove(due: Due) -> None:
    """Let it be looked at no more; a look that is under way goes on. Again is no harm."""
    _soon.waiting.pop(id(due), None)


def is_running() -> bool:
    """Whether somebody looks; starts the thread if it can be."""
    return _soon.is_running()


def waits() -> bool:
    """Whether anything is due."""
    return bool(_soon.waiting)


_soon = _Soon()
