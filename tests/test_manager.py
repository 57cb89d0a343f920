"""The `RecoveryManager`: its rules without Ray, then the actor, its death included."""

from __future__ import annotations

import ast
import asyncio
import inspect
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import pytest
import ray

import faultguard
from faultguard import RecoveryManager, WorkerState, _manager, _watch
from faultguard._core.pace import Pace
from faultguard._core.records import Ended, Mark, Outcome, Owner, Record, Snapshot
from faultguard._log import StoredLog
from faultguard._manager import find, find_or_make, forget, manager_name
from faultguard._ray import NAMESPACE
from faultguard._registry import Registry, batch_of
from faultguard._session import current_settings
from faultguard._settings import PROTOCOL, Settings
from faultguard._views import StoredWorker, merge, state_of, status_of, stored_workers
from faultguard._watch import AwakeClock, LiveView
from faultguard.errors import (
    CheckpointNotSerializableError,
    CheckpointStoreError,
    ManagerUnavailableError,
    MaxFailuresExceeded,
    SupersededError,
    UsageError,
)
from faultguard.storage import open_store, store_id
from tests.tasks import assert_whole

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from tests.conftest import StartRun

BOUND_S = 30.0
ODD_IDS = ["../../x", "/etc/passwd", ".", "..", "a b\n", "ä" * 200, "w0", "%2E", "x/000000001.json"]


def wait_until(condition: Callable[[], Any], bound_s: float = BOUND_S) -> None:
    """Wait for a condition, not for ever."""
    deadline = time.monotonic() + bound_s
    while not condition():
        assert time.monotonic() < deadline, f"it did not happen in {bound_s} s"
        time.sleep(0.05)


# --- silence, without Ray -------------------------------------------------------------------------------------------


def test_clock_goes_on_while_the_watcher_is_on_time() -> None:
    """As long as every tick comes when it was promised, the awake clock is the clock."""
    clock = AwakeClock()
    start = clock.read(100.0)
    for now in range(100, 200, 5):
        clock.tick(float(now), 5.0)
    assert clock.read(199.0) - start == 99.0


@pytest.mark.parametrize("reader_first", [True, False])
def test_clock_stands_still_while_the_watcher_is_late(reader_first: bool) -> None:
    """However long the process was away, no more than the promised time has passed for others."""
    clock = AwakeClock()
    clock.tick(100.0, 5.0)
    start = clock.read(100.0)
    if reader_first:
        assert clock.read(1000.0) - start == 5.0
    clock.tick(1000.0, 5.0)
    assert clock.read(1000.0) - start == 5.0
    assert clock.read(1003.0) - start == 8.0


def test_clock_that_nobody_ticks_is_the_clock() -> None:
    """Without a watcher there is no lateness; when it stops, the clock goes on."""
    clock = AwakeClock()
    assert clock.read(500.0) - clock.read(100.0) == 400.0
    clock.tick(500.0, 5.0)
    clock.tick(600.0, float("inf"))
    start = clock.read(600.0)
    assert clock.read(900.0) - start == 300.0


def beat(worker_id: str = "w0", *, token: int = 1, **said: Any) -> dict[str, Any]:
    """What a decorated worker says."""
    return {
        "task": "embed",
        "worker_id": worker_id,
        "run": "r",
        "attempt": 1,
        "token": token,
        "status": "active",
        "current_batch": 3,
        "position": (3,),
        "total_batches": 10,
        "node_id": "ab",
        "pid": 12,
        "started_at": 0.0,
        "last_checkpoint": None,
        "failure_count": 0,
        "cancels": 0,
        **said,
    }


def watched(view: LiveView, start: float, until: float) -> list[str]:
    """Look every second, and name who was found silent."""
    found: list[str] = []
    now = start
    while now < until:
        found += [str(live["worker_id"]) for live in view.check(now, 1.0)]
        now += 1.0
    return found


def test_silent_worker_is_told_once_and_cleared_by_a_beat() -> None:
    """A worker is silent after the timeout, is told once, and is not silent any more when it beats."""
    view = LiveView(10.0, 0.0)
    view.check(0.0, 1.0)
    view.beat([beat("w0"), beat("w1")], 1.0, 1001.0)
    assert watched(view, 1.0, 11.0) == []
    view.beat([beat("w1")], 11.0, 1011.0)
    assert watched(view, 12.0, 20.0) == ["w0"]
    assert {live["worker_id"]: live["silent"] for live in view.workers(20.0)} == {"w0": True, "w1": False}
    view.beat([beat("w0")], 20.0, 1020.0)
    assert not any(live["silent"] for live in view.workers(20.0))


def test_silence_is_told_with_everything_known(caplog: pytest.LogCaptureFixture) -> None:
    """The warning says which attempt is silent, where it runs, and how far it was."""
    view = LiveView(10.0, 0.0)
    view.check(0.0, 1.0)
    view.beat([beat("w0")], 1.0, 1001.0)
    for now in range(1, 13):
        for silent in view.check(float(now), 1.0):
            _manager._say_silent(silent)
    (warning,) = caplog.records
    assert warning.getMessage() == "faultguard: 'embed/w0' attempt 1 is silent: no heartbeat for 11 s."
    assert_whole(warning)
    assert (vars(warning)["pid"], vars(warning)["node"], vars(warning)["batch"]) == (12, "ab", 3)


def test_own_absence_is_nobodys_silence() -> None:
    """After the manager was frozen for longer than any timeout, everybody has nearly the whole timeout left."""
    view = LiveView(10.0, 0.0)
    view.check(0.0, 1.0)
    view.beat([beat()], 0.5, 1000.5)
    assert view.check(500.0, 1.0) == []
    assert watched(view, 501.0, 509.0) == []
    assert watched(view, 509.0, 512.0) == ["w0"]


def test_silence_after_the_end_is_none() -> None:
    """Who sent its final beat is not silent, and a beat that it overtook does not bring it back."""
    view = LiveView(10.0, 0.0)
    assert view.beat([beat()], 1.0, 0.0) == ["ok"]
    assert view.beat([beat(status="completed", final=True)], 2.0, 0.0) == ["ok"]
    assert view.beat([beat()], 2.1, 0.0) == ["ended"]
    assert watched(view, 3.0, 100.0) == []
    assert view.workers(100.0)[0]["status"] == "completed"


def test_beats_of_a_replaced_attempt_are_dropped() -> None:
    """A zombie can neither hide its successor nor make it look alive."""
    view = LiveView(10.0, 0.0)
    assert view.beat([beat(token=5, current_batch=7)], 1.0, 1.0) == ["ok"]
    assert view.beat([beat(token=4)], 2.0, 2.0) == ["superseded"]
    live = view.workers(2.0)[0]
    assert (live["current_batch"], live["last_heartbeat"]) == (7, 1.0)
    assert view.beat([beat(token=6)], 3.0, 3.0) == ["ok"]


def test_a_manager_has_one_group_of_its_own() -> None:
    """With two, Ray starts their threads in a race, and on a busy machine a manager came up that never answered a beat."""
    assert set(_manager._actor_class()._default_options["concurrency_groups"]) == {"beats"}


def test_who_was_told_to_beat_seldom_is_not_silent_in_between() -> None:
    """The longer interval counts, as it is told now or as the worker goes by it still; without one, the timeout alone."""
    view = LiveView(10.0, 0.0, 5.0)
    view.check(0.0, 1.0)
    view.beat([beat("w0", interval_s=5.0), beat("w1", interval_s=15.0)], 1.0, 1001.0)
    view.interval_s = 20.0
    view.beat([beat("w2", interval_s=5.0)], 1.0, 1001.0)
    assert watched(view, 1.0, 13.0) == ["w0"]
    assert watched(view, 13.0, 33.0) == ["w1"]
    assert watched(view, 33.0, 43.0) == ["w2"]


def test_a_manager_that_is_busy_stretches_the_interval() -> None:
    """From what a call costs and how many processes call; never below what was asked for, never at one leap, and back again."""
    pace = Pace(5.0, 0.0, 1.0)
    pace.look(4.0, 5.0, calls=4000, senders=20_000)
    assert pace.interval_s == 5.0, "too early to say"
    pace.look(6.0, 7.0, calls=6000, senders=20_000)
    assert pace.interval_s == 20.0, "it takes 80, in two steps"
    pace.look(12.0, 13.0, calls=12_000, senders=20_000)
    assert pace.interval_s == 80.0
    pace.look(20.0, 14.0, calls=12_002, senders=20_000)
    assert pace.interval_s == 80.0, "two calls say nothing"
    pace.look(100.0, 14.1, calls=12_102, senders=2)
    assert pace.interval_s == 5.0


def test_who_cannot_beat_any_more_is_adopted() -> None:
    """A view that begins anew counts the silence of those it was told of; it shows them when they speak, and believes no older tale."""
    view = LiveView(10.0, 0.0)
    view.check(0.0, 1.0)
    view.beat([beat("w1", token=5)], 1.0, 1001.0)
    view.adopt([beat("w0"), beat("w1", token=4)], 1.0, 1001.0)
    assert [live["worker_id"] for live in view.workers(1.0)] == ["w1"]
    assert watched(view, 1.0, 11.0) == []
    assert view.beat([beat("w1", token=5)], 11.0, 1011.0) == ["ok"]
    assert watched(view, 11.0, 15.0) == ["w0"]
    assert [said["worker_id"] for said in view.silent()] == ["w0"]
    assert view.beat([beat("w0")], 15.0, 1015.0) == ["ok"]
    assert {live["worker_id"]: live["silent"] for live in view.workers(15.0)} == {"w0": False, "w1": False}


def test_a_cancel_is_for_what_was_submitted_before_it() -> None:
    """Of one worker, or of all; each cancel of the driver has a number, and beats say how many there had been."""
    view = LiveView(10.0, 0.0)
    both = [beat("a"), beat("b")]
    assert view.beat(both, 1.0, 1.0) == ["ok", "ok"]
    view.cancel(1, "a")
    assert view.beat(both, 2.0, 2.0) == ["cancelled", "ok"]
    assert view.beat([beat("a", token=2, cancels=1)], 3.0, 3.0) == ["ok"]
    view.cancel(2, None)
    view.cancel(1, None)  # a restarted manager is told the numbers in any order
    assert view.beat([beat("a", token=2, cancels=1), beat("b")], 4.0, 4.0) == ["cancelled", "cancelled"]
    assert view.beat([beat("b", token=2, cancels=2)], 4.0, 4.0) == ["ok"]


def test_workers_of_a_drained_node_are_told() -> None:
    """Unless something weighs more."""
    view = LiveView(10.0, 0.0)
    view.drain(frozenset({"n1"}))
    here, there = beat("a", node_id="n1"), beat("b", node_id="n2")
    assert view.beat([here, there], 1.0, 1.0) == ["drained", "ok"]
    view.cancel(1, "a")
    assert view.beat([here, there], 1.0, 1.0) == ["cancelled", "ok"]
    view.beat([beat("a", token=9, node_id="n2")], 1.0, 1.0)
    assert view.beat([here], 1.0, 1.0) == ["superseded"]
    view.drain(frozenset())
    assert view.beat([beat("c", node_id="n1")], 1.0, 1.0) == ["ok"]


def test_last_beat_counts_listening_time_only() -> None:
    """Who waits for a holder's death is told how long this view has listened, its absence excluded."""
    view = LiveView(10.0, 0.0)
    view.check(0.0, 1.0)
    view.beat([beat()], 0.0, 0.0)
    assert view.last_beat("embed", "nobody", 0.5) == {"age_s": None, "doubted": False, "uptime_s": 0.5, "final_token": None}
    assert view.last_beat("embed", "w0", 500.0) == {"age_s": 1.0, "doubted": False, "uptime_s": 1.0, "final_token": None}


def test_view_forgets_who_ended_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """The view does not grow without bound, and keeps who lives."""
    monkeypatch.setattr(_watch, "MAX_WORKERS", 3)
    view = LiveView(10.0, 0.0)
    view.beat([beat(f"e{index}", final=True) for index in range(5)], 1.0, 1.0)
    view.beat([beat("alive")], 0.5, 1.0)
    view.check(2.0, 1.0)
    assert len(view.workers(2.0)) == 3
    assert "alive" in {live["worker_id"] for live in view.workers(2.0)}


# --- views, without Ray ---------------------------------------------------------------------------------------------


def record(**changes: Any) -> Record:
    """A record of a decorated worker."""
    fields: dict[str, Any] = {
        "kind": "save",
        "number": 2,
        "task": "embed",
        "worker_id": "w0",
        "owner": Owner(writer="u", node_id="ab", pid=12),
        "saved_at": 100.0,
        "life": 1,
        "attempt": 1,
        "token": 1,
    }
    return Record(**{**fields, **changes})


@pytest.mark.parametrize(
    ("changes", "status"),
    [
        ({"kind": "claim"}, "active"),
        ({}, "active"),
        ({"attempt": 2}, "recovered"),
        ({"kind": "claim", "attempt": 3}, "recovered"),
        ({"ended": Ended("cancelled", charged=False)}, "cancelled"),
        ({"ended": Ended("terminated", charged=False)}, "active"),
        ({"attempt": 2, "ended": Ended("exception", charged=True)}, "recovered"),
        ({"kind": "end", "outcome": Outcome("completed")}, "completed"),
        ({"kind": "end", "outcome": Outcome("failed"), "attempt": 4}, "failed"),
    ],
)
def test_status_of_a_record(changes: dict[str, Any], status: str) -> None:
    """The newest record says how a worker is."""
    assert status_of(record(**changes)) == status


def stored(**changes: Any) -> StoredWorker:
    """A worker by its log."""
    newest = record(**changes)
    return StoredWorker(state_of(newest, newest.snapshot, StoredLog(open_store("memory://views"), "r/embed/w0/"), "r"), newest)


def test_state_by_the_log_alone() -> None:
    """Without beats the log says how far a worker is, and when it last wrote."""
    loops = ((Mark("epochs", 1),), (Mark("batches", 7, length=10),))
    state = stored(snapshot=Snapshot(msgspec.Raw(b"{}"), loops), charged=2).state
    assert (state.position, state.current_batch, state.total_batches) == ((1, 7), 7, 10)
    assert (state.failure_count, state.last_heartbeat, state.run) == (2, 100.0, "r")
    assert state.last_checkpoint == "memory://views/r/embed/w0/000000002.json"
    assert stored().state.last_checkpoint is None


LIVE = {"last_heartbeat": 200.0, "age_s": 1.0, "silent": True, "final": False}


def test_beats_are_newer_than_the_log() -> None:
    """Who beats in the attempt that the log knows is shown as the beat says, silence included."""
    state = merge(stored(number=4, snapshot=Snapshot(msgspec.Raw(b"{}"))), {**beat(), **LIVE})
    assert (state.current_batch, state.last_heartbeat, state.silent, state.status) == (3, 200.0, True, "active")
    assert state.last_checkpoint is not None
    assert state.last_checkpoint.endswith("4.json")


@pytest.mark.parametrize(
    ("changes", "status"),
    [
        ({"token": 2, "attempt": 2}, "recovered"),
        ({"kind": "end", "outcome": Outcome("completed")}, "completed"),
        ({"ended": Ended("cancelled", charged=False)}, "cancelled"),
    ],
)
def test_the_log_is_the_truth(changes: dict[str, Any], status: str) -> None:
    """Beats of an attempt that the log knows to be replaced or over change nothing but the last sign of life."""
    state = merge(stored(**changes), {**beat(), **LIVE})
    assert (state.status, state.silent, state.current_batch, state.last_heartbeat) == (status, False, None, 200.0)


def test_worker_state_pickles() -> None:
    """What the manager answers crosses processes."""
    state = stored().state
    assert pickle.loads(pickle.dumps(state)) == state


# --- registered workers, without Ray --------------------------------------------------------------------------------


@dataclass
class Place:
    """A directory, and the managers that use it."""

    path: str

    def registry(self, writer: str = "actor-1", *, max_failures: int = 3, timeout: float = 60.0) -> Registry:
        """A manager as it is after its process has started."""
        identity = store_id(open_store(self.path))
        return Registry(Settings("", self.path, identity, "", max_failures=max_failures, heartbeat_timeout=timeout), writer)


@pytest.fixture
def place(tmp_path: Path) -> Place:
    """An empty directory."""
    return Place(str(tmp_path / "c"))


def only(registry: Registry) -> WorkerState:
    """The state of the only worker."""
    (state,) = registry.states()
    return state


def test_life_of_a_worker(place: Place) -> None:
    """Register, beat, save, load: each shows."""
    registry = place.registry()
    token = registry.register("w", {"batch_id": 0})
    assert (only(registry).status, only(registry).current_batch, only(registry).last_checkpoint) == ("active", 0, None)
    assert registry.load("w") is None, "the initial state is no checkpoint"
    assert registry.heartbeat("w", {"batch_id": 5}, token) is True
    path = registry.save("w", {"batch_id": 6, "seen": (1, 2)}, token)
    assert path == only(registry).last_checkpoint
    assert Path(str(path)).is_absolute()
    assert Path(str(path)).is_file()
    assert registry.load("w") == {"batch_id": 6, "seen": (1, 2)}
    assert (only(registry).current_batch, only(registry).failure_count) == (6, 0)


def test_three_checkpoints_stay(place: Place) -> None:
    """Old checkpoints go, oldest first."""
    registry = place.registry()
    registry.register("w", None)
    paths = [str(registry.save("w", {"batch_id": index}, None)) for index in range(6)]
    assert [Path(path).exists() for path in paths] == [False, False, False, True, True, True]


def test_current_batch_of_a_state() -> None:
    """`current_batch` counts before `batch_id`; a state without either changes nothing."""
    assert (batch_of({"batch_id": 1, "current_batch": 2}), batch_of({"x": 1}, 7), batch_of(None)) == (2, 7, None)


def test_registering_again_supersedes(place: Place) -> None:
    """The newest registration owns the worker; the token of an older one is refused, and nothing of it counts."""
    registry = place.registry()
    old = registry.register("w")
    registry.save("w", {"batch_id": 1}, old)
    new = registry.register("w")
    assert new > old
    assert (only(registry).status, only(registry).attempt, only(registry).failure_count) == ("recovered", 2, 1)
    assert registry.heartbeat("w", None, old) is False
    with pytest.raises(SupersededError, match=f"token {old} was replaced by attempt 2"):
        registry.save("w", {"batch_id": 99}, old)
    assert registry.load("w") == {"batch_id": 1}
    assert registry.heartbeat("w", None, None) is True, "without a token it counts as the newest"
    assert registry.save("w", {"batch_id": 2}, None)
    assert registry.heartbeat("w", None, new) is True


def test_repeated_call_is_answered_again(place: Place) -> None:
    """A registration whose reply Ray lost, and which it repeats, is not a second one, not even after a restart."""
    registry = place.registry()
    token = registry.register("w", None, "call-1")
    assert place.registry().register("w", None, "call-1") == token
    assert only(registry).attempt == 1
    assert registry.register("w", None, "call-2") > token


def test_marked_failed_is_one_failure(place: Place) -> None:
    """A failure is charged once, stops the heartbeats, and the next registration goes on from the checkpoint."""
    registry = place.registry()
    registry.register("w", {"batch_id": 0})
    registry.save("w", {"batch_id": 4}, None)
    assert registry.mark_failed("w", "was marked failed") is True
    assert registry.mark_failed("w", "was marked failed") is False
    assert (only(registry).status, only(registry).failure_count) == ("failed", 1)
    assert registry.heartbeat("w", None, None) is False
    registry.register("w", {"batch_id": 0})
    state = only(registry)
    assert (state.status, state.failure_count, state.current_batch) == ("recovered", 1, 4)


def test_late_save_of_a_failed_worker_is_kept(place: Place) -> None:
    """What a worker saves after it was marked failed is not lost, and neither is the failure."""
    registry = place.registry()
    registry.register("w")
    registry.mark_failed("w", "was marked failed")
    registry.save("w", {"batch_id": 9}, None)
    assert (only(registry).status, only(registry).failure_count) == ("failed", 1)
    registry.register("w")
    assert (only(registry).failure_count, registry.load("w")) == (1, {"batch_id": 9})


@pytest.mark.parametrize("marked", [True, False])
def test_budget_ends(place: Place, marked: bool) -> None:
    """After more than `max_failures` failures registering raises, and goes on raising over restarts of the manager."""
    for _ in range(3):
        registry = place.registry(max_failures=2)
        registry.register("w")
        if marked:
            registry.mark_failed("w", "was marked failed")
    for _ in range(3):
        with pytest.raises(MaxFailuresExceeded) as raised:
            place.registry(max_failures=2).register("w")
        assert len(raised.value.failures) == 3
    state = only(place.registry())
    assert (state.status, state.failure_count) == ("failed", 3)
    with pytest.raises(SupersededError, match="has ended"):
        registry.save("w", {}, None)


def test_new_manager_gives_a_new_budget(place: Place) -> None:
    """Starting again after a recorded failure goes on from the last checkpoint, with a new budget."""
    registry = place.registry(max_failures=0)
    registry.register("w")
    registry.save("w", {"batch_id": 3}, None)
    with pytest.raises(MaxFailuresExceeded):
        registry.register("w")
    fresh = place.registry("actor-2", max_failures=0)
    fresh.register("w")
    assert (only(fresh).failure_count, fresh.load("w")) == (0, {"batch_id": 3})


def test_completed_worker_begins_afresh(place: Place) -> None:
    """A worker that completed is over; registered again, it has a new budget and no checkpoint."""
    registry = place.registry(max_failures=0)
    token = registry.register("w")
    registry.save("w", {"batch_id": 3}, None)
    registry.save("w", None, token, Outcome("completed"))
    assert only(registry).status == "completed"
    assert registry.heartbeat("w", None, token) is False
    registry.register("w")
    assert (only(registry).status, registry.load("w")) == ("active", None)


def test_restarted_manager_goes_on(place: Place) -> None:
    """A manager without memory knows everything from the logs: tokens, budget, checkpoints, who failed."""
    before = place.registry()
    token = before.register("w", {"batch_id": 0})
    path = before.save("w", {"batch_id": 1}, token)
    before.register("dead")
    before.mark_failed("dead", "was marked failed")
    after = place.registry()
    assert after.heartbeat("w", {"batch_id": 2}, token) is None, "only the log can tell"
    assert [after.look_up(name) for name in ("w", "dead", "nobody")] == [True, True, False]
    assert after.heartbeat("w", {"batch_id": 2}, token) is True
    assert after.heartbeat("dead", None, None) is False
    assert after.heartbeat("w", None, token - 1) is False
    later = str(after.save("w", {"batch_id": 2}, token))
    assert later > str(path)
    assert {state.worker_id: state.status for state in after.states()} == {"w": "active", "dead": "failed"}


def test_two_managers_on_one_directory(place: Place) -> None:
    """Whichever manager a worker talks to, the logs keep them in step."""
    one, two = place.registry("actor-1"), place.registry("actor-2")
    old = one.register("w")
    one.save("w", {"batch_id": 1}, old)
    new = two.register("w")
    with pytest.raises(SupersededError):
        one.save("w", {"batch_id": 99}, old)
    assert one.save("w", {"batch_id": 2}, new)
    assert two.save("w", {"batch_id": 3}, None)
    assert one.save("w", {"batch_id": 4}, None)
    assert two.load("w") == {"batch_id": 4}
    assert one.look_up("w")
    assert one.heartbeat("w", None, new) is True
    assert one.heartbeat("w", None, old) is False


@pytest.mark.parametrize("worker_id", ODD_IDS)
def test_odd_ids_stay_inside(place: Place, worker_id: str) -> None:
    """Any text names a worker, and none leads out of the directory or to another worker."""
    registry = place.registry()
    registry.register("other")
    registry.register(worker_id)
    path = Path(str(registry.save(worker_id, {"batch_id": 1}, None))).resolve()
    assert path.parents[2] == Path(place.path).resolve()
    assert {state.worker_id for state in registry.states()} == {worker_id, "other"}
    assert registry.load("other") is None


@pytest.mark.parametrize(
    "wrong",
    [
        lambda registry: registry.register(""),
        lambda registry: registry.register(7),
        lambda registry: registry.register("w", [1]),
        lambda registry: registry.heartbeat("w", 3, None),
        lambda registry: registry.save("nobody", {}, None),
        lambda registry: registry.save("w", {}, 99),
        lambda registry: registry.mark_failed("nobody", ""),
    ],
)
def test_nonsense_is_refused(place: Place, wrong: Callable[[Registry], object]) -> None:
    """What cannot be meant is refused, with a word of advice."""
    registry = place.registry()
    registry.register("w")
    with pytest.raises(UsageError):
        wrong(registry)


def test_state_that_cannot_be_saved_is_refused_at_once(place: Place) -> None:
    """A worker learns at registration that its state can never be saved."""
    with pytest.raises(CheckpointNotSerializableError, match="initial_state"):
        place.registry().register("w", {"socket": object()})


def test_silent_worker_fails_and_a_late_beat_saves_it(place: Place) -> None:
    """Silence beyond the timeout is found; what is heard in the meantime leaves the worker alone."""
    registry = place.registry(timeout=0.05)
    registry.register("w")
    assert registry.silent() == {}
    time.sleep(0.1)
    assert list(registry.silent()) == ["w"]
    registry.heartbeat("w", None, None)
    assert registry.mark_failed("w", "was silent", unless=lambda: "w" not in registry.silent()) is False
    time.sleep(0.1)
    assert registry.mark_failed("w", "was silent", unless=lambda: "w" not in registry.silent()) is True
    assert registry.silent() == {}


def test_waiting_for_us_is_not_silence(place: Place) -> None:
    """A worker whose call we have not answered is not silent, however long that takes."""
    registry = place.registry(timeout=0.05)
    registry.register("w")
    with registry.calling("w"):
        time.sleep(0.1)
        assert registry.silent() == {}
    assert registry.silent() == {}


def test_slow_store_stops_no_heartbeat(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """While a save hangs, heartbeats of the same worker and of others are answered."""
    registry = place.registry()
    for name in ("w", "v"):
        registry.register(name)
    hanging, free = threading.Event(), threading.Event()
    run = StoredLog.run

    def slow(log: StoredLog, procedure: Any) -> Any:
        hanging.set()
        assert free.wait(BOUND_S)
        return run(log, procedure)

    monkeypatch.setattr(StoredLog, "run", slow)
    saving = threading.Thread(target=registry.save, args=("w", {"batch_id": 1}, None))
    saving.start()
    assert hanging.wait(BOUND_S)
    started = time.monotonic()
    assert registry.heartbeat("w", {"batch_id": 2}, None) is True
    assert registry.heartbeat("v", None, None) is True
    assert time.monotonic() - started < 1.0
    free.set()
    saving.join(BOUND_S)


def test_lost_store_stops_nobody(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """A worker that the manager cannot look up goes on; its save says what is wrong."""
    before = place.registry()
    token = before.register("w")
    after = place.registry()
    Path(place.path).rename(place.path + "-away")
    assert after.look_up("w") is True
    with pytest.raises(CheckpointStoreError):
        after.save("w", {"batch_id": 1}, token)
    Path(place.path + "-away").rename(place.path)
    assert after.save("w", {"batch_id": 1}, token)


def test_failed_write_is_not_taken_for_a_successor(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """After a write of which nobody knows whether it arrived, the same worker goes on."""
    registry = place.registry()
    token = registry.register("w")
    store = open_store(place.path)
    create = type(store).create

    def create_and_fail(self: Any, key: str, data: bytes, **how: Any) -> bool:
        create(self, key, data, **how)
        raise CheckpointStoreError("the reply was lost")

    with monkeypatch.context() as patch:
        patch.setattr(type(store), "create", create_and_fail)
        with pytest.raises(CheckpointStoreError, match="reply was lost"):
            registry.save("w", {"batch_id": 1}, token)
    assert registry.save("w", {"batch_id": 2}, token)
    assert registry.load("w") == {"batch_id": 2}


def test_contended_write_gives_up(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """A write that others get ahead of again and again ends with an error, not in a loop."""
    registry = place.registry()
    registry.register("w")
    monkeypatch.setattr("faultguard._core.log.save", lambda *_, **__: iter_false())
    with pytest.raises(CheckpointStoreError, match="got ahead"):
        registry.save("w", {}, None)
    with pytest.raises(CheckpointStoreError, match="got ahead"):
        registry.mark_failed("w", "was marked failed")


def iter_false() -> Any:
    """A save that finds somebody else's record."""
    yield from ()
    return False


def test_damaged_checkpoint_costs_one_checkpoint(place: Place) -> None:
    """A damaged newest checkpoint is set aside, by reading and by the next manager."""
    registry = place.registry()
    registry.register("w")
    registry.save("w", {"batch_id": 1}, None)
    newest = Path(str(registry.save("w", {"batch_id": 2}, None)))
    newest.write_bytes(newest.read_bytes()[:-9])
    assert place.registry().load("w") == {"batch_id": 1}
    after = place.registry()
    assert only(after).status == "active"
    assert Path(str(after.save("w", {"batch_id": 3}, None))).name > newest.name
    assert after.load("w") == {"batch_id": 3}


def test_restart_watches_again_whom_it_watched(place: Place) -> None:
    """A restarted manager watches its own workers, not those of others, and not those that ended."""
    mine, other = place.registry("actor-1", timeout=0.05), place.registry("actor-2")
    for name in ("alive", "dead"):
        mine.register(name)
    mine.mark_failed("dead", "was marked failed")
    other.register("foreign")
    after = place.registry("actor-1", timeout=0.05)
    after.adopt_all()
    time.sleep(0.1)
    assert list(after.silent()) == ["alive"]


def test_manager_logs_are_told_from_a_run_of_that_name(place: Place) -> None:
    """Logs that lie deeper or elsewhere under the prefix are not taken for registered workers."""
    registry = place.registry()
    registry.register("w")
    open_store(place.path).create("manager/embed/w0/000000001.json", b"x")
    assert [state.worker_id for state in registry.states()] == ["w"]
    assert stored_workers(open_store(place.path), "nothing/", run="") == []


# --- options --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wrong", "advice"),
    [
        (RecoveryManager, "RecoveryManager.remote"),
        (lambda: RecoveryManager.remote(heartbeat_interval=0), "more than 0"),
        (lambda: RecoveryManager.remote(heartbeat_interval=5, heartbeat_timeout=5), "usual factor is 10"),
        (lambda: RecoveryManager.remote(max_failures=-2), "-1 for any number"),
        (lambda: RecoveryManager.remote(checkpoint_dir="ftp://x"), "ftp"),
        (lambda: RecoveryManager.remote(checkpoint_dir=""), "directory"),
        (lambda: RecoveryManager.options(nonsense=1), "nonsense"),
    ],
)
def test_options_are_checked_at_once(wrong: Callable[[], object], advice: str) -> None:
    """A wrong option is refused where it is written, before any actor is made."""
    with pytest.raises(UsageError, match=advice):
        wrong()


def test_unusable_directory_is_refused_at_once() -> None:
    """A directory that cannot be written is refused before any actor is made."""
    with pytest.raises(CheckpointStoreError):
        RecoveryManager.remote(checkpoint_dir="/proc/checkpoints")


# --- the actor ------------------------------------------------------------------------------------------------------


class Manager:
    """A manager of a test: its calls, waited for, and its process."""

    def __init__(self, handle: Any) -> None:
        self.handle = handle

    def __getattr__(self, name: str) -> Callable[..., Any]:
        """A method of the actor."""
        return lambda *args, **kwargs: ray.get(getattr(self.handle, name).remote(*args, **kwargs), timeout=BOUND_S)

    @property
    def pid(self) -> int:
        """Of the process."""
        return int(self.hello(PROTOCOL, "", "")["pid"])

    def kill(self) -> None:
        """SIGKILL, now."""
        os.kill(self.pid, signal.SIGKILL)

    def status(self, worker_id: str) -> str:
        """What the manager says of a worker."""
        return next(str(state.status) for state in self.get_workers() if state.worker_id == worker_id)


@pytest.fixture
def make_manager(ray_cluster: str, tmp_path: Path) -> Iterator[Callable[..., Manager]]:
    """Makes managers with the checkpoints of this test; they end with it."""
    made: list[Any] = []

    def make(**options: Any) -> Manager:
        made.append(RecoveryManager.remote(checkpoint_dir=tmp_path / "c", **options))
        return Manager(made[-1])

    yield make
    for handle in made:
        ray.kill(handle)


EXAMPLE = """
# Initialize recovery manager
recovery_manager = RecoveryManager.remote(
    heartbeat_interval=5.0,
    max_failures=3,
    checkpoint_dir="checkpoints"
)

# Start monitoring
await recovery_manager.start_monitoring.remote()

# Register worker
worker_id = "worker_1"
initial_state = {"batch_id": 0}
await recovery_manager.register_worker.remote(worker_id, initial_state)

# Regular heartbeat
while processing:
    current_state = {"batch_id": current_batch}
    should_continue = await recovery_manager.heartbeat.remote(
        worker_id, current_state
    )
    if not should_continue:
        break

# Save checkpoint
checkpoint_path = await recovery_manager.save_checkpoint.remote(
    worker_id, final_state
)
"""


class Processing:
    """True for some rounds."""

    def __init__(self, rounds: int) -> None:
        self.rounds = rounds

    def __bool__(self) -> bool:
        """One round less."""
        self.rounds -= 1
        return self.rounds >= 0


@pytest.mark.ray
def test_specified_example_runs_word_for_word(ray_cluster: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The usage example of the specification works as it is written."""
    monkeypatch.chdir(tmp_path)
    processing = Processing(3)
    names: dict[str, Any] = {
        "RecoveryManager": RecoveryManager,
        "processing": processing,
        "current_batch": 2,
        "final_state": {"batch_id": 3, "loss": 0.5},
    }
    code = compile(EXAMPLE, "example", "exec", flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)

    async def run() -> None:
        pending = eval(code, names)  # noqa: S307 - the text stands above
        assert inspect.iscoroutine(pending)
        await pending

    asyncio.run(run())
    manager = Manager(names["recovery_manager"])
    path = Path(names["checkpoint_path"])
    assert path.is_absolute()
    assert path.is_file()
    assert path.parent == tmp_path / "checkpoints" / "manager" / "worker_1"
    assert processing.rounds < 0, "no heartbeat was answered with False"
    assert manager.load_checkpoint("worker_1") == {"batch_id": 3, "loss": 0.5}
    assert manager.get_failed_workers() == []
    manager.mark_worker_failed("worker_1")
    assert manager.get_failed_workers() == ["worker_1"]
    (state,) = manager.get_workers()
    assert (state.status, state.current_batch, state.last_checkpoint is not None) == ("failed", 3, True)
    manager.stop_monitoring()
    ray.kill(names["recovery_manager"])


@pytest.mark.ray
def test_errors_cross_the_actor(make_manager: Callable[..., Manager]) -> None:
    """What the manager refuses reaches the caller as the error that it is, with its attributes."""
    manager = make_manager(max_failures=0)
    old = manager.register_worker("w")
    with pytest.raises(MaxFailuresExceeded) as exceeded:
        manager.register_worker("w")
    assert len(exceeded.value.failures) == 1
    with pytest.raises(SupersededError):
        manager.save_checkpoint("w", {}, old)
    with pytest.raises(UsageError):
        manager.save_checkpoint("nobody", {})
    with pytest.raises(UsageError):
        manager.save_checkpoint("w", None)
    with pytest.raises(CheckpointNotSerializableError):
        manager.register_worker("v", {"a": object()})


@pytest.mark.ray
def test_saves_survive_the_death_of_the_manager(make_manager: Callable[..., Manager]) -> None:
    """SIGKILL while saving: the caller notices a delay at most, nothing acknowledged is lost, and the numbers go on."""
    manager = make_manager()
    token = manager.register_worker("../../x")
    paths: list[str] = []
    stop = threading.Event()

    def save() -> None:
        while not stop.is_set():
            paths.append(manager.save_checkpoint("../../x", {"batch_id": len(paths)}, token))

    saving = threading.Thread(target=save)
    saving.start()
    for _ in range(2):
        before = len(paths)
        wait_until(lambda before=before: len(paths) > before + 20)  # type: ignore[misc] # the default binds the loop variable
        manager.kill()
    before = len(paths)
    wait_until(lambda: len(paths) > before + 5)
    stop.set()
    saving.join(BOUND_S)
    assert paths == sorted(set(paths)), "no number came twice, or went back"
    assert manager.load_checkpoint("../../x") == {"batch_id": len(paths) - 1}
    (state,) = manager.get_workers()
    assert (state.attempt, state.failure_count, state.status) == (1, 0, "active")


@pytest.mark.ray
def test_registrations_survive_the_death_of_the_manager(make_manager: Callable[..., Manager]) -> None:
    """SIGKILL while registering: each call counts once, also one that Ray repeats because its reply was lost."""
    manager = make_manager(max_failures=-1)
    tokens: list[int] = []
    stop = threading.Event()

    def register() -> None:
        while not stop.is_set():
            tokens.append(manager.register_worker("w"))

    registering = threading.Thread(target=register)
    registering.start()
    wait_until(lambda: len(tokens) > 20)
    manager.kill()
    before = len(tokens)
    wait_until(lambda: len(tokens) > before + 5)
    stop.set()
    registering.join(BOUND_S)
    assert tokens == sorted(set(tokens))
    (state,) = manager.get_workers()
    assert (state.attempt, state.failure_count) == (len(tokens), len(tokens) - 1)


@pytest.mark.ray
def test_budget_survives_the_death_of_the_manager(make_manager: Callable[..., Manager]) -> None:
    """Failures are counted over SIGKILL of the manager, and a used up budget stays used up."""
    manager = make_manager(max_failures=1)
    manager.register_worker("w")
    manager.mark_worker_failed("w")
    manager.kill()
    assert manager.heartbeat("w") is False
    manager.register_worker("w")
    assert manager.status("w") == "recovered"
    manager.mark_worker_failed("w")
    with pytest.raises(MaxFailuresExceeded):
        manager.register_worker("w")
    manager.kill()
    assert manager.get_failed_workers() == ["w"]
    with pytest.raises(MaxFailuresExceeded):
        manager.register_worker("w")


@pytest.mark.ray
def test_monitoring_survives_the_death_of_the_manager(make_manager: Callable[..., Manager]) -> None:
    """A manager that is killed while it monitors goes on monitoring: who is silent fails, who beats does not."""
    manager = make_manager(heartbeat_interval=0.2, heartbeat_timeout=2.0)
    for name in ("silent", "beating"):
        manager.register_worker(name)
    for _ in range(2):
        manager.start_monitoring()
    manager.kill()

    def silent_has_failed() -> bool:
        assert manager.heartbeat("beating") is True
        return bool(manager.get_failed_workers() == ["silent"])

    wait_until(silent_has_failed)
    assert manager.heartbeat("silent") is False
    manager.register_worker("silent")
    for _ in range(2):
        manager.stop_monitoring()
    time.sleep(2.5)
    assert manager.get_failed_workers() == [], "after stop_monitoring nobody fails of silence"


@pytest.mark.ray
def test_frozen_manager_fails_nobody(make_manager: Callable[..., Manager]) -> None:
    """A manager that is stopped for longer than the timeout does not take its own absence for silence."""
    manager = make_manager(heartbeat_interval=0.3, heartbeat_timeout=2.0)
    manager.register_worker("w")
    manager.start_monitoring()
    answers: list[bool] = []
    stop = threading.Event()

    def beat_on() -> None:
        while not stop.wait(0.1):
            answers.append(manager.heartbeat("w"))

    beating = threading.Thread(target=beat_on)
    beating.start()
    wait_until(lambda: len(answers) > 3)
    pid = manager.pid
    os.kill(pid, signal.SIGSTOP)
    time.sleep(4.0)
    os.kill(pid, signal.SIGCONT)
    before = len(answers)
    wait_until(lambda: len(answers) > before + 10)
    stop.set()
    beating.join(BOUND_S)
    assert all(answers)
    assert manager.status("w") == "active"


@pytest.mark.ray
def test_hanging_store_stops_nobody_else(make_manager: Callable[..., Manager], tmp_path: Path) -> None:
    """While the log of one worker hangs, its heartbeat is answered with True, and all others are served."""
    manager = make_manager()
    manager.register_worker("v")
    folder = tmp_path / "c" / "manager" / "w"
    folder.mkdir(parents=True)
    os.mkfifo(folder / "000000001.json")  # whoever reads it waits for ever
    started = time.monotonic()
    hanging = [manager.handle.heartbeat.remote("w") for _ in range(100)]
    assert manager.heartbeat("v") is True
    assert manager.save_checkpoint("v", {"batch_id": 1})
    assert time.monotonic() - started < 1.5
    assert all(ray.get(hanging, timeout=BOUND_S))


@pytest.mark.ray
def test_named_manager_is_not_adopted_with_another_directory(ray_cluster: str, tmp_path: Path) -> None:
    """`get_if_exists` gives the manager of that name, or says that it is another one."""
    shared = RecoveryManager.options(name="mine", get_if_exists=True)
    handle = shared.remote(checkpoint_dir=tmp_path / "a")
    again = shared.remote(checkpoint_dir=tmp_path / "a")
    assert Manager(handle).pid == Manager(again).pid
    with pytest.raises(ManagerUnavailableError, match=r"actor 'mine'.*store"):
        shared.remote(checkpoint_dir=tmp_path / "b")
    ray.kill(handle)


# --- the manager of a job -------------------------------------------------------------------------------------------


@pytest.mark.ray
def test_one_manager_per_run(start_run: StartRun) -> None:
    """Everybody in a run gets the same manager; it answers as a `RecoveryManager` does."""
    run = start_run()
    shared = Manager(faultguard.manager())
    assert Manager(find_or_make(current_settings())).pid == shared.pid

    @ray.remote
    def pid_in_a_task() -> int:
        return int(ray.get(faultguard.manager().hello.remote(1, "", ""))["pid"])

    assert ray.get(pid_in_a_task.remote(), timeout=BOUND_S) == shared.pid
    shared.register_worker("w")
    assert shared.save_checkpoint("w", {"batch_id": 1}).startswith(run.checkpoint_dir)
    ray.kill(faultguard.manager())


@pytest.mark.ray
def test_manager_of_another_store_is_refused(start_run: StartRun) -> None:
    """The handshake names the difference."""
    start_run()
    faultguard.manager()
    settings = current_settings()
    forget(settings)
    with pytest.raises(ManagerUnavailableError) as raised:
        find_or_make(msgspec.structs.replace(settings, store_id="elsewhere"))
    assert f"store '{settings.store_id}', asked for is 'elsewhere'" in str(raised.value)
    assert manager_name(settings) in str(raised.value)
    ray.kill(faultguard.manager())


@pytest.mark.ray
def test_manager_of_another_run_or_protocol_is_refused(start_run: StartRun, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever has the name of this run's manager and is not it, is told from it by its run, and by what it speaks."""
    start_run()
    settings = current_settings()
    impostor = RecoveryManager.options(name=manager_name(settings), namespace=NAMESPACE).remote(checkpoint_dir=settings.checkpoint_dir)
    with pytest.raises(ManagerUnavailableError, match=f"run '', asked for is '{settings.run}'"):
        find_or_make(settings)
    ray.kill(impostor)
    wait_until(lambda: find(settings) is None)
    monkeypatch.setattr(_manager, "PROTOCOL", 99)
    with pytest.raises(ManagerUnavailableError, match="protocol 1, asked for is 99"):
        find_or_make(settings)
    found = find(settings)
    assert found is not None
    ray.kill(found)
    forget(settings)


@pytest.mark.ray
def test_killed_manager_is_made_anew(start_run: StartRun) -> None:
    """After `ray.kill` the old handle is dropped, and the next one is another actor of the same name."""
    start_run()
    settings = current_settings()
    before = Manager(faultguard.manager())
    pid = before.pid
    ray.kill(before.handle)
    forget(settings)
    after = Manager(find_or_make(settings))
    assert after.pid != pid
    ray.kill(after.handle)


@pytest.mark.ray
def test_thousands_can_pause(start_run: StartRun) -> None:
    """Pauses run side by side, and beats are answered meanwhile."""
    start_run()
    shared = Manager(faultguard.manager())
    started = time.monotonic()
    pauses = [shared.handle.pause.remote(3.0) for _ in range(2000)]
    assert shared.beat([beat()]) == (["ok"], 5.0)
    assert all(ray.get(pauses, timeout=100.0))
    assert time.monotonic() - started < 100.0, "one after another they would take 6000 s"
    assert shared.last_beat("embed", "w0")["age_s"] > 1.0
    ray.kill(shared.handle)


@pytest.mark.ray
def test_views_show_a_decorated_worker(start_run: StartRun) -> None:
    """`workers()` shows a worker while it runs, with its heartbeat, and how it ended; short tasks make no manager."""
    start_run(heartbeat_interval=0.2, heartbeat_timeout=2.0)
    settings = current_settings()

    @faultguard.recoverable
    @ray.remote
    def work(worker_id: str, seconds: float) -> int:
        for _ in faultguard.batches(range(10)):
            time.sleep(seconds)
        return 10

    assert ray.get(work.remote("short", 0.0), timeout=BOUND_S) == 10
    assert find(settings) is None, "a task that ends at once makes no actor"
    assert [state.status for state in faultguard.workers()] == ["completed"]
    pending = work.remote("long", 0.3)

    def live() -> WorkerState | None:
        return next((state for state in faultguard.workers() if state.worker_id == "long" and state.position), None)

    wait_until(lambda: live() is not None)
    wait_until(lambda: (state := live()) is not None and (state.current_batch or 0) >= 4)
    state = live()
    assert state is not None
    assert (state.status, state.silent, state.total_batches, state.attempt) == ("active", False, 10, 1)
    assert state.last_heartbeat is not None
    assert time.time() - state.last_heartbeat < 5.0
    assert ray.get(pending, timeout=BOUND_S) == 10
    assert {state.worker_id: state.status for state in faultguard.workers()} == {"long": "completed", "short": "completed"}
    ray.kill(faultguard.manager())


DRIVER = """
import sys, time, ray, faultguard
from faultguard import _beater
from faultguard._session import current_settings
from faultguard._manager import find, manager_name
ray.init(address=sys.argv[1], log_to_driver=False)
faultguard.init(checkpoint_dir=sys.argv[2], heartbeat_interval=0.2, heartbeat_timeout=2.0)
class Source:
    settings = current_settings()
    def lasts(self): pass
    def begins(self): pass
    def told(self, reply): pass
    def beat(self):
        return dict(task="t", worker_id="w", attempt=1, token=1, status="active", current_batch=0, position=(), total_batches=None,
                    node_id="", pid=0, started_at=0.0, last_checkpoint=None, failure_count=0)
    final_beat = beat
_beater.register(Source())
while find(Source.settings) is None or not ray.get(find(Source.settings).live_workers.remote()):
    time.sleep(0.05)
print(manager_name(Source.settings), ray.get(find(Source.settings).hello.remote(1, "", ""))["pid"])
"""


@pytest.mark.ray
def test_manager_leaves_with_its_job(ray_cluster: str, tmp_path: Path) -> None:
    """A driver that ends while it beats ends cleanly, and its manager goes by itself soon after, for good."""
    address = ray.get_runtime_context().gcs_address
    command = [sys.executable, "-c", DRIVER, address, str(tmp_path / "c")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    assert "Fatal" not in done.stderr
    name, pid = done.stdout.split()
    wait_until(lambda: name not in {actor["name"] for actor in ray.util.list_named_actors(all_namespaces=True)})
    wait_until(lambda: not Path(f"/proc/{pid}").exists())
