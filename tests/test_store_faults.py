"""A store that goes away, fills up or turns read-only under the work, at any moment; and one that is another one on another node."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

import faultguard
from faultguard.storage import STORE_KEY, open_store, store_id
from tests.disks import renamed, small_disk, where_it_is_another
from tests.nodes import Nodes, doctor, some_nodes
from tests.tasks import NOWAIT, Trace, expected, ray_logs, records, result, wait_until

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from contextlib import AbstractContextManager

    Fault = Callable[[], AbstractContextManager[None]]

pytestmark = pytest.mark.ray
WAIT_S = 90
N = 40
INTERVAL_S = 0.2
MOMENTS = ("loop", "wait", "claim", "retry", "stall", "end")
BATCH_S = {"loop": 0.01, "long-loop": 0.1}
STALL_S = 0.5
PATIENCE_S = 1.0
KEPT = 3  # saves
HOME, PAIR = "home", "pair"  # resources: of the first node, of two others
WAYS_OUT = r"(?s)shared.*an object store, or .*one node"


@faultguard.recoverable(every=1, backoff=NOWAIT)
@ray.remote(num_cpus=1)
def steps(worker_id: str, trace: Trace, moment: str = "loop") -> Any:
    """A loop that stops at its middle until the test has done something to the store, and then comes to the moment that is its turn."""
    ckpt = faultguard.current()
    trace.note("body", worker_id)
    for batch in ckpt.batches(range(N)):
        trace.note("batch", worker_id, attempt=ckpt.attempt, batch=batch, durable=ckpt.durable_batch)
        ckpt.state["sum"] = ckpt.state.get("sum", 0) + batch
        ckpt.state.setdefault("seen", []).append(batch)
        if batch == N // 2 and ckpt.attempt == 1 and not trace.notes("fault", worker_id):
            ckpt.advance(wait=True)
            trace.note("there", worker_id)
            wait_until(lambda: trace.notes("fault", worker_id), WAIT_S)
            if moment == "claim":
                os.kill(os.getpid(), signal.SIGKILL)
            if moment == "retry":
                raise ValueError("planned")
            if moment == "stall":
                with ckpt.section("hangs in C", timeout=STALL_S):
                    os.read(os.pipe()[0], 1)
            continue
        if batch > N // 2 and moment == "wait":
            ckpt.advance(wait=True)
        time.sleep(BATCH_S.get(moment, 0.0))
    if moment == "end" and ckpt.attempt == 1 and not trace.notes("over", worker_id):
        wait_until(lambda: ckpt.durable_batch == N, WAIT_S)
        trace.note("over", worker_id)
        wait_until(lambda: trace.notes("ended", worker_id), WAIT_S)
    return result(ckpt)


def said(directory: str, part: str) -> list[str]:
    """What worker processes of the cluster have logged with `part` in it."""
    return [line for log in ray_logs(directory) for line in log.splitlines() if part in line]


@pytest.fixture(scope="module")
def nodes() -> Iterator[Nodes]:
    """A head, a node for most tests, and others for some."""
    with some_nodes() as nodes:
        nodes.add(4, **{HOME: 4})
        yield nodes


@pytest.fixture(scope="module")
def ray_cluster(nodes: Nodes) -> str:
    """Its directory."""
    return nodes.directory


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """A run of this test waits for the store for a moment only."""
    monkeypatch.setenv("FAULTGUARD_STORE_PATIENCE", str(PATIENCE_S))


@pytest.fixture(params=["gone", "replaced", "read-only", "full"])
def fault(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Fault]:
    """What happens to the store of the test."""
    store = tmp_path / "checkpoints"
    if request.param in {"gone", "replaced"}:
        yield lambda: renamed(store, replaced=request.param == "replaced")
    else:
        with small_disk(store) as disk:
            yield disk.read_only if request.param == "read-only" else disk.full


@pytest.fixture
def worker(request: pytest.FixtureRequest) -> str:
    """One for each test, so that what is logged about it is of this test."""
    return str(request.node.callspec.id)


@pytest.fixture
def troubled(ray_cluster: str, tmp_path: Path, fault: Fault) -> Iterator[faultguard.Run]:
    """A run that beats often."""
    yield faultguard.init(checkpoint_dir=tmp_path / "checkpoints", heartbeat_interval=INTERVAL_S)
    faultguard.shutdown()


def to_the_moment(run: faultguard.Run, trace: Trace, worker: str, moment: str, fault: Fault, stack: contextlib.ExitStack) -> None:
    """Let the worker come to its moment, with the store in trouble from then on; what is superfluous goes before, or it makes room."""
    wait_until(lambda: trace.notes("there", worker), WAIT_S)
    if moment == "end":
        trace.note("fault", worker)
        wait_until(lambda: trace.notes("over", worker), WAIT_S)
    wait_until(lambda: sum(record.kind == "save" for record in records(run, "steps", worker)) <= KEPT, WAIT_S)
    stack.enter_context(fault())
    trace.note("ended" if moment == "end" else "fault", worker)


def heard_at(worker: str) -> float:
    """When the manager last heard a worker, which needs no store; 0: never."""
    beats = ray.get(faultguard.manager().live_workers.remote(), timeout=WAIT_S)
    return next((float(beat["last_heartbeat"]) for beat in beats if beat["worker_id"] == worker), 0.0)


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_store_that_comes_back(troubled: faultguard.Run, trace: Trace, fault: Fault, moment: str, ray_cluster: str, worker: str) -> None:
    """It is told once; the work goes on, or waits where it must; nothing is killed, charged or done twice because of the store."""
    ref = steps.remote(worker, trace, moment)
    with contextlib.ExitStack() as stack:
        to_the_moment(troubled, trace, worker, moment, fault, stack)
        told = wait_until(lambda: said(ray_cluster, f"'steps/{worker}' cannot"), WAIT_S)
        if moment == "loop":
            wait_until(lambda: trace.notes("batch", worker)[-1]["batch"] > N // 2 + 5, WAIT_S)
        if moment in {"loop", "wait", "end"}:
            wait_until(lambda: heard_at(worker) > trace.notes("fault", worker)[0]["time"] + 2 * INTERVAL_S, WAIT_S)
        assert not ray.wait([ref], timeout=0)[0]
    assert ray.get(ref, timeout=WAIT_S) == expected(N)
    end = records(troubled, "steps", worker)[-1]
    causes = {"claim": ["crash"], "retry": ["exception"], "stall": ["stall"]}.get(moment, [])
    assert [failure.cause for failure in end.failures] == causes
    assert end.charged == len(causes)
    begins = trace.begins(worker)
    assert begins == [0, N // 2 + 1][: 1 + len(causes)] or begins == [0, N // 2][: 1 + len(causes)]
    assert len(said(ray_cluster, f"'steps/{worker}' cannot")) == len(told) == 1


# --- for longer than there is patience ------------------------------------------------------------------------------


@pytest.mark.parametrize("moment", ["long-loop", *MOMENTS[1:]])
@pytest.mark.parametrize("way", ["gone", "full"])
@pytest.mark.usefixtures("ray_cluster", "impatient")
def test_a_store_that_stays_away(tmp_path: Path, trace: Trace, moment: str, way: str, worker: str) -> None:
    """The user gets `CheckpointStoreError`; who starts the work again, when the store is back, goes on from what was durable."""
    store = tmp_path / "checkpoints"
    with contextlib.ExitStack() as stack:
        disk = stack.enter_context(small_disk(store)) if way == "full" else None
        fault = disk.full if disk is not None else lambda: renamed(store)
        run = stack.enter_context(faultguard.init(checkpoint_dir=store, heartbeat_interval=INTERVAL_S))
        with contextlib.ExitStack() as away:
            ref = steps.remote(worker, trace, moment)
            to_the_moment(run, trace, worker, moment, fault, away)
            with pytest.raises(faultguard.CheckpointStoreError, match="not there" if way == "gone" else "No space left"):
                ray.get(ref, timeout=WAIT_S)
        assert ray.get(steps.remote(worker, trace, "again"), timeout=WAIT_S) == expected(N)
        assert trace.begins(worker) == [0, N // 2 + 1][: 1 if moment == "end" else 2]
        assert [failure.cause for failure in records(run, "steps", worker)[-1].failures] == ["crash"]


# --- for ever -------------------------------------------------------------------------------------------------------


def remove(store: Path) -> None:
    """Remove everything, while somebody may write there."""
    while store.exists():
        shutil.rmtree(store, ignore_errors=True)


@pytest.mark.parametrize("moment", ["long-loop", "claim", "retry"])
@pytest.mark.parametrize("then", ["nothing", "made anew"])
@pytest.mark.usefixtures("ray_cluster", "impatient")
def test_a_store_that_was_removed(tmp_path: Path, trace: Trace, moment: str, then: str, worker: str) -> None:
    """Nobody begins from zero: neither the process that worked there, nor a new one, nor where another driver has made a new store."""
    store = tmp_path / "checkpoints"
    faultguard.init(checkpoint_dir=store, heartbeat_interval=INTERVAL_S)
    ref = steps.remote(worker, trace, moment)
    wait_until(lambda: trace.notes("there", worker), WAIT_S)
    remove(store)
    if then == "made anew":
        store_id(open_store(str(store)))
    trace.note("fault", worker)
    with pytest.raises(faultguard.CheckpointStoreError, match=r"not there|another directory|another store"):
        ray.get(ref, timeout=WAIT_S)
    with pytest.raises(faultguard.CheckpointStoreError):
        ray.get(steps.remote(worker, trace, "again"), timeout=WAIT_S)
    assert len(trace.notes("body", worker)) == 1
    assert [path.name for path in store.rglob("*")] == ([STORE_KEY] if then == "made anew" else [])
    with pytest.raises(faultguard.CheckpointStoreError):
        faultguard.shutdown()


def test_records_that_were_removed_are_missed(run: faultguard.Run, trace: Trace, ray_cluster: str) -> None:
    """Where only the folder of the run is gone, its next attempt has nothing to go on with: it says so."""
    ref = steps.remote("missed", trace, "claim")
    wait_until(lambda: trace.notes("there", "missed"), WAIT_S)
    remove(Path(run.checkpoint_dir) / run.name)
    trace.note("fault", "missed")
    assert ray.get(ref, timeout=WAIT_S) == expected(N)
    assert len(wait_until(lambda: said(ray_cluster, "'steps/missed' finds nothing of the attempts before it"))) == 1


# --- another one on another node ------------------------------------------------------------------------------------


@pytest.fixture(params=["absent", "empty", "another"])
def estranged(request: pytest.FixtureRequest, nodes: Nodes, tmp_path: Path) -> Iterator[tuple[Any, Path, Path]]:
    """A node with another directory behind the path of the store: the node, the store, the other directory."""
    shared, other = tmp_path / "shared", tmp_path / "other"
    store = shared / "checkpoints"
    store.mkdir(parents=True)
    other.mkdir()
    if request.param == "another":
        store_id(open_store(str(other)))
    with where_it_is_another(shared if request.param == "absent" else store, other):
        node = nodes.add(1, **{PAIR: 1})
    yield node, store, other
    nodes.remove(node)


@pytest.mark.usefixtures("ray_cluster")
def test_a_directory_that_is_not_shared(estranged: tuple[Any, Path, Path], trace: Trace, worker: str) -> None:
    """The user is told before any work begins, with what can be done; nothing is made in the wrong place."""
    node, store, other = estranged
    before = sorted(other.rglob("*"))
    with faultguard.init(checkpoint_dir=store):
        there = steps.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node.node_id, soft=False))
        with pytest.raises(faultguard.CheckpointStoreError, match=WAYS_OUT):
            ray.get(there.remote(worker, trace), timeout=WAIT_S)
        with pytest.raises(faultguard.CheckpointStoreError, match=WAYS_OUT):
            ray.get(
                block.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node.node_id, soft=False)).remote(trace), timeout=WAIT_S
            )
    assert trace.notes() == []
    assert sorted(other.rglob("*")) == before


@pytest.mark.usefixtures("ray_cluster")
def test_the_doctor_sees_a_directory_that_is_not_shared(
    estranged: tuple[Any, Path, Path], nodes: Nodes, request: pytest.FixtureRequest
) -> None:
    """Before there is any work: it names the node, what is there, and what can be done; and makes nothing there."""
    node, store, other = estranged
    before = sorted(other.rglob("*"))
    done = doctor(nodes, "--checkpoint-dir", str(store), **faultguard.recommended_ray_env())
    (line,) = [line for line in done.stdout.splitlines() if f"sees at {store}: " in line]
    assert line.startswith(f"PROBLEM  node {node.node_id[:8]} (")
    assert ("another store (id" in line) == ("[another]" in request.node.name)
    assert re.search(WAYS_OUT, line)
    assert done.returncode == 1
    assert done.stdout.count(f": sees the store {store}") == len(nodes.workers), "the head, and the other workers"
    assert sorted(other.rglob("*")) == before


@ray.remote(num_cpus=1)
def block(trace: Trace) -> None:
    """A worker in a plain task."""
    with faultguard.checkpointed("block") as ckpt:
        trace.note("body", ckpt.worker_id)


@pytest.mark.parametrize("estranged", ["empty"], indirect=True)
@pytest.mark.usefixtures("impatient")
def test_an_attempt_that_comes_to_a_node_without_the_store(
    nodes: Nodes, estranged: tuple[Any, Path, Path], trace: Trace, worker: str
) -> None:
    """It may be a disk that is about to be mounted: it is waited for. It does not begin from zero; elsewhere the work goes on."""
    _, store, other = estranged
    before = sorted(other.rglob("*"))
    with faultguard.init(checkpoint_dir=store, heartbeat_interval=INTERVAL_S):
        first = nodes.add(1, **{PAIR: 2})
        ref = steps.options(resources={PAIR: 1}, scheduling_strategy=NodeAffinitySchedulingStrategy(first.node_id, soft=True)).remote(
            worker, trace, "claim"
        )
        wait_until(lambda: trace.notes("there", worker), WAIT_S)
        nodes.remove(first)
        with pytest.raises(faultguard.CheckpointStoreError, match=WAYS_OUT):
            ray.get(ref, timeout=WAIT_S)
        assert len(trace.notes("body", worker)) == 1
        assert sorted(other.rglob("*")) == before
        assert ray.get(steps.options(resources={HOME: 1}).remote(worker, trace, "again"), timeout=WAIT_S) == expected(N)
    assert trace.begins(worker) == [0, N // 2 + 1]
