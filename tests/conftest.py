"""One small private Ray cluster per test module, and one run of faultguard per test."""

from __future__ import annotations

import os
import re
import signal
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import pytest
import ray

import faultguard
from faultguard import _footguns
from tests.tasks import Trace

if TYPE_CHECKING:
    from collections.abc import Iterator

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # tests do not phone home
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # in the background of a script; Ray's processes inherit it, and its cancel is lost
    signal.signal(signal.SIGINT, signal.default_int_handler)
CPUS = 4
MATRIX = Path(__file__).parents[1] / "docs" / "failure-model.md"


def matrix_tests() -> set[str]:
    """The tests that the failure model names, as `test_file.py::test_name`."""
    return set(re.findall(r"`(test_\w+\.py::test_\w+)`", MATRIX.read_text("utf-8")))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the tests of the matrix."""
    named = matrix_tests()
    for item in items:
        if f"{item.path.name}::{getattr(item, 'originalname', item.name)}" in named:
            item.add_marker("matrix")


class StartRun(Protocol):
    """`faultguard.init` with the checkpoints of this test."""

    def __call__(self, **options: Any) -> faultguard.Run: ...


@pytest.fixture
def ray_temp_dir() -> Iterator[str]:
    """A directory for a cluster of one test, short enough for the paths of Ray's sockets."""
    with temporary_dir() as directory:
        yield directory


@pytest.fixture(scope="module")
def ray_cluster() -> Iterator[str]:
    """A cluster of this module's own; never one that is found running. Gives its directory."""
    with (
        temporary_dir() as directory,
        ray.init(address="local", _temp_dir=directory, num_cpus=CPUS, include_dashboard=False, log_to_driver=False),
    ):
        yield directory


@pytest.fixture
def start_run(ray_cluster: str, tmp_path: Path) -> Iterator[StartRun]:
    """Starts the run of a test with options of its own; it ends with the test."""

    def start(**options: Any) -> faultguard.Run:
        return faultguard.init(checkpoint_dir=tmp_path / "checkpoints", **options)

    yield start
    faultguard.shutdown()


@pytest.fixture
def run(start_run: StartRun) -> faultguard.Run:
    """A run with the usual options."""
    return start_run()


@pytest.fixture
def trace(tmp_path: Path) -> Trace:
    """What the tasks of a test note down, outside of the library."""
    return Trace(tmp_path / "trace")


def temporary_dir() -> tempfile.TemporaryDirectory[str]:
    """A directory that goes with its block; what processes that are just leaving still write there is no error."""
    return tempfile.TemporaryDirectory(prefix="fg-", dir="/tmp", ignore_cleanup_errors=True)


@pytest.fixture(autouse=True)
def _nothing_told() -> None:
    """What was told of a footgun in another test may be told again."""
    _footguns._told.clear()
