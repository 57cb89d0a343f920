"""The journal of an attempt: the newest snapshot gets to the store, whatever the store does, and never over a successor."""

from __future__ import annotations

import math
import subprocess
import sys
import threading
import time
from datetime import timedelta
from pathlib import Path
from typing import IO, TYPE_CHECKING

import pytest

from faultguard import _attempt, _journal, _sidecar
from faultguard._core.records import Ended, FailureRecord, Outcome, Spot
from faultguard.errors import AmbiguousReplyError, CheckpointStoreError, SupersededError, UsageError
from faultguard.storage import Store, open_store
from tests.attempts import Attempt, Worker, write_inline
from tests.tasks import assert_whole, stopped

if TYPE_CHECKING:
    import builtins
    from collections.abc import Callable

REPOSITORY = Path(__file__).parents[1]
BOUND_S = 20.0
THREAD = "faultguard-writer"


@pytest.fixture
def store(tmp_path: Path) -> Store:
    """A store on the local disk."""
    return open_store(str(tmp_path))


@pytest.fixture(autouse=True)
def inline(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is due is written on the thread of the loop, except in the tests of the thread."""
    if "short_park" not in request.fixturenames:
        write_inline(monkeypatch)


class Flaky:
    """A store that fails as it is told to."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self.url = store.url
        self.creates = 0
        self.durable: list[bool] = []  # whether each had to be
        self.broken = False
        self.errors = 0  # so many calls fail
        self.mute = False  # creates take place, and nothing is answered
        self.deletes = True
        self.asked: Callable[[], object] = lambda: None  # told of each create
        self.gate: threading.Event | None = None  # creates wait for it
        self.waiting = threading.Event()

    def create(self, key: str, data: bytes, *, durable: bool = True) -> bool:
        """See `Store.create`."""
        self.creates += 1
        self.asked()
        if self.gate is not None:
            self.waiting.set()
            assert self.gate.wait(BOUND_S)
        self._answer()
        self.durable.append(durable)
        created = self._store.create(key, data, durable=durable)
        if self.mute:
            self.broken = True
            raise AmbiguousReplyError("no answer")
        return created

    def get(self, key: str) -> bytes | None:
        """See `Store.get`."""
        self._answer()
        return self._store.get(key)

    def list(self, prefix: str, start_after: str = "") -> builtins.list[str]:
        """See `Store.list`."""
        self._answer()
        return self._store.list(prefix, start_after)

    def delete(self, key: str) -> None:
        """See `Store.delete`."""
        if not self.deletes:
            raise CheckpointStoreError("deletes are refused")
        self._store.delete(key)

    def _answer(self) -> None:
        self.errors -= 1
        if self.broken or self.errors >= 0:
            raise CheckpointStoreError("the disk is full")


def wait_until(condition: Callable[[], bool]) -> None:
    """Wait for a condition, not for ever."""
    deadline = time.monotonic() + BOUND_S
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.002)


def batch_of(worker: Worker) -> int:
    """Batches done in the newest record that holds a state."""
    return [record.snapshot.batch for record in worker.records() if record.snapshot is not None][-1]


def advance(attempt: Attempt, n: int = 1) -> None:
    """Do batches, each of which is durable."""
    for _ in range(n):
        attempt.ckpt.advance(wait=True)


# --- claims that a power failure can take ---------------------------------------------------------------------------


def test_a_token_is_told_when_it_is_durable(store: Store) -> None:
    """A claim that is not durable is followed by a record that is, and no time of the batch passes meanwhile; later it costs nothing."""
    flaky = Flaky(store)
    attempt = Worker(flaky, patience_s=0.0).attempt(volatile=True)
    ckpt = attempt.ckpt
    assert flaky.durable == [False]
    flaky.broken = True
    for _ in range(2):
        with pytest.raises(CheckpointStoreError, match="the disk is full"):
            _ = ckpt.token
        with pytest.raises(CheckpointStoreError, match="the disk is full"):
            ckpt.idempotency_key()
    flaky.broken, timed = False, []
    ckpt.guard.limit(5.0)
    for _ in ckpt.batches(range(1)):
        assert ckpt.guard.look()[0] is not None
        flaky.asked = lambda: timed.append(ckpt.guard.look()[0])
        assert ckpt.token == ckpt.token == 1
        flaky.asked = lambda: None
    assert set(timed) == {None}
    assert flaky.durable[:2] == [False, True]


def test_a_claim_becomes_durable_beside_the_loop(store: Store) -> None:
    """Whoever works for longer than a moment has a durable record, though nothing is saved yet."""
    flaky = Flaky(store)
    worker = Worker(flaky)
    attempt = worker.attempt(volatile=True, every=1000)
    attempt.journal.settle_soon()
    wait_until(lambda: flaky.durable == [False, True])
    wait_until(lambda: not attempt.journal.held.volatile)
    attempt.journal.settle_soon()
    attempt.journal.settle()
    assert attempt.ckpt.token == 1
    assert flaky.durable == [False, True]
    assert [(record.kind, record.snapshot) for record in worker.records()] == [("claim", None), ("save", None)]


@pytest.mark.parametrize(("before", "ended"), [("nothing", "cancelled"), ("settle", "cancelled"), ("save", None)])
def test_who_is_cut_before_the_work_begins_gives_its_claim_back(store: Store, before: str, ended: str | None) -> None:
    """Also one that is durable by then; not one that has saved something."""
    worker = Worker(store)
    attempt = worker.attempt(volatile=True)
    if before == "settle":
        attempt.journal.settle()
    elif before == "save":
        advance(attempt)
    _attempt._give_back(worker.log, attempt.journal.held.owner, "cancelled")
    note = worker.records()[-1].ended
    assert (note.cause if note is not None else None) == ended


@pytest.mark.usefixtures("short_park")
@pytest.mark.parametrize("trouble", [False, True])
def test_that_a_claim_becomes_durable_is_no_save(store: Store, monkeypatch: pytest.MonkeyPatch, trouble: bool) -> None:
    """When the state is due goes by what the user has asked for, also where the store has failed."""
    monkeypatch.setattr(_journal, "STORE_RETRY_S", 0.05)
    flaky = Flaky(store)
    worker = Worker(flaky)
    attempt = worker.attempt(volatile=True, every=2)
    attempt.ckpt.advance()
    flaky.errors = 2 if trouble else 0
    attempt.journal.settle_soon()
    wait_until(lambda: not attempt.journal.held.volatile)
    time.sleep(0.2)  # several times as long as until the next try
    assert worker.records()[-1].snapshot is None
    attempt.ckpt.advance()
    wait_until(lambda: worker.records()[-1].snapshot is not None)
    assert batch_of(worker) == 2
    attempt.die()


@pytest.mark.usefixtures("short_park")
def test_a_claim_that_no_thread_can_make_durable_waits_for_the_next_one(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """The next save starts the thread; the trouble is over then."""
    worker = Worker(store, patience_s=0.2)
    attempt = worker.attempt(volatile=True, every=timedelta(hours=1))
    wait_until(lambda: not is_running())
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", _no_thread)
        attempt.journal.settle_soon()
    assert attempt.journal.held.volatile
    attempt.ckpt.advance()
    wait_until(lambda: not attempt.journal.held.volatile)
    time.sleep(0.3)  # longer than its patience
    attempt.ckpt.advance()
    assert [(record.kind, record.snapshot) for record in worker.records()] == [("claim", None), ("save", None)]
    attempt.die()


def _no_thread(*_: object) -> None:
    raise RuntimeError("can't start new thread")


def test_the_token_of_an_attempt_that_left_nothing_is_not_told(store: Store) -> None:
    """Its end could not be recorded, so its claim is one that a power failure may take."""
    flaky = Flaky(store)
    attempt = Worker(flaky, patience_s=0.0).attempt(volatile=True)
    flaky.broken = True
    with pytest.raises(CheckpointStoreError):
        attempt.journal.end(Outcome("completed"), None)
    flaky.broken = False
    attempt.journal.close()
    with pytest.raises(UsageError, match="the attempt is over"):
        _ = attempt.ckpt.token


def test_a_loop_that_is_superseded_is_told_so_when_it_asks_for_its_token(store: Store) -> None:
    """Somebody has claimed the worker before its own claim was durable: its token is nobody's fence any more."""
    worker = Worker(store)
    attempt = worker.attempt(volatile=True)
    assert worker.attempt().ckpt.token == 2
    with pytest.raises(SupersededError):
        _ = attempt.ckpt.token


def test_the_end_of_a_short_task_makes_its_claim_superfluous(store: Store) -> None:
    """Two records, of which one had to be durable."""
    flaky = Flaky(store)
    worker = Worker(flaky)
    attempt = worker.attempt(volatile=True)
    attempt.journal.end(Outcome("completed"), None)
    assert flaky.durable == [False, True]
    assert [record.kind for record in worker.records()] == ["claim", "end"]
    attempt.journal.settle_soon()
    attempt.journal.settle()
    assert flaky.durable == [False, True]


# --- retention ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("keep", [2, 3, 7])
def test_retention_keeps_the_newest(store: Store, keep: int) -> None:
    """Of the saves the newest `keep` stay, of the claims all."""
    worker = Worker(store)
    advance(worker.attempt(keep=keep), 10)
    advance(worker.attempt(keep=keep), 1)
    advance(worker.attempt(keep=keep), 1)
    kinds = [record.kind for record in worker.records()]
    assert kinds.count("save") == keep
    assert kinds.count("claim") == 3
    assert batch_of(worker) == 12


def test_retention_counts_a_state_in_a_claim(store: Store) -> None:
    """A retry's claim with a state is as good as a save, and never deleted."""
    worker = Worker(store)
    attempt = worker.attempt(keep=2)
    for _ in range(4):
        advance(attempt, 3)
        attempt.fail()
        attempt = worker.retry(attempt, keep=2)
    advance(attempt)
    assert [record.kind for record in worker.records()] == ["claim"] * 5 + ["save"]
    assert batch_of(worker) == 13


def test_a_delete_that_fails_costs_nothing(store: Store, caplog: pytest.LogCaptureFixture) -> None:
    """The save is durable; a warning says what could not be deleted, and the next save deletes it."""
    flaky = Flaky(store)
    worker = Worker(flaky)
    attempt = worker.attempt(keep=2)
    advance(attempt, 2)
    flaky.deletes = False
    advance(attempt, 2)
    warning = caplog.records[0]
    assert "old checkpoints of 'task/w0' could not be deleted: deletes are refused" in warning.getMessage()
    assert_whole(warning)
    assert batch_of(worker) == 4
    flaky.deletes = True
    advance(attempt)
    assert [record.kind for record in worker.records()] == ["claim", "save", "save"]


# --- a store that fails ---------------------------------------------------------------------------------------------


def test_a_store_that_fails_for_a_while_is_lived_through(store: Store, caplog: pytest.LogCaptureFixture) -> None:
    """One warning, the loop goes on, and when the store is back the newest snapshot is saved."""
    flaky = Flaky(store)
    worker = Worker(flaky)
    attempt = worker.attempt()
    batches = attempt.ckpt.batches(range(100))
    next(batches)
    next(batches)
    flaky.broken = True
    for _ in range(20):
        next(batches)
    attempt.journal.write_due(time.monotonic() + 10)
    assert len(caplog.records) == 1
    assert caplog.records[0].event == "faultguard.store_failed"  # type: ignore[attr-defined] # a field
    assert "'task/w0' cannot save: the disk is full. It tries again, and gives up after 60 s." in caplog.text
    flaky.broken = False
    assert attempt.ckpt.durable_batch == 1
    attempt.journal.write_due(time.monotonic() + 20)
    assert attempt.ckpt.durable_batch == 21
    next(batches)
    assert attempt.ckpt.durable_batch == 22
    assert len(caplog.records) == 1


def test_a_store_that_fails_is_not_asked_at_every_boundary(store: Store) -> None:
    """A failed write is tried again after a second, not with every batch."""
    flaky = Flaky(store)
    attempt = Worker(flaky).attempt()
    flaky.broken = True
    before = flaky.creates
    for _ in attempt.ckpt.batches(range(50)):
        pass
    assert flaky.creates == before + 1


def test_patience_with_a_store_ends(store: Store) -> None:
    """A loop whose checkpoints cannot be saved for too long is told at its next boundary (G7)."""
    flaky = Flaky(store)
    attempt = Worker(flaky).attempt()
    batches = attempt.ckpt.batches(range(100))
    next(batches)
    flaky.broken = True
    next(batches)
    next(batches)
    attempt.journal._patience_s = -1.0
    with pytest.raises(CheckpointStoreError, match="the disk is full"):
        next(batches)


def test_an_unanswered_save_is_no_successor(store: Store) -> None:
    """A record of one's own whose create got no answer is taken over later, and is not mistaken for somebody else's (G6)."""
    flaky = Flaky(store)
    worker = Worker(flaky, patience_s=0.0)
    attempt = worker.attempt()
    advance(attempt)
    flaky.mute = True
    with pytest.raises(CheckpointStoreError):
        advance(attempt)
    flaky.mute = flaky.broken = False
    attempt.ckpt.check()
    advance(attempt)
    assert attempt.ckpt.durable_batch == batch_of(worker) == 3
    worker.attempt()
    with pytest.raises(SupersededError):
        attempt.ckpt.check()


@pytest.mark.parametrize(
    ("kind", "last"),
    [("retry", ["claim"]), ("end", ["end"]), ("leave", ["save"]), ("pin", ["save"]), ("wait", ["save"]), ("check", [])],
)
def test_a_record_that_the_worker_needs_is_insisted_on(
    store: Store, kind: str, last: list[str], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A store that fails for a moment, just when an attempt ends or waits for it, does not cost the work of hours; it is told once."""
    monkeypatch.setattr(_journal, "STORE_RETRY_S", 0.0)
    flaky = Flaky(store)
    worker = Worker(flaky)
    attempt = worker.attempt()
    advance(attempt, 2)
    flaky.errors = 5
    writes: dict[str, Callable[[], object]] = {
        "retry": attempt.fail,
        "end": attempt.complete,
        "leave": lambda: attempt.journal.leave(Ended("exception", charged=True), FailureRecord("exception", 1, 2), 60.0),
        "pin": lambda: attempt.journal.pin(attempt.ckpt._snapshot()[0], (Spot("batches", 0, 2),)),
        "wait": lambda: attempt.ckpt.save(wait=True),
        "check": attempt.ckpt.check,
    }
    writes[kind]()
    assert [record.kind for record in worker.records()] == ["claim", "save", "save", *last]
    assert batch_of(worker) == 2
    assert [record.event for record in caplog.records] == ["faultguard.store_failed"]  # type: ignore[attr-defined] # a field


def test_a_process_that_leaves_does_not_insist(store: Store) -> None:
    """Whoever is told to leave has no time: the store is asked once."""
    flaky = Flaky(store)
    attempt = Worker(flaky).attempt()
    flaky.broken = True
    with pytest.raises(CheckpointStoreError):
        attempt.journal.leave(Ended("terminated", charged=False))


def test_an_unanswered_end_is_the_end(store: Store) -> None:
    """An outcome whose create got no answer can be recorded again; it stands in the log once."""
    flaky = Flaky(store)
    worker = Worker(flaky, patience_s=0.0)
    attempt = worker.attempt()
    advance(attempt)
    snapshot = attempt.ckpt.finish()
    flaky.mute = True
    with pytest.raises(CheckpointStoreError):
        attempt.journal.end(Outcome("completed"), snapshot)
    flaky.mute = flaky.broken = False
    attempt.journal.end(Outcome("completed"), snapshot)
    assert [record.kind for record in worker.records()] == ["claim", "save", "end"]


# --- superseded -----------------------------------------------------------------------------------------------------


def test_a_successor_fences_every_kind_of_record(store: Store) -> None:
    """After a later claim nothing of an earlier attempt gets into the log: no save, no retry, no leave, no end (G3)."""
    writes: list[Callable[[Attempt], None]] = [
        advance,
        lambda attempt: attempt.journal.retry(FailureRecord("exception", 1, 0)),
        lambda attempt: attempt.journal.leave(Ended("terminated", charged=False)),
        lambda attempt: attempt.journal.end(Outcome("completed"), None),
    ]
    for number, write in enumerate(writes):
        worker = Worker(store, f"w{number}")
        old = worker.attempt()
        advance(old, 2)
        worker.attempt()
        with pytest.raises(SupersededError) as caught:
            write(old)
        assert (caught.value.worker_id, caught.value.token) == (f"w{number}", 1)
        assert [record.kind for record in worker.records()] == ["claim", "save", "save", "claim"]


def test_four_incarnations_never_go_back(store: Store) -> None:
    """Old attempts that thaw one after another change nothing of what the newest loads (G2, G3)."""
    worker = Worker(store)
    first = worker.attempt()
    second = worker.attempt()
    with pytest.raises(SupersededError):
        advance(first)
    advance(third := worker.attempt(), 5)
    with pytest.raises(SupersededError):
        advance(second)
    fourth = worker.attempt(keep=2)
    with pytest.raises(SupersededError):
        advance(third)
    assert fourth.ckpt.current_batch == 5
    advance(fourth, 5)
    for old in (first, second, third):
        with pytest.raises(SupersededError):
            advance(old)
    assert worker.attempt().ckpt.current_batch == 10


CHILD = """
import sys
from faultguard.errors import SupersededError
from faultguard.storage import open_store
from tests.attempts import Worker

store = open_store(sys.argv[1], create=False)
attempts = {}
for name in sys.argv[2:]:
    worker = Worker(store, name)
    worker.task_id = "the task"
    attempts[name] = worker.attempt()
    attempts[name].ckpt.advance(2, wait=True)
print("ready", flush=True)
for line in sys.stdin:
    try:
        attempts[line.strip()].ckpt.advance(wait=True)
    except SupersededError as error:
        print(f"{type(error).__name__} {error.worker_id}", flush=True)
    else:
        print("durable", flush=True)
"""


def successor_of_the_child(store: Store, name: str) -> Attempt:
    """Ray's next attempt of the task whose first one is in the other process."""
    worker = Worker(store, name)
    worker.task_id = "the task"
    worker.ray_attempt = 0
    return worker.attempt(keep=2)


def test_a_frozen_process_that_thaws_is_superseded(store: Store, tmp_path: Path) -> None:
    """Two processes hold one worker: the next save of the old one raises, before its successor has saved, after, and after retention."""
    names = ["before", "after", "after retention", "alone"]
    with subprocess.Popen(
        [sys.executable, "-c", CHILD, str(tmp_path), *names], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=REPOSITORY
    ) as child:
        assert child.stdin is not None
        assert child.stdout is not None
        assert child.stdout.readline() == "ready\n"
        with stopped(child.pid):
            successors = {name: successor_of_the_child(store, name) for name in names[:3]}
            advance(successors["after"])
            advance(successors["after retention"], 10)
        answers = [ask(child.stdin, child.stdout, name) for name in names]
        child.stdin.close()
        assert child.wait(BOUND_S) == 0
    assert answers == [*(f"SupersededError {name}\n" for name in names[:3]), "durable\n"]
    assert [batch_of(Worker(store, name)) for name in names] == [2, 3, 12, 3]


def ask(stdin: IO[str], stdout: IO[str], name: str) -> str:
    """Let the child save."""
    stdin.write(name + "\n")
    stdin.flush()
    return stdout.readline()


# --- the thread -----------------------------------------------------------------------------------------------------


def is_running() -> bool:
    """Whether this process has a writer thread."""
    return any(thread.name == THREAD for thread in threading.enumerate())


@pytest.fixture
def short_park(monkeypatch: pytest.MonkeyPatch) -> None:
    """Park for a moment only."""
    monkeypatch.setattr(_sidecar, "PARK_S", 0.05)


@pytest.mark.usefixtures("short_park")
def test_the_thread_writes_beside_the_loop_and_goes(store: Store) -> None:
    """What is offered gets to the store without the loop, on a thread that is gone when the last worker is."""
    worker = Worker(store)
    attempt = worker.attempt()
    for _ in attempt.ckpt.batches(range(5)):
        pass
    wait_until(lambda: attempt.ckpt.durable_batch == 5)
    assert is_running()
    attempt.complete()
    wait_until(lambda: not is_running())
    assert worker.records()[-1].kind == "end"


class Yields:
    """A lock that the thread of the loop gets when the writer thread has deleted what was superfluous."""

    def __init__(self, journal: _journal.Journal) -> None:
        self._journal, self._lock, self._loop = journal, threading.Lock(), threading.current_thread()

    def __enter__(self) -> None:
        if threading.current_thread() is self._loop:
            wait_until(lambda: self._journal._tidy_at == math.inf)
        self._lock.acquire()

    def __exit__(self, *_: object) -> None:
        self._lock.release()


@pytest.mark.usefixtures("short_park")
def test_what_a_save_makes_superfluous_goes_without_another_one(store: Store) -> None:
    """Also where the thread has just deleted what the save before had made superfluous."""
    worker = Worker(store)
    attempt = worker.attempt(keep=2)
    advance(attempt, 3)
    attempt.journal._lock = Yields(attempt.journal)  # type: ignore[assignment]
    advance(attempt)
    wait_until(lambda: len(worker.numbers()) == 3)
    assert [record.kind for record in worker.records()] == ["claim", "save", "save"]
    assert batch_of(worker) == 4
    attempt.die()
    wait_until(lambda: not is_running())


@pytest.mark.usefixtures("short_park")
def test_no_save_comes_after_the_end(store: Store) -> None:
    """An outcome waits for the save that is under way, and excludes the one that is pending behind it."""
    flaky = Flaky(store)
    worker = Worker(flaky)
    attempt = worker.attempt()
    flaky.gate = threading.Event()
    batches = attempt.ckpt.batches(range(9))
    next(batches)
    next(batches)
    assert flaky.waiting.wait(BOUND_S)
    next(batches)  # offers a snapshot behind the one that is being written
    ending = threading.Thread(target=lambda: attempt.journal.end(Outcome("completed"), attempt.ckpt.finish()))
    ending.start()
    flaky.gate.set()
    ending.join(BOUND_S)
    attempt.journal.write_due(math.inf)
    attempt.die()
    wait_until(lambda: not is_running())
    records = worker.records()
    assert records[-1].kind == "end"
    assert [record.kind for record in records].count("end") == 1


@pytest.mark.usefixtures("short_park")
def test_the_loop_hears_at_its_next_boundary_what_the_thread_has_learned(store: Store) -> None:
    """A successor that only the writer has met stops the loop at a boundary, without a call of the user."""
    worker = Worker(store)
    attempt = worker.attempt()
    batches = attempt.ckpt.batches(range(10**6))
    next(batches)
    worker.attempt()
    next(batches)
    wait_until(lambda: attempt.journal.superseded)
    with pytest.raises(SupersededError):
        next(batches)
    attempt.die()
    wait_until(lambda: not is_running())


@pytest.mark.usefixtures("short_park")
def test_a_suspicion_is_looked_into_beside_the_loop(store: Store) -> None:
    """A word of the manager supersedes nobody; the log does, also where nothing is due, and after the store was away."""
    flaky = Flaky(store)
    worker = Worker(flaky)
    attempt = worker.attempt(every=10**6)
    batches = attempt.ckpt.batches(range(10**6))
    next(batches)
    attempt.journal.suspect()
    wait_until(lambda: not attempt.journal._suspected)
    next(batches)
    worker.attempt()
    flaky.errors = 1
    attempt.journal.suspect()
    wait_until(lambda: attempt.journal.superseded)
    with pytest.raises(SupersededError):
        next(batches)
    attempt.die()
    attempt.journal.suspect()
    attempt.journal.excuse(Ended("drained", charged=False))
    wait_until(lambda: not is_running())


def test_an_attempt_on_a_drained_node_is_excused_once_it_has_saved(store: Store) -> None:
    """Not before, or it could be started for ever; then with every save, so that its death at any moment costs nothing."""
    worker = Worker(store)
    attempt = worker.attempt()
    attempt.journal.excuse(Ended("drained", charged=False))
    assert [record.kind for record in worker.records()] == ["claim"]
    advance(attempt, 2)
    saves = worker.records()[1:]
    assert [record.ended for record in saves] == [Ended("drained", charged=False)] * len(saves)
    attempt.die()
    second = worker.attempt()
    assert second.journal.held.charged == 0
    second.journal.excuse(Ended("drained", charged=False))
    second.die()
    assert worker.attempt().journal.held.charged == 1


def test_what_is_durable_is_excused_by_one_more_record(store: Store) -> None:
    """The save was there before the news: it is repeated with the note, once."""
    worker = Worker(store)
    attempt = worker.attempt()
    advance(attempt)
    before = len(worker.numbers())
    for _ in range(3):
        attempt.journal.excuse(Ended("drained", charged=False))
    assert len(worker.numbers()) == before + 1
    assert worker.records()[-1].ended == Ended("drained", charged=False)
    attempt.die()
    assert worker.attempt().journal.held.charged == 0


@pytest.mark.usefixtures("short_park")
def test_an_error_of_one_journal_is_told_and_stops_no_other(
    store: Store, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Whatever the writer meets with one worker, it says so, and goes on with the others and with this one."""
    odd, sound = Worker(store, "odd").attempt(), Worker(store, "sound").attempt()
    write_newest, errors = odd.journal._write_newest, [RuntimeError("odd")]
    monkeypatch.setattr(odd.journal, "_write_newest", lambda: (_ for _ in ()).throw(errors.pop()) if errors else write_newest())
    odd.ckpt.advance()
    sound.ckpt.advance()
    wait_until(lambda: sound.ckpt.durable_batch == 1 and len(caplog.records) == 1)
    assert "thread faultguard-writer goes on after an error of its own: RuntimeError('odd')" in caplog.text
    odd.ckpt.advance()
    wait_until(lambda: odd.ckpt.durable_batch == 2)
    odd.die()
    sound.die()
    wait_until(lambda: not is_running())


@pytest.mark.usefixtures("short_park")
def test_a_thread_that_cannot_start_is_another_try(store: Store, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """A process at its limit of threads goes on with its work, says so once, and saves as soon as it may start one."""
    attempt = Worker(store).attempt()

    def refuse(_: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as limited:
        limited.setattr(threading.Thread, "start", refuse)
        attempt.ckpt.advance(2)
        attempt.ckpt.advance(3)
    (warning,) = caplog.records
    assert "'task/w0' cannot save: its writer thread could not start: can't start new thread" in warning.getMessage()
    assert_whole(warning)
    assert attempt.ckpt.durable_batch == 0
    attempt.ckpt.advance()
    wait_until(lambda: attempt.ckpt.durable_batch == 6)
    attempt.die()
    wait_until(lambda: not is_running())


@pytest.mark.usefixtures("short_park")
def test_the_thread_serves_the_others_when_one_store_fails(store: Store, caplog: pytest.LogCaptureFixture) -> None:
    """One worker's broken store keeps no other worker from being saved."""
    flaky = Flaky(store)
    broken, sound = Worker(flaky, "broken").attempt(), Worker(store, "sound").attempt()
    flaky.broken = True
    broken.ckpt.advance()
    sound.ckpt.advance()
    wait_until(lambda: sound.ckpt.durable_batch == 1 and len(caplog.records) == 1)
    assert "'task/broken' cannot save" in caplog.text
    broken.die()
    sound.die()
    wait_until(lambda: not is_running())


def test_patience_counts_from_the_first_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that was frozen while it asked has not been refused for so long."""
    clock = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(time, "sleep", lambda seconds: clock.__setitem__(0, clock[0] + seconds))
    asked: list[float] = []
    told: list[CheckpointStoreError] = []

    def ask() -> str:
        asked.append(clock[0])
        if len(asked) == 1:
            clock[0] += 1000.0  # frozen
        if len(asked) < 4:
            raise CheckpointStoreError("away")
        return "there"

    assert _journal.insist(ask, 10.0, told.append) == "there"
    assert len(told) == 3
    asked[:] = []
    with pytest.raises(CheckpointStoreError):
        _journal.insist(ask, 1.0, told.append)
