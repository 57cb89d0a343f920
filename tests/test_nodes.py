"""Nodes that die, freeze and thaw under their workers; and how Ray has to be set up to notice."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import ray

import faultguard
from faultguard import _manager
from tests.frozen_nodes import BATCH_S
from tests.frozen_nodes import INTERVAL_S as FROZEN_INTERVAL_S
from tests.nodes import WORK, Nodes, doctor, some_nodes
from tests.tasks import NOWAIT, Trace, expected, manager_pid, result, wait_until

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = pytest.mark.ray
WAIT_S = 90
INTERVAL_S = 0.5
REPOSITORY = Path(__file__).parents[1]
TWO_HEARTBEATS_S = 2 * FROZEN_INTERVAL_S
SLACK_S = 4.0  # for the scheduling of three processes on a busy machine: who has thawed, its manager, and whoever notes it
DEFAULT_S = 440  # what Ray takes without our settings


# --- with Ray as it comes -------------------------------------------------------------------------------------------


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


@faultguard.recoverable(every=1, backoff=NOWAIT)
@ray.remote(num_cpus=1, resources={WORK: 1})
def steps(worker_id: str, n: int, trace: Trace, stuck_at: int = -1) -> Any:
    """A loop that takes its time, and for ever at one batch of its first attempt."""
    ckpt = faultguard.current()
    node = ray.get_runtime_context().get_node_id()
    for batch in ckpt.batches(range(n)):
        trace.note("batch", worker_id, attempt=ckpt.attempt, batch=batch, node=node)
        time.sleep(0.05)
        while batch == stuck_at and ckpt.attempt == 1:
            time.sleep(0.01)
        ckpt.state["sum"] = ckpt.state.get("sum", 0) + batch
        ckpt.state.setdefault("seen", []).append(batch)
    return result(ckpt)


def node_of_manager() -> str:
    """Where the manager of the run lives."""
    table: Any = ray._private.state
    return str(table.actors(faultguard.manager()._actor_id.hex())["Address"]["NodeID"])


def test_a_node_that_is_killed(nodes: Nodes, run: faultguard.Run, trace: Trace) -> None:
    """Its workers go on elsewhere; the manager was never there."""
    first = nodes.add()
    refs = [steps.remote(f"w{index}", 60, trace, 20) for index in range(2)]
    wait_until(lambda: sum(note["batch"] == 20 for note in trace.notes("batch")) == 2, WAIT_S)
    assert node_of_manager() == nodes.head_id
    second = nodes.add()
    nodes.remove(first)
    assert ray.get(refs, timeout=WAIT_S) == [expected(60)] * 2
    assert {note["node"] for note in trace.notes("batch") if note["attempt"] == 2} == {second.node_id}
    nodes.remove(second)


def test_a_manager_comes_back_elsewhere(nodes: Nodes, run: faultguard.Run, trace: Trace, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where it cannot be on the head, and its node dies, it is made on another one; the work is the same."""
    monkeypatch.setattr(_manager, "HEAD_NODE", WORK)  # which the head has not
    first = nodes.add()
    before = manager_pid()
    assert node_of_manager() == first.node_id
    second = nodes.add()
    ref = steps.remote("w", 100, trace)
    wait_until(lambda: trace.notes("batch"), WAIT_S)
    nodes.remove(first)
    assert ray.get(ref, timeout=WAIT_S) == expected(100)
    assert wait_until(manager_pid, WAIT_S) != before
    assert node_of_manager() == second.node_id
    nodes.remove(second)


def test_a_raylet_that_freezes_under_its_workers(nodes: Nodes, run: faultguard.Run, trace: Trace) -> None:
    """They do not need it: they end as if nothing had happened."""
    node = nodes.add()
    ref = steps.remote("w", 60, trace)
    wait_until(lambda: trace.notes("batch"), WAIT_S)
    with nodes.frozen(node):
        assert ray.get(ref, timeout=WAIT_S) == expected(60)
    assert {note["attempt"] for note in trace.notes("batch")} == {1}
    nodes.remove(node)


def test_the_doctor_finds_what_is_not_set_up(nodes: Nodes, tmp_path: Path) -> None:
    """On each node: the settings, and a store that is not there; what is to be done stands beside it."""
    node = nodes.add()
    store = tmp_path / "store"
    done = doctor(nodes, "--checkpoint-dir", str(store), **faultguard.recommended_ray_env())
    lines = done.stdout.splitlines()
    assert done.returncode == 1, done.stderr
    assert sum("PROBLEM" in line and "RAY_health_check_period_ms=2000" in line for line in lines) == 2
    assert any(line.startswith("ok") and "this process" in line for line in lines)
    assert sum(line.startswith("ok") and f"sees the store {store}" in line for line in lines) == 2
    assert f"ok       store: {store}" in done.stdout
    (tmp_path / "file").write_text("no directory")
    assert "PROBLEM  store:" in doctor(nodes, "--checkpoint-dir", str(tmp_path / "file")).stdout
    nodes.remove(node)


@pytest.mark.parametrize(
    ("address", "said"), [("nonsense", "no cluster at 'nonsense'"), ("local", "--address"), ("ray://h:1", "--address")]
)
def test_the_doctor_needs_a_cluster(address: str, said: str) -> None:
    """None is started for it."""
    command = [sys.executable, "-m", "faultguard.cli", "doctor", "--address", address]
    done = subprocess.run(command, capture_output=True, text=True, timeout=WAIT_S, check=False)
    assert done.returncode == 2
    assert said in done.stderr


# --- with the settings that we recommend ----------------------------------------------------------------------------


def freeze(what: str, directory: Path) -> dict[str, Any]:
    """What the driver of `frozen_nodes` saw."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.frozen_nodes", str(directory), what],
        env={**os.environ, **faultguard.recommended_ray_env()},
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    seen: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return seen


@pytest.fixture(scope="module")
def frozen(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Three nodes froze as a whole, one after another."""
    return freeze("nodes", tmp_path_factory.mktemp("nodes"))


def test_frozen_nodes_are_replaced(frozen: dict[str, Any]) -> None:
    """Every worker goes on on another node, four times over, and its result is the one of an undisturbed run."""
    assert frozen["exact"]
    assert frozen["attempts"] == [4, 4]
    assert frozen["causes"] == [["crash"] * 3] * 2
    assert frozen["ends"] == [1, 1]
    assert max(frozen["replaced_s"]) < DEFAULT_S / 10


def test_zombies_stop_by_themselves(frozen: dict[str, Any]) -> None:
    """Each finds out, also the one that saves nothing for an hour: within two heartbeats of the thaw; then its process is free."""
    stopped = {(note["worker"], note["attempt"]) for note in frozen["notes"] if note["what"] == "superseded"}
    assert stopped == {(worker, attempt) for worker in ("saves", "beats") for attempt in (1, 2, 3)}
    for worker, attempt in stopped:
        thawed = next(note["time"] for note in frozen["notes"] if note["what"] == f"thawed {attempt}")
        mine = [note for note in frozen["notes"] if (note["worker"], note.get("attempt")) == (worker, attempt)]
        assert sum(note["what"] == "batch" and note["time"] > thawed for note in mine) <= TWO_HEARTBEATS_S / BATCH_S
        (told,) = [note["time"] - thawed for note in mine if note["what"] == "superseded"]
        assert told <= TWO_HEARTBEATS_S + SLACK_S
    assert len(frozen["released_s"]) == 3
    assert max(frozen["released_s"]) <= TWO_HEARTBEATS_S + 2 * SLACK_S


def test_the_doctor_is_content(frozen: dict[str, Any]) -> None:
    """With these settings on every node and in the driver."""
    assert frozen["problems"] == []
    assert frozen["doctor"] == 0


def test_a_raylet_that_is_given_up_under_its_workers(tmp_path: Path) -> None:
    """They never stood still; what becomes of them when it thaws is Ray's affair, and nothing is lost or counted twice."""
    seen = freeze("raylet", tmp_path)
    assert seen["exact"]
    assert seen["ends"] == [1, 1]
    assert all(1 <= attempts <= 2 for attempts in seen["attempts"])
