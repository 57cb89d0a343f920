"""The workers of the soak: loops of all kinds whose results are known, and what they do to themselves when they are told to."""

from __future__ import annotations

import asyncio
import ctypes
import errno
import os
import threading
import time
from dataclasses import dataclass
from datetime import timedelta
from operator import mul
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ray

import faultguard
from faultguard._session import context
from tests.nodes import WORK
from tests.soak_check import BOUNDED, BUDGET, UNDECORATED
from tests.tasks import NOWAIT, Trace, hang, hold_the_interpreter, result

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from faultguard._core.records import Record

STEPS = 10  # of the inner of two loops
ACK_EVERY = 5
FOR_EVER_S = 3600
SLOW_S = 1.0
REAL = os.link, os.fsync


class PlannedError(Exception):
    """An exception that was ordered."""


@dataclass(frozen=True)
class Limits:
    """How long things take in a soak, in seconds; short in a short one."""

    interval: float
    heartbeat_timeout: float
    stall_timeout: float

    @property
    def burn(self) -> float:
        """A call in C that looks dead, and is not."""
        return 1.5 * self.heartbeat_timeout


@dataclass(frozen=True)
class Job:
    """A worker: what it is to do, and where it notes what it does."""

    worker_id: str
    kind: str
    size: int
    batch_s: float
    folder: str
    limits: Limits

    @property
    def trace(self) -> Trace:
        """What it notes."""
        return Trace(f"{self.folder}/{self.worker_id}.trace")

    @property
    def order(self) -> Path:
        """What it is to do to itself at its next batch."""
        return Path(f"{self.folder}/{self.worker_id}.order")

    @property
    def sickness(self) -> Path:
        """What is wrong with the store, for all workers; nothing if the file is not there."""
        return Path(f"{self.folder}/sickness")

    @property
    def timed(self) -> bool:
        """Whether it has a `stall_timeout`."""
        return self.kind not in {"auto", "interval"}

    @property
    def alone(self) -> bool:
        """Whether its process is for it alone, and may be ended."""
        return self.kind not in SHARED


# --- loops ----------------------------------------------------------------------------------------------------------


def work(ckpt: faultguard.Checkpoint, job: Job) -> Any:
    """Go through the batches."""
    for _ in middles(ckpt, job):
        time.sleep(job.batch_s)
    return result(ckpt)


async def work_beside_others(ckpt: faultguard.Checkpoint, job: Job) -> Any:
    """The same, giving way to others in each batch."""
    for _ in middles(ckpt, job):
        await asyncio.sleep(job.batch_s)
    return result(ckpt)


def middles(ckpt: faultguard.Checkpoint, job: Job) -> Iterator[None]:
    """Do the batches as the kind of the worker has it; the caller waits in the middle of each.

    There the state is half updated, and an order is obeyed.
    """
    sicken_the_store(job.sickness)
    here, task = ray.get_runtime_context().get_node_id(), context()
    home = task.identity.home_id if task and task.identity else ""
    who: dict[str, Any] = {"attempt": ckpt.attempt, "token": ckpt.token}
    job.trace.note("begin", job.worker_id, node=here, home=home, **who)
    try:
        for drawn, batch in enumerate(KINDS[job.kind].loop(ckpt, job)):
            job.trace.note("batch", job.worker_id, batch=batch, **who, **KINDS[job.kind].durable(ckpt))
            ckpt.state["sum"] = ckpt.state.get("sum", 0) + batch
            if drawn:  # the clock of a loop by hand begins with its first `advance`
                obey(ckpt, job, batch)
            yield
            ckpt.state.setdefault("seen", []).append(batch)
    except faultguard.SupersededError:
        job.trace.note("superseded", job.worker_id, attempt=ckpt.attempt)
        raise


def plain(ckpt: faultguard.Checkpoint, job: Job) -> Iterator[int]:
    """One loop."""
    yield from ckpt.batches(range(job.size))


def nested(ckpt: faultguard.Checkpoint, job: Job) -> Iterator[int]:
    """A loop in a loop."""
    for epoch in ckpt.batches(range(job.size // STEPS), name="epochs"):
        for step in ckpt.batches(range(STEPS), name="steps"):
            yield epoch * STEPS + step


def waiting(ckpt: faultguard.Checkpoint, job: Job) -> Iterator[int]:
    """A loop that waits for some of its writes."""
    for batch in ckpt.batches(range(job.size)):
        yield batch
        if batch % ACK_EVERY == 0:
            ckpt.advance(wait=True)
            job.trace.note("ack", job.worker_id, attempt=ckpt.attempt, token=ckpt.token, batch=batch + 1)


def by_hand(ckpt: faultguard.Checkpoint, job: Job) -> Iterator[int]:
    """A loop of one's own."""
    for batch in range(ckpt.current_batch, job.size):
        yield batch
        ckpt.advance()


@dataclass(frozen=True)
class Kind:
    """A kind of worker: options of its block, and its loop."""

    loop: Callable[[faultguard.Checkpoint, Job], Iterator[int]]
    every: Any = 1
    flat: bool = True

    def durable(self, ckpt: faultguard.Checkpoint) -> dict[str, int]:
        """For a note: how many batches the store has acknowledged; of nested loops that number says too little."""
        return {"durable": ckpt.durable_batch} if self.flat else {}

    def done(self, save: Record) -> int:
        """How many batches a save holds."""
        position = save.snapshot.position if save.snapshot is not None else ()
        return sum(map(mul, (1,) if self.flat else (STEPS, 1), position))


KINDS = {
    "each": Kind(plain),
    "auto": Kind(plain, "auto"),
    "interval": Kind(plain, timedelta(seconds=1)),
    "nested": Kind(nested, 2, flat=False),
    "waiting": Kind(waiting, 50),
    "by hand": Kind(by_hand),
    BOUNDED: Kind(plain),
    "block": Kind(plain, 2),
    "actor": Kind(plain, 2),
    "threaded": Kind(plain, 2),
    "async": Kind(plain, 2),
}
DECORATED = frozenset(KINDS) - UNDECORATED
SHARED = frozenset({"threaded", "async"})  # actors with two workers at once
ACTORS = SHARED | {"actor"}


def block_options(job: Job) -> dict[str, Any]:
    """What `checkpointed` is given."""
    return {"every": KINDS[job.kind].every, "stall_timeout": job.limits.stall_timeout if job.timed else None}


@faultguard.recoverable(-1, worker_id=lambda job: job.worker_id, name="soak", backoff=NOWAIT)
@ray.remote(num_cpus=1, resources={WORK: 1}, scheduling_strategy="SPREAD")
def decorated(job: Job) -> Any:
    """A decorated task; the options are those of its block."""
    with faultguard.checkpointed(**block_options(job)) as ckpt:
        return work(ckpt, job)


@faultguard.recoverable(BUDGET, worker_id=lambda job: job.worker_id, name="soak", backoff=NOWAIT)
@ray.remote(num_cpus=1, resources={WORK: 1}, scheduling_strategy="SPREAD")
def bounded(job: Job) -> Any:
    """The same; it fails for good, and is started again."""
    with faultguard.checkpointed(**block_options(job)) as ckpt:
        return work(ckpt, job)


@ray.remote(num_cpus=1, resources={WORK: 1}, scheduling_strategy="SPREAD", max_retries=-1, retry_exceptions=True)
def undecorated(job: Job) -> Any:
    """A block in a plain task that Ray runs again."""
    with faultguard.checkpointed(job.worker_id, **block_options(job)) as ckpt:
        return work(ckpt, job)


class Server:
    """An actor that Ray starts again, with the calls that it was busy with; exceptions are its caller's."""

    def work(self, job: Job) -> Any:
        """As above."""
        with faultguard.checkpointed(job.worker_id, **block_options(job)) as ckpt:
            return work(ckpt, job)


class AsyncServer:
    """The same, asynchronous."""

    async def work(self, job: Job) -> Any:
        """As above."""
        async with faultguard.checkpointed(job.worker_id, **block_options(job)) as ckpt:
            return await work_beside_others(ckpt, job)


class Host:
    """An actor, and the workers that it has to do."""

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self.room = 2 if kind in SHARED else 1
        self.workers: set[str] = set()
        server: Any = ray.remote(AsyncServer if kind == "async" else Server)
        options = {"num_cpus": 1, "resources": {WORK: 1}, "scheduling_strategy": "SPREAD", "max_restarts": -1, "max_task_retries": -1}
        self._server = server.options(max_concurrency=self.room, **options).remote()

    def start(self, job: Job) -> Any:
        """Start a worker, or let it resume."""
        self.workers.add(job.worker_id)
        return self._server.work.remote(job)

    def end(self) -> None:
        """For good."""
        ray.kill(self._server)


# --- what happens to them -------------------------------------------------------------------------------------------


def obey(ckpt: faultguard.Checkpoint, job: Job, batch: int) -> None:
    """Do once what was ordered."""
    taken = job.order.with_suffix(f".{os.getpid()}")
    try:
        job.order.rename(taken)
    except FileNotFoundError:
        return
    kind = taken.read_text("utf-8")
    taken.unlink()
    job.trace.note("fault", job.worker_id, attempt=ckpt.attempt, token=ckpt.token, batch=batch, kind=kind)
    ORDERS[kind](ckpt, job)


def raise_planned(ckpt: faultguard.Checkpoint, job: Job) -> None:
    """Fail."""
    raise PlannedError(f"in attempt {ckpt.attempt}")


def leave(ckpt: faultguard.Checkpoint, job: Job) -> None:
    """End the process."""
    os._exit(7)


def hang_in_python(ckpt: faultguard.Checkpoint, job: Job) -> None:
    """Where an exception arrives."""
    hang(FOR_EVER_S)


def hang_in_c(ckpt: faultguard.Checkpoint, job: Job) -> None:
    """Where none does."""
    lock = threading.Lock()
    lock.acquire()
    lock.acquire()


def hang_with_the_interpreter(ckpt: faultguard.Checkpoint, job: Job) -> None:
    """Where no other thread runs either."""
    ctypes.PyDLL(None).sleep(FOR_EVER_S)


def burn(ckpt: faultguard.Checkpoint, job: Job) -> None:
    """The same, and healthy."""
    with ckpt.section("burn", timeout=None):
        hold_the_interpreter(job.limits.burn)


ORDERS = {
    "exception": raise_planned,
    "exit": leave,
    "hang in Python": hang_in_python,
    "hang in C": hang_in_c,
    "hang with the GIL": hang_with_the_interpreter,
    "burn": burn,
}


def sicken_the_store(sickness: Path) -> None:
    """Let the disk of this process be slow, or full, as long as a file says so; and note that it was."""

    def sick(real: Callable[..., None]) -> Callable[..., None]:
        def call(*args: Any, **keywords: Any) -> None:
            kind = what_is_wrong(sickness)
            if kind:
                Trace(met_by(sickness)).note(kind, "store")
            if kind == "full":
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            if kind == "slow":
                time.sleep(SLOW_S)
            real(*args, **keywords)

        return call

    os.link, os.fsync = map(sick, REAL)  # type: ignore[arg-type] # in processes of Ray's that serve this soak only


def what_is_wrong(sickness: Path) -> str:
    """With the store just now."""
    try:
        return sickness.read_text("utf-8")
    except FileNotFoundError:
        return ""


def met_by(sickness: Path) -> str:
    """Where those note it who have met a sick store."""
    return f"{sickness}.met"
