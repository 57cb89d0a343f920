"""The examples do what they say: as scripts, on a cluster of their own, with real kills where they have them."""

from __future__ import annotations

import keyword
import os
import re
import subprocess
import sys
import sysconfig
import tokenize
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"
TIMEOUT_S = 200
RUN_LINES = re.compile(r"run '[^']+' (\(#\d+\) )?(starts|goes on|ended|closed|stays open)|kept /")
ATTEMPT_LINES = re.compile(r"attempt \d+( of \d+)? (resumes at|failed at) batch|\[repeated \d+x")

pytestmark = [pytest.mark.ray, pytest.mark.slow]


@pytest.fixture
def environment(ray_temp_dir: str) -> dict[str, str]:
    """Of a process that finds no cluster, no run and no options."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_ADDRESS", "FAULTGUARD_"))}
    return {**inherited, "RAY_ADDRESS": "local", "RAY_TMPDIR": ray_temp_dir}


def run_example(name: str, *arguments: str, folder: Path, environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    """Run it as a user does, in a directory of its own."""
    command = [sys.executable, str(EXAMPLES / name), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S, check=False, cwd=folder, env=environment)


def unexpected(done: subprocess.CompletedProcess[str]) -> list[str]:
    """What faultguard said beside the lines of a run and those of failures and resumes: a footgun, or trouble."""
    said = [line for line in (done.stdout + done.stderr).splitlines() if "faultguard: " in line]
    return [line for line in said if not RUN_LINES.search(line) and not ATTEMPT_LINES.search(line)]


def stdlib_identifiers(files: int) -> tuple[int, int]:
    """All identifiers of the first files of the standard library, and how many different ones: counted here, without tasks."""
    root = Path(sysconfig.get_path("stdlib"))
    paths = sorted(str(path) for path in root.rglob("*.py") if not {"site-packages", "dist-packages"} & set(path.parts))
    found: list[str] = []
    for path in paths[:files]:
        with tokenize.open(path) as file:
            found += [token.string for token in tokenize.generate_tokens(file.readline) if token.type == tokenize.NAME]
    found = [name for name in found if not keyword.iskeyword(name)]
    return len(found), len(set(found))


def test_tokenize_stdlib(tmp_path: Path, environment: dict[str, str]) -> None:
    """The tasks count what one process counts."""
    done = run_example("tokenize_stdlib.py", "--files", "60", folder=tmp_path, environment=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    total, different = stdlib_identifiers(60)
    assert f"60 files: {total} identifiers, {different} different ones" in done.stdout
    assert unexpected(done) == []


def test_etl_sqlite_is_exact_under_fire(tmp_path: Path, environment: dict[str, str]) -> None:
    """Three worker processes are killed while they load, and each row is in the database exactly once."""
    done = run_example("etl_sqlite.py", "--kill", "3", folder=tmp_path, environment=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Each row is there exactly once." in done.stdout
    assert done.stdout.count("SIGKILL to pid") == 3
    assert unexpected(done) == []


def test_etl_sqlite_without_the_key_is_not(tmp_path: Path, environment: dict[str, str]) -> None:
    """The example can fail: without the key, what was committed after the last checkpoint is there twice.

    One kill in 20 comes just after a checkpoint, and nothing is then there twice; so there are some.
    """
    done = run_example("etl_sqlite.py", "--kill", "5", "--careless", folder=tmp_path, environment=environment)
    assert done.returncode == 1, done.stdout + done.stderr
    assert "FAILED: twice\n" in done.stdout


def test_notebook(tmp_path: Path, environment: dict[str, str]) -> None:
    """Unnamed and closed runs begin anew in the second pass, a named one that was cut goes on where it failed."""
    done = run_example("notebook.py", folder=tmp_path, environment=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    everything = "[435, 435]  left: 30 batches, right: 30 batches"
    assert [" ".join(line.split()) for line in done.stdout.splitlines() if line.startswith(("---", "named", "unnamed"))] == [
        "--- pass 1 ---",
        " ".join(f"unnamed {everything}".split()),
        " ".join(f"named, closed {everything}".split()),
        "named, cut left: 30 batches, right: 21 batches",
        "--- pass 2 ---",
        " ".join(f"unnamed {everything}".split()),
        " ".join(f"named, closed {everything}".split()),
        "named, was cut [435, 435] left: 0 batches, right: 10 batches",
    ]
    assert unexpected(done) == []
