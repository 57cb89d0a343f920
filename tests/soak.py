"""A random mix of all faults over a cluster of three nodes, for as long as one likes: `make soak MINUTES=30 SEED=7`.

A program of its own, because Ray reads its settings from the environment of each process, the driver's too. It ends by itself, with 1
and a list if anything was wrong: a result, a failure that nobody caused, a process that was ended and should not have been, or
something that is still there when all is over. The seed decides what happens in which order; what it hits depends on the time.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import ctypes
import faulthandler
import json
import os
import queue
import random
import re
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from concurrent.futures import Future
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest import mock

import ray

import faultguard
from faultguard._core.names import record_number
from faultguard._core.records import decode_record
from tests.nodes import Nodes, alive, some_nodes
from tests.soak_check import BOUNDED, BUDGET, ENDS, KILLED_BY_US, Fault, newest_of, problems_of
from tests.soak_tasks import (
    ACTORS,
    DECORATED,
    KINDS,
    ORDERS,
    SHARED,
    Host,
    Job,
    Limits,
    PlannedError,
    bounded,
    decorated,
    met_by,
    undecorated,
)
from tests.tasks import Trace, expected, manager_pid, open_files, our_threads, ray_logs, wait_until

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from faultguard._core.records import Record

NODES = 2  # that work; the third is the head
WAIT_S = 300  # for what must come; a machine with other work on it is slow
CLOSING_S = 600  # for all to complete
PAUSE_S = 2.0
MAX_REFUSALS = 20
DRIVEN = 2  # workers of a driver of its own
PR_SET_CHILD_SUBREAPER = 36
ROOM_BYTES = 2 << 30  # until Ray's monitor minds; as much again may be taken
CHUNK_BYTES = 64 << 20
CHUNK_S = 0.05
HOARD_S = 10.0
ENDED_BY_RAY = {"keepalive": "process given up", "NODE_OUT_OF_MEMORY": "out of memory", "owner": "owner lost"}


@dataclass(frozen=True)
class Size:
    """How much at once: workers, slots for them on each node, faults of workers, and batches of a worker."""

    workers: int
    cpus: int
    injectors: int  # of faults of workers; those of nodes, and of what all share, have one each
    batches: tuple[int, int]
    limits: Limits


TASKS: dict[str, Any] = {BOUNDED: bounded}
TURNS = [kind for kind in KINDS for _ in range(2 if kind in SHARED else 1)]  # in pairs, so that they meet
LONG = Size(20, 12, 3, (100, 400), Limits(1.0, 6.0, 6.0))
SHORT = Size(13, 6, 4, (60, 160), Limits(0.5, 3.0, 2.0))  # for less than a minute


class Soak:
    """The workers of one soak, what was done to them, and what was wrong."""

    def __init__(self, nodes: Nodes, run: faultguard.Run, folder: str, seed: int, seconds: float, size: Size) -> None:
        self.nodes = nodes
        self.run = run
        self.seconds = seconds
        self.size = size
        self.limits = size.limits
        self.folder = folder
        self.seed = seed
        self.faults: list[Fault] = []
        self.problems: list[str] = []
        self.took: dict[str, list[float]] = collections.defaultdict(list)
        self.workers: list[Any] = [nodes.add(size.cpus) for _ in range(NODES)]
        self.removed: set[str] = set()
        self.jobs: dict[str, Job] = {}
        self.drivers: list[Driver] = []
        self.happened: set[str] = set()
        self.causes: collections.Counter[str] = collections.Counter()
        self.sick: list[tuple[float, float]] = []
        self.live: dict[Any, Job] = {}
        self._wanted: queue.Queue[tuple[Future[Any], dict[str, str]]] = queue.Queue()
        self._hosts: list[Host] = []
        self._busy: set[str] = set()
        self._again: collections.Counter[str] = collections.Counter()
        self._lock = threading.Lock()
        self._rng = random.Random(f"{seed}/jobs")
        self._began = time.monotonic()

    # --- workers ---

    def say(self, text: str) -> None:
        """Print a line, with the time."""
        print(f"{time.monotonic() - self._began:7.1f}  {text}\n", end="", flush=True)  # at once: other threads say something, too

    def wrong(self, text: str) -> None:
        """That must not be."""
        self.problems.append(text)
        self.say(f"WRONG: {text}")

    def submit_new(self) -> None:
        """One more worker, of the kind whose turn it is."""
        number = len(self.jobs)
        kind = TURNS[number % len(TURNS)]
        size = self._rng.randrange(*self.size.batches, 10)
        job = Job(f"w{number}", kind, size, self._rng.uniform(0.03, 0.1), self.folder, self.limits)
        self.jobs[job.worker_id] = job
        self.submit(job)

    def submit(self, job: Job) -> None:
        """Start a worker, or let it resume."""
        if job.kind in ACTORS:
            ref = self._host_of(job).start(job)
        else:
            ref = TASKS.get(job.kind, decorated if job.kind in DECORATED else undecorated).remote(job)
        with self._lock:
            self.live[ref] = job

    def _host_of(self, job: Job) -> Host:
        """The actor that has it, else one of its kind that has room for it."""
        hosts = [host for host in self._hosts if job.worker_id in host.workers]
        hosts += [host for host in self._hosts if host.kind == job.kind and len(host.workers) < host.room]
        if not hosts:
            hosts = [Host(job.kind)]
            self._hosts += hosts
        return hosts[0]

    def settle(self, ref: Any) -> bool:
        """Take a result. Returns whether the worker is done."""
        job = self.live[ref]
        try:
            value = ray.get(ref, timeout=WAIT_S)
        except Exception as error:  # noqa: BLE001 - judged at once
            again = self._is_expected(job, error)
            with self._lock:
                del self.live[ref]
            if not again:
                self.wrong(f"{job.worker_id} ({job.kind}) failed: {type(error).__name__}: {str(error)[-2000:]}")
                self._leave_host(job)
                return True
            self.say(f"again: {job.worker_id} ({job.kind}) after {type(error).__name__}")
            self.submit(job)
            return False
        if value != expected(job.size):
            self.wrong(f"{job.worker_id} ({job.kind}) gave {str(value)[:200]}, not the result of {job.size} batches")
        with self._lock:
            del self.live[ref]
        self._leave_host(job)
        return True

    def _leave_host(self, job: Job) -> None:
        """An actor that has nobody left is ended."""
        for host in [host for host in self._hosts if job.worker_id in host.workers]:
            host.workers.remove(job.worker_id)
            if not host.workers:
                self._hosts.remove(host)
                host.end()

    def _is_expected(self, job: Job, error: Exception) -> bool:
        """Whether the caller is to submit the worker again: it was cancelled, or it is an actor, whose failures are its caller's."""
        self._again[job.worker_id] += 1
        hits = sum(fault.worker == job.worker_id for fault in self.faults) + len(job.trace.notes("fault"))
        if self._again[job.worker_id] > hits + MAX_REFUSALS:
            return False
        # A cancelled attempt may still hold the worker, be it that its node has frozen.
        cancelled = (ray.exceptions.TaskCancelledError, ray.exceptions.WorkerCrashedError, faultguard.DuplicateWorkerError)
        if job.kind == BOUNDED and isinstance(error, faultguard.MaxFailuresExceeded):
            return len(error.failures) == BUDGET + 1
        if isinstance(error, faultguard.CheckpointStoreError):  # the first attempt on a node that has no store is told at once
            wait_until(Path(self.run.checkpoint_dir).exists, WAIT_S)
            return "store away" in self.happened
        if isinstance(error, cancelled) and any(f.worker == job.worker_id and "cancel" in f.kind for f in self.faults):
            return True
        return job.kind in ACTORS and isinstance(error, (PlannedError, faultguard.StalledError, ray.exceptions.RayActorError))

    def is_live(self, job: Job) -> bool:
        """Whether it is not done."""
        with self._lock:
            return job in self.live.values()

    def ref_of(self, job: Job) -> Any:
        """Of its task; None when it is done."""
        with self._lock:
            return next((ref for ref, known in self.live.items() if known == job), None)

    def is_known(self, job: Job) -> bool:
        """Whether its process is marked on its node: one that is stopped in its first moments is missed by nobody."""
        pid = self.newest(job).get("pid", 0)
        return any((Path(self.nodes.directory) / "session_latest" / "faultguard").glob(f"{pid}-*.json"))

    def newest(self, job: Job, what: str = "batch") -> dict[str, Any]:
        """What the newest attempt of a worker noted last."""
        return newest_of(job.trace.notes(what))

    @contextlib.contextmanager
    def target(self, rng: random.Random, kind: str) -> Iterator[Job]:
        """A worker that works, that suits the fault, and that nobody else disturbs meanwhile; nodes, the manager and the store excepted."""

        def choose() -> Job | None:
            with self._lock:
                jobs = [job for job in self.live.values() if job.worker_id not in self._busy]
            rng.shuffle(jobs)
            for job in jobs:
                if time.time() - self.newest(job).get("time", 0.0) < 1.0 and (kind not in SUITS or SUITS[kind](self, job)):
                    with self._lock:
                        if job.worker_id not in self._busy:
                            self._busy.add(job.worker_id)
                            return job
            return None

        job = wait_until(choose, WAIT_S)
        try:
            yield job
        finally:
            with self._lock:
                self._busy.discard(job.worker_id)

    def is_busy(self, job: Job) -> bool:
        """Whether something happens to it just now."""
        with self._lock:
            return job.worker_id in self._busy

    def hit(self, kind: str, job: Job, note: dict[str, Any]) -> None:
        """Note that something happens to the process of a worker, before it does."""
        self.faults.append(Fault(kind, job.worker_id, note["attempt"], note["pid"]))

    def wait_replaced(self, kind: str, job: Job, attempt: int) -> None:
        """Until a later attempt works, or the worker is done."""
        began = time.monotonic()
        try:
            wait_until(lambda: self.newest(job).get("attempt", 0) > attempt or not self.is_live(job), WAIT_S)
        except AssertionError as late:
            raise AssertionError(f"{job.worker_id} ({job.kind}) was not replaced: {self.seen_of(job)}") from late
        self.took[kind].append(time.monotonic() - began)

    def seen_of(self, job: Job) -> str:
        """What can be seen of a worker that does not get on: its last note, its process, and what that says of itself."""
        note = self.newest(job)
        marks = (Path(self.nodes.directory) / "session_latest" / "faultguard").glob(f"{note['pid']}-*.json")
        return f"{note}, runs: {runs(note['pid'])}, {time.monotonic():.0f}: {[mark.read_text('utf-8') for mark in marks]}"

    def wait_goes_on(self, kind: str, job: Job, note: dict[str, Any]) -> None:
        """Until it has gone on for some batches, in whatever attempt."""
        began = time.monotonic()
        wait_until(lambda: self.newest(job).get("batch", 0) > note["batch"] + 2 or not self.is_live(job), WAIT_S)
        self.took[kind].append(time.monotonic() - began)

    # --- nodes ---

    def add_node(self, **environment: str) -> Any:
        """Start one more node; Ray does that on the main thread only."""
        wanted: Future[Any] = Future()
        self._wanted.put((wanted, environment))
        node = wanted.result(WAIT_S)
        self.workers.append(node)
        return node

    def start_wanted_nodes(self) -> None:
        """On the main thread."""
        with contextlib.suppress(queue.Empty):
            while True:
                wanted, environment = self._wanted.get_nowait()
                try:
                    with mock.patch.dict(os.environ, environment):
                        wanted.set_result(self.nodes.add(self.size.cpus))
                except Exception as error:  # noqa: BLE001 - raised where it was asked for
                    wanted.set_exception(error)

    # --- logs ---

    def complaints(self) -> int:
        """How often a worker has said that its store is in trouble."""
        said = ("cannot save", "cannot begin")
        return sum(text in line for log in ray_logs(self.nodes.directory) for line in log.splitlines() for text in said)

    def paths_of(self, job: Job, run: str = "") -> list[tuple[int, Path]]:
        """Its records with their numbers, oldest first. `run`: the folder of another run than that of this process."""
        paths = Path(self.run.checkpoint_dir).glob(f"{run or self.run.name}/*/{job.worker_id}/*.json")
        return sorted((number, path) for path in paths if (number := record_number(path.name)) is not None)

    def log_of(self, job: Job, run: str = "") -> list[Record]:
        """The same, read; without those that are damaged."""
        found = [decode_record(path.read_bytes(), number) for number, path in self.paths_of(job, run)]
        return [record for record in found if record is not None]

    def saves_of(self, job: Job) -> list[tuple[Path, Record]]:
        """Its two newest records, the older one first, if both are saves, whole, of one attempt that leaves no note; else none."""
        newest = self.paths_of(job)[-2:]
        with contextlib.suppress(FileNotFoundError):  # it deletes what is superfluous; or the store is away
            read = [(path, decode_record(path.read_bytes(), number)) for number, path in newest]
            saves = [(path, record) for path, record in read if record is not None and record.kind == "save" and record.ended is None]
            if len(saves) == 2 and saves[0][1].token == saves[1][1].token:
                return saves
        return []

    def killed_by_us(self) -> list[tuple[str, int]]:
        """Worker and attempt of every process that the manager says it has ended."""
        said = re.compile(r"'[^'/]+/([wd][\d-]+)' attempt (\d+) (?:was stopped by a signal|stood still for longer than its stall_timeout)")
        return sorted({(worker, int(attempt)) for log in ray_logs(self.nodes.directory) for worker, attempt in said.findall(log)})


# --- faults of one worker -------------------------------------------------------------------------------------------


def order(soak: Soak, rng: random.Random, kind: str) -> None:
    """Let a worker do something to itself."""
    while True:
        with soak.target(rng, kind) as job:
            attempt = soak.newest(job)["attempt"]
            new = job.order.with_suffix(".new")
            new.write_text(kind, "utf-8")
            new.rename(job.order)
            wait_until(lambda job=job: not job.order.exists() or not soak.is_live(job), WAIT_S)
            if job.order.exists():  # it was done before
                job.order.unlink()
                continue
            note = wait_until(lambda job=job: soak.newest(job, "fault"), WAIT_S)
            attempt = max(attempt, note["attempt"])
            soak.say(f"{kind}: {job.worker_id} ({job.kind}) attempt {attempt} batch {note['batch']}")
            if kind == "burn":
                soak.wait_goes_on(kind, job, note)
            else:
                soak.wait_replaced(kind, job, attempt)
            return


def send(soak: Soak, rng: random.Random, kind: str) -> None:
    """Send a signal that ends a worker, sooner or later."""
    with soak.target(rng, kind) as job:
        note = soak.newest(job)
        soak.hit(kind, job, note)
        soak.say(f"{kind}: {job.worker_id} ({job.kind}) attempt {note['attempt']} pid {note['pid']}")
        with contextlib.suppress(ProcessLookupError):
            os.kill(note["pid"], getattr(signal, kind))
        soak.wait_replaced(kind, job, note["attempt"])


def freeze_for_a_moment(soak: Soak, rng: random.Random, kind: str) -> None:
    """Stop a worker, and let it go on before anybody may mind."""
    with soak.target(rng, kind) as job:
        note = soak.newest(job)
        soak.say(f"{kind}: {job.worker_id} ({job.kind}) attempt {note['attempt']} pid {note['pid']}")
        with contextlib.suppress(ProcessLookupError):
            os.kill(note["pid"], signal.SIGSTOP)
            time.sleep(0.6 * soak.limits.heartbeat_timeout)
            os.kill(note["pid"], signal.SIGCONT)
        soak.wait_goes_on(kind, job, note)


def damage_record(soak: Soak, rng: random.Random, kind: str) -> None:
    """Kill a worker, and flip the bits of a byte of its newest record, a save, before anybody reads it; there is another one below."""
    while True:
        with soak.target(rng, kind) as job, stopped(pid := soak.newest(job)["pid"]):
            saves = soak.saves_of(job)
            if not saves or saves[1][1].owner.pid != pid or not flip_a_byte(saves[1][0], rng):
                continue
            below, newest = (record for _, record in saves)
            left = KINDS[job.kind].done(below)
            soak.faults.append(Fault(kind, job.worker_id, newest.attempt, pid, token=newest.token, left=left))
            soak.say(f"{kind}: {job.worker_id} ({job.kind}) attempt {newest.attempt} pid {pid} record {newest.number}, which leaves {left}")
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
            soak.wait_replaced(kind, job, newest.attempt)
            return


def flip_a_byte(path: Path, rng: random.Random) -> bool:
    """All its bits; False: the file is not there, because the store was taken away."""
    try:
        with path.open("r+b") as file:
            place = rng.randrange(path.stat().st_size)
            file.seek(place)
            byte = file.read(1)[0]
            file.seek(place)
            file.write(bytes([byte ^ 0xFF]))
    except FileNotFoundError:
        return False
    return True


@contextlib.contextmanager
def stopped(pid: int) -> Iterator[None]:
    """Stop a process for a moment, with all its threads."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGSTOP)
    try:
        wait_until(lambda: states(pid) <= {"T", "Z", "X"}, WAIT_S)
        yield
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGCONT)


def cancel(soak: Soak, rng: random.Random, kind: str) -> None:
    """Cancel a worker, which is then submitted again."""
    with soak.target(rng, kind) as job:
        note, ref = soak.newest(job), soak.ref_of(job)
        force = rng.random() < 0.5 and job.kind not in ACTORS  # which Ray refuses
        soak.faults.append(Fault(kind, job.worker_id))
        soak.say(f"{kind}: {job.worker_id} ({job.kind}) attempt {note['attempt']}")
        if kind == "ray.cancel":
            if ref is not None:
                ray.cancel(ref, force=force)
        else:
            wait_until(lambda: told_to_cancel(soak, job), WAIT_S)
        soak.wait_replaced(kind, job, note["attempt"])


def told_to_cancel(soak: Soak, job: Job) -> bool:
    """Try it; the manager may be away just now. What it was told in vain may arrive all the same, and so cancel twice."""
    try:
        faultguard.cancel(job.worker_id)
    except faultguard.ManagerUnavailableError:
        soak.faults.append(Fault("faultguard.cancel", job.worker_id))
        return False
    return True


# --- faults of nodes ------------------------------------------------------------------------------------------------


def workers_on(soak: Soak, node: Any) -> list[Job]:
    """Whose newest attempt is there."""
    with soak._lock:
        jobs = list(soak.live.values())
    return [job for job in jobs if soak.newest(job, "begin").get("node") == node.node_id]


def take_away(soak: Soak, node: Any, kind: str) -> None:
    """From now on whatever ends there has this reason."""
    soak.faults += [Fault(kind, node=node.node_id) for _ in range(len(soak.jobs) + DRIVEN * len(soak.drivers))]
    soak.removed.add(node.node_id)
    soak.workers.remove(node)
    soak.say(f"{kind}: {node.node_id[:8]} with {', '.join(job.worker_id for job in workers_on(soak, node))}")


def wait_left(soak: Soak, node: Any, kind: str, done: Callable[[Job], bool] = lambda _: False) -> None:
    """Until nobody's newest attempt is on the node, but for those of whom `done` says that they are not to be waited for."""
    began = time.monotonic()
    wait_until(lambda: all(done(job) for job in workers_on(soak, node)), WAIT_S)
    soak.took[kind].append(time.monotonic() - began)


def hangs_with_the_interpreter(soak: Soak, job: Job) -> bool:
    """Whether its newest attempt does: nobody but a probe ends it, and none runs where the raylet is frozen."""
    fault = soak.newest(job, "fault")
    return fault.get("kind") == "hang with the GIL" and fault["attempt"] == soak.newest(job)["attempt"]


def replace_lost(soak: Soak) -> None:
    """A node that Ray has given up by itself, on a machine that is too busy, is replaced like any other."""
    for node in [node for node in soak.workers if node.node_id not in alive()]:
        take_away(soak, node, "node given up")
        remove(soak, node)
    while len(soak.workers) < NODES:
        soak.add_node()


def remove(soak: Soak, node: Any) -> None:
    """Kill a node with everything on it, who is stopped there, too: it cannot see that its raylet is gone, and a machine takes it along."""
    pids = children(node.all_processes["raylet"][0].process.pid)
    soak.nodes.remove(node)
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGCONT)


def kill_node(soak: Soak, rng: random.Random, kind: str) -> None:
    """Kill a node with everything on it, and start another one."""
    replace_lost(soak)
    node = rng.choice(soak.workers)
    take_away(soak, node, kind)
    remove(soak, node)
    soak.add_node()
    wait_left(soak, node, kind)


def freeze_node(soak: Soak, rng: random.Random, kind: str) -> None:
    """Freeze a node with everything on it, or its raylet alone, until its workers have successors; they thaw, or work on, beside them."""
    replace_lost(soak)
    node = rng.choice(soak.workers)
    take_away(soak, node, kind)
    raylet = node.all_processes["raylet"][0].process
    pids = children(raylet.pid)
    with soak.nodes.frozen(node, *(pids if kind == "node frozen" else ())):
        soak.add_node()
        wait_left(soak, node, kind, lambda job: hangs_with_the_interpreter(soak, job))
        wait_until(lambda: node.node_id not in alive(), WAIT_S)
    for pid in pids:  # one that was stopped besides has nobody who could end it
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGCONT)
    began = time.monotonic()
    wait_until(lambda: raylet.poll() is not None, WAIT_S)  # it learns that it was given up; others see it only when it is reaped
    wait_until(lambda: not any(runs(pid) for pid in pids), WAIT_S)
    soak.took[f"{kind}: its zombies"].append(time.monotonic() - began)
    soak.nodes.remove(node)
    wait_left(soak, node, f"{kind}: who hung")


def drain_node(soak: Soak, rng: random.Random, kind: str) -> None:
    """Say that a node will be taken away, and do it when whoever can has left: all decorated ones to whom nothing else happens.

    Ray starts nothing on such a node, a probe neither: who is stopped or hangs there goes with the node.
    """
    replace_lost(soak)
    node = rng.choice(soak.workers)
    take_away(soak, node, kind)
    soak.nodes.drain(node, 600)
    soak.add_node()
    wait_left(soak, node, kind, lambda job: soak.is_busy(job) or job.kind not in DECORATED)
    remove(soak, node)
    wait_left(soak, node, "drained, then killed")


def starve_node(soak: Soak, rng: random.Random, kind: str) -> None:
    """Take memory until Ray's monitor ends somebody on a node that is there for this alone, give it back, and kill the node.

    The monitors of the other nodes have the threshold that they have in Ray: they end nobody.
    """
    replace_lost(soak)
    memory: Any = ray._private.utils
    used, total = memory.get_used_memory(), memory.get_system_memory()
    room = min(ROOM_BYTES, (total - used) // 4)
    node = soak.add_node(RAY_memory_usage_threshold=str((used + room) / total))
    wait_until(lambda: workers_on(soak, node), WAIT_S)

    def ended() -> int:
        return sum(fault.kind == kind for fault in ended_by_ray(soak))

    before, began = ended(), time.monotonic()
    hoard: list[bytes] = []
    while not (hit := ended() > before) and time.monotonic() < began + HOARD_S:
        if len(hoard) < 2 * room // CHUNK_BYTES:
            hoard.append(b"x" * CHUNK_BYTES)
        time.sleep(CHUNK_S)
    soak.say(f"{kind}: {len(hoard) * CHUNK_BYTES >> 20} MiB, with room for {room >> 20}")
    hoard.clear()
    soak.took[kind if hit else f"{kind}: of nobody"].append(time.monotonic() - began)
    take_away(soak, node, "node killed")
    remove(soak, node)
    wait_left(soak, node, f"{kind}: it goes on")


def children(pid: int) -> list[int]:
    """The processes that a process has started."""
    found: list[int] = []
    for path in Path(f"/proc/{pid}/task").glob("*/children"):
        with contextlib.suppress(OSError):
            found += map(int, path.read_text("ascii").split())
    return found


def states(pid: int) -> set[str]:
    """What the threads of a process do, as the kernel puts it; empty: there is none."""
    found: set[str] = set()
    for path in Path(f"/proc/{pid}/task").glob("*/stat"):
        with contextlib.suppress(OSError):
            found.add(path.read_text(errors="replace").rpartition(")")[2].split()[0])
    return found


def runs(pid: int) -> bool:
    """Whether there is such a process that has not ended."""
    return not states(pid) <= {"Z", "X"}


# --- faults of what all share ---------------------------------------------------------------------------------------


def pid_of_manager() -> int | None:
    """None where it does not answer in time: it may be starting, on a machine that is busy."""
    try:
        return manager_pid()
    except (ray.exceptions.GetTimeoutError, faultguard.ManagerUnavailableError):
        return None


def kill_manager(soak: Soak, rng: random.Random, kind: str) -> None:
    """It comes back when somebody asks for it."""
    pid = wait_until(pid_of_manager, WAIT_S)
    soak.say(f"{kind}: pid {pid}")
    os.kill(pid, signal.SIGKILL)
    began = time.monotonic()
    wait_until(pid_of_manager, WAIT_S)
    soak.took[kind].append(time.monotonic() - began)


def freeze_manager(soak: Soak, rng: random.Random, kind: str) -> None:
    """It hears nothing for three times the timeout, and must not take that for silence."""
    pid = wait_until(pid_of_manager, WAIT_S)
    soak.say(f"{kind}: pid {pid}")
    os.kill(pid, signal.SIGSTOP)
    try:
        time.sleep(3 * soak.limits.heartbeat_timeout)
    finally:
        os.kill(pid, signal.SIGCONT)
    began = time.monotonic()
    wait_until(pid_of_manager, WAIT_S)
    soak.took[kind].append(time.monotonic() - began)


def sicken_store(soak: Soak, rng: random.Random, kind: str) -> None:
    """Let the disk be slow, or full, or the directory be away, for a while and until somebody has met that."""
    seconds = soak.limits.heartbeat_timeout * rng.uniform(0.5, 2)
    what = kind.rpartition(" ")[2]
    with soak.target(rng, kind):  # somebody works
        soak.say(f"{kind}: for {seconds:.1f} s")
        began = time.time()
        with store_away(soak) if what == "away" else store_sick(soak, what) as is_met:
            time.sleep(seconds)
            wait_until(is_met, WAIT_S)
        if what != "slow":
            soak.sick.append((began, time.time()))


@contextlib.contextmanager
def store_sick(soak: Soak, what: str) -> Iterator[Callable[[], bool]]:
    """Gives whether anybody has noted it."""
    sickness = next(iter(soak.jobs.values())).sickness
    met = Trace(met_by(sickness))
    before = len(met.notes(what))
    new = sickness.with_suffix(".new")
    new.write_text(what, "utf-8")
    new.rename(sickness)
    try:
        yield lambda: len(met.notes(what)) > before
    finally:
        sickness.unlink()


@contextlib.contextmanager
def store_away(soak: Soak) -> Iterator[Callable[[], bool]]:
    """Rename the directory, and back. Gives whether anybody has missed it."""
    store, before = Path(soak.run.checkpoint_dir), soak.complaints()
    away = store.with_name("away")
    store.rename(away)
    try:
        yield lambda: soak.complaints() > before
    finally:
        if store.exists():
            soak.wrong(f"somebody has made the store anew: {[*map(str, store.rglob('*'))][:10]}")
            shutil.rmtree(store)
        away.rename(store)


class Driver:
    """One of a named run with workers of its own, beside all the others; started as often as it takes."""

    def __init__(self, soak: Soak, rng: random.Random) -> None:
        self.number = len(soak.drivers)
        self.run = f"driven{self.number}"
        kinds = rng.sample(sorted(DECORATED - {BOUNDED}), DRIVEN)
        sizes = [rng.randrange(*soak.size.batches, 10) for _ in kinds]
        names = [f"d{self.number}-{index}" for index in range(DRIVEN)]
        self.jobs = [Job(name, kind, size, 0.05, soak.folder, soak.limits) for name, kind, size in zip(names, kinds, sizes, strict=True)]
        self.trace = Trace(f"{soak.folder}/{self.run}.trace")
        self.read = Path(f"{soak.folder}/{self.run}.read")
        self._said = Path(f"{soak.folder}/{self.run}.said")
        self._spec = {
            "address": soak.nodes.address,
            "run": self.run,
            "checkpoint_dir": soak.run.checkpoint_dir,
            "init": {"heartbeat_interval": soak.limits.interval, "heartbeat_timeout": soak.limits.heartbeat_timeout},
            "jobs": [asdict(job) for job in self.jobs],
            "trace": self.trace.path,
            "read": str(self.read),
        }

    def start(self) -> subprocess.Popen[bytes]:
        """Once more."""
        with self._said.open("ab") as said:
            return subprocess.Popen([sys.executable, "-m", "tests.soak_driver", json.dumps(self._spec)], stdout=said, stderr=said)

    def said(self) -> str:
        """All that its processes have printed."""
        return self._said.read_text("utf-8", "replace")

    def has(self, job: Job, pid: int | None = None) -> bool:
        """Whether it, or that process of it, has had the result of a worker."""
        return any(pid in {None, note["pid"]} for note in self.trace.notes("result", job.worker_id))


def disturb_driver(soak: Soak, rng: random.Random, kind: str) -> None:
    """Kill a driver whose workers work, once or twice, and start it again; or freeze it until another one has taken its run over.

    What has completed is not run again, and the others resume.
    """
    driver = Driver(soak, rng)
    soak.drivers.append(driver)
    for _ in range(rng.randint(1, 2) if kind == "driver killed" else 1):
        before = {job: soak.newest(job).get("batch", 0) for job in driver.jobs}
        began = time.monotonic()
        process = driver.start()

        def gets_on(before: dict[Job, int] = before) -> bool:
            return all(driver.has(job) or soak.newest(job).get("batch", 0) > batch + 2 for job, batch in before.items())

        wait_until(gets_on, WAIT_S)
        soak.took[kind].append(time.monotonic() - began)
        soak.faults += [Fault(kind, job.worker_id) for job in driver.jobs]
        soak.say(f"{kind}: pid {process.pid} of {driver.run} with {', '.join(job.worker_id for job in driver.jobs)}")
        process.send_signal(signal.SIGKILL if kind == "driver killed" else signal.SIGSTOP)
        if kind == "driver killed":
            process.wait(WAIT_S)
    last = driver.start()
    if kind == "driver frozen":
        wait_until(lambda: len(driver.trace.notes("submitted")) > 1 or last.poll() is not None, WAIT_S)
        process.send_signal(signal.SIGCONT)
    thawed = time.monotonic()
    wait_until(lambda: all(driver.has(job, last.pid) for job in driver.jobs) or last.poll() is not None, WAIT_S)
    check_driver(soak, driver, last)
    if kind == "driver frozen":
        if process.wait(WAIT_S) == 0 and "was taken over by" not in driver.said():  # it may have had all its results
            soak.wrong(f"the first driver of {driver.run}, whose run was taken over, has not noticed: {driver.said()}")
        soak.took["driver frozen: it ends"].append(time.monotonic() - thawed)


def check_driver(soak: Soak, driver: Driver, process: subprocess.Popen[bytes]) -> None:
    """What the last process of a driver has got, what the logs say, and that it closes its run."""
    for job in driver.jobs:
        values = [note["value"] for note in driver.trace.notes("result", job.worker_id)]
        if not values or any(tuple(value) != expected(job.size) for value in values):
            soak.wrong(f"{job.worker_id} of {driver.run} gave {str(values)[:200]}, not the result of {job.size} batches: {driver.said()}")
            continue
        faults = [*soak.faults, *ended_by_ray(soak)]
        for problem in problems_of(job.worker_id, job.kind, job.trace.notes(), soak.log_of(job, f"{driver.run}/*"), faults, soak.sick):
            soak.wrong(f"{problem} ({driver.run}: {job.kind})")
    driver.read.touch()
    if process.wait(WAIT_S) != 0 or f"run {driver.run!r} (#1) closed: {DRIVEN} completed" not in driver.said():
        soak.wrong(f"the driver of {driver.run} did not close it: {driver.said()}")


SUITS: dict[str, Callable[[Soak, Job], bool]] = {
    "hang in Python": lambda _, job: job.timed and job.kind != "async",
    "hang in C": lambda _, job: job.timed and job.alone,
    "hang with the GIL": lambda _, job: job.timed and job.alone,
    "SIGTERM": lambda _, job: job.alone,
    "SIGSTOP": lambda soak, job: job.alone and soak.is_known(job),
    "record damaged": lambda soak, job: bool(soak.saves_of(job)),
    "ray.cancel": lambda _, job: job.kind in DECORATED or job.kind == "async",
}
"""Which workers a fault may meet; all, where nothing is said: what is not promised there is not asked for."""

OF_WORKERS: dict[str, Any] = {
    **dict.fromkeys(ORDERS, order),
    **dict.fromkeys(("SIGKILL", "SIGTERM", "SIGSTOP"), send),
    "record damaged": damage_record,
    "SIGSTOP and SIGCONT": freeze_for_a_moment,
    "faultguard.cancel": cancel,
    "ray.cancel": cancel,
}
OF_NODES: dict[str, Any] = {
    "node killed": kill_node,
    "node frozen": freeze_node,
    "raylet frozen": freeze_node,
    "node drained": drain_node,
    "out of memory": starve_node,
}
OF_ALL: dict[str, Any] = {
    "manager killed": kill_manager,
    "manager frozen": freeze_manager,
    "store slow": sicken_store,
    "store full": sicken_store,
    "store away": sicken_store,
    "driver killed": disturb_driver,
    "driver frozen": disturb_driver,
}


class Deck:
    """Faults in an order that the seed decides, each as often as the others. May be used by several threads."""

    def __init__(self, faults: dict[str, Any], seed: str) -> None:
        self.faults = faults
        self.rounds = -1
        self._rng = random.Random(seed)
        self._left: list[str] = []
        self._lock = threading.Lock()

    def draw(self) -> tuple[str, Any]:
        """The next one."""
        with self._lock:
            if not self._left:
                self._left = sorted(self.faults)
                self._rng.shuffle(self._left)
                self.rounds += 1
            kind = self._left.pop()
            return kind, self.faults[kind]

    @property
    def is_through(self) -> bool:
        """Whether each was drawn once."""
        with self._lock:
            return self.rounds > 0 or (self.rounds == 0 and not self._left)


def inject(soak: Soak, deck: Deck, number: int, until: float) -> None:
    """Draw faults until the time is over and each was drawn; on a thread."""
    rng = random.Random(f"{soak.seed}/{number}/{len(deck.faults)}")
    while time.monotonic() < until or not deck.is_through:
        kind, fate = deck.draw()
        soak.happened.add(kind)
        try:
            fate(soak, rng, kind)
        except Exception:  # noqa: BLE001 - listed; the others go on
            soak.wrong(f"{kind}: {traceback.format_exc()}")
        time.sleep(rng.uniform(0, PAUSE_S))


# --- the whole ------------------------------------------------------------------------------------------------------


def soak_it(soak: Soak) -> None:
    """Submit, disturb, and collect until the time is over; then let all complete."""
    began = time.monotonic()
    for _ in range(soak.size.workers):
        soak.submit_new()
    decks = [Deck(faults, f"{soak.seed}/{index}") for index, faults in enumerate((OF_WORKERS, OF_NODES, OF_ALL))]
    decks += [decks[0]] * (soak.size.injectors - 1)
    threads = [
        threading.Thread(target=inject, args=(soak, deck, number, began + soak.seconds), daemon=True) for number, deck in enumerate(decks)
    ]
    for thread in threads:
        thread.start()
    closing = None
    while soak.live:
        ready, _ = ray.wait(list(soak.live), num_returns=1, timeout=0.2)
        soak.start_wanted_nodes()
        injecting = any(thread.is_alive() for thread in threads)
        for ref in ready:
            if soak.settle(ref) and injecting:
                soak.submit_new()
        if not injecting:
            closing = closing or time.monotonic()
            if time.monotonic() > closing + CLOSING_S:
                break
    for job in soak.live.values():
        soak.wrong(f"{job.worker_id} ({job.kind}) does not end; its last note {soak.newest(job)}")
    soak.say(f"{len(soak.jobs)} workers; now the checks")


def ended_by_ray(soak: Soak) -> list[Fault]:
    """Processes that Ray has ended by itself: for want of memory, because they did not answer a busy machine in time, or with their owner.

    The owner of an attempt that went to another node is the process that waits for it.
    """
    session = soak.nodes.directory
    exits = re.compile(r"Reporting worker exit, worker id = (\w+),.*(keepalive|NODE_OUT_OF_MEMORY)")
    found = {who: why for text in ray_logs(session, "gcs_server*.out") for who, why in exits.findall(text)}
    begun = re.compile(r"Started worker process with pid (\d+) worker_id=(\w+)")
    orphaned = re.compile(r"Killing leased worker because its (owner)(?:'s node)? died. worker_id=(\w+)")
    raylets = ray_logs(session, "raylet*.out")
    found |= {who: why for text in raylets for why, who in orphaned.findall(text)}
    pids = {who: int(pid) for text in raylets for pid, who in begun.findall(text)}
    return [Fault(ENDED_BY_RAY[why], pid=pids[who]) for who, why in found.items() if who in pids]


def check(soak: Soak) -> None:
    """Compare what happened with what was done."""
    soak.faults += ended_by_ray(soak)
    for job in soak.jobs.values():  # whoever ends a process ends all that work in it
        ends = [note for note in job.trace.notes("fault") if "crash" in ENDS[note["kind"]]]
        soak.faults += [Fault(note["kind"], pid=note["pid"], time=note["time"]) for note in ends]
    unfinished = {job.worker_id for job in soak.live.values()}
    for job in soak.jobs.values():
        if job.worker_id not in unfinished:
            log = soak.log_of(job)
            soak.causes.update(failure.cause for record in log[-1:] for failure in record.failures)
            for problem in problems_of(job.worker_id, job.kind, job.trace.notes(), log, soak.faults, soak.sick):
                soak.wrong(f"{problem} ({job.kind})")
    asked = {(f.worker, f.attempt) for f in soak.faults if f.kind in KILLED_BY_US}
    asked |= {(job.worker_id, n["attempt"]) for job in soak.jobs.values() for n in job.trace.notes("fault") if n["kind"] in KILLED_BY_US}
    for worker, attempt in soak.killed_by_us():
        if (worker, attempt) not in asked:
            soak.wrong(f"{worker} attempt {attempt} was ended by the manager, and nobody had stopped it")
    threads: set[str] = set()

    def tidy() -> bool:
        nonlocal threads
        threads = left_in_processes(soak)
        return not threads

    try:
        wait_until(tidy, WAIT_S)
    except AssertionError:
        soak.wrong(f"left in idle worker processes: {sorted(threads)}")


@ray.remote(num_cpus=1)
def look_around(directory: str) -> list[str]:
    """What of ours is in this process while it does nothing for us."""
    time.sleep(1)  # so that each process gets one of these
    return [*our_threads(), *(path for path in open_files().values() if path.startswith(directory))]


def left_in_processes(soak: Soak) -> set[str]:
    """Threads and open files in the processes of all nodes."""
    refs = [look_around.remote(soak.run.checkpoint_dir) for _ in range(soak.size.cpus * len(soak.workers))]
    return {found for one in ray.get(refs, timeout=WAIT_S) for found in one}


def check_run_is_over(soak: Soak) -> None:
    """After the end of the run: no actor, no checkpoint."""
    actors: Any = ray._private.state.actors
    try:
        wait_until(lambda: all(actor["State"] == "DEAD" for actor in actors().values()), WAIT_S)
    except AssertionError:
        soak.wrong(f"actors that are left: {[actor for actor in actors().values() if actor['State'] != 'DEAD']}")
    if not soak.live:
        left = [str(path) for path in (Path(soak.run.checkpoint_dir) / soak.run.name).rglob("*")]
        if left:
            soak.wrong(f"checkpoints that are left: {left[:20]}")


def report(soak: Soak) -> None:
    """How often what was done, and how long it took until the work went on."""
    print(f"\n{'fault':<24}{'times':>6}{'median s':>10}{'longest s':>11}")
    for kind, seconds in sorted(soak.took.items()):
        print(f"{kind:<24}{len(seconds):>6}{statistics.median(seconds):>10.1f}{max(seconds):>11.1f}")
    print(f"failures in the histories of those that have completed: {dict(soak.causes)}")
    counts = collections.Counter(fault.kind for fault in soak.faults if fault.kind.endswith("given up"))
    if counts:
        print(f"Ray gave up by itself, because the machine is too busy for its settings: {dict(counts)}")


def main() -> int:
    """Run a soak, and say what was wrong."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--minutes", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=None)
    options = parser.parse_args()
    wanted = {**faultguard.recommended_ray_env(), "RAY_USAGE_STATS_ENABLED": "0"}
    seed = options.seed if options.seed is not None else random.SystemRandom().randrange(10**6)
    if any(os.environ.get(key) != value for key, value in wanted.items()):
        command = [sys.executable, "-m", "tests.soak", "--minutes", str(options.minutes), "--seed", str(seed)]
        os.execve(sys.executable, command, {**os.environ, **wanted})  # noqa: S606 - no shell is wanted
    print(f"seed {seed}; replay with: make soak MINUTES={options.minutes:g} SEED={seed}", flush=True)
    seconds = options.minutes * 60
    faulthandler.dump_traceback_later(seconds + CLOSING_S + 5 * WAIT_S, exit=True)
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1)  # whoever loses its parent becomes our child, and is seen at the end
    with tempfile.TemporaryDirectory(prefix="faultguard-soak-", dir="/var/tmp") as folder:
        problems = run_soak(Path(folder), seed, seconds)
    problems += leaked()
    print("\nWRONG:" if problems else "\nnothing was wrong", *problems, sep="\n* ", flush=True)
    return 1 if problems else 0


def run_soak(folder: Path, seed: int, seconds: float) -> list[str]:
    """One soak on a cluster of its own."""
    (folder / "traces").mkdir()
    size = SHORT if seconds < 60 else LONG
    with some_nodes() as nodes:
        run = faultguard.init(
            checkpoint_dir=folder / "checkpoints",
            heartbeat_interval=size.limits.interval,
            heartbeat_timeout=size.limits.heartbeat_timeout,
        )
        soak = Soak(nodes, run, str(folder / "traces"), seed, seconds, size)
        try:
            soak_it(soak)
            check(soak)
        except Exception:  # noqa: BLE001 - what is there is kept, to be looked at
            soak.wrong(traceback.format_exc())
        faultguard.shutdown()
        check_run_is_over(soak)
        if soak.problems:
            keep(soak)
        report(soak)
    return soak.problems


def keep(soak: Soak) -> None:
    """Put traces, checkpoints and logs where they outlive this."""
    target = Path(f"/var/tmp/faultguard-soak-{soak.seed}-kept")
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(Path(soak.folder).parent, target / "soak")
    with contextlib.suppress(shutil.Error):  # of logs that Ray has moved meanwhile: the others are there
        shutil.copytree(Path(soak.nodes.directory) / "session_latest" / "logs", target / "logs")
    print(f"kept in {target}")


def leaked() -> list[str]:
    """Processes that are still there when the cluster is gone."""
    left: list[int] = []

    def none_left() -> bool:
        left[:] = [pid for pid in children(os.getpid()) if runs(pid)]
        return not left

    try:
        wait_until(none_left, WAIT_S)
    except AssertionError:
        names = [f"{pid} {Path(f'/proc/{pid}/cmdline').read_text(errors='replace')[:100]!r}" for pid in left if runs(pid)]
        for pid in left:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        return [f"processes that are left: {names}"]
    return []


if __name__ == "__main__":
    sys.exit(main())
