"""Values as readable JSON: `decode(encode(x))` is `x` again, same values and same types, or `encode` says why not.

Most states are plain (str keys, lists, numbers, text) and go through msgspec at once. What JSON would change on the way, such as
a tuple, NaN or an int key, is written as a tagged object `{"$fg": "tuple", "v": [...]}`, from the closed lists `_WRITERS` and
`_READERS` below. Nothing outside these lists is written, and nothing outside them is read: decoding runs no code that the data
names and imports nothing that it names. Reading a tagged array needs NumPy, which is imported only then.

What is not kept: aliasing (one list in two places comes back as two lists), the memory layout and the flags of an array (it comes
back in C order and writable), and which of two equal NumPy dtypes an array had (`longlong` is `int64` where both have 64 bits).
"""

from __future__ import annotations

import base64
import dataclasses
import enum
import hashlib
import json
import math
import random
import re
import struct
import sys
import types
import uuid
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterator
from datetime import date, datetime, time, timedelta, timezone
from decimal import Decimal
from fractions import Fraction
from pathlib import PosixPath, PurePath, PurePosixPath, PureWindowsPath, WindowsPath
from typing import TYPE_CHECKING, Any
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

import msgspec

from faultguard.errors import CheckpointCorruptError, CheckpointNotSerializableError, FaultguardError, UsageError

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    import numpy as np

__all__ = ["MAX_DEPTH", "decode", "encode", "fingerprint"]

MAX_DEPTH = 100
"""Containers within containers; low enough for the Python stack, since one level takes three frames here and three in the JSON."""

FINGERPRINT_LIMIT = 4096
"""Bytes of JSON up to which `fingerprint` looks at the value itself."""

_TAG = "$fg"
_TAG_MARK = b'"$fg"'
_MAX_JSON_DEPTH = 3 * MAX_DEPTH + 4
_INT64 = 2**63
_NAN_BITS = struct.pack(">d", math.nan)

_STR = frozenset({str})
_LEAVES = frozenset({str, int, float, bool, type(None)})
_CONTAINERS = frozenset({dict, list})
_PLAIN = _LEAVES | _CONTAINERS

_to_json = msgspec.json.Encoder().encode
_from_json = msgspec.json.Decoder().decode
# The text behind fingerprints and the order of sets: the standard library's, because it must not change with a version of msgspec.
_canonical = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"), allow_nan=False).encode


def encode(value: object, *, path: str = "state") -> bytes:
    """Write a value as UTF-8 JSON that `decode` gives back exactly, types included.

    Args:
        value: plain values (None, bool, int, float, str, dict, list) of up to `MAX_DEPTH` levels, and the types of the table in
            `docs/format.md`. Exact types only: a subclass is refused, it would come back as its base.
        path: what the caller calls the value, for the text of an error.

    Returns:
        The JSON, without a newline. Equal values of the same types give the same bytes, whatever the order in a set.

    Raises:
        CheckpointNotSerializableError: a value could not be given back exactly; its `path` says where, `state["opt"][3]`.

    Example:
        >>> encode({"rows": 3, "seen": (1, 2)})
        b'{"rows":3,"seen":{"$fg":"tuple","v":[1,2]}}'
    """
    data = _encode_plain(value)
    return _Encoder(path).encode(value) if data is None else data


def decode(data: bytes) -> Any:  # noqa: ANN401 - what comes back is whatever was written
    """Read what `encode` wrote.

    Args:
        data: the JSON; whoever stores it checks its checksum first.

    Returns:
        The value. Nothing in it is shared with another call.

    Raises:
        CheckpointCorruptError: the data is not JSON, is nested too deeply, or has a tag that `encode` does not write.
        UsageError: the data is intact, but this machine lacks NumPy or a time zone that it takes.

    Example:
        >>> decode(b'{"rows":3,"seen":{"$fg":"tuple","v":[1,2]}}')
        {'rows': 3, 'seen': (1, 2)}
    """
    try:
        tree = _from_json(data)
        return tree if _TAG_MARK not in data else _read(tree)
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        message = f"a record of {len(data)} bytes is not JSON: {error}"
        raise CheckpointCorruptError(message) from error
    except RecursionError as error:
        if _json_depth(data) <= _MAX_JSON_DEPTH:
            raise  # the data is fine: the caller has no stack left
        message = f"a record of {len(data)} bytes is nested deeper than any that faultguard writes"
        raise CheckpointCorruptError(message) from error


def fingerprint(value: object) -> str:
    """Give a short text by which the same batch is known again, in any process and on any machine.

    Args:
        value: anything. It is neither compared nor iterated nor printed unless its type is one of those that `encode` knows.

    Returns:
        `"v:"` and 16 hex digits for an immutable plain value whose JSON takes up to 4096 bytes: another value has another text.
        `"t:"`, the type and, where it is known without side effects, the length or shape for everything else: `"t:list:32"`.

    Example:
        >>> fingerprint("part-07.parquet")
        'v:94a8e6a9a5c99f8b'
        >>> fingerprint([1, 2, 3])
        't:list:3'
    """
    try:
        if _is_frozen(value):
            data = _canonical(_Encoder("value").tree(value)).encode()
            if len(data) <= FINGERPRINT_LIMIT:
                return f"v:{hashlib.sha256(data).hexdigest()[:16]}"
        return f"t:{_type_name(type(value))[:200]}{_size(value)}"
    except Exception:  # noqa: BLE001 - a type may refuse even to be named; a fingerprint is a help, never a reason to fail
        return "t:?"


# --- writing -----------------------------------------------------------------------------------------------------------------------


def _encode_plain(value: object) -> bytes | None:
    """The JSON of a value that takes no tags; None where the slow path must write it, or say why it cannot."""
    try:
        if not _is_plain(value, MAX_DEPTH):
            return None
        data = _to_json(value)
        # msgspec writes NaN and infinity as null: only reading it back shows that.
        return data if _from_json(data) == value else None
    except (ValueError, OverflowError, RuntimeError, msgspec.MsgspecError):  # lone surrogates; a dict that changes meanwhile
        return None


def _is_plain(value: object, levels: int) -> bool:
    """Whether all types are exactly those of JSON, compared by identity: True == 1 and 1 == 1.0 pass every other test."""
    values: Iterable[object]
    if type(value) is dict:
        if not _STR.issuperset(map(type, value)) or _TAG in value:
            return False
        values = value.values()
    elif type(value) is list:
        values = value
    else:
        return type(value) in _LEAVES and not _has_big_int((value,))
    if levels == 0:
        return False
    kinds = set(map(type, values))
    if int in kinds and _has_big_int(values):
        return False
    if kinds <= _LEAVES:
        return True
    return kinds <= _PLAIN and all(_is_plain(child, levels - 1) for child in values if type(child) in _CONTAINERS)


def _has_big_int(values: Iterable[object]) -> bool:
    """Whether an int takes over 64 bits: Python bounds the decimal digits that it reads, by a setting that differs per process."""
    return bool([value for value in values if type(value) is int and not -_INT64 <= value < _INT64])


class _Part(str):
    """A step of a path that is not a key or an index."""

    __slots__ = ()


_KEY = _Part("<key>")
_ELEMENT = _Part("<element>")
_TZINFO = _Part(".tzinfo")


class _Encoder:
    """One walk through a value: builds the tree of plain JSON values, and knows where it is when it has to refuse one."""

    __slots__ = ("_open", "_root", "_steps")

    def __init__(self, root: str) -> None:
        self._root = root
        self._steps: list[object] = []
        self._open: set[int] = set()

    def encode(self, value: object) -> bytes:
        """The JSON of a value with its tags, checked by reading it back."""
        try:
            tree = self.tree(value)
            data = _to_json(tree)
            if _from_json(data) == tree:
                return data
        except RecursionError as error:
            raise self.refusal(value, "too little is left of Python's stack for its nesting. Save it from a shallower call") from error
        except RuntimeError as error:
            raise self.refusal(value, f"it changed meanwhile ({error}). Change state only in the thread of the loop") from error
        raise self.refusal(value, "it changed meanwhile. Change state only in the thread of the loop")

    def tree(self, value: Any) -> Any:  # noqa: ANN401
        """The value as plain JSON values, tagged where needed."""
        write = _WRITERS.get(type(value)) or _numpy_writer(type(value))
        if write is None:
            raise self.refusal(value, _reason(type(value)))
        return write(self, value)

    def child(self, step: object, value: object) -> Any:  # noqa: ANN401
        """The tree of a part of the value in hand. After a refusal the steps stay as they are: they are the path."""
        self._steps.append(step)
        tree = self.tree(value)
        self._steps.pop()
        return tree

    def children(self, container: object, values: Iterable[object], step: object = None) -> list[Any]:
        """The trees of the values of a container; each is named by its index, or all by `step`."""
        self._enter(container)
        trees = [self.child(index if step is None else step, value) for index, value in enumerate(values)]
        self._open.remove(id(container))
        return trees

    def pairs(self, mapping: Mapping[Any, object]) -> list[list[Any]]:
        """The trees of keys and values, in order."""
        self._enter(mapping)
        trees = [[self.child(_KEY, key), self.child(key, value)] for key, value in mapping.items()]
        self._open.remove(id(mapping))
        return trees

    def refusal(self, value: object, reason: str) -> CheckpointNotSerializableError:
        """The error for a value at the present path."""
        path = self._root + "".join(step if type(step) is _Part else f"[{_short(step)}]" for step in self._steps)
        kind = _type_name(type(value))
        return CheckpointNotSerializableError(f"{path} ({kind}) cannot be recorded: {reason}.", path=path, type_name=kind)

    def _enter(self, container: object) -> None:
        if id(container) in self._open:
            raise self.refusal(container, "it contains itself. Store the parts without the way back")
        if len(self._open) == MAX_DEPTH:
            raise self.refusal(container, f"it is nested over {MAX_DEPTH} levels deep. Flatten it, for example into a list with indices")
        self._open.add(id(container))


def _tagged(tag: str, v: object, **more: object) -> dict[str, Any]:
    return {_TAG: tag, "v": v, **more}


def _base64(raw: bytes | bytearray) -> str:
    return base64.b64encode(raw).decode("ascii")


def _write_int(_: _Encoder, value: int) -> Any:  # noqa: ANN401
    # Hexadecimal has no limit of digits, and reads in linear time.
    return value if -_INT64 <= value < _INT64 else _tagged("int", hex(value))


def _write_float(_: _Encoder, value: float) -> Any:  # noqa: ANN401
    if math.isfinite(value):
        return value
    bits = struct.pack(">d", value)
    return _tagged("float", f"0x{bits.hex()}" if math.isnan(value) and bits != _NAN_BITS else str(value))


def _write_str(_: _Encoder, value: str) -> Any:  # noqa: ANN401
    try:
        value.encode()
    except UnicodeEncodeError:  # lone surrogates, as in the names of files that are not UTF-8
        return _tagged("str", _base64(value.encode("utf-8", "surrogatepass")))
    return value


def _write_list(encoder: _Encoder, value: list[object]) -> Any:  # noqa: ANN401
    if _LEAVES.issuperset(map(type, value)) and _encode_plain(value) is not None:
        return value
    return encoder.children(value, value)


def _write_dict(encoder: _Encoder, value: dict[object, object]) -> Any:  # noqa: ANN401
    if _LEAVES.issuperset(map(type, value.values())) and _encode_plain(value) is not None:
        return value
    pairs = encoder.pairs(value)
    if _TAG not in value and all(type(key) is str for key, _ in pairs):
        return dict(pairs)
    return _tagged("dict", pairs)


def _write_tuple(encoder: _Encoder, value: tuple[object, ...]) -> Any:  # noqa: ANN401
    plain = list(value)
    if _LEAVES.issuperset(map(type, plain)) and _encode_plain(plain) is not None:
        return _tagged("tuple", plain)
    return _tagged("tuple", encoder.children(value, plain))


def _write_set(encoder: _Encoder, value: set[Any] | frozenset[Any]) -> Any:  # noqa: ANN401
    # Sorted, because the order of a set depends on the hash seed of the process.
    if set(map(type, value)) in ({int}, {str}):
        plain = sorted(value)
        if _encode_plain(plain) is not None:
            return _tagged(type(value).__name__, plain)
    return _tagged(type(value).__name__, sorted(encoder.children(value, value, _ELEMENT), key=_canonical))


def _write_deque(encoder: _Encoder, value: deque[object]) -> Any:  # noqa: ANN401
    trees = encoder.children(value, value)
    return _tagged("deque", trees) if value.maxlen is None else _tagged("deque", trees, maxlen=value.maxlen)


def _write_mapping(encoder: _Encoder, value: OrderedDict[Any, object] | Counter[Any]) -> Any:  # noqa: ANN401
    if vars(value):
        raise encoder.refusal(value, f"it has attributes of its own ({', '.join(map(_short, vars(value)))}). Store dict(...) of it")
    return _tagged(type(value).__name__, encoder.pairs(value))


def _write_complex(encoder: _Encoder, value: complex) -> Any:  # noqa: ANN401
    return _tagged("complex", [_write_float(encoder, value.real), _write_float(encoder, value.imag)])


def _write_bytes(_: _Encoder, value: bytes | bytearray) -> Any:  # noqa: ANN401
    return _tagged(type(value).__name__, _base64(value))


def _write_date(_: _Encoder, value: date) -> Any:  # noqa: ANN401
    return _tagged("date", value.isoformat())


def _write_clock(encoder: _Encoder, value: datetime | time) -> Any:  # noqa: ANN401
    # ISO text has the offset of the moment, but neither the zone nor the fold.
    more: dict[str, Any] = {"fold": 1} if value.fold else {}
    if value.tzinfo is not None:
        more["tz"] = encoder.child(_TZINFO, value.tzinfo)
    return _tagged(type(value).__name__, value.replace(tzinfo=None).isoformat(), **more)


def _write_timedelta(_: _Encoder, value: timedelta) -> Any:  # noqa: ANN401
    return _tagged("timedelta", [value.days, value.seconds, value.microseconds])


def _write_timezone(encoder: _Encoder, value: Any) -> Any:  # noqa: ANN401
    offset, *name = value.__getinitargs__()
    more = {"name": _write_str(encoder, name[0])} if name else {}
    return _tagged("timezone", [offset.days, offset.seconds, offset.microseconds], **more)


def _write_zoneinfo(encoder: _Encoder, value: ZoneInfo) -> Any:  # noqa: ANN401
    if type(value.key) is not str or not _ZONE_KEY.fullmatch(value.key):
        raise encoder.refusal(value, "it was not made from the name of a zone. Use ZoneInfo(name) or a fixed datetime.timezone")
    return _tagged("ZoneInfo", value.key)


def _write_uuid(_: _Encoder, value: uuid.UUID) -> Any:  # noqa: ANN401
    more = {} if value.is_safe is uuid.SafeUUID.unknown else {"safe": value.is_safe.value}
    return _tagged("UUID", str(value), **more)


def _write_decimal(_: _Encoder, value: Decimal) -> Any:  # noqa: ANN401
    return _tagged("Decimal", str(value))


def _write_fraction(encoder: _Encoder, value: Fraction) -> Any:  # noqa: ANN401
    parts = [value.numerator, value.denominator]
    if set(map(type, parts)) != {int}:
        raise encoder.refusal(value, "its parts are not plain ints. Make it with Fraction(int(n), int(d))")
    return _tagged("Fraction", [_write_int(encoder, part) for part in parts])


def _write_path(encoder: _Encoder, value: PurePath) -> Any:  # noqa: ANN401
    if type(value)(str(value)) != value:  # PureWindowsPath("./c:b") prints as another path
        raise encoder.refusal(value, "its text means another path. Store its parts as strings")
    return _tagged(type(value).__name__, _write_str(encoder, str(value)))


def _write_range(encoder: _Encoder, value: range) -> Any:  # noqa: ANN401
    return _tagged("range", [_write_int(encoder, part) for part in (value.start, value.stop, value.step)])


_WRITERS: dict[type, Callable[[_Encoder, Any], Any]] = {
    type(None): lambda _, value: value,
    bool: lambda _, value: value,
    int: _write_int,
    float: _write_float,
    str: _write_str,
    list: _write_list,
    dict: _write_dict,
    tuple: _write_tuple,
    set: _write_set,
    frozenset: _write_set,
    deque: _write_deque,
    OrderedDict: _write_mapping,
    Counter: _write_mapping,
    bytes: _write_bytes,
    bytearray: _write_bytes,
    complex: _write_complex,
    datetime: _write_clock,
    date: _write_date,
    time: _write_clock,
    timedelta: _write_timedelta,
    timezone: _write_timezone,
    ZoneInfo: _write_zoneinfo,
    uuid.UUID: _write_uuid,
    Decimal: _write_decimal,
    Fraction: _write_fraction,
    PurePosixPath: _write_path,
    PosixPath: _write_path,
    PureWindowsPath: _write_path,
    WindowsPath: _write_path,
    range: _write_range,
}


# --- NumPy -------------------------------------------------------------------------------------------------------------------------


def _numpy_writer(kind: type) -> Callable[[_Encoder, Any], Any] | None:
    """How to write a NumPy type; whoever holds one has imported NumPy."""
    numpy = sys.modules.get("numpy")
    if numpy is None or kind.__module__ != "numpy":
        return None
    if kind is numpy.ndarray:
        return _write_array
    if kind in (numpy.str_, numpy.bytes_):
        return _write_text_scalar
    return _write_scalar if issubclass(kind, numpy.generic) else None


def _dtype_text(encoder: _Encoder, value: Any) -> str:  # noqa: ANN401
    """The portable name of the dtype of an array or scalar, byte order included."""
    import numpy as np  # noqa: PLC0415 - only who holds an array pays for NumPy

    dtype = value.dtype
    if dtype.char in "gG":
        raise encoder.refusal(value, f"the format of {dtype} differs between machines. Convert it with .astype('f8') or .astype('c16')")
    if dtype.hasobject:
        raise encoder.refusal(value, f"dtype {dtype} holds Python objects. Convert it to a plain dtype, or to a list with .tolist()")
    if not _DTYPE.fullmatch(dtype.str) or np.dtype(dtype.str) != dtype:
        raise encoder.refusal(value, f"dtype {dtype} is not a plain one. Store its fields as arrays of their own, or convert it with .astype(...)")
    return str(dtype.str)


def _write_array(encoder: _Encoder, value: np.ndarray[Any, Any]) -> Any:  # noqa: ANN401
    return _tagged("np.array", _base64(value.tobytes()), dtype=_dtype_text(encoder, value), shape=list(value.shape))


def _write_text_scalar(encoder: _Encoder, value: Any) -> Any:  # noqa: ANN401
    # Element by element, because every conversion of NumPy's own drops trailing NULs.
    if isinstance(value, str):
        return _tagged("np.str_", _write_str(encoder, "".join(iter(value))))
    return _tagged("np.bytes_", _base64(bytes(memoryview(value))))


def _write_scalar(encoder: _Encoder, value: np.generic[Any]) -> Any:  # noqa: ANN401
    text = _dtype_text(encoder, value)
    dtype = value.dtype
    if dtype.type is not type(value) or type(value)(0).dtype.newbyteorder("=").str != text:
        pass
    if dtype.kind in "biufc":
        item = value.item()
        if type(value)(item).tobytes() == value.tobytes():
            return _tagged("np.scalar", encoder.tree(item), dtype=text)
    return {_TAG: "np.scalar", "raw": _base64(value.tobytes()), "dtype": text}
