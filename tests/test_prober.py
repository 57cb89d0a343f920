"""Which silent workers are looked at, when again, and what a probe that never answered means. Ray is played."""

from __future__ import annotations

from typing import Any

import pytest

from faultguard import _ray
from faultguard._core.silence import Held, Verdict
from faultguard._probe import Answer
from faultguard._prober import Prober
from faultguard._process import ProcessId

TIMEOUT_S = 60.0
BEAT = {"run": "r", "task": "t", "worker_id": "w", "attempt": 1, "token": 7, "node_id": "n", "boot_id": "b", "pid": 1, "start_time": 2}


class PlayedRay:
    """Probes that end when the test says so; an answer of None is that of one that was killed."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.started = self.cancelled = 0
        self.answers: dict[int, list[Any] | None] = {}  # of those that have ended
        self.alive = True
        monkeypatch.setattr(_ray, "run_on_node", self._run)
        monkeypatch.setattr(_ray, "is_done", lambda ref: ref in self.answers)
        monkeypatch.setattr(_ray, "result_or_none", self.answers.get)
        monkeypatch.setattr(_ray, "is_alive", lambda _: self.alive)
        monkeypatch.setattr(_ray, "cancel", self._cancel)

    def _run(self, *asked: Any) -> int:
        self.started, self.asked = self.started + 1, asked
        return self.started

    def _cancel(self, _: Any) -> None:
        self.cancelled += 1

    def ends(self, verdict: Verdict | None, number: int | None = None) -> None:
        """The newest probe, or the one of that number."""
        self.says([Answer(verdict)] if verdict is not None else None, number)

    def says(self, answer: list[Any] | None, number: int | None = None) -> None:
        """Likewise, with any answer."""
        self.answers[number or self.started] = answer


@pytest.fixture
def played(monkeypatch: pytest.MonkeyPatch) -> PlayedRay:
    """A cluster of one node."""
    return PlayedRay(monkeypatch)


def test_a_probe_that_was_killed_says_nothing(played: PlayedRay) -> None:
    """On a node that is alive it is sent again; only with its node a worker is gone."""
    prober = Prober(TIMEOUT_S)
    assert prober.step([BEAT], 0.0) == []
    for now, alive, verdict in ((1.0, True, Verdict.UNKNOWN), (17.0, False, Verdict.GONE)):
        played.alive = alive
        played.ends(None)
        (found,) = prober.step([BEAT], now)
        assert found.verdict is verdict
        prober.step([BEAT], now + TIMEOUT_S / 4)
    assert played.started == 2


def test_the_same_is_new_once(played: PlayedRay) -> None:
    """However often it is looked at; again when something else was seen, or the worker was heard in between."""
    prober = Prober(TIMEOUT_S)
    news = []
    for number, verdict in enumerate([Verdict.BUSY, Verdict.BUSY, Verdict.TRACED, Verdict.BUSY]):
        prober.step([BEAT], 20.0 * number)
        played.ends(verdict)
        news += [found.is_new for found in prober.step([BEAT], 20.0 * number + 1)]
    assert news == [True, False, True, True]
    prober.step([], 100.0)
    prober.step([BEAT], 101.0)
    played.ends(Verdict.BUSY)
    assert [found.is_new for found in prober.step([BEAT], 102.0)] == [True]


def test_a_node_that_does_not_answer_is_told_once(played: PlayedRay) -> None:
    """Is it dead, its probe stays on its way until Ray says so."""
    played.alive = False
    prober = Prober(TIMEOUT_S)
    found = [each for now in (0.0, 30.0, 61.0, 90.0, 200.0) for each in prober.step([BEAT], now)]
    assert [each.verdict for each in found if each.is_new] == [None]
    assert (played.started, played.cancelled) == (1, 0)
    played.ends(Verdict.ALIVE)
    assert [each.verdict for each in prober.step([BEAT], 201.0)] == [Verdict.ALIVE]


def test_a_probe_that_is_lost_on_its_way_is_sent_again(played: PlayedRay) -> None:
    """The node is alive, and Ray has nothing of it: its workers must not be out of sight for good. That it does not answer is told once."""
    prober = Prober(TIMEOUT_S)
    found = [each for now in (0.0, 61.0, 62.0, 123.0, 124.0) for each in prober.step([BEAT], now)]
    assert [(each.verdict, each.is_new) for each in found] == [(None, True), (None, False)]
    assert (played.started, played.cancelled) == (3, 2)
    played.ends(Verdict.KILL_STALLED)
    assert [each.verdict for each in prober.step([BEAT], 125.0)] == [Verdict.KILL_STALLED]


def test_an_answer_that_comes_while_it_is_looked_for_counts(played: PlayedRay, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between two questions to Ray a probe may end: that it has answered must not be taken for the silence of one that was killed."""

    def asked(ref: int, answer: Any) -> Any:
        played.answers.setdefault(ref, [Answer(Verdict.KILL_STALLED)])
        return answer

    monkeypatch.setattr(_ray, "is_done", lambda ref: asked(ref, ref in played.answers))
    monkeypatch.setattr(_ray, "result_or_none", lambda ref: asked(ref, played.answers.get(ref)))
    prober = Prober(TIMEOUT_S)
    found = [each.verdict for now in (0.0, 1.0, 2.0) for each in prober.step([BEAT], now)]
    assert found == [Verdict.KILL_STALLED]


def test_a_slow_probe_is_not_cut(played: PlayedRay) -> None:
    """With a short timeout, on a machine that is busy, it may just have ended a process: who cuts it then never hears of that."""
    prober = Prober(1.5)
    found = [each for now in (0.0, 1.6, 3.2, 20.0) for each in prober.step([BEAT], now)]
    assert [each.verdict for each in found if each.is_new] == [None]
    assert (played.started, played.cancelled) == (1, 0)
    played.ends(Verdict.KILL_STOPPED)
    assert [each.verdict for each in prober.step([], 21.0)] == [Verdict.KILL_STOPPED]


def test_a_probe_that_was_late_says_what_it_has_done(played: PlayedRay) -> None:
    """It was given up as lost, and has ended a process before that reached it: its answer is the only one that there will be."""
    prober = Prober(TIMEOUT_S)
    prober.step([BEAT], 0.0)
    prober.step([BEAT], 61.0)
    assert played.cancelled == 1
    played.ends(Verdict.KILL_STALLED, 1)
    assert [each.verdict for each in prober.step([], 62.0)] == [Verdict.KILL_STALLED], "its worker is not silent any more"
    assert prober.step([], 63.0) == []


def test_a_probe_that_was_late_and_cancelled_says_nothing(played: PlayedRay) -> None:
    """Nor does one that has only looked: the next one says more."""
    for verdict in (None, Verdict.BUSY):
        prober, first = Prober(TIMEOUT_S), played.started + 1
        prober.step([BEAT], 0.0)
        prober.step([BEAT], 61.0)
        played.ends(verdict, first)
        assert prober.step([], 62.0) == []


def test_a_node_is_asked_once_at_a_time_and_every_answer_counts(played: PlayedRay, monkeypatch: pytest.MonkeyPatch) -> None:
    """A manager that is late for each look wants to ask at each: it must not drop the answer for the sake of the next question."""
    monkeypatch.setattr(_ray, "alive_nodes", lambda: ["n"])
    prober = Prober(TIMEOUT_S)
    held = (ProcessId("b", 1, 2), Held("t", "w", 7, "r", 1))
    for _ in range(3):
        prober.survey("r")
        assert prober.surveyed() == []
    assert played.started == 1
    played.says([held])
    (adopted,) = prober.surveyed()
    assert {key: adopted[key] for key in BEAT} == BEAT
    assert played.started == 2, "it was to be asked again"
    played.says(None)
    assert prober.surveyed() == []
    assert played.started == 3, "the process that was asked was killed, the node was not"
    played.says(None)
    played.alive = False
    assert prober.surveyed() == prober.surveyed() == []
    assert played.started == 3


def test_whom_a_node_has_named_has_marked_a_file(played: PlayedRay, monkeypatch: pytest.MonkeyPatch) -> None:
    """So that its end is seen, too, whose final beat went to the manager before; of others the probe does not know that."""
    monkeypatch.setattr(_ray, "alive_nodes", lambda: ["n"])
    prober = Prober(TIMEOUT_S)
    prober.survey("r")
    prober.surveyed()
    played.says([(ProcessId("b", 1, 2), Held("t", "adopted", 7, "r", 1))])
    prober.step([BEAT, *prober.surveyed()], 0.0)
    assert [(each.worker.worker_id, each.marked) for each in played.asked[2]] == [("w", False), ("adopted", True)]
