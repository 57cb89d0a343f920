"""The stacks with C frames: a tool that is not there, refuses, or hangs costs nothing but them."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from faultguard import _native
from faultguard._native import native_stacks
from tests.needs import require_a_look_at_parents

REPOSITORY = Path(__file__).parents[1]
WAIT_S = 60
ASKS = """
import sys, threading
from faultguard import _native
_native.shutil.which, _native.PATIENCE_S = lambda *_, **__: sys.argv[1], 0.5
print(repr(_native.native_stacks(threading.get_ident())))
"""


def test_a_lock_is_seen_from_below() -> None:
    """The thread that is meant comes first, with the C frames under its Python ones."""
    require_a_look_at_parents()
    held, ready = threading.Lock(), threading.Event()

    def waits() -> None:
        ready.set()
        with held:
            pass

    with held:
        thread = threading.Thread(target=waits)
        thread.start()
        ready.wait(WAIT_S)
        seen = native_stacks(thread.ident)
    thread.join(WAIT_S)
    assert seen.startswith(f"py-spy: Process {os.getpid()}")
    first = seen.split("\n\nThread ")[1]
    assert "waits (" in first
    assert ".so" in first, "there is a frame of C code"
    assert max(map(len, seen.splitlines())) <= _native.MAX_LINE


def test_a_record_holds_so_much() -> None:
    """8192 characters of stacks, as documented; what is cut shows that it was."""
    long = "x" * 8193
    assert _native.cut(long[1:]) == long[1:]
    assert (len(_native.cut(long)), _native.cut(long)[-4:]) == (8192, "\n...")


def test_without_the_tool(monkeypatch: pytest.MonkeyPatch) -> None:
    """There are none, and that is all."""
    monkeypatch.setattr(shutil, "which", lambda *_, **__: None)
    assert native_stacks(None) == ""


@pytest.mark.parametrize("does", ["exit 1", "kill -STOP $4; exec sleep 300"], ids=["refuses", "hangs"])
def test_a_tool_that_does_not_work(does: str, tmp_path: Path) -> None:
    """It is ended, and the process that it has stopped goes on."""
    tool = tmp_path / "py-spy"
    tool.write_text(f"#!/bin/sh\n{does}\n", "utf-8")
    tool.chmod(0o755)
    done = subprocess.run(
        [sys.executable, "-c", ASKS, str(tool)], capture_output=True, text=True, cwd=REPOSITORY, timeout=WAIT_S, check=True
    )
    assert done.stdout == "''\n", done.stderr


LITTER = """
import gc, threading, time
from faultguard._stall import stacks

class Cycle:
    pass

def litter():
    for _ in range(3):
        cycle = Cycle()
        cycle.local, cycle.again = threading.local(), cycle
        cycle.local.x = 1

def descend(n):
    descend(n - 1) if n else time.sleep(0.0001)

def work():
    while True:
        descend(5)

for _ in range(8):
    threading.Thread(target=work, daemon=True).start()
gc.set_threshold(60, 1, 1)
for _ in range(1500):
    litter()
    stacks(None)
assert gc.isenabled()
"""


def test_a_look_at_the_stacks_freezes_nobody() -> None:
    """Garbage that is collected during the look wants a lock that the interpreter holds: the process would stand still for good."""
    done = subprocess.run([sys.executable, "-c", LITTER], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
