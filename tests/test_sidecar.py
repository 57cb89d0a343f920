"""One thread for all workers of a process, which leaves nothing behind."""

from __future__ import annotations

import math
import os
import threading
import time
from typing import TYPE_CHECKING

import pytest

from faultguard import _sidecar
from faultguard._sidecar import Sidecar

if TYPE_CHECKING:
    from collections.abc import Callable

BOUND_S = 10.0


def wait_until(condition: Callable[[], bool]) -> None:
    """Wait for a condition, not for ever."""
    deadline = time.monotonic() + BOUND_S
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.002)


class Recorder:
    """Work that notes for whom it was called, and says when it is due again."""

    def __init__(self, due_in_s: float = math.inf) -> None:
        self.calls: list[list[str]] = []
        self.threads: set[int] = set()
        self.errors: list[str] = []
        self.fail = False
        self.due_in_s = due_in_s

    def work(self, clients: list[str]) -> float:
        """The work of the thread."""
        self.calls.append(list(clients))
        self.threads.add(threading.get_ident())
        if self.fail:
            raise RuntimeError("broken")
        return time.monotonic() + self.due_in_s

    def report(self, name: str, error: Exception) -> None:
        """Where its errors go."""
        self.errors.append(f"{name}: {error}")


def is_running(name: str) -> bool:
    """Whether there is a thread of that name."""
    return any(thread.name == name for thread in threading.enumerate())


@pytest.fixture(autouse=True)
def short_park(monkeypatch: pytest.MonkeyPatch) -> None:
    """Park for a moment only."""
    monkeypatch.setattr(_sidecar, "PARK_S", 0.1)
    monkeypatch.setattr(_sidecar, "ERROR_PAUSE_S", 0.01)


def test_no_client_no_thread() -> None:
    """A process without workers has no thread of ours."""
    Sidecar("t-none", Recorder().work, Recorder().report)
    assert not is_running("t-none")


def test_starts_with_the_first_client_and_leaves_after_the_last() -> None:
    """The thread is there while there are clients, and gone soon after."""
    recorder = Recorder()
    sidecar: Sidecar[str] = Sidecar("t-life", recorder.work, recorder.report)
    sidecar.add("a")
    wait_until(lambda: recorder.calls == [["a"]])
    assert is_running("t-life")
    sidecar.remove("a")
    wait_until(lambda: not is_running("t-life"))
    assert recorder.calls == [["a"]], "a parked thread does no work"


def test_clients_one_after_another_share_the_thread() -> None:
    """A task that follows within the parking time starts no thread of its own."""
    recorder = Recorder()
    sidecar: Sidecar[str] = Sidecar("t-share", recorder.work, recorder.report)
    for name in "abcdef":
        sidecar.add(name)
        wait_until(lambda name=name: [name] in recorder.calls)  # type: ignore[misc] # the default binds the loop variable
        sidecar.remove(name)
    assert len(recorder.threads) == 1


def test_begins_again_after_it_was_gone() -> None:
    """A client that comes when the thread has left gets a new one."""
    recorder = Recorder()
    sidecar: Sidecar[str] = Sidecar("t-again", recorder.work, recorder.report)
    for _ in range(2):
        sidecar.add("a")
        wait_until(lambda: is_running("t-again"))
        sidecar.remove("a")
        wait_until(lambda: not is_running("t-again"))
    sidecar.add("b")
    wait_until(lambda: ["b"] in recorder.calls)
    sidecar.remove("b")


def test_works_when_due_and_when_woken() -> None:
    """Work is done when it said, or earlier when it is woken."""
    recorder = Recorder(due_in_s=0.02)
    sidecar: Sidecar[str] = Sidecar("t-due", recorder.work, recorder.report)
    sidecar.add("a")
    wait_until(lambda: len(recorder.calls) >= 5)
    recorder.due_in_s = math.inf
    time.sleep(0.1)
    before = len(recorder.calls)
    sidecar.wake()
    wait_until(lambda: len(recorder.calls) > before)
    sidecar.remove("a")


def test_survives_its_errors() -> None:
    """An error is reported, and the thread goes on."""
    recorder = Recorder(due_in_s=0.01)
    sidecar: Sidecar[str] = Sidecar("t-error", recorder.work, recorder.report)
    recorder.fail = True
    sidecar.add("a")
    wait_until(lambda: len(recorder.errors) >= 3)
    assert recorder.errors[0] == "t-error: broken"
    recorder.fail = False
    before = len(recorder.calls)
    wait_until(lambda: len(recorder.calls) > before + 3)
    sidecar.remove("a")


def test_removing_twice_is_fine() -> None:
    """A client that is not there any more can be removed."""
    recorder = Recorder()
    sidecar: Sidecar[str] = Sidecar("t-twice", recorder.work, recorder.report)
    sidecar.add("a")
    sidecar.remove("a")
    sidecar.remove("a")
    wait_until(lambda: not is_running("t-twice"))


def test_many_threads_add_and_remove() -> None:
    """Clients that come and go in many threads leave none behind, and no second thread."""
    recorder = Recorder(due_in_s=0.001)
    sidecar: Sidecar[str] = Sidecar("t-many", recorder.work, recorder.report)

    def come_and_go(name: str) -> None:
        for _ in range(50):
            sidecar.add(name)
            sidecar.remove(name)

    threads = [threading.Thread(target=come_and_go, args=(str(index),)) for index in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sum(thread.name == "t-many" for thread in threading.enumerate()) <= 1
    wait_until(lambda: not is_running("t-many"))
    assert not recorder.errors


@pytest.mark.filterwarnings("ignore:This process.*is multi-threaded:DeprecationWarning")  # Python 3.12 on; that is the point here
def test_a_forked_child_starts_its_own() -> None:
    """A child has none of its parent's threads and clients, and can use the sidecar all the same."""
    recorder = Recorder()
    sidecar: Sidecar[str] = Sidecar("t-fork", recorder.work, recorder.report)
    sidecar.add("parent")
    wait_until(lambda: bool(recorder.calls))
    child = os.fork()
    if child == 0:
        recorder.calls.clear()
        sidecar.remove("parent")
        sidecar.add("child")
        deadline = time.monotonic() + BOUND_S
        while ["child"] not in recorder.calls and time.monotonic() < deadline:
            time.sleep(0.002)
        os._exit(0 if recorder.calls == [["child"]] else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    sidecar.remove("parent")
