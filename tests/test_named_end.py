"""The end of a named run, without a cluster: wherever its driver dies, what is on record stays readable, and the next one goes on."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import pytest

from faultguard import _attempt, _lease, _ray, _session
from faultguard._core import runs
from faultguard._core.log import Claimant, Granted, claim, save, superseded
from faultguard._core.names import record_name
from faultguard._core.records import Outcome, Owner, Record, Snapshot, decode_record
from faultguard._log import StoredLog
from faultguard._named import NamedRun
from faultguard._settings import Settings
from faultguard.errors import CheckpointStoreError, UsageError
from faultguard.storage import open_store, store_id
from tests.test_outcomes import execute
from tests.test_run_end import fail, sum_up

if TYPE_CHECKING:
    from collections.abc import Iterator

DIES = """
import os, sys
from faultguard._named import NamedRun
from faultguard._settings import decode_settings
from faultguard.storage import leftovers
left = int(sys.argv[2])
named = NamedRun.enter(decode_settings(sys.argv[1].encode()), resume="auto", takeover=False, say=print)
named._lease.end()

def dying(call):
    def dies(*args, **keywords):
        global left
        left -= 1
        if left < 0:
            os._exit(9)
        return call(*args, **keywords)
    return dies

os.unlink, os.link = dying(os.unlink), dying(os.link)
leftovers.become = dying(leftovers.become)
print("\\n".join(named.end(failed=False)))
"""
DIED = 9


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    """A run without a cluster."""
    store = open_store(str(tmp_path / "store"))
    return Settings(run="nightly", checkpoint_dir=store.url, store_id=store_id(store), job_id="01000000")


def enter(settings: Settings, **options: Any) -> NamedRun:
    """A driver of this process has the run."""
    return NamedRun.enter(settings, **{"resume": "auto", "takeover": False, "say": print, **options})


@pytest.fixture
def named(settings: Settings) -> Iterator[NamedRun]:
    """A run with two workers that completed."""
    named = enter(settings)
    for worker in ("a", "b"):
        assert execute(named.settings, sum_up, worker_id=worker) == 3
    yield named
    named._lease.end()


def outcomes(named: NamedRun) -> dict[str, Any]:
    """What is at hand for a driver."""
    return {worker: bytes(outcome.value) for (_, worker), outcome in named._recorded.items()}


def test_a_death_at_any_step_of_the_end(settings: Settings, named: NamedRun) -> None:
    """The run is open, with all that it had, or closed, with its results; what was not deleted goes with the next instance."""
    named.end(failed=True)
    log = StoredLog(open_store(settings.checkpoint_dir, create=False), "nightly/driver/")
    instance, codes = 1, []
    for steps in range(40):
        command = [sys.executable, "-c", DIES, settings.encode().decode(), str(steps)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
        codes.append(done.returncode)
        assert done.returncode in {0, DIED}, done.stderr
        head = log.newest_run()
        assert head is not None
        assert head.instance == instance
        if head.kind == "closed":
            again = enter(settings, resume="always")
            assert again.settings.instance == instance
            assert outcomes(again) == {"a": b"3", "b": b"3"}
            again.end(failed=True)
        if done.returncode == 0:
            break
    assert codes == [DIED] * (len(codes) - 1) + [0]
    assert len(codes) > 5
    folder = Path(settings.checkpoint_dir) / "nightly" / "000000001"
    assert sorted(path.parent.name for path in folder.rglob("*.json")) == ["a", "b"]


def test_what_a_close_has_left_goes_with_the_next_instance(settings: Settings, named: NamedRun, monkeypatch: pytest.MonkeyPatch) -> None:
    """A driver that died between closing and deleting leaves no checkpoints for ever."""
    with monkeypatch.context() as dying:
        dying.setattr("faultguard._named._drop_checkpoints", lambda *_: None)
        named.end(failed=False)
    folder = Path(settings.checkpoint_dir) / "nightly" / "000000001"
    assert len(list(folder.rglob("*.json"))) > 2
    enter(settings).end(failed=False)
    assert len(list(folder.rglob("*.json"))) == 2


def test_a_failed_worker_keeps_the_run_open(settings: Settings, named: NamedRun) -> None:
    """And where its records are is said."""
    with pytest.raises(Exception, match="planned"):
        execute(named.settings, fail, worker_id="c")
    lines = named.end(failed=False)
    assert lines[0].startswith(
        "run 'nightly' (#1) stays open: 2 completed (0 from the record), 0 failures survived, 0 quarantined. 1 not completed;"
    )
    assert lines[1].startswith(f"kept {settings.checkpoint_dir}/nightly/000000001/")
    again = enter(settings)
    assert "goes on: opened " in again.line
    assert "2 of 3 workers completed, 1 resume." in again.line
    again.end(failed=False)


def test_of_many_that_are_kept_the_first_are_named(settings: Settings, named: NamedRun) -> None:
    """And how many more there are, and where."""
    for number in range(13):
        with pytest.raises(Exception, match="planned"):
            execute(named.settings, fail, worker_id=f"c{number:02d}")
    folder = f"{settings.checkpoint_dir}/nightly/000000001/"
    lines = named.end(failed=False)
    assert "13 not completed" in lines[0]
    assert lines[1:] == [*(f"kept {folder}count/c{number:02d}" for number in range(10)), f"and 3 more in {folder}"]


def test_a_driver_that_lost_its_run_closes_nothing(settings: Settings, named: NamedRun) -> None:
    """Another one has it: its end changes nothing, and says so."""
    other = enter(settings, takeover=True)
    log = StoredLog(open_store(settings.checkpoint_dir, create=False), "nightly/driver/")
    before, files = log.newest_run(), sorted(Path(settings.checkpoint_dir).rglob("nightly/0*/*/*/*.json"))
    (line,) = named.end(failed=False)
    assert line.startswith("run 'nightly' (#1) was taken over by ")
    assert log.newest_run() == before
    assert sorted(Path(settings.checkpoint_dir).rglob("nightly/0*/*/*/*.json")) == files
    assert other.end(failed=False)[0].startswith("run 'nightly' (#1) closed: 2 completed (2 from the record)")


def alone(settings: Settings) -> bool:
    """Whether the thread that says that a driver lives has nothing to do for this run any more."""
    return not [lease for lease in _lease._lessor._clients if lease._log.store.url == settings.checkpoint_dir]


def broken(*_: object, **__: object) -> Any:
    """A store that cannot be listed, for a while."""
    raise CheckpointStoreError("injected")


def test_a_driver_that_cannot_begin_gives_the_run_up(settings: Settings, named: NamedRun, monkeypatch: pytest.MonkeyPatch) -> None:
    """Entered, and then the store fails: the next driver, wherever it is, need not wait for one that has told its user that it failed."""
    named.end(failed=True)
    with monkeypatch.context() as failing:
        failing.setattr("faultguard._named.stored_workers", broken)
        with pytest.raises(CheckpointStoreError, match="injected"):
            enter(settings)
    assert alone(settings)
    head = StoredLog(open_store(settings.checkpoint_dir, create=False), "nightly/driver/").newest_run()
    assert head is not None
    assert (head.kind, head.instance) == ("left", 1)
    again = enter(settings)
    assert set(outcomes(again)) == {"a", "b"}
    again.end(failed=True)


def test_a_driver_whose_end_fails_lives_no_more(settings: Settings, named: NamedRun, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its process may go on for days: nobody is to take that for a driver of the run, which is open."""
    with monkeypatch.context() as failing:
        failing.setattr("faultguard._named.stored_workers", broken)
        with pytest.raises(CheckpointStoreError, match="injected"):
            named.end(failed=False)
    assert alone(settings)
    again = enter(settings)
    assert again.settings.instance == 1
    assert set(outcomes(again)) == {"a", "b"}
    again.end(failed=True)


def test_a_beat_after_the_end_takes_it_for_nobody_elses(settings: Settings, named: NamedRun, capfd: pytest.CaptureFixture[str]) -> None:
    """Between the driver's last record and its last beat, that record is the newest: its own, so the run was not taken from it."""
    assert named._log.run(runs.leave(named._record, "left", 2.0))
    named._lease._beat()
    assert named.taken is None
    assert "taken over" not in capfd.readouterr().err


def test_a_zombie_of_a_closed_run_is_told_nothing(settings: Settings) -> None:
    """What fences it stays when the checkpoints go: it may wake up later than that, and is neither told "durable" nor completes."""
    named = enter(settings)
    log = StoredLog(open_store(settings.checkpoint_dir, create=False), f"{named.settings.log_prefix('sum_up', 'w')}")

    def owner(attempt: int) -> Owner:
        """Of one of Ray's attempts."""
        return Owner(f"w{attempt}", task_id="t", ray_attempt=attempt, epoch=named.settings.epoch)

    held = []
    for attempt in range(4):
        granted = log.run(claim(Claimant(owner(attempt), "sum_up", "w", 9, named_run=True), 0.0))
        assert isinstance(granted, Granted)
        for batch in range(attempt):
            assert log.run(save(granted.held, Snapshot(msgspec.Raw(b"%d" % batch)), 0.0))
        held.append(granted.held)
    done = Outcome("completed", recorded=True, value=msgspec.Raw(b"3"))
    assert log.run(save(held[-1], None, 0.0, outcome=done))
    assert named.end(failed=False)[0].startswith("run 'nightly' (#1) closed: 1 completed")
    assert {record.kind for record in kept(log)} == {"claim", "end"}
    for zombie in held[:-1]:
        assert log.run(superseded(zombie))
        assert not log.run(save(zombie, Snapshot(msgspec.Raw(b"9")), 0.0)), "it is told that it is durable"
        assert not log.run(save(zombie, None, 0.0, outcome=done)), "a second outcome"
    again = enter(settings, resume="always")
    assert outcomes(again) == {"w": b"3"}
    again.end(failed=True)


def kept(log: StoredLog) -> list[Record]:
    """All intact records of a worker."""
    found = [decode_record(log.store.get(log.prefix + record_name(number)) or b"", number) for number in log.numbers()]
    return [record for record in found if record is not None]


def test_ten_instances_stay_whatever_their_numbers(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    """After damage the next instance has a number far above: what is counted is instances."""
    monkeypatch.setattr("faultguard._named.KEPT_INSTANCES", 3)
    for _ in range(6):  # one instance, twelve records of the run's log
        named = enter(settings)
        execute(named.settings, sum_up, worker_id="w")
        named.end(failed=True)
    driver = Path(settings.checkpoint_dir) / "nightly" / "driver"
    newest = max(driver.glob("*.json"))
    newest.write_bytes(newest.read_bytes()[:-9])
    numbers = []
    for _ in range(5):
        named = enter(settings, resume="never")
        assert execute(named.settings, sum_up, worker_id="w") == 3
        named.end(failed=False)
        numbers.append(named.settings.instance)
        left = {int(path.name) for path in driver.parent.iterdir() if path.name.isdigit()}
        assert left == {1, *numbers[-4:]}, "the newest, three before it, and the one that was not closed"
    assert numbers[0] > 10


def test_what_is_unfinished_stays_however_old(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    """The checkpoints of what failed are there for as long as their owner wants, whose driver may thaw; instances that were closed go."""
    monkeypatch.setattr("faultguard._named.KEPT_INSTANCES", 3)
    failed = enter(settings)
    with pytest.raises(Exception, match="planned"):
        execute(failed.settings, fail, worker_id="c")
    folder = Path(settings.checkpoint_dir) / "nightly"
    before = {path: path.read_bytes() for path in (folder / "000000001").rglob("*.json")}
    assert before
    for _ in range(6):
        named = enter(settings, resume="never")
        execute(named.settings, sum_up, worker_id="w")
        named.end(failed=False)
    assert {path: path.read_bytes() for path in (folder / "000000001").rglob("*.json")} == before
    assert sorted(path.name for path in folder.iterdir() if path.name.isdigit()) == [f"{number:09d}" for number in (1, 4, 5, 6, 7)]
    records = sorted(path for path in (folder / "driver").iterdir() if path.is_file())
    assert len(records) == 1 + 2 * 4
    assert "stays open" in failed.end(failed=False)[0]
    assert {path: path.read_bytes() for path in (folder / "000000001").rglob("*.json")} == before
    again = enter(settings)
    assert again.settings.instance == 8
    again.end(failed=True)


def test_asked_for_twice_by_one_driver(settings: Settings, named: NamedRun, caplog: pytest.LogCaptureFixture) -> None:
    """Another task with the id of a worker that this driver completed gets the outcome, with a warning; a later driver's without."""
    options = _attempt.TaskOptions(name="count")
    work = _attempt.Work(lambda: pytest.fail("it runs"), repeatable=True)

    def ask(settings: Settings, task_id: str, ray_attempt: int = 0) -> Any:
        """As a task of Ray's."""
        return _attempt.run_task(settings, _ray.Identity("01000000", "node", task_id, ray_attempt, "count", "count"), options, "a", work)

    assert ask(named.settings, "task-1", ray_attempt=1) == 3
    assert caplog.records == []
    assert ask(named.settings, "task-2") == 3
    (warning,) = caplog.records
    assert warning.levelname == "WARNING"
    assert "'count/a' was completed by this driver already: its recorded result is given, and nothing is run. " in warning.getMessage()
    named.end(failed=True)
    again = enter(settings)
    assert ask(again.settings, "task-1") == 3, "in a new cluster it may have the same id"
    assert len(caplog.records) == 1
    again.end(failed=True)


def test_what_is_submitted_while_the_run_ends_is_refused(settings: Settings, named: NamedRun, monkeypatch: pytest.MonkeyPatch) -> None:
    """It would run in a run that may be closed, and nobody would wait for it; a thread that submits is told."""
    monkeypatch.setattr(_ray, "is_driver", lambda: True)
    monkeypatch.setattr(_session, "_named", named)
    assert _session.named_run(named.settings) is named
    assert _session.named_run(settings) is None, "of an unnamed run"
    named.submits("count", "late")
    assert named.end(failed=False)[0].startswith("run 'nightly' (#1) stays open")
    with pytest.raises(UsageError, match="run 'nightly' has ended while work was submitted to it"):
        named.submits("count", "too late")
    for now in (None, enter(settings)):
        monkeypatch.setattr(_session, "_named", now)
        with pytest.raises(UsageError, match="run 'nightly' has ended while work was submitted to it"):
            _session.named_run(named.settings)
    assert now is not None
    now.end(failed=True)
