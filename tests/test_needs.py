"""Nothing goes untested unseen."""

from __future__ import annotations

import contextlib
import os
import shutil
from typing import TYPE_CHECKING

import pytest

from tests import disks, needs

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


@contextlib.contextmanager
def missed(outcome: type[BaseException], what: str) -> Iterator[None]:
    """The block ends the test so, and says what is not tested."""
    with pytest.raises((pytest.fail.Exception, pytest.skip.Exception), match=f"NOT TESTED: {what}") as caught:
        yield
    assert caught.type is outcome


@pytest.mark.parametrize(("ci", "outcome"), [("true", pytest.fail.Exception), ("", pytest.skip.Exception)])
def test_what_is_missing_fails_under_ci(ci: str, outcome: type[BaseException], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """At home it skips the test, and says what is not tested."""

    def refused(*_: object) -> None:
        raise PermissionError("not permitted here")

    monkeypatch.setenv("CI", ci)
    monkeypatch.setattr(shutil, "which", lambda _: None)
    with missed(outcome, "crash states"):
        needs.require_strace()
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    monkeypatch.setattr(needs, "Path", lambda _: tmp_path / "scope")
    needs.require_a_look_at_parents()
    (tmp_path / "scope").write_text("1\n", "ascii")
    with missed(outcome, "C frames"):
        needs.require_a_look_at_parents()
    monkeypatch.setattr(disks, "_call", refused)
    with missed(outcome, "a small disk, because mounting is not permitted here"), disks.small_disk(tmp_path / "d"):
        pass
