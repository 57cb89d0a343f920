"""The public names: changing one is a decision, and importing them is cheap."""

from __future__ import annotations

import importlib
import subprocess
import sys

import pytest

import faultguard

PUBLIC_NAMES = [
    "Backoff",
    "Checkpoint",
    "CheckpointCorruptError",
    "CheckpointNotSerializableError",
    "CheckpointStoreError",
    "DuplicateWorkerError",
    "FaultguardError",
    "InputChangedError",
    "ManagerUnavailableError",
    "MaxFailuresExceeded",
    "RecoverableFunction",
    "RecoveryManager",
    "Run",
    "RunInUseError",
    "RunMismatchError",
    "StalledError",
    "SupersededError",
    "UsageError",
    "WorkerState",
    "batches",
    "cancel",
    "checkpointed",
    "current",
    "get",
    "init",
    "manager",
    "recommended_ray_env",
    "recoverable",
    "shutdown",
    "workers",
]


def test_the_public_names_are_these() -> None:
    """No name comes or goes by accident."""
    assert faultguard.__all__ == PUBLIC_NAMES


@pytest.mark.parametrize("name", PUBLIC_NAMES)
def test_every_public_name_is_there_and_explained(name: str) -> None:
    """What is promised can be imported, and has a docstring."""
    value = getattr(faultguard, name)
    assert (value.__doc__ or "").strip()


@pytest.mark.parametrize("module", ["faultguard.errors", "faultguard.policy", "faultguard.storage"])
def test_public_modules_have_what_they_list(module: str) -> None:
    """A star import of a public module works."""
    loaded = importlib.import_module(module)
    assert [name for name in loaded.__all__ if not hasattr(loaded, name)] == []


def test_importing_does_not_load_what_only_trouble_needs() -> None:
    """`import faultguard` adds none of the slow packages to those that Ray loads, as every task pays for them."""
    script = (
        "import sys, ray\n"
        "before = set(sys.modules)\n"
        "import faultguard\n"
        "new = set(sys.modules) - before\n"
        "print(sorted(new & {'structlog', 'tenacity', 'numpy', 'torch', 'rich', 'obstore'}))\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == "[]"


def test_importing_leaves_logging_alone() -> None:
    """An import installs no handler and sets no level."""
    script = (
        "import logging, ray\n"
        "before = (logging.root.level, list(logging.root.handlers), logging.root.filters[:])\n"
        "import faultguard\n"
        "assert before == (logging.root.level, list(logging.root.handlers), logging.root.filters[:])\n"
        "ours = logging.getLogger('faultguard')\n"
        "print(ours.level, ours.handlers, ours.propagate)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == "0 [] True"
