"""Values as readable JSON: `decode(encode(x))` is `x` again, same values and same types, or `encode` says why not.

Most states are plain (str keys, lists, numbers, text) and go through msgspec at once. What JSON would change on the way, such as
a tuple, NaN or an int key, is written as a tagged object `{"$fg": "tuple", "v": [...]}`, by the closed lists `_WRITERS` and
`_READERS` below. What is not on them is neither written nor read: decoding runs no code that the data names, and imports nothing
that it names (reading an array imports NumPy, at that moment).

Not kept: aliasing (one list in two places comes back as two lists); the memory layout and the flags of an array (it comes back in
C order and writable); and which of two equal dtypes an array had (`longlong` is `int64` where both have 64 bits).
"""

from __future__ import annotations

import base64
import cmath
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
from typing import TYPE_CHECKING, Any, TypeAlias
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

import msgspec

from faultguard.errors import CheckpointCorruptError, CheckpointNotSerializableError, UsageError

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    import numpy as np

__all__ = ["FINGERPRINT_LIMIT", "GROWING", "MAX_DEPTH", "decode", "encode", "fingerprint"]

MAX_DEPTH = 100
"""Containers within containers; one level takes up to four frames of Python's stack, and three levels of JSON."""

FINGERPRINT_LIMIT = 4096
"""Bytes of JSON up to which `fingerprint` looks at the value itself."""

Json: TypeAlias = Any
"""None, bool, int, float, str, and lists and dicts of these."""

_TAG = "$fg"
_TAG_MARK = b'"$fg"'
_MAX_JSON_DEPTH = 3 * MAX_DEPTH + 4
_MAX_KEY = 40
_MAX_TYPE_NAME = 200
_INT64 = 2**63
_NAN_BITS = struct.pack(">d", math.nan)
_DTYPE = re.compile(r"[<>|](?:[biufcSU]\d+|[mM]8(?:\[\d*[A-Za-zμ]+\])?)")
_ZONE_KEY = re.compile(r"[\w+-]+(?:/[\w+-]+)*", re.ASCII)  # no dots: ZoneInfo may look a name up as a module of tzdata

_STR = frozenset({str})
_LEAVES = frozenset({str, int, float, bool, type(None)})
_CONTAINERS = frozenset({dict, list})
_PLAIN = _LEAVES | _CONTAINERS

_to_json = msgspec.json.Encoder().encode
_from_json = msgspec.json.Decoder().decode
# For fingerprints and the order of sets: the standard library's text, which no version of msgspec can change.
_canonical = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"), allow_nan=False).encode


def encode(value: object, *, path: str = "state") -> bytes:
    """Write a value as UTF-8 JSON that `decode` gives back exactly, types included.

    Args:
        value: plain values (None, bool, int, float, str, dict, list) of up to `MAX_DEPTH` levels, and the types of the table in
            `docs/format.md`. Exact types only: a subclass would come back as its base, so it is refused.
        path: what the caller calls the value, for the text of an error.

    Returns:
        The JSON, without a newline. Sets are sorted, dicts keep their order.

    Raises:
        CheckpointNotSerializableError: a value would not come back exactly; its `path` says where, `state["opt"][3]`.

    Example:
        >>> encode({"rows": 3, "seen": (1, 2)})
        b'{"rows":3,"seen":{"$fg":"tuple","v":[1,2]}}'
    """
    data = _encode_plain(value)
    return _Encoder(path).encode(value) if data is None else data


def decode(data: bytes) -> Any:
    """Read what `encode` wrote.

    Args:
        data: the JSON; whoever stores it checks its checksum first.

    Returns:
        The value; nothing in it is shared with the result of another call.

    Raises:
        CheckpointCorruptError: the data is not JSON, is nested too deeply, or has a tag that `encode` does not write.
        UsageError: the data is intact, but takes NumPy or a time zone that is not installed here.

    Example:
        >>> decode(b'{"rows":3,"seen":{"$fg":"tuple","v":[1,2]}}')
        {'rows': 3, 'seen': (1, 2)}
    """
    try:
        tree = _from_json(data)
        return _read(tree) if _TAG_MARK in data else tree
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        message = f"a record of {len(data)} bytes is not JSON: {error}"
        raise CheckpointCorruptError(message) from error
    except RecursionError as error:
        if _json_depth(data) <= _MAX_JSON_DEPTH:
            raise  # nothing is wrong with the data: the caller has no stack left
        message = f"a record of {len(data)} bytes is nested deeper than any that faultguard writes"
        raise CheckpointCorruptError(message) from error


def fingerprint(value: object) -> str:
    """Give a short text by which the same batch is known again, in any process and on any machine. Never raises.

    Args:
        value: anything. It is not compared, iterated or printed unless its type is one that `encode` knows.

    Returns:
        `"v:"` and 16 hex digits of a sha256 for an immutable plain value whose JSON takes up to `FINGERPRINT_LIMIT` bytes.
        `"t:"`, the type and, where it is known without side effects, the length or shape for everything else.

    Example:
        >>> fingerprint("part-07.parquet")
        'v:630f946f322bc137'
        >>> fingerprint([1, 2, 3])
        't:list:3'
    """
    try:
        text = _frozen_text(value)
        if text is not None:
            return f"v:{hashlib.sha256(text).hexdigest()[:16]}"
        return f"t:{_type_name(type(value))}{_size(value)}"
    except Exception:  # noqa: BLE001 - a type may refuse even to be named, and a fingerprint is never a reason to fail
        return "t:?"


# --- plain values ------------------------------------------------------------------------------------------------------------------


def _encode_plain(value: object) -> bytes | None:
    """The JSON of a value that takes no tags; None where the slow path must write it, or say why it cannot."""
    try:
        if not _is_plain(value, MAX_DEPTH):
            return None
        data = _to_json(value)
        # msgspec writes NaN and infinity as null, which only reading it back shows.
        return data if _from_json(data) == value else None
    except (ValueError, OverflowError, RuntimeError, msgspec.MsgspecError):  # lone surrogates; a dict that changes meanwhile
        return None


def _is_plain(value: object, levels: int) -> bool:
    """Whether all types are exactly those of JSON. Types, because True == 1 == 1.0 and most subclasses equal their base."""
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
    """Whether an int takes over 64 bits: how many decimal digits Python reads is a setting that differs between processes."""
    return bool([value for value in values if type(value) is int and not -_INT64 <= value < _INT64])


# --- writing -----------------------------------------------------------------------------------------------------------------------


class _Part(str):
    """A step of a path that is neither a key nor an index."""

    __slots__ = ()


_KEY = _Part("<key>")
_ELEMENT = _Part("<element>")
_TZINFO = _Part(".tzinfo")


class _Encoder:
    """One walk through a value: builds the tree of JSON values, and knows where it is when it has to refuse one."""

    __slots__ = ("_open", "_root", "_steps")

    def __init__(self, root: str) -> None:
        self._root = root
        self._steps: list[object] = []
        self._open: set[int] = set()

    def encode(self, value: object) -> bytes:
        """The JSON of a value with its tags, read back once."""
        try:
            tree = self.tree(value)
            data = _to_json(tree)
            if _from_json(data) == tree:
                return data
        except RecursionError as error:
            self._steps.clear()
            raise self.refusal(value, "too little of Python's stack is left for its nesting. Save from a shallower call") from error
        except RuntimeError as error:  # "dictionary changed size during iteration"
            self._steps.clear()
            raise self.refusal(value, f"{error}. Change the state only in the thread of the loop") from error
        raise self.refusal(value, "it changed while it was read. Change the state only in the thread of the loop")

    def tree(self, value: Any) -> Json:
        """The value as JSON values, tagged where needed."""
        write = _WRITERS.get(type(value)) or _numpy_writer(type(value))
        if write is None:
            raise self.refusal(value, _reason(type(value)))
        return write(self, value)

    def child(self, step: object, value: object) -> Json:
        """The tree of a part of the value in hand. A refusal leaves the steps as they are: they are its path."""
        self._steps.append(step)
        tree = self.tree(value)
        self._steps.pop()
        return tree

    def is_plain(self, container: list[Any] | dict[Any, Any], values: Iterable[object]) -> bool:
        """Whether a container stands for itself. Asked only without containers inside, else each would be encoded many times."""
        return _LEAVES.issuperset(map(type, values)) and len(self._open) < MAX_DEPTH and _encode_plain(container) is not None

    def children(self, container: object, values: Iterable[object], step: object = None) -> list[Json]:
        """The trees of the values of a container, each named by its index or all by `step`."""
        self._enter(container)
        trees = [self.child(index if step is None else step, value) for index, value in enumerate(values)]
        self._open.remove(id(container))
        return trees

    def pairs(self, mapping: Mapping[Any, object]) -> list[list[Json]]:
        """The trees of keys and values, in order."""
        self._enter(mapping)
        trees = [[self.child(_KEY, key), self.child(key, value)] for key, value in mapping.items()]
        self._open.remove(id(mapping))
        return trees

    def refusal(self, value: object, reason: str) -> CheckpointNotSerializableError:
        """The error for the value in hand: what and where, why, what to do."""
        path = self._root + "".join(step if type(step) is _Part else f"[{_short(step)}]" for step in self._steps)
        name = _type_name(type(value))
        return CheckpointNotSerializableError(f"{path} ({name}) cannot be recorded: {reason}.", path=path, type_name=name)

    def _enter(self, container: object) -> None:
        if id(container) in self._open:
            raise self.refusal(container, "it contains itself. Store the parts without the way back")
        if len(self._open) == MAX_DEPTH:
            raise self.refusal(container, f"it lies over {MAX_DEPTH} levels deep. Flatten the state, for example to a list of rows")
        self._open.add(id(container))


def _tagged(tag: str, v: Json, **more: Json) -> Json:
    return {_TAG: tag, "v": v, **more}


def _base64(raw: bytes | bytearray) -> str:
    return base64.b64encode(raw).decode("ascii")


def _write_itself(_: _Encoder, value: bool | None) -> Json:  # noqa: FBT001 - the value is what is written
    return value


def _write_int(_: _Encoder, value: int) -> Json:
    # Hexadecimal digits have no limit, and are read in linear time.
    return value if -_INT64 <= value < _INT64 else _tagged("int", hex(value))


def _write_float(_: _Encoder, value: float) -> Json:
    if math.isfinite(value):
        return value
    bits = struct.pack(">d", value)
    return _tagged("float", f"0x{bits.hex()}" if math.isnan(value) and bits != _NAN_BITS else str(value))


def _write_str(_: _Encoder, value: str) -> Json:
    try:
        value.encode()
    except UnicodeEncodeError:  # lone surrogates, as in names of files that are not UTF-8
        return _tagged("str", _base64(value.encode("utf-8", "surrogatepass")))
    return value


def _write_list(encoder: _Encoder, value: list[object]) -> Json:
    return value if encoder.is_plain(value, value) else encoder.children(value, value)


def _write_dict(encoder: _Encoder, value: dict[object, object]) -> Json:
    if encoder.is_plain(value, value.values()):
        return value
    pairs = encoder.pairs(value)
    is_object = _TAG not in value and all(type(key) is str for key, _ in pairs)
    return dict(pairs) if is_object else _tagged("dict", pairs)


def _write_tuple(encoder: _Encoder, value: tuple[object, ...]) -> Json:
    items = list(value)
    return _tagged("tuple", items if encoder.is_plain(items, items) else encoder.children(value, items))


def _write_set(encoder: _Encoder, value: set[Any] | frozenset[Any]) -> Json:
    # Sorted, because the order of a set depends on the hash seed of the process.
    if set(map(type, value)) in ({int}, {str}):
        items = sorted(value)
        if encoder.is_plain(items, items):
            return _tagged(type(value).__name__, items)
    return _tagged(type(value).__name__, sorted(encoder.children(value, value, _ELEMENT), key=_canonical))


def _write_deque(encoder: _Encoder, value: deque[object]) -> Json:
    more = {} if value.maxlen is None else {"maxlen": value.maxlen}
    return _tagged("deque", encoder.children(value, value), **more)


def _write_mapping(encoder: _Encoder, value: OrderedDict[Any, Any] | Counter[Any]) -> Json:
    if vars(value):
        raise encoder.refusal(value, "it has attributes of its own, which would be lost. Store dict(...) of it")
    return _tagged(type(value).__name__, encoder.pairs(value))


def _write_complex(encoder: _Encoder, value: complex) -> Json:
    return _tagged("complex", [_write_float(encoder, value.real), _write_float(encoder, value.imag)])


def _write_bytes(_: _Encoder, value: bytes | bytearray) -> Json:
    return _tagged(type(value).__name__, _base64(value))


def _write_date(_: _Encoder, value: date) -> Json:
    return _tagged("date", value.isoformat())


def _write_clock(encoder: _Encoder, value: datetime | time) -> Json:
    # ISO text alone has the offset at that moment, but neither the zone nor the fold.
    more = {"fold": value.fold} if value.fold else {}
    if value.tzinfo is not None:
        more["tz"] = encoder.child(_TZINFO, value.tzinfo)
    return _tagged(type(value).__name__, value.replace(tzinfo=None).isoformat(), **more)


def _write_timedelta(_: _Encoder, value: timedelta) -> Json:
    return _tagged("timedelta", [value.days, value.seconds, value.microseconds])


def _write_timezone(encoder: _Encoder, value: Any) -> Json:
    offset, *name = value.__getinitargs__()
    more = {"name": _write_str(encoder, name[0])} if name else {}
    return _tagged("timezone", [offset.days, offset.seconds, offset.microseconds], **more)


def _write_zoneinfo(encoder: _Encoder, value: ZoneInfo) -> Json:
    if type(value.key) is not str or not _ZONE_KEY.fullmatch(value.key):
        raise encoder.refusal(value, "it was not made from the name of a zone. Use ZoneInfo(name), or a fixed datetime.timezone")
    return _tagged("ZoneInfo", value.key)


def _write_uuid(_: _Encoder, value: uuid.UUID) -> Json:
    more = {} if value.is_safe is uuid.SafeUUID.unknown else {"safe": value.is_safe.value}
    return _tagged("UUID", str(value), **more)


def _write_decimal(_: _Encoder, value: Decimal) -> Json:
    return _tagged("Decimal", str(value))


def _write_fraction(encoder: _Encoder, value: Fraction) -> Json:
    parts = [value.numerator, value.denominator]
    if set(map(type, parts)) != {int}:
        raise encoder.refusal(value, "its parts are not plain ints. Make it with Fraction(int(n), int(d))")
    return _tagged("Fraction", [_write_int(encoder, part) for part in parts])


def _write_path(encoder: _Encoder, value: PurePath) -> Json:
    if type(value)(str(value)) != value:  # PureWindowsPath("./c:b") prints as "c:b"
        raise encoder.refusal(value, "its text means another path. Store list(path.parts)")
    return _tagged(type(value).__name__, _write_str(encoder, str(value)))


def _write_range(encoder: _Encoder, value: range) -> Json:
    return _tagged("range", [_write_int(encoder, part) for part in (value.start, value.stop, value.step)])


_WRITERS: dict[type, Callable[[_Encoder, Any], Json]] = {
    type(None): _write_itself,
    bool: _write_itself,
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
    time: _write_clock,
    date: _write_date,
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
"""By exact type; NumPy's types are added by `_numpy_writer`."""


def _numpy_writer(kind: type) -> Callable[[_Encoder, Any], Json] | None:
    """How to write a NumPy type. Whoever holds one has imported NumPy, so nobody else pays for the import."""
    numpy = sys.modules.get("numpy")
    if numpy is None or kind.__module__ != "numpy":
        return None
    if kind is numpy.ndarray:
        return _write_array
    if kind in {numpy.str_, numpy.bytes_}:
        return _write_numpy_text
    return _write_scalar if issubclass(kind, numpy.generic) else None


def _dtype_text(encoder: _Encoder, value: np.ndarray[Any, Any] | np.generic[Any]) -> str:
    """The name of a dtype that means the same on every machine, byte order included."""
    dtype = value.dtype
    if dtype.hasobject:
        raise encoder.refusal(value, f"dtype {dtype} holds Python objects. Convert it to a plain dtype, or to a list with .tolist()")
    if dtype.char in "gG":
        raise encoder.refusal(value, f"the format of {dtype} differs between machines. Convert it with .astype('f8') or .astype('c16')")
    if not _DTYPE.fullmatch(dtype.str) or sys.modules["numpy"].dtype(dtype.str) != dtype:
        raise encoder.refusal(value, f"dtype {dtype} is not a plain one. Store each field as an array of its own, or use .astype(...)")
    return str(dtype.str)


def _write_array(encoder: _Encoder, value: np.ndarray[Any, Any]) -> Json:
    return _tagged("np.array", _base64(value.tobytes()), dtype=_dtype_text(encoder, value), shape=list(value.shape))


def _write_numpy_text(encoder: _Encoder, value: np.str_ | np.bytes_) -> Json:
    # By join, because NumPy's own conversions drop trailing NULs.
    if isinstance(value, str):
        return _tagged("np.str_", _write_str(encoder, "".join(value)))
    return _tagged("np.bytes_", _base64(b"".join((value,))))


def _write_scalar(encoder: _Encoder, value: np.generic[Any]) -> Json:
    dtype, kind = _dtype_text(encoder, value), type(value)
    if sys.modules["numpy"].dtype(dtype).type is not kind:
        raise encoder.refusal(value, f"it would come back as the equal numpy.{value.dtype.name}. Convert it to that")
    if value.dtype.kind in "biufc" and not cmath.isnan(value.item()):  # NaN may lose its payload on the way through a float
        return _tagged("np.scalar", encoder.tree(value.item()), dtype=dtype)
    return _tagged("np.scalar", _tagged("bytes", _base64(value.tobytes())), dtype=dtype)


# --- refusing ----------------------------------------------------------------------------------------------------------------------


def _is_under(*names: str) -> Callable[[type], bool]:
    """Tell types by the top-level package they say they are from, without importing it."""
    return lambda kind: str(kind.__module__).split(".", 1)[0] in names


def _is_a(*bases: type) -> Callable[[type], bool]:
    return lambda kind: issubclass(kind, bases)


def _is_numpy_random(kind: type) -> bool:
    return str(kind.__module__).startswith("numpy.random")


def _is_array(kind: type) -> bool:
    return any((base.__module__, base.__name__) == ("numpy", "ndarray") for base in kind.__mro__)


def _is_namedtuple(kind: type) -> bool:
    return issubclass(kind, tuple) and hasattr(kind, "_fields")


_REASONS: tuple[tuple[Callable[[type], bool], str], ...] = (
    (
        lambda kind: _is_under("ray")(kind) and "Ref" in kind.__name__,
        "the object it names may be gone when the task resumes. Store the value (ray.get), or pass the ref as an argument of the task",
    ),
    (_is_under("ray"), "what it names may be gone when the task resumes. Store a name, or pass it as an argument of the task"),
    (_is_a(enum.Enum), "an enum is code. Store its .value"),
    (_is_a(defaultdict), "its factory is code. Store dict(...) of it"),
    (_is_namedtuple, "its class is code. Store ._asdict(), or tuple(...) of it"),
    (dataclasses.is_dataclass, "its class is code. Store dataclasses.asdict(...) of it"),
    (_is_a(random.Random), "a generator is more than its values. Use ckpt.track(rng=...), or store its getstate()"),
    (_is_numpy_random, "a generator is more than its values. Use ckpt.track(rng=...), or store its bit_generator.state or get_state()"),
    (_is_array, "it would come back as a plain array. Convert it with numpy.asarray(...), and store a mask apart"),
    (
        _is_under("torch", "tensorflow", "jax", "jaxlib", "cupy", "pandas", "polars", "pyarrow"),
        "only plain values and NumPy arrays are. Use ckpt.track(name=(get, set)), or convert it to these",
    ),
    (_is_a(Iterator), "it has a position that cannot be recorded. Loop over ckpt.batches(...), or keep it out of state"),
    (
        _is_a(type, types.FunctionType, types.BuiltinFunctionType, types.MethodType, types.ModuleType),
        "it is code. Store a name and look it up",
    ),
)
"""Why not and what instead, for the types that people do put into a state; the first that fits counts."""


def _reason(kind: type) -> str:
    """Why values of this type are refused, and what to do."""
    for fits, reason in _REASONS:
        if fits(kind):
            return reason
    base = next((base for base in kind.__mro__ if base in _WRITERS), None)
    if base is not None:
        return f"it would come back as a {base.__name__}, of which it is a subclass. Convert it with {base.__name__}(...)"
    return "its type is not one that comes back exactly. Convert it, keep it out of state, or use ckpt.track(name=(get, set))"


def _type_name(kind: type) -> str:
    name = f"{kind.__module__}.{kind.__qualname__}"
    return name.removeprefix("builtins.")[-_MAX_TYPE_NAME:]


def _short(key: object) -> str:
    """A key as it is written in code, for a path."""
    try:
        text = json.dumps(key, ensure_ascii=False) if type(key) is str else repr(key)
    except ValueError:  # an int of more digits than Python prints
        text = f"<{_type_name(type(key))}>"
    text = text.encode("utf-8", "backslashreplace").decode()
    return text if len(text) <= _MAX_KEY else f"{text[:_MAX_KEY]}…"


# --- reading -----------------------------------------------------------------------------------------------------------------------


def _read(tree: Json) -> Any:
    """The value of a tree, which is used up."""
    if type(tree) is list:
        return [_read(item) if type(item) in _CONTAINERS else item for item in tree]
    if type(tree) is not dict:
        return tree
    if _TAG in tree:
        return _read_tagged(tree.pop(_TAG), tree)
    return {key: _read(item) if type(item) in _CONTAINERS else item for key, item in tree.items()}


def _read_tagged(tag: Json, fields: dict[str, Json]) -> Any:
    read = _READERS.get(tag) if type(tag) is str else None
    if read is None:
        message = f"a record has a value of the unknown kind {_short(tag)}: it is damaged, or from a newer faultguard"
        raise CheckpointCorruptError(message)
    try:
        return read(**fields)
    except (CheckpointCorruptError, UsageError, MemoryError, RecursionError):
        raise
    except Exception as error:
        message = f"a record has a damaged value of kind {tag!r}: {type(error).__name__}: {error}"
        raise CheckpointCorruptError(message) from error


def _expect(value: Json, kind: type) -> Any:
    """The value, if it is of that type; constructors take too much (`tuple("ab")`, `UUID("{...}")`)."""
    if type(value) is not kind:
        message = f"expected {kind.__name__}, found {_short(value)}"
        raise ValueError(message)
    return value


def _items(v: Json, length: int | None = None) -> list[Any]:
    """The values of a list, of that length if one is given."""
    items: list[Any] = _expect(v, list)
    if length is not None and len(items) != length:
        message = f"expected {length} values, found {_short(items)}"
        raise ValueError(message)
    return [_read(item) for item in items]


def _ints(v: Json, length: int | None = None) -> list[int]:
    return [_expect(item, int) for item in _items(v, length)]


def _raw(v: Json) -> bytes:
    return base64.b64decode(_expect(v, str), validate=True)


def _text(v: Json) -> str:
    text: str = _expect(_read(v), str)
    return text


def _read_float(v: Json) -> float:
    text = _expect(v, str)
    if text in {"nan", "inf", "-inf"}:
        return float(text)
    number: float = struct.unpack(">d", bytes.fromhex(text.removeprefix("0x")))[0]
    return number


def _read_dict(v: Json) -> dict[Any, Any]:
    return dict(_items(pair, 2) for pair in _expect(v, list))


def _read_complex(v: Json) -> complex:
    real, imag = (_expect(part, float) for part in _items(v, 2))
    return complex(real, imag)


def _read_datetime(v: Json, fold: int = 0, tz: Json = None) -> datetime:
    return datetime.fromisoformat(_expect(v, str)).replace(fold=fold, tzinfo=_read(tz))


def _read_time(v: Json, fold: int = 0, tz: Json = None) -> time:
    return time.fromisoformat(_expect(v, str)).replace(fold=fold, tzinfo=_read(tz))


def _read_timedelta(v: Json) -> timedelta:
    days, seconds, microseconds = _ints(v, 3)
    return timedelta(days, seconds, microseconds)


def _read_timezone(v: Json, name: Json = None) -> timezone:
    return timezone(_read_timedelta(v)) if name is None else timezone(_read_timedelta(v), _text(name))


def _read_zoneinfo(v: Json) -> ZoneInfo:
    if not _ZONE_KEY.fullmatch(_expect(v, str)):
        message = f"{_short(v)} is not the name of a time zone"
        raise ValueError(message)
    try:
        return ZoneInfo(v)
    except ZoneInfoNotFoundError as error:
        message = f"the record holds a time in the zone {v!r}, which this machine does not know. Install the package tzdata"
        raise UsageError(message) from error


def _read_uuid(v: Json, safe: Json = None) -> uuid.UUID:
    return uuid.UUID(_expect(v, str), is_safe=uuid.SafeUUID(safe))


def _numpy() -> Any:
    """The module, imported only for a record that needs it."""
    try:
        import numpy as np
    except ImportError as error:
        message = "the record holds NumPy arrays, and NumPy cannot be imported here. Install it"
        raise UsageError(message) from error
    return np


def _dtype(text: Json) -> Any:
    if not _DTYPE.fullmatch(_expect(text, str)):
        message = f"{_short(text)} is not a plain dtype"
        raise ValueError(message)
    return _numpy().dtype(text)


def _read_array(v: Json, dtype: Json, shape: Json) -> np.ndarray[Any, Any]:
    raw, kind, sizes = bytearray(_raw(v)), _dtype(dtype), _ints(shape)
    if len(raw) != math.prod(sizes) * kind.itemsize:
        message = f"{len(raw)} bytes are no array of {dtype} with the shape {sizes}"
        raise ValueError(message)
    array: np.ndarray[Any, Any] = _numpy().ndarray(sizes, kind, raw)
    return array


def _read_scalar(v: Json, dtype: Json) -> np.generic[Any]:
    item, kind = _read(v), _dtype(dtype)
    scalar: np.generic[Any]
    if type(item) is bytes:
        (scalar,) = _numpy().frombuffer(item, kind)
    elif type(item) in {bool, int, float, complex}:
        scalar = kind.type(item)
    else:
        message = f"{_short(v)} is not a number"
        raise ValueError(message)
    return scalar


_READERS: dict[str, Callable[..., Any]] = {
    "int": lambda v: int(_expect(v, str), 16),
    "float": _read_float,
    "str": lambda v: _raw(v).decode("utf-8", "surrogatepass"),
    "dict": _read_dict,
    "tuple": lambda v: tuple(_items(v)),
    "set": lambda v: set(_items(v)),
    "frozenset": lambda v: frozenset(_items(v)),
    "deque": lambda v, maxlen=None: deque(_items(v), maxlen),
    "OrderedDict": lambda v: OrderedDict(_read_dict(v)),
    "Counter": lambda v: Counter(_read_dict(v)),
    "bytes": _raw,
    "bytearray": lambda v: bytearray(_raw(v)),
    "complex": _read_complex,
    "datetime": _read_datetime,
    "time": _read_time,
    "date": lambda v: date.fromisoformat(_expect(v, str)),
    "timedelta": _read_timedelta,
    "timezone": _read_timezone,
    "ZoneInfo": _read_zoneinfo,
    "UUID": _read_uuid,
    "Decimal": lambda v: Decimal(_expect(v, str)),
    "Fraction": lambda v: Fraction(*_ints(v, 2)),
    "PurePosixPath": lambda v: PurePosixPath(_text(v)),
    "PosixPath": lambda v: PosixPath(_text(v)),
    "PureWindowsPath": lambda v: PureWindowsPath(_text(v)),
    "WindowsPath": lambda v: WindowsPath(_text(v)),
    "range": lambda v: range(*_ints(v, 3)),
    "np.array": _read_array,
    "np.scalar": _read_scalar,
    "np.str_": lambda v: _numpy().str_(_text(v)),
    "np.bytes_": lambda v: _numpy().bytes_(_raw(v)),
}
"""By tag. Called with the fields of the object; a missing or an extra one is damage."""


def _json_depth(data: bytes) -> int:
    """How deep the brackets of a JSON text are nested, without recursion."""
    depth = deepest = 0
    for bracket in re.findall(rb"[\[{\]}]", re.sub(rb'"(?:[^"\\]|\\.)*"', b"", data)):
        depth += 1 if bracket in b"[{" else -1
        deepest = max(deepest, depth)
    return deepest


# --- fingerprints ------------------------------------------------------------------------------------------------------------------

_IMMUTABLE = frozenset(_WRITERS) - {list, dict, set, deque, OrderedDict, Counter, bytearray}
_SIZED = frozenset({str, bytes, bytearray, list, tuple, dict, set, frozenset, deque})
GROWING = _SIZED - _IMMUTABLE
"""Types whose fingerprint changes when the user adds something: to be taken before the value is given out."""


def _frozen_text(value: object) -> bytes | None:
    """The canonical JSON of an immutable plain value; None for every other, and for a long one."""
    if not _is_frozen(value):
        return None
    try:
        text = _canonical(_Encoder("value").tree(value)).encode()
    except CheckpointNotSerializableError:
        return None
    return text if len(text) <= FINGERPRINT_LIMIT else None


def _is_frozen(value: object) -> bool:
    """Whether a value is made of immutable types only, and is not known to be long before it is encoded."""
    numpy_scalar = getattr(sys.modules.get("numpy"), "generic", ())
    todo, budget = [value], FINGERPRINT_LIMIT
    while todo and budget >= 0:
        item = todo.pop()
        if type(item) not in _IMMUTABLE and not issubclass(type(item), numpy_scalar):
            return False
        if isinstance(item, (str, bytes, tuple, frozenset)):
            budget -= len(item)
        if isinstance(item, (tuple, frozenset)) and budget >= 0:
            todo.extend(item)
    return budget >= 0


def _size(value: object) -> str:
    """The length or shape, where asking for it runs no code of the user."""
    if type(value) in _SIZED:
        return f":{len(value)}"  # type: ignore[arg-type]
    if type(value) is getattr(sys.modules.get("numpy"), "ndarray", None):
        return f":{'x'.join(map(str, value.shape))}"  # type: ignore[attr-defined]
    return ""
