"""Batches that always fail, failures that come with progress, and processes that are not trusted: with real processes of Ray."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import time
from typing import TYPE_CHECKING, Any

import pytest
import ray

import faultguard
from faultguard import _attempt, _ray, _worker
from faultguard._core.budget import MAX_QUARANTINED, batch_of
from faultguard._settings import Settings
from faultguard.storage import open_store, store_id
from tests.tasks import NOWAIT, Trace, assert_whole, die, hang, records

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from faultguard._core.records import Record
    from tests.conftest import StartRun

pytestmark = pytest.mark.ray
ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # type: ignore[no-untyped-call] # workers cannot import a test
WAIT_S = 120
N = 8


def result(poison: set[int]) -> tuple[int, list[int], tuple[tuple[int, ...], ...]]:
    """What must come of a loop over N batches when these are passed over."""
    rest = [batch for batch in range(N) if batch not in poison]
    return sum(rest), rest, tuple((batch,) for batch in sorted(poison))


def work(worker_id: str, trace: Trace, poison: dict[int, str]) -> Any:
    """A loop that carries a sum and a list, and fails at some batches each time, with its state half updated."""
    ckpt = faultguard.current()
    for batch in ckpt.batches(range(N)):
        trace.note("batch", worker_id, attempt=ckpt.attempt, batch=batch)
        ckpt.state["sum"] = ckpt.state.get("sum", 0) + batch
        if batch in poison:
            fail(poison[batch], ckpt.attempt)
        ckpt.state.setdefault("seen", []).append(batch)
    return ckpt.state["sum"], ckpt.state["seen"], ckpt.quarantined


def fail(kind: str, attempt: int) -> None:
    """Raise, die, or hang where no exception arrives."""
    if kind == "hang":
        time.sleep(90)
    die(("exception", "SIGKILL")[attempt % 2] if kind == "both" else kind)


@faultguard.recoverable(max_failures=3, on_poison="skip", backoff=NOWAIT)
@ray.remote(num_cpus=0.5)
def picky(worker_id: str, trace: Trace, poison: dict[int, str]) -> Any:
    """Skips what it fails at."""
    return work(worker_id, trace, poison)


def newest(run: faultguard.Run, task: str, worker: str = "w") -> Record:
    """The last record of a worker."""
    return records(run, task, worker)[-1]


def attempts_at(trace: Trace, batch: int) -> int:
    """How often a batch began."""
    return sum(note["batch"] == batch for note in trace.notes("batch"))


# --- in this process, before there is a cluster ---------------------------------------------------------------------


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    """A run without a cluster."""
    store = open_store(str(tmp_path / "store"))
    return Settings(run="run", checkpoint_dir=store.url, store_id=store_id(store), job_id="01000000")


def execute(settings: Settings, function: Callable[[], Any], **options: Any) -> Any:
    """Run a function as an attempt of a task of Ray's, in this process."""
    identity = _ray.Identity("01000000", "node", "task", 0, "count", "count")
    given = _attempt.TaskOptions(name="count", max_failures=3, backoff=faultguard.Backoff(initial=0), **options)
    return _attempt.run_task(settings, identity, given, "w", _attempt.Work(function, repeatable=True))


def test_each_quarantine_is_said_once(settings: Settings, caplog: pytest.LogCaptureFixture) -> None:
    """Which batch, of which loops, why, and what that means."""

    def count() -> tuple[tuple[int, ...], ...]:
        ckpt = faultguard.current()
        for epoch in ckpt.batches(range(2), name="epochs"):
            for step in ckpt.batches(range(3), name="steps"):
                if (epoch, step) == (1, 2):
                    raise OSError("bad shard")
        return ckpt.quarantined

    assert execute(settings, count, on_poison="skip") == ((1, 2),)
    (told,) = [record for record in caplog.records if vars(record)["event"] == "faultguard.batch_quarantined"]
    assert told.levelno == logging.WARNING
    assert told.getMessage() == (
        "faultguard: 'count/w' quarantines batch 2 (position 1, 2) of 'epochs', 'steps': three attempts failed there, attempt 3 with "
        "OSError('bad shard'). It is passed over from now on, and its failures are given back."
    )
    assert_whole(told)


def test_at_most_a_hundred_are_quarantined(settings: Settings) -> None:
    """Where so much fails, it is not the batches."""

    def count() -> None:
        for batch in faultguard.batches(range(1000)):
            raise ValueError(batch)

    with pytest.raises(faultguard.MaxFailuresExceeded) as caught:
        execute(settings, count, on_poison="skip")
    assert caught.value.poison_batch == MAX_QUARANTINED
    assert "max_failures=3 allows 4 attempts without progress or quarantine" in str(caught.value)


@pytest.mark.parametrize("swallowed", [False, True])
def test_a_batch_that_stalls_three_times_is_quarantined(settings: Settings, swallowed: bool) -> None:
    """The stall came out of it, at whatever instruction it arrived; or was swallowed there, and raised again at its end."""

    def count() -> list[int]:
        ckpt = faultguard.current()
        for batch in ckpt.batches(range(4)):
            with contextlib.suppress(faultguard.StalledError if swallowed else KeyError):
                if batch == 2:
                    hang()
            ckpt.state.setdefault("seen", []).append(batch)
        return [*ckpt.state["seen"], *ckpt.quarantined]

    assert execute(settings, count, on_poison="skip", stall_timeout_s=0.4) == [0, 1, 3, (2,)]


@pytest.mark.parametrize(
    ("error", "its"),
    [
        (ValueError(), True),
        (faultguard.StalledError(), True),
        (faultguard.CheckpointStoreError(), False),
        (SystemExit(1), False),
        (KeyboardInterrupt(), False),
    ],
    ids=lambda case: type(case).__name__,
)
def test_whose_doing_an_exception_can_be(error: BaseException, its: bool) -> None:
    """Trouble of the store, an exit, or a cancel that comes out of a batch is not the batch's."""
    assert _worker.is_of_the_batch(error) is its


def test_a_predicate_that_fails_trusts_no_process(
    settings: Settings, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """What it raises does not take the place of the exception that it was asked about."""

    class LeftError(BaseException):
        """In the place of the end of this process."""

    def leave() -> None:
        raise LeftError

    def count() -> None:
        raise ValueError("planned")

    def doubt(error: BaseException) -> bool:
        raise KeyError(str(error))

    monkeypatch.setattr(_attempt, "leave_process", leave)
    with pytest.raises(LeftError):
        execute(settings, count, fresh_process_on=doubt)
    (told,) = [record for record in caplog.records if vars(record)["event"] == "faultguard.predicate_failed"]
    assert told.getMessage().endswith("when asked about ValueError; a new process goes on")


# --- quarantine -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("poison", "times"),
    [({2: "exception", 5: "exception"}, 3), ({2: "exception", 5: "SIGKILL"}, 4), ({4: "both"}, 4)],
    ids=str,
)
def test_poison_is_skipped_and_the_rest_is_exact(
    run: faultguard.Run, trace: Trace, capfd: pytest.CaptureFixture[str], poison: dict[int, str], times: int
) -> None:
    """Two such batches are survived with `max_failures=3`, because their failures are given back; everybody can see which."""
    assert ray.get(picky.remote("w", trace, poison), timeout=WAIT_S) == result(set(poison))
    assert max(attempts_at(trace, batch) for batch in poison) <= times
    end = newest(run, "picky")
    assert [batch_of(place) for place in end.quarantined] == [(("batches", batch),) for batch in sorted(poison)]
    assert end.charged == 0
    assert len(end.failures) >= 3 * len(poison)
    (state,) = faultguard.workers()
    assert (state.quarantined, state.failure_count) == (tuple((batch,) for batch in sorted(poison)), 0)
    faultguard.shutdown()
    assert f"{len(end.failures)} failures survived, {len(poison)} quarantined, 0 not completed." in capfd.readouterr().err


def test_a_named_run_knows_what_was_skipped(start_run: StartRun, trace: Trace, capfd: pytest.CaptureFixture[str]) -> None:
    """Its last line counts it; started again, the outcome is that of the record, in which it stands."""
    start_run(run="nightly")
    assert ray.get(picky.remote("w", trace, {2: "exception"}), timeout=WAIT_S) == result({2})
    faultguard.shutdown()
    assert "closed: 1 completed (0 from the record), 3 failures survived, 1 quarantined." in capfd.readouterr().err
    start_run(run="nightly", resume="always")
    assert ray.get(picky.remote("w", trace, {2: "exception"}), timeout=WAIT_S) == result({2})
    assert (attempts_at(trace, 2), attempts_at(trace, 3)) == (3, 1)


@faultguard.recoverable(max_failures=3, on_poison="skip", backoff=NOWAIT, stall_timeout=0.3)
@ray.remote(num_cpus=0.5)
def stalls(worker_id: str, trace: Trace, poison: dict[int, str]) -> Any:
    """With a limit for each batch."""
    return work(worker_id, trace, poison)


def test_a_hard_stall_carries_its_batch(run: faultguard.Run, trace: Trace) -> None:
    """Its process is ended each time, with a note; the third one quarantines, and the next process passes over."""
    assert ray.get(stalls.remote("w", trace, {3: "hang"}), timeout=WAIT_S) == result({3})
    assert attempts_at(trace, 3) == 3
    assert {failure.cause for failure in newest(run, "stalls").failures} == {"stall"}
    assert len({note["pid"] for note in trace.notes("batch")}) == 4


@faultguard.recoverable(max_failures=3, on_poison="skip", backoff=NOWAIT)
@ray.remote(num_cpus=0.5)
def dies_at_once(worker_id: str, trace: Trace) -> None:
    """Before its loop begins, where no batch is at fault."""
    trace.note("batch", worker_id, attempt=faultguard.current().attempt, batch=0)
    die("SIGKILL")


def test_a_crash_that_is_not_pinned_quarantines_nothing(run: faultguard.Run, trace: Trace) -> None:
    """The budget decides."""
    with pytest.raises(faultguard.MaxFailuresExceeded) as caught:
        ray.get(dies_at_once.remote("w", trace), timeout=WAIT_S)
    assert [failure.pinned for failure in caught.value.failures] == [False] * 4
    assert newest(run, "dies_at_once").quarantined == ()


@faultguard.recoverable(max_failures=3, on_poison="fail", backoff=NOWAIT)
@ray.remote(num_cpus=0.5)
def fails(worker_id: str, trace: Trace, poison: dict[int, str]) -> Any:
    """Does not skip."""
    return work(worker_id, trace, poison)


def test_on_poison_fail_names_the_batch(run: faultguard.Run, trace: Trace) -> None:
    """As before: the budget decides."""
    with pytest.raises(faultguard.MaxFailuresExceeded) as caught:
        ray.get(fails.remote("w", trace, {3: "exception"}), timeout=WAIT_S)
    assert caught.value.poison_batch == 3
    assert newest(run, "fails").quarantined == ()


@ray.remote(num_cpus=0.5, max_retries=9, retry_exceptions=True)
def block(worker_id: str, trace: Trace, poison: dict[int, str]) -> Any:
    """A block in a task that is not decorated: Ray retries."""
    with faultguard.checkpointed(worker_id, on_poison="skip"):
        return work(worker_id, trace, poison)


def test_a_block_skips_when_its_caller_retries(run: faultguard.Run, trace: Trace) -> None:
    """The block has no budget, but it counts, so that three in a row are known as such; a crash among them does not interrupt."""
    assert ray.get(block.remote("w", trace, {3: "both"}), timeout=WAIT_S) == result({3})
    assert newest(run, "block").charged == 0


def test_a_budget_too_small_for_it_is_refused(start_run: StartRun) -> None:
    """Also where `init` says it."""
    start_run(max_failures=2)
    few = faultguard.recoverable(on_poison="skip")(ray.remote(work))
    with pytest.raises(faultguard.UsageError, match="with max_failures=2 is refused: a batch is quarantined after 3 failures"):
        few.remote("w", Trace(os.devnull), {})


# --- progress -------------------------------------------------------------------------------------------------------


@faultguard.recoverable(max_failures=1, reset_on_progress=True, backoff=NOWAIT)
@ray.remote(num_cpus=0.5)
def struggles(worker_id: str, trace: Trace, kinds: list[str]) -> Any:
    """Fails once at every batch, in the ways that are their turn."""
    ckpt = faultguard.current()
    for batch in ckpt.batches(range(len(kinds))):
        trace.note("batch", worker_id, attempt=ckpt.attempt, batch=batch)
        if attempts_at(trace, batch) == 1:
            die(kinds[batch])
        ckpt.state.setdefault("seen", []).append(batch)
        ckpt.advance(wait=True)
    return ckpt.state["seen"]


@pytest.mark.parametrize("kinds", [["exception"] * N, ["exception", "SIGKILL", "exit", "exception"]], ids=str)
def test_failures_that_come_with_progress_start_the_count_anew(run: faultguard.Run, trace: Trace, kinds: list[str]) -> None:
    """More of them than `max_failures=1` are survived, whatever dies between."""
    assert ray.get(struggles.remote("w", trace, kinds), timeout=WAIT_S) == list(range(len(kinds)))
    end = newest(run, "struggles")
    assert (len(end.failures), end.charged) == (len(kinds), 1)


@faultguard.recoverable(max_failures=2, reset_on_progress=True, backoff=NOWAIT)
@ray.remote(num_cpus=0.5)
def sticks(worker_id: str, trace: Trace, poison: dict[int, str]) -> Any:
    """Gets on for a while."""
    return work(worker_id, trace, poison)


@pytest.mark.parametrize("kind", ["exception", "both"])
def test_without_progress_it_stops_fast(run: faultguard.Run, trace: Trace, kind: str) -> None:
    """The budget of one batch is that of the whole."""
    with pytest.raises(faultguard.MaxFailuresExceeded) as caught:
        ray.get(sticks.remote("w", trace, {3: kind}), timeout=WAIT_S)
    assert len(caught.value.failures) <= 4  # a crash may be charged to where the last record was, before that batch
    assert newest(run, "sticks").charged == 3


# --- fresh processes ------------------------------------------------------------------------------------------------


class DeviceError(RuntimeError):
    """After which nothing in the process works any more."""


@faultguard.recoverable(max_failures=3, fresh_process_on=DeviceError, give_up_on=KeyError, backoff=NOWAIT)
@ray.remote(num_cpus=0.5)
def device(worker_id: str, trace: Trace, errors: dict[int, type[Exception]]) -> Any:
    """Raises at some batches, once each."""
    ckpt = faultguard.current()
    for batch in ckpt.batches(range(N)):
        trace.note("batch", worker_id, attempt=ckpt.attempt, batch=batch)
        if batch in errors and attempts_at(trace, batch) == 1:
            raise errors[batch]("planned")
        ckpt.state.setdefault("seen", []).append(batch)
    return ckpt.state["seen"]


def pids(trace: Trace) -> list[int]:
    """Of each attempt."""
    return list({note["attempt"]: note["pid"] for note in trace.notes("batch")}.values())


def test_an_untrusted_process_is_left(run: faultguard.Run, trace: Trace) -> None:
    """The next attempt has another one; after any other exception the process is kept; each is charged once."""
    errors = {2: ValueError, 4: DeviceError, 6: OSError}
    assert ray.get(device.remote("w", trace, errors), timeout=WAIT_S) == list(range(N))
    first, second, third, fourth = pids(trace)
    assert first == second != third == fourth
    end = newest(run, "device")
    assert [(failure.cause, failure.batch) for failure in end.failures] == [("exception", 2), ("exception", 4), ("exception", 6)]
    assert (end.charged, end.attempt) == (3, 4)


def test_what_is_not_retried_reaches_the_user_from_any_process(run: faultguard.Run, trace: Trace) -> None:
    """`give_up_on` comes first, also after a fresh process."""
    with pytest.raises(KeyError) as caught:
        ray.get(device.remote("w", trace, {1: DeviceError, 3: KeyError}), timeout=WAIT_S)
    assert not isinstance(caught.value, faultguard.MaxFailuresExceeded)
    assert len(set(pids(trace))) == 2


@faultguard.recoverable(max_failures=2, fresh_process_on=lambda error: "device" in str(error), backoff=NOWAIT)
@ray.remote(num_cpus=0.5)
def broken(worker_id: str, trace: Trace) -> None:
    """Never works."""
    for batch in faultguard.batches(range(N)):
        trace.note("batch", worker_id, attempt=faultguard.current().attempt, batch=batch)
        if batch == 1:
            raise DeviceError("device lost")


def test_fresh_processes_are_within_the_budget(run: faultguard.Run, trace: Trace) -> None:
    """The last failure of the budget is the end, with the exception itself."""
    with pytest.raises(DeviceError) as caught:
        ray.get(broken.remote("w", trace), timeout=WAIT_S)
    assert isinstance(caught.value, faultguard.MaxFailuresExceeded)
    assert (len(caught.value.failures), len(set(pids(trace)))) == (3, 3)


@faultguard.recoverable(on_poison="skip", fresh_process_on=ValueError, backoff=NOWAIT)
@ray.remote(num_cpus=0.5)
def both(worker_id: str, trace: Trace, poison: dict[int, str]) -> Any:
    """Skips, and trusts no process in which it has failed."""
    return work(worker_id, trace, poison)


def test_the_note_of_a_process_that_leaves_quarantines(run: faultguard.Run, trace: Trace) -> None:
    """Each failure is recorded by another process, the third as it leaves: the claim of the next one finds the list."""
    assert ray.get(both.remote("w", trace, {5: "exception"}), timeout=WAIT_S) == result({5})
    assert attempts_at(trace, 5) == 3
    assert len(set(pids(trace))) == 4
