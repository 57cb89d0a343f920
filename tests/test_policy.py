"""Which exceptions are retried, and after which wait."""

from __future__ import annotations

import uuid
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import pytest

from faultguard import _attempt, _beater, _ray, errors
from faultguard._attempt import TaskOptions, Work, run_task
from faultguard._settings import Settings
from faultguard.errors import FaultguardError, MaxFailuresExceeded, StalledError, UsageError
from faultguard.policy import Backoff, check_matcher, verdict
from faultguard.storage import open_store, store_id

if TYPE_CHECKING:
    from faultguard.policy import Matcher

OURS = [getattr(errors, name) for name in errors.__all__]
RETRIED_OF_OURS = [kind for kind in OURS if issubclass(kind, StalledError)]
FINAL_OF_OURS = [kind for kind in OURS if kind not in RETRIED_OF_OURS]


class Picky:
    """A predicate that is an object."""

    def __call__(self, error: BaseException) -> bool:
        """Only keys are tried again."""
        return isinstance(error, KeyError)


@pytest.mark.parametrize(
    "options",
    [{}, {"initial": 0}, {"factor": 1}, {"maximum": 0}, {"jitter": False}, {"initial": 0.25, "factor": 2.5, "maximum": 1e6}],
)
def test_backoff_takes_values_at_the_edge(options: dict[str, Any]) -> None:
    """The smallest allowed values are allowed, and kept as they are."""
    backoff = Backoff(**options)
    assert {name: getattr(backoff, name) for name in options} == options


@pytest.mark.parametrize(
    ("name", "value", "least"),
    [
        ("initial", -0.1, 0),
        ("initial", True, 0),
        ("initial", "1", 0),
        ("initial", None, 0),
        ("initial", float("nan"), 0),
        ("initial", float("inf"), 0),
        ("initial", timedelta(seconds=1), 0),
        ("factor", 0.99, 1),
        ("factor", float("inf"), 1),
        ("maximum", -1, 0),
        ("maximum", float("inf"), 0),
        ("maximum", float("nan"), 0),
    ],
)
def test_backoff_refuses_what_is_out_of_range(name: str, value: object, least: int) -> None:
    """A wait that is no finite number of its range is refused, with the value and the range."""
    with pytest.raises(UsageError) as refused:
        Backoff(**{name: value})  # type: ignore[arg-type]
    assert str(refused.value) == f"Backoff({name}={value!r}) is refused; it takes a number, at least {least}"


@pytest.mark.parametrize("value", [1, 0, None, "full"])
def test_backoff_refuses_a_jitter_that_is_no_bool(value: Any) -> None:
    """Jitter is on or off."""
    with pytest.raises(UsageError) as refused:
        Backoff(jitter=value)
    assert str(refused.value) == f"Backoff(jitter={value!r}) is refused; it takes True or False"


@pytest.mark.parametrize("matcher", [ValueError, Exception, (), (ValueError, OSError), lambda _: True, Picky(), isinstance])
def test_a_matcher_is_a_type_a_tuple_or_a_predicate(matcher: Any) -> None:
    """Every documented kind of matcher passes, unchanged."""
    assert check_matcher("retry_on", matcher) is matcher


@pytest.mark.parametrize(
    "matcher", [None, "ValueError", 1, int, BaseException, KeyboardInterrupt, (ValueError, "x"), (ValueError, SystemExit), [ValueError]]
)
@pytest.mark.parametrize("name", ["retry_on", "give_up_on"])
def test_a_matcher_is_nothing_else(name: str, matcher: Any) -> None:
    """Anything else is refused; so is catching the end of the process."""
    with pytest.raises(UsageError) as refused:
        check_matcher(name, matcher)
    assert str(refused.value).startswith(f"{name}={matcher!r} is refused; it takes an exception type, a tuple of them, or a predicate")


@pytest.mark.parametrize(
    ("error", "retry_on", "give_up_on", "expected"),
    [
        (ValueError(), Exception, (), True),
        (ValueError(), (), (), False),
        (ValueError(), OSError, (), False),
        (FileNotFoundError(), OSError, (), True),
        (FileNotFoundError(), OSError, FileNotFoundError, False),
        (FileNotFoundError(), (KeyError, OSError), (ValueError,), True),
        (KeyError(), Picky(), (), True),
        (ValueError(), Picky(), (), False),
        (KeyError(), Exception, Picky(), False),
        (ValueError(), Exception, Picky(), True),
    ],
)
def test_verdict_asks_both_matchers(error: Exception, retry_on: Matcher, give_up_on: Matcher, expected: bool) -> None:
    """Retried is what `retry_on` names and `give_up_on` does not."""
    assert verdict(error, retry_on, give_up_on) is expected


@pytest.mark.parametrize("wait", [timedelta(seconds=30), timedelta(0)])
def test_a_predicate_may_say_the_wait(wait: timedelta) -> None:
    """A timedelta means: again, after that time; also when it is zero, which is false as a bool."""
    answer = verdict(ValueError(), lambda _: wait, ())
    assert answer == wait
    assert answer is not False


@pytest.mark.parametrize(("answer", "expected"), [(1, True), ("yes", True), (0, False), (None, False)])
def test_other_answers_of_a_predicate_are_bools(answer: Any, expected: bool) -> None:
    """A predicate that forgets to return is one that says no."""
    assert verdict(ValueError(), lambda _: answer, ()) is expected


@pytest.mark.parametrize("kind", FINAL_OF_OURS)
@pytest.mark.parametrize("retry_on", [Exception, FaultguardError, lambda _: True], ids=["Exception", "FaultguardError", "predicate"])
def test_our_own_errors_are_final(kind: type[FaultguardError], retry_on: Matcher) -> None:
    """What would come again, or belongs to another attempt, is not retried even on demand."""
    assert verdict(kind("x"), retry_on, ()) is False


def test_a_stall_is_retried() -> None:
    """It is a failure of the work, unless told not to."""
    assert verdict(StalledError("x"), Exception, ()) is True
    assert verdict(StalledError("x"), Exception, StalledError) is False


# --- the waits of a task --------------------------------------------------------------------------------------------


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The seconds that tasks wait before their retries; nobody really waits, and nobody beats."""
    found: list[float] = []
    monkeypatch.setattr(_attempt._Task, "_sleep", lambda _, seconds: found.append(seconds))
    monkeypatch.setattr(_beater, "register", lambda _: None)
    monkeypatch.setattr(_beater, "unregister", lambda _: None)
    return found


def fail_times(n: int, error: Exception, max_failures: int, **options: Any) -> str:
    """Run a task, without a cluster, that fails `n` times."""
    url = "memory://policy"
    settings = Settings("run", url, store_id(open_store(url)), "01")
    failures = iter(range(n))

    def body() -> str:
        if next(failures, None) is not None:
            raise error
        return "done"

    identity = _ray.Identity("01", "node", uuid.uuid4().hex, 0, "task", "task")
    chosen = TaskOptions("task", max_failures, **options)
    return str(run_task(settings, identity, chosen, uuid.uuid4().hex, Work(body, repeatable=True)))


def test_without_jitter_the_waits_grow_to_their_maximum(waits: list[float]) -> None:
    """Initial * factor ** (failures - 1), and never more than maximum."""
    backoff = Backoff(initial=0.5, factor=3, maximum=10, jitter=False)
    assert fail_times(5, ValueError("x"), 5, backoff=backoff) == "done"
    assert waits == [0.5, 1.5, 4.5, 10, 10]


def test_with_jitter_the_waits_are_spread_below_that(waits: list[float]) -> None:
    """Each wait is drawn evenly between 0 and what it would be without jitter."""
    backoff = Backoff(initial=2, factor=5, maximum=30)
    for _ in range(100):
        assert fail_times(3, ValueError("x"), 3, backoff=backoff) == "done"
    for place, bound in enumerate([2, 10, 30]):
        drawn = sorted(waits[place::3])
        assert 0 <= drawn[0] < 0.25 * bound < 0.75 * bound < drawn[-1] <= bound


def test_a_very_long_history_does_not_overflow(waits: list[float]) -> None:
    """A power too large for a float is still the maximum."""
    assert fail_times(400, ValueError("x"), -1, backoff=Backoff(initial=1, factor=10, maximum=7, jitter=False)) == "done"
    assert waits[-1] == 7


def test_a_predicates_wait_is_taken_as_it_is(waits: list[float]) -> None:
    """Neither jitter nor maximum touch it."""

    def wait(error: BaseException) -> timedelta:
        return timedelta(minutes=30)

    assert fail_times(2, ValueError("x"), 2, retry_on=wait, backoff=Backoff(maximum=1)) == "done"
    assert waits == [1800, 1800]


def test_the_budget_is_not_waited_for(waits: list[float]) -> None:
    """`max_failures` waits for `max_failures + 1` attempts, and none after the last."""
    with pytest.raises(MaxFailuresExceeded) as caught:
        fail_times(9, ValueError("x"), 2, backoff=Backoff(initial=0))
    assert isinstance(caught.value, ValueError)
    assert [failure.attempt for failure in caught.value.failures] == [1, 2, 3]
    assert waits == [0, 0]


@pytest.mark.parametrize(
    ("error", "options"),
    [
        (ValueError("mine"), {"retry_on": OSError}),
        (ValueError("mine"), {"give_up_on": ValueError}),
        (ValueError("mine"), {"retry_on": lambda _: False}),
        (UsageError("ours"), {}),
    ],
)
def test_what_is_not_retried_arrives_as_itself(waits: list[float], error: Exception, options: dict[str, Any]) -> None:
    """At once, and as the user raised it."""
    with pytest.raises(type(error)) as caught:
        fail_times(9, error, 5, **options)
    assert caught.value is error
    assert waits == []
