"""Probes of real processes on this node, without a cluster: stopped, traced, gone, or holding something else by now."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import time
from typing import TYPE_CHECKING, Any

import msgspec
import pytest
from msgspec.structs import replace

from faultguard import _marks, _probe, _ray
from faultguard._core.silence import Held, Look, Mark, Verdict, judge
from faultguard._probe import Silent, probe, survey
from faultguard._process import ProcessId, _boot_id, _stat
from tests.tasks import wait_until

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

TIMEOUT_S = 0.3
SETTLE_S = 0.1
MINE = Held("task", "w", 7)
CHILD = """
import ctypes, sys, time
from faultguard import _marks, _ray
from faultguard._core.silence import Held
_ray.session_dir, _ray.is_ready, _ray.node_id = lambda: sys.argv[1], lambda: True, lambda: sys.argv[4]
kind, kill_after_s = sys.argv[2], float(sys.argv[3]) or None
if kind == "traced":
    ctypes.CDLL(None).ptrace(0, 0, 0, 0)  # PTRACE_TRACEME
_marks.write([Held("task", "w", 7)], kill_after_s)
print("marked", flush=True)
while True:
    time.sleep(0.05)
    if kind == "marks":
        _marks.write([Held("task", "w", 7)], kill_after_s)
"""


class Child:
    """A process that holds a worker."""

    def __init__(self, folder: Path, kind: str = "stands", kill_after_s: float = 0.0, node: str = "here") -> None:
        command = [sys.executable, "-c", CHILD, str(folder), kind, str(kill_after_s), node]
        self.popen = subprocess.Popen(command, stdout=subprocess.PIPE)  # ended by the fixture
        assert self.popen.stdout is not None
        assert self.popen.stdout.readline() == b"marked\n"
        stat = _stat(self.popen.pid)
        assert stat is not None
        self.process = ProcessId(_boot_id(), self.popen.pid, int(stat[19]))

    def asked(self, worker: Held = MINE, look: Look | None = None) -> Silent:
        """What a manager would ask about it."""
        return Silent(worker, self.process, look)

    def lives(self) -> bool:
        """Whether it does, and is not stopped."""
        stat = _stat(self.popen.pid)
        return self.popen.poll() is None and stat is not None and stat[0] not in "TtZ"


@pytest.fixture
def children(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Child]]:
    """Those of a test, ended with it; the session directory is a folder of its own."""
    monkeypatch.setattr(_ray, "session_dir", lambda: str(tmp_path))
    monkeypatch.setattr(_ray, "node_id", lambda: "here")
    started: list[Child] = []
    yield started
    for child in started:
        child.popen.kill()
        child.popen.communicate(timeout=10)


def start(children: list[Child], folder: Path, kind: str = "stands", kill_after_s: float = 0.0) -> Child:
    """Start one, and wait until its mark is old."""
    children.append(child := Child(folder, kind, kill_after_s))
    time.sleep(2 * TIMEOUT_S)
    return child


def ask(silent: Silent) -> Verdict:
    """Probe one."""
    (answer,) = probe([silent], TIMEOUT_S, SETTLE_S)
    return answer.verdict


def test_who_marks_its_file_lives(children: list[Child], tmp_path: Path) -> None:
    """Whatever became of its beats."""
    child = start(children, tmp_path, "marks", kill_after_s=0.01)
    assert ask(child.asked()) is Verdict.ALIVE
    assert child.lives()


def test_who_stands_and_runs_is_left_alone(children: list[Child], tmp_path: Path) -> None:
    """Without a `stall_timeout` for ever; and it does not stay stopped."""
    child = start(children, tmp_path)
    assert [ask(child.asked()) for _ in range(3)] == [Verdict.BUSY] * 3
    assert child.lives()


def test_who_is_stopped_is_ended(children: list[Child], tmp_path: Path) -> None:
    """If it was seen so for longer than the timeout: it may have been silent before for a reason of its own."""
    child = start(children, tmp_path)
    child.popen.send_signal(signal.SIGSTOP)
    wait_until(lambda: not child.lives())
    (first,) = probe([child.asked()], TIMEOUT_S, SETTLE_S)
    assert first.verdict is Verdict.STOPPED
    assert child.popen.poll() is None
    time.sleep(TIMEOUT_S)
    (second,) = probe([child.asked(look=first.stood)], TIMEOUT_S, SETTLE_S)
    assert second.verdict is Verdict.KILL_STOPPED
    assert child.popen.wait(10) == -signal.SIGKILL


def test_what_was_stopped_between_two_probes_begins_anew(children: list[Child], tmp_path: Path) -> None:
    """Seen to run, then seen stopped: neither was for long."""
    child = start(children, tmp_path, kill_after_s=60.0)
    (first,) = probe([child.asked()], TIMEOUT_S, SETTLE_S)
    assert first.verdict is Verdict.BUSY
    child.popen.send_signal(signal.SIGSTOP)
    time.sleep(2 * TIMEOUT_S)
    (second,) = probe([child.asked(look=first.stood)], TIMEOUT_S, SETTLE_S)
    assert second.verdict is Verdict.STOPPED
    assert child.popen.poll() is None


def test_who_was_thawed_meanwhile_is_left_alone(children: list[Child], tmp_path: Path) -> None:
    """Its worker may be about to go on; its raylet, which carries the probe, was just a bit faster."""
    child = start(children, tmp_path, "marks", kill_after_s=0.01)
    child.popen.send_signal(signal.SIGSTOP)
    time.sleep(2 * TIMEOUT_S)
    subprocess.Popen(["/bin/sh", "-c", f"sleep 0.1; kill -CONT {child.popen.pid}"]).wait(0.09 + 10)
    assert ask(child.asked()) is Verdict.ALIVE
    assert child.lives()


def test_a_timeout_counts_from_when_it_was_seen_to_run(children: list[Child], tmp_path: Path) -> None:
    """The first probe leaves it alone; one that finds it so for longer than it allows ends it."""
    child = start(children, tmp_path, kill_after_s=0.5)
    (first,) = probe([child.asked()], TIMEOUT_S, SETTLE_S)
    assert first.verdict is Verdict.BUSY
    time.sleep(0.6)
    (second,) = probe([child.asked(look=first.stood)], TIMEOUT_S, SETTLE_S)
    assert second.verdict is Verdict.KILL_STALLED
    assert child.popen.wait(10) == -signal.SIGKILL


@pytest.mark.parametrize("was_stopped", [False, True])
def test_a_sign_of_life_at_the_last_moment(
    was_stopped: bool, children: list[Child], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It marked its file after the last look, and before it was stopped for the end: it goes on."""
    child = start(children, tmp_path, kill_after_s=0.01)
    if was_stopped:
        child.popen.send_signal(signal.SIGSTOP)
        wait_until(lambda: not child.lives())
    (first,) = probe([child.asked()], 60.0, SETTLE_S)
    path = tmp_path / "faultguard" / f"{child.process.pid}-{child.process.start_time}.json"

    def judge_late(*arguments: Any) -> Verdict:
        verdict = judge(*arguments)
        mark = _marks.read(child.process)
        assert mark is not None
        path.write_bytes(msgspec.json.encode(replace(mark, stamp=mark.stamp + 0.01)))
        return verdict

    monkeypatch.setattr(_probe, "judge", judge_late)
    time.sleep(TIMEOUT_S)
    look = _probe._look(child.process)
    stood = Look(look.now - 2 * TIMEOUT_S, exists=True, stopped=look.stopped, mark=look.mark)
    assert first.verdict is Verdict.ALIVE
    assert ask(child.asked(look=stood)) is Verdict.ALIVE
    assert child.lives()


def test_another_worker_by_now(children: list[Child], tmp_path: Path) -> None:
    """The process went on to other work, and was stopped there: that is not ours to end."""
    child = start(children, tmp_path)
    child.popen.send_signal(signal.SIGSTOP)
    assert ask(child.asked(Held("task", "w", 6))) is Verdict.GONE
    assert child.popen.poll() is None


def test_a_process_that_has_said_so_and_says_nothing_more_holds_nobody(children: list[Child], tmp_path: Path) -> None:
    """Of one whose file nobody has seen nothing is known: it may not be able to write one."""
    child = start(children, tmp_path)
    (tmp_path / "faultguard" / f"{child.process.pid}-{child.process.start_time}.json").unlink()
    assert ask(child.asked()) is Verdict.UNKNOWN
    assert ask(Silent(MINE, child.process, marked=True)) is Verdict.GONE
    assert child.lives()


def test_another_process_by_now(children: list[Child], tmp_path: Path) -> None:
    """A pid is used again; a start time is not. Nor is anything known about another host."""
    child = start(children, tmp_path)
    child.popen.send_signal(signal.SIGSTOP)
    other = ProcessId(child.process.boot_id, child.process.pid, child.process.start_time - 1)
    assert ask(Silent(MINE, other)) is Verdict.GONE
    assert ask(Silent(MINE, ProcessId("elsewhere", child.process.pid, child.process.start_time))) is Verdict.UNKNOWN
    assert child.popen.poll() is None


def test_without_a_file_nothing_is_known(children: list[Child], tmp_path: Path) -> None:
    """And nothing is done."""
    child = start(children, tmp_path)
    for path in (tmp_path / "faultguard").iterdir():
        path.unlink()
    child.popen.send_signal(signal.SIGSTOP)
    assert ask(child.asked()) is Verdict.UNKNOWN
    assert child.popen.poll() is None


def test_a_debugger_may_stop_what_it_likes(children: list[Child], tmp_path: Path) -> None:
    """The test is one, in the eyes of the kernel."""
    child = start(children, tmp_path, "traced", kill_after_s=0.01)
    child.popen.send_signal(signal.SIGSTOP)
    os.waitpid(child.popen.pid, os.WUNTRACED)
    assert ask(child.asked()) is Verdict.TRACED
    assert child.popen.poll() is None
    ctypes.CDLL(None).ptrace(17, child.popen.pid, 0, 0)  # PTRACE_DETACH


def test_a_process_that_dies_takes_its_file_with_it(children: list[Child], tmp_path: Path) -> None:
    """The next one that marks there removes it."""
    child = start(children, tmp_path)
    child.popen.kill()
    child.popen.wait(10)
    assert ask(child.asked()) is Verdict.GONE
    left = tmp_path / "faultguard" / f"{child.process.pid}-{child.process.start_time}.json"
    assert left.exists()
    _marks._folder = None
    start(children, tmp_path)
    assert not left.exists()


def test_a_node_tells_whom_it_holds_itself(children: list[Child], tmp_path: Path) -> None:
    """Several nodes on one host share a folder: asked under another one, a worker would be gone for good when that one goes."""
    mine = start(children, tmp_path)
    children.append(Child(tmp_path, node="elsewhere"))
    assert survey("") == [(mine.process, MINE)]


def test_frozen_for_longer_than_its_timeout_is_no_stall() -> None:
    """What counts is how long it was seen to run, not how old its mark is."""
    mark = Mark("boot", 100.0, (MINE,), kill_after_s=2.0)
    thawed = Look(500.0, exists=True, mark=mark)
    assert judge(MINE, thawed, Look(501.0, exists=True, mark=mark), 60.0) is Verdict.BUSY
    assert judge(MINE, thawed, Look(503.0, exists=True, mark=mark), 60.0) is Verdict.KILL_STALLED
    assert judge(MINE, Look(500.0, exists=True, stopped=True, mark=mark), Look(503.0, exists=True, mark=mark), 60.0) is Verdict.BUSY


def test_stopped_for_less_than_the_timeout_is_no_end() -> None:
    """However long it was silent before: nodes are thawed process by process, and a long C call may be stopped for a moment."""
    mark = Mark("boot", 100.0, (MINE,), kill_after_s=2.0)

    def stopped(now: float) -> Look:
        return Look(now, exists=True, stopped=True, mark=mark)

    assert judge(MINE, stopped(500.0), stopped(559.0), 60.0) is Verdict.STOPPED
    assert judge(MINE, stopped(500.0), stopped(561.0), 60.0) is Verdict.KILL_STOPPED


@pytest.mark.parametrize("kill_after_s", [None, 2.0])
def test_who_hosts_others_is_never_ended(kill_after_s: float | None) -> None:
    """Nor a driver: nothing would replace it, however long it is stopped, and others would be lost with it."""
    mark = Mark("boot", 100.0, (MINE,), kill_after_s, hosts_others=True)

    def look(now: float, *, stopped: bool) -> Look:
        return Look(now, exists=True, stopped=stopped, mark=mark)

    for until in (501.0, 561.0, 10_000.0):
        assert judge(MINE, look(500.0, stopped=True), look(until, stopped=True), 60.0) is Verdict.LEFT_STOPPED
        assert judge(MINE, look(500.0, stopped=False), look(until, stopped=True), 60.0) is Verdict.LEFT_STOPPED
        assert judge(MINE, look(500.0, stopped=False), look(until, stopped=False), 60.0) is Verdict.BUSY
    assert not Verdict.LEFT_STOPPED.kills
