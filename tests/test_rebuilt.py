"""Results that are lost with their node: Ray runs the finished task again, which gives what is on record."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import ray

import faultguard
from faultguard import _attempt
from tests.nodes import WORK, Nodes, some_nodes

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from tests.tasks import Trace

pytestmark = pytest.mark.ray
WAIT_S = 90
INLINE_LIMIT = 100 * 1024  # of Ray: only a larger result is lost with a node


@pytest.fixture(scope="module")
def nodes() -> Iterator[Nodes]:
    """A head, and nodes for each test."""
    with some_nodes() as nodes:
        yield nodes


@faultguard.recoverable
@ray.remote(num_cpus=1, resources={WORK: 1})
def makes(worker_id: str, size: int, trace: Trace) -> bytes:
    """A result of that size, after three batches."""
    ckpt = faultguard.current()
    for batch in ckpt.batches(range(3)):
        trace.note("batch", worker_id, batch=batch)
        ckpt.state["n"] = ckpt.state.get("n", 0) + 1
    trace.note("after", worker_id, n=ckpt.state["n"])
    return bytes([ckpt.state["n"]]) * size


@pytest.mark.parametrize("name", [None, "nightly"], ids=["unnamed", "named"])
@pytest.mark.parametrize("size", [2 * INLINE_LIMIT, 2 * _attempt.MAX_RESULT_BYTES], ids=["recorded", "too large"])
def test_a_result_that_is_lost(nodes: Nodes, size: int, name: str | None, tmp_path: Path, trace: Trace) -> None:
    """What is recorded is given, and nothing runs; what is not is made again by what follows the finished loops."""
    first = nodes.add()
    with faultguard.init(run=name, checkpoint_dir=tmp_path / "checkpoints"):
        ref = makes.remote("w", size, trace)
        ready, _ = ray.wait([ref], timeout=WAIT_S, fetch_local=False)
        assert ready
        second = nodes.add()
        nodes.remove(first)
        got: Any = ray.get(ref, timeout=WAIT_S)
    assert got == bytes([3]) * size
    assert [note["batch"] for note in trace.notes("batch")] == [0, 1, 2]
    assert [note["n"] for note in trace.notes("after")] == [3] * (1 if size == 2 * INLINE_LIMIT else 2)
    assert len({note["pid"] for note in trace.notes("after")}) == len(trace.notes("after"))
    nodes.remove(second)
