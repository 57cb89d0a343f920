"""`get`: `ray.get` that shows how far the work is, and tells of all failures at once."""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING, Any, TypeVar, overload

import ray

from faultguard import _session
from faultguard.errors import MaxFailuresExceeded, UsageError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ray import ObjectRef

__all__ = ["get"]

R = TypeVar("R")
BAR_WIDTH = 30
TTY_INTERVAL_S = 0.2
LOG_INTERVAL_S = 60.0
MAX_ROWS = 20


@overload
def get(refs: ObjectRef[R], *, timeout: float | None = None, progress: bool = True, return_exceptions: bool = False) -> R: ...
@overload
def get(
    refs: Sequence[ObjectRef[R]], *, timeout: float | None = None, progress: bool = True, return_exceptions: bool = False
) -> list[R]: ...
def get(refs: Any, *, timeout: float | None = None, progress: bool = True, return_exceptions: bool = False) -> Any:
    """Wait for all tasks, showing a bar, and give their results.

    A bar on a terminal, a line a minute elsewhere.

    Args:
        refs: one ObjectRef, or a sequence of them.
        timeout: seconds to wait for all; None: for ever.
        progress: show how far it is; `init(progress=False)` switches it off everywhere.
        return_exceptions: give exceptions in the place of results, instead of raising the first.

    Raises:
        GetTimeoutError: Ray's, when not all are ready in time.
        UsageError: `refs` is something else.
        Exception: of the first task that failed, after all have ended; where several failed, the others are listed on stderr.
    """
    single = isinstance(refs, ray.ObjectRef)
    wanted: list[Any] = [refs] if single else _checked(refs)
    settings = _session.driver_settings_or_none()
    bar = _Bar(len(wanted), shown=progress and (settings is None or settings.progress))
    _wait(wanted, timeout, bar)
    results = [_result(ref) for ref in wanted]
    failed = [index for index, (ok, _) in enumerate(results) if not ok]
    if failed and not return_exceptions:
        error = results[failed[0]][1]
        _tell_of_others(results, failed)
        raise error
    values = [value for _, value in results]
    return values[0] if single else values


def _checked(refs: Any) -> list[Any]:
    if isinstance(refs, (list, tuple)) and all(isinstance(ref, ray.ObjectRef) for ref in refs):
        return list(refs)
    msg = f"get({type(refs).__name__}) is refused; it takes an ObjectRef or a list of them, such as get([task.remote(i) for i in range(3)])"
    raise UsageError(msg)


def _wait(refs: list[Any], timeout: float | None, bar: _Bar) -> None:
    """Until all are ready; Ray's own error when that takes too long."""
    deadline = time.monotonic() + timeout if timeout is not None else None
    waiting = list(dict.fromkeys(refs))
    while waiting:
        step = bar.interval_s if deadline is None else min(bar.interval_s, max(deadline - time.monotonic(), 0.0))
        _, waiting = ray.wait(waiting, num_returns=len(waiting), timeout=step)
        bar.show(len(refs) - len(waiting))
        if waiting and deadline is not None and time.monotonic() >= deadline:
            bar.end()
            msg = f"{len(waiting)} of {len(refs)} tasks were not ready within {timeout} s; they go on running"
            raise ray.exceptions.GetTimeoutError(msg)
    bar.end()


def _result(ref: Any) -> tuple[bool, Any]:
    try:
        return True, ray.get(ref)
    except Exception as error:  # noqa: BLE001 - given back, or raised by the caller
        return False, error


def _tell_of_others(results: list[tuple[bool, Any]], failed: list[int]) -> None:
    """A table of what else failed, on stderr: a note on the error would need Python 3.11."""
    if len(failed) == 1:
        return
    lines = [f"faultguard: {len(failed)} of {len(results)} tasks failed; task {failed[0]} is raised, the others:"]
    lines += [f"  task {index}: {_first_line(results[index][1])}" for index in failed[1 : MAX_ROWS + 1]]
    if len(failed) > MAX_ROWS + 1:
        lines.append(f"  and {len(failed) - MAX_ROWS - 1} more")
    print("\n".join(lines), file=sys.stderr, flush=True)  # noqa: T201 - the terminal contract


def _first_line(error: Exception) -> str:
    cause = getattr(error, "cause", None) or error
    if isinstance(cause, MaxFailuresExceeded) and cause.failures:
        last = cause.failures[-1]
        return f"{last.message or last.cause} at batch {last.batch}, after {len(cause.failures)} failures"[:160]
    text = str(cause).strip().splitlines()
    return f"{type(cause).__name__}: {text[0] if text else ''}"[:160]


class _Bar:
    """How many tasks are ready: a bar on a terminal, a line a minute elsewhere."""

    def __init__(self, total: int, *, shown: bool) -> None:
        self._total = total
        self._stream = sys.stderr
        self._tty = shown and self._stream.isatty()
        self._shown = shown
        self._started = time.monotonic()
        self._next_line = self._started + LOG_INTERVAL_S
        self.interval_s = TTY_INTERVAL_S if self._tty else 1.0

    def show(self, ready: int) -> None:
        """Draw it, if it is time."""
        now = time.monotonic()
        text = f"{ready} of {self._total} tasks, {now - self._started:.0f} s"
        if self._tty:
            filled = BAR_WIDTH * ready // max(self._total, 1)
            self._stream.write(f"\r[{'#' * filled}{'.' * (BAR_WIDTH - filled)}] {text}")
            self._stream.flush()
        elif self._shown and now >= self._next_line and ready < self._total:
            self._next_line = now + LOG_INTERVAL_S
            self._stream.write(f"faultguard: {text}\n")
            self._stream.flush()

    def end(self) -> None:
        """Leave the line."""
        if self._tty:
            self._stream.write("\n")
            self._stream.flush()
