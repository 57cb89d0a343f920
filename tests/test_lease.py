"""Whether the driver of a named run is gone, as another one finds out that cannot see its process: by its beats, on a clock of its own."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from faultguard import _lease
from faultguard._core.names import record_name
from faultguard._core.runs import Driver, RunRecord
from faultguard._lease import POLL_S, beats, is_over
from faultguard._log import StoredLog
from faultguard.storage import open_store

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

TIMEOUT_S = 4.0
ABSENT_S = 100.0
ELSEWHERE = Driver(host="h", boot_id="elsewhere", pid=1, start_time=1)
HEAD = RunRecord(kind="open", number=1, run="nightly", instance=1, driver=ELSEWHERE, writer="w", at=0.0)


class Clock:
    """The time of this process, in which nothing takes time but its sleep.

    Args:
        on_sleep: is told after each, how many there were; returns for how long the process was away besides.
    """

    def __init__(self, on_sleep: Callable[[int], float]) -> None:
        self.now = 1000.0
        self.sleeps = 0
        self._on_sleep = on_sleep

    def monotonic(self) -> float:
        """As `time.monotonic`."""
        return self.now

    def sleep(self, seconds: float) -> None:
        """As `time.sleep`."""
        self.sleeps += 1
        self.now += seconds + self._on_sleep(self.sleeps)


@pytest.fixture
def log(tmp_path: Path) -> StoredLog:
    """Of a run whose driver has beaten once."""
    log = StoredLog(open_store(str(tmp_path / "store")), "nightly/driver/")
    beat(log, 1)
    return log


def beat(log: StoredLog, number: int) -> None:
    """As the driver does."""
    log.store.create(beats(log, HEAD.number) + record_name(number), b"{}")


def ask(log: StoredLog, monkeypatch: pytest.MonkeyPatch, on_sleep: Callable[[int], float]) -> tuple[str, int]:
    """What is found out, and in how many looks."""
    clock = Clock(on_sleep)
    monkeypatch.setattr(_lease, "time", clock)
    return is_over(log, HEAD, TIMEOUT_S, lambda: None), clock.sleeps


def test_a_driver_that_does_not_beat_is_gone(log: StoredLog, monkeypatch: pytest.MonkeyPatch) -> None:
    """After as many looks as the timeout has time for, not before."""
    assert ask(log, monkeypatch, lambda _: 0.0) == (f"silent for {TIMEOUT_S:g} s", TIMEOUT_S / POLL_S)


def test_own_absence_is_not_its_silence(log: StoredLog, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both were frozen for far longer than the timeout, as with a host that was suspended; the other one beats just after the thaw."""

    def on_sleep(number: int) -> float:
        if number == 4:
            beat(log, 2)
        return ABSENT_S if number == 3 else 0.0

    assert ask(log, monkeypatch, on_sleep) == ("", 4)


def test_who_is_absent_at_each_look_still_comes_to_an_end(log: StoredLog, monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that always comes late waits longer by the clock, but not for ever."""
    found, sleeps = ask(log, monkeypatch, lambda _: ABSENT_S)
    assert found.startswith("silent")
    assert sleeps == TIMEOUT_S / (2 * POLL_S)
