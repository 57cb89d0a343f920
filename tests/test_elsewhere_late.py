"""An attempt that prefers another node does not get there: that one is frozen, and Ray notices nothing of it."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

import pytest
import ray

from tests.nodes import Nodes, some_nodes
from tests.tasks import Trace, expected, wait_until
from tests.test_elsewhere import INTERVAL_S, WAIT_S, N, begins, end_of, on, second_fails, sees

if TYPE_CHECKING:
    from collections.abc import Iterator

    import faultguard
    from tests.conftest import StartRun

pytestmark = pytest.mark.ray
TIMEOUT_S = 2.0


@pytest.fixture(scope="module")
def nodes() -> Iterator[Nodes]:
    """A head that takes a frozen node for alive for longer than a test."""
    with some_nodes(health_check_failure_threshold=10**4) as nodes:
        yield nodes


@pytest.fixture(scope="module")
def ray_cluster(nodes: Nodes) -> str:
    """Its directory."""
    return nodes.directory


@pytest.fixture
def run(start_run: StartRun) -> faultguard.Run:
    """A run that beats often, and does not wait for long."""
    return start_run(heartbeat_interval=INTERVAL_S, heartbeat_timeout=TIMEOUT_S)


def test_who_does_not_get_there_goes_on_here(nodes: Nodes, run: faultguard.Run, trace: Trace) -> None:
    """And should it get there after all, when that node goes on, it is the earlier one, and is refused."""
    thaw = contextlib.ExitStack()

    def freeze(_: Any, second: Any) -> contextlib.ExitStack:
        thaw.enter_context(nodes.frozen(second))
        return thaw

    with second_fails(nodes, trace, ["raise", "raise", "wait"], freeze) as (ref, first, second):
        wait_until(lambda: len(begins(trace)) == 3, WAIT_S)
        thaw.close()
        ray.get(sees.options(num_cpus=1, scheduling_strategy=on(second)).remote(first.node_id), timeout=WAIT_S)
        trace.note("on", "w")
        assert ray.get(ref, timeout=WAIT_S) == expected(N)
        assert begins(trace) == [first.node_id] * 3
        end = end_of(run)
        assert (end.attempt, end.charged, end.owner.node_id) == (3, 2, first.node_id)
