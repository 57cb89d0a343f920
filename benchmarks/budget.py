"""The performance budget, as one table: what is promised, and how it is measured."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

__all__ = ["BUDGET", "Bench", "Item", "Measured"]


@dataclass(frozen=True, slots=True)
class Bench:
    """What a measurement may use.

    Attributes:
        quick: fewer repetitions, shorter tasks: shows that it works, proves nothing.
        directory: a folder on a real disk, of this measurement's own.
    """

    quick: bool
    directory: Path


@dataclass(frozen=True, slots=True)
class Measured:
    """What a measurement found.

    Attributes:
        value: in the unit of its item.
        details: lines that say how it came about: medians, counts, the other side of the ratio.
        explain: where the time goes; asked when the bar is missed, or with `--explain`.
    """

    value: float
    details: tuple[str, ...] = ()
    explain: Callable[[], list[str]] = field(default=list)


class Measure(Protocol):
    """One measurement; raises when it could not be made."""

    def __call__(self, bench: Bench) -> Measured: ...


@dataclass(frozen=True, slots=True)
class Item:
    """One row of the budget.

    Attributes:
        name: for `--only`.
        what: is measured.
        bar: to be met.
        unit: of the bar and the value.
        at_least: whether more is better.
        function: `module:function` in this folder.
        gates: whether `--check` fails when it misses.
    """

    name: str
    what: str
    bar: float
    unit: str
    function: str
    at_least: bool = False
    gates: bool = False

    def meets(self, value: float) -> bool:
        """Whether a value is within the bar."""
        return value >= self.bar if self.at_least else value <= self.bar

    def shown(self, value: float) -> str:
        """A value of this row, with its unit."""
        return f"{value:.3g} {self.unit}"


BUDGET = (
    Item("loop", "a batch of `batches(range(n))`, nothing due, over the bare loop", 0.3, "µs", "handle:loop", gates=True),
    Item("snapshot", "snapshot of 20 int, 40 float, 20 str on the main thread, p50", 25, "µs", "handle:snapshot", gates=True),
    Item("durable", "`advance(wait=True)` over the same bytes durable by hand", 1.5, "x", "handle:durable", gates=True),
    Item("exception", "exception → first resumed batch, over one durable write of the record", 6, "x", "recovery:exception"),
    Item("sigkill", "SIGKILL → first resumed batch: our share of plain Ray's crash retry", 10, "%", "recovery:sigkill"),
    Item("tasks", "no-op tasks, unnamed run: throughput over plain Ray", 0.6, "x", "tasks:throughput", at_least=True),
    Item("program", "a program of 10 000 short tasks, all decorated, over plain; no file is left", 1.7, "x", "tasks:program"),
    Item("auto", '`every="auto"`: main thread inside faultguard + its threads, over wall time', 1, "%", "tasks:auto"),
    Item("named", "no-op tasks, named run: throughput over plain Ray", 0.3, "x", "tasks:named", at_least=True),
    Item("resumable", "`check_resumable` over a loop of 100 batches", 1, "s", "handle:resumable"),
    Item("manager", "manager: CPU at ten times the workers of a 5 s interval", 50, "% of a core", "listening:manager"),
    Item("frozen", "frozen node: next attempt started by Ray → first batch", 2, "s", "disasters:frozen"),
    Item("killed", "120 s of work killed after every 10 s, over undisturbed", 1.3, "x", "disasters:killed"),
)
"""The rows of the budget in `docs/design.md`."""
