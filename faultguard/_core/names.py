"""Names on disk: any worker id becomes one safe path segment, any record number one file name, and neither ever collides."""

from __future__ import annotations

import hashlib
import re
import reprlib
from typing import Final

from faultguard.errors import UsageError

__all__ = ["MAX_RECORD_NUMBER", "check_key", "check_prefix", "check_worker_id", "encode_name", "record_name", "record_number"]

MAX_RECORD_NUMBER: Final = 999_999_999
_MAX_ID_BYTES: Final = 512
_MAX_SEGMENT: Final = 200  # NAME_MAX is 255 bytes, and a temporary name wants some room
_HASH_CHARS: Final = 32
_SAFE: Final = frozenset(b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789_-.")
_PLAIN: Final = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9_.-]*")  # is encoded as it is
_SEGMENT: Final = r"(?!\.)[^/\0]+"
_KEY: Final = re.compile(f"{_SEGMENT}(?:/{_SEGMENT})*")
_RECORD: Final = re.compile(r"([0-9]{9})\.json")


def check_worker_id(worker_id: object) -> str:
    """Return `worker_id` as it is, if it can name a worker.

    Any text of 1 to 512 bytes in UTF-8 can: slashes, dots and blanks are encoded, not refused.

    Raises:
        UsageError: it is not a str, empty, too long, or holds what no file name and no JSON can (NUL, half a surrogate pair).

    >>> check_worker_id("a/b")
    'a/b'
    """
    shown = reprlib.repr(worker_id)
    if not isinstance(worker_id, str):
        msg = f"worker_id {shown} is refused: it is of type {type(worker_id).__name__!r}, not str. Write worker_id=str(...)."
        raise UsageError(msg)
    if not worker_id:
        msg = "worker_id '' is refused: it is empty, so it names nothing. Give every worker an id of its own, for example f'shard-{i}'."
        raise UsageError(msg)
    if "\0" in worker_id:
        msg = f"worker_id {shown} is refused: it contains a NUL character at position {worker_id.index(chr(0))}. Remove it."
        raise UsageError(msg)
    try:
        size = len(worker_id.encode())
    except UnicodeEncodeError as error:
        msg = (
            f"worker_id {shown} is refused: it contains half a surrogate pair at position {error.start} and is no valid text "
            f"(a file name that is not UTF-8?). Encode it, for example with os.fsencode(...).hex()."
        )
        raise UsageError(msg) from None
    if size > _MAX_ID_BYTES:
        msg = (
            f"worker_id {shown} is refused: it is {size} bytes long in UTF-8, the limit is {_MAX_ID_BYTES}. "
            f"Use a shorter id, or a hash such as hashlib.sha256(...).hexdigest()."
        )
        raise UsageError(msg)
    return worker_id[:]  # a plain str, also when a subclass (an Enum, np.str_) was given


def encode_name(name: str) -> str:
    """Encode a checked name as one path segment: injective, at most 200 characters, never empty, `.`, `..` or hidden.

    Everything but ``A-Z a-z 0-9 _ - .`` is percent-encoded. What gets too long ends in ``~`` and a hash of the whole name;
    ``~`` occurs nowhere else, so that no other name is encoded alike.

    >>> encode_name("shard-7"), encode_name("../é")
    ('shard-7', '%2E.%2F%C3%A9')
    """
    if len(name) <= _MAX_SEGMENT and _PLAIN.fullmatch(name):
        return name
    if not name:
        msg = "an empty name has no path segment"
        raise ValueError(msg)
    data = name.encode()
    encoded = "".join(chr(byte) if byte in _SAFE else f"%{byte:02X}" for byte in data)
    if encoded.startswith("."):
        encoded = "%2E" + encoded[1:]
    if len(encoded) <= _MAX_SEGMENT:
        return encoded
    head = re.sub(r"%[0-9A-F]?$", "", encoded[: _MAX_SEGMENT - 1 - _HASH_CHARS])  # no half escape
    return f"{head}~{hashlib.sha256(data).hexdigest()[:_HASH_CHARS]}"


def record_name(number: int) -> str:
    """Return the file name of record `number` (1 to 999 999 999); names sort as their numbers do.

    >>> record_name(42)
    '000000042.json'
    """
    if not 1 <= number <= MAX_RECORD_NUMBER:
        msg = f"record {number} has no name: a log holds the records 1 to {MAX_RECORD_NUMBER}, because names must sort as numbers do"
        raise ValueError(msg)
    return f"{number:09d}.json"


def record_number(name: str) -> int | None:
    """Return the number of the record called `name`; None if it is not the name of a record.

    >>> record_number("000000042.json"), record_number("42.json")
    (42, None)
    """
    match = _RECORD.fullmatch(name)
    return (int(match[1]) or None) if match else None


def check_key(key: str) -> str:
    """Return `key` if it is one: segments joined by "/", none of them empty or starting with a dot.

    A store's last defence: whatever a caller forgot to encode, nothing is read or written outside of the root.
    """
    if not _KEY.fullmatch(key):
        msg = f"{key!r} is not a key of a store: segments joined by '/', none of them empty or starting with a dot"
        raise ValueError(msg)
    return key


def check_prefix(prefix: str) -> str:
    """Return `prefix` if it is "" or a key followed by "/"."""
    if prefix and not (prefix.endswith("/") and _KEY.fullmatch(prefix[:-1])):
        msg = f"{prefix!r} is not a prefix of keys: '' or segments that each end in '/'"
        raise ValueError(msg)
    return prefix
