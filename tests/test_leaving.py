"""Ends that are nobody's failure: a cancel, a node that is drained; and an end by Ray's memory monitor, which is one."""

from __future__ import annotations

import os
import signal
import time
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import pytest
import ray

import faultguard
from faultguard._cancels import MAX_LOOK_S
from faultguard._ray import has_died
from tests.conftest import CPUS, temporary_dir
from tests.tasks import NOWAIT, Trace, expected, manager_pid, records, result, wait_until

if TYPE_CHECKING:
    from pathlib import Path

    from tests.conftest import StartRun

pytestmark = pytest.mark.ray
WAIT_S = 90
INTERVAL_S = 0.2
STUCK = 3
HOARD_BYTES, CHUNK_BYTES = 3 << 30, 1 << 24


@faultguard.recoverable(every=1, backoff=NOWAIT)
@ray.remote(num_cpus=0.5)
def sticks(worker_id: str, trace: Trace) -> Any:
    """Stays in batch 3 until the test says that it may go on."""
    ckpt = faultguard.current()
    for batch in ckpt.batches(range(6)):
        trace.note("batch", worker_id, attempt=ckpt.attempt, batch=batch)
        while batch == STUCK and not trace.notes("go"):
            time.sleep(0.01)
        ckpt.state["sum"] = ckpt.state.get("sum", 0) + batch
        ckpt.state.setdefault("seen", []).append(batch)
    return result(ckpt)


def is_stuck(trace: Trace, *workers: str) -> bool:
    """Whether they have all come to the batch at which they wait."""
    return {note["worker"] for note in trace.notes("batch") if note["batch"] == STUCK} >= set(workers)


def newest(run: faultguard.Run, worker: str, task: str = "sticks") -> Any:
    """The last record of a worker."""
    return records(run, task, worker)[-1]


def status(worker: str) -> str:
    """How it is shown."""
    return next(state.status for state in faultguard.workers() if state.worker_id == worker)


def assert_cancelled(run: faultguard.Run, worker: str) -> None:
    """It is, for good, at its last boundary, at no cost."""
    state = next(state for state in faultguard.workers() if state.worker_id == worker)
    assert (state.status, state.current_batch, state.failure_count) == ("cancelled", STUCK, 0)
    note = newest(run, worker).ended
    assert (note.cause, note.charged) == ("cancelled", False)


def test_cancel_of_one_worker(start_run: StartRun, trace: Trace) -> None:
    """Interrupted in its batch; the other one goes on; submitted again it resumes, and is not cancelled again."""
    run = start_run(heartbeat_interval=INTERVAL_S)
    refs = {worker: sticks.remote(worker, trace) for worker in ("one", "two")}
    wait_until(lambda: is_stuck(trace, "one", "two"))
    faultguard.cancel("one")
    with pytest.raises(ray.exceptions.TaskCancelledError):
        ray.get(refs["one"], timeout=WAIT_S)
    assert_cancelled(run, "one")
    trace.note("go", "test", batch=0)
    assert ray.get(refs["two"], timeout=WAIT_S) == expected(6)
    assert ray.get(sticks.remote("one", trace), timeout=WAIT_S) == expected(6)
    assert [note["batch"] for note in trace.notes("batch", "one")] == [0, 1, 2, 3, 3, 4, 5]


def test_cancel_of_all_takes_those_that_wait(start_run: StartRun, trace: Trace) -> None:
    """Those that run are interrupted; those in the queue end as they begin; the manager may die in between."""
    run = start_run(heartbeat_interval=INTERVAL_S)
    refs = [sticks.remote(f"w{index}", trace) for index in range(12)]
    wait_until(lambda: is_stuck(trace, "w0", "w1"))
    with pytest.raises(ray.exceptions.GetTimeoutError):
        ray.get(refs[0], timeout=1)  # it has beaten: there is a manager
    faultguard.cancel()
    os.kill(manager_pid(), signal.SIGKILL)
    for ref in refs:
        with pytest.raises(ray.exceptions.TaskCancelledError):
            ray.get(ref, timeout=WAIT_S)
    assert_cancelled(run, "w0")
    trace.note("go", "test", batch=0)
    assert ray.get(sticks.remote("w11", trace), timeout=WAIT_S) == expected(6)


def test_cancel_where_the_manager_has_died_for_good(start_run: StartRun, trace: Trace) -> None:
    """Somebody has killed it, and this driver knows it: there is another one."""
    start_run(heartbeat_interval=INTERVAL_S)
    first = faultguard.manager()
    ref = sticks.remote("w", trace)
    wait_until(lambda: is_stuck(trace, "w"))
    ray.kill(first, no_restart=True)
    wait_until(lambda: has_died(first))
    faultguard.cancel("w")
    with pytest.raises(ray.exceptions.TaskCancelledError):
        ray.get(ref, timeout=WAIT_S)
    assert faultguard.manager() != first


@faultguard.recoverable(backoff=NOWAIT)
@ray.remote(num_cpus=CPUS, max_calls=1)
def brief(worker_id: str, trace: Trace, deaths: int) -> str:
    """Takes all CPUs, in a process of its own, and is over before it would beat for the first time."""
    trace.note("ran", worker_id, attempt=faultguard.current().attempt)
    while deaths and not trace.notes("go"):
        time.sleep(0.01)
    if deaths:
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(0.2)
    return worker_id


@pytest.mark.parametrize("by_id", [True, False])
def test_a_short_task_that_waits_is_cancelled(start_run: StartRun, trace: Trace, by_id: bool) -> None:
    """As it begins, in a process that has heard of no cancel; what is submitted after that runs, under the same id, too."""
    run = start_run(heartbeat_interval=INTERVAL_S)
    holder = sticks.remote("holder", trace)
    wait_until(lambda: is_stuck(trace, "holder"))
    refs = {worker: brief.remote(worker, trace, 0) for worker in ("b0", "b1", "b2")}
    time.sleep(MAX_LOOK_S)  # the holder's process may run the first of them, and must not take its look at the holder's begin for new
    for worker in refs if by_id else [None]:
        faultguard.cancel(worker)
    later = [brief.remote(worker, trace, 0) for worker in ("b1", "b3")]
    if by_id:
        trace.note("go", "test", batch=0)
        assert ray.get(holder, timeout=WAIT_S) == expected(6)
    else:
        refs["holder"] = holder
    for ref in refs.values():
        with pytest.raises(ray.exceptions.TaskCancelledError):
            ray.get(ref, timeout=WAIT_S)
    assert ray.get(later, timeout=WAIT_S) == ["b1", "b3"]
    assert sorted(note["worker"] for note in trace.notes("ran")) == ["b1", "b3"]
    assert records(run, "brief", "b0") == []


def test_a_task_that_waits_to_be_run_again_is_cancelled(start_run: StartRun, trace: Trace) -> None:
    """Its process has died, and meanwhile it was cancelled: that is what its log says, too."""
    run = start_run(heartbeat_interval=60.0, heartbeat_timeout=120.0)
    ref = brief.remote("b", trace, 1)
    wait_until(lambda: trace.notes("ran"))
    faultguard.cancel("b")
    trace.note("go", "test")
    with pytest.raises(ray.exceptions.TaskCancelledError):
        ray.get(ref, timeout=WAIT_S)
    assert [note["attempt"] for note in trace.notes("ran")] == [1]
    assert status("b") == "cancelled"
    assert (newest(run, "b", "brief").ended.cause, newest(run, "b", "brief").charged) == ("cancelled", 1)


@pytest.mark.parametrize("force", [False, True])
def test_cancel_by_ray(start_run: StartRun, trace: Trace, force: bool) -> None:
    """It is shown as what it is, also where the process was given no time to say so; submitted again, it resumes, at no cost."""
    run = start_run(heartbeat_interval=INTERVAL_S)
    ref = sticks.remote("w", trace)
    wait_until(lambda: is_stuck(trace, "w"))
    wait_until(lambda: newest(run, "w").snapshot is not None and newest(run, "w").snapshot.batch == STUCK)
    ray.cancel(ref, force=force)
    with pytest.raises((ray.exceptions.TaskCancelledError, ray.exceptions.WorkerCrashedError)):
        ray.get(ref, timeout=WAIT_S)
    wait_until(lambda: status("w") == "cancelled")
    trace.note("go", "test", batch=0)
    assert ray.get(sticks.remote("w", trace), timeout=WAIT_S) == expected(6)
    assert [note["batch"] for note in trace.notes("batch", "w")] == [0, 1, 2, 3, 3, 4, 5]
    assert (newest(run, "w").charged, newest(run, "w").failures) == (0, ())


@faultguard.recoverable(every=timedelta(hours=1), backoff=NOWAIT)
@ray.remote(num_cpus=0.5)
def sticks_unsaved(worker_id: str, trace: Trace) -> int:
    """Stays in batch 3 of its first attempt, with nothing saved."""
    ckpt = faultguard.current()
    for batch in ckpt.batches(range(6)):
        trace.note("batch", worker_id, attempt=ckpt.attempt, batch=batch)
        time.sleep(0.1)  # a snapshot may take 0.3 % of the time
        while batch == STUCK and ckpt.attempt == 1:
            time.sleep(0.01)
    return ckpt.attempt


@pytest.mark.parametrize("by", ["ray.cancel", "faultguard.cancel", "SIGTERM"])
def test_the_last_boundary_is_saved(start_run: StartRun, trace: Trace, by: str) -> None:
    """Though nothing was due for an hour; only by force nobody is asked, and what is durable is what there is."""
    run = start_run(heartbeat_interval=INTERVAL_S)
    ref = sticks_unsaved.remote("w", trace)
    wait_until(lambda: is_stuck(trace, "w"))
    assert newest(run, "w", "sticks_unsaved").snapshot is None
    if by == "SIGTERM":
        os.kill(trace.notes("batch")[0]["pid"], signal.SIGTERM)
    else:
        ray.cancel(ref) if by == "ray.cancel" else faultguard.cancel("w")
        with pytest.raises(ray.exceptions.TaskCancelledError):
            ray.get(ref, timeout=WAIT_S)
        assert newest(run, "w", "sticks_unsaved").snapshot.batch > 0
        assert status("w") == "cancelled"
        ref = sticks_unsaved.remote("w", trace)
    assert ray.get(ref, timeout=WAIT_S) == 2
    assert 0 < trace.begins("w")[1] <= STUCK  # the last one, unless the machine had no time for its snapshot
    assert newest(run, "w", "sticks_unsaved").charged == 0


@ray.remote(num_cpus=0.5, max_retries=3)
def plain(worker_id: str, trace: Trace) -> None:
    """A block in a task that is not decorated."""
    with faultguard.checkpointed(worker_id, every=1) as ckpt:
        for batch in ckpt.batches(range(1000)):
            trace.note("batch", worker_id, attempt=ckpt.attempt, batch=batch)
            time.sleep(0.05)


def test_cancel_of_a_block(start_run: StartRun, trace: Trace) -> None:
    """In a task that is not decorated it is as final."""
    run = start_run(heartbeat_interval=INTERVAL_S)
    ref = plain.remote("block", trace)
    wait_until(lambda: trace.notes("batch"))
    faultguard.cancel("block")
    with pytest.raises(ray.exceptions.TaskCancelledError):
        ray.get(ref, timeout=WAIT_S)
    assert newest(run, "block", "plain").ended.cause == "cancelled"
    assert {note["attempt"] for note in trace.notes("batch")} == {1}


def test_cancel_needs_a_run(ray_cluster: str) -> None:
    """Without one there is nothing that could be meant."""
    with pytest.raises(faultguard.UsageError, match="there is no run"):
        faultguard.cancel()
    with pytest.raises(faultguard.UsageError, match="worker_id"):
        faultguard.cancel(3)  # type: ignore[arg-type]


@faultguard.recoverable(every=1, backoff=NOWAIT, max_failures=2)
@ray.remote(num_cpus=0.5)
def hoards(worker_id: str, trace: Trace) -> Any:
    """Takes more memory than there is, in batch 3 of its first attempt."""
    ckpt = faultguard.current()
    hoard: list[bytes] = []
    for batch in ckpt.batches(range(6)):
        trace.note("batch", worker_id, attempt=ckpt.attempt, batch=batch)
        ckpt.state["sum"] = ckpt.state.get("sum", 0) + batch
        ckpt.state.setdefault("seen", []).append(batch)
        ckpt.advance(wait=True)
        while batch == STUCK and ckpt.attempt == 1:
            if len(hoard) < HOARD_BYTES // CHUNK_BYTES:
                hoard.append(b"x" * CHUNK_BYTES)
            time.sleep(0.001)
    return result(ckpt)


def test_an_end_by_the_memory_monitor_is_named(trace: Trace, tmp_path: Path) -> None:
    """The history says what the process died of; it is charged as any death."""
    ray.shutdown()  # of the tests before: this one takes a cluster of its own
    memory: Any = ray._private.utils
    used, total = memory.get_used_memory(), memory.get_system_memory()
    threshold = (used + HOARD_BYTES // 2) / total
    config = {"memory_usage_threshold": threshold, "memory_monitor_refresh_ms": 100}
    with (
        temporary_dir() as directory,
        ray.init(address="local", _temp_dir=directory, num_cpus=1, include_dashboard=False, log_to_driver=False, _system_config=config),
        faultguard.init(checkpoint_dir=tmp_path / "checkpoints") as run,
    ):
        assert ray.get(hoards.remote("w", trace), timeout=WAIT_S) == expected(6)
        end = newest(run, "w", "hoards")
        assert [(failure.cause, failure.batch) for failure in end.failures] == [("oom", 4)]
        assert end.charged == 1
