"""A store in the memory of this process, for tests: what it keeps dies with the process."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Final

from faultguard._core.names import check_key, check_prefix
from faultguard.errors import CheckpointStoreError, UsageError

if TYPE_CHECKING:
    import builtins

__all__ = ["MemoryStore", "open_memory"]


class MemoryStore:
    """A `Store` whose objects are entries of a dict."""

    def __init__(self, url: str = "memory://") -> None:
        self.url = url
        self._objects: dict[str, bytes] = {}
        self._lock = threading.Lock()

    def create(self, key: str, data: bytes, *, durable: bool = True) -> bool:  # noqa: ARG002 - nothing here survives its process
        """See `Store.create`."""
        check_key(key)
        with self._lock:
            if key in self._objects:
                return False
            self._objects[key] = bytes(data)
            return True

    def get(self, key: str) -> bytes | None:
        """See `Store.get`."""
        return self._objects.get(check_key(key))

    def list(self, prefix: str, start_after: str = "") -> builtins.list[str]:
        """See `Store.list`."""
        check_prefix(prefix)
        with self._lock:
            return sorted(key for key in self._objects if key.startswith(prefix) and key > start_after)

    def delete(self, key: str) -> None:
        """See `Store.delete`."""
        with self._lock:
            self._objects.pop(check_key(key), None)


_stores: Final[dict[str, MemoryStore]] = {}


def open_memory(url: str, *, create: bool) -> MemoryStore:
    """Return the store of this process that is called `url`, for example `memory://name`."""
    if not url.removeprefix("memory://"):
        msg = f"checkpoint_dir {url!r} is refused: it has no name. Write for example 'memory://test'."
        raise UsageError(msg)
    if create:
        return _stores.setdefault(url, MemoryStore(url))
    try:
        return _stores[url]
    except KeyError:
        msg = f"store {url!r} does not exist in this process: memory:// is for tests in one process. Use an absolute path."
        raise CheckpointStoreError(msg) from None
