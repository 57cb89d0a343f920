"""The power fails while a task works, on a real file system: what is found afterwards."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest import mock

import pytest

import faultguard
from faultguard import _attempt, _ray
from faultguard._log import StoredLog
from faultguard._settings import Settings
from faultguard.errors import CheckpointStoreError
from faultguard.storage import leftovers, local, open_store, store_id
from faultguard.storage.local import LocalStore
from tests.disks import FILE_SYSTEMS, loop_disk, small_disk

if TYPE_CHECKING:
    import contextlib
    from collections.abc import Callable, Iterator

    from tests.disks import LoopDisk

REPOSITORY = Path(faultguard.__file__).parent.parent
BOUND_S = 60

# A task of the first driver: it says where it is, and works on until the power fails.
BODY = """
import json, sys
sys.path.insert(0, {repository!r})
from tests.test_power import execute, settings_of

def body():
    import faultguard
    ckpt = faultguard.current()
    asked = sys.argv[2]
    if asked == "save":
        for batch in ckpt.batches(range(2)):
            if batch:
                break
            ckpt.state["done"] = 1
            ckpt.advance(wait=True)
    print(json.dumps({{"token": ckpt.token if asked == "token" else None}}), flush=True)
    sys.stdin.read()

execute(settings_of(sys.argv[1], epoch=1), body)
"""


def settings_of(store: str, epoch: int) -> Settings:
    """Those of a driver of a named run."""
    identity = store_id(open_store(store))
    return Settings(run="power", checkpoint_dir=store, store_id=identity, job_id="01000000", instance=1, epoch=epoch)


def execute(settings: Settings, function: Any, *, attempt: int = 0, **options: Any) -> Any:
    """Run a function as a task of that driver."""
    identity = _ray.Identity("01000000", "node", f"task-{settings.epoch}", attempt, "work", "work")
    given = _attempt.TaskOptions(name="work", every=1, **options)
    return _attempt.run_task(settings, identity, given, "w", _attempt.Work(function, repeatable=True))


@pytest.fixture(params=list(FILE_SYSTEMS))
def disk(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[LoopDisk]:
    """A disk of its own, of each kind."""
    with loop_disk(tmp_path / "disk", request.param) as made:
        yield made


def power_fails(disk: LoopDisk, store: str, asked: str) -> dict[str, Any]:
    """Let a task begin, ask that of its handle, and meet the end of the power; what it had been told."""
    script = BODY.format(repository=str(REPOSITORY))
    with subprocess.Popen([sys.executable, "-c", script, store, asked], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as driver:
        try:
            assert driver.stdout is not None
            told: dict[str, Any] = json.loads(driver.stdout.readline())
        finally:
            driver.kill()
            driver.wait(BOUND_S)
    disk.power_fails()
    return told


@pytest.mark.parametrize("asked", ["nothing", "token", "save"])
def test_the_next_driver_goes_on_after_a_power_failure(disk: LoopDisk, asked: str) -> None:
    """What was not recorded yet is as if it had not begun; what somebody was told is there: no token is given twice."""
    store = str(disk.path / "store")
    settings_of(store, epoch=1)
    told = power_fails(disk, store, asked)
    settings = settings_of(store, epoch=2)
    head = StoredLog(open_store(store), settings.log_prefix("work", "w")).newest()
    assert (head is not None) == (asked != "nothing")
    seen: list[Any] = []

    def body() -> str:
        ckpt = faultguard.current()
        seen.append((ckpt.attempt, ckpt.state.get("done", 0), ckpt.token % 10**9))
        return "result"

    assert execute(settings, body) == "result"
    assert execute(settings, lambda: pytest.fail("it is completed")) == "result"
    ((attempt, done, token),) = seen
    assert attempt == (1 if asked == "nothing" else 2)
    assert done == (asked == "save")
    assert token > (told["token"] or 0) % 10**9


@pytest.mark.parametrize(("kind", "mended"), [*((kind, True) for kind in FILE_SYSTEMS), ("ext4 without a journal", False)])
@pytest.mark.parametrize("volatile", [False, True], ids=["durable", "after one that need not be"])
def test_what_is_acknowledged_is_on_the_disk(tmp_path: Path, kind: str, *, mended: bool, volatile: bool) -> None:
    """The power fails right after each record, in folders that were just made, and all that were acknowledged are there."""
    keys = [f"run/task/w{worker}/{number:09d}.json" for worker in range(7) for number in (1, 2, 3)]
    need_not = {key for key in keys if volatile and key.endswith("1.json")}
    with loop_disk(tmp_path / "disk", kind) as disk:
        store = store_on(disk)
        images: list[Path] = []
        for key in keys:
            assert store.create(key, content_of(key), durable=key not in need_not)
            images.append(disk.held(f"{len(images)}"))
        lost = []
        for count, image in enumerate(images, start=1):
            with disk.found(image, mended=mended) as place:
                lost += [key for key in keys[:count] if key not in need_not and not is_whole(place / "store", key)]
    assert lost == []


@pytest.mark.parametrize("kind", list(FILE_SYSTEMS))
@pytest.mark.parametrize("step", ["before_link", "after_link", "before_dir_fsync"])
def test_in_the_middle_of_a_record_the_power_leaves_it_or_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, step: str
) -> None:
    """And all that were acknowledged before it, in the same folder and in those before."""
    keys = [f"run/task/w{worker}/{number:09d}.json" for worker in range(4) for number in (1, 2, 3)]
    with loop_disk(tmp_path / "disk", kind) as disk:
        store = store_on(disk)
        images: list[Path] = []
        monkeypatch.setattr(local, "step_hook", lambda name, key: images.append(disk.held(f"{len(images)}")) if name == step else None)
        for key in keys:
            assert store.create(key, content_of(key))
        monkeypatch.setattr(local, "step_hook", None)
        for count, image in enumerate(images):
            with disk.found(image) as place:
                assert [key for key in keys[:count] if not is_whole(place / "store", key)] == []
                with another_boot():
                    found = LocalStore(str(place / "store"))
                    assert found.get(keys[count]) in {None, content_of(keys[count])}
                    assert set(found.list("run/")) <= set(keys[: count + 1])
    assert len(images) == len(keys)


@pytest.mark.parametrize("kind", list(FILE_SYSTEMS))
@pytest.mark.parametrize("told", ["list", "get", "create"])
def test_what_a_reader_is_told_is_on_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, told: str) -> None:
    """Its writer, which has made the folder, dies between the link and the fsync of the folder."""

    def dies(step: str, key: str) -> None:
        if step == "before_dir_fsync":
            raise InterruptedError

    keys = [f"run/task/w{worker}/000000001.json" for worker in range(10)]
    with loop_disk(tmp_path / "disk", kind) as disk:
        store = store_on(disk)
        store.create("run/task/first/000000001.json", b"the folders above are durable")
        reader = LocalStore(store.url)
        tell: Callable[[str], bool] = {
            "list": lambda key: reader.list(key.removesuffix("000000001.json")) == [key],
            "get": lambda key: reader.get(key) == content_of(key),
            "create": lambda key: reader.create(key, b"another one") is False,
        }[told]
        images: list[Path] = []
        for key in keys:
            monkeypatch.setattr(local, "step_hook", dies)
            with pytest.raises(CheckpointStoreError):
                store.create(key, content_of(key))
            monkeypatch.setattr(local, "step_hook", None)
            assert tell(key)
            images.append(disk.held(f"{len(images)}"))
        lost = []
        for count, image in enumerate(images, start=1):
            with disk.found(image) as place:
                lost += [key for key in keys[:count] if not is_whole(place / "store", key)]
    assert lost == []


def test_what_makes_a_folder_grow_is_synced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a journal the blocks of a folder that has more than one reach the disk in any order."""
    synced: list[str] = []
    fsync = os.fsync

    def noted(descriptor: int) -> None:
        synced.append(Path(f"/proc/self/fd/{descriptor}").readlink().name)
        fsync(descriptor)

    with loop_disk(tmp_path / "disk", "ext4 without a journal") as disk:
        store, folder = store_on(disk), disk.path / "store/run/task/w"
        monkeypatch.setattr(os, "fsync", noted)
        alone = 0
        for number in range(1, 200):
            synced.clear()
            assert store.create(f"run/task/w/{number:09d}.json", b"x")
            found = folder.stat()
            if found.st_size > found.st_blksize:
                assert synced[-1] == "w"
            elif number > 1:
                assert len(synced) == 1
                alone = number
        assert 1 < alone < number


def test_what_could_not_be_written_is_not_shown(tmp_path: Path) -> None:
    """The kernel has it in memory, and says that it is written, after an fsync that failed; its writer was killed then."""
    script = f"""
import os, sys
sys.path.insert(0, {str(REPOSITORY)!r})
from faultguard.storage.local import LocalStore
store, fsync = LocalStore(sys.argv[1]), os.fsync
for number in (1, 2):
    assert store.create("run/task/w/%09d.json" % number, b"x" * 5000)
os.sync()
with open(sys.argv[2], "wb", buffering=0) as ballast:
    try:
        while True:
            ballast.write(bytes(4096))
    except OSError:
        pass

def dies(fd):
    try:
        fsync(fd)
    except OSError:
        os._exit(9)

os.fsync = dies
store.create("run/task/w/%09d.json" % 3, b"x" * 3_000_000)
"""
    with small_disk(tmp_path / "memory", "24m") as memory, loop_disk(memory.path / "disk", "ext4 without a journal") as disk:
        store = store_on(disk)
        ballast = memory.path / "ballast"
        done = subprocess.run([sys.executable, "-c", script, store.url, str(ballast)], timeout=BOUND_S, check=False)
        assert done.returncode == 9
        assert [path for path in (disk.path / "store/run/task/w").iterdir() if "000000003" in path.name]
        ballast.unlink()
        for _ in range(2):
            assert store.list("run/") == ["run/task/w/000000001.json", "run/task/w/000000002.json"]
            assert store.get("run/task/w/000000003.json") is None


@pytest.mark.parametrize("kind", [kind for kind in FILE_SYSTEMS if "inodes" not in kind])
def test_the_folder_above_is_synced_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    """What is in a new folder takes its name along, so those that come after it in the same process spare that."""
    synced: list[str] = []
    fsync = os.fsync

    def noted(descriptor: int) -> None:
        synced.append(Path(f"/proc/self/fd/{descriptor}").readlink().name)
        fsync(descriptor)

    with loop_disk(tmp_path / "disk", kind) as disk:
        store = store_on(disk)
        monkeypatch.setattr(os, "fsync", noted)
        for worker in range(10):
            store.create(f"run/task/w{worker}/000000001.json", b"x")
    assert synced.count("task") == 1


def store_on(disk: LoopDisk) -> LocalStore:
    """A new store."""
    root = disk.path / "store"
    root.mkdir()
    store = LocalStore.open(str(root), create=True)
    store_id(store)
    return store


def content_of(key: str) -> bytes:
    """Of the record with that key."""
    return key.encode() * 50


def is_whole(root: Path, key: str) -> bool:
    """Whether a record is there, with its content, for who looks."""
    with another_boot():
        return LocalStore(str(root)).get(key) == content_of(key)


def another_boot() -> contextlib.AbstractContextManager[object]:
    """This process is none of those that were there before the power failed."""
    return mock.patch.object(leftovers, "host", return_value=f"{'0' * 32}-0")


@pytest.mark.parametrize(
    ("attempt", "options", "durable"),
    [(0, {}, [False, True]), (1, {}, [True, True]), (0, {"stall_timeout_s": 9.0}, [True, True])],
    ids=["first", "of a task that Ray runs again", "with a timeout"],
)
def test_whose_claim_need_not_be_durable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, attempt: int, options: dict[str, Any], durable: list[bool]
) -> None:
    """That of the first attempt of a task, which nobody but itself has to end."""
    made: list[bool] = []
    create = LocalStore.create

    def note(self: LocalStore, key: str, data: bytes, *, durable: bool = True) -> bool:
        made.append(durable)
        return create(self, key, data, durable=durable)

    settings = settings_of(str(tmp_path / "store"), epoch=1)
    monkeypatch.setattr(LocalStore, "create", note)
    assert execute(settings, lambda: "result", attempt=attempt, **options) == "result"
    assert made == durable
