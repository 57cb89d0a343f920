"""Known ways to write a loop that does not resume right, found in its source, each with what to write instead.

Asked only when a task was seen to resume wrong: these are guesses at why, not rules.
"""

from __future__ import annotations

import ast
import collections
import dis
import inspect
import itertools
import os
import textwrap
from types import CodeType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

__all__ = ["footguns", "swallowers"]

_AHEAD = {"list", "tuple", "sorted", "set", "dict", "frozenset", "sum", "max", "min"}
_BESIDE = {"enumerate", "zip"}
_GENERATORS = {"default_rng", "Random", "RandomState", "manual_seed", "seed", "PRNGKey", "Generator", "SystemRandom"}
_SHUFFLES = {"shuffle", "sample", "permutation", "permuted", "choices", "randperm"}
_MUTATORS = {"append", "extend", "insert", "pop", "remove", "clear", "sort", "reverse", "add", "discard", "update", "setdefault", "popitem"}
_MUTATORS |= {"appendleft", "popleft", "write", "put", "popright", "extendleft", "subtract"}
_CONTAINERS = (list, dict, set, bytearray, collections.deque)  # whose methods of these names are known to change them
_CHANGED_IN_PLACE = (ast.List, ast.Dict, ast.Set, ast.ListComp, ast.DictComp, ast.SetComp, ast.Call)
_LOOPS = (ast.For, ast.AsyncFor, ast.While)


def footguns(codes: Iterable[CodeType], *, input_changed: bool = False) -> list[str]:
    """What of these functions is known to be lost on resume, or done twice; the likeliest first."""
    found = [text for code in codes for text in _Function.read(code, input_changed=input_changed)]
    return list(dict.fromkeys(found))


def swallowers(codes: Iterable[CodeType]) -> list[str]:
    """The `except` clauses of these functions that hold back what interrupts a batch."""
    return list(dict.fromkeys(text for code in codes for text in _Function.swallowing(code)))


class _Function:
    """The source of one function."""

    def __init__(self, code: CodeType) -> None:
        lines, first = inspect.getsourcelines(code)
        source = textwrap.dedent("".join(lines))
        self.file = os.path.basename(code.co_filename)  # noqa: PTH119 - a label
        self.tree = ast.parse(source)
        ast.increment_lineno(self.tree, max(first, 1) - 1)
        self.definition = next((node for node in ast.walk(self.tree) if isinstance(node, (ast.FunctionDef, ast.Lambda))), self.tree)
        self.loops = [node for node in ast.walk(self.tree) if isinstance(node, _LOOPS) and _is_checkpointed(node)]
        arguments = self.definition.args if isinstance(self.definition, (ast.FunctionDef, ast.Lambda)) else None
        self.parameters = {a.arg for a in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs)} if arguments else set()
        self.aliases = {
            target.id
            for node in ast.walk(self.tree)
            if isinstance(node, ast.Assign) and isinstance(node.value, ast.Attribute) and node.value.attr == "state"
            for target in node.targets
            if isinstance(target, ast.Name)
        }
        module = inspect.getmodule(code)
        held = vars(module) if module else {}
        self.of_module = {name: type(held[name]) for name in _global_names(code) if name in held}

    @classmethod
    def of(cls, code: CodeType) -> _Function | None:
        try:
            return cls(code)
        except (OSError, TypeError, SyntaxError, ValueError):  # no source, or only a piece of it
            return None

    @classmethod
    def read(cls, code: CodeType, *, input_changed: bool) -> list[str]:
        """The footguns of one function."""
        function = cls.of(code)
        if function is None:
            return []
        order = [
            function.ahead,
            function.beside,
            function.assigned,
            function.outer,
            function.arguments,
            function.locals,
            function.copies,
            function.globals,
        ]
        random = [function.shuffled, function.sets, function.generators]
        order = [*random[:2], *order, *random[2:]] if input_changed else [*order, *random[::-1]]
        return list(itertools.chain.from_iterable(look() for look in order))

    @classmethod
    def swallowing(cls, code: CodeType) -> list[str]:
        """The clauses of one function that swallow."""
        function = cls.of(code)
        return list(function.swallowed()) if function is not None else []

    # --- what is looked for ---

    def ahead(self) -> Iterator[str]:
        """All batches at once."""
        for node in ast.walk(self.tree):
            if isinstance(node, ast.Call) and _name(node.func) in _AHEAD and any(_calls_batches(a) for a in node.args):
                yield self._at(
                    node,
                    f"{_name(node.func)}(...) takes all batches ahead, and each counts as done when the next one is taken, before anything "
                    f"is done with it. Write the loop itself: `for item in batches(items):`, and keep what it carries in ckpt.state",
                )
            elif isinstance(node, (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)) and any(
                _calls_batches(part.iter) for part in node.generators
            ):
                yield self._at(
                    node,
                    "a comprehension over batches() holds only the batches of this attempt. Write a loop, with "
                    '`ckpt.state.setdefault("results", []).append(...)` in it',
                )

    def beside(self) -> Iterator[str]:
        """Counted, or read, beside the loop."""
        for node in ast.walk(self.tree):
            if isinstance(node, ast.Call) and _name(node.func) in _BESIDE and any(_calls_batches(a) for a in node.args):
                name = _name(node.func)
                inside = "enumerate(items)" if name == "enumerate" else "zip(a, b)"
                yield self._at(node, f"{name}(batches(...)) begins anew on resume. Write batches({inside})")

    def assigned(self) -> Iterator[str]:
        """State set before the loop."""
        for node in self._before():
            if not isinstance(node, (ast.Assign, ast.AnnAssign)) or _accumulates(node):
                continue
            for target in node.targets if isinstance(node, ast.Assign) else [node.target]:
                if _is_state(target):
                    yield self._at(
                        node,
                        f"`{ast.unparse(node)}` before the loop overwrites what was restored. Write "
                        f"`{_setdefault(target, node.value)}`, or state={{...}} in the decorator or checkpointed()",
                    )

    def outer(self) -> Iterator[str]:
        """Counted in the body around another loop."""
        for loop in self.loops:
            inner = [node for node in ast.walk(loop) if node in self.loops and node is not loop]
            last = max((node.lineno for node in inner), default=0)
            hidden = {id(part) for node in inner for part in ast.walk(node)}
            for node in ast.walk(loop):
                if id(node) not in hidden and node is not loop and getattr(node, "lineno", last) < last and _accumulates(node):
                    yield self._at(
                        node,
                        f"`{ast.unparse(node)}` in the outer body runs again when a batch of the inner loop resumes. Do it in the inner "
                        f"loop, or after it, or assign what follows from the batch: `ckpt.state[...] = epoch + 1`",
                    )

    def arguments(self) -> Iterator[str]:
        """An argument that is changed."""
        for node, name in self._changed():
            if name in self.parameters and not self._is_carried(name):
                yield self._at(
                    node,
                    f"`{ast.unparse(node)}` changes the argument `{name}`, which every attempt gets as it was first passed. Keep what the "
                    f"loop makes in ckpt.state[{name!r}]",
                )

    def locals(self) -> Iterator[str]:
        """A variable that the loop carries, and the state does not."""
        before = {
            target.id: node
            for node in self._before()
            for target in _targets(node)
            if isinstance(target, ast.Name) and not self._is_carried(target.id)
        }
        told = set()
        for node, name in self._changed():
            if name in before and name not in told and name not in self.parameters:
                told.add(name)
                yield self._at(
                    node,
                    f"`{name}` lives outside of the state: after a resume it has only what this attempt put there. Write "
                    f"`ckpt.state.setdefault({name!r}, {_value(before[name])})` before the loop, and use ckpt.state[{name!r}] in it",
                )

    def copies(self) -> Iterator[str]:
        """A copy of something in the state that the loop changes, and does not write back; a list is none, and changed by `+=`."""
        copied = {
            target.id: (place, _default(node.value))
            for node in self._before()
            if isinstance(node, (ast.Assign, ast.AnnAssign)) and (place := _in_state(node.value)) is not None
            for target in _targets(node)
            if isinstance(target, ast.Name)
        }
        for node, name in self._changed():
            if name not in copied or not _rebinds(node) or self._is_written_back(name):
                continue
            place, default = copied[name]
            in_place = isinstance(node, ast.AugAssign) and not isinstance(default, ast.Constant)
            if not (in_place and isinstance(default, _CHANGED_IN_PLACE)):
                yield self._at(
                    node,
                    f"`{ast.unparse(node)}` changes a copy of what is in the state{' (unless that is a list, or an array)' * in_place}, "
                    f"and the loop does not write it back. Write `{place} = {name}` in it, after that",
                )

    def globals(self) -> Iterator[str]:
        """Something of the module that the loop changes."""
        told = set()
        for node, name in self._changed():
            kind = self.of_module.get(name)
            if kind is not None and name not in told and (not isinstance(node, ast.Call) or issubclass(kind, _CONTAINERS)):
                told.add(name)
                yield self._at(
                    node,
                    f"`{ast.unparse(node)}` changes `{name}` of the module, of which each process has its own, and which is not saved. "
                    f"Keep it in ckpt.state[{name!r}]",
                )

    def generators(self) -> Iterator[str]:
        """A random generator that every attempt seeds anew."""
        if any(isinstance(node, ast.Call) and _name(node.func) == "track" for node in ast.walk(self.tree)):
            return
        for node in self._before():
            for call in ast.walk(node):
                if isinstance(call, ast.Call) and _name(call.func) in _GENERATORS:
                    yield self._at(
                        call,
                        f"`{ast.unparse(call)}` before the loop begins anew on resume. Write ckpt.track(rng=rng), or make one per batch: "
                        f"default_rng([seed, *ckpt.position])",
                    )

    def shuffled(self) -> Iterator[str]:
        """An order that chance makes."""
        for node in ast.walk(self.tree):
            if isinstance(node, ast.Call) and _name(node.func) in _SHUFFLES:
                yield self._at(
                    node,
                    f"`{ast.unparse(node)}` may give another order in each attempt. Sort the input, or shuffle it with a generator of its "
                    f"own and a fixed seed: `random.Random(7).shuffle(items)`",
                )

    def sets(self) -> Iterator[str]:
        """An order that the hash seed makes."""
        for node in ast.walk(self.tree):
            made = isinstance(node, (ast.Set, ast.SetComp)) or (isinstance(node, ast.Call) and _name(node.func) in {"set", "frozenset"})
            if made:
                yield self._at(node, f"`{ast.unparse(node)}` has another order in every process. Write sorted(...) of it")

    def swallowed(self) -> Iterator[str]:
        """Clauses that take everything and raise nothing."""
        for node in ast.walk(self.tree):
            if not isinstance(node, ast.Try):
                continue
            for handler in node.handlers:
                kind = ast.unparse(handler.type) if handler.type is not None else ""
                wide = not kind or any(word in kind for word in ("Exception", "FaultguardError", "StalledError", "faultguard."))
                if wide and not any(isinstance(part, ast.Raise) for part in ast.walk(handler)):
                    yield self._at(
                        handler,
                        f"`except{f' {kind}' if kind else ''}:` holds back what must end the attempt (a stall, a cancel, a drained node). "
                        f"Name the errors that you expect, `except ValueError:`, or put `except faultguard.FaultguardError: raise` above it"
                        + ("" if kind else ", and write `except Exception:`"),
                    )
                    break

    # --- helpers ---

    def _at(self, node: ast.AST, text: str) -> str:
        return f"{self.file}:{getattr(node, 'lineno', 0)}: {text}."

    def _before(self) -> Iterator[ast.stmt]:
        """The statements before a loop, in its block and in those around it; not those under a condition."""
        for loop in self.loops:
            yield from _leading_to(self.definition, loop)

    def _changed(self) -> Iterator[tuple[ast.AST, str]]:
        """What the loops do to variables from outside."""
        for loop in self.loops:
            for node in ast.walk(loop):
                name = _changes(node)
                if name is not None:
                    yield node, name

    def _is_written_back(self, name: str) -> bool:
        """Whether a loop puts a variable into the state."""
        return any(
            isinstance(node, (ast.Assign, ast.AugAssign, ast.Call))
            and any(isinstance(part, ast.expr) and (_is_state(part) or _base(part) in self.aliases) for part in ast.walk(node))
            and any(isinstance(part, ast.Name) and part.id == name and isinstance(part.ctx, ast.Load) for part in ast.walk(node))
            for loop in self.loops
            for node in ast.walk(loop)
        )

    def _is_carried(self, name: str) -> bool:
        """Whether a variable stands for the state, a handle, or something that is tracked."""
        for node in ast.walk(self.tree):
            if isinstance(node, ast.Call) and _name(node.func) == "track":
                if any(isinstance(part, ast.Name) and part.id == name for value in node.keywords for part in ast.walk(value.value)):
                    return True
            elif isinstance(node, ast.Assign) and any(isinstance(target, ast.Name) and target.id == name for target in node.targets):
                if any(isinstance(part, ast.Attribute) and part.attr == "state" for part in ast.walk(node.value)):
                    return True
                if isinstance(node.value, ast.Call) and _name(node.value.func) in {"current", "checkpointed"}:
                    return True
        return False


def _global_names(code: CodeType) -> set[str]:
    """What a function, and those in it, look up in their module."""
    names = {step.argval for step in dis.get_instructions(code) if step.opname in {"LOAD_GLOBAL", "STORE_GLOBAL"}}
    return names.union(*(_global_names(inner) for inner in code.co_consts if isinstance(inner, CodeType)))


def _base(target: ast.expr) -> str:
    """The variable in `a[...][...]`; empty: there is none."""
    while isinstance(target, ast.Subscript):
        target = target.value
    return target.id if isinstance(target, ast.Name) else ""


def _default(value: ast.expr | None) -> ast.expr | None:
    """What `ckpt.state.get("n", 0)` gives where there is nothing."""
    return value.args[1] if isinstance(value, ast.Call) and len(value.args) > 1 else None


def _name(function: ast.expr) -> str:
    """The last part of what is called."""
    return function.attr if isinstance(function, ast.Attribute) else function.id if isinstance(function, ast.Name) else ""


def _calls_batches(node: ast.AST) -> bool:
    return any(isinstance(part, ast.Call) and _name(part.func) == "batches" for part in ast.walk(node))


def _is_checkpointed(loop: ast.AST) -> bool:
    """Whether a loop is one of ours: over `batches()`, over what was drawn from it, or with `advance()`."""
    if isinstance(loop, (ast.For, ast.AsyncFor)) and _calls_batches(loop.iter):
        return True
    calls = [part for part in ast.walk(loop) if isinstance(part, ast.Call)]
    return any(_name(call.func) == "advance" for call in calls)


def _is_state(target: ast.expr) -> bool:
    """Whether it is `ckpt.state`, or a part of it."""
    while isinstance(target, ast.Subscript):
        target = target.value
    return isinstance(target, ast.Attribute) and target.attr == "state"


def _in_state(value: ast.expr | None) -> str | None:
    """The place in the state from which a value was taken, as one writes it: of `ckpt.state.get("n", 0)`, too."""
    if isinstance(value, ast.Subscript) and _is_state(value):
        return ast.unparse(value)
    if not (isinstance(value, ast.Call) and isinstance(value.func, ast.Attribute) and value.args):
        return None
    taken = value.func.attr in {"get", "setdefault"} and _is_state(value.func.value)
    return f"{ast.unparse(value.func.value)}[{ast.unparse(value.args[0])}]" if taken else None


def _rebinds(node: ast.AST) -> bool:
    """Whether it gives a variable another value, and does not change the one that it has."""
    targets = node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AugAssign) else []
    return any(isinstance(target, ast.Name) for target in targets)


def _accumulates(node: ast.AST) -> bool:
    """Whether it adds to the state."""
    if isinstance(node, ast.AugAssign):
        return _is_state(node.target)
    if isinstance(node, ast.Assign):
        return any(map(_is_state, node.targets)) and any(isinstance(part, ast.expr) and _is_state(part) for part in ast.walk(node.value))
    return (
        isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in _MUTATORS and _is_state(node.func.value)
    )


def _targets(node: ast.stmt) -> list[ast.expr]:
    if isinstance(node, ast.Assign):
        return [part for target in node.targets for part in (target.elts if isinstance(target, ast.Tuple) else [target])]
    return [node.target] if isinstance(node, ast.AnnAssign) else []


def _value(node: ast.stmt) -> str:
    value = node.value if isinstance(node, (ast.Assign, ast.AnnAssign)) else None
    return ast.unparse(value) if value is not None and not isinstance(value, ast.Tuple) else "..."


def _setdefault(target: ast.expr, value: ast.expr | None) -> str:
    """What to write instead of an assignment to the state."""
    if isinstance(target, ast.Subscript) and value is not None:
        return f"{ast.unparse(target.value)}.setdefault({ast.unparse(target.slice)}, {ast.unparse(value)})"
    return "ckpt.state.setdefault(...)"


def _changes(node: ast.AST) -> str | None:
    """The variable that a node of a loop changes and does not make."""
    target: ast.expr | None = None
    if isinstance(node, ast.AugAssign):
        target = node.target
    elif isinstance(node, ast.Assign):
        names = {part.id for part in ast.walk(node.value) if isinstance(part, ast.Name)}
        target = next((t for t in node.targets if isinstance(t, ast.Subscript) or (isinstance(t, ast.Name) and t.id in names)), None)
    elif isinstance(node, ast.Delete):
        target = next((t for t in node.targets if isinstance(t, ast.Subscript)), None)
    elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in _MUTATORS:
        target = node.func.value
    return (_base(target) or None) if target is not None else None


def _leading_to(node: ast.AST, loop: ast.AST) -> Iterator[ast.stmt]:
    """The statements of `node` that run before `loop`, which is in it."""
    for field in ("body", "orelse", "finalbody"):
        block = getattr(node, field, None)
        if not isinstance(block, list):
            continue
        for at, statement in enumerate(block):
            if any(part is loop for part in ast.walk(statement)):
                yield from block[:at]
                if statement is not loop:
                    yield from _leading_to(statement, loop)
                return
