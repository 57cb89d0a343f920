"""The power fails while a task works, on a real file system: what is found afterwards."""

from __future__ import annotations

import fcntl
import json
import os
import signal
import struct
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

import faultguard
from faultguard import _attempt, _ray
from faultguard._log import StoredLog
from faultguard._settings import Settings
from faultguard.storage import open_store, store_id
from faultguard.storage.local import LocalStore
from tests.disks import loop_disk

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.disks import LoopDisk

REPOSITORY = Path(faultguard.__file__).parent.parent
BOUND_S = 60
SHUTDOWN, NO_FLUSH = 0x8004587D, 2  # EXT4_IOC_SHUTDOWN: nothing reaches the disk any more

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


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[LoopDisk]:
    """A disk of its own."""
    with loop_disk(tmp_path / "disk") as made:
        yield made


def power_fails(disk: LoopDisk, store: str, asked: str) -> dict[str, Any]:
    """Let a task begin, ask that of its handle, and meet the end of the power; what it had been told."""
    script = BODY.format(repository=str(REPOSITORY))
    with subprocess.Popen([sys.executable, "-c", script, store, asked], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as driver:
        try:
            assert driver.stdout is not None
            told: dict[str, Any] = json.loads(driver.stdout.readline())
            descriptor = os.open(disk.path, os.O_RDONLY)
            try:
                fcntl.ioctl(descriptor, SHUTDOWN, struct.pack("I", NO_FLUSH))
            finally:
                os.close(descriptor)
        finally:
            driver.send_signal(signal.SIGKILL)
            driver.wait(BOUND_S)
    disk.mount_again()
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
