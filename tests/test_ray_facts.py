"""What `_ray.py` takes for granted about Ray: when a new version changes it, these tests say so, not a user's run."""

from __future__ import annotations

import os
import signal
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import pytest
import ray

from faultguard import _cancels, _ray
from faultguard._settings import Settings
from tests.tasks import stopped

if TYPE_CHECKING:
    from collections.abc import Callable

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_cluster")]


def test_attempt_number_grows_and_task_id_stays(tmp_path: Path) -> None:
    """Claims of one task are ordered by Ray's attempt number under one task id."""

    @ray.remote(max_retries=1)
    def die_once(marker: str) -> tuple[str, int, str]:
        me = _ray.identity()
        if not Path(marker).exists():
            Path(marker).write_text(f"{me.task_id} {me.attempt}", encoding="ascii")
            os.kill(os.getpid(), signal.SIGKILL)
        return me.task_id, me.attempt, me.function_name

    marker = tmp_path / "first"
    task_id, attempt, function_name = ray.get(die_once.remote(str(marker)))
    assert marker.read_text(encoding="ascii") == f"{task_id} 0"
    assert attempt == 1
    assert function_name.endswith("die_once")


def test_driver_and_worker_are_told_apart() -> None:
    """`init` belongs into the driver, and only there."""
    assert _ray.is_driver()
    assert not ray.get(ray.remote(_ray.is_driver).remote())


def test_key_value_store_carries_settings_to_tasks() -> None:
    """What the driver publishes, any task of the job reads; the newest value counts."""
    _ray.kv_put("facts", b"old")
    _ray.kv_put("facts", b"new")
    assert ray.get(ray.remote(lambda: (_ray.kv_get("facts"), _ray.kv_get("absent"))).remote()) == (b"new", None)


def test_a_key_value_store_that_does_not_answer_is_waited_for_as_long_as_one_likes() -> None:
    """What has to be known at once is not known then, and the work goes on."""
    node: Any = ray._private.worker._global_node
    head = node.all_processes["gcs_server"][0].process.pid
    with stopped(head), pytest.raises(Exception, match=r"(?i)timed out|deadline"):
        _ray.kv_get("facts", 0.2)
    assert _ray.kv_get("absent", 60.0) is None


def test_a_head_that_is_slow_hides_no_cancel() -> None:
    """A task that begins waits for the answer: nothing else would tell it, if it is over before its first heartbeat."""
    node: Any = ray._private.worker._global_node
    head = node.all_processes["gcs_server"][0].process.pid
    settings = Settings(run="slow-head", checkpoint_dir="/c", store_id="1", job_id=_ray.identity().job_id)
    _cancels.note_cancel(msgspec.structs.replace(settings, cancels=1), "w")
    with stopped(head):
        threading.Timer(3.0, os.kill, (head, signal.SIGCONT)).start()
        assert _cancels.is_cancelled(settings, "w")


def test_job_of_this_driver_is_not_over() -> None:
    """The manager leaves when its job is over, and not before; a job that nobody knows is not over."""
    assert not _ray.job_is_over(_ray.identity().job_id)
    assert not _ray.job_is_over("ffffffff")


def test_max_retries_can_be_read_at_submission() -> None:
    """Below `@ray.remote`, too few retries are refused when the task is submitted."""
    seen: list[Any] = []

    def read(invocation: Callable[..., Any]) -> Callable[..., Any]:
        seen.append(_ray.options_at_submission(invocation))
        return invocation

    def work() -> int:
        return 1

    work.__ray_invocation_decorator__ = read  # type: ignore[attr-defined] # Ray's hook
    assert ray.get(ray.remote(max_retries=7)(work).remote()) == 1
    assert seen[0]["max_retries"] == 7


def test_function_and_options_of_a_remote_function() -> None:
    """The decorator above `@ray.remote` gets the function and its options back."""

    def work() -> None: ...

    function, options = _ray.function_and_options(ray.remote(num_cpus=2)(work))
    assert function is work
    assert options["num_cpus"] == 2
    assert _ray.is_options_wrapper(ray.remote(work).options(num_cpus=1))
    assert not _ray.is_options_wrapper(ray.remote(work))


def test_sigterm_is_marked(tmp_path: Path) -> None:
    """A task that gets SIGTERM sees Ray's `SystemExit`, which differs from a user's."""

    @ray.remote(max_retries=0)
    def wait(path: str) -> None:
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            while True:
                pass
        except SystemExit as error:
            Path(path).write_text(str(_ray.was_terminated(error)), encoding="ascii")
            raise

    marker = tmp_path / "seen"
    with pytest.raises(ray.exceptions.WorkerCrashedError):
        ray.get(wait.remote(str(marker)), timeout=60)
    assert marker.read_text(encoding="ascii") == "True"
    assert not _ray.was_terminated(SystemExit(1))


def test_who_waits_with_a_bound_lends_its_cpus() -> None:
    """Or an attempt that waits for one on another node would keep everybody else of its own node waiting."""

    def waits() -> bool:
        ask: Any = ray.cluster_resources
        inner: Any = ray.remote(num_cpus=ask()["CPU"])(lambda: True)
        return bool(ray.wait([inner.remote()], timeout=60)[0])

    assert ray.get(ray.remote(num_cpus=1)(waits).remote(), timeout=90)
