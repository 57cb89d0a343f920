"""The rules of a log one by one: the stories that broke earlier designs, what each end costs, and what damage costs."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from faultguard._core import log as true_rules
from faultguard._core.log import (
    MAX_READ_AT_ONCE,
    Blocked,
    Claimant,
    Create,
    Delete,
    Finished,
    Get,
    Granted,
    List,
    Refused,
    Reply,
    claim,
    give_back,
    is_beside,
    is_of_retry,
    load,
    may_claim,
    newest_of_task,
    retain,
    retry_record,
    save,
    superfluous,
    superseded,
)
from faultguard._core.records import Ended, FailureRecord, Mark, Outcome, Owner, Record, Snapshot, decode_record, encode_record
from faultguard.errors import AmbiguousReplyError, CheckpointCorruptError, CheckpointStoreError
from tests.model import VARIANTS, Incarnation, World, broken, random_world

if TYPE_CHECKING:
    from collections.abc import Callable, Generator

ME = Owner("w1", task_id="t1", ray_attempt=0, epoch=1)
FAILURE = FailureRecord("exception", 1, 0)
DONE = Outcome("completed", recorded=True, value=msgspec.Raw(b"1"))


def replace_owner(owner: Owner, **changes: Any) -> Owner:
    """A copy with some fields changed."""
    return msgspec.structs.replace(owner, **changes)


def replace_failure(cause: str) -> FailureRecord:
    """Another failure."""
    return msgspec.structs.replace(FAILURE, cause=cause)


# --- stories: schedules in a world that checks all guarantees --------------------------------------------------------


def run(one: Incarnation, *, to: str = "", number: int = 0) -> None:
    """Let an incarnation go on without faults, until it is about to ask for `to` (of record `number`), or has nothing to do."""
    for _ in range(500):
        if one.job is not None and to and type(one.op).__name__ == to and (not number or one.op.number == number):
            return
        if one.job is not None:
            one.step()
        elif one.can_work:
            one.work()
        else:
            break
    assert not to, f"{one.name} never asks for {to} {number}:\n" + "\n".join(one.world.story)


def batches(one: Incarnation, count: int) -> None:
    """Let an incarnation do `count` batches, each durable and with retention done before the next."""
    for _ in range(2 * count):
        one.work()
        while one.job is not None:
            one.step()
    assert one.phase in {"running", "over"}


def granted(world: World, kind: str = "rerun", *, gone: int = 0) -> Incarnation:
    """A new incarnation, up to its first batch."""
    one = world.start(kind)
    while one.job is not None:
        one.step()
    if one.phase == "blocked" and gone:
        one.claim_again(gone=gone)
        while one.job is not None:
            one.step()
    assert one.phase == "running", one.world.story
    return one


def four_incarnations(world: World) -> None:
    """1 and 2 sleep; 1 wakes and saves batch 2; 3 resumes and dies; 2 wakes and saves batch 1; 4 must not go back."""
    first = granted(world)
    batches(first, 1)
    run(first, to="Create", number=3)
    second = granted(world)
    run(second, to="Create", number=4)
    run(first)
    third = granted(world)
    third.die()
    run(second)
    assert (first.phase, second.phase) == ("over", "over")
    assert granted(world).resumed_at == 1


def successor_cleans_up(world: World) -> None:
    """A sleeper holds record 1; its successor claims record 2 and goes through many saves. The sleeper wakes and saves."""
    first = granted(world)
    run(first, to="Create", number=2)
    second = granted(world)
    batches(second, 4)
    run(first)
    assert first.phase == "over"


def lost_claim_is_cleared(world: World) -> None:
    """2 creates its claim, 3 claims above it, 2 sees that it has lost; then the sleeper 1 saves under the number of 2's claim."""
    first = granted(world)
    run(first, to="Create", number=2)
    second = world.start()
    run(second, to="Create", number=2)
    second.step()
    granted(world)
    run(second)
    run(first)
    assert (first.phase, second.phase) == ("over", "over")


def gap_and_old_listing(world: World) -> None:
    """Retention has left a gap above record 1; a claimer whose first listing shows only record 1 creates record 2 in it."""
    first = granted(world)
    batches(first, 5)
    second = world.start()
    second.step("old", 0.13)  # the first event, of twelve or so
    run(second, to="Create")
    assert second.op.number == 2
    run(second, to="Get")
    while second.job is not None:
        second.step()
    assert second.resumed_at == 5


def lost_reply_and_retention(world: World) -> None:
    """A save is created and its reply lost; a successor claims above, saves, and deletes it; the sleeper looks for it."""
    first = granted(world)
    batches(first, 1)
    run(first, to="Create", number=3)
    first.step("lost")
    successor_deletes(world, 3)
    run(first)
    assert first.phase == "over"


def late_create_between(world: World) -> None:
    """As above, and the sleeper has already seen that its save is absent and nobody above; only then the first create arrives."""
    first = granted(world)
    batches(first, 1)
    run(first, to="Create", number=3)
    first.step("late")
    run(first, to="Create", number=3)  # read back: absent; listed: nobody above
    world.land()
    successor_deletes(world, 3)
    run(first)
    assert first.phase == "over"


def newer_save_after_no_answer(world: World) -> None:
    """A save gets no answer and the store fails; it lands; a successor deletes it; the sleeper comes with a newer save."""
    first = granted(world)
    batches(first, 1)
    run(first, to="Create", number=3)
    first.step("late")
    first.step("error")
    first.work()
    first.work()
    run(first, to="Create", number=3)
    world.land()
    successor_deletes(world, 3)
    run(first)
    assert first.phase == "over"


def own_late_save(world: World) -> None:
    """A save gets no answer and the store fails; it lands, and the next save of the living holder meets it."""
    one = granted(world)
    batches(one, 1)
    run(one, to="Create", number=3)
    one.step("late")
    one.step("error")
    world.land()
    batches(one, 1)
    assert (one.phase, one.done, one.held.last) == ("running", 3, 4)


def only_one_save_left(world: World) -> None:
    """Saves 2 and 3, claims 4 to 6, save 7: counted by numbers, save 7 alone would be kept."""
    batches(granted(world), 2)
    granted(world)
    granted(world)
    batches(granted(world), 1)


def after_end_of_newer_driver(world: World) -> None:
    """The task of a newer driver has failed for good; an attempt of the old driver's task wakes up."""
    granted(world)
    sleeper = world.start()
    newer = granted(world, "driver")
    for _ in range(3):
        newer.fail()
        while newer.job is not None:
            newer.step()
    run(sleeper)
    assert sleeper.phase == "over"


def late_thaw(world: World) -> None:
    """An attempt sleeps before its claim; the next one works; the sleeper wakes."""
    sleeper = world.start()
    second = granted(world)
    batches(second, 2)
    run(sleeper)
    assert (sleeper.phase, sleeper.held) == ("over", None)
    batches(second, 1)
    assert second.phase == "running"


def crash_after_crash(world: World) -> None:
    """Attempts that die without a word, again and again: only as many begin as the budget has."""
    for _ in range(6):
        one = world.start()
        while one.job is not None:
            one.step()
        one.die()
    assert len(world.ledger.grants) == 3


def exception_in_half_a_batch(world: World) -> None:
    """The body raises when the state has half of a batch."""
    one = granted(world)
    batches(one, 1)
    one.work()
    one.fail()
    run(one, to="Create", number=4)
    assert one.resumed_at == 1


def lost_claim_in_an_old_listing(world: World) -> None:
    """A claim that was lost took the number of a deleted save; an old listing shows the claim that points there."""
    first = granted(world)
    batches(first, 1)
    second = granted(world)  # claim 3 points to save 2
    batches(second, 1)
    claimed = len(world.events) - 1
    batches(second, 3)  # save 2 is deleted
    third = world.start()
    third.step("old", 1 / (len(world.events) + 1) + 1e-9)  # shows record 1 alone
    run(third, to="Create", number=2)
    third.step()
    fourth = world.start()
    fourth.step("old without deletions", claimed / (len(world.events) + 1) + 1e-9)  # shows 1, 2, 3
    while fourth.job is not None:
        fourth.step()
    assert fourth.resumed_at == 5


def claim_cut_short(world: World) -> None:
    """The store fails after a claim was created; the same attempt tries again, and nothing is charged for it."""
    one = world.start()
    run(one, to="Create", number=1)
    one.step()
    one.step("error")
    one.claim_again(gone=0)
    while one.job is not None:
        one.step()
    assert (one.held.charged, one.held.attempt) == (0, 1)


def look_at_own_late_save(world: World) -> None:
    """A save whose reply was lost stands in the log, and the user's code asks whether it must stop."""
    one = granted(world)
    one.work()
    one.work()
    one.step("lost")
    one.step("error")
    one.check()
    while one.job is not None:
        one.step()
    assert one.phase == "running"


def successor_deletes(world: World, number: int) -> None:
    """The next attempt goes on until retention has deleted a record."""
    second = granted(world)
    while number in world.records:
        batches(second, 1)


# Each with the switched line under which it ends badly, and how.
STORIES: dict[str, tuple[Callable[[World], None], str, str]] = {
    "four incarnations": (four_incarnations, "any record taken for one's own", "G1: .* record 3 is durable, and it was never created"),
    "successor cleans up": (successor_cleans_up, "claims deleted by retention", "G3: save 2 was created after claim 2"),
    "lost claim is cleared": (lost_claim_is_cleared, "own lost claim removed", "G3: save 2 was created after claim 3"),
    "gap and old listing": (gap_and_old_listing, "no second listing", "G1: claim 2 resumes at 0"),
    "lost reply and retention": (lost_reply_and_retention, "blind re-create", "G3: save 3 was created after claim 4"),
    "late create between": (late_create_between, "second create believed at once", "G3: save 3 was created after claim 4"),
    "newer save after no answer": (newer_save_after_no_answer, "unanswered create forgotten", "G3: save 3 was created after claim 4"),
    "own late save": (own_late_save, "unanswered create forgotten", "superseded, and nobody is above"),
    "only one save left": (only_one_save_left, "keep by number", "retention left"),
    "claim after an end of a newer driver": (after_end_of_newer_driver, "older driver admitted after an end", "G3: .* older driver"),
    "late thaw": (late_thaw, "order of claims by arrival", "G3: claim .* was granted over"),
    "crash after crash": (crash_after_crash, "budget reset by a crash", "G5: record 3 charges 1 after 1"),
    "exception in half a batch": (exception_in_half_a_batch, "flush of a half-updated state", "G9: half-updated state"),
    "lost claim in an old listing": (lost_claim_in_an_old_listing, "old listing taken for damage", "finds a damaged log"),
    "claim cut short": (claim_cut_short, "own late claim waited for", "kept out by a record of its own"),
    "look at own late save": (look_at_own_late_save, "own late record taken for a successor", "superseded, and nobody is above"),
}


def tell(name: str, rules: Any = true_rules, world: type[World] = World) -> World:
    """Play a story."""
    story = STORIES[name][0]
    told = world(rules, batches=20, keep=2, max_failures=2 if "crash" in name or "driver" in name else 9, wait=True)
    story(told)
    told.quiet()
    return told


@pytest.mark.parametrize("name", STORIES)
def test_stories_end_well(name: str) -> None:
    """What broke earlier designs, and what the search found in this one, ends well."""
    tell(name)


@pytest.mark.parametrize("name", STORIES)
def test_stories_end_badly_under_broken_rules(name: str) -> None:
    """Each story needs the line of the rules that it is about."""
    _, variant, violation = STORIES[name]
    with pytest.raises(AssertionError, match=violation):
        tell(name, *broken(VARIANTS[variant]))


# --- procedures, one at a time, over a dict --------------------------------------------------------------------------


class Store:
    """The records of one log, without faults; `replies` overrides what creates answer."""

    def __init__(self, *records: Record, replies: tuple[Reply, ...] = ()) -> None:
        self.records = {record.number: encode_record(record) for record in records}
        self.asked: list[Any] = []
        self._replies = list(replies)

    def __getitem__(self, number: int) -> Record:
        """A record that is intact."""
        record = decode_record(self.records[number], number)
        assert record is not None
        return record

    def run(self, procedure: Generator[Any, Any, Any], reply: Any = None) -> Any:
        """Carry a procedure out, from its beginning or from that reply on."""
        try:
            while True:
                op = procedure.send(reply)
                self.asked.append(op)
                reply = self._answer(op)
        except StopIteration as stop:
            return stop.value

    def _answer(self, op: Any) -> Any:
        match op:
            case Create(number, data):
                absent = number not in self.records
                if self._replies:
                    return self._replies.pop(0)
                self.records.setdefault(number, data)
                return Reply.CREATED if absent else Reply.EXISTS
            case Get(number):
                return self.records.get(number)
            case List():
                return sorted(self.records)
            case Delete(number):
                self.records.pop(number, None)
        return None

    def damage(self, number: int) -> None:
        """Flip a bit."""
        data = bytearray(self.records[number])
        data[len(data) // 2] ^= 1
        self.records[number] = bytes(data)


def record(number: int, kind: str = "save", **fields: Any) -> Record:
    """A record of attempt 1 of task t1."""
    common = {"task": "task", "worker_id": "w", "owner": ME, "saved_at": 0.0, "life": 1, "attempt": 1, "token": 1}
    return Record(kind=kind, number=number, **{**common, **fields})  # type: ignore[arg-type]


def snapshot(done: int) -> Snapshot:
    """The state after `done` batches."""
    return Snapshot(state=msgspec.Raw(b'{"n":%d}' % done), loops=((Mark("batches", done),),), work_s=float(done))


def claimant(task: str = "t1", attempt: int = 0, *, epoch: int = 1, retry: int = 0, **options: Any) -> Claimant:
    """Who asks; every one is a process of its own."""
    owner = Owner(f"w-{task}-{attempt}-{retry}-{epoch}", task_id=task, ray_attempt=attempt, local_retry=retry, epoch=epoch)
    return Claimant(owner, "task", "w", **{"max_failures": 2, **options})


def held_by(store: Store, me: Claimant) -> Any:
    """What the claim of `me` is granted."""
    answer = store.run(claim(me, 0.0))
    assert isinstance(answer, Granted), answer
    return answer.held


def arrives_late(store: Store, procedure: Generator[Any, Any, Any]) -> None:
    """The store raises at the create that a procedure begins with, and carries it out all the same."""
    sent = next(procedure)
    assert isinstance(sent, Create)
    procedure.close()
    store.records[sent.number] = sent.data


CLAIM = record(5, "claim", token=5, owner=Owner("w9", task_id="t1", ray_attempt=1, local_retry=2, epoch=3))
LEFT = record(6, token=5, owner=CLAIM.owner, ended=Ended("left", charged=False))
COMPLETED = record(6, "end", owner=CLAIM.owner, outcome=DONE)
FAILED = record(6, "end", owner=CLAIM.owner, outcome=Outcome("failed"))


@pytest.mark.parametrize(
    ("head", "me", "expected"),
    [
        (None, claimant(), "claim"),
        (CLAIM, claimant(attempt=2, epoch=3), "claim"),
        (CLAIM, claimant(attempt=1, retry=3, epoch=3), "claim"),
        (CLAIM, claimant(attempt=1, retry=2, epoch=3), "wait"),
        (CLAIM, claimant(attempt=1, retry=1, epoch=3), "refuse"),
        (CLAIM, claimant(attempt=0, retry=9, epoch=3), "refuse"),
        (CLAIM, claimant(attempt=1, retry=2, epoch=3, gone=5), "claim"),
        (CLAIM, claimant(attempt=1, retry=1, epoch=3, gone=5), "refuse"),
        (LEFT, claimant(attempt=1, retry=2, epoch=3), "claim"),
        (LEFT, claimant(attempt=0, epoch=3), "refuse"),
        (CLAIM, claimant("t2", epoch=3), "wait"),
        (CLAIM, claimant("t2", epoch=3, gone=5), "claim"),
        (CLAIM, claimant("t2", epoch=3, gone=4), "wait"),
        (LEFT, claimant("t2", epoch=3), "claim"),
        (CLAIM, claimant("t2", epoch=4), "claim"),
        (CLAIM, claimant("t2", epoch=2), "refuse"),
        (CLAIM, claimant("t1", epoch=4), "claim"),  # of a new cluster, which gives the same ids
        (CLAIM, claimant("t1", attempt=9, epoch=2), "refuse"),
        (FAILED, claimant("t1", epoch=4, named_run=True), "claim"),
        (FAILED, claimant("t1", attempt=9, epoch=2, named_run=True), "refuse"),
        (LEFT, claimant("t2", epoch=2), "refuse"),
        (CLAIM, claimant("t2", epoch=1, always=True), "claim"),
        (COMPLETED, claimant(attempt=7, epoch=3), "outcome"),
        (COMPLETED, claimant(attempt=0, epoch=3), "outcome"),
        (COMPLETED, claimant("t2", epoch=3), "claim"),
        (COMPLETED, claimant("t2", epoch=3, named_run=True), "outcome"),
        (COMPLETED, claimant("t2", epoch=2, named_run=True), "outcome"),
        (COMPLETED, claimant("t2", epoch=1, always=True), "claim"),
        (FAILED, claimant(attempt=7, epoch=3), "outcome"),
        (FAILED, claimant("t2", epoch=3), "claim"),
        (FAILED, claimant("t2", epoch=4, named_run=True), "claim"),
        (FAILED, claimant("t2", epoch=2), "refuse"),
        (CLAIM, replace(claimant(), owner=replace_owner(CLAIM.owner, ray_attempt=0)), "claim"),
        # sent from another node: after what its own task has left, and nothing else
        (CLAIM, claimant(attempt=1, retry=3, epoch=3, sent=True), "claim"),
        (CLAIM, claimant(attempt=1, retry=1, epoch=3, sent=True), "refuse"),
        (CLAIM, claimant("t2", epoch=3, sent=True, gone=5), "refuse"),
        (LEFT, claimant("t2", epoch=4, sent=True), "refuse"),
        (COMPLETED, claimant("t2", epoch=3, sent=True), "refuse"),
        (COMPLETED, claimant(attempt=1, retry=3, epoch=3, sent=True), "refuse"),
        (FAILED, claimant("t2", epoch=3, sent=True), "refuse"),
        (COMPLETED, replace(claimant(sent=True), owner=CLAIM.owner), "outcome"),
        # the retry that was sent has begun, and its own ones after it: it is waited for, and says what came of it
        (CLAIM, claimant(attempt=1, retry=3, epoch=3, beside=2), "wait"),
        (CLAIM, claimant(attempt=1, retry=2, epoch=3, beside=1), "wait"),
        (LEFT, claimant(attempt=1, retry=3, epoch=3, beside=2), "wait"),
        (COMPLETED, claimant(attempt=1, retry=3, epoch=3, beside=2), "wait"),
        (CLAIM, claimant(attempt=1, retry=4, epoch=3, beside=3), "claim"),
        (CLAIM, claimant(attempt=2, retry=3, epoch=3, beside=2), "claim"),
        (CLAIM, claimant(attempt=0, retry=3, epoch=3, beside=2), "refuse"),
        (CLAIM, claimant("t2", epoch=4, beside=2), "claim"),
        (CLAIM, replace(claimant(beside=2), owner=replace_owner(CLAIM.owner, local_retry=3)), "claim"),
    ],
)
def test_who_may_claim(head: Record | None, me: Claimant, expected: str) -> None:
    """One task is ordered by Ray's attempts, tasks by who is known gone, drivers by epoch; an end gives its outcome or a start."""
    assert may_claim(head, me) == expected


@pytest.mark.parametrize("first", ["there", "here"])
def test_of_one_that_was_sent_and_one_that_went_on_one_is_granted(first: str) -> None:
    """Both are about to create the same record, in either order: nobody is charged, and the other one knows whom it has met."""
    store = Store()
    held = held_by(store, claimant())
    assert store.run(save(held, None, 0.0, ended=Ended("exception", charged=True), failure=FAILURE))
    asks = {"there": claimant(retry=1, sent=True), "here": claimant(retry=2, beside=1)}
    last = next(name for name in asks if name != first)
    waits = claim(asks[last], 0.0)
    op = next(waits)
    while not isinstance(op, Create):
        op = waits.send(store._answer(op))
    assert held_by(store, asks[first]).charged == 1
    answer = store.run(waits, store._answer(op))
    assert isinstance(answer, Blocked if last == "here" else Refused)
    assert is_beside(answer.head, asks[last]) is (last == "here")


@pytest.mark.parametrize("word", ["save", "end", "give back", "retry"])
def test_only_the_claim_of_an_empty_log_is_volatile_and_any_record_ends_that(word: str) -> None:
    """What one may not be told before it is durable, one may be told after the next record, whatever that is."""
    store, me = Store(), claimant(volatile=True)
    held = held_by(store, me)
    assert [op.durable for op in store.asked if isinstance(op, Create)] == [False]
    assert held.volatile
    if word == "save":
        store.run(save(held, None, 1.0))
    elif word == "end":
        store.run(save(held, snapshot(1), 1.0, outcome=Outcome("completed")))
    elif word == "retry":
        store.run(retry_record(held, None, FailureRecord("exception", 1, 0), 1.0))
    else:
        store.run(give_back(store[1], 1.0, Ended("exit", charged=False)))
        held = held_by(store, claimant(attempt=1, volatile=True))
    assert not held.volatile
    assert [op.durable for op in store.asked if isinstance(op, Create)][1:].count(False) == 0


def test_a_claim_over_an_unanswered_create_is_as_durable_as_the_first_try() -> None:
    """The second try of a volatile claim is volatile, too."""
    store = Store(replies=(Reply.AMBIGUOUS,))
    assert held_by(store, claimant(volatile=True)).volatile
    assert [op.durable for op in store.asked if isinstance(op, Create)] == [False, False]


@pytest.mark.parametrize("left", [b"", bytes(300)], ids=["empty", "zeros"])
def test_a_claim_that_the_power_took_is_none(left: bytes) -> None:
    """Its name may be left: the next one begins anew, durably, and nothing is said to be damaged."""
    store = Store()
    store.records[1] = left
    granted = store.run(claim(claimant(volatile=True), 0.0))
    assert (granted.held.token, granted.held.attempt, granted.held.charged, granted.held.volatile) == (2, 1, 0, False)
    assert (granted.head, granted.snapshot, granted.damaged) == (None, None, ())


def test_a_damaged_first_record_is_no_empty_log() -> None:
    """Only what has no content at all can be left by a power failure."""
    store = Store(record(1, "claim"))
    store.damage(1)
    with pytest.raises(CheckpointCorruptError):
        store.run(claim(claimant(task="t2"), 0.0))


def test_below_a_later_record_a_claim_without_content_is_never_asked_for() -> None:
    """A save that repeats that there is no state yet stands for the claim."""
    store, me = Store(), claimant(volatile=True)
    store.run(save(held_by(store, me), None, 1.0))
    store.records[1] = b""
    granted = store.run(claim(claimant(attempt=1), 2.0))
    assert (granted.held.token, granted.held.attempt, granted.held.charged, granted.damaged) == (3, 2, 1, ())


def test_who_was_sent_begins_nothing_without_what_it_was_to_follow() -> None:
    """The log is gone: its run is over, and somebody has cleared up."""
    with pytest.raises(CheckpointCorruptError, match="is gone"):
        Store().run(claim(claimant(attempt=1, retry=3, sent=True), 0.0))


def test_the_newest_of_a_task_is_known_below_claims_of_others() -> None:
    """Who has ended for good may have been followed already."""
    store = Store()
    held = held_by(store, claimant())
    assert store.run(save(held, None, 0.0, ended=Ended("exception", charged=True), failure=FAILURE, outcome=Outcome("failed")))
    held_by(store, claimant("t2"))
    assert is_of_retry(store.run(newest_of_task(claimant().owner)), claimant().owner, 0)
    assert store.run(newest_of_task(claimant("t3").owner)) is None


def test_what_the_ends_of_attempts_cost() -> None:
    """A crash is charged once, by the next claim; a note charges what it says; the history says what happened."""
    store = Store()
    first = held_by(store, claimant())
    store.run(save(first, snapshot(1), 0.0))
    second = held_by(store, claimant(attempt=1, max_failures=9))
    assert (second.charged, [failure.cause for failure in second.failures], second.attempt) == (1, ["crash"], 2)
    assert second.failures[0].batch == 1
    store.run(save(second, None, 0.0, ended=Ended("terminated", charged=False)))
    third = held_by(store, claimant(attempt=2, max_failures=9))
    assert (third.charged, third.attempt, third.durable) == (1, 3, snapshot(1))
    left = replace_failure("CudaError")
    store.run(save(third, None, 0.0, ended=Ended("exception", charged=True), failure=left))
    fourth = held_by(store, claimant(attempt=3, max_failures=9))
    assert (fourth.charged, fourth.failures[-1]) == (2, left)
    assert store.run(retry_record(fourth, None, FAILURE, 0.0))
    assert (fourth.charged, fourth.attempt, fourth.token, fourth.owner.local_retry) == (3, 5, fourth.last, 1)
    fifth = held_by(store, claimant(attempt=4, max_failures=9))
    assert (fifth.charged, [failure.cause for failure in fifth.failures]) == (4, ["crash", "CudaError", "exception", "crash"])


def test_the_budget_ends_in_an_outcome_with_the_last_state() -> None:
    """The claim that finds the budget spent records the failure, with the state; a new task then has a new budget and that state."""
    store = Store()
    held = held_by(store, claimant(max_failures=0))
    store.run(save(held, snapshot(3), 0.0))
    ended = store.run(claim(claimant(attempt=1, max_failures=0), 0.0))
    assert (ended.now, ended.record.kind, ended.record.outcome.status, ended.record.charged) == (True, "end", "failed", 1)
    assert store.run(claim(claimant(attempt=2, max_failures=0), 0.0)) == Finished(ended.record)
    answer = store.run(claim(claimant("t2", max_failures=0), 0.0))
    assert (answer.held.charged, answer.held.failures, answer.held.attempt, answer.held.life) == (0, (), 1, 1)
    assert answer.snapshot == snapshot(3)


def test_what_resuming_saved_adds_up() -> None:
    """The work behind a state counts each time that an attempt goes on from it."""
    store = Store()
    first = held_by(store, claimant())
    store.run(save(first, snapshot(3), 0.0))
    second = held_by(store, claimant(attempt=1))
    assert second.saved_s == 3.0
    store.run(save(second, snapshot(5), 0.0))
    store.run(retry_record(second, None, FAILURE, 0.0))
    assert (second.saved_s, store[second.last].saved_s) == (8.0, 8.0)
    store.run(save(second, snapshot(6), 0.0, outcome=DONE))
    assert store[second.last].saved_s == 8.0


def test_no_limit_survives_any_number_of_crashes() -> None:
    """max_failures=-1."""
    store = Store()
    for attempt in range(200):
        held = held_by(store, claimant(attempt=attempt, max_failures=-1))
    assert (held.charged, len(held.failures)) == (199, 100)


def test_a_completed_worker_begins_a_new_life_in_an_unnamed_run() -> None:
    """Another task starts afresh, without the state and the failures of the life before; its claim points to nothing."""
    store = Store()
    held = held_by(store, claimant())
    store.run(retry_record(held, snapshot(1), FAILURE, 0.0))
    store.run(save(held, snapshot(2), 0.0, outcome=DONE))
    answer = store.run(claim(claimant("t2"), 0.0))
    assert (answer.held.life, answer.held.attempt, answer.held.charged, answer.snapshot) == (2, 1, 0, None)
    assert store.run(claim(claimant("t3", named_run=True, gone=answer.held.token), 0.0)).held.life == 2


def test_a_worker_is_started_over_by_a_task_that_has_the_id_of_an_older_drivers_task() -> None:
    """A new cluster gives the ids of an old one again: such a task is another one, and its own next attempts resume."""
    store = Store()
    store.run(save(held_by(store, claimant()), snapshot(2), 0.0))
    over = held_by(store, claimant(epoch=3, afresh=True))
    assert (over.life, over.durable) == (2, None)
    store.run(save(over, snapshot(1), 0.0))
    again = held_by(store, claimant(attempt=1, epoch=3, afresh=True))
    assert (again.life, again.durable) == (2, snapshot(1))


def test_a_claim_never_points_to_a_claim_without_a_state() -> None:
    """Through any number of attempts that saved nothing, the claim names the record with the state."""
    store = Store()
    store.run(save(held_by(store, claimant()), snapshot(1), 0.0))
    for attempt in range(1, 4):
        held = held_by(store, claimant(attempt=attempt, max_failures=9))
        assert (store[held.token].points_to, held.durable) == (2, snapshot(1))


def test_a_refused_attempt_leaves_no_trace() -> None:
    """An old attempt that wakes up late writes nothing."""
    store = Store()
    held_by(store, claimant(attempt=1))
    before = dict(store.records)
    assert isinstance(store.run(claim(claimant(attempt=0), 0.0)), Refused)
    assert store.records == before


def test_only_the_first_listing_of_a_claim_may_be_old() -> None:
    """Every other listing has to show all creates that took place before it."""
    store = Store(replies=(Reply.AMBIGUOUS,))
    held = held_by(store, claimant())
    store.run(save(held, snapshot(1), 0.0))
    store.run(superseded(held))
    first, *others = (op.may_be_stale for op in store.asked if isinstance(op, List))
    assert (first, any(others), len(others)) == (True, False, 4)


@pytest.mark.parametrize("reply", [Reply.AMBIGUOUS, Reply.EXISTS])
def test_a_create_that_is_never_answered_is_given_up(reply: Reply) -> None:
    """After five tries the caller is told that nobody knows; the record stays to be settled."""
    store = Store()
    held = held_by(store, claimant())
    store._replies = [reply] * 5
    with pytest.raises(AmbiguousReplyError):
        store.run(save(held, snapshot(1), 0.0))
    assert (held.last, held.unanswered.number) == (1, 2)
    assert store.run(save(held, snapshot(2), 0.0))
    assert (store[2].snapshot, store[3].snapshot, held.unanswered) == (snapshot(1), snapshot(2), None)


LAST_WORDS: dict[str, Callable[[Any], Generator[Any, Any, bool]]] = {
    "retry": lambda held: retry_record(held, snapshot(1), FAILURE, 0.0),
    "leave": lambda held: save(held, snapshot(1), 0.0, ended=Ended("exception", charged=True), failure=FAILURE),
    "fail": lambda held: save(held, None, 0.0, ended=Ended("exception", charged=True), failure=FAILURE, outcome=Outcome("failed")),
    "complete": lambda held: save(held, snapshot(1), 0.0, outcome=DONE),
    "save": lambda held: save(held, snapshot(1), 0.0),
}


@pytest.mark.parametrize("word", LAST_WORDS)
@pytest.mark.parametrize("landed", [True, False])
def test_said_again_after_an_error_it_counts_once(word: str, landed: bool) -> None:
    """Whatever got no answer may be asked for again: one record, one charge, whether or not the first try had arrived."""
    store = Store()
    held = held_by(store, claimant())
    procedure = LAST_WORDS[word](held)
    sent = next(procedure)
    assert isinstance(sent, Create)
    procedure.close()  # the store raised
    if landed:
        store.records[sent.number] = sent.data
    assert store.run(LAST_WORDS[word](held))
    assert sorted(store.records) == [1, 2]
    assert (held.last, held.charged, store[2].charged) == (2, store[2].charged, 0 if word in {"save", "complete"} else 1)


def test_a_settled_retry_is_taken_over_whole() -> None:
    """A claim of a retry that arrives late is the holder's, whatever it writes next: its token, charge and order go on from there."""
    store = Store()
    held = held_by(store, claimant())
    arrives_late(store, retry_record(held, snapshot(1), FAILURE, 0.0))
    assert store.run(save(held, snapshot(2), 0.0))
    assert (store[3].token, store[3].charged, store[3].attempt, store[3].owner.local_retry) == (2, 1, 2, 1)


def test_a_claim_that_was_made_durable_is_given_back_all_the_same() -> None:
    """The note is of its attempt and token, and the next one is not charged."""
    store = Store()
    store.run(save(held_by(store, claimant(volatile=True)), None, 1.0))
    assert store.run(give_back(store[2], 2.0, Ended("cancelled", charged=False)))
    assert (store[3].kind, store[3].token, store[3].attempt, store[3].ended) == ("save", 1, 1, Ended("cancelled", charged=False))
    assert held_by(store, claimant(attempt=1)).charged == 0


def test_a_claim_is_given_back_once_and_only_by_its_owner() -> None:
    """A claim under which nothing was begun costs nothing, keeps the state, and a later claim is not touched."""
    store = Store()
    store.run(save(held_by(store, claimant()), snapshot(1), 0.0))
    mine = held_by(store, claimant(attempt=1))
    cut = Ended("cancelled", charged=False)
    assert store.run(give_back(store[mine.token], 0.0, cut))
    assert (store[4].ended, store[4].snapshot, store[4].charged) == (cut, snapshot(1), 1)
    later = held_by(store, claimant(attempt=2))
    assert (later.charged, later.durable) == (1, snapshot(1))
    assert not store.run(give_back(store[mine.token], 0.0, cut))
    assert max(store.records) == later.token


@pytest.mark.parametrize("word", LAST_WORDS)
def test_nothing_comes_after_an_outcome(word: str) -> None:
    """An end that arrived after all stands, whatever its author says next."""
    store = Store()
    held = held_by(store, claimant())
    arrives_late(store, save(held, snapshot(1), 0.0, outcome=DONE))
    assert store.run(LAST_WORDS[word](held))
    assert sorted(store.records) == [1, 2]


def test_superseded_looks_for_others_only() -> None:
    """Somebody above: yes. Nobody, or one's own late record: no."""
    store = Store()
    held = held_by(store, claimant())
    assert not store.run(superseded(held))
    arrives_late(store, save(held, snapshot(1), 0.0))
    assert not store.run(superseded(held))
    held_by(store, claimant(attempt=1))
    assert store.run(superseded(held))


# --- deleting --------------------------------------------------------------------------------------------------------

KINDS = st.dictionaries(st.integers(1, 30), st.sampled_from(("save", "inline", "claim", "end", "damaged", "unknown")), max_size=20)


@given(KINDS, st.integers(0, 4))
def test_retention_counts_what_holds_a_state(known: dict[int, str], keep: int) -> None:
    """The newest `keep` intact holders stay (at least two), claims, ends and what was not read always; the rest goes, oldest first."""
    holders = sorted(number for number, kind in known.items() if kind in {"save", "inline"})
    oldest_kept = holders[-max(keep, 2)] if len(holders) > max(keep, 2) else 0
    expected = [number for number, kind in sorted(known.items()) if number < oldest_kept and kind in {"save", "damaged"}]
    assert superfluous(known, keep) == expected


def test_retention_reads_what_others_wrote_before_it_deletes() -> None:
    """Records of earlier attempts may be claims or hold a state inline; only their saves go, and what is gone already is no matter."""
    store = Store()
    first = held_by(store, claimant())
    for done in (1, 2):
        store.run(save(first, snapshot(done), 0.0))
    store.run(retry_record(first, snapshot(3), FAILURE, 0.0))
    store.run(save(first, snapshot(4), 0.0))
    second = held_by(store, claimant(attempt=1, max_failures=9))
    del store.records[2]
    for done in (5, 6):
        store.run(save(second, snapshot(done), 0.0))
        store.run(retain(second, 2))
    assert sorted(store.records) == [1, 4, 6, 7, 8]
    assert sorted(second.known) == [1, 2, 4, 6, 7, 8]


def test_retention_reads_a_few_at_a_time() -> None:
    """After hundreds of attempts the next save does not wait until all their claims are read; what the newest left goes at once."""
    store = Store()
    for attempt in range(200):
        held = held_by(store, claimant(attempt=attempt, max_failures=-1))
    for done in range(6):
        store.run(save(held, snapshot(done), 0.0))
    last = held_by(store, claimant(attempt=200, max_failures=-1))
    store.run(save(last, snapshot(6), 0.0))
    before = sum(kind == "unknown" for kind in last.known.values())
    store.run(retain(last, 3))
    assert before - sum(kind == "unknown" for kind in last.known.values()) == MAX_READ_AT_ONCE
    assert sorted(number for number in store.records if number > 200) == [205, 206, 207, 208]


# --- loading ---------------------------------------------------------------------------------------------------------


def test_one_damaged_record_costs_at_most_its_own_batches() -> None:
    """Whatever a log has lived through: with any one record damaged, the newest intact state of its life is loaded."""
    checked = 0
    for seed in range(150):
        world = random_world(seed)
        for number in world.records:
            store = Store()
            store.records = dict(world.records)
            store.damage(number)
            checked += check_load(store)
    assert checked > 1000


def check_load(store: Store) -> bool:
    """Load a log that has a damaged record, and compare with what is there."""
    intact = [found for number, data in sorted(store.records.items()) if (found := decode_record(data, number)) is not None]
    try:
        loaded = store.run(load(sorted(store.records)))
    except CheckpointCorruptError:
        assert not [found for found in intact if found.life == intact[-1].life and found.snapshot is not None]
        return False
    assert loaded.head == (intact[-1] if intact else None)
    states = [found.snapshot for found in intact if found.life == intact[-1].life and found.snapshot is not None]
    assert loaded.snapshot == (states[-1] if states else None)
    return True


def test_a_damaged_pointer_never_means_a_fresh_start() -> None:
    """A claim says that there is a state; if the only one is damaged or gone, that is an error, not zero."""
    for ruin in ("damage", "remove"):
        store = Store()
        store.run(save(held_by(store, claimant()), snapshot(1), 0.0))
        held_by(store, claimant(attempt=1))
        if ruin == "damage":
            store.damage(2)
        else:
            del store.records[2]
        with pytest.raises(CheckpointCorruptError, match="damaged" if ruin == "damage" else "gone"):
            store.run(claim(claimant(attempt=2), 0.0))
        assert max(store.records) == 3


@pytest.mark.parametrize(("saves", "damaged", "starts"), [(1, {2}, True), (2, {2, 3}, False), (9, {8, 9, 10}, False)])
def test_when_every_save_is_damaged(saves: int, damaged: set[int], starts: bool) -> None:
    """One record costs its batches, be it the first; several above a claim that says "fresh" are an error, not zero."""
    store = Store()
    held = held_by(store, claimant())
    for done in range(1, saves + 1):
        store.run(save(held, snapshot(done), 0.0))
        store.run(retain(held, 3))
    for number in damaged:
        store.damage(number)
    if starts:
        assert store.run(load(sorted(store.records))).snapshot is None
    else:
        with pytest.raises(CheckpointCorruptError, match="are damaged"):
            store.run(load(sorted(store.records)))


def test_a_lost_state_is_not_replaced_by_an_older_one() -> None:
    """If the record that a claim points to is gone, somebody has removed it: an older one would silently cost batches."""
    store = Store()
    held = held_by(store, claimant())
    for done in (1, 2):
        store.run(save(held, snapshot(done), 0.0))
    held_by(store, claimant(attempt=1))
    del store.records[3]
    with pytest.raises(CheckpointCorruptError, match="gone"):
        store.run(claim(claimant(attempt=2), 0.0))


def test_a_state_of_an_earlier_life_is_never_loaded() -> None:
    """A new life whose only save is damaged does not go on from the life before."""
    store = Store()
    store.run(save(held_by(store, claimant()), snapshot(7), 0.0, outcome=DONE))
    second = held_by(store, claimant("t2"))
    store.run(save(second, snapshot(1), 0.0))
    store.damage(4)
    answer = store.run(claim(claimant("t2", 1), 0.0))
    assert (answer.snapshot, answer.damaged, answer.held.life) == (None, (4,), 2)


class BusyStore(Store):
    """A log whose holder saves, and deletes what is old, between any two requests of the one that reads."""

    def __init__(self, rounds: int) -> None:
        super().__init__()
        self.holder = held_by(self, claimant())
        self.run(save(self.holder, snapshot(1), 0.0))
        self.rounds = rounds
        self._busy = False

    def _answer(self, op: Any) -> Any:
        if isinstance(op, Get) and not self._busy and self.rounds:
            self.rounds -= 1
            self._busy = True
            for done in range(3):
                self.run(save(self.holder, snapshot(done), 0.0))
                self.run(retain(self.holder, 2))
            self._busy = False
        return super()._answer(op)


def test_a_busy_log_is_not_a_damaged_one() -> None:
    """A reader that is outrun by a living holder more than five times goes on reading; nothing is damaged."""
    store = BusyStore(rounds=20)
    assert store.run(claim(claimant(attempt=1), 0.0)).snapshot == snapshot(2)
    endless = BusyStore(rounds=1000)
    with pytest.raises(CheckpointStoreError, match="replaced by newer records"):
        endless.run(claim(claimant(attempt=1), 0.0))
