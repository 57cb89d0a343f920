"""How results are asked for, on real references: `get`, `.bind()`, and a connection that cannot work."""

from __future__ import annotations

import subprocess
import sys
from typing import TYPE_CHECKING, Any

import pytest
import ray

import faultguard
from tests.tasks import NOWAIT, Trace, expected, result, wait_until, work

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.ray
WAIT_S = 90


@faultguard.recoverable(every=1, max_failures=0, backoff=NOWAIT)
@ray.remote(num_cpus=0.5)
def answer(worker_id: str, trace: Trace, fails: str) -> str:
    """Gives its name or fails, when the test lets it."""
    for _ in faultguard.batches(range(2)):
        pass
    if worker_id.startswith("slow"):
        wait_until(lambda: trace.notes("go"), WAIT_S)
    trace.note("over", worker_id)
    if fails:
        raise LookupError(fails)
    return worker_id


def test_get_waits_for_all_before_it_raises(run: faultguard.Run, trace: Trace, capfd: pytest.CaptureFixture[str]) -> None:
    """The first failure is raised when nothing runs any more, and the others stand in a table."""
    refs = [answer.remote("a", trace, "first"), answer.remote("slow", trace, ""), answer.remote("b", trace, "second")]
    wait_until(lambda: {"a", "b"} <= {note["worker"] for note in trace.notes("over")})
    trace.note("go", "slow")
    with pytest.raises(LookupError, match="first"):
        faultguard.get(refs)
    assert {note["worker"] for note in trace.notes("over")} == {"a", "b", "slow"}
    told = capfd.readouterr().err
    assert "2 of 3 tasks failed; task 0 is raised, the others:" in told
    assert "task 2: LookupError('second') at batch 2, after 1 failures" in told


def test_get_gives_exceptions_in_their_places(run: faultguard.Run, trace: Trace) -> None:
    """With `return_exceptions` nothing is raised, and the order is that of the references."""
    first, failed, last = faultguard.get(
        [answer.remote("a", trace, ""), answer.remote("b", trace, "planned"), answer.remote("c", trace, "")], return_exceptions=True
    )
    assert (first, last) == ("a", "c")
    assert isinstance(failed, LookupError)
    assert isinstance(failed, faultguard.MaxFailuresExceeded)


def test_get_that_times_out_loses_nothing(run: faultguard.Run, trace: Trace) -> None:
    """Ray's own error says how many are missing; the tasks go on, and a second `get` has their results."""
    refs = [answer.remote("a", trace, ""), answer.remote("slow", trace, "")]
    wait_until(lambda: trace.notes("over", "a"))
    with pytest.raises(ray.exceptions.GetTimeoutError, match=r"1 of 2 tasks were not ready within 2 s; they go on running"):
        faultguard.get([refs[0], refs[1]], timeout=2)
    trace.note("go", "slow")
    assert faultguard.get(refs) == ["a", "slow"]


@faultguard.recoverable(every=1, backoff=NOWAIT)
@ray.remote(num_cpus=0.5)
def bound(worker_id: str, n: int, trace: Trace, deaths: dict[int, str]) -> Any:
    """A node of a graph that is killed."""
    ckpt = faultguard.current()
    work(ckpt, n, trace, deaths)
    return result(ckpt)


@pytest.mark.filterwarnings("ignore:DAGNode.execute:ray.util.annotations.RayDeprecationWarning")
def test_a_node_of_a_graph_recovers(run: faultguard.Run, trace: Trace) -> None:
    """`.bind()` makes a node whose task survives SIGKILL and exceptions as that of `.remote()` does."""
    node = bound.bind("w", 9, trace, {4: "SIGKILL", 6: "exception"})
    assert ray.get(node.execute(), timeout=WAIT_S) == expected(9)
    assert len({note["attempt"] for note in trace.notes("batch")}) == 3
    assert min(trace.begins("w")[1:]) > 0


CLIENT = """
import sys
import faultguard
from ray.util.client.ray_client_helpers import ray_start_client_server_for_address
with ray_start_client_server_for_address(sys.argv[1]):
    try:
        faultguard.init(checkpoint_dir="c")
    except faultguard.UsageError as error:
        print("refused:", error)
"""


def test_a_client_connection_is_refused(ray_cluster: str, tmp_path: Path) -> None:
    """Through ray:// the driver is not on the cluster, where its checkpoints would have to be: said at once, before any work."""
    command = [sys.executable, "-c", CLIENT, ray.get_runtime_context().gcs_address]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False, cwd=tmp_path)
    assert "refused: faultguard does not work through a ray:// connection yet" in done.stdout, done.stdout + done.stderr
