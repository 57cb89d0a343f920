"""Loops that count wrong once they resume, told where that is seen: what was seen, why it is wrong, what to write.

Each is a warning, at most once per task (decorated function), run and process, and only of what is certain. Nothing is added to a
batch: one is looked for where a loop begins, where a snapshot is large, or where an attempt that has resumed ends. What cannot work
at all is refused where it is asked for, not here.
"""

from __future__ import annotations

import asyncio
import math
import os
import sys
import threading
from collections import Counter, OrderedDict, deque
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, TypeVar

from faultguard import _codec

if TYPE_CHECKING:
    from types import FrameType

    from faultguard._core.cursors import Loop
    from faultguard._handle import Checkpoint

__all__ = ["LARGE_BYTES", "Batches", "Growth", "Origin", "StateBefore", "forks", "result_beside_state", "tell"]

T_co = TypeVar("T_co", covariant=True)
MAX_TOLD = 10_000
_told: set[tuple[str, str, str]] = set()


def tell(handle: Checkpoint, event: str, sentence: str, **fields: Any) -> None:
    """Warn of something, unless this process has told it of this task in this run; the sentence goes on from the ids."""
    key = (handle.run, handle.task, event)
    if key in _told or len(_told) >= MAX_TOLD:
        return
    _told.add(key)
    import logging

    from faultguard import _events

    text = f"'{handle.task}/{handle.worker_id}' {sentence}"
    _events.emit(logging.WARNING, f"faultguard.{event}", text, **handle.fields(), **fields)


# --- a handle in a forked child -------------------------------------------------------------------------------------

forks = [0]  # how many lie between the first process and this one; a handle is of the process that made it


def _count_fork() -> None:
    forks[0] += 1


os.register_at_fork(after_in_child=_count_fork)

# --- batches drawn ahead of the work --------------------------------------------------------------------------------

_EXECUTORS = ("concurrent.futures.", "multiprocessing.")  # modules that draw all, and hand it on
_AHEAD = (
    "A batch counts as done when the next one is drawn, so a checkpoint counts work that has not begun, and what resumes leaves it out. "
    "Write `for batch in batches(items):` and do the work inside, or hand on few batches at a time: batches(groups)"
)


class Origin:
    """Of a loop: in which thread batches() was called, and from where it was asked how many there will be."""

    __slots__ = ("asked", "thread")

    def __init__(self) -> None:
        self.asked: tuple[int, int] | None = None  # by which frame, at which instruction
        self.thread = threading.get_ident() if not _in_event_loop() else None

    def begins(self, handle: Checkpoint, name: str, frame: FrameType | None) -> None:
        """The first batch is drawn, from this frame."""
        if frame is None:
            return
        if self.asked == (id(frame), frame.f_lasti):
            how = "list(batches(...)) or the like"
        elif frame.f_globals.get("__name__", "").startswith(_EXECUTORS):
            how = "an executor"
        elif self.thread not in {None, threading.get_ident()}:
            how = "another thread than the one that called batches()"
        else:
            return
        tell(handle, "drawn_ahead", f"has the batches of loop {name!r} drawn ahead of the work, by {how}. {_AHEAD}.", loop=name)


class Batches(Iterator[T_co]):
    """What `batches()` gives. A `for` statement asks it for its loop, and has nothing to do with it from then on.

    Whoever draws all at once first asks how many there will be, at the very instruction that then draws them: `list`, `tuple`,
    `sorted`, `[*batches]`. Progress bars ask as well, but elsewhere.
    """

    __slots__ = ("_loop", "_origin")

    def __init__(self, loop: Iterator[T_co], origin: Origin) -> None:
        self._loop = loop
        self._origin = origin

    def __iter__(self) -> Iterator[T_co]:  # noqa: PYI034 - so that nothing lies between a `for` statement and its loop
        """The loop itself."""
        return self._loop

    def __next__(self) -> T_co:
        """For whoever draws by hand."""
        return next(self._loop)

    def close(self) -> None:
        """Leave the loop, as the end of its generator would."""
        close = getattr(self._loop, "close", None)
        if close is not None:
            close()

    def __length_hint__(self) -> Any:
        """No number; only who asks is of interest."""
        frame = sys._getframe(1)  # noqa: SLF001 - as documented
        self._origin.asked = (id(frame), frame.f_lasti)
        return NotImplemented


def _in_event_loop() -> bool:
    return asyncio._get_running_loop() is not None  # noqa: SLF001 - the public one raises, which takes longer


# --- state changed before the loop that resumes ---------------------------------------------------------------------

_ACCUMULATORS = (int, float, list, dict, set, Counter, OrderedDict, deque)  # what starts at nothing and is added to
_SCALARS = frozenset({int, float, str, bytes, bool, type(None)})  # what is compared at no cost
MAX_COMPARED = 10_000  # items of a list
CLOCK = 1_000_000_000  # a greater int may be a time


class StateBefore:
    """The state as it was restored, until the loops that go on have begun: what the code before them made of it is wrong."""

    __slots__ = ("_state",)

    def __init__(self, state: bytes) -> None:
        self._state: dict[str, Any] = _codec.decode(state)

    def compare(self, handle: Checkpoint, loop: Loop) -> None:
        """A loop goes on in which batches are done already."""
        for key, before in list(self._state.items()):
            now = handle.state.get(key, before)
            if type(now) in _SCALARS and type(now) is type(before) and now == before:
                continue
            if _is_reset(before, now):
                self._tell_reset(handle, loop, key, before, now)
            elif loop.depth and _is_added_to(before, now):
                self._tell_added(handle, loop, key)
            elif not _has_changed(before, now):
                continue
            del self._state[key]  # told, or changed in a way that may be meant

    def _tell_reset(self, handle: Checkpoint, loop: Loop, key: str, before: Any, now: Any) -> None:
        way_out = f"checkpointed(state={{{key!r}: {now!r}}}) or ckpt.state.setdefault({key!r}, {now!r}) before the loop"
        if loop.depth:
            way_out += f", and set it back behind loop {loop.name!r}, at the end of the batch around it"
        tell(
            handle,
            "state_reset",
            f"has set state[{key!r}], which was restored as {_short(before)}, to {now!r} before loop {loop.name!r} goes on at batch "
            f"{loop.done}: what the batches before it had added is lost. The code before a loop runs again on resume. Write {way_out}.",
            key=key,
            loop=loop.name,
        )

    def _tell_added(self, handle: Checkpoint, loop: Loop, key: str) -> None:
        tell(
            handle,
            "state_added_before_loop",
            f"has added to state[{key!r}] before loop {loop.name!r}, which goes on at batch {loop.done} of a batch around it that had done "
            f"so already: it counts twice. The code before an inner loop runs again on resume. Add behind the inner loop, or set a value "
            f"that is the same each time.",
            key=key,
            loop=loop.name,
        )


def _has_changed(before: Any, now: Any) -> bool:
    """Whether it is another value; of one that takes time to compare, nobody says so."""
    if type(before) not in _SCALARS:
        return False
    return type(before) is not type(now) or bool(before != now)


def _is_reset(before: Any, now: Any) -> bool:
    """Whether something that is added to is at its beginning again."""
    if type(before) is not type(now) or type(now) not in _ACCUMULATORS:
        return False
    if isinstance(now, float) and math.isinf(now):  # where a search for the best begins
        return not math.isinf(before)
    return bool(before) and not now


def _is_added_to(before: Any, now: Any) -> bool:
    """Whether it is what it was, and more."""
    if type(before) is int and type(now) is int:
        return before < now < CLOCK
    if type(before) is list and type(now) is list and len(before) < len(now) <= MAX_COMPARED:
        return _codec.fingerprint(tuple(before)) == _codec.fingerprint(tuple(now[: len(before)]))
    return False


def _short(value: object) -> str:
    """A value as it was, or how much it was."""
    return repr(value) if isinstance(value, (int, float)) else f"a {type(value).__name__} of {len(value)}"  # type: ignore[arg-type]


# --- a state that grows ---------------------------------------------------------------------------------------------

LARGE_BYTES = 1 << 16  # a state below this may grow as it likes
MAX_GROWN_BYTES = 1 << 22
DOUBLINGS = 4  # in a row, before it is told
LINEAR = (1.5, 2.7)  # batches at a doubling, over those at the one before: what grows with every batch takes twice as many


class Growth:
    """Whether a state grows with every batch: each doubling of its size takes twice the batches of the one before."""

    __slots__ = ("_marks",)

    def __init__(self) -> None:
        self._marks: list[tuple[int, int]] = []  # size, and batches done

    def add(self, handle: Checkpoint, size: int, done: int) -> None:
        """A large state was encoded."""
        marks = self._marks
        if marks and size < 2 * marks[-1][0]:
            return
        if marks and not (size < 3 * marks[-1][0] and LINEAR[0] * marks[-1][1] <= done <= LINEAR[1] * marks[-1][1]):
            marks.clear()  # it came at once, or slows down
        marks.append((size, done))
        if len(marks) > DOUBLINGS and size > MAX_GROWN_BYTES:
            tell(
                handle,
                "state_grows",
                f"has a state of {size / 1e6:.1f} MB after {done} batches, which grows with every batch, and each checkpoint writes all of "
                f"it: with twice the batches checkpoints cost four times as much. Write results to a file, table or object per batch "
                f"(ckpt.idempotency_key() names it), and keep in state where they are.",
                bytes=size,
            )


# --- results kept outside of state ----------------------------------------------------------------------------------

MIN_RESULTS = 3  # a list of one or two may have any reason


def result_beside_state(handle: Checkpoint, value: object, before: int, total: int) -> None:
    """An attempt that went on at batch `before` of the only loop has completed, with this value and nothing in its state."""
    if type(value) is list and before and len(value) == total - before >= MIN_RESULTS:
        tell(
            handle,
            "results_beside_state",
            f"went on at batch {before} of {total} and returns a list of {len(value)}, one for each batch since: the results of those "
            f"before are not in it, because only what is in state comes back. Write results = ckpt.state.setdefault('results', []), or "
            f"write each result to a file and return the paths.",
        )
