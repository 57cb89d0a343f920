"""Workers in methods of actors: `with` in synchronous ones, `async with` in asynchronous ones. Whoever calls decides about retries."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import os
import signal
import time
from typing import TYPE_CHECKING, Any

import pytest
import ray

import faultguard
from tests.tasks import Trace, assert_never_behind, die, expected, records, result, told, wait_until, wait_until_heard, work

if TYPE_CHECKING:
    from ray import ObjectRef

    from tests.conftest import StartRun

pytestmark = pytest.mark.ray

WAIT_S = 90


def get(refs: Any) -> Any:
    """`ray.get` with a bound."""
    return ray.get(refs, timeout=WAIT_S)


def make_loader() -> Any:
    """A class made here travels by value; workers cannot import this file."""

    class Loader:
        """A synchronous actor."""

        def load(self, worker_id: str, n: int, trace: Trace, deaths: dict[int, str]) -> Any:
            """Go through the batches."""
            with faultguard.checkpointed(worker_id, every=1) as ckpt:
                work(ckpt, n, trace, deaths)
                return result(ckpt)

    return ray.remote(max_restarts=1, num_cpus=0.5)(Loader)


def test_checkpointed_in_an_actor(run: faultguard.Run, trace: Trace) -> None:
    """In a method of an actor the next call goes on, after an exception and after the actor died and was restarted."""
    actor = make_loader().remote()
    deaths = {3: "exception", 6: "SIGKILL"}
    with pytest.raises(ValueError, match="planned"):
        get(actor.load.remote("w", 9, trace, deaths))
    with pytest.raises(ray.exceptions.RayActorError):
        get(actor.load.remote("w", 9, trace, deaths))
    wait_until(lambda: _error_of(actor.load.remote("w", 9, trace, deaths)) is None)
    begins = trace.begins("w")
    assert begins[:2] == [0, 3]  # an exception flushes
    assert 4 <= begins[2] <= 6  # SIGKILL does not; batch 3 was waited for
    assert_never_behind(trace, "w")
    ray.kill(actor)


def _error_of(ref: ObjectRef[Any]) -> Exception | None:
    try:
        assert get(ref) == expected(9)
    except ray.exceptions.RayActorError as error:
        return error
    return None


# --- asynchronous ---------------------------------------------------------------------------------------------------


def make_async_loader() -> Any:
    """As above."""

    class AsyncLoader:
        """An asynchronous actor, whose calls run beside one another."""

        async def load(self, worker_id: str, n: int, trace: Trace, deaths: dict[int, str]) -> Any:
            """Go through the batches, giving way to the other calls in each."""
            async with faultguard.checkpointed(worker_id, every=1) as ckpt:
                assert faultguard.current() is ckpt
                for batch in faultguard.batches(range(n)):
                    trace.note("batch", worker_id, attempt=ckpt.attempt, batch=batch)
                    await asyncio.sleep(0.02)
                    assert faultguard.current() is ckpt
                    if deaths.get(batch) and batch not in {note["batch"] for note in trace.notes("death", worker_id)}:
                        trace.note("death", worker_id, batch=batch)
                        die(deaths[batch])
                    ckpt.state["sum"] = ckpt.state.get("sum", 0) + batch
                return ckpt.attempt, ckpt.state["sum"]

        async def hold(self, worker_id: str, trace: Trace) -> None:
            """Hold a worker until it is cancelled."""
            async with faultguard.checkpointed(worker_id, every=1) as ckpt:
                for batch in ckpt.batches(range(10**6)):
                    trace.note("batch", worker_id, attempt=ckpt.attempt, batch=batch)
                    await asyncio.sleep(0.02)

        async def beside(self) -> str:
            """The worker of this call: none."""
            with contextlib.suppress(faultguard.UsageError):
                return faultguard.current().worker_id
            return "none"

    return ray.remote(max_restarts=1, num_cpus=0.5)(AsyncLoader)


def test_calls_of_an_async_actor_run_beside_one_another(run: faultguard.Run, trace: Trace) -> None:
    """Each call has its own worker, and goes on by itself: one that fails disturbs no other."""
    actor = make_async_loader().remote()
    refs = [actor.load.remote(f"w{index}", 20, trace, {7: "exception"} if index == 1 else {}) for index in range(3)]
    wait_until(lambda: len({note["worker"] for note in trace.notes("batch")}) == 3)
    assert get(actor.beside.remote()) == "none"
    with pytest.raises(ValueError, match="planned"):
        get(refs[1])
    assert get(actor.load.remote("w1", 20, trace, {})) == (2, 190)
    assert get([refs[0], refs[2]]) == [(1, 190)] * 2
    assert trace.begins("w1") == [0, 7]
    workers = [note["worker"] for note in trace.notes("batch")]
    assert workers[: workers.index("w0") + 20] != ["w0"] * 20
    ray.kill(actor)


def test_an_async_actor_that_died(run: faultguard.Run, trace: Trace) -> None:
    """After SIGKILL and the restart of the actor, the next call goes on."""
    actor = make_async_loader().remote()
    with pytest.raises(ray.exceptions.RayActorError):
        get(actor.load.remote("w", 20, trace, {9: "SIGKILL"}))
    wait_until(lambda: _alive(actor))
    assert get(actor.load.remote("w", 20, trace, {})) == (2, 190)
    assert 1 <= trace.begins("w")[1] <= 9
    ray.kill(actor)


def _alive(actor: Any) -> bool:
    try:
        return bool(get(actor.beside.remote()))
    except ray.exceptions.RayActorError:
        return False


def test_waiting_for_a_holder_holds_up_no_other_call(start_run: StartRun, trace: Trace) -> None:
    """While one call waits for a worker that somebody else holds, the other calls of its actor go on."""
    start_run(heartbeat_interval=0.5, heartbeat_timeout=3)
    holder, waiter = make_async_loader().remote(), make_async_loader().remote()
    held = holder.hold.remote("w", trace)
    wait_until(lambda: trace.notes("batch"))
    waiting = waiter.hold.remote("w", trace)
    for _ in range(5):
        assert get(waiter.beside.remote()) == "none"
    ready, _ = ray.wait([waiting], timeout=0)
    assert not ready
    with pytest.raises(faultguard.DuplicateWorkerError, match=r"'w' of task .* is held by another live task"):
        get(waiting)
    ray.cancel(held)
    with pytest.raises(ray.exceptions.TaskCancelledError):
        get(held)
    ray.kill(holder)
    ray.kill(waiter)


def test_cancel_of_a_call_of_an_async_actor(run: faultguard.Run, trace: Trace) -> None:
    """It stays a cancel, is noted as one, and the worker is free at once, also for another process."""
    actor = make_async_loader().remote()
    ref = actor.hold.remote("w", trace)
    wait_until(lambda: any(note["batch"] == 3 for note in trace.notes("batch")))
    ray.cancel(ref)
    with pytest.raises(ray.exceptions.TaskCancelledError):
        get(ref)
    assert get(actor.beside.remote()) == "none"
    task = next(worker.task for worker in faultguard.workers())
    wait_until(lambda: records(run, task, "w")[-1].ended is not None)
    ended = records(run, task, "w")[-1].ended
    assert ended is not None
    assert (ended.cause, ended.charged) == ("cancelled", False)
    again = actor.hold.remote("w", trace)
    wait_until(lambda: len(trace.begins("w")) == 2)
    assert trace.begins("w")[1] >= 3
    ray.cancel(again)
    with pytest.raises(ray.exceptions.TaskCancelledError):
        get(again)
    ray.kill(actor)


# --- threaded, and what all three do when they are told to stop -------------------------------------------------------


def make_holder(kind: str, **options: Any) -> Any:  # noqa: C901 - workers cannot import this file, so all is in here
    """An actor of a kind, with methods that hold a worker in a loop until the test says "go"."""

    def die_once(worker_id: str, trace: Trace) -> None:
        if trace.notes("dies", worker_id) and not trace.notes("died"):
            trace.note("died", worker_id)
            os._exit(1)

    class Holder:
        def hold(self, worker_id: str, trace: Trace, every: int = 1) -> int:
            """In a loop by hand."""
            with faultguard.checkpointed(worker_id, every=every) as ckpt:
                for batch in range(ckpt.current_batch, 10**6):
                    trace.note("batch", worker_id, attempt=ckpt.attempt, batch=batch)
                    if trace.notes("go"):
                        break
                    time.sleep(0.02)
                    ckpt.advance()
            die_once(worker_id, trace)
            return ckpt.attempt

        def pid(self) -> int:
            return os.getpid()

    class AsyncHolder:
        async def hold(self, worker_id: str, trace: Trace, every: int = 1) -> int:
            """The same, giving way to the other calls in each batch."""
            async with faultguard.checkpointed(worker_id, every=every) as ckpt:
                for batch in range(ckpt.current_batch, 10**6):
                    trace.note("batch", worker_id, attempt=ckpt.attempt, batch=batch)
                    if trace.notes("go"):
                        break
                    await asyncio.sleep(0.02)
                    ckpt.advance()
            die_once(worker_id, trace)
            return ckpt.attempt

        async def pid(self) -> int:
            return os.getpid()

    made: Any = ray.remote(AsyncHolder if kind == "async" else Holder)
    return made.options(num_cpus=0.5, max_concurrency={"sync": 1, "threaded": 2, "async": 10}[kind], **options).remote()


KINDS = ["sync", "threaded", "async"]


def begun(trace: Trace, worker: str, attempt: int = 1, batch: int = 5) -> bool:
    """Whether an attempt has come to a batch."""
    return any(note["attempt"] == attempt and note["batch"] >= batch for note in trace.notes("batch", worker))


def newest(run: faultguard.Run, worker: str) -> Any:
    """The last record of a worker of these actors."""
    task = next(state.task for state in faultguard.workers() if state.worker_id == worker)
    return records(run, task, worker)[-1]


def test_methods_of_a_threaded_actor_run_beside_one_another(run: faultguard.Run, trace: Trace) -> None:
    """Each has the worker, the context and the loop of its thread."""
    actor = make_loader().options(max_concurrency=2).remote()
    refs = [actor.load.remote(f"w{index}", 40, trace, {7: "exception"} if index else {}) for index in range(2)]
    with pytest.raises(ValueError, match="planned"):
        get(refs[1])
    assert get([refs[0], actor.load.remote("w1", 40, trace, {7: "exception"})]) == [expected(40)] * 2
    assert trace.begins("w0") == [0]
    assert trace.begins("w1") == [0, 7]
    ray.kill(actor)


HELD_S = 15  # a probe would end a process alone after some seven seconds


def make_pair() -> Any:
    """A threaded actor whose methods have a `stall_timeout`."""

    class Pair:
        """When the test says "go", one of two workers holds the interpreter, and with it the other one."""

        def work(self, worker_id: str, trace: Trace) -> int:
            """In a loop, until that is over."""
            with faultguard.checkpointed(worker_id, every=1, stall_timeout=1) as ckpt:
                for batch in ckpt.batches(range(10**6)):
                    trace.note("batch", worker_id, attempt=ckpt.attempt, batch=batch)
                    if worker_id == "holds" and trace.notes("go"):
                        ctypes.PyDLL(None).sleep(HELD_S)
                        trace.note("over", worker_id)
                    if trace.notes("over"):
                        break
                    time.sleep(0.05)
                return ckpt.attempt

    made: Any = ray.remote(Pair)
    return made.options(num_cpus=0.5, max_concurrency=2).remote()


def test_a_process_that_hosts_others_is_not_ended_from_outside(start_run: StartRun, trace: Trace, ray_cluster: str) -> None:
    """One of two workers holds the interpreter past every limit: the other one has done nothing, and would be lost with it."""
    start_run(heartbeat_interval=0.2, heartbeat_timeout=1.5)
    actor = make_pair()
    refs = [actor.work.remote("holds", trace), actor.work.remote("beside", trace)]
    wait_until_heard("holds")
    wait_until_heard("beside")
    trace.note("go", "test")
    assert get(refs) == [1, 1]
    assert len({note["pid"] for note in trace.notes("batch")}) == 1
    assert told(ray_cluster, "'Pair.work/holds' attempt 1 stands still")
    ray.kill(actor)


@pytest.mark.parametrize("kind", KINDS)
def test_a_call_that_ray_repeats_resumes(run: faultguard.Run, trace: Trace, kind: str) -> None:
    """With `max_restarts` and `max_task_retries` the call goes on by itself after the death of its actor, as a later attempt."""
    actor = make_holder(kind, max_restarts=1, max_task_retries=1)
    ref = actor.hold.remote("w", trace)
    wait_until(lambda: begun(trace, "w"), WAIT_S)
    os.kill(trace.notes("batch")[0]["pid"], signal.SIGKILL)
    wait_until(lambda: begun(trace, "w", attempt=2), WAIT_S)
    trace.note("go", "test")
    assert get(ref) == 2
    assert trace.begins("w")[1] > 0
    claims = [
        record.owner for record in records(run, "AsyncHolder.hold" if kind == "async" else "Holder.hold", "w") if record.kind == "claim"
    ]
    assert [(owner.task_id, owner.ray_attempt) for owner in claims] == [(claims[0].task_id, attempt) for attempt in (0, 1)]
    ray.kill(actor)


@pytest.mark.parametrize("kind", KINDS)
def test_a_call_that_ray_repeats_after_its_block_is_not_refused(run: faultguard.Run, trace: Trace, kind: str) -> None:
    """The process dies between the end of the block and the reply: the call that comes again has no second block."""
    actor = make_holder(kind, max_restarts=1, max_task_retries=1)
    trace.note("go", "test")
    trace.note("dies", "w")
    get(actor.hold.remote("w", trace))
    assert len(trace.notes("died")) == 1
    ray.kill(actor)


def test_ray_warns_nobody_of_what_we_do_beside_an_event_loop(run: faultguard.Run, trace: Trace, ray_cluster: str) -> None:
    """Heartbeats and their answers are waited for on a thread of ours, in the actor as in the manager."""
    actor = make_holder("async")
    ref = actor.hold.remote("quiet", trace)
    wait_until_heard("quiet")
    heard = len(trace.notes("batch", "quiet"))
    wait_until(lambda: len(trace.notes("batch", "quiet")) > heard + 100)  # some beats later
    trace.note("go", "test")
    assert get(ref) == 1
    assert told(ray_cluster, "blocking ray.get") == []
    ray.kill(actor)


def test_sigterm_flushes_in_a_synchronous_actor(run: faultguard.Run, trace: Trace) -> None:
    """What was done is saved, though nothing was due; the next call goes on there."""
    actor = make_holder("sync", max_restarts=1)
    ref = actor.hold.remote("w", trace, 10**6)
    wait_until(lambda: begun(trace, "w"), WAIT_S)
    os.kill(trace.notes("batch")[0]["pid"], signal.SIGTERM)
    with pytest.raises(ray.exceptions.RayActorError):
        get(ref)
    record = newest(run, "w")
    assert (record.ended.cause, record.ended.charged) == ("terminated", False)
    assert record.snapshot.batch > 0
    ray.kill(actor)


@pytest.mark.parametrize("kind", ["threaded", "async"])
def test_sigterm_does_nothing_in_other_actors(run: faultguard.Run, trace: Trace, kind: str) -> None:
    """Ray ignores it there: nothing is flushed, and the work goes on."""
    actor = make_holder(kind)
    ref = actor.hold.remote("w", trace, 10**6)
    wait_until(lambda: begun(trace, "w"), WAIT_S)
    os.kill(get(actor.pid.remote()), signal.SIGTERM)
    then = trace.notes("batch")[-1]["batch"]
    wait_until(lambda: begun(trace, "w", batch=then + 50), WAIT_S)
    record = newest(run, "w")
    assert (record.kind, record.snapshot, record.ended) in [("claim", None, None), ("save", None, None)]
    trace.note("go", "test")
    assert get(ref) == 1
    ray.kill(actor)


@pytest.mark.parametrize("kind", KINDS)
def test_cancel_of_a_worker_in_an_actor(start_run: StartRun, trace: Trace, kind: str) -> None:
    """`faultguard.cancel` ends the call, saves its last boundary, and leaves the actor and its other calls alone."""
    run = start_run(heartbeat_interval=0.2)
    actor = make_holder(kind)
    ref = actor.hold.remote("w", trace, 10**6)
    beside = actor.hold.remote("beside", trace, 10**6) if kind != "sync" else None
    wait_until(lambda: begun(trace, "w") and (beside is None or begun(trace, "beside")), WAIT_S)
    faultguard.cancel("w")
    with pytest.raises(ray.exceptions.TaskCancelledError):
        get(ref)
    record = newest(run, "w")
    assert (record.ended.cause, record.ended.charged) == ("cancelled", False)
    assert record.snapshot.batch >= 5
    assert next(state.status for state in faultguard.workers() if state.worker_id == "w") == "cancelled"
    trace.note("go", "test")
    if beside is not None:
        assert get(beside) == 1
    assert get(actor.hold.remote("w", trace)) == 2
    assert {note["pid"] for note in trace.notes("batch")} == {get(actor.pid.remote())}
    ray.kill(actor)
