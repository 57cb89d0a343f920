"""After two failures in a row on one node the next attempt prefers another one.

Ray cannot be told where to run a task again. So the attempt runs as a task of this one, on a node that has room for it at once, while
this one waits and passes on what comes of it: value, exception, cancel. In the log it is the same Ray task; should its process die,
this one leaves, too, and Ray runs the task again as ever. Where no other node has room, nothing is different. Where it has not begun in
time, it runs here; should both begin, the log knows one: whoever finds the other there waits for it, or is refused.
"""

from __future__ import annotations

import functools
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

__all__ = ["BegunError", "Elsewhere", "NotBegunError", "failed_on", "failures_before"]

FAILURES = 2
NODES_TRIED = 3
RETRIES_THERE = 1000  # more than an attempt there may have in its process: whoever comes after it is the later one
SLOW_S = 600.0  # before a node on which an attempt has not begun in time is tried again
LOOK_S = 1.0  # Ray's head takes milliseconds to say where there is room: too long for what fails again and again


_nowhere_until = 0.0  # on the monotonic clock
_slow_until: dict[str, float] = {}  # likewise, by node


class NotBegunError(Exception):
    """It could not run there, or has not begun in time.

    Args:
        local_retry: of the attempt that runs here, which is the later one.
    """

    def __init__(self, local_retry: int) -> None:
        super().__init__(local_retry)
        self.local_retry: int = local_retry


class BegunError(Exception):
    """It has begun there after all."""


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
    """It could not run on that node."""


@dataclass(slots=True)
class Elsewhere:
    """How the next attempt of a task gets to another node.

    Attributes:
        worker: for people.
        node_id: where this one runs.
        submit: runs it on a node: `(node_id, local_retry) -> ref`.
        begins_s: so long it may take to begin there: that node may be frozen, and for a node that it takes for dead Ray starts nothing.
        waits: this one runs for a task on another node, which waits: it is enough to leave.
        beside: the retry that has not begun in time, and may yet begin; -1: none.
    """

    worker: str
    node_id: str
    submit: Callable[[str, int], Any]
    begins_s: float
    waits: bool = False
    beside: int = -1
    _ref: Any = None  # of that one

    def is_there(self) -> bool:
        """Whether there is such a node now; that there is none counts for a moment."""
        global _nowhere_until  # noqa: PLW0603 - of the process
        if self.waits:
            return True
        if time.monotonic() < _nowhere_until:
            return False
        found = bool(_ray.node_with_room({self.node_id, *_slow_nodes()}))
        if not found:
            _nowhere_until = time.monotonic() + LOOK_S
        return found

    def run(self, local_retry: int, begun: Callable[[int], bool | None], leave: Callable[[], None]) -> Any:
        """Run the attempt there, and give or raise what comes of it.

        Args:
            local_retry: orders its claim among those of this Ray task.
            begun: says whether a retry has, as the log knows; None: that cannot be read.
            leave: ends this process, so that Ray runs the task again.

        Raises:
            NotBegunError: it has to run here.
        """
        if self.waits:
            leave()
        tried = {self.node_id, *_slow_nodes()}  # Ray takes a dead node for alive for a while
        for sent in range(local_retry, local_retry + NODES_TRIED * RETRIES_THERE, RETRIES_THERE):
            self.beside = -1
            node_id = _ray.node_with_room(tried)
            if not node_id:
                raise NotBegunError(sent)
            tried.add(node_id)
            try:
                self._ref = self._submit(node_id, sent)
                return self.outcome(leave, functools.partial(begun, sent))
            except _ray.LateError as error:
                self.beside = sent
                _slow_until[node_id] = time.monotonic() + SLOW_S
                raise NotBegunError(sent + RETRIES_THERE) from error  # the next node would not be sooner, where Ray takes this one for dead
            except _NotThereError:
                continue
        raise NotBegunError(local_retry + NODES_TRIED * RETRIES_THERE)

    def _submit(self, node_id: str, local_retry: int) -> Any:
        text = f"'{self.worker}' failed {FAILURES} times in a row on node {self.node_id[:8]}; its next attempt runs on node {node_id[:8]}."
        _events.emit_beside(logging.WARNING, "faultguard.elsewhere", text, node_id=self.node_id, to_node=node_id)
        try:
            return self.submit(node_id, local_retry)
        except Exception as error:  # what cannot travel, for whatever reason, stays
            raise _NotThereError from error

    def outcome(self, leave: Callable[[], None], begun: Callable[[], bool | None] = lambda: True) -> Any:
        """Give or raise what comes of the attempt there. What goes wrong before its claim is no end of an attempt."""
        try:
            return _ray.outcome_of(self._ref, self.begins_s, begun)
        except _ray.LateError:
            raise
        except Exception as error:
            if begun() is False:
                raise _NotThereError from error
            if isinstance(error, _ray.LostError):
                leave()
            raise

    def withdraw(self) -> None:
        """Nobody will want to know what comes of the one that may yet begin."""
        if self.beside >= 0:
            _ray.cancel(self._ref)


def _slow_nodes() -> list[str]:
    """Nodes on which an attempt of this process has not begun in time a while ago."""
    now = time.monotonic()
    return [node_id for node_id, until in _slow_until.items() if now < until]
