"""A node that is going to be taken away: what works there goes on elsewhere, at no cost."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import pytest
import ray

import faultguard
from tests.nodes import WORK, Nodes, some_nodes
from tests.tasks import NOWAIT, Trace, expected, records, result, wait_until
from tests.test_actors import KINDS, begun, make_holder, newest

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

pytestmark = pytest.mark.ray
WAIT_S = 90
DEADLINE_S = 600
INTERVAL_S = 0.5
UNTOLD = 20


@pytest.fixture(scope="module")
def nodes() -> Iterator[Nodes]:
    """A head, and nodes for each test."""
    with some_nodes() as nodes:
        yield nodes


@pytest.fixture
def run(nodes: Nodes, tmp_path: Path) -> Iterator[faultguard.Run]:
    """A run that beats often."""
    with faultguard.init(checkpoint_dir=tmp_path / "checkpoints", heartbeat_interval=INTERVAL_S) as run:
        yield run


@faultguard.recoverable(every=1, backoff=NOWAIT, max_failures=0)
@ray.remote(num_cpus=1, resources={WORK: 1})
def steps(worker_id: str, n: int, trace: Trace, stuck_at: int = -1) -> Any:
    """A loop that takes its time, and for ever at one batch of its first attempt."""
    ckpt = faultguard.current()
    node = ray.get_runtime_context().get_node_id()
    for batch in ckpt.batches(range(n)):
        trace.note("batch", worker_id, attempt=ckpt.attempt, batch=batch, node=node)
        time.sleep(0.05 if batch < UNTOLD or ckpt.attempt > 1 else 0.5)  # it may take long until it is told, and must not end before
        while batch == stuck_at and ckpt.attempt == 1:
            time.sleep(0.01)
        ckpt.state["sum"] = ckpt.state.get("sum", 0) + batch
        ckpt.state.setdefault("seen", []).append(batch)
    return result(ckpt)


def test_a_drained_node_is_left(nodes: Nodes, run: faultguard.Run, trace: Trace) -> None:
    """Long before the deadline, after the batch in hand, which is not redone; and nothing is charged."""
    first = nodes.add()
    ref = steps.remote("w", 100, trace)
    wait_until(lambda: len(trace.notes("batch")) > UNTOLD, WAIT_S)
    second = nodes.add()
    nodes.drain(first, DEADLINE_S)
    assert ray.get(ref, timeout=WAIT_S) == expected(100)
    notes = trace.notes("batch")
    assert [note["batch"] for note in notes] == list(range(100))
    assert [note["node"] for note in notes if note["attempt"] == 2] == [second.node_id] * (100 - trace.begins("w")[1])
    assert {note["node"] for note in notes if note["attempt"] == 1} == {first.node_id}
    end = records(run, "steps", "w")[-1]
    assert (end.attempt, end.charged, end.failures) == (2, 0, ())
    nodes.remove(first)
    nodes.remove(second)


def test_a_node_that_goes_in_the_middle_of_a_batch(nodes: Nodes, run: faultguard.Run, trace: Trace) -> None:
    """It was drained, the batch took longer: that batch is redone, and nothing is charged either."""
    first = nodes.add()
    ref = steps.remote("w", 10, trace, 5)
    wait_until(lambda: trace.notes("batch")[-1:] and trace.notes("batch")[-1]["batch"] == 5, WAIT_S)
    nodes.drain(first, DEADLINE_S)
    wait_until(lambda: records(run, "steps", "w")[-1].ended is not None, WAIT_S)
    second = nodes.add()
    nodes.remove(first)
    assert ray.get(ref, timeout=WAIT_S) == expected(10)
    nodes.remove(second)
    assert [note["batch"] for note in trace.notes("batch")] == [0, 1, 2, 3, 4, 5, 5, 6, 7, 8, 9]
    end = records(run, "steps", "w")[-1]
    assert (end.attempt, end.charged, end.failures) == (2, 0, ())


@ray.remote(num_cpus=1, resources={WORK: 1}, max_retries=0)
def plain(worker_id: str, trace: Trace) -> int:
    """A block in a task that Ray would not run again: it must not leave."""
    with faultguard.checkpointed(worker_id, every=1000) as ckpt:
        for batch in ckpt.batches(range(1000)):
            trace.note("batch", worker_id, attempt=ckpt.attempt, batch=batch)
            time.sleep(0.01)
            if trace.notes("go"):
                return ckpt.current_batch
    return -1


def test_a_block_of_a_plain_task_saves_and_goes_on(nodes: Nodes, run: faultguard.Run, trace: Trace) -> None:
    """Who calls decides about retries; what it has done is saved at once, with a note for its successor."""
    node = nodes.add()
    ref = plain.remote("block", trace)
    wait_until(lambda: len(trace.notes("batch")) > 100, WAIT_S)
    nodes.drain(node, DEADLINE_S)
    wait_until(lambda: records(run, "plain", "block")[-1].ended is not None, WAIT_S)
    record = records(run, "plain", "block")[-1]
    assert record.snapshot is not None
    assert record.snapshot.batch > 0
    assert record.ended is not None
    assert (record.ended.cause, record.ended.charged) == ("drained", False)
    assert next(state for state in faultguard.workers() if state.worker_id == "block").status == "active"
    trace.note("go", "test")
    assert ray.get(ref, timeout=WAIT_S) > 100
    nodes.remove(node)


def test_actors_of_a_drained_node_save_and_go_on(nodes: Nodes, run: faultguard.Run, trace: Trace) -> None:
    """Ray moves no actor that works; whatever its kind, its methods save at once, and from then on often, whatever `every` says."""
    node = nodes.add(holders=3)  # for a while Ray takes the node of the test before for alive
    actors = {kind: make_holder(kind, resources={"holders": 1}) for kind in KINDS}
    refs = [actor.hold.remote(kind, trace, 10**6) for kind, actor in actors.items()]
    wait_until(lambda: all(begun(trace, kind) for kind in KINDS), WAIT_S)
    nodes.drain(node, DEADLINE_S)
    for kind in KINDS:
        record = wait_until(lambda kind=kind: (found := newest(run, kind)).ended is not None and found)
        assert (record.ended.cause, record.ended.charged) == ("drained", False)
        wait_until(lambda kind=kind, batch=record.snapshot.batch: newest(run, kind).snapshot.batch >= batch + 10)
        assert newest(run, kind).ended == record.ended
    trace.note("go", "test")
    assert ray.get(refs, timeout=WAIT_S) == [1, 1, 1]
    nodes.remove(node)


@faultguard.recoverable(every=1, backoff=NOWAIT, max_failures=1)
@ray.remote(num_cpus=1, resources={WORK: 1})
def gets_nowhere(worker_id: str, trace: Trace) -> None:
    """Asks in its first batch whether it must stop."""
    ckpt = faultguard.current()
    for batch in ckpt.batches(range(3)):
        trace.note("batch", worker_id, attempt=ckpt.attempt, batch=batch)
        while ckpt.attempt < 3:
            time.sleep(0.01)
            ckpt.check()


def test_leaving_without_progress_is_charged(nodes: Nodes, run: faultguard.Run, trace: Trace) -> None:
    """Or a worker that is always told to leave before its first batch is done would be started for ever."""
    first = nodes.add(1)
    ref = gets_nowhere.remote("w", trace)
    wait_until(lambda: len(trace.notes("batch")) == 1, WAIT_S)
    second = nodes.add(1)
    nodes.drain(first, DEADLINE_S)
    wait_until(lambda: len(trace.notes("batch")) == 2, WAIT_S)
    third = nodes.add(1)
    nodes.drain(second, DEADLINE_S)
    with pytest.raises(faultguard.MaxFailuresExceeded) as caught:
        ray.get(ref, timeout=WAIT_S)
    assert [(failure.cause, failure.batch) for failure in caught.value.failures] == [("drained", 0), ("drained", 0)]
    for node in (first, second, third):
        nodes.remove(node)
