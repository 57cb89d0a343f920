"""Hidden files beside the records: whose they are, and what becomes of them when their writer is dead.

A temporary name tells the file of a dead writer from that of a living one. A **promise** is one that says, too, which record the file
is to be, and the sha256 of its content: where an fsync of a file makes its name durable, a whole promise is as good as the record.
"""
# A sequence of system calls, with file descriptors and `dir_fd`, which pathlib does not have.

from __future__ import annotations

import functools
import hashlib
import itertools
import os
import re
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

from faultguard._core.names import record_number

if TYPE_CHECKING:
    from collections.abc import Collection

__all__ = ["Tidied", "is_there", "keep_promise", "promise_name", "promises_of", "remove", "temporary_name", "tidy", "unlink"]

_AGE_S: Final = 86_400.0
_DIGEST_CHARS: Final = 32
_NAME: Final = re.compile(r"\.tmp-([0-9a-f]+-[0-9]+)-([0-9]{1,7})-([0-9]+)-[0-9]+(?:-(.+)-([0-9a-f]{32}))?")
_numbers: Final = itertools.count()


def temporary_name() -> str:
    """A name that nobody else takes, and that says whose it is."""
    pid = os.getpid()
    return f".tmp-{host()}-{pid}-{_start_time(pid)}-{next(_numbers)}"


def promise_name(record: str, data: bytes) -> str:
    """Likewise, of a file that is to be `record` in this directory, once it holds all of `data`."""
    return f"{temporary_name()}-{record}-{_digest(data)}"


@dataclass(frozen=True, slots=True)
class _Leftover:
    name: str
    host: str
    pid: int
    began: str
    record: str  # "" if it is no promise
    digest: str

    def is_alive(self, directory_fd: int) -> bool:
        """Whether its writer may still be at it; when in doubt, it is."""
        if self.host != host():  # another machine, another container, or this machine before it was started again: only age tells
            with suppress(OSError):
                return os.stat(self.name, dir_fd=directory_fd).st_mtime > time.time() - _AGE_S
            return True
        try:
            os.kill(self.pid, 0)
        except ProcessLookupError:
            return False
        except PermissionError:
            pass
        try:
            state, began = process(self.pid)
        except OSError:  # /proc hides the processes of others (hidepid)
            return True
        return began == self.began and state not in "ZX"


def _parse(name: str) -> _Leftover | None:
    match = _NAME.fullmatch(name)
    return _Leftover(name, match[1], int(match[2]), match[3], match[4] or "", match[5] or "") if match else None


@dataclass(frozen=True, slots=True)
class Tidied:
    """What is in a directory: its visible names, among them records that were only promised; and the promises that are kept.

    Those are superfluous when the directory has been fsynced since.
    """

    names: list[str]
    kept: list[str]


def tidy(names: Collection[str], directory_fd: int) -> Tidied:
    """Remove what dead writers have left in a directory, and link what was promised, also by who lives: it is about to do the same.

    Args:
        names: all that are in the directory.
        directory_fd: the directory.
    """
    visible = [name for name in names if not name.startswith(".")]
    if len(visible) == len(names):
        return Tidied(visible, [])
    kept: list[str] = []
    hidden = (_parse(name) for name in names if name.startswith("."))
    for found in sorted(filter(None, hidden), key=lambda leftover: leftover.record):  # the lower first: see `keep_promise`
        if found.record in visible:
            kept.append(found.name)
        elif found.record and keep_promise(found, visible, directory_fd):
            visible.append(found.record)
            kept.append(found.name)
        elif not found.is_alive(directory_fd):
            unlink(found.name, directory_fd)
    return Tidied(visible, kept)


def keep_promise(promise: _Leftover, visible: list[str], directory_fd: int) -> bool:
    """Link the record that was promised, if all of it is there. The directory is to be fsynced before anybody hears of it.

    Not below a record with a higher number: who made that has seen all that were acknowledged, so this one was not, or was deleted since.
    """
    number = record_number(promise.record)
    if number is None or number < max((record_number(name) or 0 for name in visible), default=0):
        return False
    try:
        file = os.open(promise.name, os.O_RDONLY, dir_fd=directory_fd)
    except FileNotFoundError:  # somebody else was faster
        return is_there(promise.record, directory_fd)
    try:
        data = b"".join(iter(lambda: os.read(file, 1 << 20), b""))
        if _digest(data) != promise.digest:
            return False  # the power failed before it was durable
        os.fsync(file)
        os.link(promise.name, promise.record, src_dir_fd=directory_fd, dst_dir_fd=directory_fd, follow_symlinks=True)
    except FileExistsError:
        return True
    except FileNotFoundError:
        return is_there(promise.record, directory_fd)
    finally:
        os.close(file)
    return True


def promises_of(record: str, names: list[str]) -> list[str]:
    """The names of all promises of a record."""
    return [name for name in names if f"-{record}-" in name and (found := _parse(name)) is not None and found.record == record]


def remove(names: list[str], directory_fd: int) -> None:
    """Remove promises that are superfluous."""
    for name in names:
        unlink(name, directory_fd)


def unlink(name: str, directory_fd: int) -> None:
    """Remove a hidden file; at worst it stays."""
    with suppress(OSError):
        os.unlink(name, dir_fd=directory_fd)


def is_there(record: str, directory_fd: int) -> bool:
    """Whether a record is in a directory."""
    try:
        os.stat(record, dir_fd=directory_fd)
    except FileNotFoundError:
        return False
    return True


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:_DIGEST_CHARS]


@functools.lru_cache(maxsize=1)
def host() -> str:
    """Name what pids are unique in: this boot of this machine, and this pid namespace (a container has its own)."""
    boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="utf-8").strip().replace("-", "")
    return f"{boot}-{re.sub(r'[^0-9]', '', str(Path('/proc/self/ns/pid').readlink()))}"


@functools.lru_cache(maxsize=1)
def _start_time(pid: int) -> str:
    """Return when our process, `pid`, began; a child made by fork asks with its own pid."""
    return process(pid)[1]


def process(pid: int) -> tuple[str, str]:
    """Return the state of a process and when it began (ticks since boot), which tells it from a later one with its pid."""
    fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
    return fields[0], fields[19]
