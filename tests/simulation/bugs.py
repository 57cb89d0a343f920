"""Planted bugs: one line of one copy is switched, to what a tempting simplification would be."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tests.model import VARIANTS, Variant
from tests.simulation.tokens import plant

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.simulation.library import Library

__all__ = ["BUGS"]

RULES = "faultguard._core.log"
LATE = 'return "claim" if owner.writer == me.owner.writer else "refuse"'

BUGS: dict[str, Variant | Callable[[Library], None]] = {
    **{
        name: VARIANTS[name]
        for name in (
            "keep by number",
            "no second listing",
            "claims deleted by retention",
            "order of claims by arrival",
            "unanswered create forgotten",
            "older driver admitted",
            "every crash blamed on the batch of its last record",
        )
    },
    "late claim of a log that is another task's": Variant(
        RULES, LATE, 'return "refuse" if owner.writer != me.owner.writer and same_task(owner, me.owner) else "claim"'
    ),
    "late claim that supersedes a re-run": Variant(
        RULES, LATE, 'return "claim" if owner.writer == me.owner.writer or same_task(owner, me.owner) else "refuse"'
    ),
    "attempt that left nothing is not charged": Variant(
        RULES, "return _after_unrecorded(base, me) if me.unrecorded else base", "return base"
    ),
    "large result of a deferred task leaves no end": Variant(
        "faultguard._attempt",
        "if isinstance(self._opened, Deferred) and stays_with_its_owner(value) and self._is_over():",
        "if isinstance(self._opened, Deferred) and self._is_over():",
    ),
    "absence of the process counts as a stall": Variant("faultguard._watcher", "awake = _clock.read(now)", "awake = now"),
    "stall that arrives after its batch": Variant("faultguard._stall", "_take_back(self._thread)", "pass"),
    "token of a claim that a power failure can take": Variant("faultguard._journal", "self._insist(self._settle)", "pass"),
    "newest token wins": plant,
}
