"""The rules of a run's own log, without a clock or a disk: whatever drivers do at the same time, one has the run."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING, Any

import pytest

from faultguard._core import runs
from faultguard._core.log import Create, Delete, Get, List, Reply
from faultguard._core.runs import Driver, Entered, InUse, RunRecord, encode_run_record
from faultguard.errors import CheckpointCorruptError, CheckpointStoreError

if TYPE_CHECKING:
    from collections.abc import Generator

SEEDS = 2000


def driver(name: str, at: float = 1.0) -> RunRecord:
    """What a driver wants to write."""
    return RunRecord(kind="open", number=0, run="r", instance=0, driver=Driver("host", 1), writer=name, at=at)


class Objects:
    """A store in memory: replies may get lost, a first listing may be old, and an old record may have been removed."""

    def __init__(self, rng: random.Random | None = None) -> None:
        self.data: dict[int, bytes] = {}
        self._rng = rng
        self._old: list[list[int]] = [[]]

    def perform(self, op: Any) -> Any:
        """Carry one operation out."""
        self._old.append(sorted(self.data))
        match op:
            case List(may_be_stale):
                stale = may_be_stale and self._rng is not None and self._rng.random() < 0.3
                return self._rng.choice(self._old) if stale and self._rng is not None else sorted(self.data)
            case Get(number):
                return self.data.get(number)
            case Create(number, data):
                created = self.data.setdefault(number, data) is data
                if self._rng is not None and self._rng.random() < 0.2:
                    return Reply.AMBIGUOUS
                return Reply.CREATED if created else Reply.EXISTS
            case Delete(number):
                return self.data.pop(number, None)
        raise AssertionError(op)

    def forget(self) -> None:
        """What retention does: the oldest goes, the newest never."""
        if len(self.data) > 2:
            del self.data[min(self.data)]


def run(procedure: Generator[Any, Any, Any], store: Objects) -> Any:
    """Carry out a procedure to its end."""
    try:
        op = next(procedure)
        while True:
            op = procedure.send(store.perform(op))
    except StopIteration as stop:
        return stop.value


def entered(store: Objects, name: str, resume: Any = "auto", gone: int = 0, at: float = 1.0) -> RunRecord:
    """A driver that gets the run."""
    answer = run(runs.enter(driver(name, at), resume, gone), store)
    assert isinstance(answer, Entered)
    return answer.record


@pytest.mark.parametrize(
    ("kind", "resume", "instance"),
    [
        ("left", "auto", 1),
        ("left", "always", 1),
        ("left", "never", 2),
        ("closed", "auto", 2),
        ("closed", "always", 1),
        ("closed", "never", 2),
    ],
)
def test_what_is_gone_on_with(kind: Any, resume: str, instance: int) -> None:
    """An open instance unless it is not wanted; a closed one only if it is."""
    store = Objects()
    first = entered(store, "a")
    assert (first.number, first.instance) == (1, 1)
    assert run(runs.leave(first, kind, 2.0), store)
    second = entered(store, "b", resume, at=3.0)
    assert (second.number, second.instance) == (3, instance)
    assert second.opened_at == (first.opened_at if instance == 1 else 3.0)


def test_a_run_that_somebody_has() -> None:
    """It is not taken unless that driver is known to be gone; then its own end comes too late."""
    store = Objects()
    first = entered(store, "a")
    answer = run(runs.enter(driver("b"), "never", 0), store)
    assert answer == InUse(first)
    second = entered(store, "b", gone=first.number)
    assert second.instance == 1
    for kind in ("left", "closed"):
        assert not run(runs.leave(first, kind, 3.0), store)
    assert run(runs.newest(store.data), store) == second
    assert run(runs.leave(second, "closed", 4.0), store)


def test_a_damaged_record_is_told() -> None:
    """An older one might say that a closed run is open; only who begins anew does not care, and gets an instance that nobody had."""
    store = Objects()
    for name in ("a", "b", "c"):
        record = entered(store, name)
        run(runs.leave(record, "closed", 2.0), store)
    store.data[6] = store.data[6][:-9]
    for resume in ("auto", "always"):
        with pytest.raises(CheckpointCorruptError, match=r"record 6 of the run is damaged; restore it, or begin anew with resume='never'"):
            entered(store, "d", resume)
    assert entered(store, "d", "never").instance == 7


def test_a_record_under_another_number_is_no_record() -> None:
    """It was copied there."""
    record = entered(Objects(), "a")
    assert runs.decode_run_record(encode_run_record(record), 1) == record
    assert runs.decode_run_record(encode_run_record(record), 2) is None
    assert runs.decode_run_record(b"{}", 1) is None


class Process:
    """A driver that does one operation after another; it may be frozen for as long as the schedule likes."""

    def __init__(self, name: str, rng: random.Random, store: Objects) -> None:
        self._name, self._rng, self._store = name, rng, store
        self.has: RunRecord | None = None
        self.closed: bool | None = None
        self.over = False
        self._steps = self._live()

    def step(self) -> None:
        """One operation of the store."""
        try:
            next(self._steps)
        except StopIteration:
            self.over = True

    def _live(self) -> Generator[None, None, None]:
        gone = 0
        while self.has is None:
            answer = yield from self._carry_out(runs.enter(driver(self._name), "auto", gone))
            if isinstance(answer, Entered):
                self.has = answer.record
            elif isinstance(answer, InUse) and self._rng.random() < 0.5:  # it looks dead, wrongly or not
                gone = answer.head.number
            elif answer is None:
                return
        if self._rng.random() < 0.7:
            self.closed = yield from self._carry_out(runs.leave(self.has, self._rng.choice(["left", "closed"]), 2.0))

    def _carry_out(self, procedure: Any) -> Generator[None, None, Any]:
        try:
            op = next(procedure)
            while True:
                yield
                reply = self._store.perform(op)
                yield
                op = procedure.send(reply)
        except StopIteration as stop:
            return stop.value
        except CheckpointStoreError:  # it was told that it does not know
            return None


def test_whatever_happens_one_driver_has_the_run() -> None:
    """Four drivers, frozen anywhere, with lost replies, old listings and retention: epochs are unique and grow, and no late end counts."""
    ended_late = 0
    for seed in range(SEEDS):
        rng = random.Random(seed)
        store = Objects(rng)
        processes = [Process(f"{index}", rng, store) for index in range(4)]
        entries: list[RunRecord] = []
        while not all(process.over for process in processes):
            process = rng.choice([process for process in processes if not process.over])
            had, ended = process.has, process.closed
            process.step()
            if rng.random() < 0.05:
                store.forget()
            if process.has is not None and had is None:
                assert all(entry.number != process.has.number for entry in entries), f"seed {seed}"
                entries.append(process.has)
            if process.closed is not None and ended is None and process.has is not None:
                later = [entry for entry in entries if entry.number > process.has.number]
                if later:
                    ended_late += not process.closed
                    assert not process.closed or later[0].number > process.has.number + 1, f"seed {seed}: it ended under a successor"
        numbers = [entry.number for entry in entries]
        by_instance = sorted(entries, key=lambda entry: entry.number)
        assert len(set(numbers)) == len(numbers), f"seed {seed}"
        assert [entry.instance for entry in by_instance] == sorted(entry.instance for entry in entries), f"seed {seed}"
    assert ended_late > SEEDS // 100
