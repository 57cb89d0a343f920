"""The rules of a worker's log: who may claim it, what is saved, loaded and deleted, and what an unclear reply means.

Every procedure is a generator: it yields what it wants from the store (`List`, `Get`, `Create`, `Delete`), is sent the
reply, and returns the result. So one text of the rules is driven by the real store, by a model with lost replies and
frozen processes, and by anything else. Nothing here knows time, threads or files.

Why it is enough: an acknowledged save lies below every later claim, so later attempts load it; creation orders everything;
deleting needs no check, because the deleter's own durable save made what it deletes superfluous.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal

from faultguard._core.budget import PLAIN, Budget, Policy, charge, cost_of_crash, exhausted, next_budget
from faultguard._core.records import Ended, FailureRecord, Outcome, Owner, Place, Record, Snapshot, decode_record, encode_record
from faultguard.errors import AmbiguousReplyError, CheckpointCorruptError, CheckpointStoreError

if TYPE_CHECKING:
    from collections.abc import Generator, Iterable

__all__ = [
    "Blocked",
    "Claimant",
    "Create",
    "Delete",
    "Finished",
    "Get",
    "Granted",
    "Held",
    "List",
    "Op",
    "Refused",
    "Reply",
    "claim",
    "condense",
    "create",
    "discard",
    "give_back",
    "is_beside",
    "is_of_retry",
    "load",
    "may_claim",
    "newest_of_task",
    "retain",
    "retention",
    "retry_record",
    "same_task",
    "save",
    "superfluous",
    "superseded",
]

MAX_CLAIM_TRIES = 64
MAX_CREATE_TRIES = 5
MAX_RELISTINGS = 5  # that show nothing new
MAX_LOAD_TRIES = 64
MAX_READ_AT_ONCE = 32
FIRST = 1  # the number of the first record of a log: always a claim, or the end of one that was never recorded
MIN_KEEP = 2  # one damaged record must not cost everything


# --- what a procedure asks of the store -----------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class List:
    """All record numbers. Only the first listing of a claim may be stale; every other must show all completed creates."""

    may_be_stale: bool = False


@dataclass(frozen=True, slots=True)
class Get:
    """The bytes of a record; None when it is absent."""

    number: int


@dataclass(frozen=True, slots=True)
class Create:
    """Create a record unless there is one of that number; answered by a `Reply`.

    Not `durable`: all who ask see it, and it need not survive a power failure, which ends all who have seen it.
    """

    number: int
    data: bytes
    durable: bool = True


@dataclass(frozen=True, slots=True)
class Delete:
    """Delete a record, which may be absent."""

    number: int


Op = List | Get | Create | Delete


class Reply(enum.Enum):
    """What a store says to a create."""

    CREATED = "created"
    EXISTS = "exists"
    AMBIGUOUS = "ambiguous"


# --- who asks, and what comes of it ---------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Claimant:
    """An attempt that wants the worker. `gone` is the token of a holder that is known to be dead."""

    owner: Owner
    task: str
    worker_id: str
    max_failures: int
    named_run: bool = False
    always: bool = False  # the manager's public methods: whoever registers, supersedes
    afresh: bool = False  # start over, whatever another task has done under this id
    gone: int = 0
    crashed: tuple[str, str, str] = ("", "", "")  # a writer, what its process died of as far as anybody knows, and where it stood
    asks: bool = False  # it finds out what a holder has died of that left no word, and says so in `crashed`
    policy: Policy = PLAIN
    late: bool = False  # it works already, and nobody knows: only an empty log is its own
    unrecorded: bool = False  # attempts before this one may have died before they claimed
    sent: bool = False  # by one that waits on another node, or does no longer: it follows what its own task has left, and nothing else
    volatile: bool = False  # the claim of an empty log need not be durable: see `claim`
    beside: int = -1  # the local retry that its own task has sent to another node, and that may begin there at any moment


@dataclass(slots=True)
class Held:
    """A worker's log as its holder knows it. `known` says what each existing record is; `last` is the highest.

    `unanswered` is the record after `last` if the store was asked to create it and gave no answer: it may come at any time.
    """

    owner: Owner
    task: str
    worker_id: str
    token: int
    life: int
    attempt: int
    charged: int
    failures: tuple[FailureRecord, ...]
    last: int
    durable: Snapshot | None
    saved_s: float = 0.0
    known: dict[int, str] = field(default_factory=dict)
    unanswered: Record | None = None
    quarantined: tuple[Place, ...] = ()
    begins: Place = ()  # what `last` says
    predecessor: str = ""  # how the attempt before this one ended
    policy: Policy = PLAIN
    volatile: bool = False  # the claim is all that is there, and need not survive a power failure: nobody may be told its token

    @property
    def budget(self) -> Budget:
        """What was spent so far."""
        return Budget(self.charged, self.failures, self.quarantined)


@dataclass(frozen=True, slots=True)
class Granted:
    """The worker is this attempt's. `head` is the record that it follows, `damaged` what had to be set aside."""

    held: Held
    snapshot: Snapshot | None
    head: Record | None
    damaged: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Finished:
    """There is nothing to run: the worker has its outcome. `now` is True when this claim recorded it (budget spent)."""

    record: Record
    now: bool = False


@dataclass(frozen=True, slots=True)
class Blocked:
    """Another task of this driver holds the worker; it must be known dead first. `dead`: it is, and `crashed` is to say of what.

    Or the attempt on another node does: see `is_beside`.
    """

    head: Record
    dead: bool = False


@dataclass(frozen=True, slots=True)
class Refused:
    """A later attempt of the same work has claimed the worker already."""

    head: Record


@dataclass(frozen=True, slots=True)
class Loaded:
    """What a listing means: the newest intact record and the one that holds the state to go on from."""

    head: Record | None
    snapshot: Snapshot | None
    holder: int  # number of the record that holds `snapshot`; 0: fresh
    damaged: tuple[int, ...]
    numbers: tuple[int, ...]  # the listing that was read; a relisting replaces the caller's


Verdict = Literal["claim", "wait", "refuse", "outcome"]


def may_claim(head: Record | None, me: Claimant) -> Verdict:  # noqa: PLR0911 - a table of cases, one line each
    """Who may claim a worker whose newest record is `head`.

    Two attempts of one Ray task are ordered by Ray's attempt number, never by arrival: an old one may thaw late.
    """
    if head is None or me.always:
        return "claim"
    owner = head.owner
    if is_beside(head, me):
        return "wait"
    if me.sent and owner.writer != me.owner.writer and (head.kind == "end" or not same_task(owner, me.owner)):
        return "refuse"
    if me.late:
        return "claim" if owner.writer == me.owner.writer else "refuse"
    if head.kind == "end":
        return _after_end(head, me)
    if owner.writer == me.owner.writer:
        return "claim"  # an earlier try of this very claim, cut short by an error of the store
    if owner.epoch != me.owner.epoch:
        return "claim" if me.owner.epoch > owner.epoch else "refuse"
    if same_task(owner, me.owner):
        mine, theirs = _order(me.owner), _order(owner)
        if mine > theirs or (mine == theirs and (head.ended is not None or head.token == me.gone)):
            return "claim"
        return "wait" if mine == theirs else "refuse"
    return "claim" if head.ended is not None or head.token == me.gone else "wait"


def same_task(one: Owner, other: Owner) -> bool:
    """Whether both are attempts of one Ray task. A new cluster gives the ids of an old one again: they are told apart by the driver."""
    return (one.task_id, one.epoch) == (other.task_id, other.epoch)


def is_of_retry(head: Record, owner: Owner, local_retry: int) -> bool:
    """Whether that retry of an attempt of Ray's wrote it, or one after it."""
    theirs = head.owner
    return same_task(theirs, owner) and theirs.ray_attempt == owner.ray_attempt and theirs.local_retry >= local_retry


def is_beside(head: Record, me: Claimant) -> bool:
    """Whether the attempt that was sent to another node has begun: then it is to be waited for."""
    return me.beside >= 0 and head.owner.writer != me.owner.writer and is_of_retry(head, me.owner, me.beside)


def _order(owner: Owner) -> tuple[int, int]:
    return owner.ray_attempt, owner.local_retry


def _after_end(head: Record, me: Claimant) -> Verdict:
    """A task that runs again gets its outcome; new work begins a new life, or after a failure goes on, but not for an older driver."""
    completed = head.outcome is None or head.outcome.status == "completed"
    if same_task(head.owner, me.owner) or (completed and me.named_run and not me.afresh):
        return "outcome"
    return "claim" if me.owner.epoch >= head.owner.epoch else "refuse"


# --- loading --------------------------------------------------------------------------------------------------------


def load(numbers: Iterable[int]) -> Generator[Op, Any, Loaded]:
    """Read what a listing means: the highest number decides.

    A save or an end is its own state; a claim names it. What is damaged is set aside for the next lower holder of the same
    life. What is absent may just have been deleted by a live holder, so it is listed again; while the log grows, somebody
    lives and nothing is lost.

    Raises:
        CheckpointCorruptError: the log says that there is a state, and no intact one is left. Never a fresh start.
        CheckpointStoreError: the log grows faster than it can be read.
    """
    fruitless = 0
    for _ in range(MAX_LOAD_TRIES):
        loaded = yield from _load_once(sorted(numbers, reverse=True))
        if loaded is not None:
            return loaded
        highest, numbers = max(numbers, default=0), (yield List())
        fruitless = fruitless + 1 if max(numbers, default=0) == highest else 0
        if fruitless == MAX_RELISTINGS:
            msg = "the record that holds the state is gone, and no newer one appears; restore the checkpoint directory, or start over"
            raise CheckpointCorruptError(msg)
    msg = f"the log could not be read in {MAX_LOAD_TRIES} tries: each time, what was listed had been replaced by newer records"
    raise CheckpointStoreError(msg)


def _load_once(numbers: list[int]) -> Generator[Op, Any, Loaded | None]:  # noqa: C901, PLR0911 - one walk, top down, is easier to follow
    """One reading, from the highest number down; None when something that must be there is absent."""
    if not numbers:
        return Loaded(None, None, 0, (), ())
    damaged: list[int] = []
    head: Record | None = None
    wanted = numbers[0]
    for number in numbers:
        if number > wanted:
            continue
        record = yield from _read(number)
        if record == "absent":
            return None
        if record == "unwritten" and number == numbers[0]:
            return Loaded(None, None, 0, (), (number,))
        if not isinstance(record, Record):
            damaged.append(number)
        elif head is None:
            head = record
            if _is_fresh(head):
                if damaged not in ([], [number + 1]):  # more than the first save: all that retention has kept
                    break
                return Loaded(head, None, 0, tuple(damaged), tuple(numbers))
            wanted = head.points_to or number
            if wanted not in numbers:
                return None
        if head is not None and isinstance(record, Record) and record.snapshot is not None and record.life == head.life:
            return Loaded(head, record.snapshot, number, tuple(damaged), tuple(numbers))
    if not damaged:
        return None  # an old listing, one of whose numbers has come to hold a claim that was lost
    msg = f"records {', '.join(map(str, damaged))} are damaged and no intact one is left below them"
    raise CheckpointCorruptError(msg, damaged=tuple(damaged))


def _read(number: int) -> Generator[Op, Any, Record | Literal["absent", "damaged", "unwritten"]]:
    """One record, verified. Unwritten is what a power failure leaves of a volatile claim: its name, and no content."""
    data = yield Get(number)
    if data is None:
        return "absent"
    if number == FIRST and not data.strip(b"\0"):
        return "unwritten"
    return decode_record(data, number) or "damaged"


def newest_of_task(owner: Owner) -> Generator[Op, Any, Record | None]:
    """The newest intact record of an attempt of that task, whoever has claimed the worker since."""
    for number in sorted((yield List()), reverse=True):
        record = yield from _read(number)
        if isinstance(record, Record) and same_task(record.owner, owner):
            return record
    return None


def _is_fresh(head: Record) -> bool:
    """Whether the record says explicitly that there is no state yet."""
    return head.snapshot is None and head.points_to == 0


# --- claiming -------------------------------------------------------------------------------------------------------


def claim(me: Claimant, now: float) -> Generator[Op, Any, Granted | Finished | Blocked | Refused]:
    """Try to begin an attempt.

    A claim is granted when its number is still the highest in a second listing. One that lost is left where it is: to
    remove it could open the number for somebody who saw the log before it.

    That of an empty log may be volatile: it keeps others out at once. Should the power fail before anything else is recorded, it is
    as if nobody had begun, and its token is given again; so it is recorded once more before anybody is told the token (`save`).
    """
    numbers = yield List(may_be_stale=True)
    for _ in range(MAX_CLAIM_TRIES):
        loaded = yield from load(numbers)
        head = loaded.head
        verdict = may_claim(head, me)
        if head is not None and verdict == "outcome":
            return Finished(head)
        if head is not None and verdict == "wait":
            return Blocked(head)
        if head is not None and verdict == "refuse":
            return Refused(head)
        if head is not None and _is_unexplained(head, me):
            return Blocked(head, dead=True)
        if head is None and me.sent:
            msg = f"the log of worker {me.worker_id!r} is gone, with all that this attempt was to follow; it begins nothing"
            raise CheckpointCorruptError(msg)
        number = max(loaded.numbers, default=0) + 1
        record = claim_record(me, loaded, number, now)
        volatile = me.volatile and number == FIRST
        created = yield from create(number, encode_record(record), durable=not volatile)
        numbers = yield List()
        if created and max(numbers, default=0) == number:
            if record.kind == "end":
                return Finished(record, now=True)
            held = _held(record, numbers, loaded, me.policy)
            held.volatile = volatile
            return Granted(held, loaded.snapshot if record.points_to else None, head, loaded.damaged)
    msg = f"worker {me.worker_id!r} could not be claimed in {MAX_CLAIM_TRIES} tries: others go on claiming it at the same time"
    raise CheckpointStoreError(msg)


def _is_unexplained(head: Record, me: Claimant) -> bool:
    """Whether the one who claims can find out, and has not yet, how the attempt of `head` has ended."""
    owner = head.owner
    silent = head.kind != "end" and head.ended is None
    return me.asks and silent and bool(owner.ray_worker) and owner.writer not in {me.owner.writer, me.crashed[0]}


def claim_record(me: Claimant, loaded: Loaded, number: int, now: float) -> Record:
    """The record that begins an attempt after what was loaded, or ends the worker when its budget is spent."""
    head = loaded.head
    base = Record(
        kind="claim",
        number=number,
        task=me.task,
        worker_id=me.worker_id,
        owner=me.owner,
        saved_at=now,
        life=1,
        attempt=1,
        token=number,
    )
    if head is None:
        return _after_unrecorded(base, me) if me.unrecorded else base
    if head.kind == "end" and (head.outcome is None or head.outcome.status == "completed"):
        return replace_record(base, life=head.life + 1, predecessor="completed")
    if me.afresh and not same_task(head.owner, me.owner):  # Ray's next attempt of the same task resumes
        return replace_record(base, life=head.life + 1, predecessor="started over")
    budget = next_budget(head)
    own = head.owner.writer == me.owner.writer  # nothing has run under it
    cancelled = me.crashed[:2] == (head.owner.writer, "cancelled")  # by force: it was given no time for a note
    crashed = 0 if own or cancelled else cost_of_crash(head)
    if crashed:
        policy = replace(me.policy, skip_poison=me.policy.skip_poison or bool(head.begins))  # which a block may have asked for
        budget = charge(budget, _crash(head, loaded.snapshot, now, me.crashed), policy)
    resumed_s = loaded.snapshot.work_s if loaded.snapshot is not None else 0.0
    record = replace_record(
        base,
        life=head.life,
        attempt=1 if head.kind == "end" else head.attempt + (not own),
        charged=budget.charged,
        failures=budget.failures,
        quarantined=budget.quarantined,
        predecessor="crash" if crashed else "cancelled" if cancelled else _end_of(head, own=own),
        points_to=loaded.holder,
        saved_s=head.saved_s + resumed_s,
    )
    if not exhausted(budget.charged, me.max_failures):
        return record
    return replace_record(
        record,
        kind="end",
        attempt=head.attempt,
        points_to=0,
        snapshot=loaded.snapshot,
        saved_s=head.saved_s,
        outcome=Outcome(status="failed"),
    )


def _after_unrecorded(base: Record, me: Claimant) -> Record:
    """The claim of an attempt that finds nothing of those before it: one failure, however many they were."""
    failure = FailureRecord("crash", attempt=1, batch=0, time=base.saved_at)
    budget = charge(Budget(), failure, me.policy)
    record = replace_record(base, attempt=2, charged=budget.charged, failures=budget.failures, predecessor="crash")
    if not exhausted(budget.charged, me.max_failures):
        return record
    return replace_record(record, kind="end", attempt=1, outcome=Outcome(status="failed"))


def _end_of(head: Record, *, own: bool) -> str:
    """How the attempt of `head` ended, by its own word; an earlier try of this claim has not begun anything."""
    if head.ended is not None:
        return head.ended.cause
    return head.predecessor if own else "failed"


def _crash(head: Record, snapshot: Snapshot | None, now: float, crashed: tuple[str, str, str]) -> FailureRecord:
    """The failure of an attempt that left no word: known by its last record."""
    owner = head.owner
    _, cause, stacks = crashed if crashed[0] == owner.writer else ("", "crash", "")
    return FailureRecord(
        cause=cause,
        attempt=head.attempt,
        batch=snapshot.batch if snapshot else 0,
        node_id=owner.node_id,
        pid=owner.pid,
        time=now,
        position=snapshot.position if snapshot else (),
        stacks=stacks,
        place=head.begins or (snapshot.place if snapshot else ()),
        pinned=bool(head.begins),
    )


def replace_record(record: Record, **changes: Any) -> Record:
    """A copy with some fields changed."""
    fields = {name: getattr(record, name) for name in record.__struct_fields__}
    return Record(**{**fields, **changes})


def _held(record: Record, numbers: Iterable[int], loaded: Loaded, policy: Policy) -> Held:
    """The log as the one knows it who has just claimed it: of older records only the numbers."""
    known = dict.fromkeys(numbers, "unknown")
    known[record.number] = _kind(record)
    if record.points_to:
        known[record.points_to] = "unknown"
    return Held(
        owner=record.owner,
        task=record.task,
        worker_id=record.worker_id,
        token=record.token,
        life=record.life,
        attempt=record.attempt,
        charged=record.charged,
        failures=record.failures,
        last=record.number,
        durable=loaded.snapshot if record.points_to else None,
        saved_s=record.saved_s,
        known=known,
        quarantined=record.quarantined,
        predecessor=record.predecessor,
        policy=policy,
    )


# --- saving ---------------------------------------------------------------------------------------------------------


def save(
    held: Held,
    snapshot: Snapshot | None,
    now: float,
    *,
    ended: Ended | None = None,
    failure: FailureRecord | None = None,
    outcome: Outcome | None = None,
    begins: Place = (),
) -> Generator[Op, Any, bool]:
    """Append a save, or with an `outcome` the end. Returns False when a later attempt owns the worker: superseded.

    `snapshot` None repeats the one that is durable. `ended` and `failure` are the note of an attempt that leaves. `begins` is the
    batch that is to begin as soon as this is durable.
    After an error of the store it may be called again, with the same or something newer.
    """
    settled = held.unanswered
    if not (yield from _settle(held)):
        return False
    if held.known.get(held.last) == "end":
        return True  # it has arrived after all, and nothing comes after an outcome
    budget = held.budget
    if failure is not None:
        budget = charge(budget, failure, held.policy if outcome is None else PLAIN)  # of what ends for good, nothing is quarantined
    snapshot = snapshot if snapshot is not None else held.durable
    if settled is not None and (settled.snapshot, settled.ended, settled.outcome, settled.begins) == (snapshot, ended, outcome, begins):
        return True
    number = held.last + 1
    record = Record(
        kind="end" if outcome is not None else "save",
        number=number,
        task=held.task,
        worker_id=held.worker_id,
        owner=held.owner,
        saved_at=now,
        life=held.life,
        attempt=held.attempt,
        token=held.token,
        charged=budget.charged,
        failures=budget.failures,
        quarantined=budget.quarantined,
        snapshot=snapshot,
        ended=ended,
        outcome=outcome,
        saved_s=held.saved_s,
        begins=begins,
    )
    return (yield from _append(held, record))


def give_back(head: Record, now: float, ended: Ended) -> Generator[Op, Any, bool]:
    """Note after a claim of one's own that nothing was begun with it. Returns False when somebody has claimed since."""
    loaded = yield from load([*(yield List())])
    if loaded.head is None or loaded.head.number != head.number:
        return False
    held = _held(head, loaded.numbers, loaded, PLAIN)
    held.durable = loaded.snapshot
    return (yield from save(held, None, now, ended=ended))


def retry_record(
    held: Held,
    snapshot: Snapshot | None,
    failure: FailureRecord,
    now: float,
) -> Generator[Op, Any, bool]:
    """Failure, newest snapshot and the claim of the next attempt in one record, before the back-off begins.

    Dying during the wait is then charged to the new attempt. Returns False when superseded.
    """
    settled = held.unanswered
    if not (yield from _settle(held)):
        return False
    if (settled is not None and settled.kind == "claim") or held.known.get(held.last) == "end":
        return True  # it was this very retry; or an end has arrived after all, and nothing comes after that
    snapshot = snapshot if snapshot is not None else held.durable
    number = held.last + 1
    owner = _next_retry(held.owner)
    budget = charge(held.budget, failure, held.policy)
    record = Record(
        kind="claim",
        number=number,
        task=held.task,
        worker_id=held.worker_id,
        owner=owner,
        saved_at=now,
        life=held.life,
        attempt=held.attempt + 1,
        token=number,
        charged=budget.charged,
        failures=budget.failures,
        quarantined=budget.quarantined,
        predecessor=failure.cause,
        snapshot=snapshot,
        saved_s=held.saved_s + (snapshot.work_s if snapshot else 0.0),
    )
    return (yield from _append(held, record))


def condense(head: Record, now: float) -> Generator[Op, Any, bool]:
    """Append an end like `head`, without its state. Returns False when somebody has claimed since."""
    record = replace_record(head, number=head.number + 1, snapshot=None, points_to=0, saved_at=now)
    return (yield from create(record.number, encode_record(record)))


def superseded(held: Held) -> Generator[Op, Any, bool]:
    """Whether a later attempt owns the worker. A record of the holder's own that got no answer is no such thing."""
    numbers = yield List()
    above = [number for number in numbers if number > held.last]
    if held.unanswered is None or above != [held.unanswered.number]:
        return bool(above)
    found = yield Get(held.unanswered.number)
    return found is not None and found != encode_record(held.unanswered)


def _append(held: Held, record: Record) -> Generator[Op, Any, bool]:
    """Create the holder's next record, and take over what it says. Returns False when superseded."""
    again = held.unanswered is record
    held.unanswered = record  # until there is an answer: this procedure may be dropped at any op
    if not (yield from create(record.number, encode_record(record), again=again)):
        return False
    held.unanswered, held.volatile = None, False
    held.last, held.durable, held.owner, held.token = record.number, record.snapshot, record.owner, record.token
    held.attempt, held.charged, held.failures, held.saved_s = record.attempt, record.charged, record.failures, record.saved_s
    held.quarantined, held.begins = record.quarantined, record.begins
    held.predecessor = record.predecessor if record.kind == "claim" else held.predecessor
    held.known[record.number] = _kind(record)
    return True


def _settle(held: Held) -> Generator[Op, Any, bool]:
    """Before anything new: create what got no answer once more, with the same bytes. Returns False when superseded.

    With other bytes under the same number, the holder could meet its own late write and take it for a successor's; or, after
    the retention of a successor, be told that something is durable which nobody will ever load.
    """
    return held.unanswered is None or (yield from _append(held, held.unanswered))


def _next_retry(owner: Owner) -> Owner:
    fields = {name: getattr(owner, name) for name in owner.__struct_fields__}
    return Owner(**{**fields, "local_retry": owner.local_retry + 1})


def create(number: int, data: bytes, *, again: bool = False, durable: bool = True) -> Generator[Op, Any, bool]:
    """Create a record of ours; False when somebody else's has that number or a higher one.

    "Exists" may be our own write, answered twice. After an unclear reply nothing is created again before a listing shows
    that nobody is above: retention of a successor may have removed ours, and a second create would be told "durable".
    That can still happen between the listing and the second create. So where there were two (`again`: one before this
    call), success counts only if a listing after it shows that nobody is above.
    """
    create = True
    for _ in range(MAX_CREATE_TRIES):
        if create and (yield Create(number, data, durable)) is Reply.CREATED and not again:
            return True
        found = yield Get(number)
        if found is not None and (found != data or not again):
            return bool(found == data)
        numbers = yield List()
        if any(other > number for other in numbers):
            return False
        if found is not None:
            return True
        create = number not in numbers  # it may have arrived since it was read: then read it again
        again = again or create
    msg = f"the store left {MAX_CREATE_TRIES} tries to create record {number} unanswered; whether it exists is not known"
    raise AmbiguousReplyError(msg)


# --- deleting -------------------------------------------------------------------------------------------------------


def superfluous(known: dict[int, str], keep: int) -> list[int]:
    """Which records may go, oldest first: all but the newest `keep` that hold a state; claims and ends never.

    Counted, not computed from numbers: between two saves there may be any number of claims. What was not read yet stays, and
    does not count.
    """
    holders = sorted(number for number, kind in known.items() if kind in {"save", "inline", "damaged"})
    valid = [number for number in holders if known[number] != "damaged"]
    if len(valid) <= max(keep, MIN_KEEP):
        return []
    oldest_kept = valid[-max(keep, MIN_KEEP)]
    return [number for number in holders if number < oldest_kept and known[number] != "inline"]


def retain(held: Held, keep: int) -> Generator[Op, Any, None]:
    """Find and delete what the newest durable save made superfluous."""
    yield from discard(held, (yield from retention(held, keep)))


def retention(held: Held, keep: int) -> Generator[Op, Any, list[int]]:
    """What the newest durable save made superfluous, oldest first. What another attempt wrote is read first: it may be a claim.

    Newest first, and not all at once: claims stay for ever, and nobody must wait until hundreds of them are read. It works on a copy,
    because `discard` may run beside it.
    """
    unread = sorted((number for number, kind in dict(held.known).items() if kind == "unknown"), reverse=True)
    for number in unread[: max(MAX_READ_AT_ONCE, 4 * keep)]:
        held.known[number] = yield from _classify(number)
    return superfluous(dict(held.known), keep)


def discard(held: Held, numbers: Iterable[int]) -> Generator[Op, Any, None]:
    """Delete what `retention` found. At any time: it stays superfluous, whatever is saved or claimed meanwhile."""
    for number in numbers:
        yield Delete(number)
        held.known.pop(number, None)


def _classify(number: int) -> Generator[Op, Any, str]:
    """What kind of record somebody else wrote. One that is gone counts as a claim: never to be deleted, holds nothing."""
    record = yield from _read(number)
    if not isinstance(record, Record):
        return "claim" if record == "absent" else record
    return _kind(record)


def _kind(record: Record) -> str:
    """What a record is to retention: a claim that holds a state counts as one."""
    return record.kind if record.kind != "claim" or record.snapshot is None else "inline"
