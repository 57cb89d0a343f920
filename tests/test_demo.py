"""The example on real digits, and the demo that kills it: it succeeds, and it can fail."""

from __future__ import annotations

import copy
import importlib.util
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

if TYPE_CHECKING:
    from collections.abc import Callable

SCRIPT = Path(__file__).parents[1] / "examples" / "train_digits.py"
TIMEOUT_S = 200
TOTAL = 100
VERDICT = "VERDICT: killed or not, the results are identical, bit for bit."


def run_script(folder: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run it as a user does, in a directory of its own."""
    command = [sys.executable, str(SCRIPT), *arguments]
    everything = {**os.environ, **environment}
    return subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S, check=False, cwd=folder, env=everything)


def lines(done: subprocess.CompletedProcess[str], beginning: str) -> list[str]:
    """The lines on stdout that begin so."""
    return [line for line in done.stdout.splitlines() if line.startswith(beginning)]


# --- the script -----------------------------------------------------------------------------------------------------


@pytest.mark.ray
@pytest.mark.slow
def test_demo_succeeds(tmp_path: Path) -> None:
    """With four SIGKILLs of workers and one of the manager the results are those of the undisturbed run, and the demo says so."""
    done = run_script(tmp_path, "--demo")
    assert done.returncode == 0, done.stdout + done.stderr
    assert VERDICT in done.stdout
    assert not lines(done, "FAILED")
    assert len(lines(done, "SIGKILL to alpha")) == 4
    assert len(lines(done, "SIGKILL to the manager")) == 1
    assert "Time saved: " in done.stdout
    assert len(lines(done, "  ")) >= 4, "live progress, every two seconds"
    assert all("alpha-0.001" in line and "%" in line for line in lines(done, "  "))
    (head,) = lines(done, "worker")
    columns = ["worker", "attempts", "causes", "cut in batch", "resumed at", "batches redone", "work saved", "accuracy"]
    assert [column for column in columns if column in head] == columns
    table = {line.split()[0]: line.split() for line in done.stdout.partition(head)[2].splitlines()[:5] if line.startswith("alpha-")}
    assert {worker: int(row[1]) for worker, row in table.items()} == {"alpha-0.001": 3, "alpha-0.01": 2, "alpha-0.1": 2}
    assert all(row[2].startswith("crash") for row in table.values())
    assert "A worker died" not in done.stdout  # Ray's own words for it, a screen full of them


@pytest.mark.ray
@pytest.mark.slow
def test_demo_fails_if_no_kill_lands_in_a_loop(tmp_path: Path) -> None:
    """Kills that are planned for after the last batch never happen, and the demo does not pass without them."""
    done = run_script(tmp_path, "--demo", "--epochs", "4", "--kill-at", "100")
    assert done.returncode == 1, done.stdout + done.stderr
    assert any("kill 1 landed" in line for line in lines(done, "FAILED")), done.stdout
    assert VERDICT not in done.stdout


@pytest.mark.ray
@pytest.mark.slow
def test_demo_beside_plain_ray(tmp_path: Path) -> None:
    """Plain Ray redoes every batch before the kill, faultguard few of them; and a manager that was spared fails the demo."""
    done = run_script(tmp_path, "--demo", "--plain-ray", "--epochs", "6", "--kill-at", "70", "--spare-manager")
    assert done.returncode == 1, done.stdout + done.stderr
    assert [("manager" in line) for line in lines(done, "FAILED")] == [True], done.stdout
    plain, ours = (int(lines(done, name)[0].split()[-3]) for name in ("Plain Ray:", "With faultguard:"))
    assert plain > 0.7 * 6 * 45 - 1
    assert ours < plain


@pytest.mark.ray
@pytest.mark.slow
def test_example_trains(tmp_path: Path, ray_temp_dir: str) -> None:
    """Without options it is the example: three classifiers that know most digits."""
    done = run_script(tmp_path, "--epochs", "2", RAY_ADDRESS="local", RAY_TMPDIR=ray_temp_dir)
    assert done.returncode == 0, done.stdout + done.stderr
    accuracies = [float(line.split()[2].rstrip(",")) for line in lines(done, "alpha-")]
    assert len(accuracies) == 3
    assert min(accuracies) > 0.8


# --- its judgement --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def script() -> Any:
    """The script as a module."""
    spec = importlib.util.spec_from_file_location("train_digits", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # its dataclasses look themselves up there
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def runs(script: Any, tmp_path: Path) -> tuple[Any, Any, Any]:
    """An undisturbed run, one in which the first worker was killed in batch 40 and went on in 30, and the fire it was under."""
    undisturbed = made_up(script, tmp_path / "undisturbed", {})
    first = next(iter(script.ALPHAS))
    disturbed = made_up(script, tmp_path / "disturbed", {first: [(11, 0, 41), (12, 30, TOTAL)]})
    disturbed.results[first]["failures"] = [("crash", 11)]
    fire = script.Fire(TOTAL, [script.Kill(first, 40, pid=11, hit=40)], manager_at=50, manager_hit=50, manager_pids=(1, 2))
    return undisturbed, disturbed, fire


def made_up(script: Any, folder: Path, attempts: dict[str, list[tuple[int, int, int]]]) -> Any:
    """A run whose diaries have these attempts: pid, first batch, one after the last; a batch takes a tenth of a second."""
    folder.mkdir()
    results, diaries = {}, {}
    for worker_id in script.ALPHAS:
        diaries[worker_id] = script.Diary(folder / worker_id)
        batches = [(pid, batch) for pid, start, stop in attempts.get(worker_id, [(10, 0, TOTAL)]) for batch in range(start, stop)]
        text = "".join(f"{pid} {batch} {index / 10}\n" for index, (pid, batch) in enumerate(batches))
        (folder / worker_id).write_text(text, encoding="ascii")
        diaries[worker_id].read()
        learned = {"coef_": np.arange(6.0).reshape(2, 3), "intercept_": np.zeros(2), "t_": 7.0, "rng": {"state": 3}}
        results[worker_id] = {"accuracy": 0.9, "result": learned, "failures": []}
    return script.Trained(results, diaries, 1.0)


def verdicts(script: Any, runs: tuple[Any, Any, Any]) -> list[str]:
    """What does not hold."""
    return [text for holds, text in script.judge(*runs) if not holds]


def test_judge_is_content(script: Any, runs: tuple[Any, Any, Any]) -> None:
    """A run in which everything held has no verdict against it."""
    assert verdicts(script, runs) == []


def test_diary_counts(script: Any, runs: tuple[Any, Any, Any]) -> None:
    """Batches 30 to 40 were redone, and the 3 s of those before were not."""
    diary = next(iter(runs[1].diaries.values()))
    assert diary.redone == 11
    assert diary.saved_s == pytest.approx(3.0)


def _last_bit(runs: Any) -> None:
    coefficients = runs[1].results["alpha-0.1"]["result"]["coef_"]
    coefficients[1, 2] = np.nextafter(coefficients[1, 2], 9)


def _other_generator(runs: Any) -> None:
    runs[1].results["alpha-0.1"]["result"]["rng"] = {"state": 4}


def _after_the_loop(runs: Any) -> None:
    runs[2].kills[0].hit = TOTAL - 1


def _never(runs: Any) -> None:
    runs[2].kills[0].hit = None


def _nothing_planned(runs: Any) -> None:
    runs[2].kills.clear()


def _from_zero(runs: Any) -> None:
    runs[1].diaries["alpha-0.001"].attempts[1].batches.insert(0, 0)


def _other_process(runs: Any) -> None:
    runs[1].results["alpha-0.001"]["failures"] = [("crash", 13)]


def _one_more_failure(runs: Any) -> None:
    runs[1].results["alpha-0.01"]["failures"] = [("exception", 10)]


def _same_manager(runs: Any) -> None:
    runs[2].manager_pids = (1, 1)


def _no_manager(runs: Any) -> None:
    runs[2].manager_pids = (1, 0)


def _spared_manager(runs: Any) -> None:
    runs[2].manager_hit = None


@pytest.mark.parametrize(
    ("spoil", "complaint"),
    [
        (_last_bit, "bit for bit"),
        (_other_generator, "bit for bit"),
        (_after_the_loop, "kill 1 landed"),
        (_never, "kill 1 landed"),
        (_nothing_planned, "0 kills"),
        (_from_zero, "above batch 0"),
        (_other_process, "record of alpha-0.001"),
        (_one_more_failure, "record of alpha-0.01 "),
        (_same_manager, "manager"),
        (_no_manager, "manager"),
        (_spared_manager, "manager"),
    ],
)
def test_judge_notices(script: Any, runs: tuple[Any, Any, Any], spoil: Callable[[Any], None], complaint: str) -> None:
    """Each thing that the demo promises fails it when it does not hold."""
    spoil(runs)
    assert any(complaint in text for text in verdicts(script, runs))


def test_fire_spares_the_last_batch(script: Any, runs: tuple[Any, Any, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that may have left its loop is never shot at."""
    shots: list[int] = []
    monkeypatch.setattr(script.os, "kill", lambda pid, _: shots.append(pid))
    fire = replace(runs[2], kills=[replace(copy.copy(runs[2].kills[0]), hit=None, pid=0)], manager_hit=None)
    fire.shoot("alpha-0.001", runs[1].diaries["alpha-0.001"])
    assert shots == []
