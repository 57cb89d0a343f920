"""How soon faults of nodes and of the manager are noticed and made good: for `detection.py`."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from typing import TYPE_CHECKING, Any
from unittest import mock

import ray

import faultguard
from benchmarks.failing import WAIT_S, makes
from benchmarks.worker import TASK, WORKER, begin, heard_at, is_gone, make_sure, raised, ready, resumed, signalled, stop
from faultguard import _manager
from faultguard._session import current_settings
from tests.nodes import WORK, alive
from tests.tasks import end_manager, manager_pid, records, wait_until
from tests.test_elsewhere import free_cpus, on, sees
from tests.test_nodes import node_of_manager

if TYPE_CHECKING:
    from collections.abc import Callable

    from benchmarks.worker import Act, Case

__all__ = [
    "drained_again",
    "elsewhere",
    "manager_frozen",
    "manager_killed",
    "node_drained",
    "node_gone_in_a_batch",
    "node_left",
    "node_of_manager_killed",
    "result_lost",
]

DEADLINE_S = 600


def node_left(case: Case, leave: Callable[[Any], None], kind: str = "", *, first: Callable[[], None] | None = None) -> float:
    """From the moment at which its node is left, or lost, to the first batch on another one."""
    old = case.node

    def act(_: int) -> float:
        case.nodes.add()
        began = time.time()
        leave(old)
        return began

    took = resumed(case, kind, first=first, act=act)
    _remove(case, old)
    return took


def node_drained(case: Case) -> float:
    """From the drain to the first batch on another node."""
    return node_left(case, lambda node: case.nodes.drain(node, DEADLINE_S))


def node_gone_in_a_batch(case: Case) -> float:
    """From the going of a drained node, in the middle of a batch, to the first batch on another one."""

    def drain() -> None:
        case.nodes.drain(case.node, DEADLINE_S)
        wait_until(lambda: _newest(case).ended is not None, WAIT_S)

    return node_left(case, case.nodes.remove, "long batch", first=drain)


def drained_again(case: Case) -> float:
    """From the second drain before the first batch is done, which is one too many, until the caller knows."""
    ref = begin(case, "asks", "asks", at=0, max_failures=1)
    drained = [case.node]
    for number in (1, 2):
        ready(case, number)
        node = case.nodes.add()
        began = time.time()
        case.nodes.drain(drained[-1], DEADLINE_S)
        drained.append(node)
    took = raised(ref, faultguard.MaxFailuresExceeded) - began
    _remove(case, *drained[:-1])
    return took


def elsewhere(case: Case, *then: str, act: Act | None = None, frozen: bool = False) -> float:
    """From the second failure in a row on one node to the first batch on another one; or on, from what is done to that attempt there.

    `frozen`: the other one is, and Ray does not notice it, so that the first batch is where the failures were.
    """
    home, there = case.node, []
    with contextlib.ExitStack() as stack:

        def add() -> None:
            node = case.nodes.add(1)
            wait_until(lambda: ray.get(sees.options(scheduling_strategy=on(home)).remote(node.node_id), timeout=WAIT_S), WAIT_S)
            wait_until(lambda: free_cpus(node) == 1, WAIT_S)
            there.append(node)
            if frozen:
                stack.enter_context(case.nodes.frozen(node))
            case.trace.note("go", "")

        took = resumed(case, "exception when told", "exception", *then, first=add, act=act)
    (node,) = there
    end = _newest(case)
    last = end.failures[-1].node_id if then else end.owner.node_id
    make_sure(last == (home if frozen else node).node_id, "the attempt was not where it was to be")
    _remove(case, node)
    return took


def result_lost(case: Case, size: int) -> float:
    """From asking for the result of a finished task, which was lost with its node, to having it."""
    task: Any = faultguard.recoverable(ray.remote(num_cpus=1, resources={WORK: 1})(makes))
    ref, old = task.remote(WORKER, size), case.node
    make_sure(ray.wait([ref], timeout=WAIT_S, fetch_local=False)[0], "the task did not end")
    case.nodes.add()
    case.nodes.remove(old)
    wait_until(lambda: old.node_id not in alive(), WAIT_S)
    began = time.time()
    ray.get(ref, timeout=WAIT_S)
    return time.time() - began


def _remove(case: Case, *nodes: Any) -> None:
    """Those that are still there."""
    for node in nodes:
        if node in case.nodes.workers:
            case.nodes.remove(node)


def _newest(case: Case) -> Any:
    """The newest record of the worker."""
    return records(case.run, TASK, WORKER)[-1]


# --- the manager ----------------------------------------------------------------------------------------------------


def heard_again(case: Case, harm: Callable[[], float], *, node: Any = None) -> float:
    """From the end of the harm to the manager until one hears the worker again, which runs on that node."""
    ref = begin(case, "", node=node)
    ready(case)
    wait_until(heard_at, WAIT_S)
    began = harm()
    wait_until(lambda: heard_at() > began, WAIT_S)
    took = time.time() - began
    stop(ref)
    return took


def manager_killed(case: Case) -> float:
    """From its death."""

    def kill() -> float:
        end_manager()
        return time.time()

    return heard_again(case, kill)


def manager_frozen(case: Case, seconds: float) -> float:
    """From its thaw after so long."""

    def freeze() -> float:
        pid = manager_pid()
        os.kill(pid, signal.SIGSTOP)
        time.sleep(seconds)
        return signalled(signal.SIGCONT)(pid)

    return heard_again(case, freeze)


def node_of_manager_killed(case: Case) -> float:
    """From its death with its node, where it is because it cannot be on the head; the worker is on another one."""
    home = case.node
    _manager.end(current_settings())  # the one on the head
    with mock.patch.object(_manager, "HEAD_NODE", WORK):  # which the head has not
        pid = manager_pid()
    make_sure(node_of_manager() == home.node_id, "the manager is somewhere else")
    node = case.nodes.add()

    def kill() -> float:
        case.nodes.remove(home)
        wait_until(lambda: is_gone(pid), WAIT_S)  # it outlives its raylet for a moment, and hears
        return time.time()

    return heard_again(case, kill, node=node)
