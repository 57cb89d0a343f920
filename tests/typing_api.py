"""Checked by mypy, never run: what the types of the public names promise, and which calls must fail."""

from __future__ import annotations

import ray
from ray import ObjectRef
from typing_extensions import assert_type

import faultguard


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
