"""The handle of a worker: its state, its loops, its checkpoints."""

from __future__ import annotations

import copy
import itertools
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any, TypeVar

import msgspec

from faultguard import _blame, _codec, _footguns
from faultguard._core.budget import batch_of
from faultguard._core.cursors import Cursors, Loop, input_changed
from faultguard._core.names import MAX_RECORD_NUMBER
from faultguard._core.records import HAND_WRITTEN, FailureRecord, Place, Snapshot, positions
from faultguard._core.schedule import NOW, Every, Pinning, Schedule
from faultguard._core.stall import check_timeout
from faultguard._stall import Section, StallGuard
from faultguard._tracking import tracker
from faultguard.errors import UsageError

if TYPE_CHECKING:
    from datetime import timedelta

    from faultguard._deferred import Deferred
    from faultguard._journal import Journal
    from faultguard._tracking import Tracked
    from faultguard.policy import OnPoison

__all__ = ["Checkpoint", "stand_in"]

T = TypeVar("T")
SLOW_SKIP_S = 10.0
TOKENS_PER_EPOCH = MAX_RECORD_NUMBER + 1
# Makes the handles of a task under test instead of `Checkpoint.in_memory`, or gives None to leave one to it.
stand_in: ContextVar[Callable[..., Checkpoint | None] | None] = ContextVar("faultguard_stand_in", default=None)


class Checkpoint:
    """The handle of one attempt of a worker; what `checkpointed` and `current` give.

    Attributes:
        worker_id: the worker.
        task: name of the decorated function.
        run: name of the run.
        attempt: of this worker, counted from 1.
        resumed: whether it goes on from a checkpoint.
        state: what the loop carries, a dict. Saved at batch boundaries, restored before the body runs.
        failures: of this budget, oldest first, those included that were given back.
        quarantined: the batches that are passed over, oldest first, each as `position` was there: `((3,), (7,))`.
        token: fencing token, an int below 2**63 that grows with every attempt, in a named run also from one driver, and one instance,
            to the next: for the external sink.
    """

    def __init__(
        self,
        *,
        run: str,
        task: str,
        worker_id: str,
        journal: Journal | Deferred | None,
        snapshot: Snapshot | None,
        schedule: Schedule,
        life: int = 1,
        attempt: int = 1,
        token: int = 0,
        failures: tuple[FailureRecord, ...] = (),
        quarantined: tuple[Place, ...] = (),
        state: Mapping[str, Any] | None = None,
        instance: int = 0,
        epoch: int = 0,
    ) -> None:
        """Made by `checkpointed` and by the decorator, not by users."""
        self.run = run
        self.task = task
        self.worker_id = worker_id
        self.attempt = attempt
        self._epoch = epoch
        self.failures = failures
        self.quarantined: tuple[tuple[int, ...], ...] = positions(quarantined)
        self.resumed: bool = snapshot is not None
        self.total_batches: int | None = None
        self._claim = token
        self._life = (instance, life) if instance else (life,)
        self._journal = journal
        self._schedule = schedule
        self._restored = snapshot
        self._cursors = Cursors(snapshot.loops if snapshot else ())
        self._state: dict[str, Any] = _codec.decode(bytes(snapshot.state)) if snapshot else {}
        self._tracked: dict[str, Any] = {}
        self._untracked: dict[str, Any] = _codec.decode(bytes(snapshot.tracked)) if snapshot else {}
        self._work_before_s = snapshot.work_s if snapshot else 0.0
        self._started = time.monotonic()
        self._forks = _footguns.forks[0]
        self._before_loops: _footguns.StateBefore | None = None  # of an attempt that goes on
        self._growth: _footguns.Growth | None = None
        self._closed = False
        self._stop: Callable[[], BaseException] | None = None  # makes what the next boundary raises, once it has taken its snapshot
        self._by_hand: Loop | None = None  # a loop that `advance()` counts, while it may go on
        self.guard: StallGuard = StallGuard(schedule, self._standing)
        self._set_aside = {batch_of(place) for place in quarantined}
        self._pinning: Pinning | None = None
        self._before_block: tuple[Snapshot | None] | None = None  # of a block that a loop was left early in: what was newest then
        if journal is not None:
            journal.fields = self.fields
            self._begin_pinning(journal)
        if state is not None:
            self.default_state(state)

    # --- what the user reads ---

    @property
    def token(self) -> int:
        """Fencing token: grows with every attempt, and no other attempt ever gets it.

        Makes the claim durable when it is asked for the first time, which is one write at most.

        Raises:
            UsageError: a forked process asks, and the claim was not durable when it began: ask in its parent before.
            SupersededError: a later attempt owns the worker.
            CheckpointStoreError: the store has failed for too long.
        """
        self._claim_first("token")
        return self._claim + self._epoch * TOKENS_PER_EPOCH

    @property
    def state(self) -> dict[str, Any]:
        """What the loop carries."""
        return self._state

    @state.setter
    def state(self, state: dict[str, Any]) -> None:
        if not isinstance(state, dict):
            msg = f"state must be a dict, not {type(state).__name__}; write ckpt.state['value'] = ..."
            raise UsageError(msg)
        self._state = state

    @property
    def current_batch(self) -> int:
        """Batches done in the innermost loop, which is the index of the batch in hand."""
        loop = self._cursors.innermost
        return loop.done if loop is not None else 0

    @property
    def position(self) -> tuple[int, ...]:
        """Batches done per open loop, outer to inner."""
        return self._cursors.position

    @property
    def place(self) -> Place:
        """`position` with the names of the loops, for the records."""
        return self._cursors.place

    def is_to_blame(self, error: BaseException) -> bool:
        """Whether an exception came out of the batch at `place`, which could be passed over."""
        loop = self._cursors.suspect
        return loop is not None and (not isinstance(loop.left_at, _blame.Instruction) or _blame.came_from(error, loop.left_at))

    @property
    def held_up(self) -> bool:
        """Whether the batch at `place`, which could be passed over, is in hand."""
        return self._cursors.in_hand and bool(self._cursors.begins)

    @property
    def durable_batch(self) -> int:
        """Batches of the innermost loop that are durable."""
        if self._journal is None:
            return self.current_batch
        durable = self._journal.durable
        return self._cursors.done_in(durable.loops) if durable is not None else 0

    @property
    def restored(self) -> Snapshot | None:
        """The checkpoint that this attempt began with."""
        return self._restored

    @property
    def restored_total(self) -> int | None:
        """Batches of the loop that the checkpoint left last, where that is known."""
        loop = self._cursors.innermost
        return loop.length if loop is not None else None

    # --- loops ---

    def batches(
        self, iterable: Iterable[T] | Callable[[int], Iterable[T]], *, name: str = "batches", total: int | None = None
    ) -> Iterator[T]:
        """Go through the batches that are not done, saving as it goes. For a `for` statement in the thread of the task.

        A batch is done when the loop asks for the next one. Loops nest, and may follow one another under different names.

        Args:
            iterable: a sequence, range or 1-d array (indexed); a callable, asked for `fn(start)`; a tracked iterable, which restores
                itself; any other iterable is read and dropped up to where the work goes on.
            name: of the loop, unique in its scope.
            total: number of batches, where the iterable does not know it; for the reports.

        Raises:
            UsageError: the iterable cannot be resumed, or the name is taken.
            InputChangedError: the input is not the one that the checkpoint was made with.
        """
        self._check_open("batches")
        length = _check_iterable(iterable)
        if not isinstance(name, str) or not name:
            msg = f"name={name!r} of a loop is refused; it takes a non-empty str"
            raise UsageError(msg)
        origin = _footguns.Origin()
        return _footguns.Batches(self._loop(iterable, name, length, total, origin), origin)

    def _loop(self, iterable: Any, name: str, length: int | None, total: int | None, origin: _footguns.Origin) -> Iterator[Any]:
        """The generator behind `batches`. Between two batches it does next to nothing unless something is due."""
        origin.begins(self, name, sys._getframe().f_back)  # noqa: SLF001 - as documented
        cursors, schedule, clock, growing = self._cursors, self._schedule, time.monotonic, _codec.GROWING
        if cursors.is_open and not cursors.in_hand:
            msg = (
                f"loop {name!r} is refused: loop {cursors.stack[-1].name!r} around it has no batch in hand, and on resume the rest of "
                f"{name!r} would be lost. Call advance() after the inner loop, or leave it out: batches() counts by itself. If the loop "
                f"around is over, its iterator was kept alive: write batches() into the `for` statement"
            )
            raise UsageError(msg)
        loop, closed = cursors.open(name, length, total)
        scopes, stack, inside = cursors.scopes, cursors.stack, loop.depth + 1
        try:
            self._begin(loop, closed=closed)
            if loop.finished:
                cursors.finish(loop)
                return
            for item in self._batches_of(iterable, loop):
                loop.current = item if type(item) not in growing else _Seen(_codec.fingerprint(item))
                loop.in_hand = True
                yield item
                if not stack or stack[-1] is not loop:
                    self._come_back(loop)
                if loop.in_hand:  # else advance() has counted it
                    if look := clock() >= schedule.look_at:
                        self._hear()
                    loop.done += 1
                    loop.in_hand = loop.last_known = False
                    if len(scopes) > inside:
                        del scopes[inside:]
                    if look:
                        self._boundary()
        except BaseException as error:
            self._leave(loop, _blame.running(sys._getframe().f_back) if isinstance(error, GeneratorExit) else None)  # noqa: SLF001
            raise
        self._finish(loop)

    def _leave(self, loop: Loop, at: _blame.Instruction | None) -> None:
        """A loop is left, by its user at an instruction of theirs; None: by an exception from here."""
        self._cursors.leave(loop, at)
        self.guard.leave()
        if self._pinning is not None and self._journal is not None:
            self._journal.unpin()

    def _finish(self, loop: Loop) -> None:
        self._cursors.finish(loop)
        self.guard.loop_over()
        self._boundary(0)
        if self._pinning is not None:
            self._pin(())

    def _begin(self, loop: Loop, *, closed: bool) -> None:
        """A loop begins: inside of another one's batch, or after another one, which that may have closed."""
        self.total_batches = loop.total
        if self._cursors.around is not None:
            _know(self._cursors.around)
        if closed:
            self._boundary()
        if loop.done and self._restored is not None:  # by an earlier attempt
            if self._before_loops is None:
                self._before_loops = _footguns.StateBefore(bytes(self._restored.state))
            self._before_loops.compare(self, loop)

    def _come_back(self, loop: Loop) -> None:
        """Somebody goes on with a loop after another one was opened inside of it, or after it was closed."""
        self._check_open("batches")
        if self._cursors.come_back(loop):
            return
        msg = (
            f"loop {loop.name!r} is refused to go on: the loop around it, the loop that follows it, or the end of its block has closed it. "
            f"Use batches() in a `for` statement, and batches(zip(a, b)) instead of zip(batches(a), batches(b))"
        )
        raise UsageError(msg)

    def _batches_of(self, iterable: Any, loop: Loop) -> Iterator[Any]:
        """The batches from where the loop goes on, one by one where something has to be seen to between them."""
        return self._source(iterable, loop) if self._pinning is None and not self._set_aside else self._carefully(iterable, loop)

    def _source(self, iterable: Any, loop: Loop) -> Iterator[Any]:
        """The batches from where the loop goes on; getting there is not timed."""
        self.guard.enter()
        with self.guard.untimed() if loop.done or not loop.depth else self.guard.paused():
            return self._from(iterable, loop, loop.done)

    def _carefully(self, iterable: Any, loop: Loop) -> Iterator[Any]:
        """The batches that are not quarantined. Where a batch has killed the attempt before, each is recorded before it is even read."""
        items = self._source(iterable, loop)
        while self._pinning is not None or self._set_aside:
            if batch_of(self._cursors.place) in self._set_aside:
                items = self._pass_over(iterable, loop, items)
                continue
            if self._pinning is not None:
                self._pin(self._cursors.begins)
            try:
                item = next(items)
            except StopIteration:
                return
            yield item
        yield from items

    def _pass_over(self, iterable: Any, loop: Loop, items: Iterator[Any]) -> Iterator[Any]:
        """Count a quarantined batch as done. It is not read where there is another way: that may be what it fails at."""
        if _is_indexed(iterable) and not self._is_tracked(iterable):
            self._cursors.pass_over(loop, None)
            return self._from(iterable, loop, loop.done)
        try:
            item = next(items)
        except StopIteration:
            raise input_changed(loop, f"it ends after {loop.done} batches") from None
        self._cursors.pass_over(loop, _codec.fingerprint(item))
        return items

    def _begin_pinning(self, journal: Journal | Deferred) -> None:
        """After a crash: which batch it was is known if the next one that kills its process was recorded just before it began."""
        self._pinning = Pinning(self._schedule.lag, time.monotonic()) if journal.must_pin() else None

    def _pin(self, begins: Place) -> None:
        """Record, and wait for it, that a batch begins; at last, that from now on nobody says which."""
        if self._pinning is None or self._journal is None:
            return
        more = self._pinning.next(time.monotonic())
        with self.guard.paused():
            self._journal.pin(self._snapshot()[0], begins if more else ())
        if more:
            self._pinning.written(time.monotonic())
        else:
            self._pinning = None

    def _is_tracked(self, iterable: Any) -> bool:
        return any(iterable is tracked.source for tracked in self._tracked.values())

    def _from(self, iterable: Any, loop: Loop, start: int) -> Iterator[Any]:
        """The batches from `start`; what is skipped is compared with what the checkpoint remembers."""
        if callable(iterable) and not isinstance(iterable, Iterable):
            return _iter(iterable(start))
        if start == 0 or self._is_tracked(iterable):
            return iter(iterable)
        return self._index(iterable, loop, start) if _is_indexed(iterable) else self._skip(iterable, loop, start)

    def _index(self, sequence: Any, loop: Loop, start: int) -> Iterator[Any]:
        if len(sequence) < start:
            raise input_changed(loop, f"it has only {len(sequence)} batches")
        if loop.last is not None:  # else nothing is known of it; it may be one that cannot even be read
            self._compare(loop, sequence[start - 1])
        if isinstance(sequence, (list, tuple)):  # which may be grown while the loop runs
            return itertools.islice(sequence, start, None)
        if isinstance(sequence, range) or _is_array(sequence):
            return _iter(sequence[start:])
        return (sequence[index] for index in range(start, len(sequence)))  # not every sequence has slices

    def _skip(self, iterable: Any, loop: Loop, start: int) -> Iterator[Any]:
        items = _iter(iterable)
        began = time.monotonic()
        announced = False
        item: Any = None
        for index in range(start):
            try:
                item = next(items)
            except StopIteration:
                raise input_changed(loop, f"it ends after {index} batches") from None
            if not announced and time.monotonic() - began > SLOW_SKIP_S:
                announced = True
                self._announce_slow_skip(loop, index)
        self._compare(loop, item)
        return items

    def _announce_slow_skip(self, loop: Loop, index: int) -> None:
        import logging

        from faultguard import _events

        _events.emit(
            logging.WARNING,
            "faultguard.slow_skip",
            f"'{self.task}/{self.worker_id}' reads and drops the first {loop.done} batches of {loop.name!r} ({index} after "
            f"{SLOW_SKIP_S:.0f} s): pass a sequence, or a callable fn(start), to skip them at once.",
            **self.fields(),
        )

    def _compare(self, loop: Loop, item: Any) -> None:
        if loop.last is not None and (found := _codec.fingerprint(item)) != loop.last:
            raise input_changed(loop, f"its batch {loop.done - 1} was {loop.last} and is {found}")

    # --- checkpoints ---

    def advance(self, n: int = 1, *, wait: bool = False) -> None:
        """The batch in hand is done; in a hand-written loop, `n` more are.

        Args:
            n: batches, at least 1; in a `batches` loop only 1.
            wait: return when the checkpoint is durable.
        """
        self._check_open("advance")
        if isinstance(n, bool) or not isinstance(n, int) or n < 1:
            msg = f"advance({n!r}) is refused; it takes a number of batches, at least 1"
            raise UsageError(msg)
        loop = self._cursors.innermost if self._cursors.is_open else self._cursors.hand_written()
        assert loop is not None  # noqa: S101 - an open loop is the innermost
        if loop.name != HAND_WRITTEN and (n != 1 or not loop.in_hand):
            why = "a batches() loop has one batch in hand" if n != 1 else "the batch in hand is done already"
            msg = f"advance({n if n != 1 else ''}) is refused: {why}; the loop counts its batches itself"
            raise UsageError(msg)
        if look := time.monotonic() >= self._schedule.look_at:
            self._hear()
        if wait:
            with self.guard.paused():  # or an exception could come between the count and the snapshot
                self._count(loop, n)
                self._schedule.boundary(time.monotonic(), n)
                self._write_now(wait=True)
                self._raise_stop()
        else:
            self._count(loop, n)
            if look:
                self._boundary(n)

    def _count(self, loop: Loop, n: int) -> None:
        """So many batches of a loop are done."""
        self._cursors.done(loop, n)
        if loop.name == HAND_WRITTEN and self._by_hand is None:
            self._by_hand = loop
            self.guard.enter()
            self.guard.loop_begins()

    def save(self, *, wait: bool = False) -> None:
        """Take a snapshot now. Only where no batch is in hand: before a loop, after `advance`, after a loop.

        Args:
            wait: return when it is durable; else it is written at once beside the loop.

        Raises:
            UsageError: a batch is half done, and resuming there would count it twice.
        """
        self._check_open("save")
        if self._cursors.in_hand:
            msg = (
                "save() in the middle of a batch is refused: on resume the batch would run again on a state that has half of it. "
                "Call advance() first if the batch is done, or leave saving to batches()"
            )
            raise UsageError(msg)
        if self._cursors.holds_back:
            msg = (
                "save() after a loop that was left early is refused: on resume that loop would go on. It is over, and saved so, when the "
                "next loop begins or the block ends"
            )
            raise UsageError(msg)
        self._write_now(wait=wait)

    def track(self, **objects: Any) -> None:
        """Carry objects that keep a state of their own; each is restored at this call.

        Takes what has `state_dict()` and `load_state_dict()`; `random.Random`; NumPy and torch generators; the modules `random` and
        `numpy.random`; or a pair `(get, set)` of callables.

        >>> import random
        >>> rng = random.Random(7)
        >>> ckpt = Checkpoint.in_memory()
        >>> ckpt.track(rng=rng)
        """
        self._check_open("track")
        for name, source in objects.items():
            if name in self._tracked:
                msg = f"track({name}=...) is refused: {name!r} is tracked already in this attempt"
                raise UsageError(msg)
            tracked = tracker(name, source)
            if name in self._untracked:
                self._restore(tracked, self._untracked[name])
                del self._untracked[name]
            self._tracked[name] = tracked

    def section(self, name: str, timeout: float | timedelta | None) -> Section:
        """A part of the work with a deadline of its own, and a name in the reports: `with ckpt.section("download", timeout=60): ...`.

        Inside, the `stall_timeout` around it does not count; after it, its clock begins anew.

        Args:
            name: of the part.
            timeout: seconds or a timedelta, after which `StalledError` is raised inside; None: no limit there.

        Raises:
            UsageError: `timeout` is not a positive number, a timedelta or None.

        >>> ckpt = Checkpoint.in_memory()
        >>> with ckpt.section("download", timeout=60):
        ...     ckpt.state["page"] = "<html>"
        """
        self._check_open("section")
        if not isinstance(name, str) or not name:
            msg = f"section({name!r}) is refused; it takes a non-empty str"
            raise UsageError(msg)
        return Section(self.guard, name, check_timeout("section(timeout=", timeout))

    def idempotency_key(self, suffix: str | None = None) -> str:
        """A key for the commit of this batch to an external system: the same in every attempt, another one for every batch."""
        from faultguard._core.names import encode_name

        self._claim_first("idempotency_key")  # work that is started over has other keys: by its log
        names = "/".join(encode_name(part) for part in (self.run, self.task, self.worker_id))
        is_open = self._cursors.is_open
        loops = (
            f"{encode_name(loop.name)}:{loop.done if is_open else 'over'}" if loop.name != HAND_WRITTEN else f":{loop.done}"
            for loop in self._cursors.here
        )
        return f"{names}/{'/'.join(map(str, self._life))}/{'/'.join(loops) or 'start'}" + (f"/{suffix}" if suffix is not None else "")

    def check(self) -> None:
        """Raise if this attempt must stop.

        It narrows the gap before an external commit and cannot close it: put `token` or `idempotency_key` into the commit.

        Raises:
            SupersededError: a later attempt owns the worker.
            SystemExit: the node is being drained; Ray runs the task again on another one.
            KeyboardInterrupt: the worker was cancelled.
        """
        self._check_open("check")
        with self.guard.paused():
            if self._journal is not None:
                self._journal.look()
            self._raise_stop()

    # --- inside ---

    @classmethod
    def in_memory(
        cls,
        *,
        task: str = "direct",
        worker_id: str = "direct",
        run: str = "memory",
        state: Mapping[str, Any] | None = None,
        snapshot: Snapshot | None = None,
        quarantined: tuple[Place, ...] = (),
        instance: int = 0,
    ) -> Checkpoint:
        """A handle that saves nothing: for a function that is called directly, and to compute a recorded result again."""
        make = stand_in.get()
        if make is not None and (handle := make(task=task, worker_id=worker_id, state=state)) is not None:
            return handle
        return cls(
            run=run,
            task=task,
            worker_id=worker_id,
            journal=None,
            snapshot=snapshot,
            schedule=Schedule("auto", 0.0),
            quarantined=quarantined,
            state=state,
            instance=instance,
        )

    def default_state(self, state: Mapping[str, Any]) -> None:
        """The state to begin with where nothing is saved."""
        self.check_state(state)
        if not self.resumed and not self._cursors.marks():
            self._state = copy.deepcopy(dict(state))

    @staticmethod
    def check_state(state: Any) -> Any:
        """The option `state`, checked: a dict that can be saved, or None."""
        if state is not None and not isinstance(state, Mapping):
            msg = f"state={state!r} is refused; it takes a dict, such as state={{'rows': 0}}"
            raise UsageError(msg)
        if state is not None:
            _codec.encode(dict(state))
        return state

    def configure(
        self,
        every: Every | None = None,
        keep: int | None = None,
        stall_timeout_s: float | None = None,
        on_poison: OnPoison | None = None,
    ) -> None:
        """Save at another interval, keep another number of saves, stall after another time, quarantine or not, from now on."""
        if stall_timeout_s is not None:
            self.guard.limit(stall_timeout_s)
        if every is not None:
            self._schedule.configure(every)
        if self._journal is None:
            return
        if keep is not None:
            self._journal.keep = keep
        if on_poison is not None:
            self._journal.skip_poison(on_poison == "skip")
        if every is not None or on_poison is not None:
            self._begin_pinning(self._journal)

    @property
    def journal(self) -> Journal | Deferred | None:
        """Where its snapshots go; None: nowhere."""
        return self._journal

    def returns(self, value: object) -> None:
        """The body has returned this: whether it misses what an earlier attempt had."""
        if self._restored is None or self._state or self._tracked or self._untracked or self.quarantined:
            return
        loops, before = self._cursors.loops(), [mark for scope in self._restored.loops for mark in scope]
        if len(loops) == len(before) == 1 and loops[0].finished and not before[0].finished:
            _footguns.result_beside_state(self, value, before[0].done, loops[0].done)

    def raise_if_superseded(self) -> None:
        """Raise `SupersededError` if a later attempt was seen in the log."""
        if self._journal is not None:
            self._journal.raise_if_superseded()

    def defer(self, deferred: Deferred) -> None:
        """Its worker is not claimed yet."""
        self._journal = deferred
        self.guard.on_timed = lambda: self._claim_first("section")

    def _claim_first(self, call: str) -> None:
        """What is asked for belongs to a claim, and to one that no power failure takes."""
        journal = self._journal  # another thread may claim at any moment
        if journal is not None and journal.is_volatile:
            self._check_process(call)
            with self.guard.paused():
                journal.settle()

    def claimed(self, journal: Journal, token: int) -> None:
        """Now it is; from whatever thread."""
        self._claim = token
        journal.fields = self.fields
        self._journal = journal

    def stop(self, error: Callable[[], BaseException]) -> None:
        """Let the next boundary take a snapshot and raise `error()`; from any thread. Again, should the loop not have looked."""
        self._stop = error
        self._schedule.look_at = NOW

    def save_often(self) -> None:
        """The end may be near: save as often as costs next to nothing, however seldom `every` asks for it; from any thread."""
        self._schedule.hurry()

    def _raise_stop(self) -> None:
        if self._stop is not None and not self._closed:
            self._schedule.look_at = NOW  # should the body swallow it, the next boundary raises it again
            raise self._stop()

    def finish(self) -> Snapshot:
        """The body is over without an exception: the last state, with every loop closed."""
        self._cursors.close_left()
        return self._snapshot()[0]

    @property
    def before_return(self) -> tuple[Snapshot | None] | None:
        """The snapshot that leads to a value which was returned from within a loop, in a tuple; None if none was left early."""
        if self._before_block is not None or self._journal is None:
            return self._before_block
        return (self._journal.newest,) if self._cursors.holds_back or self._cursors.is_open else None

    @property
    def depth(self) -> int:
        """How many loops are open."""
        return self._cursors.depth

    def leave_block(self, depth: int) -> None:
        """A block on this handle, begun where `depth` loops were open, ends without an exception: its loops are over."""
        before = self.before_return
        self._by_hand = None
        if self._cursors.close_left(depth):
            self._boundary()
            self._before_block = before

    def close(self) -> None:
        """No more use of this handle; a loop that goes on all the same is told at its next boundary."""
        self._closed = True
        self.guard.end()
        self._schedule.look_at = NOW

    def fields(self) -> dict[str, Any]:
        """What every event of this attempt says."""
        return {
            "run": self.run,
            "task": self.task,
            "worker_id": self.worker_id,
            "attempt": self.attempt,
            "token": self._claim,
            "batch": self.current_batch,
        }

    def _check_open(self, call: str) -> None:
        self._check_process(call)
        if self._closed:
            msg = f"{call}() on the handle of worker {self.worker_id!r} attempt {self.attempt} is refused: the attempt is over"
            raise UsageError(msg)

    def _check_process(self, call: str) -> None:
        if self._forks != _footguns.forks[0]:
            msg = (
                f"{call}() on the handle of worker {self.worker_id!r} is refused in a forked process: the attempt is that of its parent, "
                f"and two processes that save would each take the other for a later attempt. Give results back to the parent, and let it "
                f"count: pool.map(f, batch) inside the loop"
            )
            raise UsageError(msg)

    def _boundary(self, batches: int = 1) -> None:
        """A batch is done, or a loop: take a snapshot if one is due."""
        self.guard.pause()
        try:
            self._hear()
            take = self._schedule.boundary(time.monotonic(), batches)
            if (take or self._stop is not None) and not self._cursors.holds_back:
                snapshot, due = self._snapshot()
                if self._journal is not None:
                    self._journal.offer(snapshot, due)
            self._raise_stop()
        finally:
            self.guard.resume()

    def _hear(self) -> None:
        """Raise what the loop must know before it counts its batch: the attempt is over, it stalled, or the writer is in trouble."""
        self._check_open("batches")
        self.guard.settle()
        if self._journal is not None:
            self._journal.raise_trouble()

    def _write_now(self, *, wait: bool) -> None:
        with self.guard.paused():
            snapshot, _ = self._snapshot()
            if self._journal is None:
                return
            if wait:
                self._journal.write(snapshot)
            else:
                self._journal.offer(snapshot, time.monotonic())

    def _restore(self, tracked: Tracked, saved: Any) -> None:
        with self.guard.untimed():
            tracked.restore(saved)

    def _standing(self) -> object:
        """Where the open loop stands, for the watcher's thread; None where no loop is open."""
        stack = tuple(self._cursors.stack) or (() if self._by_hand is None else (self._by_hand,))
        return tuple((id(loop), loop.done) for loop in stack) or None

    def _snapshot(self) -> tuple[Snapshot, float]:
        """Encode everything as it is now, which must be a boundary, and when to write it."""
        started = time.perf_counter()
        self._before_block = None  # a boundary: nothing is being returned
        for loop in self._cursors.loops():
            if not loop.last_known and loop.name != HAND_WRITTEN:
                loop.last = _fingerprint(loop)
                loop.last_known = True
        tracked = b"{}"
        if self._tracked or self._untracked:
            tracked = _codec.encode({**self._untracked, **{name: source.save() for name, source in self._tracked.items()}}, path="tracked")
        state = _codec.encode(self._state)
        if len(state) > _footguns.LARGE_BYTES:
            self._growth = self._growth or _footguns.Growth()
            self._growth.add(self, len(state), self._cursors.done_outside)
        snapshot = Snapshot(
            state=msgspec.Raw(state),
            loops=self._cursors.marks(),
            tracked=msgspec.Raw(tracked),
            work_s=round(self._work_before_s + time.monotonic() - self._started, 3),
        )
        due = self._schedule.encoded(time.monotonic(), time.perf_counter() - started)
        return snapshot, due


def _know(loop: Loop) -> None:
    """A loop begins inside the batch in hand of `loop`: `current` is that batch, and no longer the last finished one."""
    if not loop.last_known:
        before, fingerprint = loop.outside or (-1, "")
        loop.last = fingerprint if before == loop.done - 1 else None  # None: no loop began in that batch, and nobody looked
        loop.last_known = True
    if loop.outside is None or loop.outside[0] != loop.done:
        loop.outside = (loop.done, _fingerprint(loop))


class _Seen(str):
    """The fingerprint of a batch that may grow in the hands of the user, taken before it was given out."""

    __slots__ = ()


def _fingerprint(loop: Loop) -> str:
    """Of `loop.current`."""
    return str(loop.current) if isinstance(loop.current, _Seen) else _codec.fingerprint(loop.current)


def _iter(items: Iterable[Any]) -> Iterator[Any]:
    return iter(items)


def _is_indexed(iterable: Any) -> bool:
    return isinstance(iterable, Sequence) or _is_array(iterable)


def _is_array(iterable: Any) -> bool:
    """Whether it is one that is indexed by position, which the Series of pandas is not."""
    return hasattr(iterable, "shape") and hasattr(iterable, "__getitem__") and not hasattr(iterable, "iloc")


def _check_iterable(iterable: Any) -> int | None:
    """The number of batches where it is known; refuses what cannot be resumed, with the way out."""
    kind = type(iterable)
    module = kind.__module__.partition(".")[0]
    way_out = None
    if isinstance(iterable, (str, bytes, bytearray)):
        way_out = "its batches would be single characters; pass a list of items, such as text.splitlines()"
    elif isinstance(iterable, (set, frozenset)):
        way_out = "a set has another order in every process; pass sorted(items)"
    elif isinstance(iterable, Mapping):
        way_out = "a mapping gives only its keys; pass list(mapping.items())"
    elif module in {"pandas", "polars"} and kind.__name__ in {"DataFrame", "LazyFrame"}:
        way_out = "a data frame gives only the names of its columns; pass a range over its rows, or a list of slices"
    elif kind.__module__.startswith("ray.data"):
        way_out = "a Ray Dataset has no fixed order of batches; use Ray Data's own checkpointing, or pass a list of files"
    elif getattr(iterable, "ndim", 1) != 1:
        way_out = f"an array of {iterable.ndim} dimensions is ambiguous; pass range(len(array)), or list(array)"
    elif not callable(iterable) and not isinstance(iterable, Iterable) and not hasattr(iterable, "__getitem__"):
        way_out = "it is no iterable; pass a sequence, an iterable, or a callable fn(start)"
    if way_out is not None:
        msg = f"batches({kind.__name__}) is refused: {way_out}"
        raise UsageError(msg)
    return len(iterable) if _is_indexed(iterable) else None
