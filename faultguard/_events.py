"""Events: a sentence for people, fields for machines, through a pipeline of our own onto the stdlib logger `faultguard`.

Nothing is configured globally. Under Ray's JSON logging the fields arrive as top-level keys. Names that a `LogRecord`
has for itself (`name`, `args`, `process`, ...) are refused there with a KeyError inside the user's task, so they get a prefix.
Ray writes ids of its own over `worker_id`, `node_id` and the like, so those have other names in an event.
"""

from __future__ import annotations

import functools
import logging
import os
import threading
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import MutableMapping

__all__ = ["LOGGER_NAME", "emit", "emit_beside", "report"]

LOGGER_NAME = "faultguard"
_RESERVED = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "exc_info", "stack_info", "stacklevel", "extra"}
_STAMPED_BY_RAY = frozenset({"job_id", "worker_id", "node_id", "actor_id", "task_id", "actor_name", "task_name", "task_func_name"})
_RENAMED = {"worker_id": "worker", "node_id": "node"}


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


def emit_beside(*args: Any, **fields: Any) -> None:
    """`emit` from a thread of its own: in a new process the first event imports structlog, and a logger may hang."""
    threading.Thread(target=emit, args=args, kwargs=fields, name="faultguard-event", daemon=True).start()


def report(thread: str, error: Exception) -> None:
    """Say an error of our own that a thread survives."""
    text = f"thread {thread} goes on after an error of its own: {error!r}"
    emit(logging.ERROR, "faultguard.thread_error", text, thread=thread, error=repr(error))


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
    extra = {_name(key): value for key, value in event.items()}
    extra.setdefault("pid", os.getpid())
    return (f"faultguard: {sentence}",), {"extra": extra}  # no arguments, so a `%` in the sentence stays what it is


def _name(key: str) -> str:
    """The name of a field on a `LogRecord`."""
    key = _RENAMED.get(key, key)
    return f"fg_{key}" if key in _RESERVED or key in _STAMPED_BY_RAY else key
