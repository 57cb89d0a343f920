"""Where the records are: a store can create an object if it is absent, read, list and delete, and nothing else.

Nothing is ever overwritten, so that one primitive, create-if-absent, both fences and commits, on a disk as on S3.
"""

from __future__ import annotations

import uuid
from typing import TYPE_CHECKING, Final, Protocol

import msgspec

from faultguard.errors import AmbiguousReplyError, CheckpointCorruptError, CheckpointStoreError, UsageError

if TYPE_CHECKING:
    import builtins

__all__ = ["STORE_KEY", "Store", "open_store", "store_id"]

STORE_KEY: Final = "faultguard-store.json"
_FORMAT: Final = 1
_CLOUD: Final = ("s3", "gs", "az")


class Store(Protocol):
    """A set of immutable objects.

    A key is segments joined by "/", already made safe by `encode_name`. What `get` or `list` shows, and what made `create`
    answer False, is durable, whoever wrote it: a record may point at another one only if that one cannot vanish in a crash.
    The content of what was created with `durable=False` is not, so nothing may point at that.

    Attributes:
        url: what a user may be shown.
    """

    url: str

    def create(self, key: str, data: bytes, *, durable: bool = True) -> bool:
        """Create `key`; True if this call did and it is durable, False if the key exists.

        Not `durable`: all see it on return, and only a failure that ends all who can see it, such as of the power of the only node,
        may take it, or its content.

        Raises:
            AmbiguousReplyError: it may exist now, or exists and may not survive a crash; read back.
            CheckpointStoreError: it was surely not created.
        """

    def get(self, key: str) -> bytes | None:
        """Return what is stored under `key`; None if it is absent."""

    def list(self, prefix: str, start_after: str = "") -> builtins.list[str]:
        """Return every key under `prefix` ("" or ending in "/") that sorts after `start_after`: whole keys, sorted."""

    def delete(self, key: str) -> None:
        """Delete `key`; absent is fine. It may come back after a crash."""


class _Identity(msgspec.Struct, frozen=True):
    store_id: str
    format: int


def open_store(url: str, *, create: bool = True) -> Store:
    """Open the store at `url`, and refuse what cannot keep the promises of `Store`.

    Args:
        url: an absolute path, or `memory://name` (of this process; for tests only).
        create: make it if it is absent, and try whether it can be written (the driver). False: it must be there (workers, readers).

    Raises:
        UsageError: `url` is not one that can be used; the text says what can.
        CheckpointStoreError: the store cannot be reached or written.

    >>> open_store("memory://example").create("run/task/w0/000000001.json", b"{}")
    True
    """
    scheme = "" if url.startswith("/") else url.partition("://")[0] if "://" in url else ""
    if scheme == "memory":
        from faultguard.storage.memory import open_memory

        return open_memory(url, create=create)
    if scheme in _CLOUD:
        msg = f"checkpoint_dir {url!r} is refused: {scheme}:// is not supported yet. Use an absolute path that all nodes share."
        raise UsageError(msg)
    if not url.startswith("/"):
        why = f"the scheme {scheme!r} is not known" if scheme else "the path is relative, and means another place in every process"
        msg = f"checkpoint_dir {url!r} is refused: {why}. Use an absolute path."
        raise UsageError(msg)
    from faultguard.storage.local import LocalStore

    return LocalStore.open(url, create=create)


def store_id(store: Store, *, create: bool = True) -> str:
    """Return the id that the store got when it was first used; two processes that read the same id see the same store.

    Args:
        store: any store.
        create: give it an id if it has none; False: it must have one.

    Raises:
        CheckpointStoreError: it cannot be read, has no id, or was written by a later version.
        CheckpointCorruptError: the id cannot be read.
    """
    data = store.get(STORE_KEY)
    if data is None and create:
        data = _create_identity(store)
    if data is None:
        msg = (
            f"store {store.url!r} has no {STORE_KEY!r}: it is not the directory that the driver uses. A path must be shared by all "
            f"nodes; if this one is not, use a shared path, an object store, or one node."
        )
        raise CheckpointStoreError(msg)
    try:
        identity = msgspec.json.decode(data, type=_Identity)
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        msg = f"{STORE_KEY!r} in store {store.url!r} is damaged ({error}). If its checkpoints are not needed, remove the store."
        raise CheckpointCorruptError(msg) from error
    if identity.format != _FORMAT:
        msg = f"store {store.url!r} has format {identity.format}, this faultguard reads format {_FORMAT}. Use the version that wrote it."
        raise CheckpointStoreError(msg)
    return identity.store_id


def _create_identity(store: Store) -> bytes | None:
    """Give the store an id, unless somebody else just did: whatever is there afterwards is the id."""
    try:
        store.create(STORE_KEY, msgspec.json.encode(_Identity(uuid.uuid4().hex, _FORMAT)))
    except AmbiguousReplyError:
        data = store.get(STORE_KEY)
        if data is None:
            raise
        return data
    return store.get(STORE_KEY)
