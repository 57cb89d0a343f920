"""Arguments as first passed: every attempt gets its own."""

from __future__ import annotations

import enum
import functools
import threading
from collections import Counter, OrderedDict
from collections.abc import Generator
from typing import Any

import numpy as np
import pytest

from faultguard import _ray
from faultguard._packing import MAX_BYTES, digests, pack, unpack


class Reference:
    """What Ray must see, in these tests."""


def packed(*args: Any, **kwargs: Any) -> bytes:
    """Arguments that can be packed, packed."""
    data = pack(args, kwargs)
    assert data is not None
    return data


def test_arguments_come_back() -> None:
    """Positional and keyword arguments keep their places and values."""
    assert unpack(packed(1, "a", [2.5], last={"k": (None, b"x")})) == ((1, "a", [2.5]), {"last": {"k": (None, b"x")}})
    assert unpack(packed()) == ((), {})


def test_every_attempt_gets_a_fresh_copy() -> None:
    """What one attempt does to its arguments, the next one does not see; nor does the caller."""
    original = [1, 2]
    data = packed(original, options={"seen": original})
    (first,), keywords = unpack(data)
    assert keywords["options"]["seen"] is first  # what was one object stays one
    first.append(3)
    assert unpack(data) == (([1, 2],), {"options": {"seen": [1, 2]}})
    assert original == [1, 2]


def test_the_caller_may_go_on_changing() -> None:
    """Packed are the arguments at the time of `.remote()`."""
    original = {"n": 1}
    data = packed(original)
    original["n"] = 2
    assert unpack(data) == (({"n": 1},), {})


def test_functions_travel_by_value() -> None:
    """Lambdas, closures, partials and classes of a function arrive, each attempt with cells of its own."""
    count = [0]

    def step() -> int:
        count[0] += 1
        return count[0]

    class Local:
        size = 3

    data = packed(step, lambda n: n + 1, functools.partial(max, 5), Local())
    for _ in range(2):
        (again, plus_one, at_least_five, local), _keywords = unpack(data)
        assert (again(), again(), plus_one(1), at_least_five(2), local.size) == (1, 2, 2, 5, 3)
    assert count == [0]


MANY = [bytes([n % 256]) * 1000 + str(n).encode() for n in range(1100)]
OVER = [bytes(MAX_BYTES), bytearray(MAX_BYTES), "x" * MAX_BYTES, np.zeros(MAX_BYTES, np.uint8), np.zeros((600, 600)).T, MANY]


@pytest.mark.parametrize("value", OVER, ids=["bytes", "bytearray", "str", "array", "transposed", "many small"])
def test_what_is_over_the_limit_stays_with_ray(value: object) -> None:
    """More than 1 MiB would be copied for every attempt: None says that Ray gets it as it is."""
    assert pack((value,), {}) is None
    assert pack((), {"value": value}) is None


@pytest.mark.parametrize("size", [10, 70_000, 500_000])
@pytest.mark.parametrize("make", [bytes, bytearray, lambda n: "x" * n], ids=["bytes", "bytearray", "str"])
def test_what_is_below_the_limit_is_packed(make: Any, size: int) -> None:
    """Half a megabyte comes back, whatever way pickle writes it."""
    assert unpack(packed(make(size))) == ((make(size),), {})


@pytest.mark.parametrize("shape", [(3,), (100, 100), (250, 250)])
@pytest.mark.parametrize("order", ["C", "F"])
def test_arrays_below_the_limit_are_packed(shape: tuple[int, ...], order: Any) -> None:
    """Arrays, which pickle writes as buffers, come back as writable copies."""
    array = np.arange(np.prod(shape), dtype=np.float64).reshape(shape, order=order)
    data = packed(array)
    (found,), _ = unpack(data)
    assert np.array_equal(found, array)
    found[0] = -1
    assert np.array_equal(unpack(data)[0][0], array)


@pytest.mark.parametrize("value", [Reference(), [Reference()], {"deep": ({"er": Reference()},)}], ids=["bare", "in a list", "deep"])
def test_references_stay_with_ray(monkeypatch: pytest.MonkeyPatch, value: object) -> None:
    """A reference inside bytes would be invisible to Ray, which then frees the object: such arguments are not packed."""
    monkeypatch.setattr(_ray, "is_ref", lambda candidate: isinstance(candidate, Reference))
    assert pack((value,), {}) is None
    assert pack((), {"value": value}) is None


def test_what_cannot_be_pickled_is_left_to_ray() -> None:
    """Ray may know a serialiser for it; if not, Ray says so at `.remote()`."""
    assert pack((threading.Lock(),), {}) is None


def digest(value: object) -> str:
    """What goes on record of one argument; empty: nothing."""
    return digests({"value": value}, small=pack((value,), {}) is not None).get("value", "")


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ({"a": 1, "b": [2]}, {"b": [2], "a": 1}),
        ([{"a": {"x": 1, "y": 2}}], [{"a": {"y": 2, "x": 1}}]),
        (Counter(a=1, b=2), Counter(b=2, a=1)),
        (OrderedDict(a={"x": 1, "y": 2}), OrderedDict(a={"y": 2, "x": 1})),
        ({1, "a", None}, {None, "a", 1}),
        (float("nan"), float("nan")),
        ([float("nan")], [float("nan")]),
        (np.arange(3), np.arange(3)),
        (np.asfortranarray(np.ones((2, 3))), np.ones((2, 3))),
    ],
)
def test_equal_arguments_have_one_digest(one: object, other: object) -> None:
    """However they were built, or a run that goes on would refuse its own work."""
    assert digest(one)
    assert digest(one) == digest(other)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (1, True),
        (1, 1.0),
        ([1], (1,)),
        ("1", 1),
        (None, "None"),
        (OrderedDict(a=1, b=2), OrderedDict(b=2, a=1)),
        (np.arange(3), np.arange(3.0)),
        ([np.zeros(4)], [np.zeros((2, 2))]),
    ],
)
def test_other_arguments_have_another_digest(one: object, other: object) -> None:
    """Types and shapes included."""
    assert digest(one)
    assert digest(one) != digest(other)


class Strange(list[int]):
    """Can neither be measured nor compared."""

    __hash__ = None

    def __len__(self) -> int:
        raise RuntimeError("len")

    def __eq__(self, other: object) -> bool:
        raise RuntimeError("eq")

    def __iter__(self) -> Any:
        raise RuntimeError("iter")


class Color(enum.Enum):
    """Of an enumeration."""

    RED = "red"


def shared(levels: int) -> list[Any]:
    """Two to the power of `levels` lists, packed into a few bytes."""
    value: list[Any] = [1]
    for _ in range(levels):
        value = [value, value]
    return value


def with_itself() -> list[Any]:
    """A list that holds itself, twice."""
    value: list[Any] = []
    value += [value, value]
    return value


@pytest.mark.parametrize(
    "value",
    [Strange(), [Strange()], Color.RED, object(), lambda: 1, (n for n in range(3)), open, shared(50), with_itself()],
    ids=["strange", "in a list", "enum", "object", "function", "generator", "builtin", "shared", "with itself"],
)
def test_what_is_not_plain_is_not_compared(value: object) -> None:
    """And does no harm: it is neither measured, compared, used up, nor gone through for ever."""
    assert digest(value) == ""
    if isinstance(value, Generator):
        assert next(value) == 0


def test_what_is_large_is_compared_only_where_that_is_quick() -> None:
    """Of arguments that were not packed, the short and immutable ones."""
    found = digests({"a": 1, "b": [1], "c": "x" * 5000}, small=False)
    assert set(found) == {"a"}
