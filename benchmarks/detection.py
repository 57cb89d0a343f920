"""How soon each fault is noticed and made good: from the fault to the first batch of the next attempt. The column of docs/failure-model.md.

    python benchmarks/detection.py [--rounds 3] [--only "stopped,node drained"]

Real faults on a real cluster of this machine, one worker at a time, each in a run of its own with the timeouts below: what is waited
for by setting is shown beside what comes on top. Where there is no next attempt, it is until the caller knows, or as the function says
that measures it. A frozen node takes a driver of its own with Ray's settings: `tests/frozen_nodes.py` prints that.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import statistics
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # Python puts only this folder there
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [sys.path[0], os.environ.get("PYTHONPATH")]))  # workers find `benchmarks`

import ray

import faultguard
from benchmarks import driver_faults, node_faults, store_faults, task_faults
from benchmarks.failing import HOARD_BYTES, ArrivesDead
from benchmarks.worker import WORKER, Case, resumed, signalled
from tests.nodes import Nodes, some_nodes
from tests.tasks import manager_pid

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from contextlib import AbstractContextManager

    Table = dict[str, tuple[float, Callable[[Case], float]]]

INTERVAL_S, TIMEOUT_S, STALL_S, PATIENCE_S = 1.0, 5.0, 2.0, 5.0
HARD_S = 2 * STALL_S  # the timeout and the grace
GIVEN: dict[str, Any] = {"heartbeat_interval": INTERVAL_S, "heartbeat_timeout": TIMEOUT_S, "progress": False}


def inside(*kinds: str, **given: Any) -> Callable[[Case], float]:
    """What a task does to itself."""
    return lambda case: resumed(case, *kinds, **given)


def outside(number: signal.Signals, **given: Any) -> Callable[[Case], float]:
    """A signal to its process."""
    return lambda case: resumed(case, "", act=signalled(number), **given)


def driving(measure: Callable[..., float], **given: Any) -> Callable[[Case], float]:
    """What becomes of drivers of a named run."""

    def measured(case: Case) -> float:
        with driver_faults.Drivers(case.nodes, case.directory / "drivers", GIVEN) as some:
            return measure(some, **given)

    return measured


MEASURES: Table = {
    "exception": (0, inside("exception")),
    "exception with large arguments": (0, inside("exception", ballast=bytes(2 << 20))),
    "exception of fresh_process_on": (0, inside("exception", fresh_process_on=ValueError)),
    "exception after progress": (0, inside("exception", "exception", gain=10, max_failures=1, reset_on_progress=True)),
    "batch that always raises": (0, lambda case: task_faults.poisoned(case, "exception", 3)),
    "batch that always kills": (0, lambda case: task_faults.poisoned(case, "SIGKILL", 4)),
    "budget spent": (0, task_faults.spent),
    "hung in Python": (STALL_S, inside("hung in Python", stall_timeout=STALL_S)),
    "hung in C": (HARD_S, inside("hung in C", stall_timeout=STALL_S)),
    "hung in C with the interpreter": (TIMEOUT_S + HARD_S, inside("hung in C with the interpreter", stall_timeout=STALL_S)),
    "hung in an event loop": (STALL_S, lambda case: task_faults.event_loop(case, STALL_S)),
    "SIGKILL": (0, outside(signal.SIGKILL)),
    "SIGKILL with on_poison": (0, outside(signal.SIGKILL, on_poison="skip")),
    "death in a save": (0, inside("death in a save", since="death")),
    "death while unpacking": (0, lambda case: resumed(case, "", ballast=ArrivesDead(WORKER, case.trace))),
    "death before the claim": (0, task_faults.unclaimed),
    "sys.exit": (0, inside("sys.exit")),
    "SIGTERM": (0, outside(signal.SIGTERM)),
    "stopped": (2 * TIMEOUT_S, outside(signal.SIGSTOP)),
    "cancelled": (0, task_faults.cancelled),
    "cancelled by force": (0, task_faults.cancelled_by_force),
    "second task": (TIMEOUT_S, task_faults.second_task),
    "unseen holder": (TIMEOUT_S, task_faults.unseen_holder),
    "failed twice on one node": (0, node_faults.elsewhere),
    "death on the other node": (0, lambda case: node_faults.elsewhere(case, "", act=signalled(signal.SIGKILL))),
    "node drained": (0, node_faults.node_drained),
    "node drained in a long batch": (0, node_faults.node_gone_in_a_batch),
    "node drained again": (0, node_faults.drained_again),
    "node killed": (0, lambda case: node_faults.node_left(case, case.nodes.remove)),
    "manager killed": (0, node_faults.manager_killed),
    "manager frozen": (0, lambda case: node_faults.manager_frozen(case, 2 * TIMEOUT_S)),
    "node of the manager killed": (0, node_faults.node_of_manager_killed),
    "store hangs": (0, store_faults.hanging),
    "store away": (0, store_faults.away),
    "store stays away": (PATIENCE_S, store_faults.stays_away),
    "store removed": (PATIENCE_S, store_faults.removed),
    "store made anew": (0, store_faults.another),
    "store not shared": (0, store_faults.not_shared),
    "store not there for the next": (PATIENCE_S, store_faults.comes_late),
    "records removed": (0, store_faults.lost),
    "record damaged": (0, store_faults.damaged),
    "all records damaged": (0, store_faults.all_damaged),
    "driver killed": (0, driving(driver_faults.killed)),
    "two drivers": (0, driving(driver_faults.second)),
    "driver frozen": (0, driving(driver_faults.frozen)),
    "driver dies before it closes": (0, driving(driver_faults.closing, dies_at="stored_workers")),
    "driver dies as it has closed": (0, driving(driver_faults.closing, dies_at="_drop_checkpoints")),
    "zombie beside its successor": (0, driving(driver_faults.zombie, closed=False)),
    "zombie of a closed run": (0, driving(driver_faults.zombie, closed=True)),
    "result lost": (0, lambda case: node_faults.result_lost(case, 1 << 18)),  # Ray keeps a smaller one beside the reference
    "unrecorded result lost": (0, lambda case: node_faults.result_lost(case, 1 << 21)),
}
SLOW: Table = {"long batch": (300, task_faults.long_batch)}  # only if it is asked for
UNNOTICED: Table = {"other node frozen": (TIMEOUT_S, lambda case: node_faults.elsewhere(case, frozen=True))}
IN_SHORT_MEMORY: Table = {"killed by the memory monitor": (0, inside("hoards", since="alive"))}


def unnoticed() -> AbstractContextManager[Nodes]:
    """Nodes that Ray takes for alive, whatever becomes of them."""
    return some_nodes(health_check_failure_threshold=10**4)


def short_of_memory() -> AbstractContextManager[Nodes]:
    """Nodes that have room for themselves, and for less than a task hoards."""
    memory: Any = ray._private.utils
    threshold = (memory.get_used_memory() + HOARD_BYTES * 3 // 4) / memory.get_system_memory()
    return some_nodes(memory_usage_threshold=threshold)


@contextlib.contextmanager
def case_of(nodes: Nodes, within: str) -> Iterator[Case]:
    """A directory and a run for one measurement."""
    directory = Path(tempfile.mkdtemp(dir=within))
    with faultguard.init(checkpoint_dir=directory / "checkpoints", **GIVEN) as run:
        manager_pid()
        yield Case(nodes, directory, run)


def lines(table: Table, nodes: Nodes, within: str, rounds: int) -> Iterator[str]:
    """What is printed of each fault, as it is measured."""
    nodes.add()
    for name, (setting_s, measure) in table.items():
        took = []
        for _ in range(rounds):
            with case_of(nodes, within) as case:
                took.append(measure(case) - setting_s)
        before = f"{setting_s:g} + " if setting_s else ""
        yield f"{name:32}{before:>6}{statistics.median(took):5.1f}   ({min(took):.1f} to {max(took):.1f})"


def main() -> None:
    """Measure and print, one line per fault."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", type=lambda text: text.split(","), default=[*MEASURES, *UNNOTICED, *IN_SHORT_MEMORY], metavar="FAULT,...")
    options = parser.parse_args()
    known = [*MEASURES, *SLOW, *UNNOTICED, *IN_SHORT_MEMORY]
    if unknown := set(options.only) - {*known}:
        parser.error(
            f"no such fault: {', '.join(sorted(unknown))}; there are {', '.join([*MEASURES, *SLOW, *UNNOTICED, *IN_SHORT_MEMORY])}"
        )
    os.environ["FAULTGUARD_STORE_PATIENCE"] = str(PATIENCE_S)
    print(
        f"heartbeat_interval {INTERVAL_S:g} s, heartbeat_timeout {TIMEOUT_S:g} s, stall_timeout {STALL_S:g} s, "
        f"FAULTGUARD_STORE_PATIENCE {PATIENCE_S:g} s; seconds, median and range"
    )
    shown = sys.stdout
    with (
        contextlib.redirect_stdout(sys.stderr),  # where Ray tells of each crash
        tempfile.TemporaryDirectory(prefix="faultguard-bench-", dir="/var/tmp") as directory,
    ):
        for cluster, table in ((some_nodes, {**MEASURES, **SLOW}), (unnoticed, UNNOTICED), (short_of_memory, IN_SHORT_MEMORY)):
            chosen = {name: row for name, row in table.items() if name in options.only}
            if chosen:
                with cluster() as nodes:
                    for line in lines(chosen, nodes, directory, options.rounds):
                        print(line, file=shown, flush=True)


if __name__ == "__main__":
    main()
