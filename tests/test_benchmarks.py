"""The benchmarks run, print what they found, and invent nothing. How fast it is, is no matter of a test."""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

RUN = Path(__file__).resolve().parents[1] / "benchmarks" / "run.py"
IN_PROCESS = ("loop", "snapshot", "durable")  # the rows that need no cluster
LATER = "named"


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    """One run of the benchmarks, with its output."""
    return subprocess.run([sys.executable, str(RUN), *arguments], capture_output=True, text=True, timeout=240, check=False)


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, list[dict[str, Any]]]:
    """What a quick run prints, and the rows that it writes."""
    directory = tmp_path_factory.mktemp("bench")
    file = directory / "rows.json"
    only = ",".join([*IN_PROCESS, LATER])
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


def test_later_part_is_not_measured(quick: tuple[str, list[dict[str, Any]]]) -> None:
    """A row that needs a later part says so, and has no value."""
    text, rows = quick
    (row,) = [row for row in rows if row["name"] == LATER]
    assert row["value"] is None
    assert row["verdict"].startswith("part ")
    assert re.search(rf"^{LATER} +- .*{row['verdict']}", text, re.MULTILINE)


def test_unknown_row_is_refused() -> None:
    """A name that is no row is an error that lists the rows, not an empty run."""
    done = run("--only", "lop")
    assert done.returncode == 2
    assert "loop" in done.stderr


def test_row_that_cannot_be_measured_fails_the_run(tmp_path: Path) -> None:
    """A row without a value is an error of the run, and does not hide the others."""
    file = tmp_path / "not-a-directory"
    file.write_text("")
    done = run("--quick", "--only", "loop,named", "--dir", str(file))
    assert done.returncode == 2
    assert "NOT MEASURED" in done.stdout
    assert "part 3" in done.stdout


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.parametrize("name", ["killed", "manager"])
def test_row_on_a_cluster_is_measured(tmp_path: Path, name: str) -> None:
    """It has a value, and says how it came about; each raises if what it measures did not take place."""
    file = tmp_path / "rows.json"
    done = run("--quick", "--only", name, "--json", str(file))
    assert done.returncode == 0, done.stdout + done.stderr
    (row,) = json.loads(file.read_text(encoding="utf-8"))
    assert math.isfinite(row["value"])
    assert row["value"] > 0
    assert len(row["details"]) > 1
