"""This process, so that another one on the same host can tell whether it is still there."""

from __future__ import annotations

import functools
import os
from dataclasses import dataclass
from pathlib import Path

__all__ = ["ProcessId", "is_dead", "this_process"]

_STATE_FIELD = 0  # of /proc/<pid>/stat, after the name in parentheses
_START_FIELD = 19


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


def is_dead(process: ProcessId) -> bool | None:
    """Whether a process is surely gone; None when that cannot be seen from here (another host, pid namespace or boot)."""
    if not process.boot_id or process.boot_id != _boot_id():
        return None
    stat = _stat(process.pid)
    if stat is None or stat[_STATE_FIELD] in {"Z", "X"}:
        return True
    return int(stat[_START_FIELD]) != process.start_time


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
