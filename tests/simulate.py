"""Deterministic simulation: the library under one thread, a seeded scheduler, a fake clock and a faulty store.

`python -m tests.simulate --seeds 10000 --from 0` goes through schedules, `--replay SEED` prints the story of one. `--bug NAME` plants a
bug first, `--bugs` lists them.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import sys
import time
from typing import TYPE_CHECKING, Any

from tests.simulation.bugs import BUGS
from tests.simulation.cluster import Cluster
from tests.simulation.library import Library
from tests.simulation.strands import Killed

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

__all__ = ["find", "library_with", "story_of"]

COLLECT_EVERY = 50  # schedules
SAY_EVERY_S = 10.0


def library_with(bug: str = "") -> Library:
    """The library, with a planted bug or without."""
    return Library(BUGS[bug] if bug else None)


def story_of(seed: int, library: Library) -> list[str]:
    """Go through the schedule of a seed.

    Raises:
        Violation: a guarantee does not hold; with the story.
    """
    with _undisturbed():
        return Cluster(seed, library).live()


def find(seeds: Iterable[int], library: Library) -> tuple[int, str] | None:
    """The first of these seeds whose schedule breaks a guarantee, and what it broke, with the story."""
    for seed in seeds:
        if seed % COLLECT_EVERY == 0:
            gc.collect()
        try:
            story_of(seed, library)
        except AssertionError as violation:
            return seed, str(violation)
    return None


@contextlib.contextmanager
def _undisturbed() -> Iterator[None]:
    """No garbage is collected: the end of a generator takes locks, and must come at the same place every time.

    What dies, or is cut, while a generator ends tells nobody: Python drops it there.
    """
    enabled, hook = gc.isenabled(), sys.unraisablehook
    gc.disable()
    sys.unraisablehook = lambda what: None if isinstance(what.exc_value, (Killed, SystemExit, KeyboardInterrupt)) else hook(what)
    try:
        yield
    finally:
        sys.unraisablehook = hook
        if enabled:
            gc.enable()


def _simulate(first: int, seeds: int, bug: str) -> int:
    library, began = library_with(bug), time.monotonic()
    said = began
    for seed in range(first, first + seeds):
        found = find([seed], library)
        now = time.monotonic()
        if found is not None:
            again = f"python -m tests.simulate --replay {seed}" + (f" --bug {bug!r}" if bug else "")
            print(f"seed {seed} breaks a guarantee, after {seed - first} that did not: {again}\n{found[1]}")
            return 1
        if now - said > SAY_EVERY_S:
            said = now
            print(f"{seed - first + 1} schedules, {60 * (seed - first + 1) / (now - began):.0f} per minute", flush=True)
    rate = 60 * seeds / max(time.monotonic() - began, 1e-9)
    print(f"{seeds} schedules, seeds {first} to {first + seeds - 1}: every guarantee holds ({rate:.0f} schedules per minute)")
    return 0


def _replay(seed: int, bug: str) -> int:
    try:
        story: Any = story_of(seed, library_with(bug))
    except AssertionError as violation:
        print(violation)
        return 1
    print("\n".join(story))
    return 0


def main(arguments: list[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m tests.simulate", description="Deterministic simulation.")
    parser.add_argument("--seeds", type=int, default=10_000, help="how many schedules")
    parser.add_argument("--from", type=int, default=0, dest="first", help="the first seed")
    parser.add_argument("--replay", type=int, help="print the story of this seed")
    parser.add_argument("--bug", choices=sorted(BUGS), default="", help="plant this bug", metavar="NAME")
    parser.add_argument("--bugs", action="store_true", help="list the bugs")
    given = parser.parse_args(arguments)
    if given.bugs:
        print("\n".join(BUGS))
        return 0
    return _replay(given.replay, given.bug) if given.replay is not None else _simulate(given.first, given.seeds, given.bug)


if __name__ == "__main__":
    sys.exit(main())
