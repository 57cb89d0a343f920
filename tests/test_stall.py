"""A worker that lives and makes no progress: told in its batch, ended if it does not come back, and nobody else is hit."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import random
import re
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import pytest
import ray

import faultguard
from faultguard import StalledError, _attempt, _native, _ray, _watcher, _worker
from faultguard._core import stall
from faultguard._journal import Journal
from faultguard._log import StoredLog
from faultguard._settings import Settings
from faultguard.storage import open_store, store_id
from tests.conftest import CPUS
from tests.needs import require_a_look_at_parents
from tests.tasks import NOWAIT, Trace, assert_whole, hang, records, told, wait_until

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from typing_extensions import Self

    from faultguard._stall import StallGuard
    from tests.conftest import StartRun

WAIT_S = 90
LONG_S = 60.0  # of a hang that is to be ended before
STALL_SEEN_S = 12.0  # to look at all stacks takes a busy machine seconds
TRACED_S = 60.0
REPOSITORY = Path(__file__).parents[1]
SHORT_S = 0.4  # a timeout of tests without a cluster
ROUNDS = 80
EDGE_ROUNDS = 64


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    """A run without a cluster."""
    store = open_store(str(tmp_path / "store"))
    return Settings(run="run", checkpoint_dir=store.url, store_id=store_id(store), job_id="01000000")


def execute(
    settings: Settings,
    function: Callable[[], Any],
    *,
    worker_id: str = "w",
    max_failures: int = 1,
    timeout_s: float | None = SHORT_S,
    **options: Any,
) -> Any:
    """Run a function as an attempt of a task of Ray's, in this process."""
    identity = _ray.Identity("01000000", "node", f"task-{worker_id}", 0, "count", "count")
    given = {"name": "count", "max_failures": max_failures, "every": 1, "backoff": NOWAIT, "stall_timeout_s": timeout_s, **options}
    return _attempt.run_task(settings, identity, _attempt.TaskOptions(**given), worker_id, _attempt.Work(function, repeatable=True))


def hangs_once(n: int = 6, at: int = 3) -> int:
    """A loop that hangs in its first attempt."""
    ckpt = faultguard.current()
    for batch in ckpt.batches(range(n)):
        ckpt.state["sum"] = ckpt.state.get("sum", 0) + batch
        if batch == at and ckpt.attempt == 1:
            hang()
    return int(ckpt.state["sum"])


# --- soft, in this process ------------------------------------------------------------------------------------------


def test_a_stalled_batch_runs_again(settings: Settings, caplog: pytest.LogCaptureFixture) -> None:
    """The thread gets `StalledError`; the next attempt goes on from the batch; the record says where everybody stood."""
    failures: list[Any] = []

    def count() -> int:
        failures.extend(faultguard.current().failures)
        return hangs_once()

    assert execute(settings, count) == 15
    (failure,) = failures
    assert (failure.cause, failure.batch, failure.attempt) == ("stall", 3, 1)
    assert "StalledError" in failure.message
    assert "has made no progress for" in failure.message
    assert "in hang" in failure.stacks.split("Thread ")[1]  # the thread that hangs comes first
    told = wait_until(lambda: [record for record in caplog.records if vars(record)["event"] == "faultguard.stalled"])
    assert f"'count/w' attempt 1 has made no progress for {vars(told[0])['stall_s']:.1f} s in batch 3" in told[0].getMessage()
    assert_whole(told[0])


@pytest.mark.parametrize("ends", ["for good", "leaves"])
def test_its_note_names_it(settings: Settings, monkeypatch: pytest.MonkeyPatch, ends: str) -> None:
    """Also where no attempt follows, or none in this process: the causes are told apart."""

    def leave() -> None:
        raise SystemExit

    monkeypatch.setattr(_attempt, "leave_process", leave)
    with pytest.raises(StalledError if ends == "for good" else SystemExit):
        execute(settings, hangs_once, max_failures=int(ends == "leaves"), fresh_process_on=StalledError)
    record = StoredLog(open_store(settings.checkpoint_dir), settings.log_prefix("count", "w")).newest()
    assert record is not None
    assert record.ended is not None
    assert (record.ended.cause, record.failures[-1].cause) == ("stall", "stall")


def test_the_failure_has_the_stack_of_every_thread(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not only of the one that hangs: what it waits for may be in another one."""
    monkeypatch.setattr(_native, "MAX_STACKS", 10**6)  # pytest alone takes most of it
    enough = threading.Event()

    def waits_beside() -> None:
        enough.wait(WAIT_S)

    beside = threading.Thread(target=waits_beside, name="beside")
    beside.start()
    failures: list[Any] = []

    def count() -> int:
        failures.extend(faultguard.current().failures)
        return hangs_once()

    try:
        assert execute(settings, count) == 15
    finally:
        enough.set()
        beside.join(WAIT_S)
    python = failures[0].stacks.partition("py-spy: ")[0]
    stacks = {stack.partition(":\n")[0]: stack for stack in python.split("Thread ")[1:]}
    assert "in waits_beside" in stacks["beside"]
    assert "in hang" in stacks["MainThread"]


def test_it_is_retried_whatever_is_retried(settings: Settings) -> None:
    """`retry_on` speaks of the user's own errors; `give_up_on` can name it."""
    assert execute(settings, hangs_once, retry_on=KeyError) == 15
    with pytest.raises(StalledError) as caught:
        execute(settings, hangs_once, worker_id="x", give_up_on=StalledError)
    assert (caught.value.worker_id, caught.value.attempt, caught.value.batch) == ("x", 1, 3)


def test_stalls_use_up_the_budget(settings: Settings) -> None:
    """One budget for all causes."""

    def count() -> None:
        for _ in faultguard.batches(range(3)):
            hang()

    with pytest.raises(StalledError) as caught:  # which it is, too
        execute(settings, count, max_failures=1)
    assert isinstance(caught.value, faultguard.MaxFailuresExceeded)
    assert [failure.cause for failure in caught.value.failures] == ["stall", "stall"]
    assert isinstance(caught.value.last_exception, StalledError)
    assert [bool(failure.stacks) for failure in caught.value.failures] == [False, True]  # the newest one keeps them


@pytest.mark.parametrize("way", ["next", "break", "return", "advance", "save"])
def test_a_swallowed_stall_is_raised_again(settings: Settings, way: str) -> None:
    """A body that catches everything does not get past its boundary, and the batch does not count."""
    began: list[int] = []

    def count() -> int:
        ckpt = faultguard.current()
        for batch in ckpt.batches(range(5)):
            began.append(batch)
            if batch == 2 and ckpt.attempt == 1:
                with contextlib.suppress(Exception):
                    hang()
                if way == "break":
                    break
                if way == "return":
                    return -1
                if way == "advance":
                    ckpt.advance()
                if way == "save":
                    with contextlib.suppress(faultguard.UsageError):
                        ckpt.save()
        return len(began)

    assert execute(settings, count) == 6
    assert began == [0, 1, 2, 2, 3, 4]


def test_another_error_on_the_way_is_that_error(settings: Settings) -> None:
    """What the body raises instead is what its caller sees."""

    def count() -> None:
        for _ in faultguard.batches(range(5)):
            try:
                hang()
            except StalledError:
                raise KeyError("cleaned up") from None

    with pytest.raises(KeyError):
        execute(settings, count, give_up_on=KeyError)


def test_a_source_that_hangs_is_a_stall(settings: Settings) -> None:
    """Waiting for the next batch is time between batches."""
    calls: list[int] = []

    def source(start: int) -> Iterator[int]:
        calls.append(start)
        for batch in range(start, 5):
            if batch == 2 and len(calls) == 1:
                hang()
            yield batch

    def count() -> int:
        for _ in faultguard.batches(source):
            pass
        return faultguard.current().attempt

    assert execute(settings, count) == 2
    assert calls == [0, 2]


def test_loops_by_hand_are_timed_from_their_first_advance(settings: Settings) -> None:
    """What is before the first `advance` may be loading."""

    def count() -> int:
        ckpt = faultguard.current()
        time.sleep(3 * SHORT_S)
        for batch in range(ckpt.current_batch, 4):
            if batch == 2 and ckpt.attempt == 1:
                hang()
            ckpt.advance()
        return ckpt.attempt

    assert execute(settings, count) == 2


def test_what_the_process_says_of_itself_changes_with_the_first_advance(settings: Settings) -> None:
    """From then on it may be ended from outside, should it stand still as a whole: the next regular mark may be one too late."""
    said: list[float | None] = []

    def count() -> int:
        guard = faultguard.current().guard
        guard.on_change = lambda: said.append(guard.timing())
        for _ in range(3):
            faultguard.current().advance()
        return len(said)

    assert execute(settings, count) == 1
    assert said[0] == SHORT_S


# --- what is no stall -----------------------------------------------------------------------------------------------


def test_only_batches_and_sections_are_timed(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before and after the loops, between them, while getting there, and while the store is slow, no clock runs."""
    long_s = 4 * SHORT_S

    class Slow(list[int]):
        """Takes long to get to where the work goes on."""

        def __getitem__(self, index: Any) -> Any:
            time.sleep(long_s)
            return super().__getitem__(index)

    def dropped() -> Iterator[int]:
        for batch in range(6):
            if batch < 3 and faultguard.current().attempt == 2:
                time.sleep(long_s / 2)
            yield batch

    def count() -> int:
        ckpt = faultguard.current()
        time.sleep(long_s)
        for batch in ckpt.batches(dropped(), name="dropped"):
            if batch == 3 and ckpt.attempt == 1:
                raise ValueError("planned")
        time.sleep(long_s)
        ckpt.track(slow=(lambda: 1, lambda _: time.sleep(long_s)))
        for _ in ckpt.batches(range(3), name="after"):
            with faultguard.checkpointed("other", stall_timeout=WAIT_S) as other:
                time.sleep(long_s)  # its own clock, not that of the task
                assert other.attempt
            break
        time.sleep(long_s)
        return ckpt.attempt

    assert execute(settings, count, max_failures=1) == 2


def test_a_slow_store_is_no_stall(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody is charged for waiting in this library."""
    slow = Journal.write

    def write(journal: Any, snapshot: Any) -> None:
        time.sleep(4 * SHORT_S)
        slow(journal, snapshot)

    monkeypatch.setattr(Journal, "write", write)

    def count() -> int:
        ckpt = faultguard.current()
        for _ in ckpt.batches(range(2)):
            ckpt.advance(wait=True)
        return ckpt.attempt

    assert execute(settings, count, max_failures=0) == 1


def test_without_a_timeout_one_warning(settings: Settings, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is raised; a batch that takes suspiciously long is told once, with the stacks."""
    monkeypatch.setattr(stall, "SLOW_S", 0.1)

    def count() -> int:
        ckpt = faultguard.current()
        worker = next(worker for worker in _worker.held_here.values() if worker is not None)
        worker.mark_every_s = 0.02
        worker.begins()  # as the beater says when it beats for the first time
        for _ in ckpt.batches(range(2)):
            hang(0.6)
        return ckpt.attempt

    assert execute(settings, count, timeout_s=None) == 1
    (told,) = wait_until(lambda: [record for record in caplog.records if vars(record)["event"] == "faultguard.slow_batch"])
    assert "with stall_timeout=... it would be retried" in told.getMessage()
    assert "in count" in told.getMessage()
    assert_whole(told)


# --- sections -------------------------------------------------------------------------------------------------------


def test_a_section_has_a_deadline_of_its_own(settings: Settings) -> None:
    """It counts also outside of loops, by itself, and is named."""
    texts: list[str] = []

    def count() -> int:
        ckpt = faultguard.current()
        texts.extend(failure.message for failure in ckpt.failures)
        with ckpt.section("download", timeout=SHORT_S):
            if ckpt.attempt == 1:
                hang()
        return ckpt.attempt

    assert execute(settings, count, timeout_s=None) == 2
    assert "in section 'download' of batch 0" in texts[0]


@pytest.mark.parametrize(("decorator_s", "block_s"), [(WAIT_S, SHORT_S), (SHORT_S, WAIT_S), (None, SHORT_S)])
@pytest.mark.parametrize("own", [False, True], ids=["of the task", "of its own"])
def test_the_timeout_of_the_block_wins(settings: Settings, decorator_s: float | None, block_s: float, own: bool) -> None:
    """Over that of the decorator, be it longer or shorter."""

    def count() -> int:
        attempt = faultguard.current().attempt
        with faultguard.checkpointed("block" if own else None, stall_timeout=block_s) as ckpt:
            for _ in ckpt.batches(range(2)):
                if attempt == 1:
                    hang(4 * SHORT_S)
        return attempt

    assert execute(settings, count, timeout_s=decorator_s) == (2 if block_s == SHORT_S else 1)


def test_a_section_without_a_limit(settings: Settings) -> None:
    """`timeout=None` switches it off inside; afterwards the clock of the batch begins anew."""

    def count() -> int:
        ckpt = faultguard.current()
        for batch in ckpt.batches(range(4)):
            with ckpt.section("compile", timeout=None):
                time.sleep(2 * SHORT_S)
                with ckpt.section("load", timeout=WAIT_S):
                    time.sleep(2 * SHORT_S)
            if batch == 2 and ckpt.attempt == 1:
                hang()
        return ckpt.attempt

    assert execute(settings, count) == 2


def test_a_stall_swallowed_in_a_section_ends_it(settings: Settings) -> None:
    """It is raised again where the section ends."""
    past: list[int] = []

    def count() -> int:
        ckpt = faultguard.current()
        with ckpt.section("download", timeout=SHORT_S), contextlib.suppress(Exception):
            if ckpt.attempt == 1:
                hang()
        past.append(ckpt.attempt)
        return ckpt.attempt

    assert execute(settings, count, timeout_s=None) == 2
    assert past == [2]


@pytest.mark.parametrize(("name", "timeout"), [("", 1), (3, 1), ("x", 0), ("x", "1"), ("x", True)], ids=str)
def test_bad_sections(name: Any, timeout: Any) -> None:
    """They are refused at the call."""
    with pytest.raises(faultguard.UsageError, match=r"section\(.* is refused; it takes"):
        faultguard.Checkpoint.in_memory().section(name, timeout)


# --- never the next task --------------------------------------------------------------------------------------------


def test_nobody_is_struck_elsewhere(settings: Settings) -> None:
    """Not in another batch, not in this library, not outside of the loop, not when the attempt is over."""
    struck: list[bool] = []

    def strike(guard: StallGuard, key: object) -> None:
        thread = threading.Thread(target=lambda: struck.append(guard.strike(key, StalledError("struck"), "")))
        thread.start()
        thread.join()

    def count() -> None:
        ckpt = faultguard.current()
        batches = ckpt.batches(range(5))  # which stays open
        next(batches)
        first, _ = ckpt.guard.look()
        assert first is not None
        next(batches)
        strike(ckpt.guard, first)
        key, _ = ckpt.guard.look()
        assert key is not None
        ckpt.guard.pause()
        strike(ckpt.guard, key)
        ckpt.guard.resume()
        strike(ckpt.guard, key)  # the clock has begun anew
        kept.append((ckpt.guard, ckpt.guard.look()[0], batches))

    kept: list[Any] = []
    execute(settings, count, timeout_s=None)
    guard, key, _ = kept[0]
    strike(guard, key)
    assert struck == [False] * 4


class _Striker:
    """As a watcher that is late: it strikes where it saw a worker some time ago, whatever became of that."""

    def __init__(self, seed: str) -> None:
        self.struck = 0
        self._chance = random.Random(seed)
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._strike)
        self._interval = sys.getswitchinterval()

    def __enter__(self) -> Self:
        sys.setswitchinterval(1e-6)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()
        sys.setswitchinterval(self._interval)

    def _strike(self) -> None:
        seen: list[tuple[StallGuard, object]] = []
        while not self._done.is_set():
            seen += [(worker.guard, worker.guard.look()[0]) for worker in tuple(_worker.held_here.values()) if worker is not None]
            del seen[:-4]
            for guard, key in seen:
                self.struck += key is not None and guard.strike(key, StalledError("struck"), "")
            time.sleep(self._chance.random() * 0.003)


@pytest.mark.parametrize("end", ["loop", "return", "error", "section", "block"])
def test_a_stall_at_the_very_end_never_reaches_the_next_task(settings: Settings, end: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Struck at any moment, as often as can be, an attempt takes the exception with it: what follows in its thread is safe."""

    def count() -> int:
        ckpt = faultguard.current()
        for batch in ckpt.batches(range(50)):
            ckpt.state["sum"] = ckpt.state.get("sum", 0) + batch
            sum(range(2000))  # long enough to be struck in
            if end == "return" and batch == 30:
                return 435
            if end == "error" and batch == 30 and ckpt.attempt < 3:
                raise KeyError("planned")
            if end == "section":
                with ckpt.section("part", timeout=WAIT_S):
                    pass
            if end == "block" and batch == 30:
                with faultguard.checkpointed(f"{ckpt.worker_id}/{ckpt.attempt}"):
                    pass
        return int(ckpt.state["sum"])

    monkeypatch.setattr(faultguard._events, "emit", lambda *_, **__: None)
    monkeypatch.setattr(sys, "unraisablehook", lambda _: None)  # of what arrives in a generator that `return` just closes
    with _Striker(end) as striker:
        for number in range(ROUNDS):
            assert execute(settings, count, worker_id=f"w{number}", max_failures=-1, every="auto", timeout_s=WAIT_S) in {435, 1225}
            sum(range(20_000))  # the next task
            for _ in range(200):
                str(number)
    assert striker.struck > ROUNDS / 2
    assert not _worker.held_here
    assert not _watcher._clients


# --- real processes -------------------------------------------------------------------------------------------------


@faultguard.recoverable(every=1, max_failures=1, backoff=NOWAIT, stall_timeout=1)
@ray.remote(num_cpus=0.5)
def sleeper(worker_id: str, trace: Trace) -> int:
    """Hangs in Python, once."""
    ckpt = faultguard.current()
    for batch in ckpt.batches(range(6)):
        trace.note("batch", worker_id, attempt=ckpt.attempt, batch=batch)
        if batch == 3 and ckpt.attempt == 1:
            hang()
    return ckpt.attempt


@pytest.mark.ray
def test_hung_in_python(run: faultguard.Run, trace: Trace) -> None:
    """The task goes on in the same process, from the batch that hung."""
    assert ray.get(sleeper.remote("w", trace), timeout=WAIT_S) == 2
    assert trace.begins("w") == [0, 3]
    assert len({note["pid"] for note in trace.notes("batch")}) == 1


EDGE_S = 0.15


@faultguard.recoverable(every=1, max_failures=0, stall_timeout=EDGE_S)
@ray.remote(num_cpus=CPUS)
def on_the_edge(worker_id: str, seconds: float, trace: Trace) -> list[str]:
    """Its last batch takes about as long as it may; before and after it there is Python in which an exception could arrive."""
    trace.note("task", worker_id)
    ckpt = faultguard.current()
    for batch in ckpt.batches(range(2)):
        ckpt.state.setdefault("seen", []).append(f"{worker_id}/{batch}")
        if batch == 1:
            hang(seconds)
    for _ in range(200):
        sum(range(2000))
    return list(ckpt.state["seen"])


@pytest.mark.ray
def test_a_stall_never_reaches_the_next_task_of_a_process(run: faultguard.Run, trace: Trace) -> None:
    """Of many tasks of one process whose last batch ends as they are being struck, each is whole, or is itself charged."""
    workers = [f"w{number:03d}" for number in range(EDGE_ROUNDS)]
    edges = [EDGE_S + 0.03 * (number % 16) for number in range(EDGE_ROUNDS)]  # a look at the stacks takes some tenths of a second
    edges[7::16] = [WAIT_S] * len(edges[7::16])  # who does not come back is struck for sure
    refs = [on_the_edge.remote(worker, seconds, trace) for worker, seconds in zip(workers, edges, strict=True)]
    stalled = 0
    for worker, ref in zip(workers, refs, strict=True):
        try:
            assert ray.get(ref, timeout=WAIT_S) == [f"{worker}/0", f"{worker}/1"]
        except StalledError as error:
            stalled += 1
            (failure,) = cast("Any", error).failures
            assert (failure.cause, failure.batch) == ("stall", 1)
            assert f"'on_the_edge/{worker}' attempt 1 has made no progress" in failure.message
    assert 0 < stalled < EDGE_ROUNDS
    tasks = trace.notes("task")
    assert [note["worker"] for note in tasks] == workers, "each ran once"
    assert len({note["pid"] for note in tasks}) == 1


@faultguard.recoverable(max_failures=0, stall_timeout=0.5)
@ray.remote(num_cpus=0.5)
def hangs() -> None:
    """Always."""
    for _ in faultguard.batches(range(2)):
        hang()


@faultguard.recoverable(every=1)
@ray.remote(num_cpus=0.5)
def slow(worker_id: str, seconds: float) -> int:
    """Two long batches after a short one; there what is suspiciously long is so at once."""
    from faultguard._core import stall

    ckpt, usual_s = faultguard.current(), stall.SLOW_S
    stall.SLOW_S = seconds / 5
    try:
        for batch in ckpt.batches(range(3)):
            hang(seconds if batch else 0.01)
    finally:
        stall.SLOW_S = usual_s
    return ckpt.attempt


@pytest.mark.ray
def test_a_long_batch_of_a_task_is_told_once(start_run: StartRun, ray_cluster: str) -> None:
    """Without a timeout nothing is raised; its process watches it by itself when it beats for the first time."""
    start_run(heartbeat_interval=0.2)
    assert ray.get(slow.remote("long", 3.0), timeout=WAIT_S) == 1
    (line,) = wait_until(lambda: told(ray_cluster, "'slow/long' attempt 1 has made no progress for"))
    assert "in batch 1 of 3, much longer than before. Nothing is done about it; with stall_timeout=..." in line


@pytest.mark.ray
def test_except_stalled_error_around_get(run: faultguard.Run) -> None:
    """A budget that a stall has used up is caught as one."""
    with pytest.raises(StalledError) as caught:
        ray.get(hangs.remote(), timeout=WAIT_S)
    assert isinstance(caught.value, faultguard.MaxFailuresExceeded)


@faultguard.recoverable(every=1, max_failures=1, backoff=NOWAIT, stall_timeout=1)
@ray.remote(num_cpus=0.5)
def locked(worker_id: str, trace: Trace, how: str, always: bool) -> int:
    """Hangs in C, where no exception arrives; with the GIL given back."""
    ckpt = faultguard.current()
    for batch in ckpt.batches(range(6)):
        trace.note("batch", worker_id, attempt=ckpt.attempt, batch=batch)
        if batch == 3 and (always or ckpt.attempt == 1):
            if how == "lock":
                lock = threading.Lock()
                lock.acquire()
                lock.acquire()
            else:
                os.read(os.pipe()[0], 1)
    return ckpt.attempt


@pytest.mark.ray
@pytest.mark.parametrize("how", ["lock", "read"])
def test_hung_in_c(run: faultguard.Run, trace: Trace, how: str) -> None:
    """Its process is ended after the grace, which is noted; Ray starts another one, which goes on from the batch that hung."""
    assert ray.get(locked.remote("w", trace, how, False), timeout=WAIT_S) == 2
    assert trace.begins("w") == [0, 3]
    assert len({note["pid"] for note in trace.notes("batch")}) == 2
    (failure,) = records(run, "locked", "w")[-1].failures
    assert (failure.cause, failure.batch, failure.attempt) == ("stall", 3, 1)
    assert "does not react" in failure.message
    python, _, native = failure.stacks.partition("py-spy: ")
    assert "in locked" in python
    require_a_look_at_parents()
    thread = native.split("Thread ")[1]  # the one that hangs comes first
    assert "locked (" in thread
    assert how != "read" or re.search(r"^    (__)?(libc_)?read ", thread, re.MULTILINE), native


@pytest.mark.ray
def test_hung_in_c_for_ever(run: faultguard.Run, trace: Trace) -> None:
    """Ended processes use up the budget, too."""
    with pytest.raises(faultguard.MaxFailuresExceeded) as caught:
        ray.get(locked.remote("w", trace, "lock", True), timeout=WAIT_S)
    assert [failure.cause for failure in caught.value.failures] == ["stall", "stall"]
    assert len({note["pid"] for note in trace.notes("batch")}) == 2


def start(server: type, **options: Any) -> Any:
    """An actor."""
    return cast("Any", ray.remote(server)).options(num_cpus=0.5, **options).remote()


TRACED_LATER = """
import os, sys, threading
from faultguard._core.schedule import Schedule
from faultguard._stall import StallGuard

guard, entered = StallGuard(Schedule("auto", 0.0), lambda: "batch"), threading.Event()

def loop():
    guard.enter()
    entered.set()
    threading.Event().wait(60)

threading.Thread(target=loop, daemon=True).start()
assert entered.wait(10)
while not guard.strike(guard.look()[0], ValueError()):
    pass
guard.leave()

def called():
    return 1

sys.settrace(lambda *_: None)
assert called() == 1
print("came back", flush=True)
os._exit(0)
"""

TRACED_MEANWHILE = """
import os, sys, threading
from faultguard._core.schedule import Schedule
from faultguard._stall import StallGuard

guard, entered = StallGuard(Schedule("auto", 0.0), lambda: "batch"), threading.Event()

def watch():
    entered.wait(10)
    while not guard.strike(guard.look()[0], ValueError()):
        pass

def trace(*_):
    return trace

threading.Thread(target=watch, daemon=True).start()
sys.settrace(trace)
try:
    guard.enter()
    entered.set()
    while True:
        pass
except ValueError:
    guard.leave()
print("came back", flush=True)
os._exit(0)
"""


@pytest.mark.parametrize("script", [TRACED_LATER, TRACED_MEANWHILE], ids=["later", "meanwhile"])
def test_who_is_traced_goes_on_after_a_stall_that_was_taken_back(script: str) -> None:
    """By a debugger, for coverage, or by `check_resumable`: Python 3.11 would look for the lost exception for ever."""
    done = subprocess.run([sys.executable, "-c", script], cwd=REPOSITORY, capture_output=True, text=True, timeout=TRACED_S, check=False)
    assert done.stdout == "came back\n", done.stderr


@pytest.mark.ray
@pytest.mark.parametrize("concurrency", [1, 2], ids=["sync", "threaded"])
def test_actors_that_hang_in_c(run: faultguard.Run, trace: Trace, concurrency: int) -> None:
    """An actor that runs one method is ended; one that may run several is not, and says so."""

    class Server:
        def work(self, trace: Trace, for_s: float) -> int:
            with faultguard.checkpointed("w", stall_timeout=0.5) as ckpt:
                for _ in ckpt.batches(range(3)):
                    trace.note("batch", "w", attempt=ckpt.attempt, batch=ckpt.current_batch)
                    if ckpt.attempt == 1:
                        read, write = os.pipe()
                        threading.Timer(for_s, os.write, (write, b"!")).start()
                        os.read(read, 1)
                return ckpt.attempt

    server = start(Server, max_concurrency=concurrency)
    ref = server.work.remote(trace, LONG_S if concurrency == 1 else STALL_SEEN_S)
    if concurrency == 1:
        with pytest.raises(ray.exceptions.RayActorError):
            ray.get(ref, timeout=WAIT_S)
        assert records(run, "Server.work", "w")[-1].failures[-1].cause == "stall"
    else:  # it comes back to Python, where `StalledError` waits for it
        with pytest.raises(ray.exceptions.RayTaskError, match="has made no progress for"):
            ray.get(ref, timeout=WAIT_S)
        assert ray.get(server.work.remote(trace, LONG_S), timeout=WAIT_S) == 2


@pytest.mark.ray
def test_a_driver_that_hangs_in_c(run: faultguard.Run) -> None:
    """Its process is not ended: `StalledError` waits until it comes back to Python."""
    faultguard.manager()  # or the beater may still be making it when the cluster goes
    read, write = os.pipe()
    told: list[str] = []

    def come_back() -> None:
        wait_until(lambda: "faultguard.stall_stays" in told)
        os.write(write, b"!")

    back = threading.Thread(target=come_back)
    back.start()

    def work() -> None:
        with faultguard.checkpointed("driver", stall_timeout=0.5) as ckpt:
            for _ in ckpt.batches(range(3)):
                os.read(read, 1)

    handler = logging.Handler()
    handler.emit = lambda record: told.append(vars(record).get("event", ""))  # type: ignore[method-assign]
    logging.getLogger("faultguard").addHandler(handler)
    try:
        with pytest.raises(StalledError):
            work()
    finally:
        logging.getLogger("faultguard").removeHandler(handler)
    assert told == ["faultguard.stalled", "faultguard.stall_stays"]
    back.join()
    os.close(read)
    os.close(write)


@pytest.mark.ray
def test_async_actors_are_told_and_go_on(run: faultguard.Run, capfd: pytest.CaptureFixture[str]) -> None:
    """Nothing is raised into an event loop, and its process is not ended: a warning says what stands still."""

    class Server:
        async def work(self) -> tuple[int, list[str]]:
            told: list[str] = []
            handler = logging.Handler()
            handler.emit = lambda record: told.append(vars(record).get("event", ""))  # type: ignore[method-assign]
            logging.getLogger("faultguard").addHandler(handler)
            async with faultguard.checkpointed("w", stall_timeout=0.5) as ckpt:
                for batch in ckpt.batches(range(3)):
                    deadline = time.monotonic() + LONG_S
                    while batch == 1 and "faultguard.stall_stays" not in told and time.monotonic() < deadline:  # noqa: ASYNC110 - another thread tells
                        await asyncio.sleep(0.1)
                return ckpt.current_batch, told

    server = start(Server)
    assert ray.get(server.work.remote(), timeout=WAIT_S) == (3, ["faultguard.stalled", "faultguard.stall_stays"])
