"""Who is silent, and who only looks so: processes that are stopped, holders that are gone, and a store that hangs under a loop."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import ray

import faultguard
from faultguard import _manager
from faultguard._core.names import encode_name
from faultguard._ray import has_died
from tests.needs import require_a_look_at_parents
from tests.tasks import (
    NOWAIT,
    Trace,
    expected,
    loop_in_c,
    manager_pid,
    ray_logs,
    records,
    result,
    stopped,
    told,
    wait_until,
    wait_until_heard,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.conftest import StartRun

pytestmark = pytest.mark.ray
WAIT_S = 90
INTERVAL_S, TIMEOUT_S = 0.2, 1.5
REPOSITORY = Path(__file__).parents[1]


def state_of(worker: str) -> Any:
    """How `workers()` shows a worker, None before it does."""
    return next((state for state in faultguard.workers() if state.worker_id == worker), None)


def is_silent(worker: str) -> bool:
    """Whether it is marked so."""
    state = state_of(worker)
    return state is not None and state.silent


@faultguard.recoverable(every=1, backoff=NOWAIT)
@ray.remote(num_cpus=0.5)
def steps(worker_id: str, n: int, seconds: float, trace: Trace, then_s: float | None = None) -> Any:
    """A loop that takes its time, another one in its later attempts."""
    ckpt = faultguard.current()
    for batch in ckpt.batches(range(n)):
        trace.note("batch", worker_id, attempt=ckpt.attempt, batch=batch)
        time.sleep(seconds if ckpt.attempt == 1 or then_s is None else then_s)
        ckpt.state["sum"] = ckpt.state.get("sum", 0) + batch
        ckpt.state.setdefault("seen", []).append(batch)
    return result(ckpt)


def test_a_stopped_worker_is_marked_silent(start_run: StartRun, trace: Trace, ray_cluster: str) -> None:
    """Its manager says so once, and takes the mark away with the first beat; the work is the same as without."""
    start_run(heartbeat_interval=INTERVAL_S, heartbeat_timeout=TIMEOUT_S)
    ref = steps.remote("stopped", 30, 0.1, trace)
    pid = int(wait_until(lambda: trace.notes("batch"))[0]["pid"])
    wait_until_heard("stopped")
    with stopped(pid):
        wait_until(lambda: is_silent("stopped"))
        assert state_of("stopped").status == "active"
    wait_until(lambda: not is_silent("stopped"))
    assert ray.get(ref, timeout=WAIT_S) == expected(30)
    assert {note["attempt"] for note in trace.notes("batch")} == {1}
    lines = [line for log in ray_logs(ray_cluster) for line in log.splitlines()]
    assert len([line for line in lines if "'steps/stopped' attempt 1 is silent" in line]) == 1


@ray.remote(num_cpus=0.5, max_retries=0)
def hold(worker_id: str, trace: Trace, elsewhere: bool, is_mute: bool) -> str:
    """Holds a worker until the test says "enough"; looks like a process of another host, and sends one beat only, if it is told to."""
    from faultguard import _attempt, _beater

    this_process, send = vars(_attempt)["this_process"], _beater._Line._send
    if elsewhere:
        _attempt.this_process = lambda: replace(this_process(), boot_id="elsewhere")  # type: ignore[attr-defined]
    try:
        with faultguard.checkpointed(worker_id, every=1) as ckpt:
            for batch in ckpt.batches(range(10_000)):
                trace.note("batch", worker_id, attempt=ckpt.attempt, batch=batch)
                if is_mute and batch == 3:  # a long one: nothing is written either
                    wait_until(lambda: trace.notes("heard"), WAIT_S)
                    _beater._Line._send = lambda *_: None  # type: ignore[method-assign]
                    wait_until(lambda: trace.notes("enough"), WAIT_S)
                if not (elsewhere or is_mute) or trace.notes("enough"):
                    return "completed"
                time.sleep(0.05)
    except faultguard.SupersededError:
        return "superseded"
    finally:
        _attempt.this_process, _beater._Line._send = this_process, send  # type: ignore[attr-defined, method-assign]
    return "used up"


@ray.remote(num_cpus=0.5, max_retries=0)
def asks_from_afar(worker_id: str, trace: Trace) -> str:
    """Wants a worker whose holder it cannot see, as if that was on another host."""
    from faultguard import _attempt

    is_dead = vars(_attempt)["is_dead"]
    _attempt.is_dead = lambda _: None  # type: ignore[attr-defined, assignment]
    try:
        with faultguard.checkpointed(worker_id, every=1) as ckpt:
            trace.note("batch", worker_id, attempt=ckpt.attempt, batch=ckpt.current_batch)
            return "completed"
    finally:
        _attempt.is_dead = is_dead  # type: ignore[attr-defined]


def test_a_silent_holder_that_nobody_can_see_is_replaced(start_run: StartRun, trace: Trace) -> None:
    """Another task takes the worker over when its holder has been silent for `heartbeat_timeout`; the holder hears it when it thaws."""
    start_run(heartbeat_interval=INTERVAL_S, heartbeat_timeout=TIMEOUT_S)
    holder = hold.remote("w", trace, True, False)
    pid = int(wait_until(lambda: trace.notes("batch"))[0]["pid"])
    wait_until_heard("w")
    with stopped(pid):
        assert ray.get(hold.remote("w", trace, False, False), timeout=WAIT_S) == "completed"
    assert ray.get(holder, timeout=WAIT_S) == "superseded"
    first = next(note for note in trace.notes("batch") if note["attempt"] == 2)
    assert first["batch"] > 0


def test_a_holder_that_beats_is_not_replaced(start_run: StartRun, trace: Trace) -> None:
    """However long the other one waits: whoever beats lives."""
    start_run(heartbeat_interval=INTERVAL_S, heartbeat_timeout=TIMEOUT_S)
    holder = hold.remote("w", trace, True, False)
    wait_until(lambda: trace.notes("batch"))
    with pytest.raises(faultguard.DuplicateWorkerError, match="is held by another live task"):
        ray.get(hold.remote("w", trace, False, False), timeout=WAIT_S)
    trace.note("enough", "w")
    assert ray.get(holder, timeout=WAIT_S) == "completed"
    assert {note["attempt"] for note in trace.notes("batch")} == {1}


@pytest.mark.parametrize("manager", ["lives", "is another one"])
def test_a_holder_whose_beats_are_lost_is_not_replaced(manager: str, start_run: StartRun, trace: Trace) -> None:
    """That nothing is heard of it is not enough: somebody looks on its node first, and sees that it lives.

    Also if nobody who hears it is left: a manager that takes the place of another one asks the nodes whom they hold.
    """
    start_run(heartbeat_interval=INTERVAL_S, heartbeat_timeout=TIMEOUT_S)
    holder = hold.options(name="both").remote("w", trace, False, True)
    wait_until(lambda: trace.notes("batch"))
    wait_until_heard("w")
    trace.note("heard", "w")
    if manager == "is another one":
        first = faultguard.manager()
        ray.kill(first, no_restart=True)
        wait_until(lambda: has_died(first))
        faultguard.manager()
        time.sleep(2 * TIMEOUT_S)  # it has listened for long enough to call silent whom it does not hear
    with pytest.raises(faultguard.DuplicateWorkerError, match="is held by another live task"):
        ray.get(asks_from_afar.options(name="both").remote("w", trace), timeout=WAIT_S)
    trace.note("enough", "w")
    assert ray.get(holder, timeout=WAIT_S) == "completed"
    assert {note["attempt"] for note in trace.notes("batch")} == {1}


@faultguard.recoverable(every=1, backoff=NOWAIT)
@ray.remote(num_cpus=0.5)
def over_a_hanging_store(worker_id: str, n: int, trace: Trace) -> Any:
    """From batch 3 on every write hangs until the test says "enough"; the loop goes on meanwhile."""
    from faultguard.storage.local import LocalStore

    ckpt, create = faultguard.current(), LocalStore.create

    def hangs(self: LocalStore, key: str, data: bytes, *, durable: bool = True) -> bool:
        wait_until(lambda: trace.notes("enough"), WAIT_S)
        return create(self, key, data, durable=durable)

    try:
        for batch in ckpt.batches(range(n)):
            if batch == 3:
                LocalStore.create = hangs  # type: ignore[method-assign]
            trace.note("batch", worker_id, attempt=ckpt.attempt, batch=batch, durable=ckpt.durable_batch)
            time.sleep(0.1)
            ckpt.state["sum"] = ckpt.state.get("sum", 0) + batch
            ckpt.state.setdefault("seen", []).append(batch)
    finally:
        LocalStore.create = create  # type: ignore[method-assign]
    return result(ckpt)


def test_a_store_that_hangs_makes_no_worker_look_dead(start_run: StartRun, trace: Trace) -> None:
    """Its beats and its loop go on, nothing is durable meanwhile, and when the store is back the newest state is."""
    n, hung_s = 80, 3 * TIMEOUT_S
    run = start_run(heartbeat_interval=INTERVAL_S, heartbeat_timeout=TIMEOUT_S)
    ref = over_a_hanging_store.remote("hung", n, trace)

    def batches() -> list[dict[str, Any]]:
        return [note for note in trace.notes("batch") if note["batch"] > 3]

    wait_until(lambda: (found := batches()) and found[-1]["time"] - found[0]["time"] > hung_s and not is_silent("hung"))
    assert batches()[-1]["durable"] <= 4
    newest, state = batches()[-1]["batch"], state_of("hung")
    assert state.current_batch >= newest - 20, "the view follows the loop, not the store"
    trace.note("enough", "hung")
    assert ray.get(ref, timeout=WAIT_S) == expected(n)
    assert {note["attempt"] for note in trace.notes("batch")} == {1}
    end = records(run, "over_a_hanging_store", "hung")[-1]
    assert end.kind == "end"
    assert end.snapshot is not None
    assert end.snapshot.batch == n


# --- probes ---------------------------------------------------------------------------------------------------------


def attempts(trace: Trace) -> set[int]:
    """Of the worker of a test."""
    return {note["attempt"] for note in trace.notes("batch")}


def test_a_stopped_worker_is_replaced(start_run: StartRun, trace: Trace, ray_cluster: str) -> None:
    """Nobody continues it: its process is ended, and the next attempt does the rest. It is charged as the crash that it is."""
    run = start_run(heartbeat_interval=INTERVAL_S, heartbeat_timeout=TIMEOUT_S)
    ref = steps.remote("replaced", 60, 0.5, trace, 0.02)
    pid = int(wait_until(lambda: trace.notes("batch"))[0]["pid"])
    wait_until_heard("replaced")
    os.kill(pid, signal.SIGSTOP)
    assert ray.get(ref, timeout=WAIT_S) == expected(60)
    assert attempts(trace) == {1, 2}
    assert [failure.cause for failure in records(run, "steps", "replaced")[-1].failures] == ["stopped"]
    assert len(wait_until(lambda: told(ray_cluster, "'steps/replaced' attempt 1 was stopped by a signal; its process is ended"))) == 1


HOLDING_DRIVER = """
import sys, time
import ray, faultguard
from tests.tasks import Trace, wait_until_heard
address, directory, interval_s, timeout_s = sys.argv[1:]
ray.init(address=address, log_to_driver=False)
trace = Trace(directory + "/trace")
with (
    faultguard.init(checkpoint_dir=directory, heartbeat_interval=float(interval_s), heartbeat_timeout=float(timeout_s)),
    faultguard.checkpointed("held", every=1, stall_timeout=60) as ckpt,
):
    for batch in ckpt.batches(range(10**6)):
        if batch == 0:
            wait_until_heard("held")
        trace.note("batch", "held", attempt=ckpt.attempt, batch=batch)
        time.sleep(0.05)
        if trace.notes("go"):
            break
"""


@contextlib.contextmanager
def holding_driver(directory: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A driver of this cluster with a worker of its own; it is ended with the block."""
    address = ray.get_runtime_context().gcs_address
    command = [sys.executable, "-c", HOLDING_DRIVER, address, str(directory), str(INTERVAL_S), str(TIMEOUT_S)]
    driver = subprocess.Popen(command, cwd=REPOSITORY)
    try:
        yield driver
    finally:
        driver.kill()
        driver.wait(WAIT_S)


def test_a_stopped_driver_is_not_ended(trace: Trace, tmp_path: Path, ray_cluster: str) -> None:
    """As after Ctrl-Z: nothing would replace it. That is told once, and it goes on where it stood."""
    with holding_driver(tmp_path) as driver:
        wait_until(lambda: any(note["batch"] >= 3 for note in trace.notes("batch")))
        with stopped(driver.pid):
            wait_until(lambda: told(ray_cluster, "/held' attempt 1 is stopped by a signal"))
            time.sleep(3 * TIMEOUT_S)
            assert driver.poll() is None
            newest = trace.notes("batch")[-1]["batch"]
        wait_until(lambda: trace.notes("batch")[-1]["batch"] > newest)
        trace.note("go", "test")
        assert driver.wait(WAIT_S) == 0
    assert attempts(trace) == {1}
    (line,) = told(ray_cluster, "/held' attempt 1 is stopped by a signal")
    assert "its process is left alone" in line


def test_a_stopped_worker_is_replaced_also_if_its_manager_dies(start_run: StartRun, trace: Trace) -> None:
    """A manager that comes back asks the nodes whom they hold: who stood still before cannot tell it."""
    start_run(heartbeat_interval=INTERVAL_S, heartbeat_timeout=TIMEOUT_S)
    refs = [steps.remote(worker, 30, 0.1, trace) for worker in ("still", "works")]
    wait_until_heard("still")
    wait_until_heard("works")
    os.kill(trace.notes("batch", "still")[-1]["pid"], signal.SIGSTOP)
    os.kill(manager_pid(), signal.SIGKILL)
    assert ray.get(refs, timeout=WAIT_S) == [expected(30)] * 2
    assert {note["attempt"] for note in trace.notes("batch", "still")} == {1, 2}
    assert {note["attempt"] for note in trace.notes("batch", "works")} == {1}


def test_a_manager_that_cannot_start_any_more_is_not_started_for_ever(
    start_run: StartRun, trace: Trace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ray has lost its class, as with a job that ended: the next heartbeat makes another one, which asks the nodes, too."""
    monkeypatch.setattr(_manager, "MAX_RESTARTS", 2)
    start_run(heartbeat_interval=INTERVAL_S, heartbeat_timeout=TIMEOUT_S)
    first = faultguard.manager()
    refs = [steps.remote(worker, 120, 0.1, trace) for worker in ("still", "works")]
    wait_until_heard("still")
    wait_until_heard("works")
    with without_actor_classes():
        os.kill(trace.notes("batch", "still")[-1]["pid"], signal.SIGSTOP)
        os.kill(manager_pid(), signal.SIGKILL)
        wait_until(lambda: has_died(first))
    assert ray.get(refs, timeout=WAIT_S) == [expected(120)] * 2
    assert {note["attempt"] for note in trace.notes("batch", "still")} == {1, 2}
    assert {note["attempt"] for note in trace.notes("batch", "works")} == {1}
    assert faultguard.manager()._actor_id != first._actor_id


@contextlib.contextmanager
def without_actor_classes() -> Iterator[None]:
    """For a while Ray lacks what it starts the actors of this job from, as it does for good when a job has ended."""
    private: Any = ray._private
    client, space = private.worker.global_worker.gcs_client, private.ray_constants.KV_NAMESPACE_FUNCTION_TABLE
    keys = client.internal_kv_keys(b"ActorClass:" + ray.get_runtime_context().get_job_id().encode(), space)
    classes = {key: client.internal_kv_get(key, space) for key in keys}
    for key in classes:
        client.internal_kv_del(key, False, space)
    try:
        yield
    finally:
        for key, value in classes.items():
            client.internal_kv_put(key, value, True, space)


def test_a_worker_that_stops_before_its_manager_has_heard_it_is_replaced(start_run: StartRun, trace: Trace, ray_cluster: str) -> None:
    """It began while the manager was frozen: that one asks the nodes when it is back, because nobody beats twice for the first time."""
    start_run(heartbeat_interval=INTERVAL_S, heartbeat_timeout=TIMEOUT_S)
    others = [steps.remote(f"other{number}", 100, 0.1, trace) for number in range(2)]
    for number in range(2):
        wait_until_heard(f"other{number}")
    marks = Path(ray_cluster) / "session_latest" / "faultguard"
    with stopped(manager_pid()):
        ref = steps.remote("unheard", 30, 0.1, trace)
        pid = wait_until(lambda: trace.notes("batch", "unheard"))[0]["pid"]
        wait_until(lambda: [*marks.glob(f"{pid}-*.json")])
        os.kill(pid, signal.SIGSTOP)
        time.sleep(3 * TIMEOUT_S)
    assert ray.get([ref, *others], timeout=WAIT_S) == [expected(30), expected(100), expected(100)]
    assert {note["attempt"] for note in trace.notes("batch", "unheard")} == {1, 2}
    assert {note["attempt"] for note in trace.notes("batch") if note["worker"] != "unheard"} == {1}


@faultguard.recoverable(every=1, backoff=NOWAIT)
@ray.remote(num_cpus=0.5)
def in_c(worker_id: str, kind: str, seconds: float, trace: Trace) -> Any:
    """See `loop_in_c`."""
    return loop_in_c(worker_id, kind, seconds, trace)


@faultguard.recoverable(every=1, backoff=NOWAIT, stall_timeout=1.0)
@ray.remote(num_cpus=0.5)
def in_c_with_timeout(worker_id: str, kind: str, seconds: float, trace: Trace) -> Any:
    """See `loop_in_c`."""
    return loop_in_c(worker_id, kind, seconds, trace)


def test_c_code_that_holds_the_interpreter_is_left_alone(start_run: StartRun, trace: Trace, ray_cluster: str) -> None:
    """It beats not, and marks no file, for three times `heartbeat_timeout`: it may be healthy, and here it is."""
    start_run(heartbeat_interval=INTERVAL_S, heartbeat_timeout=TIMEOUT_S)
    ref = in_c.remote("burns", "burn", 3 * TIMEOUT_S, trace)
    wait_until_heard("burns")
    trace.note("go", "burns")
    assert ray.get(ref, timeout=WAIT_S) == expected(6)
    assert attempts(trace) == {1}
    assert told(ray_cluster, "'in_c/burns' attempt 1 is silent")
    assert len(told(ray_cluster, "'in_c/burns' attempt 1 stands still")) <= 1, "once, however often it is looked at"


def test_a_section_without_a_limit_may_hold_the_interpreter(start_run: StartRun, trace: Trace, ray_cluster: str) -> None:
    """The timeout of its task does not hold in there, for nobody: the process says so on its node before it begins."""
    start_run(heartbeat_interval=INTERVAL_S, heartbeat_timeout=TIMEOUT_S)
    ref = in_c_with_timeout.remote("untimed", "burn untimed", 15, trace)
    wait_until_heard("untimed")
    trace.note("go", "untimed")
    assert ray.get(ref, timeout=WAIT_S) == expected(6)
    assert attempts(trace) == {1}
    assert told(ray_cluster, "'in_c_with_timeout/untimed' attempt 1 stands still, and may have a reason")


@pytest.mark.parametrize("kind", ["hang", "hang twice"])
def test_hung_in_c_with_the_interpreter(kind: str, start_run: StartRun, trace: Trace, ray_cluster: str) -> None:
    """No thread of the process can see it, so its `stall_timeout` is enforced from outside; also straight after the start."""
    run = start_run(heartbeat_interval=INTERVAL_S, heartbeat_timeout=TIMEOUT_S)
    ref = in_c_with_timeout.remote(kind, kind, 300, trace)
    wait_until_heard(kind)
    trace.note("go", kind)
    assert ray.get(ref, timeout=WAIT_S) == expected(6)
    assert attempts(trace) == ({1, 2} if kind == "hang" else {1, 2, 3})
    failures = records(run, "in_c_with_timeout", encode_name(kind))[-1].failures
    assert {failure.cause for failure in failures} == {"stall"}
    wait_until(lambda: told(ray_cluster, f"'in_c_with_timeout/{kind}' attempt 1 stood still for longer than its stall_timeout"))
    require_a_look_at_parents()
    assert re.search(r"\b(clock_)?nanosleep\b|\bsleep\b", failures[-1].stacks), failures[-1].stacks


def test_hung_in_c_with_the_interpreter_at_once(start_run: StartRun, trace: Trace) -> None:
    """Also the very first batch of a run, before anybody has made a manager."""
    start_run(heartbeat_interval=INTERVAL_S, heartbeat_timeout=TIMEOUT_S)
    assert ray.get(in_c_with_timeout.remote("at once", "hang at once", 300, trace), timeout=WAIT_S) == expected(6)
    assert trace.begins("at once") == [0]
    assert attempts(trace) == {2}


def test_a_manager_that_was_frozen_blames_nobody(start_run: StartRun, trace: Trace, ray_cluster: str) -> None:
    """For three times `heartbeat_timeout` it heard nothing, because it did not listen."""
    start_run(heartbeat_interval=INTERVAL_S, heartbeat_timeout=TIMEOUT_S)
    ref = steps.remote("not listened to", 80, 0.1, trace)
    wait_until_heard("not listened to")
    with stopped(manager_pid()):
        time.sleep(3 * TIMEOUT_S)
    assert ray.get(ref, timeout=WAIT_S) == expected(80)
    assert attempts(trace) == {1}
    assert not told(ray_cluster, "'steps/not listened to' attempt 1 is silent")


@faultguard.recoverable(every=1, backoff=NOWAIT)
@ray.remote(num_cpus=0.5)
def mute(worker_id: str, n: int, trace: Trace) -> Any:
    """A loop whose beats are lost after the first one."""
    from faultguard import _beater

    ckpt, send = faultguard.current(), _beater._Line._send
    try:
        for batch in ckpt.batches(range(n)):
            if trace.notes("go"):
                _beater._Line._send = lambda *_: None  # type: ignore[method-assign]
            trace.note("batch", worker_id, attempt=ckpt.attempt, batch=batch)
            time.sleep(0.1)
            ckpt.state["sum"] = ckpt.state.get("sum", 0) + batch
            ckpt.state.setdefault("seen", []).append(batch)
    finally:
        _beater._Line._send = send  # type: ignore[method-assign]
    return result(ckpt)


def test_beats_that_are_lost_on_their_way_harm_nobody(start_run: StartRun, trace: Trace, ray_cluster: str) -> None:
    """A probe sees on the node that the process lives."""
    start_run(heartbeat_interval=INTERVAL_S, heartbeat_timeout=TIMEOUT_S)
    ref = mute.remote("mute", 100, trace)
    wait_until_heard("mute")
    trace.note("go", "mute")
    wait_until(lambda: is_silent("mute"))
    wait_until(lambda: not is_silent("mute"))
    assert ray.get(ref, timeout=WAIT_S) == expected(100)
    assert attempts(trace) == {1}
    assert told(ray_cluster, "'mute/mute' attempt 1 is silent")


def test_frozen_and_thawed_within_the_timeout(start_run: StartRun, trace: Trace) -> None:
    """Again and again, and nobody minds."""
    start_run(heartbeat_interval=INTERVAL_S, heartbeat_timeout=TIMEOUT_S)
    ref = steps.remote("thawed", 30, 0.1, trace)
    pid = int(wait_until(lambda: trace.notes("batch"))[0]["pid"])
    wait_until_heard("thawed")
    for _ in range(3):
        with stopped(pid):
            time.sleep(0.6 * TIMEOUT_S)
        time.sleep(2 * INTERVAL_S)
    assert ray.get(ref, timeout=WAIT_S) == expected(30)
    assert attempts(trace) == {1}


STALL_S, FROZEN_S, PAUSE_S, PAUSES = 2.5, 3.0, 0.05, 20


@faultguard.recoverable(every=1, max_failures=0, stall_timeout=STALL_S)
@ray.remote(num_cpus=0.5)
def in_short_sleeps(worker_id: str, n: int, trace: Trace) -> Any:
    """Batches of many short sleeps, of which none comes near to the timeout."""
    ckpt = faultguard.current()
    for batch in ckpt.batches(range(n)):
        trace.note("batch", worker_id, attempt=ckpt.attempt, batch=batch)
        for number in range(PAUSES):
            time.sleep(PAUSE_S)
            trace.note("slept", worker_id, batch=batch, number=number)
        ckpt.state["sum"] = ckpt.state.get("sum", 0) + batch
        ckpt.state.setdefault("seen", []).append(batch)
    return result(ckpt)


def test_a_thawed_process_does_not_strike_its_own_worker(start_run: StartRun, trace: Trace) -> None:
    """Frozen in the middle of a batch for longer than its `stall_timeout`: its own absence is nobody's stall."""
    run = start_run(heartbeat_interval=INTERVAL_S, heartbeat_timeout=2 * FROZEN_S)
    ref = in_short_sleeps.remote("thawed", 8, trace)
    wait_until_heard("thawed")
    wait_until(lambda: (slept := trace.notes("slept")) and PAUSES / 4 < slept[-1]["number"] < PAUSES / 2)
    with stopped(trace.notes("slept")[-1]["pid"]):
        time.sleep(FROZEN_S)
    assert ray.get(ref, timeout=WAIT_S) == expected(8)
    assert attempts(trace) == {1}
    assert records(run, "in_short_sleeps", "thawed")[-1].failures == ()
    slept = trace.notes("slept")
    before, after = max(pairwise(slept), key=lambda two: two[1]["time"] - two[0]["time"])
    assert after["time"] - before["time"] > STALL_S
    assert before["batch"] == after["batch"], "it was frozen inside of a batch"
