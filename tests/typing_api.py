"""Checked by mypy, never run: what the types of the public names promise, and which calls must fail."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta

import ray
from ray import ObjectRef
from typing_extensions import assert_type

import faultguard


@faultguard.recoverable
@ray.remote
def bare(path: str, epochs: int) -> float:
    return len(path) * float(epochs)


@faultguard.recoverable(max_failures=3)
@ray.remote
def configured(path: str, epochs: int) -> float:
    return len(path) * float(epochs)


@faultguard.recoverable(max_failures=3)
@ray.remote(num_cpus=1)
def with_ray_options(path: str, epochs: int) -> float:
    return len(path) * float(epochs)


@faultguard.recoverable
def plain_bare(path: str, *, epochs: int = 1) -> float:
    return len(path) * float(epochs)


@faultguard.recoverable(max_failures=3)
def plain_configured(path: str, *, epochs: int = 1) -> float:
    return len(path) * float(epochs)


reveal_type(bare)
reveal_type(configured)
reveal_type(with_ray_options)
reveal_type(plain_bare)
reveal_type(plain_configured)
