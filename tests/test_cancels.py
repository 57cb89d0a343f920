"""What the driver has cancelled, as a task sees it that begins."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from faultguard import _cancels, _ray
from faultguard._cancels import LOOK_S, MAX_LOOK_S, PAUSE_S, cancels_of, is_cancelled, note_cancel
from faultguard._settings import Settings


class FakeStore:
    """The key-value store of a cluster, and a clock."""

    def __init__(self) -> None:
        self.values: dict[str, bytes] = {}
        self.error: Exception | None = None
        self.looks = 0
        self.now = 0.0
        self.takes = 0.0

    def get(self, key: str, wait_s: float | None = None) -> bytes | None:
        """Instead of `_ray.kv_get`."""
        self.looks += 1
        self.now += self.takes
        if self.error is not None:
            self.now += wait_s or 0.0
            raise self.error
        return self.values.get(key)

    def put(self, key: str, value: bytes) -> None:
        """Instead of `_ray.kv_put`."""
        self.values[key] = value


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> FakeStore:
    """No Ray."""
    fake = FakeStore()
    monkeypatch.setattr(_ray, "kv_get", fake.get)
    monkeypatch.setattr(_ray, "kv_put", fake.put)
    monkeypatch.setattr(_cancels, "time", SimpleNamespace(monotonic=lambda: fake.now))
    monkeypatch.setattr(_cancels, "_seen", {})
    return fake


def run(cancels: int = 0, name: str = "r") -> Settings:
    """Of a driver that had cancelled so often."""
    return Settings(run=name, checkpoint_dir="/c", store_id="1", job_id="01000000", cancels=cancels)


def test_a_cancel_is_for_what_was_submitted_before_it(store: FakeStore) -> None:
    """Of one worker, or of all; in this run."""
    note_cancel(run(1), "a")
    note_cancel(run(2), "b")
    assert [is_cancelled(run(cancels), "a") for cancels in (0, 1)] == [True, False]
    assert [is_cancelled(run(cancels), "b") for cancels in (0, 1, 2)] == [True, True, False]
    assert not is_cancelled(run(), "c")
    note_cancel(run(3), None)
    store.now += LOOK_S
    assert [is_cancelled(run(cancels), "c") for cancels in (0, 2, 3)] == [True, True, False]
    assert not is_cancelled(run(name="other"), "c")


def test_a_cancel_of_all_covers_those_before_it(store: FakeStore) -> None:
    """What is kept does not grow for ever; what two threads note comes in any order."""
    for number in range(1, 100):
        note_cancel(run(number), f"w{number}")
    note_cancel(run(100), None)
    assert cancels_of(run()) == {None: 100}
    note_cancel(run(102), "w")
    note_cancel(run(101), "w")
    assert cancels_of(run()) == {None: 100, "w": 102}


def test_a_process_that_begins_task_after_task_looks_seldom(store: FakeStore) -> None:
    """And the next look is a new one."""
    for _ in range(1000):
        assert not is_cancelled(run(), "w")
    assert store.looks == 1
    note_cancel(run(1), "w")
    store.now += LOOK_S
    assert is_cancelled(run(), "w")


def test_a_busy_head_is_asked_less_often(store: FakeStore) -> None:
    """A small share of the time goes into it; but not less than every two seconds."""
    for takes, wait in ((0.001, LOOK_S), (0.02, 1.0), (1.0, MAX_LOOK_S)):
        store.takes, store.now = takes, store.now + 100.0
        assert not is_cancelled(run(), "w")
        before = store.looks
        store.now += wait - takes - 0.01
        assert not is_cancelled(run(), "w")
        assert store.looks == before
        store.now += 0.02
        assert not is_cancelled(run(), "w")
        assert store.looks == before + 1


def test_a_store_that_does_not_answer_cancels_nothing_and_holds_up_nobody(store: FakeStore) -> None:
    """What was known before still holds; and it is not asked at every task."""
    note_cancel(run(1), "w")
    assert is_cancelled(run(), "w")
    store.error, before = TimeoutError("Deadline Exceeded"), store.looks
    store.now += LOOK_S
    assert is_cancelled(run(), "w")
    assert not is_cancelled(run(), "v")
    assert store.looks == before + 1
    assert not is_cancelled(run(name="new"), "w")
    store.error = None
    note_cancel(run(2), "v")
    store.now += LOOK_S
    assert not is_cancelled(run(), "v")
    store.now += PAUSE_S
    assert is_cancelled(run(), "v")
