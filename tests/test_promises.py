"""A record that was promised is there for whoever looks, once; and nothing else comes of a promise."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

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
    """And finds the record; the promise goes, at the latest with the next listing."""
    assert look(LocalStore(str(root)))
    assert LocalStore(str(root)).list("") == [ONE, TWO]
    assert LocalStore(str(root)).get(TWO) == b"promised"
    assert hidden(root) == []


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


def test_a_living_writer_is_left_to_finish(tmp_path: Path) -> None:
    """What it has not written yet is not removed."""
    log = tmp_path / "run/task/w"
    log.mkdir(parents=True)
    (log / leftovers.promise_name("000000001.json", b"whole")).write_bytes(b"wh")
    assert LocalStore(str(tmp_path)).list("") == []
    assert len(hidden(tmp_path)) == 1


def test_nothing_is_put_below_a_higher_number(root: Path) -> None:
    """Who made that one has seen what was acknowledged; this one was not, or has been deleted since."""
    (root / THREE).write_bytes(b"higher")
    assert LocalStore(str(root)).get(TWO) is None
    assert LocalStore(str(root)).list("") == [ONE, THREE]
    assert hidden(root) == []


def test_of_two_promises_the_lower_one_is_kept_first(root: Path) -> None:
    """A writer may have promised the next one before the power failed, and the link of the first one was not on the disk."""
    second = hidden(root)[0]
    assert promise_and_die(root, THREE, FOUR) == 9  # its first look links `TWO`
    log = root / "run/task/w"
    for third in ("000000002.json", "000000003.json"):
        data = (log / third).read_bytes()
        (log / third).unlink()
        (log / leftovers.promise_name(third, data)).write_bytes(data)
    assert second not in hidden(root)
    assert LocalStore(str(root)).list("") == [ONE, TWO, THREE, FOUR]
    assert hidden(root) == []


@pytest.mark.parametrize("looked", [True, False])
def test_what_is_deleted_stays_so(root: Path, *, looked: bool) -> None:
    """A promise is withdrawn with its record, whoever deletes it."""
    if looked:
        assert LocalStore(str(root)).get(TWO) == b"promised"  # and the promise is still there
        assert len(hidden(root)) == 1
    LocalStore(str(root)).delete(TWO)
    assert LocalStore(str(root)).list("") == [ONE]
    LocalStore(str(root)).delete(ONE)
    assert list(root.iterdir()) == []


def test_the_next_record_makes_the_promise_superfluous(tmp_path: Path) -> None:
    """One promise at most is left by each writer, and none after a listing by another process."""
    store = LocalStore(str(tmp_path))
    for key in (ONE, TWO, THREE):
        assert store.create(key, b"x")
    (name,) = hidden(tmp_path)
    assert "-000000003.json-" in name
    LocalStore(str(tmp_path)).list("")
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
    mine, other = LocalStore(str(tmp_path)), LocalStore(str(tmp_path))
    assert mine.create(ONE, b"below")
    assert meanwhile(monkeypatch, mine, lambda: happens(other)) == answer
    assert other.get(TWO) == (b"mine" if answer is True else None)


def test_who_loses_leaves_no_promise(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another record has the name: the promise goes, and may have been removed already, by whoever saw that."""
    mine, other = LocalStore(str(tmp_path)), LocalStore(str(tmp_path))
    assert mine.create(ONE, b"below")

    def faster() -> None:
        (tmp_path / TWO).write_bytes(b"theirs")

    assert meanwhile(monkeypatch, mine, faster) is False
    assert not [name for name in hidden(tmp_path) if "-000000002.json-" in name]
    other.delete(TWO)

    def faster_and_seen() -> None:
        faster()
        other.list("")

    assert meanwhile(monkeypatch, mine, faster_and_seen) is False
    assert other.get(TWO) == b"theirs"


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


def test_who_may_not_write_is_told_rather_than_shown_less(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The record is acknowledged, and cannot be linked: that is an error, not an older log."""

    def refuses(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    with monkeypatch.context() as patch:
        patch.setattr(os, "link", refuses)
        store = LocalStore(str(root))
        looks: list[Callable[[], object]] = [lambda: store.list(""), lambda: store.get(TWO)]
        for look in looks:
            with pytest.raises(CheckpointStoreError, match="Permission denied"):
                look()
    assert LocalStore(str(root)).list("") == [ONE, TWO]


KILLED = """
import json, os, sys
from faultguard.storage import local
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
        allowed = [list(range(1, count + 1)), list(range(1, count + 2)), [2, 3]]
        assert found in allowed, (calls, told, found)
        with contextlib.suppress(FileNotFoundError):
            assert hidden(root) == []
    else:
        pytest.fail("it never came to its end")
