"""What processes say about when something happened. Imports nothing of faultguard: it is used before that is imported."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

__all__ = ["Stamps", "memory"]

memory: dict[str, Any] = {}
"""What one attempt leaves for the next one in the same process."""


class Stamps:
    """A file of events, one line of JSON and one write each, so that SIGKILL loses none.

    Args:
        path: of the file; made by the first event.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = str(path)

    def add(self, what: str, **more: Any) -> None:
        """It happens now."""
        line = json.dumps({"what": what, "time": time.time(), "pid": os.getpid(), **more}) + "\n"
        file = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
        try:
            os.write(file, line.encode())
        finally:
            os.close(file)

    def read(self) -> list[dict[str, Any]]:
        """All events, as they were written; none where there is no file yet."""
        path = Path(self.path)
        return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []
