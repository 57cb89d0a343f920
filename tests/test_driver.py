"""What a driver leaves behind and says, what a worker process keeps, and what a record may not do."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import pytest
import ray

import faultguard
from faultguard._core.records import Record, decode_record, encode_record
from faultguard._manager import find, manager_name
from faultguard._session import current_settings
from tests.tasks import NOWAIT, Trace, hang, manager_pid, open_files, our_threads, records, wait_until

if TYPE_CHECKING:
    from faultguard import Run
    from tests.conftest import StartRun

pytestmark = pytest.mark.ray

DRIVER = """
import logging, os, signal, sys
import ray, faultguard
{setup}
ray.init(address="local", _temp_dir=sys.argv[1], num_cpus=2, include_dashboard=False{options})

@faultguard.recoverable(max_failures=1, backoff=faultguard.Backoff(initial=0))
@ray.remote
def work(worker_id, die):
    ckpt = faultguard.current()
    for batch in ckpt.batches(range(6)):
        if batch == 4 and (die == "always" or (die == "once" and ckpt.attempt == 1)):
            raise ConnectionError("reset")
        ckpt.advance(wait=True)
    return ckpt.attempt

{body}
"""
GOOD_AND_BAD = """
print(faultguard.get([work.remote("a", "never"), work.remote("b", "once")]))
try:
    faultguard.get(work.remote("c", "always"))
except ConnectionError as error:
    print(len(error.failures))
"""


def drive(
    tmp_path: Path, ray_temp_dir: str, body: str, *, setup: str = "", options: str = "", code: int = 0
) -> subprocess.CompletedProcess[str]:
    """Run a driver of its own to its end."""
    script = tmp_path / "driver.py"
    script.write_text(DRIVER.format(setup=setup, options=options, body=body), encoding="utf-8")
    command = [sys.executable, str(script), ray_temp_dir]
    done = subprocess.run(command, capture_output=True, text=True, timeout=150, check=False, cwd=tmp_path)
    assert done.returncode == code, done.stdout + done.stderr
    return done


def test_a_driver_that_ends_well(tmp_path: Path, ray_temp_dir: str) -> None:
    """Checkpoints of what completed go, records stay, what failed is kept with its path; the terminal says just that."""
    done = drive(tmp_path, ray_temp_dir, GOOD_AND_BAD)
    checkpoints = tmp_path / "checkpoints"
    assert "[1, 2]\n" in done.stdout
    assert "2\n" in done.stdout
    ours = [line for line in done.stderr.splitlines() if line.startswith("faultguard: ")]
    name = ours[0].split("'")[1]
    assert ours == [
        f"faultguard: run '{name}' starts. Store {checkpoints}.",
        f"faultguard: run '{name}' ended: 2 completed, 1 failures survived, 0 quarantined, 1 not completed.",
        f"faultguard: kept {checkpoints}/{name}/work/c",
    ]
    assert [path.name for path in (checkpoints / name / "work").iterdir()] == ["c"]
    (kept,) = (checkpoints / "runs").iterdir()
    workers = {worker["worker_id"]: worker for worker in json.loads(kept.read_text("utf-8"))["workers"]}
    assert {worker: fields["status"] for worker, fields in workers.items()} == {"a": "completed", "b": "completed", "c": "failed"}
    assert workers["b"]["failures"][0]["message"] == "ConnectionError('reset')"


def test_one_warning_per_failure_and_resume(tmp_path: Path, ray_temp_dir: str) -> None:
    """A worker that failed once makes one line on the driver's terminal, ids first, and no other."""
    done = drive(tmp_path, ray_temp_dir, 'faultguard.get(work.remote("b", "once"))')
    warnings = [line for line in (done.stdout + done.stderr).splitlines() if "faultguard: 'work/" in line]
    assert len(warnings) == 1
    assert "'work/b' attempt 2 of 2 resumes at batch 4 of 6: attempt 1 failed there" in warnings[0]
    assert warnings[0].endswith("s ago with ConnectionError('reset').")


def test_a_driver_that_fails_keeps_everything(tmp_path: Path, ray_temp_dir: str) -> None:
    """After an exception that nobody caught, the checkpoints of completed workers are there for a look, too."""
    body = 'faultguard.get([work.remote("a", "never"), work.remote("c", "always")])'
    drive(tmp_path, ray_temp_dir, body, code=1)
    (run,) = (path for path in (tmp_path / "checkpoints").iterdir() if path.name.startswith("unnamed"))
    assert sorted(path.name for path in (run / "work").iterdir()) == ["a", "c"]


def test_events_are_json_under_rays_json_logging(tmp_path: Path, ray_temp_dir: str) -> None:
    """Every field of an event is a key of its own, at the top level of the line that Ray writes."""
    setup = "config = ray.LoggingConfig(encoding='JSON', log_level='INFO')"
    done = drive(tmp_path, ray_temp_dir, 'faultguard.get(work.remote("b", "once"))', setup=setup, options=", logging_config=config")
    lines = [line[line.index("{") :] for line in (done.stdout + done.stderr).splitlines() if "faultguard.attempt_resumed" in line]
    (event,) = [json.loads(line) for line in lines]
    assert event["event"] == "faultguard.attempt_resumed"
    expected = {"task": "work", "worker": "b", "attempt": 2, "batch": 4, "cause": "exception", "failed_batch": 4}
    assert {key: event[key] for key in expected} == expected
    assert {"run", "token", "node", "pid", "failed_pid", "wait_s", "ago_s"} <= set(event)
    assert event["message"].startswith("faultguard: 'work/b' attempt 2 of 2 resumes")


# --- what a process keeps -------------------------------------------------------------------------------------------


@faultguard.recoverable(every=1)
@ray.remote(num_cpus=4)  # all of them: one process serves every call
def visit(n: int, beats: bool) -> tuple[int, list[str], dict[int, str]]:
    """Uses everything that leaves threads and files; says what there is of them while it runs."""
    import os

    from faultguard import _beater

    ckpt = faultguard.current()
    for _ in ckpt.batches(range(n)):
        ckpt.save_soon = None  # type: ignore[attr-defined] # a user's own attribute
    if beats:
        for client in _beater._clients.values():
            client.first = 0.0
            client.join()
        _beater._beater.wake()
        wait_until(lambda: all(client.beaten for client in _beater._clients.values()))
    return os.getpid(), our_threads(), open_files()


@ray.remote(num_cpus=4)
def look() -> tuple[int, list[str], dict[int, str]]:
    """The same, without the decorator."""
    import os

    return os.getpid(), our_threads(), open_files()


@pytest.mark.parametrize("beats", [False, True], ids=["short", "beating"])
def test_nothing_stays_in_a_process(run: Run, beats: bool) -> None:
    """After a hundred tasks on one process there is no thread and no file of ours in it; only those that last longer have one to beat."""
    before_pid, threads, _ = ray.get(visit.remote(3, beats), timeout=60)  # Ray connects it to the manager
    assert "faultguard-writer" in threads
    assert ("faultguard-beater" in threads) is beats
    _, _, before = ray.get(look.remote(), timeout=60)
    pids = {pid for pid, _, _ in ray.get([visit.remote(3, beats) for _ in range(100)], timeout=120)}
    assert pids == {before_pid}
    pid, _, after = wait_until(lambda: (found := ray.get(look.remote(), timeout=60)) and not found[1] and found)
    assert pid == before_pid
    ours = [path for path in after.values() if run.checkpoint_dir in path]
    assert not ours
    assert len(after) <= len(before) + 3  # Ray's own connections come and go


@faultguard.recoverable(every=1, max_failures=1, stall_timeout=0.5, backoff=NOWAIT)
@ray.remote(num_cpus=4)
def ends_badly(worker_id: str, trace: Trace) -> int:
    """Stalls, is cancelled, or fails for good, with every kind of thing open."""
    ckpt = faultguard.current()
    with faultguard.checkpointed(f"{worker_id} inside", stall_timeout=0.5) as block, ckpt.section("part", timeout=60):
        for _ in block.batches(range(3)):
            trace.note("batch", worker_id, attempt=ckpt.attempt, batch=0)
            if worker_id == "fails":
                raise ValueError("planned")
            if worker_id == "cancelled" or ckpt.attempt == 1:
                with ckpt.section("no limit", timeout=None) if worker_id == "cancelled" else contextlib.nullcontext():
                    hang()
    return os.getpid()


@ray.remote(num_cpus=4)
def look_closely() -> dict[str, Any]:
    """Everything that this library could have left in the process, and beside it."""
    from faultguard import _beater, _journal, _marks, _ray, _session, _watcher, _worker

    children = Path(f"/proc/self/task/{os.getpid()}/children").read_text("ascii").split()
    marks = Path(_ray.session_dir(), "faultguard").glob(f"{os.getpid()}-*")
    kept = (_worker.held_here, _beater._clients, _watcher._clients, _journal._writer._clients, _marks._said, _session.context())
    return {
        "threads": our_threads(),
        "children": children,
        "marks": list(marks),
        "kept": [each for each in kept if each],
        "pid": os.getpid(),
    }


def test_nothing_stays_of_what_ended_badly(start_run: StartRun, trace: Trace) -> None:
    """After a stall, a cancel and a failure for good the process is as it was, and the next task of it is not hit."""
    start_run(heartbeat_interval=0.2)
    pid = ray.get(look_closely.remote(), timeout=60)["pid"]
    assert ray.get(ends_badly.remote("stalls", trace), timeout=60) == pid
    with pytest.raises(ValueError, match="planned"):
        ray.get(ends_badly.remote("fails", trace), timeout=60)
    ref = ends_badly.remote("cancelled", trace)
    wait_until(lambda: trace.notes("batch", "cancelled"))
    faultguard.cancel("cancelled inside")
    with pytest.raises(ray.exceptions.TaskCancelledError):
        ray.get(ref, timeout=60)
    found = wait_until(lambda: (seen := ray.get(look_closely.remote(), timeout=60)) and not seen["threads"] and seen)
    assert found == {"threads": [], "children": [], "marks": [], "kept": [], "pid": pid}


def test_no_actor_stays_when_the_run_is_over(run: Run) -> None:
    """Tasks that beat have a manager; it goes with the run, and its process with it."""
    ray.get(visit.remote(1, True), timeout=60)
    name, pid = manager_name(current_settings()), manager_pid()
    assert name in {actor["name"] for actor in ray.util.list_named_actors(all_namespaces=True)}
    faultguard.shutdown()
    wait_until(lambda: name not in {actor["name"] for actor in ray.util.list_named_actors(all_namespaces=True)})
    wait_until(lambda: not Path(f"/proc/{pid}").exists())


def test_no_actor_for_short_tasks(run: Run) -> None:
    """Tasks that end before the first heartbeat start no manager, so none is left."""
    ray.get([visit.remote(1, False) for _ in range(5)], timeout=60)
    assert find(current_settings()) is None


# --- what a record may do -------------------------------------------------------------------------------------------

EXPLOITS = [
    {"py/object": "builtins.exec", "py/reduce": [{"py/function": "os.system"}, {"py/tuple": ["touch %s"]}]},
    {"$fg": "pickle", "v": "gASVIAAAAAAAAACMBXBvc2l4lIwGc3lzdGVtlJOUjAV0b3VjaJSFlFKULg=="},
    {"__reduce__": ["os.system", ["touch %s"]]},
]


@faultguard.recoverable(max_failures=1, backoff=NOWAIT)
@ray.remote
def leaves(worker_id: str, fail: bool) -> Any:
    """Saves a state; fails if it is told to."""
    ckpt = faultguard.current()
    for _ in ckpt.batches(range(2)):
        ckpt.state.setdefault("x", 1)
        ckpt.advance(wait=True)
    if fail:
        raise ArithmeticError
    return ckpt.state["x"]


@pytest.mark.parametrize("planted", EXPLOITS, ids=["jsonpickle", "tag", "reduce"])
def test_a_planted_pickle_never_executes(run: Run, tmp_path: Path, planted: dict[str, Any]) -> None:
    """Whoever can write a record with a right checksum can change values, and run nothing."""
    with pytest.raises(ArithmeticError):
        ray.get(leaves.remote("w", True), timeout=60)
    marker = tmp_path / "executed"
    folder = Path(run.checkpoint_dir) / run.name / "leaves" / "w"
    newest = records(run, "leaves", "w")[-1]
    state = json.dumps({"x": json.loads(json.dumps(planted).replace("%s", str(marker)))}).encode()
    _replace(folder / f"{newest.number:09d}.json", newest, state)
    again = leaves.remote("w", False)
    if "$fg" in planted:  # a tag that nobody knows is damage
        with pytest.raises(faultguard.CheckpointCorruptError):
            ray.get(again, timeout=60)
    else:
        assert isinstance(ray.get(again, timeout=60), dict)
    assert not marker.exists()


def _replace(path: Path, record: Record, state: bytes) -> None:
    """Put another state into a record, with a checksum that fits."""
    assert record.snapshot is not None
    fields = {name: getattr(record, name) for name in record.__struct_fields__}
    snapshot = msgspec.structs.replace(record.snapshot, state=msgspec.Raw(state))
    data = encode_record(Record(**{**fields, "snapshot": snapshot}))
    assert decode_record(data, record.number) is not None
    path.write_bytes(data)
