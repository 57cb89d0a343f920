"""When a worker counts as stalled: the state machine over samples, without threads and clocks."""

from __future__ import annotations

import math
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from faultguard._core.stall import GRACE_S, SLOW_S, Stall, StallWatch, check_timeout
from faultguard.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Sequence


def told(samples: Sequence[tuple[float, object]], timeout_s: float | None) -> list[tuple[float, Stall]]:
    """What a watch says of samples (when, key), without the nothings."""
    watch = StallWatch()
    answers = [(now, watch.look(key, timeout_s, now)) for now, key in samples]
    return [(now, answer) for now, answer in answers if answer is not Stall.NONE]


def test_soft_and_hard_once_each() -> None:
    """After the timeout the thread is told, after the grace the process ends; neither is said twice."""
    assert told([(now, "a") for now in range(50)], 10.0) == [(10, Stall.SOFT), (20, Stall.HARD)]


def test_the_grace_is_bounded() -> None:
    """Nobody waits an hour for a thread that had an hour."""
    hour = 3600.0
    found = told([(0.0, "a"), (hour, "a"), (hour + GRACE_S - 1, "a"), (hour + GRACE_S, "a")], hour)
    assert found == [(hour, Stall.SOFT), (hour + GRACE_S, Stall.HARD)]


def test_progress_starts_the_clock_anew() -> None:
    """Every other key is a new batch, also after the thread was told."""
    assert told([(0, "a"), (9, "a"), (10, "b"), (19, "b")], 10.0) == []
    assert told([(0, "a"), (10, "a"), (15, "b"), (24, "b"), (25, "b")], 10.0) == [(10, Stall.SOFT), (25, Stall.SOFT)]


def test_nothing_is_timed_without_a_key() -> None:
    """Loading, fast-forwarding and waiting for the store are not progress, and no stall either."""
    assert told([(now, None) for now in range(100)], 1.0) == []
    assert told([(0, "a"), (5, None), (9, "a"), (18, "a")], 10.0) == []


def test_without_a_timeout_one_word() -> None:
    """After five minutes, or ten times the longest batch, once per attempt."""
    assert told([(0, "a"), (SLOW_S - 1, "a"), (SLOW_S, "a"), (9999, "a")], None) == [(SLOW_S, Stall.SLOW)]
    slow = [(0.0, "a"), (100.0, "b"), (100.0 + SLOW_S, "b"), (1100.0, "b"), (1100.0, "c"), (99999.0, "c")]
    assert told(slow, None) == [(1100.0, Stall.SLOW)]


@given(st.lists(st.tuples(st.floats(0.0, 30.0), st.sampled_from(["a", "b", None])), max_size=60), st.floats(0.5, 20.0))
def test_never_early(steps: list[tuple[float, object]], timeout_s: float) -> None:
    """Whatever is sampled: told only after the key stood unbroken for the timeout, hard only after soft and the grace."""
    watch, now, since, key, soft = StallWatch(), 0.0, 0.0, object(), math.inf
    for step, sample in steps:
        now += step
        if sample != key or sample is None:
            since, key, soft = now, sample, math.inf
        answer = watch.look(sample, timeout_s, now)
        if answer is Stall.SOFT:
            assert now - since >= timeout_s
            assert soft == math.inf
            soft = now
        if answer is Stall.HARD:
            assert now - soft >= timeout_s


@pytest.mark.parametrize(("timeout", "seconds"), [(None, None), (5, 5.0), (0.5, 0.5), (timedelta(minutes=1), 60.0)], ids=str)
def test_timeouts(timeout: Any, seconds: float | None) -> None:
    """Seconds, or a timedelta."""
    assert check_timeout("f(stall_timeout=", timeout) == seconds


@pytest.mark.parametrize("timeout", [0, -1, True, "60", math.nan, math.inf, timedelta(0)], ids=str)
def test_what_is_no_timeout(timeout: Any) -> None:
    """It is refused, with what to write."""
    with pytest.raises(UsageError, match=r"f\(stall_timeout=.*\) is refused; it takes seconds \(> 0\), a timedelta, or None"):
        check_timeout("f(stall_timeout=", timeout)
