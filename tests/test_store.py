"""One contract for every store, and what a real disk does to it: full, failing, read-only, shared with the dead."""

from __future__ import annotations

import contextlib
import errno
import itertools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import faultguard
from faultguard.errors import AmbiguousReplyError, CheckpointCorruptError, CheckpointStoreError, UsageError
from faultguard.storage import leftovers as hidden
from faultguard.storage import local, open_store, store_id
from faultguard.storage.local import LocalStore
from faultguard.storage.memory import MemoryStore
from tests.needs import missing, require_strace

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from faultguard.storage import Store

REPOSITORY = Path(faultguard.__file__).parent.parent
LOCAL = ["tmpfile", "named", "renamed"]
DURABLE = ["tmpfile", "named"]
KEY = "run/task/w0/000000001.json"


def deny_links(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make this process see a file system without hard links, such as FAT."""

    def link(*args: object, **kwargs: object) -> None:
        raise OSError(errno.EPERM, os.strerror(errno.EPERM))

    monkeypatch.setattr(os, "link", link)


def make(kind: str, root: Path, monkeypatch: pytest.MonkeyPatch) -> LocalStore:
    """Open a local store whose creates go one of the three ways."""
    root.mkdir(exist_ok=True)
    if kind == "renamed":
        deny_links(monkeypatch)
        monkeypatch.setenv("FAULTGUARD_UNSAFE_FILESYSTEM", "1")
    return LocalStore(str(root), tmpfile=kind == "tmpfile")


@pytest.fixture(params=[*LOCAL, "memory"])
def store(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Store:
    """Every kind of store, each empty."""
    return MemoryStore() if request.param == "memory" else make(request.param, tmp_path / "store", monkeypatch)


@pytest.fixture(params=LOCAL)
def disk(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> LocalStore:
    """Every kind of local store, each empty."""
    return make(request.param, tmp_path / "store", monkeypatch)


@pytest.fixture(params=DURABLE)
def durable(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> LocalStore:
    """Both kinds of local store that promise to be durable, each empty."""
    return make(request.param, tmp_path / "store", monkeypatch)


def files(root: str | Path) -> list[str]:
    """Everything below `root`, temporary files and empty directories included."""
    return sorted(str(path.relative_to(root)) for path in Path(root).rglob("*"))


def leftovers(root: str | Path) -> list[str]:
    """Every temporary file below `root`."""
    return [path for path in files(root) if Path(path).name.startswith(".")]


def start(source: str, *arguments: str, command: tuple[str, ...] = (), **options: Any) -> subprocess.Popen[str]:
    """Start a Python script that finds faultguard."""
    return subprocess.Popen(
        [*command, sys.executable, "-c", source, *arguments],
        env={**os.environ, "PYTHONPATH": str(REPOSITORY), "PYTHONDONTWRITEBYTECODE": "1"},
        stdout=subprocess.PIPE,
        text=True,
        **options,
    )


def run(source: str, *arguments: str, command: tuple[str, ...] = (), **options: Any) -> Any:
    """Run a script to its end; it prints one value as JSON."""
    with start(source, *arguments, command=command, **options) as process:
        said, _ = process.communicate(timeout=60)
    assert process.returncode == 0, said
    return json.loads(said)


# -- the contract


def test_create_decides_once(store: Store) -> None:
    """The first create of a key wins, later ones are told so and change nothing."""
    assert store.create(KEY, b"first")
    assert not store.create(KEY, b"second")
    assert store.get(KEY) == b"first"


@pytest.mark.parametrize("data", [b"", b"\0", os.urandom(3_000_000)], ids=["empty", "nul", "3 MB"])
def test_data_comes_back_as_it_was(store: Store, data: bytes) -> None:
    """A store gives back exactly the bytes that it got, of whatever size."""
    assert store.create(KEY, data)
    assert store.get(KEY) == data


def test_absent_is_none(store: Store) -> None:
    """What is not there is None, also where a record stands in the place of a directory."""
    assert store.get(KEY) is None
    store.create("run", b"")
    assert store.get(KEY) is None
    assert store.list("run/task/") == []


def test_list_is_sorted_recursive_and_whole(store: Store) -> None:
    """A listing holds the whole keys below a prefix in order; `w1/` does not show what belongs to `w10/`."""
    keys = [f"run/{task}/{worker}/{number:09d}.json" for task in "ab" for worker in ("w1", "w10", "w%2E~") for number in (1, 2, 10)]
    for key in random.Random(1).sample(keys, len(keys)):
        store.create(key, b"")
    assert store.list("") == sorted(keys)
    assert store.list("run/a/w1/") == [f"run/a/w1/{number:09d}.json" for number in (1, 2, 10)]
    assert store.list("run/a/w1/", "run/a/w1/000000002.json") == ["run/a/w1/000000010.json"]
    assert store.list("", "run/a/w10/000000010.json") == sorted(key for key in keys if key > "run/a/w10/000000010.json")
    assert store.list("run/c/") == []


def test_deleted_is_absent_and_may_come_again(store: Store) -> None:
    """A deleted key is gone, deleting it again is fine, and the key is free."""
    store.create(KEY, b"one")
    store.delete(KEY)
    store.delete(KEY)
    store.delete("never/was")
    assert store.get(KEY) is None
    assert store.list("") == []
    assert store.create(KEY, b"two")
    assert store.get(KEY) == b"two"


@pytest.mark.parametrize("key", ["../x", "/etc/x", "a//b", "", "a/.b"])
def test_keys_that_are_none_are_refused(store: Store, key: str) -> None:
    """No call reaches outside of the store, or hides something in it."""
    for call in (store.get, store.delete, lambda key: store.create(key, b"")):
        with pytest.raises(ValueError, match="not a key"):
            call(key)
    with pytest.raises(ValueError, match="not a prefix"):
        store.list("run")


def test_of_eight_threads_one_wins(store: Store) -> None:
    """Of 8 threads that create the same 50 keys, exactly one wins each, and what it wrote is there."""
    barrier = threading.Barrier(8)

    def create(me: int) -> list[bool]:
        won = []
        for number in range(50):
            barrier.wait(30)
            won.append(store.create(f"run/task/{number}/000000001.json", bytes([me])))
        return won

    with ThreadPoolExecutor(8) as pool:
        results = list(pool.map(create, range(8)))
    for number, won in enumerate(zip(*results, strict=True)):
        assert sum(won) == 1
        assert store.get(f"run/task/{number}/000000001.json") == bytes([won.index(True)])


def test_keys_come_and_go_beside_each_other(store: Store) -> None:
    """Deletes that empty a directory, and remove it, never make a create beside them fail or lose its record."""

    def churn(me: int) -> None:
        for number in range(40):
            key = f"run/task/w/{me}-{number}"
            assert store.create(key, b"x")
            assert store.get(key) == b"x"
            store.delete(key)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(churn, range(4)))
    assert store.list("") == []


OPERATIONS = st.lists(
    st.tuples(st.sampled_from(["create", "delete", "get", "list"]), st.sampled_from(["a/1", "a/2", "a/b/1", "c"])), max_size=12
)


@given(OPERATIONS)
@settings(max_examples=40, deadline=None)
def test_a_disk_and_a_dict_agree(operations: list[tuple[str, str]]) -> None:
    """Whatever is done in whatever order, a local store answers as the one in memory does."""
    memory = MemoryStore()
    with tempfile.TemporaryDirectory() as root:
        disks = [LocalStore(root), LocalStore(root, tmpfile=False)]
        for (operation, key), disk in zip(operations, itertools.cycle(disks)):
            prefix = key.rpartition("/")[0] + "/" if "/" in key else ""
            arguments = {"create": (key, key.encode()), "list": (prefix,)}.get(operation, (key,))
            assert getattr(disk, operation)(*arguments) == getattr(memory, operation)(*arguments)
        assert disks[0].list("") == memory.list("")


# -- several processes

RACE = """
import json, sys, time
from faultguard.storage.local import LocalStore
root, tmpfile, me, begin = sys.argv[1:]
store = LocalStore(root, tmpfile=tmpfile == "True")
time.sleep(max(0.0, float(begin) - time.time()))
print(json.dumps([store.create(f"run/task/w/{number:09d}.json", me.encode()) for number in range(1, 51)]))
"""


def test_of_four_processes_one_wins(tmp_path: Path) -> None:
    """Of 4 processes that create the same 50 keys, some with named files, exactly one wins each."""
    begin = str(time.time() + 1.0)
    processes = [start(RACE, str(tmp_path), str(me % 2 == 0), str(me), begin) for me in range(4)]
    results = [json.loads(process.communicate(timeout=60)[0]) for process in processes]
    store = LocalStore(str(tmp_path))
    for number, won in enumerate(zip(*results, strict=True), 1):
        assert sum(won) == 1
        assert store.get(f"run/task/w/{number:09d}.json") == str(won.index(True)).encode()
    assert leftovers(tmp_path) == []


STOP_BEFORE_LINK = """
import sys
from faultguard.storage import local

def stop(step, key):
    if step == "before_link":
        print(step, flush=True)
        sys.stdin.readline()

local.step_hook = stop
local.LocalStore(sys.argv[1], tmpfile=False).create(sys.argv[2], b"late")
print("created", flush=True)
"""


@pytest.mark.parametrize("touch", ["list", "create"])
@pytest.mark.parametrize("reaped", [True, False])
def test_leftovers_of_dead_writers_go_and_those_of_living_ones_stay(tmp_path: Path, touch: str, *, reaped: bool) -> None:
    """The next process that lists or creates removes what a killed writer left, and spares a writer that only sleeps."""
    dead, alive = (start(STOP_BEFORE_LINK, str(tmp_path), f"run/w/{name}", stdin=subprocess.PIPE) for name in ("dead", "alive"))
    with dead, alive:
        for process in (dead, alive):
            assert process.stdout is not None
            assert process.stdout.readline() == "before_link\n"
        assert len(leftovers(tmp_path)) == 2
        dead.send_signal(signal.SIGKILL)
        if reaped:
            dead.wait(30)
        else:
            os.waitid(os.P_PID, dead.pid, os.WEXITED | os.WNOWAIT)  # a zombie, whose entry in /proc is still there
        store = LocalStore(str(tmp_path), tmpfile=False)
        assert store.list("run/w/") == [] if touch == "list" else store.create("run/w/other", b"")
        assert [f"-{alive.pid}-" in name for name in leftovers(tmp_path)] == [True]
        assert alive.communicate("\n", timeout=30)[0] == "created\n"
    assert store.get("run/w/alive") == b"late"
    assert leftovers(tmp_path) == []


def test_whose_leftover_it_is_shows_in_its_name(tmp_path: Path) -> None:
    """A pid used again is not its predecessor; of another host, boot or container only what is a day old goes."""
    mine = hidden.temporary_name()
    host, pid, began, number = mine.removeprefix(".tmp-").rsplit("-", 3)
    again = f".tmp-{host}-{pid}-{int(began) - 1}-{number}"
    other, old = f".tmp-{'0' * 32}-1-{pid}-{began}-0", f".tmp-{'0' * 32}-1-{pid}-{began}-1"
    not_ours = ".nfs0000001"
    for name in (mine, again, other, old, not_ours):
        (tmp_path / name).touch()
    os.utime(tmp_path / old, (0, time.time() - 100_000))
    LocalStore(str(tmp_path)).list("")
    assert leftovers(tmp_path) == sorted([mine, other, not_ours])


def test_a_process_hidden_in_proc_counts_as_living(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Where /proc does not show the processes of others, what may be theirs is spared."""
    name = hidden.temporary_name()
    host, pid, began, number = name.removeprefix(".tmp-").rsplit("-", 3)
    monkeypatch.setattr(hidden, "process", lambda pid: (_ for _ in ()).throw(FileNotFoundError()))
    names = [f".tmp-{host}-{pid}-{int(began) - 1}-{number}", f".tmp-{host}-1-1-{number}"]
    for name in names:
        (tmp_path / name).touch()
    LocalStore(str(tmp_path)).list("")
    monkeypatch.setattr(os, "kill", lambda pid, number: (_ for _ in ()).throw(PermissionError()))
    LocalStore(str(tmp_path)).list("")
    assert leftovers(tmp_path) == sorted(names)


FORK = """
import json, os, sys
from faultguard.storage import leftovers, local
store = local.LocalStore(sys.argv[1], tmpfile=False)
store.create("run/w/parent", b"")
if os.fork() == 0:
    store.create("run/w/child", b"")
    os._exit(0 if f"-{os.getpid()}-{leftovers.process(os.getpid())[1]}-" in leftovers.temporary_name() else 1)
print(json.dumps([os.waitpid(-1, 0)[1], store.list("")]))
"""


def test_a_store_goes_on_after_a_fork(tmp_path: Path) -> None:
    """A child uses the store of its parent, and signs its temporary files with its own pid."""
    assert run(FORK, str(tmp_path)) == [0, ["run/w/child", "run/w/parent"]]


# -- what a disk does


@pytest.fixture
def small_disk() -> Iterator[Path]:
    """A tmpfs of 64 KiB."""
    path = Path(tempfile.mkdtemp())
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "none", str(path)], capture_output=True, text=True, check=False)
    try:
        if done.returncode:
            missing(f"a full disk, because mounting a tmpfs is not permitted here: {done.stderr.strip()}")
        yield path
    finally:
        if not done.returncode:
            subprocess.run(["umount", str(path)], check=True)
        path.rmdir()


@pytest.mark.parametrize("kind", LOCAL)
def test_a_full_disk_is_told_and_left_clean(kind: str, small_disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A create that does not fit raises with path, cause and free space, leaves no byte, and works once there is room."""
    store = make(kind, small_disk, monkeypatch)
    assert store.create(KEY, b"x" * 20_000)
    before = files(small_disk)
    for key in ("run/task/w0/000000002.json", "other/task/w0/000000001.json"):
        with pytest.raises(
            CheckpointStoreError, match=r"not created: No space left on device \(ENOSPC\)\. Free: \d+ of 65536 bytes"
        ) as caught:
            store.create(key, b"x" * 60_000)
        assert not isinstance(caught.value, AmbiguousReplyError)
        assert str(small_disk / key) in str(caught.value)
        assert files(small_disk) == before
    assert store.create("run/task/w0/000000002.json", b"x" * 20_000)


RECORDED = """
import json, os, sys
from faultguard.errors import FaultguardError
from faultguard.storage import local
from faultguard.storage.local import LocalStore

calls, fsync = [], os.fsync
def recorded(fd):
    calls.append(os.readlink(f"/proc/self/fd/{fd}"))
    fsync(fd)
os.fsync = recorded
"""

FSYNCS = """
def tell(call, *arguments):
    try:
        said = call(*arguments)
    except FaultguardError as error:
        said = type(error).__name__
    return said.decode() if isinstance(said, bytes) else said

local._file_system = lambda path: sys.argv[3]
store = LocalStore(sys.argv[1], tmpfile=sys.argv[2] == "True")
one, two, three = ["run/task/w0/%09d.json" % number for number in (1, 2, 3)]
told = [tell(store.create, one, b"1"), tell(store.create, two, b"2"), tell(store.get, two), tell(store.list, "")]
told.append(tell(store.create, three, b"3"))
print(json.dumps([told, calls]))
"""


LISTED = """
def costs(store):
    del calls[:]
    return len(store.list("run/task/w0/")), calls.count(sys.argv[1] + "/run/task/w0")

ours, theirs = LocalStore(sys.argv[1]), LocalStore(sys.argv[1])
one, two = ["run/task/w0/%09d.json" % number for number in (1, 2)]
ours.create(one, b"1")
told = [costs(ours), costs(theirs)]
theirs.delete(one)
theirs.create(one, b"1")
told.append(costs(ours))
ours.create(two, b"2")
told.append(costs(ours))
print(json.dumps(told))
"""


def test_what_is_listed_is_durable_and_no_fsync_is_wasted_on_a_record_of_its_own(tmp_path: Path) -> None:
    """(keys, fsyncs): its own one; for another process; made anew by another one; beside one of another one."""
    root = tmp_path / "store"
    root.mkdir()
    assert run(RECORDED + LISTED, str(root)) == [[1, 0], [1, 1], [1, 1], [2, 1]]


def inject(root: Path, when: str, *, tmpfile: bool = True, kind: str = "btrfs") -> tuple[list[Any], list[str]]:
    """Run `FSYNCS` on a fresh root with some fsyncs failing."""
    shutil.rmtree(root, ignore_errors=True)
    root.mkdir()
    command = ("strace", "-f", "--seccomp-bpf", "-o", "/dev/null", "-e", "trace=fsync", "-e", f"inject=fsync:error=EIO:when={when}")
    told, calls = run(RECORDED + FSYNCS, str(root), str(tmpfile), kind, command=command)
    return told, calls


@pytest.mark.parametrize("tmpfile", [True, False], ids=DURABLE)
def test_a_failed_fsync_is_never_taken_for_success(tmp_path: Path, *, tmpfile: bool) -> None:
    """Whichever fsync fails, a create says no (or "unknown" after the link), and only what is durable is shown."""
    require_strace()
    root = tmp_path / "store"
    told, calls = inject(root, "999", tmpfile=tmpfile)
    keys = [f"run/task/w0/{number:09d}.json" for number in (1, 2, 3)]
    assert told == [True, True, "2", keys[:2], True]
    second = len(calls) - 6  # the last fsyncs are of: file, directory (create 2), get, list, file, directory (create 3)
    directory = str(root / "run/task/w0")
    assert [call == directory for call in calls[second:]] == [False, True, True, True, False, True]
    assert calls[1 : second - 1][:3] == [str(root / "run/task"), str(root / "run"), str(root)]

    for when in range(1, second + 1):  # the first create fails: at the file, at a parent, at the directory
        told, _ = inject(root, str(when), tmpfile=tmpfile)
        ambiguous = when == second
        assert told[0] == ("AmbiguousReplyError" if ambiguous else "CheckpointStoreError")
        assert told[1:] == [True, "2", keys[:2] if ambiguous else keys[1:2], True]
        assert leftovers(root) == []
    assert inject(root, str(second + 1), tmpfile=tmpfile)[0] == [True, "CheckpointStoreError", None, keys[:1], True]
    assert inject(root, str(second + 2), tmpfile=tmpfile)[0] == [True, "AmbiguousReplyError", "2", keys[:2], True]
    assert inject(root, str(second + 3), tmpfile=tmpfile)[0] == [True, True, "CheckpointStoreError", keys[:2], True]
    told, calls = inject(root, f"{second + 2}+2", tmpfile=tmpfile)  # and every other one after it
    assert told == [True, "AmbiguousReplyError", "2", *["CheckpointStoreError"] * 2]
    # The third record gets no name before the directory is durable.
    assert [call == directory for call in calls[second + 1 :]] == [True, True, True, False, True]
    assert files(root / "run/task/w0") == ["000000001.json", "000000002.json"]  # nothing new on top of the doubtful one


@pytest.mark.parametrize("kind", ["ext4", "xfs", "ext4 without a journal"])
def test_a_promise_whose_fsync_fails_is_none(tmp_path: Path, kind: str) -> None:
    """The file is thrown away; what comes after it is made durable from above, because the kernel may call the next fsync a success."""
    require_strace()
    root = tmp_path / "store"
    keys = [f"run/task/w0/{number:09d}.json" for number in (1, 2, 3)]
    directory = str(root / "run/task/w0")
    told, calls = inject(root, "999", kind=kind)
    assert told == [True, True, "2", keys[:2], True]
    second = len(calls) - 4  # the last fsyncs are of: the promise (create 2), get, list, the promise (create 3)
    names = [Path(call).name for call in calls[second:]]
    assert [f"-{Path(key).name}-" in name for key, name in zip((keys[1], keys[2]), (names[0], names[3]), strict=True)] == [True, True]
    assert names[1:3] == ["w0", "w0"]
    assert leftovers(root) == []
    told, calls = inject(root, str(second + 1), kind=kind)
    assert told == [True, "CheckpointStoreError", None, keys[:1], True]
    assert calls[second + 1] == directory  # at once, or a crash could bring it back
    assert {directory, str(root / "run/task")} <= set(calls[second + 4 :])
    assert leftovers(root) == []


READ_ONLY = """
import json, os, sys
from faultguard.errors import FaultguardError
from faultguard.storage import open_store
from faultguard.storage.local import LocalStore
if os.getuid() == 0:  # may write everywhere
    os.setgroups([])
    os.setgid(65534)
    os.setuid(65534)
store = LocalStore(sys.argv[1])
told = [store.list(""), store.get("run/w/1").decode()]
for call in (lambda: store.create("run/w/2", b""), lambda: store.delete("run/w/1"), lambda: open_store(sys.argv[1])):
    try:
        call()
    except FaultguardError as error:
        told.append([type(error).__name__, error.errno, str(error)])
print(json.dumps(told))
"""


def test_a_read_only_store_can_be_read(tmp_path: Path) -> None:
    """Without the right to write everything can be read, and whatever writes says what is missing."""
    with tempfile.TemporaryDirectory() as name:  # tmp_path is closed to other users
        root = Path(name)
        LocalStore(name).create("run/w/1", b"one")
        for path in (root, root / "run", root / "run/w"):
            path.chmod(0o555)
        told = run(READ_ONLY, name)
        for path in (root, root / "run", root / "run/w"):
            path.chmod(0o755)
        assert told[:2] == [["run/w/1"], "one"]
        assert [(kind, number) for kind, number, _ in told[2:]] == [("CheckpointStoreError", errno.EACCES)] * 3
        assert all("Permission denied (EACCES). Give this user the right" in text for *_, text in told[2:])
        assert files(root) == ["run", "run/w", "run/w/1"]


def open_files() -> list[str]:
    """What this process has open."""
    return sorted(path.name for path in Path("/proc/self/fd").iterdir())


def test_no_descriptor_leaks(disk: LocalStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """After 200 creates, lost races, failed ones, reads and deletes as many files are open as before."""
    before = open_files()
    for number in range(200):
        disk.create(f"run/task/{number % 5}/{number}", b"x")
        disk.create(f"run/task/{number % 5}/{number}", b"x")
        disk.get(f"run/task/{number % 5}/{number}")
    disk.list("")
    for name in ("open", "write", "fsync", "link", "fstat", "listdir", "unlink", "close"):
        for nth in range(8):
            with monkeypatch.context() as patch, contextlib.suppress(CheckpointStoreError):
                fail(patch, name, nth, after=name == "close")
                disk.create(f"run/fresh/{name}/{nth}", b"x")
    for key in disk.list(""):
        disk.delete(key)
    assert open_files() == before


def fail(patch: pytest.MonkeyPatch, name: str, nth: int, number: int = errno.EIO, *, after: bool = False) -> list[int]:
    """Let the nth call (from 0) of a function of `os` fail; with `after` when it has done its work. Returns a count of calls."""
    original: Callable[..., Any] = getattr(os, name)
    calls: list[int] = []

    def failing(*args: Any, **kwargs: Any) -> Any:
        calls.append(len(calls))
        if calls[-1] != nth:
            return original(*args, **kwargs)
        if after:
            original(*args, **kwargs)
        raise OSError(number, os.strerror(number))

    patch.setattr(os, name, failing)
    return calls


@pytest.mark.parametrize("after", [False, True], ids=["refused", "done and denied"])
def test_not_created_means_not_created(disk: LocalStore, monkeypatch: pytest.MonkeyPatch, *, after: bool) -> None:
    """Whichever system call fails, before or after its work, "created" and "not created" are true; what is not known is ambiguous."""
    names = [
        "write",
        "fsync",
        "link",
        "fstat",
        "stat",
        "listdir",
        "unlink",
        "rename",
        "mkdir",
        "rmdir",
        "close",
        *([] if after else ["open"]),
    ]
    outcomes = set()
    for name, nth, number in itertools.product(names, range(9), [errno.EIO, errno.ENOENT]):
        key = f"run/{name}/{number}/{nth}"
        with monkeypatch.context() as patch:
            fail(patch, name, nth, number, after=after)
            try:
                outcome = str(disk.create(key, b"x"))
            except CheckpointStoreError as error:
                outcome = type(error).__name__
        outcomes.add(outcome)
        assert outcome != "False", name
        if outcome != "AmbiguousReplyError":
            assert (disk.get(key) == b"x") == (outcome == "True"), name
    assert outcomes == {"True", "CheckpointStoreError", "AmbiguousReplyError"}


@pytest.mark.parametrize("kind", ["xfs", "ext4 without a journal"])
def test_a_new_folder_whose_first_fsync_fails_is_made_durable_from_above(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """Where the fsync of a file includes the name of its new folder, the kernel may call the next one a success."""
    monkeypatch.setattr(local, "_file_system", lambda path: kind)
    store, fsync, names = LocalStore(str(tmp_path)), os.fsync, []

    def noted(descriptor: int) -> None:
        names.append(Path(f"/proc/self/fd/{descriptor}").readlink().name)
        if len(names) == 1:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        fsync(descriptor)

    store.create("run/task/w0/000000001.json", b"x")
    assert store.create("run/task/w1/000000001.json", b"x", durable=False)  # it makes the folder
    monkeypatch.setattr(os, "fsync", noted)
    with pytest.raises(CheckpointStoreError):
        store.create("run/task/w1/000000002.json", b"x")
    assert "000000002.json" in names[0]
    assert "task" not in names
    store.create("run/task/w1/000000003.json", b"x")
    assert "task" in names


def test_short_writes_are_completed(disk: LocalStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """A write that takes only a part of the data is continued, one that takes nothing is an error and not a loop."""
    write = os.write
    monkeypatch.setattr(os, "write", lambda fd, data: write(fd, data[:100]))
    assert disk.create(KEY, bytes(range(256)) * 4)
    assert disk.get(KEY) == bytes(range(256)) * 4
    monkeypatch.setattr(os, "write", lambda fd, data: 0)
    with pytest.raises(CheckpointStoreError, match="took nothing"):
        disk.create("run/task/w0/000000002.json", b"x")


def test_steps_are_named(disk: LocalStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tests and chaos runs can die between any two steps that matter."""
    steps: list[tuple[str, str]] = []
    monkeypatch.setattr(local, "step_hook", lambda name, key: steps.append((name, key)))
    disk.create(KEY, b"")
    disk.delete(KEY)
    names = ["before_link", "after_link", "before_dir_fsync", "before_delete", "after_delete"]
    assert steps == [(name, KEY) for name in names]


@pytest.mark.parametrize("way", ["gone", "a file"])
def test_a_store_that_is_not_there_is_not_empty(durable: LocalStore, way: str) -> None:
    """When the root has gone (unmounted, removed) nothing answers "absent", and nothing is made in its place."""
    durable.create(KEY, b"")
    shutil.rmtree(durable.url)
    if way == "a file":
        Path(durable.url).touch()
    for call in (lambda: durable.get(KEY), lambda: durable.list(""), lambda: durable.create(KEY, b"")):
        with pytest.raises(CheckpointStoreError, match=repr(durable.url)[1:-1]):
            call()
    assert not Path(durable.url).is_dir()


def test_deletes_leave_no_empty_directories(disk: LocalStore) -> None:
    """The directories of a deleted log go with its last record, those that hold something stay, and so does the root."""
    disk.create(KEY, b"")
    disk.create("run/task/w1/000000001.json", b"")
    disk.delete(KEY)
    seen = [path for path in files(disk.url) if path not in leftovers(disk.url)]
    assert seen == ["run", "run/task", "run/task/w1", "run/task/w1/000000001.json"]
    disk.delete("run/task/w1/000000001.json")
    assert files(disk.url) == []
    assert Path(disk.url).is_dir()


def test_known_directories_are_forgotten_rather_than_kept_for_ever(durable: LocalStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a process remembers of directories has a limit."""
    monkeypatch.setattr(local, "_MAX_SETTLED", 10)
    for number in range(30):
        durable.create(f"run/task/{number}/1", b"")
    assert len(durable._settled) <= 14


# -- odd file systems


def test_a_lost_reply_of_link_is_a_success(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """NFS links, loses the reply, tries again and says "exists": the count of links tells that the winner is this call."""
    store = LocalStore(str(tmp_path), tmpfile=False)
    for number in (errno.EEXIST, errno.EIO):
        with monkeypatch.context() as patch:
            fail(patch, "link", 0, number, after=True)
            assert store.create(f"run/{number}", b"mine")
        assert store.get(f"run/{number}") == b"mine"
    assert leftovers(tmp_path) == []


def test_a_link_that_says_done_and_is_not_there_is_ambiguous(durable: LocalStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file system that reports a link which the file does not have is not believed."""
    monkeypatch.setattr(os, "link", lambda *args, **kwargs: None)
    with pytest.raises(AmbiguousReplyError, match="may or may not have been created"):
        durable.create(KEY, b"")
    assert leftovers(durable.url) == []


@pytest.mark.parametrize("number", [errno.EIO, errno.ETIMEDOUT, errno.EINTR, errno.ESTALE])
def test_a_link_without_an_answer_is_ambiguous(durable: LocalStore, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    """An error that does not say whether the server linked is passed on as such."""
    fail(monkeypatch, "link", 0, number)
    with pytest.raises(AmbiguousReplyError) as caught:
        durable.create(KEY, b"")
    assert getattr(caught.value, "errno", None) == number


def test_a_file_system_without_nameless_files_gets_named_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where O_TMPFILE is not supported it is tried once and never again."""
    tries = []
    original = os.open

    def refusing(path: str, flags: int, *args: Any, **kwargs: Any) -> int:
        if flags & os.O_TMPFILE == os.O_TMPFILE:
            tries.append(path)
            raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))
        return original(path, flags, *args, **kwargs)

    monkeypatch.setattr(os, "open", refusing)
    monkeypatch.setattr(local, "_file_system", lambda path: "btrfs")
    store = open_store(str(tmp_path / "store"))
    assert [store.create(KEY, b""), store.create(KEY, b"")] == [True, False]
    assert tries == ["."]
    assert leftovers(tmp_path) == []


@pytest.mark.parametrize("kind", ["ext4 without a journal", "overlay", "ext4", "xfs"])
def test_only_what_must_not_get_lost_has_a_temporary_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    """Where a file that was synced without a name may get lost, that is no matter for one that need not be durable, and is not synced."""
    monkeypatch.setattr(local, "_file_system", lambda path: kind)
    store, unlink, temporary = LocalStore(str(tmp_path)), os.unlink, []

    def noted(name: str, **options: Any) -> None:
        temporary.append(name)
        unlink(name, **options)

    monkeypatch.setattr(os, "unlink", noted)
    assert store.create("run/task/w0/000000001.json", b"", durable=False)
    assert temporary == []
    assert store.create("run/task/w0/000000002.json", b"")
    assert len(temporary) == (kind not in {"ext4", "xfs"})


@pytest.mark.parametrize("number", [errno.ENOENT, errno.EPERM, errno.EXDEV])
def test_nameless_files_that_cannot_be_linked_get_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    """Without /proc, or where a nameless file cannot be linked, the create takes a named one by itself."""
    original = os.link

    def picky(source: str, *args: Any, **kwargs: Any) -> None:
        if source.startswith("/proc/"):
            raise OSError(number, os.strerror(number))
        original(source, *args, **kwargs)

    monkeypatch.setattr(os, "link", picky)
    store = LocalStore(str(tmp_path))
    assert [store.create(KEY, b""), store.create(KEY, b"")] == [True, False]


def test_a_file_system_without_hard_links_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without hard links there is an error that names the way out, and only who takes it gets a store."""
    deny_links(monkeypatch)
    with pytest.raises(UsageError, match=r"no hard links: .*FAULTGUARD_UNSAFE_FILESYSTEM=1"):
        open_store(str(tmp_path / "store"))
    with pytest.raises(CheckpointStoreError, match="EPERM"):
        LocalStore(str(tmp_path)).create(KEY, b"")
    assert leftovers(tmp_path) == []
    monkeypatch.setenv("FAULTGUARD_UNSAFE_FILESYSTEM", "1")
    assert open_store(str(tmp_path / "store")).create(KEY, b"")


def test_a_file_system_with_two_winners_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file system that links over an existing name cannot fence, and is found out before the first record."""
    original = os.link

    def replacing(source: str, target: str, **kwargs: Any) -> None:
        (tmp_path / target).unlink(missing_ok=True)
        original(source, target, **kwargs)

    monkeypatch.setattr(os, "link", replacing)
    with pytest.raises(UsageError, match="two writers create one name"):
        open_store(str(tmp_path))
    assert files(tmp_path) == []


def test_a_fuse_mount_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """FUSE mounts are refused with their type, unless asked for."""
    monkeypatch.setattr(local, "_file_system", lambda path: "fuse.gcsfuse")
    for create in (True, False):
        with pytest.raises(UsageError, match=r"FUSE mount \(fuse.gcsfuse\)"):
            open_store(str(tmp_path), create=create)
    monkeypatch.setenv("FAULTGUARD_UNSAFE_FILESYSTEM", "1")
    assert open_store(str(tmp_path)).url == str(tmp_path)


def test_the_mount_with_the_longest_path_counts() -> None:
    """The type is that of the innermost mount, of the last one mounted there, and whole names are compared."""
    mounts = [
        "1 0 254:0 / / rw,relatime - ext4 /dev/vda rw",
        "2 1 0:40 / /data rw shared:1 master:2 - nfs4 server:/x rw",
        "3 2 0:41 / /data/a\\040b rw - fuse.sshfs host: rw",
        "4 2 0:42 / /data/twice rw - ext4 /dev/vdb rw",
        "5 4 0:43 / /data/twice rw - xfs /dev/vdc rw",
    ]
    expected = {"/": "ext4", "/database": "ext4", "/data": "nfs4", "/data/x": "nfs4", "/data/a b/x": "fuse.sshfs", "/data/twice": "xfs"}
    assert {path: local._mounted(path, mounts)[0] for path in expected} == expected
    assert local._mounted("/data/twice/x", mounts)[1] == "0:43"
    assert local._file_system("/proc") == "proc"


# -- opening


@pytest.mark.parametrize(
    ("url", "reason"),
    [
        ("checkpoints", "relative"),
        ("./x", "relative"),
        ("", "relative"),
        ("s3://bucket/x", "not supported yet"),
        ("gs://bucket/x", "not supported yet"),
        ("az://bucket/x", "not supported yet"),
        ("ftp://host/x", "'ftp' is not known"),
        ("memory://", "no name"),
    ],
)
def test_urls_that_cannot_be_used_are_refused(url: str, reason: str) -> None:
    """Every other url is a usage error that says why and what to write."""
    with pytest.raises(UsageError, match=reason):
        open_store(url)


def test_a_path_may_look_like_anything(tmp_path: Path) -> None:
    """An absolute path is one, whatever it contains; it is made with its parents, and nothing is left of the probes."""
    url = f"{tmp_path}/a/s3:/b c%2F\xe9"
    store = open_store(url)
    assert store.url == url
    assert files(url) == []
    assert store.create(KEY, b"x")
    assert open_store(url, create=False).get(KEY) == b"x"


@pytest.mark.parametrize("url", ["{}/absent", "memory://absent"])
def test_a_worker_makes_no_store_of_its_own(tmp_path: Path, url: str) -> None:
    """Where the store of the driver is not there, a worker gets an error that names the ways out, and makes none."""
    with pytest.raises(CheckpointStoreError, match=r"shared by all nodes|one process"):
        open_store(url.format(tmp_path), create=False)
    assert files(tmp_path) == []


def test_a_store_in_memory_is_found_by_name() -> None:
    """Two opens of one memory:// name in a process see one store, other names others."""
    open_store("memory://test_store/one").create(KEY, b"x")
    assert open_store("memory://test_store/one", create=False).get(KEY) == b"x"
    assert open_store("memory://test_store/two").get(KEY) is None


def test_a_root_behind_a_symlink_is_shown_as_given(tmp_path: Path) -> None:
    """A symlinked root works and keeps the name that the user knows."""
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    store = open_store(str(tmp_path / "link"))
    store.create(KEY, b"x")
    assert store.url == str(tmp_path / "link")
    assert (tmp_path / "real" / KEY).read_bytes() == b"x"


# -- who the store is


def test_a_store_has_one_id_for_ever(store: Store) -> None:
    """Of 8 threads that ask a new store for its id, all get the same one, and so does everybody later."""
    with ThreadPoolExecutor(8) as pool:
        ids = set(pool.map(lambda _: store_id(store), range(8)))
    assert ids == {store_id(store, create=False)}
    assert len(ids.pop()) == 32


def test_a_store_without_an_id_is_not_the_drivers(store: Store) -> None:
    """Who must not create an id is told that this is another directory."""
    with pytest.raises(CheckpointStoreError, match="not the directory that the driver uses"):
        store_id(store, create=False)
    assert store.list("") == []


@pytest.mark.parametrize("data", [b"", b"{", b"[]", b'{"store_id": 7, "format": 1}', b"\xff"])
def test_a_damaged_id_is_told(store: Store, data: bytes) -> None:
    """An id that cannot be read is an error, never a new id."""
    store.create("faultguard-store.json", data)
    with pytest.raises(CheckpointCorruptError, match="damaged"):
        store_id(store)


def test_a_store_of_a_later_version_is_refused(store: Store) -> None:
    """A format that this version does not know is refused, whatever else it says."""
    store.create("faultguard-store.json", b'{"store_id": "a", "format": 2, "more": 1}')
    with pytest.raises(CheckpointStoreError, match="format 2"):
        store_id(store)


def test_an_id_whose_creation_is_in_doubt_is_read_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """After an ambiguous reply the store is asked; only if it has no id the doubt is passed on."""
    store = MemoryStore()
    original = store.create

    def doubtful(key: str, data: bytes, *, arrives: bool = True) -> bool:
        if arrives:
            original(key, data)
        raise AmbiguousReplyError("lost")

    monkeypatch.setattr(store, "create", lambda key, data: doubtful(key, data, arrives=False))
    with pytest.raises(AmbiguousReplyError):
        store_id(store)
    monkeypatch.setattr(store, "create", doubtful)
    assert store_id(store) == store_id(store, create=False)
