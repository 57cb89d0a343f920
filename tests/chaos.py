"""A task that dies as a seeded plan says, also at named points inside the library, and the plan."""

from __future__ import annotations

import os
import random
import signal
import threading
import time
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ray

import faultguard
from faultguard._core.records import decode_record
from faultguard.storage import local
from tests.tasks import CRASHES, NOWAIT, Trace, die, wait_until

if TYPE_CHECKING:
    from collections.abc import Mapping

STEPS = ("before_link", "after_link", "before_dir_fsync", "before_delete", "after_delete")
POINTS = (*STEPS, "before_first_batch", "during_back_off")
ACK_EVERY = 4
BATCH_S = 0.01  # stands for work, so that a loop lasts longer than a write
BACK_OFF_S = 0.3
ENOUGH_S = 120

_create = local.LocalStore.create

Plan = dict[str, dict[int, str]]
"""For each worker, at which batch it dies, and how."""


@dataclass(frozen=True)
class Size:
    """How much chaos: deaths of each kind, spread over all workers."""

    workers: int
    batches: int
    exceptions: int
    crashes: int
    at_points: int

    @property
    def deaths(self) -> int:
        """All of them."""
        return self.exceptions + self.crashes + self.at_points


class PlannedError(Exception):
    """An exception of the plan."""


def make_plan(seed: int, size: Size) -> Plan:
    """Spread the deaths over workers and batches; the same for the same seed."""
    rng = random.Random(seed)
    kinds = ["exception"] * size.exceptions
    kinds += [CRASHES[i % len(CRASHES)] for i in range(size.crashes)]
    kinds += [POINTS[i % len(POINTS)] for i in range(size.at_points)]
    places = [(f"w{worker}", batch) for worker in range(size.workers) for batch in range(1, size.batches - ACK_EVERY)]
    plan: Plan = {f"w{worker}": {} for worker in range(size.workers)}
    for (worker, batch), kind in zip(rng.sample(places, len(kinds)), kinds, strict=True):
        plan[worker][batch] = kind
    return plan


def back_off(error: BaseException) -> bool | timedelta:
    """A long wait for the one that is to die in it; as a predicate of `retry_on`."""
    return timedelta(seconds=BACK_OFF_S) if str(error) == "during_back_off" else isinstance(error, PlannedError)


@faultguard.recoverable(max_failures=-1, every=1, retry_on=back_off, backoff=NOWAIT)
@ray.remote(num_cpus=0.5)
def chaotic(worker_id: str, n: int, trace: Trace, deaths: Mapping[int, str]) -> Any:
    """A loop that carries a sum and a list, and dies at every place of its plan once, with its state half updated.

    Half of the workers never wait for a write.
    """
    ckpt = faultguard.current()
    died = {note["batch"] for note in trace.notes("death", worker_id)}
    local.step_hook = None  # of an earlier task of this process
    _note_writes(trace, worker_id)
    _die_before_first_batch(ckpt, trace, deaths, died)
    for batch in ckpt.batches(range(n)):
        trace.note("batch", worker_id, attempt=ckpt.attempt, batch=batch, durable=ckpt.durable_batch)
        ckpt.state["sum"] = ckpt.state.get("sum", 0) + batch
        if batch in deaths and batch not in died:
            _die_at(deaths[batch], trace, worker_id, batch)
        ckpt.state.setdefault("seen", []).append(batch)
        time.sleep(BATCH_S)
        if batch == n - 1:  # the manager is to be killed while there is work
            wait_until(enough_kills(trace).exists, ENOUGH_S)
        if waits(worker_id) and batch % ACK_EVERY == 0:
            ckpt.advance(wait=True)
            trace.note("ack", worker_id, attempt=ckpt.attempt, batch=ckpt.durable_batch)
    return ckpt.state["sum"], ckpt.state["seen"]


def enough_kills(trace: Trace) -> Path:
    """A file that says that the manager was killed often enough."""
    return Path(f"{trace.path}.enough")


def waits(worker: str) -> bool:
    """Whether a worker waits for some of its writes."""
    return int(worker[1:]) % 2 == 0


def _note_writes(trace: Trace, worker: str) -> None:
    """Note every save of the worker, seen from the store: how many batches it holds, when it begins, and when it is durable."""

    def create(store: local.LocalStore, key: str, data: bytes, *, durable: bool = True) -> bool:
        record = decode_record(data, int(Path(key).stem)) if f"/{worker}/" in key else None
        if record is None or record.snapshot is None:
            return _create(store, key, data, durable=durable)
        trace.note("writing", worker, attempt=record.attempt, batch=record.snapshot.batch)
        created = _create(store, key, data, durable=durable)
        if created:
            trace.note("write", worker, attempt=record.attempt, batch=record.snapshot.batch)
        return created

    vars(local)["LocalStore"].create = create  # in a process of Ray's that serves this test only


def _die_before_first_batch(ckpt: faultguard.Checkpoint, trace: Trace, deaths: Mapping[int, str], died: set[int]) -> None:
    """Between the claim and the first batch, if the plan has that for a batch that is near."""
    for batch, kind in sorted(deaths.items()):
        if kind == "before_first_batch" and batch not in died and batch <= ckpt.current_batch:
            trace.note("death", ckpt.worker_id, batch=batch, kind=kind)
            die("SIGKILL")


def _die_at(kind: str, trace: Trace, worker: str, batch: int) -> None:
    """Die now, or when the library comes to the named point."""

    def kill() -> None:
        trace.note("death", worker, batch=batch, kind=kind)
        os.kill(os.getpid(), signal.SIGKILL)

    def at_step(step: str, key: str) -> None:
        if step == kind and f"/{worker}/" in key:
            kill()

    if kind in STEPS:
        local.step_hook = at_step
        return
    if kind == "before_first_batch":  # raise first, so that there is another attempt
        raise PlannedError(kind)
    if kind == "during_back_off":
        threading.Timer(BACK_OFF_S / 3, kill).start()
        raise PlannedError(kind)
    trace.note("death", worker, batch=batch, kind=kind)
    if kind == "exception":
        raise PlannedError(kind)
    die(kind)
