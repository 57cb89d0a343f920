"""When a snapshot is encoded and when it is written: time is a parameter, so everything here is arithmetic."""

from __future__ import annotations

import math
from datetime import timedelta
from itertools import pairwise
from typing import TYPE_CHECKING

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from faultguard._core.records import Snapshot
from faultguard._core.schedule import COST_SHARE, LATE_SHARE, MAX_AUTO_INTERVAL_S, NOW, Schedule, check_every, snapshot_to_flush
from faultguard.errors import UsageError

if TYPE_CHECKING:
    from faultguard._core.schedule import Every


class Loop:
    """A loop of batches in model time, with a writer that is never late. Records when it encoded and when it wrote."""

    def __init__(self, every: Every, *, batch_s: float, encode_s: float = 0.0, write_s: float = 0.0, min_interval_s: float = 0.0) -> None:
        self.now = 100.0
        self.schedule = Schedule(every, self.now, min_interval_s)
        self.encoded: list[float] = []
        self.written: list[float] = []
        self.batches_at_write: list[int] = []
        self.looked = 0
        self._batch_s, self._encode_s, self._write_s = batch_s, encode_s, write_s
        self._due = math.inf
        self._done = 0

    def run(self, batches: int) -> Loop:
        """Go through some batches."""
        for _ in range(batches):
            self.now += self._batch_s
            self._done += 1
            if self.now >= self.schedule.look_at:
                self._boundary()
            if self.now >= self._due:
                self._write()
        return self

    def _boundary(self) -> None:
        self.looked += 1
        if self.schedule.boundary(self.now):
            self.now += self._encode_s
            self.encoded.append(self.now)
            self._due = min(self._due, self.schedule.encoded(self.now, self._encode_s))

    def _write(self) -> None:
        self.written.append(self.now)
        self.batches_at_write.append(self._done)
        self.schedule.written(self.now, self._write_s)
        self._due = math.inf


EVERYTHING: list[Every] = ["auto", 1, 7, timedelta(seconds=30), timedelta(hours=1)]


@pytest.mark.parametrize("every", EVERYTHING)
def test_the_first_boundary_always_encodes(every: Every) -> None:
    """Whether the state can be saved at all is known at the first boundary."""
    assert len(Loop(every, batch_s=0.001).run(1).encoded) == 1


@given(
    st.floats(1e-4, 10.0),
    st.floats(1e-6, 0.5),
    st.floats(0.0, 0.5),
)
def test_auto_costs_at_most_one_part_in_a_hundred(batch_s: float, encode_s: float, write_s: float) -> None:
    """Encoding and writing together take at most 1 % of the time, the first of each aside."""
    loop = Loop("auto", batch_s=batch_s, encode_s=encode_s, write_s=write_s).run(3000)
    wall = loop.now - 100.0
    cost = max(len(loop.encoded) - 1, 0) * encode_s
    if write_s / COST_SHARE < MAX_AUTO_INTERVAL_S:  # at least one write a minute, however slow the store
        cost += max(len(loop.written) - 1, 0) * write_s
    assert cost <= 0.01 * wall


def test_auto_writes_at_least_once_a_minute() -> None:
    """However slow the store looks."""
    loop = Loop("auto", batch_s=1.0, encode_s=0.001, write_s=30.0).run(1000)
    assert max(after - before for before, after in pairwise(loop.written)) <= MAX_AUTO_INTERVAL_S + 2.0


def test_auto_writes_every_cheap_batch() -> None:
    """Where checkpointing costs next to nothing, nothing is lost."""
    loop = Loop("auto", batch_s=1.0, encode_s=1e-5, write_s=1e-3).run(50)
    assert len(loop.written) == 50


def test_a_minimum_interval_is_kept() -> None:
    """On an object store at most one write per so many seconds."""
    loop = Loop("auto", batch_s=1.0, encode_s=1e-5, write_s=1e-3, min_interval_s=10.0).run(100)
    assert all(after - before >= 10.0 for before, after in pairwise(loop.written))
    assert len(loop.written) == 10


def test_auto_learns_that_writing_became_cheap_again() -> None:
    """Many slow writes are forgotten after a few quick ones."""
    loop = Loop("auto", batch_s=1.0, encode_s=1e-5, write_s=1e-3).run(10)
    loop._write_s = 50.0 * COST_SHARE
    loop.run(60)
    loop._write_s = 1e-3
    before = len(loop.written)
    assert len(loop.run(300).written) - before > 200


def test_auto_is_not_silenced_by_one_slow_write() -> None:
    """After it, the wait is a third of what that write alone would ask for."""
    loop = Loop("auto", batch_s=1.0, encode_s=1e-5, write_s=1e-3).run(10)
    loop._write_s = 50.0 * COST_SHARE
    loop.run(1)
    slow, loop._write_s = loop.written[-1], 1e-3
    assert 10.0 < loop.run(50).written[11] - slow < 20.0


@pytest.mark.parametrize("every", [1, 3, 10])
@pytest.mark.parametrize("encode_s", [0.0, 5.0])
def test_an_int_counts_batches(every: int, encode_s: float) -> None:
    """Exactly every so many batches, whatever that costs."""
    loop = Loop(every, batch_s=0.01, encode_s=encode_s).run(30)
    assert loop.batches_at_write == list(range(every, 31, every))


def test_batches_of_advance_are_counted_all() -> None:
    """`advance(n)` is n batches."""
    schedule = Schedule(10, 0.0)
    schedule.boundary(0.0)
    schedule.encoded(0.0, 1.0)
    assert not schedule.boundary(1.0, 8)
    assert schedule.boundary(2.0, 5)
    assert schedule.encoded(2.0, 1.0) == 2.0


@pytest.mark.parametrize("encode_s", [1e-5, 0.5])
def test_a_timedelta_is_a_time_between_writes(encode_s: float) -> None:
    """A write comes at the first boundary after the interval, also when encoding is so slow that it would wait for longer."""
    loop = Loop(timedelta(seconds=30), batch_s=1.0, encode_s=encode_s).run(300)
    gaps = [after - before for before, after in pairwise(loop.written)]
    assert gaps
    assert min(gaps) >= 30.0
    assert max(gaps) <= 30.0 + 2 * (1.0 + encode_s)


@pytest.mark.parametrize("every", [1000, timedelta(hours=1)])
def test_in_a_hurry_a_write_comes_as_soon_as_it_is_cheap(every: Every) -> None:
    """However seldom the user wants it, and no more often than where nothing is said."""
    loop = Loop(every, batch_s=0.1, write_s=0.003).run(50)
    assert loop.written == []
    loop.schedule.hurry()
    loop.run(200)
    auto = Loop("auto", batch_s=0.1, write_s=0.003).run(200)
    assert 10 < len(loop.written) <= len(auto.written)


@pytest.mark.parametrize("every", [1, 3, timedelta(seconds=0.5)])
def test_in_a_hurry_no_write_of_the_user_is_left_out(every: Every) -> None:
    """Where nothing is said there would be fewer."""
    loop = Loop(every, batch_s=0.1, write_s=0.1)
    loop.schedule.hurry()
    assert len(loop.run(200).written) >= len(Loop(every, batch_s=0.1, write_s=0.1).run(200).written)


def test_while_a_write_takes_its_time_nothing_is_encoded_in_vain() -> None:
    """The interval begins anew when a write is handed over, when it begins, and when it is done."""
    schedule = Schedule(timedelta(seconds=30), 0.0)
    assert schedule.boundary(0.0)
    assert schedule.encoded(0.0, 0.5) == 30.0 + LATE_SHARE * 30.0, "a boundary after the interval brings a newer one"
    assert not schedule.boundary(29.0)
    assert schedule.boundary(31.0)
    assert schedule.encoded(31.5, 0.5) <= 31.5
    assert not schedule.boundary(32.0)
    schedule.written(45.0, 0.1)
    assert not schedule.boundary(70.0)
    assert schedule.boundary(75.0)


def test_a_batch_that_outlasts_the_interval_gets_one_write() -> None:
    """The snapshot before it is written in the middle of it; the boundary after it begins no second write of the same interval."""
    schedule = Schedule(timedelta(seconds=30), 0.0)
    schedule.boundary(0.0)
    due = schedule.encoded(0.0, 1e-3)
    assert 30.0 < due < 60.0
    schedule.begins(due)
    assert schedule.boundary(due + 0.1), "it is cheap to encode"
    assert schedule.encoded(due + 0.1, 1e-3) > due + 30.0
    schedule.written(due + 0.2, 0.1)
    assert schedule.encoded(due + 0.3, 1e-3) > due + 30.0


def test_what_a_timedelta_writes_is_new() -> None:
    """The snapshot is taken when it is due, not when the write before it was."""
    loop = Loop(timedelta(seconds=30), batch_s=1.0, encode_s=0.5).run(300)
    for written in loop.written[1:]:
        assert written - max(moment for moment in loop.encoded if moment <= written) <= 1.5


def test_between_the_moments_nothing_is_asked() -> None:
    """The loop itself reads one number; it calls only when something may be due."""
    loop = Loop("auto", batch_s=1e-4, encode_s=1e-3, write_s=1e-3).run(100_000)
    assert loop.looked == len(loop.encoded)
    assert loop.looked < 100


def test_another_interval_is_used_from_the_next_boundary_on() -> None:
    """`configure` is heard at once."""
    loop = Loop(timedelta(hours=1), batch_s=1.0, encode_s=1.0).run(10)
    assert loop.schedule.look_at > loop.now
    loop.schedule.configure(2)
    assert loop.schedule.look_at == NOW
    assert len(loop.run(10).written) == 5


@pytest.mark.parametrize("every", EVERYTHING)
def test_every_takes_auto_ints_and_timedeltas(every: Every) -> None:
    """They come back as they are."""
    assert check_every(every) == every


@pytest.mark.parametrize(
    "every", [0.5, 1.0, 30.0, 0, -1, True, False, None, "", "always", timedelta(0), timedelta(seconds=-1), math.nan, "1"]
)
def test_every_refuses_all_else(every: object) -> None:
    """A float could be batches or seconds; the text says what to write."""
    with pytest.raises(UsageError, match=r"every=.* is refused; it takes \"auto\", a number of batches"):
        check_every(every)


def test_a_flush_is_of_the_newest_snapshot() -> None:
    """Never older than what is durable already, and never of a moment that had no boundary."""
    old, new = (Snapshot(state=msgspec.Raw(state)) for state in (b"1", b"2"))
    assert snapshot_to_flush(new, old) is new
    assert snapshot_to_flush(None, old) is old
    assert snapshot_to_flush(None, None) is None
