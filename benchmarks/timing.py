"""Small tools of all measurements: variants in turn, medians, durable writes by hand, profiles as text."""

from __future__ import annotations

import cProfile
import functools
import io
import itertools
import os
import pstats
import statistics
import sys
import time
from typing import TYPE_CHECKING

from faultguard.storage import local

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

__all__ = ["DurableWriter", "in_turn", "median", "price_of_a_file", "profile", "ratio", "top", "us"]

median = statistics.median
RECENTLY_S = 420.0
CHEAP_S = 20e-6


def in_turn(rounds: int, **variants: Callable[[], float]) -> dict[str, list[float]]:
    """Run the variants alternately, first forwards, then backwards: what disturbs the machine meets all of them."""
    found: dict[str, list[float]] = {name: [] for name in variants}
    order = list(variants)
    for _ in range(rounds):
        for name in order:
            found[name].append(variants[name]())
        order.reverse()
    return found


def ratio(found: dict[str, list[float]], over: str, under: str) -> float:
    """The median over the rounds of the ratio within each."""
    return median([a / b for a, b in zip(found[over], found[under], strict=True)])


def timed(function: Callable[[], object], times: int = 1) -> float:
    """Seconds per call."""
    started = time.perf_counter()
    for _ in range(times):
        function()
    return (time.perf_counter() - started) / times


def us(seconds: float) -> str:
    """Seconds as microseconds."""
    return f"{seconds * 1e6:.3g} µs"


def price_of_a_file(directory: Path, *, wait: bool) -> float:
    """Seconds that it takes to make a file here. With `wait` that is let fall first, for seven minutes at most.

    ext4 looks at each inode that was deleted in the last five minutes before it takes another one: after a run of tests, or another
    benchmark, that is most of what a small file costs, whoever makes it.
    """
    rest = directory / "prices"
    rest.mkdir()
    deadline = time.monotonic() + (RECENTLY_S if wait else 0.0)
    for number in itertools.count():
        seconds = median(timed(functools.partial((rest / f"{number}-{each}").touch)) for each in range(50))
        if seconds <= CHEAP_S or time.monotonic() >= deadline:
            return seconds
        print(f"a file takes {us(seconds)} here, because many were deleted lately: waiting", file=sys.stderr, flush=True)
        time.sleep(RECENTLY_S / 20)
    raise AssertionError


class DurableWriter:
    """Makes bytes durable as one would by hand, so that they survive a crash here: write, fsync, link, fsync of the directory."""

    def __init__(self, directory: Path) -> None:
        directory.mkdir(parents=True)
        self._directory = os.fspath(directory)
        self.named = local._file_system(self._directory) in local._NAMED_FIRST
        self._count = 0

    def write(self, data: bytes) -> None:
        """Give `data` a new name; durable on return."""
        self._count += 1
        name = f"{self._count:09d}.json"
        directory = os.open(self._directory, os.O_RDONLY | os.O_DIRECTORY)
        try:
            if self.named:
                file = os.open(".temporary", os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666, dir_fd=directory)
            else:
                file = os.open(".", os.O_TMPFILE | os.O_WRONLY, 0o666, dir_fd=directory)
            try:
                os.write(file, data)
                os.fsync(file)
                # Without src_dir_fd Python calls link(), which does not follow, instead of linkat().
                source = ".temporary" if self.named else f"/proc/self/fd/{file}"
                os.link(source, name, src_dir_fd=directory, dst_dir_fd=directory, follow_symlinks=True)
            finally:
                os.close(file)
            if self.named:
                os.unlink(".temporary", dir_fd=directory)
            os.fsync(directory)
        finally:
            os.close(directory)


def profile(function: Callable[[], object], times: int, limit: int = 12) -> list[str]:
    """The functions that take most of the time of `function`, per call of it."""
    profiler = cProfile.Profile()
    profiler.enable()
    for _ in range(times):
        function()
    profiler.disable()
    return top(pstats.Stats(profiler, stream=io.StringIO()), times, limit)


def top(stats: pstats.Stats, times: int, limit: int = 12) -> list[str]:
    """The functions with most time of their own, in microseconds per repetition."""
    rows = [
        (own / times, total / times, calls / times, f"{os.path.basename(file)}:{line} {name}" if line else name)  # noqa: PTH119 - a label
        for (file, line, name), (_, calls, own, total, _) in stats.stats.items()  # type: ignore[attr-defined] # pstats is half typed
    ]
    rows.sort(reverse=True)
    lines = [f"{us(own):>9} own {us(total):>9} total {calls:5.3g} calls  {label}" for own, total, calls, label in rows[:limit]]
    return [f"profile (its own cost included), all functions {us(sum(row[0] for row in rows))}:", *lines]
