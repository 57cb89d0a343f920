"""The obvious protocol, planted as a bug: a counter grants tokens, everybody writes on under his own, and the newest token wins on load.

It breaks its fence (G3) with two incarnations, which the world sees at once. Here the world looks at nothing but the resume points (G2),
which go back only with four: 1 and 2 are frozen, 1 thaws and saves, 3 resumes there and dies, 2 thaws and saves less, 4 resumes at that.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from faultguard._core.records import Record
from tests.simulation.cluster import SimLedger, Sky

if TYPE_CHECKING:
    from collections.abc import Callable, Generator

    from tests.model import Grant, Promise
    from tests.simulation.library import Library

__all__ = ["plant"]

TRIES = 5


def plant(library: Library) -> None:
    """Replace the rules; the store works, so that nothing else breaks."""
    log = library.log
    log._load_once = lambda numbers: _load(log, numbers)
    log._append = _append(log, log._append)
    log.superfluous = lambda *_: []
    log.superseded = _never
    library.fair, library.only, library.sky, library.ledger = True, "G2", BlindSky, BlindLedger


def _load(log: Any, numbers: list[int]) -> Generator[Any, Any, Any]:
    """Everything is read; the newest token decides."""
    records = []
    for number in numbers:
        record = yield from log._read(number)
        if isinstance(record, Record):
            records.append(record)
    head = max(records, key=_age, default=None)
    states = [record for record in records if record.snapshot is not None and head is not None and record.life == head.life]
    holder = max(states, key=_age, default=None)
    if holder is None:
        return log.Loaded(head, None, 0, (), tuple(numbers))
    return log.Loaded(head, holder.snapshot, holder.number, (), tuple(numbers))


def _age(record: Record) -> tuple[int, int]:
    return record.token, record.number


def _append(log: Any, original: Callable[..., Any]) -> Callable[..., Any]:
    """Under the next free number, whoever has the one that was meant."""

    def append(held: Any, record: Record) -> Generator[Any, Any, bool]:
        for _ in range(TRIES):
            number = max((yield log.List()), default=0) + 1
            token = number if record.kind == "claim" and not record.owner.local_retry else held.token
            if (yield from original(held, log.replace_record(record, number=number, token=token))):
                return True
        return False

    return append


def _never(_: Any) -> Generator[Any, Any, bool]:
    """Nobody is superseded: the manager would say so, and is not asked."""
    yield from ()
    return False


class BlindSky(Sky):
    """Sees what is created, and judges nothing."""

    def _mutate(self, who: Any, text: str, change: Callable[[], Any]) -> Any:
        self.say(f"{who.name}: {text}")
        return change()

    def check_whole(self, record: Record) -> None:
        """Nothing."""


class BlindLedger(SimLedger):
    """Knows only the resume points of those who load; a retry in the process goes on from what it has in hand."""

    def grant(self, new: Grant) -> None:
        """As ever, of a first attempt of a process."""
        if not new.owner.local_retry:
            super().grant(new)

    def follows(self, new: Record, old: Record, moment: int) -> None:
        """Nothing."""

    def outcome(self, life: int, value: bytes) -> None:
        """Nothing."""

    def _in_turn(self, first: Grant, second: Grant) -> bool:
        return False

    def _check_fence(self, grant: Grant, promise: Promise) -> None:
        """Nothing."""

    def _check_budget(self, new: Grant) -> None:
        """Nothing."""
