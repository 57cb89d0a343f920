"""A driver of the named run "nightly", as a program of its own, so that it can be killed, frozen, and started again."""

from __future__ import annotations

import json
import os
import sys
import time
from typing import Any

import ray

import faultguard
from tests.tasks import NOWAIT, Trace, result

RUN = "nightly"
WAITS_AT, FAILS_AT = 5, 2


@faultguard.recoverable(every=1, backoff=NOWAIT)
@ray.remote(num_cpus=0.5)
def works(worker_id: str, n: int, trace: Trace) -> Any:
    """A loop; "fails" does so once, "fails" and "waits" wait in batch 5 until they may go on."""
    ckpt = faultguard.current()
    for batch in ckpt.batches(range(n)):
        trace.note("batch", worker_id, attempt=ckpt.attempt, batch=batch, token=ckpt.token)
        if worker_id == "fails" and batch == FAILS_AT and ckpt.attempt == 1:
            raise ValueError("planned")
        while worker_id != "quick" and batch == WAITS_AT and not trace.notes("go"):
            time.sleep(0.01)
        ckpt.state["sum"] = ckpt.state.get("sum", 0) + batch
        ckpt.state.setdefault("seen", []).append(batch)
    return result(ckpt)


def main(spec: str) -> None:
    """Run the workers that the spec names, and note what came of them. `end`: how the driver ends."""
    asked = json.loads(spec)
    trace = Trace(asked["trace"])
    ray.init(**asked["ray"], log_to_driver=False)
    trace.note("begins", "driver")
    try:
        run = faultguard.init(run=RUN, checkpoint_dir=asked["checkpoint_dir"], **asked["init"])
    except faultguard.RunInUseError as error:
        trace.note("in use", "driver", host=error.host, holder=error.pid, since=error.since, text=str(error))
        return
    trace.note("has it", "driver", instance=run.instance)
    refs = {worker: works.remote(worker, 8, trace) for worker in asked["workers"]}
    for worker, ref in reversed(refs.items()):  # the first ones take their time
        try:
            trace.note("result", worker, value=ray.get(ref, timeout=120))
        except faultguard.SupersededError as error:
            trace.note("superseded", worker, text=str(error))
    try:
        works.remote("more", 1, trace)
    except faultguard.RunInUseError as error:
        trace.note("in use", "driver", holder=error.pid)
    else:
        ray.get(works.remote("more", 1, trace), timeout=120)
    if asked["end"] == "exit 1":
        sys.exit(1)
    if asked["end"] == "exception":
        raise RuntimeError("of the driver")
    if asked["end"] == "SIGKILL":
        os.kill(os.getpid(), 9)


if __name__ == "__main__":
    main(*sys.argv[1:])
