"""The handle: loops that go on where they were, saves that are never half of something, and clear refusals."""

from __future__ import annotations

import logging
import random
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray

from faultguard import _handle, _journal
from faultguard._attempt import TaskOptions
from faultguard._checkpointed import checkpointed
from faultguard._core.records import Ended, Outcome
from faultguard._core.schedule import NOW, Schedule
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
from tests.attempts import Attempt, Died, InlineWriter, Worker, run_to_the_end, write_inline

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
        if not isinstance(index, int):
            raise TypeError("no slices")
        item = self.items[index]
        self.read.append(index)
        return item

    def __len__(self) -> int:
        return len(self.items)


class Loader:
    """A loader that can be told where to go on, as those of torchdata."""

    def __init__(self, items: list[int]) -> None:
        self.items = items
        self.position = 0

    def __iter__(self) -> Iterator[int]:
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


@pytest.mark.parametrize("name", ["following inside", "by hand"])
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
