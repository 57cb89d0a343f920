"""Where this thread stands: in which run, in which task, with which handle."""

from __future__ import annotations

import contextvars
import os
import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING

from msgspec.structs import replace

from faultguard import _ray, _settings
from faultguard.errors import UsageError

if TYPE_CHECKING:
    from faultguard._handle import Checkpoint
    from faultguard._named import NamedRun
    from faultguard._settings import Settings

__all__ = [
    "TaskContext",
    "context",
    "count_cancel",
    "current_settings",
    "driver_settings",
    "driver_settings_or_none",
    "entered",
    "leave_all",
    "named_run",
    "run_has_ended",
    "set_driver_settings",
    "settings_to_submit",
    "starting",
]


@dataclass(slots=True)
class TaskContext:
    """One execution of a decorated task, or one block. `settings` None: called directly, with a handle in memory."""

    handle: Checkpoint
    settings: Settings | None = None
    identity: _ray.Identity | None = None
    local_retry: int = 0
    decorated: bool = False  # or inside of one that is: Ray runs it again
    parent: TaskContext | None = None  # of a block: the task or block around it


_context: contextvars.ContextVar[TaskContext | None] = contextvars.ContextVar("faultguard_task", default=None)
_driver: tuple[Settings, str] | None = None  # and the cluster that it is for
_named: NamedRun | None = None  # of this driver, if its run has a name
_lock = threading.RLock()


def context() -> TaskContext | None:
    """The decorated task that this thread runs."""
    return _context.get()


class entered:  # noqa: N801 - reads as a word: `with entered(context)`
    """Run a block as that task."""

    def __init__(self, task: TaskContext) -> None:
        self._task = task

    def __enter__(self) -> TaskContext:
        self._token = _context.set(self._task)
        return self._task

    def __exit__(self, *_: object) -> None:
        _context.reset(self._token)


def leave_all() -> None:
    """The task is over: this thread runs none, whatever cut it between entering and leaving."""
    _context.set(None)


def current_settings() -> Settings:
    """The settings that hold here: of the task, of this driver, of the driver of this job.

    Raises:
        UsageError: there is no Ray here, or the driver of the job has started no run.
    """
    task = _context.get()
    if task is not None and task.settings is not None:
        return task.settings
    if not _ray.is_ready():
        msg = "faultguard needs Ray here: call ray.init() first (a decorated function that is called directly keeps its state in memory)"
        raise UsageError(msg)
    if _ray.is_driver():
        return driver_settings()
    settings = _settings.settings_of_job()
    if settings is None:
        msg = (
            "the driver of this job has started no run of faultguard, so this task does not know where its checkpoints go: call "
            "faultguard.init(checkpoint_dir=...) in the driver, before the task is submitted"
        )
        raise UsageError(msg)
    return settings


def settings_to_submit() -> Settings:
    """The settings that hold for a task submitted here; starts Ray where a plain `.remote()` would.

    Raises:
        UsageError: as `current_settings`.
    """
    _ray.start_where_ray_would()
    return current_settings()


def driver_settings() -> Settings:
    """The settings of this driver; starts a run with defaults where `init` was not called.

    Raises:
        RunInUseError: another driver has taken the run.
    """
    with _lock:
        settings = driver_settings_or_none()
        if settings is None:
            from faultguard._run import start_run

            settings = start_run()
        if _named is not None and _named.taken is not None:
            raise _named.taken
        return settings


def named_run(settings: Settings) -> NamedRun | None:
    """The named run of this driver to which `settings` belong; None in an unnamed one, and in tasks.

    Raises:
        UsageError: another thread has ended it meanwhile.
    """
    named = _named
    if not settings.named or not _ray.is_driver():
        return None
    if named is None or named.settings.epoch != settings.epoch:
        raise run_has_ended(settings.run)
    return named


def run_has_ended(run: str) -> UsageError:
    """What a thread gets that submits to a run while another one ends it: nobody would wait for that work."""
    return UsageError(f"run {run!r} has ended while work was submitted to it; call faultguard.shutdown() when all is submitted")


def starting() -> threading.RLock:
    """Held by the thread that starts a run: two of them would take a named one from each other."""
    return _lock


def set_driver_settings(settings: Settings | None, named: NamedRun | None = None) -> None:
    """What `driver_settings` and `named_run` give from now on."""
    global _driver, _named  # noqa: PLW0603 - one driver per process
    with _lock:
        _driver = (settings, _ray.session_name()) if settings is not None else None
        _named = named


def driver_settings_or_none() -> Settings | None:
    """The settings of this driver, if it has started a run; one of another cluster or job is ended."""
    with _lock:
        if _driver is None:
            return None
        settings, session = _driver
        if _ray.is_ready() and (session, settings.job_id) != (_ray.session_name(), _ray.job_id()):
            from faultguard._run import shutdown

            shutdown()
            return None
        return settings


def count_cancel() -> Settings:
    """Count a cancel of this driver: what is submitted from now on comes after it. Gives the settings that say so.

    Raises:
        UsageError: this is no driver, or it has no run.
    """
    with _lock:
        settings = driver_settings_or_none() if not _ray.is_ready() or _ray.is_driver() else None
        if settings is None or not _ray.is_ready():
            msg = "faultguard.cancel() is refused: there is no run of this process; call it in the driver that submitted the tasks"
            raise UsageError(msg)
        settings = replace(settings, cancels=settings.cancels + 1)
        set_driver_settings(settings, _named)
        return settings


def take_driver_settings() -> tuple[Settings | None, NamedRun | None]:
    """The run that this driver has started, which it ends now."""
    with _lock:
        settings, named = _driver[0] if _driver is not None else None, _named
        set_driver_settings(None)
        return settings, named


def _forget_in_child() -> None:
    """A forked child is no driver: it must not end its parent's run when it exits."""
    global _driver, _named, _lock
    _driver, _named, _lock = None, None, threading.RLock()


os.register_at_fork(after_in_child=_forget_in_child)
