"""What the end of an attempt costs."""

from __future__ import annotations

from typing import Any

import pytest

from faultguard._core.budget import add_failure, cost_of_crash, exhausted, is_charged, next_budget
from faultguard._core.records import MAX_FAILURE_RECORDS, Ended, FailureRecord, Outcome, Owner, Record

FAILURES = (FailureRecord("crash", 1, 0), FailureRecord("exception", 2, 5))


def head(kind: str, **fields: Any) -> Record:
    """The newest record of a log with two failures."""
    common = {"task": "t", "worker_id": "w", "owner": Owner("x"), "saved_at": 0.0, "life": 1, "attempt": 3, "token": 1}
    return Record(kind=kind, number=9, charged=2, failures=FAILURES, **{**common, **fields})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("cause", "progressed", "charged"),
    [
        ("exception", True, True),
        ("exception", False, True),
        ("stalled", True, True),
        ("SomeBaseException", True, True),
        ("exit", True, True),
        ("terminated", True, False),
        ("terminated", False, True),
        ("left", True, False),
        ("left", False, True),
        ("cancelled", True, False),
        ("cancelled", False, False),
    ],
)
def test_who_is_told_to_leave_is_excused_while_he_gets_on(cause: str, progressed: bool, charged: bool) -> None:
    """Otherwise a worker that always has to leave before its first save would be started for ever; cancel is free in any case."""
    assert is_charged(cause, progressed=progressed) is charged


@pytest.mark.parametrize(
    ("newest", "cost"),
    [
        (head("claim"), 1),
        (head("save"), 1),
        (head("save", ended=Ended("left", charged=False)), 0),
        (head("save", ended=Ended("exception", charged=True)), 0),
        (head("end", outcome=Outcome("failed")), 0),
        (head("end", outcome=Outcome("completed")), 0),
    ],
)
def test_only_an_attempt_without_a_last_word_is_a_crash(newest: Record, cost: int) -> None:
    """What was announced has been counted by the one who announced it."""
    assert cost_of_crash(newest) == cost


@pytest.mark.parametrize(
    "newest", [head("claim"), head("save"), head("save", ended=Ended("exception", charged=True)), head("end", outcome=Outcome("completed"))]
)
def test_nothing_but_a_recorded_failure_refills_the_budget(newest: Record) -> None:
    """A crash of the worker, the manager or the driver does not."""
    assert next_budget(newest) == (2, FAILURES)
    assert next_budget(head("end", outcome=Outcome("failed"))) == (0, ())


@pytest.mark.parametrize(
    ("charged", "max_failures", "over"), [(0, 0, False), (1, 0, True), (3, 3, False), (4, 3, True), (0, -1, False), (10**9, -1, False)]
)
def test_n_failures_are_survived(charged: int, max_failures: int, over: bool) -> None:
    """max_failures=N is N + 1 attempts; -1 is any number."""
    assert exhausted(charged, max_failures) is over


def test_the_history_is_limited_and_keeps_the_newest() -> None:
    """An unlimited budget must not let the records grow."""
    failures: tuple[FailureRecord, ...] = ()
    for attempt in range(1, 2 * MAX_FAILURE_RECORDS):
        failures = add_failure(failures, FailureRecord("exception", attempt, 0))
    assert [failure.attempt for failure in failures] == list(range(MAX_FAILURE_RECORDS, 2 * MAX_FAILURE_RECORDS))
