"""Arguments as first passed: packed at `.remote()`, unpacked after the claim, once per attempt.

So a retry in the process does not see what the failed attempt made of them, and a death while they are unpacked is charged.
"""

from __future__ import annotations

import io
from typing import Any

from ray import cloudpickle

from faultguard import _ray

__all__ = ["pack", "unpack"]

MAX_BYTES = 1 << 20


class _NotPackableError(Exception):
    """Too large, or Ray must see it."""


class _Bounded(io.BytesIO):
    """A buffer that gives up when it holds too much."""

    def write(self, data: Any) -> int:
        if self.tell() + memoryview(data).nbytes > MAX_BYTES:  # large arrays come as `PickleBuffer`, which has no length
            raise _NotPackableError
        return super().write(data)


class _Pickler(cloudpickle.Pickler):
    """Refuses what Ray has to follow: references to objects and actors."""

    def reducer_override(self, value: Any) -> Any:
        if _ray.is_ref(value):
            raise _NotPackableError
        return super().reducer_override(value)  # type: ignore[no-untyped-call] # as cloudpickle is


def pack(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bytes | None:
    """Arguments as bytes; None when they are over 1 MiB or hold references, which stay with Ray."""
    buffer = _Bounded()
    try:
        _Pickler(buffer).dump((args, kwargs))  # type: ignore[no-untyped-call] # as cloudpickle is
    except Exception:  # noqa: BLE001 - what cannot be pickled here, Ray may know how to serialise; else it says so itself
        return None
    return buffer.getvalue()


def unpack(data: bytes) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments, new."""
    args, kwargs = cloudpickle.loads(data)
    return args, kwargs
