"""The rules of a log one by one: the stories that broke earlier designs, what each end costs, and what damage costs."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from faultguard._core import log as true_rules
from faultguard._core.log import Claimant, Create, Delete, Finished, Get, Granted, List, Refused, Reply, claim, load, may_claim
from faultguard._core.log import retain, retry_record, save, superfluous, superseded
from faultguard._core.records import Ended, FailureRecord, Mark, Outcome, Owner, Record, Snapshot, decode_record, encode_record
from faultguard.errors import AmbiguousReplyError, CheckpointCorruptError, CheckpointStoreError
from tests.model import VARIANTS, Incarnation, Violation, World, broken, random_world

if TYPE_CHECKING:
    from collections.abc import Callable, Generator

ME = Owner("w1", task_id="t1", ray_attempt=0, epoch=1)
FAILURE = FailureRecord("exception", 1, 0)
DONE = Outcome("completed", recorded=True, value=msgspec.Raw(b"1"))


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
    "four incarnations": (four_incarnations, "any record taken for one's own", "G3: save 3 was created after claim 3"),
    "successor cleans up": (successor_cleans_up, "claims deleted by retention", "G3: .* changes what is loaded"),
    "lost claim is cleared": (lost_claim_is_cleared, "own lost claim removed", "G3: save 2 was created after claim 3"),
    "gap and old listing": (gap_and_old_listing, "no second listing", "G1: claim 2 resumes at 0"),
    "lost reply and retention": (lost_reply_and_retention, "blind re-create", "G3: save 3 was created after claim 4"),
    "late create between": (late_create_between, "second create believed at once", "G3: save 3 was created after claim 4"),
    "newer save after no answer": (newer_save_after_no_answer, "unanswered create forgotten", "G3: save 3 was created after claim 4"),
    "own late save": (own_late_save, "unanswered create forgotten", "superseded, and nobody is above"),
    "only one save left": (only_one_save_left, "keep by number", "retention left"),
    "claim after an end of a newer driver": (after_end_of_newer_driver, "older driver admitted after an end", "G3: .* older driver"),
    "late thaw": (late_thaw, "order of claims by arrival", "G3: claim .* was granted over"),
    "crash after crash": (crash_after_crash, "budget reset by a crash", "G5: 4 attempts began"),
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
