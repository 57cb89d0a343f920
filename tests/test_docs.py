"""What the documentation shows runs: every python block of the README and the docs, and every example in a docstring."""

from __future__ import annotations

import doctest
import importlib
import os
import pkgutil
import re
import subprocess
import sys
from pathlib import Path

import pytest

import faultguard
from tests.conftest import MATRIX, matrix_tests

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)
PRELUDE = """
import ray, faultguard
def index(batch): return len(batch)
def write(value, name): pass
"""


def _modules() -> list[str]:
    return [module.name for module in pkgutil.walk_packages(faultguard.__path__, "faultguard.")]


@pytest.mark.parametrize("name", _modules())
def test_docstring_examples_run(name: str) -> None:
    """Every example in a docstring gives what it says."""
    failed, _ = doctest.testmod(importlib.import_module(name))
    assert failed == 0


@pytest.mark.ray
@pytest.mark.parametrize("page", [page for page in PAGES if BLOCK.search(page.read_text("utf-8"))], ids=lambda page: page.name)
def test_page_runs(page: Path, tmp_path: Path, ray_temp_dir: str) -> None:
    """The python blocks of a page run one after another, as a reader would paste them: nothing has started Ray or a run."""
    script = tmp_path / "page.py"
    script.write_text(PRELUDE + "\n".join(BLOCK.findall(page.read_text("utf-8"))), encoding="utf-8")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_ADDRESS", "FAULTGUARD_"))}
    environment["RAY_TMPDIR"] = ray_temp_dir
    command = [sys.executable, str(script)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200, check=False, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_matrix_names_tests_that_exist() -> None:
    """Every row of the failure model has its test."""
    here = Path(__file__).parent
    named = matrix_tests()
    assert len(named) > 40
    for test in named:
        file, _, name = test.partition("::")
        assert re.search(rf"^def {name}\(", (here / file).read_text("utf-8"), re.MULTILINE), test
    rows = [line for line in MATRIX.read_text("utf-8").splitlines() if line.startswith("| ") and not line.startswith(("| fault", "| |"))]
    assert not [row for row in rows if "::" not in row]


def test_every_fault_says_how_soon() -> None:
    """Measured or not, no row of the failure model leaves it open; nor has a row more or fewer cells than its head."""
    tables = [table.splitlines() for table in re.findall(r"(?:^\|.*\n)+", MATRIX.read_text("utf-8"), re.MULTILINE)]
    faults = [[[cell.strip() for cell in line.split(" |")] for line in table] for table in tables if table[0].startswith("| fault")]
    assert len(faults) == 5
    for head, _, *rows in faults:
        column = head.index("how soon")
        assert [row for row in rows if len(row) != len(head) or not row[column]] == []


def test_the_recommended_settings_are_those_of_the_page() -> None:
    """Who copies them from there gets what `recommended_ray_env` says."""
    page = (ROOT / "docs" / "nodes.md").read_text("utf-8")
    assert dict(re.findall(r'name: (RAY_\w+), value: "(\d+)"', page)) == faultguard.recommended_ray_env()
    (line,) = re.findall(r"^eval .*$", page, re.MULTILINE)
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    command = ["bash", "-c", f"{line}; env"]
    done = subprocess.run(command, env={"PATH": path}, capture_output=True, text=True, timeout=200, check=True, cwd=ROOT)
    assert {f"{name}={value}" for name, value in faultguard.recommended_ray_env().items()} <= set(done.stdout.splitlines())


def test_readme_is_short() -> None:
    """A reader decides in one page."""
    assert len((ROOT / "README.md").read_text("utf-8").splitlines()) <= 150


def test_links_inside_the_project_lead_somewhere() -> None:
    """No link of a page points at a file that is not there."""
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#]+)\)", page.read_text("utf-8")):
            assert target.startswith("http") or (page.parent / target).exists(), f"{page.name}: {target}"
