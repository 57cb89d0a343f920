"""Which batch is at fault, and what the loop does with one that is quarantined: on a real store, without Ray."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np
import pytest

from faultguard import Checkpoint, InputChangedError, _journal
from faultguard._core.budget import Policy, batch_of
from faultguard._core.records import Ended, FailureRecord, Spot
from faultguard._core.schedule import Pinning, Schedule
from faultguard.storage import open_store
from tests.attempts import Died, InlineWriter, Worker, write_inline

if TYPE_CHECKING:
    from pathlib import Path

    from faultguard._core.records import Record

NEVER = 10**6  # batches between two writes
N = 6
Body = Callable[[Checkpoint], Any]


@pytest.fixture(autouse=True)
def writer(monkeypatch: pytest.MonkeyPatch) -> InlineWriter:
    """What is due is written on the thread of the loop."""
    return write_inline(monkeypatch)


@pytest.fixture
def worker(tmp_path: Path) -> Worker:
    """A worker whose poison is skipped."""
    return Worker(open_store(str(tmp_path)), policy=Policy(skip_poison=True))


def live(worker: Worker, body: Body, *, every: int = NEVER, limit: int = 30) -> tuple[dict[str, Any], list[str]]:
    """Run attempts until one completes. `Died` is the end of a process, every other exception is retried. Gives state and ends."""
    ends: list[str] = []
    attempt = worker.attempt(every=every)
    while len(ends) < limit:
        try:
            body(attempt.ckpt)
        except Died:
            ends.append("died")
            attempt.die()
            attempt = worker.attempt(every=every)
        except Exception as error:  # noqa: BLE001 - whatever the body raises
            ends.append(type(error).__name__)
            attempt.fail(error)
            attempt = worker.retry(attempt, schedule=Schedule(every, 0.0))
        else:
            return attempt.complete(), ends
    raise AssertionError(f"no end after {ends}")


def die() -> NoReturn:
    """SIGKILL: nothing is written any more, whatever is let go of."""
    writer: Any = _journal._writer
    writer.clients.clear()
    raise Died


def fail(how: str) -> NoReturn:
    """In one way or the other."""
    if how == "die":
        die()
    raise ValueError


def quarantined(worker: Worker) -> list[tuple[tuple[str, int], ...]]:
    """What the newest record says."""
    return [batch_of(place) for place in worker.records()[-1].quarantined]


def newest(worker: Worker) -> Record:
    """The last record."""
    return worker.records()[-1]


# --- which batch it was ---------------------------------------------------------------------------------------------


def through_a_generator(items: Iterator[int]) -> Iterator[int]:
    """As users wrap loops."""
    for item in items:  # noqa: UP028 - as written by those who do not know
        yield item


class Bar:
    """As progress bars wrap them."""

    def __init__(self, items: Iterator[int]) -> None:
        self.items = items

    def __iter__(self) -> Iterator[int]:
        """One by one."""
        yield from self.items


def raises(ckpt: Checkpoint) -> None:
    """In the batch."""
    for batch in ckpt.batches(range(N)):
        _ = 1 / (batch - 2)


def raises_in_a_with(ckpt: Checkpoint) -> None:
    """In a block in it."""
    for batch in ckpt.batches(range(N)):
        with contextlib.suppress(KeyError):
            _ = 1 / (batch - 2)


def raises_before_finally(ckpt: Checkpoint) -> None:
    """With something to clear up."""
    for batch in ckpt.batches(range(N)):
        try:
            _ = 1 / (batch - 2)
        finally:
            len("x")


def raises_another(ckpt: Checkpoint) -> None:
    """From a handler."""
    for batch in ckpt.batches(range(N)):
        try:
            _ = 1 / (batch - 2)
        except ZeroDivisionError as error:
            raise KeyError from error


def raises_in_a_callee(ckpt: Checkpoint) -> None:
    """The loop is in a function of its own."""
    raises(ckpt)


def raises_in_enumerate(ckpt: Checkpoint) -> None:
    """The loop goes through something of Python's."""
    for _, batch in enumerate(ckpt.batches(range(N))):
        _ = 1 / (batch - 2)


def raises_in_a_generator(ckpt: Checkpoint) -> None:
    """Or of the user's."""
    for batch in through_a_generator(ckpt.batches(range(N))):
        _ = 1 / (batch - 2)


def raises_in_a_bar(ckpt: Checkpoint) -> None:
    """Or of somebody else's."""
    for batch in Bar(ckpt.batches(range(N))):
        _ = 1 / (batch - 2)


def fails_at_two(batch: int) -> float:
    """As batches do."""
    return 1 / (batch - 2)


def raises_in_map(ckpt: Checkpoint) -> None:
    """Or is run in C."""
    set(map(fails_at_two, ckpt.batches(range(N))))


def raises_before(ckpt: Checkpoint) -> None:
    """No loop has begun."""
    raise ZeroDivisionError


def raises_after(ckpt: Checkpoint) -> None:
    """The loop is done."""
    for _ in ckpt.batches(range(N)):
        pass
    raise ZeroDivisionError


def breaks(ckpt: Checkpoint) -> None:
    """What comes after it is at fault."""
    for batch in ckpt.batches(range(N)):
        if batch == 2:
            break
    raise ZeroDivisionError


def breaks_out_of_a_with(ckpt: Checkpoint) -> None:
    """Likewise."""
    for _ in through_a_generator(ckpt.batches(range(N))):
        with contextlib.suppress(KeyError):
            break
    raise ZeroDivisionError


def returns(ckpt: Checkpoint) -> None:
    """Likewise."""

    def found() -> int:
        for batch in ckpt.batches(range(N)):
            if batch == 2:
                return batch
        return 0

    _ = 1 / (found() - 2)


def takes_one(ckpt: Checkpoint) -> None:
    """Likewise."""
    _ = 1 / (next(batch for batch in ckpt.batches(range(N)) if batch == 2) - 2)


def lets_go(ckpt: Checkpoint) -> None:
    """Likewise."""
    batches: Any = ckpt.batches(range(N))
    batches = next(batches)
    _ = 1 / batches


def survives(ckpt: Checkpoint) -> None:
    """What a batch raised was handled; this is something else."""
    with contextlib.suppress(ZeroDivisionError):
        raises(ckpt)
    raise KeyError


def raises_and_says_more(ckpt: Checkpoint) -> None:
    """What a batch raised is the reason of what arrives."""
    try:
        raises(ckpt)
    except ZeroDivisionError as error:
        raise KeyError from error


def reads_badly(ckpt: Checkpoint) -> None:
    """The input raises: no batch was there yet."""
    for _ in ckpt.batches(1 // (2 - number) for number in range(N)):
        pass


@pytest.mark.parametrize(
    ("body", "its"),
    [
        *((body, True) for body in (raises, raises_in_a_with, raises_before_finally, raises_another, raises_in_a_callee)),
        *((body, True) for body in (raises_in_enumerate, raises_in_a_generator, raises_in_a_bar, raises_in_map, raises_and_says_more)),
        *(
            (body, False)
            for body in (raises_before, raises_after, breaks, breaks_out_of_a_with, returns, takes_one, lets_go, survives, reads_badly)
        ),
    ],
    ids=lambda case: getattr(case, "__name__", ""),
)
def test_what_came_out_of_a_batch(worker: Worker, body: Body, its: bool) -> None:
    """An exception in the body is the doing of its batch; what is raised before or after a loop, or by the input, is not."""
    attempt = worker.attempt()
    with pytest.raises((ZeroDivisionError, KeyError)) as caught:
        body(attempt.ckpt)
    assert attempt.ckpt.is_to_blame(caught.value) is its
    attempt.die()


@pytest.mark.parametrize(("where", "place", "its"), [("before", (1,), True), ("inside", (1, 2), True), ("after", (1,), False)])
def test_of_nested_loops_the_innermost_that_raised(worker: Worker, where: str, place: tuple[int, ...], its: bool) -> None:
    """A batch outside can be at fault only as long as nothing inside of it is counted: else a part of it would be."""
    attempt = worker.attempt()

    def body() -> None:
        for epoch in attempt.ckpt.batches(range(3), name="epochs"):
            if (epoch, where) == (1, "before"):
                raise ValueError
            for step in attempt.ckpt.batches(range(4), name="steps"):
                if (epoch, step, where) == (1, 2, "inside"):
                    raise ValueError
            if (epoch, where) == (1, "after"):
                raise ValueError

    with pytest.raises(ValueError, match=r"^$") as caught:
        body()
    attempt.fail(caught.value)
    failure = newest(worker).failures[-1]
    assert (failure.position, failure.pinned, tuple(spot.done for spot in failure.place)) == (place, its, place)


# --- passing over ---------------------------------------------------------------------------------------------------


class Shards(Sequence[int]):
    """A sequence of the user's own, that dies of one of its items."""

    def __init__(self, n: int, deadly: int = -1) -> None:
        self.n = n
        self.deadly = deadly

    def __len__(self) -> int:
        """How many there are."""
        return self.n

    def __getitem__(self, index: Any) -> Any:
        """One of them."""
        if index == self.deadly:
            die()
        if index >= self.n:
            raise IndexError
        return index


INPUTS: dict[str, Callable[[], Any]] = {
    "range": lambda: range(N),
    "list": lambda: list(range(N)),
    "array": lambda: np.arange(N),
    "sequence": lambda: Shards(N),
    "iterator": lambda: iter(range(N)),
    "callable": lambda: lambda start: range(start, N),
    "lists": lambda: [[number] for number in range(N)],
}


def counts(items: Any, poison: set[int], how: str = "raise") -> Body:
    """A loop that adds up, and always fails at some of its batches, with its state half updated."""

    def body(ckpt: Checkpoint) -> None:
        ckpt.state.setdefault("seen", [])
        for item in ckpt.batches(items() if callable(items) else items):
            batch = int(item[0] if isinstance(item, list) else item)
            ckpt.state["sum"] = ckpt.state.get("sum", 0) + batch
            if batch in poison:
                fail(how)
            ckpt.state["seen"].append(batch)

    return body


def assert_exact(state: dict[str, Any], without: set[int]) -> None:
    """Every other batch counts once."""
    rest = [batch for batch in range(N) if batch not in without]
    assert state == {"seen": rest, "sum": sum(rest)}


@pytest.mark.parametrize("kind", INPUTS)
@pytest.mark.parametrize("every", [1, NEVER])
@pytest.mark.parametrize("poison", [{0}, {2, 3}, {N - 1}], ids=str)
def test_a_batch_that_raises_three_times_is_passed_over(worker: Worker, kind: str, every: int, poison: set[int]) -> None:
    """Whatever the input is; the rest is exact."""
    state, ends = live(worker, counts(INPUTS[kind], poison), every=every)
    assert_exact(state, poison)
    assert ends == ["ValueError"] * (3 * len(poison))
    assert quarantined(worker) == [(("batches", batch),) for batch in sorted(poison)]
    assert newest(worker).charged == 0


@pytest.mark.parametrize("kind", INPUTS)
@pytest.mark.parametrize("every", [1, NEVER])
@pytest.mark.parametrize("poison", [{0}, {2, 3}, {N - 1}], ids=str)
def test_a_batch_that_kills_its_process_is_passed_over(worker: Worker, kind: str, every: int, poison: set[int]) -> None:
    """The first death says only that there was one; from then on each batch is recorded before it begins."""
    state, ends = live(worker, counts(INPUTS[kind], poison, "die"), every=every)
    assert_exact(state, poison)
    assert ends == ["died"] * (1 + 3 * len(poison))
    assert quarantined(worker) == [(("batches", batch),) for batch in sorted(poison)]
    assert newest(worker).charged == 0


def test_of_what_cannot_be_read_only_indices_are_needed(worker: Worker) -> None:
    """A batch that kills the process as it is read is recorded before that, and not read again to pass it over."""
    state, ends = live(worker, counts(Shards(N, deadly=3), set()))
    assert_exact(state, {3})
    assert ends == ["died"] * 4
    late = Worker(worker.store, "late", worker.policy)
    once = {"died": False}

    def dies_behind_it(ckpt: Checkpoint) -> None:
        counts(Shards(N, deadly=3), set())(ckpt)
        if not once["died"]:
            once["died"] = True
            die()

    state, _ = live(late, dies_behind_it, every=1)
    assert_exact(state, {3})


def test_without_the_option_nothing_is_passed_over(worker: Worker) -> None:
    """Nor is any batch recorded before it begins."""
    plain = Worker(worker.store, "plain")
    with pytest.raises(AssertionError, match="no end"):
        live(plain, counts(range(N), {3}, "die"), limit=6)
    assert not any(record.begins or record.quarantined for record in plain.records())
    assert newest(plain).charged == 6


def test_a_batch_of_one_epoch_is_not_that_of_another(worker: Worker) -> None:
    """Batch 3 of epoch 0 is passed over, batch 3 of epoch 1 is not; nor is batch 3 of a loop of another name."""

    def body(ckpt: Checkpoint) -> None:
        for epoch in ckpt.batches(range(2), name="epochs"):
            for step in ckpt.batches(range(5), name="steps"):
                if (epoch, step) == (0, 3):
                    raise ValueError
                ckpt.state.setdefault("seen", []).append((epoch, step))
        for step in ckpt.batches(range(5), name="more"):
            ckpt.state["seen"].append(step)

    state, _ = live(worker, body)
    assert quarantined(worker) == [(("epochs", 0), ("steps", 3))]
    assert state["seen"] == [(epoch, step) for epoch in range(2) for step in range(5) if (epoch, step) != (0, 3)] + list(range(5))


@pytest.mark.parametrize("how", ["raise", "die"])
@pytest.mark.parametrize("every", [1, NEVER])
def test_an_outer_batch_is_passed_over_before_anything_inside_is_counted(worker: Worker, how: str, every: int) -> None:
    """One that fails before its inner loop goes as a whole."""

    def body(ckpt: Checkpoint) -> None:
        for epoch in ckpt.batches(range(3), name="epochs"):
            if epoch == 1:
                fail(how)
            for step in ckpt.batches(range(2), name="steps"):
                ckpt.state.setdefault("seen", []).append((epoch, step))

    state, _ = live(worker, body, every=every)
    assert quarantined(worker) == [(("epochs", 1),)]
    assert state["seen"] == [(0, 0), (0, 1), (2, 0), (2, 1)]


@pytest.mark.parametrize("how", ["raise", "die"])
@pytest.mark.parametrize("where", ["between", "behind"])
def test_an_outer_batch_that_is_counted_in_part_is_not_passed_over(worker: Worker, how: str, where: str) -> None:
    """One that fails after some of its inner batches: the budget decides."""

    def body(ckpt: Checkpoint) -> None:
        for epoch in ckpt.batches(range(3), name="epochs"):
            if where == "between" and epoch == 1 and ckpt.attempt > 1:
                fail(how)
            for step in ckpt.batches(range(2), name="steps"):
                if (epoch, step, where) == (1, 1, "between"):
                    fail(how)
            if epoch == 1:
                fail(how)

    with pytest.raises(AssertionError, match="no end"):
        live(worker, body, every=1, limit=8)
    assert (quarantined(worker), newest(worker).charged) == ([], 8)


@pytest.mark.parametrize("there", ["b", "x"])
def test_what_was_passed_over_does_not_hide_another_input(worker: Worker, there: str) -> None:
    """The batch that was passed over counts as done, and the same one is expected there on resume."""

    def body(ckpt: Checkpoint, items: str = "abcd") -> None:
        for batch in ckpt.batches(iter(items)):
            if batch == "b":
                die()
            if batch == "c" and not ckpt.state.get("go"):
                raise KeyError

    attempt = worker.attempt(every=NEVER)
    for _ in range(4):
        with pytest.raises(Died):
            body(attempt.ckpt)
        attempt.die()
        attempt = worker.attempt(every=NEVER)
    with pytest.raises(KeyError):
        body(attempt.ckpt)
    attempt.die()
    attempt = worker.attempt()
    assert attempt.ckpt.position == (2,)
    attempt.ckpt.state["go"] = True
    with pytest.raises(InputChangedError) if there == "x" else contextlib.nullcontext():
        body(attempt.ckpt, f"a{there}cd")
    attempt.die()


@pytest.mark.parametrize("who", ["claim", "retry", "leave"])
def test_whatever_dies_after_the_third_failure_the_batch_stays_quarantined(worker: Worker, who: str) -> None:
    """The record that counts the failure quarantines, be it the claim after a crash; four more incarnations die at once, and carry it."""
    attempt = worker.attempt()
    place = (Spot("batches", 0, 3),)
    for nth in range(3):
        snapshot = attempt.ckpt._snapshot()[0]
        if who == "claim":
            attempt.journal.pin(snapshot, place)
            attempt.die()
        elif who == "retry":
            attempt.journal.retry(FailureRecord("exception", 1, 3, place=place, pinned=True))
            attempt.die()
        else:
            attempt.journal.leave(Ended("exception", charged=True), FailureRecord("exception", 1, 3, place=place, pinned=True))
            attempt.die()
        attempt = worker.attempt() if who != "retry" or nth == 2 else worker.retry(attempt)  # the claim of the third retry is not used
    assert (newest(worker).quarantined, newest(worker).charged) == ((place,), int(who == "retry"))
    for _ in range(4):
        attempt.die()
        attempt = worker.attempt()
    assert (newest(worker).quarantined, newest(worker).charged) == ((place,), 4 + int(who == "retry"))
    attempt.die()


def test_a_new_life_begins_with_none(worker: Worker) -> None:
    """New work under the id of a completed worker; in the same life every record carries the list."""
    live(worker, counts(range(N), {2}))
    since = next(index for index, record in enumerate(worker.records()) if record.quarantined)
    assert all(record.quarantined for record in worker.records()[since:])
    worker.task_id, worker.ray_attempt = "new work", -1
    attempt = worker.attempt()
    assert (newest(worker).life, newest(worker).quarantined, attempt.ckpt.quarantined) == (2, (), ())
    attempt.die()


def test_users_see_positions(worker: Worker) -> None:
    """As `position` was there."""
    seen: list[object] = []

    def body(ckpt: Checkpoint) -> None:
        counts(range(N), {2, 4})(ckpt)
        seen.append(ckpt.quarantined)

    live(worker, body)
    assert seen == [((2,), (4,))]


# --- the batch that killed its process ------------------------------------------------------------------------------


def begun(worker: Worker) -> list[tuple[int, ...]]:
    """What the records say begins after them."""
    return [tuple(spot.done for spot in record.begins) for record in worker.records() if record.kind == "save"]


def test_after_a_crash_each_batch_is_recorded_before_it_begins(worker: Worker) -> None:
    """Until the attempt is well past where the one before can have died; then the last record takes it back."""
    worker.attempt(every=2).die()
    attempt = worker.attempt(every=2, keep=100)
    for batch in attempt.ckpt.batches(range(8)):
        pinned = newest(worker).begins
        assert tuple(spot.done for spot in pinned) == ((batch,) if batch < 4 else ())
    assert begun(worker)[-1] == ()
    attempt.die()


def test_how_long_is_work_and_not_waiting_for_the_store() -> None:
    """Twice the lag of the schedule, in seconds of work, or in batches."""
    pinning = Pinning((10.0, 0), now=0.0)
    assert pinning.next(5.0)
    pinning.written(500.0)
    assert pinning.next(514.0)
    pinning.written(514.0)
    assert pinning.next(515.5)
    assert not pinning.next(516.0)
    assert [Pinning((0.0, 1), 0.0).next(9.0), *map(Pinning((0.0, 1), 0.0).next, (1.0, 2.0, 3.0))] == [True, True, True, False]


@pytest.mark.parametrize("way", ["end", "break"])
def test_who_dies_behind_a_loop_blames_no_batch(worker: Worker, way: str) -> None:
    """The end of a loop is recorded, too, and so is leaving it early."""

    def body(ckpt: Checkpoint) -> None:
        for batch in ckpt.batches(range(N)):
            if (batch, way) == (2, "break"):
                break
        die()

    with pytest.raises(AssertionError, match="no end"):
        live(worker, body, limit=6)
    assert quarantined(worker) == []
    assert all(failure.pinned == 0 for failure in newest(worker).failures)


def test_who_dies_between_two_batches_blames_no_batch_that_is_done(worker: Worker) -> None:
    """As the next one is read: that one, if any, is meant."""
    deadly = Shards(N, deadly=4)
    live(worker, lambda ckpt: [None for _ in ckpt.batches(deadly)])
    assert quarantined(worker) == [(("batches", 4),)]


def test_what_was_saved_within_a_batch_pins_nothing(worker: Worker) -> None:
    """After `advance()` its batch is done, and what the body still does is nobody's batch."""

    def body(ckpt: Checkpoint) -> None:
        for batch in ckpt.batches(range(N)):
            ckpt.advance(wait=True)
            if batch == 3:
                die()

    state, ends = live(worker, body)
    assert (ends, quarantined(worker), state) == (["died"], [], {})


def test_crashes_that_are_pinned_to_nothing_are_not_quarantined(worker: Worker) -> None:
    """Each attempt dies before its first record: however often, no batch is passed over."""

    def body(ckpt: Checkpoint) -> None:
        if ckpt.attempt < 9:
            die()
        counts(range(N), set())(ckpt)

    state, ends = live(worker, body)
    assert_exact(state, set())
    assert (len(ends), newest(worker).charged, quarantined(worker)) == (8, 8, [])


def test_a_block_can_ask_for_it(worker: Worker) -> None:
    """`checkpointed(on_poison="skip")` in a task whose decorator does not: from the block on, over all attempts."""
    worker.policy = Policy()

    def body(ckpt: Checkpoint) -> None:
        ckpt.configure(on_poison="skip")
        counts(range(N), {2}, "die")(ckpt)

    state, ends = live(worker, body)
    assert_exact(state, {2})
    assert ends == ["died"] * 4
    worker = Worker(worker.store, "raises")

    def raising(ckpt: Checkpoint) -> None:
        ckpt.configure(on_poison="skip")
        counts(range(N), {2})(ckpt)

    assert_exact(live(worker, raising)[0], {2})


def test_a_block_can_refuse_it(worker: Worker) -> None:
    """And the decorator's word comes second."""

    def body(ckpt: Checkpoint) -> None:
        ckpt.configure(on_poison="fail")
        counts(range(N), {2})(ckpt)

    with pytest.raises(AssertionError, match="no end"):
        live(worker, body, limit=5)
    assert newest(worker).charged == 5
