"""How soon faults of tasks, their processes, nodes and the manager are noticed and made good: for `detection.py`."""

from __future__ import annotations

import os
import signal
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest import mock

import ray

import faultguard
from benchmarks.failing import AT, WAIT_S, Server, holds, makes, steps
from faultguard import _manager
from faultguard._session import current_settings
from tests.nodes import WORK, Nodes, alive
from tests.tasks import NOWAIT, Trace, end_manager, manager_pid, records, told, wait_until
from tests.test_elsewhere import free_cpus, on, sees
from tests.test_nodes import node_of_manager

if TYPE_CHECKING:
    from collections.abc import Callable

    Act = Callable[[int], float]

__all__ = ["Case", "after", "begin", "is_gone", "make_sure", "raised", "ready", "resumed", "signalled", "stop"]

WORKER = "w"
DEADLINE_S = 600


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
        return self.store / self.run.name / steps.__name__ / WORKER

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


# --- the code and the process ---------------------------------------------------------------------------------------


def poisoned(case: Case, kind: str, times: int) -> float:
    """From the first failure to the first batch after the one that fails so many times, and is passed over from then on."""
    took = resumed(case, *[kind] * times, which=0, on_poison="skip")
    make_sure(after(case, times)["batch"] == AT + 1, "the batch was not passed over")
    return took


def spent(case: Case) -> float:
    """From the last exception of a budget until the caller knows."""
    ended = raised(begin(case, "exception", max_failures=0), faultguard.MaxFailuresExceeded)
    return float(ended - case.trace.notes("fault")[0]["time"])


def long_batch(case: Case) -> float:
    """From its beginning until its process says that it is a long one."""
    ref, session = begin(case, "long batch"), case.nodes.directory
    ready(case)
    part = f"'{steps.__name__}/{WORKER}' attempt 1 has made no progress for"
    before = len(told(session, part))
    wait_until(lambda: len(told(session, part)) > before, 5 * WAIT_S)
    took = time.time() - case.trace.notes("fault")[0]["time"]
    stop(ref)
    return float(took)


def event_loop(case: Case, stall_timeout: float) -> float:
    """From the batch that blocks it until that is told."""
    server: Any = ray.remote(num_cpus=1, resources={WORK: 1})(Server).remote()
    ray.get(server.blocks.remote(WORKER, case.trace, stall_timeout), timeout=WAIT_S)
    ray.kill(server)
    return float(case.trace.notes("told")[0]["time"] - case.trace.notes("fault")[0]["time"])


def cancelled(case: Case) -> float:
    """From `faultguard.cancel` until the caller knows."""
    ref = begin(case, "")
    ready(case)
    began = time.time()
    faultguard.cancel(WORKER)
    return raised(ref, ray.exceptions.TaskCancelledError) - began


def cancelled_by_force(case: Case) -> float:
    """From `ray.cancel` until it is shown as that."""
    ref = begin(case, "")
    ready(case)
    wait_until(_heard_at, WAIT_S)
    began = time.time()
    ray.cancel(ref, force=True)
    wait_until(lambda: [state.status for state in faultguard.workers()] == ["cancelled"], WAIT_S)
    return time.time() - began


def second_task(case: Case) -> float:
    """From its submission until it is told that another task holds its worker, and lives."""
    ref = begin(case, "")
    ready(case)
    began = time.time()
    took = raised(begin(case, ""), faultguard.DuplicateWorkerError) - began
    stop(ref)
    return took


def unseen_holder(case: Case) -> float:
    """From the moment at which it is stopped to the first batch of the task that waits for its worker, and cannot see its host."""
    decorate: Any = ray.remote(num_cpus=1, resources={WORK: 1}, max_retries=0)
    hold = decorate(holds)
    hold.remote(WORKER, case.trace, is_far=True)
    pid = ready(case)
    wait_until(_heard_at, WAIT_S)
    began = signalled(signal.SIGSTOP)(pid)
    ray.get(hold.remote(WORKER, case.trace, is_far=False), timeout=WAIT_S)
    os.kill(pid, signal.SIGKILL)
    return float(after(case, 1)["time"] - began)


# --- nodes ----------------------------------------------------------------------------------------------------------


def node_left(case: Case, leave: Callable[[Any], None], kind: str = "", *, first: Callable[[], None] | None = None) -> float:
    """From the moment at which its node is left, or lost, to the first batch on another one."""
    old = case.node

    def act(_: int) -> float:
        case.nodes.add()
        began = time.time()
        leave(old)
        return began

    took = resumed(case, kind, first=first, act=act)
    _remove(case, old)
    return took


def node_drained(case: Case) -> float:
    """From the drain to the first batch on another node."""
    return node_left(case, lambda node: case.nodes.drain(node, DEADLINE_S))


def node_gone_in_a_batch(case: Case) -> float:
    """From the going of a drained node, in the middle of a batch, to the first batch on another one."""

    def drain() -> None:
        case.nodes.drain(case.node, DEADLINE_S)
        wait_until(lambda: _newest(case).ended is not None, WAIT_S)

    return node_left(case, case.nodes.remove, "long batch", first=drain)


def drained_again(case: Case) -> float:
    """From the second drain before the first batch is done, which is one too many, until the caller knows."""
    ref = begin(case, "asks", "asks", at=0, max_failures=1)
    drained = [case.node]
    for number in (1, 2):
        ready(case, number)
        node = case.nodes.add()
        began = time.time()
        case.nodes.drain(drained[-1], DEADLINE_S)
        drained.append(node)
    took = raised(ref, faultguard.MaxFailuresExceeded) - began
    _remove(case, *drained[:-1])
    return took


def elsewhere(case: Case, *then: str, act: Act | None = None) -> float:
    """From the second failure in a row on one node to the first batch on another one; or on, from what is done to that attempt there."""
    home, there = case.node, []

    def add() -> None:
        node = case.nodes.add(1)
        wait_until(lambda: ray.get(sees.options(scheduling_strategy=on(home)).remote(node.node_id), timeout=WAIT_S), WAIT_S)
        wait_until(lambda: free_cpus(node) == 1, WAIT_S)
        there.append(node)
        case.trace.note("go", "")

    took = resumed(case, "exception when told", "exception", *then, first=add, act=act)
    (node,) = there
    end = _newest(case)
    last = end.failures[-1].node_id if then else end.owner.node_id
    make_sure(last == node.node_id, "the attempt was not on another node")
    _remove(case, node)
    return took


def result_lost(case: Case, size: int) -> float:
    """From asking for the result of a finished task, which was lost with its node, to having it."""
    task: Any = faultguard.recoverable(ray.remote(num_cpus=1, resources={WORK: 1})(makes))
    ref, old = task.remote(WORKER, size), case.node
    make_sure(ray.wait([ref], timeout=WAIT_S, fetch_local=False)[0], "the task did not end")
    case.nodes.add()
    case.nodes.remove(old)
    wait_until(lambda: old.node_id not in alive(), WAIT_S)
    began = time.time()
    ray.get(ref, timeout=WAIT_S)
    return time.time() - began


def _remove(case: Case, *nodes: Any) -> None:
    """Those that are still there."""
    for node in nodes:
        if node in case.nodes.workers:
            case.nodes.remove(node)


def _newest(case: Case) -> Any:
    """The newest record of the worker."""
    return records(case.run, steps.__name__, WORKER)[-1]


# --- the manager ----------------------------------------------------------------------------------------------------


def heard_again(case: Case, harm: Callable[[], float], *, node: Any = None) -> float:
    """From the end of the harm to the manager until one hears the worker again, which runs on that node."""
    ref = begin(case, "", node=node)
    ready(case)
    wait_until(_heard_at, WAIT_S)
    began = harm()
    wait_until(lambda: _heard_at() > began, WAIT_S)
    took = time.time() - began
    stop(ref)
    return took


def manager_killed(case: Case) -> float:
    """From its death."""

    def kill() -> float:
        end_manager()
        return time.time()

    return heard_again(case, kill)


def manager_frozen(case: Case, seconds: float) -> float:
    """From its thaw after so long."""

    def freeze() -> float:
        pid = manager_pid()
        os.kill(pid, signal.SIGSTOP)
        time.sleep(seconds)
        return signalled(signal.SIGCONT)(pid)

    return heard_again(case, freeze)


def node_of_manager_killed(case: Case) -> float:
    """From its death with its node, where it is because it cannot be on the head; the worker is on another one."""
    home = case.node
    _manager.end(current_settings())  # the one on the head
    with mock.patch.object(_manager, "HEAD_NODE", WORK):  # which the head has not
        pid = manager_pid()
    make_sure(node_of_manager() == home.node_id, "the manager is somewhere else")
    node = case.nodes.add()

    def kill() -> float:
        case.nodes.remove(home)
        wait_until(lambda: is_gone(pid), WAIT_S)  # it outlives its raylet for a moment, and hears
        return time.time()

    return heard_again(case, kill, node=node)


def _heard_at() -> float:
    """When the manager last heard the worker; 0: never, or there is no manager. None is made for this: that is the worker's affair."""
    settings = current_settings()
    manager = _manager.find(settings)
    try:
        beats = ray.get(manager.live_workers.remote(), timeout=WAIT_S) if manager is not None else []
    except ray.exceptions.RayError:
        _manager.forget(settings)
        return 0.0
    return next((float(beat["last_heartbeat"]) for beat in beats if beat["worker_id"] == WORKER), 0.0)
