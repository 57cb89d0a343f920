"""What an attempt raises in its loop where it has to stop, and nothing failed."""

from __future__ import annotations

import asyncio

__all__ = ["CALLS", "Cancelled", "CancelledCoroutine", "Drained", "cancelled_here"]

CALLS = "faultguard.cancel()"


class Drained(SystemExit):
    """The node is being drained. The process ends, and Ray runs the task again on another node."""

    def __init__(self, text: str) -> None:
        super().__init__(1)
        self.text = text

    def __str__(self) -> str:
        """Why, not the exit code."""
        return self.text


class Cancelled(KeyboardInterrupt):
    """The worker was cancelled. Ray takes it for its own cancel, which is final."""


class CancelledCoroutine(asyncio.CancelledError):
    """The same for a method of an async actor: an interrupt would end the event loop."""


def cancelled_here(text: str) -> BaseException:
    """The error of a cancelled worker in this thread."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return Cancelled(text)
    return CancelledCoroutine(text)
