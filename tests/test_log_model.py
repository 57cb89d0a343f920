"""The guarantees of the log hold under every schedule that was tried, and tempting simplifications of its rules are caught."""

from __future__ import annotations

import os
import shutil
import tempfile
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule, run_state_machine_as_test

from faultguard._core.names import record_name, record_number
from faultguard.storage.local import LocalStore
from tests.model import (
    CAUSES,
    CREATE_FAULTS,
    MAX_INCARNATIONS,
    OLD_LISTINGS,
    POLICIES,
    RARE,
    VARIANTS,
    Incarnation,
    World,
    broken,
    find,
    random_world,
)

if TYPE_CHECKING:
    from pathlib import Path

SCHEDULES = int(os.environ.get("FAULTGUARD_SCHEDULES", "8000"))
BOUND = SCHEDULES // 4  # within which a broken variant must be caught; the true rules live through four times as many
INDEX = st.integers(0, MAX_INCARNATIONS - 1)
ACTS = ("run",) * 8 + ("start",) * 4 + ("claim again", "land", "work", "fail", "leave", "check", "die", "give_back")
EASY = {
    "budget reset by a crash",
    "claims deleted by retention",
    "flush of a half-updated state",
    "keep by number",
    "no second listing",
    "order of claims by arrival",
}
FAULT = st.sampled_from(("",) * 12 + (*CREATE_FAULTS, *OLD_LISTINGS, *OLD_LISTINGS))


def _possible(one: Incarnation) -> tuple[str, ...]:
    """The faults that the next op of an incarnation can meet."""
    kind = type(one.op).__name__
    return CREATE_FAULTS if kind == "Create" else (*OLD_LISTINGS, "error") if kind == "List" else ("error",)


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
        batches=st.integers(3, 12),
        keep=st.sampled_from((2, 3)),
        failures=st.integers(0, 3),
        every=st.integers(1, 2),
        named=st.booleans(),
        wait=st.booleans(),
        policy=st.sampled_from(POLICIES),
        poison=st.integers(-1, 2),
    )
    def begin(self, *, failures: int, **options: Any) -> None:
        """A new worker, and its first incarnation."""
        self.world = self.new_world(max_failures=failures, **options)
        self.world.start()

    def new_world(self, **options: Any) -> World:
        """A world over the model of a store."""
        return World(**options)

    def one(self, index: int) -> Incarnation:
        """One of the living, or the last one that was."""
        alive = [one for one in self.world.incarnations if one.phase != "over"] or self.world.incarnations[-1:]
        return alive[index % len(alive)]

    @rule(act=st.sampled_from(ACTS), index=INDEX, steps=st.sampled_from((1, 2, 3, 5, 10, 30, 30)), fault=FAULT, cut=st.floats(0, 1))
    def act(self, act: str, index: int, steps: int, fault: str, cut: float) -> None:
        """One incarnation goes on for a while, or something happens to it; all others are frozen.

        One rule for everything, because hypothesis switches rules off at random, and without steps nothing happens.
        """
        one = self.one(index)
        if act == "run":
            self.run(one, steps, fault, cut)
        elif act == "start" and len(self.world.incarnations) < MAX_INCARNATIONS:
            kind = "rerun" if index else "task" if cut < 0.5 else "driver"
            self.run(self.world.start(kind, -1 if index > 2 else index), steps, fault, cut)
        elif act == "claim again":
            one.claim_again(gone=one.gone if cut < 0.7 else 0)
        elif act == "leave":
            one.leave(CAUSES[steps % len(CAUSES)])
        elif act == "land":
            self.world.land(index)
        elif act in {"work", "fail", "check", "die", "give_back"}:
            getattr(one, act)()

    def run(self, one: Incarnation, steps: int, fault: str, cut: float) -> None:
        """Up to `steps` things that it does, the first op with a fault."""
        for _ in range(steps):
            if one.job is not None:
                one.step(fault if fault in _possible(one) else "", cut)
                fault = ""
            else:
                one.work()
                one.go_on()

    def teardown(self) -> None:
        """Whatever happened, a last claimer finds all that was promised."""
        if hasattr(self, "world"):
            self.world.quiet()


class LocalMachine(LogMachine):
    """The same over a real directory, whose answers must be those of the model."""

    root = ""

    def new_world(self, **options: Any) -> World:
        """A world over a new directory."""
        self.root = tempfile.mkdtemp(prefix="fg-log-")
        return World(backend=LocalBackend(self.root), **options)

    def teardown(self) -> None:
        """As above, and clean up."""
        super().teardown()
        shutil.rmtree(self.root, ignore_errors=True)


def run_machine(machine: type[LogMachine], examples: int, **options: Any) -> None:
    """Let hypothesis try `examples` schedules; a failing one is shrunk and printed as a program."""
    chosen = settings(
        max_examples=examples,
        stateful_step_count=40,
        deadline=None,
        database=None,
        report_multiple_bugs=False,
        suppress_health_check=list(HealthCheck),
        **options,
    )
    run_state_machine_as_test(machine, settings=chosen)


def test_guarantees_hold_in_schedules_of_hypothesis() -> None:
    """No schedule of up to eight incarnations with faults breaks G1 to G5 or G9."""
    run_machine(LogMachine, 400)


def test_guarantees_hold_over_a_real_directory() -> None:
    """The same rules over `LocalStore`, which answers as the model does."""
    run_machine(LocalMachine, 30)


@pytest.mark.parametrize("name", sorted(EASY))
def test_hypothesis_catches_broken_rules(name: str) -> None:
    """Hypothesis does get to the places where rules break: it finds the simpler ones (within 400 schedules when this was written)."""
    rules, world = broken(VARIANTS[name])

    class BrokenMachine(LogMachine):
        def new_world(self, **options: Any) -> World:
            return world(rules, **options)

    with pytest.raises(AssertionError, match=r"^G\d|retention left"):
        run_machine(BrokenMachine, 2000, derandomize=True, phases=[Phase.generate])


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
