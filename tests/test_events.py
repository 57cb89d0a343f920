"""Events reach the stdlib logger with their fields, and nobody else's logging changes."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import pytest
import structlog

from faultguard import _events

if TYPE_CHECKING:
    from collections.abc import Iterator


class Collector(logging.Handler):
    """Keeps the records."""

    def __init__(self) -> None:
        super().__init__()
        self.records: list[logging.LogRecord] = []

    def emit(self, record: logging.LogRecord) -> None:
        """Keep one."""
        self.records.append(record)


@pytest.fixture
def collected() -> Iterator[list[logging.LogRecord]]:
    """What arrives at the logger `faultguard`, from INFO on."""
    logger, handler = logging.getLogger(_events.LOGGER_NAME), Collector()
    level, propagate = logger.level, logger.propagate
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    logger.propagate = False
    yield handler.records
    logger.removeHandler(handler)
    logger.setLevel(level)
    logger.propagate = propagate


def test_an_event_is_a_sentence_with_fields(collected: list[logging.LogRecord]) -> None:
    """People read the sentence; machines find each field, the key and the pid as attributes of the record."""
    _events.emit(logging.WARNING, "faultguard.attempt_failed", "attempt 2 failed.", worker_id="w0", batches=7)
    [record] = collected
    fields: dict[str, Any] = vars(record)
    assert (record.name, record.levelname, record.getMessage()) == ("faultguard", "WARNING", "faultguard: attempt 2 failed.")
    assert (fields["event"], fields["worker"], fields["batches"]) == ("faultguard.attempt_failed", "w0", 7)
    assert fields["pid"] == os.getpid()
    assert "sentence" not in fields
    assert "level" not in fields


def test_a_pid_that_is_given_is_kept(collected: list[logging.LogRecord]) -> None:
    """An event about another process names that one."""
    _events.emit(logging.INFO, "faultguard.x", "x", pid=1)
    assert vars(collected[0])["pid"] == 1


@pytest.mark.parametrize("name", ["name", "args", "process", "module", "msg", "message", "asctime", "exc_info", "stack_info", "created"])
def test_names_of_the_log_record_get_a_prefix(collected: list[logging.LogRecord], name: str) -> None:
    """A field that the record has for itself does not raise in the user's task, and is found under `fg_`."""
    _events.emit(logging.INFO, "faultguard.x", "x", **{name: "mine"})
    [record] = collected
    assert vars(record)[f"fg_{name}"] == "mine"
    assert record.name == "faultguard"
    assert record.getMessage() == "faultguard: x"


@pytest.mark.parametrize("sentence", ["100 % done", "100%s", "%d of %(n)s", "%%"])
def test_a_percent_sign_stays(collected: list[logging.LogRecord], sentence: str) -> None:
    """Whatever a user's exception text holds is printed as it is."""
    _events.emit(logging.INFO, "faultguard.x", sentence)
    assert collected[0].getMessage() == f"faultguard: {sentence}"


def test_a_level_below_the_loggers_is_silent(collected: list[logging.LogRecord]) -> None:
    """What the user does not want to see costs nothing and shows nothing."""
    _events.emit(logging.DEBUG, "faultguard.x", "x")
    logging.getLogger(_events.LOGGER_NAME).setLevel(logging.ERROR)
    _events.emit(logging.WARNING, "faultguard.x", "x")
    assert collected == []


@pytest.mark.parametrize("level", [logging.DEBUG, logging.INFO, logging.WARNING, logging.ERROR])
def test_the_level_arrives(collected: list[logging.LogRecord], level: int) -> None:
    """The record has the level of the event."""
    logging.getLogger(_events.LOGGER_NAME).setLevel(logging.DEBUG)
    _events.emit(level, "faultguard.x", "x")
    assert collected[0].levelno == level


def test_structlog_of_the_user_is_not_ours(collected: list[logging.LogRecord]) -> None:
    """Our pipeline configures nothing, and does not follow what the user configures."""
    assert not structlog.is_configured()
    _events.emit(logging.INFO, "faultguard.x", "first")
    assert not structlog.is_configured()
    try:
        structlog.configure(processors=[])
        _events.emit(logging.INFO, "faultguard.x", "second")
    finally:
        structlog.reset_defaults()
    assert [record.getMessage() for record in collected] == ["faultguard: first", "faultguard: second"]


def test_a_silent_level_does_not_import_structlog() -> None:
    """In a fresh process, an event below the level loads nothing; one above it changes no global configuration."""
    script = (
        "import logging, sys\n"
        "from faultguard import _events\n"
        "root = logging.getLogger()\n"
        "before = (root.level, list(root.handlers), list(root.filters), logging.root.manager.disable)\n"
        "_events.emit(logging.DEBUG, 'faultguard.x', 'x')\n"
        "assert 'structlog' not in sys.modules\n"
        "_events.emit(logging.WARNING, 'faultguard.x', 'seen')\n"
        "import structlog\n"
        "assert not structlog.is_configured()\n"
        "assert before == (root.level, list(root.handlers), list(root.filters), logging.root.manager.disable)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stderr == "faultguard: seen\n"  # the last resort of the stdlib
