"""When to encode a snapshot and when to write it: pure arithmetic on measured costs, time is a parameter.

Encoding a snapshot happens on the user's thread, so it may take at most one part in a hundred of it. Writing happens beside
it, bounded by `every`: by cost (auto), by batches, or by time.
"""

from __future__ import annotations

from datetime import timedelta
from typing import TYPE_CHECKING, Literal

from faultguard.errors import UsageError

if TYPE_CHECKING:
    from faultguard._core.records import Snapshot

__all__ = ["Every", "Schedule", "check_every", "snapshot_to_flush"]

Every = Literal["auto"] | int | timedelta
COST_SHARE = 0.01
SMOOTHING = 0.3  # of the newest measurement; one slow write must not silence the next hundred
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
    """Decides at boundaries. `snapshot_at` is read by the loop itself: before that moment nothing has to be asked."""

    __slots__ = ("_encode_cost", "_every", "_interval", "_last_write", "_min_interval", "_write_cost", "snapshot_at", "snapshot_done")

    def __init__(self, every: Every, now: float, min_interval_s: float = 0.0) -> None:
        self._every = every
        self._min_interval = min_interval_s
        self._interval = every.total_seconds() if isinstance(every, timedelta) else None
        self._encode_cost = 0.0
        self._write_cost = 0.0
        self._last_write = now
        self.snapshot_at = now  # the first boundary shows whether the state can be saved at all
        self.snapshot_done = every if isinstance(every, int) else 0  # batches until a write is due whatever the time

    def encoded(self, now: float, cost_s: float) -> None:
        """A snapshot was taken and took `cost_s` of the user's thread."""
        self._encode_cost = _smooth(self._encode_cost, cost_s)
        self.snapshot_at = now + self._encode_cost / COST_SHARE
        if self._interval is not None:
            due = self.write_due(now)
            if now < due < self.snapshot_at:
                self.snapshot_at = due

    def written(self, now: float, cost_s: float) -> None:
        """A write ended and took `cost_s` of processor time, all threads together."""
        self._write_cost = _smooth(self._write_cost, cost_s)
        self._last_write = now

    def write_due(self, now: float) -> float:
        """From which moment on the newest snapshot is to be written; for `every=<batches>` the moment is when it is taken."""
        if isinstance(self._every, int):
            return now
        if self._interval is not None:
            return self._last_write + self._interval
        auto = min((self._write_cost + self._encode_cost) / COST_SHARE, MAX_AUTO_INTERVAL_S)
        return self._last_write + max(auto, self._min_interval)

    @property
    def batches(self) -> int:
        """Every how many batches a write is due; 0 when that depends on time."""
        return self._every if isinstance(self._every, int) else 0


def snapshot_to_flush(newest: Snapshot | None, durable: Snapshot | None) -> Snapshot | None:
    """What an attempt that leaves in the middle of a batch writes: the newest snapshot, never the state as it is now."""
    return newest if newest is not None else durable


def _smooth(old: float, new: float) -> float:
    return new if old == 0.0 else old + SMOOTHING * (new - old)
