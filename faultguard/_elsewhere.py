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
LOOK_S = 1.0  # Ray's head takes milliseconds to say where there is room: too long for what fails again and again


_nowhere_until = 0.0  # on the monotonic clock


class NotBegunError(Exception):
    """It could not run there, and nothing was begun."""


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


@dataclass(frozen=True, slots=True)
class Elsewhere:
    """How the next attempt of a task gets to another node.

    Attributes:
        worker: for people.
        node_id: where this one runs.
        submit: runs it on a node: `(node_id, local_retry) -> ref`.
        waits: this one runs for a task on another node, which waits: it is enough to leave.
    """

    worker: str
    node_id: str
    submit: Callable[[str, int], Any]
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

    def run(self, local_retry: int, tried: set[str], newest: Callable[[], Record | None], leave: Callable[[], None]) -> Any:
        """Run the attempt there, and give or raise what comes of it.

        Args:
            tried: nodes where it could not begin, to which the one that is tried now is added: Ray takes a dead one for alive for a while.
            local_retry: orders its claim among those of this Ray task.
            newest: reads the newest record of the worker: whatever goes wrong there before a claim is no end of an attempt.
            leave: ends this process, so that Ray runs the task again.

        Raises:
            NotBegunError: it has to run here.
        """
        if self.waits:
            leave()
        before, node_id = newest(), _ray.node_with_room({self.node_id, *tried})
        if before is None or not node_id:
            raise NotBegunError
        tried.add(node_id)
        text = f"'{self.worker}' failed {FAILURES} times in a row on node {self.node_id[:8]}; its next attempt runs on node {node_id[:8]}."
        _events.emit_beside(logging.WARNING, "faultguard.elsewhere", text, node_id=self.node_id, to_node=node_id)
        try:
            ref = self.submit(node_id, local_retry)
        except Exception as error:  # what cannot travel, for whatever reason, stays
            raise NotBegunError from error
        try:
            return _ray.outcome_of(ref)
        except _ray.LostError as error:
            if _is(newest(), before):
                raise NotBegunError from error
            leave()
            raise
        except Exception as error:
            if _is(newest(), before):
                raise NotBegunError from error
            raise


def _is(record: Record | None, before: Record) -> bool:
    return record is not None and record.number == before.number
