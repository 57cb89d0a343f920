"""The handle: loops that go on where they were, saves that are never half of something, and clear refusals."""

from __future__ import annotations

import math
import random
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import ray

from faultguard import _handle
from faultguard._checkpointed import checkpointed
from faultguard._core.records import Ended, FailureRecord, Outcome
from faultguard._core.schedule import Schedule
from faultguard._handle import Checkpoint
from faultguard._session import TaskContext, entered
from faultguard.errors import (
    CheckpointNotSerializableError,
    CheckpointStoreError,
    InputChangedError,
    SupersededError,
    UsageError,
)
from faultguard.storage import Store, open_store
from faultguard.storage.memory import MemoryStore
from tests.attempts import Attempt, InlineWriter, Worker, run_to_the_end, write_inline

if TYPE_CHECKING:
    from pathlib import Path

Tick = Callable[[], None]
Body = Callable[[Checkpoint, Tick], None]
SEEDS = range(40)


@pytest.fixture(autouse=True)
def writer(monkeypatch: pytest.MonkeyPatch) -> InlineWriter:
    """What is due is written on the thread of the loop."""
    return write_inline(monkeypatch)


@pytest.fixture
def worker(tmp_path: Path) -> Worker:
    """A worker on the local disk."""
    return Worker(open_store(str(tmp_path)))


def no_tick() -> None:
    """Nothing happens."""


class Shards(Sequence[int]):
    """A sequence of the user's own: no slices, and it says what was read."""

    def __init__(self, items: list[int]) -> None:
        self.items = items
        self.read: list[int] = []

    def __getitem__(self, index: Any) -> Any:
        """One item."""
        if not isinstance(index, int):
            raise TypeError("no slices")
        item = self.items[index]
        self.read.append(index)
        return item

    def __len__(self) -> int:
        """How many."""
        return len(self.items)


class Loader:
    """A loader that can be told where to go on, as those of torchdata."""

    def __init__(self, items: list[int]) -> None:
        self.items = items
        self.position = 0

    def __iter__(self) -> Iterator[int]:
        """What is left."""
        while self.position < len(self.items):
            self.position += 1
            yield self.items[self.position - 1]

    def state_dict(self) -> dict[str, int]:
        """Where it is."""
        return {"position": self.position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go there."""
        self.position = state["position"]


# --- resume equals undisturbed --------------------------------------------------------------------------------------

ITEMS = [3, 1, 4, 1, 5]


def step(ckpt: Checkpoint, tick: Tick, item: int) -> None:
    """One batch; in the middle, the state has half of it."""
    tick()
    ckpt.state["sum"] += int(item)
    tick()
    ckpt.state["seen"].append([*ckpt.position, int(item)])
    tick()


def loop_over(make: Callable[[], Any]) -> Body:
    """One plain loop over an input that is made anew for every attempt."""

    def body(ckpt: Checkpoint, tick: Tick) -> None:
        for item in ckpt.batches(make()):
            step(ckpt, tick, item)

    return body


def tracked(ckpt: Checkpoint, tick: Tick) -> None:
    """A loader that restores itself."""
    loader = Loader(ITEMS)
    ckpt.track(loader=loader)
    for item in ckpt.batches(loader):
        step(ckpt, tick, item)


def nested(ckpt: Checkpoint, tick: Tick) -> None:
    """Epochs outside, steps inside, something between them."""
    for _ in ckpt.batches(range(3), name="epochs"):
        tick()
        for item in ckpt.batches(ITEMS, name="steps"):
            step(ckpt, tick, item)
        tick()


def three_deep(ckpt: Checkpoint, tick: Tick) -> None:
    """Loops in loops in loops."""
    for _ in ckpt.batches(range(2), name="a"):
        for _ in ckpt.batches(range(2), name="b"):
            for item in ckpt.batches(range(3), name="c"):
                step(ckpt, tick, item)


def following(ckpt: Checkpoint, tick: Tick) -> None:
    """One loop after another, one of them empty, one over what the first one has found."""
    for item in ckpt.batches(ITEMS, name="load"):
        step(ckpt, tick, item)
    for item in ckpt.batches([], name="nothing"):
        step(ckpt, tick, item)
    for item in ckpt.batches(ckpt.state.setdefault("found", [item for *_, item in ckpt.state["seen"]]), name="store"):
        step(ckpt, tick, item)


def following_inside(ckpt: Checkpoint, tick: Tick) -> None:
    """Two loops, one after the other, in each batch of a third one."""
    for _ in ckpt.batches(range(2), name="epochs"):
        for item in ckpt.batches(range(2), name="train"):
            step(ckpt, tick, item)
        for item in ckpt.batches(iter(range(3)), name="test"):
            step(ckpt, tick, item)


def leaves_inside(ckpt: Checkpoint, tick: Tick) -> None:
    """The inner loop is left early; what follows it belongs to the batch outside."""
    for _ in ckpt.batches(range(3), name="epochs"):
        for item in ckpt.batches(range(4), name="steps"):
            step(ckpt, tick, item)
            if item == ckpt.position[0]:
                break
        tick()


def leaves(ckpt: Checkpoint, tick: Tick) -> None:
    """A loop is left early, then comes another one."""
    for item in ckpt.batches(ITEMS, name="search"):
        step(ckpt, tick, item)
        if item == 4:
            break
    tick()
    for item in ckpt.batches(range(3), name="use"):
        step(ckpt, tick, item)


def leaves_last(ckpt: Checkpoint, tick: Tick) -> None:
    """The last loop is left early."""
    for item in ckpt.batches(ITEMS):
        step(ckpt, tick, item)
        if item == 4:
            break
    tick()


def advances(ckpt: Checkpoint, tick: Tick) -> None:
    """The body says itself when its batch is done, every second time."""
    for item in ckpt.batches(ITEMS):
        step(ckpt, tick, item)
        if item != 1:
            ckpt.advance()
        tick()


def waits(ckpt: Checkpoint, tick: Tick) -> None:
    """Every batch is durable before the next one."""
    for item in ckpt.batches(ITEMS):
        step(ckpt, tick, item)
        ckpt.advance(wait=True)
        tick()


def by_hand(ckpt: Checkpoint, tick: Tick) -> None:
    """A loop of the user's own."""
    while ckpt.current_batch < 5:
        step(ckpt, tick, ckpt.current_batch)
        ckpt.advance()
        tick()


def by_hand_after_break(ckpt: Checkpoint, tick: Tick) -> None:
    """A loop that is left early, then one of the user's own, with a count of its own."""
    for item in ckpt.batches(ITEMS, name="search"):
        step(ckpt, tick, item)
        if item == 4:
            break
    tick()
    while ckpt.state.setdefault("n", 0) < 3:
        step(ckpt, tick, ckpt.state["n"])
        ckpt.state["n"] += 1
        ckpt.advance(wait=ckpt.state["n"] == 2)


def in_blocks(ckpt: Checkpoint, tick: Tick) -> None:
    """Blocks on the task's own handle: inside of a batch, and with a loop in them."""
    with entered(TaskContext(ckpt)):
        for _ in ckpt.batches(range(3), name="epochs"):
            with checkpointed() as inner:
                for item in inner.batches(range(3), name="steps"):
                    step(ckpt, tick, item)
                    if item == 1:
                        break
            tick()
        with checkpointed() as inner:
            for item in inner.batches(range(3), name="more"):
                step(ckpt, tick, item)


def block_in_a_batch(ckpt: Checkpoint, tick: Tick) -> None:
    """A block without a loop ends while a batch is half done."""
    with entered(TaskContext(ckpt)):
        for item in ckpt.batches(ITEMS):
            ckpt.state["sum"] += 1
            with checkpointed() as same:
                same.state["sum"] += 1
            tick()
            step(ckpt, tick, item)


def random_numbers(ckpt: Checkpoint, tick: Tick) -> None:
    """A generator of random numbers that goes on where it was."""
    rng, bits = random.Random(7), np.random.default_rng(7)
    ckpt.track(rng=rng, bits=bits)
    for _ in ckpt.batches(range(4)):
        step(ckpt, tick, rng.randrange(100))
        step(ckpt, tick, int(bits.integers(100)))


def saves(ckpt: Checkpoint, tick: Tick) -> None:
    """Saves where it may, and prepares its state before the loop in a way that can be repeated."""
    ckpt.state.setdefault("prepared", 1)
    ckpt.save()
    tick()
    for item in ckpt.batches(ITEMS):
        step(ckpt, tick, item)
        ckpt.advance()
        ckpt.save()
        tick()
    ckpt.save(wait=True)
    tick()


def replaces_state(ckpt: Checkpoint, tick: Tick) -> None:
    """The state is another dict after every batch."""
    for item in ckpt.batches(ITEMS):
        step(ckpt, tick, item)
        ckpt.state = {**ckpt.state, "last": item}


BODIES: dict[str, Body] = {
    "list": loop_over(lambda: list(ITEMS)),
    "tuple": loop_over(lambda: tuple(ITEMS)),
    "range": loop_over(lambda: range(3, 13, 2)),
    "numpy": loop_over(lambda: np.array(ITEMS)),
    "deque": loop_over(lambda: deque(ITEMS)),
    "own sequence": loop_over(lambda: Shards(ITEMS)),
    "generator": loop_over(lambda: (item for item in ITEMS)),
    "callable": loop_over(lambda: lambda start: ITEMS[start:]),
    "tracked": tracked,
    "nested": nested,
    "three deep": three_deep,
    "following": following,
    "following inside": following_inside,
    "leaves inside": leaves_inside,
    "leaves": leaves,
    "leaves last": leaves_last,
    "advances": advances,
    "waits": waits,
    "by hand": by_hand,
    "by hand after break": by_hand_after_break,
    "in blocks": in_blocks,
    "block in a batch": block_in_a_batch,
    "random numbers": random_numbers,
    "saves": saves,
    "replaces state": replaces_state,
}


def fresh() -> dict[str, Any]:
    """The state to begin with."""
    return {"sum": 0, "seen": []}


def undisturbed(body: Body) -> tuple[dict[str, Any], int]:
    """The state without any death, in memory, and how many ticks that took."""
    ticks = 0

    def tick() -> None:
        nonlocal ticks
        ticks += 1

    ckpt = Checkpoint.in_memory(state=fresh())
    body(ckpt, tick)
    return ckpt.state, ticks


def check_every_point(name: str, store: Store, *, by_exception: bool) -> None:
    """Die at one point after the other."""
    expected, ticks = undisturbed(BODIES[name])
    for point in range(1, ticks + 1):
        worker = Worker(store, f"{name} {point} {by_exception}")
        assert run_to_the_end(worker, BODIES[name], {point}, state=fresh(), by_exception=by_exception) == expected, f"died at tick {point}"


@pytest.mark.parametrize("by_exception", [False, True], ids=["death", "exception"])
@pytest.mark.parametrize("name", BODIES)
def test_resumed_at_every_point_is_undisturbed(name: str, by_exception: bool) -> None:
    """Wherever the task dies or raises, with half of a batch in the state, the result is that of an undisturbed run (G9)."""
    check_every_point(name, MemoryStore(), by_exception=by_exception)


@pytest.mark.parametrize("name", ["by hand", "leaves"])
def test_resumed_from_the_disk_is_undisturbed(name: str, tmp_path: Path) -> None:
    """The same on a real disk."""
    store = open_store(str(tmp_path))
    check_every_point(name, store, by_exception=False)
    check_every_point(name, store, by_exception=True)


@pytest.mark.parametrize("name", BODIES)
def test_rare_saves_resume_undisturbed(name: str) -> None:
    """The same with several deaths, where only some boundaries are encoded and only some of those are written."""
    expected, ticks = undisturbed(BODIES[name])
    for seed in SEEDS:
        rng = random.Random(f"{name} {seed}")
        points = {rng.randint(1, 2 * ticks) for _ in range(3)}
        worker = Worker(MemoryStore())
        found = run_to_the_end(worker, BODIES[name], points, state=fresh(), rng=rng, by_exception=rng.random() < 0.5)
        assert found == expected, f"seed {seed}: died at {points}"


def test_a_seed_replays_its_saves() -> None:
    """The random schedule is a function of its seed, so a failure above can be replayed."""
    found = []
    for _ in range(2):
        worker = Worker(MemoryStore())
        run_to_the_end(worker, nested, {7, 23}, state=fresh(), rng=random.Random(3))
        found.append([(record.kind, record.snapshot.position if record.snapshot else None) for record in worker.records()])
    assert found[0] == found[1]


def test_work_that_is_done_is_not_done_again(worker: Worker) -> None:
    """After a death the loop goes on at the first batch that is not in the last checkpoint, not earlier."""
    started: list[int] = []
    attempt = worker.attempt()
    for item in attempt.ckpt.batches(range(10)):
        started.append(item)
        if item == 6:
            break
    attempt.die()
    started += worker.attempt().ckpt.batches(range(10))
    assert started == [0, 1, 2, 3, 4, 5, 6, 6, 7, 8, 9]


def test_a_sequence_is_indexed_not_read(worker: Worker) -> None:
    """What is done is not read again, but for the one batch by which the input is known again."""
    take(worker.attempt(), Shards(ITEMS), 3)
    shards = Shards(ITEMS)
    assert list(worker.attempt().ckpt.batches(shards)) == ITEMS[3:]
    assert shards.read == [2, 3, 4]


def test_a_callable_is_asked_for_the_rest(worker: Worker) -> None:
    """A callable gets the number of batches done, with the state restored: it may use a key that it kept there."""
    attempt = worker.attempt(state={"key": 0})

    def rows(start: int) -> Iterator[int]:
        assert start == attempt.ckpt.state["key"]
        yield from range(start, 6)

    for row in attempt.ckpt.batches(rows):
        attempt.ckpt.state["key"] = row + 1
        if row == 3:
            break
    attempt.die()
    attempt = worker.attempt(state={"key": 0})
    assert list(attempt.ckpt.batches(rows)) == [3, 4, 5]


def test_a_finished_loop_yields_nothing(worker: Worker) -> None:
    """A loop that is done is not begun again: not even its input is asked for."""
    attempt = worker.attempt()
    assert list(attempt.ckpt.batches(range(3), name="first")) == [0, 1, 2]
    take(attempt, range(5), 2, name="second")

    def never(start: int) -> Iterable[int]:
        raise AssertionError(start)

    again = worker.attempt().ckpt
    assert list(again.batches(never, name="first")) == []
    assert list(again.batches(range(5), name="second")) == [2, 3, 4]


def test_an_inner_loop_begins_anew_with_each_outer_batch() -> None:
    """Every epoch has all its steps; in memory as well."""
    ckpt = Checkpoint.in_memory()
    seen = [(epoch, step, ckpt.position) for epoch in ckpt.batches(range(2), name="e") for step in ckpt.batches(range(2), name="s")]
    assert seen == [(0, 0, (0, 0)), (0, 1, (0, 1)), (1, 0, (1, 0)), (1, 1, (1, 1))]


def test_reading_and_dropping_is_announced(worker: Worker, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """When it takes long to drop what is done, one warning says so, and what to pass instead."""
    take(worker.attempt(), iter(range(5)), 4)
    monkeypatch.setattr(_handle, "SLOW_SKIP_S", -1.0)
    assert list(worker.attempt().ckpt.batches(iter(range(5)))) == [4]
    assert len([record for record in caplog.records if vars(record)["event"] == "faultguard.slow_skip"]) == 1
    assert "'task/w0' reads and drops the first 4 batches of 'batches'" in caplog.text
    assert "callable fn(start)" in caplog.text


def take(attempt: Attempt, items: Any, n: int, *, name: str = "batches") -> None:
    """Do `n` batches, begin the next one, and die."""
    for _ in attempt.ckpt.batches(items, name=name):
        if attempt.ckpt.current_batch == n:
            break
    attempt.die()


# --- inputs that are refused ----------------------------------------------------------------------------------------


def named(name: str, module: str, **attributes: Any) -> Any:
    """A stand-in for a type of a package that is not installed here."""
    return type(name, (), {"__module__": module, "__iter__": lambda _: iter(()), **attributes})()


@pytest.mark.parametrize(
    ("iterable", "text"),
    [
        ("text", "batches(str) is refused: its batches would be single characters; pass a list of items, such as text.splitlines()"),
        (b"bytes", "batches(bytes) is refused: its batches would be single characters"),
        (bytearray(b"bytes"), "batches(bytearray) is refused"),
        ({1, 2}, "batches(set) is refused: a set has another order in every process; pass sorted(items)"),
        (frozenset("ab"), "batches(frozenset) is refused"),
        ({"a": 1}, "batches(dict) is refused: a mapping gives only its keys; pass list(mapping.items())"),
        (named("DataFrame", "pandas.core.frame"), "batches(DataFrame) is refused: a data frame gives only the names of its columns"),
        (named("LazyFrame", "polars.lazyframe"), "pass a range over its rows, or a list of slices"),
        (named("Dataset", "ray.data.dataset"), "batches(Dataset) is refused: a Ray Dataset has no fixed order of batches"),
        (named("MaterializedDataset", "ray.data.dataset"), "pass a list of files"),
        (np.zeros((2, 3)), "batches(ndarray) is refused: an array of 2 dimensions is ambiguous; pass range(len(array)), or list(array)"),
        (np.array(5), "batches(ndarray) is refused: an array of 0 dimensions"),
        (7, "batches(int) is refused: it is no iterable; pass a sequence, an iterable, or a callable fn(start)"),
        (None, "batches(NoneType) is refused: it is no iterable"),
    ],
    ids=lambda value: type(value).__name__ if not isinstance(value, str) or value == "text" else "",
)
def test_inputs_that_cannot_be_resumed_are_refused(iterable: Any, text: str) -> None:
    """What has no batches, or none in a fixed order, is refused at the call, with the way out."""
    with pytest.raises(UsageError) as caught:
        Checkpoint.in_memory().batches(iterable)
    assert text in str(caught.value)


def test_a_series_is_read_by_position(worker: Worker) -> None:
    """The Series of pandas is indexed by label: it is read and dropped, never indexed."""

    def refuse(*_: object) -> None:
        raise AssertionError("indexed by label")

    def series() -> Any:
        return named("Series", "pandas.core.series", shape=(3,), iloc=None, __getitem__=refuse, __iter__=lambda _: iter(ITEMS))

    take(worker.attempt(), series(), 3)
    assert list(worker.attempt().ckpt.batches(series())) == ITEMS[3:]


@pytest.mark.parametrize("name", ["", None, 3])
def test_a_loop_needs_a_name(name: Any) -> None:
    """A loop is known by its name, which is a text."""
    with pytest.raises(UsageError, match="of a loop is refused; it takes a non-empty str"):
        Checkpoint.in_memory().batches([1], name=name)


def test_a_name_is_used_once_in_a_scope() -> None:
    """Two loops of one name could not be told apart on resume."""
    ckpt = Checkpoint.in_memory()
    assert list(ckpt.batches([1])) == [1]
    with pytest.raises(UsageError, match=r"a second loop named 'batches' begins in the same scope.*name=\"second\""):
        list(ckpt.batches([2]))


def test_loops_do_not_nest_without_end() -> None:
    """There is a limit to everything, and the text says what it is."""
    ckpt = Checkpoint.in_memory()

    def dive(depth: int) -> None:
        for _ in ckpt.batches([0], name=f"loop {depth}"):
            dive(depth + 1)

    with pytest.raises(UsageError, match="nested 17 deep, the limit is 16"):
        dive(0)


# --- the memory of the input ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("before", "after", "text"),
    [
        (lambda: [1, 2, 3, 4], lambda: [1, 2, 3], "it had 4 batches and now has 3"),
        (lambda: [1, 2, 3, 4], lambda: [1, 2, 3, 4, 5], "it had 4 batches and now has 5"),
        (lambda: np.arange(4), lambda: np.arange(8), "it had 4 batches and now has 8"),
        (lambda: [1, 2, 3, 4], lambda: [1, 9, 3, 4], "its batch 1 was v:"),
        (lambda: ["a", "b", "c"], lambda: ["b", "a", "c"], "its batch 1 was v:"),
        (lambda: [[1, 2], [3, 4], [5]], lambda: [[1, 2, 3], [4, 5], [6]], None),
        (lambda: [[1], [3, 4], [5]], lambda: [[1], [3, 4, 5], [6]], "its batch 1 was t:list:2 and is t:list:3"),
        (lambda: iter([1, 2, 3, 4]), lambda: iter([1, 9, 3, 4]), "its batch 1 was v:"),
        (lambda: iter([1, 2, 3, 4]), lambda: iter([1]), "it ends after 1 batches"),
        (lambda: iter([1, 2, 3, 4]), lambda: [1], "it has only 1 batches"),
        (lambda: iter([1, 2, 3, 4]), lambda: [1, 2, 3, 4], None),
        (lambda: lambda start: [1, 2, 3, 4][start:], lambda: lambda start: [1, 9, 8, 7][start:], None),
    ],
    ids=[
        "shorter",
        "longer",
        "longer array",
        "changed",
        "shuffled",
        "equal length",
        "chunk size",
        "changed generator",
        "shortened generator",
        "shorter list",
        "same as list",
        "callable",
    ],
)
def test_another_input_is_noticed(worker: Worker, before: Callable[[], Any], after: Callable[[], Any], text: str | None) -> None:
    """A length, or a last finished batch, that differs from the checkpoint's is an error; what cannot be seen is not."""
    take(worker.attempt(), before(), 2)
    attempt = worker.attempt()
    if text is None:
        assert len(list(attempt.ckpt.batches(after()))) in {1, 2}
        return
    with pytest.raises(InputChangedError) as caught:
        list(attempt.ckpt.batches(after()))
    assert text in str(caught.value)
    assert "loop 'batches' resumes after 2 batches, but its input is another one" in str(caught.value)
    assert caught.value.loop == "batches"


def test_the_input_of_a_finished_loop_is_remembered(worker: Worker) -> None:
    """A listing that grew after its loop was done is told, not left out in silence."""
    attempt = worker.attempt()
    assert list(attempt.ckpt.batches(["a", "b"])) == ["a", "b"]
    attempt.die()
    with pytest.raises(InputChangedError, match="it had 2 batches and now has 3"):
        list(worker.attempt().ckpt.batches(["a", "b", "c"]))


@pytest.mark.parametrize("make", [lambda: [{"text": "a"} for _ in range(4)], lambda: iter([[1], [2], [3], [4]])], ids=["dicts", "lists"])
def test_a_batch_may_be_changed_by_the_body(worker: Worker, make: Callable[[], Any]) -> None:
    """A body that fills its batch, a common thing, does not make the input another one."""
    attempt = worker.attempt()
    for batch in attempt.ckpt.batches(make()):
        if isinstance(batch, dict):
            batch["vector"] = [1.0]
        else:
            batch.clear()
        if attempt.ckpt.current_batch == 2:
            break
    attempt.die()
    assert len(list(worker.attempt().ckpt.batches(make()))) == 2


def test_the_outer_input_is_known_by_its_finished_batch(worker: Worker) -> None:
    """A save inside an outer batch that is in hand remembers the outer batch before it."""
    attempt = worker.attempt(every=10**6)  # one snapshot at the first boundary
    ckpt = attempt.ckpt
    for epoch in ckpt.batches(["a", "b", "c"], name="epochs"):
        for number in ckpt.batches(range(3), name="steps"):
            if (epoch, number) == ("b", 1):
                ckpt.advance()
                ckpt.save(wait=True)
                break
        if epoch == "b":
            break
    attempt.die()
    again = worker.attempt().ckpt
    rest = [(epoch, list(again.batches(range(3), name="steps"))) for epoch in again.batches(["a", "b", "c"], name="epochs")]
    assert rest == [("b", [2]), ("c", [0, 1, 2])]


# --- how a loop is left ---------------------------------------------------------------------------------------------


def test_after_break_nothing_newer_is_saved(worker: Worker) -> None:
    """Until it is known what follows, a batch that was left by `break` neither counts nor is it lost."""
    attempt = worker.attempt(state={"n": 0})
    for _ in attempt.ckpt.batches(range(5)):
        attempt.ckpt.state["n"] += 1
        if attempt.ckpt.current_batch == 2:
            break
    assert attempt.ckpt.durable_batch == 2
    with pytest.raises(UsageError, match=r"save\(\) after a loop that was left early is refused"):
        attempt.ckpt.save()
    attempt.die()
    again = worker.attempt(state={"n": 0}).ckpt
    assert again.state == {"n": 2}
    assert list(again.batches(range(5))) == [2, 3, 4]


def test_a_loop_that_was_left_is_not_saved_as_open(worker: Worker) -> None:
    """Also if its last batch was done: on resume it would go on, and it is over as soon as something follows."""
    attempt = worker.attempt(state={"n": 0})
    for _ in attempt.ckpt.batches(range(5)):
        attempt.ckpt.advance()
        break
    with pytest.raises(UsageError, match=r"save\(\) after a loop that was left early is refused"):
        attempt.ckpt.save(wait=True)
    for _ in attempt.ckpt.batches(range(2), name="following"):
        break
    attempt.die()
    assert list(worker.attempt().ckpt.batches(range(5))) == []


def test_a_loop_inside_of_a_batch_that_is_done_is_refused(worker: Worker) -> None:
    """On resume the batch around it would not come again, and the rest of the inner loop would be lost."""
    ckpt = worker.attempt().ckpt
    for _ in ckpt.batches(range(3)):
        ckpt.advance()
        with pytest.raises(UsageError, match=r"loop 'steps' is refused: loop 'batches' around it has no batch in hand"):
            next(iter(ckpt.batches(range(3), name="steps")))
        break


def test_a_loop_after_one_whose_iterator_lives_on_says_so(worker: Worker) -> None:
    """The library cannot see that a loop was left while its iterator is kept: the text says what to write."""
    ckpt = worker.attempt().ckpt
    kept = ckpt.batches(range(3))
    for _ in kept:
        ckpt.advance()
        break
    with pytest.raises(UsageError, match=r"its iterator was kept alive: write batches\(\) into the `for` statement"):
        next(iter(ckpt.batches(range(3), name="second")))


def test_past_an_inner_loop_the_position_is_of_the_outer_one(worker: Worker) -> None:
    """An exception after the steps of an epoch is a failure of that epoch, not of a step that does not exist."""
    ckpt = worker.attempt().ckpt

    def fails() -> None:
        for epoch in ckpt.batches(range(5), name="epochs"):
            for _ in ckpt.batches(range(10), name="steps"):
                pass
            if epoch == 2:
                raise ValueError("planned")

    with pytest.raises(ValueError, match="planned"):
        fails()
    assert (ckpt.position, ckpt.current_batch) == ((2,), 2)


def test_where_a_nested_loop_was_left(worker: Worker) -> None:
    """After an exception, and in the next attempt before any loop is opened, batch and position are those of the inner loop."""
    attempt = worker.attempt()

    def fails() -> None:
        for _ in attempt.ckpt.batches(range(3), name="epochs"):
            for _ in attempt.ckpt.batches(range(4), name="steps"):
                if attempt.ckpt.position == (1, 2):
                    raise ValueError("planned")

    with pytest.raises(ValueError, match="planned"):
        fails()
    assert (attempt.ckpt.position, attempt.ckpt.current_batch) == ((1, 2), 2)
    attempt.die()
    again = worker.attempt().ckpt
    assert (again.position, again.current_batch) == ((1, 2), 2)


def test_a_following_loop_closes_one_that_was_left(worker: Worker) -> None:
    """When the next loop starts, the one that was left by `break` is over, its batch in hand done."""
    attempt = worker.attempt(state={"n": 0})
    for _ in attempt.ckpt.batches(range(5), name="first"):
        attempt.ckpt.state["n"] += 1
        if attempt.ckpt.current_batch == 2:
            break
    next(iter(attempt.ckpt.batches(range(5), name="second")))
    attempt.die()
    again = worker.attempt(state={"n": 0}).ckpt
    assert again.state == {"n": 3}
    assert list(again.batches(range(5), name="first")) == []
    assert list(again.batches(range(5), name="second")) == [0, 1, 2, 3, 4]


def test_the_end_of_the_body_closes_a_loop_that_was_left(worker: Worker) -> None:
    """`break`, or `return` inside of the loop, and no exception: the batch in hand is done, and the loop is over."""
    attempt = worker.attempt(state={"n": 0})

    def body(ckpt: Checkpoint) -> int | None:
        for item in ckpt.batches(range(5)):
            ckpt.state["n"] += 1
            if item == 2:
                return item
        return None

    assert body(attempt.ckpt) == 2
    assert attempt.complete() == {"n": 3}
    end = worker.records()[-1]
    assert end.kind == "end"
    assert end.snapshot is not None
    assert [(mark.done, mark.finished) for scope in end.snapshot.loops for mark in scope] == [(3, True)]


def test_an_exception_leaves_the_batch_not_done(worker: Worker) -> None:
    """The batch that raised runs again, on the state before it, of which nothing half-done was kept."""
    attempt = worker.attempt(state={"a": [], "b": []})

    def body(ckpt: Checkpoint) -> None:
        for item in ckpt.batches(range(4)):
            ckpt.state["a"].append(item)
            if item == 2:
                raise ValueError("half-way")
            ckpt.state["b"].append(item)

    with pytest.raises(ValueError, match="half-way"):
        body(attempt.ckpt)
    attempt.fail()
    again = worker.retry(attempt).ckpt
    assert again.state == {"a": [0, 1], "b": [0, 1]}
    assert list(again.batches(range(4))) == [2, 3]


def test_a_loop_begins_before_anything_is_saved_anew(worker: Worker) -> None:
    """A failure in the first batch starts again at the first batch, on the default state."""
    attempt = worker.attempt(state={"n": 0})
    for _ in attempt.ckpt.batches(range(4)):
        attempt.ckpt.state["n"] += 1
        break
    attempt.fail()
    again = worker.retry(attempt, state={"n": 0}).ckpt
    assert again.state == {"n": 0}
    assert not again.resumed
    assert list(again.batches(range(4))) == [0, 1, 2, 3]


def test_an_inner_loop_that_was_left_belongs_to_the_outer_batch(worker: Worker) -> None:
    """`break` inside counts with the batch outside."""
    attempt = worker.attempt()
    for _ in attempt.ckpt.batches(range(3), name="outer"):
        for _ in attempt.ckpt.batches(range(3), name="inner"):
            break
    assert attempt.ckpt.current_batch == attempt.ckpt.durable_batch == 3


def test_an_iterator_that_is_kept_open_is_closed_by_the_end(worker: Worker) -> None:
    """A loop that was left, whose generator somebody still holds, is over when the body is."""
    attempt = worker.attempt()
    batches = attempt.ckpt.batches(range(5))
    assert next(batches) == 0
    attempt.complete()
    snapshot = worker.records()[-1].snapshot
    assert snapshot is not None
    assert snapshot.loops[0][0].finished
    assert snapshot.position == (1,)


# --- advance and save -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [0, -1, True, 1.5, "2"])
def test_advance_takes_a_number(n: Any) -> None:
    """A number of batches that is none is refused."""
    with pytest.raises(UsageError, match=r"advance\(.*\) is refused; it takes a number of batches, at least 1"):
        Checkpoint.in_memory().advance(n)


def test_advance_in_a_loop_is_for_the_batch_in_hand() -> None:
    """In `batches` there is one batch in hand; it can be done once."""
    ckpt = Checkpoint.in_memory()
    for _ in ckpt.batches(range(2)):
        with pytest.raises(UsageError, match=r"advance\(2\) is refused: a batches\(\) loop has one batch in hand"):
            ckpt.advance(2)
        ckpt.advance()
        with pytest.raises(UsageError, match=r"advance\(\) is refused: the batch in hand is done already"):
            ckpt.advance()
    assert ckpt.current_batch == 2


def test_hand_written_loops_count_as_they_are_told(worker: Worker) -> None:
    """Outside of `batches`, `advance(n)` counts n batches, over the attempts."""
    attempt = worker.attempt()
    attempt.ckpt.advance(3)
    attempt.ckpt.advance()
    attempt.die()
    again = worker.attempt().ckpt
    assert again.current_batch == 4
    again.advance(2)
    assert again.current_batch == again.durable_batch == 6


def test_advance_wait_is_durable(tmp_path: Path) -> None:
    """When `advance(wait=True)` returns, the batch is on the disk, whatever the schedule says."""
    worker = Worker(open_store(str(tmp_path)))
    attempt = worker.attempt(every=10**6)
    for item in attempt.ckpt.batches(range(3)):
        attempt.ckpt.state["n"] = item
        attempt.ckpt.advance(wait=True)
        newest = worker.records()[-1].snapshot
        assert newest is not None
        assert newest.batch == attempt.ckpt.durable_batch == item + 1
        assert bytes(newest.state) == b'{"n":%d}' % item


def test_advance_tells_when_the_store_fails_for_too_long(worker: Worker, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was to be durable, and is not after the patience with the store, raises where it was waited for."""
    worker.patience_s = 0.1
    attempt = worker.attempt()
    monkeypatch.setattr(worker.store, "create", broken_create)
    attempt.ckpt.advance()
    with pytest.raises(CheckpointStoreError, match="the disk is full"):
        attempt.ckpt.advance(wait=True)


def broken_create(key: str, data: bytes) -> bool:
    """A store that takes nothing."""
    raise CheckpointStoreError("the disk is full")


def test_save_is_refused_in_the_middle_of_a_batch(worker: Worker) -> None:
    """A snapshot of half a batch would count it twice; the text says what to do."""
    ckpt = worker.attempt().ckpt
    ckpt.save()
    for _ in ckpt.batches(range(2), name="outer"):
        for _ in ckpt.batches(range(2), name="inner"):
            with pytest.raises(UsageError, match=r"Call advance\(\) first if the batch is done, or leave saving to batches\(\)"):
                ckpt.save(wait=True)
            ckpt.advance()
            ckpt.save()
        with pytest.raises(UsageError, match="in the middle of a batch"):
            ckpt.save()
    ckpt.save(wait=True)


def test_save_writes_at_once(worker: Worker) -> None:
    """`save()` does not wait for its turn: the newest snapshot goes to the store now, beside the loop."""
    attempt = worker.attempt(every=10**6)
    attempt.ckpt.state["n"] = 1
    attempt.ckpt.save()
    newest = worker.records()[-1].snapshot
    assert newest is not None
    assert bytes(newest.state) == b'{"n":1}'


def test_save_is_not_put_off_by_what_is_due_later(worker: Worker) -> None:
    """A write that is due in an hour does not hold back one that was asked for now."""
    attempt = worker.attempt()
    snapshot = attempt.ckpt.finish()
    attempt.journal.offer(snapshot, time.monotonic() + 3600)
    attempt.ckpt.save()
    assert worker.records()[-1].kind == "save"


# --- what the user reads --------------------------------------------------------------------------------------------


def test_the_handle_says_where_it_is(worker: Worker) -> None:
    """Batch, position and what is durable, before, in, between and after the loops."""
    attempt = worker.attempt()
    ckpt = attempt.ckpt
    assert (ckpt.current_batch, ckpt.position, ckpt.durable_batch, ckpt.resumed, ckpt.attempt) == (0, (), 0, False, 1)
    for _ in ckpt.batches(range(2), name="outer"):
        for number in ckpt.batches(range(3), name="inner"):
            assert (ckpt.current_batch, ckpt.position[1], ckpt.durable_batch) == (number, number, number)
        assert len(ckpt.position) == 1
    assert (ckpt.current_batch, ckpt.position, ckpt.durable_batch) == (2, (2,), 2)
    attempt.die()
    again = worker.attempt().ckpt
    assert (again.current_batch, again.position, again.resumed, again.attempt) == (2, (2,), True, 2)
    assert again.token > ckpt.token
    assert [failure.cause for failure in again.failures] == ["crash"]


def test_the_default_state_is_copied(worker: Worker) -> None:
    """What is passed as state is nobody's state: neither changed, nor seen through."""
    default: dict[str, Any] = {"rows": []}
    ckpt = worker.attempt(state=default).ckpt
    ckpt.state["rows"].append(1)
    assert default == {"rows": []}
    default["rows"].append(2)
    assert ckpt.state == {"rows": [1]}


def test_the_default_state_is_not_used_when_something_is_saved(worker: Worker) -> None:
    """The state of the checkpoint is the state."""
    attempt = worker.attempt(state={"n": 1})
    attempt.ckpt.state = {"other": 2}
    attempt.ckpt.save(wait=True)
    attempt.die()
    assert worker.attempt(state={"n": 1}).ckpt.state == {"other": 2}


@pytest.mark.parametrize("state", [[], None, 7])
def test_a_state_is_a_dict(state: Any) -> None:
    """Another state is refused where it is set, with what to write."""
    ckpt = Checkpoint.in_memory()
    with pytest.raises(UsageError, match=r"state must be a dict, not .*; write ckpt.state\['value'\] = ..."):
        ckpt.state = state
    with pytest.raises(UsageError, match=r"state=7 is refused; it takes a dict"):
        Checkpoint.in_memory(state=7)  # type: ignore[arg-type]


def test_the_first_boundary_tells_what_cannot_be_saved(worker: Worker) -> None:
    """A state that cannot be recorded stops the loop after its first batch, and the path says where it is (G7)."""
    ckpt = worker.attempt().ckpt
    batches = ckpt.batches(range(10))
    assert next(batches) == 0
    ckpt.state["opt"] = [1, 2, 3, object()]
    with pytest.raises(CheckpointNotSerializableError) as caught:
        next(batches)
    assert caught.value.path == 'state["opt"][3]'


def test_the_first_boundary_tells_in_memory_as_well() -> None:
    """A unit test without a store finds out, too: in a loop, by hand, and at a save."""
    ckpt = Checkpoint.in_memory(state={"x": 1})
    ckpt.state["x"] = {1, 2, len}
    for call in (ckpt.advance, ckpt.save, ckpt.finish):
        with pytest.raises(CheckpointNotSerializableError) as caught:
            call()
        assert caught.value.path.startswith('state["x"]')


def test_what_is_tracked_is_named_in_the_path() -> None:
    """A tracked object whose state cannot be recorded is named."""
    ckpt = Checkpoint.in_memory()
    ckpt.track(model=(lambda: {"w": object()}, print))
    with pytest.raises(CheckpointNotSerializableError) as caught:
        ckpt.save()
    assert caught.value.path == 'tracked["model"]["w"]'


def test_a_reference_in_the_state_is_a_footgun() -> None:
    """An ObjectRef may name nothing when the task resumes: the text says so, and what to do."""
    ckpt = Checkpoint.in_memory()
    ckpt.state["ref"] = ray.ObjectRef(b"\1" * 28)
    with pytest.raises(CheckpointNotSerializableError) as caught:
        ckpt.save()
    assert caught.value.path == 'state["ref"]'
    assert "the object it names may be gone when the task resumes. Store the value (ray.get), or pass the ref" in str(caught.value)


def test_a_default_state_that_cannot_be_saved_is_refused_at_once() -> None:
    """Before the body runs."""
    with pytest.raises(CheckpointNotSerializableError, match=r'state\["f"\]'):
        Checkpoint.in_memory(state={"f": print})


# --- idempotency keys -----------------------------------------------------------------------------------------------


def keys_of(ckpt: Checkpoint) -> Iterator[tuple[str, str]]:
    """The key wherever one may be asked for, with the name of the place."""
    yield "before", ckpt.idempotency_key()
    for number in ckpt.batches(range(3), name="load"):
        yield f"load {number}", ckpt.idempotency_key()
    yield "between", ckpt.idempotency_key()
    for epoch in ckpt.batches(range(2), name="store"):
        yield f"store {epoch}", ckpt.idempotency_key()
        for number in ckpt.batches(range(2), name="a/b"):
            yield f"a/b {epoch} {number}", ckpt.idempotency_key()
        for number in ckpt.batches(range(2), name="a"):
            yield f"a {epoch} {number}", ckpt.idempotency_key()
            if number == 0:
                break
    yield "after", ckpt.idempotency_key()


def test_every_place_has_a_key_of_its_own() -> None:
    """No two batches have the same key, whatever their loops are called."""
    keys = dict(keys_of(Checkpoint.in_memory()))
    assert len(set(keys.values())) == len(keys) == 14
    assert keys["load 1"] == "memory/direct/direct/1/load:1"
    assert keys["a/b 1 0"] == "memory/direct/direct/1/store:1/a%2Fb:0"


def test_batches_of_a_hand_written_loop_have_keys(worker: Worker) -> None:
    """They differ from batch to batch, and are the same after a death."""
    attempt = worker.attempt()
    keys = []
    for _ in range(3):
        keys.append(attempt.ckpt.idempotency_key())
        attempt.ckpt.advance()
    last = attempt.ckpt.idempotency_key()
    attempt.die()
    assert len({*keys, last}) == 4
    assert worker.attempt().ckpt.idempotency_key() == last


def test_a_key_is_the_same_in_every_attempt() -> None:
    """Wherever an attempt died, the next one has the same keys for the same places."""
    expected = dict(keys_of(Worker(MemoryStore()).attempt().ckpt))
    for stop in expected:
        worker = Worker(MemoryStore())
        attempt = worker.attempt()
        for place, key in keys_of(attempt.ckpt):
            assert key == expected[place]
            if place == stop:
                break
        attempt.die()
        found = dict(keys_of(worker.attempt().ckpt))
        assert found == {place: expected[place] for place in found}, f"died at {stop}"


def test_keys_differ_by_suffix_and_worker() -> None:
    """One batch may have several commits, and other workers have other keys."""
    ckpt = Checkpoint.in_memory(worker_id="a/b")
    assert ckpt.idempotency_key("row 1") != ckpt.idempotency_key("row 2") != ckpt.idempotency_key()
    assert ckpt.idempotency_key() != Checkpoint.in_memory(worker_id="a%2Fb").idempotency_key()


def test_a_new_life_has_new_keys() -> None:
    """New work under the id of a completed worker commits anew."""
    store = MemoryStore()
    first = Worker(store).attempt()
    key = first.ckpt.idempotency_key()
    first.complete()
    assert Worker(store).attempt().ckpt.idempotency_key() != key


# --- superseded, and over -------------------------------------------------------------------------------------------


class Drowsy(Schedule):
    """Looks at nothing unless it is woken."""

    def boundary(self, now: float, batches: int = 1) -> bool:
        """Sleep on."""
        self.look_at = math.inf
        return False


@pytest.mark.parametrize("schedule", [Schedule(1, 0.0), Drowsy("auto", 0.0)], ids=["busy", "drowsy"])
def test_a_swallowed_supersession_is_raised_again(worker: Worker, schedule: Schedule) -> None:
    """The body cannot get past it: each later boundary raises it again, its batch does not count, and nothing is written."""
    old = worker.attempt(state={"n": 0}, schedule=schedule).ckpt
    swallowed = []

    def inside(outer: int) -> None:
        for inner in old.batches(range(3), name="inner"):
            old.state["n"] += 1
            if (outer, inner) == (1, 1):
                worker.attempt()
                with pytest.raises(SupersededError):
                    old.check()

    def body() -> None:
        for outer in old.batches(range(3), name="outer"):
            try:
                inside(outer)
            except SupersededError as error:
                swallowed.append((outer, old.position, error.token))

    with pytest.raises(SupersededError):  # by the outer loop itself, at last
        body()
    assert swallowed == [(1, (1,), old.token)]
    assert old.state["n"] == 5
    numbers = worker.numbers()
    assert worker.record(numbers[-1]).kind == "claim"
    with pytest.raises(SupersededError, match=r"worker 'w0' attempt 1 \(token 1\) was replaced by a later attempt; its writes are ignored"):
        old.advance(wait=True)
    with pytest.raises(SupersededError):
        old.save(wait=True)
    assert worker.numbers() == numbers


def test_check_is_quiet_while_nobody_is_above(worker: Worker) -> None:
    """`check` costs a listing and says nothing."""
    attempt = worker.attempt()
    attempt.ckpt.check()
    worker.attempt()
    with pytest.raises(SupersededError, match="Stop this loop; nothing is lost"):
        attempt.ckpt.check()


def test_a_handle_is_refused_after_its_end(worker: Worker) -> None:
    """Whatever would save on a handle that is over says so, with worker and attempt; reading its state still works."""
    attempt = worker.attempt(state={"n": 1})
    loop = attempt.ckpt.batches(range(5))
    assert next(loop) == 0
    attempt.complete()
    numbers = worker.numbers()
    calls: list[tuple[str, Callable[[], object]]] = [
        ("batches", lambda: attempt.ckpt.batches([1])),
        ("batches", lambda: next(loop)),
        ("advance", attempt.ckpt.advance),
        ("save", lambda: attempt.ckpt.save(wait=True)),
        ("track", lambda: attempt.ckpt.track(x=random.Random())),
        ("check", attempt.ckpt.check),
    ]
    for name, call in calls:
        with pytest.raises(UsageError) as caught:
            call()
        assert f"{name}() on the handle of worker 'w0' attempt 1 is refused: the attempt is over" in str(caught.value)
    assert attempt.ckpt.state == {"n": 1}
    assert worker.numbers() == numbers


def test_a_loop_that_outlives_its_attempt_is_told(worker: Worker) -> None:
    """A generator that somebody kept from an attempt that failed stops at its next batch, whatever the schedule."""
    attempt = worker.attempt(schedule=Drowsy("auto", 0.0))
    loop = attempt.ckpt.batches(range(5))
    assert [next(loop), next(loop)] == [0, 1]
    attempt.fail()
    with pytest.raises(UsageError, match=r"batches\(\) on the handle of worker 'w0' attempt 1 is refused: the attempt is over"):
        next(loop)


def test_a_block_in_memory_is_over_at_its_end() -> None:
    """What is refused in a cluster is refused in a unit test, too."""
    with entered(TaskContext(Checkpoint.in_memory())), checkpointed("other", state={"n": 1}) as ckpt:
        assert list(ckpt.batches([1])) == [1]
    assert ckpt.state == {"n": 1}
    with pytest.raises(UsageError, match=r"batches\(\) on the handle of worker 'other' attempt 1 is refused"):
        ckpt.batches([1])


def test_a_block_applies_its_options_to_the_task(worker: Worker) -> None:
    """A block without an id, or with the task's, is the task's handle: state, interval and number of saves are the block's."""
    attempt = worker.attempt(every=10**6)
    with entered(TaskContext(attempt.ckpt)):
        for worker_id in ("w0", None):
            with checkpointed(worker_id, state={"n": 5}, every=1, keep=5) as ckpt:
                assert ckpt is attempt.ckpt
                assert ckpt.state == {"n": 5}
        for _ in ckpt.batches(range(9)):
            pass
        with checkpointed():
            pass
    assert len([record for record in worker.records() if record.kind == "save"]) == attempt.journal.keep == 5


@pytest.mark.parametrize("keep", [1, 0, True, 2.5])
def test_keep_is_at_least_two(keep: Any) -> None:
    """One damaged record must not cost everything."""
    with pytest.raises(UsageError, match=r"keep=.* is refused; it takes the number of saves that stay, at least 2"):
        checkpointed("w0", keep=keep)


def test_what_does_not_work_yet_is_refused() -> None:
    """An option of a later version is not taken in silence."""
    with pytest.raises(UsageError, match=r"checkpointed\(allow_pickle=.*\) is refused: allow_pickle does not work yet; leave it out"):
        checkpointed("w0", allow_pickle=True)


def test_what_to_do_about_poison_is_checked() -> None:
    """At the block, as at the decorator."""
    with pytest.raises(UsageError, match=r"checkpointed\(on_poison='drop'\) is refused; it takes \"fail\" .* or \"skip\""):
        checkpointed("w0", on_poison="drop")  # type: ignore[arg-type]


def test_a_block_needs_an_id_or_a_task() -> None:
    """Outside of a task there is no handle to take."""
    with pytest.raises(UsageError, match=r"checkpointed\(\) without a worker_id needs a decorated task around it"), checkpointed():
        pass


@pytest.mark.parametrize("kind", ["end", "leave", "retry"])
def test_the_last_record_excludes_every_later_write(worker: Worker, kind: str) -> None:
    """What the writer still had in hand when the attempt ended stays unwritten: nothing of it comes after its last record."""
    attempt = worker.attempt(every=10**6)
    for _ in attempt.ckpt.batches(range(3)):
        pass
    attempt.journal.offer(attempt.ckpt.finish(), time.monotonic() + 3600)
    last: dict[str, Callable[[], None]] = {
        "end": lambda: attempt.journal.end(Outcome("completed"), attempt.ckpt.finish()),
        "leave": lambda: attempt.journal.leave(Ended("terminated", charged=False)),
        "retry": lambda: attempt.journal.retry(FailureRecord("exception", 1, 3)),
    }
    last[kind]()
    numbers = worker.numbers()
    attempt.journal.offer(attempt.ckpt.finish(), time.monotonic() + 3600)
    assert attempt.journal.write_due(time.monotonic() + 7200) > time.monotonic() + 7200
    attempt.journal.leave(Ended("terminated", charged=False))
    assert worker.numbers() == numbers == [1, 2]
