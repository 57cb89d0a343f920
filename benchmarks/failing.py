"""Tasks that meet the faults which `detection.py` measures. Each new process pays for the imports here again: they are few."""

from __future__ import annotations

import asyncio
import ctypes
import logging
import os
import signal
import sys
import threading
import time
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import faultguard
from faultguard.storage import local
from tests.tasks import Trace, hang, wait_until

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["AT", "HOARD_BYTES", "WAIT_S", "ArrivesDead", "Server", "dies_early", "holds", "makes", "steps"]

BATCH_S = 0.02
AT = 50  # the batch of the fault: a second on, when the manager knows the worker
WAIT_S = 120.0
LONG_S = 600.0
HOARD_BYTES, CHUNK_BYTES = 4 << 30, 1 << 24


def steps(worker_id: str, plan: tuple[tuple[int, str], ...], trace: Trace, ballast: Any) -> None:  # noqa: ARG001 - it only travels
    """A loop that meets the faults one after another, each in an attempt of its own, and ends when the attempt after them has begun.

    Args:
        worker_id: of the worker.
        plan: at which batch it meets which fault; "": one that somebody else does to the process.
        trace: where each batch and each fault is noted.
        ballast: an argument.
    """
    met = len(trace.notes("fault", worker_id))
    ckpt = faultguard.current()
    for batch in ckpt.batches(range(10**6)):
        trace.note("batch", worker_id, met=met, batch=batch, durable=ckpt.durable_batch)
        if met == len(plan):
            return
        at, kind = plan[met]
        if batch == at:
            trace.note("fault", worker_id)
            FAULTS[kind](trace)
        ckpt.state["batch"] = batch
        time.sleep(BATCH_S)


def dies_early(trace: Trace) -> None:
    """Work without an id, whose first process dies at once: nothing of it is on record yet."""
    met = len(trace.notes("fault"))
    for batch in faultguard.batches(range(1)):
        trace.note("batch", "", met=met, batch=batch)
        if not met:
            trace.note("fault", "")
            _kill(trace)


def makes(worker_id: str, size: int) -> bytes:  # noqa: ARG001 - it names the worker
    """A result of that size, after three batches."""
    for _ in faultguard.batches(range(3)):
        pass
    return bytes(size)


def holds(worker_id: str, trace: Trace, *, is_far: bool) -> None:
    """Holds the worker for good, and looks as if it was on another host, where it is far; else it ends with the first batch."""
    from faultguard import _attempt

    this_process = vars(_attempt)["this_process"]
    if is_far:
        vars(_attempt)["this_process"] = lambda: replace(this_process(), boot_id="elsewhere")
    with faultguard.checkpointed(worker_id, every=1) as ckpt:
        for batch in ckpt.batches(range(10**6)):
            trace.note("batch", worker_id, met=int(not is_far), batch=batch)
            if not is_far:
                return
            if batch == AT:
                trace.note("fault", worker_id)
            time.sleep(BATCH_S)


class Server:
    """An actor with an event loop."""

    async def blocks(self, worker_id: str, trace: Trace, stall_timeout: float) -> None:
        """Batches, of which one blocks the event loop until that is told."""

        class Told(logging.Handler):
            def emit(self, record: logging.LogRecord) -> None:
                if vars(record).get("event") == "faultguard.stalled":
                    trace.note("told", worker_id)

        logging.getLogger("faultguard").addHandler(Told())
        async with faultguard.checkpointed(worker_id, stall_timeout=stall_timeout) as ckpt:
            for batch in ckpt.batches(range(AT + 1)):
                if batch == AT:
                    trace.note("fault", worker_id)
                    wait_until(lambda: trace.notes("told"), WAIT_S)
                await asyncio.sleep(BATCH_S)


class ArrivesDead:
    """An argument that kills the first process that unpickles it."""

    def __init__(self, worker: str, trace: Trace) -> None:
        self.worker = worker
        self.trace = trace

    def __reduce__(self) -> Any:
        """Travel as a call."""
        return _arrive, (self.worker, self.trace)


def _arrive(worker: str, trace: Trace) -> None:
    if not trace.notes("fault", worker):
        trace.note("fault", worker)
        os.kill(os.getpid(), signal.SIGKILL)


# --- the faults -----------------------------------------------------------------------------------------------------


def _raise(_: Trace) -> None:
    raise ValueError("planned")


def _kill(_: Trace) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _long(trace: Trace) -> None:
    wait_until(lambda: trace.notes("go"), LONG_S)


def _raise_when_told(trace: Trace) -> None:
    _long(trace)
    _raise(trace)


def _lock_twice(_: Trace) -> None:
    lock = threading.Lock()
    lock.acquire()
    lock.acquire()


def _ask(_: Trace) -> None:
    """Whether it must stop, until it must."""
    while True:
        faultguard.current().check()
        time.sleep(BATCH_S)


def _die_in_a_save(trace: Trace) -> None:
    """In the next one: it has its name, and its directory is not durable yet."""

    def die(step: str, _: str) -> None:
        if step == "before_dir_fsync":
            trace.note("death", "")
            os.kill(os.getpid(), signal.SIGKILL)

    local.step_hook = die


def _let_the_store_hang(trace: Trace) -> None:
    """From the next write on, until it is told to go on."""
    create = local.LocalStore.create

    def hangs(self: local.LocalStore, key: str, data: bytes, *, durable: bool = True) -> bool:
        _long(trace)
        local.LocalStore.create = create  # type: ignore[method-assign]
        return create(self, key, data, durable=durable)

    local.LocalStore.create = hangs  # type: ignore[method-assign]


def _hoard(trace: Trace) -> None:
    """Take more memory than there is, and say as long as possible that it lives."""
    hoard: list[bytes] = []
    while True:
        trace.note("alive", "")
        if len(hoard) < HOARD_BYTES // CHUNK_BYTES:
            hoard.append(b"x" * CHUNK_BYTES)
        time.sleep(0.005)


FAULTS: dict[str, Callable[[Trace], None]] = {
    "": lambda _: None,
    "exception": _raise,
    "exception when told": _raise_when_told,
    "SIGKILL": _kill,
    "sys.exit": lambda _: sys.exit(1),
    "hung in Python": lambda _: hang(),
    "hung in C": _lock_twice,
    "hung in C with the interpreter": lambda _: ctypes.PyDLL(None).sleep(100),
    "long batch": _long,
    "asks": _ask,
    "death in a save": _die_in_a_save,
    "store hangs": _let_the_store_hang,
    "hoards": _hoard,
}
