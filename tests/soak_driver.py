"""A driver of a named run for the soak, as a program of its own, so that it can be killed and started again."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import ray

import faultguard
from tests.soak_tasks import Job, Limits, decorated
from tests.tasks import Trace, wait_until

READ_S = 120


def main(spec: str) -> None:
    """Run the workers that the spec names, note what came of them, and stay until their logs were read."""
    asked = json.loads(spec)
    trace = Trace(asked["trace"])
    ray.init(address=asked["address"], log_to_driver=False)
    jobs = [Job(**{**job, "limits": Limits(**job["limits"])}) for job in asked["jobs"]]
    with faultguard.init(run=asked["run"], checkpoint_dir=asked["checkpoint_dir"], progress=False, **asked["init"]):
        refs = [decorated.remote(job) for job in jobs]
        trace.note("submitted", "driver")
        for job, ref in zip(jobs, refs, strict=True):
            trace.note("result", job.worker_id, value=ray.get(ref))
        wait_until(Path(asked["read"]).exists, READ_S)


if __name__ == "__main__":
    main(*sys.argv[1:])
