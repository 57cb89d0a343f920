"""After two failures in a row on one node the next attempt prefers another one.

Ray cannot be told where to run a task again. So the attempt runs as a task of this one, on a node that has room for it at once, while
this one waits and passes on what comes of it: value, exception, cancel. In the log it is the same Ray task; should its process die,
this one leaves, too, and Ray runs the task again as ever. Where no other node has room, nothing is different.
"""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from faultguard import _events, _ray
from faultguard._core.budget import cost_of_crash
from faultguard._core.records import FailureRecord

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from faultguard._core.records import Record

__all__ = ["Elsewhere", "NotBegunError", "failed_on", "failures_before"]

FAILURES = 2
NODES_TRIED = 3
LOOK_S = 1.0  # Ray's head takes milliseconds to say where there is room: too long for what fails again and again


_nowhere_until = 0.0  # on the monotonic clock


class NotBegunError(Exception):
    """It could not run there, and nothing was begun.

    Args:
        local_retry: of the attempt that runs here: should one of those begin after all, this one is the later.
    """

    def __init__(self, local_retry: int) -> None:
        super().__init__(local_retry)
        self.local_retry: int = local_retry


def failed_on(node_id: str, failures: Sequence[FailureRecord]) -> bool:
    """Whether the last failures were all on that node."""
    last = failures[-FAILURES:]
    return len(last) == FAILURES and all(failure.node_id == node_id for failure in last)


def failures_before(head: Record | None) -> tuple[FailureRecord, ...]:
    """The failures of a worker whose newest record is `head`; one that left no word crashed where it wrote that."""
    if head is None or head.kind == "end":
        return ()
    if not cost_of_crash(head):
        return head.failures
    return (*head.failures, FailureRecord("crash", head.attempt, 0, node_id=head.owner.node_id))


class _NotThereError(Exception):
    """The same of one node."""


class _LateError(_NotThereError):
    """It may yet begin there."""


@dataclass(frozen=True, slots=True)
class Elsewhere:
    """How the next attempt of a task gets to another node.

    Attributes:
        worker: for people.
        node_id: where this one runs.
        submit: runs it on a node: `(node_id, local_retry) -> ref`.
        begins_s: so long it may take to begin there: that node may be frozen, and for a node that it takes for dead Ray starts nothing.
        waits: this one runs for a task on another node, which waits: it is enough to leave.
    """

    worker: str
    node_id: str
    submit: Callable[[str, int], Any]
    begins_s: float
    waits: bool = False

    def is_there(self) -> bool:
        """Whether there is such a node now; that there is none counts for a moment."""
        global _nowhere_until  # noqa: PLW0603 - of the process
        if self.waits:
            return True
        if time.monotonic() < _nowhere_until:
            return False
        found = bool(_ray.node_with_room({self.node_id}))
        if not found:
            _nowhere_until = time.monotonic() + LOOK_S
        return found

    def run(self, local_retry: int, newest: Callable[[], Record | None], leave: Callable[[], None]) -> Any:
        """Run the attempt there, and give or raise what comes of it.

        Args:
            local_retry: orders its claim among those of this Ray task.
            newest: reads the newest record of the worker: whatever goes wrong there before a claim is no end of an attempt.
            leave: ends this process, so that Ray runs the task again.

        Raises:
            NotBegunError: it has to run here.
        """
        if self.waits:
            leave()
        before, tried = newest(), {self.node_id}  # Ray takes a dead node for alive for a while
        while before is not None and len(tried) <= NODES_TRIED and (node_id := _ray.node_with_room(tried)):
            tried.add(node_id)
            try:
                return self._run_on(node_id, local_retry, lambda: _is(newest(), before), leave)
            except _NotThereError as error:
                local_retry += 1
                if isinstance(error, _LateError):  # which the next node would be, too
                    break
        raise NotBegunError(local_retry)

    def _run_on(self, node_id: str, local_retry: int, not_begun: Callable[[], bool], leave: Callable[[], None]) -> Any:
        text = f"'{self.worker}' failed {FAILURES} times in a row on node {self.node_id[:8]}; its next attempt runs on node {node_id[:8]}."
        _events.emit_beside(logging.WARNING, "faultguard.elsewhere", text, node_id=self.node_id, to_node=node_id)
        try:
            ref = self.submit(node_id, local_retry)
        except Exception as error:  # what cannot travel, for whatever reason, stays
            raise _NotThereError from error
        try:
            return _ray.outcome_of(ref, self.begins_s, not_begun)
        except _ray.LateError as error:
            raise _LateError from error
        except Exception as error:
            if not_begun():
                raise _NotThereError from error
            if isinstance(error, _ray.LostError):
                leave()
            raise


def _is(record: Record | None, before: Record) -> bool:
    return record is not None and record.number == before.number
