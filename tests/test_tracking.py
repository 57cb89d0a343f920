"""Tracked objects: what keeps a state of its own goes on where the checkpoint left it."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from faultguard._tracking import tracker
from faultguard.errors import CheckpointNotSerializableError, UsageError
from faultguard.storage.memory import MemoryStore
from tests.attempts import Worker, write_inline

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from faultguard import Checkpoint


@pytest.fixture(autouse=True)
def inline(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is due is written on the thread of the loop."""
    write_inline(monkeypatch)


@pytest.fixture(autouse=True)
def global_generators() -> Iterator[None]:
    """Tests that seed the generators of the process leave them as they were."""
    state, numpy_state = random.getstate(), np.random.get_state()  # noqa: NPY002 - the old interface is tracked, too
    yield
    random.setstate(state)
    np.random.set_state(numpy_state)  # noqa: NPY002


@pytest.fixture
def worker() -> Worker:
    """A worker in memory."""
    return Worker(MemoryStore())


class Model:
    """What has a state of its own, in the way of torch."""

    def __init__(self) -> None:
        self.weights = np.zeros(3)
        self.steps = 0

    def state_dict(self) -> dict[str, Any]:
        """Its state, which it goes on changing in place."""
        return {"weights": self.weights, "steps": self.steps}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Its state, back."""
        self.weights, self.steps = state["weights"], state["steps"]

    def step(self) -> list[float]:
        """Change it."""
        self.steps += 1
        self.weights += self.steps / 3
        return [float(weight) for weight in self.weights]


class Counter:
    """What is read and set through a pair of callables."""

    def __init__(self) -> None:
        self.value = 0

    def get(self) -> int:
        """Its state."""
        return self.value

    def set(self, value: int) -> None:
        """Its state, back."""
        self.value = value

    def step(self) -> int:
        """Change it."""
        self.value += 7
        return self.value


def model() -> tuple[Any, Callable[[], Any]]:
    """An object with `state_dict`, and a step of it."""
    made = Model()
    return made, made.step


def pair() -> tuple[Any, Callable[[], Any]]:
    """A pair of callables, and a step of what is behind them."""
    made = Counter()
    return (made.get, made.set), made.step


def python_random() -> tuple[Any, Callable[[], Any]]:
    """A generator of the standard library; `gauss` keeps a second number back."""
    made = random.Random(1)
    return made, lambda: (made.random(), made.gauss(0, 1))


def python_module() -> tuple[Any, Callable[[], Any]]:
    """The generator of the process."""
    random.seed(2)
    return random, lambda: (random.random(), random.gauss(0, 1))


def numpy_generator(bits: Any) -> Callable[[], tuple[Any, Callable[[], Any]]]:
    """A generator of NumPy."""

    def make() -> tuple[Any, Callable[[], Any]]:
        made = np.random.Generator(bits(3))
        return made, lambda: (made.normal(), int(made.integers(2**31, dtype=np.uint32)))  # the latter keeps half a number back

    return make


def numpy_state() -> tuple[Any, Callable[[], Any]]:
    """The old generator of NumPy."""
    made = np.random.RandomState(4)
    return made, lambda: (made.normal(), made.rand())


def numpy_module() -> tuple[Any, Callable[[], Any]]:
    """NumPy's generator of the process."""
    np.random.seed(5)  # noqa: NPY002
    return np.random, lambda: (np.random.normal(), np.random.rand())  # noqa: NPY002


KINDS: dict[str, Callable[[], tuple[Any, Callable[[], Any]]]] = {
    "state_dict": model,
    "pair": pair,
    "random.Random": python_random,
    "random": python_module,
    "PCG64": numpy_generator(np.random.PCG64),
    "MT19937": numpy_generator(np.random.MT19937),
    "Philox": numpy_generator(np.random.Philox),
    "SFC64": numpy_generator(np.random.SFC64),
    "RandomState": numpy_state,
    "numpy.random": numpy_module,
}


@pytest.mark.parametrize("make", KINDS.values(), ids=KINDS)
def test_it_goes_on_where_the_checkpoint_left_it(worker: Worker, make: Callable[[], tuple[Any, Callable[[], Any]]]) -> None:
    """After a death in the middle of any batch the numbers are those of an undisturbed run."""
    _, step = make()
    expected = [step() for _ in range(12)]

    found: dict[int, Any] = {}
    for stop in (1, 5, 7, 99):
        source, step = make()
        attempt = worker.attempt()
        attempt.ckpt.track(it=source)
        for batch in attempt.ckpt.batches(range(6)):
            found[2 * batch] = step()
            if batch == stop:
                break
            found[2 * batch + 1] = step()
        attempt.die()
    assert [found[index] for index in sorted(found)] == expected


def test_the_module_is_not_reseeded_by_tracking() -> None:
    """Tracking reads the state of the process's generator and does not touch it, until something is restored."""
    random.seed(1)
    expected = random.random()
    random.seed(1)
    Worker(MemoryStore()).attempt().ckpt.track(rng=random)
    assert random.random() == expected


def test_what_is_saved_is_a_copy(worker: Worker) -> None:
    """An object that changes its arrays in place changes no snapshot that was taken."""
    made = Model()
    attempt = worker.attempt()
    attempt.ckpt.track(model=made)
    for batch in attempt.ckpt.batches(range(5)):
        made.step()
        if batch == 3:
            break
    attempt.die()
    again = Model()
    worker.attempt().ckpt.track(model=again)
    assert again.steps == 3
    assert again.weights.tolist() == [1 / 3 + 2 / 3 + 3 / 3] * 3


def test_it_is_restored_at_the_call(worker: Worker) -> None:
    """What is tracked late has its own state until then, and the restored one after."""
    attempt = worker.attempt()
    counter = Counter()
    attempt.ckpt.track(n=(counter.get, counter.set))
    counter.step()
    attempt.ckpt.save(wait=True)
    attempt.die()
    again = Counter()
    ckpt = worker.attempt().ckpt
    assert again.value == 0
    ckpt.track(n=(again.get, again.set))
    assert again.value == 7


def track_counters(ckpt: Checkpoint, *names: str) -> dict[str, Counter]:
    """Track new counters under these names."""
    counters = {name: Counter() for name in names}
    ckpt.track(**{name: (counter.get, counter.set) for name, counter in counters.items()})
    return counters


def test_what_is_restored_and_not_tracked_yet_is_carried_on(worker: Worker) -> None:
    """An attempt that dies before it tracks an object again does not lose the state of that object."""
    attempt = worker.attempt()
    for number, counter in enumerate(track_counters(attempt.ckpt, "early", "late").values()):
        counter.value = number + 1
    attempt.ckpt.save(wait=True)
    attempt.die()

    attempt = worker.attempt()
    early = track_counters(attempt.ckpt, "early")["early"]
    assert early.value == 1
    early.value = 10
    attempt.ckpt.save(wait=True)  # "late" is not tracked in this attempt yet
    attempt.die()

    counters = track_counters(worker.attempt().ckpt, "early", "late")
    assert {name: counter.value for name, counter in counters.items()} == {"early": 10, "late": 2}


def test_a_restore_that_fails_loses_nothing(worker: Worker) -> None:
    """The state that could not be given back stays in the checkpoints, for a program that can take it."""
    attempt = worker.attempt()
    attempt.ckpt.track(value=(lambda: 7, lambda _: None))
    attempt.ckpt.advance(wait=True)
    again = worker.attempt()
    with pytest.raises(ZeroDivisionError):
        again.ckpt.track(value=(lambda: 8, lambda _: 1 // 0))
    again.ckpt.advance(wait=True)
    restored: list[int] = []
    worker.attempt().ckpt.track(value=(lambda: 9, restored.append))
    assert restored == [7]


def test_a_name_is_tracked_once(worker: Worker) -> None:
    """Two objects of one name could not both be restored."""
    ckpt = worker.attempt().ckpt
    ckpt.track(rng=random.Random(1))
    with pytest.raises(UsageError, match=r"track\(rng=...\) is refused: 'rng' is tracked already in this attempt"):
        ckpt.track(rng=random.Random(2))


def test_several_objects_at_once(worker: Worker) -> None:
    """Each has its name, and its state."""
    attempt = worker.attempt()
    rng = random.Random(1)
    counters = track_counters(attempt.ckpt, "a", "b")
    attempt.ckpt.track(rng=rng)
    counters["a"].value, counters["b"].value, drawn = 1, 2, rng.random()
    attempt.ckpt.save(wait=True)
    expected = rng.random()
    attempt.die()

    ckpt = worker.attempt().ckpt
    again = random.Random(99)
    ckpt.track(rng=again)
    counters = track_counters(ckpt, "a", "b")
    assert (counters["a"].value, counters["b"].value) == (1, 2)
    assert again.random() == expected != drawn


class Half:
    """Can be read, and not set."""

    def state_dict(self) -> dict[str, int]:
        """Its state."""
        return {}


@pytest.mark.parametrize(
    "source", [object(), 7, "rng", None, {"a": 1}, [print, print], (print,), (print, 7), (print, print, print), Half(), np, np.zeros(3)]
)
def test_what_has_no_known_state_is_refused(source: Any) -> None:
    """The text says what is missing, and how to track it all the same."""
    with pytest.raises(UsageError) as caught:
        tracker("it", source)
    assert str(caught.value) == (
        f"track(it={type(source).__name__}) is refused: it has no state_dict()/load_state_dict() and is no known random generator; "
        f"pass a pair (get, set) of callables, such as (lambda: model.coef_, set_coef)"
    )


def test_a_state_that_cannot_be_saved_is_named(worker: Worker) -> None:
    """The path leads to the value inside of the tracked object."""
    ckpt = worker.attempt().ckpt
    ckpt.track(model=(lambda: {"layers": [1, print]}, print))
    with pytest.raises(CheckpointNotSerializableError) as caught:
        ckpt.advance()
    assert caught.value.path == 'tracked["model"]["layers"][1]'


class FakeTensor:
    """Stands for a tensor of torch, which is not installed here."""

    def __init__(self, values: np.ndarray[Any, Any]) -> None:
        self.values = values

    def numpy(self) -> np.ndarray[Any, Any]:
        """Its values."""
        return self.values


def test_a_torch_generator_is_saved_as_an_array(worker: Worker, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its state, a tensor of bytes, goes into the record as an array and comes back as a tensor."""
    restored: list[Any] = []

    def get_state(_: object) -> FakeTensor:
        return FakeTensor(np.arange(3, dtype=np.uint8))

    def set_state(_: object, state: FakeTensor) -> None:
        restored.append(state.values.tolist())

    kind = type("Generator", (), {"__module__": "torch._C", "get_state": get_state, "set_state": set_state})
    monkeypatch.setattr("faultguard._tracking._tensor", FakeTensor)
    attempt = worker.attempt()
    attempt.ckpt.track(rng=kind())
    attempt.ckpt.save(wait=True)
    attempt.die()
    worker.attempt().ckpt.track(rng=kind())
    assert restored == [[0, 1, 2]]
