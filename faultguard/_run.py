"""The run of a driver: it starts, says so, and at its normal end keeps the records and drops the checkpoints."""

from __future__ import annotations

import atexit
import sys
from typing import TYPE_CHECKING, Any, Literal

import msgspec

from faultguard import _ray, _session, _settings
from faultguard._cancels import note_cancel
from faultguard._core.names import check_worker_id, record_number
from faultguard._core.records import FailureRecord, Outcome, Place, Record, decode_record
from faultguard._settings import checked_store
from faultguard.errors import CheckpointStoreError, ManagerUnavailableError, UsageError

if TYPE_CHECKING:
    import os
    from types import TracebackType

    from typing_extensions import Self

    from faultguard._settings import Settings
    from faultguard.storage import Store

__all__ = ["Run", "cancel", "init", "shutdown", "start_run"]

KEPT_RUNS = 10
NAMED_PATHS = 10
CANCEL_WAIT_S = 30.0
_SUMMARY = "runs/"
_hooked = False


class Run:
    """What `init` returns: a context manager that ends the run.

    Attributes:
        name: of the run.
        instance: of a named run, counted from 1; 0: it has no name of its own.
        checkpoint_dir: where its checkpoints are, absolute.
    """

    def __init__(self, settings: Settings) -> None:
        self.name: str = settings.run
        self.instance: int = settings.instance
        self.checkpoint_dir: str = settings.checkpoint_dir

    def __enter__(self) -> Self:
        """The run, started."""
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        """End the run; after an exception everything stays for a look."""
        shutdown(_failed=kind is not None)


def init(
    run: str | None = None,
    checkpoint_dir: str | os.PathLike[str] | None = None,
    *,
    resume: Literal["auto", "never", "always"] | None = None,
    takeover: bool | None = None,
    max_failures: int | None = None,
    heartbeat_interval: float | None = None,
    heartbeat_timeout: float | None = None,
    check_args: bool | None = None,
    progress: bool | None = None,
) -> Run:
    """Start a run with options of its own; also a context manager. Optional: everything works with defaults.

    Does not start Ray. The store is tested before it returns. Every option can come from the environment instead
    (`FAULTGUARD_CHECKPOINT_DIR`, `FAULTGUARD_MAX_FAILURES`, ...).

    A run with a name survives its driver. It is open until a driver ends normally with all of its workers completed; until then a
    driver that starts it again goes on with it: what has completed is not run, what has not resumes, budgets go on counting. Every
    worker of it needs an id: a parameter `worker_id`, or `.options(worker_id=...)`.

    Args:
        run: its name, any text of up to 512 bytes. Default: none; the run ends with this driver.
        checkpoint_dir: a directory that all nodes share; default `./checkpoints`, made absolute here.
        resume: whether to go on: "auto" (the default) with an open run, while a closed name starts anew; "always" also with a closed
            one, whose results are given again; "never" begins anew in any case.
        takeover: take the run from another driver that lives. What that then still writes does not count.
        max_failures: default of the decorator; failures that a worker survives, -1 for any number.
        heartbeat_interval: seconds between two signs of life of a worker process.
        heartbeat_timeout: seconds of silence after which a worker is called silent.
        check_args: in a named run, refuse a worker that is on record with other plain arguments.
        progress: show the bar of `get`.

    Raises:
        UsageError: an option cannot work, or a run of this driver is going on.
        RunInUseError: another driver that lives has the run; `host`, `pid` and `since` say which. Until that is known it waits, at most
            `heartbeat_timeout`.
        CheckpointStoreError: the store cannot be written.
        CheckpointCorruptError: the newest record of the run is damaged.

    Example:
        >>> with faultguard.init(run="nightly", checkpoint_dir="/shared/checkpoints"):  # doctest: +SKIP
        ...     rows = faultguard.get([embed.options(worker_id=s.name).remote(s.keys) for s in shards])
    """
    if not _ray.is_ready():
        msg = "faultguard.init() needs Ray: call ray.init() first"
        raise UsageError(msg)
    if not _ray.is_driver():
        msg = "faultguard.init() belongs into the driver, not into a task; tasks take over what the driver decided"
        raise UsageError(msg)
    with _session.starting():
        if _session.driver_settings_or_none() is not None:
            msg = (
                "faultguard.init() is refused: this driver has a run already; call faultguard.shutdown() first, or init() before the first "
                "task"
            )
            raise UsageError(msg)
        return Run(
            start_run(
                run,
                checkpoint_dir,
                resume=resume,
                takeover=takeover,
                max_failures=max_failures,
                heartbeat_interval=heartbeat_interval,
                heartbeat_timeout=heartbeat_timeout,
                check_args=check_args,
                progress=progress,
            )
        )


def start_run(
    run: str | None = None,
    checkpoint_dir: str | os.PathLike[str] | None = None,
    *,
    resume: str | None = None,
    takeover: bool | None = None,
    **options: Any,
) -> Settings:
    """Let this driver and its tasks have a run, and say so. Returns its settings."""
    global _hooked  # noqa: PLW0603 - one hook per process
    _ray.refuse_client_mode()
    name, how, take = (_settings.option(key, given) for key, given in (("run", run), ("resume", resume), ("takeover", takeover)))
    if name is None and (how != "auto" or take):
        raise UsageError(f"init(resume={how!r}, takeover={take}) is refused without a run: only one with a name outlives its driver")
    settings = _settings.new_settings(checkpoint_dir, run=name, **options)
    named, line = None, f"run {settings.run!r} starts. Store {settings.checkpoint_dir}."
    if name is not None:
        from faultguard._named import NamedRun

        named = NamedRun.enter(settings, resume=how, takeover=take, say=say)
        settings, line = named.settings, named.line
    try:
        _settings.publish(settings)
        _session.set_driver_settings(settings, named)
    except BaseException:  # then this driver has no run, and keeps no other one from it
        if named is not None:
            named.give_up()
        raise
    if not _hooked:
        _hooked = True
        atexit.register(_at_exit)
    say(line)
    return settings


def shutdown(*, _failed: bool = False) -> None:
    """End the run of this driver: print what happened, drop the checkpoints of what completed, keep the records.

    What failed, and what did not end, stays; its path is printed. A named run is closed if all of its workers have completed, else it
    stays open, and keeps all. Without a run it does nothing.
    """
    from faultguard._manager import end

    settings, named = _session.take_driver_settings()
    if settings is None:
        return
    try:
        if named is None:
            end_run(settings, failed=_failed)
        else:
            for line in named.end(failed=_failed):
                say(line)
    except CheckpointStoreError as error:
        if not _failed:
            raise
        say(f"the end of run {settings.run!r} could not be recorded: {error}")  # what ended it is to be seen, not this
    finally:
        end(settings)


def cancel(worker_id: str | None = None) -> None:
    """Cancel what this driver has submitted so far: final, as `ray.cancel` is, also for what it has no reference to any more.

    A worker that runs is interrupted in its batch (in methods of async actors, and outside of loops and sections, at its next
    boundary), with its next heartbeat. Its last boundary is saved, its status is "cancelled", `ray.get` raises
    `TaskCancelledError`, and nothing is charged; submitted again, it resumes. A task that waits to be run is cancelled as it begins
    (within 0.2 s from now, 2 s where Ray's head is busy, it may still begin, in a process that has just begun another one);
    `ray.cancel(ref)` takes it out of the queue. Where the decorator is below `@ray.remote`, nobody knows when a task that waits was
    submitted, and it runs. Tasks in plain `@ray.remote` without a block of ours are left alone.

    Args:
        worker_id: the worker, of whatever task; None: all of this run.

    Raises:
        UsageError: this is no driver, or it has no run.
        ManagerUnavailableError: the manager of the run, which passes it on, cannot be reached.

    Example:
        >>> ref = embed.options(worker_id="w7").remote(keys)  # doctest: +SKIP
        >>> faultguard.cancel("w7")  # doctest: +SKIP
    """
    from faultguard._manager import ask

    if worker_id is not None:
        check_worker_id(worker_id)
    settings = _session.count_cancel()
    note_cancel(settings, worker_id)
    _settings.publish(settings)
    try:
        ask(settings, lambda manager: manager.cancel.remote(settings.cancels, worker_id), CANCEL_WAIT_S)
    except _ray.UNREACHABLE as error:
        raise ManagerUnavailableError(f"the manager of run {settings.run!r} could not be told to cancel: {error}") from error


def _at_exit() -> None:
    shutdown(_failed=getattr(sys, "last_value", None) is not None)


class _Worker(msgspec.Struct, frozen=True, omit_defaults=True):
    """What stays of a worker when its checkpoints go."""

    task: str
    worker_id: str
    status: str
    attempts: int
    outcome: Outcome | None = None
    failures: tuple[FailureRecord, ...] = ()
    quarantined: tuple[Place, ...] = ()


def end_run(settings: Settings, *, failed: bool) -> None:
    """Keep the records of a run, drop the checkpoints of its completed workers, print the summary."""
    store = checked_store(settings)
    prefix = settings.run_prefix
    logs: dict[str, list[str]] = {}
    for key in store.list(prefix):
        folder, _, name = key.rpartition("/")
        if record_number(name) is not None:
            logs.setdefault(folder, []).append(key)
    workers, unfinished, superfluous, saved_s = [], [], [], 0.0
    for folder, keys in logs.items():
        head = _newest(store, keys)
        status = head.outcome.status if head is not None and head.outcome is not None else "unfinished"
        if head is None or status != "completed":
            unfinished.append(folder)
        if head is not None:
            workers.append(_Worker(head.task, head.worker_id, status, head.attempt, head.outcome, head.failures, head.quarantined))
            saved_s += head.saved_s
        if status == "completed" and not failed:
            superfluous += keys  # oldest first: the end goes last, so dying here leaves a completed worker
    if not workers:
        return
    summary = msgspec.json.encode({"run": settings.run, "workers": workers})
    store.create(f"{_SUMMARY}{settings.run}.json", summary)  # before anything goes: the outcomes are then nowhere else
    for key in superfluous:
        store.delete(key)
    for key in store.list(_SUMMARY)[:-KEPT_RUNS]:
        store.delete(key)
    _say_end(settings, workers, unfinished, saved_s)


def _newest(store: Store, keys: list[str]) -> Record | None:
    for key in reversed(keys):
        number = record_number(key.rpartition("/")[2])
        data = store.get(key)
        if data is not None and number is not None and (record := decode_record(data, number)) is not None:
            return record
    return None


def _say_end(settings: Settings, workers: list[_Worker], unfinished: list[str], saved_s: float) -> None:
    completed = sum(worker.status == "completed" for worker in workers)
    survived = sum(len(worker.failures) for worker in workers if worker.status == "completed")
    saved = f" Saved {duration(saved_s)} of work." if saved_s >= 1 else ""
    quarantined = sum(len(worker.quarantined) for worker in workers)
    counts = f"{completed} completed, {survived} failures survived, {quarantined} quarantined, {len(unfinished)} not completed."
    say(f"run {settings.run!r} ended: {counts}{saved}")
    for line in kept_lines(settings, unfinished):
        say(line)


def kept_lines(settings: Settings, folders: list[str]) -> list[str]:
    """What to say of what stays of a run: where it is; of many, where the first ones are, and how many more."""
    root = f"{checked_store(settings).url}/"
    more = len(folders) - NAMED_PATHS
    lines = [f"kept {root}{folder}" for folder in folders[:NAMED_PATHS]]
    return [*lines, f"and {more} more in {root}{settings.run_prefix}"] if more > 0 else lines


def duration(seconds: float) -> str:
    """Seconds as people say them."""
    if seconds < 60:  # noqa: PLR2004 - a minute
        return f"{seconds:.0f} s"
    minutes, hours = divmod(round(seconds / 60), 60)[::-1]
    return f"{hours} h {minutes} min" if hours else f"{minutes} min"


def say(sentence: str) -> None:
    """Print one line of the run on the terminal of the driver."""
    print(f"faultguard: {sentence}", file=sys.stderr, flush=True)  # noqa: T201 - the lines of the terminal contract
