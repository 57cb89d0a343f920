"""The manager's side of probes: which silent workers are looked at, when again, and what came of it."""

from __future__ import annotations

import collections
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from faultguard import _ray
from faultguard._core.silence import Held, Verdict
from faultguard._probe import Answer, Silent, probe, survey
from faultguard._process import ProcessId

if TYPE_CHECKING:
    from collections.abc import Mapping

    from faultguard._core.silence import Look

__all__ = ["Found", "Prober"]

LOOKS_PER_TIMEOUT = 4
MAX_LATE = 64
LOST_S = 30.0  # sooner no probe counts as lost: one that is cancelled when it has ended a process can say so no more


class Found(NamedTuple):
    """What came of a probe: of whose beat, what was seen (None: their node does not answer), and whether it was not so before."""

    beat: Mapping[str, Any]
    verdict: Verdict | None
    is_new: bool = True


@dataclass(slots=True)
class _Flight:
    """A probe on its way."""

    ref: Any
    beats: list[Mapping[str, Any]]
    until: float
    lost_at: float


@dataclass(slots=True)
class _Known:
    """What earlier probes said of a worker."""

    again_at: float = -math.inf
    stood: Look | None = None
    seen: Verdict | None = None
    missed: bool = False  # its node did not answer
    over: bool = False


class Prober:
    """Probes silent workers on their nodes, one task per node at a time.

    Args:
        heartbeat_timeout_s: of the run.
    """

    def __init__(self, heartbeat_timeout_s: float) -> None:
        self._timeout_s = heartbeat_timeout_s
        self._flights: dict[str, _Flight] = {}
        self._late: collections.deque[_Flight] = collections.deque(maxlen=MAX_LATE)  # given up as lost, and perhaps only slow
        self._known: dict[Held, _Known] = {}
        self._run = ""
        self._unasked: set[str] = set()
        self._surveys: dict[str, Any] = {}

    def survey(self, run: str) -> None:
        """Ask every node whom it holds, for `surveyed`."""
        self._run = run
        self._unasked.update(_ray.alive_nodes())

    def surveyed(self) -> list[Mapping[str, Any]]:
        """What the nodes have answered meanwhile: of each worker what a beat says of its process. One that is frozen answers late.

        A node has one question at a time, whose answer is always taken: a manager that is late for each look surveys at each.
        """
        said = {node_id: self._surveys.pop(node_id) for node_id, ref in [*self._surveys.items()] if _ray.is_done(ref)}
        answers = {node_id: _ray.result_or_none(ref) for node_id, ref in said.items()}
        self._unasked.update(node_id for node_id, found in answers.items() if found is None and _ray.is_alive(node_id))
        for node_id in self._unasked - self._surveys.keys():
            self._unasked.remove(node_id)
            self._surveys[node_id] = _ray.run_on_node(survey, node_id, self._run)
        return [_adopted(node_id, *held) for node_id, found in answers.items() for held in found or ()]

    def step(self, silent: list[Mapping[str, Any]], now: float) -> list[Found]:
        """Start the probes that are due, and take what the others say.

        Args:
            silent: the newest beats of the workers that nothing is heard of.
            now: monotonic seconds.

        Returns:
            What was found since the last step.
        """
        found = self._land_late()
        found += [answer for node_id in list(self._flights) for answer in self._land(node_id, now)]
        self._known = {held: self._known.get(held, _Known()) for held in map(_held, silent)}
        by_node: dict[str, list[Mapping[str, Any]]] = {}
        for beat in silent:
            known = self._known[_held(beat)]
            if now >= known.again_at and not known.over and beat["node_id"] not in self._flights:
                by_node.setdefault(beat["node_id"], []).append(beat)
        for node_id, beats in by_node.items():
            asked = [Silent(_held(beat), _process(beat), self._known[_held(beat)].stood, beat.get("marked", False)) for beat in beats]
            ref = _ray.run_on_node(probe, node_id, asked, self._timeout_s)
            self._flights[node_id] = _Flight(ref, beats, now + self._timeout_s, now + max(self._timeout_s, LOST_S))
        return found

    def _land(self, node_id: str, now: float) -> list[Found]:
        flight = self._flights[node_id]
        if not _ray.is_done(flight.ref):  # asked first, and once: it may end at any moment
            if now < flight.until:
                return []
            if now >= flight.lost_at and _ray.is_alive(node_id):  # it may be lost on its way, and would be waited for without end
                _ray.cancel(flight.ref)
                self._late.append(flight)
                del self._flights[node_id]
            flight.until = now + self._timeout_s
            return [self._miss(beat) for beat in flight.beats]
        del self._flights[node_id]
        answers: list[Answer] | None = _ray.result_or_none(flight.ref)
        if answers is None:  # with the node Ray runs its tasks elsewhere; a probe that was killed says nothing
            answers = [Answer(Verdict.UNKNOWN if _ray.is_alive(node_id) else Verdict.GONE)] * len(flight.beats)
        return [self._note(beat, answer, now) for beat, answer in zip(flight.beats, answers, strict=True)]

    def _land_late(self) -> list[Found]:
        """Of probes that came after they had been given up, whom they have ended: nobody else can say that."""
        landed = [flight for flight in self._late if _ray.is_done(flight.ref)]
        for flight in landed:
            self._late.remove(flight)
        answers = [(flight.beats, _ray.result_or_none(flight.ref) or ()) for flight in landed]
        return [
            Found(beat, answer.verdict)
            for beats, said in answers
            for beat, answer in zip(beats, said, strict=False)
            if answer.verdict.kills
        ]

    def _miss(self, beat: Mapping[str, Any]) -> Found:
        known = self._known.setdefault(_held(beat), _Known())
        found = Found(beat, None, not known.missed)
        known.missed, known.seen = True, None
        return found

    def _note(self, beat: Mapping[str, Any], answer: Answer, now: float) -> Found:
        known = self._known.setdefault(_held(beat), _Known())
        found = Found(beat, answer.verdict, answer.verdict is not known.seen)
        known.again_at, known.stood, known.seen = now + self._timeout_s / LOOKS_PER_TIMEOUT, answer.stood, answer.verdict
        known.over, known.missed = answer.verdict.kills or answer.verdict is Verdict.GONE, False
        return found


def _held(beat: Mapping[str, Any]) -> Held:
    return Held(beat["task"], beat["worker_id"], beat["token"], beat["run"], beat["attempt"])


def _process(beat: Mapping[str, Any]) -> ProcessId:
    return ProcessId(beat["boot_id"], beat["pid"], beat["start_time"])


def _adopted(node_id: str, process: ProcessId, held: Held) -> Mapping[str, Any]:
    """As a beat says it."""
    return {
        "task": held.task,
        "worker_id": held.worker_id,
        "token": held.token,
        "run": held.run,
        "attempt": held.attempt,
        "node_id": node_id,
        "boot_id": process.boot_id,
        "pid": process.pid,
        "start_time": process.start_time,
        "current_batch": None,
        "marked": True,
    }
