"""One daemon thread per process and purpose, for all its workers.

It starts with the first client, survives every error of its own work, is parked when the last client leaves, and is gone
`PARK_S` later: short tasks one after another share it, and nothing of ours stays in a process without work.
"""

from __future__ import annotations

import os
import threading
import time
from typing import TYPE_CHECKING, Generic, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["Sidecar"]

PARK_S = 2.0
ERROR_PAUSE_S = 1.0

Client = TypeVar("Client")


class Sidecar(Generic[Client]):
    """A thread that calls `work(clients)` whenever it is due.

    Args:
        name: of the thread.
        work: does what is due for the clients and returns the monotonic time of the next call, infinity for none.
        report: is told of every error that `work` raises.
    """

    def __init__(self, name: str, work: Callable[[list[Client]], float], report: Callable[[str, Exception], None]) -> None:
        self._name = name
        self._work = work
        self._report = report
        self._reset()
        os.register_at_fork(after_in_child=self._reset)  # a child has none of its parent's threads

    def _reset(self) -> None:
        self._condition = threading.Condition()
        self._clients: list[Client] = []
        self._thread: threading.Thread | None = None
        self._woken = False

    def add(self, client: Client) -> None:
        """Serve a client from now on; again is no harm."""
        with self._condition:
            if client not in self._clients:
                self._clients.append(client)
            self._wake()

    def remove(self, client: Client) -> None:
        """Serve it no more; a call of `work` that is under way may still see it."""
        with self._condition:
            if client not in self._clients:
                return
            self._clients.remove(client)
            if not self._clients:
                self._wake()  # park now, not when something would have been due

    def wake(self) -> None:
        """Something may be due earlier than was said."""
        with self._condition:
            self._wake()

    def _wake(self) -> None:
        if self._thread is None and self._clients:
            thread = threading.Thread(target=self._run, name=self._name, daemon=True)
            thread.start()  # may fail; then the next call tries again
            self._thread = thread
        self._woken = True
        self._condition.notify_all()

    def _run(self) -> None:
        try:
            self._serve()
        finally:
            with self._condition:
                if self._thread is threading.current_thread():
                    self._thread = None

    def _serve(self) -> None:
        while (clients := self._wait_for_clients()) is not None:
            try:
                due = self._work(clients)
            except Exception as error:  # noqa: BLE001 - the thread must outlive every error of its own
                self._report(self._name, error)
                due = time.monotonic() + ERROR_PAUSE_S
            with self._condition:
                if not self._woken:
                    self._condition.wait(min(max(due - time.monotonic(), 0.0), threading.TIMEOUT_MAX))

    def _wait_for_clients(self) -> list[Client] | None:
        """The clients; None when there was none for `PARK_S`, and the thread is to end."""
        with self._condition:
            parked_until = time.monotonic() + PARK_S
            while not self._clients:
                left = parked_until - time.monotonic()
                if left <= 0:
                    self._thread = None
                    return None
                self._condition.wait(left)
            self._woken = False  # what wakes it from now on is not known to the work that begins
            return list(self._clients)
