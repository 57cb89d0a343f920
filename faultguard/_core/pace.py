"""How often workers beat: as often as was asked for, or as seldom as it takes for their manager to keep most of a core free."""

from __future__ import annotations

__all__ = ["MEASURE_S", "SHARE", "Pace", "silent_after"]

SHARE = 0.25  # of a core, for listening
MEASURE_S = 5.0
MIN_CALLS = 20  # in one measurement, or as many as come in one interval: what the manager does besides is not the price of a beat
MAX_STEP = 4.0  # at a time: one measurement may be wrong
MAX_INTERVAL_S = 600.0


class Pace:
    """The interval that a manager tells its workers, from what a call costs it and how many processes call.

    Args:
        interval_s: that was asked for; never less.
        now: monotonic seconds.
        cpu_s: processor time of the manager's process so far.

    >>> pace = Pace(5.0, 0.0, 0.0)
    >>> pace.look(10.0, 4.0, calls=4000, senders=4000)  # a call costs 1 ms
    >>> pace.interval_s
    16.0
    """

    def __init__(self, interval_s: float, now: float, cpu_s: float) -> None:
        self.interval_s = interval_s
        self._asked_s = interval_s
        self._since = now, cpu_s, 0

    def look(self, now: float, cpu_s: float, *, calls: int, senders: int) -> None:
        """Measure, if there is enough to be measured since the last time.

        Args:
            now: monotonic seconds.
            cpu_s: as above.
            calls: that have arrived so far.
            senders: processes that call, once per interval.
        """
        then, before_s, made = self._since
        enough = MIN_CALLS if now - then < self.interval_s else 1
        if now - then < MEASURE_S or calls - made < enough:
            return
        self._since = now, cpu_s, calls
        wanted_s = senders * (cpu_s - before_s) / (calls - made) / SHARE
        self.interval_s = max(self._asked_s, min(wanted_s, MAX_STEP * self.interval_s, MAX_INTERVAL_S))


def silent_after(timeout_s: float, asked_s: float, told_s: float) -> float:
    """How long a worker must be silent that was told to beat at longer intervals: what it is late by, and once more for a lost beat.

    >>> silent_after(60.0, 5.0, 5.0), silent_after(60.0, 5.0, 20.0)
    (60.0, 90.0)
    """
    return timeout_s + 2 * max(told_s - asked_s, 0.0)
