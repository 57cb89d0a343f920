"""Prove in a test that a task resumes right: no cluster, no disk, every place where it can be cut.

>>> import faultguard
>>> from faultguard.testing import check_resumable
>>> @faultguard.recoverable
... def total(numbers):
...     ckpt = faultguard.current()
...     for number in ckpt.batches(numbers):
...         ckpt.state["total"] = ckpt.state.get("total", 0) + number
...     return ckpt.state["total"]
>>> check_resumable(total, [1, 2, 3]).batches
3
"""

from __future__ import annotations

import contextlib
import inspect
import io
import sys
import time
import warnings
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

from ray import cloudpickle

from faultguard import _hints, _ray, _session
from faultguard._difference import difference, frozen_copy
from faultguard._handle import stand_in
from faultguard._other_process import OtherProcess, mentions_sets, packed
from faultguard._recoverable import RecoverableFunction
from faultguard._rehearsal import Attempt, InterruptedHereError, Key, Kill, KilledHere, Line, Seen, Story, World, where
from faultguard.errors import InputChangedError, ResumabilityError, UsageError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from types import CodeType

__all__ = ["ResumabilityError", "ResumabilityReport", "check_resumable"]

MAX_KILLS = 1000
MAX_SECONDS = 60.0
ENOUGH = 0.5  # of all kills: where fewer were tried and nobody has said so, it is told
MAX_ELSEWHERE = 5  # kills after which the work goes on in another process


@dataclass(frozen=True, slots=True)
class ResumabilityReport:
    """What `check_resumable` has tried, all of it with the result of the undisturbed run.

    Attributes:
        task: name of the function.
        batches: that the undisturbed run has done.
        kills: how often it was killed; a task that is killed twice in a row counts once.
        possible: how many such kills there are; more than `kills` where only a part was tried.
        other_process: kills after which it went on in a process with another hash seed.
        seconds: that all of it took.
    """

    task: str
    batches: int
    kills: int
    possible: int
    other_process: int
    seconds: float

    @property
    def is_complete(self) -> bool:
        """Whether every kill was tried."""
        return self.kills == self.possible

    def __str__(self) -> str:
        """In one line."""
        elsewhere = f", {self.other_process} times continued in another process" if self.other_process else ""
        done = f"{self.batches} batches, killed at"
        if self.is_complete:
            return f"{self.task!r} resumes right: {done} {self.kills} places{elsewhere}, in {self.seconds:.2f} s"
        tried = f"{self.kills} of {self.possible} places"
        return f"{self.task!r} resumes right where it was tried: {done} {tried}{elsewhere}, in {self.seconds:.2f} s"


def check_resumable(
    fn: Callable[..., Any],
    /,
    *args: Any,
    kwargs: Mapping[str, Any] | None = None,
    effects: Callable[[], Any] | None = None,
    reset: Callable[[], Any] | None = None,
    max_kills: int = MAX_KILLS,
    max_seconds: float = MAX_SECONDS,
    other_process: bool | None = None,
) -> ResumabilityReport:
    """Run a task undisturbed, then kill it wherever it can be cut, let it resume, and compare what comes out.

    It is killed at every boundary and inside every batch (in the middle of the body, and at its end), killed again right after it has
    resumed, and resumed from a checkpoint that is one boundary older. All of it happens in this process, in memory, without Ray: a kill
    is an exception that the task must let through. Each attempt gets the arguments as they were first passed; module-level state it
    shares with the others. What it prints is shown once.

    Args:
        fn: a plain function that uses `batches`, `current` or `checkpointed`, or one under `@recoverable` or `@ray.remote`, or both.
        args: for it. They are pickled, as for a task; give it a small input, as it runs hundreds of times.
        kwargs: for it, by name.
        effects: gives what the task has done to the world, such as the content of a table; compared after every resume, too. Needs `reset`.
        reset: undoes that. Called before the undisturbed run, and before each kill.
        max_kills: how many kills are tried; of more than that a part, evenly spread, and the report says so.
        max_seconds: likewise; as many kills as take about so long. Each takes as long as the task, so give it a small input. Where less
            than half of the kills were tried, and neither limit was given, that is a `UserWarning`.
        other_process: whether it goes on in a new process as well, with another hash seed, where sets have another order and nothing of
            this process is left; `effects` are not compared there. Takes a second or so. None: if the task has to do with sets or hashes.

    Returns:
        What was tried.

    Raises:
        ResumabilityError: a resumed run does not end as the undisturbed one; an `AssertionError`. The text names the first difference,
            where the task was killed, and, where it can, the line to change.
        UsageError: `fn` cannot be a task, has no boundary, or its arguments cannot be pickled.
    """
    __tracebackhide__ = True
    _check_options(effects, reset, max_kills, max_seconds)
    started = time.perf_counter()
    rehearsal = Rehearsal(*_task_and_arguments(fn, args, dict(kwargs or {})), effects=effects, reset=reset)
    with contextlib.ExitStack() as stack:
        elsewhere = None
        if other_process or (other_process is None and mentions_sets(fn, (args, kwargs))):
            elsewhere = OtherProcess()
            stack.callback(elsewhere.close)
        trials, possible = rehearsal.plan(max_kills, max_seconds)
        for trial in trials:
            rehearsal.check(trial)
        continued = rehearsal.check_elsewhere(elsewhere, asked=bool(other_process)) if elsewhere is not None else 0
    batches = len(rehearsal.story.ends)
    report = ResumabilityReport(rehearsal.name, batches, len(trials), possible, continued, time.perf_counter() - started)
    if report.kills < ENOUGH * report.possible and (max_kills, max_seconds) == (MAX_KILLS, MAX_SECONDS):
        text = (
            f"{report}; what goes wrong elsewhere was not seen. Give it less input, or say with max_seconds= and max_kills= what is enough"
        )
        warnings.warn(text, stacklevel=2)
    return report


def _check_options(effects: object, reset: object, max_kills: object, max_seconds: object) -> None:
    if (effects is None) != (reset is None):
        raise UsageError("check_resumable() takes effects= and reset= together: what was done before must not hide what is missing now")
    for name, value in (("effects", effects), ("reset", reset)):
        if value is not None and not callable(value):
            raise UsageError(f"check_resumable({name}={value!r}) is refused; it takes a callable without arguments")
    if isinstance(max_kills, bool) or not isinstance(max_kills, int) or max_kills < 1:
        raise UsageError(f"check_resumable(max_kills={max_kills!r}) is refused; it takes an int, at least 1")
    if isinstance(max_seconds, bool) or not isinstance(max_seconds, (int, float)) or not max_seconds > 0:
        raise UsageError(f"check_resumable(max_seconds={max_seconds!r}) is refused; it takes seconds, more than 0")


def _task_and_arguments(fn: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, bytes]:
    """What is called in each attempt, and its arguments, packed."""
    if _ray.is_remote_function(fn):
        fn = _ray.function_and_options(fn)[0]
    if not callable(fn):
        raise UsageError(f"check_resumable({fn!r}) is refused: it is no function")
    if inspect.ismethod(fn):  # each attempt gets an object of its own
        fn, args = fn.__func__, (fn.__self__, *args)
    plain = inspect.unwrap(fn)
    if inspect.iscoroutinefunction(plain) or inspect.isasyncgenfunction(plain) or inspect.isgeneratorfunction(plain):
        raise UsageError(
            f"check_resumable({fn!r}) is refused: it gives a generator or a coroutine; pass a function that runs it to its end"
        )
    try:
        arguments = packed((args, kwargs))
    except Exception as error:
        msg = f"check_resumable() is refused: its arguments cannot be pickled, as for a task they must ({type(error).__name__}: {error})"
        raise UsageError(msg) from error
    return fn, arguments


@dataclass(frozen=True, slots=True)
class Ended:
    """How an attempt ended: with a value, with an error that nobody made, or killed."""

    value: Any = None
    error: Exception | None = None
    killed: bool = False
    swallowed: bool = False


@dataclass(frozen=True, slots=True)
class Trial:
    """One kill, or two in a row; and in words."""

    kills: tuple[Kill, ...]
    text: str


class Rehearsal:
    """A task that is run again and again."""

    def __init__(
        self, function: Any, arguments: bytes, *, effects: Callable[[], Any] | None = None, reset: Callable[[], Any] | None = None
    ) -> None:
        self._function = function
        self._arguments = arguments
        self._effects = effects or (lambda: None)
        self._reset = reset or (lambda: None)
        self._decorated = isinstance(function, RecoverableFunction) or hasattr(function, "__faultguard__")
        self.name: str = getattr(function, "__qualname__", type(function).__name__)
        self.story: Story = Story()
        self._bodies: list[list[Line]] = []
        self._seconds = 0.0
        self._value: Any = None
        self._done: Any = None

    def run(self, attempt: Attempt, *, quiet: bool = True) -> Ended:
        """One attempt."""
        args, kwargs = cloudpickle.loads(self._arguments)
        traced = sys.gettrace()
        token = stand_in.set(attempt.handle)
        try:
            with _silence() if quiet else contextlib.nullcontext():
                value = self._call(attempt, args, kwargs)
        except BaseException as error:
            if attempt.killed and (isinstance(error, Exception) or _comes_of_us(error)):
                return Ended(killed=True, swallowed=attempt.swallowed)
            if not isinstance(error, Exception):
                raise
            return Ended(error=error.with_traceback(None) if quiet else error)
        finally:
            stand_in.reset(token)
            if sys.gettrace() is not traced:
                sys.settrace(traced)
        return Ended(value=value, killed=attempt.killed, swallowed=attempt.killed)

    def _call(self, attempt: Attempt, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self._decorated:
            return self._function(*args, **kwargs)
        handle = attempt.task(self.name)
        try:
            with _session.entered(_session.TaskContext(handle)):
                value = self._function(*args, **kwargs)
            handle.finish()
        finally:
            handle.close()
        return value

    # --- undisturbed ---

    def plan(self, max_kills: int, max_seconds: float) -> tuple[list[Trial], int]:
        """Run it twice undisturbed, and say where to kill it; and of how many places those were chosen."""
        __tracebackhide__ = True
        self._undisturbed()
        self._watch_lines()
        kinds = [self._at_boundaries(), self._at_ends(), self._at_lines(), self._twice(), self._lagging()]
        possible = sum(map(len, kinds))
        limit = min(max_kills, max(len(kinds), int(max_seconds / max(self._seconds, 1e-6))))
        share = min(1.0, limit / max(possible, 1))
        return [trial for kind in kinds for trial in _spread(kind, share)], possible

    def _undisturbed(self) -> None:
        __tracebackhide__ = True
        self._reset()
        attempt = Attempt(watched=True)
        began = time.perf_counter()
        ended = self.run(attempt, quiet=False)
        self._seconds = time.perf_counter() - began
        if ended.error is not None:
            raise ended.error
        assert attempt.seen is not None  # noqa: S101 - it was watched
        self.story = attempt.seen
        self._value, self._done = frozen_copy(ended.value), frozen_copy(self._effects())
        if not self.story.boundaries:
            msg = (
                f"check_resumable({self.name}) is refused: it has no boundary, so there is nothing to resume. Wrap its loop, "
                f"`for item in faultguard.batches(items):`"
            )
            raise UsageError(msg)

    def _watch_lines(self) -> None:
        """Run it again: to see which lines run, and whether it ends the same at all."""
        __tracebackhide__ = True
        self._reset()
        attempt = Attempt(watched=True, traced=True)
        began = time.perf_counter()
        ended = self.run(attempt)
        self._seconds = min(self._seconds, time.perf_counter() - began)  # of two, one may have met a pause of the machine
        assert attempt.seen is not None  # noqa: S101 - it was watched
        self._bodies = attempt.seen.lines if len(attempt.seen.bodies) == len(self.story.bodies) else []
        advice = (
            "It depends on chance, on time, or on what the process kept of the first run. Give it seeds, keep what it carries in the "
            "state, and let reset= undo the rest"
        )
        self._compare(ended, "", "run undisturbed for the second time", advice)

    # --- kills ---

    def _at_boundaries(self) -> list[Trial]:
        kills = (self._kill("boundary", seen.number, self._takes(seen.number + 1), seen.bodies) for seen in self.story.boundaries)
        texts = (f"killed at the boundary {_at(seen, after=True)}" for seen in self.story.boundaries)
        return [Trial((kill,), text) for kill, text in zip(kills, texts, strict=True)]

    def _at_ends(self) -> list[Trial]:
        return [Trial((self._end(seen),), f"killed inside {_at(seen)}, when its body was done") for seen in self.story.ends]

    def _at_lines(self) -> list[Trial]:
        """In each batch the last line of its body, when most of it has run; and every other line once."""
        bodies = list(zip(self.story.bodies, self._bodies, strict=False))
        chosen = {(seen.number, len(lines) - 1) for seen, lines in bodies if lines}
        covered = {(lines[-1].file, lines[-1].line) for _, lines in bodies if lines}
        for seen, lines in bodies:
            for number, line in enumerate(lines):
                if (line.file, line.line) not in covered:
                    covered.add((line.file, line.line))
                    chosen.add((seen.number, number))
        return [self._line(bodies[body][0], number, bodies[body][1][number]) for body, number in sorted(chosen)]

    def _twice(self) -> list[Trial]:
        """Again right after it has resumed: at the next boundary, and inside of the next batch, in turn."""
        again = (Kill("boundary", 0, frozenset({0})), Kill("end", 0))
        texts = ("at the next boundary", "inside the next batch")
        return [
            Trial((self._end(seen), again[seen.number % 2]), f"killed inside {_at(seen)}, and then {texts[seen.number % 2]} again")
            for seen in self.story.ends
        ]

    def _lagging(self) -> list[Trial]:
        return [
            Trial((self._end(seen, lags=True),), f"killed inside {_at(seen)}, while the checkpoint was one boundary behind")
            for seen in self.story.ends
        ]

    def _end(self, seen: Seen, *, lags: bool = False) -> Kill:
        return self._kill("end", seen.number, self._takes(seen.snapshots, seen.key if lags else None), seen.bodies)

    def _line(self, seen: Seen, number: int, line: Line) -> Trial:
        text = f"interrupted inside {_at(seen)}, at line {line.line} of {line.file.rpartition('/')[2]}"
        kill = self._kill("line", seen.number, self._takes(line.snapshots), seen.bodies)
        return Trial((replace(kill, line=number),), text)

    def _kill(self, how: Literal["boundary", "end", "line"], number: int, takes: frozenset[int], bodies: int) -> Kill:
        """A kill before which `bodies` batches were handed out: the attempt wakes at the last one before all that matters."""
        first = min([bodies, *(self.story.boundaries[at].bodies for at in takes)])
        return Kill(how, number, takes, wakes=self.story.bodies[first - 1] if first else None)

    def _takes(self, before: int, lags: Key | None = None) -> frozenset[int]:
        """Which of the first snapshots are the newest of their workers; of a worker that lags the one before."""
        newest: dict[Key, list[int]] = {}
        for seen in self.story.boundaries[:before]:
            newest.setdefault(seen.key, []).append(seen.number)
        numbers = (found[-1:] if key != lags else found[-2:-1] for key, found in newest.items())
        return frozenset(number for found in numbers for number in found)

    # --- comparing ---

    def check(self, trial: Trial) -> None:
        """Kill it, let it go on, and compare.

        Raises:
            ResumabilityError: it does not end as it does undisturbed.
        """
        __tracebackhide__ = True
        self._reset()
        world: World = {}
        ended = Ended()
        for number, kill in enumerate((*trial.kills, None), 1):
            attempt = Attempt(world, number=number, kill=kill)
            ended = self.run(attempt)
            if ended.swallowed:
                self._fail_swallowed(trial)
            if not ended.killed:  # the last one; or one that ended before it came there
                break
            world = attempt.world
        self._compare(ended, trial.text, f"{trial.text}, and resumed")

    def _compare(self, ended: Ended, kill: str, story: str, advice: str = "", *, effects: bool = True) -> None:
        __tracebackhide__ = True
        advice = advice or "What the loop carries from batch to batch belongs into ckpt.state, or into ckpt.track()"
        if ended.error is not None:
            first = f"it raised {type(ended.error).__name__}: {ended.error}"
            raise self._error(kill, f"{story}, {first}", advice, input_changed=isinstance(ended.error, InputChangedError)) from ended.error
        found = difference(self._value, ended.value) or (difference(self._done, self._effects(), "effects") if effects else None)
        if found is None:
            return
        path, text = found
        if path.startswith("effects"):
            advice = "A batch that was cut runs again: name what it writes by its batch, or put ckpt.idempotency_key() into the commit"
        raise self._error(kill, f"{story}, {path} {text}", advice, path=path)

    def _fail_swallowed(self, trial: Trial) -> None:
        __tracebackhide__ = True
        codes = self._codes()
        hints = tuple(_hints.swallowers(codes))
        story = f"{trial.text}, it went on as if nothing had happened"
        advice = "What ends an attempt must get out of the task: no `except:` and no `except Exception:` around the body or the loop"
        raise self._error(trial.text, story, advice, hints=hints)

    def _error(
        self, kill: str, story: str, advice: str, *, path: str = "", input_changed: bool = False, hints: tuple[str, ...] | None = None
    ) -> ResumabilityError:
        if hints is None:
            hints = tuple(_hints.footguns(self._codes(), input_changed=input_changed)) if not path.startswith("effects") else ()
        footguns = "".join(f"\n  {hint}" for hint in hints)
        likely = f"\nLikely because of:{footguns}" if hints else ""
        text = f"{self.name!r} does not resume right: {story.rstrip('.')}. {advice}.{likely}"
        return ResumabilityError(text, task=self.name, kill=kill, path=path, footguns=hints)

    def _codes(self) -> list[CodeType]:
        """The function, and those that loop."""
        own = getattr(inspect.unwrap(self._function), "__code__", None)
        return list(dict.fromkeys([*([own] if own is not None else []), *self.story.codes]))

    # --- elsewhere ---

    def check_elsewhere(self, other: OtherProcess, *, asked: bool) -> int:
        """Let it go on in another process after some kills; gives how many.

        Raises:
            ResumabilityError: it does not end there as it does here undisturbed.
            UsageError: it cannot be taken there, and that was `asked` for.
        """
        __tracebackhide__ = True
        kinds = self._at_boundaries()[:-1] or self._at_boundaries()
        trials = _spread(kinds, MAX_ELSEWHERE / len(kinds))
        worlds = []
        for trial in trials:
            attempt = Attempt(kill=trial.kills[0])
            self.run(attempt)
            worlds.append(attempt.world)
        answers = other.resume(self._function, self._arguments, worlds, 10 * self._seconds * len(trials))
        if isinstance(answers, str):
            if asked:
                raise UsageError(f"check_resumable(other_process=True) of {self.name!r} is refused: {answers}")
            return 0
        for trial, (well, found) in zip(trials, answers, strict=True):
            advice = (
                "There sets have another order, and nothing is left of what this process keeps: sort them, and keep the rest in the state"
            )
            story = f"{trial.text}, and resumed in another process (other PYTHONHASHSEED)"
            ended = Ended(value=found) if well else Ended(error=found)
            self._compare(ended, trial.text, story, advice, effects=False)  # which are not seen here
        return len(trials)


def _at(seen: Seen, *, after: bool = False) -> str:
    """Where that was, in words."""
    block = f" of worker {seen.key[1]!r}" if seen.key[1] != "direct" else ""
    return where(seen.place, after=after) + block


def _spread(trials: list[Trial], share: float) -> list[Trial]:
    """A part of them, evenly spread, the last one included."""
    count = min(len(trials), max(1, int(len(trials) * share)))
    return [trials[(number + 1) * len(trials) // count - 1] for number in range(count)] if trials else []


@contextlib.contextmanager
def _silence() -> Any:
    """What a task prints is of no interest the hundredth time."""
    with contextlib.redirect_stdout(_Nowhere()), contextlib.redirect_stderr(_Nowhere()):
        yield


class _Nowhere(io.StringIO):
    """Keeps nothing."""

    def write(self, text: str) -> int:
        return len(text)


def _comes_of_us(error: BaseException) -> bool:
    """Whether it is our exception, or was made of it."""
    seen: BaseException | None = error
    for _ in range(10):
        if seen is None:
            return False
        if isinstance(seen, (KilledHere, InterruptedHereError)):
            return True
        seen = seen.__cause__ or seen.__context__
    return False
