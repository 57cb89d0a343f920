"""The codec gives back exactly what it was given, or says where and why not; reading never runs code."""

from __future__ import annotations

import base64
import contextlib
import datetime as dt
import doctest
import enum
import json
import math
import os
import pickle
import random
import re
import struct
import subprocess
import sys
import threading
import uuid
import zoneinfo
from collections import Counter, OrderedDict, defaultdict, deque, namedtuple
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path, PosixPath, PurePosixPath, PureWindowsPath
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from faultguard import _codec
from faultguard._codec import FINGERPRINT_LIMIT, MAX_DEPTH, decode, encode, fingerprint
from faultguard.errors import CheckpointCorruptError, CheckpointNotSerializableError, UsageError
from tests.needs import missing

if TYPE_CHECKING:
    from collections.abc import Callable

ROOT = Path(__file__).parents[1]


def bits(value: Any) -> Any:
    """A description of a value that is equal for two values only if nothing tells them apart, written without the codec."""
    kind = type(value)
    if isinstance(value, np.generic) and kind not in DESCRIBE:
        return kind, value.dtype.str, value.tobytes()
    return kind, DESCRIBE[kind](value) if kind in DESCRIBE else value


def items_of(value: Any) -> Any:
    """The items in order."""
    return [bits(item) for item in value]


def pairs_of(value: Any) -> Any:
    """The keys and values in order."""
    return [(bits(key), bits(item)) for key, item in value.items()]


def elements_of(value: Any) -> Any:
    """The elements in any one order."""
    return sorted(map(bits, value), key=repr)


def clock_of(value: Any) -> Any:
    """The fields of a moment that do not take part in comparisons, too."""
    return value.replace(tzinfo=None).isoformat(), value.fold, bits(value.tzinfo)


DESCRIBE: dict[type, Callable[[Any], Any]] = {
    float: lambda value: struct.pack(">d", value),
    complex: lambda value: (bits(value.real), bits(value.imag)),
    list: items_of,
    tuple: items_of,
    deque: lambda value: (items_of(value), value.maxlen),
    dict: pairs_of,
    OrderedDict: pairs_of,
    Counter: pairs_of,
    set: elements_of,
    frozenset: elements_of,
    dt.datetime: clock_of,
    dt.time: clock_of,
    dt.timezone: lambda value: value.__getinitargs__(),
    Decimal: lambda value: value.as_tuple(),
    uuid.UUID: lambda value: (value.int, value.is_safe),
    range: lambda value: (value.start, value.stop, value.step),
    np.ndarray: lambda value: (value.dtype.str, value.shape, value.tobytes()),
    np.str_: list,
    np.bytes_: list,
}
"""What to compare where `==` is not enough."""


def check_exact(value: object) -> None:
    """Fail unless the value comes back exactly."""
    before = bits(value)
    data = encode(value)
    json.loads(data)  # and the bytes are JSON for everybody else, too
    assert bits(decode(data)) == before
    assert bits(value) == before, "encoding changed the value"
    assert encode(decode(data)) == data


# --- everything that is supported, at random ---------------------------------------------------------------------------------------

ZONES = [zoneinfo.ZoneInfo(key) for key in ("Europe/Paris", "America/New_York", "UTC") if key in zoneinfo.available_timezones()]
MICROSECOND = dt.timedelta(microseconds=1)

any_text = st.text(st.characters(exclude_categories=()), max_size=8)
any_float = st.floats() | st.binary(min_size=8, max_size=8).map(lambda raw: struct.unpack(">d", raw)[0])
plain_leaves = st.none() | st.booleans() | st.integers(-(2**63), 2**63 - 1) | any_float | st.text(max_size=8)
offsets = st.timedeltas(-dt.timedelta(days=1) + MICROSECOND, dt.timedelta(days=1) - MICROSECOND)
zones = st.none() | st.builds(dt.timezone, offsets) | st.builds(dt.timezone, offsets, any_text) | st.sampled_from([*ZONES, dt.timezone.utc])
numpy_dtypes = (
    hnp.boolean_dtypes()
    | hnp.integer_dtypes(endianness="?")
    | hnp.unsigned_integer_dtypes(endianness="?")
    | hnp.floating_dtypes(endianness="?", sizes=(16, 32, 64))
    | hnp.complex_number_dtypes(endianness="?", sizes=(64, 128))
    | hnp.datetime64_dtypes(endianness="?")
    | hnp.timedelta64_dtypes(endianness="?")
    | hnp.byte_string_dtypes(min_len=1, max_len=5)
    | hnp.unicode_string_dtypes(endianness="?", min_len=1, max_len=5)
)


def raw_array(dtype: np.dtype[Any], shape: tuple[int, ...], data: st.DataObject) -> np.ndarray[Any, Any]:
    """An array of arbitrary bytes, so that NaN payloads and padding are met; text must be valid, though."""
    size = math.prod(shape) * dtype.itemsize
    array: np.ndarray[Any, Any]
    if dtype.kind == "U":
        array = data.draw(hnp.arrays(dtype, shape))
    else:
        array = np.ndarray(shape, dtype, bytearray(data.draw(st.binary(min_size=size, max_size=size))))
    return array


@st.composite
def arrays(draw: st.DrawFn) -> np.ndarray[Any, Any]:
    """Arrays of every supported dtype, of any shape, also 0-d and empty, also in Fortran order."""
    array = raw_array(draw(numpy_dtypes), draw(hnp.array_shapes(min_dims=0, min_side=0, max_side=3)), draw(st.data()))
    return np.asfortranarray(array) if array.ndim and draw(st.booleans()) else array


@st.composite
def scalars(draw: st.DrawFn) -> Any:
    """Scalars of every dtype whose type is the canonical one of its size."""
    dtype = draw(numpy_dtypes)
    return raw_array(np.dtype(dtype.str).newbyteorder("="), (), draw(st.data()))[()]


hashable_leaves = st.one_of(
    plain_leaves,
    any_text,
    st.integers(),
    st.binary(max_size=8),
    st.complex_numbers(),
    st.builds(complex, any_float, any_float),
    st.builds(lambda moment, zone, fold: moment.replace(tzinfo=zone, fold=fold), st.datetimes(), zones, st.sampled_from([0, 1])),
    st.builds(lambda moment, zone, fold: moment.replace(tzinfo=zone, fold=fold), st.times(), zones, st.sampled_from([0, 1])),
    st.dates(),
    st.timedeltas(),
    zones,
    st.builds(uuid.UUID, int=st.integers(0, 2**128 - 1), is_safe=st.sampled_from(list(uuid.SafeUUID))),
    st.decimals().filter(lambda number: not number.is_snan()),  # a signalling NaN has no hash
    st.fractions(),
    st.builds(PurePosixPath, st.text("ab./ é\udcff", max_size=6)),
    st.builds(PosixPath, st.text("ab./ é\udcff", max_size=6)),
    st.builds(range, st.integers(), st.integers(), st.integers().filter(bool)),
    scalars(),
    st.builds(np.str_, st.text(st.characters(max_codepoint=300), max_size=4)),
    st.builds(np.bytes_, st.binary(max_size=4)),
)
hashables = st.recursive(
    hashable_leaves,
    lambda inner: st.lists(inner, max_size=3).map(tuple) | st.frozensets(inner, max_size=3),
    max_leaves=4,
)
values = st.recursive(
    hashables | st.decimals() | st.binary(max_size=8).map(bytearray) | arrays(),
    lambda inner: st.one_of(
        st.lists(inner, max_size=4),
        st.lists(inner, max_size=4).map(tuple),
        st.builds(deque, st.lists(inner, max_size=4), st.none() | st.integers(0, 5)),
        st.sets(hashables, max_size=4),
        st.dictionaries(st.text(max_size=4), inner, max_size=4),
        st.dictionaries(hashables, inner, max_size=4),
        st.dictionaries(hashables, inner, max_size=4).map(OrderedDict),
        st.dictionaries(hashables, st.integers(), max_size=4).map(Counter),
    ),
    max_leaves=12,
)


@settings(max_examples=600, deadline=None)
@given(values)
def test_every_supported_value_comes_back_exactly(value: object) -> None:
    """Values of all supported types, nested in each other, come back with the same bits and types."""
    check_exact(value)


@settings(max_examples=300, deadline=None)
@given(st.recursive(plain_leaves, lambda inner: st.lists(inner) | st.dictionaries(st.text(max_size=4), inner), max_leaves=30))
def test_plain_json_comes_back_exactly(value: object) -> None:
    """Values of JSON's own types, which take the fast path, keep types that compare equal (True, 1, 1.0) apart."""
    check_exact(value)


@settings(max_examples=300, deadline=None)
@given(hashables | values)
def test_fingerprint_takes_anything(value: object) -> None:
    """A fingerprint is a short text, and the same for the value that came back."""
    text = fingerprint(value)
    assert re.match(r"v:[0-9a-f]{16}$|t:", text)
    assert len(text) < 250
    assert fingerprint(decode(encode(value))) == text


# --- traps, by name ----------------------------------------------------------------------------------------------------------------

TRAPS = {
    "true beside one": [True, 1, 1.0, False, 0, 0.0, -0.0],
    "keys that print alike": {"1": "str", 1: "int"},
    "true as a key": {True: "yes"},
    "none as a key": {None: 1},
    "not finite": [math.nan, math.inf, -math.inf],
    "nan with a payload": struct.unpack(">d", bytes.fromhex("7ff8000000000001"))[0],
    "nan with a sign": struct.unpack(">d", bytes.fromhex("fff8000000000000"))[0],
    "nan in a deep list": {"a": [[1.0, math.nan]]},
    "two nans as keys": {float("nan"): 1, float("nan"): 2},
    "smallest and largest floats": [5e-324, 2.2250738585072014e-308, sys.float_info.max, 1e16, 1e22, 0.1, 123456789012345680.0],
    "ints around 64 bits": [2**63 - 1, 2**63, 2**64 - 1, 2**64, -(2**63), -(2**63) - 1],
    "an int of 10,000 digits": 10**10_000,
    "lone surrogates": ["\ud800", "\udfff\udcff", "a\ud800b"],
    "surrogates that make a pair": "\ud83d\ude00",
    "surrogate in a key": {"\udcff": 1},
    "text": ["", "\0", "\x7f\x80", "é😀", "\u2028", '"\\/', "\r\n\t"],
    "our tag as a key": {"$fg": "tuple", "v": [1]},
    "our tag alone": {"$fg": 1},
    "our tag as a value": {"a": "$fg", "b": ["$fg"]},
    "our tag inside text": {"a": '{"$fg":"tuple","v":[]}'},
    "our tag in a deep key": [{"a": {"$fg": {"$fg": None}}}],
    "empty containers": [[], {}, (), set(), frozenset(), deque(), OrderedDict(), Counter(), b"", bytearray(), range(0)],
    "order of a dict": {"b": 1, "a": 2, "c": 3},
    "order of an ordered dict": OrderedDict([("b", 1), ("a", 2)]),
    "counts": Counter({"a": 0, "b": -3, "c": 2}),
    "a full deque": deque([1, 2, 3], maxlen=3),
    "tuples in tuples": ((), ((),), (1, (2, (3,)))),
    "set of mixed types": {1, "1", (1,), None, b"1", 2.5, frozenset({1})},
    "fold": [dt.datetime(2026, 10, 25, 2, 30, fold=1), dt.time(2, 30, fold=1)],  # noqa: DTZ001
    "utc twice": [dt.datetime(2026, 1, 1, tzinfo=dt.timezone.utc), dt.timezone(dt.timedelta(0), "UTC")],
    "zone with a strange name": dt.timezone(dt.timedelta(hours=1), "\udcff"),
    "odd offset": dt.timezone(-dt.timedelta(hours=3, seconds=7, microseconds=11)),
    "extreme dates": [dt.datetime(1, 1, 1), dt.datetime(9999, 12, 31, 23, 59, 59, 999999), dt.date.min, dt.timedelta.min, dt.timedelta.max],  # noqa: DTZ001
    "decimals": [Decimal(text) for text in ("NaN123", "-sNaN7", "-0.00", "1E+5", "-Infinity", "0E-10", "1" * 60)],
    "uuid that knows to be safe": uuid.UUID(int=1, is_safe=uuid.SafeUUID.safe),
    "paths": [PurePosixPath("//a//b/./c"), PosixPath("~/x"), PurePosixPath("\udcff"), PureWindowsPath("c:/a"), PurePosixPath()],
    "ranges that are equal": [range(0), range(5, 5), range(0, 3, 2), range(0, 4, 2), range(2**80, 2**81, 2**70)],
    "numpy scalars that are python types": [np.float64(1.5), np.str_("a"), np.bytes_(b"a"), np.bool_(True), np.complex128(1j)],
    "numpy scalars": [np.int8(-1), np.uint64(2**64 - 1), np.float16(0.1), np.float32(0.1), np.complex64(1 + 2j), np.float64("-inf")],
    "numpy scalars with payload": [np.ndarray((), "<f4", bytes.fromhex("0100a07f"))[()], np.ndarray((), "<f8", b"\1" + b"\xff" * 7)[()]],
    "numpy times": [np.datetime64("NaT", "s"), np.datetime64("2026-07-04T01:02", "ns"), np.timedelta64(3, ("s", 25))],
    "numpy text with zeros": [np.str_("a\0"), np.bytes_(b"a\0\0"), np.str_(""), np.bytes_(b"")],
    "arrays of odd shapes": [np.array(1.5), np.zeros((0, 3)), np.zeros((2, 0, 2), "<i2"), np.broadcast_to(np.arange(2), (3, 2))],
    "arrays of odd dtypes": [np.arange(3, dtype=">i4"), np.array(["ab", ""]), np.array([b"a\0", b"b"]), np.zeros(2, "<M8[7ms]")],
    "array of text without length": np.ndarray((2,), "<U0"),
    "array in reverse": np.arange(6).reshape(2, 3)[::-1, ::2],
}


@pytest.mark.parametrize("value", TRAPS.values(), ids=TRAPS.keys())
def test_known_traps_come_back_exactly(value: object) -> None:
    """Each value that some JSON library changes silently comes back as it was."""
    check_exact(value)
    check_exact({"state": [value, (value,)]})


def test_plain_state_is_plain_json() -> None:
    """A state that needs no tags is written as anybody would write it, in the order it has."""
    assert encode({"b": 1, "a": [None, True, 2.5, "é"]}) == '{"b":1,"a":[null,true,2.5,"é"]}'.encode()


def test_numbers_that_json_readers_disagree_on_are_tagged() -> None:
    """An int over 64 bits is never a JSON number: how many digits a process reads is a setting of Python. Nor is NaN."""
    assert encode([2**63 - 1, 2**63]) == b'[9223372036854775807,{"$fg":"int","v":"0x8000000000000000"}]'
    assert encode({"a": -(2**63) - 1}) == b'{"a":{"$fg":"int","v":"-0x8000000000000001"}}'
    assert encode(math.nan) == b'{"$fg":"float","v":"nan"}'


def test_sets_are_written_in_one_order() -> None:
    """Equal sets give equal bytes, however they were built."""
    numbers = [0, 8, 16, 2**70, -1]
    backwards = numbers[::-1]
    assert encode(set(numbers)) == encode(set(backwards))
    assert encode({"x", "y", (1,)}) == encode({(1,), "y", "x"})


def test_arrays_come_back_writable_and_alone() -> None:
    """A restored array can be worked on, and is not the memory of another restored one."""
    original = np.arange(4.0)
    original.setflags(write=False)
    data = encode(original)
    first, second = decode(data), decode(data)
    first += 1
    assert second.tolist() == [0.0, 1.0, 2.0, 3.0]


def test_aliases_come_apart() -> None:
    """One list in two places comes back as two lists, as documented; it is no cycle."""
    shared = [1, (2,)]
    restored = decode(encode({"a": shared, "b": shared}))
    assert restored == {"a": shared, "b": shared}
    assert restored["a"] is not restored["b"]


def test_daylight_saving_zone_is_kept() -> None:
    """A time in a named zone keeps the zone, not just its offset at that moment."""
    if not ZONES:
        missing("zones, because this machine has no time zones")
    moment = dt.datetime(2026, 10, 25, 2, 30, tzinfo=ZONES[0], fold=1)
    restored = decode(encode(moment))
    assert restored.tzinfo is ZONES[0]
    assert restored.utcoffset() == moment.utcoffset()


def random_states() -> dict[str, Any]:
    """The states of generators, used for a while so that they hold cached numbers, too."""
    plain = random.Random(7)
    plain.gauss(0, 1)
    states: dict[str, Any] = {"random": plain.getstate()}
    for kind in (np.random.PCG64, np.random.PCG64DXSM, np.random.MT19937, np.random.Philox, np.random.SFC64):
        generator = np.random.Generator(kind(7))
        generator.standard_normal(3)
        generator.integers(9, dtype=np.int32)
        states[kind.__name__] = generator.bit_generator.state
    legacy = np.random.RandomState(7)
    legacy.standard_normal()
    states["RandomState"] = legacy.get_state()
    states["RandomState dict"] = legacy.get_state(legacy=False)
    return states


@pytest.mark.parametrize(("name", "state"), random_states().items(), ids=random_states().keys())
def test_random_states_round_trip(name: str, state: Any) -> None:
    """The state of every generator of the standard library and of NumPy comes back exactly."""
    check_exact({name: state})


def test_restored_generators_go_on_alike() -> None:
    """A generator that was given a restored state draws the same numbers."""
    one, two = random.Random(1), random.Random(2)
    one.gauss(0, 1)
    two.setstate(decode(encode(one.getstate())))
    assert [one.gauss(0, 1) for _ in range(5)] == [two.gauss(0, 1) for _ in range(5)]
    left, right = np.random.default_rng(1), np.random.default_rng(2)
    left.integers(9, dtype=np.int32)
    right.bit_generator.state = decode(encode(left.bit_generator.state))
    assert left.integers(9, size=5, dtype=np.int32).tolist() == right.integers(9, size=5, dtype=np.int32).tolist()


# --- refusals ----------------------------------------------------------------------------------------------------------------------


class Color(enum.Enum):
    """A plain enum."""

    RED = 1


class Level(enum.IntEnum):
    """An enum that is an int."""

    LOW = 1


class Mode(str, enum.Enum):
    """An enum that is a str."""

    FAST = "fast"


class Name(str):
    """A str that is not just a str."""

    __slots__ = ()


class Rows(list[int]):
    """A list that is not just a list."""


Point = namedtuple("Point", "x y")  # noqa: PYI024 - the plain kind is meant


@dataclass
class Config:
    """A dataclass."""

    rate: float = 0.1


class Plain:
    """Some class of the user."""

    def __repr__(self) -> str:
        """Must not be asked for: it may be slow, or raise."""
        raise AssertionError


def foreign(module: str, name: str) -> Any:
    """An object of a class that says it is from elsewhere."""
    return type(name, (), {"__module__": module})()


def counter_with_attribute() -> Counter[str]:
    """A Counter that carries more than its counts."""
    counts = Counter("ab")
    counts.source = "x"  # type: ignore[attr-defined]
    return counts


REFUSED: dict[str, tuple[object, str, str]] = {
    "enum": (Color.RED, f"{__name__}.Color", ".value"),
    "int enum": (Level.LOW, "Level", ".value"),
    "str enum": (Mode.FAST, "Mode", ".value"),
    "str subclass": (Name("a"), "Name", "str(...)"),
    "list subclass": (Rows(), "Rows", "list(...)"),
    "namedtuple": (Point(1, 2), "Point", "._asdict()"),
    "struct time": (__import__("time").gmtime(0), "struct_time", "tuple(...)"),
    "dataclass": (Config(), "Config", "dataclasses.asdict(...)"),
    "defaultdict": (defaultdict(list), "collections.defaultdict", "dict(...)"),
    "counter with attributes": (counter_with_attribute(), "collections.Counter", "dict(...)"),
    "object ref": (foreign("ray", "ObjectRef"), "ray.ObjectRef", "may be gone when the task resumes. Store the value"),
    "client ref": (foreign("ray.util.client.common", "ClientObjectRef"), "ClientObjectRef", "pass the ref as an argument"),
    "actor handle": (foreign("ray.actor", "ActorHandle"), "ray.actor.ActorHandle", "may be gone when the task resumes"),
    "tensor": (foreign("torch", "Tensor"), "torch.Tensor", "ckpt.track("),
    "data frame": (foreign("pandas.core.frame", "DataFrame"), "DataFrame", "ckpt.track("),
    "random": (random.Random(1), "random.Random", "getstate()"),
    "numpy generator": (np.random.default_rng(1), "Generator", "bit_generator.state"),
    "numpy random state": (np.random.RandomState(1), "RandomState", "get_state()"),
    "generator": ((number for number in "ab"), "generator", "ckpt.batches("),
    "iterator": (iter([1]), "list_iterator", "ckpt.batches("),
    "function": (len, "builtin_function_or_method", "it is code"),
    "lambda": (lambda: 1, "function", "it is code"),
    "class": (Plain, "type", "it is code"),
    "module": (os, "module", "it is code"),
    "lock": (threading.Lock(), "lock", "(get, set)"),
    "object": (Plain(), f"{__name__}.Plain", "keep it out of state"),
    "memoryview": (memoryview(b"a"), "memoryview", "Convert it"),
    "ellipsis": (..., "ellipsis", "Convert it"),
    "path": (PureWindowsPath("./c:b"), "PureWindowsPath", "parts"),
    "zone without a name": (foreign("zoneinfo", "ZoneInfo"), "zoneinfo.ZoneInfo", "Convert it"),
    "array of objects": (np.array([None]), "numpy.ndarray", ".tolist()"),
    "structured array": (np.zeros(2, [("a", "i4")]), "numpy.ndarray", "array of its own"),
    "record": (np.zeros(2, [("a", "i4")])[0], "numpy.void", "array of its own"),
    "long double": (np.zeros(2, np.longdouble), "numpy.ndarray", "differs between machines"),
    "long double scalar": (np.longdouble(1), "numpy.longdouble", "differs between machines"),
    "masked array": (np.ma.masked_array([1], [True]), "MaskedArray", "numpy.asarray"),
    "array subclass": (np.recarray(1, [("a", "i4")]), "recarray", "numpy.asarray"),
    "twin of int64": (np.longlong(1), "numpy.longlong", "int64"),
}
if PureWindowsPath(str(PureWindowsPath("./c:b"))) == PureWindowsPath("./c:b"):
    del REFUSED["path"]  # mended in Python 3.12
if np.dtype("<i8").type is np.longlong or np.longdouble(1).dtype.itemsize == np.dtype("<f8").itemsize:
    del REFUSED["twin of int64"]


@pytest.mark.parametrize(("value", "kind", "advice"), REFUSED.values(), ids=REFUSED.keys())
def test_refusals_name_the_path_the_type_and_the_way_out(value: object, kind: str, advice: str) -> None:
    """What would not come back is refused with where it is, what it is and what to store instead."""
    with pytest.raises(CheckpointNotSerializableError) as caught:
        encode({"opt": [0, 1, 2, value]})
    error = caught.value
    assert error.path == 'state["opt"][3]'
    text = str(error)
    assert text.startswith('state["opt"][3] (')
    assert kind in text.partition(")")[0]
    assert advice in text
    again = pickle.loads(pickle.dumps(error))
    assert (type(again), str(again), again.path) == (type(error), text, error.path)


def test_real_ray_references_are_refused() -> None:
    """Ray's own classes have the module and the names that the codec goes by."""
    ray = pytest.importorskip("ray")
    with pytest.raises(CheckpointNotSerializableError, match="Store the value"):
        encode({"ref": ray.ObjectRef.nil()})


class Zone(dt.tzinfo):
    """A zone of the user's own."""

    def utcoffset(self, _: dt.datetime | None, /) -> dt.timedelta:
        """Some offset."""
        return dt.timedelta(hours=1)

    dst = utcoffset

    def tzname(self, _: dt.datetime | None, /) -> str:
        """Some name."""
        return "X"


PATHS: dict[str, tuple[object, str]] = {
    "root": (Plain(), "state"),
    "key with quotes": ({'a "b"': Plain()}, r'state["a \"b\""]'),
    "other key": ({(1, "x"): Plain()}, "state[(1, 'x')]"),
    "tuple": ((1, (2, Plain())), "state[1][1]"),
    "a key itself": ({"a": {Color.RED: 1}}, 'state["a"]<key>'),
    "inside a key": ({"a": {(1, Color.RED): 1}}, 'state["a"]<key>[1]'),
    "str subclass as a key": ({Name("a"): 1}, "state<key>"),
    "element of a set": ({"a": {Color.RED}}, 'state["a"]<element>'),
    "deque": (deque([Plain()]), "state[0]"),
    "ordered dict": (OrderedDict(a=Plain()), 'state["a"]'),
    "zone": ({"at": dt.datetime(2026, 1, 1, tzinfo=Zone())}, 'state["at"].tzinfo'),
    "long key": ({"k" * 100: Plain()}, f'state["{"k" * 39}…]'),
    "surrogate in a key": ({"\udcff": Plain()}, r'state["\udcff"]'),
    "huge key": ({10**5000: Plain()}, "state[<int>]"),
    "after a good branch": ({"a": [(1,), {"b": {2}}], "c": [Plain()]}, 'state["c"][0]'),
}


@pytest.mark.parametrize(("value", "path"), PATHS.values(), ids=PATHS.keys())
def test_paths(value: object, path: str) -> None:
    """A refusal says where the value is, in the words of the code that reads it."""
    with pytest.raises(CheckpointNotSerializableError) as caught:
        encode(value)
    assert caught.value.path == path


def test_path_starts_as_the_caller_says() -> None:
    """Whoever encodes something else than a state names it."""
    with pytest.raises(CheckpointNotSerializableError, match=r"^return value\[0\] \("):
        encode([Plain()], path="return value")


def test_zone_without_a_name_is_refused() -> None:
    """A zone read from a file cannot be found again."""
    path = next((folder for folder in map(Path, zoneinfo.TZPATH) if (folder / "UTC").exists()), None)
    if path is None:
        missing("zones, because this machine has no time zones")
    with (path / "UTC").open("rb") as file:
        zone = zoneinfo.ZoneInfo.from_file(file)
    with pytest.raises(CheckpointNotSerializableError, match=r"state\.tzinfo .*ZoneInfo\(name\)"):
        encode(dt.time(1, tzinfo=zone))


def nested(depth: int, kind: Any) -> Any:
    """A container within a container, `depth` of them."""
    value: Any = kind([])
    for _ in range(depth - 1):
        value = kind([value])
    return value


NESTS: dict[str, Any] = {
    "list": list,
    "tuple": tuple,
    "deque": deque,
    "frozenset": frozenset,
    "dict": lambda items: {"a": items[0]} if items else {},
    "tagged dict": lambda items: {(1, 2): items[0], "x": complex(math.nan, 0)} if items else {1: np.complex128(complex(0, math.inf))},
    "key": lambda items: {(frozenset(items),): 1}.keys().__iter__().__next__(),
}


@pytest.mark.parametrize("kind", NESTS.values(), ids=NESTS.keys())
def test_nesting_up_to_the_limit(kind: Any) -> None:
    """The documented depth can be used in full, by every container."""
    deepest = MAX_DEPTH // 2 if kind is NESTS["key"] else MAX_DEPTH - (kind is NESTS["tagged dict"])
    data = encode(nested(deepest, kind))
    assert bits(decode(data)) == bits(nested(deepest, kind))
    assert _codec._json_depth(data) <= _codec._MAX_JSON_DEPTH


@pytest.mark.parametrize("kind", NESTS.values(), ids=NESTS.keys())
@pytest.mark.parametrize("depth", [MAX_DEPTH + 1, 400])
def test_deeper_nesting_is_refused(kind: Any, depth: int) -> None:
    """One level more is an error of ours with a path, not a RecursionError."""
    with pytest.raises(CheckpointNotSerializableError, match="over 100 levels deep") as caught:
        encode(nested(depth, kind))
    assert caught.value.path.startswith("state")


def test_cycles_are_refused_at_the_first_return() -> None:
    """A container that contains itself is named where it closes, once round."""
    loop: dict[str, Any] = {"a": [1, {}]}
    loop["a"][1]["b"] = loop["a"]
    with pytest.raises(CheckpointNotSerializableError, match="contains itself") as caught:
        encode(loop)
    assert caught.value.path == 'state["a"][1]["b"]'


def at_the_end_of_the_stack(action: Any, frames_left: int) -> Any:
    """Call with that many frames left."""
    frame, used = sys._getframe(), 0
    while frame is not None:
        frame, used = frame.f_back, used + 1  # type: ignore[assignment]

    def descend(depth: int) -> Any:
        return action() if depth == 0 else descend(depth - 1)

    return descend(sys.getrecursionlimit() - used - frames_left)


def test_a_caller_without_stack_is_told_so() -> None:
    """Deep in a recursion of the user, saving is refused with a clear text, and loading does not call good data damaged."""
    value = nested(MAX_DEPTH, tuple)
    data = encode(value)
    with pytest.raises(CheckpointNotSerializableError, match="stack"):
        at_the_end_of_the_stack(lambda: encode(value), 120)
    with pytest.raises(RecursionError):
        at_the_end_of_the_stack(lambda: decode(data), 60)


def test_what_reads_back_differently_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """The bytes are read back before they count, on both paths: a writer that drops something does not pass."""
    monkeypatch.setattr(_codec, "_to_json", lambda _: b'{"a":1}')
    for value in ({"a": 2}, {"a": (2,)}):
        with pytest.raises(CheckpointNotSerializableError, match="changed while it was read"):
            encode(value)


def test_a_dict_that_grows_meanwhile_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another thread that writes to the state gets an error with advice, not a bare RuntimeError."""
    state: dict[Any, Any] = {1: 1, 2: 2}

    def grow(_: object, value: int) -> int:
        state[len(state) + 1] = 0
        return value

    monkeypatch.setitem(_codec._WRITERS, int, grow)
    with pytest.raises(CheckpointNotSerializableError, match="changed size during iteration"):
        encode(state)


# --- damaged and hostile data ------------------------------------------------------------------------------------------------------

NOT_JSON = [
    b"",
    b"{",
    b"nul",
    b"NaN",
    b"1 2",
    b'"\xff"',
    b'{"\xff":1}',
    b'"\\ud800"',
    b"1e999",
    b"\x80\x04N.",
    b"[" * 100_000,
    b'{"a":' * 5_000,
]

DAMAGED = [
    '{"$fg":"nothing","v":1}',
    '{"$fg":["tuple"],"v":1}',
    '{"$fg":null}',
    '{"$fg":"tuple"}',
    '{"$fg":"tuple","v":[],"more":1}',
    '{"$fg":"tuple","v":"ab"}',
    '{"$fg":"tuple","v":{"a":1}}',
    '{"$fg":"set","v":[[1]]}',
    '{"$fg":"dict","v":[["a"]]}',
    '{"$fg":"dict","v":["ab"]}',
    '{"$fg":"dict","v":[[[],1]]}',
    '{"$fg":"int","v":12}',
    '{"$fg":"int","v":"twelve"}',
    '{"$fg":"float","v":"1_0"}',
    '{"$fg":"float","v":"0x00"}',
    '{"$fg":"str","v":"*"}',
    '{"$fg":"bytes","v":"A"}',
    '{"$fg":"bytes","v":3}',
    '{"$fg":"complex","v":[1.0]}',
    '{"$fg":"complex","v":["1",2.0]}',
    '{"$fg":"deque","v":[],"maxlen":"x"}',
    '{"$fg":"datetime","v":"yesterday"}',
    '{"$fg":"datetime","v":"2026-01-01","tz":"UTC"}',
    '{"$fg":"time","v":"01:00","fold":7}',
    '{"$fg":"date","v":20260101}',
    '{"$fg":"timedelta","v":[1,2]}',
    '{"$fg":"timedelta","v":[99999999999,0,0]}',
    '{"$fg":"timezone","v":[5,0,0]}',
    '{"$fg":"ZoneInfo","v":"../../etc/passwd"}',
    '{"$fg":"ZoneInfo","v":"os.path/x"}',
    '{"$fg":"UUID","v":"1"}',
    '{"$fg":"UUID","v":"00000000-0000-0000-0000-0000000000ff","safe":9}',
    '{"$fg":"Decimal","v":"ten"}',
    '{"$fg":"Fraction","v":[1,0]}',
    '{"$fg":"Fraction","v":[1.5,2]}',
    '{"$fg":"PosixPath","v":["a"]}',
    '{"$fg":"range","v":[1,2,0]}',
    '{"$fg":"np.array","v":"","dtype":"|O","shape":[0]}',
    '{"$fg":"np.array","v":"AAAAAAAAAAA=","dtype":"|O8","shape":[1]}',
    '{"$fg":"np.array","v":"AAAA","dtype":"<f8","shape":[1]}',
    '{"$fg":"np.array","v":"AAAA","dtype":"|u1","shape":[2]}',
    '{"$fg":"np.array","v":"AA==","dtype":"|u1","shape":[-1,-1]}',
    '{"$fg":"np.array","v":"AA==","dtype":"|u1","shape":["1"]}',
    '{"$fg":"np.array","v":"","dtype":"<i8,<i8","shape":[0]}',
    '{"$fg":"np.array","v":"","dtype":"<f3","shape":[0]}',
    '{"$fg":"np.array","v":"","dtype":"<f8","shape":[0,4611686018427387904,4611686018427387904]}',
    '{"$fg":"np.scalar","v":[1],"dtype":"<f8"}',
    '{"$fg":"np.scalar","v":{"$fg":"bytes","v":"AA=="},"dtype":"<f8"}',
    '{"$fg":"np.scalar","v":{"$fg":"bytes","v":"AAAAAAAAAAAAAAAAAAAAAA=="},"dtype":"<f8"}',
    '{"$fg":"np.str_","v":1}',
]


@pytest.mark.parametrize("data", NOT_JSON, ids=[repr(data[:12]) for data in NOT_JSON])
def test_what_is_not_json_is_corrupt(data: bytes) -> None:
    """Bytes that are not JSON, or nested without end, are one error of ours."""
    with pytest.raises(CheckpointCorruptError, match=f"a record of {len(data)} bytes"):
        decode(data)


@pytest.mark.parametrize("text", DAMAGED)
def test_unknown_and_damaged_tags_are_corrupt(text: str) -> None:
    """A tag that we do not write, or with fields that we do not write, is one error of ours, however deep it lies."""
    for record in (text, f'{{"a":[{text}]}}', f'{{"$fg":"tuple","v":[{text}]}}'):
        with pytest.raises(CheckpointCorruptError, match=r"^a record has a"):
            decode(record.encode())


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=30) | values.map(encode), st.data())
def test_any_damage_is_our_error_or_a_value(data: bytes, draw: st.DataObject) -> None:
    """Whatever the bytes are, decoding gives a value or an error of ours, and nothing else."""
    damaged = bytearray(data)
    for _ in range(draw.draw(st.integers(0, 3)) if damaged else 0):
        damaged[draw.draw(st.integers(0, len(damaged) - 1))] = draw.draw(st.integers(0, 255))
    with contextlib.suppress(CheckpointCorruptError, UsageError):
        decode(bytes(damaged))


class Bomb:
    """Executes a command when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        """What a pickle does on loading."""
        return os.system, (f"touch {self.marker}",)


BARE = f"""
import sys, types
package = types.ModuleType("faultguard")  # the codec alone, without Ray and the rest of the package
package.__path__ = [{str(ROOT / "faultguard")!r}]
sys.modules["faultguard"] = package
"""

WATCHED_DECODE = """
import json
import numpy
from faultguard._codec import decode
from faultguard.errors import CheckpointCorruptError
records = json.load(sys.stdin)
for warm in ('1', '[', '{"$fg":"x"}', '{"$fg":"np.array","v":"","dtype":"<f8","shape":[0]}'):
    try:
        decode(warm.encode())
    except CheckpointCorruptError:
        pass
seen, results = [], []
sys.addaudithook(lambda event, args: seen.append(event))
for record in records:
    try:
        decode(record.encode("latin-1"))
        results.append("value")
    except CheckpointCorruptError:
        results.append("corrupt")
    except BaseException as error:
        results.append(repr(error))
events = sorted(set(seen))
print(json.dumps([results, events]))
"""


def test_a_planted_pickle_is_refused_and_nothing_runs(tmp_path: Path) -> None:
    """Pickles and the tags of unsafe libraries are damage or plain data: nothing is imported, opened, compiled or started."""
    marker = tmp_path / "executed"
    bomb = pickle.dumps(Bomb(marker))
    text = base64.b64encode(bomb).decode()
    command = f"touch {marker}"
    array = json.dumps({"$fg": "np.array", "v": text, "dtype": "|O", "shape": [1]})
    corrupt = [
        bomb.decode("latin-1"),
        json.dumps({"$fg": "pickle", "v": text}),
        json.dumps({"$fg": "os.system", "v": [command]}),
        json.dumps({"$fg": "__reduce__", "v": ["os.system", [command]]}),
        json.dumps({"$fg": "PosixPath", "v": {"$fg": "py/reduce", "v": [{"py/function": "os.system"}, [command]]}}),
        json.dumps({"$fg": "ZoneInfo", "v": "antigravity.this/x"}),
        json.dumps({"$fg": "_numpy", "v": 1}),
        array,
        *DAMAGED,
    ]
    plain = [json.dumps({"py/reduce": [{"py/function": "os.system"}, {"py/tuple": [command]}]}), json.dumps({"__class__": "os.system"})]
    result = subprocess.run(
        [sys.executable, "-c", BARE + WATCHED_DECODE],
        input=json.dumps(corrupt + plain),
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    outcomes, events = json.loads(result.stdout)
    assert outcomes == ["corrupt"] * len(corrupt) + ["value"] * len(plain)
    assert not marker.exists()
    assert not {event for event in events if re.match(r"import|exec|compile|open|os\.|subprocess|pickle|marshal|ctypes|socket", event)}


def test_numpy_is_imported_only_for_arrays() -> None:
    """Neither the module, nor a state without arrays, nor reading one costs the import of NumPy."""
    code = (
        "from faultguard._codec import decode, encode, fingerprint\n"
        "decode(encode({'a': (1, {2}, b'3')})); fingerprint((1, 2)); fingerprint([])\n"
        "assert 'numpy' not in sys.modules; import numpy\n"
        "assert decode(encode(numpy.arange(3))).sum() == 3\n"
    )
    subprocess.run([sys.executable, "-c", BARE + code], check=True, timeout=60)


def test_a_machine_that_lacks_something_does_not_call_the_record_damaged(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without NumPy or a time zone the record stays good, and the error says what to install."""
    data = encode({"a": np.arange(3)})
    with pytest.raises(UsageError, match=r"'Mars/Olympus_Mons'.*tzdata"):
        decode(b'{"$fg":"ZoneInfo","v":"Mars/Olympus_Mons"}')
    monkeypatch.setitem(sys.modules, "numpy", None)
    with pytest.raises(UsageError, match="NumPy cannot be imported here"):
        decode(data)


# --- fingerprints ------------------------------------------------------------------------------------------------------------------


class Unnamed(type):
    """A metaclass whose classes refuse to be named."""

    @property
    def __module__(cls) -> str:  # type: ignore[override]
        """Raise, as a lazy proxy without its target does."""
        raise LookupError


class Sized:
    """Counts how often it is asked for anything."""

    def __len__(self) -> int:
        """Must not be asked for."""
        raise AssertionError

    __iter__ = __bool__ = __hash__ = __eq__ = __repr__ = __len__  # type: ignore[assignment]


FINGERPRINTED: dict[str, tuple[object, str]] = {
    "list": ([1, 2], "t:list:2"),
    "dict": ({"a": 1}, "t:dict:1"),
    "set": ({1}, "t:set:1"),
    "bytearray": (bytearray(b"abc"), "t:bytearray:3"),
    "array": (np.zeros((3, 4)), "t:numpy.ndarray:3x4"),
    "0-d array": (np.array(1), "t:numpy.ndarray:"),
    "tuple with a list": ((1, [2]), "t:tuple:2"),
    "long text": ("a" * FINGERPRINT_LIMIT, f"t:str:{FINGERPRINT_LIMIT}"),
    "long bytes": (bytes(10**6), "t:bytes:1000000"),
    "many in a tuple": (tuple(range(10**5)), "t:tuple:100000"),
    "deep tuple": (nested(MAX_DEPTH + 1, tuple), "t:tuple:1"),
    "huge int": (10**20_000, "t:int"),
    "str subclass": (Name("a"), f"t:{__name__}.Name"),
    "enum": (Color.RED, f"t:{__name__}.Color"),
    "record": (np.zeros(1, [("a", "i4")])[0], "t:numpy.void"),
    "object": (Sized(), f"t:{__name__}.Sized"),
    "no name": (Unnamed("Lazy", (), {})(), "t:?"),
}


@pytest.mark.parametrize(("value", "expected"), FINGERPRINTED.values(), ids=FINGERPRINTED.keys())
def test_fingerprint_of_what_is_not_plain(value: object, expected: str) -> None:
    """Everything mutable, long or unknown gives its type, and its length only if asking is harmless."""
    assert fingerprint(value) == expected


def test_fingerprint_tells_types_and_values_apart() -> None:
    """Values that compare equal, or print alike, are different batches."""
    different = [
        None,
        True,
        1,
        1.0,
        -1.0,
        0.0,
        -0.0,
        "1",
        b"1",
        (1,),
        (1.0,),
        frozenset({1}),
        np.int64(1),
        np.float64(1),
        Decimal(1),
        math.nan,
    ]
    assert len({fingerprint(value) for value in different}) == len(different)
    assert all(fingerprint(value).startswith("v:") for value in different)


FINGERPRINT_SCRIPT = """
import datetime, pathlib, uuid, decimal, json
import numpy as np
from faultguard._codec import fingerprint
words = ["alpha", "beta", "gamma", "delta", "epsilon", ("zeta", 1), frozenset({"eta", "theta", ("iota",)}), 1.5, None, b"x"]
batches = [
    frozenset(words), frozenset({"a", "b", "c", "d"}), frozenset({1.5, 1e16, 1e-7}), ("part", 7, 1e22), "part-07.parquet", 7, b"key",
    datetime.datetime(2026, 7, 4, tzinfo=datetime.timezone.utc), uuid.UUID(int=9), decimal.Decimal("1.10"), pathlib.PurePosixPath("a/b"),
    np.int64(7), np.str_("x"), range(3), "\\udcff", 2**90,
]
print(json.dumps([fingerprint(batch) for batch in batches]))
"""


def test_fingerprints_are_the_same_in_every_process() -> None:
    """Neither hash randomisation nor the version of a library changes a fingerprint: it is compared across processes and upgrades."""
    outputs = {
        subprocess.run(
            [sys.executable, "-c", BARE + FINGERPRINT_SCRIPT],
            capture_output=True,
            text=True,
            check=True,
            timeout=60,
            env={**os.environ, "PYTHONHASHSEED": seed},
        ).stdout
        for seed in ("0", "1", "2", "4294967295")
    }
    assert len(outputs) == 1
    assert json.loads(outputs.pop()) == EXPECTED_FINGERPRINTS


EXPECTED_FINGERPRINTS = [
    "v:81447cba2ecbfba7",
    "v:f040170c4e882c0d",
    "v:ccbd19a00e1d0d15",
    "v:7111f5731e02a23d",
    "v:630f946f322bc137",
    "v:7902699be42c8a8e",
    "v:cfc97c610dc66efb",
    "v:d850b6d87b172644",
    "v:dd1ca00a9ceab526",
    "v:51db0dff1c8a7b94",
    "v:8f3df369ce6c44db",
    "v:b14752933298f432",
    "v:b2b6523b0b925c58",
    "v:1931895d8d5c7b91",
    "v:61ca6ecc7ff0bb9c",
    "v:63917e176e9b3609",
]


# --- documentation -----------------------------------------------------------------------------------------------------------------


def documented() -> list[tuple[str, str, str]]:
    """The rows of the table in docs/format.md: tag, expression, JSON."""
    section = (ROOT / "docs" / "format.md").read_text(encoding="utf-8").split("\n## Values\n")[1].split("\n## ")[0]
    return re.findall(r"^\| `([^`]+)`[^|]*\| (?:`([^`]+)`)? ?\| (?:`([^`]+)`)? ?\|$", section, re.MULTILINE)


@pytest.mark.parametrize(
    ("expression", "text"), [row[1:] for row in documented() if row[1]], ids=[row[0] for row in documented() if row[1]]
)
def test_documented_examples(expression: str, text: str) -> None:
    """Every example of the format's documentation is what is written, and is read again."""
    names = {**vars(_codec), **vars(dt), "UUID": uuid.UUID, "np": np}
    value = eval(expression, names)  # noqa: S307 - our own documentation
    assert encode(value).decode() == text
    assert bits(decode(text.encode())) == bits(value)


def test_every_tag_is_documented() -> None:
    """The documentation lists exactly the tags that are read."""
    assert [tag for tag, _, _ in documented()] == list(_codec._READERS)


def test_examples_in_docstrings() -> None:
    """The examples in the docstrings of the module are true."""
    result = doctest.testmod(_codec)
    assert result.attempted > 0
    assert result.failed == 0
