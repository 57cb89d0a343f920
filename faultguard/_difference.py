"""The first difference between two values, and where in them it is."""

from __future__ import annotations

import copy
import sys
from collections import deque
from collections.abc import Mapping
from typing import Any

__all__ = ["difference", "frozen_copy", "short"]

_SCALARS = frozenset({int, str, float, bool, bytes, type(None)})
_SEQUENCES = (list, tuple, deque)
MAX_SHOWN = 100  # characters of a value in a text

Difference = tuple[str, str]  # the path, and what is there


def difference(expected: Any, found: Any, path: str = "result") -> Difference | None:
    """Compare two values part by part: types exactly, arrays element by element, NaN equal to NaN.

    >>> difference({"rows": [1, 2]}, {"rows": [1, 3]})
    ("result['rows'][1]", 'is 3 instead of 2')
    """
    there = _Comparison().of(expected, found)
    return (path + there[0], there[1]) if there is not None else None


def frozen_copy(value: Any) -> Any:
    """A copy that later runs do not change; the value itself where it cannot be copied."""
    try:
        return copy.deepcopy(value)
    except Exception:  # noqa: BLE001 - a lock, a file, a class that refuses: then it is compared as it is
        return value


def short(value: Any) -> str:
    """A value in one line."""
    try:
        text = " ".join(repr(value).split())
    except Exception:  # noqa: BLE001 - a type may refuse to be printed
        text = f"<{type(value).__name__}>"
    return text if len(text) <= MAX_SHOWN else f"{text[: MAX_SHOWN - 3]}..."


class _Comparison:
    """One walk through two values side by side. The paths are made on the way back from a difference: mostly there is none."""

    def __init__(self) -> None:
        self._met: set[tuple[int, int]] = set()

    def of(self, expected: Any, found: Any) -> Difference | None:
        """The first difference."""
        kind = type(expected)
        if kind is not type(found):
            return "", f"is {short(found)} ({type(found).__name__}) instead of {short(expected)} ({kind.__name__})"
        if kind in _SCALARS and expected == found:
            return None
        if (id(expected), id(found)) in self._met:  # a value that contains itself, or one that is shared
            return None
        self._met.add((id(expected), id(found)))
        numpy = sys.modules.get("numpy")
        if numpy is not None and isinstance(expected, numpy.ndarray):
            return self._arrays(numpy, expected, found)
        if isinstance(expected, Mapping):
            return self._mappings(expected, found)
        return self._sequences(expected, found) if isinstance(expected, _SEQUENCES) else self._objects(expected, found)

    def _below(self, step: object, expected: Any, found: Any) -> Difference | None:
        inside = self.of(expected, found)
        return (f"[{short(step)}]{inside[0]}", inside[1]) if inside is not None else None

    def _objects(self, expected: Any, found: Any) -> Difference | None:
        if _are_equal(expected, found):
            return None
        compares: Any = type(expected).__eq__
        if compares is object.__eq__:  # no two of them are ever equal, so their attributes are compared
            return self.of(vars(expected), vars(found)) if hasattr(expected, "__dict__") else None
        return "", f"is {short(found)} instead of {short(expected)}"

    def _mappings(self, expected: Mapping[Any, Any], found: Mapping[Any, Any]) -> Difference | None:
        for key in expected:
            if key not in found:
                return "", f"has no {short(key)}, and should"
            if (inside := self._below(key, expected[key], found[key])) is not None:
                return inside
        more = next((key for key in found if key not in expected), None) if len(found) > len(expected) else None
        return ("", f"has {short(more)}, and should not") if len(found) > len(expected) else None

    def _sequences(self, expected: Any, found: Any) -> Difference | None:
        if len(expected) != len(found):
            return "", f"has {len(found)} items instead of {len(expected)}: {short(found)} instead of {short(expected)}"
        pairs = enumerate(zip(expected, found, strict=True))
        inside = (self._below(index, one, other) for index, (one, other) in pairs)
        return next((there for there in inside if there is not None), None)

    def _arrays(self, numpy: Any, expected: Any, found: Any) -> Difference | None:
        if (expected.dtype, expected.shape) != (found.dtype, found.shape):
            return "", f"is {found.dtype}{list(found.shape)} instead of {expected.dtype}{list(expected.shape)}"
        if expected.dtype == object:
            return self.of(expected.tolist(), found.tolist())
        differs = (expected != found) & ~((expected != expected) & (found != found))  # noqa: PLR0124 - NaN, NaT
        if not numpy.any(differs):
            return None
        first = tuple(int(index) for index in numpy.argwhere(differs)[0]) if expected.shape else ()
        return f"[{', '.join(map(str, first))}]" if first else "", f"is {short(found[first])} instead of {short(expected[first])}"


def _are_equal(expected: Any, found: Any) -> bool:
    for method in ("equals", "equal"):  # data frames of pandas and polars, tensors of torch
        if hasattr(expected, "shape") and callable(getattr(expected, method, None)):
            return bool(getattr(expected, method)(found))
    try:
        return bool(expected == found) or bool(expected != expected and found != found)  # noqa: PLR0124 - NaN
    except Exception:  # noqa: BLE001 - a type may refuse
        return short(expected) == short(found)
