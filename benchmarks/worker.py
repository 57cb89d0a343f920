"""One worker, which meets faults, and how long it takes until it is back: what the measurements of `detection.py` have in common."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ray

import faultguard
from benchmarks.failing import AT, WAIT_S, steps
from faultguard import _manager
from faultguard._session import current_settings
from tests.nodes import WORK, Nodes
from tests.tasks import NOWAIT, Trace, wait_until
from tests.test_elsewhere import on

if TYPE_CHECKING:
    import signal
    from collections.abc import Callable

    Act = Callable[[int], float]

__all__ = [
    "TASK",
    "WORKER",
    "Case",
    "after",
    "begin",
    "heard_at",
    "is_gone",
    "make_sure",
    "raised",
    "ready",
    "resumed",
    "signalled",
    "stop",
]

TASK, WORKER = steps.__name__, "w"


@dataclass(frozen=True, slots=True)
class Case:
    """One measurement: a worker in a run of its own.

    Attributes:
        nodes: of the cluster: one with room for the worker, before the measurement and after it.
        directory: of the measurement.
        run: that has just begun; its manager is there.
    """

    nodes: Nodes
    directory: Path
    run: faultguard.Run

    @property
    def trace(self) -> Trace:
        """What the worker notes."""
        return Trace(self.directory / "trace")

    @property
    def store(self) -> Path:
        """Of the run."""
        return Path(self.run.checkpoint_dir)

    @property
    def log(self) -> Path:
        """The folder of the worker's records."""
        return self.store / self.run.name / TASK / WORKER

    @property
    def node(self) -> Any:
        """The node with room for the worker, where there is one."""
        (node,) = self.nodes.workers
        return node


def begin(case: Case, *kinds: str, at: int = AT, gain: int = 0, ballast: Any = None, node: Any = None, **options: Any) -> Any:
    """Start the worker, and give its reference.

    Args:
        case: of this measurement.
        kinds: the faults that it meets, one in each attempt: see `failing.steps`.
        at: the batch of the first one.
        gain: by how many batches each further one is further on.
        ballast: an argument of the task.
        node: where it has to run.
        options: of `recoverable`.
    """
    task: Any = faultguard.recoverable(every=1, backoff=NOWAIT, **options)(ray.remote(num_cpus=1, resources={WORK: 1})(steps))
    if node is not None:
        task = task.options(scheduling_strategy=on(node))
    return task.remote(WORKER, tuple((at + number * gain, kind) for number, kind in enumerate(kinds)), case.trace, ballast)


def ready(case: Case, faults: int = 1) -> int:
    """Wait until the worker has come to so many faults, and give its process."""
    notes = wait_until(lambda: (found := case.trace.notes("fault"))[faults - 1 :] and found, WAIT_S)
    return int(notes[-1]["pid"])


def resumed(
    case: Case,
    *kinds: str,
    first: Callable[[], None] | None = None,
    act: Act | None = None,
    since: str = "fault",
    which: int = -1,
    **given: Any,
) -> float:
    """Seconds from a fault to the first batch of the attempt after all of them.

    Args:
        case: of this measurement.
        kinds: what the worker meets.
        first: what is done when it has come to the first one.
        act: does the last one to the process with that pid, and says when.
        since: the notes of the worker that say when a fault was, if nobody else does.
        which: of those.
        given: to `begin`.
    """
    ref = begin(case, *kinds, **given)
    if first is not None:
        ready(case)
        first()
    began = act(ready(case, len(kinds))) if act is not None else None
    ray.get(ref, timeout=WAIT_S)
    if began is None:
        began = case.trace.notes(since)[which]["time"]
    return float(after(case, len(kinds))["time"] - began)


def after(case: Case, faults: int) -> dict[str, Any]:
    """The first batch of the attempt after so many faults."""
    return next(note for note in case.trace.notes("batch") if note["met"] == faults)


def raised(ref: Any, error: type[Exception]) -> float:
    """When the caller gets that error."""
    try:
        ray.get(ref, timeout=WAIT_S)
    except error:
        return time.time()
    raise AssertionError(f"there was no {error.__name__}")


def make_sure(is_so: object, unless: str) -> None:
    """That it was measured what is meant."""
    if not is_so:
        raise AssertionError(unless)


def stop(ref: Any) -> None:
    """End a worker that goes on."""
    faultguard.cancel(WORKER)
    ray.wait([ref], timeout=WAIT_S)


def signalled(number: signal.Signals) -> Act:
    """Send that signal."""

    def act(pid: int) -> float:
        os.kill(pid, number)
        return time.time()

    return act


def is_gone(pid: int) -> bool:
    """Whether a process is no more; one that nobody buries is none, either."""
    try:
        return not Path(f"/proc/{pid}/cmdline").read_bytes()
    except (FileNotFoundError, ProcessLookupError):
        return True


def heard_at() -> float:
    """When the manager last heard the worker; 0: never, or there is no manager. None is made for this: that is the worker's affair."""
    settings = current_settings()
    manager = _manager.find(settings)
    try:
        beats = ray.get(manager.live_workers.remote(), timeout=WAIT_S) if manager is not None else []
    except ray.exceptions.RayError:
        _manager.forget(settings)
        return 0.0
    return next((float(beat["last_heartbeat"]) for beat in beats if beat["worker_id"] == WORKER), 0.0)
