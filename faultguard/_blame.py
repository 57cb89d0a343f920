"""Whether an exception came out of the body of a loop, or from somewhere behind it.

A generator is closed alike by `break` and by an exception in the body that it was left by, and cannot see which it was. But
a loop that an exception leaves is let go of by the very instruction at which that exception came into its frame, and the
traceback says which one that is.
"""

from __future__ import annotations

import dis
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from types import CodeType, FrameType

__all__ = ["Instruction", "came_from", "running"]

RAISED_AGAIN = dis.opmap["RERAISE"]  # behind a `finally`, or past an `except`: the traceback keeps to the first instruction
MAX_CHAIN = 10  # exceptions, each raised because of, or while handling, the next one


class Instruction(NamedTuple):
    """One instruction of a function."""

    code: CodeType
    offset: int


def running(frame: FrameType | None) -> Instruction | None:
    """Where a frame stands."""
    return Instruction(frame.f_code, frame.f_lasti) if frame is not None else None


def came_from(error: BaseException, instruction: Instruction) -> bool:
    """Whether an exception, or one that it was made of, has passed through an instruction on its way."""
    code, offset = instruction
    if code.co_code[offset] == RAISED_AGAIN:
        return True
    seen: BaseException | None = error
    for _ in range(MAX_CHAIN):
        if seen is None:
            return False
        traceback = seen.__traceback__
        while traceback is not None:
            if (traceback.tb_frame.f_code, traceback.tb_lasti) == instruction:
                return True
            traceback = traceback.tb_next
        seen = seen.__cause__ or seen.__context__
    return False
