"""Events: a sentence for people, fields for machines, through a pipeline of our own onto the stdlib logger `faultguard`.

Nothing is configured globally. Under Ray's JSON logging the fields arrive as top-level keys. Names that a `LogRecord`
has for itself (`name`, `args`, `process`, ...) are refused there with a KeyError inside the user's task, so they get a prefix.
"""

from __future__ import annotations

import functools
import logging
import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import MutableMapping

__all__ = ["LOGGER_NAME", "emit"]

LOGGER_NAME = "faultguard"
_RESERVED = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "exc_info", "stack_info", "stacklevel", "extra"}


def emit(level: int, event: str, sentence: str, **fields: Any) -> None:
    """Log one event.

    Args:
        level: of the stdlib.
        event: its stable key, such as `"faultguard.attempt_failed"`.
        sentence: what a person reads.
        fields: what a machine reads; keys are stable, values are plain.
    """
    if logging.getLogger(LOGGER_NAME).isEnabledFor(level):
        _pipeline().log(level, event, sentence=sentence, **fields)


@functools.lru_cache(maxsize=1)
def _pipeline() -> Any:
    import structlog  # 50 ms: only a process that has something to say pays it

    return structlog.wrap_logger(
        logging.getLogger(LOGGER_NAME),
        processors=[structlog.processors.add_log_level, _to_stdlib],
        wrapper_class=structlog.stdlib.BoundLogger,
        context_class=dict,
        cache_logger_on_first_use=False,
    )


def _to_stdlib(_logger: object, _method: str, event: MutableMapping[str, Any]) -> tuple[Any, ...]:
    """The last processor: what the stdlib logger is called with."""
    sentence = event.pop("sentence")
    event.pop("level", None)
    extra = {(f"fg_{key}" if key in _RESERVED else key): value for key, value in event.items()}
    extra.setdefault("pid", os.getpid())
    return ("faultguard: %s" % sentence.replace("%", "%%"),), {"extra": extra}  # noqa: UP031 - no args, so `%` stays
