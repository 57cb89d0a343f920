"""A record that was promised is there for whoever looks, once; and nothing else comes of a promise."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import stat
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest import mock

import pytest

import faultguard
from faultguard.errors import AmbiguousReplyError, CheckpointStoreError
from faultguard.storage import leftovers, local
from faultguard.storage.local import LocalStore

if TYPE_CHECKING:
    from collections.abc import Callable

REPOSITORY = Path(faultguard.__file__).parent.parent
ONE, TWO, THREE, FOUR = (f"run/task/w/{number:09d}.json" for number in (1, 2, 3, 4))
BOUND_S = 60

DIES = """
import os, sys
from faultguard.storage import local
local._file_system = lambda path: "ext4"
store = local.LocalStore(sys.argv[1])
assert store.create(sys.argv[2], b"below")

def dies(step, key):
    if step == "before_link":
        os._exit(9)

local.step_hook = dies
store.create(sys.argv[3], b"promised")
"""


@pytest.fixture(autouse=True)
def _kind(monkeypatch: pytest.MonkeyPatch) -> None:
    """A file system with promises, whatever this one is."""
    monkeypatch.setattr(local, "_file_system", lambda path: "ext4")


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A store whose writer has died with a promise of `TWO`, above `ONE`."""
    tmp_path.joinpath("store").mkdir()
    assert promise_and_die(tmp_path / "store") == 9
    assert len(hidden(tmp_path / "store")) == 1
    return tmp_path / "store"


def promise_and_die(root: Path, below: str = ONE, promised: str = TWO) -> int:
    """Let a process make a record, promise the next one, and die; how it did."""
    command = [sys.executable, "-c", DIES, str(root), below, promised]
    return subprocess.run(command, env={**os.environ, "PYTHONPATH": str(REPOSITORY)}, timeout=BOUND_S, check=False).returncode


def hidden(root: Path) -> list[str]:
    """The hidden files of the log."""
    return sorted(path.name for path in (root / "run/task/w").iterdir() if path.name.startswith("."))


def changed(root: Path, change: Callable[[bytes], bytes]) -> None:
    """Change what was promised."""
    path = root / "run/task/w" / hidden(root)[0]
    path.write_bytes(change(path.read_bytes()))


@pytest.mark.parametrize(
    "look",
    [
        lambda store: store.list("") == [ONE, TWO],
        lambda store: store.list("run/task/w/", ONE) == [TWO],
        lambda store: store.get(TWO) == b"promised",
        lambda store: store.create(TWO, b"another one") is False,
    ],
    ids=["list", "list those after", "get", "create"],
)
def test_whoever_looks_keeps_the_promise_of_the_dead(root: Path, look: Callable[[LocalStore], bool]) -> None:
    """And finds the record, under its name."""
    assert look(LocalStore(str(root)))
    assert hidden(root) == []
    assert LocalStore(str(root)).list("") == [ONE, TWO]
    assert LocalStore(str(root)).get(TWO) == b"promised"


@pytest.mark.parametrize(
    "change", [lambda data: data[:-1], lambda data: b"\0" * len(data), lambda data: b""], ids=["short", "zeros", "empty"]
)
def test_what_did_not_reach_the_disk_whole_was_not_acknowledged(root: Path, change: Callable[[bytes], bytes]) -> None:
    """It is removed."""
    changed(root, change)
    store = LocalStore(str(root))
    assert store.get(TWO) is None
    assert store.list("") == [ONE]
    assert hidden(root) == []


@pytest.mark.parametrize(("data", "seconds", "found"), [(b"wh", 0, []), (b"wh", 60, []), (b"whole", 0, []), (b"whole", 60, [ONE])])
def test_a_living_writer_is_left_to_finish(tmp_path: Path, data: bytes, seconds: int, found: list[str]) -> None:
    """What it has not written yet is not removed, and what it was about to rename is kept only if it has not for long: it was stopped."""
    log = tmp_path / "run/task/w"
    log.mkdir(parents=True)
    promise = log / leftovers.promise_name("000000001.json", b"whole")
    promise.write_bytes(data)
    os.utime(promise, (0, time.time() - seconds))
    assert LocalStore(str(tmp_path)).list("") == found
    assert len(hidden(tmp_path)) == (not found)


def test_nothing_is_put_below_a_higher_number(root: Path) -> None:
    """Who made that one has seen what was acknowledged; this one was not, or has been deleted since."""
    (root / THREE).write_bytes(b"higher")
    assert LocalStore(str(root)).get(TWO) is None
    assert LocalStore(str(root)).list("") == [ONE, THREE]
    assert hidden(root) == []


def test_of_two_promises_the_lower_one_is_kept_first(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the rename of the first one was not on the disk when the power failed."""
    for number in (4, 3):
        promise = root / "run/task/w" / leftovers.promise_name(f"{number:09d}.json", b"x")
        promise.write_bytes(b"x")
    monkeypatch.setattr(leftovers, "_UNDER_WAY_S", 0.0)
    assert LocalStore(str(root)).list("") == [ONE, TWO, THREE, FOUR]
    assert hidden(root) == []


def test_a_promise_whose_record_is_another_one_is_removed(root: Path) -> None:
    """Its writer was not the first."""
    (root / TWO).write_bytes(b"another one")
    assert LocalStore(str(root)).list("") == [ONE, TWO]
    assert LocalStore(str(root)).get(TWO) == b"another one"
    assert hidden(root) == []


@pytest.mark.parametrize(("seconds", "found"), [(0, [ONE]), (60, [ONE, TWO])])
def test_who_cannot_see_whether_the_writer_lives_waits_as_long(root: Path, seconds: int, found: list[str]) -> None:
    """It is in another container of the same machine, which was not started again since."""
    promise = root / "run/task/w" / hidden(root)[0]
    boot, space, rest = promise.name.removeprefix(".tmp-").split("-", 2)
    other = promise.rename(promise.with_name(f".tmp-{boot}-{int(space) + 1}-{rest}"))
    os.utime(other, (0, time.time() - seconds))
    assert LocalStore(str(root)).list("") == found


@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOSYS, errno.EPERM])
def test_a_promise_is_kept_without_a_rename(root: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    """By an NFS client, or with a C library that has none."""

    def fails(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(leftovers, "become", fails)
    assert LocalStore(str(root)).list("") == [ONE, TWO]
    assert LocalStore(str(root)).get(TWO) == b"promised"
    assert hidden(root) == []


def test_what_another_one_has_kept_meanwhile_is_read(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between the look for the record and that for promises."""
    tidy = leftovers.tidy
    looked: list[bool] = []

    def later(names: list[str], directory_fd: int) -> leftovers.Tidied:
        if not looked:
            looked.append(True)
            assert LocalStore(str(root)).list("") == [ONE, TWO]
        return tidy(os.listdir(directory_fd), directory_fd)

    monkeypatch.setattr(leftovers, "tidy", later)
    assert LocalStore(str(root)).get(TWO) == b"promised"


@pytest.mark.parametrize("many", [1, 100])
def test_a_long_listing_that_a_rename_has_met_is_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, many: int) -> None:
    """The kernel tells some names at a time; where it tells all at once, nothing can be missed."""
    store, scandir = LocalStore(str(tmp_path)), os.scandir
    for key in (ONE, TWO, THREE):
        assert store.create(key, b"x")
    left = [2]

    def misses(descriptor: int) -> Any:
        with scandir(descriptor) as entries:
            found = list(entries)
        if left[0] and len(found) > 1:
            left[0] -= 1
            found = [entry for entry in found if entry.name != TWO[-14:]]
            (tmp_path / "run/task/w/other").touch()
            (tmp_path / "run/task/w/other").unlink()
            time.sleep(0.01)  # the clock of the file system goes in steps
        return contextlib.nullcontext(iter(found))

    monkeypatch.setattr(local, "_MANY", many)
    monkeypatch.setattr(os, "scandir", misses)
    assert LocalStore(str(tmp_path)).list("run/task/w/") == ([ONE, TWO, THREE] if many == 1 else [ONE, THREE])


@pytest.mark.parametrize("links", [1, 2])
def test_half_a_rename_is_left_alone(root: Path, monkeypatch: pytest.MonkeyPatch, links: int) -> None:
    """Both names are on the disk, of one file; where ext4 without a journal counts one link, the file would go with either."""
    os.link(root / "run/task/w" / hidden(root)[0], root / TWO)
    real = os.stat

    def counted(path: Any, **options: Any) -> Any:
        found = real(path, **options)
        return mock.Mock(st_ino=found.st_ino, st_nlink=links) if "dir_fd" in options else found

    with monkeypatch.context() as patch:
        patch.setattr(os, "stat", counted)
        assert LocalStore(str(root)).list("") == [ONE, TWO]
    assert len(hidden(root)) == (links == 1)
    assert (root / TWO).read_bytes() == b"promised"


def test_a_promise_that_cannot_be_read_now_is_not_removed(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The error is told, and later there it is."""
    real = os.open

    def fails(path: Any, *arguments: Any, **options: Any) -> int:
        if str(path).startswith(".tmp-"):
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
        return real(path, *arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(os, "open", fails)
        with pytest.raises(CheckpointStoreError, match="EMFILE"):
            LocalStore(str(root)).list("")
    assert LocalStore(str(root)).list("") == [ONE, TWO]


def test_nothing_hidden_is_left_by_who_lives(tmp_path: Path) -> None:
    """Nor does a deleted record leave anything."""
    store = LocalStore(str(tmp_path))
    for key in (ONE, TWO, THREE):
        assert store.create(key, b"x")
        assert hidden(tmp_path) == []
    for key in (ONE, TWO, THREE):
        store.delete(key)
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def promised(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The records that were promised in this process, by their last parts."""
    seen: list[str] = []
    become = leftovers.become

    def noted(promise: str, record: str, directory_fd: int) -> None:
        seen.append(record)
        become(promise, record, directory_fd)

    monkeypatch.setattr(leftovers, "become", noted)
    return seen


def test_who_has_made_a_record_may_promise_the_next_one(tmp_path: Path, promised: list[str]) -> None:
    """And nobody else: of two promises of one number nobody could say which one was acknowledged."""
    mine, other = LocalStore(str(tmp_path)), LocalStore(str(tmp_path))
    assert mine.create(ONE, b"x")
    assert mine.create(TWO, b"x")
    assert promised == ["000000002.json"]
    assert other.create(THREE, b"x")
    assert mine.create(FOUR, b"x")
    assert promised == ["000000002.json"]
    assert mine.create("run/task/w/000000005.json", b"x")
    assert promised == ["000000002.json", "000000005.json"]
    mine.delete("run/task/w/000000005.json")
    assert mine.create("run/task/w/000000006.json", b"x")
    assert not mine.create(TWO, b"x")
    assert mine.create("run/task/w/first/000000001.json", b"x")
    assert mine.create("run/task/w/named", b"x")
    assert promised == ["000000002.json", "000000005.json"]


def test_a_volatile_record_in_a_new_folder_counts_as_made(tmp_path: Path, promised: list[str]) -> None:
    """If the folder above is known to be durable; that of the record itself becomes so with the promise."""
    store = LocalStore(str(tmp_path))
    for worker in "vwx":
        assert store.create(f"run/task/{worker}/000000001.json", b"x", durable=False)
        assert store.create(f"run/task/{worker}/000000002.json", b"x")
    assert promised == ["000000002.json"] * 2
    (tmp_path / "run/task/y").mkdir()  # by another process
    assert store.create("run/task/y/000000001.json", b"x", durable=False)
    assert store.create("run/task/y/000000002.json", b"x")
    assert promised == ["000000002.json"] * 2


@pytest.mark.parametrize(("kind", "expected"), [("ext4", 100), ("xfs", 100), ("ext4 without a journal", 2), ("btrfs", 0), ("nfs4", 0)])
def test_where_a_promise_is_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, promised: list[str], kind: str, expected: int) -> None:
    """Without a journal only in a folder of one block: both halves of a rename are written at once, or the record may be lost."""
    monkeypatch.setattr(local, "_file_system", lambda path: kind)
    store, fstat = LocalStore(str(tmp_path)), os.fstat

    def small_blocks(descriptor: int) -> Any:
        found = fstat(descriptor)
        if not stat.S_ISDIR(found.st_mode):
            return found
        size = 100 if len(list((tmp_path / "run/w").iterdir())) < 3 else 101
        return mock.Mock(wraps=found, st_nlink=found.st_nlink, st_blocks=1, st_blksize=100, st_size=size)

    monkeypatch.setattr(os, "fstat", small_blocks)
    for number in range(1, 102):
        assert store.create(f"run/w/{number:09d}.json", b"x")
    assert len(promised) == expected


def test_a_child_does_not_promise_what_its_parent_may(tmp_path: Path, promised: list[str]) -> None:
    """Both have made the record below."""
    store = LocalStore(str(tmp_path))
    assert store.create(ONE, b"x")
    child = os.fork()
    if child == 0:
        code = 9
        with contextlib.suppress(BaseException):
            code = 0 if store.create(TWO, b"child") and not promised and store.create(THREE, b"child") and len(promised) == 1 else 1
        os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert not store.create(TWO, b"parent")
    assert store.get(TWO) == b"child"


def test_one_thread_at_a_time_promises(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, promised: list[str]) -> None:
    """The other one makes its record with two fsyncs."""
    store = LocalStore(str(tmp_path))
    assert store.create(ONE, b"x")
    answers: list[bool | str] = []
    assert meanwhile(monkeypatch, store, lambda: answers.append(store.create(TWO, b"faster"))) is False
    assert answers == [True]
    assert store.get(TWO) == b"faster"
    assert promised == ["000000002.json"]
    assert hidden(tmp_path) == []


def meanwhile(monkeypatch: pytest.MonkeyPatch, store: LocalStore, happens: Callable[[], object]) -> bool | str:
    """Create `TWO`, while something happens right before the link; the answer."""

    def hook(step: str, key: str) -> None:
        if step == "before_link":
            monkeypatch.setattr(local, "step_hook", None)
            happens()

    monkeypatch.setattr(local, "step_hook", hook)
    try:
        return store.create(TWO, b"mine")
    except AmbiguousReplyError:
        return "ambiguous"


def look(store: LocalStore) -> None:
    """Keep the promise."""
    assert store.get(TWO) == b"mine"


def tidy(store: LocalStore) -> None:
    """Keep the promise, and remove it."""
    assert store.list("") == [ONE, TWO]


def tidy_and_delete(store: LocalStore) -> None:
    """Keep the promise, and delete the record."""
    tidy(store)
    store.delete(TWO)


@pytest.mark.parametrize(("happens", "answer"), [(look, True), (tidy, True), (tidy_and_delete, "ambiguous")])
def test_a_promise_that_another_one_keeps_is_kept_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, happens: Callable[[LocalStore], None], answer: bool | str
) -> None:
    """The writer, who comes to link it, hears what has become of it: no record is made twice, or after it was deleted."""
    monkeypatch.setattr(leftovers, "_UNDER_WAY_S", 0.0)
    mine, other = LocalStore(str(tmp_path)), LocalStore(str(tmp_path))
    assert mine.create(ONE, b"below")
    assert meanwhile(monkeypatch, mine, lambda: happens(other)) == answer
    assert other.get(TWO) == (b"mine" if answer is True else None)


@pytest.mark.parametrize("seen", [False, True])
def test_who_loses_leaves_no_promise(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *, seen: bool) -> None:
    """Another record has the name: the promise goes, and may have been removed already, by whoever saw that."""
    mine, other = LocalStore(str(tmp_path)), LocalStore(str(tmp_path))
    assert mine.create(ONE, b"below")

    def faster() -> None:
        (tmp_path / TWO).write_bytes(b"theirs")
        if seen:
            other.list("")

    assert meanwhile(monkeypatch, mine, faster) is False
    assert other.get(TWO) == b"theirs"
    assert hidden(tmp_path) == []


def test_who_loses_makes_the_other_record_durable_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """If that fails it was not created, which is all that is known."""
    mine, fsync = LocalStore(str(tmp_path)), os.fsync
    assert mine.create(ONE, b"below")
    left: list[int] = []

    def fails(descriptor: int) -> None:
        if stat.S_ISDIR(os.fstat(descriptor).st_mode) and not left:
            left.append(len(hidden(tmp_path)))
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", fails)
    with pytest.raises(CheckpointStoreError, match="EIO"):
        meanwhile(monkeypatch, mine, lambda: (tmp_path / TWO).write_bytes(b"theirs"))
    assert left == [1]
    assert hidden(tmp_path) == []


def test_a_hard_link_of_a_backup_makes_nobody_win(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What counts is whose file has the name."""
    mine = LocalStore(str(tmp_path))
    assert mine.create(ONE, b"below")

    def backup_and_faster() -> None:
        log = tmp_path / "run/task/w"
        os.link(log / hidden(tmp_path)[0], log / "backup")
        (tmp_path / TWO).write_bytes(b"theirs")

    assert meanwhile(monkeypatch, mine, backup_and_faster) is False


def test_a_promise_that_cannot_be_taken_back_may_be_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The disk has become read-only: nobody may say that it was not created."""
    mine = LocalStore(str(tmp_path))
    assert mine.create(ONE, b"below")

    def fails(*_: object, **__: object) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fails)
        patch.setattr(os, "unlink", fails)
        with pytest.raises(AmbiguousReplyError):
            mine.create(TWO, b"mine")
    assert len(hidden(tmp_path)) == 1


@pytest.mark.parametrize("kept", [False, True])
def test_what_becomes_of_a_promise_whose_fsync_failed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *, kept: bool) -> None:
    """It is taken back; if another process has kept it meanwhile, nobody may say that it was not created."""
    monkeypatch.setattr(leftovers, "_UNDER_WAY_S", 0.0)
    mine, other, fsync = LocalStore(str(tmp_path)), LocalStore(str(tmp_path)), os.fsync
    assert mine.create(ONE, b"below")

    def fails(descriptor: int) -> None:
        monkeypatch.setattr(os, "fsync", fsync)
        if kept:
            other.list("")
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "fsync", fails)
    with pytest.raises(CheckpointStoreError) as caught:
        mine.create(TWO, b"mine")
    assert isinstance(caught.value, AmbiguousReplyError) == kept
    assert other.get(TWO) == (b"mine" if kept else None)
    assert hidden(tmp_path) == []


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.EINVAL, errno.EIO, errno.ENOSPC])
def test_a_rename_that_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    """Where there is no such thing it is tried once and never again; else it is as with a link."""
    tries: list[str] = []

    def fails(promise: str, record: str, directory_fd: int) -> None:
        tries.append(record)
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(leftovers, "become", fails)
    store = LocalStore(str(tmp_path))
    assert store.create(ONE, b"x")
    if number in {errno.ENOSYS, errno.EINVAL}:
        assert store.create(TWO, b"x")
        assert store.create(THREE, b"x")
    else:
        with pytest.raises(CheckpointStoreError) as caught:
            store.create(TWO, b"x")
        assert isinstance(caught.value, AmbiguousReplyError) == (number == errno.EIO)
        assert store.get(TWO) is None
        assert store.create(TWO, b"x")  # with two fsyncs
    assert tries == ["000000002.json"]
    assert hidden(tmp_path) == []


def test_many_look_at_once(root: Path) -> None:
    """All find the record that was promised."""
    barrier, found = threading.Barrier(8), []

    def look() -> None:
        store = LocalStore(str(root))
        barrier.wait(BOUND_S)
        found.append((store.list(""), store.get(TWO)))

    threads = [threading.Thread(target=look) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(BOUND_S)
    assert found == [([ONE, TWO], b"promised")] * 8
    assert hidden(root) == []


@pytest.mark.parametrize("lives", [False, True])
def test_who_may_not_write_is_told_rather_than_shown_less(root: Path, monkeypatch: pytest.MonkeyPatch, *, lives: bool) -> None:
    """The record is acknowledged, and cannot be made: that is an error, not an older log. Within one boot it is not acknowledged."""

    def refuses(*_: object) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    promise = root / "run/task/w" / hidden(root)[0]
    if lives:
        promise.rename(promise.with_name(leftovers.promise_name("000000002.json", b"promised")))
    else:
        promise.rename(promise.with_name(f".tmp-{'0' * 32}-{promise.name.split('-', 2)[2]}"))
    monkeypatch.setattr(leftovers, "_UNDER_WAY_S", 0.0)
    with monkeypatch.context() as patch:
        patch.setattr(leftovers, "become", refuses)
        store = LocalStore(str(root))
        looks: list[Callable[[], object]] = [lambda: store.list(""), lambda: store.get(TWO)]
        for look in looks:
            if lives:
                assert look() in ([ONE], None)
            else:
                with pytest.raises(CheckpointStoreError, match="Permission denied"):
                    look()
    assert LocalStore(str(root)).list("") == [ONE, TWO]


KILLED = """
import json, os, sys
from faultguard.storage import leftovers, local
local._file_system = lambda path: "ext4"
store = local.LocalStore(sys.argv[1])
calls = int(sys.argv[2])

def dying(function):
    def call(*arguments, **options):
        global calls
        if not calls:
            os._exit(9)
        calls -= 1
        return function(*arguments, **options)
    return call

for name in ("open", "write", "fsync", "link", "unlink", "close"):
    setattr(os, name, dying(getattr(os, name)))
leftovers.become = dying(leftovers.become)
for number in (1, 2, 3):
    key = "run/task/w/%09d.json" % number
    store.create(key, key.encode())
    print(number, flush=True)
store.delete("run/task/w/%09d.json" % 1)
print("end", flush=True)
"""


def test_a_writer_killed_at_any_call_loses_nothing(tmp_path: Path) -> None:
    """Whatever it had acknowledged is found, whole, and at most one more; and nothing hidden is left."""
    for calls in range(200):
        root = tmp_path / str(calls)
        root.mkdir()
        command = [sys.executable, "-c", KILLED, str(root), str(calls)]
        done = subprocess.run(
            command, env={**os.environ, "PYTHONPATH": str(REPOSITORY)}, stdout=subprocess.PIPE, text=True, timeout=BOUND_S, check=False
        )
        told = done.stdout.split()
        store = LocalStore(str(root))
        found: list[Any] = [json.loads(key[-14:-5].lstrip("0")) for key in store.list("")]
        assert all(store.get(f"run/task/w/{number:09d}.json") == f"run/task/w/{number:09d}.json".encode() for number in found)
        if told[-1:] == ["end"]:
            assert found == [2, 3]
            break
        count = len(told)
        allowed = [list(range(1, count + 1)), list(range(1, count + 2)), *([[2, 3]] if count == 3 else [])]
        assert found in allowed, (calls, told, found)
        with contextlib.suppress(FileNotFoundError):
            assert hidden(root) == []
    else:
        pytest.fail("it never came to its end")
