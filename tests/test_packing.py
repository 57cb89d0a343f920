"""Arguments as first passed: every attempt gets its own."""

from __future__ import annotations

import functools
import threading
from typing import Any

import numpy as np
import pytest

from faultguard import _ray
from faultguard._packing import MAX_BYTES, pack, unpack


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
