"""The file in which this process says that it lives, and which workers it holds, for a probe on the same node.

Beats can be lost on their way; this cannot. It lies in Ray's directory of the session, one file per process, and is replaced
as a whole. It is about the process, not about progress: a thread of its own marks it, which waits for nothing else.
"""

from __future__ import annotations

import contextlib
import logging
import os
import time
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from faultguard import _events, _ray
from faultguard._core.silence import Held, Mark
from faultguard._process import ProcessId, is_dead, this_process

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

__all__ = ["erase", "read", "read_all", "write"]

_decoder = msgspec.json.Decoder(Mark)
_folder: Path | None = None
_said = False


def write(workers: Iterable[Held], kill_after_s: float | None, *, hosts_others: bool = False) -> None:
    """Mark the file of this process, now. What fails is told once, and leaves no file that says too much."""
    global _said  # noqa: PLW0603 - one thread writes at a time
    if not _ray.is_ready():  # nobody can look
        return
    me = this_process()
    mark = Mark(me.boot_id, time.monotonic(), tuple(workers), kill_after_s, hosts_others, _ray.node_id())
    path = _path(me)
    try:
        _replace(path, msgspec.json.encode(mark))
    except OSError as error:
        with contextlib.suppress(OSError):
            path.unlink()
        if not _said:
            _said = True
            text = f"this process cannot mark {path} ({error}); should it be stopped from outside, nobody will end it"
            _events.emit_beside(logging.WARNING, "faultguard.mark_failed", text, error=repr(error))
    else:
        _said = False


def erase() -> None:
    """This process holds no worker any more."""
    if not _ray.is_ready():
        return
    with contextlib.suppress(OSError):  # it was never marked, or the disk is in trouble, which `write` has told
        _path(this_process()).unlink()


def read(process: ProcessId) -> Mark | None:
    """What a process of this node has said last; None: nothing that can be read."""
    return _decode(_path(process))


def read_all() -> list[tuple[ProcessId, Mark]]:
    """What the living processes of this node have said last; those of another node on this host lie in the same folder."""
    here = _ray.node_id()
    return [(process, mark) for _, process, mark in _files(_directory()) if mark.node_id == here and is_dead(process) is False]


def _decode(path: Path) -> Mark | None:
    try:
        return _decoder.decode(path.read_bytes())
    except (OSError, msgspec.MsgspecError):
        return None


def _path(process: ProcessId) -> Path:
    return _directory() / f"{process.pid}-{process.start_time}.json"


def _directory() -> Path:
    global _folder  # noqa: PLW0603 - made once per session of Ray
    folder = Path(_ray.session_dir()) / "faultguard"
    if folder != _folder:
        folder.mkdir(mode=0o700, exist_ok=True)
        _forget_the_dead(folder)
        _folder = folder
    return folder


def _forget_the_dead(folder: Path) -> None:
    """Remove what processes left that were killed."""
    for path, process, _ in _files(folder):
        if is_dead(process):
            with contextlib.suppress(OSError):
                path.unlink()


def _files(folder: Path) -> Iterator[tuple[Path, ProcessId, Mark]]:
    """All that can be read, and whose they are."""
    for path in folder.glob("*-*.json"):
        pid, _, start_time = path.stem.partition("-")
        mark = _decode(path)
        if mark is not None:
            yield path, ProcessId(mark.boot_id, int(pid), int(start_time)), mark


def _replace(path: Path, data: bytes) -> None:
    new = path.with_suffix(".new")
    fd = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    try:
        os.write(fd, data)
    finally:
        os.close(fd)
    new.rename(path)
