"""The lease of a named run: its driver lives as long as a numbered file goes on; another driver watches that by its own clock.

It is a courtesy, so that nobody takes a run from a driver that lives. The fence is the epoch in the claims of its tasks.
"""

from __future__ import annotations

import logging
import time
from typing import TYPE_CHECKING

from faultguard import _events
from faultguard._core.names import record_name, record_number
from faultguard._process import ProcessId, is_dead, this_process
from faultguard._sidecar import Sidecar
from faultguard.errors import CheckpointStoreError

if TYPE_CHECKING:
    from collections.abc import Callable

    from faultguard._core.runs import RunRecord
    from faultguard._log import StoredLog

__all__ = ["REPLACED", "Lease", "beats", "is_over", "sweep"]

POLL_S = 0.5
REPLACED = "replaced"  # it has ended, or somebody else was faster: look again


class Lease:
    """What a driver does for the run that it has: beat, and notice that it has been taken.

    Args:
        log: of the run.
        record: with which the driver has entered it.
        lost: called once, from a thread, with the record of the driver that has it now.
    """

    def __init__(self, log: StoredLog, record: RunRecord, lost: Callable[[RunRecord], None]) -> None:
        self._log = log
        self._record = record
        self._lost = lost
        self._next = 1
        self._due = 0.0
        self._failing = False
        _lessor.add(self)

    def step(self, now: float) -> float:
        """Beat if it is time. Returns when to come again, monotonic seconds."""
        if now < self._due:
            return self._due
        self._due = now + self._record.heartbeat_interval
        try:
            self._beat()
        except CheckpointStoreError as error:  # the next one is another try; if nobody can see it, the run may be taken, which is safe
            if not self._failing:
                self._failing = True
                text = f"run {self._record.run!r} cannot say in its store that this driver lives: {error}. Another one may take it over."
                _events.emit(logging.WARNING, "faultguard.lease_failed", text, run=self._record.run, error=str(error))
        else:
            self._failing = False
        return self._due

    def _beat(self) -> None:
        store, prefix = self._log.store, beats(self._log, self._record.number)
        store.create(prefix + record_name(self._next), b"{}")
        self._next += 1
        for key in store.list(prefix)[:-1]:
            store.delete(key)
        head = self._log.newest_run()
        if head is not None and head.number > self._record.number and head.writer != self._record.writer:  # its own end is no loss
            _lessor.remove(self)
            self._lost(head)

    def end(self) -> None:
        """Beat no more, and leave nothing of it; what the store does not let go of goes with the next driver."""
        _lessor.remove(self)
        try:
            sweep(self._log, self._record.number)
        except CheckpointStoreError as error:
            _events.emit(logging.DEBUG, "faultguard.lease_left", f"beats of the driver stay: {error}", run=self._record.run)


def beats(log: StoredLog, epoch: int) -> str:
    """Where the beats of a driver are; ends in "/"."""
    return f"{log.prefix}{epoch:09d}/"


def sweep(log: StoredLog, epoch: int) -> None:
    """Remove the beats of this driver, and of all before it."""
    for key in log.store.list(log.prefix):
        folder, _, name = key[len(log.prefix) :].partition("/")
        if record_number(name) is not None and folder.isdigit() and int(folder) <= epoch:
            log.store.delete(key)


def _process(record: RunRecord) -> ProcessId:
    """The process of the driver that wrote a record."""
    return ProcessId(record.driver.boot_id, record.driver.pid, record.driver.start_time)


def is_over(log: StoredLog, head: RunRecord, timeout_s: float, waits: Callable[[], None]) -> str:
    """Find out whether the driver that has a run is gone: how that is known, in words; empty: it lives.

    Args:
        log: of the run.
        head: the record of that driver.
        timeout_s: how long nothing may be heard of it, if nothing else is known.
        waits: called once, if that takes more than a look.
    """
    if _process(head) == this_process():
        return "of this process"  # which has no run, or it would not ask
    if is_dead(_process(head)):
        return "gone"
    waits()
    before = log.store.list(beats(log, head.number))
    quiet_s, looked = 0.0, time.monotonic()
    poll_s = min(POLL_S, timeout_s / 4)
    while quiet_s < timeout_s:
        time.sleep(poll_s)
        if is_dead(_process(head)):
            return "gone"
        newest = log.newest_run()
        if newest is not None and newest.number != head.number:
            return REPLACED
        if log.store.list(beats(log, head.number)) != before:
            return ""
        now = time.monotonic()
        quiet_s += min(now - looked, 2 * poll_s)  # one's own absence is not its silence
        looked = now
    return f"silent for {timeout_s:g} s"


def _work(leases: list[Lease]) -> float:
    return min(lease.step(time.monotonic()) for lease in leases)


_lessor: Sidecar[Lease] = Sidecar("faultguard-lease", _work, _events.report)
