"""Measure the performance budget: each row in one run, beside what it is compared with.

    python benchmarks/run.py [--quick] [--only loop,durable] [--explain] [--json FILE] [--check]

Only ratios mean anything, and only those of one run: the machine is the same, and the variants took turns. What misses its bar
is followed by where its time goes; with `--explain` each row is, that has a profile.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import platform
import sys
import tempfile
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # Python puts only this folder there

from benchmarks.budget import BUDGET, Bench, Item, Measured

if TYPE_CHECKING:
    from collections.abc import Sequence

NAME_WIDTH = 10
DISK = "/var/tmp"  # noqa: S108 - /tmp is memory on many systems, where an fsync costs nothing


@dataclass(frozen=True, slots=True)
class Row:
    """A row of the budget and what came of it: a measurement, or an error."""

    item: Item
    measured: Measured | None = None
    explained: tuple[str, ...] = ()  # where the time goes, if it misses or that was asked
    error: str = ""

    @property
    def verdict(self) -> str:
        """In one word, or two."""
        if self.measured is not None:
            return "meets" if self.item.meets(self.measured.value) else "MISSES"
        return "NOT MEASURED"

    def as_json(self) -> dict[str, object]:
        """For a machine."""
        value = self.measured.value if self.measured is not None else None
        details = self.measured.details if self.measured is not None else ()
        item = self.item
        return {
            "name": item.name,
            "what": item.what,
            "value": value,
            "unit": item.unit,
            "bar": item.bar,
            "at_least": item.at_least,
            "verdict": self.verdict,
            "details": details,
            "explained": self.explained,
            "error": self.error,
        }


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print, and say with the exit code whether that worked."""
    options = _parse(arguments)
    items = [item for item in BUDGET if not options.only or item.name in options.only]
    print(f"Python {platform.python_version()}, {os.cpu_count()} CPUs, {platform.system()} {platform.release()}, {options.dir}")
    if options.quick:
        print("--quick: too short to judge by")
    rows = []
    for item in items:
        rows.append(_measure(item, quick=options.quick, parent=options.dir, explain=options.explain))
        _print(rows[-1])  # as soon as it is known
    if len(rows) > 1:
        print("\n" + _table(rows))
    if options.json:
        Path(options.json).write_text(json.dumps([row.as_json() for row in rows], indent=1) + "\n", encoding="utf-8")
    return _exit_code(rows, check=options.check)


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    names = [item.name for item in BUDGET]
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="fewer repetitions, shorter tasks")
    parser.add_argument("--only", type=lambda text: text.split(","), default=[], metavar="NAME,...", help=f"of {', '.join(names)}")
    parser.add_argument("--explain", action="store_true", help="say where the time goes, also of what meets its bar")
    parser.add_argument("--json", metavar="FILE", help="write the rows there, too")
    parser.add_argument("--check", action="store_true", help="exit with 1 if loop, snapshot or durable misses its bar")
    parser.add_argument("--dir", default=DISK, help="where to write; must be a real disk (default: %(default)s)")
    options = parser.parse_args(arguments)
    unknown = sorted(set(options.only) - set(names))
    if unknown:
        parser.error(f"--only {','.join(unknown)}: no such row; there are {', '.join(names)}")
    return options


def _measure(item: Item, *, quick: bool, parent: str, explain: bool) -> Row:
    """One row, in a directory of its own."""
    module, _, name = item.function.partition(":")
    try:
        with tempfile.TemporaryDirectory(prefix="faultguard-bench-", dir=parent, ignore_cleanup_errors=True) as directory:
            bench = Bench(quick, Path(directory))
            measured: Measured = getattr(importlib.import_module(f"benchmarks.{module}"), name)(bench)
            return Row(item, measured, tuple(measured.explain()) if explain or not item.meets(measured.value) else ())
    except Exception as error:  # noqa: BLE001 - one row that cannot be measured must not hide the others
        traceback.print_exc()
        return Row(item, error=f"{type(error).__name__}: {error}")


def _print(row: Row) -> None:
    details = row.measured.details if row.measured is not None else (row.error,) if row.error else ()
    print("\n" + "\n    ".join([_line(row), *details, *row.explained]), flush=True)


def _line(row: Row) -> str:
    item = row.item
    value = item.shown(row.measured.value) if row.measured is not None else "-"
    bar = f"{'≥' if item.at_least else '≤'} {item.bar:g} {item.unit}"
    return f"{item.name:<{NAME_WIDTH}} {value:>10}  {bar:<16}  {row.verdict:<12}  {item.what}"


def _table(rows: list[Row]) -> str:
    head = f"{'row':<{NAME_WIDTH}} {'measured':>10}  {'bar':<16}  {'':<12}  what"
    return "\n".join([head, *map(_line, rows)])


def _exit_code(rows: list[Row], *, check: bool) -> int:
    if any(row.error for row in rows):
        return 2
    missed = any(row.item.gates and row.verdict == "MISSES" for row in rows)
    return 1 if check and missed else 0


if __name__ == "__main__":
    sys.exit(main())
