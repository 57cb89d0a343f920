"""The rules of a named run's own log: which instance a driver works on, who has it, and how it ended.

It is a log like that of a worker. A driver that enters the run creates the next record; the number of that record is its *epoch*,
which stands in every claim of its tasks and fences them. It leaves, or closes the run, with the next record but one: if somebody
has entered meanwhile, that number is taken, and nothing happens. So there is no lock that a dead driver could hold.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import msgspec

from faultguard._core.log import Get, List, Op, create
from faultguard._core.records import open_envelope, seal
from faultguard.errors import CheckpointCorruptError, CheckpointStoreError

if TYPE_CHECKING:
    from collections.abc import Generator, Iterable

__all__ = ["Driver", "Entered", "InUse", "Resume", "RunRecord", "decode_run_record", "enter", "leave", "newest"]

MAX_TRIES = 64
Resume = Literal["auto", "never", "always"]


class Driver(msgspec.Struct, frozen=True, omit_defaults=True):
    """Who has a run: for people the host, and what tells on that host whether the process lives."""

    host: str
    pid: int
    boot_id: str = ""
    start_time: int = 0


class RunRecord(msgspec.Struct, frozen=True, omit_defaults=True, kw_only=True):
    """One record of a run's log.

    `open`: a driver has it, and works on that `instance`. `left`: it has ended, and the instance is to go on. `closed`: all of its
    workers completed.
    """

    kind: Literal["open", "left", "closed"]
    number: int
    run: str
    instance: int
    driver: Driver
    writer: str
    at: float
    opened_at: float = 0.0  # when the instance began
    heartbeat_interval: float = 5.0
    heartbeat_timeout: float = 60.0


@dataclass(frozen=True, slots=True)
class Entered:
    """The run is this driver's. `before` is the record that it follows."""

    record: RunRecord
    before: RunRecord | None


@dataclass(frozen=True, slots=True)
class InUse:
    """Another driver has it, and is not known to be gone."""

    head: RunRecord


_encoder = msgspec.json.Encoder()
_decoder = msgspec.json.Decoder(RunRecord)


def encode_run_record(record: RunRecord) -> bytes:
    """Put a record into its envelope."""
    return seal(_encoder.encode(record))


def decode_run_record(data: bytes, number: int) -> RunRecord | None:
    """Take a record out of its envelope; None when it is damaged, or not record `number`."""
    body = open_envelope(data)
    try:
        record = _decoder.decode(body) if body is not None else None
    except msgspec.MsgspecError:
        return None
    return record if record is not None and record.number == number else None


def enter(me: RunRecord, resume: Resume, gone: int) -> Generator[Op, Any, Entered | InUse]:
    """Take a run for a driver.

    Args:
        me: what is to be written; its number and instance are found here.
        resume: whether to go on with what is there: an open instance ("auto"), also a closed one ("always"), none ("never").
        gone: number of an `open` record whose driver is known to be gone, or has to give way.

    Raises:
        CheckpointCorruptError: the newest record is damaged, so that nobody knows what to go on with.
        CheckpointStoreError: others go on taking it.
    """
    numbers = yield List(may_be_stale=True)
    for _ in range(MAX_TRIES):
        head = yield from newest(numbers, skip_damaged=resume == "never")
        if head is not None and head.kind == "open" and head.number != gone:
            return InUse(head)
        number = max(numbers, default=0) + 1
        record = _next(me, head, resume, number)
        created = yield from create(number, encode_run_record(record))
        numbers = yield List()
        if created and max(numbers, default=0) == number:
            return Entered(record, head)
    raise CheckpointStoreError(f"run {me.run!r} could not be taken in {MAX_TRIES} tries: others go on taking it at the same time")


def leave(mine: RunRecord, kind: Literal["left", "closed"], now: float) -> Generator[Op, Any, bool]:
    """End what `enter` began. Returns False, and has done nothing, when another driver has entered since."""
    record = _changed(mine, kind=kind, number=mine.number + 1, at=now)
    return (yield from create(record.number, encode_run_record(record)))


def newest(numbers: Iterable[int], *, skip_damaged: bool = False) -> Generator[Op, Any, RunRecord | None]:
    """Read the newest record of a listing; None where there is none, or where it is damaged and that does not matter.

    Raises:
        CheckpointCorruptError: it is damaged. An older one may say something else: that the run is open, or that it is another instance.
    """
    for number in sorted(numbers, reverse=True):
        data = yield Get(number)
        if data is None:  # of an old listing
            continue
        record = decode_run_record(data, number)
        if record is None and not skip_damaged:
            raise CheckpointCorruptError(
                f"record {number} of the run is damaged; restore it, or begin anew with resume='never'", damaged=(number,)
            )
        return record
    return None


def _next(me: RunRecord, head: RunRecord | None, resume: Resume, number: int) -> RunRecord:
    """What this driver works on: the instance that is there, or a new one."""
    if head is None:
        return _changed(me, number=number, instance=number, opened_at=me.at)  # which no instance had, whatever was damaged
    if resume == "never" or (head.kind == "closed" and resume == "auto"):
        return _changed(me, number=number, instance=head.instance + 1, opened_at=me.at)
    return _changed(me, number=number, instance=head.instance, opened_at=head.opened_at)


def _changed(record: RunRecord, **changes: Any) -> RunRecord:
    fields = {name: getattr(record, name) for name in record.__struct_fields__}
    return RunRecord(**{**fields, **changes})
