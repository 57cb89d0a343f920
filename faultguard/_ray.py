"""Everything that faultguard asks of Ray beyond `.remote()`; all private Ray APIs live here.

Facts behind it were measured on Ray 2.60 and are pinned by `tests/test_ray_facts.py`.
"""

from __future__ import annotations

import concurrent.futures
import functools
import uuid
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import ray

from faultguard.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

__all__ = [
    "NAMESPACE",
    "UNREACHABLE",
    "Identity",
    "LateError",
    "LostError",
    "alive_nodes",
    "cancel",
    "death_of",
    "draining_nodes",
    "function_and_options",
    "get_within",
    "has_died",
    "identity",
    "is_actor_class",
    "is_alive",
    "is_done",
    "is_driver",
    "is_options_wrapper",
    "is_ready",
    "is_ref",
    "is_remote_function",
    "job_is_over",
    "kv_get",
    "kv_note",
    "kv_put",
    "needs_of_task",
    "node_id",
    "node_with_room",
    "options_at_submission",
    "ordered",
    "outcome_of",
    "ready_refs",
    "refuse_client_mode",
    "result_or_none",
    "run_on_node",
    "run_there",
    "session_dir",
    "session_name",
    "was_terminated",
]

NAMESPACE = "faultguard"
READY_S = 30.0  # for a value that is there
_KV_NAMESPACE = b"faultguard"


@dataclass(frozen=True, slots=True)
class Identity:
    """What Ray calls the work of this thread. Only right on the thread that runs the task: capture it there."""

    job_id: str
    node_id: str
    task_id: str
    attempt: int
    task_name: str
    function_name: str
    in_actor: bool = False
    ray_worker: str = ""
    home_id: str = ""  # of the node where the task waits that runs on this one
    is_guess: bool = False  # `attempt` is how often the actor was started again: the call may be a first one


def is_ready() -> bool:
    """Whether this process is connected to Ray."""
    return bool(ray.is_initialized())


def start_where_ray_would() -> None:
    """Start Ray, or connect to it, as a plain `.remote()` does where nobody called `ray.init()` (not with `RAY_ENABLE_AUTO_CONNECT=0`)."""
    start: Any = ray._private.auto_init_hook.auto_init_ray  # noqa: SLF001 - public calls do it in passing only
    start()


def is_driver() -> bool:
    """Whether this process is a driver, not a worker of Ray's."""
    return bool(ray._private.worker.global_worker.mode != ray._private.worker.WORKER_MODE)  # noqa: SLF001 - no public name


def job_id() -> str:
    """The job that this process, or its task, belongs to."""
    return str(ray.get_runtime_context().get_job_id())


def identity() -> Identity:
    """The identity of the running task, or of the driver (attempt 0)."""
    context = ray.get_runtime_context()
    worker: Any = ray._private.worker.global_worker  # noqa: SLF001 - the attempt number has no public name
    in_task = worker.mode == ray._private.worker.WORKER_MODE  # noqa: SLF001
    of_job, on_node, ray_worker = _of_worker() if in_task else _of_process()
    return Identity(
        job_id=of_job,
        node_id=on_node,
        task_id=(context.get_task_id() if in_task else None) or f"driver-{uuid.uuid4().hex}",  # each block there is new work
        attempt=worker.core_worker.get_current_task_attempt_number() if in_task else 0,
        task_name=(context.get_task_name() if in_task else None) or "driver",
        function_name=(context.get_task_function_name() if in_task else None) or "",
        in_actor=in_task and context.get_actor_id() is not None,
        ray_worker=ray_worker,
    )


def _of_process() -> tuple[str, str, str]:
    """Job, node and worker id. A driver may connect to another cluster, which gives it others."""
    context = ray.get_runtime_context()
    return job_id(), context.get_node_id(), context.get_worker_id()


@functools.lru_cache(maxsize=1)
def _of_worker() -> tuple[str, str, str]:
    """The same of a worker of Ray's, which has them for its life."""
    return _of_process()


def ordered(identity: Identity) -> Identity:
    """The same, where it is that of a method of an async actor: which attempt that is Ray does not tell a coroutine.

    It repeats a call when it has started the actor again, so how often it has done that orders the attempts as well. May ask Ray's head.
    """
    worker: Any = ray._private.worker.global_worker  # noqa: SLF001 - no public name
    if not identity.in_actor or not worker.core_worker.current_actor_is_asyncio():
        return identity
    restarts = _restarts(ray.get_runtime_context().get_actor_id())
    return replace(identity, attempt=restarts, is_guess=True)


@functools.lru_cache(maxsize=1)
def _restarts(actor_id: str) -> int:
    """How often the actor of this process had been started again when it asked first: the next start is another process."""
    return int(ray._private.state.actors(actor_id)["NumRestarts"])  # noqa: SLF001 - no public name


def runs_several() -> bool:
    """Whether this process may run other work than one task: a driver, and an actor whose methods run beside one another."""
    worker: Any = ray._private.worker.global_worker  # noqa: SLF001 - no public name
    if worker.mode != ray._private.worker.WORKER_MODE:  # noqa: SLF001
        return True
    core = worker.core_worker
    return bool(core.current_actor_is_asyncio() or core.current_actor_max_concurrency() > 1)


def node_id() -> str:
    """Of the node that this process belongs to; on any thread."""
    return str(ray.get_runtime_context().get_node_id())


def session_name() -> str:
    """The cluster: job ids begin anew with each one."""
    node: Any = ray._private.worker._global_node  # noqa: SLF001 - the public name came after Ray 2.50
    return str(node.session_name)


def session_dir() -> str:
    """Ray's directory of this session on this node."""
    node: Any = ray._private.worker._global_node  # noqa: SLF001 - no public name
    return str(node.get_session_dir_path())


def kv_put(key: str, value: bytes) -> None:
    """Put a value into the cluster's key-value store, over an older one."""
    from ray.experimental.internal_kv import _internal_kv_put

    _internal_kv_put(key.encode(), value, overwrite=True, namespace=_KV_NAMESPACE)


def kv_note(key: str) -> bool:
    """Leave a note in the cluster: whether it was there before."""
    from ray.experimental.internal_kv import _internal_kv_put

    return bool(_internal_kv_put(key.encode(), b"noted", overwrite=False, namespace=_KV_NAMESPACE))


def kv_get(key: str, wait_s: float | None = None) -> bytes | None:
    """A value from the cluster's key-value store. `wait_s`: how long that may take; None: as long as Ray waits for its head."""
    from ray.experimental.internal_kv import internal_kv_get_gcs_client

    client: Any = internal_kv_get_gcs_client  # untyped; the function that gets takes no timeout
    value: bytes | None = client().internal_kv_get(key.encode(), _KV_NAMESPACE, timeout=wait_s)
    return value


def job_is_over(job_id: str) -> bool:
    """Whether Ray's job table says that the job has ended. A job that the table does not know is not over."""
    jobs = ray._private.state.jobs()  # type: ignore[no-untyped-call]  # noqa: SLF001 - the public State API needs the dashboard
    return any(job["JobID"] == job_id and bool(job["IsDead"]) for job in jobs)


def draining_nodes() -> frozenset[str]:
    """Ids of the nodes that are being drained: soon they are taken away, and Ray starts nothing new there."""
    return frozenset(ray._private.state.state.get_draining_nodes())  # noqa: SLF001 - no public name


def alive_nodes() -> list[str]:
    """Ids of the nodes that Ray takes for alive."""
    nodes: Any = ray.nodes  # type: ignore[attr-defined, unused-ignore] # Ray left it unannotated
    return [node["NodeID"] for node in nodes() if node["Alive"]]


def has_died(actor: Any) -> bool:
    """Whether an actor is over, and not to be started again."""
    info = ray._private.state.actors(actor._actor_id.hex())  # noqa: SLF001 - as above
    return bool(info and info["State"] == "DEAD")


def death_of(ray_worker: str) -> str:
    """What a worker process of Ray's died of: "oom", "cancelled" (by force), "crash" for all else; empty: not known to be dead."""
    from ray.core.generated import common_pb2, gcs_pb2

    tables: Any = gcs_pb2  # generated, and not typed
    kinds: Any = common_pb2
    accessor: Any = ray._private.state.state._connect_and_get_accessor()  # noqa: SLF001 - the public State API needs the dashboard
    data = accessor.get_worker_info(ray.WorkerID.from_hex(ray_worker))
    worker: Any = tables.WorkerTableData.FromString(data) if data is not None else None
    if worker is None or worker.is_alive:
        return ""
    if worker.exit_type == kinds.NODE_OUT_OF_MEMORY:
        return "oom"
    forced = worker.exit_type == kinds.INTENDED_USER_EXIT and "ray.cancel" in worker.exit_detail
    return "cancelled" if forced else "crash"


def is_remote_function(candidate: object) -> bool:
    """Whether it is what `@ray.remote` makes of a function."""
    return isinstance(candidate, ray.remote_function.RemoteFunction)


def is_actor_class(candidate: object) -> bool:
    """Whether it is what `@ray.remote` makes of a class."""
    return isinstance(candidate, ray.actor.ActorClass)


def is_options_wrapper(candidate: object) -> bool:
    """Whether it is what `.options()` of a remote function gives: the function cannot be got back from it."""
    return type(candidate).__name__ == "FuncWrapper"


def is_ref(candidate: object) -> bool:
    """Whether Ray must see this argument itself: a reference to an object or an actor."""
    return isinstance(candidate, (ray.ObjectRef, ray.actor.ActorHandle, ray.ObjectRefGenerator))


def function_and_options(remote_function: Any) -> tuple[Callable[..., Any], dict[str, Any]]:
    """The function under `@ray.remote` and the options given there."""
    function: Callable[..., Any] = remote_function._function  # noqa: SLF001 - no public name
    options: dict[str, Any] = dict(remote_function._default_options)  # noqa: SLF001
    return function, options


def options_at_submission(invocation: Callable[..., Any]) -> dict[str, Any] | None:
    """Ray's `max_retries` as it stands in the call that `__ray_invocation_decorator__` wraps; None where it cannot be read."""
    import inspect

    try:
        variables = inspect.getclosurevars(invocation).nonlocals
    except (TypeError, ValueError):
        return None
    return dict(variables) if "max_retries" in variables else None


def was_terminated(error: SystemExit) -> bool:
    """Whether Ray raised this `SystemExit` because the process got SIGTERM, not the user's code."""
    return "ray_terminate_msg" in vars(error)


UNREACHABLE = (ray.exceptions.RayActorError, ray.exceptions.GetTimeoutError, ray.exceptions.RaySystemError)


def get_within(ref: Any, seconds: float) -> Any:
    """`ray.get` with a bound. On the main thread of a task it lends the CPU to others while it waits.

    In an async actor, where only threads of ours wait so, it is done without: Ray would warn its user of a blocked event loop.

    Raises:
        GetTimeoutError: it takes longer.
    """
    core: Any = getattr(ray._private.worker.global_worker, "core_worker", None)  # noqa: SLF001 - no public name
    if core is None or not core.current_actor_is_asyncio():
        return ray.get(ref, timeout=max(seconds, 0.0))
    try:
        return ref.future().result(max(seconds, 0.0))
    except concurrent.futures.TimeoutError as error:
        raise ray.exceptions.GetTimeoutError(f"not within {seconds:.1f} s") from error


def run_on_node(function: Callable[..., Any], node_id: str, *args: Any) -> Any:
    """Start `function(*args)` as a task on that node and no other; it takes no CPU. Gives the reference."""
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    strategy = NodeAffinitySchedulingStrategy(node_id, soft=False)
    task: Any = ray.remote(num_cpus=0, max_retries=0)(function)
    return task.options(scheduling_strategy=strategy).remote(*args)


def is_alive(node_id: str) -> bool:
    """Whether Ray takes a node for alive."""
    return node_id in alive_nodes()


def needs_of_task() -> dict[str, float]:
    """The resources that the running task was given."""
    context: Any = ray.get_runtime_context()
    needs: dict[str, float] = context.get_assigned_resources()
    return {name: amount for name, amount in needs.items() if not name.startswith("node:")}


def node_with_room(not_on: set[str]) -> str:
    """The node that has most CPUs free, of those that have room for the running task now and are not being drained; empty: none."""
    state: Any = ray._private.state  # noqa: SLF001 - no public name
    if ray.get_runtime_context().get_placement_group_id() is not None:  # it says where its tasks run
        return ""
    try:
        free: dict[str, dict[str, float]] = state.available_resources_per_node()
        shunned = not_on | draining_nodes()
    except ray.exceptions.RayError:
        return ""
    needs = needs_of_task()
    able = [(has.get("CPU", 0.0), node) for node, has in free.items() if all(has.get(name, 0.0) >= needs[name] for name in needs)]
    return max((candidate for candidate in able if candidate[1] not in shunned), default=(0.0, ""))[1]


def run_there(function: Callable[..., Any], node_id: str, needs: Mapping[str, float], name: str, *args: Any) -> Any:
    """Start `function(*args)` as a task of that name on that node; it fails at once where its needs are not free. Gives the reference."""
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    named = {"CPU": "num_cpus", "GPU": "num_gpus", "memory": "memory"}
    options: dict[str, Any] = {"num_cpus": 0, **{named[name]: amount for name, amount in needs.items() if name in named}}
    options["resources"] = {name: amount for name, amount in needs.items() if name not in named}
    options["scheduling_strategy"] = NodeAffinitySchedulingStrategy(node_id, soft=False, _fail_on_unavailable=True)
    task: Any = ray.remote(max_retries=0, **options)(function)
    return task.options(name=name).remote(*args)


class LostError(Exception):
    """A task did not come to an end of its own."""


class LateError(Exception):
    """A task has not begun in time; it may yet begin."""


def outcome_of(ref: Any, begins_s: float, begun: Callable[[], bool | None]) -> Any:
    """Give or raise what comes of the only value of a task, as if it were this one: cancelled, so is this one, and the other way round.

    Args:
        ref: of the value.
        begins_s: so long it may take to begin.
        begun: asked then.

    Raises:
        LostError: it could not start, or its process died.
        LateError: it has not begun, as far as is known.
    """
    try:
        if ray.wait([ref], timeout=begins_s)[0] or begun():
            return ray.get(ref)
    except ray.exceptions.RayTaskError as error:
        if type(error.cause) is ray.exceptions.TaskCancelledError:
            raise KeyboardInterrupt(str(error.cause)) from None
        raise error.cause from error
    except ray.exceptions.TaskCancelledError as error:
        raise KeyboardInterrupt(str(error)) from None
    except ray.exceptions.RayError as error:
        raise LostError(str(error)) from error
    except BaseException:
        ray.cancel(ref)
        raise
    raise LateError


def cancel(ref: Any) -> None:
    """Ask Ray to cancel a task; should it run all the same, it runs."""
    ray.cancel(ref)


def is_done(ref: Any) -> bool:
    """Whether a task has ended, however."""
    return bool(ray.wait([ref], timeout=0)[0])


def result_or_none(ref: Any) -> Any:
    """The value of a task that has ended; None: it has not, or not well."""
    if not is_done(ref):
        return None
    try:
        return get_within(ref, READY_S)
    except ray.exceptions.RayError:
        return None


def ready_refs(value: Any, returns: Any) -> tuple[Any] | None:
    """What `.remote()` gives for a value that is known already, in a tuple; None where Ray has to say what is wrong with `num_returns`.

    Args:
        value: of the task.
        returns: its `num_returns`.
    """
    if returns == 1 or returns is None:
        return (ray.put(value),)
    if returns == 0:
        return (None,)
    if isinstance(returns, int) and isinstance(value, (tuple, list)) and len(value) == returns:
        return ([ray.put(item) for item in value],)
    return None


def refuse_client_mode() -> None:
    """Refuse a `ray://` connection, where the driver is not on the cluster."""
    if ray.util.client.ray.is_connected():  # type: ignore[no-untyped-call] # untyped in Ray
        msg = "faultguard does not work through a ray:// connection yet; submit the script as a job, or start it on a node of the cluster"
        raise UsageError(msg)
