"""What a manager knows of decorated workers: their newest beats, and who is silent. No Ray, no store; time is a parameter."""

from __future__ import annotations

import math
import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from faultguard._core.pace import silent_after

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

__all__ = ["MAX_WORKERS", "AwakeClock", "LiveView"]

MAX_WORKERS = 100_000  # the view of one run; beyond it, who ended goes first


class AwakeClock:
    """Seconds in which this process surely listened: silence of others is measured by it, and one's own absence is not silence.

    It stands still from the moment for which the next `tick` was promised until that tick comes. So whatever froze or
    starved this process adds to nobody's silence, whoever of its threads looks first when it is back.

    >>> clock = AwakeClock()
    >>> clock.tick(100.0, 5.0)
    >>> before = clock.read(101.0)
    >>> clock.read(160.0) - before, clock.tick(160.0, 5.0), clock.read(161.0) - before  # frozen for 55 s of them
    (4.0, None, 5.0)
    """

    def __init__(self) -> None:
        self._late = 0.0
        self._due = math.inf

    def tick(self, now: float, next_in_s: float) -> None:
        """Say that the watcher is here, and when it will be again; infinity: it watches no more."""
        self._late += max(now - self._due, 0.0)
        self._due = now + next_in_s

    def read(self, now: float) -> float:
        """Read the clock; only differences mean something."""
        return min(now, self._due) - self._late


@dataclass(slots=True)
class _Live:
    """The newest beat of one worker: what it said, when on the awake clock, and when on the wall clock."""

    said: Mapping[str, Any]
    heard: float
    heard_at: float
    silent: bool = False
    doubted: bool = False  # a probe on its node did not find its process
    adopted: bool = False  # it never said so itself
    told_s: float = 0.0  # within which its next beat comes: as it is told now, or, should that be lost, as it was told before

    @property
    def final(self) -> bool:
        return bool(self.said.get("final"))


class LiveView:
    """The newest beat of every decorated worker of a run. May be used by several threads.

    Args:
        heartbeat_timeout_s: silence beyond it is told.
        now: monotonic seconds.
        interval_s: at which workers beat unless they are told to do so more seldom.
    """

    def __init__(self, heartbeat_timeout_s: float, now: float, interval_s: float = 0.0) -> None:
        self.interval_s = interval_s  # that they are told now
        self._asked_s = interval_s
        self._timeout_s = heartbeat_timeout_s
        self._lock = threading.Lock()
        self._clock = AwakeClock()
        self._started = self._clock.read(now)
        self._newest = -math.inf
        self._workers: dict[tuple[str, str], _Live] = {}
        self._draining: frozenset[str] = frozenset()
        self._cancels: dict[str | None, int] = {}

    def beat(self, beats: Iterable[Mapping[str, Any]], now: float, wall: float) -> list[str]:
        """Take beats.

        Returns:
            For each "ok", "superseded" (a later attempt beats already), "ended" (its final beat was here), "cancelled", or "drained"
            (its node is going to be).
        """
        with self._lock:
            self._newest = now
            return [self._take(said, now, wall) for said in beats]

    def _take(self, said: Mapping[str, Any], now: float, wall: float) -> str:
        key = said["task"], said["worker_id"]
        known = self._workers.get(key)
        if known is not None and said["token"] < known.said["token"]:
            return "superseded"
        if known is not None and known.final and said["token"] == known.said["token"]:
            return "ended"  # sent before the final beat, and overtaken by it
        self._workers[key] = _Live(said, self._clock.read(now), wall, told_s=max(self.interval_s, said.get("interval_s", 0.0)))
        if self._is_cancelled(said):
            return "cancelled"
        return "drained" if {said["node_id"], said.get("home_id")} & self._draining else "ok"

    def adopt(self, held: Iterable[Mapping[str, Any]], now: float, wall: float) -> None:
        """Take over those who may have stood still before this view began, as if they had beaten now: they cannot tell it."""
        with self._lock:
            for said in held:
                key = said["task"], said["worker_id"]
                if key not in self._workers or self._workers[key].said["token"] < said["token"]:
                    self._workers[key] = _Live(said, self._clock.read(now), wall, adopted=True)

    def _is_cancelled(self, said: Mapping[str, Any]) -> bool:
        return bool(said["cancels"] < max(self._cancels.get(None, 0), self._cancels.get(said["worker_id"], 0)))

    def drain(self, nodes: frozenset[str]) -> None:
        """These nodes, and no others, are being drained."""
        with self._lock:
            self._draining = nodes

    def cancel(self, number: int, worker_id: str | None) -> None:
        """Cancel what was submitted before the driver's cancel of that number: a worker, or with None all."""
        with self._lock:
            self._cancels[worker_id] = max(number, self._cancels.get(worker_id, 0))

    def check(self, now: float, next_in_s: float) -> list[dict[str, Any]]:
        """Look who is silent now and was not before; the next look is promised in `next_in_s`."""
        with self._lock:
            self._clock.tick(now, next_in_s)
            silent = [live for live in self._workers.values() if not live.silent and self._is_silent(live, now)]
            for live in silent:
                live.silent = True
            self._forget()
            return [self._told(live, now) for live in silent]

    def silent(self) -> list[Mapping[str, Any]]:
        """The newest beats of those who are silent."""
        with self._lock:
            return [live.said for live in self._workers.values() if live.silent]

    def found(self, said: Mapping[str, Any], now: float) -> None:
        """The process of that beat lives, as was seen on its node; its beats are lost on their way."""
        with self._lock:
            live = self._workers.get((said["task"], said["worker_id"]))
            if live is not None and live.said is said:
                live.heard, live.silent, live.doubted = self._clock.read(now), False, False

    def not_found(self, said: Mapping[str, Any]) -> None:
        """Nobody could see on its node that the process of that beat is there."""
        with self._lock:
            live = self._workers.get((said["task"], said["worker_id"]))
            if live is not None and live.said is said:
                live.doubted = True

    def last_beat(self, task: str, worker_id: str, now: float) -> dict[str, float | bool | None]:
        """Say how long ago the worker beat (seconds; None: never heard), whether a probe doubts it, and how long this view has listened.

        `final_token` is that of an attempt whose beat was its final one; None while it beats.
        """
        with self._lock:
            live = self._workers.get((task, worker_id))
            awake = self._clock.read(now)
            return {
                "age_s": awake - live.heard if live is not None else None,
                "doubted": live is not None and live.doubted,
                "uptime_s": awake - self._started,
                "final_token": live.said["token"] if live is not None and live.final else None,
            }

    def workers(self, now: float) -> list[dict[str, Any]]:
        """Return the newest beat of each worker, with `last_heartbeat` (seconds since the epoch), `age_s`, `silent` and `final`."""
        with self._lock:
            return [self._told(live, now) for live in self._workers.values() if not live.adopted]

    def senders(self) -> int:
        """How many processes beat."""
        with self._lock:
            return len({(live.said["node_id"], live.said["pid"]) for live in self._workers.values() if not (live.final or live.silent)})

    def quiet_s(self, now: float) -> float:
        """Seconds since anybody beat; infinity: nobody ever did."""
        return now - self._newest

    def _is_silent(self, live: _Live, now: float) -> bool:
        limit_s = silent_after(self._timeout_s, self._asked_s, live.told_s)
        return not live.final and self._clock.read(now) - live.heard > limit_s

    def _told(self, live: _Live, now: float) -> dict[str, Any]:
        age_s = self._clock.read(now) - live.heard
        return {**live.said, "last_heartbeat": live.heard_at, "age_s": age_s, "silent": live.silent, "final": live.final}

    def _forget(self) -> None:
        excess = len(self._workers) - MAX_WORKERS
        if excess > 0:
            oldest = sorted(self._workers, key=lambda key: (not self._workers[key].final, self._workers[key].heard))
            for key in oldest[:excess]:
                del self._workers[key]
