"""A worker's log on a real store: carries out what the rules in `_core.log` ask for, and decides nothing."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeVar

from faultguard._core.log import Create, Delete, Get, List, Op, Reply
from faultguard._core.names import record_name, record_number
from faultguard._core.records import decode_record
from faultguard._core.runs import decode_run_record
from faultguard.errors import AmbiguousReplyError

if TYPE_CHECKING:
    from collections.abc import Callable, Generator

    from faultguard._core.records import Record
    from faultguard._core.runs import RunRecord
    from faultguard.storage import Store

__all__ = ["StoredLog"]

Result = TypeVar("Result")
Found = TypeVar("Found")


class StoredLog:
    """The log of one worker.

    Args:
        store: where it lies.
        prefix: its folder there, ending in "/".
    """

    def __init__(self, store: Store, prefix: str) -> None:
        self.store = store
        self.prefix = prefix

    def path(self, number: int) -> str:
        """Where a record is, for people."""
        return f"{self.store.url}/{self.prefix}{record_name(number)}"

    def run(self, procedure: Generator[Op, Any, Result]) -> Result:
        """Carry out a procedure of the rules to its end."""
        try:
            op = next(procedure)
            while True:
                op = procedure.send(self._perform(op))
        except StopIteration as stop:
            result: Result = stop.value
            return result

    def newest(self) -> Record | None:
        """The newest intact record; None when there is none."""
        return self._newest(decode_record)

    def newest_run(self) -> RunRecord | None:
        """The same of the log of a run."""
        return self._newest(decode_run_record)

    def _newest(self, decode: Callable[[bytes, int], Found | None]) -> Found | None:
        for number in reversed(self.numbers()):
            data = self.store.get(self.prefix + record_name(number))
            if data is not None and (record := decode(data, number)) is not None:
                return record
        return None

    def _perform(self, op: Op) -> object:
        match op:
            case Create(number, data, durable):
                return self._create(number, data, durable=durable)
            case Get(number):
                return self.store.get(self.prefix + record_name(number))
            case List():
                return self.numbers()
            case Delete(number):
                self.store.delete(self.prefix + record_name(number))
                return None

    def _create(self, number: int, data: bytes, *, durable: bool) -> Reply:
        key = self.prefix + record_name(number)
        try:
            created = self.store.create(key, data) if durable else self.store.create(key, data, durable=False)
        except AmbiguousReplyError:
            return Reply.AMBIGUOUS
        return Reply.CREATED if created else Reply.EXISTS

    def numbers(self) -> list[int]:
        """Of all records, ascending."""
        names = (key[len(self.prefix) :] for key in self.store.list(self.prefix))
        return [number for name in names if (number := record_number(name)) is not None]
