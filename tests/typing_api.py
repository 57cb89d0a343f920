"""Checked by mypy and pyright, never run: what the types of the public names promise, and which calls must fail."""

# pyright: reportUnnecessaryTypeIgnoreComment=true

from __future__ import annotations

from datetime import timedelta
from typing import Any

import ray
from ray import ObjectRef
from typing_extensions import assert_type

import faultguard
from faultguard.testing import ResumabilityReport, check_resumable


@faultguard.recoverable
@ray.remote
def bare(path: str, epochs: int) -> float:
    """Below the bare decorator."""
    return len(path) * float(epochs)


@faultguard.recoverable(max_failures=3)
@ray.remote
def configured(path: str, epochs: int) -> float:
    """Below the decorator with options."""
    return len(path) * float(epochs)


@faultguard.recoverable(max_failures=3, worker_id="path")
@ray.remote(num_cpus=1)
def with_ray_options(path: str, epochs: int) -> float:
    """With options for both."""
    return len(path) * float(epochs)


@faultguard.recoverable
def plain_bare(path: str, *, epochs: int = 1) -> float:
    """A plain function below the bare decorator."""
    return len(path) * float(epochs)


@faultguard.recoverable(max_failures=3)
def plain_configured(path: str, *, epochs: int = 1) -> float:
    """A plain function below the decorator with options."""
    return len(path) * float(epochs)


def remote_keeps_the_signature() -> None:
    """`.remote()` takes what the function takes, or references to it, and refers to what the function returns."""
    for task in (bare, configured, with_ray_options):
        assert_type(task.remote("a", 1), ObjectRef[float])
        assert_type(task.remote("a", ray.put(1)), ObjectRef[float])
        assert_type(task.options(worker_id="w0", num_cpus=2).remote("a", 1), ObjectRef[float])
        task.remote("a", "1")  # type: ignore[arg-type]
        task.remote("a")  # type: ignore[call-arg]
        task.remote("a", 1, 2)  # type: ignore[call-arg]
    bare.remote("a", 1.5)  # type: ignore[arg-type]
    configured.remote(1, 1)  # type: ignore[arg-type]
    with_ray_options.remote()  # type: ignore[call-arg]


def options_keep_the_signature() -> None:
    """`.options()` changes no argument, and its own have types."""
    named = configured.options(worker_id="w0")
    named.remote("a", None)  # type: ignore[arg-type]
    named.remote("a")  # type: ignore[call-arg]
    configured.options(worker_id=7)  # type: ignore[arg-type]
    configured.options("w0")  # type: ignore[call-arg]


def a_direct_call_gives_the_value() -> None:
    """Called directly, a task is the function."""
    assert_type(bare("a", 1), float)
    assert_type(configured.options(worker_id="w0")("a", 1), float)
    bare("a", b"")  # type: ignore[arg-type]


def plain_functions_stay_functions() -> None:
    """A decorated plain function keeps its keywords and defaults, and has no `.remote()` until Ray gives it one."""
    assert_type(plain_bare("a"), float)
    assert_type(plain_configured("a", epochs=2), float)
    plain_bare("a", 2)  # type: ignore[call-arg]
    plain_configured("a", epochs="2")  # type: ignore[arg-type]
    plain_configured.remote("a")  # type: ignore[attr-defined]


def get_gives_one_or_many() -> None:
    """`get` gives a value for a reference, and a list for a sequence."""
    assert_type(faultguard.get(bare.remote("a", 1)), float)
    assert_type(faultguard.get([bare.remote("a", n) for n in range(3)], timeout=5), list[float])
    assert_type(faultguard.get((bare.remote("a", 1),), progress=False), list[float])
    faultguard.get(7)  # type: ignore[call-overload]
    faultguard.get(bare.remote("a", 1), 5)  # type: ignore[call-overload]


def options_of_the_decorator_have_types() -> None:
    """A wrong option is seen before the program runs."""
    faultguard.recoverable(max_failures="3")  # type: ignore[call-overload]
    faultguard.recoverable(max_failures=3, retries=2)  # type: ignore[call-overload]
    faultguard.recoverable(every="sometimes")  # type: ignore[call-overload]
    faultguard.recoverable(retry_on="ValueError")  # type: ignore[call-overload]
    faultguard.recoverable(backoff=1.0)  # type: ignore[call-overload]
    faultguard.recoverable(on_poison="drop")  # type: ignore[call-overload]
    faultguard.recoverable(fresh_process_on="CUDA")  # type: ignore[call-overload]
    faultguard.init(max_failures="3")  # type: ignore[arg-type]
    with faultguard.init(checkpoint_dir="/shared") as run:
        assert_type(run, faultguard.Run)


def options_of_ray_stay_options() -> None:
    """`.options()` takes Ray's options beside its own two, whose values are checked, and may be called again on what it gives."""
    chosen = configured.options(worker_id="w0", resume="never", num_cpus=2, scheduling_strategy="SPREAD").options(num_cpus=1)
    assert_type(chosen.remote("a", 1), ObjectRef[float])
    assert_type(chosen("a", 1), float)
    configured.options(worker_id=b"w0")  # type: ignore[arg-type]
    configured.options(resume=False)  # type: ignore[arg-type]
    plain_configured.options(worker_id="w0")  # type: ignore[attr-defined]


def batches_give_what_goes_in(handle: faultguard.Checkpoint) -> None:
    """A loop keeps the type of its batches, from an iterable or from a callable that makes one."""

    def pages(start: int) -> list[bytes]:
        return [b""] * start

    def by_name(start: str) -> list[str]:
        return [start]

    for loop in (handle.batches, faultguard.batches):
        for number in loop(range(3)):
            assert_type(number, int)
        for index, word in loop(enumerate(["a"]), name="words", total=1):
            assert_type((index, word), tuple[int, str])
        for page in loop(pages):
            assert_type(page, bytes)
        loop(3)  # type: ignore[arg-type]
        loop(by_name)  # type: ignore[arg-type]
        loop([1], name=1)  # type: ignore[arg-type]
        loop([1], "words")  # type: ignore[call-arg]
        loop([1], total="3")  # type: ignore[arg-type]
        loop()  # type: ignore[call-arg]


def a_block_gives_the_handle() -> None:
    """`checkpointed` gives the handle of its worker, with and without an id, in both kinds of functions."""
    with faultguard.checkpointed("w0", state={"rows": 0}, every=10, keep=3, stall_timeout=60, on_poison="skip") as handle:
        assert_type(handle, faultguard.Checkpoint)
    with faultguard.checkpointed(every=timedelta(seconds=30), stall_timeout=timedelta(minutes=1)) as handle:
        assert_type(handle, faultguard.Checkpoint)
    assert_type(faultguard.current(), faultguard.Checkpoint)
    faultguard.checkpointed(7)  # type: ignore[arg-type]
    faultguard.checkpointed("w0", {"rows": 0})  # type: ignore[call-arg]
    faultguard.checkpointed("w0", state=["rows"])  # type: ignore[arg-type]
    faultguard.checkpointed("w0", every="often")  # type: ignore[arg-type]
    faultguard.checkpointed("w0", keep=2.5)  # type: ignore[arg-type]
    faultguard.checkpointed("w0", on_poison="drop")  # type: ignore[arg-type]
    faultguard.checkpointed("w0", retries=3)  # type: ignore[call-arg]


async def a_block_of_an_async_actor() -> None:
    """`async with` gives the same."""
    async with faultguard.checkpointed("w0") as handle:
        assert_type(handle, faultguard.Checkpoint)


def the_handle_has_types(handle: faultguard.Checkpoint) -> None:
    """What the handle says, what can be set, and what its calls take."""
    assert_type(handle.state, dict[str, Any])
    assert_type(handle.position, tuple[int, ...])
    assert_type(handle.quarantined, tuple[tuple[int, ...], ...])
    assert_type((handle.worker_id, handle.task, handle.run), tuple[str, str, str])
    assert_type((handle.attempt, handle.token, handle.current_batch, handle.durable_batch), tuple[int, int, int, int])
    assert_type(handle.resumed, bool)
    assert_type(handle.failures[0].message, str)
    assert_type(handle.idempotency_key("part"), str)
    handle.state = {"rows": 0}
    handle.state = [0]  # type: ignore[assignment]
    handle.token = 3  # type: ignore[misc]
    handle.current_batch = 3  # type: ignore[misc]
    handle.rows = 3  # type: ignore[attr-defined]
    handle.advance("2")  # type: ignore[arg-type]
    handle.advance(1, True)  # type: ignore[call-arg]
    handle.save(True)  # type: ignore[call-arg]
    handle.track(handle)  # type: ignore[call-arg]
    handle.section("download")  # type: ignore[call-arg]
    handle.section("download", timeout="60")  # type: ignore[arg-type]
    handle.idempotency_key(3)  # type: ignore[arg-type]


def get_takes_its_options_by_name() -> None:
    """`get` takes references, and options of the right type."""
    faultguard.get(bare.remote("a", 1), timeout="5")  # type: ignore[call-overload]
    faultguard.get([bare.remote("a", 1)], progress="no")  # type: ignore[call-overload]
    faultguard.get([1.0])  # type: ignore[arg-type]
    faultguard.get({"a": bare.remote("a", 1)})  # type: ignore[call-overload]
    faultguard.get(bare.remote("a", 1), retries=2)  # type: ignore[call-overload]


def the_run_has_types() -> None:
    """What belongs to the driver."""
    assert_type(faultguard.init("nightly", "/shared", resume="always", takeover=True).instance, int)
    assert_type(faultguard.workers(), list[faultguard.WorkerState])
    assert_type(faultguard.recommended_ray_env(), dict[str, str])
    faultguard.init(7)  # type: ignore[arg-type]
    faultguard.init(resume="sometimes")  # type: ignore[arg-type]
    faultguard.init(heartbeat="5")  # type: ignore[call-arg]
    faultguard.cancel(7)  # type: ignore[arg-type]
    faultguard.Backoff(initial="1")  # type: ignore[arg-type]


def a_proof_has_types() -> None:
    """`check_resumable` takes any function, its arguments, and options by name."""
    report = check_resumable(plain_bare, "/data", kwargs={"epochs": 2}, max_kills=10)
    assert_type(report, ResumabilityReport)
    assert_type((report.task, report.kills, report.is_complete), tuple[str, int, bool])
    check_resumable(bare, "/data", 2, effects=list, reset=list, max_seconds=10.0, other_process=False)
    check_resumable("plain_bare")  # type: ignore[arg-type]
    check_resumable(fn=plain_bare)  # type: ignore[call-arg]
    check_resumable(plain_bare, max_kills="10")  # type: ignore[arg-type]
    check_resumable(plain_bare, effects=3)  # type: ignore[arg-type]
    report.kills = 3  # type: ignore[misc]
