"""This process, so that another one on the same host can tell whether it is still there."""

from __future__ import annotations

import contextlib
import functools
import itertools
import os
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["ProcessId", "is_dead", "is_stopped", "is_traced", "new_writer", "opened", "this_process"]

_STATE_FIELD = 0  # of /proc/<pid>/stat, after the name in parentheses
_START_FIELD = 19
_STOPPED = "T"  # by a signal; a debugger makes it "t"


@dataclass(frozen=True, slots=True)
class ProcessId:
    """A process, unique over reboots, pid reuse and pid namespaces. `boot_id` is empty where the system does not tell."""

    boot_id: str
    pid: int
    start_time: int


def this_process() -> ProcessId:
    """The calling process; a forked child has its own."""
    return _process(os.getpid())


@functools.lru_cache(maxsize=2)
def _process(pid: int) -> ProcessId:
    stat = _stat(pid)
    return ProcessId(_boot_id(), pid, int(stat[_START_FIELD]) if stat else 0)


def new_writer() -> str:
    """A name that no other writer has had or will have, of 32 hexadecimal digits."""
    return f"{_base(os.getpid())}{next(_writers):012x}"


@functools.lru_cache(maxsize=1)
def _base(pid: int) -> str:
    """Once per process, and a forked child has its own: asking the system for randomness may take 0.1 ms."""
    return f"{pid:08x}{uuid.uuid4().hex[:12]}"


_writers = itertools.count()


def is_dead(process: ProcessId) -> bool | None:
    """Whether a process is surely gone; None when that cannot be seen from here (another host, pid namespace or boot)."""
    if not process.boot_id or process.boot_id != _boot_id():
        return None
    stat = _stat(process.pid)
    if stat is None or stat[_STATE_FIELD] in {"Z", "X"}:
        return True
    return int(stat[_START_FIELD]) != process.start_time


def is_stopped(pid: int) -> bool:
    """Whether a signal has stopped it, as SIGSTOP does."""
    stat = _stat(pid)
    return stat is not None and stat[_STATE_FIELD] == _STOPPED


def is_traced(pid: int) -> bool:
    """Whether a debugger is attached to it."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return False
    return any(line.startswith("TracerPid:") and line.split()[1] != "0" for line in lines)


@contextlib.contextmanager
def opened(process: ProcessId) -> Iterator[int | None]:
    """A descriptor of this very process, for signals, whoever gets its pid later; None: it is gone, or may not be touched."""
    try:
        descriptor = os.pidfd_open(process.pid)
    except OSError:
        yield None
        return
    try:
        yield descriptor if is_dead(process) is False else None  # asked after it was opened: the pid may have been another's
    finally:
        os.close(descriptor)


@functools.lru_cache(maxsize=1)
def _boot_id() -> str:
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{boot}:{Path('/proc/self/ns/pid').stat().st_ino}"
    except OSError:  # no Linux /proc: liveness is then known from heartbeats only
        return ""


def _stat(pid: int) -> list[str] | None:
    try:
        text = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    return text[text.rindex(")") + 2 :].split()
