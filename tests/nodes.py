"""A cluster of several nodes on this host, and what can happen to them."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ray
from ray.cluster_utils import Cluster

from tests.conftest import temporary_dir
from tests.tasks import wait_until

if TYPE_CHECKING:
    from collections.abc import Iterator

WORK = "work"  # a resource of the nodes that run the tasks of a test; the head has none
SECONDS = 1000
QUICK = {"health_check_initial_delay_ms": 0, "health_check_period_ms": 1000, "health_check_failure_threshold": 3}
WAIT_S = 90


class Nodes:
    """A head, which runs no tasks, and worker nodes that come and go."""

    def __init__(self, cluster: Any, directory: str) -> None:
        self.directory = directory
        self._cluster = cluster
        self.address: str = cluster.address
        self.head_id: str = cluster.head_node.node_id

    def add(self, cpus: int = 2, **resources: float) -> Any:
        """Start a worker node, and wait until Ray knows it."""
        node = self._cluster.add_node(num_cpus=cpus, resources={WORK: cpus, **resources})
        wait_until(lambda: node.node_id in alive(), WAIT_S)
        return node

    @property
    def workers(self) -> list[Any]:
        """The worker nodes that are there."""
        return list(self._cluster.worker_nodes)

    def remove(self, node: Any) -> None:
        """Kill a node with everything on it."""
        self._cluster.remove_node(node, allow_graceful=False)

    def drain(self, node: Any, deadline_s: float) -> None:
        """Tell Ray that the node is going to be preempted."""
        from ray.core.generated import autoscaler_pb2

        worker: Any = ray._private.worker.global_worker
        reasons: Any = autoscaler_pb2
        gcs, preempted = worker.gcs_client, reasons.DrainNodeReason.DRAIN_NODE_REASON_PREEMPTION
        accepted, why = gcs.drain_node(node.node_id, preempted, "of a test", int((time.time() + deadline_s) * SECONDS))
        assert accepted, why

    @contextlib.contextmanager
    def frozen(self, node: Any, *pids: int) -> Iterator[None]:
        """Stop the raylet of a node, and worker processes on it; let them go on afterwards."""
        raylet = node.all_processes["raylet"][0].process.pid
        for pid in (raylet, *pids):
            os.kill(pid, signal.SIGSTOP)
        try:
            yield
        finally:
            for pid in (*pids, raylet):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGCONT)


def doctor(nodes: Nodes, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run the command `faultguard doctor`."""
    command = [sys.executable, "-m", "faultguard.cli", "doctor", "--address", nodes.address, *arguments]
    return subprocess.run(command, env={**os.environ, **environment}, capture_output=True, text=True, timeout=WAIT_S, check=False)


def alive() -> set[str]:
    """The ids of the nodes that Ray takes for alive."""
    ask: Any = ray.nodes
    return {node["NodeID"] for node in ask() if node["Alive"]}


@contextlib.contextmanager
def some_nodes(**system_config: Any) -> Iterator[Nodes]:
    """A head alone, to which nodes can be added; the driver is connected to it. That one was killed is noticed within seconds."""
    if "RAY_health_check_period_ms" not in os.environ:  # which these settings would overrule
        system_config = {**QUICK, **system_config}
    with temporary_dir() as directory:
        Path("/tmp/ray").mkdir(exist_ok=True)  # where `Cluster` notes its address, whatever `temp_dir` is
        head = {"num_cpus": 0, "include_dashboard": False, "temp_dir": directory, "_system_config": system_config}
        cluster: Any = Cluster(initialize_head=True, head_node_args=head)
        try:
            ray.init(address=cluster.address, log_to_driver=False)
            yield Nodes(cluster, directory)
        finally:
            ray.shutdown()
            cluster.shutdown()
