"""Whether a process is there: said only when it is sure."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from faultguard import _process
from faultguard._process import ProcessId, is_dead, new_writer, this_process

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs the /proc of Linux")
BOUND_S = 10.0


@dataclasses.dataclass
class Child:
    """A process that waits for its end, and who it is."""

    popen: subprocess.Popen[bytes]
    identity: ProcessId

    def is_zombie(self) -> bool:
        """Whether it has ended, and nobody has asked for its exit code."""
        stat = Path(f"/proc/{self.popen.pid}/stat").read_text(encoding="utf-8")
        return stat.rpartition(")")[2].split()[0] == "Z"


@pytest.fixture
def child() -> Iterator[Child]:
    """A living child, which waits for its input."""
    with subprocess.Popen(["cat"], stdin=subprocess.PIPE) as popen:
        yield Child(popen, _process._process.__wrapped__(popen.pid))  # as it would say itself
        popen.kill()


def test_this_process_is_this_one() -> None:
    """It has our pid, a start time and a boot, and is the same at every call."""
    identity = this_process()
    assert identity == this_process()
    assert identity.pid == os.getpid()
    assert identity.start_time > 0
    assert identity.boot_id
    assert is_dead(identity) is False


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")  # from Python 3.12 on; the child does little
def test_a_forked_child_has_an_identity_of_its_own() -> None:
    """What was remembered before a fork is not what the child says."""
    before = this_process()
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:  # pragma: no cover - in the child
        os.write(writing, str(this_process().pid).encode())
        os._exit(0)
    os.waitpid(pid, 0)
    assert os.read(reading, 100).decode() == str(pid)
    os.close(reading)
    os.close(writing)
    assert this_process() == before


def test_a_living_child_is_alive(child: Child) -> None:
    """Another process on this host that runs is not dead."""
    assert child.identity.pid == child.popen.pid
    assert is_dead(child.identity) is False


def test_a_dead_child_is_dead(child: Child) -> None:
    """After its end, and after its exit code was fetched, it is gone."""
    child.popen.kill()
    child.popen.wait(BOUND_S)
    assert is_dead(child.identity) is True


def test_a_zombie_is_dead(child: Child) -> None:
    """A process that was killed writes nothing more, even while its parent has not noticed."""
    child.popen.kill()
    deadline = time.monotonic() + BOUND_S
    while not child.is_zombie():
        assert time.monotonic() < deadline, "it did not die"
        time.sleep(0.002)
    assert is_dead(child.identity) is True


def test_a_reused_pid_is_another_process(child: Child) -> None:
    """A living process with the pid, but not the start time, is a successor: the one meant is dead."""
    earlier = dataclasses.replace(child.identity, start_time=child.identity.start_time - 1)
    assert is_dead(earlier) is True


@pytest.mark.parametrize("boot_id", ["", "00000000-0000-0000-0000-000000000000:1"])
def test_another_boot_cannot_be_judged(child: Child, boot_id: str) -> None:
    """Another host, container or boot, or a system that does not tell, gives None, not a guess."""
    assert is_dead(dataclasses.replace(child.identity, boot_id=boot_id)) is None
    assert is_dead(ProcessId(boot_id, 4_000_000, 1)) is None


def test_another_pid_namespace_cannot_be_judged(child: Child) -> None:
    """The same host with other pids, as in another container, gives None."""
    boot, _, namespace = child.identity.boot_id.rpartition(":")
    assert is_dead(dataclasses.replace(child.identity, boot_id=f"{boot}:{int(namespace) + 1}")) is None


def test_a_system_without_proc_cannot_judge(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the boot cannot be read, no process is called dead."""
    monkeypatch.setattr(_process, "_boot_id", lambda: "")
    assert is_dead(ProcessId("", 4_000_000, 1)) is None
    assert is_dead(ProcessId("boot:1", 4_000_000, 1)) is None


def test_a_name_with_spaces_and_parentheses_is_read(tmp_path: Path) -> None:
    """The name of a program comes before the numbers in /proc, and may hold anything."""
    odd = tmp_path / "a) R 1 (b"
    odd.symlink_to("/bin/sleep")
    with subprocess.Popen([str(odd), "60"]) as popen:
        stat = _process._stat(popen.pid)
        assert stat is not None
        identity = ProcessId(this_process().boot_id, popen.pid, int(stat[19]))
        assert is_dead(identity) is False
        popen.kill()


def test_writers_have_names_of_their_own() -> None:
    """Two of one process, and those of a process and its forked child."""
    mine = {new_writer() for _ in range(100)}
    read, write = os.pipe()
    child = os.fork()
    if not child:
        os.write(write, "".join(new_writer() for _ in range(100)).encode())
        os._exit(0)
    os.waitpid(child, 0)
    text = os.read(read, 100 * 32).decode()
    theirs = {text[start : start + 32] for start in range(0, len(text), 32)}
    assert len(mine | theirs) == 200
    assert {len(name) for name in mine} == {32}
