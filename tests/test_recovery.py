"""A Ray task killed in the middle of its loop goes on from its checkpoint, and its budget is what it says, whatever dies."""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import ray

import faultguard
from faultguard import MaxFailuresExceeded
from tests.conftest import CPUS
from tests.tasks import (
    KINDS,
    NOWAIT,
    DiesOnArrival,
    GaveUpError,
    Trace,
    assert_never_behind,
    die,
    doomed,
    end_manager,
    expected,
    manager_pid,
    records,
    result,
    wait_until,
    work,
)

if TYPE_CHECKING:
    from ray import ObjectRef

    from faultguard._core.records import FailureRecord
    from tests.conftest import StartRun

pytestmark = pytest.mark.ray
BATCHES = 12
MEBIBYTE = 1 << 20
WAIT_S = 90


def get(refs: Any) -> Any:
    """`ray.get` with a bound."""
    return ray.get(refs, timeout=WAIT_S)


def failed(ref: ObjectRef[Any]) -> MaxFailuresExceeded:
    """The error of a worker whose budget is spent."""
    with pytest.raises(MaxFailuresExceeded) as caught:
        get(ref)
    return caught.value


def attempts(trace: Trace, worker: str) -> list[int]:
    """The attempts whose body ran."""
    return list(dict.fromkeys(note["attempt"] for note in trace.notes(worker=worker) if "attempt" in note))


# --- going on -------------------------------------------------------------------------------------------------------


@faultguard.recoverable(max_failures=3, backoff=NOWAIT)
@ray.remote(num_cpus=0.5)
def long_form(worker_id: str, n: int, trace: Trace, deaths: dict[int, str]) -> Any:
    """The long form, with everything."""
    with faultguard.checkpointed(worker_id, state={"sum": 0}, every=1) as ckpt:
        work(ckpt, n, trace, deaths)
        return result(ckpt)


@faultguard.recoverable(every=1, backoff=NOWAIT)
@ray.remote(num_cpus=0.5)
def short_form(n: int, trace: Trace, deaths: dict[int, str]) -> Any:
    """The short form: no `with`, no id."""
    ckpt = faultguard.current()
    work(ckpt, n, trace, deaths)
    return result(ckpt)


@pytest.mark.parametrize("kinds", [*[(kind, kind) for kind in KINDS], ("SIGKILL", "exception")], ids="-".join)
def test_goes_on_whatever_kills_it(run: faultguard.Run, trace: Trace, tmp_path: Path, kinds: tuple[str, str]) -> None:
    """Killed twice in the middle of a state update, both forms give exact results and never begin behind what was durable."""
    deaths = dict(zip((4, 9), kinds, strict=True))
    other = Trace(tmp_path / "other")
    long, short = long_form.remote("w", BATCHES, trace, deaths), short_form.remote(BATCHES, other, deaths)
    assert get([long, short]) == [expected(BATCHES)] * 2
    for each in (trace, other):
        (worker,) = {note["worker"] for note in each.notes("batch")}
        assert_never_behind(each, worker)
        assert len(attempts(each, worker)) == 3
        assert min(each.begins(worker)[1:]) > 0


def test_a_clean_task_runs_once(run: faultguard.Run, trace: Trace) -> None:
    """Without failures there is one attempt, and each batch runs once."""
    assert get(long_form.remote("w", BATCHES, trace, {})) == expected(BATCHES)
    assert [note["batch"] for note in trace.notes("batch")] == list(range(BATCHES))
    assert [record.kind for record in records(run, "long_form", "w")][-1] == "end"


# --- the budget -----------------------------------------------------------------------------------------------------


def doomed_task(max_failures: int) -> Any:
    """`doomed` with a budget of its own."""
    return faultguard.recoverable(max_failures=max_failures, backoff=NOWAIT)(ray.remote(num_cpus=0.5)(doomed))


def check_failures(failures: tuple[FailureRecord, ...], trace: Trace, since: float, *, kinds: list[str]) -> None:
    """The failures tell of the attempts that ran, one by one."""
    assert [f.cause for f in failures] == ["exception" if kind == "exception" else "crash" for kind in kinds]
    assert [f.attempt for f in failures] == [1, 2, 3]
    assert [f.batch for f in failures] == [2, 4, 6]
    pids = {note["attempt"]: note["pid"] for note in trace.notes("batch")}
    assert [f.pid for f in failures] == list(pids.values())
    assert {f.node_id for f in failures} == {ray.get_runtime_context().get_node_id()}
    times = [since, *(f.time for f in failures), time.time()]
    assert times == sorted(times)


@pytest.mark.parametrize("kinds", [["SIGKILL"] * 3, ["exception"] * 3, ["SIGKILL", "exception", "exit"]], ids="-".join)
def test_budget_of_two_is_three_attempts(run: faultguard.Run, trace: Trace, kinds: list[str]) -> None:
    """With max_failures=2 a task that always dies is started exactly three times, and the error names every death."""
    since = time.time()
    error = failed(doomed_task(2).remote("w", trace, kinds))
    assert attempts(trace, "w") == [1, 2, 3]
    assert trace.begins("w") == [0, 2, 4]
    check_failures(error.failures, trace, since, kinds=kinds)
    assert error.worker_id == "w"
    assert "max_failures=2 allows 3 attempts" in str(error)
    assert isinstance(error, ValueError) == (kinds[-1] == "exception")
    assert [record.outcome and record.outcome.status for record in records(run, "doomed", "w")][-1] == "failed"


@pytest.mark.parametrize("kinds", [["SIGKILL"] * 3, ["exception", "SIGKILL", "exception"]], ids="-".join)
def test_budget_holds_when_the_manager_dies_too(run: faultguard.Run, trace: Trace, kinds: list[str]) -> None:
    """With the manager killed together with the worker each time, it is three attempts all the same."""
    since = time.time()
    error = failed(doomed_task(2).remote("w", trace, kinds, kill_manager=True))
    assert attempts(trace, "w") == [1, 2, 3]
    check_failures(error.failures, trace, since, kinds=kinds)
    assert len({note["killed"] for note in trace.notes("manager")}) == 3


def test_budget_counts_deaths_while_arguments_are_unpacked(run: faultguard.Run, trace: Trace) -> None:
    """An argument that kills whoever unpacks it is met three times, not for ever."""
    error = failed(doomed_task(2).remote("w", trace, ["done"], extra=DiesOnArrival(trace)))
    arrived = [note["pid"] for note in trace.notes("arrived")]
    assert [(f.cause, f.attempt, f.batch, f.pid) for f in error.failures] == [("crash", n + 1, 0, pid) for n, pid in enumerate(arrived)]
    assert len(arrived) == 3
    assert not trace.notes("batch")


@pytest.mark.parametrize("kind", ["SIGKILL", "exception"])
def test_budget_of_none_is_one_attempt(run: faultguard.Run, trace: Trace, kind: str) -> None:
    """With max_failures=0 the first death is the last."""
    error = failed(doomed_task(0).remote("w", trace, [kind]))
    assert attempts(trace, "w") == [1]
    assert len(error.failures) == 1


def test_budget_without_limit(run: faultguard.Run, trace: Trace) -> None:
    """With max_failures=-1 a task outlives more deaths than any default allows."""
    kinds = ["SIGKILL", *["exception"] * 20, "exit", *["exception"] * 10, "done"]
    assert get(doomed_task(-1).remote("w", trace, kinds)) == len(kinds)


@faultguard.recoverable(max_failures=1, backoff=NOWAIT)
@ray.remote
def looks_up(key: str) -> None:
    """Raises KeyError."""
    faultguard.current().state["here"] = key
    raise KeyError(key)


def test_existing_except_clauses_work(run: faultguard.Run) -> None:
    """`except KeyError` catches the end of a budget that KeyErrors have spent, and the last one is there to be looked at."""
    with pytest.raises(KeyError) as caught:
        get(looks_up.remote("gone"))
    error = caught.value
    assert isinstance(error, MaxFailuresExceeded)
    assert isinstance(error.last_exception, KeyError)
    assert error.last_exception.args == ("gone",)
    assert "KeyError: 'gone'" in str(error)
    assert error.poison_batch is None


def test_poison_batch_is_named(run: faultguard.Run, trace: Trace) -> None:
    """After three failures in a row at one batch the error names it."""
    error = failed(stuck.remote("w"))
    assert error.poison_batch == 4
    assert "the last failures were all at batch 4" in str(error)


@faultguard.recoverable(max_failures=2, backoff=NOWAIT)
@ray.remote
def stuck(worker_id: str) -> None:
    """Cannot get past batch 4."""
    for batch in faultguard.batches(range(10)):
        if batch == 4:
            raise ValueError("bad input")


@faultguard.recoverable(give_up_on=GaveUpError, backoff=NOWAIT)
@ray.remote
def gives_up(worker_id: str, trace: Trace) -> None:
    """Raises what is not retried."""
    trace.note("batch", worker_id, attempt=faultguard.current().attempt, batch=0)
    raise GaveUpError("enough")


def test_what_is_not_retried_arrives_as_itself(run: faultguard.Run, trace: Trace) -> None:
    """An error of `give_up_on` reaches `ray.get` as itself, after one attempt."""
    with pytest.raises(GaveUpError, match="enough") as caught:
        get(gives_up.remote("w", trace))
    assert not isinstance(caught.value, MaxFailuresExceeded)
    assert attempts(trace, "w") == [1]


@faultguard.recoverable(max_failures=2, backoff=NOWAIT)
@ray.remote
def exits(worker_id: str, trace: Trace) -> tuple[str, ...]:
    """Leaves twice by sys.exit, the second time with success."""
    ckpt = faultguard.current()
    for batch in ckpt.batches(range(6)):
        trace.note("batch", worker_id, attempt=ckpt.attempt, batch=batch)
        if batch == 2 * ckpt.attempt:
            sys.exit(2 - ckpt.attempt)
        ckpt.advance(wait=True)
    return tuple(failure.cause for failure in ckpt.failures)


def test_sys_exit_is_charged(run: faultguard.Run, trace: Trace) -> None:
    """A user's sys.exit, of whatever code, ends the attempt and counts; the next one goes on."""
    assert get(exits.remote("w", trace)) == ("exit", "exit")
    assert trace.begins("w") == [0, 2, 4]


# --- what cannot go on ----------------------------------------------------------------------------------------------


@faultguard.recoverable(every=1, backoff=NOWAIT)
@ray.remote(num_cpus=0.5)
def rots(worker_id: str, trace: Trace, folder: str, how_many: int) -> Any:
    """In batch 6 of its first attempt damages its newest records, and dies."""
    ckpt = faultguard.current()
    for batch in ckpt.batches(range(BATCHES)):
        trace.note("batch", worker_id, attempt=ckpt.attempt, batch=batch)
        if batch == 6 and ckpt.attempt == 1:
            for path in sorted(Path(folder).glob("*.json"))[-how_many:]:
                path.write_bytes(path.read_bytes().replace(b'"sum":', b'"sun":'))
            die("SIGKILL")
        ckpt.state["sum"] = ckpt.state.get("sum", 0) + batch
        ckpt.state.setdefault("seen", []).append(batch)
        ckpt.advance(wait=True)
    return result(ckpt)


@pytest.mark.parametrize("how_many", [1, 100])
def test_records_that_rot(run: faultguard.Run, trace: Trace, how_many: int) -> None:
    """One costs its batches; all of them are an error, and never a fresh start."""
    ref = rots.remote("w", trace, str(Path(run.checkpoint_dir) / run.name / "rots" / "w"), how_many)
    if how_many == 1:
        assert get(ref) == expected(BATCHES)
        assert trace.begins("w") == [0, 5]
    else:
        with pytest.raises(faultguard.CheckpointCorruptError):
            get(ref)
        assert trace.begins("w") == [0]


@faultguard.recoverable(every=1, backoff=NOWAIT)
@ray.remote(num_cpus=0.5)
def cannot(worker_id: str, trace: Trace, what: str) -> None:
    """Gets another input in its second attempt, or keeps in its state what cannot be saved."""
    ckpt = faultguard.current()
    for batch in ckpt.batches([number * ckpt.attempt for number in range(BATCHES)] if what == "input" else range(BATCHES)):
        trace.note("batch", worker_id, attempt=ckpt.attempt, batch=batch)
        if what == "state":
            ckpt.state["lock"] = object()
        if batch == 6:
            die("SIGKILL")
        ckpt.advance(wait=True)


def test_another_input_on_resume(run: faultguard.Run, trace: Trace) -> None:
    """It is refused before a batch of it runs, and not tried again."""
    with pytest.raises(faultguard.InputChangedError, match="batch 5 was"):
        get(cannot.remote("w", trace, "input"))
    assert trace.begins("w") == [0]


def test_a_state_that_cannot_be_saved(run: faultguard.Run, trace: Trace) -> None:
    """The first boundary says so, with the path, and nothing is tried again."""
    with pytest.raises(faultguard.CheckpointNotSerializableError, match=r'state\["lock"\]'):
        get(cannot.remote("w", trace, "state"))
    assert [note["batch"] for note in trace.notes("batch")] == [0]


# --- arguments ------------------------------------------------------------------------------------------------------


@faultguard.recoverable(max_failures=3, backoff=NOWAIT)
@ray.remote
def empties(worker_id: str, items: list[Any], trace: Trace, nested: dict[str, Any]) -> int:
    """Empties its arguments, then fails."""
    attempt = faultguard.current().attempt
    trace.note("batch", worker_id, attempt=attempt, batch=0, items=len(items), nested=len(nested["items"]))
    items.clear()
    nested["items"].clear()
    if attempt < 3:
        raise ValueError("again")
    return attempt


def test_retry_sees_arguments_as_first_passed(run: faultguard.Run, trace: Trace) -> None:
    """What the failed attempt did to its arguments does not meet the next one, which is in the same process."""
    assert get(empties.remote("w", [1, 2], trace, {"items": [3]})) == 3
    assert [(note["items"], note["nested"]) for note in trace.notes("batch")] == [(2, 1)] * 3
    assert len({note["pid"] for note in trace.notes("batch")}) == 1


@pytest.mark.parametrize("which", ["large", "reference"])
def test_arguments_that_cannot_be_kept_take_a_new_process(run: faultguard.Run, trace: Trace, which: str) -> None:
    """Arguments over 1 MiB, or with references inside, are brought anew by Ray: same values, another process, same budget."""
    items: list[Any] = [bytes(MEBIBYTE + 1), 2] if which == "large" else [ray.put(7), 2]
    assert get(empties.remote("w", items, trace, {"items": [3]})) == 3
    notes = trace.notes("batch")
    assert [(note["attempt"], note["items"], note["nested"]) for note in notes] == [(1, 2, 1), (2, 2, 1), (3, 2, 1)]
    assert len({note["pid"] for note in notes}) == 3


@faultguard.recoverable(max_failures=1)
@ray.remote
def adds(worker_id: str, value: int, values: list[Any]) -> int:
    """Uses references as Ray's tasks do."""
    return value + sum(map(int, ray.get(values)))


def test_references_behave_as_in_ray(run: faultguard.Run) -> None:
    """A reference passed as an argument arrives as its value, one inside a list as a reference."""
    assert get(adds.remote("w", ray.put(1), [ray.put(2), ray.put(3)])) == 6


# --- cancel ---------------------------------------------------------------------------------------------------------


@faultguard.recoverable(backoff=NOWAIT)
@ray.remote
def endless(worker_id: str, trace: Trace) -> None:
    """Stays in batch 3."""
    ckpt = faultguard.current()
    for batch in ckpt.batches(range(10)):
        trace.note("batch", worker_id, attempt=ckpt.attempt, batch=batch)
        while batch == 3:
            time.sleep(0.01)
        ckpt.advance(wait=True)


@pytest.mark.parametrize("force", [False, True])
def test_cancel_stays_cancel(run: faultguard.Run, trace: Trace, force: bool) -> None:
    """A cancelled task is not retried, its checkpoint stays, and its log says why it ended, if it was given the time."""
    ref = endless.remote("w", trace)
    wait_until(lambda: any(note["batch"] == 3 for note in trace.notes("batch")))
    ray.cancel(ref, force=force)
    with pytest.raises((ray.exceptions.TaskCancelledError, ray.exceptions.WorkerCrashedError)):
        get(ref)
    assert attempts(trace, "w") == [1]
    newest = records(run, "endless", "w")[-1]
    assert newest.snapshot is not None
    assert newest.snapshot.batch == 3
    if not force:
        assert newest.ended is not None
        assert (newest.ended.cause, newest.ended.charged, newest.charged) == ("cancelled", False, 0)


@faultguard.recoverable(backoff=faultguard.Backoff(initial=60, jitter=False))
@ray.remote
def waits_long(worker_id: str, trace: Trace) -> None:
    """Fails, and waits for a minute before the retry."""
    trace.note("batch", worker_id, attempt=faultguard.current().attempt, batch=0)
    raise ValueError("wait")


def test_sigterm_flushes_and_is_not_charged(run: faultguard.Run, trace: Trace) -> None:
    """Told to end, a worker that has got on saves its last boundary with a note; Ray runs it again, and nothing is redone but one batch."""
    ref = endless.remote("w", trace)
    wait_until(lambda: any(note["batch"] == 3 for note in trace.notes("batch")))
    os.kill(next(note["pid"] for note in trace.notes("batch")), signal.SIGTERM)
    wait_until(lambda: attempts(trace, "w") == [1, 2])
    noted = [record for record in records(run, "endless", "w") if record.ended is not None]
    assert [(record.ended.cause, record.ended.charged) for record in noted if record.ended] == [("terminated", False)]
    last = [note["batch"] for note in trace.notes("batch") if note["attempt"] == 1][-1]
    assert trace.begins("w")[1] == last
    ray.cancel(ref)
    with pytest.raises(ray.exceptions.TaskCancelledError):
        get(ref)


def test_cancel_during_the_wait(run: faultguard.Run, trace: Trace) -> None:
    """A task that is cancelled while it waits for its retry is cancelled, and nothing of it stays behind."""
    ref = waits_long.remote("w", trace)
    wait_until(lambda: any(record.attempt == 2 for record in records(run, "waits_long", "w")))
    ray.cancel(ref)
    with pytest.raises(ray.exceptions.TaskCancelledError):
        get(ref)
    assert attempts(trace, "w") == [1]
    newest = records(run, "waits_long", "w")[-1]
    assert newest.ended is not None
    assert newest.ended.cause == "cancelled"


def fails_once(wait_s: float) -> Any:
    """A task that takes all the processors of the cluster, fails, and waits for its retry."""

    @faultguard.recoverable(max_failures=1, backoff=faultguard.Backoff(initial=wait_s, jitter=False))
    @ray.remote(num_cpus=CPUS)
    def waits(worker_id: str, trace: Trace) -> int:
        attempt = faultguard.current().attempt
        trace.note("batch", worker_id, attempt=attempt, batch=0)
        if attempt == 1:
            raise ValueError("planned")
        return attempt

    return waits.options(worker_id="w")


def test_a_wait_lends_its_processors(run: faultguard.Run, trace: Trace) -> None:
    """While a worker waits for its retry, others have its processors."""
    manager_pid()  # it is there; to start it takes a part of the wait
    ref = fails_once(6).remote("w", trace)
    wait_until(lambda: trace.notes("batch", "w"))
    assert get(doomed_task(0).remote("other", trace, ["done"])) == 1
    assert get(ref) == 2
    times = [trace.notes("batch", worker)[0]["time"] for worker in ("w", "other")]
    assert times[0] < times[1] < trace.notes("batch", "w")[1]["time"]


def test_a_wait_outlives_the_manager(run: faultguard.Run, trace: Trace) -> None:
    """When the manager dies during a wait, the rest of it is slept."""
    manager_pid()
    ref = fails_once(2).remote("w", trace)
    wait_until(lambda: trace.notes("batch", "w"))
    end_manager()
    assert get(ref) == 2
    first, second = (note["time"] for note in trace.notes("batch", "w"))
    assert second - first >= 2


# --- identity -------------------------------------------------------------------------------------------------------


@faultguard.recoverable(max_failures=0)
@ray.remote
def counts(worker_id: str, n: int, fail_at: int) -> tuple[int, int, int]:
    """Counts batches; gives the attempt, the failures behind it, and the count."""
    ckpt = faultguard.current()
    for batch in ckpt.batches(range(n)):
        if batch == fail_at:
            raise ValueError("planned")
        ckpt.state["n"] = ckpt.state.get("n", 0) + 1
        ckpt.advance(wait=True)
    return ckpt.attempt, len(ckpt.failures), ckpt.state["n"]


def test_an_id_that_is_used_again(run: faultguard.Run) -> None:
    """A failed worker goes on with a new budget, a completed one begins a new life."""
    assert len(failed(counts.remote("w", 5, 3)).failures) == 1
    assert len(failed(counts.remote("w", 5, 4)).failures) == 1
    assert get(counts.remote("w", 5, -1)) == (1, 0, 5)
    assert [record.life for record in records(run, "counts", "w")][-1] == 1
    assert get(counts.remote("w", 4, -1)) == (1, 0, 4)
    assert [record.life for record in records(run, "counts", "w")][-1] == 2


def test_an_unfinished_worker_goes_on(run: faultguard.Run, trace: Trace) -> None:
    """A new task with the id of a cancelled worker goes on where that one was."""
    ref = endless.remote("w", trace)
    wait_until(lambda: any(note["batch"] == 3 for note in trace.notes("batch")))
    ray.cancel(ref)
    with pytest.raises(ray.exceptions.TaskCancelledError):
        get(ref)
    again = endless.remote("w", trace)
    wait_until(lambda: attempts(trace, "w") == [1, 2])
    ray.cancel(again)
    assert trace.begins("w") == [0, 3]
    with pytest.raises(ray.exceptions.TaskCancelledError):
        get(again)


def test_ids_of_two_tasks_do_not_meet(run: faultguard.Run, trace: Trace) -> None:
    """One id under two tasks is two workers."""
    assert get([counts.remote("w", 3, -1), long_form.remote("w", 4, trace, {})]) == [(1, 0, 3), expected(4)]
    assert records(run, "counts", "w")
    assert records(run, "long_form", "w")


@ray.remote(max_retries=0)
def holds(worker_id: str, trace: Trace, until: str) -> int:
    """Holds a worker until a file appears; a plain task of Ray's."""
    with faultguard.checkpointed(worker_id) as ckpt:
        for batch in ckpt.batches(range(4)):
            trace.note("batch", worker_id, attempt=ckpt.attempt, batch=batch)
            if batch == 2 and not ckpt.resumed:
                wait_until(lambda: Path(until).exists())
            ckpt.advance(wait=True)
        return ckpt.attempt


def test_a_live_holder_is_not_pushed_aside(start_run: StartRun, trace: Trace, tmp_path: Path) -> None:
    """A second live task with the same id is refused, by name, and the first is not disturbed."""
    start_run(heartbeat_interval=0.2, heartbeat_timeout=1)
    first = holds.remote("w", trace, str(tmp_path / "go"))
    wait_until(lambda: any(note["batch"] == 2 for note in trace.notes("batch")))
    with pytest.raises(faultguard.DuplicateWorkerError, match="'w' of task 'holds' is held by another live task") as caught:
        get(holds.remote("w", trace, ""))
    assert caught.value.worker_id == "w"
    (tmp_path / "go").touch()
    assert get(first) == 1
    assert [note["batch"] for note in trace.notes("batch")] == [0, 1, 2, 3]


def test_a_dead_holder_is_replaced(start_run: StartRun, trace: Trace) -> None:
    """A second task that waits for the id takes over as soon as the first one is known dead, however long the timeout."""
    start_run(heartbeat_timeout=600)
    first = holds.remote("w", trace, "/never")
    note = wait_until(lambda: next((note for note in trace.notes("batch") if note["batch"] == 2), None))
    second = holds.remote("w", trace, "/never")
    os.kill(note["pid"], signal.SIGKILL)
    assert get(second) == 2
    with pytest.raises(ray.exceptions.WorkerCrashedError):
        get(first)
    assert trace.begins("w") == [0, 2]


# --- below @ray.remote ----------------------------------------------------------------------------------------------


@ray.remote(max_retries=5)
@faultguard.recoverable(max_failures=2, backoff=NOWAIT)
def below(worker_id: str, n: int, trace: Trace, deaths: dict[int, str]) -> Any:
    """Decorated the other way round."""
    ckpt = faultguard.current()
    work(ckpt, n, trace, deaths)
    return result(ckpt)


@ray.remote
@faultguard.recoverable(max_failures=3)
def below_with_too_few(worker_id: str) -> None:
    """Ray's default of 3 retries is one too few."""


def test_below_ray_remote(run: faultguard.Run, trace: Trace) -> None:
    """Below `@ray.remote` a task survives crashes and exceptions, too."""
    deaths = {4: "SIGKILL", 8: "exception"}
    assert get(below.remote("w", BATCHES, trace, deaths)) == expected(BATCHES)
    assert attempts(trace, "w") == [1, 2, 3]
    assert_never_behind(trace, "w")


def test_below_ray_remote_the_budget_holds(run: faultguard.Run, trace: Trace) -> None:
    """Below `@ray.remote` the budget ends the task before Ray's retries do."""
    deaths = dict.fromkeys((2, 4, 6, 8), "exit")
    assert len(failed(below.remote("w", BATCHES, trace, deaths)).failures) == 3
    assert attempts(trace, "w") == [1, 2, 3]


def test_below_ray_remote_too_few_retries_are_refused(run: faultguard.Run) -> None:
    """Where Ray would give up before the budget is spent, `.remote()` says what to write."""
    with pytest.raises(faultguard.UsageError, match=r"max_retries=3, too few for max_failures=3.*max_retries=23 \(at least 4\)"):
        below_with_too_few.remote("w")
    get(below_with_too_few.options(max_retries=-1).remote("w"))


# --- inside, beside and without the decorator ------------------------------------------------------------------------


@faultguard.recoverable(max_failures=1, backoff=NOWAIT)
@ray.remote(num_cpus=0.5)
def outer(worker_id: str, trace: Trace) -> list[Any]:
    """Submits recoverable tasks of its own."""
    inner = [long_form.remote(f"{worker_id}.{i}", 6, trace, {3: "exception"}) for i in range(2)]
    return ray.get(inner)


def test_nested_submission(run: faultguard.Run, trace: Trace) -> None:
    """A task may submit recoverable tasks; they belong to the run of the driver."""
    assert get(outer.remote("w", trace)) == [expected(6)] * 2
    assert [records(run, "long_form", f"w.{i}")[-1].kind for i in range(2)] == ["end", "end"]


@faultguard.recoverable(max_failures=2, backoff=NOWAIT)
@ray.remote
def two_workers(worker_id: str, trace: Trace) -> tuple[Any, ...]:
    """Has a second worker inside, which dies in both ways."""
    with faultguard.checkpointed("part", every=1) as part:
        work(part, 8, trace, {3: "SIGKILL", 6: "exception"})
        made = result(part)
    task = faultguard.current()
    return made, part.worker_id, task.worker_id, [failure.cause for failure in task.failures], len(part.failures)


def test_a_worker_inside_a_task(run: faultguard.Run, trace: Trace) -> None:
    """`checkpointed(other_id)` in a task goes on by itself, and the failures are charged to the task."""
    made, part, task, causes, _ = get(two_workers.remote("w", trace))
    assert made == expected(8)
    assert (part, task, causes) == ("part", "w", ["crash", "exception"])
    assert_never_behind(trace, "part")
    assert trace.begins("part")[1] >= 1  # that one was waited for


@ray.remote(max_retries=1)
def plain(worker_id: str, n: int, trace: Trace, deaths: dict[int, str]) -> Any:
    """A task of Ray's with a worker inside."""
    with faultguard.checkpointed(worker_id, every=1) as ckpt:
        work(ckpt, n, trace, deaths)
        return result(ckpt)


def test_checkpointed_in_a_plain_task(run: faultguard.Run, trace: Trace) -> None:
    """Without the decorator whoever calls decides about retries; each goes on where the last one was."""
    assert get(plain.remote("crash", 8, trace, {5: "SIGKILL"})) == expected(8)
    with pytest.raises(ValueError, match="planned"):
        get(plain.remote("raise", 8, trace, {5: "exception"}))
    assert get(plain.remote("raise", 8, trace, {5: "exception"})) == expected(8)
    for worker in ("crash", "raise"):
        assert_never_behind(trace, worker)
        assert trace.begins(worker)[1] >= 4
