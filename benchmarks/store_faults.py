"""How soon it is noticed what becomes of the store and of the records in it: for `detection.py`."""

from __future__ import annotations

import contextlib
import shutil
import signal
import time
from typing import TYPE_CHECKING, Any

import faultguard
from benchmarks.failing import WAIT_S
from benchmarks.worker import Case, after, begin, is_gone, make_sure, raised, ready, resumed, signalled, stop
from faultguard.storage import open_store, store_id
from tests.disks import renamed, where_it_is_another
from tests.tasks import wait_until
from tests.test_store_faults import remove

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from contextlib import AbstractContextManager
    from pathlib import Path

__all__ = ["all_damaged", "another", "away", "comes_late", "damaged", "hanging", "lost", "not_shared", "removed", "stays_away"]

AWAY_S = 3.1  # it is tried every second: coming back just after a try is the longest wait


# --- the store ------------------------------------------------------------------------------------------------------


def away(case: Case) -> float:
    """From its return to the next durable save."""
    return _durable_again(case, renamed(case.store))


def hanging(case: Case) -> float:
    """From when it answers again to the next durable save."""
    return _durable_again(case, _hanging(case), "store hangs")


@contextlib.contextmanager
def _hanging(case: Case) -> Iterator[None]:
    yield
    case.trace.note("go", "")


def _durable_again(case: Case, trouble: AbstractContextManager[None], kind: str = "") -> float:
    ref = begin(case, kind)
    ready(case)
    with trouble:
        time.sleep(AWAY_S)
        before = case.trace.notes("batch")[-1]["durable"]
    began = time.time()
    wait_until(lambda: case.trace.notes("batch")[-1]["durable"] > before, WAIT_S)
    took = time.time() - began
    stop(ref)
    return took


def stays_away(case: Case) -> float:
    """From its going until the caller knows."""
    ref = begin(case, "")
    ready(case)
    with renamed(case.store):
        began = time.time()
        return raised(ref, faultguard.CheckpointStoreError) - began


def removed(case: Case) -> float:
    """From its removal until the caller knows."""
    ref = begin(case, "")
    ready(case)
    began = time.time()
    remove(case.store)
    return _without_store(raised(ref, faultguard.CheckpointStoreError) - began)


def another(case: Case) -> float:
    """From the death of an attempt, whose store was made anew meanwhile, until the caller knows."""

    def make_anew() -> None:
        remove(case.store)
        store_id(open_store(str(case.store)))

    return _without_store(_until_raised(case, make_anew, faultguard.CheckpointStoreError))


def _without_store(took: float) -> float:
    """The run has no store any more, and cannot end well."""
    with contextlib.suppress(faultguard.CheckpointStoreError):
        faultguard.shutdown()
    return took


def not_shared(case: Case) -> float:
    """From the submission to a node that sees another directory until the caller knows."""
    node = _estranged(case)
    began = time.time()
    took = raised(begin(case, node=node), faultguard.CheckpointStoreError) - began
    case.nodes.remove(node)
    return took


def comes_late(case: Case) -> float:
    """From the loss of a node until the caller knows that the attempt on the next one finds no store there."""
    home, ref = case.node, begin(case, "")
    ready(case)
    node = _estranged(case)
    began = time.time()
    case.nodes.remove(home)
    took = raised(ref, faultguard.CheckpointStoreError) - began
    case.nodes.add()
    case.nodes.remove(node)
    return took


def _estranged(case: Case) -> Any:
    """A node which sees an empty directory where the store is."""
    other = case.directory / "other"
    other.mkdir()
    with where_it_is_another(case.store, other):
        return case.nodes.add()


# --- the records ----------------------------------------------------------------------------------------------------


def lost(case: Case) -> float:
    """From the death of an attempt, whose records somebody removes, to the first batch of the next one."""
    took = resumed(case, "", act=_crash(lambda: shutil.rmtree(case.log)))
    make_sure(after(case, 1)["batch"] == 0, "it did not begin from zero")
    return took


def damaged(case: Case) -> float:
    """From the death of an attempt, whose newest record has a wrong bit, to the first batch of the next one."""
    return resumed(case, "", act=_crash(lambda: _damage(_records(case)[-1:])))


def all_damaged(case: Case) -> float:
    """From the death of an attempt, whose records all have a wrong bit, until the caller knows."""
    return _until_raised(case, lambda: _damage(_records(case)), faultguard.CheckpointCorruptError)


def _until_raised(case: Case, harm: Callable[[], None], error: type[Exception]) -> float:
    """From the death of an attempt, and the harm to its store, until the caller knows."""
    ref = begin(case, "")
    began = _crash(harm)(ready(case))
    return raised(ref, error) - began


def _crash(harm: Callable[[], None]) -> Callable[[int], float]:
    """Kill the process, and do that harm while there is none."""

    def act(pid: int) -> float:
        began = signalled(signal.SIGKILL)(pid)
        wait_until(lambda: is_gone(pid), WAIT_S)
        harm()
        return began

    return act


def _records(case: Case) -> list[Path]:
    """The records of the worker, oldest first."""
    return sorted(case.log.glob("*.json"))


def _damage(paths: list[Path]) -> None:
    for path in paths:
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 1
        path.write_bytes(data)
