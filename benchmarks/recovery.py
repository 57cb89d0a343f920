"""How long it takes until the work goes on, after an exception and after the death of the process."""

from __future__ import annotations

import cProfile
import functools
import os
import pstats
import signal
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ray

import faultguard
from benchmarks import stamps as stamped
from benchmarks.budget import Bench, Measured
from benchmarks.cluster import cluster, entered_through, profiled, profiles
from benchmarks.handle import newest_record, plain_state
from benchmarks.stamps import Stamps
from benchmarks.timing import DurableWriter, median, top, us

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["exception", "sigkill", "stamping"]

BATCH_S = 0.02
KILLED_AT = 12  # batches; by then there is something to resume
TIMEOUT_S = 120
PAUSE_S = 0.01  # longer than a pending write of the attempt that is about to fail


def _get(refs: Any) -> Any:
    """`ray.get` that ends: a measurement that hangs is none."""
    return ray.get(refs, timeout=TIMEOUT_S)


# --- exception ------------------------------------------------------------------------------------------------------


def exception(bench: Bench) -> Measured:
    """Each attempt stamps its first batch, makes the newest record durable by hand, and fails in the next batch."""
    processes, failures = (2, 4) if bench.quick else (6, 12)
    with cluster(bench):
        found = [_get(_fail.remote(failures, str(bench.directory / f"by-hand-{i}"))) for i in range(processes)]
    first = median([one["resumed"][0] for one in found])
    resumed = [s for one in found for s in one["resumed"][1:]]
    by_hand = [s for one in found for s in one["by_hand"][1:]]
    details = (
        f"{us(median(resumed))} over {us(median(by_hand))} for {found[0]['bytes']} bytes; {processes} processes, {failures} failures each",
        f"not counted: the first failure of a process, {us(first)} ({first / median(by_hand):.0f} x), which imports tenacity and structlog",
    )
    return Measured(median([a / b for a, b in zip(resumed, by_hand, strict=True)]), details, lambda: _explain_exception(bench, failures))


def _explain_exception(bench: Bench, failures: int) -> list[str]:
    file = bench.directory / "exception.prof"
    with cluster(bench):
        _get(_fail.remote(failures, str(bench.directory / "by-hand-profiled"), str(file)))
    return top(pstats.Stats(str(file)), failures - 1)


@faultguard.recoverable(max_failures=100, backoff=faultguard.Backoff(initial=0.0), state=plain_state())
@ray.remote(max_calls=1)
def _fail(failures: int, folder: str, profile: str = "") -> dict[str, Any]:
    """Fail that often, in one process of its own, and time how the work goes on."""
    handle = faultguard.current()
    memory = stamped.memory  # of the module: a function that is decorated travels with a copy of its globals
    if not memory:
        memory.update(resumed=[], by_hand=[], writer=DurableWriter(Path(folder)), profiler=cProfile.Profile())
    for batch in handle.batches(range(failures + 1)):
        if "raised" in memory:
            _went_on(handle)
        elif batch < failures:
            time.sleep(PAUSE_S)
            memory["raised"] = time.perf_counter()
            if profile and batch:
                memory["profiler"].enable()
            raise ValueError(batch)
    if profile:
        memory["profiler"].dump_stats(profile)
    return {key: memory[key] for key in ("resumed", "by_hand", "bytes")}


def _went_on(handle: faultguard.Checkpoint) -> None:
    """In the first batch after a failure."""
    memory = stamped.memory
    memory["resumed"].append(time.perf_counter() - memory.pop("raised"))
    memory["profiler"].disable()
    record = newest_record(handle)
    started = time.perf_counter()
    memory["writer"].write(record)
    memory["by_hand"].append(time.perf_counter() - started)
    memory["bytes"] = len(record)


# --- SIGKILL --------------------------------------------------------------------------------------------------------

# What runs here in the workers is nested functions, which travel by value: a function of this module would import it, and
# faultguard with it, before anything is stamped. `max_calls=1`: each attempt gets a process that never saw faultguard. One CPU: like a
# busy node, it has no spare process at hand, so each retry starts one; with a second CPU there is one, or not, by chance.


def sigkill(bench: Bench) -> Measured:
    """Plain Ray: from the kill until the function is entered again. Ours: from there, imports to come, to the first batch."""
    rounds = 3 if bench.quick else 20
    with cluster(bench, cpus=1):
        found = [(_crash_plain(bench.directory, i), _crash_ours(bench.directory, i)) for i in range(rounds)]
    plain = median([seconds for seconds, _ in found])
    share = {key: median([ours[key] for _, ours in found]) for key in found[0][1]}
    details = (
        f"{share['ours'] * 1e3:.0f} ms of ours after plain Ray's {plain * 1e3:.0f} ms (kill → function entered), medians of {rounds}",
        f"of them {share['loaded'] * 1e3:.0f} ms to load the task, which imports faultguard; the rest to claim, restore and warn",
        f"kill → first resumed batch in all {(share['ours'] + share['ray']) * 1e3:.0f} ms; at batch {share['batch']:.0f} of {KILLED_AT}",
    )
    return Measured(100 * share["ours"] / plain, details, lambda: _explain_sigkill(bench))


def _crash_plain(folder: Path, number: int) -> float:
    """Seconds from the kill until plain Ray enters the function again."""
    stamps = Stamps(folder / f"plain-{number}")

    def crash(path: str) -> None:
        stamps = Stamps(path)
        before = stamps.read()
        stamps.add("entered")
        if not before:
            time.sleep(KILLED_AT * BATCH_S)
            stamps.add("killed")
            os.kill(os.getpid(), signal.SIGKILL)

    _get(ray.remote(max_calls=1, max_retries=2)(crash).remote(stamps.path))
    return _between(stamps.read(), "killed", "entered")


def _crash_ours(folder: Path, number: int) -> dict[str, float]:
    """Seconds of Ray and of ours, up to the first resumed batch."""
    stamps = Stamps(folder / f"ours-{number}")
    with entered_through(functools.partial(stamping, stamps.path)):
        _get(_crashing().remote(stamps.path))
    events = stamps.read()
    batch = events[-1]["batch"]
    if [event["warm"] for event in events if event["what"] == "entered"] != [False, False] or not 0 < batch <= KILLED_AT:
        raise RuntimeError(f"not a resume in a new process: {events}")
    return {
        "ray": _between(events, "killed", "entered"),
        "loaded": _between(events, "entered", "loaded"),
        "ours": _between(events, "entered", "resumed"),
        "batch": batch,
    }


def _between(events: list[dict[str, Any]], earlier: str, later: str) -> float:
    """Seconds between the last events of two kinds."""
    last = {event["what"]: event["time"] for event in events}
    seconds: float = last[later] - last[earlier]
    return seconds


def stamping(path: str, load: Callable[[], Callable[..., Any]]) -> Callable[..., Any]:
    """An entry that stamps before faultguard is imported, and after."""

    def entry(*arguments: Any, **keywords: Any) -> Any:
        import sys

        from benchmarks.stamps import Stamps

        stamps = Stamps(path)
        stamps.add("entered", warm="faultguard" in sys.modules)
        function = load()
        stamps.add("loaded")
        return function(*arguments, **keywords)

    return entry


def _crashing() -> Any:
    """A task that kills its process once, and stamps the first batch after that."""

    def crash(path: str) -> None:
        stamps = Stamps(path)
        handle = faultguard.current()
        for batch in handle.batches(range(100)):
            if handle.attempt > 1:
                stamps.add("resumed", batch=batch)
                return
            time.sleep(BATCH_S)
            if batch == KILLED_AT:
                stamps.add("killed")
                os.kill(os.getpid(), signal.SIGKILL)

    return faultguard.recoverable(state=plain_state())(ray.remote(max_calls=1)(crash))


def _explain_sigkill(bench: Bench) -> list[str]:
    """The attempt that resumes, profiled with its imports."""
    folder = bench.directory / "profiles"
    with cluster(bench, cpus=1), entered_through(profiled(folder)):
        _get([_crashing().remote(str(bench.directory / f"profiled-{i}")) for i in range(3)])
    return profiles(folder)
