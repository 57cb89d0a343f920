"""A worker that this process holds: its handle, its log, its beats, and how it is given up."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import threading
import time
from typing import TYPE_CHECKING, NoReturn

from faultguard import _beater, _events, _ray, _watcher
from faultguard._core.records import Ended, FailureRecord
from faultguard._core.silence import Held
from faultguard._handle import TOKENS_PER_EPOCH
from faultguard._sentences import place_of, say_quarantined
from faultguard._stall import StallGuard, first_stack, stacks
from faultguard._stops import CALLS, Cancelled, Drained, cancelled_here
from faultguard.errors import CheckpointStoreError, StalledError

if TYPE_CHECKING:
    from faultguard._handle import Checkpoint
    from faultguard._journal import Journal
    from faultguard._settings import Settings

__all__ = ["OpenWorker", "failure_of", "held_here", "is_of_the_batch", "leave_process"]

MAX_MESSAGE = 1000
FIRST_BEAT_WAIT_S = 10.0  # where a manager has to be made first; else it takes milliseconds
LAST_WORDS_S = 30.0  # for the record of a process that is ended because it hangs; after that its successor calls it a crash
STALL_PATIENCE_S = 20.0  # of these for a store that fails

held_here: dict[str, OpenWorker | None] = {}  # writers of the workers that this process holds; None: not open yet, or any more


class OpenWorker:
    """A worker that this process holds: its handle, its log, its beats. It is what the beater asks."""

    def __init__(self, settings: Settings, identity: _ray.Identity, journal: Journal, handle: Checkpoint, *, leaves: bool) -> None:
        self.settings = settings
        self._leaves = leaves  # whether Ray runs its task again when it leaves
        self._told = ""
        self.journal = journal
        self.handle = handle
        self._identity = identity
        self._started = time.time()
        self._status = ""
        self._announced = False
        self.mark_every_s: float = settings.heartbeat_interval
        token = journal.held.token + settings.epoch * TOKENS_PER_EPOCH  # not that of the handle: nobody is told yet
        self.held: Held = Held(handle.task, handle.worker_id, token, handle.run, handle.attempt)
        held_here[journal.held.owner.writer] = self
        self.guard.on_timed = self._timed
        self.guard.on_change = self._remark
        _beater.register(self)
        if self.guard.timeout_s is not None:
            self._timed()

    @property
    def guard(self) -> StallGuard:
        """Where its loop stands."""
        return self.handle.guard

    def _watched(self) -> None:
        if not self._status:
            _watcher.watch(self)
            if self._status:  # closed meanwhile
                _watcher.unwatch(self)

    def _timed(self) -> None:
        """A timeout is set: from now on the process may stand still as a whole, which only others can see, if they know of it."""
        self._watched()
        if not (self._announced or self._status or self.hosts_others()):
            self._announced = True
            with self.guard.paused():
                _watcher.mark(self)
                _beater.hurry(self, FIRST_BEAT_WAIT_S)

    def _remark(self) -> None:
        _watcher.remark(self)

    def beat(self) -> dict[str, object]:
        """What the manager is told, on the beater's thread."""
        handle, held = self.handle, self.journal.held
        return {
            "task": handle.task,
            "worker_id": handle.worker_id,
            "run": handle.run,
            "attempt": held.attempt,
            "token": held.token,
            "status": self._status or ("active" if held.attempt == 1 else "recovered"),
            "current_batch": handle.current_batch,
            "position": handle.position,
            "total_batches": handle.total_batches,
            "node_id": self._identity.node_id,
            "home_id": self._identity.home_id,
            "boot_id": held.owner.boot_id,
            "pid": held.owner.pid,
            "start_time": held.owner.start_time,
            "started_at": self._started,
            "last_checkpoint": self.journal.log.path(held.last),
            "failure_count": held.charged,
            "quarantined": handle.quarantined,
            "cancels": self.settings.cancels,
        }

    def lasts(self) -> None:
        """It has worked for a moment, and goes on: a power failure is not to take its claim any more."""
        self.journal.settle_soon()

    def begins(self) -> None:
        """It works for longer than a moment: from now on the process says on its node, too, that it lives."""
        self._watched()
        _watcher.mark(self)

    def final_beat(self) -> dict[str, object]:
        """The last one."""
        return self.beat()

    def told(self, reply: str) -> None:
        """What the manager answered to a beat; on the beater's thread. It comes again with every beat, as long as it is true."""
        if self._status or reply in {"ok", "ended"}:
            return
        if reply == "superseded":
            self.journal.suspect()
        elif reply == "drained":
            self._drained()
        elif reply == "cancelled":
            self._cancelled()
        self._told = reply

    def _drained(self) -> None:
        """The node is going to be taken away: save what there is; what Ray runs again elsewhere leaves at its next boundary."""
        text = f"'{self.handle.task}/{self.handle.worker_id}' attempt {self.handle.attempt} is on a node that is being drained"
        self.journal.excuse(Ended("drained", charged=False))
        if self._leaves:
            self.handle.stop(lambda: Drained(f"{text}; it leaves, and Ray runs it again on another node"))
        else:
            self.handle.save_often()
        if self._told != "drained":
            then = "goes on elsewhere after its batch" if self._leaves else "saves often, and goes on as long as it is there"
            _events.emit_beside(logging.WARNING, "faultguard.node_drains", f"{text}; it {then}.", **self.handle.fields())

    def _cancelled(self) -> None:
        """Raise inside the batch in hand, where there is one in a thread of its own, and at the next boundary in any case."""
        handle, guard = self.handle, self.guard
        text = f"'{handle.task}/{handle.worker_id}' attempt {handle.attempt} was cancelled by {CALLS}"
        handle.stop(lambda: cancelled_here(text))
        guard.strike(guard.look()[0], Cancelled(text))

    # --- stalls ---

    def slow(self, age_s: float) -> None:
        """Without a timeout nothing is raised or killed; what takes suspiciously long is said, once; on the thread of the watcher."""
        seen = stacks(self.guard.thread)
        text = (
            f"{self._stands_still(age_s)}, much longer than before. Nothing is done about it; with stall_timeout=... it would be "
            f"retried.\n{first_stack(seen)}"
        )
        _events.emit_beside(logging.WARNING, "faultguard.slow_batch", text, **self.handle.fields(), stacks=seen)

    def _stands_still(self, age_s: float) -> str:
        handle, guard = self.handle, self.guard
        where = f"section {guard.section!r} of " if guard.section is not None else ""
        return (
            f"'{handle.task}/{handle.worker_id}' attempt {handle.attempt} has made no progress for {age_s:.1f} s in {where}"
            f"{place_of(handle.position, handle.total_batches)}"
        )

    def stalled(self, key: object, age_s: float, timeout_s: float) -> None:
        """Raise `StalledError` in its thread; on the thread of the watcher."""
        handle, guard = self.handle, self.guard
        text = f"{self._stands_still(age_s)} (stall_timeout={timeout_s:g} s)"
        error = StalledError(text, worker_id=handle.worker_id, attempt=handle.attempt, batch=handle.current_batch)
        seen = stacks(guard.thread, native=True)
        raised = guard.strike(key, error, seen)
        if raised or guard.look()[0] == key:
            what = "StalledError is raised there" if raised else "nothing is raised into the thread of an event loop"
            fields = {**handle.fields(), "stall_s": round(age_s, 3), "raised": raised, "stacks": seen}
            _events.emit_beside(logging.WARNING, "faultguard.stalled", f"{text}; {what}.\n{first_stack(seen)}", **fields)

    def leave_hard(self, key: object, age_s: float, timeout_s: float) -> None:
        """The thread does not come back: note that and end the process, if nobody else works in it."""
        guard = self.guard
        if guard.thread is None or self.hosts_others():
            text = f"{self._stands_still(age_s)}; this process is not ended, because it hosts other work."
            _events.emit_beside(logging.ERROR, "faultguard.stall_stays", text, **self.handle.fields())
            return
        seen = guard.stacks or stacks(guard.thread, native=True)
        text = f"{self._stands_still(age_s)} (stall_timeout={timeout_s:g} s) and does not react"
        if not guard.hold(key):
            return
        message = f"{StalledError.__name__}({text!r})"
        failure = failure_of(self.handle, self._identity, "stall", message, seen, pinned=self.handle.held_up)
        last_words = threading.Thread(target=self._note_stall, args=(failure, text, seen), name="faultguard-stall", daemon=True)
        try:
            last_words.start()
            last_words.join(LAST_WORDS_S)  # the store may hang, and so may whoever holds the lock of a log or of stdout
        finally:
            os._exit(1)

    def _note_stall(self, failure: FailureRecord, text: str, seen: str) -> None:
        try:  # whoever comes next needs the store, too
            self._note(Ended("stall", charged=True), failure, min(self.settings.store_patience, STALL_PATIENCE_S))
        finally:  # also where that is not what a note can fail with
            fields = {**self.handle.fields(), "stacks": seen}
            _events.emit(logging.WARNING, "faultguard.stall_exit", f"{text}; its process is ended.\n{first_stack(seen)}", **fields)
            _flush()

    def hosts_others(self) -> bool:
        """Whether other work than that of this task runs in this process, as far as one can know."""
        mine = self._identity.task_id
        opened = [worker for worker in tuple(held_here.values()) if worker is not None]
        return _ray.runs_several() or any(worker._identity.task_id != mine for worker in opened)  # noqa: SLF001 - of this class

    # --- the end ---

    def failure(self, error: BaseException, cause: str = "exception") -> FailureRecord:
        """What is kept of an exception that came out of the body."""
        text = _text(error)
        message = f"{type(error).__name__}({text!r})" if text else type(error).__name__
        pinned = is_of_the_batch(error) and self.handle.is_to_blame(error)
        if isinstance(error, StalledError):
            return failure_of(self.handle, self._identity, "stall", message, self.guard.stacks, pinned=pinned)
        return failure_of(self.handle, self._identity, cause, message, pinned=pinned)

    def leave(self, ended: Ended, failure: FailureRecord | None = None) -> None:
        """Flush the newest snapshot with a note, and give the worker up. What it leaves with goes on, whatever the store says."""
        self._note(ended, failure)
        self.close("cancelled" if ended.cause == "cancelled" else "recovered")

    def _note(self, ended: Ended, failure: FailureRecord | None, patience_s: float = 0.0) -> None:
        """`give_up`, for one who leaves in any case: the next attempt finds out what could not be noted."""
        try:
            self.give_up(ended, failure, patience_s)
        except Exception as trouble:  # noqa: BLE001 - it must not take the place of a cancel, or of the user's own exception
            text = f"'{self.handle.task}/{self.handle.worker_id}' could not note why it leaves: {trouble}"
            _events.emit(logging.ERROR, "faultguard.leave_failed", text, **self.handle.fields())

    def give_up(self, ended: Ended, failure: FailureRecord | None, patience_s: float = 0.0) -> None:
        """Flush the newest snapshot with a note; and say what that quarantines."""
        before = self.journal.held.quarantined
        self.journal.leave(ended, failure, patience_s)
        say_quarantined(self.handle, self.journal.held, before)

    def close(self, status: str) -> None:
        """Give the worker up: no more writes, no more beats."""
        self._status = status
        try:
            self.handle.close()
            self.journal.close()
        finally:  # a cancel may come between any two of these
            held_here.pop(self.journal.held.owner.writer, None)
            _watcher.unwatch(self)
            _beater.unregister(self)


def is_of_the_batch(error: BaseException) -> bool:
    """Whether what came out of a batch can be its doing: not a signal, an exit or a cancel, and not the store's trouble."""
    return isinstance(error, Exception) and not isinstance(error, CheckpointStoreError)


def failure_of(
    handle: Checkpoint, identity: _ray.Identity, cause: str, message: str, seen: str = "", *, pinned: bool = False
) -> FailureRecord:
    """A failure of an attempt of this process, now. `pinned`: of the batch at which it stands."""
    return FailureRecord(
        cause=cause,
        attempt=handle.attempt,
        batch=handle.current_batch,
        message=message[:MAX_MESSAGE],
        node_id=identity.node_id,
        pid=os.getpid(),
        time=time.time(),
        position=handle.position,
        stacks=seen,
        place=handle.place,
        pinned=pinned,
    )


def _text(error: BaseException) -> str:
    if type(error).__str__ is KeyError.__str__ and len(error.args) == 1:  # which shows its key in quotes of its own
        error = Exception(*error.args)
    try:
        return str(error)
    except Exception as trouble:  # noqa: BLE001 - a user's __str__ may raise anything
        return f"its text raises {type(trouble).__name__}"


def leave_process() -> NoReturn:
    """End this process at once, so that Ray runs the task again in another one."""
    _flush()
    os._exit(1)


def _flush() -> None:
    with contextlib.suppress(OSError, ValueError):
        sys.stdout.flush()
        sys.stderr.flush()
