"""How soon it is noticed what becomes of the drivers of a named run: for `detection.py`."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from typing import TYPE_CHECKING, Any

from tests.named_driver import WAITS_AT
from tests.tasks import Trace, wait_until

if TYPE_CHECKING:
    from pathlib import Path

    from typing_extensions import Self

    from tests.nodes import Nodes

__all__ = ["Drivers", "closing", "frozen", "killed", "second", "zombie"]

WAIT_S = 120.0


class Drivers:
    """Drivers of a named run of their own, each a program: see `tests/named_driver.py`.

    Args:
        nodes: of their cluster.
        directory: of the run; it is made.
        given: options of `init`.
    """

    def __init__(self, nodes: Nodes, directory: Path, given: dict[str, Any]) -> None:
        directory.mkdir()
        self.trace = Trace(directory / "trace")
        self._directory = directory
        self._address = nodes.address
        self._given = given
        self._started: list[subprocess.Popen[bytes]] = []

    def __enter__(self) -> Self:
        """The drivers."""
        return self

    def __exit__(self, *_: object) -> None:
        """End those that still run."""
        for driver in self._started:
            driver.kill()
            driver.wait(WAIT_S)

    def start(self, worker: str = "waits", *, stops: str = "", end: str = "", **options: Any) -> subprocess.Popen[bytes]:
        """Start one; its worker waits in a batch, unless it is "quick"."""
        spec = {
            "ray": {"address": self._address},
            "trace": self.trace.path,
            "checkpoint_dir": str(self._directory / "checkpoints"),
            "workers": [worker],
            "end": end,
            "on": "",
            "stops": stops,
            "init": {**self._given, **options},
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

    def waiting(self, processes: int) -> tuple[int, float]:
        """Wait until so many processes have come to the batch in which the worker waits: the last of them, and when it began."""
        wait_until(lambda: len({note["pid"] for note in self._batches(WAITS_AT)}) == processes, WAIT_S)
        last = self._batches(WAITS_AT)[-1]["pid"]
        return int(last), float(next(note["time"] for note in self._batches() if note["pid"] == last))

    def _batches(self, at_least: int = 0) -> list[dict[str, Any]]:
        return [note for note in self.trace.notes("batch", "waits") if note["batch"] >= at_least]


def second(drivers: Drivers) -> float:
    """Seconds from the `init` of a second driver until it is told that the first one lives."""
    drivers.start()
    drivers.waiting(1)
    other = drivers.start()
    return drivers.note("in use", other) - drivers.note("begins", other)


def killed(drivers: Drivers) -> float:
    """Seconds from the `init` of the next driver to the first batch of the worker."""
    first = drivers.start()
    drivers.waiting(1)
    _end(first)
    following = drivers.start()
    return drivers.waiting(2)[1] - drivers.note("begins", following)


def frozen(drivers: Drivers) -> float:
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


def zombie(drivers: Drivers, *, closed: bool) -> float:
    """Seconds from the thaw of a driver and its worker until it is told that they were superseded; `closed`: the run is over by then."""
    first = drivers.start(heartbeat_timeout=WAIT_S)  # or a probe ends the worker meanwhile
    frozen = first.pid, drivers.waiting(1)[0]
    for pid in frozen:
        os.kill(pid, signal.SIGSTOP)
    other = drivers.start(takeover=True, heartbeat_timeout=WAIT_S)
    drivers.waiting(2)
    drivers.trace.note("go", "")  # both workers may leave their batch
    if closed:
        other.wait(WAIT_S)
    began = time.time()
    for pid in frozen:
        os.kill(pid, signal.SIGCONT)
    return drivers.note("superseded", first) - began


def closing(drivers: Drivers, dies_at: str) -> float:
    """Seconds from the `init` of the next driver until it has the run of one that died at that step of its end."""
    first = drivers.start("quick", stops=dies_at, end="shutdown")
    drivers.note("stops", first)
    _end(first)
    following = drivers.start("quick")
    return drivers.note("has it", following) - drivers.note("begins", following)


def _end(driver: subprocess.Popen[bytes]) -> None:
    driver.kill()
    driver.wait(WAIT_S)
