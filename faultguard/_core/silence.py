"""What is done about a process that the manager hears nothing of: decided from what can be seen of it on its own node.

Nothing healthy may die of it. A process is ended only if it stands still as a whole: somebody has stopped it, or it says that
its worker has a `stall_timeout`, which its own watcher would have enforced if it could run. Anything else is told, and left alone;
so is, whatever it does, a driver, which nothing would replace, and a process with which other work would be lost.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass

import msgspec

__all__ = ["Held", "Look", "Mark", "Verdict", "judge"]


class Held(msgspec.Struct, frozen=True):
    """A worker that a process holds, in which run, and as which attempt."""

    task: str
    worker_id: str
    token: int
    run: str = ""
    attempt: int = 0


class Mark(msgspec.Struct, frozen=True):
    """What a process says of itself, again and again, in a file on its node.

    Args:
        boot_id: of the host, with the pid namespace.
        stamp: when, in monotonic seconds of the host.
        workers: what it holds.
        kill_after_s: how long all of it may stand still, and run, before it may be ended; None: it may not.
        hosts_others: it is a driver, or other work than that of one task runs in it: it may not be ended at all.
        node_id: of Ray's node that it belongs to, several of which may be on one host.
    """

    boot_id: str
    stamp: float
    workers: tuple[Held, ...]
    kill_after_s: float | None = None
    hosts_others: bool = False
    node_id: str = ""


class Verdict(enum.Enum):
    """What a look at a silent process has shown, and what was done."""

    ALIVE = "alive"  # it marks its file: only its beats do not arrive
    GONE = "gone"  # it has ended, or holds another worker now: Ray, or nobody, has something to do
    BUSY = "busy"  # it stands, and may have a reason, such as C code that holds the interpreter
    STOPPED = "stopped"  # by a signal, and not yet seen so for long enough
    LEFT_STOPPED = "left alone: it is stopped, and hosts other work"  # or is a driver: whoever stopped it may continue it
    TRACED = "traced"  # a debugger has it
    UNKNOWN = "unknown"  # nothing can be seen from there
    KILL_STOPPED = "killed: it was stopped"
    KILL_STALLED = "killed: it stood still for longer than its stall_timeout"

    @property
    def kills(self) -> bool:
        """Whether the process is ended."""
        return self in {Verdict.KILL_STOPPED, Verdict.KILL_STALLED}


@dataclass(frozen=True, slots=True)
class Look:
    """A process at one moment.

    Args:
        now: monotonic seconds of the host.
        exists: whether there is a process of this pid and start time; None: that cannot be seen, and nothing else either.
        stopped: whether a signal has stopped it.
        traced: whether a debugger is attached.
        mark: what its file says; None: there is none.
    """

    now: float
    exists: bool | None
    stopped: bool = False
    traced: bool = False
    mark: Mark | None = None


def judge(worker: Held, first: Look, second: Look, timeout_s: float) -> Verdict:
    """Judge by two looks; between them a process that has just been continued had time to mark its file.

    Args:
        worker: that nothing is heard of.
        first: the earliest look at which the process already stood as it does now, if there was one; else one just before.
        second: the last one.
        timeout_s: a file that is older is no sign of life; to be stopped for as long is the end.

    >>> w = Held("t", "w", 7)
    >>> def look(now, **seen):
    ...     return Look(now, exists=True, mark=Mark("b", 100.0, (w,)), **seen)
    >>> judge(w, look(161.0), look(222.0), 60.0), judge(w, look(161.0, stopped=True), look(222.0, stopped=True), 60.0)
    (<Verdict.BUSY: 'busy'>, <Verdict.KILL_STOPPED: 'killed: it was stopped'>)
    """
    mark = second.mark
    if second.exists is False or (mark is not None and worker not in mark.workers):
        return Verdict.GONE
    if mark is None:
        return Verdict.UNKNOWN
    age_s = second.now - mark.stamp
    if first.mark != mark or age_s <= timeout_s / 2:
        return Verdict.ALIVE
    if second.traced:
        return Verdict.TRACED
    return _judge_standing(first, second, mark, timeout_s) if age_s > timeout_s else Verdict.BUSY


def _judge_standing(first: Look, second: Look, mark: Mark, timeout_s: float) -> Verdict:
    """By how long it was *seen* as it is now. Not since its mark: it may have worked in C, or been frozen with its whole node."""
    if mark.hosts_others:
        return Verdict.LEFT_STOPPED if second.stopped else Verdict.BUSY
    seen_s = second.now - first.now if first.stopped == second.stopped else 0.0
    if second.stopped:
        return Verdict.KILL_STOPPED if seen_s > timeout_s else Verdict.STOPPED
    if mark.kill_after_s is not None and seen_s > mark.kill_after_s:
        return Verdict.KILL_STALLED
    return Verdict.BUSY
