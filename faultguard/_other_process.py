"""A task that goes on in a new process with another hash seed.

What depends on the order of a set, or on what this process holds, shows there.
"""

from __future__ import annotations

import dis
import json
import os
import subprocess
import sys
import sysconfig
import types
from typing import TYPE_CHECKING, Any

import msgspec
from ray import cloudpickle

from faultguard._core.records import Snapshot

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from faultguard._rehearsal import World

__all__ = ["Answer", "OtherProcess", "answer", "mentions_sets", "packed"]

WAIT_S = 120.0  # for the new process, beyond the work
_NAMES = {"set", "frozenset", "hash", "intersection", "union", "symmetric_difference"}
_CODES = {"BUILD_SET", "SET_ADD", "SET_UPDATE"}
_MAX_FUNCTIONS = 500
_MAX_VALUES = 10_000
_START = "import json, sys; sys.path[:] = json.loads(sys.argv[1]); from faultguard._other_process import answer; answer()"

Answer = tuple[bool, Any]  # whether it ended with a value, and that, or the exception


class OtherProcess:
    """A Python process that waits for work: started early, as it takes a while to import everything."""

    def __init__(self) -> None:
        seed = "1" if os.environ.get("PYTHONHASHSEED") != "1" else "2"
        command = [sys.executable, "-c", _START, json.dumps([path for path in sys.path if isinstance(path, str)])]
        self._process = subprocess.Popen(  # noqa: S603 - ourselves
            command, env={**os.environ, "PYTHONHASHSEED": seed}, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )

    def resume(self, function: Any, arguments: bytes, worlds: list[World], within_s: float) -> list[Answer] | str:
        """How the attempts end that go on from `worlds` there; in words, why that could not be seen."""
        saved = [[(key, msgspec.json.encode(snapshot)) for key, snapshot in world.items()] for world in worlds]
        try:
            work = packed((function, arguments, saved))
            out, err = self._process.communicate(work, timeout=WAIT_S + within_s)
        except subprocess.TimeoutExpired:
            return f"the other process was not done after {WAIT_S + within_s:.0f} s"
        except Exception as error:  # noqa: BLE001 - what cannot be pickled
            return f"{type(error).__name__}: {error}"
        if self._process.returncode:
            return (err.decode(errors="replace").strip().splitlines() or ["it died"])[-1]
        answers: list[Answer] = cloudpickle.loads(out)
        return answers

    def close(self) -> None:
        """End it."""
        self._process.kill()
        self._process.communicate()


def packed(value: object) -> bytes:
    """A value pickled as Ray does it, functions included."""
    data: bytes = cloudpickle.dumps(value)  # type: ignore[no-untyped-call] # as cloudpickle is
    return data


def answer() -> None:
    """What the new process does."""
    from faultguard._rehearsal import Attempt
    from faultguard.testing import Rehearsal

    out = os.dup(1)
    os.dup2(2, 1)  # what the task prints is not the answer
    function, arguments, saved = cloudpickle.loads(sys.stdin.buffer.read())
    rehearsal = Rehearsal(function, arguments)
    answers: list[Answer] = []
    for world in saved:
        attempt = Attempt({key: msgspec.json.decode(data, type=Snapshot) for key, data in world}, number=2)
        ended = rehearsal.run(attempt)
        answers.append((ended.error is None, ended.value if ended.error is None else ended.error))
    with open(out, "wb") as file:  # noqa: PTH123 - a file descriptor
        file.write(packed(answers))


def mentions_sets(function: Any, arguments: Any) -> bool:
    """Whether a set, or a hash, can have a part in this: in the arguments, or in the code that is reached from the function."""
    return _holds_set(arguments) or any(map(_makes_set, _codes(function)))


def _holds_set(value: Any) -> bool:
    stack, count = [value], 0
    while stack and count < _MAX_VALUES:
        item = stack.pop()
        count += 1
        if isinstance(item, (set, frozenset)):
            return True
        if isinstance(item, dict):
            stack += [*item.keys(), *item.values()]
        elif isinstance(item, (list, tuple)):
            stack += item
    return False


def _makes_set(code: types.CodeType) -> bool:
    return bool(_NAMES & set(code.co_names)) or any(step.opname in _CODES for step in dis.get_instructions(code))


def _codes(function: Any) -> Iterator[types.CodeType]:
    """The code of a function, and of those of the same project that it names."""
    met: set[types.CodeType] = set()
    waiting = [function]
    while waiting and len(met) < _MAX_FUNCTIONS:
        found = _plain(waiting.pop())
        if isinstance(found, type):
            waiting += list(vars(found).values())
        if not isinstance(found, types.FunctionType) or found.__code__ in met or _is_installed(found.__code__.co_filename):
            continue
        met.add(found.__code__)
        for code in _inside(found.__code__):
            yield code
            waiting += _named(code.co_names, found.__globals__)
        waiting += [cell.cell_contents for cell in found.__closure__ or () if _is_filled(cell)]


def _plain(value: Any) -> Any:
    """The function under decorators."""
    for _ in range(10):
        inner = getattr(value, "__wrapped__", None) or getattr(value, "_function", None) or getattr(value, "__func__", None)
        if inner is None:
            break
        value = inner
    return value


def _inside(code: types.CodeType) -> Iterator[types.CodeType]:
    yield code
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _inside(constant)


def _named(names: Iterable[str], namespace: dict[str, Any]) -> list[Any]:
    """The functions and classes that code with these names may use."""
    found = []
    for name in names:
        value = namespace.get(name)
        if isinstance(value, types.ModuleType):
            found += [vars(value).get(other) for other in names if not _is_installed(getattr(value, "__file__", None) or "")]
        elif value is not None:
            found.append(value)
    return [value for value in found if callable(value)]


def _is_filled(cell: types.CellType) -> bool:
    try:
        return callable(cell.cell_contents)
    except ValueError:
        return False


def _is_installed(file: str) -> bool:
    """Whether a file is of Python or of an installed package."""
    paths = sysconfig.get_paths()
    return not file or any(file.startswith(paths[name]) for name in ("stdlib", "platstdlib", "purelib", "platlib")) or _is_ours(file)


def _is_ours(file: str) -> bool:
    return file.startswith(os.path.dirname(os.path.abspath(__file__)) + os.sep)  # noqa: PTH100, PTH120 - texts are compared
