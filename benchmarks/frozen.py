"""A driver whose node freezes under its worker, and thaws beside the successor; prints what it saw. See `disasters.frozen`."""

from __future__ import annotations

import functools
import json
import sys
import time
from datetime import timedelta
from itertools import pairwise
from pathlib import Path
from typing import Any

import ray

import faultguard
from benchmarks.cluster import entered_through
from benchmarks.disasters import BATCH_S
from benchmarks.recovery import stamping
from benchmarks.stamps import Stamps
from tests.nodes import WORK, some_nodes
from tests.tasks import wait_until

FROZEN_AT = 20
BATCHES = 200
BESIDE = 30  # batches of the live attempt, before the thaw and after it
INTERVAL_S = 1.0
WAIT_S = 300


def task() -> Any:
    """Saves each batch, and stops at one in its first attempt until it has thawed; then it goes on saving, as a zombie would."""

    def work(path: str) -> tuple[int, int]:
        stamps = Stamps(path)
        handle = faultguard.current()
        for batch in handle.batches(range(BATCHES)):
            stamps.add("batch", batch=batch, attempt=handle.attempt)
            time.sleep(BATCH_S)
            handle.state["sum"] = handle.state.get("sum", 0) + batch
            zombie = handle.attempt == 1 and batch >= FROZEN_AT
            while zombie and not any(stamp["what"] == "thawed" for stamp in stamps.read()):
                time.sleep(BATCH_S)
            if zombie:
                stamps.add("tried")
            handle.advance(wait=True)
            if zombie:
                stamps.add("accepted")
        return handle.attempt, handle.state["sum"]

    return faultguard.recoverable(every=timedelta(hours=1))(ray.remote(num_cpus=1, resources={WORK: 1}, max_calls=1)(work))


def main(directory: str) -> None:
    """Freeze, wait for the successor, thaw."""
    Path(directory).mkdir()
    stamps = Stamps(Path(directory) / "stamps")

    def batches(attempt: int) -> list[dict[str, Any]]:
        return [stamp for stamp in stamps.read() if stamp["what"] == "batch" and stamp["attempt"] == attempt]

    run = functools.partial(faultguard.init, checkpoint_dir=Path(directory) / "checkpoints", heartbeat_interval=INTERVAL_S)
    with some_nodes() as nodes, run(progress=False), entered_through(functools.partial(stamping, stamps.path)):
        node = nodes.add(1)
        ref = task().remote(stamps.path)
        wait_until(lambda: len(batches(1)) > FROZEN_AT, WAIT_S)
        time.sleep(2 * BATCH_S)  # into its wait, not into a save
        with nodes.frozen(node, batches(1)[-1]["pid"]):
            frozen = time.time()
            nodes.add(1)
            wait_until(lambda: len(batches(2)) > BESIDE, WAIT_S)
            thawed = time.time()
            stamps.add("thawed")  # before it thaws: its raylet finds out that it was given up, and takes it along
        attempts, total = ray.get(ref, timeout=WAIT_S)
    events = stamps.read()
    live = batches(2)
    pauses = [(after["time"] - before["time"], after["time"] > thawed) for before, after in pairwise(live)]
    seen = {
        "ours_s": live[0]["time"] - [event["time"] for event in events if event["what"] == "entered"][-1],
        "total_s": live[0]["time"] - frozen,
        "tried": sum(event["what"] == "tried" for event in events),
        "accepted": sum(event["what"] == "accepted" for event in events),
        "exact": total == sum(range(BATCHES)),
        "attempts": attempts,
        "once": [event["batch"] for event in live] == [*range(live[0]["batch"], BATCHES)] and len({event["pid"] for event in live}) == 1,
        "pause_before_s": max(seconds for seconds, after in pauses if not after),
        "pause_after_s": max(seconds for seconds, after in pauses if after),
    }
    print(json.dumps(seen))


if __name__ == "__main__":
    main(*sys.argv[1:])
