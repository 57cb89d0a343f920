"""One thread per process that sees that a worker with a `stall_timeout` stands still, raises, and in the end ends the process.

It exists only where a timeout was asked for. What the process as a whole missed (frozen, starved, its interpreter held by C
code) counts for nobody: the manager's probe decides about that, from outside.
"""

from __future__ import annotations

import logging
import threading
import time
from typing import TYPE_CHECKING, Protocol

from faultguard import _events
from faultguard._core.stall import GRACE_S, Stall, StallWatch
from faultguard._sidecar import Sidecar
from faultguard._watch import AwakeClock

if TYPE_CHECKING:
    from faultguard._stall import StallGuard

__all__ = ["Watched", "unwatch", "watch"]

MIN_STEP_S = 0.02
MAX_STEP_S = 1.0
LOOKS_PER_TIMEOUT = 10
LATE_FACTOR = 2.0  # a look that comes so much later than promised was not the fault of the worker


class Watched(Protocol):
    """A worker that is watched."""

    @property
    def guard(self) -> StallGuard:
        """Where it stands."""

    def stalled(self, key: object, age_s: float, timeout_s: float) -> None:
        """Raise in its thread."""

    def leave_hard(self, key: object, age_s: float, timeout_s: float) -> None:
        """End the process, if nobody else works in it."""


class _Client:
    """A watched worker and its samples."""

    def __init__(self, worker: Watched) -> None:
        self.worker = worker
        self.watch = StallWatch()


def watch(worker: Watched) -> None:
    """Watch a worker from now on; again is no harm."""
    with _lock:
        if id(worker) in _clients:
            return
        client = _clients[id(worker)] = _Client(worker)
    _watcher.add(client)


def unwatch(worker: Watched) -> None:
    """Watch it no more."""
    with _lock:
        client = _clients.pop(id(worker), None)
    if client is not None:
        _watcher.remove(client)


def _work(clients: list[_Client]) -> float:
    """Look at all of them."""
    now = time.monotonic()
    step = MAX_STEP_S
    seen = [(client, *client.worker.guard.look()) for client in clients]
    for _, key, timeout_s in seen:
        if key is not None and timeout_s is not None:
            step = min(step, max(min(timeout_s, GRACE_S) / LOOKS_PER_TIMEOUT, MIN_STEP_S))
    _clock.tick(now, LATE_FACTOR * step)
    awake = _clock.read(now)
    for client, key, timeout_s in seen:
        if timeout_s is None:
            client.watch.look(None, None, awake)
            continue
        verdict = client.watch.look(key, timeout_s, awake)
        if verdict is Stall.SOFT:
            client.worker.stalled(key, client.watch.age_s(awake), timeout_s)
        elif verdict is Stall.HARD:
            client.worker.leave_hard(key, client.watch.age_s(awake), timeout_s)
    return now + step


def _report(name: str, error: Exception) -> None:
    text = f"thread {name} goes on after an error of its own: {error!r}"
    _events.emit(logging.ERROR, "faultguard.thread_error", text, thread=name, error=repr(error))


_lock = threading.Lock()
_clients: dict[int, _Client] = {}
_clock = AwakeClock()
_watcher: Sidecar[_Client] = Sidecar("faultguard-watcher", _work, _report)
