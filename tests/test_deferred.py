"""Tasks that are over in a moment leave nothing; those that are not are claimed as if they had been from the beginning."""

from __future__ import annotations

import os
import signal
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import ray
from msgspec import structs

import faultguard
from faultguard import _attempt, _ray, _soon
from faultguard._core.names import record_number
from faultguard._core.records import decode_record
from faultguard._deferred import Deferred
from faultguard._log import StoredLog
from faultguard._settings import Settings
from faultguard.storage import open_store, store_id
from tests.tasks import NOWAIT, Trace, expected, hold_the_interpreter, result, wait_until

if TYPE_CHECKING:
    from collections.abc import Callable

    from faultguard._core.records import Record
    from tests.conftest import StartRun

DEFER_S = 0.1
LONG_S = 0.4
WAIT_S = 90
TASK = "0a1b"
FIRST = _ray.Identity("01000000", "node", TASK, 0, "count", "count")


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    """A run without a cluster, whose tasks are claimed after a moment."""
    store = open_store(str(tmp_path / "store"))
    return Settings(run="run", checkpoint_dir=store.url, store_id=store_id(store), job_id="01000000", defer=DEFER_S, heartbeat_timeout=1.0)


def execute(
    settings: Settings, function: Callable[[], Any], *, identity: _ray.Identity = FIRST, worker_id: str = TASK, **options: Any
) -> Any:
    """Run a function as an attempt of a task of Ray's, in this process."""
    given = _attempt.TaskOptions(**{"name": "count", "max_failures": 3, "backoff": NOWAIT, **options})
    return _attempt.run_task(settings, identity, given, worker_id, _attempt.Work(function, repeatable=True))


def kinds(settings: Settings) -> list[str]:
    """The records of the worker."""
    folder = Path(settings.checkpoint_dir) / settings.log_prefix("count", TASK)
    found = (decode_record(path.read_bytes(), record_number(path.name) or 0) for path in sorted(folder.glob("*.json")))
    return [record.kind for record in found if record is not None]


def newest(settings: Settings) -> Record:
    """The last one."""
    record = StoredLog(open_store(settings.checkpoint_dir), settings.log_prefix("count", TASK)).newest()
    assert record is not None
    return record


def files(settings: Settings) -> list[str]:
    """What is in the store, but for what makes it one."""
    return [path.name for path in Path(settings.checkpoint_dir).rglob("*.json") if path.name != "faultguard-store.json"]


def loop(n: int = 3, seconds: float = 0.0) -> Any:
    """A few batches."""
    ckpt = faultguard.current()
    for batch in ckpt.batches(range(n)):
        ckpt.state["sum"] = ckpt.state.get("sum", 0) + batch
        ckpt.state.setdefault("seen", []).append(batch)
        time.sleep(seconds)
    return result(ckpt)


# --- what costs nothing ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("function", [lambda: None, loop, lambda: [0.5] * 1000], ids=["nothing", "loop", "list"])
def test_a_task_that_is_over_in_a_moment_leaves_nothing(settings: Settings, function: Callable[[], Any]) -> None:
    """No record, no folder, and no thread but the one that looks, which ends itself."""
    execute(settings, function)
    assert files(settings) == []
    ours = {thread.name for thread in threading.enumerate() if thread.name.startswith("faultguard")}
    assert ours <= {_soon.NAME, "faultguard-beater", "faultguard-writer", "faultguard-watcher"}
    wait_until(lambda: not any(thread.name == _soon.NAME for thread in threading.enumerate()))


def test_it_is_over_also_for_the_thread_that_looks(settings: Settings) -> None:
    """What has ended is not claimed afterwards."""
    execute(settings, loop)
    time.sleep(3 * DEFER_S)
    assert files(settings) == []


def test_an_end_that_is_cut_once_more_is_charged(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    """A second signal comes as the first one is noted, after the worker was claimed beside: its last word counts like any failure."""

    def cut(self: Any, error: BaseException) -> None:
        raise KeyboardInterrupt

    def body() -> None:
        assert faultguard.current().token == 1
        raise SystemExit

    monkeypatch.setattr(_attempt._Task, "_leave", cut)
    with pytest.raises(KeyboardInterrupt):
        execute(settings, body)
    record = newest(settings)
    assert record.ended is not None
    assert (record.ended.cause, record.charged, [failure.cause for failure in record.failures]) == ("left", 1, ["left"])


def test_a_state_that_cannot_be_saved_is_told_all_the_same(settings: Settings) -> None:
    """On the first day, not when the task takes longer one day."""

    def unsaveable() -> None:
        faultguard.current().state["lock"] = threading.Lock()

    with pytest.raises(faultguard.CheckpointNotSerializableError):
        execute(settings, unsaveable)


# --- what claims ----------------------------------------------------------------------------------------------------


def test_what_works_for_longer_is_claimed(settings: Settings) -> None:
    """While it works; with what it had done until then."""
    seen: list[list[str]] = []

    def long() -> Any:
        value = loop(8, LONG_S / 4)
        seen.append(kinds(settings))
        return value

    assert execute(settings, long) == expected(8)
    assert seen[0][0] == "claim"
    assert "save" in seen[0]
    assert (newest(settings).kind, newest(settings).attempt, newest(settings).charged) == ("end", 1, 0)


@pytest.mark.parametrize(
    "ask",
    [
        lambda ckpt: ckpt.token,
        lambda ckpt: ckpt.idempotency_key(),
        lambda ckpt: ckpt.check(),
        lambda ckpt: ckpt.save(wait=True),
        lambda ckpt: ckpt.advance(wait=True),
    ],
    ids=["token", "idempotency_key", "check", "save", "advance"],
)
def test_what_only_a_claim_gives_claims_first(settings: Settings, ask: Callable[[faultguard.Checkpoint], Any]) -> None:
    """A token of an attempt that nobody knows would fence nothing."""

    def asks() -> int:
        ckpt = faultguard.current()
        ask(ckpt)
        assert kinds(settings)[0] == "claim"
        return ckpt.token

    assert execute(settings, asks) == 1
    assert kinds(settings)[-1] == "end"


def test_a_save_that_was_asked_for_claims(settings: Settings) -> None:
    """`every=1` means that each batch is saved."""
    assert execute(settings, loop, every=1) == expected(3)
    assert kinds(settings)[-1] == "end"


def test_a_failure_claims(settings: Settings) -> None:
    """It goes on from the last boundary, and the history says so."""

    def fails_once() -> Any:
        ckpt = faultguard.current()
        for batch in ckpt.batches(range(4)):
            if batch == 2 and ckpt.attempt == 1:
                raise ValueError("planned")
            ckpt.state.setdefault("seen", []).append(batch)
        return ckpt.state["seen"], ckpt.attempt

    assert execute(settings, fails_once) == ([0, 1, 2, 3], 2)
    (failure,) = newest(settings).failures
    assert (failure.cause, failure.batch, newest(settings).charged) == ("exception", 2, 1)


def test_a_failure_for_good_is_recorded(settings: Settings) -> None:
    """Also of a task that fails at once."""

    def fails() -> None:
        raise ValueError("planned")

    with pytest.raises(ValueError, match="planned"):
        execute(settings, fails, max_failures=0)
    assert (newest(settings).kind, newest(settings).charged) == ("end", 1)


@pytest.mark.parametrize("value", [b"x" * 100_000, object], ids=["large", "unknown"])
def test_a_result_that_can_be_lost_is_recorded(settings: Settings, value: Any) -> None:
    """What Ray keeps in its object store may have to be made again: then the task must be known to have completed."""
    execute(settings, lambda: value)
    assert kinds(settings) == ["claim", "end"]


def test_a_timeout_claims_first(settings: Settings) -> None:
    """Or a process that hangs with the interpreter in its first moments would be missed by nobody."""
    execute(settings, lambda: None, stall_timeout_s=5.0)
    assert kinds(settings) == ["claim", "end"]
    other = replace(FIRST, task_id="0a1c")

    def block() -> None:
        with faultguard.checkpointed(stall_timeout=5):
            pass

    execute(settings, block, identity=other, worker_id="0a1c")
    log = StoredLog(open_store(settings.checkpoint_dir), settings.log_prefix("count", "0a1c"))
    assert len(list(log.numbers())) == 2


# --- races ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ray_attempt", [1, 5])
def test_an_attempt_that_finds_nothing_counts_one_failure(settings: Settings, ray_attempt: int) -> None:
    """However often Ray has started the task: nobody knows what the attempts before it have done."""
    found = execute(settings, lambda: faultguard.current().attempt, identity=replace(FIRST, attempt=ray_attempt))
    assert found == 2
    assert (newest(settings).charged, [failure.cause for failure in newest(settings).failures]) == (1, ["crash"])


def test_an_attempt_that_finds_nothing_may_have_no_budget(settings: Settings) -> None:
    """With `max_failures=0` there is no second one."""
    with pytest.raises(faultguard.MaxFailuresExceeded) as caught:
        execute(settings, lambda: pytest.fail("it runs"), identity=replace(FIRST, attempt=1), max_failures=0)
    assert [failure.cause for failure in caught.value.failures] == ["crash"]


def superseded_by(settings: Settings, then: Callable[[], Any]) -> Any:
    """A first attempt in which the second one begins and ends, before the first is claimed."""
    done = []

    def first() -> Any:
        ckpt = faultguard.current()
        if ckpt.attempt == 1:
            again = replace(FIRST, attempt=1)
            thread = threading.Thread(target=lambda: done.append(execute(settings, loop, identity=again)))
            thread.start()
            thread.join(WAIT_S)
        return then()

    try:
        return execute(structs.replace(settings, defer=60.0) if then is not slow else settings, first)
    finally:
        assert done == [expected(3)]


def slow() -> Any:
    """Long enough for the thread that looks."""
    return loop(20, DEFER_S)


def test_a_late_claim_gives_way_to_a_later_attempt(settings: Settings) -> None:
    """A process that thaws finds out when it is claimed: by the thread that looks, or when it asks itself."""
    with pytest.raises(faultguard.SupersededError):
        superseded_by(settings, slow)
    assert (newest(settings).attempt, newest(settings).charged) == (2, 1)


def test_a_late_claim_for_a_token_gives_way(settings: Settings) -> None:
    """Nobody gets a token that fences nothing."""
    with pytest.raises(faultguard.SupersededError):
        superseded_by(settings, lambda: faultguard.current().token)


def test_two_tasks_with_one_id(settings: Settings) -> None:
    """Somebody has given the id of this task to another one: the late claim must not take its worker."""
    other = replace(FIRST, task_id="another")

    def first() -> Any:
        execute(settings, loop, identity=other, worker_id=TASK)
        return faultguard.current().token

    with pytest.raises(faultguard.DuplicateWorkerError):
        execute(settings, first)
    assert newest(settings).owner.task_id == "another"


def test_a_store_in_trouble_is_tried_again(settings: Settings, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """While the work goes on; when the store is back the worker is claimed, and nothing is lost."""
    store, away = Path(settings.checkpoint_dir), tmp_path / "away"

    def work() -> Any:
        store.rename(away)
        wait_until(lambda: any(vars(record).get("event") == "faultguard.store_failed" for record in caplog.records))
        away.rename(store)
        value = loop(4, 0.01)
        wait_until(lambda: kinds(settings))
        return value

    assert execute(settings, work) == expected(4)
    assert kinds(settings)[-1] == "end"


def test_a_store_that_stays_away_is_told(settings: Settings, tmp_path: Path) -> None:
    """At a boundary, after the patience."""
    store = Path(settings.checkpoint_dir)

    def work() -> Any:
        store.rename(tmp_path / "away")
        return loop(10_000, 0.01)

    with pytest.raises(faultguard.CheckpointStoreError):
        execute(structs.replace(settings, store_patience=0.2), work)


def test_what_has_failed_without_a_store_is_not_claimed_when_that_is_back(settings: Settings, tmp_path: Path) -> None:
    """Its task is over: the worker would be held by a process that does not work on it."""
    store, away = Path(settings.checkpoint_dir), tmp_path / "away"

    def work() -> None:
        store.rename(away)
        raise ValueError("planned")

    with pytest.raises(faultguard.CheckpointStoreError):
        execute(structs.replace(settings, store_patience=0.1), work, max_failures=0)
    away.rename(store)
    time.sleep(3 * DEFER_S)
    assert files(settings) == []
    assert not _soon.waits()


def test_without_a_thread_it_is_claimed_first(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that can start no thread now must not work unseen."""

    class Full(threading.Thread):
        def start(self) -> None:
            raise RuntimeError("can't start new thread")

    wait_until(lambda: _soon._soon.thread is None)
    monkeypatch.setattr(threading, "Thread", Full)
    assert not _soon.is_running()
    monkeypatch.undo()
    monkeypatch.setattr(_soon, "is_running", lambda: False)
    execute(settings, loop)
    assert (kinds(settings)[0], kinds(settings)[-1]) == ("claim", "end")


@pytest.mark.parametrize(("cut", "charged"), [(SystemExit, 1), (KeyboardInterrupt, 0)], ids=["left", "cancelled"])
def test_a_late_claim_that_is_cut(settings: Settings, monkeypatch: pytest.MonkeyPatch, cut: type[BaseException], charged: int) -> None:
    """Its body has run, so it counts, but for a cancel: or an attempt that always ends so would be started for ever."""

    def cuts(*_: object) -> None:
        raise cut

    with monkeypatch.context() as patch:
        patch.setattr(Deferred, "take_over", cuts)
        with pytest.raises(cut):
            execute(settings, lambda: faultguard.current().token)
    assert kinds(settings)[0] == "claim"
    found = execute(settings, lambda: len(faultguard.current().failures), identity=replace(FIRST, attempt=1))
    assert (found, newest(settings).charged) == (charged, charged)


def test_it_may_be_looked_at_at_once(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    """The thread that looks may do so as soon as it knows of the task: then everything that it needs for a claim is there."""
    add = _soon.add

    def add_and_look(due: Any) -> None:
        add(due)
        due.tick(time.monotonic() + 1.0)

    monkeypatch.setattr(_soon, "add", add_and_look)
    assert execute(settings, loop) == expected(3)
    assert kinds(settings)[-1] == "end"


def test_the_thread_begins_again(settings: Settings) -> None:
    """It has ended itself, or is just about to: the next task must not be missed."""
    for _ in range(3):
        execute(settings, loop)
        wait_until(lambda: _soon._soon.thread is None)
    test_what_works_for_longer_is_claimed(settings)


# --- through Ray ----------------------------------------------------------------------------------------------------


@faultguard.recoverable(max_failures=2, backoff=NOWAIT)
@ray.remote(num_cpus=0.5)
def dies_at_once(trace: Trace, how: str, times: int) -> int:
    """Before anybody can have claimed it."""
    trace.note("runs", "w")
    if len(trace.notes("runs")) <= times:
        if how == "with the interpreter":
            hold_the_interpreter(3 * DEFER_S)
        os.kill(os.getpid(), signal.SIGKILL)
    return faultguard.current().attempt


@pytest.mark.ray
@pytest.mark.parametrize("how", ["at once", "with the interpreter"])
def test_deaths_before_the_claim_are_counted(start_run: StartRun, trace: Trace, how: str) -> None:
    """Once for all that were not recorded; the budget is kept."""
    run = start_run()
    assert ray.get(dies_at_once.remote(trace, how, 2), timeout=WAIT_S) == 3
    (log,) = (Path(run.checkpoint_dir) / run.name / "dies_at_once").iterdir()
    assert len(list(log.iterdir())) >= 2
    with pytest.raises(faultguard.MaxFailuresExceeded):
        ray.get(dies_at_once.remote(trace, how, 99), timeout=WAIT_S)
    assert len(trace.notes("runs")) == 3 + 3


@faultguard.recoverable
@ray.remote(num_cpus=0.5)
def nothing() -> None:
    """A task."""


@pytest.mark.ray
def test_short_tasks_leave_nothing_on_disk(start_run: StartRun, monkeypatch: pytest.MonkeyPatch) -> None:
    """Many of them; on a machine that is busy a short one may take longer than the usual tenth of a second."""
    monkeypatch.setenv("FAULTGUARD_DEFER", str(WAIT_S))
    run = start_run()
    assert ray.get([nothing.remote() for _ in range(200)], timeout=WAIT_S) == [None] * 200
    assert list(Path(run.checkpoint_dir).glob("*/nothing/*")) == []
