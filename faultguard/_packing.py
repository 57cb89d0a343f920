"""Arguments as first passed: packed at `.remote()`, unpacked after the claim, once per attempt.

So a retry in the process does not see what the failed attempt made of them, and a death while they are unpacked is charged. In a
named run digests of the plain ones go on record, so that a result is not taken for that of other arguments.
"""

from __future__ import annotations

import hashlib
import io
import itertools
from collections import Counter, OrderedDict
from typing import TYPE_CHECKING, Any

from ray import cloudpickle

from faultguard import _codec, _ray
from faultguard.errors import CheckpointNotSerializableError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

__all__ = ["digests", "pack", "unpack"]

MAX_BYTES = 1 << 20
MAX_CONTAINERS = 1 << 15  # of one argument that is compared
_DIGEST_CHARS = 16
_CONTAINERS = frozenset({list, tuple, dict, Counter, OrderedDict})


class _NotPackableError(Exception):
    """Too large, or Ray must see it."""


class _TooManyError(Exception):
    """It holds more containers than are looked at."""


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


def digests(arguments: Mapping[str, Any], *, small: bool) -> dict[str, str]:
    """Say by name what each argument is, where that is the same in every process: plain values, not references and objects.

    Args:
        arguments: by the names of the parameters.
        small: all of them together were packed. Else only short immutable ones are compared.

    >>> digests({"n": 3, "names": ["a"], "lock": object()}, small=True)
    {'n': 'v:4e07408562bedb8b', 'names': '0eb5b8d6f81bc677'}
    """
    found = {}
    for name, value in arguments.items():
        digest = _codec.fingerprint(value)
        if not digest.startswith("v:"):
            digest = _digest(value, name) if small else ""
        if digest:
            found[name] = digest
    return found


def _digest(value: Any, name: str) -> str:
    """Of a value of any size; empty where it is none that the codec takes, or none that is written in reasonable time."""
    try:
        return hashlib.sha256(_codec.encode(_sorted(value, itertools.count()), path=name)).hexdigest()[:_DIGEST_CHARS]
    except (CheckpointNotSerializableError, _TooManyError):
        return ""


def _sorted(value: Any, visited: Iterator[int], levels: int = _codec.MAX_DEPTH) -> Any:
    """A value in which equal dicts have one order. What is shared is packed once, but written as often as it is met."""
    if type(value) not in _CONTAINERS or levels == 0:  # so deep that the codec refuses it
        return value
    if next(visited) == MAX_CONTAINERS:
        raise _TooManyError
    if type(value) in {list, tuple}:
        return type(value)(_sorted(item, visited, levels - 1) for item in value)
    items = [(key, _sorted(item, visited, levels - 1)) for key, item in value.items()]
    return type(value)(dict(items if type(value) is OrderedDict else sorted(items, key=lambda item: _codec.encode(item[0]))))
