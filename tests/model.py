"""A small world around the rules of a log: one worker, many incarnations, a store that loses replies, and all guarantees.

The rules under test are the very generators of `faultguard._core.log`. Everything they ask of the store is one step, and between
two steps anything may happen: an incarnation that is not stepped is frozen, one that is dropped is dead, a create whose reply
was lost may land much later. After each step the world compares what would be loaded with what was promised.

`python -m tests.model SEED [variant]` replays a schedule and prints its story.
"""

from __future__ import annotations

import random
import sys
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, Protocol

import msgspec

from faultguard._core import log as true_rules
from faultguard._core.budget import (
    PLAIN,
    POISON_FAILURES,
    Policy,
    batch_of,
    charge,
    exhausted,
    is_charged,
    is_later,
    must_pin,
)
from faultguard._core.records import Ended, FailureRecord, Mark, Outcome, Owner, Place, Record, Snapshot, Spot, decode_record
from faultguard._core.schedule import snapshot_to_flush
from faultguard.errors import AmbiguousReplyError, CheckpointCorruptError, CheckpointStoreError

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Iterable

CREATE_FAULTS = ("lost", "dropped", "late", "retried", "error")
OLD_LISTINGS = ("old", "old without deletions", "old with all deletions")
CAUSES = ("terminated", "left", "exception", "cancelled")  # of leaving
MAX_INCARNATIONS = 8
POLICIES = (PLAIN, PLAIN, Policy(reset_on_progress=True), Policy(skip_poison=True), Policy(reset_on_progress=True, skip_poison=True))
PINNED = 2  # batches, after which it is no longer recorded what begins


class Violation(AssertionError):  # noqa: N818 - it is what a test looks for
    """A guarantee does not hold."""


class Backend(Protocol):
    """A real store, driven beside the model: its answers must be the same."""

    def create(self, number: int, data: bytes) -> bool:
        """Create a record if it is absent: whether this call did."""

    def get(self, number: int) -> bytes | None:
        """The bytes of a record."""

    def numbers(self) -> list[int]:
        """All records, sorted."""

    def delete(self, number: int) -> None:
        """Delete a record, which may be absent."""


# --- what was promised ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Grant:
    """A claim that was granted: an attempt began."""

    number: int
    landed: int  # when its record was created
    life: int
    resume: int
    owner: Owner


@dataclass(frozen=True)
class Promise:
    """A save that was reported durable."""

    number: int
    landed: int
    claim_landed: int  # when the claim of the attempt that saved was created
    life: int
    batch: int


@dataclass(frozen=True)
class Landing:
    """A create that took place, as the `moment`-th event of the store."""

    moment: int
    record: Record


@dataclass
class Ledger:
    """Everything that was promised, and every promise checked against the others."""

    max_failures: int
    policy: Policy = PLAIN
    grants: list[Grant] = field(default_factory=list)
    promises: list[Promise] = field(default_factory=list)
    completed: dict[int, bytes] = field(default_factory=dict)  # per life: the value that was recorded
    failed_ends: list[tuple[int, int]] = field(default_factory=list)  # (life, landed): each refills the budget of what follows
    refills: list[tuple[int, int]] = field(default_factory=list)  # (life, landed) of records that gave something back
    begun: dict[int, int] = field(default_factory=dict)  # token: the last batch that the attempt has begun
    excused: list[tuple[int, int, int]] = field(default_factory=list)  # (life, landed, token) of uncharged ends
    heads: list[tuple[int, str]] = field(default_factory=list)  # (landed, task) of every record that was the newest

    def grant(self, new: Grant) -> None:
        """An attempt begins: it must see all that was promised (G1), go on from there (G2), be in order, and within budget (G5)."""
        for promise in self.promises:
            self._check_fence(new, promise)
        for old in self.grants:
            first, second = (old, new) if old.landed < new.landed else (new, old)
            if first.life == second.life and second.resume < first.resume:
                raise Violation(f"G2: claim {second.number} resumes at {second.resume}, claim {first.number} resumed at {first.resume}")
            if self._in_turn(first, second) and _order(second.owner) <= _order(first.owner):
                raise Violation(f"G3: claim {second.number} of {_order(second.owner)} was granted over {_order(first.owner)}")
            if first.owner.epoch > second.owner.epoch and first.life == second.life:
                raise Violation(f"G3: claim {second.number} of an older driver was granted over claim {first.number}")
        self.grants.append(new)
        self._check_budget(new)

    def promise(self, new: Promise) -> None:
        """A save is reported durable: nobody may have claimed before it was created (G3), nor resumed below it (G1)."""
        for grant in self.grants:
            self._check_fence(grant, new)
        self.promises.append(new)

    def outcome(self, life: int, value: bytes) -> None:
        """Somebody recorded or was given the outcome of a life (G4)."""
        if self.completed.setdefault(life, value) != value:
            raise Violation(f"G4: life {life} was completed with {self.completed[life]!r} and with {value!r}")

    def follows(self, new: Record, old: Record, moment: int) -> None:
        """A record is the newest now: it carries what is quarantined, and gives back only what the policy allows (G5)."""
        if new.life != old.life:
            if new.quarantined:
                raise Violation(f"life {new.life} begins with {new.quarantined} in quarantine")
            return
        if new.quarantined[: len(old.quarantined)] != old.quarantined:
            raise Violation(f"record {new.number} forgets that {old.quarantined} are in quarantine")
        if new.failures == old.failures or old.kind == "end":
            return
        newest, before = new.failures[-1], new.failures[:-1]
        self._check_culprit(new.number, old.token, newest)
        at_it = [failure for failure in new.failures if failure.pinned and batch_of(failure.place) == batch_of(newest.place)]
        aside = len(new.quarantined) - len(old.quarantined)
        if aside and (aside, new.quarantined[-1]) != (1, newest.place):
            raise Violation(f"record {new.number} quarantines {new.quarantined}, and {newest.place} failed")
        if aside and (not self.policy.skip_poison or len(at_it) < POISON_FAILURES):
            raise Violation(f"record {new.number} quarantines {newest.place} after {len(at_it)} failures")
        if new.charged == old.charged + 1:
            return
        progressed = self.policy.reset_on_progress and all(is_later(newest.place, failure.place) for failure in before)
        if not aside and not (progressed and new.charged == 1):
            raise Violation(f"G5: record {new.number} charges {new.charged} after {old.charged}, and nothing was given back")
        self.refills.append((new.life, moment))

    def _check_culprit(self, number: int, token: int, failure: FailureRecord) -> None:
        """What is said to have failed was not followed by another batch."""
        last = self.begun.get(token, -1)
        if failure.pinned and (not failure.place or last > failure.place[-1].done):
            raise Violation(f"record {number} blames {failure.place}, and attempt {failure.attempt} was at batch {last}")

    def _in_turn(self, first: Grant, second: Grant) -> bool:
        """Whether both are of one task, and none of another task came between."""
        between = {task for moment, task in self.heads if first.landed <= moment <= second.landed}
        return between == {_task(first.owner)}

    def _check_fence(self, grant: Grant, promise: Promise) -> None:
        if promise.claim_landed < grant.landed < promise.landed:
            raise Violation(f"G3: save {promise.number} was created after claim {grant.number} and reported durable")
        if grant.life == promise.life and promise.landed < grant.landed and grant.resume < promise.batch:
            raise Violation(f"G1: claim {grant.number} resumes at {grant.resume}, save {promise.number} at {promise.batch} was durable")

    def _check_budget(self, new: Grant) -> None:
        fresh = [*self.failed_ends, *self.refills]
        since = max((landed for life, landed in fresh if life == new.life and landed <= new.landed), default=-1)
        begun = sum(old.life == new.life and since < old.landed <= new.landed for old in self.grants)
        tokens = {old.number for old in self.grants}
        excused = sum(life == new.life and since < landed < new.landed and token in tokens for life, landed, token in self.excused)
        if 0 <= self.max_failures < begun - excused - 1:
            raise Violation(f"G5: {begun} attempts began, {excused} were excused, max_failures is {self.max_failures}")


def _order(owner: Owner) -> tuple[int, int]:
    return owner.ray_attempt, owner.local_retry


def _task(owner: Owner) -> str:
    """A task of Ray's, of one driver."""
    return f"{owner.task_id}e{owner.epoch}"


# --- one incarnation ------------------------------------------------------------------------------------------------


class Incarnation:
    """One execution of the task: a claim, user code in batches, a writer beside it, and how it ends.

    A batch adds 1 to `a`, and later 1 to `b`; a state in which they differ is half-updated.
    """

    def __init__(self, world: World, owner: Owner) -> None:
        self.world = world
        self.owner = owner
        self.name = owner.writer
        self.phase = "claiming"  # blocked, running, failing, leaving, ending, over
        self.held: Any = None
        self.superfluous: list[int] = []  # found, and deleted later
        self.newest: Snapshot | None = None
        self.a = self.b = self.done = self.resumed_at = 0
        self.cause = "exception"
        self.in_batch = False  # where it failed
        self.pinning = 0  # batches that are still recorded before they begin
        self.pinned = -1  # the last one that was
        self.gone = 0
        self.job: Generator[Any, Any, None] | None = None
        self.op: Any = None
        self._start(self._claim())

    # what the scheduler may do with it

    @property
    def can_work(self) -> bool:
        """Whether the user's code runs; with `wait` not while a save is on its way."""
        return self.phase == "running" and not (self.world.wait and self.job is not None)

    def step(self, fault: str = "", cut: float = 0.5) -> None:
        """Carry out the next thing that the rules want from the store, with a fault or without."""
        if self.job is None:
            return
        try:
            reply = self.world.perform(self, self.op, fault, cut)
        except CheckpointStoreError:  # the shell drops the procedure, and tries again at the next occasion
            self.job.close()
            self._stop(f"{self.name}: store error at {type(self.op).__name__}")
            return
        self._resume(reply)

    def work(self) -> None:
        """Half a batch; then a boundary."""
        if not self.can_work:
            return
        if self.a == self.b:
            if self.pinning and self.pinned != self.done:
                self._pin()
                return
            self.a += 1
            self.world.ledger.begun[self.held.token] = self.done
            return
        if self.done == self.world.poison:
            self.leave("exception") if self.held.attempt % 4 == 3 else self.die() if self.held.attempt % 4 == 2 else self.fail()
            return
        self.b += 1
        self.done += 1
        self._pass_over()
        if self.done % self.world.every == 0 or self.done == self.world.batches:
            self.newest = self._snapshot()
        if self.done >= self.world.batches:
            self.phase = "ending"
        self.go_on()

    def _pin(self) -> None:
        """Before a batch begins: record that, and wait for it; at last, that nobody says so any more."""
        if self.job is None:
            self.newest = self._snapshot()
            self._start(self._save(self.newest, self._place() if self.pinning > 1 else ()))

    def _pass_over(self) -> None:
        aside = {batch_of(place) for place in self.held.quarantined}
        while batch_of(self._place()) in aside:
            self.a, self.b, self.done = self.a + 1, self.b + 1, self.done + 1

    def fail(self) -> None:
        """The user's code raises, perhaps in the middle of a batch; or the store did, when the outcome was to be recorded."""
        if self.phase == "running" or (self.phase == "ending" and self.job is None):
            self.in_batch = self.a != self.b
            self.phase = "failing"
            self.go_on()

    def leave(self, cause: str) -> None:
        """SIGTERM, drain, or an exception that wants a fresh process."""
        if self.phase == "running":
            self.in_batch = self.a != self.b and cause == "exception"
            self.phase, self.cause = "leaving", cause
            self.go_on()

    def check(self) -> None:
        """The user's code asks whether it must stop."""
        if self.phase == "running" and self.job is None:
            self._start(self._check())

    def claim_again(self, *, gone: int) -> None:
        """After "blocked", or an error of the store: try once more."""
        if self.phase in {"claiming", "blocked"} and self.job is None:
            self.phase, self.gone = "claiming", gone
            self._start(self._claim())

    def give_back(self) -> None:
        """Cut while it claims: note in the log that nothing was begun, if the claim stands."""
        if self.phase == "claiming" and self.job is None:
            self._start(self._give_back())

    def die(self) -> None:
        """SIGKILL; what it sent may still arrive."""
        if self.phase != "over":
            self._end("dies")
            if self.job is not None:
                self.job.close()
                self.job = self.op = None

    def go_on(self) -> None:
        """Give the writer the next thing to do, if it is idle."""
        if self.job is not None:
            return
        if self.phase == "running" and self.newest is not None and self.newest is not self.held.durable:
            self._start(self._save(self.newest))
        elif self.phase in {"failing", "leaving", "ending"}:
            self._start({"failing": self._fail, "leaving": self._leave, "ending": self._complete}[self.phase]())

    # its procedures

    def _claim(self) -> Generator[Any, Any, None]:
        world = self.world
        limit, policy = world.ledger.max_failures, world.ledger.policy
        me = world.rules.Claimant(self.owner, "task", "w", limit, named_run=world.named, gone=self.gone, policy=policy)
        answer = yield from world.rules.claim(me, world.clock)
        kind = type(answer).__name__
        if kind == "Granted":
            if answer.damaged:
                raise Violation(f"{self.name} is told that {answer.damaged} are damaged, and nothing is")
            self.held = answer.held
            self._begin(answer.snapshot)
            world.began(self)
        elif kind == "Finished":
            outcome = answer.record.outcome
            self._end(f"is given the outcome {outcome.status} of life {answer.record.life}")
            if outcome.status == "completed":
                world.ledger.outcome(answer.record.life, bytes(outcome.value))
        elif answer.head.owner.writer == self.owner.writer:
            raise Violation(f"{self.name} is kept out by a record of its own")
        elif kind == "Blocked":
            self.phase, self.gone = "blocked", answer.head.token
            world.say(f"{self.name}: blocked by record {answer.head.number}")
        else:
            self._end(f"is refused by record {answer.head.number}")

    def _give_back(self) -> Generator[Any, Any, None]:
        rules = self.world.rules
        numbers = yield rules.List()
        data = (yield rules.Get(max(numbers))) if numbers else None
        head = decode_record(data, max(numbers)) if data is not None else None
        if head is not None and head.kind == "claim" and head.owner.writer == self.name:
            yield from rules.give_back(head, self.world.clock, Ended("cancelled", charged=False))
        self._end("gives its claim back")

    def _save(self, snapshot: Snapshot, begins: Place | None = None) -> Generator[Any, Any, None]:
        """With what goes beside it: deletes that were found earlier, or at once; and those of an attempt that hears of its successor."""
        world = self.world
        done = self.done
        saved = yield from world.rules.save(self.held, snapshot, world.clock, begins=begins or ())
        if saved:
            world.promised(self, self.held.last)
            if begins is not None:
                self.pinned, self.pinning = done, self.pinning - 1
        yield from world.rules.discard(self.held, self.superfluous)
        self.superfluous = yield from world.rules.retention(self.held, world.keep)
        if self.held.last % 2 or not saved:
            yield from world.rules.discard(self.held, self.superfluous)
        if not saved:
            self._superseded()

    def _check(self) -> Generator[Any, Any, None]:
        if (yield from self.world.rules.superseded(self.held)):
            self._superseded()

    def _fail(self) -> Generator[Any, Any, None]:
        """What the wrapper does with an exception: the next attempt in this process, or the end."""
        world = self.world
        failure = self._failure("exception")
        if exhausted(charge(self.held.budget, failure, self.held.policy).charged, world.ledger.max_failures):
            outcome, ended = Outcome("failed"), Ended("exception", charged=True)
            saved = yield from world.rules.save(self.held, self._flush(), world.clock, ended=ended, failure=failure, outcome=outcome)
            self._end("has failed for good") if saved else self._superseded()
        elif (yield from world.rules.retry_record(self.held, self._flush(), failure, world.clock)):
            self._begin(self.held.durable)
            if self.held.known[self.held.last] != "end":  # else it has arrived after all: this one only finds nothing left to do
                world.promised(self, self.held.last)
                world.began(self)
        else:
            self._superseded()

    def _leave(self) -> Generator[Any, Any, None]:
        world = self.world
        charged = is_charged(self.cause, progressed=self.held.durable is not None and self.held.durable.batch > self.resumed_at)
        failure = self._failure(self.cause) if charged else None
        if (yield from world.rules.save(self.held, self._flush(), world.clock, ended=Ended(self.cause, charged), failure=failure)):
            world.promised(self, self.held.last)
            self._end(f"leaves: {self.cause}")
        else:
            self._superseded()

    def _complete(self) -> Generator[Any, Any, None]:
        world = self.world
        outcome = Outcome("completed", recorded=True, value=msgspec.Raw(f'"{self.name}"'.encode()))
        if (yield from world.rules.save(self.held, self._snapshot(), world.clock, outcome=outcome)):
            world.promised(self, self.held.last)
            world.ledger.outcome(self.held.life, bytes(outcome.value))
            self._end("has completed")
        else:
            self._superseded()

    def _flush(self) -> Snapshot | None:
        return snapshot_to_flush(self.newest, self.held.durable)

    # inside

    def _snapshot(self) -> Snapshot:
        state = msgspec.Raw(msgspec.json.encode({"a": self.a, "b": self.b}))
        return Snapshot(state=state, loops=((Mark("batches", self.done),),), work_s=float(self.done))

    def _place(self) -> Place:
        return (Spot("batches", 0, self.done),)

    def _failure(self, cause: str) -> FailureRecord:
        return FailureRecord(cause, self.held.attempt, self.done, cause, place=self._place(), pinned=self.in_batch)

    def _begin(self, snapshot: Snapshot | None) -> None:
        self.resumed_at = self.done = self.a = self.b = check_whole(snapshot)
        self.newest = None
        self._pass_over()
        self.pinned = -1
        self.pinning = PINNED + 1 if self.held.policy.skip_poison and must_pin(self.held.predecessor, self.held.failures) else 0
        self.phase = "running" if self.done < self.world.batches else "ending"

    def _superseded(self) -> None:
        if not any(old.record.owner.writer != self.name and old.record.number > self.held.token for old in self.world.landed):
            raise Violation(f"{self.name} is told that it is superseded, and nobody is above it")
        self._end("is superseded")

    def _end(self, text: str) -> None:
        self.world.say(f"{self.name}: {text}")
        self.phase = "over"

    def _start(self, job: Generator[Any, Any, None]) -> None:
        self.job = job
        self._resume(None)

    def _resume(self, reply: object) -> None:
        assert self.job is not None
        self.world.clock += 1.0
        try:
            self.op = self.job.send(reply)
        except StopIteration:
            self._stop("")
            self.go_on()
        except AmbiguousReplyError:
            self._stop(f"{self.name}: is left without an answer")
        except CheckpointCorruptError as error:
            raise Violation(f"{self.name} finds a damaged log: {error}") from error

    def _stop(self, text: str) -> None:
        self.job = self.op = None
        if text:
            self.world.say(text)


def check_whole(snapshot: Snapshot | None) -> int:
    """Batches done of a snapshot, which must be of a boundary (G9)."""
    if snapshot is None:
        return 0
    state = msgspec.json.decode(bytes(snapshot.state))
    if not state["a"] == state["b"] == snapshot.batch:
        raise Violation(f"G9: half-updated state {state} at batch {snapshot.batch}")
    return snapshot.batch


# --- the world ------------------------------------------------------------------------------------------------------


class World:
    """The store, the incarnations, and what would be loaded if somebody looked.

    Args:
        rules: the module of the rules, or a broken variant of it.
        backend: a real store to be driven beside the model.
        batches: per life.
        every: batches between snapshots.
        wait: whether the user's code waits for each save.
        policy: what is counted otherwise.
        poison: a batch that always fails.
    """

    def __init__(
        self,
        rules: Any = true_rules,
        backend: Backend | None = None,
        *,
        batches: int = 4,
        keep: int = 2,
        max_failures: int = 2,
        every: int = 1,
        named: bool = False,
        wait: bool = False,
        policy: Policy = PLAIN,
        poison: int = -1,
    ) -> None:
        self.rules = rules
        self.backend = backend
        self.batches, self.keep, self.every, self.named, self.wait = batches, keep, every, named, wait
        self.poison = poison
        self.ledger = Ledger(max_failures, policy)
        self.records: dict[int, bytes] = {}
        self.events: list[tuple[str, int]] = []  # every create and delete that took place, in order
        self.landed: list[Landing] = []
        self.in_flight: list[tuple[Incarnation, int, bytes]] = []
        self.incarnations: list[Incarnation] = []
        self.clock = 0.0
        self.story: list[str] = []
        self._decoded: dict[bytes, Record] = {}
        self._head: Any = None
        self._truth = (0, 1, 0)
        self._tasks: dict[str, int] = {}  # task id -> its Ray attempts so far
        self._epoch = 1

    # what the scheduler may do

    def start(self, kind: str = "rerun", task: int = -1) -> Incarnation:
        """Begin another incarnation: Ray's next attempt of a task, another task, or one of another driver."""
        names = list(self._tasks)
        if kind == "rerun" and names:
            name = names[task % len(names)]
        else:
            self._epoch += kind == "driver"
            before = sum(name.endswith(f"e{self._epoch}") for name in names)
            name = f"t{before + 1}e{self._epoch}"  # a driver in a new cluster gives the ids of an older one again
            self._tasks[name] = 0
        attempt = self._tasks[name]
        self._tasks[name] += 1
        epoch = int(name.rpartition("e")[2])
        new = Incarnation(self, Owner(f"{name}.{attempt}", task_id=name.partition("e")[0], ray_attempt=attempt, epoch=epoch))
        self.incarnations.append(new)
        self.say(f"{new.name}: starts")
        return new

    def land(self, index: int = 0) -> None:
        """A create that got no reply arrives."""
        if self.in_flight:
            writer, number, data = self.in_flight.pop(index % len(self.in_flight))
            self._mutate(writer, f"late create {number}", lambda: self._create(number, data))

    def perform(self, who: Incarnation, op: Any, fault: str, cut: float) -> Any:
        """Carry out one op, with a fault or without."""
        kind = type(op).__name__
        if fault == "error" or (fault and kind in {"Get", "Delete"}):
            raise CheckpointStoreError("injected")
        if kind == "Create":
            return self._perform_create(who, op.number, op.data, fault)
        if kind == "Get":
            if self.backend is not None:
                assert self.backend.get(op.number) == self.records.get(op.number)
            return self.records.get(op.number)
        if kind == "Delete":
            self._mutate(who, f"delete {op.number}", lambda: self._delete(op.number))
            return None
        if fault and op.may_be_stale:
            return self._old_listing(fault, cut)
        if self.backend is not None:
            assert self.backend.numbers() == sorted(self.records)
        return sorted(self.records)

    def quiet(self) -> None:
        """The end of the story: a new driver comes, nothing goes wrong, and it must find all that was promised."""
        for index in range(len(self.in_flight)):
            self.land(index)
        last = self.start("driver")
        for _ in range(200):
            last.step()
            if last.phase in {"over", "running", "ending"}:
                return
        raise Violation(f"{last.name} does not get anywhere, it is {last.phase}")

    # what incarnations tell

    def say(self, text: str) -> None:
        """Add a line to the story."""
        self.story.append(text)

    def began(self, who: Incarnation) -> None:
        """An attempt was granted."""
        number, held = who.held.token, who.held
        self.say(f"{who.name}: granted {number}, life {held.life} attempt {held.attempt} charged {held.charged} at batch {who.resumed_at}")
        self.ledger.grant(Grant(number, self._landing_of(number, who).moment, held.life, who.resumed_at, held.owner))

    def promised(self, who: Incarnation, number: int) -> None:
        """A record was reported durable."""
        batch = who.held.durable.batch if who.held.durable is not None else 0
        self.say(f"{who.name}: record {number} at batch {batch} is durable")
        landing = self._landing_of(number, who)
        claim = self._landing_of(_claim_of(landing.record, self.landed), who)
        self.ledger.promise(Promise(number, landing.moment, claim.moment, landing.record.life, batch))

    # inside

    def _perform_create(self, who: Incarnation, number: int, data: bytes, fault: str) -> Any:
        if fault in {"late", "dropped"}:
            if fault == "late":
                self.in_flight.append((who, number, data))
            self.say(f"{who.name}: create {number} {fault}")
            return self.rules.Reply.AMBIGUOUS
        created = self._mutate(who, f"create {number} {fault}", lambda: self._create(number, data))
        if fault == "lost":
            return self.rules.Reply.AMBIGUOUS
        return self.rules.Reply.CREATED if created and fault != "retried" else self.rules.Reply.EXISTS

    def _old_listing(self, fault: str, cut: float) -> list[int]:
        """A listing that shows creates only up to some moment, and deletions up to that moment, none, or all up to now."""
        then = int(cut * (len(self.events) + 1))
        numbers: set[int] = set()
        for moment, (kind, number) in enumerate(self.events):
            if kind == "create" and moment < then:
                numbers.add(number)
            elif kind == "delete" and (moment < then or fault == "old with all deletions") and fault != "old without deletions":
                numbers.discard(number)
        return sorted(numbers)

    def _create(self, number: int, data: bytes) -> bool:
        created = number not in self.records
        if self.backend is not None:
            assert self.backend.create(number, data) == created
        if created:
            self._landing(number, data)
        return created

    def _landing(self, number: int, data: bytes) -> None:
        record = self._decode(number, data)
        newest = max((old.record.number for old in self.landed), default=0)
        now = len(self.events)
        self.records[number] = data
        self.events.append(("create", number))
        self.landed.append(Landing(now, record))
        self.check_whole(record)
        if number <= newest:  # in a gap: nobody goes by it
            return
        if newest:
            self.ledger.follows(record, self._head, now)
        self._head = record
        self.ledger.heads.append((now, _task(record.owner)))
        if record.life in self.ledger.completed:
            raise Violation(f"G4: record {number} comes after the outcome of life {record.life}")
        if record.ended is not None and not record.ended.charged:
            self.ledger.excused.append((record.life, now, record.token))
        if record.outcome is not None and record.outcome.status == "failed":
            self.ledger.failed_ends.append((record.life, now))
        if record.outcome is not None and record.outcome.status == "completed":
            self.ledger.outcome(record.life, bytes(record.outcome.value))

    def check_whole(self, record: Record) -> None:
        """What is saved is of a boundary."""
        check_whole(record.snapshot)

    def _delete(self, number: int) -> None:
        if self.backend is not None:
            self.backend.delete(number)
        if self.records.pop(number, None) is not None:
            self.events.append(("delete", number))

    def _mutate(self, who: Incarnation, text: str, change: Callable[[], Any]) -> Any:
        """Change the store, and look what that does to what would be loaded now."""
        self.say(f"{who.name}: {text}")
        before = self._truth
        result = change()
        self._truth = after = self._would_load()
        if before[1] == after[1] and after[2] < before[2]:
            raise Violation(f"G2: what would be loaded goes back from batch {before[2]} to {after[2]}")
        newest = max((grant.number for grant in self.ledger.grants), default=0)
        if who.held is not None and who.held.token < newest and before != after:
            raise Violation(f"G3: {who.name} (token {who.held.token}) changes what is loaded, after claim {newest}")
        self._check_spare(after[1])
        return result

    def _would_load(self) -> tuple[int, int, int]:
        """Number, life and batch of what a perfect reader would load now."""
        if not self.records:
            return 0, 1, 0
        number = max(self.records)
        head = self._decode(number, self.records[number])
        holder: Record | None = head
        if head.snapshot is None and head.points_to:
            data = self.records.get(head.points_to)
            if data is None:
                raise Violation(f"G1: record {number} points to {head.points_to}, which is gone")
            holder = self._decode(head.points_to, data)
        batch = holder.snapshot.batch if holder is not None and holder.snapshot is not None else 0
        return number, head.life, batch

    def _check_spare(self, life: int) -> None:
        """One damaged record must not cost everything: as soon as a life has two records with a state, it keeps two."""
        ever = {old.record.number for old in self.landed if old.record.life == life and old.record.snapshot is not None}
        if len(ever) > 1:
            there = [number for number in ever if number in self.records]
            if len(there) < 2:
                raise Violation(f"of the records {sorted(ever)} of life {life}, retention left {there}")

    def _landing_of(self, number: int, who: Incarnation) -> Landing:
        """How record `number` of an incarnation came last into the store."""
        for landing in reversed(self.landed):
            if landing.record.number == number and landing.record.owner.writer == who.name:
                return landing
        raise Violation(f"G1: {who.name} is told that record {number} is durable, and it was never created")

    def _decode(self, number: int, data: bytes) -> Record:
        record = self._decoded.get(data)
        if record is None:
            record = decode_record(data, number)
            assert record is not None
            self._decoded[data] = record
        return record


def _claim_of(record: Record, landed: Iterable[Landing]) -> int:
    """Number of the claim under which a record was written; for the claim of a retry, of the one that it follows."""
    if record.kind != "claim":
        return record.token
    claims = (old.record.number for old in landed if old.record.kind == "claim" and old.record.owner.writer == record.owner.writer)
    return max((number for number in claims if number < record.number), default=record.number)


# --- schedules ------------------------------------------------------------------------------------------------------

BURSTS = (1, 2, 3, 5, 10, 30, 30)


def random_world(seed: int, rules: Any = true_rules, backend: Backend | None = None, world: type[World] = World) -> World:
    """A world that has lived through the schedule of this seed.

    Incarnations run in bursts, because what breaks a protocol is one that sleeps through the lives of others.

    Raises:
        Violation: with the seed and the story.
    """
    rng = random.Random(seed)
    options: dict[str, Any] = {
        "batches": rng.choice((3, 6, 9, 12)),
        "keep": rng.choice((2, 2, 3)),
        "max_failures": rng.choice((0, 1, 2, 3, -1)),
        "every": rng.choice((1, 1, 2)),
        "named": rng.random() < 0.3,
        "wait": rng.random() < 0.5,
        "policy": rng.choice(POLICIES),
        "poison": rng.choice((-1, -1, 0, 1, 2)),
    }
    lived = world(rules, backend, **options)
    try:
        _live(lived, rng)
        lived.quiet()
    except Violation as violation:
        story = "\n  ".join(lived.story)
        raise Violation(f"{violation}\nseed {seed}: {options}\n  {story}") from violation
    return lived


@dataclass(frozen=True)
class Weather:
    """How likely what is, in one schedule: extremes find more than averages."""

    creates: tuple[str, ...]  # faults of creates
    faults: float
    old_listings: float
    failures: float
    deaths: float
    arrivals: float
    landings: float

    @classmethod
    def of(cls, rng: random.Random) -> Weather:
        """Draw one."""
        return cls(
            creates=tuple(rng.sample(CREATE_FAULTS, rng.choice((1, 2, len(CREATE_FAULTS))))),
            faults=rng.choice((0.0, 0.05, 0.15, 0.4)),
            old_listings=rng.choice((0.0, 0.3, 0.8)),
            failures=rng.choice((0.0, 0.02, 0.1)),
            deaths=rng.choice((0.0, 0.0, 0.05, 0.15)),
            arrivals=rng.choice((0.15, 0.3)),
            landings=rng.choice((0.1, 0.5)),
        )

    def fault(self, op: Any, rng: random.Random) -> str:
        """What goes wrong with an op."""
        kind = type(op).__name__
        if kind == "List" and op.may_be_stale and rng.random() < self.old_listings:
            return rng.choice(OLD_LISTINGS)
        if rng.random() >= self.faults:
            return ""
        return rng.choice(self.creates) if kind == "Create" else "error" if rng.random() < 0.3 else ""


def _live(world: World, rng: random.Random) -> None:
    weather = Weather.of(rng)
    world.start()
    for _ in range(rng.choice((12, 25, 50))):
        alive = [one for one in world.incarnations if one.phase != "over"]
        if not alive or (len(world.incarnations) < MAX_INCARNATIONS and rng.random() < weather.arrivals):
            if len(world.incarnations) >= MAX_INCARNATIONS:
                return
            alive = [world.start(rng.choice(("rerun", "rerun", "rerun", "rerun", "task", "driver")), rng.randrange(4))]
        one = rng.choice(alive)
        for _ in range(rng.choice(BURSTS)):
            if _one_step(one, rng, weather) and rng.random() < 0.5:
                break  # a fault is the best moment to freeze
        if world.in_flight and rng.random() < weather.landings:
            world.land(rng.randrange(8))
        if rng.random() < weather.deaths:
            rng.choice(alive).die()


def _one_step(one: Incarnation, rng: random.Random, weather: Weather) -> str:
    """Let it do one thing; returns the fault that it met."""
    fault = ""
    if one.job is None and one.phase == "claiming" and rng.random() < 0.5:
        one.give_back()
    elif one.job is None and one.phase in {"claiming", "blocked"}:
        one.claim_again(gone=one.gone if rng.random() < 0.7 else 0)
    elif one.job is None and one.phase == "ending" and rng.random() < weather.failures:
        one.fail()
    elif one.can_work and (one.job is None or rng.random() < 0.3):
        if rng.random() < weather.failures:
            one.fail() if rng.random() < 0.7 else one.leave(rng.choice(CAUSES))
        elif rng.random() < weather.failures:
            one.check()
        else:
            one.work()
    elif one.job is None:
        one.go_on()
    else:
        fault = weather.fault(one.op, rng)
        one.step(fault, rng.random())
    return fault


# --- broken variants ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Variant:
    """The rules with one line switched: what a tempting simplification would be."""

    module: str
    line: str
    instead: str


VARIANTS = {
    "claims deleted by retention": Variant(
        "faultguard._core.log",
        'return [number for number in holders if number < oldest_kept and known[number] != "inline"]',
        "return [number for number in sorted(known) if number < oldest_kept]",
    ),
    "own lost claim removed": Variant(
        "faultguard._core.log",
        "if created and max(numbers, default=0) == number:",
        "if created and (max(numbers, default=0) == number or (yield Delete(number))):",
    ),
    "no second listing": Variant(
        "faultguard._core.log",
        "if created and max(numbers, default=0) == number:",
        "if created:",
    ),
    "blind re-create": Variant(
        "faultguard._core.log",
        "if any(other > number for other in numbers):",
        "if False:",
    ),
    "keep by number": Variant(
        "faultguard._core.log",
        "oldest_kept = valid[-max(keep, MIN_KEEP)]",
        "oldest_kept = valid[-1] - max(keep, MIN_KEEP) + 1",
    ),
    "budget reset by a crash": Variant(
        "faultguard._core.budget",
        'if head.kind == "end" and head.outcome is not None and head.outcome.status == "failed":',
        "if head.ended is None:",
    ),
    "budget reset without progress": Variant(
        "faultguard._core.budget",
        "progressed = policy.reset_on_progress and all(is_later(failure.place, before.place) for before in budget.failures)",
        "progressed = policy.reset_on_progress",
    ),
    "quarantine forgotten by a claim": Variant(
        "faultguard._core.budget",
        "return Budget(head.charged, head.failures, head.quarantined)",
        "return Budget(head.charged, head.failures)",
    ),
    "every crash blamed on the batch of its last record": Variant(
        "faultguard._core.log",
        "pinned=bool(head.begins),",
        "pinned=True,",
    ),
    "two failures are enough": Variant(
        "faultguard._core.budget",
        "return pinned + others if pinned >= POISON_FAILURES else 0",
        "return pinned + others if pinned > 1 else 0",
    ),
    "pin not taken back": Variant(
        "tests.model",
        "self._start(self._save(self.newest, self._place() if self.pinning > 1 else ()))",
        "self._start(self._save(self.newest, self._place())) if self.pinning > 1 else self.__dict__.update(pinning=0)",
    ),
    "flush of a half-updated state": Variant(
        "tests.model",
        "return snapshot_to_flush(self.newest, self.held.durable)",
        "return self._snapshot()",
    ),
    "order of claims by arrival": Variant(
        "faultguard._core.log",
        'return "wait" if mine == theirs else "refuse"',
        'return "wait" if mine == theirs else "claim"',
    ),
    "unanswered create forgotten": Variant(
        "faultguard._core.log",
        "held.unanswered = record  # until there is an answer: this procedure may be dropped at any op",
        "held.unanswered = None",
    ),
    "any record taken for one's own": Variant(
        "faultguard._core.log",
        "return bool(found == data)",
        "return True",
    ),
    "outcome after an outcome": Variant(
        "faultguard._core.log",
        'if held.known.get(held.last) == "end":',
        "if False:",
    ),
    "retry after an outcome": Variant(
        "faultguard._core.log",
        'if (settled is not None and settled.kind == "claim") or held.known.get(held.last) == "end":',
        'if settled is not None and settled.kind == "claim":',
    ),
    "second create believed at once": Variant(
        "faultguard._core.log",
        "if create and (yield Create(number, data, durable)) is Reply.CREATED and not again:",
        "if create and (yield Create(number, data, durable)) is Reply.CREATED:",
    ),
    "own late record taken for a successor": Variant(
        "faultguard._core.log",
        "if held.unanswered is None or above != [held.unanswered.number]:",
        "if True:",
    ),
    "own late claim waited for": Variant(
        "faultguard._core.log",
        "if owner.writer == me.owner.writer:",
        "if False:",
    ),
    "older driver admitted": Variant(
        "faultguard._core.log",
        'return "claim" if me.owner.epoch > owner.epoch else "refuse"',
        'return "claim"',
    ),
    "older driver admitted after an end": Variant(
        "faultguard._core.log",
        'return "claim" if me.owner.epoch >= head.owner.epoch else "refuse"',
        'return "claim"',
    ),
    "old listing taken for damage": Variant(
        "faultguard._core.log",
        "if not damaged:",
        "if False:",
    ),
}

RARE = {"second create believed at once", "old listing taken for damage"}  # schedules seldom get there: test_log_rules plays them


def broken(variant: Variant) -> tuple[Any, type[World]]:
    """The rules and the world with the line of a variant switched; everything else is as it is."""
    if variant.module == "faultguard._core.log":
        return _switched(variant), World
    if variant.module == "faultguard._core.budget":
        other = _switched(variant)
        log = execute(true_rules.__name__, source_of(true_rules.__name__), {"faultguard._core.budget": other})
        return log, World
    return true_rules, _switched(variant).World


def _switched(variant: Variant) -> ModuleType:
    return execute(variant.module, switched_source(variant), {})


def switched_source(variant: Variant) -> str:
    """The source of a module with that line switched."""
    lines = source_of(variant.module).splitlines()
    found = [index for index, line in enumerate(lines) if line.strip() == variant.line]
    assert len(found) == 1, f"{variant.line!r} occurs {len(found)} times in {variant.module}"
    indent = lines[found[0]][: -len(variant.line)]
    lines[found[0]] = indent + variant.instead
    return "\n".join(lines)


def source_of(module: str) -> str:
    """The source of a module."""
    path = import_module(module).__file__
    assert path is not None
    return Path(path).read_text("utf-8")


def execute(name: str, source: str, instead: dict[str, ModuleType]) -> ModuleType:
    """Run a source as a module of the same name and package, which sees `instead` of some others. Nothing of it stays."""
    module = ModuleType(name)
    module.__package__ = name.rpartition(".")[0]
    names = {name: module, **instead}
    before = {key: sys.modules[key] for key in names}
    sys.modules.update(names)
    try:
        exec(compile(source, f"<{name} with a line switched>", "exec"), module.__dict__)  # noqa: S102 - our own source
    finally:
        sys.modules.update(before)
    return module


def find(seeds: Iterable[int], rules: Any = true_rules, world: type[World] = World) -> tuple[int, str] | None:
    """The first of these seeds whose schedule breaks a guarantee, and its story."""
    for seed in seeds:
        try:
            random_world(seed, rules, world=world)
        except AssertionError as violation:  # a variant of this module has a Violation of its own
            return seed, str(violation)
    return None


if __name__ == "__main__":
    chosen = broken(VARIANTS[sys.argv[2]]) if len(sys.argv) > 2 else (true_rules, World)
    print("\n  ".join(random_world(int(sys.argv[1]), chosen[0], world=chosen[1]).story))
