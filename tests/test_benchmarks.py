"""The benchmarks run, print what they found, and invent nothing. How fast it is, is no matter of a test."""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from benchmarks import disasters
from benchmarks.budget import Bench

if TYPE_CHECKING:
    from benchmarks.budget import Measured

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"
IN_PROCESS = ("loop", "snapshot", "durable", "resumable")  # the rows that need no cluster


def run(*arguments: str, program: str = "run.py") -> subprocess.CompletedProcess[str]:
    """One run of the benchmarks, with its output."""
    command = [sys.executable, str(BENCHMARKS / program), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, list[dict[str, Any]]]:
    """What a quick run prints, and the rows that it writes."""
    directory = tmp_path_factory.mktemp("bench")
    file = directory / "rows.json"
    only = ",".join(IN_PROCESS)
    done = run("--quick", "--only", only, "--json", str(file), "--dir", str(directory))
    assert done.returncode == 0, done.stdout + done.stderr
    assert list(directory.iterdir()) == [file]  # nothing else is left behind
    return done.stdout, json.loads(file.read_text(encoding="utf-8"))


@pytest.mark.parametrize("name", IN_PROCESS)
def test_row_shows_value_bar_and_verdict(quick: tuple[str, list[dict[str, Any]]], name: str) -> None:
    """Each row says what was measured, the bar, and whether it is met; the number it was compared with stands below it."""
    text, rows = quick
    (row,) = [row for row in rows if row["name"] == name]
    assert math.isfinite(row["value"])
    assert row["value"] > 0
    assert row["verdict"] == ("meets" if row["value"] <= row["bar"] else "MISSES")
    value = re.escape(f"{row['value']:.3g}")
    assert re.search(rf"^{name} +{value} .*≤ .*{row['verdict']}", text, re.MULTILINE)
    assert row["details"]
    assert all(line in text for line in row["details"])


def test_ratio_is_within_one_run(quick: tuple[str, list[dict[str, Any]]]) -> None:
    """The durable row is a ratio over the same bytes written by hand, and every row names its other side."""
    text, rows = quick
    assert next(row for row in rows if row["name"] == "durable")["unit"] == "x"
    assert "by hand" in text
    assert "x the bare loop" in text
    assert "x msgspec's encoding" in text


def test_miss_is_explained(quick: tuple[str, list[dict[str, Any]]]) -> None:
    """What misses its bar is followed by where its time goes; what meets it is not."""
    _, rows = quick
    for row in rows:
        assert bool(row["explained"]) == (row["verdict"] == "MISSES")


def test_unknown_row_is_refused() -> None:
    """A name that is no row is an error that lists the rows, not an empty run."""
    done = run("--only", "lop")
    assert done.returncode == 2
    assert "loop" in done.stderr


def test_row_that_cannot_be_measured_fails_the_run(tmp_path: Path) -> None:
    """A row without a value is an error of the run, and does not hide the others."""
    file = tmp_path / "not-a-directory"
    file.write_text("")
    done = run("--quick", "--only", "loop,snapshot", "--dir", str(file))
    assert done.returncode == 2
    for row in ("loop", "snapshot"):
        assert re.search(rf"^{row} +- .*NOT MEASURED", done.stdout, re.MULTILINE)


ZOMBIE = {"accepted": 0, "tried": 1, "exact": True, "once": True, "attempts": 2, "ours_s": 0.5, "total_s": 20.0}
PAUSES = {"pause_before_s": 0.1, "pause_after_s": 0.2}


def freeze(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, **seen: Any) -> Measured:
    """The row of the frozen node, had its driver seen this."""
    said = subprocess.CompletedProcess([], 0, json.dumps({**ZOMBIE, **PAUSES, **seen}), "")
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: said)
    return disasters.frozen(Bench(directory=tmp_path, quick=True))


def test_a_zombie_that_did_nothing_proves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """That none of its saves was accepted says something only if it tried one."""
    assert "tried to save 1 times, and 0 were accepted" in freeze(tmp_path, monkeypatch).details[1]
    with pytest.raises(RuntimeError, match="did not try to save"):
        freeze(tmp_path, monkeypatch, tried=0)


@pytest.mark.parametrize("seen", [{"accepted": 1}, {"exact": False}, {"once": False}, {"attempts": 3}], ids=str)
def test_a_live_attempt_that_was_disturbed_fails_the_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seen: dict[str, Any]) -> None:
    """Nothing is reported then."""
    with pytest.raises(RuntimeError, match="disturbed the live one"):
        freeze(tmp_path, monkeypatch, **seen)


@pytest.mark.parametrize(("pause_s", "said"), [(0.9, "undisturbed"), (1.1, "DISTURBED")])
def test_undisturbed_has_a_bound(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pause_s: float, said: str) -> None:
    """A pause of the live attempt that is longer than a heartbeat, and than all before the thaw, is shown as what it is."""
    assert f"the live one: {said}, " in freeze(tmp_path, monkeypatch, pause_after_s=pause_s).details[2]


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.parametrize("name", ["killed", "manager", "frozen", "named"])
def test_row_on_a_cluster_is_measured(tmp_path: Path, name: str) -> None:
    """It has a value, and says how it came about; each raises if what it measures did not take place."""
    file = tmp_path / "rows.json"
    done = run("--quick", "--only", name, "--json", str(file), *["--explain"][: name == "named"])
    assert done.returncode == 0, done.stdout + done.stderr
    (row,) = json.loads(file.read_text(encoding="utf-8"))
    assert math.isfinite(row["value"])
    assert row["value"] > 0
    assert len(row["details"]) > 1
    assert name != "named" or any(" own " in line for line in row["explained"]), "asked where the time goes, it says so"


def test_unknown_fault_is_refused() -> None:
    """A name that is no fault is an error that lists them, not an empty run."""
    done = run("--only", "SIGKIL", program="detection.py")
    assert done.returncode == 2
    assert "no such fault: SIGKIL; there are exception, " in done.stderr


@pytest.mark.ray
@pytest.mark.slow
def test_how_soon_a_fault_is_made_good_is_measured() -> None:
    """Each that is asked for has a line, and each measurement a run of its own."""
    faults = ("hung in Python", "SIGKILL", "all records damaged")
    done = run("--rounds", "1", "--only", ",".join(faults), program="detection.py")
    assert done.returncode == 0, done.stdout + done.stderr
    head, *lines = done.stdout.splitlines()
    assert head.startswith("heartbeat_interval 1 s, ")
    assert [line[:32].rstrip() for line in lines] == list(faults)
    assert done.stderr.count("' starts. Store ") == len(faults)
