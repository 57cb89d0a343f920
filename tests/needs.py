"""What some tests need of the machine: without it they are skipped, and under CI they fail, so that nothing goes untested unseen."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import NoReturn

import pytest


def missing(what: str) -> NoReturn:
    """Skip the test, for want of something; under CI it must be there."""
    message = f"NOT TESTED: {what}"
    if os.environ.get("CI") == "true":
        pytest.fail(message)
    pytest.skip(message)


def require_strace() -> None:
    """Crash states can be enumerated."""
    if shutil.which("strace") is None:
        missing("crash states cannot be enumerated, because strace is not installed")


def require_a_look_at_parents() -> None:
    """The kernel lets a child look at its parent, as py-spy does."""
    scope = Path("/proc/sys/kernel/yama/ptrace_scope")
    if os.geteuid() and scope.exists() and scope.read_text("ascii").strip() != "0":
        missing("C frames of a thread that hangs, because kernel.yama.ptrace_scope is not 0, and only root may look")
