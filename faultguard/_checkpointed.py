"""`with checkpointed(...)`, `current()` and `batches()`: the handle of a worker, where the user's code asks for it."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from typing import TYPE_CHECKING, Any, TypeVar

from faultguard import _attempt, _events, _ray, _session
from faultguard._core.log import Finished
from faultguard._core.names import check_worker_id
from faultguard._core.records import Ended, FailureRecord, Outcome
from faultguard._core.schedule import check_every
from faultguard._core.stall import check_timeout
from faultguard._handle import Checkpoint
from faultguard._sentences import say_completed_already
from faultguard.errors import UsageError
from faultguard.policy import check_on_poison

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping
    from datetime import timedelta
    from types import TracebackType

    from faultguard._core.schedule import Every
    from faultguard._settings import Settings
    from faultguard._worker import OpenWorker
    from faultguard.policy import OnPoison

__all__ = ["batches", "checkpointed", "current", "refuse_not_yet"]

T = TypeVar("T")
MIN_KEEP = 2


def refuse_not_yet(call: str, **given: tuple[object, object]) -> None:
    """Refuse options that belong to a later version: `name=(value, default)`."""
    for name, (value, default) in given.items():
        if value != default:
            msg = f"{call}({name}={value!r}) is refused: {name} does not work yet; leave it out"
            raise UsageError(msg)


class checkpointed:  # noqa: N801 - read as `with checkpointed(...)`
    """Open a worker for a block; gives its handle, with the state restored.

    In a decorated task, without an id or with the task's own, it is the handle of the task, to which the options then apply. With
    another id it is a worker of its own for heartbeats and checkpoints, while failures are charged to the task. In a task that is
    not decorated it registers, beats, checkpoints and resumes, and whoever calls decides about retries. In methods of async actors
    write `async with`.

    Args:
        worker_id: any text up to 512 bytes.
        state: copied and used when nothing is saved.
        every: how often to write: "auto" (at most 1 % of the worker's time), a number of batches, or a timedelta. None: as the
            decorator says, else "auto".
        keep: how many saves stay, at least 2. None: as before, else 3.
        stall_timeout: seconds (or a timedelta) without progress after which `StalledError` is raised in the batch, and in the end the
            process is ended. None: as the decorator or the block around says, else no limit.
        on_poison: as the decorator's option. In a task that is not decorated "skip" lets failures be counted, so that three in a row are
            known as such; whoever calls still decides about retries. None: as the decorator says, else "fail".
        allow_pickle: not yet.

    Raises:
        UsageError: an option cannot work, or there is no task and no id.
        DuplicateWorkerError: another live task holds the worker.

    >>> import faultguard
    >>> @faultguard.recoverable
    ... def count(items):
    ...     with faultguard.checkpointed(state={"n": 0}) as ckpt:
    ...         for item in ckpt.batches(items):
    ...             ckpt.state["n"] += item
    ...     return ckpt.state["n"]
    >>> count([1, 2, 3])  # called directly: in memory
    6
    """

    def __init__(
        self,
        worker_id: str | None = None,
        *,
        state: Mapping[str, Any] | None = None,
        every: Every | None = None,
        keep: int | None = None,
        stall_timeout: float | timedelta | None = None,
        on_poison: OnPoison | None = None,
        allow_pickle: bool = False,
    ) -> None:
        refuse_not_yet("checkpointed", allow_pickle=(allow_pickle, False))
        self._worker_id = check_worker_id(worker_id) if worker_id is not None else None
        self._state = Checkpoint.check_state(state)
        self._every = check_every(every) if every is not None else None
        self._keep = check_keep(keep) if keep is not None else None
        self._on_poison = check_on_poison("checkpointed", on_poison) if on_poison is not None else None
        self._stall_timeout_s = check_timeout("checkpointed(stall_timeout=", stall_timeout)
        self._opened: OpenWorker | None = None  # a worker of this block's own
        self._entered: _session.entered | None = None
        self._around: Checkpoint | None = None  # whose clock stands still

    def __enter__(self) -> Checkpoint:
        """Claim the worker, or take the handle of the task."""
        handle = self._without_claim()
        if handle is not None:
            return handle
        place = self._place()
        self._pause_around()
        try:
            return self._enter(self._open(*place))
        except BaseException:
            self._resume_around()
            raise

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        """End the worker of the block, or hand the task's handle back."""
        if self._entered is not None:
            self._entered.__exit__(kind, error, traceback)
        self._leave(error)

    async def __aenter__(self) -> Checkpoint:
        """As `with`, in methods of async actors: while the store, or another holder, is waited for, the other calls go on."""
        handle = self._without_claim()
        if handle is not None:
            return handle
        place = self._place()  # known only in this coroutine
        self._pause_around()
        opening = asyncio.ensure_future(asyncio.to_thread(self._open, *place))
        try:
            return self._enter(await asyncio.shield(opening))
        except BaseException as error:
            self._resume_around()
            if isinstance(error, asyncio.CancelledError):
                await self._give_back(opening, error)
            raise

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        """As at the end of `with`."""
        if self._entered is not None:
            self._entered.__exit__(kind, error, traceback)
        await asyncio.shield(asyncio.to_thread(self._leave, error))

    def _without_claim(self) -> Checkpoint | None:
        """The handle where none has to be claimed: that of the task or block around, or one in memory."""
        task = _session.context()
        around = task
        while around is not None and self._worker_id not in {None, around.handle.worker_id}:
            around = around.parent
        if around is not None:
            return self._use(around.handle)
        if task is not None and task.settings is None:
            handle = Checkpoint.in_memory(worker_id=self._worker_id or "direct", state=self._state)
            return self._enter(_session.TaskContext(handle, parent=task))
        return None

    async def _give_back(self, opening: asyncio.Future[Any], error: BaseException) -> None:
        """Cancelled while the worker was claimed: the thread that does it cannot be stopped, and nobody will end the block."""
        with contextlib.suppress(Exception):  # then there is nothing to give back
            await opening
        if self._opened is not None:
            await asyncio.to_thread(self._end, self._opened, error)

    def _leave(self, error: BaseException | None) -> None:
        stalled = self._handle.guard.end() if self._opened is not None else None
        try:
            if self._opened is not None:
                self._end(self._opened, error if error is not None else stalled)
            elif error is None:
                self._handle.leave_block(self._depth)
            if self._entered is not None:
                self._handle.close()
        finally:
            self._resume_around()
        if stalled is not None and error is None:
            raise stalled  # the body has swallowed it

    def _pause_around(self) -> None:
        """A worker of its own has its own clock: that of the task around it stands still meanwhile, claiming included."""
        task = _session.context()
        if task is not None:
            task.handle.guard.lend()
            self._around = task.handle

    def _resume_around(self) -> None:
        around, self._around = self._around, None
        if around is not None:
            around.guard.take_back()

    def _use(self, handle: Checkpoint) -> Checkpoint:
        """The handle of the task, with the options of this block."""
        self._handle = handle
        self._depth = handle.depth
        if self._state is not None:
            handle.default_state(self._state)
        handle.configure(self._every, self._keep, self._stall_timeout_s, self._on_poison)
        return handle

    def _enter(self, task: _session.TaskContext) -> Checkpoint:
        self._handle = task.handle
        self._depth = 0
        self._entered = _session.entered(task)
        self._entered.__enter__()
        return task.handle

    def _place(self) -> tuple[str, _session.TaskContext | None, Settings, _ray.Identity]:
        """Where a worker of its own is opened: its id, the task around it, in which run, as which task of Ray's."""
        if self._worker_id is None:
            msg = "checkpointed() without a worker_id needs a decorated task around it; write checkpointed('some-id'), or decorate the task"
            raise UsageError(msg)
        task = _session.context()
        settings = _session.current_settings()
        identity = task.identity if task is not None and task.identity is not None else _ray.identity()
        return self._worker_id, task, settings, identity

    def _open(self, worker_id: str, task: _session.TaskContext | None, settings: Settings, identity: _ray.Identity) -> _session.TaskContext:
        """A worker of its own."""
        identity = _ordered(identity)
        options = _attempt.TaskOptions(
            name=task.handle.task if task is not None else identity.task_name,
            state=self._state,
            every=self._every or "auto",
            keep=self._keep or _attempt.DEFAULT_KEEP,
            stall_timeout_s=self._stall_timeout_s or (task.handle.guard.timeout_s if task is not None else None),
            on_poison=self._on_poison or "fail",
        )
        local_retry = task.local_retry if task is not None else 0
        opened = _attempt.open_worker(
            settings, identity, options, worker_id, max_failures=-1, local_retry=local_retry, leaves=task is not None and task.decorated
        )
        if isinstance(opened, Finished):  # this task before it failed, or in a named run another one, has finished the block
            record = opened.record
            owner = record.owner
            mine = (settings.epoch, identity.task_id, identity.attempt, local_retry)
            if (owner.epoch, owner.task_id, owner.ray_attempt, owner.local_retry) == mine:
                msg = (
                    f"a second block checkpointed({worker_id!r}) is refused: this attempt has ended the first one, and its loops are "
                    f"done. Give each block an id of its own; what you retry by yourself goes into the block"
                )
                raise UsageError(msg)
            if settings.named and owner.epoch == settings.epoch and owner.task_id != identity.task_id:
                then = "the loops of its block are done, and yield nothing. Give new work an id of its own."
                say_completed_already(record, settings, then)
            handle = Checkpoint.in_memory(
                task=record.task,
                worker_id=record.worker_id,
                run=settings.run,
                instance=settings.instance,
                snapshot=record.snapshot,
                state=self._state,
                quarantined=record.quarantined,
            )
        else:
            self._opened = opened
            handle = opened.handle
        return _session.TaskContext(handle, settings, identity, local_retry, task is not None and task.decorated, parent=task)

    def _end(self, opened: OpenWorker, error: BaseException | None) -> None:
        """End a worker of this block's own: with an outcome, or with a note that it leaves. Its caller decides about retries."""
        if error is not None:
            opened.leave(*self._note(opened, error))
            return
        try:
            opened.journal.end(Outcome("completed"), self._handle.finish())
        except BaseException:
            opened.close("recovered")
            raise
        opened.close("completed")

    def _note(self, opened: OpenWorker, error: BaseException) -> tuple[Ended, FailureRecord | None]:
        """Why the block leaves. It has no budget; failures are counted only so that three in a row at one batch are seen."""
        cause = _attempt.cause_of_leaving(error)
        failure = opened.failure(error) if self._on_poison == "skip" and isinstance(error, Exception) else None
        return Ended(cause, charged=failure is not None), failure


def _ordered(identity: _ray.Identity) -> _ray.Identity:
    """With the order of a call that Ray repeats. Not to know it is to be told that a predecessor, should there be one, holds the worker."""
    try:
        return _ray.ordered(identity)
    except Exception as error:  # noqa: BLE001 - whatever Ray raises where its head does not answer
        text = f"how often the actor was started again is not known: {error!r}"
        _events.emit(logging.DEBUG, "faultguard.attempt_unknown", text, ray_worker=identity.ray_worker)
        return identity


def check_keep(keep: object) -> int:
    """How many saves stay.

    Raises:
        UsageError: not an int, or less than 2: one damaged record must not cost everything.
    """
    if isinstance(keep, bool) or not isinstance(keep, int) or keep < MIN_KEEP:
        msg = f"keep={keep!r} is refused; it takes the number of saves that stay, at least {MIN_KEEP}: one damaged record must not cost all"
        raise UsageError(msg)
    return keep


def current() -> Checkpoint:
    """The handle of the decorated task, or of the innermost `checkpointed` block, that this thread runs.

    Raises:
        UsageError: this thread runs none. A handle belongs to the thread of its task.
    """
    task = _session.context()
    if task is None:
        msg = (
            "faultguard.current() is refused: this thread runs no decorated task. Decorate the task with @faultguard.recoverable, or open "
            "`with faultguard.checkpointed(worker_id) as ckpt`; in a thread of your own, pass the handle on"
        )
        raise UsageError(msg)
    return task.handle


def batches(iterable: Iterable[T] | Callable[[int], Iterable[T]], *, name: str = "batches", total: int | None = None) -> Iterator[T]:
    """`current().batches(...)`: go through the batches that are not done, saving as it goes.

    >>> import faultguard
    >>> @faultguard.recoverable
    ... def shout(words):
    ...     said = faultguard.current().state.setdefault("said", [])
    ...     for word in faultguard.batches(words):
    ...         said.append(word.upper())
    ...     return said
    >>> shout(["a", "b"])
    ['A', 'B']
    """
    return current().batches(iterable, name=name, total=total)
