"""The public names: changing one is a decision, and importing them is cheap."""

from __future__ import annotations

import importlib
import inspect
import re
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

MEMBERS = {
    "Checkpoint": [
        *("worker_id", "task", "run", "attempt", "resumed", "state", "current_batch", "position", "durable_batch", "failures"),
        *("quarantined", "token", "batches", "advance", "save", "track", "check", "idempotency_key", "section"),
    ],
    "RecoverableFunction": ["remote", "options", "bind"],
    "Run": ["name", "instance", "checkpoint_dir"],
    "WorkerState": [
        *("worker_id", "status", "last_checkpoint", "failure_count", "last_heartbeat", "current_batch", "task", "run", "attempt"),
        *("position", "node_id", "pid", "total_batches", "quarantined"),
    ],
}
CALLS = {  # of the handle
    "batches": ["iterable", "name", "total"],
    "advance": ["n", "wait"],
    "save": ["wait"],
    "track": ["objects"],
    "check": [],
    "idempotency_key": ["suffix"],
    "section": ["name", "timeout"],
}
OPTIONS = {
    "recoverable": [
        *("max_failures", "worker_id", "name", "state", "every", "retry_on", "give_up_on", "backoff", "stall_timeout"),
        *("reset_on_progress", "fresh_process_on", "on_poison"),
    ],
    "checkpointed": ["worker_id", "state", "every", "keep", "stall_timeout", "on_poison", "allow_pickle"],
    "init": [
        *("run", "checkpoint_dir", "resume", "takeover", "max_failures", "heartbeat_interval", "heartbeat_timeout", "check_args"),
        "progress",
    ],
    "get": ["refs", "timeout", "progress", "return_exceptions"],
    "batches": ["iterable", "name", "total"],
    "cancel": ["worker_id"],
    "Backoff": ["initial", "factor", "maximum", "jitter"],
    "current": [],
    "manager": [],
    "shutdown": ["_failed"],
    "workers": [],
    "recommended_ray_env": [],
}


def test_the_public_names_are_these() -> None:
    """No name comes or goes by accident."""
    assert faultguard.__all__ == PUBLIC_NAMES


@pytest.mark.parametrize("name", PUBLIC_NAMES)
def test_every_public_name_is_there_and_explained(name: str) -> None:
    """What is promised can be imported, and has a docstring."""
    value = getattr(faultguard, name)
    assert (value.__doc__ or "").strip()


@pytest.mark.parametrize("owner", MEMBERS)
def test_the_members_that_users_write_are_these(owner: str) -> None:
    """No part of the contract goes by accident, and each is explained: in its docstring, or among the attributes of its class."""
    kind = getattr(faultguard, owner)
    for name in MEMBERS[owner]:
        member = getattr(kind, name, None)
        listed = re.search(rf"^\s+{name}: |[\s,]{name}[,:]", kind.__doc__, re.MULTILINE)
        assert listed or (getattr(member, "__doc__", None) or "").strip(), f"{owner}.{name}"


def test_the_options_are_these() -> None:
    """No option of a public function, or of a call on the handle, comes or goes by accident."""
    assert {name: list(inspect.signature(getattr(faultguard, name)).parameters) for name in OPTIONS} == OPTIONS
    calls = {name: list(inspect.signature(getattr(faultguard.Checkpoint, name)).parameters)[1:] for name in CALLS}
    assert calls == CALLS


@pytest.mark.parametrize(
    "module",
    [
        "faultguard.errors",
        "faultguard.policy",
        "faultguard.storage",
        "faultguard.storage.local",
        "faultguard.storage.memory",
        "faultguard.cli",
    ],
)
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
