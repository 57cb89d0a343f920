"""The world around the processes of one worker: Ray, the store, the weather, and every guarantee after every step.

The store, its faults and the ledger of what was promised are those of `tests.model`; here the library itself runs on top of them.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass, field, replace
from datetime import timedelta
from typing import TYPE_CHECKING, Any, cast

import msgspec

from faultguard import _codec
from faultguard._ray import Identity
from faultguard._settings import Settings
from faultguard.policy import Backoff
from tests.model import POLICIES, Grant, Incarnation, Ledger, Violation, Weather, World
from tests.simulation.process import FreshError, PlantedError, Process, whole
from tests.simulation.strands import Killed, Scheduler, Strand

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from faultguard._core.records import Record
    from tests.simulation.library import Library
    from tests.simulation.strands import Home

__all__ = ["Cluster", "Sky", "Task"]

MAX_PROCESSES = 8
BURSTS = (1, 2, 3, 5, 10, 20, 40, 80)
FAIR_BURSTS = (5, 5, 10, 10, 20)
LOOK_SHARE = 0.2  # two looks of the watcher, over the timeout: what one absence may count for
GRACE_S = 0.5
TIMEOUT_S = 5.0
BEAT_S = 1.0
LARGE = "x" * 40_000
CALM_STEPS = 20_000


@dataclass
class Task:
    """A task of Ray's: it is run again until a reply of its newest attempt arrives."""

    sim: Cluster
    ray_id: str
    epoch: int
    attempts: int = 0
    newest: Process | None = None
    value: Any = None
    life: int = 0  # that it is the outcome of
    over: bool = False  # a reply has arrived
    can_be_lost: bool = False  # the value lies in Ray's object store

    def start(self) -> Process:
        """Ray's next attempt."""
        name = f"{self.ray_id}e{self.epoch}.{self.attempts}"
        identity = Identity("01", "node", self.ray_id, self.attempts, "task", "task", ray_worker=name)
        self.newest = Process(self.sim, name, len(self.sim.homes) + 1, self, identity)
        self.attempts += 1
        self.over = False
        return self.newest

    def replied(self, process: Process, value: Any) -> None:
        """A reply arrives: that of an attempt which Ray has given up is dropped."""
        if self.newest is not process:
            return
        self.over = True
        if value is None:
            return
        if self.value is not None and self.value != value and self.life == process.life:  # else another task has begun the worker anew
            self.sim.fails(Violation(f"G4: task {self.ray_id} has given {_short(self.value)} and gives {_short(value)}"))
        self.value, self.life = value, process.life
        self.can_be_lost = len(value[0]) > len(LARGE)


@dataclass
class SimLedger(Ledger):
    """Of a worker that may be claimed late: user code may have run before there was any record."""

    unclaimed: list[Process] = field(default_factory=list)
    records: Callable[[], Iterable[Record]] = tuple  # that ever were in the log

    def _check_budget(self, new: Grant) -> None:
        since = any(life == new.life and landed <= new.landed for life, landed in [*self.failed_ends, *self.refills])
        owners = [record.owner for record in self.records()]
        writers = {owner.writer for owner in owners}  # what stands in the log is charged, or excused, like any other
        first = min(
            self.grants, key=lambda grant: grant.landed
        ).owner.task_id  # another task that has taken the id owes nothing for this one
        extra = sum(process.begun and process.name not in writers and process.identity.task_id == first for process in self.unclaimed)
        if new.life > 1 or since or any(owner.task_id != first for owner in owners):  # a log that others have begun hides that nothing was
            extra = 0
        limit = self.max_failures
        self.max_failures = limit - extra if limit >= 0 else limit
        try:
            if 0 <= limit < extra:
                raise Violation(f"G5: {extra} attempts began without a record, claim {new.number} follows, max_failures is {limit}")
            super()._check_budget(new)
        finally:
            self.max_failures = limit


class Sky(World):
    """The store of the model, whose records are those of the library's own handles."""

    volatile: int | None = None  # the record that need not be durable

    def _would_load(self) -> tuple[int, int, int]:
        return super()._would_load() if any(self.records.values()) else (max(self.records, default=0), 1, 0)

    def check_whole(self, record: Record) -> None:
        """A saved state is that of a boundary, and counts each batch once (G9)."""
        if record.snapshot is None:
            return
        state = msgspec.json.decode(bytes(record.snapshot.state))
        wrong = whole(state, record.snapshot.batch, {place[-1].done for place in record.quarantined})
        if wrong:
            raise Violation(f"G9: the state of record {record.number} {wrong}")
        if record.outcome is not None and record.outcome.status == "completed" and record.snapshot.batch != self.batches:
            raise Violation(f"G9: record {record.number} completes at batch {record.snapshot.batch} of {self.batches}")

    def perform(self, who: Incarnation, op: Any, fault: str, cut: float) -> Any:
        """As of the model; it also knows what need not be durable."""
        reply = super().perform(who, op, fault, cut)
        if type(op).__name__ == "Create" and self.records.get(op.number) == op.data and not op.durable:
            self.volatile = op.number
        return reply

    def vanish(self, rng: random.Random, deleted: dict[int, bytes], *, all_die: bool) -> None:
        """The power fails: what has no reply may be gone, what was deleted may come back.

        What need not be durable may be gone, if all who have seen it are; its name is durable with the next record above it.
        """
        self.in_flight.clear()
        number = self.volatile
        if all_die and number is not None and rng.random() < 0.7:
            self.say(f"record {number} is gone")
            if max(self.records) > number or rng.random() < 0.5:
                self.records[number] = b""
            else:
                self._delete(number)
                self.landed = [old for old in self.landed if old.record.number != number]
            if max(self.records, default=number) == number:  # nothing tells that anybody had begun
                self.ledger.grants = [grant for grant in self.ledger.grants if grant.number != number]
                self._truth = self._would_load()
        self.volatile = None if all_die else number
        for number, data in deleted.items():
            if number not in self.records and rng.random() < 0.5:
                self.say(f"record {number} is back")
                self.records[number] = data
                self.events.append(("create", number))


@dataclass(frozen=True)
class Storm:
    """How likely is what beside the store, in one schedule."""

    preempts: float
    batch_s: float
    latency_s: float
    spend_s: float  # of the processor, whenever it is asked how much was spent
    signals: float
    false_alarms: float
    outages: float
    leaps: float
    power: float
    hangs: float
    dies: float
    raises: float
    exits: float
    asks: float
    large: float
    apart: bool  # the processes cannot see each other

    @classmethod
    def of(cls, rng: random.Random) -> Storm:
        """Draw one."""
        choice = rng.choice
        return cls(
            preempts=choice((0.0, 0.0, 0.05, 0.3)),
            batch_s=choice((0.001, 0.03, 0.3)),
            latency_s=choice((0.0001, 0.01, 0.2)),
            spend_s=choice((0.0, 0.0, 0.0005)),
            signals=choice((0.0, 0.0, 0.1)),
            false_alarms=choice((0.0, 0.0, 0.1)),
            outages=choice((0.0, 0.0, 0.05)),
            leaps=choice((0.0, 0.1, 0.3)),
            power=choice((0.0, 0.0, 0.05)),
            hangs=choice((0.0, 0.0, 0.1)),
            dies=choice((0.0, 0.02, 0.1)),
            raises=choice((0.0, 0.05, 0.2)),
            exits=choice((0.0, 0.0, 0.03)),
            asks=choice((0.0, 0.0, 0.2)),
            large=choice((0.0, 0.5)),
            apart=rng.random() < 0.3,
        )


class Cluster(Scheduler):
    """All that happens to one worker in one schedule.

    Args:
        seed: of everything.
        library: the copies that run.
    """

    def __init__(self, seed: int, library: Library) -> None:
        rng = random.Random(seed)
        super().__init__(rng, library.install)
        self.library = library
        library.sim = self
        self.kind = rng.choice(("deferred", "deferred", "unnamed", "named"))
        self.batches = rng.choice((2, 4, 8))
        self.policy = rng.choice(POLICIES)
        self.max_failures = rng.choice((0, 1, 2, 3, -1))
        self.keep = rng.choice((2, 2, 3))
        self.every = rng.choice((1, 1, 2, "auto", "auto", timedelta(seconds=0.5)))
        self.stalls = self.kind != "deferred" and rng.random() < 0.4
        self.patience_s = rng.choice((0.0, 3.0, 30.0))
        self.poison = rng.choice((-1, -1, -1, 0, 1))
        self.weather, self.storm = Weather.of(rng), Storm.of(rng)
        if library.fair:
            self.poison, self.every, self.batches = -1, 1, 8
            self.weather = replace(self.weather, faults=0.0, old_listings=0.0, deaths=0.05, arrivals=0.3)
            self.storm = replace(
                self.storm, outages=0.0, power=0.0, signals=0.0, raises=0.0, hangs=0.0, leaps=0.0, false_alarms=0.0, exits=0.0
            )
        self.preempts = self.storm.preempts
        self.worker_id = "t1" if self.kind == "deferred" else "w"
        self.world = (library.sky or Sky)(
            library.log, batches=self.batches, keep=self.keep, max_failures=self.max_failures, policy=self.policy
        )
        self.world.ledger = (library.ledger or SimLedger)(
            self.max_failures, self.policy, records=lambda: [old.record for old in self.world.landed]
        )
        self.options = self._options()
        self.tasks: list[Task] = []
        self.epoch = int(self.kind == "named")
        self.bursts = rng.choice((8, 15, 30)) * (1 + library.fair)
        self.calm = False
        self.last: Process | None = None
        self.outage_until = -math.inf
        self.deleted: dict[int, bytes] = {}
        self.final_token: int | None = None
        self.told: dict[int, str] = {}  # who was given which token
        self._cpu_s = 0.0

    def live(self) -> list[str]:
        """Go through the schedule; its story.

        Raises:
            Violation: with the story.
        """
        self._start(Task(self, "t1", self.epoch))
        self.drive()
        if self.failure is not None:
            said = "\n  ".join(self.world.story)
            raise Violation(f"{self.failure}\n{self.describe()}\n  {said}") from self.failure
        return self.world.story

    def describe(self) -> str:
        """The options of this schedule."""
        names = ("kind", "batches", "policy", "max_failures", "keep", "every", "stalls", "patience_s", "poison", "weather", "storm")
        return ", ".join(f"{name}={getattr(self, name)}" for name in names)

    def _options(self) -> Any:
        return self.library.attempt.TaskOptions(
            name="task",
            max_failures=self.max_failures,
            every=self.every,
            keep=self.keep,
            backoff=Backoff(initial=0.2, factor=2.0, maximum=0.9, jitter=False),
            stall_timeout_s=TIMEOUT_S if self.stalls else None,
            reset_on_progress=self.policy.reset_on_progress,
            fresh_process_on=FreshError,
            on_poison="skip" if self.policy.skip_poison else "fail",
        )

    # --- what a process asks ---

    def settings_of(self, process: Process) -> Settings:
        """What its driver has decided."""
        return Settings(
            run="sim",
            checkpoint_dir="memory://sim",
            store_id="sim",
            job_id="01",
            max_failures=self.max_failures,
            heartbeat_interval=BEAT_S,
            heartbeat_timeout=2.0,
            store_patience=self.patience_s,
            epoch=process.task.epoch,
            instance=int(self.kind == "named"),
        )

    def work_of(self, process: Process) -> Any:
        """The arguments may be too large to be had twice."""
        return self.library.attempt.Work(process.call, repeatable=self.rng.random() < 0.8)

    def value_of(self, process: Process) -> list[str]:
        """Nobody else gives the same."""
        text = process.name
        return [text + LARGE] if self.rng.random() < self.storm.large and not self.calm else [text]

    def is_dead(self, pid: int) -> bool | None:
        """As far as one can see."""
        if self.storm.apart and not self.calm:
            return None
        return not self.homes[pid - 1].alive

    def last_beat(self) -> dict[str, Any]:
        """What the manager has heard."""
        return {"age_s": 0.0, "doubted": False, "uptime_s": 0.0, "final_token": self.final_token}

    def gives_up(self, source: Any) -> None:
        """A final beat."""
        self.final_token = max(self.final_token or 0, source.journal.held.token)

    def spend(self) -> float:
        """Seconds of the processor."""
        self._cpu_s += self.storm.spend_s
        return self._cpu_s

    def ask(self, op: Any) -> Any:
        """Carry out one operation of the store: before it, and before its reply is read, anything may happen."""
        process = cast("Process", self.current.home)
        self.sleep(self.storm.latency_s * self.rng.random())
        fault = "" if self.calm else "error" if self.now < self.outage_until else self.weather.fault(op, self.rng)
        if fault and self.rng.random() < 0.5:
            self.left = 0  # a fault is the best moment to freeze
        if type(op).__name__ == "Delete":
            self.deleted[op.number] = self.world.records.get(op.number, self.deleted.get(op.number, b""))
        try:
            reply = self.world.perform(cast("Incarnation", process), op, fault, self.rng.random())
        except AssertionError as error:
            self.fails(error)
        finally:
            process.met_fault = process.met_fault or bool(fault)
        if self.rng.random() < 0.1:
            self.pause()
        return reply

    def answered(self, process: Any, procedure: str, result: Any, *, late: bool) -> None:
        """What comes of a procedure of the rules; on behalf of the user, who may be told next."""
        try:
            self._answered(process, procedure, result, late=late)
        except AssertionError as error:
            self.fails(error)

    def _answered(self, process: Any, procedure: str, result: Any, *, late: bool) -> None:
        world, kind = self.world, type(result).__name__
        if procedure == "claim" and kind == "Granted":
            if result.damaged:
                raise Violation(f"{process.name} is told that {result.damaged} are damaged, and nothing is")
            process.held, process.life = result.held, result.held.life
            self._check_new(process, result.held.token + process.task.epoch * 10**9)
            process.resumed_at = 0 if late or result.snapshot is None else result.snapshot.batch
            if process.begun:
                world.ledger.begun[result.held.token] = process.last_begun
            world.began(process)
        elif procedure == "claim" and kind == "Finished":
            record = result.record
            process.life = record.life
            if record.outcome.status == "completed":
                world.ledger.outcome(record.life, bytes(record.outcome.value))
            elif not self._is_spent(record):
                raise Violation(f"G5: record {record.number} fails for good with {record.charged} of {self.max_failures} failures")
        elif procedure == "claim":
            if kind == "Blocked" and result.head.owner.writer == process.name:
                raise Violation(f"{process.name} is kept out by a record of its own")
        elif procedure in {"save", "retry_record"} and result and process.held is not None:
            self._wrote(process, procedure)

    def _check_new(self, process: Any, token: int) -> None:
        if token in self.told:
            raise Violation(f"G3: {process.name} gets token {token}, which {self.told[token]} was told")

    def _wrote(self, process: Any, procedure: str) -> None:
        held = process.held
        self.world.promised(process, held.last)
        if procedure == "retry_record" and held.known[held.last] != "end":
            process.resumed_at = held.durable.batch if held.durable is not None else 0
            self.world.began(process)

    def _is_spent(self, record: Record) -> bool:
        return 0 <= self.max_failures < record.charged or (record.ended is not None and record.ended.charged)

    # --- what the user's code does ---

    def enters(self, process: Process, ckpt: Any) -> None:
        """The body begins: with what was promised."""
        ledger = cast("SimLedger", self.world.ledger)
        if process.held is None:
            ledger.unclaimed.append(process)
        process.begun = True
        batch = ckpt.current_batch
        if process.held is not None and batch != process.resumed_at:
            self.fails(Violation(f"G1: {process.name} was granted batch {process.resumed_at} and begins at {batch}"))
        wrong = whole(ckpt.state, batch, {position[-1] for position in ckpt.quarantined})
        if wrong:
            self.fails(Violation(f"G9: the state with which {process.name} begins {wrong}"))
        if self.storm.asks and self.rng.random() < 0.5:
            self._check_token(process, ckpt.token)

    def begins(self, process: Process, ckpt: Any, batch: int) -> None:
        """A batch is in hand."""
        if ckpt.current_batch != batch:
            self.fails(Violation(f"{process.name} is at batch {ckpt.current_batch} and gets {batch}"))
        if (batch,) in ckpt.quarantined:
            self.fails(Violation(f"{process.name} is given batch {batch}, which is in quarantine"))
        process.last_begun = batch
        if process.held is not None:
            self.world.ledger.begun[process.held.token] = batch

    def works(self, process: Process, ckpt: Any, batch: int) -> None:
        """In the middle of a batch."""
        rng, storm = self.rng, self.storm
        self.sleep(storm.batch_s * rng.random())
        if self.calm:
            return
        if batch == self.poison:
            self._fails_at(process, rng.choice(("raise", "raise", "die", "fresh")))
        chance = rng.random()
        if chance < storm.dies:
            self._fails_at(process, "die")
        elif rng.random() < storm.raises:
            self._fails_at(process, rng.choice(("raise", "raise", "raise", "fresh")))
        elif rng.random() < storm.exits:
            self._fails_at(process, "exit")
        elif rng.random() < storm.hangs:
            self._hangs(process)

    def _fails_at(self, process: Process, how: str) -> None:
        self.world.say(f"{process.name}: {how}s at batch {process.handle.current_batch}")
        if how == "die":
            self.exits()
        if how == "exit":
            raise SystemExit(1)
        raise PlantedError("planted") if how == "raise" else FreshError("planted")

    def _hangs(self, process: Process) -> None:
        """Two kinds: what runs Python now and then gets a `StalledError`, what does not is ended."""
        self.world.say(f"{process.name}: hangs")
        if self.rng.random() < 0.5:
            for _ in range(8):
                self.sleep(TIMEOUT_S / 4)
        else:
            self.sleep(4 * TIMEOUT_S)

    def asks(self, process: Process, ckpt: Any) -> None:
        """At the end of a batch: something that only a claim gives, or a save that is waited for."""
        if self.rng.random() >= self.storm.asks:
            return
        what = self.rng.choice(("token", "advance", "check", "save"))
        if what == "token":
            self._check_token(process, ckpt.token)
        elif what == "check":
            ckpt.check()
        elif what == "advance":
            ckpt.advance(wait=True)
        else:
            ckpt.advance()
            ckpt.save(wait=True)

    def _check_token(self, process: Process, token: int) -> None:
        if process.held is None or token % 10**9 != process.held.token:
            self.fails(Violation(f"G3: {process.name} is given token {token}, and holds {process.held and process.held.token}"))
        self.told[token] = process.name

    def exits(self) -> None:
        """The process of the current strand ends at once."""
        home = cast("Process", self.current.home)
        self.world.say(f"{home.name}: dies")
        self.kill(home)
        raise Killed

    # --- guarantees that are seen from here ---

    def fail(self, error: BaseException) -> None:
        """As of the scheduler; of one guarantee alone, where that is asked for."""
        if self.library.only and not str(error).startswith(self.library.only):
            self.finish()
        else:
            super().fail(error)

    def fails(self, error: BaseException) -> None:
        """Something does not hold; nothing goes on here."""
        self.fail(error)
        raise Killed from error

    def demand(self, holds: bool, text: str) -> None:
        """Something must hold."""
        if not holds:
            self.fails(Violation(text))

    def has_rival(self, process: Process) -> bool:
        """Whether anybody else has written above the claim of a process."""
        token = process.held.token if process.held is not None else 0
        return any(old.record.owner.writer != process.name and old.record.number > token for old in self.world.landed)

    def store_failed(self, process: Process) -> bool:
        """Whether a process has met a fault of the store, and had patience: which is counted from when it began to ask."""
        return process.met_fault and self.now >= process.born + self.patience_s

    def failed_for_good(self, process: Process) -> None:
        """The user is told so: it stands in the log."""
        ends = [old.record for old in self.world.landed if old.record.outcome is not None and old.record.outcome.status == "failed"]
        self.demand(bool(ends), f"G5: {process.name} has failed for good, and the log does not say so")
        process.task.replied(process, None)

    def set_async(self, ident: int, error: type[BaseException] | None) -> bool:
        """An exception for another thread, as CPython sets it; none: it is taken back."""
        strand = next((strand for home in self.homes for strand in home.strands if strand.ident == ident), None)
        if strand is None:
            return False
        strand.pending, strand.struck = error, error is not None
        if error is not None and issubclass(error, Exception):
            self._check_stall(cast("Process", strand.home))
        return True

    def _check_stall(self, process: Process) -> None:
        """G6: what the process missed as a whole is nobody's stall."""
        stood_s = process.awake_s - process.batch_awake_s
        absences = process.absences - process.batch_absences
        if stood_s < TIMEOUT_S * (1 - LOOK_SHARE * (absences + 1)) - GRACE_S:
            self.fails(Violation(f"G6: {process.name} stalls after {stood_s:.2f} s of its own in its batch, the timeout is {TIMEOUT_S} s"))

    def arrives(self, strand: Strand) -> None:
        """What was raised into a strand: a stall only where a batch is in hand, or it would end the next task of the process."""
        if strand.struck and not cast("Process", strand.home).is_in_batch:
            self.fails(Violation(f"G10: a stall arrives in {strand.home.name} outside of its batch"))
        self.world.say(f"{strand.home.name}: is interrupted")

    # --- what happens between ---

    def beats(self, home: Any) -> None:
        """The thread that beats."""
        begun: list[Any] = []
        self.sleep(BEAT_S / 2)
        while home.sources:
            for source in tuple(home.sources):
                if source not in begun:
                    begun.append(source)
                    source.lasts()
                    source.begins()
                source.told(self._reply(source.beat()))
            self.sleep(BEAT_S)

    def _reply(self, beat: Any) -> str:
        newest = max((grant.number for grant in self.world.ledger.grants), default=0)
        if self.calm or self.rng.random() >= self.storm.false_alarms:
            return "superseded" if beat["token"] < newest else "ok"
        return self.rng.choice(("superseded", "drained", "drained", "cancelled"))

    def between(self) -> None:
        """A burst is over: something happens, and another process goes on."""
        if self.calm:
            self._go_on_calmly()
            return
        self.bursts -= 1
        if self.bursts < 0:
            self._becomes_calm()
            return
        rng, storm = self.rng, self.storm
        self._arrivals()
        if self.world.in_flight and rng.random() < self.weather.landings:
            self.world.land(rng.randrange(8))
        alive = [cast("Process", home) for home in self.homes if self.can_go_on(home)]
        if rng.random() < storm.leaps:
            self.leap(rng.choice((0.2, 5.0, 100.0)))
        if rng.random() < storm.outages:
            self.outage_until = self.now + rng.choice((0.5, 5.0, 60.0))
        if rng.random() < storm.power:
            self._power_fails()
        if alive and rng.random() < self.weather.deaths:
            self._ends(rng.choice(alive))
        if alive and rng.random() < storm.signals:
            self._signals(rng.choice(alive))
        alive = [process for process in alive if self.can_go_on(process)]
        if alive:
            self._burst(rng.choice(alive), rng.choice(BURSTS if not self.library.fair else FAIR_BURSTS))

    def _burst(self, process: Home, steps: int) -> None:
        if self.home is not process:
            process.absences += 1
        self.home, self.left = process, steps

    def _arrivals(self) -> None:
        rng = self.rng
        alive = any(self.can_go_on(home) for home in self.homes)
        if len(self.homes) >= MAX_PROCESSES or (alive and rng.random() >= self.weather.arrivals):
            return
        again = [task for task in self.tasks if task.epoch == self.epoch and (not task.over or task.can_be_lost)]
        if again and rng.random() < 0.8:
            self._start(rng.choice(again))
        elif self.kind == "named" and rng.random() < 0.5:
            self.epoch += 1
            self._start(Task(self, "t1", self.epoch))  # a new cluster gives the ids of an old one again
        else:
            self._start(Task(self, f"t{len(self.tasks) + 1}", self.epoch))

    def _start(self, task: Task) -> Process:
        if task not in self.tasks:
            self.tasks.append(task)
        process = task.start()
        self.homes.append(process)
        self.world.say(f"{process.name}: starts at {self.now:.1f}")
        return process

    def _ends(self, process: Process) -> None:
        self.world.say(f"{process.name}: is killed")
        self.kill(process)

    def _signals(self, process: Process) -> None:
        """SIGTERM, or a cancel of Ray's: it arrives wherever the main thread stands."""
        if process.done:
            return
        process.body.pending = _terminated if self.rng.random() < 0.5 else KeyboardInterrupt
        process.body.struck = False

    def _power_fails(self) -> None:
        self.world.say("the power fails")
        all_die = self.rng.random() < 0.7
        self.world.vanish(self.rng, self.deleted, all_die=all_die)
        if all_die:
            for home in self.homes:
                if home.alive:
                    self.kill(home)

    def _becomes_calm(self) -> None:
        """The end of the story: all are dead, nothing goes wrong any more, and who comes then finds all that was promised."""
        self.world.say("calm")
        self.calm, self.preempts = True, 0.0
        for home in self.homes:
            if home.alive:
                self.kill(home)
        for _ in range(len(self.world.in_flight)):
            self.world.land()
        if self.kind == "named":
            self.epoch += 1
        again = [task for task in self.tasks if task.epoch == self.epoch and (not task.over or task.can_be_lost)]
        new = Task(self, f"t{len(self.tasks) + 1}" if self.kind != "named" else "t1", self.epoch)
        self.last = self._start(again[-1] if again else new)

    def _go_on_calmly(self) -> None:
        last = self.last
        assert last is not None
        if last.done:
            self.finish()
        elif self.can_go_on(last):
            self._burst(last, CALM_STEPS)
        else:
            raise Violation(f"{last.name} does not get anywhere")


def _terminated() -> SystemExit:
    """As Ray raises it when a worker process gets SIGTERM."""
    error = SystemExit(1)
    error.ray_terminate_msg = "terminated"  # type: ignore[attr-defined] # what Ray sets
    return error


def _short(value: Any) -> str:
    return _codec.encode([text.rstrip("x") for text in value]).decode()
