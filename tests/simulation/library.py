"""Private copies of the library's modules, which see the clock, the locks, the store and the processes of a simulation.

The copies are made from the very sources, so what runs is what ships; the modules that everybody else has imported stay as they
are. A planted bug is one line switched in a copy.
"""

from __future__ import annotations

import math
from importlib import import_module
from types import ModuleType, SimpleNamespace
from typing import TYPE_CHECKING, Any

from faultguard._core.log import Get, List
from faultguard._core.names import record_name, record_number
from faultguard._process import ProcessId
from faultguard.errors import FaultguardError
from tests.model import Variant, execute, source_of, switched_source
from tests.simulation.strands import Aside, StrandLock

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.simulation.strands import Home

__all__ = ["Library"]

COPIED = (  # each sees the copies before it
    "_core.budget",
    "_core.log",
    "_core.schedule",
    "_core.stall",
    "_watch",
    "_stall",
    "_handle",
    "_sidecar",
    "_log",
    "_journal",
    "_sentences",
    "_watcher",
    "_worker",
    "_soon",
    "_deferred",
    "_attempt",
)
BOOT = "boot"


class Library:
    """The copies, wired to whatever simulation is in `sim`.

    Args:
        bug: a line to be switched, or what else is to be done to the copies.

    Attributes:
        fair: the store works, nobody fails, and the bursts are such that a process is often frozen before its first save.
        only: violations of other guarantees end a schedule, and are not told.
        sky: the world, if another one than the usual.
        ledger: likewise.
    """

    def __init__(self, bug: Variant | Callable[[Library], None] | None = None) -> None:
        self.fair = False
        self.only = ""
        self.sky: Any = None
        self.ledger: Any = None
        self.sim: Any = None
        self._copies: dict[str, ModuleType] = {}
        self._installed: Any = None  # the process that runs
        for name in (f"faultguard.{short}" for short in COPIED):
            import_module(name)
            if name == "faultguard._sidecar":
                copy = ModuleType(name)
                copy.__dict__["Sidecar"] = self._sidecar()
            else:
                source = switched_source(bug) if isinstance(bug, Variant) and bug.module == name else source_of(name)
                copy = execute(name, source, self._copies)
            self._copies[name] = copy
        self._wire()
        if bug is not None and not isinstance(bug, Variant):
            bug(self)

    def __getattr__(self, short: str) -> Any:
        """A copy: `library.attempt`, `library.log` (the rules)."""
        for name in (f"faultguard._{short}", f"faultguard._core.{short}"):
            if name in self._copies and (short != "log" or "_core" in name):
                return self._copies[name]
        raise AttributeError(short)

    def install(self, home: Home) -> None:
        """From now on it is this process that runs: what a module has once per process is its own."""
        watcher = self.watcher
        if self._installed is not None:
            self._installed.mark_at = watcher._mark_at
        globals_ = getattr(home, "globals", None)
        self._installed = globals_
        if globals_ is not None:
            watcher._clients, watcher._clock, watcher._mark_at = globals_.clients, globals_.clock, globals_.mark_at
            watcher._lock = globals_.lock
            self.worker.held_here = self.attempt.held_here = globals_.held_here
            self.soon._soon = globals_.soon

    def globals_of_a_process(self) -> SimpleNamespace:
        """What a new process has."""
        watcher = self.watcher
        return SimpleNamespace(
            clients={}, clock=watcher.AwakeClock(), mark_at=math.inf, lock=self._lock(), held_here={}, soon=self.soon._Soon()
        )

    # --- wiring ---

    def _lock(self) -> StrandLock:
        return StrandLock(lambda: self.sim)

    def _wire(self) -> None:
        rules, attempt, journal, worker = self.log, self.attempt, self.journal, self.worker
        deferred, soon, stall, watcher = self.deferred, self.soon, self.stall, self.watcher
        attempt.rules = journal.rules = rules
        attempt._soon = deferred._soon = soon
        clock = _Clock(self)
        threads = SimpleNamespace(
            Lock=self._lock,
            Thread=lambda **how: _Thread(self, **how),
            get_ident=lambda: self.sim.current.ident,
            local=SimpleNamespace,
        )
        events = SimpleNamespace(emit=self._event, emit_beside=self._event, report=self._report)
        for module in (attempt, journal, worker, deferred, soon, watcher, self.handle, self.sentences):
            module.time = clock
        for module in (journal, worker, deferred, soon, stall):
            module.threading = threads
        for module in (attempt, journal, worker, watcher, self.sentences):
            module._events = events
        stall._set_async = self._set_async
        stall._take_back = lambda ident: self._set_async(ident, None)
        soon.os = SimpleNamespace(register_at_fork=lambda **_: None)
        watcher._marks = SimpleNamespace(write=lambda *_, **__: None, erase=lambda: None)
        worker._watcher, worker._beater = watcher, _Beater(self)
        worker._ray = SimpleNamespace(runs_several=lambda: False)
        worker.os = SimpleNamespace(_exit=lambda _: self.sim.exits(), getpid=lambda: self.sim.current.home.pid)
        worker.stacks = lambda *_, **__: ""
        worker._flush = lambda: None
        self._wire_attempt(attempt)

    def _wire_attempt(self, attempt: Any) -> None:
        attempt.StoredLog = self._stored_log()
        attempt.checked_store = lambda _: _Store(self)
        attempt.is_cancelled = lambda *_: False
        attempt._death_of = lambda head: (head.owner.writer, "crash", "")  # it is looked for between two tries to claim
        attempt.is_dead = lambda process: self.sim.is_dead(process.pid)
        attempt.this_process = lambda: ProcessId(BOOT, self.sim.current.home.pid, 1)
        attempt.new_writer = lambda: self.sim.current.home.name
        attempt._last_beat = lambda *_: self.sim.last_beat()

    def _set_async(self, ident: int, error: type[BaseException] | None) -> bool:
        return bool(self.sim.set_async(ident, error))

    def _event(self, _level: int, _event: str, sentence: str, **_: Any) -> None:
        self.sim.world.say(f"{self.sim.current.home.name}: {sentence}")

    def _report(self, thread: str, error: Exception) -> None:
        self.sim.fails(AssertionError(f"{thread} goes on after {error!r}"))

    def _sidecar(self) -> type[Any]:
        library = self

        class Sidecar:
            """One `Aside` per process."""

            def __class_getitem__(cls, _: object) -> type[Sidecar]:
                return cls

            def __init__(self, name: str, work: Callable[[list[Any]], float], report: Callable[[str, Exception], None]) -> None:
                self._work = work

            def __getattr__(self, what: str) -> Any:
                sim = library.sim
                home = sim.current.home
                if self not in home.asides:
                    home.asides[self] = Aside(sim, home, self._work)
                return getattr(home.asides[self], what)

        return Sidecar

    def _stored_log(self) -> type[Any]:
        library = self

        class Log(self._copies["faultguard._log"].StoredLog):  # type: ignore[misc] # a class of a copy
            """Asks the world, and lets it know what comes of it."""

            def run(self, procedure: Any) -> Any:
                me = library.sim.current.home
                late = procedure.gi_frame.f_locals["me"].late if procedure.__name__ == "claim" else False
                result = super().run(procedure)
                library.sim.answered(me, procedure.__name__, result, late=late)
                return result

            def numbers(self) -> Any:
                return library.sim.ask(List())

            def _perform(self, op: Any) -> Any:
                return library.sim.ask(op)

        return Log


class _Store:
    """For what reads the newest record without the rules."""

    url = "memory://sim"

    def __init__(self, library: Library) -> None:
        self._library = library

    def get(self, key: str) -> Any:
        number = record_number(key.rpartition("/")[2])
        assert number is not None
        assert key.endswith(record_name(number))
        return self._library.sim.ask(Get(number))


class _Clock:
    """In the place of the module `time`."""

    def __init__(self, library: Library) -> None:
        self._library = library

    def monotonic(self) -> float:
        return float(self._library.sim.look())

    def time(self) -> float:
        sim = self._library.sim
        return float(sim.look() + sim.current.home.pid)  # no two hosts agree

    def perf_counter(self) -> float:
        return float(self._library.sim.spend())

    thread_time = perf_counter

    def sleep(self, seconds: float) -> None:
        self._library.sim.sleep(seconds)


class _Thread:
    """In the place of `threading.Thread`."""

    def __init__(self, library: Library, *, target: Callable[..., None], args: tuple[Any, ...] = (), **_: Any) -> None:
        self._library = library
        self._target, self._args = target, args
        self._strand: Any = None

    def _run(self) -> None:
        try:
            self._target(*self._args)
        except FaultguardError as error:  # a real thread ends so, too, and nothing else does
            self._library.sim.world.say(f"{self._library.sim.current.home.name}: a thread ends with {type(error).__name__}")

    def start(self) -> None:
        sim = self._library.sim
        self._strand = sim.spawn(sim.current.home, self._run)

    def join(self, timeout: float) -> None:
        sim = self._library.sim
        sim.pause(sim.now + timeout, lambda: bool(self._strand.over))


class _Beater:
    """In the place of the thread that beats: one strand per process, as long as it has something to tell."""

    def __init__(self, library: Library) -> None:
        self._library = library

    def register(self, source: Any) -> None:
        sim = self._library.sim
        home = sim.current.home
        if not (home.sources or sim.current.dead):
            sim.spawn(home, lambda: sim.beats(home))
        home.sources.append(source)

    def hurry(self, source: Any, wait_s: float) -> None:
        """Nobody waits."""

    def unregister(self, source: Any) -> None:
        sim = self._library.sim
        if source in sim.current.home.sources and not sim.current.dead:
            sim.current.home.sources.remove(source)
            sim.gives_up(source)
