"""Options: the argument, else the environment, else the default; what cannot work is refused before anything runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from faultguard import _ray, _settings
from faultguard._settings import checked_store, decode_settings, new_settings, option, resolve_checkpoint_dir
from faultguard.errors import CheckpointStoreError, UsageError

DEFAULTS = {
    "max_failures": 3,
    "heartbeat_interval": 5.0,
    "heartbeat_timeout": 60.0,
    "check_args": True,
    "progress": True,
    "run": None,
    "resume": "auto",
    "takeover": False,
    "store_patience": 60.0,
    "defer": 0.1,
}
OTHERS = {  # an argument, and the environment with its value
    "max_failures": (7, "-1", -1),
    "heartbeat_interval": (2, "0.5", 0.5),
    "heartbeat_timeout": (90.0, "120", 120.0),
    "check_args": (True, "false", False),
    "progress": (True, "0", False),
    "run": ("nightly", "weekly", "weekly"),
    "resume": ("never", "always", "always"),
    "takeover": (False, "1", True),
    "store_patience": (5, "0", 0.0),
    "defer": (0, "2.5", 2.5),
}
IDENTITY = _ray.Identity(job_id="01000000", node_id="ab", task_id="driver", attempt=0, task_name="driver", function_name="")


@pytest.fixture(autouse=True)
def no_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No variable of ours, an empty directory, and a driver of a job."""
    for name in (*DEFAULTS, "checkpoint_dir"):
        monkeypatch.delenv(f"FAULTGUARD_{name.upper()}", raising=False)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(_ray, "job_id", lambda: IDENTITY.job_id)


def test_every_option_is_tested_here() -> None:
    """A new option needs its rows in this file."""
    assert set(_settings._OPTIONS) == set(DEFAULTS) == set(OTHERS)


@pytest.mark.parametrize("name", DEFAULTS)
def test_an_argument_beats_the_environment_beats_the_default(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """The nearest to the code wins."""
    argument, text, from_environment = OTHERS[name]
    assert option(name, None) == DEFAULTS[name]
    monkeypatch.setenv(f"FAULTGUARD_{name.upper()}", text)
    assert option(name, None) == from_environment
    assert option(name, argument) == argument
    assert type(option(name, argument)) is type(from_environment)


def test_false_is_an_argument(monkeypatch: pytest.MonkeyPatch) -> None:
    """`progress=False` and `max_failures=0` are values, not the absence of one."""
    monkeypatch.setenv("FAULTGUARD_PROGRESS", "1")
    monkeypatch.setenv("FAULTGUARD_MAX_FAILURES", "9")
    assert option("progress", given=False) is False
    assert option("max_failures", 0) == 0


@pytest.mark.parametrize(("text", "value"), [("1", True), ("true", True), ("True", True), ("0", False), ("FALSE", False)])
def test_switches_in_the_environment(monkeypatch: pytest.MonkeyPatch, text: str, value: bool) -> None:
    """A switch is 0 or 1, false or true."""
    monkeypatch.setenv("FAULTGUARD_PROGRESS", text)
    assert option("progress", None) is value


@pytest.mark.parametrize("value", [-2, 1.5, True, "3", float("inf")])
def test_bad_max_failures_are_refused(value: object) -> None:
    """It is a whole number from -1 on."""
    with pytest.raises(UsageError) as refused:
        option("max_failures", value)
    text = f"max_failures={value!r} is refused; it takes the number of failures to survive: 0 for none, -1 for any number"
    assert str(refused.value) == text


@pytest.mark.parametrize("name", ["heartbeat_interval", "heartbeat_timeout"])
@pytest.mark.parametrize("value", [0, -1, 86_400, float("nan"), float("inf"), True, "5"])
def test_bad_seconds_are_refused(name: str, value: object) -> None:
    """Times are seconds of less than a day."""
    with pytest.raises(UsageError) as refused:
        option(name, value)
    assert str(refused.value) == f"{name}={value!r} is refused; it takes seconds, more than 0 and less than a day"


@pytest.mark.parametrize("value", [-1, 86_400, float("nan"), True, "5"])
def test_bad_patience_is_refused(value: object) -> None:
    """It may be none."""
    with pytest.raises(UsageError) as refused:
        option("store_patience", value)
    assert str(refused.value) == f"store_patience={value!r} is refused; it takes seconds, less than a day: 0 for no patience"


@pytest.mark.parametrize("name", ["check_args", "progress"])
@pytest.mark.parametrize("value", [0, 1, "true", "no"])
def test_bad_switches_are_refused(name: str, value: object) -> None:
    """A switch is a bool, not something that is true or false somehow."""
    with pytest.raises(UsageError) as refused:
        option(name, value)
    assert str(refused.value) == f"{name}={value!r} is refused; it takes True or False"


@pytest.mark.parametrize(
    ("name", "text", "why"),
    [
        ("max_failures", "many", "='many' in the environment is refused; it takes a value of type int"),
        ("max_failures", "", "='' in the environment is refused; it takes a value of type int"),
        ("max_failures", "2.0", "='2.0' in the environment is refused; it takes a value of type int"),
        ("max_failures", "-5", "=-5 is refused; it takes the number of failures to survive: 0 for none, -1 for any number"),
        ("heartbeat_interval", "5s", "='5s' in the environment is refused; it takes a value of type float"),
        ("heartbeat_timeout", "nan", "=nan is refused; it takes seconds, more than 0 and less than a day"),
        ("progress", "maybe", "='maybe' in the environment is refused; it takes a value of type bool"),
    ],
)
def test_a_bad_environment_is_refused_by_its_name(monkeypatch: pytest.MonkeyPatch, name: str, text: str, why: str) -> None:
    """The text names the variable, as that is what must be changed."""
    variable = f"FAULTGUARD_{name.upper()}"
    monkeypatch.setenv(variable, text)
    with pytest.raises(UsageError) as refused:
        option(name, None)
    assert str(refused.value) == variable + why


@pytest.mark.parametrize(("interval", "timeout"), [(60, None), (10, 10), (10, 5)])
def test_the_timeout_must_exceed_the_interval(tmp_path: Path, interval: float, timeout: float | None) -> None:
    """Otherwise every worker would be called silent; nothing is made before that is said."""
    with pytest.raises(UsageError, match=r"^heartbeat_timeout=.* must be more than heartbeat_interval=.*; the usual factor is 10$"):
        new_settings(tmp_path / "c", heartbeat_interval=interval, heartbeat_timeout=timeout)
    assert not (tmp_path / "c").exists()


def test_settings_travel() -> None:
    """What the driver decided, each task decodes to the same."""
    settings = new_settings(None, max_failures=7, progress=False, heartbeat_interval=1)
    assert decode_settings(settings.encode()) == settings
    assert (settings.max_failures, settings.progress, settings.heartbeat_interval, settings.heartbeat_timeout) == (7, False, 1.0, 60.0)
    assert settings.job_id == IDENTITY.job_id
    assert settings.log_prefix("a/b", "w 0").startswith(settings.run_prefix)
    assert settings.log_prefix("a/b", "w 0").count("/") == 3


def test_two_runs_have_two_names() -> None:
    """Runs that begin in the same second do not share a folder; the store is the same."""
    first, second = new_settings(None), new_settings(None)
    assert first.run != second.run
    assert first.store_id == second.store_id


# --- checkpoint_dir -------------------------------------------------------------------------------------------------


def test_the_place_of_the_checkpoints_is_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A relative path, a `Path` and `~` mean the same place in every process: the one that they mean in the driver."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert resolve_checkpoint_dir(None) == str(tmp_path / "checkpoints")
    assert resolve_checkpoint_dir("a/../b") == str(tmp_path / "b")
    assert resolve_checkpoint_dir(Path("b")) == str(tmp_path / "b")
    assert resolve_checkpoint_dir("~/c") == str(tmp_path / "home" / "c")
    assert resolve_checkpoint_dir("/shared/c") == "/shared/c"
    assert resolve_checkpoint_dir("memory://x") == "memory://x"


def test_the_place_may_come_from_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The argument beats the environment here, too."""
    monkeypatch.setenv("FAULTGUARD_CHECKPOINT_DIR", "from-env")
    assert resolve_checkpoint_dir(None) == str(tmp_path / "from-env")
    assert resolve_checkpoint_dir("given") == str(tmp_path / "given")


@pytest.mark.parametrize("given", ["", b"/shared", 7, ["/shared"], True, "a\0b", "~no-such-user-here/c"])
def test_what_is_no_directory_is_refused(given: Any) -> None:
    """Anything that names no directory is a usage error, whatever the type."""
    with pytest.raises(UsageError) as refused:
        resolve_checkpoint_dir(given)
    assert str(refused.value).startswith(f"checkpoint_dir={given!r} is refused; it takes a directory, such as checkpoint_dir=")


def test_an_empty_variable_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """An empty variable is a mistake in a script, not the default."""
    monkeypatch.setenv("FAULTGUARD_CHECKPOINT_DIR", "")
    with pytest.raises(UsageError, match="takes a directory"):
        resolve_checkpoint_dir(None)


@pytest.mark.parametrize("mark", ["sockets", "runtime_resources"])
def test_a_session_directory_of_ray_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mark: str) -> None:
    """Ray cleans its sessions away: `ray job submit` makes the default directory lie in one."""
    work = tmp_path / "ray" / "session_2026-01-01_00-00-00_1_2" / "runtime_resources" / "working_dir_files" / "_ray_pkg_1"
    work.mkdir(parents=True)
    (work.parents[2] / mark).mkdir(exist_ok=True)
    monkeypatch.chdir(work)
    with pytest.raises(UsageError) as refused:
        resolve_checkpoint_dir(None)
    assert str(refused.value).startswith(f"checkpoint_dir='checkpoints' is {work / 'checkpoints'}, inside a session directory of Ray")
    assert "give an absolute path outside of it" in str(refused.value)
    assert resolve_checkpoint_dir(tmp_path / "outside") == str(tmp_path / "outside")


def test_a_symlink_stays_one(tmp_path: Path) -> None:
    """On another node it may lead elsewhere: to where that node has the shared disk."""
    (tmp_path / "disk").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "disk")
    assert resolve_checkpoint_dir(tmp_path / "link" / "c") == str(tmp_path / "link" / "c")


def test_the_latest_session_is_refused(tmp_path: Path) -> None:
    """Also by its other name, and before it is there."""
    with pytest.raises(UsageError, match="inside a session directory of Ray"):
        resolve_checkpoint_dir(tmp_path / "session_latest" / "c")


def test_a_directory_that_is_only_called_so_is_fine(tmp_path: Path) -> None:
    """A user's own folder `session_1` is none of Ray's."""
    (tmp_path / "session_1").mkdir()
    assert resolve_checkpoint_dir("session_1/c") == str(tmp_path / "session_1" / "c")


def test_a_place_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    """The store is tested where the run begins, not at the first checkpoint."""
    (tmp_path / "file").write_text("", encoding="utf-8")
    with pytest.raises(CheckpointStoreError):
        new_settings(tmp_path / "file" / "c")


def test_another_store_at_the_same_path_is_refused(tmp_path: Path) -> None:
    """A directory that is not shared between the nodes is an error, never a fresh start."""
    settings = new_settings(tmp_path / "c")
    assert checked_store(settings) is checked_store(settings)
    (tmp_path / "c").rename(tmp_path / "elsewhere")
    other = new_settings(tmp_path / "c")
    assert other.store_id != settings.store_id
    _settings._checked_store.cache_clear()
    with pytest.raises(CheckpointStoreError, match="is another store on this node"):
        checked_store(settings)
    assert checked_store(other).url
