"""The newest snapshot of a worker and its way to the store: beside the user's thread, or on it where that must wait.

One writer thread serves all workers of the process. It never beats, and the beater never writes: a store that hangs must not
make a worker look dead.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from dataclasses import replace
from typing import TYPE_CHECKING, Any, TypeVar

from faultguard import _events
from faultguard._core import log as rules
from faultguard._core.budget import must_pin
from faultguard._core.records import Ended
from faultguard._core.schedule import NOW, snapshot_to_flush
from faultguard._sidecar import Sidecar
from faultguard.errors import CheckpointStoreError, OtherStoreError, SupersededError, UsageError

if TYPE_CHECKING:
    from collections.abc import Callable

    from faultguard._core.records import FailureRecord, Outcome, Place, Snapshot
    from faultguard._core.schedule import Schedule
    from faultguard._log import StoredLog

__all__ = ["Journal", "insist"]

T = TypeVar("T")
STORE_RETRY_S = 1.0
TIDY_DELAY_S = 0.1  # deleting beside the loop disturbs its next save: seldom, and several at once


def insist(ask: Callable[[], T], patience_s: float, trouble: Callable[[CheckpointStoreError], None]) -> T:
    """Ask the store for what cannot be done without, until it answers: one that fails for a moment must not end the work.

    Args:
        ask: fails with `CheckpointStoreError`, and may be tried again.
        patience_s: for how long from its first error on; then the error is raised.
        trouble: is told each time.
    """
    since: float | None = None  # not since it was asked: this process may have been frozen in between
    while True:
        try:
            return ask()
        except OtherStoreError:
            raise
        except CheckpointStoreError as error:
            since = since if since is not None else time.monotonic()
            if time.monotonic() - since >= patience_s:
                raise
            trouble(error)
        time.sleep(STORE_RETRY_S)


class Journal:
    """What one attempt writes about its worker.

    Args:
        log: the worker's log.
        held: what the claim was granted.
        schedule: told of every write and its cost.
        keep: how many saves stay in the log, at least 2.
        patience_s: how long the store may fail before the loop is told; nothing durable is lost meanwhile.
    """

    def __init__(self, log: StoredLog, held: rules.Held, schedule: Schedule, keep: int, patience_s: float = 60.0) -> None:
        self.log = log
        self.held = held
        self.superseded: bool = False
        self._suspected = False  # somebody says that a later attempt lives: the log is to be asked
        self._began_with = held.durable
        self._excuse: Ended | None = None  # what the saves say of the end that is near
        self._excused = False
        self._schedule = schedule
        self.keep = keep
        self._patience_s = patience_s
        self._lock = threading.Lock()  # one write in flight
        self._newest: Snapshot | None = None  # taken by this attempt or an earlier one of this process
        self._begins: Place = ()  # the batch that began right after `_newest`, where that is recorded
        self._due = math.inf
        self._settles_at = math.inf  # when to make the claim durable
        self._failing_since: float | None = None
        self._error: CheckpointStoreError | None = None
        self._tidy_at = math.inf  # when to delete what the saves have made superfluous
        self.beside_s: float = 0.0  # processor time of the writer thread for this worker since the last save: waking up, deleting
        self._served = False
        self._over = False
        self._closed = False  # the last record of this attempt is written: whatever is pending must not come after it
        self.fields: Callable[[], dict[str, Any]] = self._fields  # what every event says

    def reopened(self, schedule: Schedule, keep: int) -> Journal:
        """For the next attempt of this process, after `retry`. What this one still deletes, and the next one writes, is one log."""
        journal = Journal(self.log, self.held, schedule, keep, self._patience_s)
        journal._lock = self._lock
        return journal

    def offer(self, snapshot: Snapshot, due: float) -> None:
        """Take a snapshot, to be written at `due` (monotonic seconds) unless a newer one comes; the newest always counts."""
        self._begins = ()  # first: a batch that is over must never be recorded with a later snapshot
        self._newest = snapshot
        if self.superseded:
            self._schedule.look_at = NOW  # the schedule may just have looked the other way
        elif due < self._due and (self._failing_since is None or self._due > time.monotonic() + STORE_RETRY_S):  # else it is soon enough
            self._due = due
            self._call_writer()

    def write(self, snapshot: Snapshot) -> None:
        """Write a snapshot now, on this thread; durable on return. What that makes superfluous goes beside it.

        Raises:
            SupersededError: a later attempt owns the worker.
            CheckpointStoreError: the store has failed for too long.
        """
        self._write_here(snapshot, ())

    def pin(self, snapshot: Snapshot, begins: Place) -> None:
        """Write a snapshot, and which batch begins right after it; durable on return.

        Raises:
            SupersededError: a later attempt owns the worker.
            CheckpointStoreError: the store has failed for too long.
        """
        self._write_here(snapshot, begins)

    def skip_poison(self, skip: bool) -> None:  # noqa: FBT001 - what the block says
        """Whether a batch that fails three times in a row is quarantined, from now on."""
        self.held.policy = replace(self.held.policy, skip_poison=skip)

    def unpin(self) -> None:
        """The batch that is recorded as begun is over, and no snapshot follows: the writer thread says so."""
        self._begins = ()
        self._due = NOW
        self._call_writer()

    def _write_here(self, snapshot: Snapshot, begins: Place) -> None:
        calls = False

        def write() -> None:
            nonlocal calls
            self._newest, self._begins = snapshot, begins  # under the lock: the writer thread must not see one without the other
            calls = self._tidy_at == math.inf  # else it comes by itself
            self._write_newest()

        self._insist(write)
        if calls and self._tidy_at < math.inf:
            self._call_writer()
        self.raise_if_superseded()

    def suspect(self) -> None:
        """Somebody says that a later attempt lives. Only the log knows: the writer thread looks, and the next boundary raises."""
        if not self.superseded:
            self._suspected = True
            self._due = NOW
            self._call_writer()

    @property
    def is_volatile(self) -> bool:
        """Whether a power failure may take the claim, and with it all that belongs to it."""
        return self.held.volatile

    def settle(self) -> None:
        """The claim is to outlive a power failure, whose token somebody is told: durable on return.

        Raises:
            SupersededError: a later attempt owns the worker.
            CheckpointStoreError: the store has failed for too long.
            UsageError: the attempt is over, and has left no record of its own.
        """
        self._insist(self._settle)
        self.raise_if_superseded()
        if self.held.volatile:
            raise UsageError(f"the handle of worker {self.held.worker_id!r} attempt {self.held.attempt} is refused: the attempt is over")

    def settle_soon(self) -> None:
        """The same on the writer thread; from any thread."""
        if self.held.volatile:
            self._settles_at = NOW
            self._call_writer()

    def _settle(self) -> None:
        """Under the lock. Any record will do; when the state is saved is not asked here."""
        if self.held.volatile and not (self.superseded or self._closed or self._over):
            self._outcome_of(self._save(None))

    def excuse(self, ended: Ended) -> None:
        """The end is near, and not the fault of this attempt: every save says so from now on, and the newest is written at once.

        One that has saved nothing yet is not excused, or it could be ended so for ever.
        """
        if self._excuse is None:
            self._excuse = ended
            self._due = NOW
            self._call_writer()

    def write_due(self, now: float) -> float:
        """On the writer thread: write the newest snapshot if it is due, delete what is superfluous. Returns when to come again."""
        if now >= min(self._due, self._settles_at):
            with self._lock:
                writes, self._settles_at = now >= self._due, math.inf
                if writes:
                    self._due = math.inf
                try:
                    if self._suspected:
                        self._look()
                    if writes:
                        self._write_newest()
                    self._settle()
                except CheckpointStoreError as error:
                    if writes:
                        self._due = now + STORE_RETRY_S
                    self._settles_at = now + STORE_RETRY_S
                    self._trouble(error, now)
                else:
                    self._failing_since = self._error = None
        if now >= self._tidy_at:
            self._tidy()
        return min(self._due, self._settles_at, self._tidy_at)

    def raise_trouble(self) -> None:
        """At a boundary: tell the loop what the writer learned.

        Raises:
            SupersededError: a later attempt owns the worker.
            CheckpointStoreError: the store has failed for too long.
        """
        self.raise_if_superseded()
        since, error = self._failing_since, self._error  # the writer may clear them at any moment
        if since is not None and error is not None and time.monotonic() - since > self._patience_s:
            raise error

    def raise_if_superseded(self) -> None:
        """Raise `SupersededError` if a later attempt was seen in the log."""
        if self.superseded:
            self._schedule.look_at = NOW  # should the body swallow it, the next boundary raises it again
            raise superseded(self.held.worker_id, self.held.attempt, self.held.token)

    def look(self) -> None:
        """Look into the log whether somebody is above; raise `SupersededError` then."""
        self._insist(self._look)
        self.raise_if_superseded()

    def _look(self) -> None:
        """Under the lock."""
        if not self.superseded and not self._closed:
            self._outcome_of(not self.log.run(rules.superseded(self.held)))
        self._suspected = False

    def retry(self, failure: FailureRecord) -> None:
        """Record a failure, the newest snapshot and the claim of the next attempt, at once."""
        snapshot = self.newest
        self._insist(lambda: self._last(self.log.run(rules.retry_record(self.held, snapshot, failure, time.time()))))
        self.raise_if_superseded()

    def leave(self, ended: Ended, failure: FailureRecord | None = None, patience_s: float = 0.0) -> None:
        """Note in the log, with the newest snapshot, that the attempt leaves, and why; a store that fails is waited for that long."""

        def note() -> None:
            if not self._closed:  # else it was cut between its last record and its end: there is nothing left to say
                self._last(self._save(self.newest, ended=ended, failure=failure))
                self.raise_if_superseded()

        self._insist(note, patience_s)

    def end(self, outcome: Outcome, snapshot: Snapshot | None, failure: FailureRecord | None = None) -> None:
        """Record the outcome, with the state that belongs to it."""
        ended = Ended(failure.cause, charged=True) if failure is not None else None
        self._insist(lambda: self._last(self._save(snapshot, ended=ended, failure=failure, outcome=outcome)))
        self.raise_if_superseded()

    def _save(self, snapshot: Snapshot | None, **what: Any) -> bool:
        saved: bool = self.log.run(rules.save(self.held, snapshot, time.time(), **what))
        return saved

    def _insist(self, ask: Callable[[], None], patience_s: float | None = None) -> None:
        """Do, on the thread of the loop, what that cannot do without. Under the lock: a retry that the writer settles would count twice."""
        with self._lock:
            try:
                insist(ask, self._patience_s if patience_s is None else patience_s, lambda error: self._trouble(error, time.monotonic()))
            finally:  # whatever came of it, the next trouble is a new one
                self._failing_since = self._error = None

    def close(self) -> None:
        """Let the writer thread go; after `leave`, `end` or `retry` nothing is pending. What it has not deleted, a later attempt does."""
        self._over, self._due = True, math.inf
        if self._served:
            self._served = False
            _writer.remove(self)

    @property
    def durable(self) -> Snapshot | None:
        """The newest snapshot that is durable."""
        return self.held.durable

    def must_pin(self) -> bool:
        """Whether each batch is to be recorded before it begins."""
        return self.held.policy.skip_poison and must_pin(self.held.predecessor, self.held.failures)

    @property
    def newest(self) -> Snapshot | None:
        """The newest snapshot, durable or not."""
        return snapshot_to_flush(self._newest, self.held.durable)

    def _write_newest(self) -> None:
        """Under the lock."""
        snapshot, begins = self.newest, self._begins
        excuse = self._excuse if snapshot is not self._began_with else None
        if snapshot is None or self.superseded or self._closed:
            return
        if snapshot is self.held.durable and begins == self.held.begins and (excuse is None or self._excused):
            return
        started = time.thread_time()
        self._schedule.begins(time.monotonic())
        self._outcome_of(self._save(snapshot, ended=excuse, begins=begins))
        self._excused = excuse is not None
        now = time.monotonic()
        if not self.superseded:
            self._tidy_at = min(self._tidy_at, now + TIDY_DELAY_S)
        self._schedule.written(now, time.thread_time() - started + self.beside_s)
        self.beside_s = 0.0

    def _last(self, saved: bool) -> None:  # noqa: FBT001 - the answer of the rules
        """Under the lock: that was the last record of this attempt."""
        self._closed = True
        self._outcome_of(saved)

    def _outcome_of(self, saved: bool) -> None:  # noqa: FBT001 - the answer of the rules
        if not saved:
            self.superseded = True
            self._schedule.look_at = NOW

    def _call_writer(self) -> None:
        """From the thread of the loop, and from the beater's."""
        if self._over:
            return
        try:
            if self._served:
                _writer.wake()
            else:
                self._served = True
                _writer.add(self)
                if self._over:  # closed meanwhile
                    _writer.remove(self)
        except RuntimeError as error:  # no thread can be started now: the next snapshot is another try
            self._due = self._tidy_at = math.inf  # a claim that is to be made durable stays so
            self._trouble(CheckpointStoreError(f"its writer thread could not start: {error}"), time.monotonic())

    def _tidy(self) -> None:
        """Delete what is superfluous. The deletes need no lock: a save on the thread of the loop need not wait for them."""
        started = time.thread_time()
        try:
            with self._lock:
                self._tidy_at = math.inf
                numbers = self.log.run(rules.retention(self.held, self.keep))
            self.log.run(rules.discard(self.held, numbers))
            self.beside_s += time.thread_time() - started
        except CheckpointStoreError as error:  # the save is durable; what could not be deleted is tried again after the next one
            text = f"old checkpoints of '{self.held.task}/{self.held.worker_id}' could not be deleted: {error}"
            _events.emit(logging.WARNING, "faultguard.retention_failed", text, **self.fields(), error=str(error))

    def _trouble(self, error: CheckpointStoreError, now: float) -> None:
        self._error = error
        self._schedule.look_at = NOW
        if self._failing_since is None:
            self._failing_since = now
            _events.emit(
                logging.WARNING,
                "faultguard.store_failed",
                f"'{self.held.task}/{self.held.worker_id}' cannot save: {str(error).rstrip('.')}. It tries again, and gives up after "
                f"{self._patience_s:g} s.",
                **self.fields(),
                error=str(error),
            )

    def _fields(self) -> dict[str, Any]:
        held = self.held
        return {"task": held.task, "worker_id": held.worker_id, "attempt": held.attempt, "token": held.token}


def superseded(worker_id: str, attempt: int, token: int) -> SupersededError:
    """The error for an attempt that has a successor."""
    msg = (
        f"worker {worker_id!r} attempt {attempt} (token {token}) was replaced by a later attempt; its writes are ignored. "
        f"Stop this loop; nothing is lost"
    )
    return SupersededError(msg, worker_id=worker_id, attempt=attempt, token=token)


def _work(journals: list[Journal]) -> float:
    """What is due for all; the trouble of one is not that of the others."""
    now, due = time.monotonic(), math.inf
    began = time.thread_time()
    woken_s = (began - getattr(_idle, "since", began)) / len(journals)
    for journal in journals:
        journal.beside_s += woken_s
        try:
            due = min(due, journal.write_due(now))
        except Exception as error:  # noqa: BLE001 - whatever it is, the next snapshot is another try
            _events.report(_THREAD, error)
    _idle.since = time.thread_time()
    return due


_THREAD = "faultguard-writer"
_idle = threading.local()  # per writer thread: its processor time when it last had nothing to do
_writer: Sidecar[Journal] = Sidecar(_THREAD, _work, _events.report)
