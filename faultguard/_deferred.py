"""The first attempt of a task that may be over in a moment: it writes nothing, and wakes no thread, before that is worth its price.

It stands in for the journal of its handle. The worker is claimed at its first save, at its first failure, when somebody asks for what
only a claim gives, and after `defer` seconds by a thread that looks now and then (`_soon`). A task that ends before leaves nothing: whoever
starts it again finds an empty log, and counts that as one failure.
"""

from __future__ import annotations

import threading
import time
from typing import TYPE_CHECKING, Any

from faultguard import _soon
from faultguard._core.schedule import NOW
from faultguard.errors import CheckpointStoreError, UsageError

if TYPE_CHECKING:
    from collections.abc import Callable

    from faultguard._core import log as rules
    from faultguard._core.records import Place, Snapshot
    from faultguard._core.schedule import Schedule
    from faultguard._handle import Checkpoint
    from faultguard._journal import Journal
    from faultguard._worker import OpenWorker

__all__ = ["Deferred"]

RETRY_S = 1.0


class Deferred:
    """A worker that is not claimed yet, in the place of its journal, and of the `OpenWorker` that it becomes.

    Args:
        handle: of the attempt.
        schedule: of the handle.
        keep: as of a journal.
        patience_s: how long the store may fail before the loop is told.
        after_s: when to claim in any case.
        trouble: is told each time that the store fails.
        claims: makes the worker of `deferred`, and waits for the store for `patience_s`.
    """

    def __init__(
        self,
        handle: Checkpoint,
        schedule: Schedule,
        keep: int,
        *,
        patience_s: float,
        after_s: float,
        trouble: Callable[[CheckpointStoreError], None],
        claims: Callable[..., OpenWorker],
    ) -> None:
        self.handle = handle
        self.trouble = trouble
        self.keep = keep
        self.skips_poison: bool | None = None
        self.fields: Callable[[], dict[str, Any]] = handle.fields
        self.durable: Snapshot | None = None
        self._claims = claims
        self.schedule = schedule
        self._patience_s = patience_s
        self._claiming = threading.Lock()  # held while the store is asked
        self._moving = threading.Lock()  # never held for long: what is offered reaches either this or the journal
        self._worker: OpenWorker | None = None
        self._over = False
        self._refused: Exception | None = None
        self._failing_since: float | None = None
        self._newest: tuple[Snapshot, float] | None = None
        self._look_at = time.monotonic() + after_s
        handle.defer(self)
        _soon.add(self)

    def claim(self) -> OpenWorker:
        """The worker; claims it if nobody has yet, and waits for a store that is in trouble.

        Raises:
            SupersededError: a later attempt has begun meanwhile.
            DuplicateWorkerError: another task has this id.
            CheckpointStoreError: the store has failed for too long.
        """
        with self._claiming:
            return self._claim(self._patience_s)

    def _claim(self, patience_s: float) -> OpenWorker:
        """Under the lock."""
        if self._refused is not None:
            raise self._refused
        if self._over:
            handle = self.handle
            raise UsageError(f"the handle of worker {handle.worker_id!r} attempt {handle.attempt} is refused: the attempt is over")
        if self._worker is None:
            self._worker = self._claims(deferred=self, patience_s=patience_s)
            _soon.remove(self)
        return self._worker

    def take_over(self, journal: Journal, token: int) -> None:
        """The worker is claimed: from now on the handle speaks to its journal, which gets what was offered here."""
        with self._moving:
            if self._newest is not None:
                journal.offer(*self._newest)
            self.handle.claimed(journal, token)

    def finish(self) -> bool:
        """The task is over, and nothing has to be kept of it. False: too late, it is claimed."""
        _soon.remove(self)
        with self._claiming:
            self._over = self._worker is None
        if self._over:
            self.handle.close()
        return self._over

    def tick(self, now: float) -> None:
        """On the thread that looks: claim what has worked for long enough. What goes wrong is told at the next boundary."""
        if now < self._look_at or not self._claiming.acquire(blocking=False):
            return
        try:
            if not self._over:
                self._claim(0.0)
        except CheckpointStoreError as error:
            self.trouble(error)
            self._look_at = now + RETRY_S
            self._failing_since = self._failing_since or now
        except Exception as error:  # noqa: BLE001 - raised where the task can see it
            self._refused = error
            _soon.remove(self)
        finally:
            self._claiming.release()
        self.schedule.look_at = NOW

    # --- what a handle asks of its journal ---

    @property
    def held(self) -> rules.Held:
        """As of the journal; claims."""
        return self.claim().journal.held

    @property
    def newest(self) -> Snapshot | None:
        """The newest snapshot."""
        return self._newest[0] if self._newest is not None else None

    def offer(self, snapshot: Snapshot, due: float) -> None:
        """Keep a snapshot; a save that the user has asked for by batches or seconds claims."""
        with self._moving:
            journal = self.handle.journal
            if journal is self:
                self._newest = (snapshot, due)
        if journal is not None and journal is not self:  # it has moved meanwhile
            journal.offer(snapshot, due)
        elif self.schedule.is_strict and due <= time.monotonic():
            self.claim()

    def write(self, snapshot: Snapshot) -> None:
        """As of the journal; claims."""
        self.claim().journal.write(snapshot)

    def pin(self, snapshot: Snapshot, begins: Place) -> None:
        """As of the journal; claims."""
        self.claim().journal.pin(snapshot, begins)

    def unpin(self) -> None:
        """As of the journal; claims."""
        self.claim().journal.unpin()

    @property
    def is_volatile(self) -> bool:
        """There is no claim yet."""
        return True

    def settle(self) -> None:
        """As of the journal; claims."""
        self.claim()

    def look(self) -> None:
        """As of the journal; claims."""
        self.claim()

    def raise_trouble(self) -> None:
        """At a boundary: tell the loop why it could not be claimed."""
        self.raise_if_superseded()
        if self._failing_since is not None and time.monotonic() - self._failing_since > self._patience_s:
            self.claim()

    def raise_if_superseded(self) -> None:
        """Likewise, at the end."""
        if self._refused is not None:
            self.schedule.look_at = NOW
            raise self._refused

    def must_pin(self) -> bool:
        """There was no attempt before."""
        return False

    def skip_poison(self, skip: bool) -> None:  # noqa: FBT001 - what the block says
        """For the claim."""
        self.skips_poison = skip
