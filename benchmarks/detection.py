"""How soon each fault is noticed and made good: from the fault to the first batch of the next attempt. The column of docs/failure-model.md.

    python benchmarks/detection.py [--rounds 3] [--only stopped,drained]

Real faults on a real cluster of this machine, one worker at a time, with the timeouts below: what is waited for by setting is shown
beside what comes on top. A frozen node takes a driver of its own with Ray's settings: `tests/frozen_nodes.py` prints that.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # Python puts only this folder there
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [sys.path[0], os.environ.get("PYTHONPATH")]))  # workers find `benchmarks`

import ray

import faultguard
from tests.disks import renamed
from tests.named_driver import WAITS_AT
from tests.nodes import WORK, Nodes, some_nodes
from tests.tasks import Trace, end_manager, hang, wait_until

if TYPE_CHECKING:
    from collections.abc import Callable

    from typing_extensions import Self

INTERVAL_S, TIMEOUT_S, STALL_S = 1.0, 5.0, 2.0
BATCH_S = 0.02
AT = 50  # the batch of the fault: a second on, when the manager knows the worker
AWAY_S = 3.1  # it is tried every second: coming back just after a try is the longest wait
WAIT_S = 120.0
NOW = faultguard.Backoff(initial=0.01, jitter=False)


def fail(kind: str) -> None:
    """What a batch does to itself."""
    if kind == "exception":
        raise ValueError("planned")
    if kind == "hung in Python":
        hang()
    if kind == "hung in C":
        lock = threading.Lock()
        lock.acquire()
        lock.acquire()
    if kind == "hung in C with the interpreter":
        ctypes.PyDLL(None).sleep(100)
    if kind == "sys.exit":
        sys.exit(1)


class DiesOnce:
    """An argument that kills the first process that unpickles it."""

    def __init__(self, worker: str, trace: Trace) -> None:
        self.worker = worker
        self.trace = trace

    def __reduce__(self) -> Any:
        """Travel as a call."""
        return _arrive, (self.worker, self.trace.path)


def _arrive(worker: str, path: str) -> None:
    trace = Trace(path)
    if not trace.notes("fault", worker):
        trace.note("fault", worker)
        os.kill(os.getpid(), signal.SIGKILL)


@faultguard.recoverable(every=1, backoff=NOW)
@ray.remote(num_cpus=1, resources={WORK: 1})
def steps(worker_id: str, kind: str, trace: Trace, stall_timeout: float | None, ballast: Any) -> None:  # noqa: ARG001 - it only travels
    """A loop that meets its fault in its first attempt, and goes on until the second has begun."""
    with faultguard.checkpointed(stall_timeout=stall_timeout) as ckpt:
        for batch in ckpt.batches(range(10**6)):
            trace.note("batch", worker_id, attempt=ckpt.attempt, batch=batch, durable=ckpt.durable_batch)
            if ckpt.attempt > 1:
                return
            if batch == AT:
                trace.note("fault", worker_id)
                fail(kind)
            time.sleep(BATCH_S)


def next_attempt(
    kind: str, worker: str, trace: Trace, act: Callable[[int], float] | None, *, stall_timeout: float | None = None, ballast: Any = None
) -> float:
    """Seconds from the fault to the first batch of the second attempt; `act` does what the task does not do itself, and says when."""
    ref = steps.remote(worker, kind, trace, stall_timeout, ballast)
    fault = wait_until(lambda: trace.notes("fault", worker), WAIT_S)[0]
    began = fault["time"] if act is None else act(fault["pid"])
    ray.get(ref, timeout=WAIT_S)
    return float(next(note["time"] for note in trace.notes("batch", worker) if note["attempt"] > 1) - began)


def cancelled(worker: str, trace: Trace) -> float:
    """Seconds until the caller knows."""
    ref = steps.remote(worker, "", trace, None, None)
    wait_until(lambda: trace.notes("fault", worker), WAIT_S)
    began = time.time()
    faultguard.cancel(worker)
    try:
        ray.get(ref, timeout=WAIT_S)
    except ray.exceptions.TaskCancelledError:
        return time.time() - began
    raise AssertionError("it was not cancelled")


def manager_back(worker: str, trace: Trace) -> float:
    """Seconds until the manager hears the worker again."""
    ref = steps.remote(worker, "", trace, None, None)
    wait_until(lambda: trace.notes("fault", worker), WAIT_S)
    end_manager()
    began = time.time()
    wait_until(lambda: worker in _heard(), WAIT_S)
    took = time.time() - began
    faultguard.cancel(worker)
    ray.wait([ref], timeout=WAIT_S)
    return took


def store_back(worker: str, trace: Trace, store: Path) -> float:
    """Seconds from the return of the store until something newer is durable."""
    ref = steps.remote(worker, "", trace, None, None)
    wait_until(lambda: trace.notes("fault", worker), WAIT_S)
    with renamed(store):
        time.sleep(AWAY_S)
        before = trace.notes("batch", worker)[-1]["durable"]
    began = time.time()
    wait_until(lambda: trace.notes("batch", worker)[-1]["durable"] > before, WAIT_S)
    took = time.time() - began
    faultguard.cancel(worker)
    ray.wait([ref], timeout=WAIT_S)
    return took


class Drivers:
    """Drivers of a named run of their own, each a program: see `tests/named_driver.py`."""

    def __init__(self, nodes: Nodes, directory: Path) -> None:
        directory.mkdir()
        self.trace = Trace(directory / "trace")
        self._directory = directory
        self._address = nodes.address
        self._started: list[subprocess.Popen[bytes]] = []

    def __enter__(self) -> Self:
        """The drivers."""
        return self

    def __exit__(self, *_: object) -> None:
        """End those that still run."""
        for driver in self._started:
            driver.kill()
            driver.wait(WAIT_S)

    def start(self, **options: Any) -> subprocess.Popen[bytes]:
        """Start one, whose worker waits in a batch."""
        spec = {
            "ray": {"address": self._address},
            "trace": self.trace.path,
            "checkpoint_dir": str(self._directory / "checkpoints"),
            "workers": ["waits"],
            "end": "",
            "on": "",
            "stops": "",
            "init": {"heartbeat_interval": INTERVAL_S, "heartbeat_timeout": TIMEOUT_S, "progress": False, **options},
        }
        command = [sys.executable, "-m", "tests.named_driver", json.dumps(spec)]
        with (self._directory / f"said-{len(self._started)}").open("wb") as said:
            self._started.append(subprocess.Popen(command, stdout=said, stderr=subprocess.STDOUT))
        return self._started[-1]

    def said(self, driver: subprocess.Popen[bytes]) -> str:
        """What it has printed."""
        return (self._directory / f"said-{self._started.index(driver)}").read_text("utf-8", "replace")

    def note(self, what: str, driver: subprocess.Popen[bytes]) -> float:
        """Wait until the driver has noted that, and say when it did."""
        notes = wait_until(lambda: [note for note in self.trace.notes(what) if note["pid"] == driver.pid], WAIT_S)
        return float(notes[0]["time"])

    def waiting(self, processes: int) -> float:
        """Wait until so many processes have come to the batch in which the worker waits, and say when the last one began."""
        wait_until(lambda: len({note["pid"] for note in self._batches(WAITS_AT)}) == processes, WAIT_S)
        last = self._batches(WAITS_AT)[-1]["pid"]
        return float(next(note["time"] for note in self._batches() if note["pid"] == last))

    def _batches(self, at_least: int = 0) -> list[dict[str, Any]]:
        return [note for note in self.trace.notes("batch", "waits") if note["batch"] >= at_least]


def second_driver(drivers: Drivers) -> float:
    """Seconds from the `init` of a second driver until it is told that the first one lives."""
    drivers.start()
    drivers.waiting(1)
    second = drivers.start()
    return drivers.note("in use", second) - drivers.note("begins", second)


def driver_killed(drivers: Drivers) -> float:
    """Seconds from the `init` of the next driver to the first batch of the worker."""
    first = drivers.start()
    drivers.waiting(1)
    first.kill()
    first.wait(WAIT_S)
    second = drivers.start()
    return drivers.waiting(2) - drivers.note("begins", second)


def driver_frozen(drivers: Drivers) -> float:
    """Seconds from the thaw of a driver until it knows that another one has the run."""
    first = drivers.start()
    drivers.waiting(1)
    os.kill(first.pid, signal.SIGSTOP)
    drivers.start(takeover=True)
    drivers.waiting(2)
    began = time.time()
    os.kill(first.pid, signal.SIGCONT)
    wait_until(lambda: "was taken over" in drivers.said(first), WAIT_S)
    return time.time() - began


def _heard() -> set[str]:
    try:
        return {beat["worker_id"] for beat in ray.get(faultguard.manager().live_workers.remote(), timeout=WAIT_S)}
    except ray.exceptions.RayError:
        return set()


def measures(nodes: Nodes, directory: Path, trace: Trace) -> dict[str, tuple[float, Callable[[str], float]]]:
    """Each fault: how long its settings make us wait, and its measurement."""
    workers = [nodes.add()]

    def signalled(number: signal.Signals) -> Callable[[str], float]:
        def act(pid: int) -> float:
            os.kill(pid, number)
            return time.time()

        return lambda worker: next_attempt("", worker, trace, act)

    def inside(kind: str, stall_timeout: float | None = None) -> Callable[[str], float]:
        return lambda worker: next_attempt(kind, worker, trace, None, stall_timeout=stall_timeout)

    def leaving(leave: Callable[[Any], None]) -> Callable[[str], float]:
        def act(_: int) -> float:
            workers.append(nodes.add())
            began = time.time()
            leave(workers[0])
            return began

        def measure(worker: str) -> float:
            took = next_attempt("", worker, trace, act)
            old = workers.pop(0)
            if old.any_processes_alive():
                nodes.remove(old)
            return took

        return measure

    def driving(measure: Callable[[Drivers], float]) -> Callable[[str], float]:
        def measured(name: str) -> float:
            with Drivers(nodes, directory / name.replace(" ", "-")) as drivers:
                return measure(drivers)

        return measured

    hard_s = 2 * STALL_S  # the timeout and the grace
    return {
        "exception": (0, inside("exception")),
        "exception with large arguments": (0, lambda worker: next_attempt("exception", worker, trace, None, ballast=bytes(2 << 20))),
        "SIGKILL": (0, signalled(signal.SIGKILL)),
        "death while unpacking": (0, lambda worker: next_attempt("", worker, trace, None, ballast=DiesOnce(worker, trace))),
        "sys.exit": (0, inside("sys.exit")),
        "SIGTERM": (0, signalled(signal.SIGTERM)),
        "hung in Python": (STALL_S, inside("hung in Python", STALL_S)),
        "hung in C": (hard_s, inside("hung in C", STALL_S)),
        "hung in C with the interpreter": (TIMEOUT_S + hard_s, inside("hung in C with the interpreter", STALL_S)),
        "stopped": (2 * TIMEOUT_S, signalled(signal.SIGSTOP)),
        "cancelled": (0, lambda worker: cancelled(worker, trace)),
        "manager killed": (0, lambda worker: manager_back(worker, trace)),
        "store away": (0, lambda worker: store_back(worker, trace, directory / "checkpoints")),
        "driver killed": (0, driving(driver_killed)),
        "two drivers": (0, driving(second_driver)),
        "driver frozen": (0, driving(driver_frozen)),
        "node drained": (0, leaving(lambda node: nodes.drain(node, 600))),
        "node killed": (0, leaving(nodes.remove)),
    }


def main() -> None:
    """Measure and print, one line per fault."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", type=lambda text: text.split(","), default=[], metavar="FAULT,...")
    options = parser.parse_args()
    print(f"heartbeat_interval {INTERVAL_S:g} s, heartbeat_timeout {TIMEOUT_S:g} s, stall_timeout {STALL_S:g} s; seconds, median and range")
    shown = sys.stdout
    with (
        contextlib.redirect_stdout(sys.stderr),  # where Ray tells of each crash
        tempfile.TemporaryDirectory(prefix="faultguard-bench-", dir="/var/tmp") as directory,
        some_nodes() as nodes,
    ):
        trace = Trace(Path(directory) / "trace")
        given: dict[str, Any] = {"heartbeat_interval": INTERVAL_S, "heartbeat_timeout": TIMEOUT_S, "progress": False}
        with faultguard.init(checkpoint_dir=Path(directory) / "checkpoints", **given):
            for fault, (setting_s, measure) in measures(nodes, Path(directory), trace).items():
                if not options.only or fault in options.only:
                    took = sorted(measure(f"{fault} {number}") - setting_s for number in range(options.rounds))
                    before = f"{setting_s:g} + " if setting_s else ""
                    print(
                        f"{fault:32}{before:>6}{statistics.median(took):5.1f}   ({took[0]:.1f} to {took[-1]:.1f})", file=shown, flush=True
                    )


if __name__ == "__main__":
    main()
