"""`check_resumable`: it finds the loops that do not resume right, says what to write, and passes those that are written so."""

from __future__ import annotations

import contextlib
import pickle
import random
import re
import subprocess
import sys
import textwrap
import threading
from collections import Counter
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import ray

import faultguard
from faultguard import FaultguardError, UsageError, batches, checkpointed, current, recoverable, testing
from faultguard._difference import difference
from faultguard.testing import Rehearsal, ResumabilityError, ResumabilityReport, check_resumable

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

NUMBERS = [3, 1, 4, 1, 5, 9, 2, 6]
WORDS = [f"word-{number}" for number in range(30)]

# --- traps and their twins ------------------------------------------------------------------------------------------


def named(value: object) -> str:
    """A parameter without its address, which differs between the processes that share the tests."""
    return re.sub(r" at 0x\w+", "", str(value))


def outside(items: list[int]) -> list[int]:
    """Results outside of the state."""
    results = []
    for item in batches(items):
        results.append(item * 2)  # noqa: PERF401 - the trap
    return results


def outside_twin(items: list[int]) -> list[int]:
    """Results in the state."""
    results: list[int] = current().state.setdefault("results", [])
    for item in batches(items):
        results.append(item * 2)  # noqa: PERF401 - its twin
    return results


def a_total(items: list[int]) -> int:
    """A number outside of the state."""
    total = 0
    for item in batches(items):
        total += item
    return total


def a_total_twin(items: list[int]) -> int:
    """A number in the state."""
    ckpt = current()
    for item in ckpt.batches(items):
        ckpt.state["total"] = ckpt.state.get("total", 0) + item
    total: int = ckpt.state["total"]
    return total


def copied(items: list[int]) -> Any:
    """A copy of the state, which goes back when all is done."""
    ckpt = current()
    total = ckpt.state.get("total", 0)
    for item in ckpt.batches(items):
        total += item
    ckpt.state["total"] = total
    return total


def copied_twin(items: list[int]) -> Any:
    """A copy of the state, which goes back in each batch."""
    ckpt = current()
    total = ckpt.state.get("total", 0)
    for item in ckpt.batches(items):
        total += item
        ckpt.state["total"] = total
    return total


SEEN: list[int] = []


def of_the_module(items: list[int]) -> Any:
    """What the module holds is each process's own."""
    for item in batches(items):
        SEEN.append(item)  # noqa: PERF402 - the trap
    found = sorted(SEEN)
    SEEN.clear()
    return found


def comprehension(items: list[int]) -> list[int]:
    """Results in a list that this attempt makes."""
    return [item * 2 for item in batches(items)]


def enumerated(items: list[int]) -> dict[str, int]:
    """Counted beside the loop."""
    state = current().state
    for index, item in enumerate(batches(items)):
        state[f"{index}"] = item
    return state


def enumerated_twin(items: list[int]) -> dict[str, int]:
    """Counted by the loop."""
    state = current().state
    for index, item in batches(list(enumerate(items))):
        state[f"{index}"] = item
    return state


def seeded(draws: int) -> Any:
    """A generator that begins anew."""
    ckpt, rng = current(), random.Random(7)
    for _ in ckpt.batches(range(draws)):
        ckpt.state["sum"] = ckpt.state.get("sum", 0.0) + rng.random()
    return ckpt.state["sum"]


def seeded_twin(draws: int) -> Any:
    """A generator that is carried."""
    ckpt, rng = current(), random.Random(7)
    ckpt.track(rng=rng)
    for _ in ckpt.batches(range(draws)):
        ckpt.state["sum"] = ckpt.state.get("sum", 0.0) + rng.random()
    return ckpt.state["sum"]


def seeded_in_numpy(draws: int) -> Any:
    """The same with NumPy."""
    ckpt, rng = current(), np.random.default_rng(7)
    for _ in ckpt.batches(range(draws)):
        ckpt.state["sum"] = ckpt.state.get("sum", np.zeros(2)) + rng.random(2)
    return ckpt.state["sum"]


def seeded_in_numpy_twin(draws: int) -> Any:
    """One generator per batch."""
    ckpt = current()
    for _ in ckpt.batches(range(draws)):
        rng = np.random.default_rng([7, *ckpt.position])
        ckpt.state["sum"] = ckpt.state.get("sum", np.zeros(2)) + rng.random(2)
    return ckpt.state["sum"]


def reshuffled(items: list[str]) -> Any:
    """An order that chance makes; what comes out does not depend on it, if nothing fails."""
    ckpt, order = current(), list(items)
    random.shuffle(order)
    for item in ckpt.batches(order):
        ckpt.state["n"] = ckpt.state.get("n", 0) + len(item)
    return ckpt.state["n"]


def reshuffled_twin(items: list[str]) -> Any:
    """An order of a fixed seed."""
    ckpt, order = current(), list(items)
    random.Random(7).shuffle(order)
    for item in ckpt.batches(order):
        ckpt.state["n"] = ckpt.state.get("n", 0) + len(item)
    return ckpt.state["n"]


def assigned(items: list[int]) -> Any:
    """State that is overwritten."""
    ckpt = current()
    ckpt.state["total"] = 0
    for item in ckpt.batches(items):
        ckpt.state["total"] += item
    return ckpt.state["total"]


def assigned_twin(items: list[int]) -> Any:
    """State that is restored."""
    ckpt = current()
    ckpt.state.setdefault("total", 0)
    for item in ckpt.batches(items):
        ckpt.state["total"] += item
    return ckpt.state["total"]


def ahead(items: list[int]) -> Any:
    """All batches count before anything is done."""
    ckpt = current()
    for item in list(ckpt.batches(items)):
        ckpt.state["total"] = ckpt.state.get("total", 0) + item
    return ckpt.state["total"]


def outer(epochs: int, items: list[int]) -> Any:
    """What the outer body counts is counted again."""
    ckpt = current()
    for _ in ckpt.batches(range(epochs), name="epochs"):
        ckpt.state["epochs"] = ckpt.state.get("epochs", 0) + 1
        for item in ckpt.batches(items, name="steps"):
            ckpt.state["total"] = ckpt.state.get("total", 0) + item
    return ckpt.state


def outer_twin(epochs: int, items: list[int]) -> Any:
    """What follows from the batch is the same whenever it is said."""
    ckpt = current()
    for epoch in ckpt.batches(range(epochs), name="epochs"):
        ckpt.state["epochs"] = epoch + 1
        for item in ckpt.batches(items, name="steps"):
            ckpt.state["total"] = ckpt.state.get("total", 0) + item
    return ckpt.state


def mutated(rows: list[int]) -> list[int]:
    """The argument carries what was done."""
    for index in batches(range(len(rows))):
        rows[index] *= 2
    return rows


def mutated_twin(rows: list[int]) -> list[int]:
    """The state does."""
    found: list[int] = current().state.setdefault("rows", rows)
    for index in batches(range(len(rows))):
        found[index] *= 2
    return found


def unordered(words: list[str]) -> Any:
    """The order of a set."""
    ckpt = current()
    for word in ckpt.batches(list(set(words))):
        ckpt.state["n"] = ckpt.state.get("n", 0) + len(word)
    return ckpt.state["n"]


def unordered_twin(words: list[str]) -> Any:
    """Another order."""
    ckpt = current()
    for word in ckpt.batches(sorted(set(words))):
        ckpt.state["n"] = ckpt.state.get("n", 0) + len(word)
    return ckpt.state["n"]


def swallowing(items: list[int]) -> Any:
    """Whatever is raised in the body, it goes on."""
    ckpt = current()
    for item in ckpt.batches(items):
        try:
            ckpt.state["total"] = ckpt.state.get("total", 0) + 12 // item
        except Exception:  # noqa: BLE001, S112 - the trap
            continue
    return ckpt.state["total"]


def swallowing_bare(items: list[int]) -> Any:
    """Without naming anything."""
    ckpt = current()
    for item in ckpt.batches(items):
        try:
            ckpt.state["total"] = ckpt.state.get("total", 0) + 12 // item
        except:  # noqa: E722 - the trap
            ckpt.state["bad"] = True
    return ckpt.state["total"]


def swallowing_around(items: list[int]) -> Any:
    """Around the loop."""
    ckpt = current()
    try:
        for item in ckpt.batches(items):
            ckpt.state["total"] = ckpt.state.get("total", 0) + 12 // item
    except Exception:  # noqa: BLE001 - the trap
        print("never mind")
    return ckpt.state["total"]


def swallowing_twin(items: list[int]) -> Any:
    """Only what is expected is held back."""
    ckpt = current()
    for item in ckpt.batches(items):
        try:
            ckpt.state["total"] = ckpt.state.get("total", 0) + 12 // item
        except ZeroDivisionError:
            continue
    return ckpt.state["total"]


def swallowing_second_twin(items: list[int]) -> Any:
    """What is meant for the attempt goes through."""
    ckpt = current()
    for item in ckpt.batches(items):
        try:
            ckpt.state["total"] = ckpt.state.get("total", 0) + 12 // item
        except FaultguardError:
            raise
        except Exception:  # noqa: BLE001, S112 - no longer one
            continue
    return ckpt.state["total"]


def by_hand(n: int) -> Any:
    """A loop of one's own that begins anew."""
    ckpt = current()
    for index in range(n):
        ckpt.state["sum"] = ckpt.state.get("sum", 0) + index
        ckpt.advance()
    return ckpt.state["sum"]


def by_hand_twin(n: int) -> Any:
    """A loop of one's own that goes on."""
    ckpt = current()
    for index in range(ckpt.current_batch, n):
        ckpt.state["sum"] = ckpt.state.get("sum", 0) + index
        ckpt.advance(wait=index % 3 == 0)
    return ckpt.state["sum"]


def in_a_row(items: list[int]) -> Any:
    """Loops that follow one another, one left early, with a save between: written right."""
    ckpt = current()
    for item in ckpt.batches(items, name="first"):
        ckpt.state["first"] = ckpt.state.get("first", 0) + item
        if item == 9:
            break
    for item in ckpt.batches(iter(items), name="second"):
        ckpt.state["second"] = ckpt.state.get("second", 0) + item
    ckpt.save(wait=True)
    for item in ckpt.batches(lambda start: items[start:], name="third"):
        ckpt.state["third"] = [*ckpt.state.get("third", []), item]
    return ckpt.state


TRAPS: list[tuple[Callable[..., Any], tuple[Any, ...], str]] = [
    (outside, (NUMBERS,), "`results` lives outside of the state"),
    (a_total, (NUMBERS,), "ckpt.state.setdefault('total', 0)"),
    (copied, (NUMBERS,), "Write `ckpt.state['total'] = total` in it, after that"),
    (of_the_module, (NUMBERS,), "`SEEN.append(item)` changes `SEEN` of the module"),
    (comprehension, (NUMBERS,), "a comprehension over batches() holds only"),
    (enumerated, (NUMBERS,), "Write batches(enumerate(items))"),
    (seeded, (8,), "Write ckpt.track(rng=rng)"),
    (seeded_in_numpy, (8,), "default_rng([seed, *ckpt.position])"),
    (reshuffled, (WORDS,), "a fixed seed: `random.Random(7).shuffle(items)`"),
    (assigned, (NUMBERS,), "Write `ckpt.state.setdefault('total', 0)`"),
    (ahead, (NUMBERS,), "list(...) takes all batches ahead"),
    (outer, (3, NUMBERS), "in the outer body runs again"),
    (mutated, (NUMBERS,), "changes the argument `rows`"),
    (unordered, (WORDS,), "`set(words)` has another order in every process. Write sorted(...) of it"),
    (swallowing, ([1, 0, 2, 3],), "`except Exception:` holds back what must end the attempt"),
    (swallowing_bare, ([1, 0, 2, 3],), "`except:` holds back what must end the attempt"),
    (swallowing_around, ([1, 2, 3],), "`except Exception:` holds back what must end the attempt"),
    (by_hand, (8,), "ckpt.state"),
]
TWINS: list[tuple[Callable[..., Any], tuple[Any, ...]]] = [
    (outside_twin, (NUMBERS,)),
    (a_total_twin, (NUMBERS,)),
    (copied_twin, (NUMBERS,)),
    (enumerated_twin, (NUMBERS,)),
    (seeded_twin, (8,)),
    (seeded_in_numpy_twin, (8,)),
    (reshuffled_twin, (WORDS,)),
    (assigned_twin, (NUMBERS,)),
    (outer_twin, (3, NUMBERS)),
    (mutated_twin, (NUMBERS,)),
    (unordered_twin, (WORDS,)),
    (swallowing_twin, ([1, 0, 2, 3],)),
    (swallowing_second_twin, ([1, 0, 2, 3],)),
    (by_hand_twin, (8,)),
    (in_a_row, (NUMBERS,)),
]


def block(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function within a block of its own."""

    def in_block(*args: Any) -> Any:
        with checkpointed("w0"):
            return function(*args)

    return in_block


def own_block(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function in the block of the task that is decorated."""

    def in_own_block(*args: Any) -> Any:
        with checkpointed(every=1000):
            return function(*args)

    return recoverable(in_own_block)


WAYS: dict[str, Callable[[Callable[..., Any]], Any]] = {
    "plain": lambda function: function,
    "decorated": recoverable,
    "above_remote": lambda function: recoverable(max_failures=1)(ray.remote(function)),
    "below_remote": lambda function: ray.remote(max_retries=10)(recoverable(function)),
    "plain_block": block,
    "decorated_block": lambda function: recoverable(block(function)),
    "own_block": own_block,
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(("trap", "args", "said"), TRAPS, ids=[trap.__name__ for trap, *_ in TRAPS])
def test_a_trap_is_found(trap: Callable[..., Any], args: tuple[Any, ...], said: str, way: str) -> None:
    """However the function is decorated, what does not resume right is named, with the line and what to write instead."""
    with pytest.raises(ResumabilityError) as raised:
        check_resumable(WAYS[way](trap), *args)
    assert said in str(raised.value)
    assert raised.value.kill or "second time" in str(raised.value)
    assert raised.value.footguns or trap is by_hand


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(("twin", "args"), TWINS, ids=[twin.__name__ for twin, _ in TWINS])
def test_its_twin_passes(twin: Callable[..., Any], args: tuple[Any, ...], way: str) -> None:
    """What is written right passes, however it is decorated, with every kill tried."""
    report = check_resumable(WAYS[way](twin), *args)
    assert report.is_complete
    assert report.kills > 3 * report.batches > 0


class Lazy:
    """As settings that are read when they are first looked at: even its class is not known before."""

    @property  # type: ignore[misc] # it cannot be set
    def __class__(self) -> type:
        raise RuntimeError("not configured")


class Bar:
    """Of progress."""

    def update(self, by: int) -> None:
        """Nothing that counts."""


LAZY = Lazy()
BAR = Bar()


def wrong_in_one_place(items: list[int]) -> Any:
    """Much that looks like a trap beside the one that it has."""
    ckpt = current()
    state = ckpt.state
    rows = ckpt.state.setdefault("rows", [])
    total = ckpt.state.get("total", 0)
    lost = 0

    def collect(SEEN: list[int]) -> None:  # noqa: N803 - the name of something of the module
        SEEN.append(1)

    for item in ckpt.batches(items):
        rows += [item]
        total += item
        state["total"] = total
        BAR.update(1)
        collect([])
        lost += item
    return rows, total, lost, id(LAZY)


def test_what_is_right_is_not_blamed() -> None:
    """A list that is changed in place, what is written back by another name, a bar of progress, a parameter with a name of the module."""
    with pytest.raises(ResumabilityError) as raised:
        check_resumable(wrong_in_one_place, NUMBERS, other_process=False)
    (told,) = raised.value.footguns
    assert "`lost` lives outside of the state" in told


def maybe_copied(items: list[int]) -> Any:
    """Whether it is a copy depends on what it is."""
    ckpt = current()
    ckpt.state.setdefault("total", 0)
    total = ckpt.state["total"]
    for item in ckpt.batches(items):
        total += item
    return total


def test_a_copy_that_may_be_none_is_told_as_that() -> None:
    """Of a list, or an array, it would be none."""
    with pytest.raises(ResumabilityError, match=re.escape("a copy of what is in the state (unless that is a list, or an array), and")):
        check_resumable(maybe_copied, NUMBERS, other_process=False)


def test_ray_is_not_started() -> None:
    """Nothing needs a cluster."""
    check_resumable(recoverable(ray.remote(a_total_twin)), NUMBERS)
    assert not ray.is_initialized()


# --- what is tried --------------------------------------------------------------------------------------------------


def test_every_boundary_and_every_batch_is_tried() -> None:
    """Of a hundred batches nothing is left out: the boundaries, the lines and ends of all bodies, twice in a row, and lagging."""
    log: list[tuple[str, int]] = []

    def task(n: int) -> Any:
        ckpt = current()
        for index in ckpt.batches(range(n)):
            log.append(("in", index))
            ckpt.state["n"] = ckpt.state.get("n", 0) + 1
            log.append(("out", index))
        return ckpt.state["n"]

    report = check_resumable(task, 100, other_process=False)
    assert (report.batches, report.kills, report.possible) == (100, 503, 503)
    assert "503 places" in str(report)  # 101 boundaries, 4 times 100 batches, and two more lines
    began = [index for what, index in log if what == "in"]
    done = [index for what, index in log if what == "out"]
    assert set(Counter(began) - Counter(done)) == set(range(100))


def test_more_kills_than_the_limit_are_a_part_of_them() -> None:
    """Above the limit they are spread over the loop, the last one included, and the report says how many."""
    report = check_resumable(a_total_twin, list(range(400)), max_kills=50)
    assert report.kills <= 50 < report.possible
    assert not report.is_complete
    assert f"{report.kills} of {report.possible} places" in str(report)


def test_a_trap_in_the_last_batch_is_found_within_a_limit() -> None:
    """The last kill of each kind is always among those tried."""

    def task(n: int) -> Any:
        ckpt, extra = current(), 0
        for index in ckpt.batches(range(n)):
            extra += index == n - 2
        return extra

    with pytest.raises(ResumabilityError):
        check_resumable(task, 300, max_kills=10)


def test_slow_loops_are_tried_within_a_time() -> None:
    """As many kills as take about that long; at least one of each kind."""
    report = check_resumable(a_total_twin, list(range(100)), max_seconds=1e-6)
    assert report.kills == 5


def test_a_thin_proof_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a slow loop so few kills are tried that what goes wrong may be missed: nobody is to take that for a proof unasked."""
    monkeypatch.setattr(testing, "MAX_SECONDS", 0.002)
    with pytest.warns(UserWarning, match=r"resumes right where it was tried: .* killed at \d+ of \d+ places.*; .*Give it less input"):
        check_resumable(a_total_twin, list(range(100)), max_seconds=0.002)
    check_resumable(a_total_twin, list(range(100)), max_seconds=0.003)  # it is what was asked for: a warning would fail this test


def test_a_lagging_checkpoint_is_tried() -> None:
    """A loop that goes wrong only if more than the batch in hand runs again is found."""
    done: list[int] = []

    def task(n: int) -> Any:
        ckpt = current()
        for index in ckpt.batches(range(n)):
            if done and index < done[-1]:
                ckpt.state["again"] = True  # two batches back
            done.append(index)
            ckpt.state["n"] = index
        return ckpt.state.get("again", False)

    with pytest.raises(ResumabilityError, match="one boundary behind"):
        check_resumable(task, 5, effects=lambda: None, reset=done.clear)


def test_two_kills_in_a_row_are_tried() -> None:
    """A loop that goes wrong only at its third attempt is found."""

    def task(n: int) -> Any:
        ckpt = current()
        for _ in ckpt.batches(range(n)):
            pass
        return ckpt.attempt > 2

    with pytest.raises(ResumabilityError, match="and then at the next boundary again") as raised:
        check_resumable(task, 5)
    assert raised.value.kill.startswith("killed inside batch 0")


def test_every_line_of_a_body_is_interrupted() -> None:
    """With fewer batches than lines, too: a clause around the first line only is found."""

    def task(n: int) -> Any:
        ckpt = current()
        for index in ckpt.batches(range(n)):
            try:
                first = index + 1
            except Exception:  # noqa: BLE001 - the trap
                first = 0
            second = first + 1
            third = second + 1
            ckpt.state["n"] = third
        return ckpt.state["n"]

    with pytest.raises(ResumabilityError, match="went on as if nothing had happened"):
        check_resumable(task, 1)


def test_only_lines_of_the_body_are_interrupted() -> None:
    """Each once, in order: not the end of a `with`, which has the line of its beginning, nor the `for`, which is not in the body."""

    def task(items: list[int]) -> Any:
        ckpt = current()
        for item in ckpt.batches(items):
            with contextlib.nullcontext():
                first = item + 1
                ckpt.state["n"] = first
        return ckpt.state["n"]

    rehearsal = Rehearsal(task, pickle.dumps(((NUMBERS,), {})))
    trials, _ = rehearsal.plan(1000, 60.0)
    first = task.__code__.co_firstlineno
    lines = [int(trial.text.partition("at line ")[2].partition(" ")[0]) - first for trial in trials if "at line" in trial.text]
    assert sorted(lines) == [3, 4] + 8 * [5]


def test_an_interruption_that_is_told_later_was_swallowed() -> None:
    """A task that collects what was raised in its batches, and raises at the end, has gone on meanwhile."""

    def task(items: list[int]) -> None:
        errors = []
        for item in batches(items):
            try:
                errors += [item] if item > 100 else []
            except Exception as error:  # noqa: BLE001 - the trap
                errors.append(0)
                print(error)
        if errors:
            raise RuntimeError(errors)

    with pytest.raises(ResumabilityError, match="went on as if nothing had happened"):
        check_resumable(task, NUMBERS)


def test_a_lock_is_released() -> None:
    """Nothing is raised where the end of a `with` would be skipped, or an exception that was handled would stay."""
    lock = threading.Lock()

    def task(items: list[int]) -> Any:
        ckpt = current()
        for item in ckpt.batches(items):
            with lock:
                try:
                    ckpt.state["n"] = ckpt.state.get("n", 0) + 12 // item
                except ZeroDivisionError:
                    continue
        return ckpt.state["n"]

    assert check_resumable(task, [1, 0, 2], other_process=False).is_complete
    assert not lock.locked()
    assert sys.exc_info()[1] is None


def test_a_nested_loop_says_where() -> None:
    """The text names the loops, their batches, and the value that differs."""
    with pytest.raises(ResumabilityError) as raised:
        check_resumable(outer, 2, [5, 5])
    assert raised.value.path == "result['epochs']"
    assert raised.value.kill == "killed at the boundary after 1 batch of 'steps' in batch 0 of 'epochs'"
    assert "result['epochs'] is 3 instead of 2" in str(raised.value)


def test_arguments_are_those_first_passed() -> None:
    """No attempt sees what another one has made of them, nor does the caller."""
    rows = list(NUMBERS)
    with pytest.raises(ResumabilityError):
        check_resumable(mutated, rows)
    assert rows == NUMBERS


def test_an_object_is_one_per_attempt() -> None:
    """What a method keeps in `self` is an argument like others."""

    class Summer:
        total = 0

        def sum(self, items: list[int]) -> int:
            for item in batches(items):
                self.total += item
            return self.total

    with pytest.raises(ResumabilityError):
        check_resumable(Summer().sum, NUMBERS)


def test_kwargs_are_passed_by_name() -> None:
    """Options of the check and arguments of the task do not meet."""

    def task(items: list[int], *, effects: int) -> Any:
        return a_total_twin(items) + effects

    assert check_resumable(task, NUMBERS, kwargs={"effects": 3}).batches == 8


def test_a_wrapper_around_a_task_is_a_task() -> None:
    """What of a result is compared can be said by a lambda."""
    task = recoverable(lambda items: (a_total_twin(items), random.random()))
    with pytest.raises(ResumabilityError, match="undisturbed for the second time"):
        check_resumable(task, NUMBERS)
    assert check_resumable(lambda items: task(items)[0], NUMBERS).batches == 8


def test_a_task_that_keeps_something_in_the_process_is_found() -> None:
    """Two undisturbed runs already differ."""
    kept: list[int] = []

    def task(items: list[int]) -> list[int]:
        for item in batches(items):
            kept.append(item)  # noqa: PERF402 - one by one
        return kept

    with pytest.raises(ResumabilityError, match="undisturbed for the second time, result has 16 items instead of 8"):
        check_resumable(task, NUMBERS)


def test_blocks_that_follow_one_another() -> None:
    """A block that has ended is done for the attempts after it, as in a run; one without an end resumes."""

    def task(items: list[int]) -> Any:
        found = {}
        for worker in ("a", "b"):
            with checkpointed(worker, state={"n": 0}) as ckpt:
                for item in ckpt.batches(items):
                    ckpt.state["n"] += item
            found[worker] = dict(ckpt.state)
        return found

    assert check_resumable(task, NUMBERS).batches == 16
    assert check_resumable(recoverable(task), NUMBERS).batches == 16


def test_a_block_with_a_used_id_is_refused() -> None:
    """As it is in a run."""

    def task(items: list[int]) -> None:
        for _ in range(2):
            with checkpointed("a") as ckpt:
                for _ in ckpt.batches(items):
                    pass

    with pytest.raises(UsageError, match="a second block"):
        check_resumable(task, NUMBERS)


# --- effects --------------------------------------------------------------------------------------------------------


def test_effects_are_compared() -> None:
    """A batch that is cut writes twice; one that names what it writes does not show it."""
    rows: list[int] = []

    def task(items: list[int]) -> None:
        for item in batches(items):
            rows.append(item)  # noqa: PERF402 - one by one

    with pytest.raises(ResumabilityError, match="name what it writes by its batch") as raised:
        check_resumable(task, NUMBERS, effects=lambda: rows, reset=rows.clear)
    assert raised.value.path == "effects"
    assert "killed inside batch 0" in raised.value.kill
    table: dict[str, int] = {}

    def twin(items: list[int]) -> None:
        ckpt = current()
        for item in ckpt.batches(items):
            table[ckpt.idempotency_key()] = item

    assert check_resumable(twin, NUMBERS, effects=lambda: table, reset=table.clear).is_complete
    assert len(table) == 8


def test_effects_need_a_reset() -> None:
    """What was there before would hide what is missing."""
    with pytest.raises(UsageError, match="together"):
        check_resumable(a_total_twin, NUMBERS, effects=dict)


# --- another process ------------------------------------------------------------------------------------------------


def test_a_set_in_the_arguments_is_seen() -> None:
    """Its order is that of the process."""

    def task(words: set[str]) -> Any:
        return a_total_twin([int(word[5:]) for word in words])

    with pytest.raises(ResumabilityError, match="other PYTHONHASHSEED"):
        check_resumable(task, set(WORDS))


def test_only_sets_need_another_process() -> None:
    """It takes a second that others do not have to wait for."""
    assert check_resumable(a_total_twin, NUMBERS).other_process == 0
    assert check_resumable(unordered_twin, WORDS).other_process == 5
    assert check_resumable(a_total_twin, NUMBERS, other_process=True).other_process == 5
    assert check_resumable(unordered_twin, WORDS, other_process=False).other_process == 0


def test_what_cannot_be_taken_to_another_process_is_said() -> None:
    """Only if it was asked for."""
    lock = threading.Lock()

    def task(items: list[int]) -> Any:
        with lock:
            return a_total_twin(items)

    assert check_resumable(task, NUMBERS).other_process == 0
    with pytest.raises(UsageError, match="cannot pickle"):
        check_resumable(task, NUMBERS, other_process=True)


# --- refusals, report, error ----------------------------------------------------------------------------------------


def generates(items: list[int]) -> Any:
    """No task."""
    yield from batches(items)


@pytest.mark.parametrize(
    ("function", "options", "said"),
    [
        (len, {}, "it has no boundary"),
        (3, {}, "it is no function"),
        (generates, {}, "generator"),
        (a_total_twin, {"max_kills": 0}, "max_kills=0"),
        (a_total_twin, {"max_kills": True}, "max_kills=True"),
        (a_total_twin, {"max_seconds": -1}, "max_seconds=-1"),
        (a_total_twin, {"effects": 3, "reset": 3}, "effects=3"),
    ],
    ids=named,
)
def test_what_cannot_work_is_refused(function: Any, options: dict[str, Any], said: str) -> None:
    """With what to write instead, before anything is killed."""
    with pytest.raises(UsageError, match=said):
        check_resumable(function, NUMBERS, **options)


def test_arguments_that_cannot_be_pickled_are_refused() -> None:
    """Ray could not send them either."""
    with pytest.raises(UsageError, match="cannot be pickled"):
        check_resumable(a_total_twin, (item for item in NUMBERS))


def test_an_error_of_the_task_itself_is_its_own() -> None:
    """What it raises undisturbed is not about resuming."""
    with pytest.raises(ZeroDivisionError):
        check_resumable(lambda items: a_total_twin([1 // n for n in items]), [0])


def test_the_report_is_a_value() -> None:
    """Frozen, and it says what was done."""
    report = check_resumable(a_total_twin, NUMBERS)
    assert isinstance(report, ResumabilityReport)
    assert (report.task, report.batches) == ("a_total_twin", 8)
    assert report.seconds > 0
    with pytest.raises(AttributeError):
        report.batches = 3  # type: ignore[misc] # the point


def test_the_error_is_an_assertion_and_pickles() -> None:
    """Test runners show it as a failed check, and it arrives from another process."""
    with pytest.raises(AssertionError) as raised:
        check_resumable(outside, NUMBERS)
    found = pickle.loads(pickle.dumps(raised.value))
    assert isinstance(found, FaultguardError)
    assert (str(found), vars(found)) == (str(raised.value), vars(raised.value))
    assert str(found).startswith("'outside' does not resume right: killed at the boundary after 1 batch, and resumed, result has 7 items")


def test_a_trace_function_stays() -> None:
    """Coverage and debuggers go on."""
    seen: list[str] = []

    def tracer(frame: Any, event: str, argument: Any) -> None:
        seen.append(event)

    before = sys.gettrace()
    sys.settrace(tracer)
    try:
        check_resumable(a_total_twin, NUMBERS)
        assert sys.gettrace() is tracer
    finally:
        sys.settrace(before)


def test_what_it_prints_is_shown_once(capsys: pytest.CaptureFixture[str]) -> None:
    """Not some hundred times."""

    def task(items: list[int]) -> None:
        for item in batches(items):
            print("item", item)

    check_resumable(task, NUMBERS)
    assert capsys.readouterr().out.count("item 9") == 1


def test_it_is_there_without_another_import() -> None:
    """`faultguard.testing` is loaded when it is asked for, and not before."""
    script = "import sys, faultguard; assert 'faultguard.testing' not in sys.modules; print(faultguard.testing.check_resumable.__name__)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == "check_resumable"
    with pytest.raises(AttributeError, match="no attribute 'tasting'"):
        _ = faultguard.tasting  # type: ignore[attr-defined] # the point


SCRIPT = """
    import faultguard, ray
    from faultguard.testing import check_resumable

    @faultguard.recoverable
    @ray.remote
    def right(words):
        ckpt = faultguard.current()
        for word in ckpt.batches(sorted(set(words))):
            ckpt.state["n"] = ckpt.state.get("n", 0) + len(word)
        return ckpt.state["n"]

    def wrong(words):
        ckpt = faultguard.current()
        for word in ckpt.batches(list(set(words))):
            ckpt.state["n"] = ckpt.state.get("n", 0) + len(word)
        return ckpt.state["n"]

    words = [f"word-{number}" for number in range(30)]
    print(check_resumable(right, words))
    check_resumable(wrong, words)
"""


def test_from_a_script(tmp_path: Path) -> None:
    """The same without pytest: a line for what is right, and an error that names the line of what is wrong."""
    file = tmp_path / "job.py"
    file.write_text(textwrap.dedent(SCRIPT), encoding="utf-8")
    done = subprocess.run([sys.executable, str(file)], capture_output=True, text=True, timeout=120, check=False, cwd=tmp_path)
    assert done.returncode == 1
    assert done.stdout.startswith("'right' resumes right: 30 batches, killed at 151 places, 5 times continued in another process")
    assert "ResumabilityError: 'wrong' does not resume right" in done.stderr
    assert "job.py:15: `set(words)` has another order in every process. Write sorted(...) of it." in done.stderr


# --- differences ----------------------------------------------------------------------------------------------------


class Model:
    """Compared by identity."""

    def __init__(self, weights: Any) -> None:
        self.weights = weights


@pytest.mark.parametrize(
    ("expected", "found", "path"),
    [
        (1, 1.0, "result"),
        ({"a": [1, {"b": (2, 3)}]}, {"a": [1, {"b": (2, 4)}]}, "result['a'][1]['b'][1]"),
        ({"a": 1}, {}, "result"),
        ({}, {"a": 1}, "result"),
        ([1], [1, 2], "result"),
        ({1, 2}, {1, 3}, "result"),
        (np.arange(4.0), np.array([0.0, 1.0, 2.5, 3.0]), "result[2]"),
        (np.zeros((2, 2)), np.zeros(4), "result"),
        (np.zeros(2), np.zeros(2, dtype=np.float32), "result"),
        (Model(np.zeros(2)), Model(np.ones(2)), "result['weights'][0]"),
        (float("nan"), 1.0, "result"),
    ],
    ids=named,
)
def test_the_first_difference_is_named(expected: Any, found: Any, path: str) -> None:
    """With the way to it."""
    there = difference(expected, found)
    assert there is not None
    assert there[0] == path


@pytest.mark.parametrize(
    "make",
    [
        lambda: float("nan"),
        lambda: {"a": [np.array([1.0, np.nan]), {1, 2}], "b": None},
        lambda: Model([Model(np.ones(3))]),
        lambda: np.array(["a", None], dtype=object),
        lambda: np.float32("nan"),
        lambda: np.zeros(()),
    ],
)
def test_equal_values_are_equal(make: Callable[[], Any]) -> None:
    """NaN, arrays and plain objects included."""
    assert difference(make(), make()) is None


def test_a_value_that_contains_itself_is_compared() -> None:
    """The walk ends."""
    one: list[Any] = [1]
    one.append(one)
    other: list[Any] = [1]
    other.append(other)
    assert difference(one, other) is None
