"""One thread per process that tells the manager that its workers live, and how far they are. It never touches the store.

A beat that cannot be delivered is dropped, not queued: the next one says more. Nothing that happens here reaches the work.
"""

from __future__ import annotations

import atexit
import logging
import math
import os
import threading
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

import ray

from faultguard import _events, _ray, _soon
from faultguard._manager import find_or_make, forget, known
from faultguard._sidecar import Sidecar
from faultguard.errors import ManagerUnavailableError

if TYPE_CHECKING:
    from faultguard._settings import Settings

__all__ = ["Source", "hurry", "register", "unregister"]

FIRST_BEAT_S = 0.5  # shorter tasks cost no call, and make no actor
JOIN_BEFORE_S = 0.4  # shorter ones yet do not even wake the thread
REPLY_S = 0.5  # a reply is waited for on the spot; a later one is looked for every so often
STUCK_S = 2.0  # a reply that takes so long may never come
RESOLVE_S = 10.0
RETRY_S = 0.5
IDLE_S = 1.0
EXIT_S = 2.0
MAX_SAID = 100  # errors whose texts are never twice the same must not fill a log


class Source(Protocol):
    """A worker that beats."""

    @property
    def settings(self) -> Settings:
        """Of its run."""

    def lasts(self) -> None:
        """It goes on for longer than a moment; from any thread, perhaps again. Must not wait, nor raise."""

    def begins(self) -> None:
        """It is going to beat for the first time; called on the beater's thread."""

    def beat(self) -> dict[str, object]:
        """What the manager is told; called on the beater's thread."""

    def final_beat(self) -> dict[str, object]:
        """The last one; called by `unregister`."""

    def told(self, reply: str) -> None:
        """Take the manager's answer to a beat; called on the beater's thread."""


@dataclass(slots=True, eq=False)
class _Client:
    """A registered source: when its first beat is due, whether it was ever sent one, and whether that was tried at least."""

    source: Source
    first: float
    begun: bool = False
    beaten: bool = False
    tried: threading.Event = field(default_factory=threading.Event)
    joined: bool = False
    gone: bool = False

    def tick(self, now: float) -> None:
        """The work goes on for longer than a moment: the thread that beats is told of it."""
        if now >= self.first - JOIN_BEFORE_S:
            self.join()

    def join(self) -> None:
        """Beat from now on; from any thread, again is no harm."""
        _soon.remove(self)
        self.source.lasts()
        self.joined = True
        _beater.add(self)
        if self.gone:  # meanwhile
            _beater.remove(self)


def register(source: Source) -> None:
    """Let a worker beat from now on, for the first time in `FIRST_BEAT_S`."""
    _hook()
    client = _Client(source, time.monotonic() + FIRST_BEAT_S)
    _clients[id(source)] = client
    if _soon.is_running():
        _soon.add(client)
    else:
        client.join()


def hurry(source: Source, wait_s: float) -> None:
    """Let a worker that has not beaten yet do so now, and wait so long for it."""
    client = _clients.get(id(source))
    if client is not None and not client.tried.is_set() and _ray.is_ready():
        client.first = time.monotonic()
        client.join()
        _beater.wake()
        client.tried.wait(wait_s)


def unregister(source: Source) -> None:
    """Let it beat no more. If it ever did, its final beat is sent, and not waited for."""
    client = _clients.pop(id(source), None)
    if client is None:
        return
    client.gone = True
    _soon.remove(client)
    if client.joined:
        _beater.remove(client)
    if client.beaten and not _exiting.is_set():
        try:
            _send_final(source)
        except Exception as error:  # noqa: BLE001 - the work is over; the log has its outcome
            _report(threading.current_thread().name, error)


def _send_final(source: Source) -> None:
    handle = known(source.settings)
    if handle is not None:
        handle.beat.remote([{**source.final_beat(), "final": True}])


class _Line:
    """The calls of this process to the manager of one run: one in flight."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._ref: Any = None
        self._beaten: list[_Client] = []  # for whom it is
        self._sent = 0.0
        self._due = 0.0
        self._lost = False
        self._retry_s = RETRY_S
        self._interval_s = settings.heartbeat_interval  # or longer, as the manager has told

    def step(self, clients: list[_Client]) -> float:
        """Do what is due. Returns when to come again, monotonic seconds."""
        now = time.monotonic()
        if self._ref is not None and not self._settle(0.0):
            if now - self._sent < self._settings.heartbeat_timeout:
                if now - self._sent > STUCK_S:
                    _give_up_waiting(clients)
                return now + REPLY_S
            self._drop(f"no reply for {self._settings.heartbeat_timeout:g} s")
        if self._lost:
            _give_up_waiting(clients)
        due = [client for client in clients if client.first <= now]
        first = min((client.first for client in clients if client.first > now), default=math.inf)
        if due and (now >= self._due or not (self._lost or all(client.beaten for client in due))):
            self._send(due)
        again = min(self._due, first) if due else first
        return again if self._ref is None else min(again, time.monotonic() + REPLY_S)

    def _send(self, clients: list[_Client]) -> None:
        """Beat for all these workers in one call, and see whether it arrives."""
        self._due = time.monotonic() + self._interval_s
        try:
            more = {"interval_s": self._interval_s}
            said = [(client, {**beat, **more}) for client in clients if (beat := _beat(client)) is not None]
            beats, self._beaten = [beat for _, beat in said], [client for client, _ in said]
            if beats:
                self._ref = find_or_make(self._settings, RESOLVE_S).beat.remote(beats)
        except (ManagerUnavailableError, ray.exceptions.RayError) as error:
            self._drop(error)
            return
        finally:
            for client in clients:
                client.tried.set()
        self._sent = time.monotonic()
        for client in clients:
            client.beaten = True
        if beats:
            self._settle(REPLY_S)

    def _settle(self, wait_s: float) -> bool:
        """Look whether the call in flight has ended, and how."""
        ref, self._ref = self._ref, None  # one of an earlier connection raises, and must not do so for ever
        ready, _ = ray.wait([ref], timeout=wait_s)
        if not ready:
            self._ref = ref
            return False
        try:
            replies, interval_s = _ray.get_within(ref, _ray.READY_S)
        except ray.exceptions.RayError as error:
            self._drop(error)
        else:
            self._back()
            self._interval_s = interval_s
            self._due = self._sent + interval_s
            for client, reply in zip(self._beaten, replies, strict=True):
                _tell(client, reply)
        return True

    def _drop(self, why: object) -> None:
        """That beat is lost. The first of an outage is told; the actor may restart by itself, or has to be found anew."""
        self._ref = None
        if isinstance(why, ray.exceptions.ActorDiedError):
            forget(self._settings)
        self._due = time.monotonic() + self._retry_s
        self._retry_s = min(2 * self._retry_s, max(self._settings.heartbeat_interval, RETRY_S))
        if not self._lost:
            self._lost = True
            run = self._settings.run
            text = (
                f"the manager of run {run!r} cannot be reached ({_first_line(why)}). Work and checkpoints go on; until it is back, nobody "
                f"notices silence."
            )
            _events.emit(logging.WARNING, "faultguard.manager_lost", text, run=run, error=str(why))

    def _back(self) -> None:
        self._retry_s = RETRY_S
        if self._lost:
            self._lost = False
            run = self._settings.run
            _events.emit(logging.INFO, "faultguard.manager_back", f"the manager of run {run!r} is back.", run=run)


def _beat(client: _Client) -> dict[str, object] | None:
    """One beat; None where the worker cannot say one, which must not silence the others."""
    try:
        if not client.begun:
            client.begun = True
            client.source.begins()
        return client.source.beat()
    except Exception as error:  # noqa: BLE001 - see above
        _report(threading.current_thread().name, error)
        return None


def _give_up_waiting(clients: list[_Client]) -> None:
    """Nobody listens now: whoever waits for its first beat is to work."""
    for client in clients:
        client.tried.set()


def _tell(client: _Client, reply: str) -> None:
    try:
        client.source.told(reply)
    except Exception as error:  # noqa: BLE001 - the others are to hear their replies
        _report(threading.current_thread().name, error)


def _work(clients: list[_Client]) -> float:
    """What the thread does: all workers of the process, by run."""
    with _busy:
        if _exiting.is_set():
            return math.inf
        if not _ray.is_ready():
            return time.monotonic() + IDLE_S
        runs: dict[str, list[_Client]] = {}
        for client in clients:
            runs.setdefault(client.source.settings.key, []).append(client)
        for gone in _lines.keys() - runs.keys():
            del _lines[gone]
        due = math.inf
        for key, members in runs.items():
            line = _lines.setdefault(key, _Line(members[0].source.settings))
            due = min(due, line.step(members))
        return due


def _report(name: str, error: Exception) -> None:
    """Say an error of our own, once: several may take turns."""
    text = f"thread {name} goes on after an error of its own: {error!r}"
    if text not in _said and len(_said) < MAX_SAID:
        _said.add(text)
        _events.emit(logging.ERROR, "faultguard.thread_error", text, thread=name, error=repr(error))


def _first_line(why: object) -> str:
    return (str(why).strip().splitlines() or [type(why).__name__])[0]


def _hook() -> None:
    """Stop before Ray does, at the end of the interpreter: a thread inside Ray would meet its ruins."""
    global _hooked  # noqa: PLW0603 - once per process
    if not _hooked:
        _hooked = True
        atexit.register(_at_exit)


def _at_exit() -> None:
    _exiting.set()
    if _busy.acquire(timeout=EXIT_S):
        _busy.release()


def _after_fork() -> None:
    """A child has neither the thread nor the connection."""
    global _busy  # noqa: PLW0603 - the parent's may be held by a thread that the child does not have
    _busy = threading.Lock()
    _clients.clear()
    _lines.clear()


_clients: dict[int, _Client] = {}
_lines: dict[str, _Line] = {}
_busy = threading.Lock()
_exiting = threading.Event()
_hooked = False
_said: set[str] = set()
_beater: Sidecar[_Client] = Sidecar("faultguard-beater", _work, _report)
os.register_at_fork(after_in_child=_after_fork)
