"""Every state that a disk may be in after a power cut, at every moment of a recorded script.

A script runs under strace. From its system calls a model of the disk is built in which nothing is durable without an fsync:
each sector of a file, its size, and each entry of a directory reach the disk when they like, independently of one another,
also before anybody asks; only `fsync` of the file or the directory that holds them ends the doubt. For every prefix of the
calls, the states that are possible after a crash are made real in a temporary directory, and a checker looks at each.

The model is harsher than ext4 or xfs, which keep more order than they promise. It knows the calls that our stores make and
fails loudly at others. Steps of several processes or threads should not overlap within one directory: of two calls that
overlap, the one that returned first counts as first.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import os
import random
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

__all__ = ["enumerate_crashes"]

SECTOR = 512
MAX_EXHAUSTIVE = 256  # states of one prefix; beyond that: all old, all new, each single, each all-but-one, and samples
SAMPLES = 64
CALLS = (
    "openat,open,creat,write,pwrite64,writev,pwritev,fsync,fdatasync,sync,syncfs,link,linkat,symlink,symlinkat,rename,renameat,"
    "renameat2,unlink,unlinkat,mkdir,mkdirat,rmdir,truncate,ftruncate,fallocate,copy_file_range,sendfile"
)
TIMEOUT_S = 120

# (node, "entry", name), (node, "sector", number) or (node, "size", ""); where changes keep their order, (node, "entries", "")
Slot: TypeAlias = tuple[int, str, object]
Value: TypeAlias = "int | bytes | frozenset[tuple[str, int]] | None"  # an entry: node or None; a sector: bytes; a size: int
Choice: TypeAlias = dict[Slot, Value]
Tree: TypeAlias = dict[str, bytes | None]  # path -> content, None: a directory


def enumerate_crashes(script: str, root: Path, check: Callable[[Path, list[str]], None], *, names: bool = False) -> int:
    """Run a Python script on `root` and check every state that a crash may leave of it.

    Args:
        script: source; `sys.argv[1]` is `root`. What it may rely on from then on it says with `print("ACK something", flush=True)`.
        root: a directory; what it holds before the script runs is durable. The script must not write in a relative path.
        check: called as `check(path, acks)`: `path` looks as `root` would after the crash, `acks` is what had been acknowledged
            (in order, without "ACK "). It raises AssertionError if something is lost or torn. It may write below `path`.
        names: the disk is one, as those with ext4 and XFS, where the changes of a directory keep their order, and an fsync includes
            those that the directory of a file has seen, and the name of that directory, or of one that is fsynced itself.

    Returns:
        The number of different states checked.

    Raises:
        AssertionError: `check` did; the text also tells the moment and what was on the disk.
    """
    disk = _Disk(root, names=names)
    calls = _record(script, root)
    seen: set[tuple[object, ...]] = set()
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if os.access(memory, os.W_OK) else None) as scratch:
        for position in range(len(calls) + 1):
            if position:
                disk.apply(calls[position - 1])
            for tree in disk.crashes(seed=position):
                state = (tuple(disk.acks), *sorted(tree.items()))
                if state in seen:
                    continue
                seen.add(state)
                target = Path(scratch) / str(len(seen))
                _materialise(tree, target)
                try:
                    check(target, list(disk.acks))
                except AssertionError as error:
                    raise AssertionError(_story(calls[:position], disk.acks, tree, error)) from error
                shutil.rmtree(target)
    return len(seen)


# -- recording


@dataclasses.dataclass(frozen=True)
class _Call:
    """One system call that succeeded; `begun` is the number of those that had returned when it began."""

    thread: str
    name: str
    arguments: list[str]
    result: str
    begun: int
    ack: str = ""

    def __str__(self) -> str:
        return f"{self.name}({', '.join(_readable(argument) for argument in self.arguments)})"


def _record(script: str, root: Path) -> list[_Call]:
    with tempfile.TemporaryDirectory() as scratch:
        trace, said = Path(scratch, "trace"), Path(scratch, "said")
        command = ["strace", "-f", "--seccomp-bpf", "-y", "-xx", "-s", "100000000", "-e", f"trace={CALLS}", "-o", str(trace)]
        with said.open("wb") as output:
            command += [sys.executable, "-c", script, str(root)]
            done = subprocess.run(command, stdout=output, stderr=subprocess.PIPE, timeout=TIMEOUT_S, check=False)
        assert done.returncode == 0, f"the script failed: {done.stderr.decode(errors='replace')}"
        calls = list(_parse(trace.read_text(), str(root), str(said)))
    assert calls, "the script did nothing below its root"
    return calls


_LINE = re.compile(r"(\d+) +(?:<\.\.\. (\w+) resumed>(.*)|(\w+)\((.*))")
_END = re.compile(r"(.*)\) += (.+)")


def _parse(trace: str, root: str, said: str) -> Iterator[_Call]:
    """Read the calls below `root`, and the acknowledgements, in the order in which they returned."""
    pending: dict[str, tuple[str, int]] = {}
    count = 0
    for line in trace.splitlines():
        match = _LINE.match(line)
        if match is None:  # a signal, an exit
            continue
        thread, name, text = match[1], match[2] or match[4], match[3] if match[2] else match[5]
        begun = count
        if match[2]:
            head, begun = pending.pop(thread)
            text = head + text
        if text.endswith("<unfinished ...>"):
            pending[thread] = (text.removesuffix("<unfinished ...>").rstrip(), begun)
            continue
        ended = _END.fullmatch(text)
        if ended is None or ended[2].startswith(("-1 ", "?")):
            continue
        call = _Call(thread, name, ended[1].split(", "), ended[2], begun)  # everything is in hex: no comma within a string
        if name == "write" and _descriptor(call.arguments[0])[1] == said:
            text = _string(call.arguments[1]).decode()
            if not text.startswith("ACK "):
                continue
            call = dataclasses.replace(call, ack=text.removeprefix("ACK ").rstrip("\n"))
        elif name not in {"sync", "syncfs"} and not any(_is_below(path, root) for path in _paths(call)):
            continue
        count += 1
        yield call


def _hex(text: str) -> bytes:
    return bytes.fromhex(text.replace("\\x", ""))


def _readable(argument: str) -> str:
    found = re.sub(r"(?:\\x[0-9a-f]{2})+", lambda match: _hex(match[0]).decode(errors="backslashreplace"), argument)
    return found if len(found) <= 120 else f"{found[:100]}... {len(found)} bytes"


def _string(argument: str) -> bytes:
    assert re.fullmatch(r'"[^"]*"', argument), f"not recorded whole: {argument[:80]}"
    return _hex(argument[1:-1])


def _descriptor(argument: str) -> tuple[str, str, bool]:
    """Read "3</path>(deleted)" as (number, path, whether it is deleted)."""
    match = re.fullmatch(r"(AT_FDCWD|\d+)<([^>]*)>(\(deleted\))?", argument)
    if match is None:
        return argument, "", False
    return match[1], _hex(match[2]).decode() if match[2].startswith("\\x") else match[2], bool(match[3])


def _path(base: str, argument: str) -> str:
    return os.path.normpath(Path(_descriptor(base)[1], os.fsdecode(_string(argument))))


def _paths(call: _Call) -> list[str]:
    """Every path that a call names, strings after descriptors being relative to them."""
    found, base = [], "AT_FDCWD<>"
    for argument in call.arguments:
        if argument.startswith('"') and "write" not in call.name:
            found.append(_path(base, argument))
        elif "<" in argument:
            base = argument
            found.append(_descriptor(argument)[1])
    if call.name == "openat":  # opened for reading only: nothing happens, but its descriptor may be fsynced
        found.append(_descriptor(call.result)[1])
    return found


def _is_below(path: str, root: str) -> bool:
    return path == root or path.startswith(f"{root}/")


# -- the model


class _Disk:
    """What has been written, and for each slot every value that a crash may leave in it: the last durable one and all since."""

    def __init__(self, root: Path, *, names: bool) -> None:
        self._names = names
        self.acks: list[str] = []
        self._root = str(root)
        self._nodes: list[str] = []  # "file" or "directory", by number; 0 is the root
        self._history: dict[Slot, list[tuple[int, Value]]] = {}  # (the number of the call that wrote it, the value), oldest first
        self._opened: dict[tuple[str, str], int] = {}  # (thread, descriptor) -> node
        self._offsets: dict[tuple[str, str], int] = {}
        self._count = 0
        self._load(root)

    def _load(self, path: Path) -> int:
        node = self._new("directory" if path.is_dir() else "file")
        if path.is_dir():
            for child in sorted(path.iterdir()):
                self._set((node, "entry", child.name), self._load(child))
        else:
            self._write(node, 0, path.read_bytes())
        return node

    def _new(self, kind: str) -> int:
        self._nodes.append(kind)
        if kind == "file":
            self._history[len(self._nodes) - 1, "size", ""] = [(0, 0)]  # an inode without its size is an empty file
        return len(self._nodes) - 1

    def _set(self, slot: Slot, value: Value) -> None:
        if slot[1] == "entry" and self._names:
            node, _, name = slot
            others = {(other, child) for other, child in self._entries(node) if other != name}
            slot, value = (node, "entries", ""), frozenset(others | ({(str(name), value)} if isinstance(value, int) else set()))
        default: Value = b"" if slot[1] == "sector" else frozenset() if slot[1] == "entries" else None
        history = self._history.setdefault(slot, [(0, default)] if self._count else [])
        if self._count == 0:  # what was there before the script is durable
            history.clear()
        history.append((self._count, value))

    def _entries(self, node: int) -> frozenset[tuple[str, int]]:
        found = self._get((node, "entries", ""))
        return found if isinstance(found, frozenset) else frozenset()

    def _get(self, slot: Slot) -> Value:
        if slot[1] == "entry" and self._names:
            return dict(self._entries(slot[0])).get(str(slot[2]))
        return self._history[slot][-1][1] if slot in self._history else None

    def _size(self, node: int) -> int:
        size = self._get((node, "size", ""))
        assert isinstance(size, int)
        return size

    def _write(self, node: int, offset: int, data: bytes) -> None:
        end = offset + len(data)
        for number in range(offset // SECTOR, -(-end // SECTOR)):
            start = number * SECTOR
            old = self._get((node, "sector", number)) or b""
            assert isinstance(old, bytes)
            new = bytearray(old.ljust(SECTOR, b"\0"))
            low, high = max(start, offset), min(start + SECTOR, end)
            new[low - start : high - start] = data[low - offset : high - offset]
            self._set((node, "sector", number), bytes(new))
        if end > self._size(node):
            self._set((node, "size", ""), end)

    def _fsync(self, node: int, begun: int) -> None:
        """Forget what a crash can no longer bring back: everything older than what was there when the fsync began."""
        for slot, history in self._history.items():
            if slot[0] == node:
                durable = max((i for i, (count, _) in enumerate(history) if count <= begun), default=0)
                del history[:durable]
        if self._names and self._nodes[node] == "directory":
            self._keep_name(node)
        elif self._names:
            for above in {slot[0] for slot in self._history if slot[1] == "entries" and self._name(slot[0], node)}:
                self._fsync(above, begun)

    def _name(self, directory: int, node: int) -> str:
        return next((name for name, child in self._entries(directory) if child == node), "")

    def _keep_name(self, node: int) -> None:
        """Forget all states of the directory above in which this one was not there yet."""
        for slot, history in self._history.items():
            if slot[1] == "entries" and (name := self._name(slot[0], node)):
                without = [i for i, (_, value) in enumerate(history) if isinstance(value, frozenset) and (name, node) not in value]
                del history[: max(without, default=-1) + 1]

    # -- names

    def _find(self, path: str) -> int | None:
        node: int | None = 0
        for name in path[len(self._root) :].split("/"):
            if name and node is not None:
                found = self._get((node, "entry", name))
                node = found if isinstance(found, int) else None
        return node

    def _parent(self, path: str) -> tuple[int, str]:
        head, _, name = path.rpartition("/")
        parent = self._find(head)
        assert parent is not None, f"{path} was made in a directory that the model does not know"
        return parent, name

    def _node(self, call: _Call, argument: str) -> int:
        number, path, deleted = _descriptor(argument)
        node = self._opened.get((call.thread, number)) if deleted else self._find(path)
        assert node is not None, f"the model does not know the file of {call}"
        return node

    def _entry(self, path: str, node: int | None) -> None:
        if _is_below(path, self._root):
            parent, name = self._parent(path)
            self._set((parent, "entry", name), node)

    # -- system calls

    def apply(self, call: _Call) -> None:
        """Do to the model what the call did to the disk."""
        self._count += 1
        if call.ack:
            self.acks.append(call.ack)
            return
        handler = getattr(self, f"_do_{call.name}", None)
        if handler is None:
            msg = f"the model does not know {call}"
            raise NotImplementedError(msg)
        handler(call, *call.arguments)

    def _do_openat(self, call: _Call, base: str, path: str, flags: str, _mode: str = "") -> None:
        key = (call.thread, _descriptor(call.result)[0])
        full = _path(base, path)
        node = self._find(full)
        if "O_TMPFILE" in flags:
            node = self._new("file")
        elif node is None:
            assert "O_CREAT" in flags, f"the model lost {full}"
            node = self._new("file")
            self._entry(full, node)
        elif "O_TRUNC" in flags and self._size(node):
            self._do_ftruncate(call, call.result, "0")
        self._opened[key] = node
        self._offsets[key] = self._size(node) if "O_APPEND" in flags else 0

    def _do_write(self, call: _Call, descriptor: str, data: str, _count: str) -> None:
        node, key = self._node(call, descriptor), (call.thread, _descriptor(descriptor)[0])
        written = _string(data)[: int(call.result)]
        offset = self._offsets.get(key, self._size(node))
        self._write(node, offset, written)
        self._offsets[key] = offset + len(written)

    def _do_pwrite64(self, call: _Call, descriptor: str, data: str, _count: str, offset: str) -> None:
        self._write(self._node(call, descriptor), int(offset), _string(data)[: int(call.result)])

    def _do_ftruncate(self, call: _Call, descriptor: str, length: str) -> None:
        assert length == "0", f"the model can only truncate to nothing: {call}"
        node = self._node(call, descriptor)
        for slot in [slot for slot in self._history if slot[0] == node]:
            self._set(slot, 0 if slot[1] == "size" else b"")

    def _do_fsync(self, call: _Call, descriptor: str) -> None:
        self._fsync(self._node(call, descriptor), call.begun)

    _do_fdatasync = _do_fsync

    def _do_sync(self, call: _Call, *_: str) -> None:
        for node in range(len(self._nodes)):
            self._fsync(node, call.begun)

    _do_syncfs = _do_sync

    def _do_linkat(self, call: _Call, old_base: str, old: str, new_base: str, new: str, _flags: str) -> None:
        source = _path(old_base, old)
        number = re.fullmatch(r"/proc/(?:self|\d+)/fd/(\d+)", source)
        node = self._opened.get((call.thread, number[1])) if number else self._find(source)
        assert node is not None, f"the model does not know the file of {call}"
        self._entry(_path(new_base, new), node)

    def _do_renameat(self, _call: _Call, old_base: str, old: str, new_base: str, new: str, *flags: str) -> None:
        assert "RENAME_EXCHANGE" not in "".join(flags)
        source = _path(old_base, old)
        self._entry(_path(new_base, new), self._find(source))
        self._entry(source, None)

    _do_renameat2 = _do_renameat

    def _do_unlinkat(self, _call: _Call, base: str, path: str, _flags: str) -> None:
        self._entry(_path(base, path), None)

    def _do_mkdirat(self, _call: _Call, base: str, path: str, _mode: str) -> None:
        self._entry(_path(base, path), self._new("directory"))

    def _do_open(self, call: _Call, *arguments: str) -> None:
        self._do_openat(call, "AT_FDCWD<>", *arguments)

    def _do_link(self, call: _Call, old: str, new: str) -> None:
        self._do_linkat(call, "AT_FDCWD<>", old, "AT_FDCWD<>", new, "0")

    def _do_rename(self, call: _Call, old: str, new: str) -> None:
        self._do_renameat(call, "AT_FDCWD<>", old, "AT_FDCWD<>", new)

    def _do_unlink(self, call: _Call, path: str) -> None:
        self._do_unlinkat(call, "AT_FDCWD<>", path, "0")

    _do_rmdir = _do_unlink

    def _do_mkdir(self, call: _Call, path: str, mode: str) -> None:
        self._do_mkdirat(call, "AT_FDCWD<>", path, mode)

    # -- crashes

    def crashes(self, seed: int) -> Iterator[Tree]:
        """Every tree that a crash may leave now; a fixed sample of them where there are too many."""
        reachable = self._reachable()
        options = {slot: self._options(slot) for slot in self._history if slot[0] in reachable}
        fixed = {slot: values[0] for slot, values in options.items() if len(values) == 1}
        open_slots = {slot: values for slot, values in options.items() if len(values) > 1}
        for choice in _choices(open_slots, seed):
            yield self._tree(fixed | choice)

    def _options(self, slot: Slot) -> list[Value]:
        return list(dict.fromkeys(value for _, value in self._history[slot]))

    def _reachable(self) -> set[int]:
        found, pending = {0}, [0]
        children: dict[int, set[int]] = {}
        for (node, kind, _), history in self._history.items():
            if kind == "entry":
                children.setdefault(node, set()).update(value for _, value in history if isinstance(value, int))
            elif kind == "entries":
                seen = (value for _, value in history if isinstance(value, frozenset))
                children.setdefault(node, set()).update(child for value in seen for _, child in value)
        while pending:
            new = children.get(pending.pop(), set()) - found
            found |= new
            pending += new
        return found

    def _tree(self, choice: Choice) -> Tree:
        entries: dict[int, dict[str, int]] = {}
        sectors: dict[int, dict[int, bytes]] = {}
        for (node, kind, key), value in choice.items():
            if kind == "entry" and isinstance(value, int):
                entries.setdefault(node, {})[str(key)] = value
            elif kind == "entries" and isinstance(value, frozenset):
                entries[node] = dict(value)
            elif kind == "sector" and isinstance(key, int) and isinstance(value, bytes):
                sectors.setdefault(node, {})[key] = value
        tree: Tree = {}
        pending = [("", 0)]
        while pending:
            path, node = pending.pop()
            if self._nodes[node] == "directory":
                tree[path] = None
                pending += [(f"{path}/{name}", child) for name, child in entries.get(node, {}).items()]
            else:
                tree[path] = _content(sectors.get(node, {}), choice[node, "size", ""])
        return tree


def _content(sectors: dict[int, bytes], size: Value) -> bytes:
    """Put a file together; a sector that did not reach the disk reads as zeros."""
    assert isinstance(size, int)
    data = bytearray(size)
    for number, sector in sectors.items():
        data[number * SECTOR : (number + 1) * SECTOR] = sector.ljust(SECTOR, b"\0")
    return bytes(data[:size])


def _choices(options: dict[Slot, list[Value]], seed: int) -> Iterator[Choice]:
    """Every combination of one value per slot; if they are too many, the extreme ones and a sample."""
    if math.prod(map(len, options.values())) <= MAX_EXHAUSTIVE:
        for combination in itertools.product(*options.values()):
            yield dict(zip(options, combination, strict=True))
        return
    old = {slot: values[0] for slot, values in options.items()}
    new = {slot: values[-1] for slot, values in options.items()}
    yield old
    yield new
    for slot, values in options.items():
        for value in values:
            yield old | {slot: value}
            yield new | {slot: value}
    chance = random.Random(seed)
    for _ in range(SAMPLES):
        yield {slot: chance.choice(values) for slot, values in options.items()}


# -- making a state real, and telling about it


def _materialise(tree: Tree, target: Path) -> None:
    for path, content in sorted(tree.items()):
        if content is None:
            Path(f"{target}{path}").mkdir()
        else:
            Path(f"{target}{path}").write_bytes(content)


def _story(calls: list[_Call], acks: list[str], tree: Tree, error: AssertionError) -> str:
    lines = [f"a crash here breaks the promise: {error}", f"acknowledged: {acks}", "the last calls were:"]
    lines += [f"  ACK {call.ack}" if call.ack else f"  {call}" for call in calls[-12:]]
    lines += ["the disk holds:"]
    lines += [f"  {path or '/'}{'' if content is None else f': {len(content)} bytes'}" for path, content in sorted(tree.items())]
    return "\n".join(lines)
