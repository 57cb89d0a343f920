"""When a worker that lives makes no progress: a state machine over samples of where it stands. Time is a parameter.

Whoever looks says where the worker stands (`key`, equal as long as there is no progress; None: nothing is timed there) and by
a clock that leaves out the watcher's own absence. What the clock of the watched process did not see is nobody's stall.
"""

from __future__ import annotations

import enum
import math
from datetime import timedelta
from typing import Any

from faultguard.errors import UsageError

__all__ = ["GRACE_S", "Stall", "StallWatch", "check_timeout"]

GRACE_S = 30.0  # at most, between the exception and the end of the process; a short `stall_timeout` waits only its own length
SLOW_S = 300.0  # without a timeout nothing is killed, and nothing is said before
SLOW_FACTOR = 10.0  # nor before so many times the longest batch


class Stall(enum.Enum):
    """What has just happened."""

    NONE = "none"
    SLOW = "slow"  # no timeout, and a suspiciously long batch: say it, once
    SOFT = "soft"  # the timeout is over: raise in the thread
    HARD = "hard"  # and the thread did not come back: end the process


class StallWatch:
    """The samples of one worker.

    >>> watch = StallWatch()
    >>> [watch.look("batch 1", 10.0, now) for now in (0.0, 9.9, 10.0, 19.9, 20.0, 21.0)]  # doctest: +NORMALIZE_WHITESPACE
    [<Stall.NONE: 'none'>, <Stall.NONE: 'none'>, <Stall.SOFT: 'soft'>, <Stall.NONE: 'none'>, <Stall.HARD: 'hard'>,
     <Stall.NONE: 'none'>]
    """

    __slots__ = ("_hard", "_key", "_longest_s", "_since", "_slow", "_soft_at")

    def __init__(self) -> None:
        self._key: object = None
        self._since = 0.0
        self._soft_at: float | None = None
        self._hard = False
        self._slow = False
        self._longest_s = 0.0

    def look(self, key: object, timeout_s: float | None, now: float) -> Stall:
        """Take a sample.

        Args:
            key: where the worker stands; None where nothing is timed.
            timeout_s: for standing there; None: none.
            now: seconds; only differences mean something.
        """
        if key is None or key != self._key:
            if self._key is not None:
                self._longest_s = max(self._longest_s, self.age_s(now))
            self._key, self._since, self._soft_at, self._hard = key, now, None, False
            return Stall.NONE
        if timeout_s is None:
            return self._look_slow(now)
        if self._soft_at is None:
            if self.age_s(now) < timeout_s:
                return Stall.NONE
            self._soft_at = now
            return Stall.SOFT
        if self._hard or now - self._soft_at < min(timeout_s, GRACE_S):
            return Stall.NONE
        self._hard = True
        return Stall.HARD

    def age_s(self, now: float) -> float:
        """Seconds that the worker has stood where it stands."""
        return now - self._since if self._key is not None else 0.0

    def _look_slow(self, now: float) -> Stall:
        if self._slow or self.age_s(now) < max(SLOW_S, SLOW_FACTOR * self._longest_s):
            return Stall.NONE
        self._slow = True
        return Stall.SLOW


def check_timeout(call: str, timeout: Any) -> float | None:
    """A timeout in seconds, checked; `call` is named in the refusal.

    >>> check_timeout("f(stall_timeout=", timedelta(minutes=2)), check_timeout("f(stall_timeout=", None)
    (120.0, None)

    Raises:
        UsageError: it is no positive number of seconds, timedelta or None.
    """
    if timeout is None:
        return None
    seconds = timeout.total_seconds() if isinstance(timeout, timedelta) else timeout
    if isinstance(seconds, bool) or not isinstance(seconds, (int, float)) or not 0 < seconds < math.inf:
        msg = f"{call}{timeout!r}) is refused; it takes seconds (> 0), a timedelta, or None for no limit"
        raise UsageError(msg)
    return float(seconds)
