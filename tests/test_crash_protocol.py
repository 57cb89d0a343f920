"""Claim, save, retention and end as they are written: whatever a crash leaves of them loads, whole, and no older than acknowledged."""

from __future__ import annotations

from pathlib import Path

import pytest

import faultguard
from faultguard._core import log as rules
from faultguard._core.names import record_number
from faultguard._core.records import decode_record
from faultguard._log import StoredLog
from faultguard.storage.local import LocalStore
from tests.crash_enumeration import enumerate_crashes
from tests.needs import require_strace

REPOSITORY = Path(faultguard.__file__).parent.parent

# Two attempts of one task. The first one saves, cleans up, fails and goes on, and dies; the second one ends the work.
SCRIPT = """
import os, stat, sys
sys.path.insert(0, {repository!r})
import msgspec
from faultguard._core import log as rules
from faultguard._core.records import FailureRecord, Mark, Outcome, Owner, Snapshot
from faultguard._log import StoredLog
from faultguard.storage import local
from faultguard.storage.local import LocalStore

local._file_system = lambda path: {kind!r}

def ack(text):
    print("ACK " + text, flush=True)

def skip(kind, fsync=os.fsync):
    def partial(fd):
        directory = stat.S_ISDIR(os.fstat(fd).st_mode)
        inner = os.path.basename(os.readlink("/proc/self/fd/%d" % fd)) == "w"
        if kind != ("file" if not directory else "directory" if inner else "parent"):
            fsync(fd)
    os.fsync = partial

{extra}
root = sys.argv[1] + "/store"
os.mkdir(root)
log = StoredLog(LocalStore(root), "run/task/w/")

def snapshot(batch):
    state = msgspec.json.encode({{"sum": sum(range(batch))}})
    return Snapshot(msgspec.Raw(state), ((Mark("batches", batch),),))

def claim(attempt):
    owner = Owner(writer=str(attempt), task_id="t", ray_attempt=attempt)
    granted = log.run(rules.claim(rules.Claimant(owner, "task", "w", 5, volatile={volatile}), 0.0))
    if not granted.held.volatile:  # else nobody is told the token
        ack("claim %d" % granted.held.token)
    return granted.held

def save(held, batch):
    assert log.run(rules.save(held, snapshot(batch), 0.0))
    ack("batch %d" % batch)
    log.run(rules.retain(held, 2))

held = claim(0)
ack("begun")
for batch in range(1, 4):
    save(held, batch)
assert log.run(rules.retry_record(held, snapshot(4), FailureRecord("exception", 1, 4), 0.0))
ack("batch 4")
save(held, 5)
held = claim(1)
save(held, 6)
save(held, 7)
save(held, 8)
assert log.run(rules.save(held, snapshot(9), 0.0, outcome=Outcome("completed")))
ack("batch 9")
ack("end")
"""


def script(*, extra: str = "", volatile: bool = False, promised: bool = False) -> str:
    """The script, with more in it."""
    kind = "ext4" if promised else "btrfs"  # a local disk that says nothing of the names of what is fsynced
    return SCRIPT.format(repository=str(REPOSITORY), extra=extra, volatile=volatile, kind=kind)


def check(path: Path, acks: list[str], *, volatile: bool = False) -> None:
    """What is left of the log says where to go on."""
    root = path / "store"
    if not root.exists():
        assert set(acks) <= {"begun"}, "the store is lost"
        return
    log = StoredLog(LocalStore(str(root)), "run/task/w/")
    log.store.list(log.prefix)  # which keeps what was promised
    folder = root / "run" / "task" / "w"
    for file in folder.glob("*.json") if folder.exists() else []:
        name = record_number(file.name) or 0
        assert decode_record(file.read_bytes(), name) is not None or (volatile and name == 1), f"{file.name} is torn"
    numbers = [number for key in log.store.list(log.prefix) if (number := record_number(key.rpartition("/")[2]))]
    loaded = log.run(rules.load(numbers))
    tokens = [int(ack.split()[1]) for ack in acks if ack.startswith("claim")]
    batches = [int(ack.split()[1]) for ack in acks if ack.startswith("batch")]
    assert not tokens or (loaded.head is not None and loaded.head.number >= max(tokens)), "a granted claim is lost"
    found = loaded.snapshot.batch if loaded.snapshot is not None else 0
    assert found >= max(batches, default=0), f"batch {max(batches)} is lost, batch {found} is there"
    assert loaded.snapshot is None or bytes(loaded.snapshot.state) == b'{"sum":%d}' % sum(range(found)), "the state is another one"
    assert "end" not in acks or (loaded.head is not None and loaded.head.kind == "end"), "the end is lost"


@pytest.fixture(autouse=True)
def _strace() -> None:
    require_strace()


@pytest.mark.parametrize("promised", [False, True], ids=["synced", "promised"])
def test_every_crash_leaves_a_log_that_loads(tmp_path: Path, *, promised: bool) -> None:
    """After a crash at any system call, the newest acknowledged batch, claim or end is what the next attempt finds."""
    assert enumerate_crashes(script(promised=promised), tmp_path, check, names=promised) >= 30


@pytest.mark.parametrize("promised", [False, True], ids=["synced", "promised"])
def test_a_crash_may_take_a_claim_that_nobody_built_upon(tmp_path: Path, *, promised: bool) -> None:
    """Where the first claim is volatile it may be torn, or gone; what is acknowledged after it never is, and it always loads."""
    states: set[str] = set()

    def looks(path: Path, acks: list[str]) -> None:
        check(path, acks, volatile=True)
        claim = path / "store" / "run" / "task" / "w" / "000000001.json"
        if "begun" in acks:
            whole = claim.exists() and decode_record(claim.read_bytes(), 1) is not None
            states.add("whole" if whole else "torn" if claim.exists() else "gone")

    assert enumerate_crashes(script(volatile=True, promised=promised), tmp_path, looks, names=promised) >= 30
    assert states == {"whole", "torn", "gone"}


@pytest.mark.parametrize(("kind", "found"), [("file", "torn"), ("directory", "lost"), ("parent", "lost")])
def test_no_fsync_is_superfluous(tmp_path: Path, kind: str, found: str) -> None:
    """Without any one kind of fsync there is a crash after which the log is torn, or older than acknowledged."""
    with pytest.raises(AssertionError, match=found):
        enumerate_crashes(script(extra=f"skip({kind!r})"), tmp_path, check)
