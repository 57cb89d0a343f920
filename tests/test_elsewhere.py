"""After two failures in a row on one node the next attempt prefers another one; where there is none, nothing is different."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

import faultguard
from faultguard import _elsewhere, _ray
from faultguard._core.records import FailureRecord
from faultguard._elsewhere import NotBegunError, failed_on
from faultguard._recoverable import _may_move
from tests.disks import where_it_is_another
from tests.nodes import WORK, Nodes, alive, some_nodes
from tests.tasks import NOWAIT, Trace, expected, records, result, wait_until

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from contextlib import AbstractContextManager

    from faultguard._core.records import Record
    from tests.conftest import StartRun

WAIT_S = 90
N = 16
INTERVAL_S = 0.5
CAUSE = {"raise": "exception", "kill": "crash"}


@pytest.fixture(scope="module")
def nodes() -> Iterator[Nodes]:
    """A head, and nodes for each test."""
    with some_nodes() as nodes:
        yield nodes


@pytest.fixture(scope="module")
def ray_cluster(nodes: Nodes) -> str:
    """Its directory."""
    return nodes.directory


@pytest.fixture
def run(start_run: StartRun) -> faultguard.Run:
    """A run that beats often."""
    return start_run(heartbeat_interval=INTERVAL_S)


@faultguard.recoverable(every=1, backoff=NOWAIT, max_failures=5)
@ray.remote(num_cpus=1, resources={WORK: 1})
def fails(worker_id: str, trace: Trace, plan: list[str]) -> Any:
    """Does two batches in each attempt, and ends it in the next one as is planned."""
    ckpt = faultguard.current()
    node, end = ray.get_runtime_context().get_node_id(), plan[ckpt.attempt - 1]
    trace.note("begin", worker_id, attempt=ckpt.attempt, node=node, token=ckpt.token, batch=ckpt.current_batch)
    for drawn, batch in enumerate(ckpt.batches(range(N))):
        ckpt.state["sum"] = ckpt.state.get("sum", 0) + batch
        if drawn == 2:
            wait_until(lambda: trace.notes("go", worker_id) or ckpt.attempt != 2, WAIT_S)
            if end == "raise":
                raise ConnectionError("planned")
            if end == "time out":
                raise ray.exceptions.GetTimeoutError("planned")
            if end == "refuse":
                raise faultguard.UsageError("refused")
            if end == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
        while end == "wait" and drawn == 3 and not trace.notes("on", worker_id):
            time.sleep(0.01)
            ckpt.check()
        ckpt.state.setdefault("seen", []).append(batch)
        ckpt.advance(wait=True)
    return result(ckpt)


def begins(trace: Trace, *, worker: str = "w") -> list[str]:
    """The node of each attempt."""
    return [note["node"] for note in trace.notes("begin", worker)]


@contextlib.contextmanager
def second_fails(
    nodes: Nodes, trace: Trace, plan: list[str], meanwhile: Callable[[Any, Any], AbstractContextManager[Any]] | None = None
) -> Iterator[tuple[Any, Any, Any]]:
    """Begin on a node that is alone, and add another one when the second attempt is about to fail. Gives the ref and both nodes."""
    first = alone(nodes)
    ref = fails.remote("w", trace, plan)
    try:
        wait_until(lambda: len(begins(trace)) == 2, WAIT_S)
        second = nodes.add(1)
        wait_until(lambda: ray.get(sees.options(scheduling_strategy=on(first)).remote(second.node_id), timeout=WAIT_S), WAIT_S)
        wait_until(lambda: free_cpus(second) == 1, WAIT_S)
        with meanwhile(first, second) if meanwhile is not None else contextlib.nullcontext():
            trace.note("go", "w")
            yield ref, first, second
    finally:
        if not ray.wait([ref], timeout=0)[0]:  # the test has failed
            ray.cancel(ref, force=True)
        for node in nodes.workers:
            if node is not first:
                nodes.remove(node)


def on(node: Any) -> NodeAffinitySchedulingStrategy:
    """There, and nowhere else."""
    return NodeAffinitySchedulingStrategy(node.node_id, soft=False)


@ray.remote(num_cpus=0, max_retries=0)
def sees(node_id: str) -> bool:
    """Whether the node of this task knows that one: news take a moment from node to node."""
    try:
        return bool(ray.get(_ray.run_there(ray.is_initialized, node_id, {}, "sees"), timeout=WAIT_S))
    except ray.exceptions.TaskUnschedulableError:
        return False


def alone(nodes: Nodes) -> Any:
    """The only node: that of the test before, if it is still there."""
    return next(iter(nodes.workers), None) or nodes.add(1)


def free_cpus(node: Any) -> float:
    """What Ray would give away there now."""
    state: Any = ray._private.state
    return float(state.available_resources_per_node().get(node.node_id, {}).get("CPU", 0.0))


def end_of(run: faultguard.Run) -> Record:
    """The newest record."""
    return records(run, "fails", "w")[-1]


def saved(run: faultguard.Run) -> int:
    """Batches in it."""
    snapshot = end_of(run).snapshot
    return snapshot.batch if snapshot is not None else 0


def test_two_in_a_row_count() -> None:
    """Two, the last ones, on this node."""
    failures = [FailureRecord("crash", number, 0, node_id=node) for number, node in enumerate("abaa")]
    assert failed_on("a", failures)
    assert [failed_on("a", failures[:count]) for count in range(4)] == [False] * 4
    assert not failed_on("b", failures)


@pytest.mark.parametrize(
    ("options", "moves"),
    [
        ({}, True),
        ({"num_cpus": 2, "scheduling_strategy": "SPREAD"}, True),
        ({"scheduling_strategy": NodeAffinitySchedulingStrategy("ab" * 28, soft=False)}, False),
        ({"label_selector": {"zone": "a"}}, False),
    ],
)
def test_where_the_user_says_where_it_runs_there_it_runs(options: dict[str, Any], moves: bool) -> None:
    """Only what Ray may put anywhere goes elsewhere."""
    assert _may_move(options) is moves


class Left(Exception):  # noqa: N818 - it is no error: the process is gone
    """In the place of its end."""


def leave() -> None:
    """End the process."""
    raise Left


@pytest.mark.parametrize(
    ("error", "begun", "raised"),
    [
        (_ray.LostError(), True, Left),
        (_ray.LostError(), None, Left),
        (_ray.LostError(), False, NotBegunError),
        (ConnectionError(), True, ConnectionError),
        (ConnectionError(), None, ConnectionError),
        (ConnectionError(), False, NotBegunError),
        (_ray.LateError(), False, NotBegunError),
    ],
)
def test_what_goes_wrong_there(monkeypatch: pytest.MonkeyPatch, error: Exception, begun: bool | None, raised: type[Exception]) -> None:
    """Before its claim it is nothing, and this attempt, the later one, goes on here; else, or if nobody knows, that came of it."""

    def outcome_of(*_: Any) -> None:
        raise error

    withdrawn: list[Any] = []
    monkeypatch.setattr(_ray, "node_with_room", lambda tried: next((node for node in "abcdefg" if node not in tried), ""))
    monkeypatch.setattr(_ray, "outcome_of", outcome_of)
    monkeypatch.setattr(_ray, "cancel", withdrawn.append)
    monkeypatch.setattr(_elsewhere, "_slow_until", {})
    sent: list[tuple[str, int]] = []

    def submit(node_id: str, local_retry: int) -> str:
        sent.append((node_id, local_retry))
        return f"ref of {local_retry}"

    there = _elsewhere.Elsewhere("w", "a", submit, 1.0)
    with pytest.raises(raised) as caught:
        there.run(2, lambda _: begun, leave)
    late = isinstance(error, _ray.LateError)
    assert [node for node, _ in sent] == (["b", "c", "d"] if begun is False and not late else ["b"])
    assert there.beside == (2 if late else -1)
    there.withdraw()
    assert withdrawn == (["ref of 2"] if late else [])
    if isinstance(caught.value, NotBegunError):
        assert caught.value.local_retry > max(number for _, number in sent) + 100, "room for the retries in the process there"
        sent.clear()
        with pytest.raises(NotBegunError):
            there.run(5000, lambda _: begun, leave)
        assert sent[0] == ("c" if late else "b", 5000), "one that was late is left alone for a while"


@pytest.mark.ray
@pytest.mark.parametrize("how", ["raise", "kill"])
def test_the_third_attempt_runs_on_another_node(nodes: Nodes, run: faultguard.Run, trace: Trace, how: str) -> None:
    """After exceptions and after crashes; its result, history and budget are those of any other attempt."""
    with second_fails(nodes, trace, [how, how, "done"]) as (ref, first, second):
        assert ray.get(ref, timeout=WAIT_S) == expected(N)
        assert begins(trace) == [first.node_id, first.node_id, second.node_id]
        end = end_of(run)
        assert [(failure.cause, failure.node_id) for failure in end.failures] == [(CAUSE[how], first.node_id)] * 2
        assert (end.attempt, end.charged, end.owner.node_id) == (3, 2, second.node_id)
        assert [note["batch"] for note in trace.notes("begin")] == [0, 2, 4]


@pytest.mark.ray
def test_alone_it_goes_on_where_it_is(nodes: Nodes, run: faultguard.Run, trace: Trace) -> None:
    """Nothing is different."""
    node = alone(nodes)
    trace.note("go", "w")
    assert ray.get(fails.remote("w", trace, ["raise", "raise", "kill", "kill", "done"]), timeout=WAIT_S) == expected(N)
    assert begins(trace) == [node.node_id] * 5
    assert (end_of(run).attempt, end_of(run).charged) == (5, 4)


@pytest.mark.ray
def test_a_death_there_is_one_failure(nodes: Nodes, run: faultguard.Run, trace: Trace) -> None:
    """And the attempt after it is one of Ray's as ever."""
    with second_fails(nodes, trace, ["raise", "raise", "kill", "done"]) as (ref, first, second):
        assert ray.get(ref, timeout=WAIT_S) == expected(N)
        end = end_of(run)
        where = [first.node_id, first.node_id, second.node_id]
        assert [(failure.cause, failure.node_id) for failure in end.failures] == list(
            zip(["exception", "exception", "crash"], where, strict=True)
        )
        assert (end.attempt, end.charged) == (4, 3)


@pytest.mark.ray
def test_from_there_it_comes_back(nodes: Nodes, run: faultguard.Run, trace: Trace) -> None:
    """Two failures there, and the next attempt is on the first node again; tokens only grow."""
    with second_fails(nodes, trace, ["raise"] * 4 + ["done"]) as (ref, first, second):
        assert ray.get(ref, timeout=WAIT_S) == expected(N)
        seen = begins(trace)
        assert seen[:4] == [first.node_id] * 2 + [second.node_id] * 2
        assert (end_of(run).attempt, end_of(run).charged) == (5, 4)
        tokens = [note["token"] for note in trace.notes("begin")]
        assert tokens == sorted(set(tokens))


@pytest.mark.ray
@pytest.mark.parametrize("last", ["raise", "time out", "refuse"])
def test_an_error_there_is_the_error(nodes: Nodes, run: faultguard.Run, trace: Trace, last: str) -> None:
    """Of the class, and with the text, that it has anywhere."""
    with second_fails(nodes, trace, ["raise"] * 2 + [last] * 4) as (ref, _, _):
        kinds = {"raise": ConnectionError, "time out": ray.exceptions.GetTimeoutError, "refuse": faultguard.UsageError}
        with pytest.raises(kinds[last], match=r"planned|refused") as caught:
            ray.get(ref, timeout=WAIT_S)
        if last != "refuse":
            assert isinstance(caught.value, faultguard.MaxFailuresExceeded)
            assert len(caught.value.failures) == 6


@pytest.mark.ray
@pytest.mark.parametrize("by", ["ray", "faultguard", "force"])
def test_cancel_reaches_it_there(nodes: Nodes, run: faultguard.Run, trace: Trace, by: str) -> None:
    """It is final, and costs nothing."""
    with second_fails(nodes, trace, ["raise", "raise", *["wait"] * 4]) as (ref, first, second):
        wait_until(lambda: len(begins(trace)) == 3 and saved(run) == 7, WAIT_S)
        if by == "faultguard":
            faultguard.cancel("w")
        else:
            ray.cancel(ref, force=by == "force")
        with pytest.raises(ray.exceptions.TaskCancelledError):
            ray.get(ref, timeout=WAIT_S)
        if by != "force":
            ended = wait_until(lambda: end_of(run).ended, WAIT_S)
            assert (ended.cause, ended.charged) == ("cancelled", False)
        wait_until(lambda: free_cpus(first) == free_cpus(second) == 1, WAIT_S)
        assert begins(trace) == [first.node_id] * 2 + [second.node_id]
        assert end_of(run).charged == 2


@pytest.mark.ray
@pytest.mark.parametrize("how", ["killed", "drained"])
def test_a_home_that_goes(nodes: Nodes, run: faultguard.Run, trace: Trace, how: str) -> None:
    """The node where the task waits dies, or is drained: the attempt elsewhere leaves, and another one goes on."""
    with second_fails(nodes, trace, ["raise", "raise", "wait", "done"]) as (ref, first, second):
        wait_until(lambda: len(begins(trace)) == 3 and saved(run) == 7, WAIT_S)
        there = trace.notes("begin")[-1]["pid"]
        if how == "killed":
            nodes.remove(first)
        else:
            nodes.drain(first, 600)
        assert ray.get(ref, timeout=WAIT_S) == expected(N)
        assert begins(trace) == [first.node_id] * 2 + [second.node_id] * 2
        end = end_of(run)
        assert end.attempt == 4
        assert end.charged in ({2} if how == "drained" else {2, 3})  # one that is killed may have no time to say why
        wait_until(lambda: not Path(f"/proc/{there}").exists() or free_cpus(second) == 1, WAIT_S)
        if how == "drained":
            nodes.remove(first)


@pytest.mark.ray
def test_a_zombie_there_changes_nothing(nodes: Nodes, run: faultguard.Run, trace: Trace) -> None:
    """The attempt elsewhere freezes, the one that waits dies, a fourth one ends the work; thawed, the third one adds nothing."""
    with second_fails(nodes, trace, ["raise", "raise", "wait", "done"]) as (ref, first, second):
        wait_until(lambda: len(begins(trace)) == 3 and saved(run) == 7, WAIT_S)
        there, waiting = trace.notes("begin")[-1]["pid"], trace.notes("begin")[0]["pid"]
        with nodes.frozen(second, there):
            os.kill(waiting, signal.SIGKILL)
            assert ray.get(ref, timeout=WAIT_S) == expected(N)
            assert begins(trace) == [first.node_id] * 2 + [second.node_id, first.node_id]
            before = records(run, "fails", "w")
        wait_until(lambda: not Path(f"/proc/{there}").exists() or free_cpus(second) == 1, WAIT_S)
        assert records(run, "fails", "w")[-1] == before[-1]
        assert (before[-1].kind, before[-1].attempt, before[-1].charged) == ("end", 4, 3)


@pytest.mark.ray
def test_where_ray_starts_nothing_for_it_it_goes_on_here(nodes: Nodes, start_run: StartRun, trace: Trace) -> None:
    """The raylet of its node is frozen, and Ray takes the node for dead, whose processes work on."""
    run = start_run(heartbeat_interval=INTERVAL_S, heartbeat_timeout=4 * INTERVAL_S)

    @contextlib.contextmanager
    def dead(first: Any, _: Any) -> Iterator[None]:
        with nodes.frozen(first):
            wait_until(lambda: first.node_id not in alive(), WAIT_S)
            yield

    with second_fails(nodes, trace, ["raise", "raise", "done"], dead) as (ref, first, _):
        assert ray.get(ref, timeout=WAIT_S) == expected(N)
        assert begins(trace) == [first.node_id] * 3
        assert (end_of(run).attempt, end_of(run).charged) == (3, 2)
    nodes.remove(first)


@pytest.mark.ray
@pytest.mark.parametrize("timeout_s", [0.02, 0.04, 0.08, 0.16])
def test_who_went_on_and_who_begins_there_all_the_same_are_one(nodes: Nodes, start_run: StartRun, trace: Trace, timeout_s: float) -> None:
    """The attempt there begins at about the moment at which it counts as late: one of the two is the third, and nobody is charged."""
    run = start_run(heartbeat_interval=0.01, heartbeat_timeout=timeout_s)
    with second_fails(nodes, trace, ["raise", "raise", "done", "done"]) as (ref, _, _):
        assert ray.get(ref, timeout=WAIT_S) == expected(N)
        assert len(begins(trace)) == 3
        assert (end_of(run).attempt, end_of(run).charged) == (3, 2)


@pytest.mark.ray
def test_a_node_without_the_store_is_none(nodes: Nodes, run: faultguard.Run, trace: Trace, tmp_path: Path) -> None:
    """It goes on where the store is."""
    first = alone(nodes)
    ref = fails.remote("w", trace, ["raise", "raise", "done"])
    wait_until(lambda: len(begins(trace)) == 2, WAIT_S)
    (tmp_path / "other").mkdir()
    with where_it_is_another(Path(run.checkpoint_dir), tmp_path / "other"):
        second = nodes.add(1)
    wait_until(lambda: free_cpus(second) == 1, WAIT_S)
    trace.note("go", "w")
    assert ray.get(ref, timeout=WAIT_S) == expected(N)
    assert begins(trace) == [first.node_id] * 3
    assert (end_of(run).attempt, end_of(run).charged) == (3, 2)
    assert list((tmp_path / "other").iterdir()) == []
    nodes.remove(second)
