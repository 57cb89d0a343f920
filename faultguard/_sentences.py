"""What is said on the terminal about attempts: one line each, ids first, because Ray folds lines that are alike."""

from __future__ import annotations

import logging
import time
from typing import TYPE_CHECKING

from faultguard import _events
from faultguard._core.budget import batch_of

if TYPE_CHECKING:
    from faultguard._core.log import Held
    from faultguard._core.records import FailureRecord, Place, Record
    from faultguard._handle import Checkpoint
    from faultguard._settings import Settings

__all__ = [
    "LONG_WAIT_S",
    "place_of",
    "say_completed_already",
    "say_damaged",
    "say_from_zero",
    "say_given_up",
    "say_leaves",
    "say_quarantined",
    "say_resumed",
]

LONG_WAIT_S = 1.0  # shorter waits are worth neither a word nor a call


def say_resumed(handle: Checkpoint, held: Held, max_failures: int, wait_s: float = 0.0, *, beside: bool = False) -> None:
    """One line per failure and resume, ids first: Ray folds lines that are alike."""
    failure = held.failures[-1]
    of = "" if max_failures < 0 else f" of {held.attempt + max_failures - held.charged}"
    where = place_of(handle.position, handle.restored_total)
    ago = max(time.time() - failure.time, 0.0)
    there = "there" if failure.position == handle.position else f"at {place_of(failure.position)}"
    how = f"with {failure.message}" if failure.message else f"by {failure.cause} (pid {failure.pid})"
    when = f" {ago:.1f} s ago" if failure.cause != "crash" else ""
    known = bool(failure.message) or failure.pinned  # else all that is known is what it had saved
    end = f"failed {there}{when} {how}" if known else f"ended{when} {how}, at that batch or a later one"
    after = f", after a wait of {wait_s:.1f} s" if wait_s >= LONG_WAIT_S else ""
    emit = _events.emit_beside if beside else _events.emit
    emit(
        logging.WARNING,
        "faultguard.attempt_resumed",
        f"'{handle.task}/{handle.worker_id}' attempt {held.attempt}{of} resumes at {where}{after}: attempt {failure.attempt} {end}.",
        **handle.fields(),
        cause=failure.cause,
        node=failure.node_id,
        failed_pid=failure.pid,
        failed_batch=failure.batch,
        wait_s=round(wait_s, 3),
        ago_s=round(ago, 3),
    )


def place_of(position: tuple[int, ...], total: int | None = None) -> str:
    """A batch, as people name it: `batch 3 of 8`, in nested loops with where the outer ones are."""
    batch = f"batch {position[-1] if position else 0}" + (f" of {total}" if total is not None else "")
    return batch + (f" (position {', '.join(map(str, position))})" if len(position) > 1 else "")


def say_given_up(handle: Checkpoint, failure: FailureRecord, max_failures: int | None) -> None:
    """The last one."""
    why = "it is not retried" if max_failures is None else f"max_failures={max_failures} is used up"
    text = f"{_failed(handle, failure)}; {why}."
    _events.emit(logging.WARNING, "faultguard.attempt_failed", text, **handle.fields(), cause=failure.cause, node=failure.node_id)


def _failed(handle: Checkpoint, failure: FailureRecord) -> str:
    return f"'{handle.task}/{handle.worker_id}' attempt {failure.attempt} failed at {place_of(failure.position)} with {failure.message}"


def say_quarantined(handle: Checkpoint, held: Held, before: tuple[Place, ...], *, beside: bool = False) -> None:
    """One line per batch that was not quarantined before."""
    emit = _events.emit_beside if beside else _events.emit
    for place in held.quarantined[len(before) :]:
        failure = held.failures[-1]
        loops = ", ".join(f"{spot.loop!r}" for spot in place)
        where = f"{place_of(tuple(spot.done for spot in place))} of {loops}"
        how = failure.message or failure.cause
        text = (
            f"'{handle.task}/{handle.worker_id}' quarantines {where}: three attempts failed there, attempt {failure.attempt} with {how}. "
            f"It is passed over from now on, and its failures are given back."
        )
        fields = {**handle.fields(), "quarantined": batch_of(place), "cause": failure.cause}
        emit(logging.WARNING, "faultguard.batch_quarantined", text, **fields)


def say_leaves(handle: Checkpoint, failure: FailureRecord, why: str) -> None:
    """It goes on, and not here."""
    text = f"{_failed(handle, failure)}; a new process goes on, because {why}."
    _events.emit(logging.WARNING, "faultguard.attempt_left", text, **handle.fields(), cause=failure.cause)


def say_from_zero(handle: Checkpoint) -> None:
    text = (
        f"'{handle.task}/{handle.worker_id}' finds nothing of the attempts before it: they died before they began, or its records were "
        f"removed. It begins from zero."
    )
    _events.emit_beside(logging.WARNING, "faultguard.from_zero", text, **handle.fields())


def say_damaged(handle: Checkpoint, damaged: tuple[int, ...]) -> None:
    text = (
        f"'{handle.task}/{handle.worker_id}' found damaged checkpoint records {', '.join(map(str, damaged))} and set them aside; it "
        f"goes on from the newest intact one."
    )
    _events.emit(logging.WARNING, "faultguard.record_damaged", text, **handle.fields(), damaged=list(damaged))


def say_completed_already(record: Record, settings: Settings, then: str) -> None:
    """In a named run an id is one piece of work: whoever asks twice is told what comes of it."""
    text = f"'{record.task}/{record.worker_id}' was completed by this driver already: {then}"
    fields = {"run": settings.run, "task": record.task, "worker_id": record.worker_id, "attempt": record.attempt, "token": record.token}
    _events.emit(logging.WARNING, "faultguard.completed_already", text, **fields)
