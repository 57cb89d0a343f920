"""What raises `StalledError` into a thread that makes no progress: inside its batch, and nowhere else.

The exception is set from another thread, and arrives when that one runs Python again. So every way out of a batch, and every
way into code of this library that holds a lock, goes through `settle` or `pause`, which take the lock under which it is set:
afterwards nothing is on its way any more. Set any later, it would kill the next task of the process.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import gc
import math
import sys
import threading
import traceback
from typing import TYPE_CHECKING, Any

from faultguard._core.schedule import NOW
from faultguard._native import cut, native_stacks

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from types import FrameType

    from faultguard._core.schedule import Schedule

__all__ = ["Section", "StallGuard", "first_stack", "stacks"]


ARRIVES_STEPS = 1000  # of the interpreter; it looks after each call, and each turn of a loop


class StallGuard:
    """Where one attempt stands, and whether it may be struck there.

    Args:
        schedule: of the attempt; the loop is made to look at its next boundary.
        standing: says where the open loop stands; None where there is none.
    """

    def __init__(self, schedule: Schedule, standing: Callable[[], object]) -> None:
        self.timeout_s: float | None = None
        self.on_timed: Callable[[], None] | None = None  # called when a timeout is set: somebody has to look from now on
        self.on_change: Callable[[], None] | None = None  # called when `timing` has another answer
        self.stacks: str = ""  # of all threads, when the attempt stalled
        self._schedule = schedule
        self._standing = standing
        self._lock = threading.Lock()
        self._sections: list[Section] = []
        self._turns = 0  # resumes and sections: each is a new start of the clock
        self._paused = 0
        self._untimed = 0
        self._lent = 0
        self._timed = False
        self._over = False
        self._thread: int | None = None
        self._stalled: BaseException | None = None  # what was struck with
        self._pending = False

    # --- on the thread of the loop ---

    def enter(self) -> None:
        """A loop begins in this thread, or goes on. In the thread of an event loop nothing is ever raised."""
        self._thread = threading.get_ident() if not _has_event_loop() else None

    def limit(self, timeout_s: float | None) -> None:
        """Use another timeout from now on."""
        self.timeout_s = timeout_s
        if timeout_s is not None:
            self._watch()
            self._changed()

    def _watch(self) -> None:
        self._timed = True
        if self.on_timed is not None:
            self.on_timed()

    def _changed(self) -> None:
        """What the file of this process says must be right at any moment: the process may stand still from the next one on."""
        if self._timed and self.on_change is not None:
            self.on_change()

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """`pause` and `resume` around a block of this library's own business."""
        self.pause()
        try:
            yield
        finally:
            self.resume()

    @contextlib.contextmanager
    def untimed(self) -> Iterator[None]:
        """The same where code of others may take as long as it likes, and hold the interpreter."""
        with self.paused():
            self._untimed += 1
            self._changed()
            try:
                yield
            finally:
                self._untimed -= 1
        self._changed()

    def lend(self) -> None:
        """From now on another worker of this task says what is timed; raises what was on its way."""
        self.pause()
        self._lent += 1
        self._changed()

    def take_back(self) -> None:
        """End what `lend` began."""
        self._lent -= 1
        self.resume()
        self._changed()

    def loop_begins(self) -> None:
        """A loop is timed from here on."""
        self._changed()

    def loop_over(self) -> None:
        """A loop is over; after the outermost one nothing is timed."""
        if self._standing() is None:
            self._changed()

    def pause(self) -> None:
        """Stop the clock until `resume`: what follows is this library's own business. Raises what was on its way."""
        with self._lock:
            self._raise_stalled()
            self._paused += 1

    def resume(self) -> None:
        """Let the clock run again, from zero."""
        with self._lock:
            self._paused -= 1
            self._turns += 1

    def leave(self) -> None:
        """The loop is left, by an exception or early: take back what has not arrived, and raise nothing here."""
        with self._lock:
            self._clear()
        self._changed()

    def settle(self) -> None:
        """Raise what was set, whether it arrived and was swallowed, or is still on its way. Then nothing is."""
        with self._lock:
            self._raise_stalled()

    def end(self) -> BaseException | None:
        """The attempt is over: nothing can be set any more. Returns what was, should the body have swallowed it."""
        with self._lock:
            self._over = True
            self._clear()
            return self._stalled

    def _raise_stalled(self) -> None:
        """Under the lock."""
        self._clear()
        if self._stalled is not None and not self._over:
            self._schedule.look_at = NOW  # should the body swallow it, the next boundary raises it again
            raise self._stalled.with_traceback(None)

    def _clear(self) -> None:
        """Under the lock: take back an exception that has not arrived."""
        if self._pending:
            self._pending = False
            _take_back(self._thread)

    # --- on the thread of the watcher ---

    def look(self) -> tuple[object, float | None]:
        """Where the attempt stands, equal as long as there is no progress, and its timeout there; None: nothing is timed."""
        if self._over or self._paused:
            return None, None
        turns = self._turns
        section = self._innermost()
        if section is not None:
            return ((turns, section.name), section.timeout_s) if section.timeout_s is not None else (None, None)
        standing = self._standing()
        return ((turns, standing) if standing is not None else None), self.timeout_s

    def timing(self) -> float | None:
        """The timeout that holds now, infinity where nothing is timed; None: that is another worker's matter."""
        if self._over or self._lent:
            return None
        section = self._innermost()
        timeout_s = section.timeout_s if section is not None else self.timeout_s if self._standing() is not None else None
        return timeout_s if timeout_s is not None and not self._untimed else math.inf

    @property
    def thread(self) -> int | None:
        """The thread that is struck; None: it runs an event loop, or no loop has begun."""
        section = self._innermost()
        return section.thread if section is not None else self._thread

    @property
    def section(self) -> str | None:
        """Name of the innermost section."""
        section = self._innermost()
        return section.name if section is not None else None

    def strike(self, key: object, error: BaseException, stacks: str = "") -> bool:
        """Raise `error` in the thread, if it still stands at `key`. False: it does not, or nothing can be raised there.

        What is no `Exception`, such as a cancel, is raised once, and nothing is raised after it.
        """
        with self._lock:
            thread = self.thread
            if key is None or self.look()[0] != key or thread is None:
                return False
            if self._stalled is not None and not isinstance(self._stalled, Exception):
                return False
            self._schedule.look_at = NOW  # before the last look: a loop that does not see it has not counted its batch yet
            if self.look()[0] != key:
                return False
            self._stalled, self.stacks = error, stacks
            self._thread, self._pending = thread, True
            return _set_async(thread, _raising(error))

    def hold(self, key: object) -> bool:
        """Keep the attempt from going on, for good, if it still stands at `key`: the process is about to end."""
        self._lock.acquire()
        if self.look()[0] == key:
            return True
        self._lock.release()
        return False

    def _innermost(self) -> Section | None:
        sections = self._sections
        try:
            return sections[-1]
        except IndexError:
            return None

    # --- sections ---

    def open(self, section: Section) -> None:
        """A section begins in this thread."""
        if section.timeout_s is not None:
            self._watch()
        with self._lock:
            self._raise_stalled()
            self._turns += 1
            self._sections.append(section)
        self._changed()

    def close(self, section: Section) -> None:
        """It ends; the clock of what is around it begins anew."""
        with self._lock:
            self._turns += 1
            if section in self._sections:
                self._sections.remove(section)
            self._clear()
        self._changed()


class Section:
    """A part of the work with a deadline and a name of its own; what `Checkpoint.section` gives."""

    def __init__(self, guard: StallGuard, name: str, timeout_s: float | None) -> None:
        self.name = name
        self.timeout_s = timeout_s
        self.thread: int | None = None
        self._guard = guard

    def __enter__(self) -> None:
        """Start its clock."""
        self.thread = threading.get_ident() if not _has_event_loop() else None
        self._guard.open(self)

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Stop it. A stall that was swallowed inside, or comes at the very end, is raised here."""
        self._guard.close(self)
        if kind is None:
            self._guard.settle()


def stacks(first: int | None, *, native: bool = False) -> str:
    """The stack of every thread of this process, that of the thread `first` before the others, our own last; then those with C frames."""
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    frames = _frames()
    order = sorted(frames, key=lambda ident: (ident != first, str(names.get(ident)).startswith("faultguard-"), ident))
    parts = [f"Thread {names.get(ident, ident)}:\n{''.join(traceback.format_stack(frames[ident]))}" for ident in order]
    text = cut("\n".join(parts))
    seen = native_stacks(first) if native else ""
    return f"{text}\n\n{seen}" if seen else text


def _frames() -> dict[int, FrameType]:
    """Where each thread stands. Only the watcher's thread asks.

    Up to Python 3.11 at least, it holds a lock of the interpreter while it makes objects. Should garbage be collected then, with a
    `threading.local` in it, that wants the same lock, and the process stands still for good.
    """
    collects = gc.isenabled()
    gc.disable()
    try:
        return sys._current_frames()  # noqa: SLF001 - the documented way
    finally:
        if collects:
            gc.enable()


def first_stack(text: str) -> str:
    """Of what `stacks` gave, the thread that is meant."""
    return text.partition("\n\nThread ")[0].rstrip()


def _has_event_loop() -> bool:
    if "asyncio" not in sys.modules:
        return False
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return False
    return True


def _raising(error: BaseException) -> type[BaseException]:
    """A class that gives `error` when it is raised: an exception for another thread is set by its class, without arguments."""

    def give(*_: Any) -> BaseException:
        return error

    return type("RaisedThereError", (type(error),), {"__new__": give})


_set_exc = ctypes.pythonapi.PyThreadState_SetAsyncExc


def _set_async(thread: int | None, error: type[BaseException]) -> bool:
    """Set an exception that arrives in a thread when it runs Python again."""
    found: int = _set_exc(ctypes.c_ulong(thread or 0), ctypes.py_object(error))
    return found == 1


class _Nothing(BaseException):
    """Arrives where it was set, and ends there."""


def _take_back(thread: int | None) -> None:
    """Take back an exception that has not arrived.

    Up to Python 3.12 the interpreter goes on looking for it until one arrives somewhere: every thread at each of its steps, and one
    that is traced, by a debugger or for coverage, does nothing else any more (3.11). So one arrives here, and no function of Python
    is called until it has: it would be traced.
    """
    theirs, mine = ctypes.c_ulong(thread or 0), ctypes.c_ulong(threading.get_ident())
    nothing = ctypes.py_object(_Nothing)
    try:
        _set_exc(theirs, None)
        _set_exc(mine, nothing)
        for _ in range(ARRIVES_STEPS):
            pass
        _set_exc(mine, None)  # it should have
    except _Nothing:
        pass
    except BaseException:  # a signal came first
        _set_exc(theirs, None)
        _set_exc(mine, None)
        raise
