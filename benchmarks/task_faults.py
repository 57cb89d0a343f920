"""How soon faults of tasks and of their processes are noticed and made good: for `detection.py`."""

from __future__ import annotations

import os
import signal
import time
from typing import TYPE_CHECKING, Any

import ray

import faultguard
from benchmarks.failing import AT, WAIT_S, Server, dies_early, holds
from benchmarks.worker import TASK, WORKER, after, begin, heard_at, make_sure, raised, ready, resumed, signalled, stop
from tests.nodes import WORK
from tests.tasks import told, wait_until

if TYPE_CHECKING:
    from benchmarks.worker import Case

__all__ = ["cancelled", "cancelled_by_force", "event_loop", "long_batch", "poisoned", "second_task", "spent", "unclaimed", "unseen_holder"]


def poisoned(case: Case, kind: str, times: int) -> float:
    """From the first failure to the first batch after the one that fails so many times, and is passed over from then on."""
    took = resumed(case, *[kind] * times, which=0, on_poison="skip")
    make_sure(after(case, times)["batch"] == AT + 1, "the batch was not passed over")
    return took


def unclaimed(case: Case) -> float:
    """From the death of a task without an id, before it is claimed, to the first batch of the next attempt."""
    task: Any = faultguard.recoverable(ray.remote(num_cpus=1, resources={WORK: 1})(dies_early))
    ray.get(task.remote(case.trace), timeout=WAIT_S)
    return float(after(case, 1)["time"] - case.trace.notes("fault")[0]["time"])


def spent(case: Case) -> float:
    """From the last exception of a budget until the caller knows."""
    ended = raised(begin(case, "exception", max_failures=0), faultguard.MaxFailuresExceeded)
    return float(ended - case.trace.notes("fault")[0]["time"])


def long_batch(case: Case) -> float:
    """From its beginning until its process says that it is a long one."""
    ref, session = begin(case, "long batch"), case.nodes.directory
    ready(case)
    part = f"'{TASK}/{WORKER}' attempt 1 has made no progress for"
    before = len(told(session, part))
    wait_until(lambda: len(told(session, part)) > before, 5 * WAIT_S)
    took = time.time() - case.trace.notes("fault")[0]["time"]
    stop(ref)
    return float(took)


def event_loop(case: Case, stall_timeout: float) -> float:
    """From the batch that blocks it until that is told."""
    server: Any = ray.remote(num_cpus=1, resources={WORK: 1})(Server).remote()
    ray.get(server.blocks.remote(WORKER, case.trace, stall_timeout), timeout=WAIT_S)
    ray.kill(server)
    return float(case.trace.notes("told")[0]["time"] - case.trace.notes("fault")[0]["time"])


def cancelled(case: Case) -> float:
    """From `faultguard.cancel` until the caller knows."""
    ref = begin(case, "")
    ready(case)
    began = time.time()
    faultguard.cancel(WORKER)
    return raised(ref, ray.exceptions.TaskCancelledError) - began


def cancelled_by_force(case: Case) -> float:
    """From `ray.cancel` until it is shown as that."""
    ref = begin(case, "")
    ready(case)
    wait_until(heard_at, WAIT_S)
    began = time.time()
    ray.cancel(ref, force=True)
    wait_until(lambda: [state.status for state in faultguard.workers()] == ["cancelled"], WAIT_S)
    return time.time() - began


def second_task(case: Case) -> float:
    """From its submission until it is told that another task holds its worker, and lives."""
    ref = begin(case, "")
    ready(case)
    began = time.time()
    took = raised(begin(case, ""), faultguard.DuplicateWorkerError) - began
    stop(ref)
    return took


def unseen_holder(case: Case) -> float:
    """From the moment at which it is stopped to the first batch of the task that waits for its worker, and cannot see its host."""
    decorate: Any = ray.remote(num_cpus=1, resources={WORK: 1}, max_retries=0)
    hold = decorate(holds)
    hold.remote(WORKER, case.trace, is_far=True)
    pid = ready(case)
    wait_until(heard_at, WAIT_S)
    began = signalled(signal.SIGSTOP)(pid)
    ray.get(hold.remote(WORKER, case.trace, is_far=False), timeout=WAIT_S)
    os.kill(pid, signal.SIGKILL)
    return float(after(case, 1)["time"] - began)
