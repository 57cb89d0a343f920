"""Where a worker stands in its loops: whatever the program, wherever it dies, each batch counts exactly once."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import msgspec
import pytest

from faultguard._core.cursors import HAND_WRITTEN, MAX_DEPTH, MAX_SIBLINGS, Cursors
from faultguard._core.records import Mark, Snapshot
from faultguard.errors import InputChangedError, UsageError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from faultguard._core.cursors import Loop, Marks

Saved = tuple["Marks", tuple[Any, ...]]
FRESH: Saved = ((), ())


class Crash(BaseException):
    """The process dies here."""


class Worker:
    """An attempt: loops as `Checkpoint.batches` drives them, a state, and a crash at the `crash_at`-th touch of the state."""

    def __init__(self, saved: Saved = FRESH, crash_at: int = -1) -> None:
        self.cursors = Cursors(saved[0])
        self.state = list(saved[1])
        self.saves = [saved]
        self.touches = 0
        self._crash_at = crash_at

    def batches(self, count: int, name: str = "batches") -> Iterator[int]:
        """One loop."""
        cursors = self.cursors
        loop, closed = cursors.open(name, count)
        if closed:
            self.boundary()
        if loop.finished:
            cursors.finish(loop)
            return
        try:
            for index in range(loop.done, count):
                loop.in_hand = True
                yield index
                if cursors.stack[-1:] != [loop]:
                    assert cursors.come_back(loop)
                if loop.in_hand:
                    cursors.done(loop)
                    self.boundary()
        except BaseException:
            cursors.leave(loop)
            raise
        cursors.finish(loop)
        self.boundary()

    def advance(self) -> int:
        """The batch in hand of a hand-written loop is done; returns how many are."""
        loop = self.cursors.hand_written()
        self.cursors.done(loop)
        self.boundary()
        return loop.done

    def touch(self, *entry: object) -> None:
        """Change the state in two halves, with a chance to die before, between and after them."""
        for half in "ab":
            self._perhaps_die()
            self.state.append((*entry, half))
        self._perhaps_die()

    def boundary(self) -> None:
        """What a checkpoint would keep."""
        if not self.cursors.holds_back:
            self.saves.append((self.cursors.marks(), tuple(self.state)))

    def _perhaps_die(self) -> None:
        if self.touches == self._crash_at:
            raise Crash
        self.touches += 1


def one_loop(worker: Worker) -> None:
    """The plainest."""
    for batch in worker.batches(4):
        worker.touch(batch)


def epochs(worker: Worker) -> None:
    """Steps begin anew with each epoch; what follows the inner loop counts once."""
    for epoch in worker.batches(3, "epochs"):
        for step in worker.batches(3, "steps"):
            worker.touch(epoch, step)
        worker.touch(epoch, "end")


def growing_epochs(worker: Worker) -> None:
    """The inner loop has another length in each epoch, and sometimes none at all."""
    for epoch in worker.batches(4, "epochs"):
        if epoch != 1:
            for step in worker.batches(epoch, "steps"):
                worker.touch(epoch, step)
        worker.touch(epoch, "end")


def siblings(worker: Worker) -> None:
    """One after another."""
    for name in ("load", "train", "test"):
        for batch in worker.batches(2, name):
            worker.touch(name, batch)


def nested_siblings(worker: Worker) -> None:
    """Two inner loops in each epoch."""
    for epoch in worker.batches(2, "epochs"):
        for name in ("train", "test"):
            for batch in worker.batches(2, name):
                worker.touch(epoch, name, batch)
    for batch in worker.batches(2, "train"):
        worker.touch("after", batch)


def three_deep(worker: Worker) -> None:
    """Loops in loops in loops."""
    for a in worker.batches(2, "a"):
        for b in worker.batches(2, "b"):
            for c in worker.batches(2, "c"):
                worker.touch(a, b, c)
            worker.touch(a, b)


def broken_off(worker: Worker) -> None:
    """A loop that is left early, and one that follows: the batch in hand at the break counts."""
    for batch in worker.batches(5, "search"):
        worker.touch("search", batch)
        if batch == 2:
            break
    for batch in worker.batches(2, "use"):
        worker.touch("use", batch)


def broken_off_inside(worker: Worker) -> None:
    """An inner loop that is left early in each epoch."""
    for epoch in worker.batches(3, "epochs"):
        for step in worker.batches(4, "steps"):
            worker.touch(epoch, step)
            if step == epoch:
                break
        worker.touch(epoch, "end")


def broken_off_twice(worker: Worker) -> None:
    """Both loops are left early, from the inner one; then another one follows."""
    for epoch in worker.batches(3, "epochs"):
        for step in worker.batches(3, "steps"):
            worker.touch(epoch, step)
            if (epoch, step) == (1, 1):
                break
        if epoch == 1:
            break
    for batch in worker.batches(2, "after"):
        worker.touch("after", batch)


def broken_off_at_the_end(worker: Worker) -> None:
    """The block ends after a break."""
    for batch in worker.batches(5):
        worker.touch(batch)
        if batch == 3:
            break


def without_batches(worker: Worker) -> None:
    """An empty loop between two others."""
    for name, count in (("a", 2), ("none", 0), ("b", 2)):
        for batch in worker.batches(count, name):
            worker.touch(name, batch)


def hand_written(worker: Worker) -> None:
    """A loop of the user's own, counted by `advance`."""
    done = worker.cursors.hand_written().done
    while done < 4:
        worker.touch(done)
        done = worker.advance()


def hand_written_and_loops(worker: Worker) -> None:
    """A loop, then a hand-written one, then another one."""
    for batch in worker.batches(2, "before"):
        worker.touch("before", batch)
    hand_written(worker)
    for batch in worker.batches(2, "after"):
        worker.touch("after", batch)


PROGRAMS = [
    one_loop,
    epochs,
    growing_epochs,
    siblings,
    nested_siblings,
    three_deep,
    broken_off,
    broken_off_inside,
    broken_off_twice,
    broken_off_at_the_end,
    without_batches,
    hand_written,
    hand_written_and_loops,
]


def attempt(program: Callable[[Worker], None], saved: Saved = FRESH, crash_at: int = -1) -> Worker:
    """Run a program until it ends or dies."""
    worker = Worker(saved, crash_at)
    try:
        program(worker)
    except Crash:
        return worker
    worker.cursors.close_left()
    worker.boundary()
    return worker


@pytest.mark.parametrize("program", PROGRAMS)
def test_resume_from_every_checkpoint_equals_undisturbed(program: Callable[[Worker], None]) -> None:
    """Each checkpoint that is ever taken, also an old one, leads to the same end."""
    undisturbed = attempt(program)
    for saved in undisturbed.saves:
        resumed = attempt(program, saved)
        assert resumed.saves[-1] == undisturbed.saves[-1]


@pytest.mark.parametrize("program", PROGRAMS)
def test_two_crashes_at_every_pair_of_points_equal_undisturbed(program: Callable[[Worker], None]) -> None:
    """Wherever it dies, and dies again on its way from there: the state is the same in the end."""
    undisturbed = attempt(program)
    for first in range(undisturbed.touches):
        crashed = attempt(program, crash_at=first)
        rest = attempt(program, crashed.saves[-1])
        assert rest.saves[-1] == undisturbed.saves[-1]
        for second in range(rest.touches):
            again = attempt(program, crashed.saves[-1], crash_at=second)
            assert attempt(program, again.saves[-1]).saves[-1] == undisturbed.saves[-1]


@pytest.mark.parametrize("program", [program for program in PROGRAMS if "broken" not in program.__name__])
def test_a_crash_costs_at_most_one_batch(program: Callable[[Worker], None]) -> None:
    """Every boundary, of an inner loop as well, is one where a checkpoint can be taken."""
    batch = 2 * 3  # the longest has two touches of three points to die at
    for point in range(attempt(program).touches):
        crashed = attempt(program, crash_at=point)
        assert crashed.touches - 3 * len(crashed.saves[-1][1]) // 2 <= batch


@pytest.mark.parametrize("program", PROGRAMS)
def test_a_finished_program_does_nothing_when_it_runs_again(program: Callable[[Worker], None]) -> None:
    """To compute a result again, the function is called with its loops done."""
    done = attempt(program)
    assert attempt(program, done.saves[-1]).touches == 0


@pytest.mark.parametrize("program", PROGRAMS)
def test_checkpoints_go_forward(program: Callable[[Worker], None]) -> None:
    """Progress of the outermost loops never shrinks from one checkpoint to the next."""
    done = [[mark.done for mark in marks[0]] if marks else [] for marks, _ in attempt(program).saves]
    assert done == sorted(done)


# --- what is refused -------------------------------------------------------------------------------------------------


def test_a_name_is_used_once_in_a_scope() -> None:
    """A second loop of one name could not be told from the first on resume; in another batch outside, or elsewhere, it can."""
    cursors = Cursors()
    loop, _ = cursors.open("x")
    inner, _ = cursors.open("x")  # nested: another scope
    cursors.finish(inner)
    with pytest.raises(UsageError, match="second loop named 'x'"):
        cursors.open("x")
    cursors.done(loop)
    cursors.open("x")


def test_a_name_is_used_once_after_resume_as_well() -> None:
    """The mark of the checkpoint is taken by the first loop of that name, and by that one alone."""
    cursors = Cursors(((Mark("x", 3, finished=True),),))
    loop, _ = cursors.open("x")
    assert loop.finished
    cursors.finish(loop)
    with pytest.raises(UsageError, match="second loop named 'x'"):
        cursors.open("x")


@pytest.mark.parametrize(("before", "now", "changed"), [(5, 5, False), (5, 6, True), (5, 4, True), (None, 5, False), (5, None, False)])
def test_another_length_is_another_input(before: int | None, now: int | None, changed: bool) -> None:
    """The length is compared where it was known then and is known now, and then kept."""
    cursors = Cursors(((Mark("x", 3, length=before),),))
    if changed:
        with pytest.raises(InputChangedError, match="it had 5 batches and now has") as raised:
            cursors.open("x", now)
        assert raised.value.loop == "x"
        return
    loop, _ = cursors.open("x", now)
    assert (loop.done, loop.length, loop.total) == (3, 5, 5)


def test_a_new_batch_outside_may_have_another_input_inside() -> None:
    """Only the inner loop that the checkpoint was made in is compared."""
    cursors = Cursors(((Mark("epochs", 1),), (Mark("steps", 2, length=5),)))
    epochs_loop, _ = cursors.open("epochs")
    cursors.open("steps", 5)
    cursors.done(epochs_loop)
    cursors.come_back(epochs_loop)
    assert cursors.open("steps", 9)[0].done == 0


def test_there_are_limits() -> None:
    """Depth and siblings end in an error that says what to do, not in a record that grows without end."""
    deep = Cursors()
    for depth in range(MAX_DEPTH):
        deep.open(f"d{depth}")
    with pytest.raises(UsageError, match=f"the limit is {MAX_DEPTH}"):
        deep.open("deeper")
    wide = Cursors()
    for sibling in range(MAX_SIBLINGS):
        wide.finish(wide.open(f"s{sibling}")[0])
    with pytest.raises(UsageError, match=f"more than {MAX_SIBLINGS} loops"):
        wide.open("one more")


# --- breaks ----------------------------------------------------------------------------------------------------------


def left_in_hand(cursors: Cursors, name: str = "x") -> Loop:
    """A loop that was left in the middle of its second batch."""
    loop, _ = cursors.open(name)
    cursors.done(loop)
    loop.in_hand = True
    cursors.leave(loop)
    return loop


def test_after_a_break_nothing_is_saved_until_it_is_clear_what_counts() -> None:
    """Nobody knows whether the batch in hand counts, until a loop follows: then it does."""
    cursors = Cursors()
    loop = left_in_hand(cursors)
    assert cursors.holds_back
    assert not cursors.is_open
    _, closed = cursors.open("y")
    assert closed
    assert not cursors.holds_back
    assert (loop.done, loop.finished) == (2, True)


@pytest.mark.parametrize("how", ["block", "advance"])
def test_the_end_of_the_block_and_advance_close_what_was_left(how: str) -> None:
    """They too make the batch in hand count."""
    cursors = Cursors()
    loop = left_in_hand(cursors)
    assert cursors.close_left() if how == "block" else cursors.hand_written()
    assert (loop.done, loop.finished, cursors.holds_back) == (2, True, False)
    assert not cursors.close_left()


def test_a_loop_of_an_earlier_attempt_is_not_closed_by_one_that_comes_before_it() -> None:
    """The marks wait until their loop begins, whatever begins first."""
    cursors = Cursors(((Mark("b", 2),),))
    first, closed = cursors.open("a")
    assert not closed
    cursors.finish(first)
    second, _ = cursors.open("b")
    assert (second.done, second.finished) == (2, False)


def test_a_block_inside_a_loop_closes_only_its_own_loops() -> None:
    """`close_left(depth)` leaves the loops around the block alone."""
    cursors = Cursors()
    outer, _ = cursors.open("outer")
    outer.in_hand = True
    inner = left_in_hand(cursors, "inner")
    assert cursors.close_left(1)
    assert (inner.finished, outer.finished, cursors.depth, outer.done) == (True, False, 1, 0)


def test_the_end_of_the_block_closes_what_somebody_still_holds_but_not_what_is_ahead() -> None:
    """An iterator that is kept alive is over as well; a loop of the checkpoint that this attempt has not come to is not."""
    cursors = Cursors(((Mark("kept", 1), Mark("ahead", 2)),))
    kept, _ = cursors.open("kept")
    kept.in_hand = True
    assert cursors.close_left()
    assert not cursors.is_open
    assert cursors.marks() == ((Mark("kept", 2, finished=True), Mark("ahead", 2)),)


def test_coming_back_to_a_loop_abandons_those_inside() -> None:
    """A loop that goes on while another one was opened inside of it; one that is over cannot."""
    cursors = Cursors()
    outer, _ = cursors.open("outer")
    inner, _ = cursors.open("inner")
    assert cursors.come_back(outer)
    assert cursors.innermost is outer
    assert not cursors.come_back(inner)


# --- where one is ----------------------------------------------------------------------------------------------------


def test_the_position_is_outer_to_inner() -> None:
    """Batches done per open loop; where none is open, of the last outermost one."""
    cursors = Cursors()
    assert (cursors.position, cursors.innermost, cursors.around) == ((), None, None)
    outer, _ = cursors.open("outer")
    cursors.done(outer)
    inner, _ = cursors.open("inner")
    cursors.done(inner, 3)
    assert (cursors.position, cursors.innermost, cursors.around, cursors.depth) == ((1, 3), inner, outer, 2)
    assert list(cursors.here) == [outer, inner]
    cursors.finish(inner)
    cursors.finish(outer)
    assert (cursors.position, cursors.is_open, list(cursors.here)) == ((1,), False, [outer])


def test_after_resume_here_is_what_this_attempt_has_come_past() -> None:
    """Loops of the checkpoint that were not opened again are ahead."""
    cursors = Cursors(((Mark("a", 2, finished=True), Mark("b", 1)),))
    assert not cursors.here
    loop, _ = cursors.open("a")
    cursors.finish(loop)
    assert list(cursors.here) == [loop]


def test_what_is_durable_counts_only_in_the_same_batch_outside() -> None:
    """A checkpoint of an earlier epoch says nothing about the steps of this one."""
    cursors = Cursors()
    outer, _ = cursors.open("epochs")
    inner, _ = cursors.open("steps")
    cursors.done(inner, 2)
    marks = cursors.marks()
    assert cursors.done_in(marks) == 2
    cursors.done(inner)
    assert cursors.done_in(marks) == 2
    cursors.finish(inner)
    cursors.done(outer)
    cursors.open("steps")
    assert cursors.done_in(marks) == 0
    assert cursors.done_in(()) == 0


def test_only_a_batch_in_hand_of_the_innermost_loop_is_in_hand() -> None:
    """That is where `save()` is refused."""
    cursors = Cursors()
    outer, _ = cursors.open("outer")
    outer.in_hand = True
    assert cursors.in_hand
    inner, _ = cursors.open("inner")
    assert not cursors.in_hand
    cursors.finish(inner)
    assert cursors.in_hand


def test_marks_keep_all_that_resuming_needs() -> None:
    """Name, batches done, whether it ended, length and fingerprint come back as they were."""
    marks: Marks = ((Mark("a", 2, finished=True, length=2, last="x"), Mark(HAND_WRITTEN, 7)), (Mark("c", 1, length=9),))
    assert Cursors(marks).marks() == marks
    assert [loop.name for loop in Cursors(marks).loops()] == ["a", HAND_WRITTEN, "c"]


def test_a_snapshot_stands_where_the_loops_stood() -> None:
    """What a record says of a crash is what an exception at that place would have said: past an inner loop, the outer batch."""
    cursors = Cursors()
    epochs, _ = cursors.open("epochs")
    for done in (1, 2, 3):
        steps, _ = cursors.open("steps")
        cursors.done(steps, 5)
        assert _snapshot(cursors).position == cursors.position == (done - 1, 5)
        cursors.finish(steps)
        if done < 3:
            cursors.done(epochs)
    cursors.leave(epochs)
    assert _snapshot(cursors).position == cursors.position == (2,)


def _snapshot(cursors: Cursors) -> Snapshot:
    return Snapshot(msgspec.Raw(b"{}"), loops=cursors.marks())
