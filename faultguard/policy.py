"""What to do about an exception: give up, retry, and after which wait. Arithmetic and checks, nothing else."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Literal, get_args

from faultguard.errors import FaultguardError, StalledError, UsageError

__all__ = ["Backoff", "Matcher", "OnPoison", "check_matcher", "check_on_poison", "matches", "verdict"]

Matcher = type[BaseException] | tuple[type[BaseException], ...] | Callable[[BaseException], "bool | timedelta"]
OnPoison = Literal["fail", "skip"]
LEAST_FOR_SKIP = 3  # failures until a batch is quarantined; a crash on the way to it may come first, and one that was no poison


@dataclass(frozen=True, slots=True)
class Backoff:
    """Wait before a retry in the process: `initial * factor ** (failures - 1)` seconds, at most `maximum`.

    Args:
        initial: seconds before the first retry, at least 0.
        factor: growth from one wait to the next, at least 1.
        maximum: the longest wait, seconds.
        jitter: draw the wait evenly between 0 and that value ("full jitter"), so that workers do not come back all at once.

    Raises:
        UsageError: a value is out of its range.

    >>> Backoff(initial=0.1, maximum=10)
    Backoff(initial=0.1, factor=5.0, maximum=10, jitter=True)
    """

    initial: float = 1.0
    factor: float = 5.0
    maximum: float = 300.0
    jitter: bool = True

    def __post_init__(self) -> None:
        """Check the ranges."""
        for name, least in (("initial", 0), ("factor", 1), ("maximum", 0)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not least <= value < float("inf"):
                msg = f"Backoff({name}={value!r}) is refused; it takes a number, at least {least}"
                raise UsageError(msg)
        if not isinstance(self.jitter, bool):
            msg = f"Backoff(jitter={self.jitter!r}) is refused; it takes True or False"
            raise UsageError(msg)


def check_matcher(name: str, matcher: Any) -> Matcher:
    """The option `retry_on` or `give_up_on`, checked: an exception type, a tuple of them, or a predicate.

    Raises:
        UsageError: it is something else.
    """
    if isinstance(matcher, tuple):
        if all(_is_exception_type(kind) for kind in matcher):
            return matcher
    elif _is_exception_type(matcher) or (callable(matcher) and not isinstance(matcher, type)):
        result: Matcher = matcher
        return result
    msg = f"{name}={matcher!r} is refused; it takes an exception type, a tuple of them, or a predicate exc -> bool | timedelta"
    raise UsageError(msg)


def _is_exception_type(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, Exception)


def check_on_poison(call: str, on_poison: Any, max_failures: int | None = None) -> OnPoison:
    """The option `on_poison`, checked, also against the failures that are survived, where those are known.

    Raises:
        UsageError: it is neither "fail" nor "skip", or the budget is spent before a batch is known to be poison.
    """
    if on_poison not in get_args(OnPoison):
        msg = f'{call}(on_poison={on_poison!r}) is refused; it takes "fail" (the budget decides) or "skip" (quarantine the batch)'
        raise UsageError(msg)
    if on_poison == "skip" and max_failures is not None and 0 <= max_failures < LEAST_FOR_SKIP:
        msg = (
            f'{call}(on_poison="skip") with max_failures={max_failures} is refused: a batch is quarantined after {LEAST_FOR_SKIP} '
            f"failures, which have to be survived; set max_failures={LEAST_FOR_SKIP} or more, or -1"
        )
        raise UsageError(msg)
    checked: OnPoison = on_poison
    return checked


def verdict(error: Exception, retry_on: Matcher, give_up_on: Matcher) -> bool | timedelta:
    """Whether an exception is retried; a timedelta says after which wait.

    Errors of ours are not: they would come again (usage, serialisation, input), somebody else goes on (superseded), or it was tried
    for long enough (store). A stall is the one that is a failure of the work.
    """
    if isinstance(error, FaultguardError) and not isinstance(error, StalledError):
        return False
    if matches(error, give_up_on):
        return False
    return matches(error, retry_on)


def matches(error: Exception, matcher: Matcher) -> bool | timedelta:
    """Whether an exception is one of these; a predicate may answer with a timedelta."""
    if isinstance(matcher, (type, tuple)):
        return isinstance(error, matcher)
    answer = matcher(error)
    return answer if isinstance(answer, timedelta) else bool(answer)
