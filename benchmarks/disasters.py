"""What a worker pays that is killed again and again, and how soon one goes on whose node has frozen."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import ray

import faultguard
from benchmarks.budget import Bench, Measured
from benchmarks.cluster import cluster
from benchmarks.handle import plain_state
from benchmarks.stamps import Stamps
from benchmarks.timing import median

__all__ = ["frozen", "killed"]

BATCH_S = 0.05
TIMEOUT_S = 900
PAUSE_S = 1.0  # that the live attempt may make while the frozen one thaws: one heartbeat


# --- killed, again and again ----------------------------------------------------------------------------------------


def killed(bench: Bench) -> Measured:
    """Side by side: one that is left alone, and some that are killed whenever they have worked for so long since they resumed."""
    work_s, every_s, rounds = (6.0, 2.0, 1) if bench.quick else (120.0, 10.0, 3)
    with cluster(bench, cpus=rounds + 1):
        files = [str(bench.directory / f"stamps-{index}") for index in range(rounds + 1)]
        refs = [_work.remote(file, round(work_s / BATCH_S), every_s if index else math.inf) for index, file in enumerate(files)]
        attempts = ray.get(refs, timeout=TIMEOUT_S)
    undisturbed, *disturbed = [_took(Stamps(file).read()) for file in files]
    if attempts[0] != 1 or min(attempts[1:]) < work_s / every_s:
        raise RuntimeError(f"attempts: {attempts}, which is not what was to be measured")
    batches = [sum(stamp["what"] == "batch" for stamp in Stamps(file).read()) for file in files]
    kills = ", ".join(str(number - 1) for number in attempts[1:])
    again = ", ".join(str(number - batches[0]) for number in batches[1:])
    details = (
        f"{median(disturbed):.1f} s over {undisturbed:.1f} s undisturbed beside it; {work_s:g} s in batches of {BATCH_S * 1e3:g} ms",
        f"killed {kills} times, after every {every_s:g} s of resumed work; {again} batches done again",
    )
    return Measured(median(disturbed) / undisturbed, details)


@faultguard.recoverable(-1, state=plain_state())
@ray.remote(num_cpus=1)
def _work(path: str, batches: int, every_s: float) -> int:
    """Wait in each batch; die when this attempt has worked for `every_s`. Gives the number of attempts."""
    handle, stamps = faultguard.current(), Stamps(path)
    began = time.monotonic()
    for batch in handle.batches(range(batches)):
        stamps.add("batch", batch=batch)
        time.sleep(BATCH_S)
        handle.state["count_0"] += 1
        if time.monotonic() - began > every_s:
            os.kill(os.getpid(), signal.SIGKILL)
    stamps.add("done")
    return handle.attempt


def _took(stamps: list[dict[str, Any]]) -> float:
    """Seconds from the first batch to the end."""
    seconds: float = stamps[-1]["time"] - stamps[0]["time"]
    return seconds


# --- a node that freezes --------------------------------------------------------------------------------------------


def frozen(bench: Bench) -> Measured:
    """In a driver of its own: Ray reads its settings from the environment of each process."""
    rounds = 1 if bench.quick else 3
    found = [_freeze(bench, index) for index in range(rounds)]
    worst = max(found, key=lambda one: float(one["ours_s"]))
    total, ours = (", ".join(f"{one[key]:.2f}" for one in found) for key in ("total_s", "ours_s"))
    details = (
        f"node frozen → first batch of the next attempt {total} s (Ray's defaults: 440 s); of it ours {ours} s, imports included",
        f"after the thaw the old attempts tried to save {sum(one['tried'] for one in found)} times, and 0 were accepted",
        _live(max(found, key=lambda one: float(one["pause_after_s"]))),
    )
    return Measured(float(worst["ours_s"]), details)


def _live(one: dict[str, Any]) -> str:
    """How the live attempt fared. Had it been superseded, or its process been ended, a heartbeat at least would have gone by."""
    before_s, after_s = one["pause_before_s"], one["pause_after_s"]
    verdict = "undisturbed" if after_s <= max(before_s, PAUSE_S) else "DISTURBED"
    pauses = f"{1e3 * before_s:.0f} ms before the thaw, {1e3 * after_s:.0f} ms after"
    return f"the live one: {verdict}, each batch once in one process; longest pause between batches {pauses}, at most {PAUSE_S:g} s allowed"


def _freeze(bench: Bench, index: int) -> dict[str, Any]:
    """One round; raises if anything of what must not be was seen."""
    command = [sys.executable, "-m", "benchmarks.frozen", str(bench.directory / f"frozen-{index}")]
    environment = {**os.environ, **faultguard.recommended_ray_env(), "RAY_USAGE_STATS_ENABLED": "0"}
    root = Path(__file__).resolve().parents[1]
    done = subprocess.run(command, env=environment, cwd=root, capture_output=True, text=True, timeout=TIMEOUT_S, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr[-3000:]}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    if found["accepted"] or not found["exact"] or not found["once"] or found["attempts"] != 2:  # noqa: PLR2004 - the frozen one, and its successor
        raise RuntimeError(f"the frozen attempt has disturbed the live one: {found}")
    if not found["tried"]:
        raise RuntimeError(f"the frozen attempt did not try to save, so that nothing was measured: {found}")
    return found
