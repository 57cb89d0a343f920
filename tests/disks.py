"""Disks of a test: small ones, and what one node sees where the others see something else. Needs the right to mount, nothing else."""

from __future__ import annotations

import contextlib
import ctypes
import os
import subprocess
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tests.needs import missing

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

MS_RDONLY, MS_REMOUNT, MS_BIND, MS_REC, MS_PRIVATE = 1, 32, 4096, 16384, 1 << 18
MNT_DETACH = 2
CLONE_NEWNS, CLONE_FS = 0x20000, 0x200
PAGE = 4096
TOOL_S = 60
TRIES = 20  # of a mount or unmount, in 4 s: others take the same loop device, or the kernel has not quite let go of it
_libc = ctypes.CDLL(None, use_errno=True)


class Disk:
    """A tmpfs."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @contextlib.contextmanager
    def read_only(self) -> Iterator[None]:
        """Nobody can write, root neither."""
        _mount("none", self.path, "tmpfs", MS_REMOUNT | MS_RDONLY)
        try:
            yield
        finally:
            _mount("none", self.path, "tmpfs", MS_REMOUNT)

    @contextlib.contextmanager
    def full(self) -> Iterator[None]:
        """There is no room for a byte: somebody takes whatever there is, also what is deleted meanwhile."""
        over = threading.Event()
        ballast = self.path / "ballast"
        eater = threading.Thread(target=_eat, args=(ballast, over))
        eater.start()
        try:
            while os.statvfs(self.path).f_bavail:
                time.sleep(0.01)
            yield
        finally:
            over.set()
            eater.join()
            ballast.unlink()


@contextlib.contextmanager
def renamed(store: Path, *, replaced: bool = False) -> Iterator[None]:
    """The directory is not there for a while: nothing is, or an empty one, such as the mount point of a disk that is gone."""
    away = store.with_name("away")
    store.rename(away)
    if replaced:
        store.mkdir()
    try:
        yield
    finally:
        if replaced:
            store.rmdir()  # fails if anything was made there
        away.rename(store)


def _eat(ballast: Path, over: threading.Event) -> None:
    with ballast.open("wb", buffering=0) as file:
        while not over.is_set():
            try:
                file.write(bytes(PAGE))
            except OSError:
                over.wait(0.01)


@contextlib.contextmanager
def small_disk(path: Path, size: str = "4m") -> Iterator[Disk]:
    """Mount a disk of that size at `path`, which is made; skips the test where that is not permitted."""
    path.mkdir()
    _permitted(lambda: _mount("none", path, "tmpfs", 0, f"size={size}"), "a small disk")
    try:
        yield Disk(path)
    finally:
        _call("umount2", os.fsencode(path), MNT_DETACH)


# What makes each, and the least of megabytes that it takes.
FILE_SYSTEMS = {
    "ext4": (["mkfs.ext4", "-q", "-F"], 32),
    "ext4 without a journal": (["mkfs.ext4", "-q", "-F", "-O", "^has_journal"], 32),
    "ext4 without a journal, with names in inodes": (["mkfs.ext4", "-q", "-F", "-O", "^has_journal,inline_data", "-I", "256"], 32),
    "xfs": (["mkfs.xfs", "-q", "-f"], 300),
}


class LoopDisk:
    """A file system of its own, in a file: the power of its disk can fail."""

    def __init__(self, path: Path, kind: str, image: Path) -> None:
        self.path = path
        self._kind = kind
        self._image = image

    def mount(self) -> None:
        """As the kernel finds it: the journal is replayed, if there is one."""
        _mount_image(self._image, self.path)

    def unmount(self) -> None:
        """Let go of it."""
        _unmount(self.path)

    def held(self, name: str) -> Path:
        """What the disk holds now, in a file: what the kernel has not written yet is not there. Nothing may write to it meanwhile."""
        copy = self._image.with_name(f"{self._image.stem}-{name}.img")
        _run("cp", "--sparse=always", self._image, copy)
        return copy

    @contextlib.contextmanager
    def found(self, image: Path, *, mended: bool = True) -> Iterator[Path]:
        """Where that can be seen after the power has come back; with `mended`, a machine has looked at it as it started."""
        place = image.with_suffix("")
        place.mkdir()
        if mended:
            self._mend(image)
        _mount_image(image, place, *(["-o", "nouuid"] if self._kind == "xfs" else []))
        try:
            yield place
        finally:
            _unmount(place)

    def power_fails(self) -> None:
        """Go on with what the disk holds now. All who have it open have to be dead: that writes nothing."""
        image = self.held("held")
        self._mend(image)
        self.unmount()
        image.replace(self._image)
        self.mount()

    def _mend(self, image: Path) -> None:
        """What a machine does as it starts."""
        if self._kind.startswith("ext4"):
            _run("e2fsck", "-f", "-y", image, accepted=(0, 1))  # 1: it has mended something


class ToolError(subprocess.CalledProcessError):
    """A tool failed; says what it said."""

    def __str__(self) -> str:
        return f"{super().__str__()}: {self.stderr.decode(errors='replace').strip()}"


def _run(*command: str | Path, accepted: tuple[int, ...] = (0,), tries: int = 1) -> None:
    for left in reversed(range(tries)):
        done = subprocess.run(command, check=False, capture_output=True, timeout=TOOL_S)
        if done.returncode in accepted:
            return
        if not left or b"permi" in done.stderr or b"superuser" in done.stderr:
            raise ToolError(done.returncode, command, done.stdout, done.stderr)
        time.sleep(0.2)


def _mount_image(image: Path, path: Path, *options: str) -> None:
    _run("mount", "-o", "loop", *options, image, path, tries=TRIES)


def _unmount(path: Path) -> None:
    _run("umount", path, tries=TRIES)


@contextlib.contextmanager
def loop_disk(path: Path, kind: str) -> Iterator[LoopDisk]:
    """Make a file system in a file and mount it at `path`, which is made; skips the test where that cannot be."""
    path.mkdir()
    image = path.with_suffix(".img")
    command, megabytes = FILE_SYSTEMS[kind]
    with image.open("wb") as file:
        file.truncate(megabytes << 20)
    disk = LoopDisk(path, kind, image)
    try:
        _run(*command, image)
        disk.mount()
    except (FileNotFoundError, subprocess.CalledProcessError) as error:
        missing(f"{kind} in a file, because it cannot be made or mounted here: {error}")
    try:
        yield disk
    finally:
        disk.unmount()


@contextlib.contextmanager
def where_it_is_another(place: Path, other: Path) -> Iterator[None]:
    """What this thread starts in the block sees the directory `other` at `place`; everybody else, and itself afterwards, does not."""
    home, here = Path.cwd(), os.open("/proc/thread-self/ns/mnt", os.O_RDONLY)
    try:
        _permitted(lambda: _call("unshare", CLONE_NEWNS), "a directory that is another one on the second node")
        try:
            _mount("none", "/", "", MS_REC | MS_PRIVATE)
            _mount(other, place, "", MS_BIND)
            yield
        finally:
            _call("unshare", CLONE_FS)  # threads that were started meanwhile share the working directory
            _call("setns", here, CLONE_NEWNS)
            os.chdir(home)
    finally:
        os.close(here)


def _permitted(doing: Callable[[], None], what: str) -> None:
    try:
        doing()
    except PermissionError as error:
        missing(f"{what}, because mounting is not permitted here: {error}")


def _mount(source: str | Path, target: str | Path, kind: str, flags: int, options: str = "") -> None:
    _call("mount", os.fsencode(source), os.fsencode(target), kind.encode(), ctypes.c_ulong(flags), options.encode())


def _call(name: str, *arguments: Any) -> None:
    if getattr(_libc, name)(*arguments):
        number = ctypes.get_errno()
        raise OSError(number, f"{name}: {os.strerror(number)}")
