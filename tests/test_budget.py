"""What the end of an attempt costs, and what is given back."""

from __future__ import annotations

from typing import Any

import pytest

from faultguard._core.budget import (
    MAX_QUARANTINED,
    PLAIN,
    Budget,
    Policy,
    add_failure,
    charge,
    cost_of_crash,
    exhausted,
    is_charged,
    is_later,
    must_pin,
    next_budget,
    poison_batch,
)
from faultguard._core.records import MAX_FAILURE_RECORDS, Ended, FailureRecord, Mark, Outcome, Owner, Place, Record, Snapshot, Spot

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
    assert next_budget(newest) == Budget(2, FAILURES)
    assert next_budget(head("end", outcome=Outcome("failed"))) == Budget()


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


# --- progress -------------------------------------------------------------------------------------------------------

RESET, SKIP = Policy(reset_on_progress=True), Policy(skip_poison=True)


def at(*steps: int, loops: str = "abc") -> Place:
    """A place in nested loops, each the first of its scope."""
    return tuple(Spot(name, 0, done) for name, done in zip(loops, steps, strict=False))


def raised(*steps: int) -> FailureRecord:
    """An exception in a batch."""
    return FailureRecord("exception", 1, steps[-1], "ValueError", position=steps, place=at(*steps), pinned=True)


def crashed(*steps: int, pinned: bool = False, cause: str = "crash") -> FailureRecord:
    """A process that died after a record at that place, which may have been made for the batch that began there."""
    return FailureRecord(cause, 1, 0, place=at(*steps), pinned=pinned)


def after(policy: Policy, *failures: FailureRecord, budget: Budget = Budget()) -> Budget:  # noqa: B008 - frozen
    """The budget that these failures leave."""
    for failure in failures:
        budget = charge(budget, failure, policy)
    return budget


@pytest.mark.parametrize(
    ("place", "other", "later"),
    [
        (at(4), at(3), True),
        (at(3), at(3), False),
        (at(3), at(4), False),
        (at(1, 0), at(0, 9), True),
        (at(0, 9), at(1, 0), False),
        (at(1, 0), at(1), True),
        (at(1), at(1, 0), False),
        (at(0), (), True),
        ((), (), False),
        ((Spot("first", 0, 9),), (Spot("second", 1, 0),), False),
        ((Spot("second", 1, 0),), (Spot("first", 0, 9),), True),
    ],
)
def test_places_are_ordered_as_the_work_is(place: Place, other: Place, later: bool) -> None:
    """Outer loops decide, a loop that follows another one is further on, and the same place is not."""
    assert is_later(place, other) is later


def test_a_snapshot_has_the_place_of_the_loops_that_were_left_last() -> None:
    """With how many loops came before each."""
    loops = ((Mark("a", 9, finished=True), Mark("b", 2)), (Mark("c", 7),))
    assert Snapshot(state=b"{}", loops=loops).place == (Spot("b", 1, 2), Spot("c", 0, 7))  # type: ignore[arg-type] # not looked at
    assert Snapshot(state=b"{}").place == ()  # type: ignore[arg-type]


def test_progress_starts_the_count_anew_only_where_that_is_asked_for() -> None:
    """A failure further on than all before it counts as the first."""
    failures = [raised(batch) for batch in range(6)]
    assert after(PLAIN, *failures).charged == 6
    assert after(RESET, *failures) == Budget(1, tuple(failures))
    assert after(RESET, raised(3), raised(3), raised(5), raised(5)).charged == 2


def test_without_progress_the_count_goes_on() -> None:
    """Also when a batch that raises takes turns with crashes on the way to it: "further than the last one" would never end."""
    assert after(RESET, *[raised(3)] * 5).charged == 5
    assert after(RESET, *[raised(25), crashed(22)] * 4).charged == 8


def test_a_crash_is_as_far_as_what_was_durable() -> None:
    """It refills nothing by itself; with a durable position further on than all before it, there was progress."""
    assert after(RESET, *[crashed()] * 4).charged == 4
    assert after(RESET, crashed(3), crashed(3), crashed(4)).charged == 1


# --- quarantine -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "failures",
    [
        (raised(3),) * 3,
        (crashed(3, pinned=True),) * 3,
        (crashed(3, pinned=True), raised(3), crashed(3, pinned=True, cause="oom")),
        (crashed(1), crashed(3, pinned=True), crashed(3), raised(3), raised(3)),
        (crashed(1, cause="stall"), *[crashed(3, pinned=True, cause="stall")] * 3),
    ],
)
def test_three_failures_in_a_row_quarantine_a_batch(failures: tuple[FailureRecord, ...]) -> None:
    """They are given back, with the crashes on the way to it; the history keeps them."""
    assert after(SKIP, raised(1), *failures) == Budget(1, (raised(1), *failures), (at(3),))
    assert after(PLAIN, raised(1), *failures).quarantined == ()


@pytest.mark.parametrize(
    "failures",
    [
        (raised(3), raised(3)),
        (raised(3), raised(4), raised(3), raised(3)),
        (raised(3), raised(3), crashed(3)),
        (crashed(3),) * 3,
        (raised(3), crashed(4), raised(3), raised(3)),
        (raised(0, 3), raised(1, 3), raised(0, 3)),
        (raised(3), raised(3), FailureRecord("exit", 1, 3, "SystemExit", place=at(3)), raised(3)),
        (FailureRecord("exception", 1, 0),) * 3,
    ],
)
def test_without_three_that_are_pinned_in_a_row_nothing_is(failures: tuple[FailureRecord, ...]) -> None:
    """Batch 3 of epoch 0 is not that of epoch 1; a crash that is pinned to nothing is nobody's; what is further on interrupts."""
    assert after(SKIP, *failures) == Budget(len(failures), failures)


def test_a_batch_is_known_by_the_names_of_its_loops() -> None:
    """Batch 3 of one loop is not batch 3 of the next one."""
    other = FailureRecord("exception", 1, 3, place=(Spot("other", 1, 3),), pinned=True)
    assert after(SKIP, raised(3), raised(3), other).quarantined == ()
    assert poison_batch((raised(3), raised(3), raised(3))) == 3
    assert poison_batch((raised(3), raised(3), other)) is None


def test_quarantine_has_a_limit_and_lasts() -> None:
    """Beyond it the budget decides; a new budget in the same life keeps the list."""
    budget = Budget()
    for batch in range(MAX_QUARANTINED + 1):
        budget = after(SKIP, *[raised(batch)] * 3, budget=budget)
    assert (len(budget.quarantined), budget.charged) == (MAX_QUARANTINED, 3)
    for newest in (head("save", quarantined=(at(3),)), head("end", quarantined=(at(3),), outcome=Outcome("failed"))):
        assert next_budget(newest).quarantined == (at(3),)


@pytest.mark.parametrize(
    ("predecessor", "failures", "pins"),
    [
        ("crash", (crashed(3),), True),
        ("crash", (crashed(3, cause="stall"),), True),
        ("exception", (crashed(3), raised(3)), True),
        ("exception", (crashed(3), raised(3), raised(3)), False),
        ("exception", (raised(3),), False),
        ("drained", (crashed(3),), False),
        ("", (), False),
    ],
)
def test_who_follows_a_crash_pins(predecessor: str, failures: tuple[FailureRecord, ...], pins: bool) -> None:
    """Also when exceptions came since, for a batch may fail in several ways; not for ever, and not because a node was drained."""
    assert must_pin(predecessor, failures) is pins


def test_nothing_is_given_back_twice() -> None:
    """What progress has forgiven already is not paid out."""
    both = Policy(reset_on_progress=True, skip_poison=True)
    assert after(both, crashed(), crashed(1), *[raised(3)] * 3).charged == 0
    assert after(both, crashed(), crashed(1), *[raised(3)] * 3, raised(4)).charged == 1
