"""What a record of a worker's log says, and the envelope that proves that it is whole.

A record is one JSON object, `{"faultguard":1,"sha256":"<of the record's bytes>","record":{...}}`. The checksum is verified
on the bytes before anything is decoded. State and outcome stay encoded (`msgspec.Raw`): the rules never look into them.
"""

from __future__ import annotations

import hashlib
import itertools
from typing import TYPE_CHECKING, Literal, Protocol, TypeVar

import msgspec

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

__all__ = [
    "FORMAT",
    "HAND_WRITTEN",
    "MAX_FAILURE_RECORDS",
    "Ended",
    "FailureRecord",
    "Mark",
    "Outcome",
    "Owner",
    "Place",
    "Record",
    "Snapshot",
    "Spot",
    "decode_record",
    "encode_record",
    "left_last",
    "open_envelope",
    "positions",
    "seal",
]

FORMAT = 1
HAND_WRITTEN = ""  # the loop that `advance()` counts where no `batches()` is open
MAX_FAILURE_RECORDS = 100  # unlimited budgets fail without end; the log must not grow with them
_PREFIX = b'{"faultguard":1,"sha256":"'
_MIDDLE = b'","record":'
_DIGEST_LENGTH = 64
_BODY_START = len(_PREFIX) + _DIGEST_LENGTH + len(_MIDDLE)


class Spot(msgspec.Struct, frozen=True, array_like=True):
    """One loop of a place: its name, how many loops were opened before it in its scope, and its batches done."""

    loop: str
    before: int
    done: int


Place = tuple[Spot, ...]  # where a worker stands, outer to inner


def positions(places: Iterable[Place]) -> tuple[tuple[int, ...], ...]:
    """Places as users see them: without the names of the loops."""
    return tuple(tuple(spot.done for spot in place) for place in places)


class FailureRecord(msgspec.Struct, frozen=True, omit_defaults=True):
    """One charged end of an attempt.

    Attributes:
        cause: `"exception"`, `"stall"`, `"exit"`, a note's; of a process that died without a word `"oom"`, `"stall"` or `"stopped"` where
            a probe has ended it, else `"crash"`.
        attempt: the attempt that failed, counted from 1.
        batch: batches done in the innermost loop when it failed (for a crash: of the last record it left).
        message: for an exception its class and text, at most 1000 characters.
        node_id: Ray's id of the node, hex.
        pid: the process that failed.
        time: when it was recorded, seconds since the epoch.
        position: batches done per loop, outer to inner.
        stacks: of a stall, the stack of every thread, at most 8192 characters, and as many again of those with C frames, where py-spy
            sees them. Only the newest failure keeps it.
        place: `position` with the names of the loops.
        pinned: whether it is known that the batch at `place` failed, and nothing around it.
    """

    cause: str
    attempt: int
    batch: int
    message: str = ""
    node_id: str = ""
    pid: int = 0
    time: float = 0.0
    position: tuple[int, ...] = ()
    stacks: str = ""
    place: Place = ()
    pinned: bool = False

    @property
    def wordless(self) -> bool:
        """Whether its process died without a word, of whatever: its place is that of its last record."""
        return not self.message


class Owner(msgspec.Struct, frozen=True, omit_defaults=True):
    """Who wrote a record: enough to order claims, and to find out on the same host whether the process lives."""

    writer: str
    task_id: str = ""
    ray_attempt: int = 0
    local_retry: int = 0
    epoch: int = 0
    node_id: str = ""
    boot_id: str = ""
    pid: int = 0
    start_time: int = 0
    ray_worker: str = ""


class Ended(msgspec.Struct, frozen=True):
    """Note in a save: the attempt left by itself, and whether that was charged to the budget (it is counted already)."""

    cause: str
    charged: bool


class Mark(msgspec.Struct, frozen=True, omit_defaults=True):
    """How far one loop has come, and what its input looked like."""

    name: str
    done: int
    finished: bool = False
    length: int | None = None
    last: str | None = None  # fingerprint of the last finished batch


class _Place(Protocol):
    """A loop, open or recorded, as far as `left_last` looks."""

    @property
    def name(self) -> str: ...
    @property
    def finished(self) -> bool: ...


P = TypeVar("P", bound=_Place)


def left_last(scopes: Iterable[Sequence[P]]) -> list[P]:
    """The loops that were left last, outer to inner, of the scopes per depth: none inside of one that is finished."""
    path: list[P] = []
    for scope in itertools.takewhile(bool, scopes):
        if path and scope[-1].finished:  # the outer body is past it
            break
        path.append(scope[-1])
        if scope[-1].finished or scope[-1].name == HAND_WRITTEN:
            break
    return path


class Snapshot(msgspec.Struct, frozen=True):
    """The state at one batch boundary, encoded. `loops` holds, per depth, the loops that were opened in that scope."""

    state: msgspec.Raw
    loops: tuple[tuple[Mark, ...], ...] = ()
    tracked: msgspec.Raw = msgspec.Raw(b"{}")
    work_s: float = 0.0  # seconds of work behind this state, over all attempts

    @property
    def position(self) -> tuple[int, ...]:
        """Batches done, outer to inner, in the loops that were left last."""
        return tuple(mark.done for mark in left_last(self.loops))

    @property
    def batch(self) -> int:
        """Batches done in the innermost loop."""
        return self.position[-1] if self.position else 0

    @property
    def place(self) -> Place:
        """`position` with the names of the loops."""
        path = zip(left_last(self.loops), self.loops, strict=False)
        return tuple(Spot(mark.name, len(scope) - 1, mark.done) for mark, scope in path)


class Outcome(msgspec.Struct, frozen=True, omit_defaults=True):
    """How the work ended for good. `value` is the encoded return value; if not `recorded`, it has to be computed again."""

    status: Literal["completed", "failed"]
    recorded: bool = False
    value: msgspec.Raw = msgspec.Raw(b"null")
    message: str = ""
    arguments: dict[str, str] = {}  # in a named run: a digest of each plain one that the task was called with


class Record(msgspec.Struct, frozen=True, omit_defaults=True, kw_only=True):
    """One record of a worker's log.

    `charged` and `failures` count the ends of this budget, this record's own `ended` included. `points_to` is, in a claim
    without a snapshot, the number of the record that holds the state to go on from; 0 says that there is none: fresh.
    `begins` is, in a save that was waited for, the batch that began right after it: if nothing follows, that one killed the process.
    """

    kind: Literal["claim", "save", "end"]
    number: int
    task: str
    worker_id: str
    owner: Owner
    saved_at: float
    life: int
    attempt: int
    token: int
    charged: int = 0
    failures: tuple[FailureRecord, ...] = ()
    predecessor: str = ""  # in a claim: how the attempt before it ended
    points_to: int = 0
    snapshot: Snapshot | None = None
    ended: Ended | None = None
    outcome: Outcome | None = None
    saved_s: float = 0.0  # seconds of work that resuming has saved so far
    quarantined: tuple[Place, ...] = ()  # batches of this life that are passed over
    begins: Place = ()


_encoder = msgspec.json.Encoder()
_decoder = msgspec.json.Decoder(Record)


def encode_record(record: Record) -> bytes:
    """Put a record into its envelope."""
    return seal(_encoder.encode(record))


def decode_record(data: bytes, number: int) -> Record | None:
    """Take a record out of its envelope; None when it is damaged, of another format, or not record `number`."""
    body = open_envelope(data)
    try:
        record = _decoder.decode(body) if body is not None else None
    except (msgspec.DecodeError, msgspec.ValidationError):
        return None
    return record if record is not None and record.number == number else None


def seal(body: bytes) -> bytes:
    """The envelope around a record's JSON."""
    return b"".join((_PREFIX, hashlib.sha256(body).hexdigest().encode(), _MIDDLE, body, b"}"))


def open_envelope(data: bytes) -> bytes | None:
    """The JSON in an envelope; None when it is damaged, or of another format."""
    body = data[_BODY_START:-1]
    digest = data[len(_PREFIX) : len(_PREFIX) + _DIGEST_LENGTH]
    if data[: len(_PREFIX)] != _PREFIX or data[_BODY_START - len(_MIDDLE) : _BODY_START] != _MIDDLE or data[-1:] != b"}":
        return None
    return body if hashlib.sha256(body).hexdigest().encode() == digest else None
