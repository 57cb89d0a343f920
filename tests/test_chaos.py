"""Two hundred deaths, many of them inside the library, with the manager killed again and again: every result is exact."""

from __future__ import annotations

import os
import random
import threading
from collections import Counter
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import pytest
import ray

from tests.chaos import POINTS, STEPS, Size, chaotic, make_plan
from tests.tasks import Trace, assert_never_behind, end_manager, expected

if TYPE_CHECKING:
    from pathlib import Path

    from typing_extensions import Self

    import faultguard
    from tests.conftest import StartRun

SIZE = Size(workers=8, batches=60, exceptions=100, crashes=60, at_points=56)
MANAGER_KILLS = 20
TIMEOUT_S = 280


def test_a_plan_is_its_seed() -> None:
    """A run can be played again from the seed that it prints, and holds what is asked for."""
    plan = make_plan(7, SIZE)
    assert plan == make_plan(7, SIZE) != make_plan(8, SIZE)
    kinds = Counter(kind for deaths in plan.values() for kind in deaths.values())
    assert sum(kinds.values()) == SIZE.deaths >= 200
    assert sum(kinds[point] for point in POINTS) >= 30


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(TIMEOUT_S + 60)
def test_chaos(start_run: StartRun, tmp_path: Path) -> None:
    """Whatever dies, and wherever: exact results, no attempt behind what was durable, and few batches redone."""
    seed = int(os.environ.get("FAULTGUARD_CHAOS_SEED", random.SystemRandom().randrange(10**6)))
    print(f"seed {seed}; replay with FAULTGUARD_CHAOS_SEED={seed}")
    run = start_run(heartbeat_interval=0.2, heartbeat_timeout=20.0)
    trace = Trace(tmp_path / "trace")
    plan = make_plan(seed, SIZE)
    refs = [chaotic.remote(worker, SIZE.batches, trace, deaths) for worker, deaths in plan.items()]
    with _Assassin(run) as assassin:
        results = ray.get(refs, timeout=TIMEOUT_S)
        assassin.finish()
    assert results == [expected(SIZE.batches)] * SIZE.workers
    died = {(note["worker"], note["batch"]) for note in trace.notes("death")}
    missed = {place for place in _places(plan) if place not in died}
    assert len(died) >= 200, f"only {len(died)} deaths took place"
    assert not {plan[worker][batch] for worker, batch in missed} - set(STEPS), missed  # another death came before that step
    assert sum(plan[worker][batch] in POINTS for worker, batch in died) >= 30
    assert assassin.kills >= MANAGER_KILLS
    for worker in plan:
        assert_never_behind(trace, worker)
        _assert_few_redone(trace, worker)


def _places(plan: dict[str, dict[int, str]]) -> list[tuple[str, int]]:
    return [(worker, batch) for worker, deaths in plan.items() for batch in deaths]


def _assert_few_redone(trace: Trace, worker: str) -> None:
    """What runs again after a death is not older than one batch and two writes, as long as they took in this run.

    Every batch writes (`every=1`), so the snapshot interval is that of encoding: as long as a batch at most.
    """
    write_s = max(note["took"] for note in trace.notes("ack"))
    notes = trace.notes(worker=worker)
    begun = [note for note in notes if note["what"] == "batch"]
    gaps = [b["time"] - a["time"] for a, b in pairwise(begun) if a["attempt"] == b["attempt"]]
    bound_s = 2 * max(gaps) + 2 * write_s
    for before, after in pairwise(begun):
        if before["attempt"] == after["attempt"]:
            continue
        died_at = max(note["time"] for note in notes if (note["time"] <= after["time"] and note["what"] != "batch") or note is before)
        done_since = [n for n in begun if n["attempt"] == before["attempt"] and n["batch"] > after["batch"]]
        if done_since:
            age_s = min(before["time"], died_at) - done_since[0]["time"]
            assert age_s <= bound_s, f"{worker} began again at {after['batch']}, done {age_s:.3f} s before its death; bound {bound_s:.3f} s"


class _Assassin:
    """Kills the manager again and again, beside the test."""

    def __init__(self, run: faultguard.Run) -> None:
        self.kills = 0
        self._run = run
        self._error: BaseException | None = None
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._work)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join(60)

    def finish(self) -> None:
        """Wait until there were enough kills; most have happened by now."""
        self._thread.join(60)
        if self._error is not None:
            raise self._error

    def _work(self) -> None:
        try:
            killed: Any = None
            while self.kills < MANAGER_KILLS and not self._stop.is_set():
                pid = end_manager()
                self.kills += pid != killed
                killed = pid
                self._stop.wait(0.5)
        except BaseException as error:  # noqa: BLE001 - raised in the test's thread
            self._error = error
