"""One strand runs at a time, and a seeded scheduler says which: real threads that hand a baton on, under a clock of their own.

The code under test blocks where it always does: it sleeps, takes a lock, asks the store. Here each of these is a place where the
scheduler may let another strand go on, or let the whole process die. Whoever holds the baton chooses the next one, so a strand that
goes on costs no switch. A strand that dies gets `Killed` where it stands, and from then on changes nothing any more.
"""

from __future__ import annotations

import contextvars
import functools
import math
import threading
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import random
    from collections.abc import Callable

__all__ = ["Aside", "Home", "Killed", "Scheduler", "Strand", "StrandLock"]

MAX_STEPS = 60_000
STUCK_S = 60.0  # of the real clock
LATE = 0.3  # that what a watcher has set arrives a moment later
STAYS = 0.6  # that a strand goes on when others of its process could


class Killed(BaseException):
    """The process of this strand is dead."""


class _Carrier(threading.Thread):
    """A real thread that runs one strand after another."""

    def __init__(self) -> None:
        super().__init__(name="strand", daemon=True)
        self.turn = threading.Lock()
        self.turn.acquire()
        self.job: Callable[[], None] = lambda: None

    def run(self) -> None:
        while True:
            self.turn.acquire()
            contextvars.Context().run(self.job)


_idle: list[_Carrier] = []


class Home:
    """A process: strands that live and die together. Seconds of its own, in which it was not frozen, are `awake_s`."""

    def __init__(self, name: str, pid: int) -> None:
        self.name = name
        self.pid = pid
        self.alive = True
        self.strands: list[Strand] = []
        self.asides: dict[object, Aside] = {}
        self.awake_s = 0.0
        self.absences = 0


class Strand:
    """One thread of a process. It is ready when it is time, or when what it waits for has come."""

    def __init__(self, ident: int, home: Home, job: Callable[[], None]) -> None:
        self.ident = ident
        self.home = home
        self.job = job
        self.carrier: Any = None
        self.wake_at = 0.0
        self.waits: Callable[[], bool] | None = None
        self.pending: Callable[[], BaseException] | None = None  # arrives when it goes on
        self.struck = False  # `pending` is of a watcher
        self.dead = False
        self.over = False


class Scheduler:
    """Lets strands take turns, in bursts of one process: what breaks a protocol is one that sleeps through the lives of others."""

    def __init__(self, rng: random.Random, install: Callable[[Home], None]) -> None:
        self.rng = rng
        self.now = 1000.0
        self.homes: list[Home] = []
        self.failure: BaseException | None = None
        self.finished = False
        self.home: Home | None = None  # whose burst it is
        self.left = 0
        self.preempts = 0.0  # how likely another strand goes on where the clock is read
        self._install = install
        self._idents = 0
        self._steps = 0
        self._dying: list[Strand] = []
        self._main = Strand(0, Home("main", 0), lambda: None)
        self._main.carrier = _Carrier()
        self.current = self._main

    # --- for whoever holds the baton ---

    def drive(self) -> None:
        """Let everything happen until `finish`."""
        target = self._choose()
        if target is not self._main:
            self._hand(target)
            if not self._main.carrier.turn.acquire(timeout=STUCK_S):
                raise RuntimeError(f"strand {self.current.ident} of {self.current.home.name} blocks for real")

    def spawn(self, home: Home, job: Callable[[], None]) -> Strand:
        """A new strand of a process."""
        self._idents += 1
        strand = Strand(self._idents, home, job)
        home.strands.append(strand)
        return strand

    def kill(self, home: Home) -> None:
        """A process is gone: none of its strands does anything any more."""
        home.alive = False
        for strand in tuple(home.strands):
            strand.dead = True
            if strand.carrier is None:
                self._over(strand)
            elif strand is not self.current:
                self._dying.append(strand)

    def fail(self, error: BaseException) -> None:
        """That is the end: something does not hold."""
        self.failure = self.failure or error
        self.finish()

    def finish(self) -> None:
        """Everybody dies."""
        self.finished = True
        for home in self.homes:
            if home.alive:
                self.kill(home)

    def advance(self, seconds: float) -> None:
        """Time passes for the process whose burst it is."""
        self.now += seconds
        if self.home is not None:
            self.home.awake_s += seconds

    def leap(self, seconds: float) -> None:
        """Time passes, and everybody is frozen."""
        self.now += seconds
        for home in self.homes:
            home.absences += 1

    # --- for strands ---

    def look(self) -> float:
        """Read the clock; another strand may come between."""
        if self.preempts and not (self.finished or self.current.dead or self.current is self._main) and self.rng.random() < self.preempts:
            self.pause()
        return self.now

    def sleep(self, seconds: float) -> None:
        """Sleep."""
        self.pause(self.now + max(seconds, 0.0))

    def pause(self, wake_at: float = 0.0, waits: Callable[[], bool] | None = None) -> None:
        """Let others go on, at least until it is time, or until what is waited for has come."""
        me = self.current
        if me.dead or self.finished:
            raise Killed
        me.wake_at, me.waits = wake_at, waits
        target = self._choose()
        if target is not me:
            self._hand(target)
            me.carrier.turn.acquire()
        if me.dead:
            raise Killed
        if me.pending is not None and not (me.struck and self.rng.random() < LATE):
            error, me.pending = me.pending, None
            self.arrives(me)
            raise error()

    # --- for the world ---

    def between(self) -> None:
        """A burst is over: choose `home` and `left` for the next one, or `finish`."""
        raise NotImplementedError

    def arrives(self, strand: Strand) -> None:
        """What was set for a strand is raised there now."""

    # --- inside ---

    def _choose(self) -> Strand:
        me = self.current
        while True:
            if me.dead and not me.over:
                return me
            if self._dying:
                dying = self._dying.pop()
                if not dying.over:
                    return dying
            elif self.finished:
                return self._main
            else:
                try:
                    target = self._of_burst(me)
                except AssertionError as error:
                    self.fail(error)
                else:
                    if target is not None:
                        return target

    def _of_burst(self, me: Strand) -> Strand | None:
        home = self.home
        self._steps += 1
        if self._steps > MAX_STEPS:
            raise AssertionError(f"after {MAX_STEPS} steps nothing has come to an end")
        self.left -= 1
        if home is None or not home.alive or self.left < 0:
            self.between()
            return None
        ready = self._ready(home)
        if not ready:
            wake_at = min((strand.wake_at for strand in home.strands), default=math.inf)
            if wake_at == math.inf:
                self.left = 0
                self.home = None
                return None
            self.advance(wake_at - self.now)
            ready = self._ready(home)
        if me in ready and (len(ready) == 1 or self.rng.random() < STAYS):
            return me
        return ready[0] if len(ready) == 1 else self.rng.choice(ready)

    def _ready(self, home: Home) -> list[Strand]:
        now = self.now
        return [strand for strand in home.strands if now >= strand.wake_at or (strand.waits is not None and strand.waits())]

    def can_go_on(self, home: Home) -> bool:
        """Whether anything will ever happen in a process by itself."""
        return home.alive and any(strand.wake_at < math.inf or (strand.waits is not None and strand.waits()) for strand in home.strands)

    def _hand(self, target: Strand) -> None:
        self.current = target
        self._install(target.home)
        if target.carrier is None:
            if _idle:
                target.carrier = _idle.pop()
            else:
                target.carrier = _Carrier()
                target.carrier.start()
            target.carrier.job = functools.partial(self._run, target)
        target.carrier.turn.release()

    def _run(self, strand: Strand) -> None:
        try:
            if not strand.dead:
                strand.job()
        except Killed:
            pass
        except BaseException as error:  # noqa: BLE001 - whatever it is, no strand may end so
            self.fail(error)
        carrier = strand.carrier
        self._over(strand)
        target = self._choose()
        _idle.append(carrier)
        self._hand(target)

    def _over(self, strand: Strand) -> None:
        strand.over = True
        strand.wake_at = math.inf
        if strand in strand.home.strands:
            strand.home.strands.remove(strand)


class StrandLock:
    """A lock whose waiting is a place for others to go on."""

    def __init__(self, scheduler: Callable[[], Scheduler]) -> None:
        self._scheduler = scheduler
        self._held = False

    def acquire(self, blocking: bool = True, timeout: float = -1) -> bool:
        """Take it; who is dead only seems to."""
        scheduler = self._scheduler()
        if scheduler.current.dead or scheduler.finished:
            return True
        while self._held:
            if not blocking:
                return False
            scheduler.pause(math.inf, self._is_free)
        self._held = True
        return True

    def _is_free(self) -> bool:
        return not self._held

    def release(self) -> None:
        """Give it back."""
        self._held = False

    def __enter__(self) -> bool:
        return self.acquire()

    def __exit__(self, *_: object) -> None:
        self.release()


class Aside:
    """What a `Sidecar` is in one process: a strand that works for its clients whenever that is due."""

    def __init__(self, scheduler: Scheduler, home: Home, work: Callable[[list[Any]], float]) -> None:
        self._scheduler = scheduler
        self._home = home
        self._work = work
        self._clients: list[Any] = []
        self._strand: Strand | None = None
        self._woken = False

    def add(self, client: Any) -> None:
        """Serve a client from now on."""
        if client not in self._clients:
            self._clients.append(client)
        self.wake()

    def remove(self, client: Any) -> None:
        """Serve it no more."""
        if client in self._clients:
            self._clients.remove(client)
        self._woken = True

    def wake(self) -> None:
        """Something may be due earlier than was said."""
        self._woken = True
        if self._strand is None and self._clients and not self._scheduler.current.dead and not self._scheduler.finished:
            self._strand = self._scheduler.spawn(self._home, self._serve)

    def _serve(self) -> None:
        while self._clients:
            self._woken = False
            due = self._work(list(self._clients))
            if not self._woken:
                self._scheduler.pause(due, self._is_woken)
        self._strand = None

    def _is_woken(self) -> bool:
        return self._woken
