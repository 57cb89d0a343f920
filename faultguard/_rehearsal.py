"""Attempts of a task in memory: each is killed where one says, and leaves what would have been durable then.

An attempt counts what happens in it: snapshots, ends of batches (their body is over, and they do not count yet), batches handed
out, and the lines that run in each. A `Kill` names one of these by its number, so that the same kill can be made again.
"""

from __future__ import annotations

import dis
import math
import sys
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import msgspec

from faultguard import _session
from faultguard._core.records import HAND_WRITTEN, Place, Snapshot
from faultguard._core.schedule import NOW, Every, Schedule
from faultguard._handle import Checkpoint
from faultguard.errors import StalledError, UsageError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from types import CodeType, FrameType

    from faultguard._core.cursors import Loop

__all__ = ["Attempt", "InterruptedHereError", "Key", "Kill", "KilledHere", "Line", "Seen", "Story", "World", "where"]

NO_OPERATION = dis.opmap["NOP"]
MAX_LINES = 500  # of one batch that are told apart
DIRECT = "direct"  # the name that `Checkpoint.in_memory` has for a block

Key = tuple[str, str]  # task and worker id
World = dict[Key, Snapshot]  # what is durable of each worker
_NOT_TAKEN = Snapshot(state=msgspec.Raw(b"{}"))


class KilledHere(BaseException):
    """Stands for the death of the process."""


class InterruptedHereError(StalledError):
    """What interrupts a batch from outside, such as a stall: an `Exception`, raised in the middle of its body."""


@dataclass(frozen=True, slots=True)
class Kill:
    """Where an attempt dies.

    Attributes:
        how: at a boundary, its snapshot taken; at the end of a batch's body, before it counts; at a line in a batch's body.
        number: of that snapshot, end of a batch, or batch handed out, in this attempt, from 0.
        takes: the numbers of the snapshots that are taken before; the others would only cost time.
        wakes: the batch handed out from which on all is counted; before it nothing happens that matters.
        line: the number of that line event in the batch.
    """

    how: Literal["boundary", "end", "line"]
    number: int
    takes: frozenset[int] = frozenset()
    wakes: Seen | None = None
    line: int = 0


@dataclass(frozen=True, slots=True)
class Seen:
    """A moment of an attempt: its number among its like, whose it was, where the loops stood, and what had been counted before."""

    number: int
    key: Key
    place: Place
    snapshots: int
    ends: int
    bodies: int


@dataclass(frozen=True, slots=True)
class Line:
    """A line that began in a batch's body: file and line, and how many snapshots were taken before."""

    file: str
    line: int
    snapshots: int


@dataclass(slots=True)
class Story:
    """What was seen of an attempt.

    Attributes:
        boundaries: whose snapshot was taken.
        ends: of the bodies of batches.
        bodies: the batches that were handed out.
        lines: of each of these, what ran in its body.
        codes: the functions that loop.
    """

    boundaries: list[Seen] = field(default_factory=list)
    ends: list[Seen] = field(default_factory=list)
    bodies: list[Seen] = field(default_factory=list)
    lines: list[list[Line]] = field(default_factory=list)
    codes: list[CodeType] = field(default_factory=list)


class Attempt:
    """One attempt of a task; also what makes its handles.

    Args:
        world: what it goes on from.
        number: of the attempt, from 1.
        kill: where it dies.
        watched: whether it writes down what it sees, in `seen`, and takes every snapshot.
        traced: whether that includes lines.
    """

    def __init__(
        self, world: World | None = None, *, number: int = 1, kill: Kill | None = None, watched: bool = False, traced: bool = False
    ) -> None:
        self.world: World = dict(world or {})
        self.number: int = number
        self.killed: bool = False
        self.swallowed: bool = False  # it went on after that
        self.seen: Story | None = Story() if watched else None
        self.snapshots: int = 0
        self.ends: int = 0
        self.bodies: int = 0
        self._kill = kill
        self._has_task = False
        self._ended: set[Key] = set()
        self.schedule: Schedule = _EveryBoundary(1, 0.0)
        if not watched and (kill is None or kill.wakes is not None):
            self.schedule.look_at = math.inf
        self._lines = Lines(self, kill) if traced or (kill is not None and kill.how == "line") else None

    # --- handles ---

    def task(self, name: str) -> Checkpoint:
        """The handle of a task that is not decorated."""
        return Rehearsed(self, (name, DIRECT), None)

    def handle(self, *, task: str, worker_id: str, state: Mapping[str, Any] | None) -> Checkpoint | None:
        """The handle of the decorated function that is called, or of a block in it; None where Ray, too, would give none that saves."""
        around = _session.context()
        if task == DIRECT and around is not None:
            return self._block((around.handle.task, worker_id), state) if isinstance(around.handle, Rehearsed) else None
        if self._has_task:
            return None  # a decorated function that is called by another one keeps its state in memory
        self._has_task = True
        return Rehearsed(self, (task, worker_id), state)

    def _block(self, key: Key, state: Mapping[str, Any] | None) -> Checkpoint:
        if key in self._ended:
            msg = (
                f"a second block checkpointed({key[1]!r}) is refused: this attempt has ended the first one, and its loops are done. "
                f"Give each block an id of its own"
            )
            raise UsageError(msg)
        self._has_task = True
        return Rehearsed(self, key, state, is_block=True)

    # --- what happens ---

    def batches_of(self, handle: Rehearsed, loop: Loop, items: Iterator[Any]) -> Iterator[Any]:
        """The batches of a loop, looked at on their way. What else is called from now on, is not the task."""
        self._has_task = True
        return self._follow(handle, loop, items) if self.seen is not None or self._kill is not None else items

    def _follow(self, handle: Rehearsed, loop: Loop, items: Iterator[Any]) -> Iterator[Any]:
        for item in items:
            self._hands_out(handle, loop, _user_of(sys._getframe(1)))  # noqa: SLF001 - of the generator that asks
            yield item

    def takes(self) -> bool:
        """A boundary: whether its snapshot is needed."""
        self._goes_on()
        return self.seen is not None or (self._kill is not None and self.snapshots in self._kill.takes)

    def boundary(self, handle: Rehearsed, snapshot: Snapshot | None) -> None:
        """A snapshot is durable, or would be were it needed."""
        number = self.snapshots
        self.snapshots += 1
        if snapshot is not None:
            self.world[handle.key] = snapshot
        if self.seen is not None:
            self.seen.boundaries.append(self._now(number, handle))
        self._die_at("boundary", number)

    def ends_batch(self, handle: Rehearsed, loop: Loop | None) -> None:
        """The body of a batch is over, and it does not count yet."""
        self._goes_on()
        number = self.ends
        self.ends += 1
        if self._lines is not None:
            self._lines.ends(loop)
        if self.seen is not None:
            self.seen.ends.append(self._now(number, handle))
        self._die_at("end", number)

    def _hands_out(self, handle: Rehearsed, loop: Loop, frame: FrameType | None) -> None:
        """A batch goes to the body in `frame`."""
        self._goes_on()
        number = self.bodies
        self.bodies += 1
        if self._kill is not None and self._kill.wakes is not None and number == self._kill.wakes.number:
            self.schedule.look_at = NOW
            self.snapshots, self.ends = self._kill.wakes.snapshots, self._kill.wakes.ends
        if self.seen is not None:
            self.seen.bodies.append(self._now(number, handle))
            self.seen.lines.append([])
            if frame is not None and frame.f_code not in self.seen.codes:
                self.seen.codes.append(frame.f_code)
        if self._lines is not None and frame is not None:
            self._lines.begins(loop, frame, number)

    def ends_block(self, handle: Rehearsed, snapshot: Snapshot | None) -> None:
        """The outcome of a block is durable."""
        self._ended.add(handle.key)
        self.boundary(handle, snapshot)

    def _now(self, number: int, handle: Rehearsed) -> Seen:
        return Seen(number, handle.key, handle.place, self.snapshots, self.ends, self.bodies)

    def interrupt(self) -> None:
        """Raise what the body must let through."""
        self.killed = True
        raise InterruptedHereError("this batch is interrupted, by faultguard.testing")

    def _die_at(self, how: str, number: int) -> None:
        if self._kill is not None and (self._kill.how, self._kill.number) == (how, number) and not self.killed:
            self.killed = True
            raise KilledHere("killed by faultguard.testing")

    def _goes_on(self) -> None:
        self.swallowed = self.swallowed or self.killed


class _EveryBoundary(Schedule):
    """Every boundary is looked at, or none, whatever `every` says."""

    __slots__ = ()

    def __init__(self, every: Every, now: float) -> None:
        super().__init__(every, now)
        self.look_at = NOW

    def configure(self, every: Every) -> None:  # noqa: ARG002 - whatever it is
        """Not by the task."""
        self._every = 1

    def boundary(self, now: float, batches: int = 1) -> bool:  # noqa: ARG002
        return True


class Rehearsed(Checkpoint):
    """The handle of an attempt in memory, which tells it what happens."""

    def __init__(self, attempt: Attempt, key: Key, state: Mapping[str, Any] | None, *, is_block: bool = False) -> None:
        self.key = key
        self._told = attempt
        self._is_block = is_block
        self._at_boundary = False
        self._is_over = False
        super().__init__(
            run="memory",
            task=key[0],
            worker_id=key[1],
            journal=None,
            snapshot=attempt.world.get(key),
            schedule=attempt.schedule,
            attempt=attempt.number,
            token=attempt.number,
            state=state,
        )

    def leave_block(self, depth: int) -> None:
        """A block with a worker of its own ends with an outcome."""
        super().leave_block(depth)
        if self._is_block and not depth and not self._is_over:
            needed = self._told.takes()
            self._told.ends_block(self, self.finish() if needed else None)

    def finish(self) -> Snapshot:
        """No boundary: what is durable with it is the outcome."""
        self._is_over = True
        if self._told.seen is None and not self._is_block:
            return _NOT_TAKEN  # that it can be saved was seen before
        return super().finish()

    def _batches_of(self, iterable: Any, loop: Loop) -> Iterator[Any]:
        return self._told.batches_of(self, loop, super()._batches_of(iterable, loop))

    def _hear(self) -> None:
        super()._hear()
        if not self._at_boundary:
            stack = self._cursors.stack
            self._told.ends_batch(self, stack[-1] if stack else None)

    def _boundary(self, batches: int = 1) -> None:
        self._at_boundary = True
        try:
            super()._boundary(batches)
        finally:
            self._at_boundary = False

    def _snapshot(self) -> tuple[Snapshot, float]:
        if self._is_over:
            return super()._snapshot()
        snapshot = super()._snapshot()[0] if self._told.takes() else None
        self._before_block = None
        self._told.boundary(self, snapshot)
        return snapshot or _NOT_TAKEN, math.inf


def _user_of(frame: FrameType | None) -> FrameType | None:
    """The frame that asks `batches()` for its next batch."""
    return frame.f_back if frame is not None else None


class _Body:
    """A batch whose body runs: the frame, the last of its lines that has begun, and how many have."""

    __slots__ = ("count", "frame", "handled", "line", "loop", "number")

    def __init__(self, loop: Loop, frame: FrameType, number: int) -> None:
        self.loop = loop
        self.frame = frame
        self.line = frame.f_lineno  # at first that of the `for`
        self.handled = sys.exc_info()[1]
        self.number = number
        self.count = 0


class Lines:
    """Follows the lines that run in the bodies of loops, in the frames that loop and in no others.

    Only forwards: a line that comes again may be the end of a `with`, where an exception that Python itself does not raise there would
    skip its `__exit__`. Nor in `except` clauses, which would stay open, nor at an instruction that does nothing, such as that of `try:`,
    which no `with` covers.
    """

    def __init__(self, attempt: Attempt, kill: Kill | None) -> None:
        self._attempt = attempt
        self._kill = kill if kill is not None and kill.how == "line" else None
        self._open: list[_Body] = []

    def begins(self, loop: Loop, frame: FrameType, number: int) -> None:
        """A batch is handed out. Until the one that is meant nothing is traced, which would cost time."""
        self.ends(loop)
        if self._kill is not None and number < self._kill.number:
            return
        self._open.append(_Body(loop, frame, number))
        frame.f_trace = self._line
        if sys.gettrace() != self._call:
            sys.settrace(self._call)

    def ends(self, loop: Loop | None) -> None:
        """The body of the batch in hand is over, and with it those of loops inside that were left early."""
        numbers = [at for at, body in enumerate(self._open) if body.loop is loop]
        if numbers:
            del self._open[numbers[0] :]

    def _call(self, frame: FrameType, event: str, argument: Any) -> None:
        """Another function begins: not ours to follow."""

    def _line(self, frame: FrameType, event: str, argument: Any) -> Any:  # noqa: ARG002
        body = self._open[-1] if self._open else None
        if event == "line" and body is not None and frame is body.frame and frame.f_lineno > body.line:
            body.line = frame.f_lineno
            if sys.exc_info()[1] is body.handled and frame.f_code.co_code[frame.f_lasti] != NO_OPERATION:
                self._begun(body, frame)
        return self._line

    def _begun(self, body: _Body, frame: FrameType) -> None:
        seen, number = self._attempt.seen, body.count
        body.count += 1
        if seen is not None and number < MAX_LINES:
            seen.lines[body.number].append(Line(frame.f_code.co_filename, frame.f_lineno, self._attempt.snapshots))
        if self._kill is not None and (body.number, number) == (self._kill.number, self._kill.line) and not self._attempt.killed:
            self._attempt.interrupt()


def where(place: Place, *, after: bool) -> str:
    """A place in words: `after 3 batches of 'steps' in batch 1 of 'epochs'`, or the batch in hand there."""
    if not place:
        return "before the first batch"
    spots = list(place)
    last = spots.pop()
    named = len(place) > 1 or last.loop not in {"batches", HAND_WRITTEN}
    of = f" of {last.loop!r}" if named and last.loop != HAND_WRITTEN else ""
    inner = f"after {last.done} batch{'es' if last.done != 1 else ''}{of}" if after else f"batch {last.done}{of}"
    return " in ".join([inner, *(f"batch {spot.done} of {spot.loop!r}" for spot in reversed(spots))])
