"""A small private Ray cluster, a run of faultguard on it, and a look at what Ray runs for a decorated task."""

from __future__ import annotations

import compileall
import contextlib
import functools
import io
import itertools
import os
import pstats
import shutil
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import cloudpickle
import ray

import faultguard
from benchmarks.timing import top
from faultguard import _recoverable

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from benchmarks.budget import Bench

    Entry = Callable[..., Any]
    Load = Callable[[], Entry]

__all__ = ["cluster", "entered_through", "profiled", "profiles"]

_ROOT = Path(__file__).resolve().parents[1]


@contextlib.contextmanager
def cluster(bench: Bench, cpus: int = 2, **options: Any) -> Iterator[None]:
    """A cluster of this measurement's own, with a run whose checkpoints are in its directory; `options` of `init`."""
    # Whatever is installed brings its bytecode; from a source tree every new process would compile faultguard again.
    compileall.compile_dir(str(Path(faultguard.__file__).parent), quiet=1)
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(_ROOT), os.environ.get("PYTHONPATH")]))  # workers find `benchmarks`
    sessions = tempfile.mkdtemp(prefix="fgb-", dir="/tmp")  # short: paths of sockets lie below it
    with contextlib.redirect_stdout(sys.stderr):  # where Ray tells of each crash, up to its shutdown
        try:
            ray.init(address="local", _temp_dir=sessions, num_cpus=cpus, include_dashboard=False, log_to_driver=False)
            with faultguard.init(checkpoint_dir=bench.directory / "checkpoints", progress=False, **options):
                yield
        finally:
            ray.shutdown()
            shutil.rmtree(sessions, ignore_errors=True)


@contextlib.contextmanager
def entered_through(wrap: Callable[[Load], Entry]) -> Iterator[None]:
    """Let Ray run `wrap(load)` in the place of a decorated task's entry, for tasks whose first `.remote()` is inside.

    Normally Ray unpickles the entry before it calls it, and faultguard is imported on the way. Here it stays bytes until the
    benchmark's own function calls `load()`, so that those imports come after whatever that function stamps first.

    Args:
        wrap: gives a nested function, which travels by value, and which imports nothing of faultguard.
    """
    real = _recoverable._entry

    def entry(function: Entry, options: Any) -> Entry:
        return wrap(functools.partial(cloudpickle.loads, cloudpickle.dumps(real(function, options))))

    _recoverable._entry = entry
    try:
        yield
    finally:
        _recoverable._entry = real


def profiled(folder: Path) -> Callable[[Load], Entry]:
    """For `entered_through`: each call leaves its profile in `folder`, imports included."""
    target = str(folder)
    folder.mkdir(exist_ok=True)

    def wrap(load: Load) -> Entry:
        numbers = itertools.count()

        def entry(*arguments: Any, **keywords: Any) -> Any:
            import cProfile
            import os

            profiler = cProfile.Profile()
            profiler.enable()
            try:
                return load()(*arguments, **keywords)
            finally:
                profiler.disable()
                profiler.dump_stats(f"{target}/{os.getpid()}-{next(numbers)}.prof")

        return entry

    return wrap


def profiles(folder: Path, *, limit: int = 14, skip_first: bool = False) -> list[str]:
    """What `profiled` left, per call; without the first of each process, which imports."""
    files = [str(path) for path in folder.glob("*.prof") if not (skip_first and path.stem.endswith("-0"))]
    if not files:
        return ["no profile was left"]
    return top(pstats.Stats(*files, stream=io.StringIO()), len(files), limit)
