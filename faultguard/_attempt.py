"""One attempt of a worker: claim it, run the body, and record how that ended.

Exceptions are retried here, in the process, through tenacity. The death of the process is Ray's to retry. The budget is one,
and it stands in the log.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import time
import traceback
from dataclasses import dataclass, field, replace
from datetime import timedelta
from typing import TYPE_CHECKING, Any, NoReturn

import msgspec

from faultguard import _codec, _events, _ray, _soon
from faultguard._cancels import is_cancelled
from faultguard._core import log as rules
from faultguard._core.budget import Policy, charge, exhausted, is_charged, poison_batch
from faultguard._core.records import Ended, FailureRecord, Outcome, Owner, Record, Snapshot
from faultguard._core.schedule import Every, Schedule
from faultguard._deferred import Deferred
from faultguard._elsewhere import BegunError, Elsewhere, NotBegunError, failed_on, failures_before
from faultguard._footguns import tell
from faultguard._handle import Checkpoint
from faultguard._journal import Journal, insist, superseded
from faultguard._log import StoredLog
from faultguard._probe import ending_of
from faultguard._process import ProcessId, is_dead, new_writer, this_process
from faultguard._sentences import (
    LONG_WAIT_S,
    say_completed_already,
    say_damaged,
    say_from_zero,
    say_given_up,
    say_leaves,
    say_quarantined,
    say_resumed,
)
from faultguard._session import TaskContext, entered, leave_all
from faultguard._settings import Settings, checked_store
from faultguard._stops import CALLS, Cancelled, Drained
from faultguard._worker import OpenWorker, failure_of, held_here, leave_process
from faultguard.errors import (
    CheckpointNotSerializableError,
    CheckpointStoreError,
    DuplicateWorkerError,
    FaultguardError,
    ManagerUnavailableError,
    RunMismatchError,
    StalledError,
    SupersededError,
    max_failures_exceeded,
)
from faultguard.policy import Backoff, Matcher, OnPoison, matches, verdict

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from faultguard.storage import Store

__all__ = ["TaskOptions", "Work", "cause_of_leaving", "check_arguments", "open_worker", "run_task"]

MAX_RESULT_BYTES = 1 << 20
MAX_INLINE_BYTES = 30_000  # of a value as it is written here: Ray's pickle of it, up to three times as long, then travels in the reply
DEFAULT_KEEP = 3
HOLDER_POLL_S = 0.2
PROBE_WAIT_S = 90.0  # for a look at the node of a silent holder
MANAGER_WAIT_S = 10.0


@dataclass(frozen=True, slots=True)
class TaskOptions:
    """The options of `recoverable`, checked. `max_failures` None: what `init` says."""

    name: str
    max_failures: int | None = None
    worker_id: str | Callable[..., str] | None = None
    state: Mapping[str, Any] | None = None
    every: Every = "auto"
    keep: int = DEFAULT_KEEP
    retry_on: Matcher = Exception
    give_up_on: Matcher = ()
    backoff: Backoff = field(default_factory=Backoff)
    stall_timeout_s: float | None = None
    reset_on_progress: bool = False
    fresh_process_on: Matcher = ()
    on_poison: OnPoison = "fail"


@dataclass(frozen=True, slots=True)
class Work:
    """What a task is to do: `call` runs the function on fresh arguments; not `repeatable` where those cannot be had twice.

    `arguments` are digests of the plain ones, for the record; `afresh` begins the worker anew.
    """

    call: Callable[[], Any]
    repeatable: bool
    arguments: dict[str, str] = field(default_factory=dict)
    afresh: bool = False


# --- claiming -------------------------------------------------------------------------------------------------------


def open_worker(
    settings: Settings,
    identity: _ray.Identity,
    options: TaskOptions,
    worker_id: str,
    *,
    max_failures: int,
    local_retry: int = 0,
    leaves: bool = False,
    volatile: bool = False,
    afresh: bool = False,
    elsewhere: Elsewhere | None = None,
) -> OpenWorker | rules.Finished:
    """Claim a worker and restore what it saved. `leaves`: Ray runs its task again when it leaves a node that is drained.

    `volatile`: its claim need not be durable, if it begins the log. `afresh`: what other tasks have done under this id does not count.
    `elsewhere`: how its task gets, or has got, to another node.

    Raises:
        BegunError: an attempt that was sent to another node has begun.
        SupersededError: a later attempt of the same work has begun already.
        DuplicateWorkerError: another live task holds the worker.
        CheckpointStoreError: there is no store here, or it has failed for too long.
    """
    log, me = _claimant(
        settings,
        identity,
        options,
        worker_id,
        max_failures=max_failures,
        local_retry=local_retry,
        asks=identity.attempt > 0 or settings.named,  # also after the holder of another driver, whom nobody waits for
        afresh=afresh,
        volatile=volatile,
        sent=elsewhere is not None and elsewhere.waits,
        beside=elsewhere.beside if elsewhere is not None else -1,
    )
    try:
        return _open(log, me, settings, identity, options, leaves=leaves)
    except BaseException as error:
        if elsewhere is not None and not isinstance(error, BegunError):
            elsewhere.withdraw()
        _give_back(log, me.owner, cause_of_leaving(error))
        raise


def _claimant(
    settings: Settings,
    identity: _ray.Identity,
    options: TaskOptions,
    worker_id: str,
    *,
    max_failures: int,
    local_retry: int = 0,
    **more: Any,
) -> tuple[StoredLog, rules.Claimant]:
    """The log of a worker, and who this attempt is; `more` of a claimant."""
    log = StoredLog(_store(settings, identity, options.name, worker_id), settings.log_prefix(options.name, worker_id))
    process = this_process()
    owner = Owner(
        writer=new_writer(),
        task_id=identity.task_id,
        ray_attempt=identity.attempt,
        local_retry=local_retry,
        epoch=settings.epoch,
        node_id=identity.node_id,
        boot_id=process.boot_id,
        pid=process.pid,
        start_time=process.start_time,
        ray_worker=identity.ray_worker,
    )
    return log, rules.Claimant(
        owner=owner,
        task=options.name,
        worker_id=worker_id,
        max_failures=max_failures,
        named_run=settings.named,
        policy=Policy(options.reset_on_progress, options.on_poison == "skip"),
        unrecorded=identity.attempt > 0 and worker_id == identity.task_id,
        **more,
    )


def _may_defer(settings: Settings, identity: _ray.Identity, options: TaskOptions, worker_id: str, local_retry: int) -> bool:
    """Whether nobody can have claimed the worker before, or can ask for it: it is new work, and its id is that of the task."""
    new = worker_id == identity.task_id and not (identity.attempt or local_retry or identity.home_id)
    return new and settings.defer > 0 and not settings.named and options.stall_timeout_s is None and _soon.is_running()


def defer_worker(settings: Settings, identity: _ray.Identity, options: TaskOptions, worker_id: str, *, max_failures: int) -> Deferred:
    """Begin to work on what nobody else can have, and claim it when that is worth its price.

    Raises:
        CheckpointStoreError: there is no store here.
    """
    log, me = _claimant(settings, identity, options, worker_id, max_failures=max_failures, late=True)
    schedule = Schedule(options.every, time.monotonic())
    handle = Checkpoint(
        run=settings.run, task=options.name, worker_id=worker_id, journal=None, snapshot=None, schedule=schedule, state=options.state
    )
    return Deferred(
        handle,
        schedule,
        options.keep,
        patience_s=settings.store_patience,
        after_s=settings.defer,
        trouble=_StoreTrouble(options.name, worker_id, settings.store_patience),
        claims=functools.partial(_claim_late, log, me, settings, identity),
    )


def _claim_late(
    log: StoredLog, me: rules.Claimant, settings: Settings, identity: _ray.Identity, *, deferred: Deferred, patience_s: float
) -> OpenWorker:
    """Claim a worker that works already, and let its handle go on with its journal."""
    if deferred.skips_poison is not None:
        me = replace(me, policy=replace(me.policy, skip_poison=deferred.skips_poison))
    try:
        granted = _granted(insist(functools.partial(_claim_once, log, me), patience_s, deferred.trouble), me, settings)
        journal = Journal(log, granted.held, deferred.schedule, deferred.keep, settings.store_patience)
        deferred.take_over(journal, granted.held.token)
        return OpenWorker(settings, identity, journal, deferred.handle, leaves=True)
    except (SupersededError, DuplicateWorkerError, CheckpointStoreError):  # there is nothing to give back, or it is tried again
        raise
    except BaseException as error:
        cause = cause_of_leaving(error)
        if not is_charged(cause, progressed=False):  # else it is a crash to whoever comes next: the body has run
            _give_back(log, me.owner, cause)
        raise


def _granted(
    answer: rules.Granted | rules.Finished | rules.Blocked | rules.Refused, me: rules.Claimant, settings: Settings
) -> rules.Granted:
    """What a late claim needs: the log was empty. Raises what it is told of whoever is there."""
    if isinstance(answer, rules.Granted):
        return answer
    head = answer.record if isinstance(answer, rules.Finished) else answer.head
    raise superseded(me.worker_id, 1, 0) if rules.same_task(head.owner, me.owner) else _duplicate(me, head, settings)


def _store(settings: Settings, identity: _ray.Identity, task: str, worker_id: str) -> Store:
    """The store of the run. An attempt that follows another one waits for it; a first one that finds none is told at once."""
    if not identity.attempt:
        return checked_store(settings)
    return insist(lambda: checked_store(settings), settings.store_patience, _StoreTrouble(task, worker_id, settings.store_patience))


class _StoreTrouble:
    """Says once that a claim waits for the store."""

    def __init__(self, task: str, worker_id: str, patience_s: float) -> None:
        self._fields = {"task": task, "worker_id": worker_id}
        self._text = f"'{task}/{worker_id}' cannot begin: {{}}. It tries again, and gives up after {patience_s:g} s."
        self._told = False

    def __call__(self, error: CheckpointStoreError) -> None:
        if not self._told:
            self._told = True
            _events.emit(
                logging.WARNING, "faultguard.store_failed", self._text.format(str(error).rstrip(".")), **self._fields, error=str(error)
            )


def _death_of(head: Record) -> tuple[str, str, str]:
    """Who held the worker, what its process died of, and where it stood: for the history only, so what cannot be found out is a crash."""
    owner = head.owner
    try:
        ending = ending_of(ProcessId(owner.boot_id, owner.pid, owner.start_time))
        if ending is not None:
            return owner.writer, ending.cause, ending.stacks
        return owner.writer, (_ray.death_of(owner.ray_worker) if owner.ray_worker else None) or "crash", ""
    except Exception as trouble:  # noqa: BLE001 - it must not keep anybody from the work
        _events.emit(logging.DEBUG, "faultguard.death_unknown", f"what the last attempt died of is not known: {trouble}")
    return owner.writer, "crash", ""


def _give_back(log: StoredLog, owner: Owner, cause: str) -> None:
    """Cut between the claim and the handle: say so in the log, or a process that lives on would hold the worker for ever."""
    held_here.pop(owner.writer, None)
    try:
        head = log.newest()
        if head is not None and head.owner.writer == owner.writer and (head.snapshot, head.ended, head.outcome) == (None, None, None):
            log.run(rules.give_back(head, time.time(), Ended(cause, charged=False)))
    except Exception as trouble:  # noqa: BLE001 - what cut the claim goes on, whatever the store says
        text = f"worker {owner.writer} could not be given back: {trouble}"
        _events.emit(logging.ERROR, "faultguard.leave_failed", text, error=repr(trouble))


def _open(
    log: StoredLog, me: rules.Claimant, settings: Settings, identity: _ray.Identity, options: TaskOptions, *, leaves: bool
) -> OpenWorker | rules.Finished:
    """Claim, and make the handle."""
    granted = _claim(log, me, settings)
    if isinstance(granted, rules.Finished):
        return granted
    schedule = Schedule(options.every, time.monotonic())
    journal = Journal(log, granted.held, schedule, options.keep, settings.store_patience)
    handle = _handle(settings, options, journal, schedule, granted.snapshot)
    if granted.damaged:
        say_damaged(handle, granted.damaged)
    if identity.attempt and not identity.is_guess and granted.head is None:
        say_from_zero(handle)
    if granted.held.attempt > 1 and granted.held.failures:
        say_resumed(handle, granted.held, me.max_failures, beside=True)
    if granted.head is not None and granted.head.life == granted.held.life:
        say_quarantined(handle, granted.held, granted.head.quarantined, beside=True)
    return OpenWorker(settings, identity, journal, handle, leaves=leaves)


def _handle(settings: Settings, options: TaskOptions, journal: Journal, schedule: Schedule, snapshot: Snapshot | None) -> Checkpoint:
    held = journal.held
    handle = Checkpoint(
        run=settings.run,
        task=held.task,
        worker_id=held.worker_id,
        journal=journal,
        snapshot=snapshot,
        schedule=schedule,
        life=held.life,
        attempt=held.attempt,
        token=held.token,
        failures=held.failures,
        quarantined=held.quarantined,
        state=options.state,
        instance=settings.instance,
        epoch=settings.epoch,
    )
    handle.guard.limit(options.stall_timeout_s)
    return handle


def _claim(log: StoredLog, me: rules.Claimant, settings: Settings) -> rules.Granted | rules.Finished:
    """Claim, waiting for a holder of another task until it is known dead.

    Raises:
        BegunError: an attempt that was sent to another node has begun.
    """
    deadline = time.monotonic() + settings.heartbeat_timeout
    watched: tuple[int, float] | None = None  # newest record of the holder, and since when it is the newest
    trouble = _StoreTrouble(me.task, me.worker_id, settings.store_patience)
    while True:
        answer = insist(functools.partial(_claim_once, log, me), settings.store_patience, trouble)
        if isinstance(answer, (rules.Granted, rules.Finished)):
            return answer
        blocked = _blocked(answer, me)
        head, now = blocked.head, time.monotonic()
        if blocked.dead:
            me = replace(me, crashed=_death_of(head))
            continue
        owner = head.owner
        dead = is_dead(holder := ProcessId(owner.boot_id, owner.pid, owner.start_time))
        if holder == this_process():  # of this very process: it knows what it still holds
            if owner.writer in held_here:
                raise _duplicate(me, head, settings)
            dead = True
        if watched is None or watched[0] != head.number:
            watched = (head.number, now)
        waited = dead is None and now - watched[1] >= settings.heartbeat_timeout
        silent = _is_silent(settings, me) if waited else False
        if dead or silent or _has_given_up(settings, me, head):
            me = replace(me, gone=head.token, crashed=_death_of(head))
        elif now >= deadline + (HOLDER_POLL_S if silent is False else PROBE_WAIT_S):
            raise _duplicate(me, head, settings)
        else:
            time.sleep(HOLDER_POLL_S)


def _blocked(answer: rules.Blocked | rules.Refused, me: rules.Claimant) -> rules.Blocked:
    """Whom to wait for, if that is worth it."""
    if isinstance(answer, rules.Refused):
        raise superseded(me.worker_id, answer.head.attempt - 1, 0)
    if rules.is_beside(answer.head, me):
        raise BegunError
    return answer


def _claim_once(log: StoredLog, me: rules.Claimant) -> rules.Granted | rules.Finished | rules.Blocked | rules.Refused:
    return log.run(rules.claim(me, time.time()))


def _has_given_up(settings: Settings, me: rules.Claimant, head: Record) -> bool:
    """Whether the holder lives on without the worker: it said so with its final beat, and a store that was away has no note of it."""
    heard = _last_beat(settings, me)
    return heard is not None and heard["final_token"] == head.token


def _last_beat(settings: Settings, me: rules.Claimant) -> dict[str, Any] | None:
    """What the manager has heard of the holder; None: it cannot be asked."""
    from faultguard._manager import ask

    def last_beat(manager: Any) -> Any:
        return manager.last_beat.remote(me.task, me.worker_id)

    try:
        heard: dict[str, Any] = ask(settings, last_beat, MANAGER_WAIT_S, MANAGER_WAIT_S)
    except (ManagerUnavailableError, *_ray.UNREACHABLE):
        return None
    return heard


def _is_silent(settings: Settings, me: rules.Claimant) -> bool | None:
    """Whether the manager has watched for long enough and heard nothing of the holder; None: it has, and asks on its node if it lives.

    Not to know is not silence.
    """
    heard = _last_beat(settings, me)
    if heard is None:
        return False
    if heard["age_s"] is None:
        return bool(heard["uptime_s"] >= settings.heartbeat_timeout)
    return (heard["doubted"] or None) if heard["age_s"] >= settings.heartbeat_timeout else False


def _duplicate(me: rules.Claimant, head: Record, settings: Settings) -> DuplicateWorkerError:
    owner = head.owner
    msg = (
        f"worker {me.worker_id!r} of task {me.task!r} is held by another live task (attempt {head.attempt}, token {head.token}, node "
        f"{owner.node_id[:8]}, pid {owner.pid}), which was not silent for heartbeat_timeout={settings.heartbeat_timeout:g} s. Give each "
        f"task a worker_id of its own, or ray.cancel() the other one first"
    )
    return DuplicateWorkerError(msg, worker_id=me.worker_id)


# --- running --------------------------------------------------------------------------------------------------------


def run_task(
    settings: Settings,
    identity: _ray.Identity,
    options: TaskOptions,
    worker_id: str,
    work: Work,
    *,
    elsewhere: Elsewhere | None = None,
    local_retry: int = 0,
) -> Any:
    """Run a decorated task to its outcome: the value, or the error that Ray is to report. `elsewhere`: it may go to another node."""
    max_failures = options.max_failures if options.max_failures is not None else settings.max_failures
    if not identity.attempt:  # else its log is to say so, too
        _raise_if_cancelled(settings, options.name, worker_id)
    newest = functools.partial(_newest, settings, options.name, worker_id)
    moves = elsewhere is not None and identity.attempt > 0 and failed_on(identity.node_id, failures_before(newest()))
    begun = functools.partial(_has_begun, settings, identity, options.name, worker_id)
    try:
        while True:
            if elsewhere is not None and moves:
                try:
                    return elsewhere.run(local_retry, begun, leave_process)
                except NotBegunError as error:
                    local_retry = error.local_retry
            opened: OpenWorker | Deferred | rules.Finished
            if _may_defer(settings, identity, options, worker_id, local_retry):
                opened = defer_worker(settings, identity, options, worker_id, max_failures=max_failures)
            else:
                opened = open_worker(
                    settings,
                    identity,
                    options,
                    worker_id,
                    max_failures=max_failures,
                    local_retry=local_retry,
                    leaves=True,
                    volatile=not identity.attempt and options.stall_timeout_s is None and settings.defer > 0,
                    afresh=work.afresh,
                    elsewhere=elsewhere,
                )
            if isinstance(opened, rules.Finished):
                if (opened.record.owner.task_id, opened.record.owner.epoch) != (identity.task_id, settings.epoch):
                    _check_recorded(opened.record, settings, work)
                return _recorded(opened, settings, options, work, max_failures)
            value = _Task(opened, settings, identity, options, work=work, max_failures=max_failures, elsewhere=elsewhere).run()
            if not isinstance(value, _Moves):
                return value
            moves, local_retry = True, value.local_retry
    except BegunError:
        assert elsewhere is not None  # noqa: S101 - who has sent it
        return elsewhere.outcome(leave_process)
    finally:
        leave_all()


def stays_with_its_owner(value: Any) -> bool:
    """Whether Ray sends a value with the reply: it cannot be lost then, and the task that made it is not run again."""
    if value is None:
        return True
    try:
        return len(_codec.encode(value, path="return value")) <= MAX_INLINE_BYTES
    except CheckpointNotSerializableError:
        return False


def _raise_if_cancelled(settings: Settings, task: str, worker_id: str) -> None:
    if is_cancelled(settings, worker_id):
        raise Cancelled(f"'{task}/{worker_id}' was cancelled by {CALLS} before it began")


def _check_recorded(record: Record, settings: Settings, work: Work) -> None:
    """The outcome of another task is given: it must be of the same arguments, and whoever asks twice is told."""
    if record.outcome is not None:
        check_arguments(record.task, record.worker_id, record.outcome, work.arguments)
    if record.owner.epoch == settings.epoch:
        then = "its recorded result is given, and nothing is run. Give new work an id of its own, or start it over with"
        say_completed_already(record, settings, f"{then} .options(resume='never').")


def check_arguments(task: str, worker_id: str, outcome: Outcome, arguments: Mapping[str, str]) -> None:
    """Refuse an outcome that was made of other arguments.

    Raises:
        RunMismatchError: some of them, that can be compared, differ.
    """
    differ = sorted(name for name, digest in arguments.items() if outcome.arguments.get(name, digest) != digest)
    if differ:
        text = (
            f"worker {worker_id!r} of task {task!r} is on record with other arguments: {', '.join(differ)} differ, so its result is "
            f"not the one that is asked for. Give the new work an id of its own, or start it over with .options(resume='never'); "
            f"init(check_args=False) takes the result as it is"
        )
        raise RunMismatchError(text, worker_id=worker_id, arguments=tuple(differ))


@dataclass(frozen=True, slots=True)
class _Moves:
    """In the place of a value: the attempt has left its worker, and the next one, which orders itself so, prefers another node."""

    local_retry: int


def _newest(settings: Settings, task: str, worker_id: str) -> Record | None:
    """The newest record of a worker; None where there is none, or it cannot be read, which the claim tells."""
    with contextlib.suppress(FaultguardError):
        return StoredLog(checked_store(settings), settings.log_prefix(task, worker_id)).newest()
    return None


def _has_begun(settings: Settings, identity: _ray.Identity, task: str, worker_id: str, local_retry: int) -> bool | None:
    """Whether a retry of this attempt of Ray's has claimed the worker; None: that cannot be read."""
    me = Owner("", task_id=identity.task_id, ray_attempt=identity.attempt, epoch=settings.epoch)
    with contextlib.suppress(FaultguardError):
        newest = StoredLog(checked_store(settings), settings.log_prefix(task, worker_id)).run(rules.newest_of_task(me))
        return newest is not None and rules.is_of_retry(newest, me, local_retry)
    return None


def _recorded(finished: rules.Finished, settings: Settings, options: TaskOptions, work: Work, max_failures: int) -> Any:
    """Give the outcome that stands in the log; a value that could not be recorded is computed by the finished loops."""
    record = finished.record
    outcome = record.outcome
    if outcome is None or outcome.status == "failed":
        raise max_failures_exceeded(
            record.worker_id, record.failures, max_failures=max_failures, poison_batch=poison_batch(record.failures)
        )
    if outcome.recorded:
        return _codec.decode(bytes(outcome.value))
    handle = Checkpoint.in_memory(
        task=options.name,
        worker_id=record.worker_id,
        run=settings.run,
        instance=settings.instance,
        snapshot=record.snapshot,
        state=options.state,
        quarantined=record.quarantined,
    )
    with entered(TaskContext(handle, settings)):
        return work.call()


class _Task:
    """A claimed task: its attempts in this process, one after another."""

    def __init__(
        self,
        opened: OpenWorker | Deferred,
        settings: Settings,
        identity: _ray.Identity,
        options: TaskOptions,
        *,
        work: Work,
        max_failures: int,
        elsewhere: Elsewhere | None = None,
    ) -> None:
        self._settings = settings
        self._identity = identity
        self._options = options
        self._work = work
        self._opened = opened
        self._max_failures = max_failures
        self._elsewhere = elsewhere
        self._moves: _Moves | None = None
        self._wait_s: float | None = None  # what a predicate said
        self._retried = False  # whether the last exception is one that is retried at all

    @property
    def _open(self) -> OpenWorker:
        """The worker; claims it if that was deferred."""
        if isinstance(self._opened, Deferred):
            self._opened = self._opened.claim()
        return self._opened

    @property
    def _journal(self) -> Journal:
        return self._open.journal

    def _is_over(self) -> bool:
        """Whether nobody has claimed the worker, nor will: what was begun leaves nothing."""
        return isinstance(self._opened, Deferred) and self._opened.finish()

    def run(self) -> Any:
        """All attempts of this process. What is no `Exception` is noted, and goes its way."""
        try:
            if self._identity.attempt:
                _raise_if_cancelled(self._settings, self._options.name, self._journal.held.worker_id)
            return self._attempts()
        except Exception:
            raise
        except BaseException as error:  # also during the wait before a retry
            self._leave(error)
            raise
        finally:
            if isinstance(self._opened, Deferred) and not self._is_over():  # claimed at the very end, by the thread that looks
                self._open.leave(Ended("left", charged=True), failure_of(self._open.handle, self._identity, "left", ""))

    def _attempts(self) -> Any:
        """The first attempt, and those that follow it here."""
        try:
            return self._attempt()
        except Exception as error:  # noqa: BLE001 - whatever the user's code raises is what this library is for
            first = error
        return self._retry(first)  # outside of the handler, or every later error would drag the first one along

    def _retry(self, first: Exception) -> Any:  # noqa: RET503 - `_give_up` never returns
        """Go on after a first failure, through tenacity."""
        import tenacity  # 40 ms: a task that does not fail does not pay for it

        backoff = self._options.backoff
        exponential = tenacity.wait_random_exponential if backoff.jitter else tenacity.wait_exponential
        wait = exponential(multiplier=backoff.initial, exp_base=backoff.factor, max=backoff.maximum)
        pending = [first]

        def attempt() -> Any:
            if pending:
                raise pending.pop()
            return self._moves or self._attempt()

        retrying = tenacity.Retrying(
            retry=tenacity.retry_if_exception(self._survives),
            wait=lambda state: self._wait_s if self._wait_s is not None else wait(state),
            before_sleep=self._record_failure,
            sleep=self._sleep,
            reraise=True,
        )
        try:
            return retrying(attempt)
        except Exception as error:  # noqa: BLE001 - as above
            last = error
        self._give_up(last)

    def _attempt(self) -> Any:
        """One execution of the body."""
        handle, deferred = self._opened.handle, isinstance(self._opened, Deferred)
        local_retry = 0 if deferred else self._journal.held.owner.local_retry
        task = TaskContext(handle, self._settings, self._identity, local_retry, decorated=True)
        try:
            with entered(task):
                value = self._work.call()
        finally:
            stalled = handle.guard.end()  # from here on nothing is raised into this thread
        if stalled is not None:
            raise stalled
        handle.raise_if_superseded()  # the body may have swallowed it
        self._complete(value)
        return value

    def _complete(self, value: Any) -> None:
        """Record the outcome with the last state; where the value would have to be computed again, with one that leads to it.

        A function that returned from within a loop cannot give its value once that loop is done.
        """
        handle = self._opened.handle
        before = handle.before_return
        last = handle.finish()
        handle.returns(value)
        if isinstance(self._opened, Deferred) and stays_with_its_owner(value) and self._is_over():
            return
        outcome = self._outcome(value)
        self._journal.end(outcome, last if before is None or outcome.recorded else before[0])
        self._open.close("completed")

    def _outcome(self, value: Any) -> Outcome:
        """The outcome with the return value, unless that has to be computed again if it is ever asked for."""
        try:
            data = _codec.encode(value, path="return value")
        except CheckpointNotSerializableError as error:
            why = str(error)
        else:
            if len(data) <= MAX_RESULT_BYTES:
                return Outcome("completed", recorded=True, value=msgspec.Raw(data), arguments=self._work.arguments)
            why = f"it takes {len(data)} bytes, the limit is {MAX_RESULT_BYTES}"
        tell(
            self._open.handle,
            "result_not_recorded",
            f"has a return value that cannot be recorded ({why}). If it is asked for again, the function is called again with its loops "
            f"done. Return plain values, or write the result to a file and return its path.",
        )
        return Outcome("completed", arguments=self._work.arguments)

    # --- failures ---

    def _survives(self, error: BaseException) -> bool:
        """Whether the attempt that raised `error` is followed by another one of this budget."""
        if not isinstance(error, Exception) or isinstance(error, SupersededError):
            return False
        answer = self._verdict(error)
        self._retried = answer is not False
        if not self._retried:
            return False
        self._wait_s = answer.total_seconds() if isinstance(answer, timedelta) else None
        held = self._journal.held
        return not exhausted(charge(held.budget, self._open.failure(error), held.policy).charged, self._max_failures)

    def _verdict(self, error: Exception) -> bool | timedelta:
        """What the options say about an exception; a predicate that raises says nothing, and must not take its place."""
        retry_on = self._options.retry_on if not isinstance(error, StalledError) else StalledError  # which nobody thinks of naming
        try:
            return verdict(error, retry_on, self._options.give_up_on)
        except Exception as trouble:  # noqa: BLE001 - a user's predicate may raise anything
            self._say_predicate_failed(error, trouble, "not retried")
            return False

    def _distrusts(self, error: Exception) -> bool:
        """Whether the process is not to be used any more after an exception; likewise."""
        try:
            return bool(matches(error, self._options.fresh_process_on))
        except Exception as trouble:  # noqa: BLE001 - as above
            self._say_predicate_failed(error, trouble, "a new process goes on")
            return True

    def _say_predicate_failed(self, error: Exception, trouble: Exception, then: str) -> None:
        text = f"a predicate of task {self._options.name!r} raised {trouble!r} when asked about {type(error).__name__}; {then}"
        _events.emit(logging.ERROR, "faultguard.predicate_failed", text, **self._open.handle.fields(), error=repr(trouble))

    def _record_failure(self, state: Any) -> None:
        """Before the wait: the failure, the newest snapshot and the next claim, in one record. Then a new handle."""
        error = state.outcome.exception()
        failure = self._open.failure(error)
        traceback.clear_frames(error.__traceback__)  # what the failed attempt held must not meet the next one
        if self._distrusts(error):
            self._leave_to_ray(failure, "it is not trusted after that exception (fresh_process_on)")
        if not self._work.repeatable:
            self._leave_to_ray(failure, "the arguments are too large, or hold references, to be kept for a retry in this one")
        if self._goes_elsewhere(failure):
            return
        before, journal, quarantined = self._open, self._journal, self._journal.held.quarantined
        before.close("recovered")
        try:
            journal.retry(failure)
        except Exception as refused:
            raise refused from error
        schedule = Schedule(self._options.every, time.monotonic())
        reopened = journal.reopened(schedule, self._options.keep)
        handle = _handle(self._settings, self._options, reopened, schedule, journal.held.durable)
        self._opened = OpenWorker(self._settings, self._identity, reopened, handle, leaves=True)
        say_resumed(handle, journal.held, self._max_failures, state.next_action.sleep)
        say_quarantined(handle, journal.held, quarantined)

    def _goes_elsewhere(self, failure: FailureRecord) -> bool:
        """After the second failure in a row on this node: leave the worker to an attempt on another one, if there is one."""
        held = self._journal.held
        if self._elsewhere is None or not failed_on(self._identity.node_id, (*held.failures, failure)) or not self._elsewhere.is_there():
            return False
        self._moves = _Moves(held.owner.local_retry + 1)
        self._open.give_up(Ended(failure.cause, charged=True), failure, self._settings.store_patience)
        self._open.close("recovered")
        return True

    def _leave_to_ray(self, failure: FailureRecord, why: str) -> NoReturn:
        """No further attempt in this process: let Ray start another one, and bring the arguments as first passed."""
        self._open.give_up(Ended(failure.cause, charged=True), failure, self._settings.store_patience)
        self._open.close("recovered")
        say_leaves(self._open.handle, failure, why)
        leave_process()

    def _give_up(self, error: Exception) -> NoReturn:
        """No attempt follows: record that, and raise what the caller of `ray.get` is to see."""
        if isinstance(error, (SupersededError, CheckpointStoreError)) and self._is_over():  # it is not to be claimed now, either
            raise error
        journal = self._journal
        if isinstance(error, SupersededError):
            self._open.close("recovered")
            raise error
        if isinstance(error, CheckpointStoreError):  # nobody's failure: who starts it again, when the store is back, goes on
            self._open.leave(Ended("store", charged=False))
            raise error
        failure = self._open.failure(error)
        try:
            journal.end(Outcome("failed", message=failure.message), journal.newest, failure)
        finally:
            self._open.close("failed")
        say_given_up(self._open.handle, failure, self._max_failures if self._retried else None)
        if not self._retried:
            raise error
        failures = journal.held.failures
        raise max_failures_exceeded(
            journal.held.worker_id,
            failures,
            max_failures=self._max_failures,
            last_exception=error,
            poison_batch=poison_batch(failures),
        )

    def _leave(self, error: BaseException) -> None:
        """Cancel, exit and the like: flush the newest snapshot with a note, and stay out of the way."""
        if self._is_over():
            return  # whoever comes after it counts one failure, as of whatever ends without progress
        cause = cause_of_leaving(error)
        charged = is_charged(cause, progressed=self._journal.newest is not self._open.handle.restored)
        failure = self._open.failure(error, cause) if charged else None
        self._open.leave(Ended(cause, charged), failure)

    def _sleep(self, seconds: float) -> None:
        """Wait before a retry. On the main thread, blocked in `ray.get`, so that Ray lends the processor to others."""
        deadline = time.monotonic() + seconds
        if seconds > LONG_WAIT_S:
            from faultguard._manager import find_or_make

            with contextlib.suppress(ManagerUnavailableError, *_ray.UNREACHABLE):  # then the rest is slept
                _ray.get_within(find_or_make(self._settings, wait_s=seconds).pause.remote(seconds), deadline - time.monotonic())
        left = deadline - time.monotonic()
        if left > 0:  # a sleep of no time, too, gives the processor away
            time.sleep(left)


def cause_of_leaving(error: BaseException) -> str:
    """What a note in the log calls the end of an attempt that `error` cuts."""
    if isinstance(error, StalledError):
        return "stall"
    if isinstance(error, Drained):
        return "drained"
    if isinstance(error, Exception):
        return "exception"
    if isinstance(error, (KeyboardInterrupt, asyncio.CancelledError)):
        return "cancelled"  # Ray's cancel, and nothing else, interrupts a task, or a coroutine of an async actor
    if isinstance(error, SystemExit):
        return "terminated" if _ray.was_terminated(error) else "exit"
    return type(error).__name__
