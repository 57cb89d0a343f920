"""A driver of the named run "nightly", as a program of its own, so that it can be killed, frozen, and started again."""

from __future__ import annotations

import json
import os
import sys
import time
from typing import Any

import ray

import faultguard
from faultguard import _named
from tests.tasks import NOWAIT, Trace, result, wait_until

RUN = "nightly"
WAITS_AT, FAILS_AT = 5, 2


@faultguard.recoverable(every=1, backoff=NOWAIT)
@ray.remote(num_cpus=0.5)
def works(worker_id: str, n: int, trace: Trace) -> Any:
    """A loop; "fails" and "waits" wait in batch 5 until they may go on; "fails" fails once, and is sure of every batch."""
    ckpt = faultguard.current()
    try:
        for batch in ckpt.batches(range(n)):
            trace.note("batch", worker_id, attempt=ckpt.attempt, batch=batch, token=ckpt.token)
            if worker_id == "fails" and batch == FAILS_AT and ckpt.attempt == 1:
                raise ValueError("planned")
            while worker_id != "quick" and batch == WAITS_AT and not trace.notes("go"):
                time.sleep(0.01)
            ckpt.state["sum"] = ckpt.state.get("sum", 0) + batch
            ckpt.state.setdefault("seen", []).append(batch)
            if worker_id == "fails":
                ckpt.advance(wait=True)
    except faultguard.SupersededError:
        trace.note("fenced", worker_id, batch=batch)
        raise
    return result(ckpt)


def stop_at(name: str, trace: Trace) -> None:
    """Where the driver calls that function for the first time, it waits until the test has done its harm."""
    call = getattr(_named, name)

    def waits(*args: Any, **keywords: Any) -> Any:
        trace.note("stops", "driver")
        wait_until(lambda: trace.notes("harm"))
        return call(*args, **keywords)

    setattr(_named, name, waits)


def work(asked: dict[str, Any], trace: Trace) -> None:
    """Run the workers that are asked for, on a node with the resource `on`, and note what came of them; then one more."""
    there = works.options(resources={asked["on"]: 1}) if asked["on"] else works
    refs = {worker: there.remote(worker, 8, trace) for worker in asked["workers"]}
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


def end(how: str) -> None:
    """End as a driver may, or as the end of the program does."""
    if how == "shutdown":
        faultguard.shutdown()
    if how == "exit 1":
        sys.exit(1)
    if how == "exception":
        raise RuntimeError("of the driver")
    if how == "SIGKILL":
        os.kill(os.getpid(), 9)


def main(spec: str) -> None:
    """Be a driver of the run, and do what the spec says. `stops`: where it waits for harm to the store."""
    asked = json.loads(spec)
    trace = Trace(asked["trace"])
    ray.init(**asked["ray"], log_to_driver=False)
    trace.note("begins", "driver")
    if asked["stops"]:
        stop_at(asked["stops"], trace)
    try:
        run = faultguard.init(run=RUN, checkpoint_dir=asked["checkpoint_dir"], **asked["init"])
        trace.note("has it", "driver", instance=run.instance)
        work(asked, trace)
        end(asked["end"])
    except faultguard.RunInUseError as error:
        trace.note("in use", "driver", host=error.host, holder=error.pid, since=error.since, text=str(error))
    except faultguard.CheckpointStoreError as error:  # told; the process goes on with something else
        trace.note("failed", "driver", text=str(error))
        wait_until(lambda: trace.notes("leave"))


if __name__ == "__main__":
    main(*sys.argv[1:])
