"""Where a worker stands in its loops: named, nested, following one another.

Per depth there is a scope: the loops opened there within the batch in hand of the loop outside, in order. A new batch
outside begins new scopes inside. Marks of an earlier attempt wait in `_restored` until a loop of their name is opened.
"""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING

from faultguard._core.records import HAND_WRITTEN, Mark, Place, Spot, left_last
from faultguard.errors import InputChangedError, UsageError

if TYPE_CHECKING:
    from collections.abc import Iterable

__all__ = ["HAND_WRITTEN", "Cursors", "Loop"]

MAX_DEPTH = 16
MAX_SIBLINGS = 1000

Marks = tuple[tuple[Mark, ...], ...]


class Loop:
    """One open or finished loop. `done` counts finished batches, and is the index of the batch in hand."""

    __slots__ = (
        "before",
        "current",
        "depth",
        "done",
        "finished",
        "in_hand",
        "last",
        "last_known",
        "left",
        "left_at",
        "length",
        "name",
        "opened",
        "outside",
        "total",
    )

    def __init__(self, name: str, depth: int, before: int) -> None:
        self.name: str = name
        self.depth: int = depth
        self.before: int = before  # how many were opened before it in its scope
        self.done: int = 0
        self.finished: bool = False
        self.in_hand: bool = False  # a batch was given out and is not done
        self.length: int | None = None
        self.last: str | None = None  # fingerprint of the last finished batch, as far as it is known
        self.current: object = None  # the batch in hand, or the last one given out
        self.last_known: bool = True  # False: `current` is newer than `last`
        self.outside: tuple[int, str] | None = None  # of a batch in which a loop began: its index and fingerprint
        self.opened: bool = False  # by this attempt; a mark of an earlier one waits until then
        self.left: bool = False  # early, by this attempt
        self.left_at: object = None  # by whoever uses it; this attempt
        self.total: int | None = None

    def mark(self) -> Mark:
        """What a record keeps of this loop."""
        return Mark(name=self.name, done=self.done, finished=self.finished, length=self.length, last=self.last)


class Cursors:
    """All loops of one worker.

    Args:
        restored: the loops of the checkpoint to go on from.
    """

    def __init__(self, restored: Marks = ()) -> None:
        self.scopes: list[list[Loop]] = [
            [_loop(mark, depth, before) for before, mark in enumerate(scope)] for depth, scope in enumerate(restored)
        ]
        self.stack: list[Loop] = []  # changed in place, and read by the loops themselves

    @property
    def innermost(self) -> Loop | None:
        """The last loop of `path`."""
        path = self.path
        return path[-1] if path else None

    @property
    def path(self) -> list[Loop]:
        """The open loops, outer to inner; where none is open, those that were left last, by this attempt or the one before."""
        return self.stack or left_last(self.scopes)

    @property
    def around(self) -> Loop | None:
        """The loop around the innermost open one."""
        return self.stack[-2] if len(self.stack) > 1 else None

    @property
    def here(self) -> tuple[Loop, ...]:
        """The open loops, outer to inner; where none is open, the one that this attempt has come past last."""
        if self.stack:
            return tuple(self.stack)
        passed = itertools.takewhile(lambda loop: loop.opened or loop.name == HAND_WRITTEN, self.scopes[0] if self.scopes else ())
        return tuple(passed)[-1:]

    def done_in(self, marks: Marks) -> int:
        """Batches of the innermost loop that a checkpoint counts as done: none, if it is of another batch outside."""
        path = self.path
        done = 0
        for depth, loop in enumerate(path):
            mark = next((mark for scope in marks[depth : depth + 1] for mark in scope if mark.name == loop.name), None)
            if mark is None or (loop is not path[-1] and mark.done != loop.done):
                return 0
            done = mark.done
        return done

    @property
    def depth(self) -> int:
        """How many loops are open."""
        return len(self.stack)

    @property
    def position(self) -> tuple[int, ...]:
        """Batches done, outer to inner."""
        return tuple(loop.done for loop in self.path)

    @property
    def place(self) -> Place:
        """`position` with the names of the loops."""
        return tuple(Spot(loop.name, loop.before, loop.done) for loop in self.path)

    @property
    def begins(self) -> Place:
        """The batch of the innermost open loop, as records name it; empty where it could not be passed over."""
        return self.place if self.stack and self._is_whole(self.stack) else ()

    @property
    def suspect(self) -> Loop | None:
        """The loop whose batch at `place`, which could be passed over, was in hand when it was left."""
        path = self.path
        return path[-1] if path and path[-1].left and path[-1].in_hand and self._is_whole(path) else None

    def _is_whole(self, path: list[Loop]) -> bool:
        """Whether nothing inside of the batch in hand is counted: to pass over a batch that is would count a part of it."""
        return not any(self.scopes[len(path) :])

    @property
    def done_outside(self) -> int:
        """Batches done in the loops that lie in no other one."""
        return sum(loop.done for loop in self.scopes[0]) if self.scopes else 0

    @property
    def is_open(self) -> bool:
        """Whether a loop is open."""
        return bool(self.stack)

    @property
    def holds_back(self) -> bool:
        """Whether a loop was left early, so that nobody knows yet whether it is over, and whether its batch in hand counts."""
        return any(loop.left and not loop.finished for scope in self.scopes for loop in scope)

    @property
    def in_hand(self) -> bool:
        """Whether the innermost open loop has a batch in hand."""
        return bool(self.stack) and self.stack[-1].in_hand

    def open(self, name: str, length: int | None = None, total: int | None = None) -> tuple[Loop, bool]:
        """Open a loop inside the batch in hand, or after the loop before it; True if that closed a loop left early.

        Raises:
            UsageError: the scope had a loop of this name in this attempt.
            InputChangedError: its input has another length than when the checkpoint was made.
        """
        depth = len(self.stack)
        if depth >= MAX_DEPTH:
            msg = f"loop {name!r} is nested {depth + 1} deep, the limit is {MAX_DEPTH}; use advance() in a loop of your own inside"
            raise UsageError(msg)
        scope = self._scope(depth)
        loop = next((known for known in scope if known.name == name), None)
        if loop is not None and loop.opened:
            msg = (
                f"a second loop named {name!r} begins in the same scope; on resume the two could not be told apart. "
                f'Give each its own name: batches(items, name="second")'
            )
            raise UsageError(msg)
        closed = self._close(other for other in scope if other is not loop and other.left)
        if loop is None:
            if len(scope) >= MAX_SIBLINGS:
                msg = f"more than {MAX_SIBLINGS} loops in one scope; make one loop over all of it"
                raise UsageError(msg)
            loop = Loop(name, depth, len(scope))
            scope.append(loop)
        elif loop.length is not None and length is not None and loop.length != length:
            raise input_changed(loop, f"it had {loop.length} batches and now has {length}")
        loop.opened = True
        loop.length = length if length is not None else loop.length
        loop.total = total if total is not None else loop.length
        self.stack.append(loop)
        return loop, closed

    def done(self, loop: Loop, n: int = 1) -> None:
        """The batch in hand of `loop` is done, or `n` more of a hand-written one: loops inside it begin anew."""
        loop.done += n
        loop.in_hand = False
        loop.last_known = False
        del self.scopes[loop.depth + 1 :]

    def come_back(self, loop: Loop) -> bool:
        """`loop` is asked for a batch while it is not the innermost. Whether it is open: then those inside were abandoned."""
        if loop not in self.stack:
            return False
        del self.stack[self.stack.index(loop) + 1 :]
        return True

    def finish(self, loop: Loop) -> None:
        """The input is used up."""
        loop.finished = True
        loop.in_hand = False
        self._pop(loop)

    def leave(self, loop: Loop, at: object = None) -> None:
        """The loop was left early: by `break`, `return` or an exception. What follows decides whether its batch counts."""
        loop.left, loop.left_at = not loop.finished, at
        self._pop(loop)

    def close_left(self, depth: int = 0) -> bool:
        """A block in which `depth` loops were open ends without an exception: those that it left early are over.

        Returns whether there was one; its batch in hand is done.
        """
        closed = self._close(loop for loop in self._scope(depth) if loop.opened)
        del self.stack[depth:]
        return closed

    def hand_written(self) -> Loop:
        """The loop that `advance()` counts outside of any `batches()`: always there, never over."""
        scope = self._scope(0)
        self._close(other for other in scope if other.left)
        loop = next((known for known in scope if known.name == HAND_WRITTEN), None)
        if loop is None:
            loop = Loop(HAND_WRITTEN, 0, len(scope))
            scope.append(loop)
        loop.opened = True
        return loop

    def marks(self) -> Marks:
        """What a record keeps of all loops."""
        return tuple(tuple(loop.mark() for loop in scope) for scope in self.scopes if scope)

    def pass_over(self, loop: Loop, fingerprint: str | None) -> None:
        """A batch is over that was never in hand; None: it was not even read."""
        self.done(loop)
        loop.last, loop.last_known = fingerprint, True

    def loops(self) -> list[Loop]:
        """Every loop in every scope."""
        return [loop for scope in self.scopes for loop in scope]

    def _scope(self, depth: int) -> list[Loop]:
        while len(self.scopes) <= depth:
            self.scopes.append([])
        return self.scopes[depth]

    def _close(self, loops: Iterable[Loop]) -> bool:
        """End loops of one scope that were left early; a batch in hand counts as done. Returns whether there was one."""
        closed = [loop for loop in loops if not loop.finished and loop.name != HAND_WRITTEN]
        for loop in closed:
            if loop.in_hand:
                self.done(loop)
            loop.finished = True
            del self.scopes[loop.depth + 1 :]
        return bool(closed)

    def _pop(self, loop: Loop) -> None:
        if loop in self.stack:
            del self.stack[self.stack.index(loop) :]


def input_changed(loop: Loop, difference: str) -> InputChangedError:
    """The error for an input that is not the one of the checkpoint."""
    msg = (
        f"loop {loop.name!r} resumes after {loop.done} batches, but its input is another one: {difference}. "
        f"Give it the same batches in the same order (fixed seed, sorted listing, same chunk size), or start over under a new id."
    )
    return InputChangedError(msg, loop=loop.name)


def _loop(mark: Mark, depth: int, before: int) -> Loop:
    loop = Loop(mark.name, depth, before)
    loop.done, loop.finished, loop.length, loop.last = mark.done, mark.finished, mark.length, mark.last
    return loop
