"""When to encode a snapshot and when to write it: pure arithmetic on measured costs, time is a parameter.

Encoding a snapshot happens on the user's thread, so its share of the time is bounded. Writing happens beside it, bounded by
`every`: by cost (auto), by batches, or by time.
"""

from __future__ import annotations

import math
from datetime import timedelta
from typing import TYPE_CHECKING, Literal

from faultguard.errors import UsageError

if TYPE_CHECKING:
    from faultguard._core.records import Snapshot

__all__ = ["NOW", "Every", "Pinning", "Schedule", "check_every", "snapshot_to_flush"]

Every = Literal["auto"] | int | timedelta
COST_SHARE = 0.003  # for encoding, and again for writing; with claim, beats and bookkeeping together below one part in a hundred
NOW = -math.inf
SMOOTHING = 0.3  # of the newest measurement; one slow write must not silence the next hundred
LATE_SHARE = 0.25  # of a user's interval: so long the newest snapshot waits for a boundary to bring a newer one
PINNED_LAGS = 2  # a batch in which an attempt died lies within one, if neither it nor the store was slow
MAX_AUTO_INTERVAL_S = 60.0  # however slow the store looks, at least one write a minute


def check_every(every: object) -> Every:
    """The option `every`, checked.

    Raises:
        UsageError: it is neither "auto", a positive int, nor a positive timedelta.
    """
    if every == "auto":
        return "auto"
    if isinstance(every, int) and not isinstance(every, bool) and every > 0:
        return every
    if isinstance(every, timedelta) and every > timedelta(0):
        return every
    msg = f'every={every!r} is refused; it takes "auto", a number of batches (int > 0), or a timedelta such as timedelta(seconds=30)'
    raise UsageError(msg)


class Schedule:
    """Decides at boundaries.

    `look_at` is read by the loop itself: before that moment (monotonic seconds) nothing has to be asked. Anything that the
    loop must learn soon sets it to `NOW`.
    """

    __slots__ = (
        "_batches",
        "_encode_cost",
        "_every",
        "_hurried",
        "_interval",
        "_last_write",
        "_min_interval",
        "_snapshot_at",
        "_write_cost",
        "look_at",
    )

    def __init__(self, every: Every, now: float, min_interval_s: float = 0.0) -> None:
        self.configure(every)
        self._min_interval = min_interval_s
        self._hurried = False
        self._encode_cost = 0.0
        self._write_cost = 0.0
        self._last_write = now
        self._batches = 0  # since a write was due by their number
        self._snapshot_at = now  # the first boundary shows whether the state can be saved at all

    def configure(self, every: Every) -> None:
        """Use another interval from now on."""
        self._every = every if isinstance(every, int) else 0
        self._interval = every.total_seconds() if isinstance(every, timedelta) else None
        self.look_at: float = NOW

    @property
    def is_strict(self) -> bool:
        """Whether the user has said how often to write."""
        return bool(self._every) or self._interval is not None

    def boundary(self, now: float, batches: int = 1) -> bool:
        """`batches` more are done: whether to encode a snapshot."""
        self._batches += batches
        take = now >= min(self._snapshot_at, self._next_interval()) or bool(self._every and self._batches >= self._every)
        self._look()
        return take

    def encoded(self, now: float, cost_s: float) -> float:
        """A snapshot was taken and took `cost_s` of the user's thread. Returns when to write it; infinity: not by itself."""
        self._encode_cost = _smooth(self._encode_cost, cost_s)
        self._snapshot_at = now + self._encode_cost / COST_SHARE
        due = self._write_due(now)
        if due <= now and self._interval is not None:
            self._last_write = now  # it is about to be: until then no boundary is due because of time
        self._look()
        return due

    def begins(self, now: float) -> None:
        """A write begins: until it ends no boundary is due because of time."""
        self._last_write = now

    def written(self, now: float, cost_s: float) -> None:
        """A write ended and took `cost_s` of processor time."""
        self._write_cost = _smooth(self._write_cost, cost_s)
        self._last_write = now

    @property
    def lag(self) -> tuple[float, int]:
        """How far a loop can be ahead of its last write, unless a batch or the store is slow: seconds of work, and batches."""
        if self._every:
            return 0.0, self._every
        return (MAX_AUTO_INTERVAL_S if self._interval is None else (1 + LATE_SHARE) * self._interval), 0

    def hurry(self) -> None:
        """From now on write also where the interval of the user asks for none, as often as costs next to nothing; from any thread."""
        self._hurried = True
        self.look_at = NOW

    def _write_due(self, now: float) -> float:
        if not self.is_strict:
            return self._next_auto()
        return min(self._next_strict(now), self._next_auto() if self._hurried else math.inf)

    def _next_auto(self) -> float:
        auto = min(self._write_cost / COST_SHARE, MAX_AUTO_INTERVAL_S)
        return self._last_write + max(auto, self._min_interval)

    def _next_strict(self, now: float) -> float:
        if self._every:
            if self._batches < self._every:
                return math.inf
            self._batches = 0
            return now
        due = self._next_interval()
        return due if due <= now or self._interval is None else due + LATE_SHARE * self._interval

    def _next_interval(self) -> float:
        """When the user's interval asks for a write, and so for a snapshot, whatever encoding costs."""
        return self._last_write + self._interval if self._interval is not None else math.inf

    def _look(self) -> None:
        self.look_at = NOW if self._every else min(self._snapshot_at, self._next_interval())


class Pinning:
    """For how long every batch is recorded before it begins: until the loop is well past where the attempt before can have died.

    Args:
        lag: of the schedule: seconds of work, and batches.
        now: seconds; only differences mean something.
    """

    __slots__ = ("_batches", "_seconds", "_since")

    def __init__(self, lag: tuple[float, int], now: float) -> None:
        self._seconds, self._batches = PINNED_LAGS * lag[0], PINNED_LAGS * lag[1]
        self._since = now

    def next(self, now: float) -> bool:
        """A batch is about to begin: whether it is recorded before. The writing itself is no work: see `written`."""
        due = self._seconds > 0 or self._batches > 0
        self._seconds -= now - self._since
        self._batches -= 1
        self._since = now
        return due

    def written(self, now: float) -> None:
        """The record is durable, and the batch begins."""
        self._since = now


def snapshot_to_flush(newest: Snapshot | None, durable: Snapshot | None) -> Snapshot | None:
    """What an attempt that leaves in the middle of a batch writes: the newest snapshot, never the state as it is now."""
    return newest if newest is not None else durable


def _smooth(old: float, new: float) -> float:
    return new if old == 0.0 else old + SMOOTHING * (new - old)
