"""Hidden files beside the records: whose they are, and what becomes of them when their writer is dead.

A temporary name tells the file of a dead writer from that of a living one. A **promise** is one that says, too, which record the file
is to be, and the sha256 of its content: where an fsync of a file makes its name durable, a whole promise is as good as the record.
"""
# A sequence of system calls, with file descriptors and `dir_fd`, which pathlib does not have.

from __future__ import annotations

import ctypes
import errno
import functools
import hashlib
import itertools
import os
import re
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal

from faultguard._core.names import record_number

if TYPE_CHECKING:
    from collections.abc import Collection

__all__ = ["NO_RENAME", "Tidied", "become", "inode", "promise_name", "temporary_name", "tidy", "unlink"]

_AGE_S: Final = 86_400.0
_UNDER_WAY_S: Final = 10.0  # a living writer needs a moment between the fsync of a promise and its rename
_DIGEST_CHARS: Final = 32
_PIECE: Final = 1 << 20
_RENAME_NOREPLACE: Final = 1
_MAY_NOT: Final = frozenset({errno.EACCES, errno.EPERM, errno.EROFS})
NO_RENAME: Final = frozenset({errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS, errno.EPERM})  # of what `become` may say: use links
_NAME: Final = re.compile(r"\.tmp-([0-9a-f]+-[0-9]+)-([0-9]{1,7})-([0-9]+)-[0-9]+(?:-(.+)-([0-9a-f]{32}))?")
_numbers: Final = itertools.count()


def temporary_name() -> str:
    """A name that nobody else takes, and that says whose it is."""
    pid = os.getpid()
    return f".tmp-{host()}-{pid}-{_start_time(pid)}-{next(_numbers)}"


def promise_name(record: str, data: bytes) -> str:
    """Likewise, of a file that is to be `record` in this directory, once it holds all of `data`."""
    return f"{temporary_name()}-{record}-{hashlib.sha256(data).hexdigest()[:_DIGEST_CHARS]}"


def become(promise: str, record: str, directory_fd: int) -> None:
    """Rename a promise, in one step, to the record that it is to be.

    Raises:
        FileExistsError: there is such a record.
        FileNotFoundError: the promise is gone.
        OSError: one of `NO_RENAME` where this cannot be done, or another error of the file system.
    """
    rename = _renameat2()
    if rename is None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))
    if rename(directory_fd, promise.encode(), directory_fd, record.encode(), _RENAME_NOREPLACE):
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


@functools.lru_cache(maxsize=1)
def _renameat2() -> Any:
    """The function of the C library; Python has none that does not replace."""
    return getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)


@dataclass(frozen=True, slots=True)
class _Leftover:
    name: str
    host: str
    pid: int
    began: str
    record: str  # "" if it is no promise
    digest: str

    @property
    def is_of_this_boot(self) -> bool:
        """Whether the machine was not started again since, in whatever container."""
        return self.host.partition("-")[0] == host().partition("-")[0]

    def is_alive(self, directory_fd: int, *, in_doubt_s: float = _AGE_S) -> bool:
        """Whether its writer may still be at it; when in doubt, it is."""
        if self.host != host():  # another machine, another container, or this machine before it was started again: only age tells
            return self.is_younger(in_doubt_s, directory_fd)
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

    def is_younger(self, seconds: float, directory_fd: int) -> bool:
        """Whether it was written since; when in doubt, it was."""
        with suppress(OSError):
            return os.stat(self.name, dir_fd=directory_fd).st_mtime > time.time() - seconds
        return True


@dataclass(frozen=True, slots=True)
class Tidied:
    """The visible names in a directory; and whether records are among them that were only promised: it is to be fsynced first."""

    names: list[str]
    kept: bool = False


def tidy(names: Collection[str], directory_fd: int) -> Tidied:
    """Remove what dead writers have left in a directory, and make the records that they have promised.

    Args:
        names: all that are in the directory.
        directory_fd: the directory.

    Raises:
        OSError: a promise cannot be kept, so what is there is less than what was acknowledged.
    """
    visible = [name for name in names if not name.startswith(".")]
    if len(visible) == len(names):
        return Tidied(visible)
    kept = False
    hidden = (_parse(name) for name in names if name.startswith("."))
    for found in sorted(filter(None, hidden), key=lambda leftover: leftover.record):  # the lower first: see `_keep`
        if found.record in visible:
            if _is_superfluous(found, directory_fd):
                unlink(found.name, directory_fd)
            continue
        answer = _keep(found, visible, directory_fd) if found.record else "no"
        if answer == "kept":
            visible.append(found.record)
            kept = True
        elif answer == "no" and not found.is_alive(directory_fd):
            unlink(found.name, directory_fd)
    return Tidied(visible, kept)


def _is_superfluous(promise: _Leftover, directory_fd: int) -> bool:
    """Whether its record is another file, or this one with two links. Half a rename, without a journal, leaves two names and one link."""
    try:
        mine, there = (os.stat(name, dir_fd=directory_fd) for name in (promise.name, promise.record))
    except FileNotFoundError:
        return False
    return mine.st_ino != there.st_ino or mine.st_nlink > 1


def _keep(promise: _Leftover, visible: list[str], directory_fd: int) -> Literal["kept", "later", "no"]:
    """Make the record that was promised, if all of it is there.

    Not below a record with a higher number: who made that one has seen all that were acknowledged, so this one was not, or was deleted
    since. Later, while its writer is about to do so itself; one that was stopped meanwhile is not waited for.
    """
    number = record_number(promise.record)
    if number is None or number < max((record_number(name) or 0 for name in visible), default=0):
        return "no"
    young = promise.is_younger(_UNDER_WAY_S, directory_fd)
    if young and promise.is_of_this_boot and promise.is_alive(directory_fd, in_doubt_s=_UNDER_WAY_S):
        return "later"
    try:
        file = os.open(promise.name, os.O_RDONLY, dir_fd=directory_fd)
        try:
            if not _is_whole(file, promise.digest):
                return "no"  # the power failed before it was durable
            _rename(promise, directory_fd)
        finally:
            os.close(file)
    except (FileExistsError, FileNotFoundError):  # somebody else was faster
        return "kept" if inode(promise.record, directory_fd) is not None else "no"
    except OSError as error:
        # Who may not write has to see less: the reply to the writer comes after the rename. But after a crash there was one, maybe.
        if error.errno in _MAY_NOT and (young or promise.is_of_this_boot):
            return "later"
        raise
    return "kept"


def _is_whole(file: int, digest: str) -> bool:
    """Whether the disk has the content of a promise.

    After an fsync that failed, for whomever, the kernel may have it in memory only, and the next fsync is a success.
    """
    os.fsync(file)
    os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
    found = hashlib.sha256()
    for piece in iter(lambda: os.read(file, _PIECE), b""):
        found.update(piece)
    return found.hexdigest()[:_DIGEST_CHARS] == digest


def _rename(promise: _Leftover, directory_fd: int) -> None:
    """With two calls where it cannot be one, such as on an NFS client of the disk."""
    try:
        become(promise.name, promise.record, directory_fd)
    except OSError as error:
        if error.errno not in NO_RENAME:
            raise
        os.link(promise.name, promise.record, src_dir_fd=directory_fd, dst_dir_fd=directory_fd)
        os.fsync(directory_fd)
        unlink(promise.name, directory_fd)


def _parse(name: str) -> _Leftover | None:
    match = _NAME.fullmatch(name)
    return _Leftover(name, match[1], int(match[2]), match[3], match[4] or "", match[5] or "") if match else None


def inode(name: str, directory_fd: int) -> int | None:
    """Which file has a name in a directory; None if there is none."""
    try:
        return os.stat(name, dir_fd=directory_fd).st_ino
    except FileNotFoundError:
        return None


def unlink(name: str, directory_fd: int) -> None:
    """Remove a hidden file; at worst it stays."""
    with suppress(OSError):
        os.unlink(name, dir_fd=directory_fd)


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
