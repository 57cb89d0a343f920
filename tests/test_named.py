"""Named runs within one driver after another: what is on record is not run, what is not goes on, what is closed begins anew."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import ray

import faultguard
from faultguard import _named
from faultguard._log import StoredLog
from faultguard._named import KEPT_INSTANCES
from faultguard.storage import open_store
from tests.disks import renamed
from tests.tasks import NOWAIT, Trace, expected, result, wait_until

if TYPE_CHECKING:
    from collections.abc import Iterator

    from faultguard._core.records import Record
    from tests.conftest import StartRun

pytestmark = pytest.mark.ray
WAIT_S = 90
RUN = "nightly"
FAILS_AT = 3


@faultguard.recoverable(every=1, backoff=NOWAIT, max_failures=1)
@ray.remote(num_cpus=0.5)
def works(worker_id: str, n: int, trace: Trace, options: dict[str, Any] | None = None) -> Any:
    """A loop that fails at batch 3 as long as it is told to."""
    ckpt = faultguard.current()
    for batch in ckpt.batches(range(n)):
        trace.note("batch", worker_id, attempt=ckpt.attempt, batch=batch, token=ckpt.token, key=ckpt.idempotency_key())
        if batch == FAILS_AT and not trace.notes("mended", worker_id):
            raise ValueError("planned")
        ckpt.state["sum"] = ckpt.state.get("sum", 0) + batch
        ckpt.state.setdefault("seen", []).append(batch)
    return result(ckpt)


def get(refs: Any) -> Any:
    """`ray.get` with a bound."""
    return ray.get(refs, timeout=WAIT_S)


def batches(trace: Trace, worker: str) -> list[int]:
    """The batches that a worker has begun, in order."""
    return [note["batch"] for note in trace.notes("batch", worker)]


def logs(run: faultguard.Run) -> Path:
    """Where the logs of a run's instance are."""
    return Path(run.checkpoint_dir) / run.name / f"{run.instance:09d}"


def head(run: faultguard.Run, task: str, worker: str) -> Record:
    """The newest record of a worker."""
    record = StoredLog(open_store(run.checkpoint_dir, create=False), f"{run.name}/{run.instance:09d}/{task}/{worker}/").newest()
    assert record is not None
    return record


@pytest.fixture(autouse=True)
def no_run_is_left(ray_cluster: str) -> Iterator[None]:
    """Whatever a test left begun ends with it."""
    yield
    faultguard.shutdown()


def test_an_open_run_goes_on(start_run: StartRun, trace: Trace, capfd: pytest.CaptureFixture[str]) -> None:
    """Who has completed is not run again, the result is at hand; who failed for good resumes, with a new budget; then it is closed."""
    trace.note("mended", "good")
    with start_run(run=RUN) as run:
        good = works.remote("good", 6, trace)
        assert get(good) == expected(6)
        with pytest.raises(ValueError, match="planned"):
            get(works.remote("bad", 6, trace))
    assert batches(trace, "bad") == [0, 1, 2, 3, 3]
    said = capfd.readouterr().err
    assert f"faultguard: run 'nightly' (#1) starts. Store {run.checkpoint_dir}.\n" in said
    assert (
        "faultguard: run 'nightly' (#1) stays open: 1 completed (0 from the record), 0 failures survived, 0 quarantined. 1 not completed"
        in said
    )
    assert f"faultguard: kept {logs(run)}/works/bad\n" in said
    trace.note("mended", "bad")
    with start_run(run=RUN) as again:
        assert again.instance == 1
        assert get([works.remote(worker, 6, trace) for worker in ("good", "bad")]) == [expected(6)] * 2
        assert head(run, "works", "bad").charged == 0
    assert batches(trace, "good") == list(range(6))
    assert batches(trace, "bad") == [0, 1, 2, 3, 3, 3, 4, 5]
    said = capfd.readouterr().err
    assert f"(#1) goes on: opened {time.strftime('%H:')}" in said or "(#1) goes on: opened " in said
    assert f"pid {os.getpid()} (ended). 1 of 2 workers completed, 1 resume. Store" in said
    assert "faultguard: run 'nightly' (#1) closed: 2 completed (1 from the record), 0 failures survived, 0 quarantined." in said
    assert [len(list((logs(run) / "works" / worker).iterdir())) for worker in ("good", "bad")] == [1, 2], "ends, and a claim that fences"


@pytest.mark.parametrize(
    ("resume", "instance", "runs"), [("auto", 2, 2), ("never", 2, 2), ("always", 1, 1)], ids=["auto", "never", "always"]
)
def test_a_closed_run(start_run: StartRun, trace: Trace, resume: str, instance: int, runs: int) -> None:
    """Its name starts anew, or with resume="always" its results are given again."""
    trace.note("mended", "w")
    with start_run(run=RUN):
        assert get(works.remote("w", 6, trace)) == expected(6)
    with start_run(run=RUN, resume=resume) as run:
        assert run.instance == instance
        assert get(works.remote("w", 6, trace)) == expected(6)
    assert batches(trace, "w") == list(range(6)) * runs
    with start_run(run=RUN) as run:  # which was closed again
        assert run.instance == instance + 1


def test_an_open_run_begins_anew_if_that_is_wanted(start_run: StartRun, trace: Trace) -> None:
    """With resume="never", whatever is on record."""
    trace.note("mended", "good")
    with start_run(run=RUN):
        get(works.remote("good", 6, trace))
        with pytest.raises(ValueError, match="planned"):
            get(works.remote("bad", 6, trace))
    with start_run(run=RUN, resume="never") as run:
        assert run.instance == 2
        assert get(works.remote("good", 6, trace)) == expected(6)
    assert batches(trace, "good") == list(range(6)) * 2
    keys = [note["key"] for note in trace.notes("batch", "good")]
    assert len(set(keys)) == 12, "the batches of another instance are other work"
    tokens = [note["token"] for note in trace.notes("batch", "good")]
    assert tokens == sorted(tokens)
    assert tokens[0] < tokens[-1] < 2**63


def fail_in(run: faultguard.Run, ref: Any) -> None:
    """An exception of the driver, in its block."""
    with run:
        get(ref)
        raise RuntimeError("of the driver")


def test_a_run_is_open_until_everything_that_was_submitted_has_completed(start_run: StartRun, trace: Trace) -> None:
    """Also what never began; and if the block was left by an exception."""
    for worker in ("w", "late"):
        trace.note("mended", worker)
    with start_run(run=RUN):
        get(works.remote("w", 6, trace))
        works.options(num_cpus=1000).remote("late", 6, trace)  # which cannot be scheduled
    with pytest.raises(RuntimeError, match="of the driver"):
        fail_in(start_run(run=RUN), works.remote("late", 6, trace))
    with start_run(run=RUN) as run:
        assert run.instance == 1
        assert get([works.remote(worker, 6, trace) for worker in ("w", "late")]) == [expected(6)] * 2
    with start_run(run=RUN) as run:
        assert run.instance == 2
    assert batches(trace, "w") == batches(trace, "late") == list(range(6))


@ray.remote(max_retries=10)
@faultguard.recoverable
def below(worker_id: str, n: int) -> int:
    """Decorated below `@ray.remote`."""
    return n


@pytest.mark.parametrize("how", ["above", "bound", "below", "below with a reference"])
def test_however_it_was_submitted(start_run: StartRun, trace: Trace, how: str) -> None:
    """What the driver has submitted by whatever way, and what has not begun yet, keeps the run open."""
    impossible: Any = (below if how.startswith("below") else works).options(num_cpus=1000)
    with start_run(run=RUN):
        get(below.remote("w", 3))
        if how == "bound":
            with pytest.warns(Warning, match=r"DAGNode.execute"):
                impossible.bind("late", 6, trace).execute()
        elif how == "above":
            impossible.remote("late", 6, trace)
        else:
            impossible.remote("late", ray.put(3) if how.endswith("reference") else 3)
    with start_run(run=RUN) as run:
        assert run.instance == 1


def test_the_environment_names_the_run(ray_cluster: str, tmp_path: Path, trace: Trace, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing in the script says so: `FAULTGUARD_RUN`, and the other options of `init`."""
    for name, value in (("RUN", RUN), ("CHECKPOINT_DIR", str(tmp_path / "c")), ("RESUME", "always")):
        monkeypatch.setenv(f"FAULTGUARD_{name}", value)
    trace.note("mended", "w")
    for _ in range(2):
        assert get(works.remote("w", 6, trace)) == expected(6)
        faultguard.shutdown()
    assert batches(trace, "w") == list(range(6))


def test_what_resuming_saved(start_run: StartRun, trace: Trace, capfd: pytest.CaptureFixture[str]) -> None:
    """Is said by the summary: the work behind what was on record."""
    with start_run(run=RUN):
        assert get(takes.remote("t", 1.2)) == 1
    assert "Saved" not in capfd.readouterr().err
    with start_run(run=RUN, resume="always"):
        assert get(takes.remote("t", 1.2)) == 1
    assert "1 completed (1 from the record), 0 failures survived, 0 quarantined. Saved 1 s of work." in capfd.readouterr().err


@faultguard.recoverable(every=1)
@ray.remote
def takes(worker_id: str, seconds: float) -> int:
    """A batch that takes its time."""
    ckpt = faultguard.current()
    for _ in ckpt.batches(range(1)):
        time.sleep(seconds)
    return ckpt.current_batch


def test_a_run_without_workers_is_not_used_up(start_run: StartRun) -> None:
    """It stays open, and the next driver has the same instance."""
    for _ in range(2):
        with start_run(run=RUN) as run:
            assert run.instance == 1


@faultguard.recoverable
@ray.remote(num_returns=2)
def two(worker_id: str, trace: Trace) -> tuple[int, str]:
    """Gives two objects."""
    trace.note("ran", worker_id)
    return 1, "b"


@faultguard.recoverable
@ray.remote
def odd(worker_id: str, trace: Trace) -> type:
    """Gives what cannot be recorded."""
    for batch in faultguard.batches(range(2)):
        trace.note("batch", worker_id, batch=batch)
    trace.note("after", worker_id)
    return Trace


@pytest.mark.parametrize("worker_id", ["../../é/ x", "w" * 500, "%2E", "driver"])
def test_any_id_is_found_again(start_run: StartRun, trace: Trace, worker_id: str) -> None:
    """As the name of a folder it may look quite different."""
    trace.note("mended", worker_id)
    with start_run(run="a/b: ../é"):
        assert get(works.remote(worker_id, 6, trace)) == expected(6)
    with start_run(run="a/b: ../é", resume="always") as run:
        assert run.instance == 1
        assert get(works.remote(worker_id, 6, trace)) == expected(6)
    assert batches(trace, worker_id) == list(range(6))


def test_what_a_recorded_worker_gives(start_run: StartRun, trace: Trace) -> None:
    """References as of a task: none, a list, and what cannot be cancelled any more; a wrong number is refused as by Ray."""
    with start_run(run=RUN):
        get(two.remote("t", trace))
        get(odd.remote("o", trace))
        with pytest.raises(ray.exceptions.TaskCancelledError):
            get(cancels_itself(works.options(num_cpus=1000).remote("late", 6, trace)))
    with start_run(run=RUN):
        assert two.options(num_returns=0).remote("t", trace) is None
        one = two.options(num_returns=1).remote("t", trace)
        assert ray.cancel(one) is None
        assert get(one) == (1, "b")
        with pytest.raises(ValueError, match="returned 2 objects, but num_returns=3"):
            get(two.options(num_returns=3).remote("t", trace))
        assert get(odd.remote("o", trace)) is Trace
    assert [note["worker"] for note in trace.notes("after")] == ["o", "o"]
    assert len(trace.notes("ran")) == 1
    assert batches(trace, "o") == [0, 1]


def cancels_itself(ref: Any) -> Any:
    """A reference that is cancelled."""
    ray.cancel(ref)
    return ref


@ray.remote
def submits(trace: Trace) -> Any:
    """Submits a task from a task."""
    return ray.get(works.remote("w", 6, trace), timeout=WAIT_S)


def test_a_recorded_result_takes_no_slot(start_run: StartRun, trace: Trace) -> None:
    """`.remote()` gives what is there, with all CPUs busy, and the store away; nested and bound calls are run, and ask the log."""
    trace.note("mended", "w")
    with start_run(run=RUN):
        get(works.remote("w", 6, trace))
        get(two.remote("t", trace))
        works.options(num_cpus=1000).remote("never", 6, trace)
    with start_run(run=RUN) as run:
        impossible: Any = works.options(num_cpus=1000)
        with renamed(Path(run.checkpoint_dir)):
            assert get(impossible.remote("w", 6, trace)) == expected(6)
            both: Any = two.options(num_cpus=1000).remote("t", trace)
            assert get(both) == [1, "b"]
        assert get(submits.remote(trace)) == expected(6)
        with pytest.warns(Warning, match="DAGNode.execute"):  # all that it says is that Ray calls it old
            assert get(works.bind("w", 6, trace).execute()) == expected(6)
    assert batches(trace, "w") == list(range(6))
    assert len(trace.notes("ran")) == 1


def test_asked_for_twice_by_one_driver(start_run: StartRun, trace: Trace) -> None:
    """It gets the recorded outcome, and nothing runs: in a named run an id is one piece of work."""
    trace.note("mended", "w")
    with start_run(run=RUN):
        assert get([works.remote("w", 6, trace), works.remote("w", 6, trace)]) == [expected(6)] * 2
        assert get(works.remote("w", 6, trace)) == expected(6)
    assert batches(trace, "w") == list(range(6))


@ray.remote
def submits_other(trace: Trace) -> Any:
    """As `submits`, with another number of batches."""
    return ray.get(works.remote("w", 7, trace), timeout=WAIT_S)


def test_other_arguments_are_refused(start_run: StartRun, trace: Trace) -> None:
    """A recorded result is of the arguments that it was made with; the order of a dict, and objects, do not count."""
    trace.note("mended", "w")
    with start_run(run=RUN):
        get(works.remote("w", 6, trace, {"a": 1, "b": [2]}))
        works.options(num_cpus=1000).remote("never", 6, trace)
    with start_run(run=RUN):
        assert get(works.remote("w", 6, Trace("elsewhere"), {"b": [2], "a": 1})) == expected(6)
        with pytest.raises(
            faultguard.RunMismatchError, match=r"worker 'w' of task 'works' .* other arguments: n, options differ"
        ) as caught:
            works.remote("w", 7, trace, {"a": 1})
        assert (caught.value.worker_id, caught.value.arguments) == ("w", ("n", "options"))
        with pytest.raises(faultguard.RunMismatchError, match="n, options differ"):
            get(submits_other.remote(trace))
    with start_run(run=RUN, resume="always", check_args=False):
        assert get(works.remote("w", 7, trace)) == expected(6)


def test_a_worker_is_started_over(start_run: StartRun, trace: Trace) -> None:
    """`.options(resume="never")`: a completed one as one that failed; its own next attempts resume."""
    trace.note("mended", "good")
    with start_run(run=RUN):
        get(works.remote("good", 6, trace))
        with pytest.raises(ValueError, match="planned"):
            get(works.remote("bad", 6, trace))
        assert get(works.options(resume="never").remote("good", 4, trace)) == expected(4)
    assert batches(trace, "good") == [0, 1, 2, 3, 4, 5, 0, 1, 2, 3]
    with start_run(run=RUN) as run:
        assert get(works.options(resume="never").remote("good", 5, trace)) == expected(5)
        with pytest.raises(ValueError, match="planned"):
            get(works.options(resume="never").remote("bad", 6, trace))
        assert (head(run, "works", "bad").life, head(run, "works", "good").life) == (2, 3)
    assert batches(trace, "bad") == [0, 1, 2, 3, 3] * 2, "afresh once, not with every attempt"


@faultguard.recoverable
@ray.remote
def nameless(n: int) -> int:
    """Has no id."""
    return n


@ray.remote(max_retries=10)
@faultguard.recoverable
def nameless_below(n: int) -> int:
    """Has none either."""
    return n


def test_an_id_is_needed(start_run: StartRun) -> None:
    """Or nobody could tell which work it is: refused where it is submitted."""
    with start_run(run=RUN):
        for task in (nameless, nameless_below):
            with pytest.raises(faultguard.UsageError, match=r"refused in the named run 'nightly' without a worker id"):
                task.remote(3)
        with pytest.raises(faultguard.UsageError, match=r"refused in the named run 'nightly' without a worker id"):
            nameless_below.remote(ray.put(3))
        assert get(nameless.options(worker_id="n").remote(3)) == 3


def test_what_ray_refuses_was_not_submitted(start_run: StartRun, capfd: pytest.CaptureFixture[str]) -> None:
    """A run does not wait for it: it is closed when all others have completed."""
    with start_run(run=RUN):
        with pytest.raises(ValueError, match="nonsense"):
            nameless.options(worker_id="bad", nonsense=1).remote(3)
        assert get(nameless.options(worker_id="good").remote(3)) == 3
    assert "run 'nightly' (#1) closed: 1 completed" in capfd.readouterr().err


SIZE = 2 << 20


@faultguard.recoverable(every=1)
@ray.remote(num_cpus=0.5)
def large(worker_id: str, trace: Trace) -> bytes:
    """Gives more than is recorded."""
    for batch in faultguard.batches(range(3)):
        trace.note("batch", worker_id, batch=batch)
    trace.note("after", worker_id)
    return bytes(SIZE)


def test_a_result_that_is_not_recorded(start_run: StartRun, trace: Trace) -> None:
    """Is made again, by what follows the finished loops; also from a closed run."""
    with start_run(run=RUN):
        assert get(large.remote("l", trace)) == bytes(SIZE)
    with start_run(run=RUN, resume="always") as run:
        assert run.instance == 1
        assert get(large.remote("l", trace)) == bytes(SIZE)
    assert batches(trace, "l") == [0, 1, 2]
    assert len(trace.notes("after")) == 2


@ray.remote
def block(worker_id: str, trace: Trace) -> int:
    """A block in a task that is not decorated."""
    with faultguard.checkpointed(worker_id, state={"sum": 0}, every=1) as ckpt:
        for batch in ckpt.batches(range(4)):
            trace.note("batch", worker_id, batch=batch)
            ckpt.state["sum"] += batch
    return int(ckpt.state["sum"])


def test_a_block_that_is_done(start_run: StartRun, trace: Trace) -> None:
    """Its loops are, for the next driver, too; its state is what it was."""
    with start_run(run=RUN):
        assert get(block.remote("b", trace)) == 6
    with start_run(run=RUN, resume="always"):
        assert get(block.remote("b", trace)) == 6
    assert batches(trace, "b") == [0, 1, 2, 3]


def test_a_block_that_this_driver_has_done(start_run: StartRun, caplog: pytest.LogCaptureFixture) -> None:
    """Its loops yield nothing, as in any task of the run: that is said, so that nobody takes it for work that was done."""

    def seen() -> list[int]:
        """The batches of a block of this driver."""
        with faultguard.checkpointed("b", every=1) as ckpt:
            return [batch for batch in ckpt.batches(range(3))]  # noqa: C416 - `list` would draw ahead

    with start_run(run=RUN):
        assert seen() == [0, 1, 2]
        assert caplog.records == []
        assert seen() == []
        (warning,) = caplog.records
        assert (
            "'driver/b' was completed by this driver already: the loops of its block are done, and yield nothing. " in warning.getMessage()
        )
    with start_run(run=RUN, resume="always"):
        assert seen() == []
    assert len(caplog.records) == 1


@faultguard.recoverable(every=1)
@ray.remote(num_cpus=0.5)
def waits(worker_id: str, trace: Trace) -> int:
    """Stays in batch 2 until it may go on."""
    ckpt = faultguard.current()
    for batch in ckpt.batches(range(4)):
        trace.note("batch", worker_id, batch=batch)
        while batch == 2 and not trace.notes("go"):
            time.sleep(0.01)
    return ckpt.current_batch


@pytest.mark.parametrize("force", [False, True])
def test_a_cancelled_worker_resumes(start_run: StartRun, trace: Trace, force: bool) -> None:
    """With the next driver, and that counts its own cancels, also within one process; a cancel is not charged, by force neither."""
    with start_run(run=RUN, heartbeat_interval=0.2) as run:
        ref = waits.remote("c", trace)
        wait_until(lambda: 2 in batches(trace, "c"))
        if force:
            wait_until(lambda: (snapshot := head(run, "waits", "c").snapshot) is not None and snapshot.batch == 2)
            ray.cancel(ref, force=True)
        else:
            faultguard.cancel()
        with pytest.raises((ray.exceptions.TaskCancelledError, ray.exceptions.WorkerCrashedError)):
            get(ref)
        wait_until(lambda: [state.status for state in faultguard.workers()] == ["cancelled"])
    trace.note("go", "test")
    with start_run(run=RUN, heartbeat_interval=0.2):
        assert get(waits.remote("c", trace)) == 4
    assert batches(trace, "c") == [0, 1, 2, 2, 3]
    assert head(run, "waits", "c").charged == 0


@faultguard.recoverable
@ray.remote
def heavy(worker_id: str) -> int:
    """Carries much, and gives little."""
    ckpt = faultguard.current()
    ckpt.state["ballast"] = "x" * _named.CONDENSE_BYTES
    return 3


def test_a_large_last_state_goes_with_the_checkpoints(start_run: StartRun) -> None:
    """Where the result is recorded, nobody needs it any more."""
    with start_run(run=RUN) as run:
        assert get(heavy.remote("h")) == 3
        assert head(run, "heavy", "h").snapshot is not None
    record = head(run, "heavy", "h")
    assert (record.kind, record.snapshot) == ("end", None)
    assert sum(path.stat().st_size for path in logs(run).rglob("*.json")) < _named.CONDENSE_BYTES
    with start_run(run=RUN, resume="always"):
        assert get(heavy.remote("h")) == 3


def test_the_records_of_the_last_ten_instances_stay(start_run: StartRun, trace: Trace) -> None:
    """And of nothing older, not even that it was; no driver leaves a sign of its life."""
    trace.note("mended", "w")
    for _ in range(KEPT_INSTANCES + 3):
        with start_run(run=RUN) as run:
            get(works.remote("w", 2, trace))
    assert KEPT_INSTANCES == 10
    folder = Path(run.checkpoint_dir) / RUN
    assert sorted(path.name for path in folder.iterdir()) == [*(f"{number:09d}" for number in range(3, 14)), "driver"]
    assert [path.name for path in (folder / "driver").iterdir() if path.is_dir()] == []
    assert len(list((folder / "driver").iterdir())) == 2 * (KEPT_INSTANCES + 1)
