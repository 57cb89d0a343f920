"""What listening to heartbeats takes of the manager's processor, and how many processes it hears at the interval asked for."""

from __future__ import annotations

import asyncio
import os
import random
import time
from pathlib import Path
from typing import Any

import ray

import faultguard
from benchmarks.budget import Bench, Measured
from benchmarks.cluster import cluster
from faultguard import _ray
from faultguard._core.pace import SHARE
from faultguard._session import current_settings
from faultguard._settings import PROTOCOL

__all__ = ["manager"]

PROCESSES = 4  # that send; each beats for many, in one call for each, as that many processes would
FACTOR = 10
TIMEOUT_S = 600


def manager(bench: Bench) -> Measured:
    """First few that beat, for what a beat costs; then ten times as many as that allows at this interval."""
    interval_s, few, seconds = (0.5, 40, 4.0) if bench.quick else (5.0, 400, 40.0)
    with cluster(bench, heartbeat_interval=interval_s, heartbeat_timeout=12 * interval_s):
        handle = faultguard.manager()
        senders = [_Senders.remote() for _ in range(PROCESSES)]  # type: ignore[attr-defined] # Ray's
        alone = _listen(handle, senders, few, interval_s, seconds)
        most = round(few * SHARE / alone["share"])
        found = _listen(handle, senders, FACTOR * most, interval_s, seconds)
        alarms = _alarms()
    if alarms:
        raise RuntimeError(f"{len(alarms)} false alarms, the first: {alarms[0]}")
    share, cost_ms, many = 100 * alone["share"], 1e3 * alone["cost_s"], FACTOR * most
    details = (
        f"{few} at {interval_s:g} s: {share:.1f} % of a core, {cost_ms:.2f} ms a beat; N = {most}, then it stretches",
        f"10 N = {many}: {found['calls']:.0f} beats/s, told every {found['interval_s']:.1f} s; slowest reply {found['slowest_s']:.2f} s",
        f"no false alarm; sent by {PROCESSES} processes, a call for each that beats; {seconds:g} s each, when all had been heard",
    )
    return Measured(100 * found["share"], details)


def _listen(handle: Any, senders: list[Any], count: int, interval_s: float, seconds: float) -> dict[str, float]:
    """So many beat; measured when all have begun, and the interval is what it will be."""
    settings = current_settings()
    pid = ray.get(handle.hello.remote(PROTOCOL, settings.store_id, settings.run), timeout=TIMEOUT_S)["pid"]
    begin_s = seconds  # nobody's workers all begin at once
    each = count // len(senders)
    until_s = begin_s + 2 * seconds
    refs = [
        sender.beat.remote(
            handle, [_said(settings.run, f"{count}-{index}-{number}") for number in range(each)], interval_s, begin_s, until_s
        )
        for index, sender in enumerate(senders)
    ]
    time.sleep(begin_s + seconds)
    before, began = _cpu_s(pid), time.monotonic()
    time.sleep(0.9 * seconds)
    share = (_cpu_s(pid) - before) / (time.monotonic() - began)
    found = ray.get(refs, timeout=TIMEOUT_S)
    late = [said for said in found if said["calls"]]
    calls = sum(said["calls"] for said in late) / seconds
    return {
        "share": share,
        "calls": calls,
        "cost_s": share / calls,
        "interval_s": max(said["interval_s"] for said in found),
        "slowest_s": max(said["slowest_s"] for said in found),
    }


@ray.remote(num_cpus=0)
class _Senders:
    """Sends what many processes would."""

    async def beat(self, handle: Any, said: list[dict[str, Any]], interval_s: float, begin_s: float, until_s: float) -> dict[str, float]:
        """Beat for each, in a call of its own, as often as the manager says. Gives what was seen in the last third."""
        began = time.monotonic()
        found = {"calls": 0.0, "interval_s": 0.0, "slowest_s": 0.0}

        async def one(beat: dict[str, Any]) -> None:
            told_s = interval_s
            due = began + random.uniform(0, begin_s)
            while due < began + until_s:
                await asyncio.sleep(due - time.monotonic())
                sent = time.monotonic()
                _, told = await handle.beat.remote([{**beat, "interval_s": told_s}])
                if sent > began + until_s * 2 / 3:
                    found["calls"] += 1
                    found["slowest_s"] = max(found["slowest_s"], time.monotonic() - sent)
                    found["interval_s"] = told
                told_s, due = told, sent + told
            await handle.beat.remote([{**beat, "final": True}])

        await asyncio.gather(*(one(beat) for beat in said))
        return found


def _said(run: str, worker_id: str) -> dict[str, Any]:
    """A beat as a worker sends it; its process is on no host that could be looked at."""
    return {
        "task": "bench",
        "worker_id": worker_id,
        "run": run,
        "attempt": 1,
        "token": 1,
        "status": "active",
        "current_batch": 17,
        "position": (3, 17),
        "total_batches": 1000,
        "node_id": ray.get_runtime_context().get_node_id(),
        "boot_id": "elsewhere",
        "pid": hash(worker_id),
        "start_time": 1,
        "started_at": time.time(),
        "last_checkpoint": f"/checkpoints/{run}/bench/{worker_id}/000000042.json",
        "failure_count": 0,
        "cancels": 0,
    }


def _cpu_s(pid: int) -> float:
    """Processor time of a process so far."""
    fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _alarms() -> list[str]:
    """What the manager has said of workers that were silent."""
    logs = (Path(_ray.session_dir()) / "logs").glob("worker-*.err")
    return [line for log in logs for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if " is silent: " in line]
