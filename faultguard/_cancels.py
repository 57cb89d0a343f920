"""What the driver of a run has cancelled: in the cluster's key-value store, where tasks look as they begin, and a manager as it starts.

What runs is told by the manager, with a heartbeat. A task that has waited in a queue may be over before its first one.
"""

from __future__ import annotations

import logging
import threading
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

import msgspec

from faultguard import _events, _ray

if TYPE_CHECKING:
    from faultguard._settings import Settings

__all__ = ["cancels_of", "is_cancelled", "note_cancel"]

LOOK_S = 0.2  # a look takes 0.3 ms, so it costs a process that begins task after task 0.15 % of its time ...
SHARE, MAX_LOOK_S = 0.02, 2.0  # ... and where Ray's head is busy no more than this share, unless that meant to look even less often
LOOK_WAIT_S = 10.0  # a head that is only busy has taken more than one second
PAUSE_S = 30.0  # after a look in vain: the work does not need that store, and a head that is gone must not hold up every task
Cancels = dict[str | None, int]  # the number of the last cancel of a worker, and with None of all


@dataclass(frozen=True, slots=True)
class _Seen:
    """What a look at a run found, and until when that is new enough, on the monotonic clock."""

    cancels: Cancels
    until: float


def note_cancel(settings: Settings, worker_id: str | None) -> None:
    """In the driver, which is the only one that writes them: its newest cancel is of this worker, or with None of all."""
    with _lock:
        before = cancels_of(settings) if worker_id is not None else {}  # one of all covers the earlier ones
        number = max(settings.cancels, before.get(worker_id, 0))
        _ray.kv_put(_key(settings), msgspec.msgpack.encode(list({**before, worker_id: number}.items())))


def cancels_of(settings: Settings, wait_s: float | None = None) -> Cancels:
    """What has been cancelled so far. `wait_s`: how long that may take; None: as long as Ray waits."""
    data = _ray.kv_get(_key(settings), wait_s)
    return dict(msgspec.msgpack.decode(data, type=list[tuple[str | None, int]])) if data is not None else {}


def is_cancelled(settings: Settings, worker_id: str) -> bool:
    """Whether a worker has been cancelled since it was submitted, as far as this process has seen lately: see `_look`."""
    cancels = _look(settings).cancels
    return settings.cancels < max(cancels.get(None, 0), cancels.get(worker_id, 0))


def _look(settings: Settings) -> _Seen:
    """Look, if the last look is not new enough. Not to know is no cancel: the first heartbeat asks again."""
    seen, now = _seen.get(settings.key), time.monotonic()
    if seen is None or now >= seen.until:
        try:
            cancels, took = cancels_of(settings, LOOK_WAIT_S), time.monotonic() - now
            until = now + max(LOOK_S, min(took / SHARE, MAX_LOOK_S))
        except Exception as error:  # noqa: BLE001 - whatever Ray raises where its head does not answer
            _events.emit(logging.DEBUG, "faultguard.cancels_unknown", f"what is cancelled is not known: {error}", run=settings.run)
            cancels, until = seen.cancels if seen is not None else {}, time.monotonic() + PAUSE_S
        seen = _seen[settings.key] = _Seen(cancels, until)
    return seen


def _key(settings: Settings) -> str:
    return f"cancels:{settings.key}"


_lock = threading.Lock()  # two threads of the driver must not overwrite what the other has noted
_seen: dict[str, _Seen] = {}
