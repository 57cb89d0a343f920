"""Named runs, on their driver: which instance it works on, what that has on record, and how it is closed."""

from __future__ import annotations

import datetime as dt
import logging
import socket
import threading
import time
import uuid
from typing import TYPE_CHECKING

from msgspec.structs import replace

from faultguard import _events
from faultguard._core import runs
from faultguard._core.log import condense
from faultguard._core.names import encode_name, record_name, record_number
from faultguard._core.records import decode_record
from faultguard._lease import REPLACED, Lease, is_over, sweep
from faultguard._log import StoredLog
from faultguard._process import this_process
from faultguard._session import run_has_ended
from faultguard._settings import checked_store
from faultguard._views import StoredWorker, stored_workers
from faultguard.errors import CheckpointStoreError, RunInUseError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from faultguard._core.records import Outcome, Record
    from faultguard._settings import Settings
    from faultguard.storage import Store

__all__ = ["KEPT_INSTANCES", "NamedRun"]

KEPT_INSTANCES = 10  # besides the one that is worked on
MAX_TRIES = 16
MAX_RECORDED_BYTES = 1 << 28  # of results that are kept at hand; the log has the others, too
CONDENSE_BYTES = 1 << 16  # a last state over this goes with the checkpoints, where the result is recorded without it
_DRIVER = "driver/"


class NamedRun:
    """A named run that this driver has. Made by `enter`.

    Attributes:
        settings: with the instance and the epoch.
        taken: what to raise, once another driver has it; None: it is ours.
    """

    def __init__(self, settings: Settings, log: StoredLog, entered: runs.Entered, how: str, resume: runs.Resume) -> None:
        self._log = log
        self._record = entered.record
        self.settings = replace(settings, instance=entered.record.instance, epoch=entered.record.number)
        self.taken: RunInUseError | None = None
        self._lock = threading.Lock()
        self._over = False
        self._submitted: set[tuple[str, str]] = set()
        self._recorded: dict[tuple[str, str], Outcome] = {}
        self._given = 0  # results from the record
        self._wants_records = resume == "always"
        self._lease = Lease(log, entered.record, self._lose)
        try:
            self.line = self._begin(entered.before, how)
        except BaseException:
            self.give_up()
            raise

    @classmethod
    def enter(cls, settings: Settings, *, resume: runs.Resume, takeover: bool, say: Callable[[str], None]) -> NamedRun:
        """Take the run, if no other driver has it that lives.

        Args:
            settings: of the run, without instance and epoch.
            resume: as `init` takes it.
            takeover: take it from a driver that lives, too.
            say: told, once, that it is waited for.

        Raises:
            RunInUseError: another driver has it.
            CheckpointCorruptError: the newest record of the run is damaged.
            CheckpointStoreError: it cannot be read or written.
        """
        log = StoredLog(checked_store(settings), f"{encode_name(settings.run)}/{_DRIVER}")
        process = this_process()
        me = runs.RunRecord(
            kind="open",
            number=0,
            run=settings.run,
            instance=0,
            driver=runs.Driver(socket.gethostname(), process.pid, process.boot_id, process.start_time),
            writer=uuid.uuid4().hex,
            at=time.time(),
            heartbeat_interval=settings.heartbeat_interval,
            heartbeat_timeout=settings.heartbeat_timeout,
        )
        gone, how = 0, "ended"
        for _ in range(MAX_TRIES):
            answer = log.run(runs.enter(me, resume, gone))
            if isinstance(answer, runs.Entered):
                return cls(settings, log, answer, how, resume)
            head = answer.head
            timeout_s = max(settings.heartbeat_timeout, head.heartbeat_timeout)
            waiting = f"run {settings.run!r} waits: {_who(head)} has it, and it is taken over if that is silent for {timeout_s:g} s."
            how = "taken over" if takeover else is_over(log, head, timeout_s, lambda text=waiting: say(text))  # type: ignore[misc]
            if not how:
                break
            gone = head.number if how != REPLACED else 0
            how = how if how != REPLACED else "ended"
        raise _in_use(head)

    def _begin(self, before: runs.RunRecord | None, how: str) -> str:
        """Find out what there is. Returns the line to say."""
        if before is None or before.instance != self.settings.instance:
            line = f"run {self._name} starts. Store {self.settings.checkpoint_dir}."
            self._forget_old(before)
        else:
            known = stored_workers(self._store, self.settings.run_prefix, run=self.settings.run)
            self._recorded = _at_hand(record for _, record in known)
            line = f"run {self._name} goes on: {_opened(before, how)}. {_counts(known)} Store {self.settings.checkpoint_dir}."
        if before is not None:
            sweep(self._log, before.number)
        return line

    @property
    def _store(self) -> Store:
        return self._log.store

    @property
    def _name(self) -> str:
        return f"{self.settings.run!r} (#{self.settings.instance})"

    # --- what is on record ---

    def recorded(self, task: str, worker_id: str) -> Outcome | None:
        """The outcome of a worker that was completed before this driver began, where it has a value and is at hand."""
        return self._recorded.get((task, worker_id))

    def gives(self) -> None:
        """A result was given from the record."""
        self._given += 1

    def submits(self, task: str, worker_id: str) -> None:
        """A worker is submitted to be run: until it has completed, the run is not over.

        Raises:
            UsageError: the run is over.
        """
        with self._lock:
            if self._over:
                raise run_has_ended(self.settings.run)
            self._submitted.add((task, worker_id))
            self._recorded.pop((task, worker_id), None)

    # --- the end ---

    def give_up(self) -> None:
        """This driver could not begin: leave the run as it is to others, as far as the store allows it."""
        try:
            self._log.run(runs.leave(self._record, "left", time.time()))
        except CheckpointStoreError as error:  # most likely what is raised already; others then find out that nothing lives here
            _events.emit(logging.DEBUG, "faultguard.run_not_left", f"run {self._name} could not be left: {error}", run=self._record.run)
        finally:
            self._lease.end()

    def end(self, *, failed: bool) -> list[str]:
        """Leave the run; close it if the driver ends normally and every worker completed. Returns the lines to say.

        Whatever the store says, this driver is one no more: its process may go on for days.
        """
        try:
            return self._end(failed=failed)
        finally:
            self._lease.end()

    def _end(self, *, failed: bool) -> list[str]:
        from faultguard._run import kept_lines

        with self._lock:
            self._over = True  # nothing is submitted any more
        workers = stored_workers(self._store, self.settings.run_prefix, run=self.settings.run)
        completed = {(state.task, state.worker_id): record for state, record in workers if state.status == "completed"}
        open_ = [state for state, _ in workers if state.status != "completed"]
        missing = self._submitted - {(state.task, state.worker_id) for state, _ in workers}
        closes = bool(workers) and not failed and not open_ and not missing
        kept = self._log.run(runs.leave(self._record, "closed" if closes else "left", time.time()))
        if not kept:
            head = self._log.newest_run()
            by = f" by {_who(head)}" if head is not None else ""
            return [f"run {self._name} was taken over{by}; it goes on there, and nothing that this driver leaves changes it."]
        if closes:
            _drop_checkpoints(self._store, self.settings.run_prefix)
        counts = self._summary(completed.values())
        if closes:
            return [f"run {self._name} closed: {counts}", *self._nothing_ran()]
        folders = [self.settings.log_prefix(task, worker).rstrip("/") for task, worker in sorted((s.task, s.worker_id) for s in open_)]
        text = f"run {self._name} stays open: {counts} {len(open_) + len(missing)} not completed; started again, it goes on."
        return [text, *kept_lines(self.settings, folders)]

    def _nothing_ran(self) -> list[str]:
        """What to say where all that was asked for had been computed before; not where that was what was asked for."""
        if self._submitted or not self._given or self._wants_records:
            return []
        name = self.settings.run
        text = (
            f"every result of run {self._name} came from the record of an earlier driver, and nothing was run: what has changed in code "
            f"or data since then shows in none of them. To compute them anew, write init(run={name!r}, resume='never')."
        )
        return [text]

    def _summary(self, completed: Iterable[Record]) -> str:
        from faultguard._run import duration

        ends = list(completed)
        before = [record for record in ends if record.owner.epoch < self.settings.epoch]
        survived = sum(len(record.failures) for record in ends)
        saved_s = sum(record.saved_s for record in ends) + sum(record.snapshot.work_s for record in before if record.snapshot is not None)
        saved = f" Saved {duration(saved_s)} of work." if saved_s >= 1 else ""
        quarantined = sum(len(record.quarantined) for record in ends)
        counts = f"{len(ends)} completed ({len(before)} from the record), {survived} failures survived, {quarantined} quarantined."
        return f"{counts}{saved}"

    def _lose(self, head: runs.RunRecord) -> None:
        """On the thread of the lease: another driver has the run."""
        from faultguard._run import say

        self.taken = _in_use(head)
        say(f"run {self._name} was taken over by {_who(head)}; what this driver still runs does not count, and it can start nothing more.")

    # --- retention ---

    def _forget_old(self, before: runs.RunRecord | None) -> None:
        """A new instance begins: finish what the last close left, and drop what was closed before the last ten.

        What was not closed stays for its owner to remove, however old: there is work in it that nothing else has.
        """
        if before is None:
            return
        run = encode_name(self.settings.run)
        if before.kind == "closed":
            _drop_checkpoints(self._store, f"{run}/{before.instance:09d}/")
        instances: dict[int, list[runs.RunRecord]] = {}  # oldest first
        for number in self._log.numbers():
            data = self._store.get(self._log.prefix + record_name(number))
            record = runs.decode_run_record(data, number) if data is not None else None
            if record is not None and record.instance < self.settings.instance:
                instances.setdefault(record.instance, []).append(record)
        for instance in sorted(instances)[:-KEPT_INSTANCES]:  # counted: after damage their numbers have gaps
            if instances[instance][-1].kind != "closed":
                continue
            for key in self._store.list(f"{run}/{instance:09d}/"):
                self._store.delete(key)
            for record in instances[instance]:  # last, the end after all else: whoever is cut before comes back to it
                self._store.delete(self._log.prefix + record_name(record.number))


def _at_hand(heads: Iterable[Record]) -> dict[tuple[str, str], Outcome]:
    """The outcomes that can be given without running anything."""
    found, size = {}, 0
    for record in heads:
        outcome = record.outcome
        if record.kind == "end" and outcome is not None and outcome.status == "completed" and outcome.recorded:
            size += len(bytes(outcome.value))
            if size > MAX_RECORDED_BYTES:
                break
            found[record.task, record.worker_id] = outcome
    return found


def _drop_checkpoints(store: Store, prefix: str) -> None:
    """Of each completed worker the end stays: outcome and failures, and what is needed to compute a result again; and what fences."""
    folders: dict[str, list[str]] = {}
    for key in store.list(prefix):
        folder, _, name = key.rpartition("/")
        if record_number(name) is not None:
            folders.setdefault(folder, []).append(key)
    for folder, keys in folders.items():
        log = StoredLog(store, f"{folder}/")
        head = log.newest()
        if head is None or head.kind != "end" or head.outcome is None or head.outcome.status != "completed":
            continue
        snapshot, last = head.snapshot, head.number
        if snapshot is not None and head.outcome.recorded and len(bytes(snapshot.state)) + len(bytes(snapshot.tracked)) > CONDENSE_BYTES:
            last += int(log.run(condense(head, time.time())))
        for key in keys:
            number = record_number(key.rpartition("/")[2]) or 0
            if number != last and (number > head.token or not _fences(log, number)):
                store.delete(key)


def _fences(log: StoredLog, number: int) -> bool:
    """Whether a record has the number that an older attempt would write next: it may wake up long after the run was closed."""
    data = log.store.get(log.prefix + record_name(number))
    record = decode_record(data, number) if data is not None else None
    return record is None or (record.kind == "claim" and record.snapshot is None and bool(record.predecessor))


# --- saying ---------------------------------------------------------------------------------------------------------


def _in_use(head: runs.RunRecord) -> RunInUseError:
    driver = head.driver
    text = (
        f"run {head.run!r} is in use: {_who(head)} has it, and lives. Wait until it ends, end it, or take the run from it with "
        f"init(run={head.run!r}, takeover=True); what it then still writes does not count"
    )
    return RunInUseError(text, run=head.run, host=driver.host, pid=driver.pid, since=head.at)


def _who(head: runs.RunRecord) -> str:
    return f"{head.driver.host} pid {head.driver.pid}, since {_clock(head.at)},"


def _opened(before: runs.RunRecord, how: str) -> str:
    return f"opened {_clock(before.opened_at)} by {before.driver.host} pid {before.driver.pid} ({how})"


def _clock(at: float) -> str:
    """The time of day; with the date if it was another day."""
    moment, today = dt.datetime.fromtimestamp(at).astimezone(), dt.datetime.now().astimezone().date()
    return f"{moment:%H:%M:%S}" if moment.date() == today else f"{moment:%Y-%m-%d %H:%M:%S}"


def _counts(known: list[StoredWorker]) -> str:
    completed = sum(state.status == "completed" for state, _ in known)
    rest = f", {len(known) - completed} resume" if len(known) > completed else ""
    return f"{completed} of {len(known)} workers completed{rest}."
