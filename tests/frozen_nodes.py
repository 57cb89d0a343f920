"""A driver whose nodes freeze, one after another, under two workers, and thaw while their successors work; prints what it saw.

It is a program of its own, because Ray reads its settings from the environment of each process, the driver's too.
"""

from __future__ import annotations

import json
import sys
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import ray

import faultguard
from faultguard._doctor import examine
from tests.nodes import WORK, alive, doctor, some_nodes
from tests.tasks import NOWAIT, Trace, expected, records, result, wait_until

INTERVAL_S = 1.0
BATCH_S = 0.05
BATCHES = 100
FROZEN_AT = {1: 10, 2: 20, 3: 30}  # at which batch each attempt is frozen
LAST = 4
WORKERS = ("saves", "beats")  # finds out by a save of its own; only by the answer to its heartbeat
WAIT_S = 120


@faultguard.recoverable(every=timedelta(hours=1), backoff=NOWAIT)
@ray.remote(num_cpus=1, resources={WORK: 1})
def works(worker_id: str, trace: Trace) -> Any:
    """Saves each batch up to where it is frozen; waits there for the ice. The worker "saves" goes on saving afterwards."""
    ckpt = faultguard.current()
    frozen_at = FROZEN_AT.get(ckpt.attempt, BATCHES)
    try:
        for batch in ckpt.batches(range(BATCHES)):
            trace.note("batch", worker_id, attempt=ckpt.attempt, batch=batch)
            ckpt.state["sum"] = ckpt.state.get("sum", 0) + batch
            ckpt.state.setdefault("seen", []).append(batch)
            time.sleep(BATCH_S)
            while batch >= frozen_at and not trace.notes(f"thawed {ckpt.attempt}"):
                time.sleep(BATCH_S)
            if batch < frozen_at or worker_id == "saves":
                ckpt.advance(wait=True)
    except faultguard.SupersededError:
        trace.note("superseded", worker_id, attempt=ckpt.attempt)
        raise
    return result(ckpt)


def reached(trace: Trace, attempt: int, batch: int) -> bool:
    """Whether both workers have come so far."""
    return {note["worker"] for note in trace.notes("batch") if (note["attempt"], note["batch"]) == (attempt, batch)} == set(WORKERS)


def pids(trace: Trace, attempt: int) -> list[int]:
    """The processes of an attempt of both workers."""
    return sorted({note["pid"] for note in trace.notes("batch") if note["attempt"] == attempt})


def main(directory: str, what: str) -> None:
    """Freeze "nodes": of the attempts 1, 2 and 3; thaw the first under the third, the others under the fourth; or one "raylet" alone."""
    trace = Trace(Path(directory) / "trace")
    with some_nodes() as nodes, faultguard.init(checkpoint_dir=Path(directory) / "checkpoints", heartbeat_interval=INTERVAL_S) as run:
        node = nodes.add()
        refs = [works.remote(worker, trace) for worker in WORKERS]
        ice: dict[int, Any] = {}
        if what == "raylet":
            wait_until(lambda: reached(trace, 1, FROZEN_AT[1]), WAIT_S)
            with nodes.frozen(node):
                wait_until(lambda: node.node_id not in alive(), WAIT_S)
            nodes.add()
            trace.note("thawed 1", "driver")
            trace.note("thawed 2", "driver")
        replaced_s, released_s = [], []
        for attempt, batch in FROZEN_AT.items() if what == "nodes" else ():
            wait_until(lambda attempt=attempt, batch=batch: reached(trace, attempt, batch), WAIT_S)
            if attempt == LAST - 1:
                released_s.append(thaw(ice, 1, trace))
            ice[attempt] = nodes.frozen(node, *pids(trace, attempt))
            ice[attempt].__enter__()
            frozen = time.monotonic()
            node = nodes.add()
            wait_until(lambda attempt=attempt: len(pids(trace, attempt + 1)) == len(WORKERS), WAIT_S)
            replaced_s.append(round(time.monotonic() - frozen, 1))
        released_s += [thaw(ice, attempt, trace) for attempt in sorted(ice)]
        results = ray.get(refs, timeout=WAIT_S)
        problems = [str(finding) for finding in examine(run.checkpoint_dir) if not finding.ok]
        ends = [records(run, "works", worker)[-1] for worker in WORKERS]
        seen = {
            "exact": results == [expected(BATCHES)] * len(WORKERS),
            "replaced_s": replaced_s,
            "released_s": released_s,
            "attempts": [end.attempt for end in ends],
            "causes": [[failure.cause for failure in end.failures] for end in ends],
            "problems": problems,
            "doctor": doctor(nodes, "--checkpoint-dir", run.checkpoint_dir).returncode,
            "ends": [[record.kind for record in records(run, "works", worker)].count("end") for worker in WORKERS],
            "notes": trace.notes(),
        }
    print(json.dumps(seen))


def thaw(ice: dict[int, Any], attempt: int, trace: Trace) -> float:
    """Let an attempt go on, and wait until its processes do not work for it any more; says how long that took."""
    mine = pids(trace, attempt)
    assert not any(is_released(pid) for pid in mine), "they are frozen in their task"
    trace.note(f"thawed {attempt}", "driver")
    thawed = time.monotonic()
    ice.pop(attempt).__exit__(None, None, None)
    wait_until(lambda: all(is_released(pid) for pid in mine), WAIT_S)
    return round(time.monotonic() - thawed, 1)


def is_released(pid: int) -> bool:
    """Whether a process is gone, or does something else by now: Ray shows in its title what it runs."""
    try:
        title = Path(f"/proc/{pid}/cmdline").read_bytes()
    except (FileNotFoundError, ProcessLookupError):
        return True
    return not title.startswith(b"ray::works")


if __name__ == "__main__":
    main(*sys.argv[1:])
