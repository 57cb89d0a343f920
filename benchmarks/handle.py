"""What a loop pays in its own process, without Ray: per batch, per snapshot, per durable save; and how long its proof takes."""

from __future__ import annotations

import functools
import math
import random
import time
from typing import Any

import msgspec

from benchmarks.budget import Bench, Measured
from benchmarks.timing import DurableWriter, in_turn, median, profile, ratio, timed, us
from faultguard import Checkpoint, _codec, current
from faultguard._core import log as rules
from faultguard._core.records import Owner
from faultguard._core.schedule import Schedule
from faultguard._journal import Journal
from faultguard._log import StoredLog
from faultguard.storage import open_store
from faultguard.testing import check_resumable

__all__ = ["durable", "loop", "newest_record", "plain_state", "resumable", "snapshot"]

BLOCK = 10  # saves in a row: the first write after another's fsync waits for what that left to do


def plain_state(seed: int = 7) -> dict[str, Any]:
    """The state of the budget: 20 int, 40 float and 20 str values."""
    rng = random.Random(seed)
    return {
        **{f"count_{i}": rng.randrange(1_000_000) for i in range(20)},
        **{f"metric_{i}": rng.random() for i in range(40)},
        **{f"name_{i}": f"shard-{rng.randrange(10_000)}.parquet" for i in range(20)},
    }


# --- loop -----------------------------------------------------------------------------------------------------------


def loop(bench: Bench) -> Measured:
    """Per batch: the generator with its clock. What ends a stalled batch takes its lock only where something is due."""
    n = 10_000  # a millisecond: most blocks are not interrupted by anybody, and opening and ending the loop does not show
    found = in_turn(
        20 if bench.quick else 500,
        bare=lambda: _bare(n) / n,
        ours=lambda: _batches(n) / n,
    )
    bare, ours = (median(found[name]) for name in ("bare", "ours"))
    over = ours - bare
    details = (
        f"bare loop {us(bare)}, batches() {us(ours)} per batch: {us(over)} over it; {ratio(found, 'ours', 'bare'):.1f} x the bare loop",
    )
    return Measured(over * 1e6, details, lambda: profile(lambda: _batches(1000), 20))


def _bare(n: int) -> float:
    started = time.perf_counter()
    for _ in range(n):
        pass
    return time.perf_counter() - started


def _batches(n: int) -> float:
    handle = Checkpoint.in_memory()
    handle._schedule.look_at = math.inf  # nothing due
    started = time.perf_counter()
    for _ in handle.batches(range(n)):
        pass
    return time.perf_counter() - started


# --- snapshot -------------------------------------------------------------------------------------------------------


def snapshot(bench: Bench) -> Measured:
    """On the main thread: fingerprint of the batch, types checked, encoded, read back and compared."""
    handle = Checkpoint.in_memory(state=plain_state())
    handle.advance()
    bare = msgspec.json.Encoder()

    def ours() -> float:
        handle.state["count_0"] += 1
        return timed(handle._snapshot)

    found = in_turn(300 if bench.quick else 5000, ours=ours, bare=lambda: timed(lambda: bare.encode(handle.state)))
    p50 = median(found["ours"])
    size = len(_codec.encode(handle.state))
    details = (f"{size} bytes; {p50 / median(found['bare']):.1f} x msgspec's encoding alone ({us(median(found['bare']))})",)
    return Measured(p50 * 1e6, details, lambda: profile(handle._snapshot, 500))


# --- durable save ---------------------------------------------------------------------------------------------------


def durable(bench: Bench) -> Measured:
    """Retention on, same file system, same bytes; blocks in turn, so that each pays for what its own last write left to do."""
    handle = _stored_handle(bench)
    by_hand = DurableWriter(bench.directory / "by-hand")
    save = functools.partial(handle.advance, wait=True)
    for _ in range(5):  # retention has begun
        save()
    record = newest_record(handle)
    found = in_turn(
        8 if bench.quick else 60,
        ours=lambda: timed(save, BLOCK),
        by_hand=lambda: timed(lambda: by_hand.write(record), BLOCK),
    )
    details = (
        f"{us(median(found['ours']))} over {us(median(found['by_hand']))} for {len(record)} bytes; blocks of {BLOCK} in turn",
        f"by hand: {'a temporary name' if by_hand.named else 'O_TMPFILE'}, write, fsync, link, fsync of the directory; no record goes",
    )
    return Measured(ratio(found, "ours", "by_hand"), details, lambda: profile(save, 200))


def _stored_handle(bench: Bench) -> Checkpoint:
    """A handle on a log of its own, as a task has it."""
    log = StoredLog(open_store(str(bench.directory / "store")), "run/task/worker/")
    owner = Owner(writer="0" * 32, task_id="1" * 48, node_id="2" * 56, boot_id="3" * 47, pid=1, start_time=1)
    me = rules.Claimant(owner=owner, task="task", worker_id="worker", max_failures=3)
    granted = log.run(rules.claim(me, time.time()))
    if not isinstance(granted, rules.Granted):
        raise TypeError(f"the log of a new store was not granted: {granted!r}")
    schedule = Schedule("auto", time.monotonic())
    journal = Journal(log, granted.held, schedule, keep=3)
    return Checkpoint(run="run", task="task", worker_id="worker", journal=journal, snapshot=None, schedule=schedule, state=plain_state())


def newest_record(handle: Checkpoint) -> bytes:
    """The bytes of the newest record of a worker, as this process knows it."""
    journal = handle._journal
    if not isinstance(journal, Journal):
        raise TypeError("a handle in memory has no record")
    with open(journal.log.path(journal.held.last), "rb") as file:  # noqa: PTH123 - a path as the store shows it
        return file.read()


# --- proof ----------------------------------------------------------------------------------------------------------


def resumable(bench: Bench) -> Measured:
    """Every kill there is, of a loop that carries the state of the budget; the median of some."""
    reports = [check_resumable(_counting, 100) for _ in range(3 if bench.quick else 15)]
    kills = reports[0].kills
    if not all(report.is_complete and report.kills == kills for report in reports):
        raise RuntimeError(f"not every kill was tried: {reports}")
    seconds = sorted(report.seconds for report in reports)
    details = (
        f"{kills} kills, all there are; of {len(reports)} checks the fastest took {seconds[0]:.2f} s, the slowest {seconds[-1]:.2f} s",
        "a state of 80 values; no other process, which takes a second more where a task has to do with sets",
    )
    return Measured(median(seconds), details, lambda: profile(lambda: check_resumable(_counting, 100), 1))


def _counting(n: int) -> dict[str, Any]:
    ckpt = current()
    if not ckpt.resumed:
        ckpt.state = plain_state()
    for index in ckpt.batches(range(n)):
        ckpt.state["count_0"] += index
        ckpt.state["name_0"] = f"shard-{index}"
    return ckpt.state
