"""What whole tasks pay: many that end at once, and one that works for a minute."""

from __future__ import annotations

import itertools
import os
import tempfile
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ray

import faultguard
from benchmarks.budget import Bench, Measured
from benchmarks.cluster import cluster, entered_through, profiled, profiles
from benchmarks.handle import plain_state
from benchmarks.timing import DurableWriter, in_turn, median, price_of_a_file, ratio, us
from faultguard.storage import STORE_KEY

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["auto", "named", "program", "throughput"]

TIMEOUT_S = 300
BATCH_S = 0.005
MEMORY = Path("/dev/shm")  # noqa: S108 - not for files: for a folder of its own there
RECORD_BYTES = 800  # as of a claim or an end without state
ROOM_S = 60  # for a task beyond the time that it works


# --- tasks that end at once -----------------------------------------------------------------------------------------


def throughput(bench: Bench) -> Measured:
    """The same function plain and decorated, all tasks submitted at once."""
    tasks, rounds = (200, 2) if bench.quick else (2000, 5)
    with cluster(bench):
        plain, ours = ray.remote(_nothing), faultguard.recoverable(ray.remote(_nothing))
        for task in (plain, ours):
            _run(task, 100)  # all processes are started, and have imported what they need
        found = in_turn(rounds, plain=lambda: _run(plain, tasks), ours=lambda: _run(ours, tasks))
    each = {name: median(seconds) / tasks for name, seconds in found.items()}
    details = (f"per task {us(each['plain'])} plain, {us(each['ours'])} ours; {tasks} tasks, medians of {rounds}",)
    return Measured(ratio(found, "plain", "ours"), details, lambda: _explain_throughput(bench))


def program(bench: Bench) -> Measured:
    """A program of many short tasks, each with an argument and a result, plain and with all of them decorated; what that leaves on disk."""
    tasks, rounds = (1000, 1) if bench.quick else (10_000, 3)
    with cluster(bench):
        plain, ours = ray.remote(_square), faultguard.recoverable(ray.remote(_square))

        def run(task: Any, count: int = tasks) -> float:
            started = time.perf_counter()
            found = ray.get([task.remote(number) for number in range(count)], timeout=TIMEOUT_S)
            took = time.perf_counter() - started
            if found != [number * number for number in range(count)]:
                raise AssertionError("wrong results")
            return took

        for task in (plain, ours):
            run(task, 100)
        found = in_turn(rounds, plain=lambda: run(plain), ours=lambda: run(ours))
        left = [path for path in (bench.directory / "checkpoints").rglob("*") if path.is_file() and path.name != STORE_KEY]
    if left:
        raise AssertionError(f"{len(left)} files were left, such as {left[0]}")
    seconds = {name: median(took) for name, took in found.items()}
    details = (f"{seconds['plain']:.2f} s plain, {seconds['ours']:.2f} s ours; {tasks} tasks, medians of {rounds}; no file is left",)
    return Measured(ratio(found, "ours", "plain"), details, lambda: _explain_throughput(bench))


def _square(number: int) -> int:
    """A short task."""
    return number * number


def named(bench: Bench) -> Measured:
    """The same in a named run, where each task has an id: others see its claim before it begins, and its outcome is kept, durably.

    After it plain tasks that do nothing but make two such records durable: with one disk for all, that is most of the price. (In turn
    with ours they would leave it more to write than it has to.) And the same with a store in memory, where it has none: the rest is ours.
    """
    tasks, rounds = (200, 2) if bench.quick else (2000, 5)
    price = price_of_a_file(bench.directory, wait=not bench.quick)
    folder = bench.directory / "records"
    folder.mkdir()
    writer, numbers = ray.remote(_two_records), itertools.count()

    def run_writer(count: int = tasks) -> float:
        started = time.perf_counter()
        ray.get([writer.remote(folder / f"w{next(numbers)}") for _ in range(count)], timeout=TIMEOUT_S)
        return time.perf_counter() - started

    on_disk, by_hand = _in_turn_named(bench, tasks, rounds, run_writer)
    each = {name: median(seconds) / tasks for name, seconds in on_disk.items()}
    details = [
        f"per task {us(each['plain'])} plain, {us(each['ours'])} ours; {tasks} tasks, medians of {rounds}",
        f"tasks that make two durable records: {us(median(by_hand['writes']) / tasks)}, {ratio(by_hand, 'plain', 'writes'):.3f} x",
        f"to make a file took {us(price)} before",
    ]
    if MEMORY.is_dir():
        with tempfile.TemporaryDirectory(prefix="faultguard-bench-", dir=MEMORY) as directory:
            in_memory, _ = _in_turn_named(replace(bench, directory=Path(directory)), tasks, rounds)
        took = median(in_memory["ours"]) / tasks
        details.append(f"with the store in memory ({MEMORY}): {us(took)} ours, {ratio(in_memory, 'plain', 'ours'):.3f} x")
    return Measured(ratio(on_disk, "plain", "ours"), tuple(details), lambda: _explain_named(bench))


def _in_turn_named(
    bench: Bench, tasks: int, rounds: int, writer: Callable[..., float] | None = None
) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
    """Seconds that so many tasks take, plain and in a named run; and then, plain and as `writer` does them."""
    numbers = itertools.count()
    with cluster(bench, run="bench"):
        plain, ours = ray.remote(_nothing), faultguard.recoverable(ray.remote(_nothing))

        def run_named(count: int = tasks) -> float:
            started = time.perf_counter()
            ray.get([ours.options(worker_id=f"w{next(numbers)}").remote() for _ in range(count)], timeout=TIMEOUT_S)
            return time.perf_counter() - started

        _run(plain, 100)
        run_named(100)
        found = in_turn(rounds, plain=lambda: _run(plain, tasks), ours=run_named)
        if writer is None:
            return found, {}
        writer(100)
        return found, in_turn(rounds, plain=lambda: _run(plain, tasks), writes=writer)


def _two_records(folder: Path) -> None:
    """What is durable on any file system: a folder, and two files that are there whole or not at all."""
    writer = DurableWriter(folder)
    for _ in range(2):
        writer.write(b"x" * RECORD_BYTES)
    parent = os.open(folder.parent, os.O_RDONLY)
    try:
        os.fsync(parent)
    finally:
        os.close(parent)


def _explain_named(bench: Bench) -> list[str]:
    """What one task does in its process."""
    folder = bench.directory / "profiles"
    with cluster(bench, run="profiled"), entered_through(profiled(folder)):
        task = faultguard.recoverable(ray.remote(_nothing))
        ray.get([task.options(worker_id=f"w{number}").remote() for number in range(200)], timeout=TIMEOUT_S)
    return ["each task makes a claim that others see, and an end that is durable", *profiles(folder, skip_first=True)]


def _nothing() -> None:
    """The task."""


def _run(task: Any, count: int) -> float:
    """Seconds until that many are done."""
    started = time.perf_counter()
    ray.get([task.remote() for _ in range(count)], timeout=TIMEOUT_S)
    return time.perf_counter() - started


def _explain_throughput(bench: Bench) -> list[str]:
    """The driver's side of a `.remote()`, and what one task does in its process."""
    count, folder = 200, bench.directory / "profiles"
    with cluster(bench):
        plain, ours = ray.remote(_nothing), faultguard.recoverable(ray.remote(_nothing))
        driver = {name: _submit(task, count) for name, task in (("plain", plain), ("ours", ours))}
        with entered_through(profiled(folder)):
            _run(faultguard.recoverable(ray.remote(_nothing)), count)
    submitting = f"submitting takes the driver {us(driver['plain'])} plain, {us(driver['ours'])} ours"
    return [submitting, *profiles(folder, skip_first=True)]


def _submit(task: Any, count: int) -> float:
    """Seconds of the driver per task."""
    _run(task, 20)
    started = time.perf_counter()
    refs = [task.remote() for _ in range(count)]
    seconds = (time.perf_counter() - started) / count
    ray.get(refs, timeout=TIMEOUT_S)
    return seconds


# --- a task that works ----------------------------------------------------------------------------------------------


def auto(bench: Bench) -> Measured:
    """All time of the main thread that is not the body's, claim and outcome included, and the CPU time of our threads."""
    seconds = 5 if bench.quick else 60
    with cluster(bench), entered_through(_clocked):
        task = faultguard.recoverable(state=plain_state())(ray.remote(_work))
        found = ray.get(task.remote(seconds), timeout=seconds + ROOM_S)
    wall = found["left"] - found["entered"]
    main = {
        "entry → first batch (imports, claim)": found["first"] - found["entered"],
        "between batches": found["between"],
        "last batch → outcome recorded": found["left"] - found["last"],
    }
    spent = {**{f"main thread, {part}": s for part, s in main.items()}, **{f"CPU of {name}": s for name, s in found["threads"].items()}}
    details = (
        *(f"{100 * s / wall:.3f} % {part}: {s * 1e3:.1f} ms" for part, s in spent.items()),
        f"of {wall:.1f} s, {found['batches']} batches of {BATCH_S * 1e3:g} ms, {found['records']} records",
        f"longest pause between two batches {found['longest'] * 1e3:.2f} ms; Ray's own threads, which carry the beats, are not counted",
    )
    return Measured(100 * sum(spent.values()) / wall, details)


def _clocked(load: Callable[[], Callable[..., Any]]) -> Callable[..., Any]:
    """An entry that adds when it was entered and left to what the task returns."""

    def entry(*arguments: Any, **keywords: Any) -> Any:
        import time

        entered = time.perf_counter()
        found = load()(*arguments, **keywords)
        return {**found, "entered": entered, "left": time.perf_counter()}

    return entry


def _work(seconds: float) -> dict[str, Any]:
    """Compute, with the interpreter's lock held, and change the state; time what happens between the batches."""
    handle = faultguard.current()
    first = ended = time.perf_counter()
    between = longest = 0.0
    batches = 0
    for batch in handle.batches(range(10**9)):
        began = time.perf_counter()
        if batch:
            between += began - ended
            longest = max(longest, began - ended)
        else:
            first = began
        while time.perf_counter() < began + BATCH_S:
            handle.state["count_0"] += 1
        batches += 1
        ended = time.perf_counter()
        if ended - first > seconds:
            break
    threads = {thread.name: _cpu_time(thread) for thread in threading.enumerate() if thread.name.startswith("faultguard")}
    journal = handle._journal
    records = journal.held.last if journal is not None else 0
    return {
        "first": first,
        "between": between,
        "longest": longest,
        "last": time.perf_counter(),
        "batches": batches,
        "records": records,
        "threads": threads,
    }


def _cpu_time(thread: threading.Thread) -> float:
    """Seconds of processor time that a live thread has used."""
    return time.clock_gettime(time.pthread_getcpuclockid(thread.ident)) if thread.ident is not None else 0.0
