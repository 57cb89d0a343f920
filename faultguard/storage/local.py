"""Checkpoints on a disk: immutable files, created if absent, and durable before anybody is told that they are there.

The order is the whole point::

    write a file without a name -> fsync it -> parents durable -> link (fails if the name exists) -> fsync the directory

* A name appears only after its content is durable, so that no reader, and no crash, ever sees half a record.
* A record appears only after every directory above it is durable, so that one fsync of its own directory makes it safe. Where that
  fsync includes the name of a new directory, whoever calls it (ext4, XFS), the one above is spared for a directory just made.
* There, too, the fsync of a file includes its name, and what was done to its directory before. So a writer's second record in a row takes
  one fsync: the file is a **promise** first, whose hidden name says which record it is to be, and then renamed. Whoever finds a promise,
  and no record, makes it (`leftovers`).
* Where ext4 has no journal, a file that is fsynced without a name is on the disk as one that is deleted, and stays so after the link
  and the fsync of the directory: there what is fsynced has a temporary name first.
* Whoever is told "it is there" is told so after an fsync of the directory. Without it, a claim could survive a power cut
  while the save that it points at, whose writer died between link and fsync, did not: entries of a directory reach the
  disk one by one.
"""
# This module is a sequence of system calls, with file descriptors and `dir_fd`, which pathlib does not have.
# ruff: noqa: PTH102, PTH103, PTH106, PTH108, PTH112, PTH116, PTH120, PTH208

from __future__ import annotations

import errno
import os
import re
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

from faultguard._core.names import check_key, check_prefix, record_name, record_number
from faultguard.errors import AmbiguousReplyError, CheckpointStoreError, UsageError
from faultguard.storage import STORE_KEY, leftovers

if TYPE_CHECKING:
    import builtins
    from collections.abc import Callable
    from types import TracebackType

__all__ = ["LocalStore"]

UNSAFE_VARIABLE: Final = "FAULTGUARD_UNSAFE_FILESYSTEM"
_DIRECTORY: Final = os.O_RDONLY | os.O_DIRECTORY
_NEW_FILE: Final = os.O_WRONLY | os.O_CREAT | os.O_EXCL
_MAX_TRIES: Final = 100  # of a create whose directory is removed under it again and again
_MAX_SETTLED: Final = 10_000
_EMPTY_WAIT_S: Final = 0.2
_MAX_IDENTITY: Final = 1 << 12
_MANY: Final = 128  # files in a directory
_MAX_LOOKS: Final = 3
_NO_JOURNAL: Final = "ext4 without a journal"
_OF_ONE_NODE: Final = frozenset({"ext3", "ext4", _NO_JOURNAL, "xfs", "btrfs", "f2fs", "zfs", "overlay", "tmpfs"})
# Here the fsync of a new file or directory includes its name, and what was done to its directory before: a journal keeps the order of all
# changes, and ext4 without one writes the directory with it, and those above as far as they are new.
_NAME_INCLUDED: Final = frozenset({"ext4", _NO_JOURNAL, "xfs"})
# Here, or in what may be below (overlay), a file that was synced without a name is deleted on the disk, whatever it is linked as later.
_NAMED_FIRST: Final = frozenset({"ext2", _NO_JOURNAL, "overlay"})
_NO_TMPFILE: Final = frozenset({errno.EOPNOTSUPP, errno.EISDIR, errno.EINVAL, errno.ENOSYS})
_NO_HARD_LINKS: Final = frozenset({errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK})
# A link that failed so surely made nothing. After any other error (EIO, ETIMEDOUT, EINTR, ESTALE, ...) a server may have.
_SURELY_NOT: Final = _NO_HARD_LINKS | {
    errno.EACCES,
    errno.EDQUOT,
    errno.ENAMETOOLONG,
    errno.ENOENT,
    errno.ENOSPC,
    errno.ENOTDIR,
    errno.EROFS,
    errno.EXDEV,
}

step_hook: Callable[[str, str], None] | None = None
"""Called with the name of a step and the key; tests and chaos runs die there."""


def _step(name: str, key: str) -> None:
    if step_hook is not None:
        step_hook(name, key)


@dataclass(frozen=True, slots=True)
class _Witness:
    """A record made by this process; while it is there, the directories above it are the ones that were made durable.

    (device, inode) of the directory itself would not do: ext4 gives the inode number of a removed directory to the next one.
    """

    path: str
    device: int
    inode: int
    mtime_ns: int

    def is_there(self) -> bool:
        try:
            found = os.stat(self.path)
        except OSError:
            return False
        return (found.st_ino, found.st_mtime_ns, found.st_dev) == (self.inode, self.mtime_ns, self.device)


class LocalStore:
    """A `Store` in a directory, on a local disk or on one that several nodes share (NFS).

    Holds no file open between calls; may be used by several threads, and after a fork.
    """

    def __init__(self, root: str, *, tmpfile: bool | None = None) -> None:
        """Take `root` as it is; `open` also looks whether it can be trusted.

        Args:
            root: absolute path of a directory that exists.
            tmpfile: whether to try files without a name (`O_TMPFILE`), which most network file systems do not have. None: unless a
                name that such a file gets may get lost here, and must not.
        """
        self.url = root
        self._root = os.path.realpath(root)
        self._kind = _file_system(self._root)
        self._tmpfile = tmpfile is not False
        self._named_first = tmpfile is None and self._kind in _NAMED_FIRST
        self._unsafe = os.environ.get(UNSAFE_VARIABLE) == "1"
        self._promises = self._kind in _NAME_INCLUDED and not self._unsafe
        self._promising: dict[str, object] = {}  # the directories where a promise of this process is to become a record
        self._pid = os.getpid()
        self._settled: dict[str, _Witness] = {}
        self._made = ""  # the directory that was made last, if its first fsync is one of its name, too
        self._volatile: tuple[str, _Witness] | None = None  # the directory and the record that was made last, and need not be durable
        self._identity: bytes | None = None  # what says which store it is, once it was seen

    @classmethod
    def open(cls, root: str, *, create: bool) -> LocalStore:
        """Open `root`; with `create` make it, and try whether it keeps its promises.

        Raises:
            UsageError: the file system cannot be trusted, and `FAULTGUARD_UNSAFE_FILESYSTEM=1` is not set.
            CheckpointStoreError: it is not there, or cannot be written.
        """
        store = cls(root)
        kind = store._kind
        if kind.startswith("fuse") and not store._unsafe:
            msg = _untrusted(root, f"it is on a FUSE mount ({kind}), most of which do not make durable what they say is")
            raise UsageError(msg)
        with store._translated("opened", store._root):
            if create:
                os.makedirs(store._root, exist_ok=True)
                store._probe()
            else:
                store._check_root()
        return store

    def create(self, key: str, data: bytes, *, durable: bool = True) -> bool:
        """See `Store.create`."""
        return self._create(check_key(key), data, durable=durable)

    def get(self, key: str) -> bytes | None:
        """See `Store.get`."""
        path = f"{self._root}/{check_key(key)}"
        with self._translated("read", path):
            try:
                try:
                    data = self._read(path)
                except FileNotFoundError:
                    self._keep_promises(_parent(path))
                    data = self._read(path)
                _fsync_directory(_parent(path))
            except (FileNotFoundError, NotADirectoryError):
                self._check_place(_parent(path))
                return None
            return data

    def list(self, prefix: str, start_after: str = "") -> builtins.list[str]:
        """See `Store.list`."""
        keys: list[str] = []
        pending = [check_prefix(prefix)]
        with self._translated("listed", f"{self._root}/{prefix}"):
            while pending:
                found, inner = self._scan(pending.pop(), start_after)
                keys += found
                pending += inner
            if not keys:
                self._check_place(f"{self._root}/{prefix}".rstrip("/"))
        return sorted(keys)

    def delete(self, key: str) -> None:
        """See `Store.delete`."""
        path = f"{self._root}/{check_key(key)}"
        _step("before_delete", key)
        with self._translated("deleted", path), suppress(FileNotFoundError, NotADirectoryError):
            os.unlink(path)
        _step("after_delete", key)
        self._prune(_parent(path))

    # -- create, step by step

    def _create(self, key: str, data: bytes, *, durable: bool = True) -> bool:
        path = f"{self._root}/{key}"
        directory = _parent(path)
        if self._pid != os.getpid():  # after a fork: what this process has made, its parent has made, too
            self._forget(directory)
            self._settled, self._promising, self._pid = {}, {}, os.getpid()
        with self._translated("created", path):
            try:
                for _ in range(_MAX_TRIES):
                    try:
                        return self._create_in(directory, key, data, durable=durable)
                    except FileNotFoundError:  # noqa: PERF203 - not made yet, or a `delete` of its last key removed it before the link
                        self._make(directory)
                raise FileNotFoundError(errno.ENOENT, f"its directory was removed {_MAX_TRIES} times while it was written")
            except OSError:
                self._forget(directory)  # whether its names will be durable with the next fsync is not known
                self._prune(directory)
                raise

    def _create_in(self, directory: str, key: str, data: bytes, *, durable: bool) -> bool:
        # Everything below is done in this very directory, not in whatever has its name a moment later: once it is removed,
        # the link fails with ENOENT, even if another process has made it anew.
        directory_fd = os.open(directory, _DIRECTORY)
        try:
            created = self._create_promised(directory, directory_fd, key, data) if durable and self._promises else None
            if created is not None:
                return created
            made, settled = self._write_and_link(directory, directory_fd, key, data, durable=durable)
            _step("before_dir_fsync", key)
            try:
                # Also if the key exists: its writer may have died before it did this, and our caller goes by what is there.
                if settled or made is None:
                    os.fsync(directory_fd)
            except OSError as error:
                self._forget(directory)
                if made is None:
                    raise
                msg = self._ambiguous(key, "its directory could not be made durable", error)
                raise AmbiguousReplyError(msg, errno=error.errno) from error
        finally:
            _close(directory_fd)
        if made is None:
            return False
        witness = self._remember(key, made, settled)
        if not settled:
            self._volatile = (directory, witness)
        return True

    def _remember(self, key: str, made: os.stat_result, settled: builtins.list[str]) -> _Witness:
        """The record that was made, and as long as it is there, these directories are durable."""
        witness = _Witness(f"{self._root}/{key}", made.st_dev, made.st_ino, made.st_mtime_ns)
        if len(self._settled) >= _MAX_SETTLED:
            self._settled.clear()
        self._settled.update(dict.fromkeys(settled, witness))
        return witness

    def _forget(self, directory: str) -> None:
        """The next create here starts with an fsync, and fails if that does."""
        self._settled.pop(directory, None)
        self._made, self._volatile = "", None

    # -- the same with one fsync

    def _may_promise(self, directory: str, directory_fd: int, key: str) -> bool:
        """Whether this is the record after one of this very process, in a directory that is durable, or will be with this record.

        So there is never a second promise of the same number, of which nobody could say after a crash which one was acknowledged.
        """
        number = record_number(key.rpartition("/")[2]) or 0
        if number <= 1:
            return False
        below = f"{directory}/{record_name(number - 1)}"
        witness = self._settled.get(directory)
        if witness is None and self._volatile is not None and directory == self._made and self._is_settled(_parent(directory)):
            witness = self._volatile[1]
        if witness is None or witness.path != below or not witness.is_there():
            return False
        return self._kind != _NO_JOURNAL or _is_one_block(directory_fd)

    def _create_promised(self, directory: str, directory_fd: int, key: str, data: bytes) -> bool | None:
        """Create a record whose name is durable, hidden, before it has it; None if this process must not, or another thread is at it."""
        me = object()
        if self._promising.setdefault(directory, me) is not me:
            return None
        try:
            if not self._may_promise(directory, directory_fd, key):
                return None
            made = self._promise(directory, directory_fd, key, data)
        finally:
            self._promising.pop(directory, None)
        if made is None:
            return False
        _step("after_link", key)
        _step("before_dir_fsync", key)
        self._remember(key, made, [directory])
        return True

    def _promise(self, directory: str, directory_fd: int, key: str, data: bytes) -> os.stat_result | None:
        """Promise a record and make it: what it is then, None if there is one."""
        promise = leftovers.promise_name(key.rpartition("/")[2], data)
        fd = os.open(promise, _NEW_FILE, 0o666, dir_fd=directory_fd)
        try:
            _write(fd, data)
            os.fsync(fd)  # if this fails: see `_write_and_link`
            _step("before_link", key)
            made = self._become(fd, promise, directory_fd, key)
            if made is None:
                os.fsync(directory_fd)  # as below; and before the promise goes, or a crash could find it without the other record
                leftovers.unlink(promise, directory_fd)
            elif self._kind == _NO_JOURNAL and not _is_one_block(directory_fd):
                self._fsync_grown(directory_fd, key)
        except BaseException as error:
            self._forget(directory)
            try:
                os.unlink(promise, dir_fd=directory_fd)
            except OSError:  # another process has kept it, or will
                if isinstance(error, OSError):
                    raise AmbiguousReplyError(self._ambiguous(key, "another process may make it", error), errno=error.errno) from error
            try:
                os.fsync(directory_fd)  # or a crash could bring it back
            except OSError:
                if isinstance(error, OSError):
                    raise AmbiguousReplyError(self._ambiguous(key, "a crash may bring it", error), errno=error.errno) from error
            raise
        else:
            return made
        finally:
            _close(fd)

    def _become(self, fd: int, promise: str, directory_fd: int, key: str) -> os.stat_result | None:
        """Rename a promise to the last part of `key`. Here exactly one of several writers wins, as with a link."""
        name = key.rpartition("/")[2]
        try:
            leftovers.become(promise, name, directory_fd)
        except OSError as error:
            if error.errno in {errno.EEXIST, errno.ENOENT}:  # ENOENT: another process has kept the promise, or removed it
                there, mine = leftovers.inode(name, directory_fd), os.fstat(fd)
                if there == mine.st_ino:
                    return mine
                if there is not None or error.errno == errno.EEXIST:
                    return None
            elif error.errno in leftovers.NO_RENAME:
                self._promises = False
                raise FileNotFoundError(errno.ENOENT, "once more, without a promise") from error
            elif error.errno in _SURELY_NOT:
                raise
            msg = self._ambiguous(key, "it is not known what has become of it", error)
            raise AmbiguousReplyError(msg, errno=error.errno) from error
        made = os.fstat(fd)
        if not made.st_nlink:
            gone = OSError(errno.ENOLINK, "renamed, and not there")
            raise AmbiguousReplyError(self._ambiguous(key, "somebody has deleted it already", gone), errno=gone.errno)
        return made

    def _fsync_grown(self, directory_fd: int, key: str) -> None:
        """It had one block before the promise."""
        try:
            os.fsync(directory_fd)
        except OSError as error:
            msg = self._ambiguous(key, "its directory could not be made durable", error)
            raise AmbiguousReplyError(msg, errno=error.errno) from error

    # -- the same, with a file and its directory

    def _write_and_link(
        self, directory: str, directory_fd: int, key: str, data: bytes, *, durable: bool
    ) -> tuple[os.stat_result | None, builtins.list[str]]:
        """Give durable content its name: the file (None if there is one of that name), and the directories that are durable with it.

        What need not be durable is so all the same where other nodes may see it: one that fails would take the content from them.
        """
        synced = durable or self._kind not in _OF_ONE_NODE
        fd, temporary = self._open_temporary(directory_fd, nameless=not (synced and self._named_first))
        try:
            _write(fd, data)
            settled: builtins.list[str] = []
            if synced:
                # If this fails, the kernel may have dropped the data and will call the next fsync of this file a success: the
                # file is thrown away, and a caller that tries again gets another one.
                os.fsync(fd)
                # Before the link: nobody may be told of a record whose directory a crash can take.
                settled = self._settle(directory, directory_fd)
            _step("before_link", key)
            made = self._link(fd, temporary, directory_fd, key)
            _step("after_link", key)
            return made, settled
        finally:
            _close(fd)
            if temporary is not None:
                leftovers.unlink(temporary, directory_fd)

    def _open_temporary(self, directory_fd: int, *, nameless: bool) -> tuple[int, str | None]:
        """Open a file without a name (it goes with its writer); one with a temporary name if not `nameless`, or where there is none."""
        if nameless and self._tmpfile:
            try:
                return os.open(".", os.O_TMPFILE | os.O_WRONLY, 0o666, dir_fd=directory_fd), None
            except OSError as error:
                if not os.fstat(directory_fd).st_nlink:  # the directory was removed, which ext4 calls EPERM here
                    raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT)) from error
                if error.errno not in _NO_TMPFILE:
                    raise
                self._tmpfile = False
        temporary = leftovers.temporary_name()
        return os.open(temporary, _NEW_FILE, 0o666, dir_fd=directory_fd), temporary

    def _link(self, fd: int, temporary: str | None, directory_fd: int, key: str) -> os.stat_result | None:
        """Link the file as the last part of `key`: what it is then, None if there is one. Here exactly one of several writers wins."""
        name = key.rpartition("/")[2]
        links = 1 if temporary is None else 2
        try:
            # With a dir_fd Python calls linkat(AT_SYMLINK_FOLLOW); link() would link the symlink in /proc.
            source = temporary or f"/proc/self/fd/{fd}"
            os.link(source, name, src_dir_fd=directory_fd, dst_dir_fd=directory_fd, follow_symlinks=True)
        except OSError as error:
            found = _found(fd)
            if found is not None and found.st_nlink == links:  # NFS: done, but the reply was lost, and the client's second try failed
                return found
            if error.errno == errno.EEXIST and found is not None:
                return None
            if self._try_named(error, temporary, directory_fd):
                raise FileNotFoundError(errno.ENOENT, "once more, with a named file") from error
            if temporary is not None and found is not None and error.errno in _NO_HARD_LINKS and self._unsafe:
                return found if _rename(temporary, name, directory_fd) else None
            if error.errno in _SURELY_NOT:
                raise
            msg = self._ambiguous(key, "the file system did not say whether it was linked", error)
            raise AmbiguousReplyError(msg, errno=error.errno) from error
        found = _found(fd)
        if found is None or found.st_nlink != links:  # NFS says "done" and did not, or somebody has deleted the record already
            gone = OSError(errno.ENOLINK, "linked, but not there")
            raise AmbiguousReplyError(self._ambiguous(key, "the file system linked it, and it is not there", gone), errno=gone.errno)
        return found

    def _try_named(self, error: OSError, temporary: str | None, directory_fd: int) -> bool:
        """After a failed link of a nameless file: whether a named one may do (no /proc here, or a file system that cannot)."""
        if temporary is not None or error.errno not in {errno.ENOENT, errno.EXDEV, *_NO_HARD_LINKS}:
            return False
        if not os.fstat(directory_fd).st_nlink:  # the directory was removed: an ordinary ENOENT
            return False
        self._tmpfile = False
        return True

    def _read(self, path: str) -> bytes:
        data = Path(path).read_bytes()
        if not data and self._unsafe:  # see `_rename`: its writer is between the two steps, or died there
            time.sleep(_EMPTY_WAIT_S)
            data = Path(path).read_bytes()
        return data

    # -- directories

    def _settle(self, directory: str, directory_fd: int) -> builtins.list[str]:
        """Make the entries of `directory` and its parents durable, once per process: whoever made them may have died before it did.

        Not what the fsync of the record's directory, and of whoever reads it, includes.

        Returns:
            The directories that are durable as long as the record that is made now is there.
        """
        if self._is_settled(directory):
            return [directory]
        if directory == self._made and self._is_settled(_parent(directory)):
            return [directory]  # by the fsync of its first record
        found = leftovers.tidy(os.listdir(directory_fd), directory_fd)
        if found.kept or (found.names and not self._has_made_lately(directory, [f"{directory}/{name}" for name in found.names])):
            os.fsync(directory_fd)
        path, settled = directory, [directory]
        while path != self._root:
            path = _parent(path)
            _fsync_directory(path)
            if self._is_settled(path):
                return settled
            settled.append(path)
        _fsync_above(self._root)
        return settled

    def _is_settled(self, directory: str) -> bool:
        witness = self._settled.get(directory)
        return witness is not None and witness.is_there()

    def _make(self, directory: str) -> None:
        """Make `directory`, but never the root: a root that is gone is an unmounted disk or a removed store, not a new one."""
        self._check_place(directory)
        with suppress(FileNotFoundError, FileExistsError):  # raced with a `_prune`; the next try of `create` sees
            try:
                os.mkdir(directory)
            except FileNotFoundError:  # nor are those above it
                os.makedirs(directory, exist_ok=True)
            else:
                included = self._kind in _NAME_INCLUDED and (self._kind != _NO_JOURNAL or not _is_in_its_inode(directory))
                self._made = directory if included else ""

    def _check_place(self, directory: str) -> None:
        """Check the root, if no record that this process has made beside `directory` shows that it is there."""
        if self._identity is None or not self._is_settled(_parent(directory)):
            self._check_root()

    def _check_root(self) -> None:
        """A store that is not there is not an empty one: a worker would start from zero, in another place.

        Nor is what is found in its place, such as the mount point of a disk that is gone.
        """
        try:
            fd = os.open(f"{self._root}/{STORE_KEY}", os.O_RDONLY)
        except (FileNotFoundError, NotADirectoryError):
            found = None
        else:
            try:
                found = os.read(fd, _MAX_IDENTITY)
            finally:
                _close(fd)
        if found is None and not os.path.isdir(self._root):
            raise FileNotFoundError(errno.ENOENT, "the checkpoint directory is not there", self._root)
        if self._identity is None:
            self._identity = found
        elif found != self._identity:
            raise FileNotFoundError(errno.ENOENT, "another directory is in the place of the checkpoint directory", self._root)

    def _prune(self, directory: str) -> None:
        """Remove `directory` and its parents as far as they are empty, the root excepted."""
        while directory != self._root:
            try:
                os.rmdir(directory)
            except FileNotFoundError:
                pass
            except OSError:  # not empty, mostly; at any rate only tidiness is lost
                return
            directory = _parent(directory)

    def _scan(self, prefix: str, start_after: str) -> tuple[builtins.list[str], builtins.list[str]]:
        """Return the keys directly under `prefix`, made durable, and the prefixes below it."""
        try:
            directory_fd = os.open(f"{self._root}/{prefix}", _DIRECTORY)
        except (FileNotFoundError, NotADirectoryError):
            return [], []
        try:
            kinds = _look(directory_fd)
            found = leftovers.tidy(kinds, directory_fd)
            keys = [key for name in found.names if not kinds.get(name) and (key := prefix + name) > start_after]
            if found.kept or (keys and not self._has_made(prefix, keys)):
                os.fsync(directory_fd)
        finally:
            _close(directory_fd)
        return keys, [f"{prefix}{name}/" for name in found.names if kinds.get(name)]

    def _keep_promises(self, directory: str) -> None:
        """Look whether what is not there was promised."""
        directory_fd = os.open(directory, _DIRECTORY)
        try:
            if leftovers.tidy(os.listdir(directory_fd), directory_fd).kept:
                os.fsync(directory_fd)
        finally:
            _close(directory_fd)

    def _has_made(self, prefix: str, keys: builtins.list[str]) -> bool:
        """Whether these are one record of this process, durable or not in need of it: the look of a claim that began a log."""
        directory, paths = f"{self._root}/{prefix}".rstrip("/"), [f"{self._root}/{key}" for key in keys]
        witness = self._settled.get(directory)
        if witness is None:
            return self._has_made_lately(directory, paths)
        return paths == [witness.path] and witness.is_there()

    def _has_made_lately(self, directory: str, paths: builtins.list[str]) -> bool:
        """Whether these are one record that this process has made, and that need not be durable."""
        volatile = self._volatile
        return volatile is not None and volatile[0] == directory and paths == [volatile[1].path] and volatile[1].is_there()

    # -- trust and complaints

    def _probe(self) -> None:
        """Try what everything rests upon: there are hard links, and a name cannot be made twice."""
        names = [leftovers.temporary_name() for _ in range(3)]
        directory_fd = os.open(self._root, _DIRECTORY)
        try:
            _close(os.open(names[0], _NEW_FILE, 0o666, dir_fd=directory_fd))
            try:
                os.link(names[0], names[1], src_dir_fd=directory_fd, dst_dir_fd=directory_fd)
            except OSError as error:
                if error.errno not in _NO_HARD_LINKS:
                    raise
                if not self._unsafe:
                    raise UsageError(_untrusted(self.url, f"its file system has no hard links: {_reason(error)}")) from error
            if [self._create(names[2], b"") for _ in range(2)] != [True, False]:
                raise UsageError(_untrusted(self.url, "its file system lets two writers create one name"))
        finally:
            for name in names:
                leftovers.unlink(name, directory_fd)
            _close(directory_fd)

    def _translated(self, done: str, path: str) -> _Translated:
        """Let no bare OSError out: say which path was not `done`, why, and what to do."""
        return _Translated(self, done, path)

    def _ambiguous(self, key: str, why: str, error: OSError) -> str:
        return f"'{self._root}/{key}' may or may not have been created: {why} ({_reason(error)}). Read it back. {self._advice(error)}"

    def _advice(self, error: OSError) -> str:
        if error.errno in {errno.ENOSPC, errno.EDQUOT}:
            return f"{_free_space(self._root)} Make room; what was durable before still is."
        if error.errno == errno.ENOENT:
            return "A path must be shared by all nodes and stay mounted; else use a shared path, an object store, or one node."
        if error.errno in {errno.EACCES, errno.EPERM, errno.EROFS}:
            return "Give this user the right to read and write it, or choose another checkpoint_dir."
        return "Look at the disk (dmesg); what was durable before still is."


class _Translated:
    """See `LocalStore._translated`; a class, because a generator takes three times as long, several times per task."""

    __slots__ = ("_done", "_path", "_store")

    def __init__(self, store: LocalStore, done: str, path: str) -> None:
        self._store, self._done, self._path = store, done, path

    def __enter__(self) -> None: ...

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if isinstance(error, OSError):
            msg = f"{self._path!r} was not {self._done}: {_reason(error)}. {self._store._advice(error)}"  # noqa: SLF001 - a part of it
            raise CheckpointStoreError(msg, errno=error.errno) from error


def _untrusted(root: str, why: str) -> str:
    return (
        f"checkpoint_dir {root!r} is refused: {why}. Use a local disk, NFS or another POSIX file system, or set "
        f"{UNSAFE_VARIABLE}=1 if you can do without the promise that a durable checkpoint survives a crash."
    )


def _reason(error: OSError) -> str:
    return f"{error.strerror} ({errno.errorcode.get(error.errno or 0, error.errno)})"


def _free_space(path: str) -> str:
    try:
        found = os.statvfs(path)
    except OSError:
        return ""
    inodes = f" and {found.f_favail} inodes" if found.f_files else ""
    return f"Free: {found.f_bavail * found.f_frsize} of {found.f_blocks * found.f_frsize} bytes{inodes}."


def _write(fd: int, data: bytes) -> None:
    """Write all of `data`; one call may take only a part of it (2 GiB, a nearly full disk)."""
    written = os.write(fd, data)
    while written < len(data):
        count = os.write(fd, memoryview(data)[written:])
        if not count:
            raise OSError(errno.EIO, "write() took nothing")
        written += count


def _look(directory_fd: int) -> dict[str, bool]:
    """The names in a directory, and whether each is a directory.

    Of many the kernel tells some at a time, and a rename in between (of a promise) may hide what was there all the time: then once more.
    """
    for _ in range(_MAX_LOOKS):
        before = os.fstat(directory_fd).st_mtime_ns
        with os.scandir(directory_fd) as entries:
            kinds = {entry.name: entry.is_dir() for entry in entries}
        if len(kinds) - sum(kinds.values()) < _MANY or os.fstat(directory_fd).st_mtime_ns == before:
            break
    return kinds


def _is_one_block(directory_fd: int) -> bool:
    """Whether all names of a directory are in one block: on ext4 without a journal, only then is a rename written at once."""
    found = os.fstat(directory_fd)
    return found.st_size == found.st_blksize


def _is_in_its_inode(directory: str) -> bool:
    """Whether a directory is one of ext4 that has its names in its inode (`inline_data`); it is not written with what is in it."""
    found = os.stat(directory)
    return found.st_size < found.st_blksize


def _found(fd: int) -> os.stat_result | None:
    """What an open file is now, and how many names it has; None if the file system does not say."""
    try:
        return os.fstat(fd)
    except OSError:
        return None


def _close(fd: int) -> None:
    """Close; after an fsync there is nothing left that could fail, and before one the write has failed already."""
    try:  # noqa: SIM105 - several times per record
        os.close(fd)
    except OSError:
        pass


def _rename(temporary: str, name: str, directory_fd: int) -> bool:
    """Without hard links, and only if asked to: O_EXCL decides, the rename fills. Dying in between leaves an empty record."""
    try:
        _close(os.open(name, _NEW_FILE, 0o666, dir_fd=directory_fd))
    except FileExistsError:
        return False
    try:
        os.rename(temporary, name, src_dir_fd=directory_fd, dst_dir_fd=directory_fd)
    except OSError:
        leftovers.unlink(name, directory_fd)
        raise
    return True


def _parent(path: str) -> str:
    return path.rpartition("/")[0]


def _fsync_directory(path: str) -> None:
    fd = os.open(path, _DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        _close(fd)


def _fsync_above(root: str) -> None:
    """Make the entry of `root` durable, and those of all directories above it on this file system: who made which is not known."""
    path = root
    while path != "/" and not os.path.ismount(path):
        path = os.path.dirname(path)
        try:
            _fsync_directory(path)
        except PermissionError:
            if os.access(path, os.W_OK):  # somebody like us may have made an entry there, and we cannot open it to fsync it
                os.sync()


def _file_system(path: str) -> str:
    """Return the type of the file system that `path` is on; "" where the kernel does not say."""
    try:
        lines = Path("/proc/self/mountinfo").read_text(encoding="utf-8", errors="surrogateescape").splitlines()
    except OSError:
        return ""
    kind, device = _mounted(path, lines)
    return _NO_JOURNAL if kind == "ext4" and not _has_journal(device) else kind


def _mounted(path: str, mountinfo: builtins.list[str]) -> tuple[str, str]:
    """Look `path` up in the lines of mountinfo, type and device: the longest mount point above it counts, of like ones the last."""
    longest, kind, device = "", "", ""
    for line in mountinfo:
        fields = line.split(" ")
        mount = re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), fields[4])
        if len(mount) >= len(longest) and f"{path}/".startswith(f"{mount.rstrip('/')}/"):
            longest, kind, device = mount, fields[fields.index("-", 6) + 1], fields[2]
    return kind, device


def _has_journal(device: str) -> bool:
    """Whether the ext4 on a device, such as "254:0", has one; no answer counts as no."""
    disk = Path(os.path.realpath(f"/sys/dev/block/{device}")).name
    try:
        return Path(f"/sys/fs/ext4/{disk}/journal_task").read_text(encoding="utf-8").strip() != "<none>"
    except OSError:
        return False
