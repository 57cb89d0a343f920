"""The `RecoveryManager` actor: it listens to heartbeats, keeps the logs of workers that register with it, and shows who lives.

It grants nothing to decorated tasks and fences nothing: their logs do. Its death costs detection speed, and nothing else.
"""

from __future__ import annotations

import asyncio
import functools
import logging
import math
import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

import ray

from faultguard import _events, _ray
from faultguard._cancels import cancels_of
from faultguard._core.pace import Pace
from faultguard._core.records import Outcome
from faultguard._core.silence import Verdict
from faultguard._prober import Prober
from faultguard._settings import PROTOCOL, Settings, check_max_failures, decode_settings, option, resolve_checkpoint_dir
from faultguard._watch import LiveView
from faultguard.errors import ManagerUnavailableError, UsageError
from faultguard.storage import open_store, store_id

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from ray.actor import ActorHandle

    from faultguard._views import WorkerState

__all__ = ["RecoveryManager", "RecoveryManagerActor", "ask", "end", "find", "find_or_make", "forget", "known", "manager_name"]

R = TypeVar("R")
STORE_THREADS = 32
LOOKUP_S = 2.0  # how long a heartbeat may wait for the store; then it is answered without
JOB_CHECK_S = 3.0
MAX_PAUSES = 5_000  # each costs the actor 50 KB of stack
MAX_CALLS = 1_000
MAX_BEATS = 1_000  # calls at once that never wait for the store
READY_S = 30.0
RETRY_S = 0.2
HEAD_NODE = "node:__internal_head__"
MAX_RESTARTS = 20  # by Ray, preemptions excepted: one whose class went with its job would be started about once a second for ever


class RecoveryManagerActor:
    """What `RecoveryManager.remote()` makes: call its methods with `.remote()`, and `await` or `ray.get` what they give.

    Each registered worker has a log under `<checkpoint_dir>/manager/`, so that neither the death of this actor nor that of the
    driver loses anything: Ray restarts the actor, and it goes on with what the logs say. A worker that registers gets a token.
    Passing it with later calls keeps an attempt that was replaced from doing harm; without it the caller counts as the newest.
    """

    def __init__(self, settings: bytes, name: str = "") -> None:
        """Made by `RecoveryManager.remote` and `faultguard.manager`.

        Args:
            settings: of the store and the limits, encoded.
            name: of the actor that a job shares; it ends itself with the job. Empty: it belongs to who made it.
        """
        from faultguard._registry import Registry  # only the actor needs it, and every worker process imports this module

        self._settings = decode_settings(settings)
        self._name = name
        self._actor_id = ray.get_runtime_context().get_actor_id() or ""
        self._registry = Registry(self._settings, self._actor_id)
        self._live = LiveView(self._settings.heartbeat_timeout, time.monotonic(), self._settings.heartbeat_interval)
        self._pace = Pace(self._settings.heartbeat_interval, time.monotonic(), time.process_time())
        self._calls = 0
        self._pool = ThreadPoolExecutor(STORE_THREADS, "faultguard-store")  # the store may hang; beats are answered all the same
        self._looking: dict[str, asyncio.Future[bool]] = {}
        self._pauses = 0
        self._monitor: _Ticker | None = None
        self._prober = Prober(self._settings.heartbeat_timeout)
        self._watched = time.monotonic()  # when it last looked: it may be frozen before its first look, too
        self._follows = False  # another manager of this name, or another process of this one, which has heard who does not beat any more
        if name:
            self._follows = _ray.kv_note(f"manager:{name}")
            period_s = min(self._settings.heartbeat_interval, JOB_CHECK_S)
            for worker_id, number in cancels_of(self._settings).items():
                self._live.cancel(number, worker_id)
            self._live.check(time.monotonic(), period_s)  # from here on its own absence is nobody's silence
            _Ticker("faultguard-watch", period_s, functools.partial(self._watch, period_s)).start()
        if _ray.kv_get(self._monitoring_key):  # this process replaces one that was monitoring
            self._pool.submit(self._resume_monitoring)

    # --- registered workers ---

    async def start_monitoring(self) -> None:
        """From now on mark registered workers failed that send no heartbeat for `heartbeat_timeout`; again: nothing changes.

        Looks every `heartbeat_interval`. Time in which the manager itself did not run is nobody's silence.
        """
        self._begin_monitoring()
        await self._in_thread(_ray.kv_put, self._monitoring_key, b"on")

    async def stop_monitoring(self) -> None:
        """End what `start_monitoring` began; again: nothing changes."""
        if self._monitor is not None:
            self._monitor.stop()
            self._monitor = None
            self._registry.tick(math.inf)
        await self._in_thread(_ray.kv_put, self._monitoring_key, b"")

    async def register_worker(self, worker_id: str, initial_state: dict[str, Any] | None = None) -> int:
        """Begin an attempt of a worker. If it was registered before, that attempt is replaced, and its status is "recovered".

        An attempt that is replaced without having ended counts as a failure.

        Args:
            worker_id: any text of up to 512 bytes.
            initial_state: shown as its `current_batch` until it says more; not a checkpoint.

        Returns:
            The token of the attempt; greater than that of any earlier one.

        Raises:
            MaxFailuresExceeded: it has failed more than `max_failures` times.
        """
        call_id = ray.get_runtime_context().get_task_id() or ""
        with self._registry.calling(worker_id):
            return await self._in_thread(self._registry.register, worker_id, initial_state, call_id)

    @ray.method(concurrency_group="beats")
    async def heartbeat(self, worker_id: str, current_state: dict[str, Any] | None = None, token: int | None = None) -> bool:
        """Take a sign of life.

        Args:
            worker_id: a registered worker.
            current_state: its `current_batch`, or else its `batch_id`, is shown; it is not saved.
            token: what `register_worker` gave.

        Returns:
            Whether to go on. False only if the worker has ended (marked failed, too), was replaced by a later attempt (with a
            token), or was never registered. A store that is slow or away is no reason to stop.
        """
        known = self._registry.heartbeat(worker_id, current_state, token)
        if known is not None:
            return known
        looking = self._looking.get(worker_id)
        if looking is None:  # one at a time: a log that hangs must not take all the threads
            looking = self._looking[worker_id] = asyncio.ensure_future(self._in_thread(self._registry.look_up, worker_id))
            looking.add_done_callback(lambda _: self._looking.pop(worker_id, None))
        await asyncio.wait({looking}, timeout=LOOKUP_S)
        if looking.done() and not looking.result():
            return False
        return self._registry.heartbeat(worker_id, current_state, token) is not False

    async def save_checkpoint(self, worker_id: str, state: dict[str, Any], token: int | None = None) -> str:
        """Save a checkpoint of a worker. The newest three stay.

        Args:
            worker_id: a registered worker.
            state: a dict of plain values; it comes back with the same types.
            token: what `register_worker` gave.

        Returns:
            The absolute path of the checkpoint; it is durable.

        Raises:
            SupersededError: the token is not that of the newest attempt, or the worker has ended for good.
            CheckpointNotSerializableError: the state holds something that cannot be written; the text says where.
            CheckpointStoreError: it could not be written.
            UsageError: the worker was never registered.
        """
        if not isinstance(state, dict):
            raise UsageError(f"state of type {type(state).__name__!r} is refused; it takes a dict, such as {{'batch_id': 3}}")
        with self._registry.calling(worker_id):
            return str(await self._in_thread(self._registry.save, worker_id, state, token))

    async def load_checkpoint(self, worker_id: str) -> dict[str, Any] | None:
        """Read the newest checkpoint of a worker, whoever saved it, and whenever; None if there is none.

        Raises:
            CheckpointCorruptError: there are checkpoints, and no intact one.
            CheckpointStoreError: it could not be read.
        """
        state: dict[str, Any] | None = await self._in_thread(self._registry.load, worker_id)
        return state

    async def mark_worker_failed(self, worker_id: str) -> None:
        """End the current attempt of a worker as a failure, once: until it registers again its heartbeats are answered with False.

        Raises:
            UsageError: it was never registered.
        """
        await self._in_thread(self._registry.mark_failed, worker_id, "was marked failed")

    async def mark_worker_completed(self, worker_id: str, token: int | None = None) -> None:
        """Record that a worker is done: registered again, it begins afresh, with a new budget and without a checkpoint.

        Raises:
            SupersededError: the token is not that of the newest attempt, or the worker has ended already.
            UsageError: it was never registered.
        """
        with self._registry.calling(worker_id):
            await self._in_thread(self._registry.save, worker_id, None, token, Outcome("completed"))

    async def get_failed_workers(self) -> list[str]:
        """Name the workers under this directory whose newest attempt failed and was not followed by another."""
        states = await self._in_thread(self._registry.states)
        return [state.worker_id for state in states if state.status == "failed"]

    async def get_workers(self) -> list[WorkerState]:
        """Tell what all registered workers under this directory are doing, by id."""
        return await self._in_thread(self._registry.states)

    # --- decorated workers, and what faultguard itself asks ---

    @ray.method(concurrency_group="beats")
    async def hello(self, protocol: int, store: str, run: str) -> dict[str, Any]:
        """Say who this is, and in what it differs from what the caller takes it for."""
        ours = {"protocol": PROTOCOL, "store": self._settings.store_id, "run": self._settings.run}
        theirs = {"protocol": protocol, "store": store, "run": run}
        differences = [f"{key} {ours[key]!r}, asked for is {theirs[key]!r}" for key in ours if ours[key] != theirs[key]]
        return {"pid": os.getpid(), "differs": "; ".join(differences)}

    @ray.method(concurrency_group="beats")
    async def beat(self, beats: list[dict[str, Any]]) -> tuple[list[str], float]:
        """Take the beats of a process.

        Returns:
            For each "ok" or what its worker must know; in how many seconds to beat again.
        """
        self._calls += 1
        return self._live.beat(beats, time.monotonic(), time.time()), self._live.interval_s

    @ray.method(concurrency_group="beats")
    async def cancel(self, number: int, worker_id: str | None) -> None:
        """Cancel a decorated worker, or with None all, that was submitted before the driver's cancel of that number; it has noted that."""
        self._live.cancel(number, worker_id)

    @ray.method(concurrency_group="beats")
    async def last_beat(self, task: str, worker_id: str) -> dict[str, float | bool | None]:
        """Say for how long a worker has been silent, whether a probe doubts it, for how long this actor listens, and who was over."""
        return self._live.last_beat(task, worker_id, time.monotonic())

    @ray.method(concurrency_group="beats")
    async def live_workers(self) -> list[dict[str, Any]]:
        """Return the newest beat of each decorated worker, with `last_heartbeat`, `age_s`, `silent` and `final`."""
        return self._live.workers(time.monotonic())

    async def pause(self, seconds: float) -> bool:
        """Sleep for a worker that waits in `ray.get` meanwhile; False at once if too many do."""
        if self._pauses >= MAX_PAUSES:
            return False
        self._pauses += 1
        try:
            await asyncio.sleep(seconds)
        finally:
            self._pauses -= 1
        return True

    # --- threads ---

    async def _in_thread(self, function: Callable[..., R], *args: Any) -> R:
        """Do what may wait for a disk or for Ray. A caller that goes away does not end it half-way."""
        return await asyncio.get_running_loop().run_in_executor(self._pool, function, *args)

    @property
    def _monitoring_key(self) -> str:
        return f"monitoring:{self._actor_id}"

    def _begin_monitoring(self) -> None:
        if self._monitor is None:
            interval_s = self._settings.heartbeat_interval
            self._registry.tick(interval_s)
            self._monitor = _Ticker("faultguard-monitor", interval_s, functools.partial(self._fail_silent, interval_s))
            self._monitor.start()

    def _resume_monitoring(self) -> None:
        self._begin_monitoring()
        try:
            self._registry.adopt_all()
        except Exception as error:  # noqa: BLE001 - the first heartbeat of each worker does the same
            text = f"the manager, restarted, could not read who is registered; each worker is watched from its next heartbeat on: {error}"
            _events.emit(logging.WARNING, "faultguard.adoption_failed", text, error=repr(error))

    def _fail_silent(self, interval_s: float) -> None:
        """One look of the monitor."""
        self._registry.tick(interval_s)
        for worker_id, age_s in self._registry.silent().items():
            message = f"no heartbeat for {age_s:.1f} s"
            self._registry.mark_failed(worker_id, "was silent", message, unless=functools.partial(self._is_heard, worker_id))

    def _is_heard(self, worker_id: str) -> bool:
        return worker_id not in self._registry.silent()

    def _survey_if_absent(self, now: float) -> None:
        """Ask the nodes whom they hold, if beats can have been lost here: who has stood still since then will not send another one."""
        if self._follows or now - self._watched > self._settings.heartbeat_timeout / 2:
            self._prober.survey(self._settings.run)
        self._watched, self._follows = now, False

    def _watch(self, period_s: float) -> None:
        """One look of a shared manager."""
        self._pace.look(time.monotonic(), time.process_time(), calls=self._calls, senders=self._live.senders())
        self._live.interval_s = self._pace.interval_s
        self._live.drain(_ray.draining_nodes())
        self._survey_if_absent(time.monotonic())
        self._live.adopt(self._prober.surveyed(), time.monotonic(), time.time())
        for beat in self._live.check(time.monotonic(), period_s):
            _say_silent(beat)
        for said, verdict, is_new in self._prober.step(self._live.silent(), time.monotonic()):
            if verdict is Verdict.ALIVE:
                self._live.found(said, time.monotonic())
            elif verdict not in _UNDECIDED:
                self._live.not_found(said)
            if is_new:
                _say_found(said, verdict)
        # A task of the dead driver may be an actor of the user that lives on, and works.
        if self._live.quiet_s(time.monotonic()) > 2 * self._settings.heartbeat_interval and _ray.job_is_over(self._settings.job_id):
            ray.kill(ray.get_actor(self._name, namespace=_ray.NAMESPACE), no_restart=True)


_FOUND = {
    Verdict.ALIVE: "lives: only its heartbeats do not arrive",
    Verdict.GONE: "is not held by its process any more",
    Verdict.BUSY: "stands still, and may have a reason, such as C code that holds the interpreter; with stall_timeout=... that would end",
    Verdict.STOPPED: "is stopped by a signal; if that lasts for heartbeat_timeout, its process is ended",
    Verdict.LEFT_STOPPED: "is stopped by a signal; its process is left alone, because it is a driver or hosts other work",
    Verdict.TRACED: "stands still in a debugger",
    Verdict.UNKNOWN: "cannot be seen from its node",
    Verdict.KILL_STOPPED: "was stopped by a signal; its process is ended, and Ray starts anew",
    Verdict.KILL_STALLED: "stood still for longer than its stall_timeout, its interpreter too; its process is ended, and Ray starts anew",
    None: "is on a node that does not answer; Ray decides about that",
}
_QUIET = {Verdict.ALIVE, Verdict.GONE}
# It may be healthy: Ray says when its node is lost.
_UNDECIDED = {Verdict.BUSY, Verdict.STOPPED, Verdict.LEFT_STOPPED, Verdict.TRACED, None}


def _say_silent(beat: Mapping[str, Any]) -> None:
    _say(beat, logging.WARNING, "faultguard.worker_silent", f"is silent: no heartbeat for {beat['age_s']:.0f} s")


def _say_found(beat: Mapping[str, Any], verdict: Verdict | None) -> None:
    event = "faultguard.worker_killed" if verdict is not None and verdict.kills else "faultguard.worker_probed"
    level = logging.DEBUG if verdict in _QUIET else logging.WARNING
    _say(beat, level, event, _FOUND[verdict], verdict=verdict.name.lower() if verdict is not None else "unreachable")


def _say(beat: Mapping[str, Any], level: int, event: str, text: str, **more: Any) -> None:
    fields = {key: beat[key] for key in ("run", "task", "worker_id", "attempt", "token", "node_id", "pid")}
    if "age_s" in beat:
        fields["age_s"] = round(beat["age_s"], 3)
    _events.emit(
        level,
        event,
        f"'{beat['task']}/{beat['worker_id']}' attempt {beat['attempt']} {text}.",
        **fields,
        batch=beat["current_batch"],
        **more,
    )


class _Ticker(threading.Thread):
    """Does something every `period_s`, for the first time after the first period, until it is stopped; survives its errors."""

    def __init__(self, name: str, period_s: float, work: Callable[[], None]) -> None:
        super().__init__(name=name, daemon=True)
        self._period_s = period_s
        self._work = work
        self._stopped = threading.Event()
        self._said = ""

    def stop(self) -> None:
        """Do it no more; what is under way goes on to its end."""
        self._stopped.set()

    def run(self) -> None:
        while not self._stopped.wait(self._period_s):
            self._step()

    def _step(self) -> None:
        try:
            self._work()
        except Exception as error:  # noqa: BLE001 - a watcher that dies of its first error watches nothing
            self._say(error)
        else:
            self._said = ""

    def _say(self, error: Exception) -> None:
        """Once as long as it is the same."""
        text = f"thread {self.name} goes on after an error: {error!r}"
        if text != self._said:
            self._said = text
            _events.emit(logging.WARNING, "faultguard.thread_error", text, thread=self.name, error=repr(error))


@functools.lru_cache(maxsize=1)
def _actor_class() -> Any:
    # One group besides the default one, and no more: Ray starts the threads of several in a race, after which two may run the
    # loop of one group and nobody that of another, whose calls are then never answered.
    options: Any = {"concurrency_groups": {"beats": MAX_BEATS}, "max_concurrency": MAX_CALLS + 2 * MAX_PAUSES}
    return ray.remote(**options)(RecoveryManagerActor)


# --- made by users --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Factory:
    """What `RecoveryManager` is: `.remote(...)` starts one, `.options(...)` takes what Ray's actors take.

    An actor that restarts when it dies, keeps nothing that its logs do not have, and needs no CPU.

    Example:
        >>> manager = RecoveryManager.remote(heartbeat_interval=5.0, max_failures=3, checkpoint_dir="checkpoints")  # doctest: +SKIP
        >>> token = ray.get(manager.register_worker.remote("worker_1", {"batch_id": 0}))  # doctest: +SKIP
    """

    ray_options: dict[str, Any] = field(default_factory=dict)

    def options(self, **ray_options: Any) -> _Factory:
        """Give a `RecoveryManager` with options of Ray's for the actor, such as `name=`, `lifetime="detached"`, `max_restarts=`.

        Raises:
            UsageError: Ray does not take them.
        """
        options = {**self.ray_options, **ray_options}
        try:
            _actor_class().options(**options)
        except (TypeError, ValueError) as error:
            raise UsageError(f"RecoveryManager.options({', '.join(ray_options)}) is refused by Ray: {error}") from error
        return _Factory(options)

    def remote(
        self,
        heartbeat_interval: float | None = None,
        max_failures: int | None = None,
        checkpoint_dir: str | os.PathLike[str] | None = None,
        *,
        heartbeat_timeout: float | None = None,
    ) -> ActorHandle[RecoveryManagerActor]:
        """Start a manager. What is None comes from the environment (`FAULTGUARD_MAX_FAILURES`, ...), else it is the default.

        Args:
            heartbeat_interval: seconds between two looks at the workers, and about between their heartbeats; 5.
            max_failures: failures that a worker survives, so that it can register once more often; 3. -1 for any number.
            checkpoint_dir: a directory that all nodes share; "checkpoints". A relative one is meant here, not in the actor.
            heartbeat_timeout: seconds without a heartbeat after which a worker has failed; ten times the interval.

        Returns:
            A handle of the actor; see `RecoveryManagerActor`.

        Raises:
            UsageError: an option cannot work.
            CheckpointStoreError: the directory cannot be written.
        """
        _ray.refuse_client_mode()
        settings = _own_settings(heartbeat_interval, max_failures, checkpoint_dir, heartbeat_timeout)
        options = {"num_cpus": 0, "max_restarts": -1, "max_task_retries": 3, **self.ray_options}
        handle: ActorHandle[RecoveryManagerActor] = _actor_class().options(**options).remote(settings.encode())
        if options.get("get_if_exists"):  # Ray gives whatever has the name, and drops these arguments
            _check(ray.get(_hello(handle, settings), timeout=READY_S), f"actor {options.get('name')!r}")
        return handle

    def __call__(self, *_: object, **__: object) -> Any:
        raise UsageError("RecoveryManager(...) is refused: it is a Ray actor. Write RecoveryManager.remote(...)")


RecoveryManager: _Factory = _Factory()


def _own_settings(
    heartbeat_interval: float | None,
    max_failures: int | None,
    checkpoint_dir: str | os.PathLike[str] | None,
    heartbeat_timeout: float | None,
) -> Settings:
    """The settings of a manager that a user makes: no run, no job."""
    interval = option("heartbeat_interval", heartbeat_interval)
    if heartbeat_timeout is None and "FAULTGUARD_HEARTBEAT_TIMEOUT" not in os.environ:
        heartbeat_timeout = 10 * interval
    timeout = option("heartbeat_timeout", heartbeat_timeout)
    if timeout <= interval:
        raise UsageError(f"heartbeat_timeout={timeout} must be more than heartbeat_interval={interval}; the usual factor is 10")
    failures = check_max_failures(option("max_failures", max_failures))
    directory = resolve_checkpoint_dir(checkpoint_dir)
    identity = store_id(open_store(directory))
    return Settings(
        run="",
        checkpoint_dir=directory,
        store_id=identity,
        job_id="",
        max_failures=failures,
        heartbeat_interval=interval,
        heartbeat_timeout=timeout,
    )


# --- shared by a job ------------------------------------------------------------------------------------------------

_lock = threading.Lock()
_handles: dict[str, ActorHandle[RecoveryManagerActor]] = {}
_connection = ""  # the connection to Ray that the handles belong to


def manager_name(settings: Settings) -> str:
    """Name the manager of a run: the protocol is in the name, because an actor of an older version may still be there.

    >>> manager_name(Settings(run="r", checkpoint_dir="/c", store_id="1", job_id="01000000"))
    'faultguard-v1-01000000-r'
    """
    return f"faultguard-v{PROTOCOL}-{settings.key}"


def find_or_make(settings: Settings, wait_s: float = READY_S) -> ActorHandle[RecoveryManagerActor]:
    """Give the manager of a run, which is made by whoever asks first. Known handles cost nothing.

    Args:
        settings: of the run.
        wait_s: how long it may take until it answers for the first time.

    Raises:
        ManagerUnavailableError: it does not answer, or serves another store.
    """
    handle = known(settings)
    if handle is not None:
        return handle
    name = manager_name(settings)
    if not _ray.is_ready():
        raise ManagerUnavailableError(f"RecoveryManager {name!r} cannot be reached: this process is not connected to Ray")
    deadline = time.monotonic() + wait_s
    while (handle := _ready(settings, name, deadline)) is None:
        time.sleep(RETRY_S)
    with _lock:
        return _handles.setdefault(name, handle)


def find(settings: Settings) -> ActorHandle[RecoveryManagerActor] | None:
    """Give the manager of a run if there is one."""
    return known(settings) or (_get(manager_name(settings)) if _ray.is_ready() else None)


def ask(settings: Settings, call: Callable[[ActorHandle[RecoveryManagerActor]], Any], timeout_s: float, wait_s: float = READY_S) -> Any:
    """Give what the manager answers; one that has died, and that Ray does not start any more, has a successor.

    Args:
        settings: of the run.
        call: calls a method of the manager.
        timeout_s: for the answer.
        wait_s: as of `find_or_make`.

    Raises:
        ManagerUnavailableError: as of `find_or_make`.
        RayError: it does not answer.
    """
    try:
        return _ray.get_within(call(find_or_make(settings, wait_s)), timeout_s)
    except ray.exceptions.ActorDiedError:
        forget(settings)
    return _ray.get_within(call(find_or_make(settings, wait_s)), timeout_s)


def forget(settings: Settings) -> None:
    """Drop the handle of a manager that died, so that the next one is found by its name."""
    with _lock:
        _handles.pop(manager_name(settings), None)


def end(settings: Settings) -> None:
    """End the manager of a run that is over, if there is one and it can be reached; without this it goes with its job."""
    try:
        handle = find(settings)
        if handle is not None:
            ray.kill(handle, no_restart=True)
    except (ray.exceptions.RayError, ValueError) as error:
        _events.emit(logging.DEBUG, "faultguard.manager_left", f"the manager goes with its job: {error}", run=settings.run)
    forget(settings)


def known(settings: Settings) -> ActorHandle[RecoveryManagerActor] | None:
    """The handle that this process has; those of an earlier connection to Ray lead nowhere."""
    global _connection  # noqa: PLW0603 - one connection per process
    if not _ray.is_ready():
        return None
    connection = ray.get_runtime_context().get_worker_id()
    with _lock:
        if connection != _connection:
            _handles.clear()
            _connection = connection
        return _handles.get(manager_name(settings))


def _ready(settings: Settings, name: str, deadline: float) -> ActorHandle[RecoveryManagerActor] | None:
    """The manager, if it answers and is the right one; None: not yet."""
    try:
        handle = _get(name) or _make(settings, name)
        reply = _ray.get_within(_hello(handle, settings), max(deadline - time.monotonic(), RETRY_S))
    except (ray.exceptions.RayError, ValueError) as error:  # it restarts, is about to go, or somebody else is making it
        if time.monotonic() + RETRY_S < deadline:
            return None
        text = f"RecoveryManager {name!r} did not answer in time ({error}). Work and checkpoints do not need it"
        raise ManagerUnavailableError(text) from error
    _check(reply, f"RecoveryManager {name!r}")
    return handle


def _get(name: str) -> ActorHandle[RecoveryManagerActor] | None:
    try:
        return ray.get_actor(name, namespace=_ray.NAMESPACE)
    except ValueError:
        return None


def _make(settings: Settings, name: str) -> ActorHandle[RecoveryManagerActor]:
    """Where Ray puts its own managers: on the head node, which the cluster does not outlive, if it has one that can be named."""
    options: dict[str, Any] = {
        "name": name,
        "namespace": _ray.NAMESPACE,
        "get_if_exists": True,
        "lifetime": "detached",
        "num_cpus": 0,
        "max_restarts": MAX_RESTARTS,
        "max_task_retries": 0,
        "scheduling_strategy": "DEFAULT",
    }
    resources: dict[str, float] = ray.cluster_resources()  # type: ignore[no-untyped-call] # Ray left it unannotated
    if HEAD_NODE in resources:
        options["resources"] = {HEAD_NODE: 0.001}
    handle: ActorHandle[RecoveryManagerActor] = _actor_class().options(**options).remote(settings.encode(), name)
    return handle


def _hello(handle: Any, settings: Settings) -> Any:
    return handle.hello.remote(PROTOCOL, settings.store_id, settings.run)


def _check(reply: dict[str, Any], who: str) -> None:
    if reply["differs"]:
        raise ManagerUnavailableError(
            f"{who} (pid {reply['pid']}) is another one than was asked for: it has {reply['differs']}. Use one checkpoint_dir per run, "
            f"or give it another name"
        )
