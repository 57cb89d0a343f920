"""Drivers of a named run that are killed, frozen, and started at once: the work survives them, and one of them has the run."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from faultguard._core.names import record_number
from faultguard._log import StoredLog
from faultguard.storage import open_store
from tests.disks import renamed, small_disk
from tests.named_driver import RUN, WAITS_AT
from tests.nodes import Nodes, some_nodes
from tests.tasks import Trace, expected, wait_until

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from contextlib import AbstractContextManager

    from faultguard._core.records import Record
    from faultguard._core.runs import RunRecord

pytestmark = pytest.mark.ray
WAIT_S = 90
ICE = "ice"  # a resource of a node that freezes
REPOSITORY = Path(__file__).parents[1]
WORKERS = ("fails", "waits", "quick")  # what resumes comes first: in a new cluster it then has the ids of the same tasks in the old one


@pytest.fixture(scope="module")
def nodes() -> Iterator[Nodes]:
    """A cluster that outlives its drivers."""
    with some_nodes() as nodes:
        nodes.add(4)
        yield nodes


class Drivers:
    """Drivers of one run, and what they leave behind.

    Args:
        directory: of this test.
        ray_options: how they find their cluster.
    """

    def __init__(self, directory: Path, ray_options: dict[str, Any]) -> None:
        self.trace = Trace(directory / "trace")
        self.store = str(directory / "checkpoints")
        self._directory = directory
        self._ray_options = ray_options
        self._started: list[subprocess.Popen[bytes]] = []

    def start(self, *workers: str, end: str = "", on: str = "", stops: str = "", **options: Any) -> subprocess.Popen[bytes]:
        """Start one."""
        spec = {
            "ray": self._ray_options,
            "trace": self.trace.path,
            "checkpoint_dir": self.store,
            "workers": workers or WORKERS,
            "end": end,
            "on": on,
            "stops": stops,
            "init": {"heartbeat_interval": 0.5, "heartbeat_timeout": 4.0, "progress": False, **options},
        }
        said = (self._directory / f"said-{len(self._started)}").open("wb")
        command = [sys.executable, "-m", "tests.named_driver", json.dumps(spec)]
        environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
        driver = subprocess.Popen(command, cwd=self._directory, env=environment, stdout=said, stderr=subprocess.STDOUT)
        said.close()
        self._started.append(driver)
        return driver

    def said(self, driver: subprocess.Popen[bytes]) -> str:
        """What it has printed."""
        return (self._directory / f"said-{self._started.index(driver)}").read_text("utf-8", "replace")

    def end(self, driver: subprocess.Popen[bytes], code: int = 0) -> str:
        """Wait until it has ended, and give what it printed."""
        assert driver.wait(WAIT_S) == code, self.said(driver)
        return self.said(driver)

    def stuck(self, *workers: str) -> bool:
        """Whether these have come to the batch in which they wait."""
        return {note["worker"] for note in self.trace.notes("batch") if note["batch"] == WAITS_AT} >= set(workers)

    def head(self, worker: str, instance: int = 1) -> Record:
        """The newest record of a worker."""
        record = StoredLog(open_store(self.store, create=False), f"{RUN}/{instance:09d}/works/{worker}/").newest()
        assert record is not None
        return record

    def run_head(self) -> RunRecord:
        """The newest record of the run."""
        record = StoredLog(open_store(self.store, create=False), f"{RUN}/driver/").newest_run()
        assert record is not None
        return record

    def results(self) -> dict[str, Any]:
        """What the drivers got."""
        return {note["worker"]: (note["value"][0], note["value"][1]) for note in self.trace.notes("result")}

    def kill(self) -> None:
        """End all that still run."""
        for driver in self._started:
            with contextlib.suppress(ProcessLookupError):
                os.kill(driver.pid, signal.SIGCONT)
            driver.kill()
            driver.wait(WAIT_S)


@pytest.fixture
def drivers(nodes: Nodes, tmp_path: Path) -> Iterator[Drivers]:
    """Of the cluster of this module."""
    drivers = Drivers(tmp_path, {"address": nodes.address})
    yield drivers
    drivers.kill()


@pytest.mark.parametrize("cluster", ["same", "new"])
def test_a_driver_is_killed_and_started_again(
    cluster: str, nodes: Nodes, tmp_path: Path, ray_temp_dir: str, request: pytest.FixtureRequest
) -> None:
    """What had completed is not run, the others resume, and their budgets go on counting; the end of all closes the run."""
    local = {"address": "local", "_temp_dir": ray_temp_dir, "num_cpus": 4, "include_dashboard": False}
    drivers = Drivers(tmp_path, {"address": nodes.address} if cluster == "same" else local)
    request.addfinalizer(drivers.kill)
    first = drivers.start()
    wait_until(lambda: drivers.stuck("waits", "fails") and "quick" in drivers.results(), WAIT_S)
    wait_until(lambda: all(drivers.head(worker).snapshot is not None for worker in WORKERS))
    os.kill(first.pid, signal.SIGKILL)
    first.wait(WAIT_S)
    began = drivers.trace.notes("batch")
    wait_until(lambda: not any(Path(f"/proc/{note['pid']}").exists() for note in began if note["worker"] != "quick"), WAIT_S)
    drivers.trace.note("go", "test")
    said = drivers.end(drivers.start())
    assert drivers.results() == dict.fromkeys(WORKERS, expected(8))
    assert "quick" not in {note["worker"] for note in drivers.trace.notes("batch")[len(began) :]}
    for worker in ("waits", "fails"):
        begins = drivers.trace.begins(worker)
        assert begins[-1] in {WAITS_AT - 1, WAITS_AT}, "all but perhaps the newest batch was durable"
        tokens = [note["token"] for note in drivers.trace.notes("batch", worker)]
        assert tokens == sorted(tokens)
    causes = [[failure.cause for failure in drivers.head(worker).failures] for worker in ("waits", "fails")]
    crash = [[], ["crash"]]  # Ray gives its workers a few milliseconds, in which they may come to say that they were terminated
    assert causes[0] in crash
    assert causes[1] in [["exception", *then] for then in crash]
    assert [drivers.head(worker).charged for worker in ("waits", "fails")] == [len(found) for found in causes]
    assert "run 'nightly' (#1) goes on: opened " in said
    assert f"by {socket.gethostname()} pid {first.pid} (gone). 1 of 3 workers completed, 2 resume. Store {drivers.store}." in said
    survived = sum(map(len, causes))
    assert f"run 'nightly' (#1) closed: 4 completed (1 from the record), {survived} failures survived, 0 quarantined." in said
    assert drivers.run_head().kind == "closed"


def test_two_drivers_at_once(drivers: Drivers) -> None:
    """One has the run, the other is told which one."""
    both = [drivers.start(), drivers.start()]
    refused = wait_until(lambda: drivers.trace.notes("in use"), WAIT_S)
    (owner,) = drivers.trace.notes("has it")
    assert (refused[0]["holder"], refused[0]["host"]) == (owner["pid"], socket.gethostname())
    assert refused[0]["since"] <= owner["time"]
    assert f"run 'nightly' is in use: {socket.gethostname()} pid {owner['pid']}, since " in refused[0]["text"]
    assert "init(run='nightly', takeover=True)" in refused[0]["text"]
    drivers.trace.note("go", "test")
    said = [drivers.end(driver) for driver in both]
    assert drivers.results() == dict.fromkeys(WORKERS, expected(8))
    assert sum("run 'nightly' waits: " in text for text in said) == 1
    assert max(note["attempt"] for note in drivers.trace.notes("batch") if note["worker"] != "fails") == 1


def test_a_driver_that_thaws_after_its_run_was_taken_over(drivers: Drivers) -> None:
    """It stops nobody: its workers find out, what it submits is refused, and it closes nothing."""
    old = drivers.start()
    wait_until(lambda: drivers.stuck("waits", "fails") and "quick" in drivers.results(), WAIT_S)
    os.kill(old.pid, signal.SIGSTOP)
    new = drivers.start()
    wait_until(lambda: len([note for note in drivers.trace.notes("has it") if note["pid"] == new.pid]) == 1, WAIT_S)
    for worker in ("waits", "fails"):
        wait_until(lambda worker=worker: len({note["pid"] for note in drivers.trace.notes("batch", worker)}) == 2, WAIT_S)
    before = drivers.run_head()
    os.kill(old.pid, signal.SIGCONT)
    wait_until(lambda: "was taken over by" in drivers.said(old), WAIT_S)
    assert drivers.run_head() == before
    drivers.trace.note("go", "test")
    assert "(silent for 4 s)" in drivers.end(new)
    said = drivers.end(old)
    assert {note["worker"] for note in drivers.trace.notes("superseded")} == {"waits", "fails"}
    assert [note["holder"] for note in drivers.trace.notes("in use")] == [new.pid]
    assert said.count("run 'nightly' (#1) was taken over by") == 2
    assert "it goes on there, and nothing that this driver leaves changes it." in said
    assert drivers.results() == dict.fromkeys(WORKERS, expected(8))
    assert drivers.run_head().kind == "closed"
    assert drivers.run_head().driver.pid == new.pid
    assert all(drivers.head(worker).kind == "end" for worker in WORKERS)


def test_a_run_is_taken_from_a_driver_that_lives(drivers: Drivers) -> None:
    """Only if that is asked for; then the work goes on with the new one."""
    old = drivers.start("waits")
    wait_until(lambda: drivers.stuck("waits"), WAIT_S)
    drivers.end(drivers.start("waits"))
    assert [note["holder"] for note in drivers.trace.notes("in use")] == [old.pid]
    new = drivers.start("waits", takeover=True)
    wait_until(lambda: len(drivers.trace.notes("has it")) == 2, WAIT_S)
    drivers.trace.note("go", "test")
    assert "(taken over)" in drivers.end(new)
    drivers.end(old)
    assert drivers.results()["waits"] == expected(8)
    assert drivers.run_head().driver.pid == new.pid


def test_four_drivers_one_after_another_that_thaw_in_any_order(drivers: Drivers) -> None:
    """Three are frozen with their workers, in the middle of a batch, and taken over: only what the last one does counts."""
    old: list[subprocess.Popen[bytes]] = []
    frozen: list[int] = []
    for number in range(4):
        driver = drivers.start("waits", takeover=number > 0)
        wait_until(lambda now=number: len({note["pid"] for note in stuck(drivers)}) == now + 1, WAIT_S)
        if number < 3:
            frozen += [driver.pid, stuck(drivers)[-1]["pid"]]
            old.append(driver)
            for pid in frozen[-2:]:
                os.kill(pid, signal.SIGSTOP)
    before = drivers.run_head()
    drivers.trace.note("go", "test")
    for pid in (*frozen[4:], *frozen[:4]):  # the third, the first, the second
        os.kill(pid, signal.SIGCONT)
    for one in (*old, driver):
        drivers.end(one)
    assert [(note["pid"], note["value"][0]) for note in drivers.trace.notes("result")] == [(driver.pid, expected(8)[0])]
    assert {note["pid"] for note in drivers.trace.notes("superseded")} == {one.pid for one in old}
    assert {note["pid"] for note in drivers.trace.notes("in use")} == {one.pid for one in old}
    assert (drivers.run_head().kind, drivers.run_head().number) == ("closed", before.number + 1)
    assert drivers.head("waits").owner.epoch == before.number


def stuck(drivers: Drivers) -> list[dict[str, Any]]:
    """Those that have come to the batch in which they wait, in order."""
    return [note for note in drivers.trace.notes("batch", "waits") if note["batch"] == WAITS_AT]


@pytest.mark.parametrize(
    ("end", "code", "kind"), [("", 0, "closed"), ("exit 1", 1, "closed"), ("exception", 1, "left"), ("SIGKILL", -9, "open")]
)
def test_the_end_of_the_interpreter(drivers: Drivers, end: str, code: int, kind: str) -> None:
    """Without an exception it closes the run, if all have completed."""
    drivers.end(drivers.start("quick", end=end), code)
    assert drivers.run_head().kind == kind
    beats = [path for path in (Path(drivers.store) / RUN / "driver").rglob("*.json") if record_number(path.parent.name + ".json")]
    assert bool(beats) == (kind == "open"), "of a driver that ended by itself no sign of life is left"
    if kind != "closed":
        assert "goes on: opened" in drivers.end(drivers.start("quick"))
    assert drivers.run_head().kind == "closed"
    assert len({note["pid"] for note in drivers.trace.notes("batch", "quick")}) == 1


def files(drivers: Drivers) -> dict[Path, bytes]:
    """All that is on record, but for the signs of life of drivers."""
    return {path: path.read_bytes() for path in (Path(drivers.store) / RUN).rglob("*.json")}


def test_zombies_of_a_closed_run_change_nothing(nodes: Nodes, drivers: Drivers) -> None:
    """Frozen with their node as their driver was killed, they thaw when the run is closed: one saves, one only says that it is done."""
    node, workers = nodes.add(1, **{ICE: 2}), ("waits", "fails")
    old = drivers.start(*workers, on=ICE)
    wait_until(lambda: drivers.stuck(*workers) and all(drivers.head(worker).snapshot is not None for worker in workers), WAIT_S)
    zombies = {worker: drivers.trace.notes("batch", worker)[-1]["pid"] for worker in workers}
    with nodes.frozen(node, *zombies.values()):
        os.kill(old.pid, signal.SIGKILL)
        new = drivers.start(*workers)
        wait_until(lambda: all(drivers.trace.notes("batch", worker)[-1]["pid"] != pid for worker, pid in zombies.items()), WAIT_S)
        drivers.trace.note("go", "test")
        assert "run 'nightly' (#1) closed: 3 completed" in drivers.end(new)
        closed = files(drivers)
        for pid in zombies.values():  # before their raylet, which would end them
            os.kill(pid, signal.SIGCONT)
        wait_until(lambda: not any(is_at_work(pid) for pid in zombies.values()), WAIT_S)
    assert [(note["worker"], note["pid"]) for note in drivers.trace.notes("fenced")] == [("fails", zombies["fails"])]
    assert [note["batch"] for note in drivers.trace.notes("batch", "waits") if note["pid"] == zombies["waits"]][-1] > WAITS_AT
    assert files(drivers) == closed
    ran = len(drivers.trace.notes("batch"))
    assert "(#1) closed: 3 completed (3 from the record)" in drivers.end(drivers.start(*workers, resume="always"))
    assert len(drivers.trace.notes("batch")) == ran
    assert drivers.results() == dict.fromkeys(workers, expected(8))
    nodes.remove(node)


def is_at_work(pid: int) -> bool:
    """Whether a process of Ray's runs a task of ours, which its title says."""
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        return b"works" in Path(f"/proc/{pid}/cmdline").read_bytes()
    return False


@contextlib.contextmanager
def harmful(harm: str, store: Path) -> Iterator[Callable[[], AbstractContextManager[None]]]:
    """A store, and what is done to it."""
    if harm == "gone":
        yield lambda: renamed(store)
    else:
        with small_disk(store) as disk:
            yield disk.read_only


ENTERING, AT_THE_LOOK = "checked_store", "stored_workers"  # the driver looks at all workers once it has entered, or when it ends


@pytest.mark.parametrize(
    ("moment", "stops", "harm"),
    [
        ("entering", ENTERING, "gone"),
        ("entering", ENTERING, "read-only"),
        ("entered", AT_THE_LOOK, "gone"),
        ("end", AT_THE_LOOK, "gone"),
        ("end", AT_THE_LOOK, "read-only"),
    ],
)
def test_a_store_that_fails_as_a_driver_enters_or_ends(drivers: Drivers, moment: str, stops: str, harm: str) -> None:
    """The user is told, and the run stays open; the next driver need not wait for the end of the process, which lives on."""
    with harmful(harm, Path(drivers.store)) as fault:
        first = drivers.start("quick", end="exception") if moment != "end" else None
        if first is not None:
            drivers.end(first, 1)
        old = drivers.start("quick", stops=stops, end="shutdown")
        wait_until(lambda: drivers.trace.notes("stops"), WAIT_S)
        with fault():
            drivers.trace.note("harm", "test")
            (failed,) = wait_until(lambda: drivers.trace.notes("failed"), WAIT_S)
        assert failed["pid"] == old.pid
        assert drivers.store in failed["text"]
        assert drivers.run_head().kind == ("left" if moment == "entering" else "open")
        said = drivers.end(drivers.start("quick"))
        before = f"pid {first.pid} (ended)." if first is not None and moment == "entering" else f"pid {old.pid} (silent for 4 s)."
        assert "run 'nightly' (#1) goes on: opened " in said
        assert before in said
        assert "run 'nightly' (#1) closed: 2 completed (2 from the record)" in said
        assert len({note["pid"] for note in drivers.trace.notes("batch", "quick")}) == 1
        drivers.trace.note("leave", "test")
        assert "(#1) closed" not in drivers.end(old)
        assert drivers.run_head().kind == "closed"
