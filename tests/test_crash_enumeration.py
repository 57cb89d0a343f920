"""What `LocalStore` acknowledges survives every crash that the model of a disk allows, and no fsync of it is superfluous."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import faultguard
from faultguard.storage.local import LocalStore
from tests.crash_enumeration import enumerate_crashes
from tests.needs import require_strace

REPOSITORY = Path(faultguard.__file__).parent.parent

# Every script begins with this. A payload can be told to be whole from its key; `skip` leaves out one kind of fsync.
PROLOGUE = """
import os, stat, sys
sys.path.insert(0, {repository!r})
from faultguard.storage import local
from faultguard.storage.local import LocalStore

local._file_system = lambda path: {kind!r}
base = sys.argv[1]
root = base + "/made/store"

def payload(key):
    return (key * 100).encode()

def ack(text):
    print("ACK " + text, flush=True)

def skip(kind, fsync=os.fsync):
    def partial(fd):
        path = os.readlink("/proc/self/fd/%d" % fd)
        if not stat.S_ISDIR(os.fstat(fd).st_mode):
            found = "promise" if ".json-" in os.path.basename(path) else "file"
        else:
            found = {{"w": "directory", "task": "parent", "run": "parent of parent", "store": "root", "made": "above"}}.get(
                os.path.basename(path), "base"
            )
        if found != kind:
            fsync(fd)
    os.fsync = partial

os.makedirs(root)
store = LocalStore(root, tmpfile={tmpfile})
"""

CREATES = """
for number in range(1, 4):
    key = "run/task/w/%09d.json" % number
    assert store.create(key, payload(key))
    ack(key)
"""

MADE_BY_ANOTHER = """
os.makedirs(root + "/run/task/w")  # ... which died before it made them durable
"""

MADE_ANEW = """
key = "run/task/w/%09d.json" % 1
store.create(key, payload(key))
number = os.stat(root + "/run/task/w").st_ino
os.unlink(root + "/" + key)
os.rmdir(root + "/run/task/w")
for attempt in range(100):  # ext4 gives the lowest free number to the next inode: take those below
    os.mkdir(base + "-%d" % attempt)
    if os.stat(base + "-%d" % attempt).st_ino == number:
        os.rmdir(base + "-%d" % attempt)
        break
os.mkdir(root + "/run/task/w")  # by another process
ack("same inode: %s" % (number == os.stat(root + "/run/task/w").st_ino))
key = "run/task/w/%09d.json" % 2
assert store.create(key, payload(key))
ack(key)
"""

UNFINISHED = """
first, second = ["run/task/w/%09d.json" % number for number in (1, 2)]
assert store.create(first, payload(first))
ack(first)
def die(step, key):
    if step == "before_dir_fsync":
        raise InterruptedError
from faultguard.storage import local
local.step_hook = die
try:
    store.create(second, payload(second))  # linked, and its writer dies
except Exception:
    pass
local.step_hook = None
"""

DELETES = """
for number in range(1, 6):
    key = "run/task/w/%09d.json" % number
    assert store.create(key, payload(key))
    ack(key)
    if number > 2:
        old = "run/task/w/%09d.json" % (number - 2)
        ack("gone " + old)
        store.delete(old)
"""

VOLATILE = """
first, second = ["run/task/w/%09d.json" % number for number in (1, 2)]
assert store.create(first, payload(first), durable=False)
ack("seen")
assert store.list("run/") == [first]
assert {again}.create(second, payload(second))
ack(second)
"""

FOLDERS = """
for worker in "wxy":
    first, second = ["run/task/%s/%09d.json" % (worker, number) for number in (1, 2)]
    ack("volatile " + first)
    assert store.create(first, payload(first), durable=False)
    assert store.create(second, payload(second))
    ack(second)
"""

SCRIPTS = {
    "fresh": CREATES,
    "made": MADE_BY_ANOTHER + CREATES,
    "anew": MADE_ANEW,
    "deletes": DELETES,
    "folders": FOLDERS,
}
WAYS = ["tmpfile", "named", "promised"]
KINDS = ["file", "directory", "parent", "parent of parent", "root", "above", "base"]


def script(*parts: str, way: str = "tmpfile") -> str:
    """Put a script together."""
    kind = "ext4" if way == "promised" else "btrfs"  # a local disk that says nothing of the names of what is fsynced
    return PROLOGUE.format(repository=str(REPOSITORY), tmpfile=way != "named", kind=kind) + "".join(parts)


def check(path: Path, acks: list[str]) -> None:
    """Every acknowledged key that was not given up is there, and every key that is there is whole."""
    root = path / "made" / "store"
    keep_promises(root)
    gone = {ack.removeprefix("gone ") for ack in acks if ack.startswith("gone ")}
    for key in acks:
        if key.startswith("run/") and key not in gone:
            assert (root / key).exists(), f"{key} is lost"
    for file in root.rglob("*.json"):
        key = str(file.relative_to(root))
        assert f"volatile {key}" in acks or file.read_bytes() == (key * 100).encode(), f"{key} is torn"


def keep_promises(root: Path) -> None:
    """Look at a store as whoever comes after the crash does."""
    if root.exists():
        LocalStore(str(root)).list("")


def fresh(tmp_path: Path) -> Path:
    """Make another empty root; for the scripts of one test."""
    root = tmp_path / f"{len(list(tmp_path.iterdir()))}"
    root.mkdir()
    return root


@pytest.fixture(autouse=True)
def _strace() -> None:
    require_strace()


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("parts", SCRIPTS.values(), ids=SCRIPTS)
def test_acknowledged_records_survive(tmp_path: Path, parts: str, way: str) -> None:
    """No crash loses an acknowledged record or leaves half of one, whoever made the directories."""
    assert enumerate_crashes(script(parts, way=way), tmp_path, check, names=way == "promised") >= 8


@pytest.mark.parametrize("way", ["tmpfile", "named"])
@pytest.mark.parametrize("kind", KINDS)
def test_every_fsync_is_needed(tmp_path: Path, kind: str, way: str) -> None:
    """Without any one kind of fsync the harness finds a crash that loses or tears a record."""
    parts = f"\nskip({kind!r})\n"
    with pytest.raises(AssertionError, match=r"torn" if kind == "file" else r"lost"):
        enumerate_crashes(script(parts, MADE_BY_ANOTHER, CREATES, way=way), tmp_path, check)


@pytest.mark.parametrize("parts", [CREATES, FOLDERS], ids=["one folder", "a folder each"])
def test_a_promise_needs_its_fsync_and_a_disk_where_that_includes_its_name(tmp_path: Path, parts: str) -> None:
    """Which those that we know do (see `test_power`); the model of any other disk knows no mercy."""
    for names, more in ((True, "\nskip('promise')\n"), (False, "")):
        with pytest.raises(AssertionError, match=r"lost|torn"):
            enumerate_crashes(script(more, parts, way="promised"), fresh(tmp_path), check, names=names)


def test_what_a_kept_promise_has_told_survives(tmp_path: Path) -> None:
    """Also a second crash, in the middle of the first look, or after it."""
    dies = """
first, second = ["run/task/w/%09d.json" % number for number in (1, 2)]
assert store.create(first, payload(first))
local.step_hook = lambda step, key: os._exit(9) if step == "before_link" else None
store.create(second, payload(second))
"""
    root = fresh(tmp_path)
    assert subprocess.run([sys.executable, "-c", script(dies, way="promised"), str(root)], check=False).returncode == 9
    again = """
first, second = ["run/task/w/%09d.json" % number for number in (1, 2)]
assert {told}
ack(second)
"""
    for told in ("store.list('run/') == [first, second]", "store.get(second) == payload(second)", "not store.create(second, b'')"):
        place = fresh(tmp_path)
        shutil.copytree(root, place, dirs_exist_ok=True)
        looks = script(again.format(told=told), way="promised").replace("os.makedirs(root)\n", "")
        for names in (True, False):
            assert enumerate_crashes(looks, place, check, names=names) >= 2


@pytest.mark.parametrize("read", ["store.list('run/')", "store.get(second)", "store.create(second, b'')"], ids=["list", "get", "create"])
def test_what_a_reader_is_told_survives(tmp_path: Path, read: str) -> None:
    """A record whose writer died between link and fsync is made durable before anybody hears that it is there."""
    told = f"\n{read}\nack(second)\n"
    assert enumerate_crashes(script(UNFINISHED, told), fresh(tmp_path), check) >= 8
    with pytest.raises(AssertionError, match="lost"):
        enumerate_crashes(script(UNFINISHED, "\nskip('directory')\n", told), fresh(tmp_path), check)


@pytest.mark.parametrize("again", ["store", "LocalStore(root)"], ids=["the same process", "another one"])
def test_what_need_not_be_durable_takes_nothing_with_it(tmp_path: Path, again: str) -> None:
    """A record that need not survive a crash is gone, or torn, after some; the next one, whoever makes it, is whole after all."""
    states: set[str] = set()

    def looks(path: Path, acks: list[str]) -> None:
        log = path / "made" / "store" / "run" / "task" / "w"
        for name in ("000000001.json", "000000002.json"):
            file, key = log / name, f"run/task/w/{name}"
            whole = file.exists() and file.read_bytes() == (key * 100).encode()
            assert whole or key not in acks, f"{key} is lost"
            assert whole or name.endswith("1.json") or not file.exists(), f"{key} is torn"
            if name.endswith("1.json") and "seen" in acks:
                states.add("whole" if whole else "torn" if file.exists() else "gone")

    assert enumerate_crashes(script(VOLATILE.format(again=again)), fresh(tmp_path), looks) >= 8
    assert states == {"whole", "torn", "gone"}


def test_what_another_one_has_made_beside_it_is_durable_when_it_is_told(tmp_path: Path) -> None:
    """A record of somebody who died before the fsync of the directory, above one that need not be durable."""
    other = """
import subprocess
first, second = ["run/task/w/%09d.json" % number for number in (1, 2)]
assert store.create(first, payload(first), durable=False)
store.list("run/")
def die(step, key):
    if step == "before_dir_fsync":
        raise InterruptedError
from faultguard.storage import local
local.step_hook = die
try:
    LocalStore(root).create(second, payload(second))
except Exception:
    pass
local.step_hook = None
assert store.list("run/") == [first, second]
ack(second)
"""

    def looks(path: Path, acks: list[str]) -> None:
        file = path / "made" / "store" / "run" / "task" / "w" / "000000002.json"
        assert file.exists() or not [ack for ack in acks if ack.startswith("run/")], "the second one is lost"

    assert enumerate_crashes(script(other), fresh(tmp_path), looks) >= 8


def test_what_need_not_be_durable_is_so_where_nodes_may_share_it(tmp_path: Path) -> None:
    """On a file system that may be one of several nodes, one that fails would take the content from the others."""
    first = "key = 'run/task/w/000000001.json'\nassert store.create(key, payload(key), durable=False)\nack(key)\n"
    for way in ("tmpfile", "named"):
        assert enumerate_crashes(script("\nstore._kind = 'nfs4'\n", first, way=way), fresh(tmp_path), check) >= 8
    with pytest.raises(AssertionError, match=r"lost|torn"):
        enumerate_crashes(script(first), fresh(tmp_path), check)


@pytest.mark.parametrize("listing", ["assert second in LocalStore(root).list('run/')", ""], ids=["listed", "not listed"])
def test_a_claim_never_outlives_what_it_points_at(tmp_path: Path, listing: str) -> None:
    """A later record never survives alone a crash that takes the record below it, whose writer died before its fsync."""
    claim = f"""
{listing}
third = "run/task/w/%09d.json" % 3
LocalStore(root).create(third, payload(third))
"""

    def whole(path: Path, acks: list[str]) -> None:
        check(path, acks)
        log = path / "made" / "store" / "run" / "task" / "w"
        assert not (log / "000000003.json").exists() or (log / "000000002.json").exists(), "the claim points at nothing: lost"

    assert enumerate_crashes(script(UNFINISHED, claim), fresh(tmp_path), whole) >= 8
    with pytest.raises(AssertionError, match="points at nothing"):
        enumerate_crashes(script(UNFINISHED, "\nskip('directory')\n", claim), fresh(tmp_path), whole)


def test_the_harness_has_no_mercy_with_the_usual_protocols(tmp_path: Path) -> None:
    """Writing in place and renaming without both fsyncs are found out, so that silence about ours means something."""
    in_place = "\nopen(base + '/a', 'wb').write(b'x' * 600)\n"
    renamed = "\nopen(base + '/b', 'wb').write(b'x' * 600)\nos.rename(base + '/b', base + '/a')\n"
    fsynced = """
with open(base + '/b', 'wb') as file:
    file.write(b'x' * 600)
    file.flush()
    os.fsync(file.fileno())
os.rename(base + '/b', base + '/a')
"""
    durable = f"{fsynced}os.fsync(os.open(base, os.O_RDONLY))\n"
    ack = "ack('a')\n"

    def there(path: Path, acks: list[str]) -> None:
        content = (path / "a").read_bytes() if (path / "a").exists() else b""
        assert not acks or content == b"x" * 600, "a is lost"

    for bad in (in_place, renamed, fsynced):
        with pytest.raises(AssertionError, match="a is lost"):
            enumerate_crashes(script(bad, ack), fresh(tmp_path), there)
    assert enumerate_crashes(script(durable, ack), fresh(tmp_path), there) > 4
