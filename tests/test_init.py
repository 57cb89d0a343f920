"""`init` refuses what cannot work, each with the way out, before anything is made."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import pytest

import faultguard
from faultguard import UsageError, _lease, _ray
from tests.tasks import wait_until

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a driver of Ray."""
    monkeypatch.setattr(_ray, "is_ready", lambda: True)
    monkeypatch.setattr(_ray, "is_driver", lambda: True)


@pytest.mark.usefixtures("driver")
@pytest.mark.parametrize("options", [{"resume": "never"}, {"takeover": True}], ids=lambda options: next(iter(options)))
def test_only_a_named_run_outlives_its_driver(options: dict[str, Any]) -> None:
    """What belongs to named runs is refused without a name."""
    with pytest.raises(UsageError, match=r"is refused without a run: only one with a name outlives its driver"):
        faultguard.init(**options)


@pytest.mark.usefixtures("driver")
@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"run": "r", "resume": "yes"}, r"^resume='yes' is refused; it takes one of 'auto', 'never', 'always'$"),
        ({"run": "r", "takeover": "yes"}, r"^takeover='yes' is refused; it takes True or False$"),
        ({"run": "r", "check_args": 1}, r"^check_args=1 is refused"),
        ({"run": ""}, r"^run '' is refused"),
        ({"run": "runs"}, r"^run='runs' is refused: that folder of a checkpoint directory has another meaning"),
        ({"run": "unnamed-x"}, r"^run='unnamed-x' is refused"),
    ],
    ids=str,
)
def test_options_of_named_runs_are_checked(options: dict[str, Any], said: str, tmp_path: Path) -> None:
    """Before anything is made."""
    with pytest.raises(UsageError, match=said):
        faultguard.init(checkpoint_dir=tmp_path / "c", **options)
    assert not (tmp_path / "c").exists()


def test_ray_comes_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """It does not start Ray."""
    monkeypatch.setattr(_ray, "is_ready", lambda: False)
    with pytest.raises(UsageError, match=r"needs Ray: call ray.init\(\) first"):
        faultguard.init()


def test_it_belongs_into_the_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    """A task takes over what the driver decided."""
    monkeypatch.setattr(_ray, "is_ready", lambda: True)
    monkeypatch.setattr(_ray, "is_driver", lambda: False)
    with pytest.raises(UsageError, match="belongs into the driver, not into a task"):
        faultguard.init()


@pytest.mark.ray
def test_one_run_at_a_time(run: faultguard.Run) -> None:
    """A second one would take the tasks of the first."""
    with pytest.raises(UsageError, match=r"this driver has a run already; call faultguard.shutdown\(\) first"):
        faultguard.init()
    assert faultguard.workers() == []


@pytest.mark.ray
@pytest.mark.parametrize("name", [None, "nightly"], ids=["unnamed", "named"])
def test_a_start_that_fails_leaves_no_run(ray_cluster: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str | None) -> None:
    """The cluster cannot be told: the driver has no run, nobody has the named one, and the next try works."""
    with monkeypatch.context() as failing:
        failing.setattr(_ray, "kv_put", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            faultguard.init(run=name, checkpoint_dir=tmp_path)
    assert not _lease._lessor._clients
    with faultguard.init(run=name, checkpoint_dir=tmp_path) as run:
        assert run.instance == (name is not None)


@pytest.mark.ray
def test_two_threads_start_one_run(ray_cluster: str, tmp_path: Path) -> None:
    """The second is refused, as one after the other would be: it must not take the run from its own process."""
    begun = []

    def begin() -> object:
        """One of the threads."""
        begun.append(threading.current_thread())
        wait_until(lambda: len(begun) == 2)
        try:
            return faultguard.init(run="nightly", checkpoint_dir=tmp_path)
        except UsageError as error:
            return error

    try:
        with ThreadPoolExecutor(2) as pool:
            got = [future.result() for future in [pool.submit(begin) for _ in range(2)]]
        assert sorted(type(one).__name__ for one in got) == ["Run", "UsageError"]
    finally:
        faultguard.shutdown()
