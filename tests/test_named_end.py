"""The end of a named run, without a cluster: wherever its driver dies, what is on record stays readable, and the next one goes on."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from faultguard._log import StoredLog
from faultguard._named import NamedRun
from faultguard._settings import Settings
from faultguard.storage import open_store, store_id
from tests.test_outcomes import execute
from tests.test_run_end import fail, sum_up

if TYPE_CHECKING:
    from collections.abc import Iterator

DIES = """
import os, sys
from faultguard._named import NamedRun
from faultguard._settings import decode_settings
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
    assert lines[0].startswith("run 'nightly' (#1) stays open: 2 completed (0 from the record), 0 failures survived. 1 not completed;")
    assert lines[1].startswith(f"kept {settings.checkpoint_dir}/nightly/000000001/")
    again = enter(settings)
    assert "goes on: opened " in again.line
    assert "2 of 3 workers completed, 1 resume." in again.line
    again.end(failed=False)


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
