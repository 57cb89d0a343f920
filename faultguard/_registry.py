"""The workers that register with a manager by themselves: each has a log like every other worker, written by the manager.

The logs are the truth. What is kept in memory is what beats need, so that a store that is slow or away never stops one.
"""

from __future__ import annotations

import logging
import math
import threading
import time
import uuid
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import msgspec

from faultguard import _codec, _events
from faultguard._core import log as rules
from faultguard._core.names import check_worker_id, encode_name
from faultguard._core.records import Ended, FailureRecord, Outcome, Owner, Record, Snapshot
from faultguard._log import StoredLog
from faultguard._settings import checked_store
from faultguard._views import StoredWorker, WorkerState, stored_workers
from faultguard._watch import AwakeClock
from faultguard.errors import (
    CheckpointCorruptError,
    CheckpointStoreError,
    MaxFailuresExceeded,
    SupersededError,
    UsageError,
    max_failures_exceeded,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Iterator, Mapping

    from faultguard._settings import Settings
    from faultguard.storage import Store

__all__ = ["FOLDER", "TASK", "Registry", "batch_of"]

TASK = "manager"
FOLDER = "manager/"
KEEP = 3
MAX_TRIES = 8  # of a write that another manager on the same directory gets ahead of


@dataclass(slots=True)
class _Worker:
    """What this process knows of a worker. `log_lock` is held over store work, the registry's lock never is."""

    log_lock: threading.Lock = field(default_factory=threading.Lock)
    held: rules.Held | None = None  # its log; None: look there first
    token: int = 0  # of its newest attempt; 0: not known here
    ended: Ended | None = None  # how that attempt ended; None while it goes on
    closed: bool = False  # its log ends with an outcome
    calls: int = 0  # of it that are under way: it waits for us, and is not silent
    heard: float = -math.inf  # on the awake clock
    heard_at: float | None = None  # seconds since the epoch
    batch: Any = None

    @property
    def over(self) -> bool:
        return self.closed or self.ended is not None

    @property
    def watched(self) -> bool:
        return self.token > 0 and not self.over and self.calls == 0


class Registry:
    """Registered workers. May be used by several threads; what touches the store says so.

    Args:
        settings: store and limits.
        writer: names the manager in the records it writes, over its restarts.
    """

    def __init__(self, settings: Settings, writer: str) -> None:
        self._settings = settings
        self._writer = writer
        self._lock = threading.Lock()
        self._clock = AwakeClock()
        self._workers: dict[str, _Worker] = {}

    # --- signs of life: never touch the store ---

    def heartbeat(self, worker_id: str, state: object, token: int | None) -> bool | None:
        """Take a sign of life. True: go on; False: ended or superseded; None: only the log can tell."""
        checked = _check_state(state, "current_state")
        with self._lock:
            worker = self._workers.get(check_worker_id(worker_id))
            if worker is None or not worker.token or (token is not None and token > worker.token):
                return None
            if worker.over or (token is not None and token < worker.token):
                return False
            self._hear(worker, checked)
            return True

    @contextmanager
    def calling(self, worker_id: str) -> Iterator[None]:
        """Do something for a worker that waits for it: however slow the store is, that is not the worker's silence."""
        worker = self._worker(worker_id)
        with self._lock:
            worker.calls += 1
        superseded = False
        try:
            yield
        except SupersededError:
            superseded = True
            raise
        finally:
            with self._lock:
                worker.calls -= 1
                if not superseded:
                    worker.heard = self._clock.read(time.monotonic())

    def tick(self, next_in_s: float) -> None:
        """The watcher is here, and promises to be back; infinity: it stops."""
        with self._lock:
            self._clock.tick(time.monotonic(), next_in_s)

    def silent(self) -> dict[str, float]:
        """Who of the workers known here is silent for too long, and for how many seconds."""
        with self._lock:
            awake = self._clock.read(time.monotonic())
            ages = {worker_id: awake - worker.heard for worker_id, worker in self._workers.items() if worker.watched}
        return {worker_id: age for worker_id, age in ages.items() if age > self._settings.heartbeat_timeout}

    # --- with the store ---

    def register(self, worker_id: str, initial_state: object = None, call_id: str = "") -> int:
        """Begin an attempt of a worker, whoever holds it. Returns its token.

        Args:
            worker_id: the worker.
            initial_state: shown until it says more.
            call_id: the same for all executions of one call; one that Ray repeats, because it lost the reply, is answered again.

        Raises:
            MaxFailuresExceeded: its failures are used up; it stays so for this manager.
        """
        state = _check_state(initial_state, "initial_state")
        _codec.encode(state, path="initial_state")  # what cannot be saved later is refused now
        worker, log = self._worker(worker_id), self._log(worker_id)
        with worker.log_lock:
            loaded = log.run(_look())
            head = loaded.head
            if head is not None and self._is_used_up(head):
                raise self._exceeded(head)
            if head is not None and call_id and head.owner.task_id == call_id:
                return self._adopt(worker, loaded).token
            answer = log.run(rules.claim(self._claimant(worker_id, call_id), time.time()))
            if isinstance(answer, rules.Granted):
                self._begin(worker, answer, state)
                return answer.held.token
            record = answer.record if isinstance(answer, rules.Finished) else answer.head
            self._know(worker, None, token=record.token, closed=True)
            raise self._exceeded(record)

    def look_up(self, worker_id: str) -> bool:
        """Learn from the log who holds a worker. False: it was never registered. Not to know is no reason to stop anybody."""
        worker = self._worker(worker_id)
        try:
            with worker.log_lock:
                loaded = self._log(worker_id).run(_look())
                if loaded.head is not None:
                    self._adopt(worker, loaded)
        except (CheckpointStoreError, CheckpointCorruptError) as error:
            text = f"worker {worker_id!r} beats, and whether it may go on could not be looked up: {error}"
            _events.emit(logging.WARNING, "faultguard.lookup_failed", text, worker_id=worker_id, error=str(error))
            return True
        return loaded.head is not None

    def save(self, worker_id: str, state: object, token: int | None, outcome: Outcome | None = None) -> str | None:
        """Append a checkpoint, or with an outcome the end. Durable on return.

        Returns:
            Where the checkpoint is; None where there is none to save.

        Raises:
            SupersededError: the token is older than the newest attempt's, or the worker has ended for good.
            UsageError: it was never registered.
        """
        checked = _check_state(state, "state")
        snapshot = Snapshot(state=msgspec.Raw(_codec.encode(checked))) if checked is not None else None
        worker, log = self._worker(worker_id), self._log(worker_id)
        with worker.log_lock:
            for _ in range(MAX_TRIES):
                held = self._current(worker, log, worker_id, token)
                if worker.closed:
                    raise SupersededError(_ended_text(worker_id), worker_id=worker_id, token=held.token)
                # Late, but not lost: the checkpoint of an attempt that was marked failed repeats that note, which is charged once.
                note = _repeated(worker.ended)
                if self._append(worker, log, held, snapshot, ended=note, outcome=outcome):
                    with self._lock:
                        self._hear(worker, checked)
                    return log.path(held.last) if held.durable is not None else None
        raise _contended(worker_id)

    def load(self, worker_id: str) -> Any:
        """Read the newest checkpoint; None where there is none."""
        loaded = self._log(worker_id).run(_look())
        if loaded.damaged:
            numbers = ", ".join(map(str, loaded.damaged))
            text = f"worker {worker_id!r} has damaged checkpoint records {numbers}; they are set aside for the newest intact one"
            _events.emit(logging.WARNING, "faultguard.record_damaged", text, worker_id=worker_id, damaged=list(loaded.damaged))
        return _codec.decode(bytes(loaded.snapshot.state)) if loaded.snapshot is not None else None

    def mark_failed(self, worker_id: str, cause: str, message: str = "", *, unless: Callable[[], bool] = lambda: False) -> bool:
        """End the attempt of a worker as a failure that is charged. Returns whether this call did: one attempt fails once.

        Args:
            worker_id: the worker.
            cause: for the failure history.
            message: likewise.
            unless: asked when the log is at hand; True: leave it alone.

        Raises:
            UsageError: it was never registered.
        """
        worker, log = self._worker(worker_id), self._log(worker_id)
        with worker.log_lock:
            for _ in range(MAX_TRIES):
                held = self._current(worker, log, worker_id, None)
                if worker.over or unless():
                    return False
                batch = worker.batch if isinstance(worker.batch, int) else 0
                failure = FailureRecord(cause=cause, attempt=held.attempt, batch=batch, message=message, time=time.time())
                if self._append(worker, log, held, None, ended=Ended(cause, charged=True), failure=failure):
                    _say_failed(worker_id, failure, held, self._settings.max_failures)
                    return True
        raise _contended(worker_id)

    def states(self) -> list[WorkerState]:
        """All registered workers of this directory, by id: the logs, and what is newer in memory."""
        stored = stored_workers(self._store, FOLDER, run="", levels=1)
        with self._lock:
            heard = {worker_id: (worker.token, worker.heard_at, worker.batch) for worker_id, worker in self._workers.items()}
        states = (_registered(worker, *heard.get(worker.record.worker_id, (0, None, None))) for worker in stored)
        return sorted(states, key=lambda state: state.worker_id)

    def adopt_all(self) -> None:
        """After a restart: watch again whom this manager watched. Their silence counts from now on."""
        for _, record in stored_workers(self._store, FOLDER, run="", levels=1):
            if record.owner.writer.startswith(self._writer) and record.kind != "end" and record.ended is None:
                worker = self._worker(record.worker_id)
                with worker.log_lock:
                    self._adopt(worker, self._log(record.worker_id).run(_look()))

    # --- the log of one worker; its `log_lock` is held ---

    def _current(self, worker: _Worker, log: StoredLog, worker_id: str, token: int | None) -> rules.Held:
        """The log as the holder of `token` may write it; read where memory does not do."""
        held = worker.held
        if held is None or (token is not None and token > held.token):
            loaded = log.run(_look())
            if loaded.head is None:
                raise UsageError(f"worker {worker_id!r} was never registered here; call register_worker({worker_id!r}, ...) first")
            held = self._adopt(worker, loaded)
        if token is not None and token < held.token:
            text = (
                f"worker {worker_id!r} token {token} was replaced by attempt {held.attempt} (token {held.token}); its writes are ignored. "
                f"Stop this loop; nothing is lost"
            )
            raise SupersededError(text, worker_id=worker_id, attempt=held.attempt, token=token)
        if token is not None and token > held.last:
            raise UsageError(f"token {token} of worker {worker_id!r} is not in its log; pass what register_worker returned for it")
        return held

    def _append(self, worker: _Worker, log: StoredLog, held: rules.Held, snapshot: Snapshot | None, **end: Any) -> bool:
        """Write one record; False when another manager wrote one in between: then the log has to be read again."""
        worker.held = None  # until it is known what stands in the log
        if not log.run(rules.save(held, snapshot, time.time(), **end)):
            return False
        self._know(worker, held, token=held.token, ended=end.get("ended"), closed=end.get("outcome") is not None)
        try:
            log.run(rules.retain(held, KEEP))
        except CheckpointStoreError as error:  # the record is durable; what could not be deleted is tried again after the next one
            text = f"old checkpoints of worker {held.worker_id!r} could not be deleted: {error}"
            _events.emit(logging.WARNING, "faultguard.retention_failed", text, worker_id=held.worker_id, task=TASK, error=str(error))
        return True

    def _begin(self, worker: _Worker, granted: rules.Granted, state: dict[str, Any] | None) -> None:
        """Take a granted claim to memory, and say what it follows."""
        held = granted.held
        self._know(worker, held, token=held.token)
        batch = batch_of(state) if granted.snapshot is None else _batch_in(granted.snapshot)
        with self._lock:
            worker.batch = batch
            self._hear(worker, None)
        if held.attempt > 1:
            _say_recovered(held, self._settings.max_failures)

    def _adopt(self, worker: _Worker, loaded: rules.Loaded) -> rules.Held:
        """Go on with a log that was read: the attempt stays who it is. Silence counts from now on."""
        head = loaded.head
        if head is None:
            raise ValueError("an empty log has nobody to go on with")
        held = _held(head, loaded, self._owner(head.owner.task_id))
        ended = Ended("ended", charged=False) if head.kind == "end" else head.ended
        self._know(worker, held, token=held.token, ended=ended, closed=head.kind == "end")
        batch = worker.batch if worker.batch is not None else _batch_in(loaded.snapshot)
        with self._lock:
            worker.batch = batch
            if worker.heard == -math.inf:
                worker.heard = self._clock.read(time.monotonic())
        return held

    def _know(self, worker: _Worker, held: rules.Held | None, *, token: int, ended: Ended | None = None, closed: bool = False) -> None:
        with self._lock:
            worker.token, worker.ended, worker.closed = token, ended, closed
            worker.held = None if worker.over else held  # another manager may begin the next attempt: look, when it matters again

    # --- small things ---

    def _hear(self, worker: _Worker, state: Mapping[str, Any] | None) -> None:
        worker.heard, worker.heard_at = self._clock.read(time.monotonic()), time.time()
        worker.batch = batch_of(state, worker.batch)

    def _worker(self, worker_id: str) -> _Worker:
        with self._lock:
            return self._workers.setdefault(check_worker_id(worker_id), _Worker())

    @property
    def _store(self) -> Store:
        return checked_store(self._settings)

    def _log(self, worker_id: str) -> StoredLog:
        return StoredLog(self._store, f"{FOLDER}{encode_name(worker_id)}/")

    def _owner(self, call_id: str) -> Owner:
        """The manager wrote it; where the worker runs it does not know, so its own pid would mislead."""
        return Owner(writer=f"{self._writer}-{call_id or uuid.uuid4().hex}", task_id=call_id)

    def _claimant(self, worker_id: str, call_id: str) -> rules.Claimant:
        owner = self._owner(call_id)
        return rules.Claimant(owner=owner, task=TASK, worker_id=worker_id, max_failures=self._settings.max_failures, always=True)

    def _is_used_up(self, head: Record) -> bool:
        """Whether this manager has refused the worker already. A new manager, that is a new start, gives it a new budget."""
        failed = head.kind == "end" and head.outcome is not None and head.outcome.status == "failed"
        return failed and head.owner.writer.startswith(self._writer)

    def _exceeded(self, record: Record) -> MaxFailuresExceeded:
        return max_failures_exceeded(record.worker_id, record.failures, max_failures=self._settings.max_failures)


def batch_of(state: Mapping[str, Any] | None, default: Any = None) -> Any:
    """What a state says of its batch.

    >>> batch_of({"batch_id": 3}), batch_of({"batch_id": 3, "current_batch": 4}), batch_of({"rows": 1}, default=2)
    (3, 4, 2)
    """
    state = state or {}
    return state.get("current_batch", state.get("batch_id", default))


def _registered(stored: StoredWorker, token: int, heard_at: float | None, batch: Any) -> WorkerState:
    """A worker as its log shows it, with what memory has of the same attempt."""
    state, record = stored
    if record.ended is not None and record.kind != "end":
        state = replace(state, status="failed")
    if token != record.token:
        return replace(state, current_batch=_batch_in(record.snapshot))
    return replace(state, current_batch=batch, last_heartbeat=heard_at or state.last_heartbeat)


def _batch_in(snapshot: Snapshot | None) -> Any:
    """What a checkpoint says of its batch. That is for the view: a state that cannot be read must not stop a save."""
    if snapshot is None:
        return None
    try:
        return batch_of(_codec.decode(bytes(snapshot.state)))
    except (CheckpointCorruptError, UsageError):
        return None


def _repeated(ended: Ended | None) -> Ended | None:
    """The note of an attempt that is over already, for one more record of it."""
    return Ended(ended.cause, charged=False) if ended is not None else None


def _check_state(state: object, name: str) -> dict[str, Any] | None:
    if state is None or isinstance(state, dict):
        return state
    raise UsageError(f"{name} of type {type(state).__name__!r} is refused; it takes a dict, such as {{'batch_id': 0}}")


def _look() -> Generator[rules.Op, Any, rules.Loaded]:
    return (yield from rules.load((yield rules.List())))


def _held(head: Record, loaded: rules.Loaded, owner: Owner) -> rules.Held:
    """The log as one knows it who has only read it."""
    return rules.Held(
        owner=owner,
        task=head.task,
        worker_id=head.worker_id,
        token=head.token,
        life=head.life,
        attempt=head.attempt,
        charged=head.charged,
        failures=head.failures,
        last=max(loaded.numbers),
        durable=loaded.snapshot,
        saved_s=head.saved_s,
        known={number: "damaged" if number in loaded.damaged else "unknown" for number in loaded.numbers},
    )


def _ended_text(worker_id: str) -> str:
    return f"worker {worker_id!r} has ended; what comes after that is ignored. Call register_worker({worker_id!r}, ...) to begin again"


def _contended(worker_id: str) -> CheckpointStoreError:
    text = f"worker {worker_id!r} could not be written in {MAX_TRIES} tries: another manager on this directory got ahead each time"
    return CheckpointStoreError(text)


def _say_failed(worker_id: str, failure: FailureRecord, held: rules.Held, max_failures: int) -> None:
    of = "" if max_failures < 0 else f" of {max_failures + 1}"
    why = f" ({failure.message})" if failure.message else ""
    text = f"worker {worker_id!r} attempt {failure.attempt}{of} {failure.cause}{why} at batch {failure.batch}."
    fields = {"worker_id": worker_id, "task": TASK, "attempt": failure.attempt, "token": held.token, "cause": failure.cause}
    _events.emit(logging.WARNING, "faultguard.worker_failed", text, **fields)


def _say_recovered(held: rules.Held, max_failures: int) -> None:
    of = "" if max_failures < 0 else f" of {max_failures + 1}"
    how = f": attempt {held.failures[-1].attempt} ended by {held.failures[-1].cause}" if held.failures else ""
    text = f"worker {held.worker_id!r} attempt {held.attempt}{of} is registered{how}."
    fields = {"worker_id": held.worker_id, "task": TASK, "attempt": held.attempt, "token": held.token}
    _events.emit(logging.WARNING, "faultguard.worker_recovered", text, **fields)
