"""Errors: every one pickles, and the one that ends a worker is what the user's `except` clauses wait for."""

from __future__ import annotations

import builtins
import importlib
import inspect
import pickle
import pkgutil
import sys
import threading
from typing import TYPE_CHECKING, Any

import cloudpickle
import pytest
import ray

import faultguard
from faultguard import errors
from faultguard._core.records import FailureRecord
from faultguard.errors import FaultguardError, MaxFailuresExceeded, SupersededError, UsageError, max_failures_exceeded

if TYPE_CHECKING:
    from collections.abc import Callable

EVERY = [kind for _, kind in inspect.getmembers(errors, inspect.isclass) if issubclass(kind, FaultguardError)]
FAILURES = (
    FailureRecord("exception", 1, 3, "ValueError('a')", "ab12cd34ef", 17, 1.5, (3,)),
    FailureRecord("crash", 2, 4, "", "", 18, 2.5, (4,)),
)


class TwoArguments(Exception):  # noqa: N818 - as users name them
    """Cannot be unpickled: its `args` do not fit its `__init__`."""

    def __init__(self, code: int, reason: str) -> None:
        super().__init__(f"{code}: {reason}")
        self.code = code


class Slots(Exception):  # noqa: N818
    """Has a layout of its own."""

    __slots__ = ("code",)


class ArgsProperty(Exception):  # noqa: N818
    """Hides what exceptions are made of."""

    @property
    def args(self) -> Any:  # type: ignore[override] # as users do
        """No arguments to be had."""
        return ("hidden",)


class Final(Exception):  # noqa: N818
    """Refuses subclasses."""

    def __init_subclass__(cls, **kwargs: object) -> None:
        """No."""
        raise RuntimeError("final")


class Refusing(Exception):  # noqa: N818
    """Refuses to be made from a text."""

    def __new__(cls, *args: object) -> Refusing:  # noqa: PYI034 - as it is
        """From a number only."""
        if args and not isinstance(args[0], int):
            raise TypeError("a number, please")
        return super().__new__(cls, *args)


class WithLock(Exception):  # noqa: N818
    """Cannot be pickled."""

    def __init__(self) -> None:
        super().__init__("locked")
        self.lock = threading.Lock()


class ApiError(Exception):
    """What handlers look into."""

    def __init__(self, text: str, status: int = 0) -> None:
        super().__init__(text)
        self.status = status
        self.text = text


def fail(error: Exception, cause: Exception | None = None) -> None:
    """Raise it; with `cause`, from that."""
    if cause is not None:
        raise error from cause
    raise error


def raised(error: Exception, cause: Exception | None = None) -> Exception:
    """The exception with a traceback."""
    try:
        fail(error, cause)
    except Exception as caught:  # noqa: BLE001 - given back
        return caught
    raise AssertionError(error)


def exceeded(error: Exception | None, *, poison_batch: int | None = None) -> Any:
    """The error that ends a worker whose last failure is `error`."""
    last = raised(error) if error is not None and error.__traceback__ is None else error
    return max_failures_exceeded("w7", FAILURES, max_failures=1, last_exception=last, poison_batch=poison_batch)


def test_every_error_is_under_one_base() -> None:
    """`except FaultguardError` gets all of them, and all are public."""
    assert {kind.__name__ for kind in EVERY} == {*errors.__all__} - {"max_failures_exceeded"}


@pytest.mark.parametrize("kind", EVERY, ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("dumps", [pickle.dumps, cloudpickle.dumps], ids=["pickle", "cloudpickle"])
def test_every_error_pickles(kind: type[FaultguardError], dumps: Callable[[object], bytes]) -> None:
    """Text and attributes arrive on the other side."""
    found = pickle.loads(dumps(kind("what was refused", worker_id="w7", token=3, failures=FAILURES)))
    assert type(found) is kind
    assert str(found) == "what was refused"
    assert vars(found) == {"worker_id": "w7", "token": 3, "failures": FAILURES}


def test_every_exception_of_the_package_pickles() -> None:
    """Also those that are never public, such as what ends a drained attempt: Ray carries them from process to process."""
    for module in pkgutil.walk_packages(faultguard.__path__, "faultguard."):
        importlib.import_module(module.name)
    ours = {kind for kind in _below(BaseException) if kind.__module__.startswith("faultguard")}
    assert {"Drained", "Cancelled", "CancelledCoroutine", "LostError", "NotBegunError", "UsageError"} <= {kind.__name__ for kind in ours}
    for kind in ours:
        found = pickle.loads(pickle.dumps(kind("why")))
        assert (type(found), str(found)) == (kind, "why")


def _below(kind: type[BaseException]) -> set[type[BaseException]]:
    """All classes under it."""
    direct = set(type.__subclasses__(kind))
    return direct.union(*map(_below, direct))


def test_a_subclass_with_an_init_of_its_own_pickles() -> None:
    """Errors that users derive from ours need no `__reduce__`."""
    found = pickle.loads(pickle.dumps(OwnError(7)))
    assert (type(found), str(found), found.number) == (OwnError, "number 7", 7)


class OwnError(UsageError):
    """Of a user."""

    def __init__(self, number: int) -> None:
        super().__init__(f"number {number}", number=number)


def test_a_cause_that_is_both_stays_both() -> None:
    """An error of ours that is a TypeError as well is one after pickling."""
    found: Any = pickle.loads(pickle.dumps(errors.CheckpointNotSerializableError("state['x'] cannot", path="state['x']")))
    assert found.path == "state['x']"
    assert isinstance(found, TypeError)


# --- MaxFailuresExceeded --------------------------------------------------------------------------------------------

COMBINING = [
    ValueError("bad value"),
    OSError(28, "no space"),
    KeyError("key"),
    UnicodeDecodeError("utf-8", b"x", 0, 1, "why"),
    ApiError("no", 503),
    TwoArguments(5, "because"),
    Slots("slot"),
    WithLock(),
    StopIteration(3),
    errors.StalledError("no progress", batch=3),
]
PLAIN = [Exception("nothing to combine with"), Final("final"), ArgsProperty("hidden"), Refusing(7), SupersededError("ours")]


@pytest.mark.parametrize("error", COMBINING, ids=lambda error: type(error).__name__)
@pytest.mark.parametrize("dumps", [pickle.dumps, cloudpickle.dumps], ids=["pickle", "cloudpickle"])
def test_it_is_also_the_users_exception(error: Exception, dumps: Callable[[object], bytes]) -> None:
    """Existing `except` clauses get it, before and after pickling, with the failures and the text."""
    made = exceeded(error, poison_batch=3)
    for found in (made, pickle.loads(dumps(made)), pickle.loads(dumps(pickle.loads(dumps(made))))):
        assert isinstance(found, MaxFailuresExceeded)
        assert isinstance(found, type(error))
        assert type(found).__name__ == "MaxFailuresExceeded"
        assert (found.worker_id, found.failures, found.poison_batch) == ("w7", FAILURES, 3)
        assert str(found) == str(made)
        assert str(found).startswith("worker 'w7' failed 2 times, max_failures=1 allows 2 attempts. Raise max_failures")


@pytest.mark.parametrize("error", PLAIN, ids=lambda error: type(error).__name__)
def test_it_is_plain_where_the_classes_do_not_combine(error: Exception) -> None:
    """A class that cannot have a subclass, or one of ours, gives the plain error, with the exception in it."""
    made = exceeded(error)
    for found in (made, pickle.loads(pickle.dumps(made))):
        assert type(found) is MaxFailuresExceeded
        assert type(found.last_exception) is type(error)
        assert found.failures == FAILURES


@pytest.mark.skipif(sys.version_info < (3, 11), reason="there are no exception groups")
def test_a_group_stays_a_group() -> None:
    """An exception group has another layout: the error is plain, the group is its last exception."""
    group = vars(builtins)["ExceptionGroup"]("several", [ValueError("a"), OSError("b")])
    found: Any = pickle.loads(pickle.dumps(exceeded(group)))
    assert [type(error) for error in found.last_exception.exceptions] == [ValueError, OSError]
    assert "ValueError: a" in str(found)
    assert type(found) is MaxFailuresExceeded


def test_without_a_last_exception_it_is_plain() -> None:
    """After a crash there is no exception to combine with."""
    found = pickle.loads(pickle.dumps(exceeded(None)))
    assert type(found) is MaxFailuresExceeded
    assert found.last_exception is None
    assert str(found).splitlines()[1:] == [
        "  attempt 1 at batch 3 on node ab12cd34 pid 17: exception: ValueError('a')",
        "  attempt 2 at batch 4 on node ? pid 18: crash",
    ]


@pytest.mark.parametrize("error", [TwoArguments(5, "because"), WithLock()], ids=lambda error: type(error).__name__)
def test_an_exception_that_does_not_pickle_is_left_out(error: Exception) -> None:
    """It would take the whole error with it; its class and its traceback are there all the same."""
    made = exceeded(error)
    assert made.last_exception is None
    assert str(error) in str(made)


def test_handlers_find_their_attributes() -> None:
    """What handlers of the user's exception look into is there, and does not hide what is ours."""
    found: Any = pickle.loads(pickle.dumps(exceeded(ApiError("no", 503))))
    assert (found.status, found.text) == (503, "no")
    assert str(found).startswith("worker 'w7' failed")
    assert isinstance(found.last_exception, ApiError)
    assert found.last_exception.status == 503


@pytest.mark.parametrize("error", [*COMBINING, *PLAIN], ids=lambda error: type(error).__name__)
def test_the_text_ends_with_the_traceback(error: Exception) -> None:
    """`__cause__` does not survive `ray.get`, so the text has the user's frames, and ends with the exception itself."""
    lines = str(exceeded(error)).splitlines()
    assert "Traceback (most recent call last):" in lines
    assert any(line.strip().startswith(f'File "{__file__}"') and line.endswith("in fail") for line in lines)
    last = f"{type(error).__module__}.{type(error).__qualname__}".removeprefix("builtins.")
    assert lines[-1].startswith(last)


def test_the_traceback_begins_with_the_users_frame() -> None:
    """Frames of faultguard and tenacity above the user's code are left out, those of a user's project of that name are not."""
    namespace: dict[str, Any] = {"__name__": "faultguard._attempt"}
    exec(compile("def call(function): function()", "/lib/faultguard/_attempt.py", "exec"), namespace)  # noqa: S102 - a frame of ours
    users: dict[str, Any] = {"__name__": "train"}
    exec(compile("def train(): inner()\ndef inner(): raise ValueError('x')", "/home/me/faultguard/train.py", "exec"), users)  # noqa: S102
    try:
        namespace["call"](users["train"])
    except ValueError as error:
        frames = error.__traceback__
        assert frames is not None
        text = str(max_failures_exceeded("w7", FAILURES, max_failures=1, last_exception=error.with_traceback(frames.tb_next)))
    assert "_attempt.py" not in text
    assert text.count("/home/me/faultguard/train.py") == 2


def test_what_was_handled_before_is_not_in_the_text() -> None:
    """An exception raised while another one was handled comes without that one; a cause is shown."""
    try:
        fail(KeyError("an earlier one"))
    except KeyError:
        error = raised(ValueError("the last one"))
    assert isinstance(error.__context__, KeyError)
    assert "an earlier one" not in str(exceeded(error))
    assert "the cause" in str(exceeded(raised(ValueError("the last one"), KeyError("the cause"))))


@pytest.mark.parametrize("error", [*COMBINING, *PLAIN], ids=lambda error: type(error).__name__)
def test_it_gets_through_ray(error: Exception) -> None:
    """What `ray.get` raises is a task error, ours and the user's at once, with the failures and the text."""
    exceptions: Any = ray.exceptions
    sent = exceptions.RayTaskError("train", "the traceback of Ray", exceeded(error, poison_batch=3))
    arrived = exceptions.RayError.from_bytes(sent.to_bytes()).as_instanceof_cause()
    assert isinstance(arrived, ray.exceptions.RayTaskError)
    assert isinstance(arrived, MaxFailuresExceeded)
    if error in COMBINING:
        assert isinstance(arrived, type(error))
    assert (arrived.failures, arrived.poison_batch, arrived.worker_id) == (FAILURES, 3, "w7")
    assert isinstance(arrived.cause, MaxFailuresExceeded)
    assert "worker 'w7' failed 2 times" in str(arrived.cause)
