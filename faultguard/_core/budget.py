"""What the end of an attempt costs, and when there is nothing left to spend."""

from __future__ import annotations

from msgspec.structs import replace

from faultguard._core.records import MAX_FAILURE_RECORDS, FailureRecord, Record

__all__ = ["add_failure", "cost_of_crash", "exhausted", "is_charged", "next_budget"]

EXCUSED_CAUSES = frozenset({"cancelled", "drained", "terminated", "left", "finished elsewhere"})


def is_charged(cause: str, *, progressed: bool) -> bool:
    """Whether an end that the attempt itself announces is charged.

    An excused end (cancel, SIGTERM) is free only while the worker gets on: otherwise a worker that is always told to
    leave before its first save would be started for ever. Cancel is final, so it is free in any case.
    """
    if cause == "cancelled":
        return False
    return cause not in EXCUSED_CAUSES or not progressed


def cost_of_crash(head: Record) -> int:
    """What the next claim adds for the attempt that wrote `head`: 1 unless that one said how it ended."""
    return 0 if head.ended is not None or head.kind == "end" else 1


def next_budget(head: Record) -> tuple[int, tuple[FailureRecord, ...]]:
    """Charged ends and failures with which the attempt after `head` begins, before any crash is added.

    Only a recorded failure refills the budget. A crash, of whatever, refills nothing.
    """
    if head.kind == "end" and head.outcome is not None and head.outcome.status == "failed":
        return 0, ()
    return head.charged, head.failures


def add_failure(failures: tuple[FailureRecord, ...], failure: FailureRecord) -> tuple[FailureRecord, ...]:
    """The history with one more failure, which alone keeps its stacks; the oldest dropped beyond the limit."""
    known = (replace(known, stacks="") if known.stacks else known for known in failures)
    return (*known, failure)[-MAX_FAILURE_RECORDS:]


def exhausted(charged: int, max_failures: int) -> bool:
    """Whether `charged` failures are more than are survived; -1 survives any number."""
    return max_failures >= 0 and charged > max_failures
