"""What the end of an attempt costs, what is given back, and when there is nothing left to spend."""

from __future__ import annotations

from dataclasses import dataclass

from msgspec.structs import replace

from faultguard._core.records import MAX_FAILURE_RECORDS, FailureRecord, Place, Record

__all__ = [
    "MAX_QUARANTINED",
    "PLAIN",
    "POISON_FAILURES",
    "Budget",
    "Policy",
    "add_failure",
    "batch_of",
    "charge",
    "cost_of_crash",
    "exhausted",
    "is_charged",
    "is_later",
    "must_pin",
    "next_budget",
    "poison_batch",
]

EXCUSED_CAUSES = frozenset({"cancelled", "drained", "terminated", "left", "finished elsewhere"})
POISON_FAILURES = 3  # in a row, at one batch
MAX_QUARANTINED = 100  # batches of a worker; more are no accident


@dataclass(frozen=True, slots=True)
class Policy:
    """What the user wants counted otherwise. Whoever writes the record that counts a failure decides by it.

    Attributes:
        reset_on_progress: a failure further on than all before it starts the count anew.
        skip_poison: a batch that fails three times in a row is quarantined, and its failures are given back.
    """

    reset_on_progress: bool = False
    skip_poison: bool = False


PLAIN = Policy()


@dataclass(frozen=True, slots=True)
class Budget:
    """What was spent so far. `failures` is the history, also of what was given back or forgiven."""

    charged: int = 0
    failures: tuple[FailureRecord, ...] = ()
    quarantined: tuple[Place, ...] = ()


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


def next_budget(head: Record) -> Budget:
    """With what the attempt after `head` begins, before any crash is added.

    Only a recorded failure refills the budget. A crash, of whatever, refills nothing. What is quarantined stays so for this life.
    """
    if head.kind == "end" and head.outcome is not None and head.outcome.status == "failed":
        return Budget(quarantined=head.quarantined)
    return Budget(head.charged, head.failures, head.quarantined)


def charge(budget: Budget, failure: FailureRecord, policy: Policy) -> Budget:
    """The budget after one more failure.

    "Further on" is further than every failure before it. Were it only the last one, a batch that raises, and a crash on the
    way to it, would take turns for ever.
    """
    progressed = policy.reset_on_progress and all(is_later(failure.place, before.place) for before in budget.failures)
    charged = 1 if progressed else budget.charged + 1
    failures = add_failure(budget.failures, failure)
    explained = _explained(failures)
    if not policy.skip_poison or not explained or len(budget.quarantined) >= MAX_QUARANTINED:
        return Budget(charged, failures, budget.quarantined)
    return Budget(max(charged - explained, 0), failures, (*budget.quarantined, failure.place))


def _explained(failures: tuple[FailureRecord, ...]) -> int:
    """How many of the last failures come of the batch to which the newest is pinned; 0 while that has not failed often enough.

    A crash that is pinned to no batch, at or before that one, does not count as one of its failures, and does not interrupt them.
    """
    newest = failures[-1]
    pinned = others = 0
    for failure in reversed(failures if newest.pinned else ()):
        if failure.pinned and batch_of(failure.place) == batch_of(newest.place):
            pinned += 1
        elif failure.pinned or not failure.wordless or is_later(failure.place, newest.place):
            break
        else:
            others += 1
    return pinned + others if pinned >= POISON_FAILURES else 0


def must_pin(predecessor: str, failures: tuple[FailureRecord, ...]) -> bool:
    """Whether an attempt that follows `predecessor` records each batch before it begins: or nobody knows which one kills its process.

    After a crash, and after what else failed since, as long as both can come of one batch.
    """
    recent = failures[-POISON_FAILURES + 1 :]
    return predecessor not in EXCUSED_CAUSES and any(failure.wordless for failure in recent)


def is_later(place: Place, other: Place) -> bool:
    """Whether a worker that comes to `place` has got further than `other`."""
    return [(spot.before, spot.done) for spot in place] > [(spot.before, spot.done) for spot in other]


def batch_of(place: Place) -> tuple[tuple[str, int], ...]:
    """What makes a batch the same batch: the loops by name, and where each stood."""
    return tuple((spot.loop, spot.done) for spot in place)


def poison_batch(failures: tuple[FailureRecord, ...]) -> int | None:
    """The batch at which the last failures in a row happened, if there were enough of them."""
    last = failures[-POISON_FAILURES:]
    if len(last) < POISON_FAILURES or len({(failure.batch, failure.position, batch_of(failure.place)) for failure in last}) > 1:
        return None
    return last[-1].batch


def add_failure(failures: tuple[FailureRecord, ...], failure: FailureRecord) -> tuple[FailureRecord, ...]:
    """The history with one more failure, which alone keeps its stacks; the oldest dropped beyond the limit."""
    known = (replace(known, stacks="") if known.stacks else known for known in failures)
    return (*known, failure)[-MAX_FAILURE_RECORDS:]


def exhausted(charged: int, max_failures: int) -> bool:
    """Whether `charged` failures are more than are survived; -1 survives any number."""
    return max_failures >= 0 and charged > max_failures
