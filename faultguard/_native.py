"""The stack of every thread with its C frames, where the tool `py-spy` is installed and the kernel lets it look.

It stops this process while it looks, some tenths of a second. So nobody in here could see that it takes too long: the process that
starts it does, and lets this one go on. That one runs this file as a script, which imports nothing else.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path

__all__ = ["cut", "native_stacks"]

PATIENCE_S = 10.0
MAX_STACKS = 8192  # characters, for a record
MAX_LINE = 160  # names of C++ templates go on for ever


def cut(text: str) -> str:
    """As much of a text as a record may hold."""
    return text if len(text) <= MAX_STACKS else f"{text[: MAX_STACKS - 4]}\n..."


def native_stacks(first: int | None, pid: int | None = None) -> str:
    """The stacks of this process, or of another one, as py-spy sees them; that of our thread `first` before the others.

    Empty where it sees none.
    """
    found = shutil.which("py-spy", path=os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")]))
    if found is None:
        return ""
    command = [sys.executable, "-I", "-S", __file__, found, str(pid or os.getpid()), str(PATIENCE_S)]
    try:
        # Its own bound holds; this one is for a system that gives it no time at all.
        done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, timeout=2 * PATIENCE_S, check=False)  # noqa: S603
    except (OSError, subprocess.SubprocessError):
        return ""
    if done.returncode:
        return ""
    native_ids = {thread.ident: str(thread.native_id) for thread in threading.enumerate()}
    head, *threads = done.stdout.decode(errors="replace").replace("\n\nThread ", "\nThread ").split("\nThread ")
    threads.sort(key=lambda text: text.split(maxsplit=1)[0] != native_ids.get(first))
    lines = "\n\nThread ".join(["py-spy: " + head.partition("\n")[0], *threads]).splitlines()
    return cut("\n".join(line[:MAX_LINE] for line in lines).rstrip())


def _supervise(tool: str, pid: str, patience_s: str) -> int:
    """Run py-spy; if that takes too long, end it, and let the parent, should it be about that, go on: it may have been left stopped."""
    command = [tool, "dump", "--native", "--pid", pid]
    try:
        done = subprocess.run(command, stdin=subprocess.DEVNULL, timeout=float(patience_s), check=False)  # noqa: S603 - a tool of the user's
    except subprocess.TimeoutExpired:
        if os.getppid() == int(pid):
            os.kill(int(pid), signal.SIGCONT)
        return 1
    return done.returncode


if __name__ == "__main__":
    sys.exit(_supervise(*sys.argv[1:]))
