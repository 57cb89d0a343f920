"""What the driver decided for all its tasks: the run, the store, the limits.

They travel with every task that our `.remote()` submits, and for all other tasks in the cluster's key-value store under the
job id. Each process opens the store as it sees it and compares the store's id: a directory that is not the same on all
nodes is an error, never a fresh start.
"""

from __future__ import annotations

import datetime as dt
import functools
import os
import secrets
from pathlib import Path
from typing import Any

import msgspec

from faultguard import _ray
from faultguard._core.names import check_worker_id, encode_name
from faultguard.errors import OtherStoreError, UsageError
from faultguard.storage import Store, open_store, store_id

__all__ = ["Settings", "check_run_name", "checked_store", "decode_settings", "new_settings", "publish", "settings_of_job"]

PROTOCOL = 1
UNNAMED = "unnamed-"
RESERVED = frozenset({"manager", "runs"})
_DAY_S = 86_400
_KV_KEY = "settings:{protocol}:{job_id}"


class Settings(msgspec.Struct, frozen=True, omit_defaults=True):
    """Settings of a run. Times in seconds. `run` is its name; `instance` and `epoch` are 0 where it is unnamed."""

    run: str
    checkpoint_dir: str
    store_id: str
    job_id: str
    max_failures: int = 3
    heartbeat_interval: float = 5.0
    heartbeat_timeout: float = 60.0
    check_args: bool = True
    progress: bool = True
    store_patience: float = 60.0  # how long a store may fail before the work is told
    defer: float = 0.1  # how long a task whose id is Ray's works before it is claimed
    cancels: int = 0  # how often this driver had cancelled when the work was submitted
    instance: int = 0  # a name that was closed starts anew
    epoch: int = 0  # of the driver: the later one wins

    def encode(self) -> bytes:
        """As JSON."""
        return msgspec.json.encode(self)

    @property
    def named(self) -> bool:
        """Whether the run outlives its driver."""
        return self.epoch > 0

    @property
    def key(self) -> str:
        """The run of one driver, for names that must not be those of another one's, nor of one in another store."""
        return f"{self.job_id}-{self.run}" + (f"-{self.store_id[:8]}-{self.epoch}" if self.named else "")

    @property
    def run_prefix(self) -> str:
        """Where the logs of this run lie in the store; ends in "/"."""
        return f"{encode_name(self.run)}/" + (f"{self.instance:09d}/" if self.named else "")

    def log_prefix(self, task: str, worker_id: str) -> str:
        """Where the log of a worker lies in the store; ends in "/"."""
        return f"{self.run_prefix}{encode_name(task)}/{encode_name(worker_id)}/"


def decode_settings(data: bytes) -> Settings:
    """The settings that came with a task."""
    return msgspec.json.decode(data, type=Settings)


def settings_of_job() -> Settings | None:
    """The settings that the driver of this job published; None when it published none."""
    data = _ray.kv_get(_KV_KEY.format(protocol=PROTOCOL, job_id=_ray.job_id()))
    return decode_settings(data) if data is not None else None


def publish(settings: Settings) -> None:
    """Let the tasks of this job find their settings."""
    _ray.kv_put(_KV_KEY.format(protocol=PROTOCOL, job_id=settings.job_id), settings.encode())


RESUMES = ("auto", "never", "always")
_OF_NAMED_RUNS = frozenset({"run", "resume", "takeover"})
_OR_NONE = {"store_patience": "0 for no patience", "defer": "0 to claim first, always"}
_OPTIONS: dict[str, tuple[type, Any]] = {
    "max_failures": (int, 3),
    "heartbeat_interval": (float, 5.0),
    "heartbeat_timeout": (float, 60.0),
    "check_args": (bool, True),
    "progress": (bool, True),
    "run": (str, None),
    "resume": (str, "auto"),
    "takeover": (bool, False),
    "store_patience": (float, 60.0),
    "defer": (float, 0.1),
}


def option(name: str, given: Any) -> Any:
    """The value of an option of `init`: the argument, else `FAULTGUARD_<NAME>`, else the default.

    Raises:
        UsageError: the value is not one that the option takes.
    """
    kind, default = _OPTIONS[name]
    variable = f"FAULTGUARD_{name.upper()}"
    text = os.environ.get(variable)
    if given is None and text is None:
        return default
    source = name if given is not None else variable
    value = given if given is not None else _parse(kind, source, str(text))
    return check_option(name, value, source)


def check_option(name: str, value: Any, source: str) -> Any:
    """A value that an option takes, or a `UsageError` that says what it takes."""
    if name == "max_failures":
        return check_max_failures(value, source)
    if name == "run":
        return check_run_name(value, source)
    if name == "resume":
        if value not in RESUMES:
            raise UsageError(f"{source}={value!r} is refused; it takes one of {', '.join(map(repr, RESUMES))}")
        return value
    if name in {"heartbeat_interval", "heartbeat_timeout"}:
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < _DAY_S:
            msg = f"{source}={value!r} is refused; it takes seconds, more than 0 and less than a day"
            raise UsageError(msg)
        return float(value)
    if name in _OR_NONE:
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < _DAY_S:
            msg = f"{source}={value!r} is refused; it takes seconds, less than a day: {_OR_NONE[name]}"
            raise UsageError(msg)
        return float(value)
    if not isinstance(value, bool):
        msg = f"{source}={value!r} is refused; it takes True or False"
        raise UsageError(msg)
    return value


def check_max_failures(value: Any, source: str = "max_failures") -> int:
    """How many failures are survived.

    Raises:
        UsageError: it is not an int, or below -1.
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < -1:
        msg = f"{source}={value!r} is refused; it takes the number of failures to survive: 0 for none, -1 for any number"
        raise UsageError(msg)
    return value


def _parse(kind: type, source: str, text: str) -> Any:
    try:
        if kind is bool:
            return {"1": True, "true": True, "0": False, "false": False}[text.lower()]
        return kind(text)
    except (KeyError, ValueError):
        msg = f"{source}={text!r} in the environment is refused; it takes a value of type {kind.__name__}"
        raise UsageError(msg) from None


def new_settings(checkpoint_dir: str | os.PathLike[str] | None, *, run: str | None = None, **options: Any) -> Settings:
    """Settings of a run of this driver, without instance and epoch where it is named; makes and tests its store.

    Raises:
        UsageError: an option, or the place of the checkpoints, cannot work.
        CheckpointStoreError: the store cannot be written.
    """
    values = {name: option(name, options.get(name)) for name in _OPTIONS if name not in _OF_NAMED_RUNS}
    if values["heartbeat_timeout"] <= values["heartbeat_interval"]:
        msg = (
            f"heartbeat_timeout={values['heartbeat_timeout']} must be more than heartbeat_interval={values['heartbeat_interval']}; "
            f"the usual factor is 10"
        )
        raise UsageError(msg)
    directory = resolve_checkpoint_dir(checkpoint_dir)
    store = open_store(directory)
    now = dt.datetime.now().astimezone()
    return Settings(
        run=run or f"{UNNAMED}{now:%Y%m%dT%H%M%S}-{secrets.token_hex(3)}",
        checkpoint_dir=directory,
        store_id=store_id(store),
        job_id=_ray.job_id(),
        **values,
    )


def check_run_name(run: object, source: str = "run") -> str:
    """The name of a run: any text that a worker id may be, but for the folders that have another meaning.

    Raises:
        UsageError: it is not one.
    """
    try:
        name = check_worker_id(run)
    except UsageError as error:
        raise UsageError(str(error).replace("worker_id", source)) from None
    if name in RESERVED or name.startswith(UNNAMED):
        raise UsageError(f"{source}={name!r} is refused: that folder of a checkpoint directory has another meaning; choose another name")
    return name


def resolve_checkpoint_dir(given: str | os.PathLike[str] | None) -> str:
    """The place of the checkpoints, absolute on this machine.

    Raises:
        UsageError: it is no directory, or lies where Ray keeps its sessions, and would be cleaned away with them.
    """
    variable = "FAULTGUARD_CHECKPOINT_DIR"
    source = "checkpoint_dir" if given is not None or variable not in os.environ else variable
    chosen = given if given is not None else os.environ.get(variable, "checkpoints")
    text = os.fspath(chosen) if isinstance(chosen, (str, os.PathLike)) else ""
    if isinstance(text, str) and "://" in text:
        return text
    path = _absolute(text)
    if path is None:
        msg = f"{source}={chosen!r} is refused; it takes a directory, such as {source}='/shared/checkpoints'"
        raise UsageError(msg)
    parts = path.resolve().parts
    if any(part.startswith("session_") and _is_ray_session(Path(*parts[: index + 1])) for index, part in enumerate(parts)):
        msg = (
            f"{source}={text!r} is {path}, inside a session directory of Ray (`ray job submit` runs scripts there), which goes "
            f"with the cluster; give an absolute path outside of it"
        )
        raise UsageError(msg)
    return str(path)


def _absolute(text: object) -> Path | None:
    """A directory as an absolute path; None where the text names none."""
    if not isinstance(text, str) or not text or "\0" in text:
        return None
    try:
        return Path(os.path.abspath(Path(text).expanduser()))  # noqa: PTH100 - a symlink may lead elsewhere on another node
    except RuntimeError:  # `~` of a user that does not exist
        return None


def _is_ray_session(path: Path) -> bool:
    """Whether `path` is a session directory of Ray."""
    return (path / "sockets").exists() or (path / "runtime_resources").exists() or path.name == "session_latest"


def checked_store(settings: Settings) -> Store:
    """The run's store as this process sees it; the same object every time.

    Raises:
        CheckpointStoreError: it is not there.
        OtherStoreError: it is not the store that the driver chose.
    """
    return _checked_store(settings.checkpoint_dir, settings.store_id)


@functools.lru_cache(maxsize=16)
def _checked_store(checkpoint_dir: str, expected: str) -> Store:
    store = open_store(checkpoint_dir, create=False)
    found = store_id(store, create=False)
    if found != expected:
        msg = (
            f"checkpoint store {store.url!r} is another store on this node (id {found[:8]}) than on the driver's (id {expected[:8]}): the "
            f"directory is not shared between the nodes. Give checkpoint_dir a path on a file system that all nodes share, or an object "
            f"store, or use one node"
        )
        raise OtherStoreError(msg)
    return store
