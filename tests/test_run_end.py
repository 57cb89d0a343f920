"""What the end of a run leaves in its directory: records, what failed, and nothing half-done."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import faultguard
from faultguard import _run
from faultguard._core.names import record_number
from faultguard._core.records import Record, decode_record
from faultguard._run import end_run
from faultguard._settings import Settings
from faultguard.storage import open_store, store_id
from tests.test_outcomes import execute

END = """
import os, sys
from faultguard._run import end_run
from faultguard._settings import decode_settings
left, unlink = int(sys.argv[2]), os.unlink

def dies(*args, **keywords):
    global left
    if os.path.basename(args[0]).startswith("."):  # the temporary name of a record, where it has one
        return unlink(*args, **keywords)
    if left == 0:
        os._exit(9)
    left -= 1
    return unlink(*args, **keywords)

os.unlink = dies
end_run(decode_settings(sys.argv[1].encode()), failed=False)
"""
DIED = 9


def a_run(tmp_path: Path, name: str = "run") -> Settings:
    """A run without a cluster."""
    store = open_store(str(tmp_path / "store"))
    return Settings(run=name, checkpoint_dir=store.url, store_id=store_id(store), job_id="01000000")


def sum_up() -> int:
    """A task that completes."""
    ckpt = faultguard.current()
    for batch in ckpt.batches(range(3)):
        ckpt.state["sum"] = ckpt.state.get("sum", 0) + batch
        ckpt.advance(wait=True)
    return int(ckpt.state["sum"])


def fail() -> None:
    """A task that does not."""
    for _ in faultguard.batches(range(3)):
        raise ValueError("planned")


def done(settings: Settings, *, failures: bool = True) -> None:
    """Two workers that completed, and one that failed."""
    for worker in ("a", "b"):
        assert execute(settings, sum_up, worker_id=worker) == 3
    if failures:
        with pytest.raises(faultguard.MaxFailuresExceeded):
            execute(settings, fail, worker_id="c")


def files(settings: Settings) -> dict[str, list[Path]]:
    """The records of each worker, oldest first."""
    found: dict[str, list[Path]] = {}
    for path in sorted((Path(settings.checkpoint_dir) / settings.run).rglob("*.json")):
        found.setdefault(path.parent.name, []).append(path)
    return found


def newest(paths: list[Path]) -> Record:
    """What a worker's log says."""
    number = record_number(paths[-1].name)
    assert number is not None
    record = decode_record(paths[-1].read_bytes(), number)
    assert record is not None
    return record


def summary(settings: Settings, name: str = "run") -> dict[str, Any]:
    """What stays of a run."""
    path = Path(settings.checkpoint_dir) / "runs" / f"{name}.json"
    workers: list[dict[str, Any]] = json.loads(path.read_text("utf-8"))["workers"]
    return {worker["worker_id"]: worker for worker in workers}


def test_the_records_of_the_last_ten_stay(tmp_path: Path) -> None:
    """Every run leaves its records; the eleventh takes the oldest away, and touches no checkpoint of another run."""
    runs = [a_run(tmp_path, f"run-{number:02d}") for number in range(_run.KEPT_RUNS + 2)]
    for settings in runs:
        done(settings, failures=settings is runs[0])
        end_run(settings, failed=False)
    kept = sorted(path.stem for path in (Path(runs[0].checkpoint_dir) / "runs").iterdir())
    assert _run.KEPT_RUNS == 10
    assert kept == [settings.run for settings in runs[2:]]
    assert list(files(runs[0])) == ["c"], "what failed is kept for as long as its owner wants"


def test_a_run_without_workers_leaves_nothing(tmp_path: Path) -> None:
    """No record of nothing, which would push the tenth out."""
    settings = a_run(tmp_path)
    end_run(settings, failed=False)
    assert not (Path(settings.checkpoint_dir) / "runs").exists()


def test_a_death_half_way_through_the_end_loses_nothing(tmp_path: Path) -> None:
    """Wherever the driver dies while it deletes: outcomes are in the records, what failed is whole, and the next try finishes."""
    settings = a_run(tmp_path)
    done(settings)
    total = sum(len(paths) for worker, paths in files(settings).items() if worker != "c")
    failed = files(settings)["c"]
    deaths = 0
    while deaths < 4 * total:
        command = [sys.executable, "-c", END, settings.encode().decode(), "1"]  # one delete, and no more
        code = subprocess.run(command, capture_output=True, timeout=60, check=False).returncode
        left = files(settings)
        outcomes = summary(settings)
        assert {worker: fields["status"] for worker, fields in outcomes.items()} == {"a": "completed", "b": "completed", "c": "failed"}
        assert outcomes["a"]["outcome"]["value"] == 3
        assert left["c"] == failed
        for worker in left.keys() - {"c"}:
            assert newest(left[worker]).kind == "end", "a worker that is partly deleted is still one that completed"
        if code == 0:
            break
        assert code == DIED
        deaths += 1
    assert deaths >= total - 1, "it died between any two deletes"
    assert list(left) == ["c"]


def test_of_many_that_are_kept_the_first_are_named(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """And how many more there are, and where."""
    settings = a_run(tmp_path)
    for number in range(13):
        with pytest.raises(faultguard.MaxFailuresExceeded):
            execute(settings, fail, worker_id=f"c{number:02d}")
    end_run(settings, failed=False)
    lines = capfd.readouterr().err.splitlines()
    folder = f"{settings.checkpoint_dir}/run/"
    assert lines[-12] == "faultguard: run 'run' ended: 0 completed, 0 failures survived, 0 quarantined, 13 not completed."
    assert lines[-11:-1] == [f"faultguard: kept {folder}count/c{number:02d}" for number in range(10)]
    assert lines[-1] == f"faultguard: and 3 more in {folder}"


def test_a_driver_that_failed_keeps_all(tmp_path: Path) -> None:
    """The checkpoints of what completed may be what its owner looks for."""
    settings = a_run(tmp_path)
    done(settings)
    before = files(settings)
    end_run(settings, failed=True)
    assert files(settings) == before
    assert set(summary(settings)) == {"a", "b", "c"}
