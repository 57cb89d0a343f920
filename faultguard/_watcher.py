"""One thread per process that sees where its workers stand; it waits for nothing else, neither a store nor the network.

It marks the file that says that this process lives, says what takes suspiciously long, and where there is a `stall_timeout`,
raises, and in the end ends the process. What the process as a whole missed (frozen, starved, its interpreter held by C code)
counts for nobody: the manager's probe decides about that, from outside.
"""

from __future__ import annotations

import math
import os
import threading
import time
from typing import TYPE_CHECKING, Protocol

from faultguard import _events, _marks
from faultguard._core.stall import GRACE_S, Stall, StallWatch
from faultguard._sidecar import Sidecar
from faultguard._watch import AwakeClock

if TYPE_CHECKING:
    from faultguard._core.silence import Held
    from faultguard._stall import StallGuard

__all__ = ["Watched", "mark", "remark", "unwatch", "watch"]

MIN_STEP_S = 0.02
MAX_STEP_S = 1.0
LOOKS_PER_TIMEOUT = 10
LATE_FACTOR = 2.0  # a look that comes so much later than promised was not the fault of the worker


class Watched(Protocol):
    """A worker that is watched."""

    mark_every_s: float

    @property
    def guard(self) -> StallGuard:
        """Where it stands."""

    @property
    def held(self) -> Held:
        """Which worker, and which attempt of it."""

    def hosts_others(self) -> bool:
        """Whether other work than this runs in the process."""

    def slow(self, age_s: float) -> None:
        """Say that it takes long."""

    def stalled(self, key: object, age_s: float, timeout_s: float) -> None:
        """Raise in its thread."""

    def leave_hard(self, key: object, age_s: float, timeout_s: float) -> None:
        """End the process, if nobody else works in it."""


class _Client:
    """A watched worker and its samples."""

    def __init__(self, worker: Watched) -> None:
        self.worker = worker
        self.watch = StallWatch()
        self.marked = False


def watch(worker: Watched) -> None:
    """Watch a worker from now on; again is no harm."""
    with _lock:
        if id(worker) in _clients:
            return
        client = _clients[id(worker)] = _Client(worker)
    _watcher.add(client)


def unwatch(worker: Watched) -> None:
    """Watch it no more, and say so in the file."""
    with _lock:
        client = _clients.pop(id(worker), None)
    if client is not None:
        _watcher.remove(client)
        if client.marked:
            mark()


def mark(worker: Watched | None = None) -> None:
    """Mark the file of this process now: with `worker`, because something is timed there from now on, or not timed any more."""
    global _mark_at  # noqa: PLW0603 - under the lock
    with _lock:
        if worker is not None and (client := _clients.get(id(worker))) is not None:
            client.marked = True
        workers = [client.worker for client in _clients.values() if client.marked]
        if workers:
            _mark_at = time.monotonic() + min(worker.mark_every_s for worker in workers)
            hosts_others = any(worker.hosts_others() for worker in workers)
            _marks.write((worker.held for worker in workers), _kill_after_s(workers), hosts_others=hosts_others)
        else:
            _mark_at = math.inf
            _marks.erase()


def remark(worker: Watched) -> None:
    """Mark the file again, if `worker` stands in it: what is timed there has changed."""
    client = _clients.get(id(worker))
    if client is not None and client.marked:
        mark()


def _kill_after_s(workers: list[Watched]) -> float | None:
    """How long the process may stand still before it may be ended from outside: as long as its watcher would wait, if it could run."""
    timeouts = [worker.guard.timing() for worker in workers]
    timed = [seconds for seconds in timeouts if seconds is not None]
    if not timed or math.inf in timed:
        return None
    return max(seconds + min(seconds, GRACE_S) for seconds in timed)


def _work(clients: list[_Client]) -> float:
    """Look at all of them."""
    now = time.monotonic()
    step = min(client.worker.mark_every_s for client in clients)
    seen = [(client, *client.worker.guard.look()) for client in clients]
    for _, key, timeout_s in seen:
        if timeout_s is not None:
            step = min(step, MAX_STEP_S)
            if key is not None:
                step = min(step, max(min(timeout_s, GRACE_S) / LOOKS_PER_TIMEOUT, MIN_STEP_S))
    if now >= _mark_at:
        mark()
    _clock.tick(now, LATE_FACTOR * step)
    awake = _clock.read(now)
    for client, key, timeout_s in seen:
        verdict = client.watch.look(key, timeout_s, awake)
        if verdict is Stall.SLOW:
            client.worker.slow(client.watch.age_s(awake))
        elif timeout_s is not None and verdict is Stall.SOFT:
            client.worker.stalled(key, client.watch.age_s(awake), timeout_s)
        elif timeout_s is not None and verdict is Stall.HARD:
            client.worker.leave_hard(key, client.watch.age_s(awake), timeout_s)
    return min(now + step, _mark_at)


def _after_fork() -> None:
    """A child holds nothing, and has no thread."""
    global _lock, _mark_at
    _lock, _mark_at = threading.Lock(), math.inf
    _clients.clear()


_lock = threading.Lock()
_clients: dict[int, _Client] = {}
_mark_at = math.inf
_clock = AwakeClock()
_watcher: Sidecar[_Client] = Sidecar("faultguard-watcher", _work, _events.report)
os.register_at_fork(after_in_child=_after_fork)
