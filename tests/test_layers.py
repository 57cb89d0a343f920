"""Which module may know which: the core is pure, and nobody looks upwards."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "faultguard"
PURE = {
    "__future__",
    "collections",
    "dataclasses",
    "datetime",
    "enum",
    "hashlib",
    "itertools",
    "math",
    "msgspec",
    "re",
    "reprlib",
    "typing",
}
CORE_KNOWS = {"faultguard._core", "faultguard.errors", "faultguard.policy"}
LAYERS = [  # each may import those above it, and its own; `_session`, `_events`, `_ray`, `_process` are aside
    {"errors"},
    {"policy", "_stops", "_failover", "_native"},
    {"_core"},
    {"storage", "_codec", "_blame"},
    {"_footguns"},
    {
        "_cancels",
        "_log",
        "_sidecar",
        "_soon",
        "_journal",
        "_tracking",
        "_settings",
        "_watch",
        "_stall",
        "_handle",
        "_marks",
        "_probe",
        "_prober",
    },
    {"_views", "_registry", "_manager", "_beater", "_watcher", "_lease", "_elsewhere"},
    {"_sentences", "_worker", "_deferred"},
    {"_attempt", "_run", "_named", "_get"},
    {"_checkpointed"},
    {"_recoverable", "_packing"},
    {"__init__", "_doctor"},
    {"cli"},
    {"_difference", "_hints", "_rehearsal", "_other_process"},
    {"testing"},
]


def imports(source: str) -> set[str]:
    """The modules that a module imports when it runs: at its top, or in a function; not for its types."""
    found: set[str] = set()
    for node in ast.walk(_without_types(ast.parse(source))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute here"
            module = node.module or ""
            found |= {f"{module}.{alias.name}" for alias in node.names} if module == "faultguard" else {module}
    return found


def _without_types(tree: ast.Module) -> ast.Module:
    tree.body = [node for node in tree.body if not (isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING")]
    return tree


def impurities(source: str) -> set[str]:
    """What a module of the core imports and may not."""
    return {
        name
        for name in imports(source)
        if name.partition(".")[0] not in PURE and not any(name == known or name.startswith(f"{known}.") for known in CORE_KNOWS)
    }


@pytest.mark.parametrize("path", sorted((PACKAGE / "_core").glob("*.py")), ids=lambda path: path.stem)
def test_the_core_is_pure(path: Path) -> None:
    """No clock, no chance, no thread, no file, no Ray: time and randomness are arguments."""
    assert not impurities(path.read_text("utf-8"))


@pytest.mark.parametrize(
    "planted", ["import time", "import os", "from random import random", "def f():\n    import ray", "from faultguard import _ray"]
)
def test_an_impurity_is_found(planted: str) -> None:
    """Wherever in a module it stands."""
    assert impurities(planted)


def test_what_is_only_for_types_is_no_impurity() -> None:
    """It is never imported."""
    assert not impurities("from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import ray")


def layer(module: str) -> int | None:
    """The number of a module's layer."""
    return next((number for number, names in enumerate(LAYERS) if module in names), None)


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_nobody_looks_upwards(path: Path) -> None:
    """At import a module needs only what stands below it; a function that starts something may look further."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    own = layer(parts[0])
    if own is None:
        assert parts[0] in {"_session", "_events", "_ray", "_process"}, f"{parts[0]} belongs to no layer"
        return
    tree = _without_types(ast.parse(path.read_text("utf-8")))
    top = ast.Module([node for node in tree.body if isinstance(node, (ast.Import, ast.ImportFrom))], [])
    for name in imports(ast.unparse(top)):
        if name.startswith("faultguard."):
            other = layer(name.split(".")[1])
            assert other is None or other <= own, f"{'.'.join(parts)} imports {name}"


def test_private_ray_stays_in_one_module() -> None:
    """Only `_ray` touches what Ray does not promise."""
    for path in PACKAGE.rglob("*.py"):
        private = [line for line in path.read_text("utf-8").splitlines() if "ray._private" in line or "_internal_kv" in line]
        assert not private or path.name == "_ray.py", (path.name, private)
