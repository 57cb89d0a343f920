"""`init` refuses what cannot work, each with the way out, before anything is made."""

from __future__ import annotations

from typing import Any

import pytest

import faultguard
from faultguard import UsageError, _ray


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a driver of Ray."""
    monkeypatch.setattr(_ray, "is_ready", lambda: True)
    monkeypatch.setattr(_ray, "is_driver", lambda: True)


@pytest.mark.usefixtures("driver")
@pytest.mark.parametrize("options", [{"run": "nightly"}, {"resume": "never"}, {"takeover": True}], ids=lambda options: next(iter(options)))
def test_named_runs_do_not_exist_yet(options: dict[str, Any]) -> None:
    """What belongs to them is refused."""
    with pytest.raises(UsageError, match=r"is refused: named runs do not exist yet; leave them out"):
        faultguard.init(**options)


@pytest.mark.usefixtures("driver")
@pytest.mark.parametrize("value", [True, False])
def test_arguments_are_not_compared_yet(monkeypatch: pytest.MonkeyPatch, value: bool) -> None:
    """Nor is what named runs compare, not even with its default, nor through the environment."""
    with pytest.raises(UsageError, match=r"check_args, or FAULTGUARD_CHECK_ARGS, is refused: it belongs to named runs"):
        faultguard.init(check_args=value)
    monkeypatch.setenv("FAULTGUARD_CHECK_ARGS", str(value))
    with pytest.raises(UsageError, match=r"check_args, or FAULTGUARD_CHECK_ARGS, is refused: it belongs to named runs"):
        faultguard.init()


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
