"""The guarantees of the log hold under every schedule that was tried, and tempting simplifications of its rules are caught."""

from __future__ import annotations

import os
import shutil
import tempfile
from typing import TYPE_CHECKING

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule, run_state_machine_as_test

from faultguard._core.names import record_name, record_number
from faultguard.storage.local import LocalStore
from tests.model import CAUSES, CREATE_FAULTS, MAX_INCARNATIONS, OLD_LISTINGS, RARE, VARIANTS, Incarnation, World, broken, find, random_world

if TYPE_CHECKING:
    from pathlib import Path

SCHEDULES = int(os.environ.get("FAULTGUARD_SCHEDULES", "8000"))
BOUND = SCHEDULES // 4  # within which a broken variant must be caught; the true rules live through four times as many
INDEX = st.integers(0, MAX_INCARNATIONS - 1)
FAULT = st.sampled_from(("", "", "", *CREATE_FAULTS, *OLD_LISTINGS))


class LocalBackend:
    """The log of one worker in a real directory."""

    def __init__(self, root: str, worker: str = "w") -> None:
        self._store = LocalStore(root)
        self._prefix = f"run/task/{worker}/"

    def create(self, number: int, data: bytes) -> bool:
        """See `Store.create`."""
        return self._store.create(self._prefix + record_name(number), data)

    def get(self, number: int) -> bytes | None:
        """See `Store.get`."""
        return self._store.get(self._prefix + record_name(number))

    def numbers(self) -> list[int]:
        """All record numbers."""
        names = (key.rpartition("/")[2] for key in self._store.list(self._prefix))
        return [number for name in names if (number := record_number(name)) is not None]

    def delete(self, number: int) -> None:
        """See `Store.delete`."""
        self._store.delete(self._prefix + record_name(number))


class LogMachine(RuleBasedStateMachine):
    """Hypothesis chooses who does what and what goes wrong; the world checks the guarantees after every step."""

    world: World

    @initialize(
        batches=st.integers(2, 8), keep=st.sampled_from((2, 3)), failures=st.integers(0, 3), every=st.integers(1, 2), named=st.booleans(), wait=st.booleans()
    )
    def begin(self, batches: int, keep: int, failures: int, every: int, named: bool, wait: bool) -> None:
        """A new worker, and its first incarnation."""
        self.world = self.new_world(batches=batches, keep=keep, max_failures=failures, every=every, named=named, wait=wait)
        self.world.start()

    def new_world(self, **options: int) -> World:
        """A world over the model of a store."""
        return World(**options)  # type: ignore[arg-type]

    def one(self, index: int) -> Incarnation:
        """The incarnation of that index, as far as there is one."""
        return self.world.incarnations[index % len(self.world.incarnations)]

    @precondition(lambda self: len(self.world.incarnations) < MAX_INCARNATIONS)
    @rule(kind=st.sampled_from(("rerun", "rerun", "rerun", "task", "driver")), task=INDEX)
    def start(self, kind: str, task: int) -> None:
        """Ray's next attempt, another task, or one of another driver."""
        self.world.start(kind, task)

    @rule(index=INDEX, fault=FAULT, cut=st.floats(0, 1), steps=st.sampled_from((1, 2, 3, 5, 10, 30)))
    def run(self, index: int, fault: str, cut: float, steps: int) -> None:
        """Let one incarnation go on for a while, after a first step that may meet a fault; all others are frozen."""
        one = self.one(index)
        one.step(fault if fault in (CREATE_FAULTS if type(one.op).__name__ == "Create" else ("error", *OLD_LISTINGS)) else "", cut)
        for _ in range(steps):
            if one.job is not None:
                one.step()
            else:
                one.work()
                one.go_on()

    @rule(index=INDEX)
    def work(self, index: int) -> None:
        """Half a batch, whatever the writer does."""
        self.one(index).work()

    @rule(index=INDEX)
    def fail(self, index: int) -> None:
        """The user's code raises."""
        self.one(index).fail()

    @rule(index=INDEX, cause=st.sampled_from(CAUSES))
    def leave(self, index: int, cause: str) -> None:
        """The attempt has to leave."""
        self.one(index).leave(cause)

    @rule(index=INDEX)
    def check(self, index: int) -> None:
        """The user's code asks whether it must stop."""
        self.one(index).check()

    @rule(index=INDEX, declared_gone=st.booleans())
    def claim_again(self, index: int, declared_gone: bool) -> None:
        """One that was blocked, or met an error, tries again."""
        self.one(index).claim_again(gone=self.one(index).gone if declared_gone else 0)

    @rule(index=INDEX)
    def land(self, index: int) -> None:
        """A create without a reply arrives."""
        self.world.land(index)

    @rule(index=INDEX)
    def die(self, index: int) -> None:
        """SIGKILL."""
        self.one(index).die()

    def teardown(self) -> None:
        """Whatever happened, a last claimer finds all that was promised."""
        if hasattr(self, "world"):
            self.world.quiet()


class LocalMachine(LogMachine):
    """The same over a real directory, whose answers must be those of the model."""

    root = ""

    def new_world(self, **options: int) -> World:
        """A world over a new directory."""
        self.root = tempfile.mkdtemp(prefix="fg-log-")
        return World(backend=LocalBackend(self.root), **options)  # type: ignore[arg-type]

    def teardown(self) -> None:
        """As above, and clean up."""
        super().teardown()
        shutil.rmtree(self.root, ignore_errors=True)


def run_machine(machine: type[LogMachine], examples: int) -> None:
    """Let hypothesis try `examples` schedules; a failing one is shrunk and printed as a program."""
    quick = settings(max_examples=examples, stateful_step_count=40, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    run_state_machine_as_test(machine, settings=quick)


def test_guarantees_hold_in_schedules_of_hypothesis() -> None:
    """No schedule of at least four incarnations with faults breaks G1 to G5 or G9."""
    run_machine(LogMachine, 150)


def test_guarantees_hold_over_a_real_directory() -> None:
    """The same rules over `LocalStore`, which answers as the model does."""
    run_machine(LocalMachine, 15)


def test_guarantees_hold_in_seeded_schedules() -> None:
    """Thousands of seeded schedules: `python -m tests.model SEED` replays one; FAULTGUARD_SCHEDULES asks for more."""
    assert find(range(SCHEDULES)) is None


def test_seeded_schedules_over_a_real_directory(tmp_path: Path) -> None:
    """Some of the same schedules over `LocalStore`."""
    for seed in range(40):
        random_world(seed, backend=LocalBackend(str(tmp_path), f"w{seed}"))


@pytest.mark.parametrize("name", sorted(VARIANTS.keys() - RARE))
def test_broken_rules_are_caught(name: str) -> None:
    """One switched line of the rules is found by a quarter of the schedules that the true rules live through."""
    found = find(range(BOUND), *broken(VARIANTS[name]))
    assert found is not None, f"{name!r} lives through {BOUND} schedules"
    seed, story = found
    print(f"python -m tests.model {seed} {name!r}: {story.splitlines()[0]}")


def test_a_schedule_replays() -> None:
    """The same seed tells the same story."""
    assert random_world(7).story == random_world(7).story
