"""Attempts of a worker on a real store, without Ray and without the writer's thread: every write happens where it is due."""

from __future__ import annotations

import math
import time
import uuid
from typing import TYPE_CHECKING, Any

from faultguard import _journal
from faultguard._core import log as rules
from faultguard._core.budget import PLAIN, Policy
from faultguard._core.names import encode_name, record_name
from faultguard._core.records import FailureRecord, Outcome, Owner, Record, decode_record
from faultguard._core.schedule import NOW, Every, Schedule
from faultguard._handle import Checkpoint
from faultguard._journal import Journal
from faultguard._log import StoredLog

if TYPE_CHECKING:
    import random
    from collections.abc import Callable

    import pytest

    from faultguard.storage import Store

RUN, TASK = "run", "task"


class Died(BaseException):
    """The process is gone: nothing more is written."""


class InlineWriter:
    """In the place of the writer's thread: writes what is due at once, on the thread of the loop."""

    def __init__(self) -> None:
        self.clients: list[Journal] = []

    def add(self, journal: Journal) -> None:
        """Serve a journal from now on."""
        self.clients.append(journal)
        self.wake()

    def remove(self, journal: Journal) -> None:
        """Serve it no more."""
        if journal in self.clients:
            self.clients.remove(journal)

    def wake(self) -> None:
        """Something is due: a write, and then what it made superfluous."""
        for journal in list(self.clients):
            if journal.write_due(time.monotonic()) <= time.monotonic():
                journal.write_due(time.monotonic())


def write_inline(monkeypatch: pytest.MonkeyPatch) -> InlineWriter:
    """Let journals write on the thread of the loop, so that a test knows what is durable."""
    writer = InlineWriter()
    monkeypatch.setattr(_journal, "_writer", writer)
    monkeypatch.setattr(_journal, "TIDY_DELAY_S", 0.0)
    return writer


class RandomSchedule(Schedule):
    """Takes and writes snapshots at random: whatever a real schedule does, this one does sooner or later."""

    __slots__ = ("_rng",)

    def __init__(self, rng: random.Random) -> None:
        self._rng = rng
        super().__init__("auto", 0.0)

    def boundary(self, now: float, batches: int = 1) -> bool:
        """Whether to encode a snapshot."""
        self.look_at = NOW
        return self._rng.random() < 0.5

    def encoded(self, now: float, cost_s: float) -> float:
        """When to write it."""
        self.look_at = NOW
        return now if self._rng.random() < 0.5 else math.inf


class Attempt:
    """One attempt: its journal and its handle."""

    def __init__(
        self, log: StoredLog, held: rules.Held, schedule: Schedule, state: dict[str, Any] | None, keep: int, patience_s: float = 60.0
    ) -> None:
        self.journal = Journal(log, held, schedule, keep, patience_s)
        self.ckpt = Checkpoint(
            run=RUN,
            task=TASK,
            worker_id=held.worker_id,
            journal=self.journal,
            snapshot=held.durable,
            schedule=schedule,
            life=held.life,
            attempt=held.attempt,
            token=held.token,
            failures=held.failures,
            quarantined=held.quarantined,
            state=state,
        )

    def complete(self) -> dict[str, Any]:
        """The body has returned; gives the last state."""
        self.journal.end(Outcome("completed"), self.ckpt.finish())
        self.die()
        return self.ckpt.state

    def die(self) -> None:
        """The process is gone; for the sake of the next test, its writer forgets it."""
        self.ckpt.close()
        self.journal.close()

    def fail(self, error: BaseException | None = None) -> None:
        """The body has raised: failure, newest snapshot and the next claim in one record."""
        ckpt = self.ckpt
        self.journal.retry(
            FailureRecord(
                "exception",
                self.journal.held.attempt,
                ckpt.current_batch,
                "raised",
                position=ckpt.position,
                place=ckpt.place,
                pinned=error is not None and ckpt.is_to_blame(error),
            )
        )
        self.die()


class Worker:
    """A worker of one Ray task."""

    def __init__(self, store: Store, worker_id: str = "w0", policy: Policy = PLAIN, patience_s: float = 60.0) -> None:
        self.store = store
        self.policy = policy
        self.patience_s = patience_s
        self.log = StoredLog(store, f"{RUN}/{TASK}/{encode_name(worker_id)}/")
        self.worker_id = worker_id
        self.task_id = uuid.uuid4().hex
        self.ray_attempt = -1

    def attempt(
        self,
        *,
        every: Every = 1,
        state: dict[str, Any] | None = None,
        keep: int = 3,
        schedule: Schedule | None = None,
        volatile: bool = False,
    ) -> Attempt:
        """Ray's next attempt: claims the worker and restores it."""
        self.ray_attempt += 1
        owner = Owner(uuid.uuid4().hex, task_id=self.task_id, ray_attempt=self.ray_attempt)
        claimant = rules.Claimant(owner, TASK, self.worker_id, max_failures=-1, policy=self.policy, volatile=volatile)
        granted = self.log.run(rules.claim(claimant, time.time()))
        assert isinstance(granted, rules.Granted), granted
        return Attempt(self.log, granted.held, schedule or Schedule(every, time.monotonic()), state, keep, self.patience_s)

    def retry(self, failed: Attempt, *, state: dict[str, Any] | None = None, schedule: Schedule | None = None, keep: int = 3) -> Attempt:
        """The attempt after a failure in the same process."""
        return Attempt(self.log, failed.journal.held, schedule or Schedule(1, time.monotonic()), state, keep, self.patience_s)

    def numbers(self) -> list[int]:
        """The numbers of all records."""
        return self.log.run(_listing())

    def record(self, number: int) -> Record:
        """A record, verified."""
        data = self.store.get(f"{self.log.prefix}{record_name(number)}")
        assert data is not None
        record = decode_record(data, number)
        assert record is not None
        return record

    def records(self) -> list[Record]:
        """All records, oldest first."""
        return [self.record(number) for number in self.numbers()]


def _listing() -> Any:
    return (yield rules.List())


def run_to_the_end(
    worker: Worker,
    body: Callable[[Checkpoint, Callable[[], None]], None],
    die_at: set[int],
    *,
    state: dict[str, Any] | None = None,
    rng: random.Random | None = None,
    by_exception: bool = False,
    keep: int = 3,
) -> dict[str, Any]:
    """Run attempts until one completes; the calls of `tick` that are numbered in `die_at`, over all attempts, end theirs.

    Args:
        worker: whose log to use.
        body: what the task does with its handle; calls `tick()` wherever it may die.
        die_at: at which ticks.
        state: to begin with.
        rng: of a schedule that saves at random; None: every boundary is saved.
        by_exception: the attempt ends by an exception that is recorded, not by the death of the process.
        keep: how many saves stay.
    """
    ticks = 0

    def tick() -> None:
        nonlocal ticks
        ticks += 1
        if ticks in die_at:
            raise Died

    def schedule() -> Schedule | None:
        return RandomSchedule(rng) if rng is not None else None

    attempt = worker.attempt(state=state, schedule=schedule(), keep=keep)
    while not _survives(body, attempt.ckpt, tick):
        if by_exception:
            attempt.fail()
            attempt = worker.retry(attempt, state=state, schedule=schedule(), keep=keep)
        else:
            attempt.die()
            attempt = worker.attempt(state=state, schedule=schedule(), keep=keep)
    return attempt.complete()


def _survives(body: Callable[[Checkpoint, Callable[[], None]], None], ckpt: Checkpoint, tick: Callable[[], None]) -> bool:
    try:
        body(ckpt, tick)
    except Died:
        return False
    return True
