"""Tasks that die on purpose, and the file in which they note what they do, outside of the library."""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import signal
import sys
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import ray

import faultguard
from faultguard._core.names import record_number
from faultguard._core.records import decode_record
from faultguard._manager import forget
from faultguard._session import current_settings
from faultguard._settings import PROTOCOL

if TYPE_CHECKING:
    import logging
    from collections.abc import Iterable, Iterator, Mapping

    from faultguard._core.records import Record

CRASHES = ("SIGKILL", "exit", "SIGSEGV")
KINDS = (*CRASHES, "exception")
NOWAIT = faultguard.Backoff(initial=0.01, factor=1, jitter=False)


class Trace:
    """Notes in a file that everybody appends to, one line each; they survive whoever wrote them.

    Args:
        path: of the file.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = os.fspath(path)

    def note(self, what: str, worker: str, **fields: Any) -> None:
        """Append a note; one write each, so that no two are mixed."""
        line = json.dumps({"what": what, "worker": worker, "pid": os.getpid(), "time": time.time(), **fields}) + "\n"
        fd = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            os.write(fd, line.encode())
        finally:
            os.close(fd)

    def notes(self, what: str | None = None, worker: str | None = None) -> list[dict[str, Any]]:
        """The notes so far, in order."""
        if not Path(self.path).exists():
            return []
        text = Path(self.path).read_text("utf-8")
        notes = [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]  # the last one may be just being written
        return [n for n in notes if what in {None, n["what"]} and worker in {None, n["worker"]}]

    def begins(self, worker: str) -> list[int]:
        """The first batch of each attempt of a worker."""
        first: dict[int, int] = {}
        for note in self.notes("batch", worker):
            first.setdefault(note["attempt"], note["batch"])
        return list(first.values())


def wait_until(condition: Any, timeout_s: float = 90.0) -> Any:
    """Ask until the answer is true, and give it; AssertionError when that takes too long."""
    deadline = time.monotonic() + timeout_s
    while not (answer := condition()):
        assert time.monotonic() < deadline, f"not within {timeout_s} s"
        time.sleep(0.02)
    return answer


@contextlib.contextmanager
def stopped(pid: int) -> Iterator[None]:
    """Stop a process, and let it go on afterwards. A busy machine takes a moment until the last of its threads stands still."""
    os.kill(pid, signal.SIGSTOP)
    try:
        wait_until(lambda: set(_states(pid)) <= {"T"})
        yield
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGCONT)


def _states(pid: int) -> Iterator[str]:
    """Of all threads of a process, as in /proc."""
    for stat in Path(f"/proc/{pid}/task").glob("*/stat"):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            yield stat.read_text("ascii", "replace").rpartition(")")[2].split()[0]


def wait_until_heard(worker: str) -> None:
    """Until the manager has a beat of it."""
    wait_until(lambda: worker in {beat["worker_id"] for beat in ray.get(faultguard.manager().live_workers.remote(), timeout=90)})


def ray_logs(session: str, *kinds: str) -> list[str]:
    """What the processes of a cluster have said, its workers on stderr if no other logs are asked for."""
    folder = Path(session) / "session_latest" / "logs"
    for _ in range(100):
        with contextlib.suppress(FileNotFoundError):  # Ray gives a log another name when its process gets work
            return [log.read_text(errors="replace") for kind in kinds or ("worker-*.err",) for log in folder.glob(kind)]
    raise AssertionError("each time, a log had another name")


def told(session: str, part: str) -> list[str]:
    """Lines that the manager of a cluster, or a worker, has said."""
    return [line for log in ray_logs(session, "worker-*.err", "python-core-worker-*.log") for line in log.splitlines() if part in line]


def hang(seconds: float = 90.0) -> None:
    """Wait in Python, where an exception can arrive."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        time.sleep(0.005)


def die(kind: str) -> NoReturn:
    """End this process, or raise, in one of `KINDS`."""
    if kind == "exception":
        raise ValueError("planned")
    if kind == "exit":
        os._exit(7)
    os.kill(os.getpid(), signal.SIGKILL if kind == "SIGKILL" else signal.SIGSEGV)
    time.sleep(60)  # a signal may take a moment
    sys.exit("still alive")


def manager_pid() -> int:
    """The process of the manager of this run, which may have to start first."""
    settings = current_settings()
    while True:
        try:
            return int(ray.get(faultguard.manager().hello.remote(PROTOCOL, settings.store_id, settings.run), timeout=30)["pid"])
        except ray.exceptions.ActorDiedError:
            forget(settings)
        except ray.exceptions.ActorUnavailableError:
            time.sleep(0.05)


def end_manager() -> int:
    """Kill the manager of this run, and give its pid."""
    pid = manager_pid()
    os.kill(pid, signal.SIGKILL)
    return pid


class GaveUpError(Exception):
    """An error of a user."""


class DiesOnArrival:
    """An argument that kills the process that unpickles it; packing it does no harm."""

    def __init__(self, trace: Trace) -> None:
        self.trace = trace

    def __reduce__(self) -> Any:
        """Travel as a call."""
        return _arrive, (self.trace.path,)


def _arrive(path: str) -> Any:
    Trace(path).note("arrived", "?")
    die("SIGKILL")


def work(ckpt: faultguard.Checkpoint, n: int, trace: Trace, deaths: Mapping[int, str], *, ack_every: int = 3) -> None:
    """A loop that carries a sum and a list, and dies at planned batches, once each, with its state half updated."""
    state, worker = ckpt.state, ckpt.worker_id
    died = {note["batch"] for note in trace.notes("death", worker)}
    for batch in ckpt.batches(range(n)):
        trace.note("batch", worker, attempt=ckpt.attempt, batch=batch, token=ckpt.token)
        state["sum"] = state.get("sum", 0) + batch
        if batch in deaths and batch not in died:
            trace.note("death", worker, attempt=ckpt.attempt, batch=batch, kind=deaths[batch])
            die(deaths[batch])
        state.setdefault("seen", []).append(batch)
        if batch % ack_every == 0:
            ckpt.advance(wait=True)
            trace.note("ack", worker, attempt=ckpt.attempt, batch=ckpt.durable_batch)


def doomed(worker_id: str, trace: Trace, kinds: list[str], *, kill_manager: bool = False, extra: Any = None) -> int:
    """Does two batches in each attempt, which it waits for, and dies in the next one in the way that is its turn."""
    ckpt = faultguard.current()
    for drawn, batch in enumerate(ckpt.batches(range(1000)), start=1):  # of this attempt
        trace.note("batch", worker_id, attempt=ckpt.attempt, batch=batch)
        if drawn > 2:
            kind = kinds[min(ckpt.attempt, len(kinds)) - 1]
            if kind == "done":
                break
            if kill_manager:
                trace.note("manager", worker_id, killed=end_manager())
            die(kind)
        ckpt.advance(wait=True)
    return ckpt.attempt


def hold_the_interpreter(seconds: float) -> None:
    """Burn CPU in one C call that no other thread can interrupt."""
    started = time.perf_counter()
    sum(range(10_000_000))
    sum(range(int(10_000_000 * seconds / (time.perf_counter() - started))))


def loop_in_c(worker_id: str, kind: str, seconds: float, trace: Trace) -> Any:
    """A loop that holds the interpreter, in its first attempt: in batch 3, when it is known to the manager, or "at once"."""
    ckpt = faultguard.current()
    for batch in ckpt.batches(range(6)):
        if kind == "hang at once" and ckpt.attempt == 1:
            ctypes.PyDLL(None).sleep(int(seconds))
        trace.note("batch", worker_id, attempt=ckpt.attempt, batch=batch)
        ckpt.state["sum"] = ckpt.state.get("sum", 0) + batch
        ckpt.state.setdefault("seen", []).append(batch)
        if batch == 3 and ckpt.attempt <= (2 if kind == "hang twice" else 1):
            if ckpt.attempt == 1:
                with ckpt.section("wait for the manager", timeout=None):
                    wait_until(lambda: trace.notes("go"))
            if kind == "burn":
                hold_the_interpreter(seconds)
            elif kind == "burn untimed":
                with ckpt.section("burn", timeout=None):
                    hold_the_interpreter(seconds)
            else:
                ctypes.PyDLL(None).sleep(int(seconds))
    return result(ckpt)


def result(ckpt: faultguard.Checkpoint) -> tuple[int, list[int]]:
    """What `work` made."""
    return ckpt.state["sum"], ckpt.state["seen"]


def expected(n: int) -> tuple[int, list[int]]:
    """What `work` must make, whatever happens."""
    return sum(range(n)), list(range(n))


def assert_never_behind(trace: Trace, worker: str) -> None:
    """Every attempt began at or above the newest batch that had been acknowledged before it: to it, or by the store."""
    acknowledged, attempt = 0, 0
    for note in trace.notes(worker=worker):
        if note["what"] in {"ack", "write"}:
            acknowledged = max(acknowledged, note["batch"])
        elif note["what"] == "batch":
            if note["attempt"] != attempt:
                assert note["attempt"] > attempt, f"an earlier attempt goes on beside its successor: {note}"
                attempt = note["attempt"]
                assert note["batch"] >= acknowledged, f"attempt {attempt} began at {note['batch']}, {acknowledged} were durable"
            acknowledged = max(acknowledged, note.get("durable", 0))


def records(run: faultguard.Run, task: str, worker: str) -> list[Record]:
    """The log of a worker as it is on the disk, oldest first."""
    folder = Path(run.checkpoint_dir) / run.name / task / worker
    numbered = sorted((number, path) for path in folder.glob("*.json") if (number := record_number(path.name)) is not None)
    found = []
    for number, path in numbered:
        with contextlib.suppress(FileNotFoundError):  # its writer deletes what is superfluous, also after its end
            found.append(decode_record(path.read_bytes(), number))
    return [record for record in found if record is not None]


def assert_whole(event: logging.LogRecord) -> None:
    """An event of an attempt says which one, and where it stands."""
    missing = {"event", "run", "task", "worker", "attempt", "token", "batch", "pid"} - vars(event).keys()
    assert not missing, f"{event.getMessage()!r} does not say {missing}"


def our_threads() -> list[str]:
    """Threads of this library in this process."""
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("faultguard")]


def open_files() -> dict[int, str]:
    """What the file descriptors of this process lead to."""
    found = {}
    for link in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(OSError):  # the one that lists them
            found[int(link.name)] = str(link.readlink())
    return found


def first_line(texts: Iterable[str], part: str) -> str:
    """The first of the lines that has `part` in it."""
    return next(line for text in texts for line in text.splitlines() if part in line)
