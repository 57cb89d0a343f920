"""A look at processes of this node that the manager hears nothing of, and their end if they stand still as a whole.

It runs as a task on their node, where the same clock and the same files are. Between the last look and the end the process is
stopped, so that it cannot come back to life in between; if its file says that it did, it goes on.
"""

from __future__ import annotations

import contextlib
import signal
import time
from dataclasses import dataclass

import msgspec

from faultguard import _marks, _ray
from faultguard._core.silence import Held, Look, Verdict, judge
from faultguard._native import native_stacks
from faultguard._process import ProcessId, is_dead, is_stopped, is_traced, opened

__all__ = ["SETTLE_S", "Answer", "Silent", "ending_of", "probe", "survey"]

SETTLE_S = 1.0  # a process that was just continued marks its file within this time, also on a busy machine
STOP_S = 2.0  # a signal may have to wait for a disk
POLL_S = 0.005


@dataclass(frozen=True, slots=True)
class Silent:
    """A worker that nothing is heard of, the process that held it, and since when earlier probes saw it as it is.

    `marked`: its process has been seen to say so in its file. Where there is none any more, it holds nobody.
    """

    worker: Held
    process: ProcessId
    stood: Look | None = None
    marked: bool = False


@dataclass(frozen=True, slots=True)
class Answer:
    """What a probe says of one of them; `stood` for the next one."""

    verdict: Verdict
    stood: Look | None = None


class Ending(msgspec.Struct, frozen=True):
    """Why a probe has ended a process, and where its threads stood, as far as that could be seen from outside."""

    cause: str
    stacks: str = ""


_CAUSES = {Verdict.KILL_STOPPED: "stopped", Verdict.KILL_STALLED: "stall"}


def probe(silent: list[Silent], timeout_s: float, settle_s: float = SETTLE_S) -> list[Answer]:
    """Judge each, and end what is to be ended.

    Args:
        silent: all on this node.
        timeout_s: a file that is older is no sign of life.
        settle_s: between the two looks.

    Returns:
        An answer for each.
    """
    first = [_look(each.process) for each in silent]
    time.sleep(settle_s)
    return [_decide(each, before, timeout_s) for each, before in zip(silent, first, strict=True)]


def survey(run: str) -> list[tuple[ProcessId, Held]]:
    """Whom the living processes of this node hold, of that run."""
    return [(process, held) for process, mark in _marks.read_all() for held in mark.workers if held.run == run]


def _look(process: ProcessId) -> Look:
    now = time.monotonic()
    dead = is_dead(process)
    if dead is not False:
        return Look(now, exists=None if dead is None else False)
    stopped, traced, mark = is_stopped(process.pid), is_traced(process.pid), _marks.read(process)
    if mark is not None and mark.boot_id != process.boot_id:
        mark = None  # left by another one
    return Look(now, exists=True, stopped=stopped, traced=traced, mark=mark)


def _decide(silent: Silent, first: Look, timeout_s: float) -> Answer:
    second = _look(silent.process)
    known, seen = silent.stood, (second.mark, second.stopped)
    stood = known if known is not None and (known.mark, known.stopped) == seen == (first.mark, first.stopped) else first
    verdict = judge(silent.worker, stood, second, timeout_s)
    if verdict is Verdict.UNKNOWN and second.exists and silent.marked:
        verdict = Verdict.GONE
    verdict = _carry_out(silent, verdict, second)
    return Answer(verdict, stood if stood.stopped == second.stopped else None)


def ending_of(process: ProcessId) -> Ending | None:
    """What the probe that has ended a process says of that; None: it was none of ours."""
    data = _ray.kv_get(_key(process))
    return msgspec.json.decode(data, type=Ending) if data is not None else None


def _note(process: ProcessId, verdict: Verdict, seen: str) -> None:
    """For the attempt that comes after it: the process itself cannot say anything any more."""
    if _ray.is_ready():
        _ray.kv_put(_key(process), msgspec.json.encode(Ending(_CAUSES[verdict], seen)))


def _key(process: ProcessId) -> str:
    return f"ended:{process.boot_id}:{process.pid}:{process.start_time}"


def _carry_out(silent: Silent, verdict: Verdict, second: Look) -> Verdict:
    if not verdict.kills:
        return verdict
    seen = native_stacks(None, silent.process.pid) if verdict is Verdict.KILL_STALLED else ""
    with opened(silent.process) as descriptor:
        if descriptor is None:
            return Verdict.GONE if is_dead(silent.process) else Verdict.UNKNOWN
        try:
            return _end(silent.process, descriptor, second, verdict, seen)
        except PermissionError:
            return Verdict.UNKNOWN
        except ProcessLookupError:
            return Verdict.GONE


def _end(process: ProcessId, descriptor: int, last: Look, verdict: Verdict, seen: str) -> Verdict:
    """Stop it, look once more, and end it or let it go on."""
    signal.pidfd_send_signal(descriptor, signal.SIGSTOP)
    try:
        stands = _wait_until_stopped(process.pid) and _marks.read(process) == last.mark
        if stands:
            _note(process, verdict, seen)
            signal.pidfd_send_signal(descriptor, signal.SIGKILL)
            return verdict
    finally:  # whatever cuts this: nothing stays stopped that ran; a killed one does not care
        if not last.stopped or _marks.read(process) != last.mark:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(descriptor, signal.SIGCONT)
    return Verdict.ALIVE if _marks.read(process) != last.mark else Verdict.BUSY


def _wait_until_stopped(pid: int) -> bool:
    deadline = time.monotonic() + STOP_S
    while not is_stopped(pid):
        if time.monotonic() >= deadline:
            return False
        time.sleep(POLL_S)
    return True
