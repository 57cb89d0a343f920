"""What a task leaves behind: its result and its record, which runs nothing, and no actor."""

from __future__ import annotations

import base64
import contextlib
import os
import pickle
import time
import weakref
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import msgspec
import pytest
import ray

import faultguard
from faultguard import _attempt, _codec, _ray
from faultguard._core.names import record_name
from faultguard._core.records import FailureRecord, Mark, Owner, Record, Snapshot, decode_record, encode_record
from faultguard._handle import Checkpoint
from faultguard._manager import manager_name
from faultguard._sentences import say_resumed
from faultguard._session import current_settings
from faultguard._settings import Settings
from faultguard.storage import open_store, store_id
from tests.attempts import Died
from tests.tasks import NOWAIT, assert_whole, records, wait_until

if TYPE_CHECKING:
    from collections.abc import Callable

WAIT_S = 90
INLINE_LIMIT = 100 * 1024  # of Ray: a larger result goes to the object store


def get(refs: Any) -> Any:
    """`ray.get` with a bound."""
    return ray.get(refs, timeout=WAIT_S)


# --- results --------------------------------------------------------------------------------------------------------


@faultguard.recoverable(max_failures=1, backoff=NOWAIT)
@ray.remote(num_returns=2)
def two_results(n: int) -> tuple[int, list[int]]:
    """Gives two objects, after a failure."""
    ckpt = faultguard.current()
    for batch in ckpt.batches(range(n)):
        if batch == 3 and ckpt.attempt == 1:
            raise ValueError("planned")
    return ckpt.attempt, [n]


@pytest.mark.ray
def test_two_results(run: faultguard.Run) -> None:
    """With num_returns=2 there are two references, as in Ray, also after a retry."""
    two: Any = two_results.remote(6)  # Ray's types know one reference
    attempt, values = two
    assert get([attempt, values]) == [2, [6]]


@faultguard.recoverable
@ray.remote
def who(n: int) -> tuple[str, Any, int]:
    """Says who it is, and with which resources."""
    for _ in faultguard.batches(range(n)):
        pass
    context: Any = ray.get_runtime_context()
    return faultguard.current().worker_id, context.get_assigned_resources().get("CPU"), os.getpid()


@pytest.mark.ray
def test_options(run: faultguard.Run) -> None:
    """`.options()` takes the id of the worker and Ray's own options, and leaves the function as it was."""
    assert get(who.options(worker_id="part/7", num_cpus=2).remote(3))[:2] == ("part/7", 2.0)
    assert get(who.options(worker_id="a").options(num_cpus=3).remote(3))[:2] == ("a", 3.0)
    assert records(run, "who", "part%2F7")[-1].kind == "end"
    assert get(who.remote(3))[0] not in {"part/7", "a"}


@faultguard.recoverable
@ray.remote
def large_result(size: int) -> bytes:
    """Gives many bytes."""
    for _ in faultguard.batches(range(2)):
        pass
    return bytes(size)


@pytest.mark.ray
@pytest.mark.parametrize("size", [INLINE_LIMIT * 2, _attempt.MAX_RESULT_BYTES * 2])
def test_large_results(run: faultguard.Run, size: int) -> None:
    """A result that Ray keeps in its object store arrives as it is; one over 1 MiB is not recorded."""
    assert get(large_result.options(worker_id="w").remote(size)) == bytes(size)
    outcome = records(run, "large_result", "w")[-1].outcome
    assert outcome is not None
    assert (outcome.status, outcome.recorded) == ("completed", size < _attempt.MAX_RESULT_BYTES)


@faultguard.recoverable
@ray.remote
def works_until(path: str) -> str:
    """Works, without a boundary, until a file is there."""
    wait_until(Path(path).exists, WAIT_S)
    return "result"


@pytest.mark.ray
def test_the_claim_of_a_worker_with_an_id_becomes_durable_while_it_works(run: faultguard.Run, tmp_path: Path) -> None:
    """What is over in a moment leaves its claim and its end; what is not, makes a record that is durable in between."""
    there, absent = tmp_path / "there", tmp_path / "absent"
    there.touch()
    assert get(works_until.options(worker_id="short").remote(str(there))) == "result"
    assert [record.kind for record in records(run, "works_until", "short")] == ["claim", "end"]
    working = works_until.options(worker_id="long").remote(str(absent))
    wait_until(lambda: len(records(run, "works_until", "long")) > 1, WAIT_S)
    absent.touch()
    assert get(working) == "result"
    first, durable, end = records(run, "works_until", "long")
    assert [(record.kind, record.token, record.snapshot) for record in (first, durable)] == [("claim", 1, None), ("save", 1, None)]
    assert end.kind == "end"


# --- results that are asked for again, without Ray -------------------------------------------------------------------


class Opaque:
    """A value that the codec does not know."""


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    """A run without a cluster."""
    store = open_store(str(tmp_path / "store"))
    return Settings(run="run", checkpoint_dir=store.url, store_id=store_id(store), job_id="01000000")


def execute(settings: Settings, function: Callable[[], Any], *, worker_id: str = "w", ray_attempt: int = 0, max_failures: int = 0) -> Any:
    """Run a function as an attempt of one and the same task of Ray's."""
    identity = _ray.Identity("01000000", "node", "task-1", ray_attempt, "count", "count")
    options = _attempt.TaskOptions(name="count", max_failures=max_failures, every=1, backoff=NOWAIT)
    return _attempt.run_task(settings, identity, options, worker_id, _attempt.Work(function, repeatable=True))


def test_a_recorded_result_is_not_computed_again(settings: Settings) -> None:
    """A task that Ray runs once more, because its result was lost, gives the result from the record."""
    assert execute(settings, lambda: {"rows": (1, 2)}) == {"rows": (1, 2)}
    assert execute(settings, lambda: pytest.fail("ran again"), ray_attempt=1) == {"rows": (1, 2)}


def test_a_result_that_cannot_be_recorded(settings: Settings, caplog: pytest.LogCaptureFixture) -> None:
    """It is returned, with a warning; asked for again, the function is called with its loops done and its state restored."""
    seen: list[int] = []

    def count() -> tuple[Opaque, int]:
        ckpt = faultguard.current()
        for batch in ckpt.batches(range(4)):
            seen.append(batch)
            ckpt.state["sum"] = ckpt.state.get("sum", 0) + batch
        return Opaque(), ckpt.state["sum"]

    assert execute(settings, count)[1] == 6
    (warning,) = caplog.records
    assert "has a return value that cannot be recorded" in warning.getMessage()
    assert vars(warning)["event"] == "faultguard.result_not_recorded"
    assert_whole(warning)
    assert execute(settings, count, ray_attempt=1)[1] == 6
    assert seen == [0, 1, 2, 3]


@pytest.mark.parametrize("way", ["return", "break", "in a block", "in a nested block", "kept"])
def test_a_result_from_within_a_loop_that_cannot_be_recorded(settings: Settings, way: str) -> None:
    """What left its loop early goes through the rest of it again: with the loop done, it would never come to its `return`."""

    def find() -> tuple[Opaque, int] | None:
        ckpt = faultguard.current()
        blocks = {"in a block": 1, "in a nested block": 2}.get(way, 0)
        with contextlib.ExitStack() as stack:
            for _ in range(blocks):
                stack.enter_context(faultguard.checkpointed())
            batches = ckpt.batches(range(9))
            if way == "kept":
                kept.append(batches)
            found = None
            for batch in batches:
                ckpt.state["sum"] = ckpt.state.get("sum", 0) + batch
                if batch == 5:
                    found = Opaque(), ckpt.state["sum"]
                    if way == "break":
                        break
                    return found
        return found

    kept: list[Any] = []

    first, again = (execute(settings, find, ray_attempt=attempt) for attempt in range(2))
    assert first is not None
    assert again is not None
    assert first[1] == again[1] == 15


def test_a_result_from_a_block_within_a_batch_that_cannot_be_recorded(settings: Settings) -> None:
    """The loop in the block, and the one around it, go on from where both were before they were left."""

    def find() -> tuple[Opaque, int] | None:
        ckpt = faultguard.current()
        for epoch in ckpt.batches(range(4), name="epochs"):
            with faultguard.checkpointed():
                for step in ckpt.batches(range(3)):
                    ckpt.state["sum"] = ckpt.state.get("sum", 0) + step
                    if (epoch, step) == (2, 1):
                        return Opaque(), ckpt.state["sum"]
        return None

    first, again = (execute(settings, find, ray_attempt=attempt) for attempt in range(2))
    assert first is not None
    assert again is not None
    assert first[1] == again[1] == 7


def test_a_damaged_record_costs_its_batches_only(settings: Settings, caplog: pytest.LogCaptureFixture) -> None:
    """The next attempt says which record is damaged and goes on from the one before it; the result is exact."""
    begins: list[int] = []

    def count(*, dies: bool) -> int:
        ckpt = faultguard.current()
        begins.append(ckpt.current_batch)
        for batch in ckpt.batches(range(9)):
            if dies and batch == 5:
                raise Died
            ckpt.state["sum"] = ckpt.state.get("sum", 0) + batch
            ckpt.advance(wait=True)
        return int(ckpt.state["sum"])

    with pytest.raises(Died):
        execute(settings, lambda: count(dies=True), max_failures=3)
    folder = Path(settings.checkpoint_dir) / "run" / "count" / "w"
    newest = sorted(folder.glob("*.json"))[-2:]  # the last save, and the note with which it left
    for path in newest:
        path.write_bytes(path.read_bytes().replace(b'"sum":10', b'"sum":11'))
    caplog.clear()
    assert execute(settings, lambda: count(dies=False), max_failures=3, ray_attempt=1) == sum(range(9))
    assert begins == [0, 4]
    warning = wait_until(lambda: next((r for r in caplog.records if vars(r).get("event") == "faultguard.record_damaged"), None))
    assert vars(warning)["damaged"] == [int(path.stem) for path in reversed(newest)]
    assert "found damaged checkpoint records" in warning.getMessage()
    assert_whole(warning)


def test_a_retry_does_not_meet_what_the_failed_attempt_held(settings: Settings) -> None:
    """Its locals are gone, however large, before the next attempt of the process begins."""
    held: list[weakref.ref[Opaque]] = []
    alive: list[bool] = []

    def fail_once() -> None:
        for _ in faultguard.batches(range(2)):
            alive.extend(reference() is not None for reference in held)
            if not held:
                large = Opaque()
                held.append(weakref.ref(large))
                raise ValueError("planned")

    execute(settings, fail_once, max_failures=1)
    assert alive
    assert not any(alive)


def test_a_second_block_of_one_id_is_refused(settings: Settings) -> None:
    """In one attempt it would yield nothing; in a retry the block that was finished is passed over."""
    seen: list[tuple[str, int]] = []
    failed: list[int] = []

    def block(worker_id: str) -> None:
        with faultguard.checkpointed(worker_id) as ckpt:
            seen.extend((worker_id, batch) for batch in ckpt.batches(range(2)))

    def blocks() -> None:
        block("one")
        if not failed:
            failed.append(1)
            raise ValueError("planned")
        block("two")
        block("two")

    with pytest.raises(faultguard.UsageError, match=r"a second block checkpointed\('two'\) is refused: this attempt has ended"):
        execute(settings, blocks, max_failures=1)
    assert seen == [("one", 0), ("one", 1), ("two", 0), ("two", 1)]


def test_a_failure_for_good_is_a_warning(settings: Settings, caplog: pytest.LogCaptureFixture) -> None:
    """One line, ids first, with everything that a machine may ask for."""

    def fail() -> None:
        for batch in faultguard.batches(range(4)):
            if batch == 2:
                raise ValueError("planned")

    with pytest.raises(ValueError, match="planned"):
        execute(settings, fail)
    (warning,) = caplog.records
    text = "faultguard: 'count/w' attempt 1 failed at batch 2 with ValueError('planned'); max_failures=0 is used up."
    assert warning.getMessage() == text
    fields = {
        name: value for name, value in vars(warning).items() if name in {"event", "run", "task", "worker", "attempt", "batch", "cause"}
    }
    assert fields == {
        "event": "faultguard.attempt_failed",
        "run": "run",
        "task": "count",
        "worker": "w",
        "attempt": 1,
        "batch": 2,
        "cause": "exception",
    }


@pytest.mark.parametrize(("error", "said"), [(KeyError("x"), "KeyError('x')"), (KeyError("x", 1), "KeyError(\"('x', 1)\")")], ids=str)
def test_a_key_error_is_not_quoted_twice(settings: Settings, error: Exception, said: str) -> None:
    """Its text is its key in quotes."""

    def fail() -> None:
        raise error

    with pytest.raises(KeyError):
        execute(settings, fail)
    with pytest.raises(faultguard.MaxFailuresExceeded) as caught:
        execute(settings, fail, ray_attempt=1)
    assert [failure.message for failure in caught.value.failures] == [said]


def test_a_failure_in_a_nested_loop_says_where(settings: Settings, caplog: pytest.LogCaptureFixture) -> None:
    """Both the failure and the line about the resume name the batch of the inner loop, and where the outer one is."""
    failed: list[int] = []

    def nested() -> tuple[int, ...]:
        ckpt = faultguard.current()
        for epoch in ckpt.batches(range(3), name="epochs"):
            for step in ckpt.batches(range(4), name="steps"):
                if (epoch, step) == (1, 2) and not failed:
                    failed.append(1)
                    raise ValueError("planned")
        (failure,) = ckpt.failures
        return (failure.batch, *failure.position)

    assert execute(settings, nested, max_failures=1) == (2, 1, 2)
    (warning,) = caplog.records
    text = "attempt 2 of 2 resumes at batch 2 of 4 (position 1, 2): attempt 1 failed there"
    assert text in warning.getMessage()


def test_of_a_crash_it_is_said_how_far_the_attempt_had_come_at_least(caplog: pytest.LogCaptureFixture) -> None:
    """Where it ended nobody knows, unless that batch was recorded before it began."""
    handle: Any = Checkpoint.in_memory(task="count", worker_id="w")
    for pinned, end in ((False, "ended by crash (pid 7), at that batch or a later one."), (True, "failed there by crash (pid 7).")):
        held: Any = SimpleNamespace(attempt=2, charged=1, failures=(FailureRecord("crash", 1, 0, pid=7, pinned=pinned),))
        say_resumed(handle, held, 2)
        assert f"'count/w' attempt 2 of 3 resumes at batch 0: attempt 1 {end}" in caplog.records[-1].getMessage()


def test_a_recorded_failure_is_given_again(settings: Settings) -> None:
    """A task that failed for good does not run again for the same task of Ray's: it gives the failures that were recorded."""

    def fail() -> None:
        raise ValueError("planned")

    with pytest.raises(ValueError, match="planned"):
        execute(settings, fail)
    with pytest.raises(faultguard.MaxFailuresExceeded) as caught:
        execute(settings, lambda: pytest.fail("ran again"), ray_attempt=1)
    assert [failure.message for failure in caught.value.failures] == ["ValueError('planned')"]


# --- what others put into the store ----------------------------------------------------------------------------------


class Bomb:
    """Unpickled, it leaves a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


def planted(newest: Record, number: int, state: bytes) -> bytes:
    """A whole and valid record that holds a state of somebody's own."""
    snapshot = Snapshot(state=msgspec.Raw(state), loops=((Mark(name="batches", done=2, length=4),),))
    owner = Owner(writer="somebody", task_id="task-1", ray_attempt=0)
    return encode_record(
        Record(
            kind="save",
            number=number,
            task=newest.task,
            worker_id=newest.worker_id,
            owner=owner,
            saved_at=time.time(),
            life=1,
            attempt=newest.attempt,
            token=newest.token,
            snapshot=snapshot,
        )
    )


@pytest.mark.parametrize("how", ["whole file", "state", *sorted(_codec._READERS)])
def test_a_planted_pickle_is_never_run(settings: Settings, tmp_path: Path, how: str) -> None:
    """Whatever is planted in the newest record, as a file, as a state, or under any tag: loading it runs nothing."""
    mark = tmp_path / "mark"
    bomb = pickle.dumps(Bomb(mark))
    assert not mark.exists()
    text = base64.b64encode(bomb).decode()

    def dies() -> None:
        for batch in faultguard.batches(range(4)):
            if batch == 2:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        execute(settings, dies)
    folder = Path(settings.checkpoint_dir) / settings.log_prefix("count", "w")
    newest = decode_record(max(folder.iterdir()).read_bytes(), len(list(folder.iterdir())))
    assert newest is not None
    number = newest.number + 1
    state = {"whole file": b"", "state": msgspec.json.encode(text)}.get(how)
    if state is None:
        state = msgspec.json.encode({"sum": {"$fg": how, "v": text}})
    (folder / record_name(number)).write_bytes(planted(newest, number, state) if state else bomb)

    seen: list[int] = []

    def look() -> None:
        seen.extend(faultguard.batches(range(4)))

    try:
        execute(settings, look, ray_attempt=1)
    except (faultguard.FaultguardError, TypeError) as error:  # refused, or set aside: both are no execution
        assert how != "whole file", error  # noqa: PT017 - either way is right
    else:
        assert seen == [2, 3]
    assert not mark.exists()
    pickle.loads(bomb)
    assert mark.exists()  # it would have worked


# --- nothing remains -------------------------------------------------------------------------------------------------


@faultguard.recoverable
@ray.remote
def long_enough_to_beat(seconds: float) -> None:
    """Outlasts the first heartbeat."""
    for _ in faultguard.batches(range(10)):
        time.sleep(seconds / 10)


@pytest.mark.ray
def test_no_actor_outlives_the_run(run: faultguard.Run) -> None:
    """The manager that a longer task has started ends with the run, not with the driver."""
    wait_until(lambda: not named_actors())  # of the runs of other tests
    get(long_enough_to_beat.remote(1.5))
    assert [actor["name"] for actor in named_actors()] == [manager_name(current_settings())]
    faultguard.shutdown()
    wait_until(lambda: not named_actors())


def named_actors() -> list[dict[str, str]]:
    """The actors of this library."""
    actors: list[dict[str, str]] = ray.util.list_named_actors(all_namespaces=True)
    return [actor for actor in actors if actor["namespace"] == _ray.NAMESPACE]
