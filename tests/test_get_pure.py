"""`get` without a cluster: what it refuses, and what it draws."""

from __future__ import annotations

import io
from types import SimpleNamespace
from typing import Any

import pytest

import faultguard
from faultguard import _get
from faultguard._get import BAR_WIDTH, LOG_INTERVAL_S, MAX_ROWS
from faultguard.errors import UsageError


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self) -> bool:
        """It is."""
        return True


class Clock:
    """Time that a test moves."""

    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        """Now."""
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """The clock of the bar."""
    made = Clock()
    monkeypatch.setattr(_get, "time", made)
    return made


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> Terminal:
    """Standard error is a terminal."""
    stream = Terminal()
    monkeypatch.setattr(_get, "sys", SimpleNamespace(stderr=stream))
    return stream


@pytest.fixture
def file(monkeypatch: pytest.MonkeyPatch) -> io.StringIO:
    """Standard error is a file."""
    stream = io.StringIO()
    monkeypatch.setattr(_get, "sys", SimpleNamespace(stderr=stream))
    return stream


@pytest.mark.parametrize("refs", [None, 7, "ref", [7], [[]], {"a": 1}, {1}, iter([])], ids=lambda refs: type(refs).__name__)
def test_what_is_no_reference_is_refused(refs: Any) -> None:
    """The text says what was given, and what to write."""
    with pytest.raises(UsageError) as refused:
        faultguard.get(refs)
    assert str(refused.value).startswith(f"get({type(refs).__name__}) is refused; it takes an ObjectRef or a list of them")


@pytest.mark.parametrize("refs", [[], ()])
def test_nothing_gives_nothing(refs: Any, file: io.StringIO) -> None:
    """An empty sequence needs no cluster and no words."""
    assert faultguard.get(refs) == []
    assert file.getvalue() == ""


def test_the_bar_of_a_terminal(terminal: Terminal, clock: Clock) -> None:
    """Each step is drawn over the last one, and the end leaves the line."""
    bar = _get._Bar(4, shown=True)
    for ready in range(5):
        clock.now += 1.5
        bar.show(ready)
    bar.end()
    drawn = terminal.getvalue()
    assert drawn.endswith("\n")
    assert drawn.count("\n") == 1
    first, *_, last = drawn.rstrip("\n").lstrip("\r").split("\r")
    assert first.rstrip() == f"[{'.' * BAR_WIDTH}] 0 of 4 tasks, 2 s"
    assert last.rstrip() == f"[{'#' * BAR_WIDTH}] 4 of 4 tasks, 8 s"
    assert f"[{'#' * 15}{'.' * 15}] 2 of 4 tasks" in drawn
    assert len(drawn.split("\r")) == 6


def test_the_bar_of_nothing(terminal: Terminal, clock: Clock) -> None:
    """Zero tasks divide nothing."""
    _get._Bar(0, shown=True).show(0)
    assert "0 of 0 tasks, 0 s" in terminal.getvalue()


def test_a_file_gets_a_line_a_minute(file: io.StringIO, clock: Clock) -> None:
    """In a log there are plain whole lines, one a minute, and none for what is done at once."""
    bar = _get._Bar(4, shown=True)
    bar.show(0)
    assert file.getvalue() == ""
    for ready in (1, 1, 2, 2, 3):
        clock.now += LOG_INTERVAL_S / 2
        bar.show(ready)
    bar.end()
    assert file.getvalue() == "faultguard: 1 of 4 tasks, 60 s\nfaultguard: 2 of 4 tasks, 120 s\n"


def test_a_file_gets_no_line_for_the_end(file: io.StringIO, clock: Clock) -> None:
    """When all is ready, `get` returns: that says it."""
    bar = _get._Bar(4, shown=True)
    clock.now += 10 * LOG_INTERVAL_S
    bar.show(4)
    assert file.getvalue() == ""


@pytest.mark.parametrize("tty", [True, False], ids=["terminal", "file"])
def test_switched_off_it_is_silent(monkeypatch: pytest.MonkeyPatch, clock: Clock, tty: bool) -> None:
    """`progress=False` draws nothing anywhere."""
    stream = Terminal() if tty else io.StringIO()
    monkeypatch.setattr(_get, "sys", SimpleNamespace(stderr=stream))
    bar = _get._Bar(4, shown=False)
    clock.now += 10 * LOG_INTERVAL_S
    bar.show(1)
    bar.end()
    assert stream.getvalue() == ""


def test_one_failure_needs_no_table(file: io.StringIO) -> None:
    """What is raised tells of itself."""
    _get._tell_of_others([(True, 1), (False, ValueError("x"))], [1])
    assert file.getvalue() == ""


def test_the_other_failures_are_told(file: io.StringIO) -> None:
    """One line for each of the others, with its number, its class and the first line of its text."""
    _get._tell_of_others([(False, ValueError("a")), (True, 1), (False, OSError("b\nmore")), (False, KeyError())], [0, 2, 3])
    assert file.getvalue().splitlines() == [
        "faultguard: 3 of 4 tasks failed; task 0 is raised, the others:",
        "  task 2: OSError: b",
        "  task 3: KeyError: ",
    ]


def test_the_table_has_an_end(file: io.StringIO) -> None:
    """A thousand failures are twenty lines and a number; a long text is cut."""
    results: list[tuple[bool, Any]] = [(False, ValueError("x" * 1000)) for _ in range(1000)]
    _get._tell_of_others(results, list(range(1000)))
    lines = file.getvalue().splitlines()
    assert len(lines) == MAX_ROWS + 2
    assert lines[-1] == f"  and {1000 - MAX_ROWS - 1} more"
    assert max(map(len, lines)) < 200
