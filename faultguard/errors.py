"""Every error that faultguard raises on purpose; all of them pickle, all are under `FaultguardError`.

Each says first what was refused, then why, then what to do. They are split by who must act: the caller (`UsageError`), the
world (`CheckpointStoreError`, ...), or nobody (`SupersededError`: stop, nothing is lost).
"""

from __future__ import annotations

import builtins
import traceback
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from faultguard._core.records import FailureRecord

__all__ = [
    "AmbiguousReplyError",
    "CheckpointCorruptError",
    "CheckpointNotSerializableError",
    "CheckpointStoreError",
    "DuplicateWorkerError",
    "FaultguardError",
    "InputChangedError",
    "ManagerUnavailableError",
    "MaxFailuresExceeded",
    "OtherStoreError",
    "ResumabilityError",
    "RunInUseError",
    "RunMismatchError",
    "StalledError",
    "SupersededError",
    "UsageError",
]


_GROUPS = tuple(vars(builtins)[name] for name in ("BaseExceptionGroup",) if name in vars(builtins))  # their layout does not combine


def _rebuild(cls: type[FaultguardError], message: str, attributes: dict[str, Any]) -> FaultguardError:
    """Make an error again from what `__reduce__` kept, without running the `__init__` of a subclass."""
    error = cls.__new__(cls, message)
    Exception.__init__(error, message)
    error.__dict__.update(attributes)
    return error


class FaultguardError(Exception):
    """Base of every error of this library.

    Keyword arguments become attributes, and survive pickling.
    """

    def __init__(self, message: str = "", **attributes: object) -> None:
        super().__init__(message)
        self.__dict__.update(attributes)

    def __reduce__(self) -> tuple[Callable[..., FaultguardError], tuple[Any, ...]]:
        """Pickle by class, text and attributes."""
        return _rebuild, (type(self), str(self), self.__dict__)


class UsageError(FaultguardError):
    """The caller asked for something that cannot work; the text says what to write instead. Never retried."""


class SupersededError(FaultguardError):
    """A later attempt owns this worker; nothing that this one writes counts. Stop; nothing is lost."""

    worker_id: str
    token: int


class StalledError(FaultguardError):
    """A batch made no progress for longer than its `stall_timeout`, or a section for longer than its `timeout`.

    `batch` counts the batches done in the innermost loop.
    """

    worker_id: str
    attempt: int
    batch: int


class InputChangedError(FaultguardError):
    """The input of a loop is not the one that the checkpoint was made with."""

    worker_id: str
    loop: str


class CheckpointCorruptError(FaultguardError):
    """No intact record is left where the log says that there must be one."""


class CheckpointNotSerializableError(FaultguardError, TypeError):
    """The state holds a value that the record format cannot give back exactly; `path` says where. Never retried."""

    path: str


class CheckpointStoreError(FaultguardError):
    """The checkpoint store cannot be read or written."""


class AmbiguousReplyError(CheckpointStoreError):
    """The store did not say whether a create took place; the caller must read back."""


class OtherStoreError(CheckpointStoreError):
    """The path leads to another store than that of the driver; waiting does not change that."""


class DuplicateWorkerError(FaultguardError):
    """Another live task holds this worker id."""

    worker_id: str


class ResumabilityError(FaultguardError, AssertionError):
    """`faultguard.testing.check_resumable` has found a kill after which a task does not end as it does undisturbed.

    Attributes:
        task: name of the function.
        kill: where it was killed.
        path: of the first value that differs, `result["rows"][3]`; empty where it is not a value.
        footguns: what is known to lead to this and was found in the source, each with what to write instead.
    """

    task: str
    kill: str
    path: str
    footguns: tuple[str, ...]


class RunInUseError(FaultguardError):
    """Another live driver has the named run: which process, on which host, and since when (seconds since the epoch)."""

    run: str
    host: str
    pid: int
    since: float


class RunMismatchError(FaultguardError):
    """A worker is on record with other arguments; `arguments` names those that differ."""

    worker_id: str
    arguments: tuple[str, ...]


class ManagerUnavailableError(FaultguardError):
    """The `RecoveryManager` actor cannot be reached or speaks another protocol."""


class MaxFailuresExceeded(FaultguardError):  # noqa: N818 - the public name is fixed by the contract
    """The worker failed more often than `max_failures` allows.

    Attributes:
        failures: every recorded failure of this budget, oldest first.
        last_exception: the final exception, when it was raised in the process that gave up and survives pickling; else None.
        poison_batch: the batch at which the last failures in a row happened, or None.

    When `last_exception` is an ordinary exception whose class can be combined with this one, the error raised is an
    instance of both and has its attributes, so that existing `except` clauses go on working.
    """

    worker_id: str
    failures: tuple[FailureRecord, ...]  # no defaults: Ray's error, which is of this class too, looks up what the class lacks
    last_exception: Exception | None
    poison_batch: int | None


_TEXT = "_faultguard_text"  # in the `__dict__` of a combined error, beside what the user keeps there


def _combined_init(self: MaxFailuresExceeded, message: str = "", **attributes: object) -> None:
    """Set the text and the attributes; the `__init__` of the user's class has its own idea of arguments."""
    Exception.__init__(self, message)
    self.__dict__.update(attributes)


def _combined_str(self: MaxFailuresExceeded) -> str:
    """Our text, whatever the user's class makes of its own arguments."""
    return str(self.__dict__[_TEXT])


def _combined_reduce(self: MaxFailuresExceeded) -> tuple[Callable[..., MaxFailuresExceeded], tuple[Any, ...]]:
    """Pickle by the user's class, because the combined one cannot be imported."""
    return _rebuild_combined, (type(self).__dict__["_user_class"], str(self), dict(self.__dict__))


def _combine(user_class: type[Exception]) -> type[MaxFailuresExceeded] | None:
    """A class that is both, or None where the two cannot be combined (other layout, final class, own metaclass)."""
    if user_class is Exception or issubclass(user_class, _GROUPS):
        return None
    if issubclass(user_class, FaultguardError) and user_class is not StalledError:  # the one of ours that an `except` may wait for
        return None
    if user_class.args is not BaseException.args:  # Ray 2.50 sets them on the class that it makes of both, and fails
        return None
    namespace = {
        "_user_class": user_class,
        "__init__": _combined_init,
        "__str__": _combined_str,
        "__reduce__": _combined_reduce,
        "__module__": MaxFailuresExceeded.__module__,
        "__doc__": MaxFailuresExceeded.__doc__,
    }
    try:
        return type("MaxFailuresExceeded", (MaxFailuresExceeded, user_class), namespace)
    except Exception:  # noqa: BLE001 - layout, metaclass, `__init_subclass__`: a class may refuse in any way
        return None


def _rebuild_combined(user_class: type[Exception], message: str, attributes: dict[str, Any]) -> MaxFailuresExceeded:
    """The other side of `_combined_reduce`; plain where the class no longer combines."""
    return _make(user_class, message, attributes)


def _make(user_class: type[Exception], message: str, attributes: dict[str, Any]) -> MaxFailuresExceeded:
    combined = _combine(user_class)
    if combined is not None:
        try:
            error = combined.__new__(combined, message)
            _combined_init(error, message, **{**attributes, _TEXT: message})
        except Exception:  # noqa: BLE001 - a user class may refuse anything; the plain error says the same
            return MaxFailuresExceeded(message, **attributes)
        return error
    return MaxFailuresExceeded(message, **{k: v for k, v in attributes.items() if k != _TEXT})


def max_failures_exceeded(
    worker: str,
    failures: Sequence[FailureRecord],
    *,
    max_failures: int,
    last_exception: Exception | None = None,
    poison_batch: int | None = None,
) -> MaxFailuresExceeded:
    """Build the error that ends a worker, combined with the class of `last_exception` where that is possible."""
    refilled = " without progress or quarantine" if len(failures) > max_failures + 1 else ""
    first = (
        f"worker {worker!r} failed {len(failures)} times, max_failures={max_failures} allows {max_failures + 1} attempts{refilled}. "
        f"Raise max_failures, or mend the cause; starting it again resumes at the last checkpoint."
    )
    lines = [first]
    if poison_batch is not None:
        lines.append(f"  the last failures were all at batch {poison_batch}: look at that input")
    lines.extend(
        f"  attempt {f.attempt} at batch {f.batch} on node {f.node_id[:8] or '?'} pid {f.pid}: {f.cause}"
        f"{': ' + f.message if f.message else ''}"
        for f in failures
    )
    if last_exception is not None:
        lines.append("")
        lines.append(_user_traceback(last_exception))
    message = "\n".join(lines)
    travels = last_exception is not None and _travels(last_exception)
    attributes = {
        **(vars(last_exception) if travels else {}),
        "worker_id": worker,
        "failures": tuple(failures),
        "last_exception": last_exception if travels else None,
        "poison_batch": poison_batch,
    }
    if isinstance(last_exception, Exception):
        return _make(type(last_exception), message, attributes)
    return MaxFailuresExceeded(message, **attributes)


def _travels(error: Exception) -> bool:
    """Whether an exception survives pickling; where it does not, it would take the error that carries it with it."""
    import cloudpickle

    try:
        return isinstance(cloudpickle.loads(cloudpickle.dumps(error)), type(error))
    except Exception:  # noqa: BLE001 - a lock inside, an `__init__` with two arguments, ...
        return False


def _user_traceback(error: Exception) -> str:
    """The traceback from the user's first frame on, without what was handled before."""
    frames = error.__traceback__
    while frames is not None and frames.tb_next is not None and _is_ours(frames.tb_frame.f_globals):
        frames = frames.tb_next
    return "".join(traceback.format_exception(type(error), error, frames, chain=error.__cause__ is not None)).rstrip()


def _is_ours(module: dict[str, Any]) -> bool:
    """Whether a frame of the module with these globals stands between the user's code and the top."""
    return str(module.get("__name__")).partition(".")[0] in {"faultguard", "tenacity", "concurrent"}
