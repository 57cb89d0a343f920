"""What the workers of a run are doing: truth from their logs, liveness from the manager where there is one."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import ray

from faultguard import _ray
from faultguard._core.names import record_name, record_number
from faultguard._core.records import decode_record, positions
from faultguard._log import StoredLog

if TYPE_CHECKING:
    from collections.abc import Mapping

    from ray.actor import ActorHandle

    from faultguard._core.records import Record, Snapshot
    from faultguard._settings import Settings
    from faultguard.storage import Store

__all__ = ["Status", "StoredWorker", "WorkerState", "manager", "merge", "state_of", "status_of", "stored_workers", "workers"]

READERS = 16
LIVE_WAIT_S = 3.0
BEATS_MISSED = 2

Status = Literal["active", "failed", "recovered", "completed", "cancelled"]


@dataclass(frozen=True, slots=True)
class WorkerState:
    """What a worker is doing.

    Attributes:
        worker_id: the worker.
        status: "active" in its first attempt, "recovered" in a later one, or how it ended: "completed", "failed", "cancelled".
        last_checkpoint: where its newest checkpoint is; None before the first. Older ones are deleted as newer ones come.
        failure_count: failures charged to its budget.
        last_heartbeat: seconds since the epoch; without a manager that has heard it, when it last wrote to its log.
        current_batch: batches done in the innermost loop; of a registered worker, what its state calls `current_batch` or `batch_id`.
        task: name of the decorated function; "manager" for a worker that registered with a `RecoveryManager`.
        run: name of the run; empty for a registered worker.
        attempt: counted from 1.
        position: batches done per open loop, outer to inner.
        node_id: Ray's id of its node, hex; empty where that is not known.
        pid: of its process; 0 where that is not known.
        total_batches: of the innermost loop, where that is known.
        quarantined: batches that are passed over, each as `position` was there.
        silent: no heartbeat for longer than `heartbeat_timeout`, and no end either.
    """

    worker_id: str
    status: Status
    last_checkpoint: str | None = None
    failure_count: int = 0
    last_heartbeat: float | None = None
    current_batch: Any = None
    task: str = ""
    run: str = ""
    attempt: int = 1
    position: tuple[int, ...] = ()
    node_id: str = ""
    pid: int = 0
    total_batches: int | None = None
    quarantined: tuple[tuple[int, ...], ...] = ()
    silent: bool = False


def workers() -> list[WorkerState]:
    """What the workers of the current run are doing, by task and id.

    Their logs decide; beats that the run's manager heard are newer and fill in the rest. No manager is started for this,
    and one that does not answer within seconds is done without.

    Raises:
        UsageError: there is no run here.
        CheckpointStoreError: the store cannot be read.

    Example:
        >>> [state.worker_id for state in faultguard.workers() if state.silent]  # doctest: +SKIP
        ['shard-7']
    """
    from faultguard._session import current_settings
    from faultguard._settings import checked_store

    settings = current_settings()
    beats = {(beat["task"], beat["worker_id"]): beat for beat in _live(settings)}
    stored = stored_workers(checked_store(settings), settings.run_prefix, run=settings.run)
    states = [merge(worker, beats.pop((worker.state.task, worker.state.worker_id), None)) for worker in stored]
    states += [_beaten(beat) for beat in beats.values()]  # claimed since the logs were listed
    records = {(worker.state.task, worker.state.worker_id): worker.record for worker in stored}
    heard = time.time() - BEATS_MISSED * settings.heartbeat_interval
    states = [_unless_cancelled(state, records.get((state.task, state.worker_id)), heard) for state in states]
    return sorted(states, key=lambda state: (state.task, state.worker_id))


def _unless_cancelled(state: WorkerState, record: Record | None, heard: float) -> WorkerState:
    """A worker of which nothing is heard: cancelled by force it could not say so, but Ray can."""
    if record is None or state.status not in {"active", "recovered"} or (state.last_heartbeat or 0.0) > heard or not _ray.is_ready():
        return state
    over = record.owner.ray_worker and _ray.death_of(record.owner.ray_worker) == "cancelled"
    return replace(state, status="cancelled") if over else state


def manager() -> ActorHandle[Any]:
    """Give the `RecoveryManager` of the current run; starts it if nobody has yet.

    Raises:
        UsageError: there is no run here.
        ManagerUnavailableError: it does not answer, or serves another store.
    """
    from faultguard._manager import find_or_make, forget
    from faultguard._session import current_settings

    settings = current_settings()
    if _ray.has_died(find_or_make(settings)):
        forget(settings)
    return find_or_make(settings)


def _live(settings: Settings) -> list[dict[str, Any]]:
    """What the manager heard; nothing if there is none, or if it does not answer."""
    from faultguard._manager import find, forget

    if not _ray.is_ready():
        return []
    try:
        handle = find(settings)
        beats: list[dict[str, Any]] = _ray.get_within(handle.live_workers.remote(), LIVE_WAIT_S) if handle is not None else []
    except ray.exceptions.RayError:
        forget(settings)
        return []
    return beats


# --- from the logs --------------------------------------------------------------------------------------------------


class StoredWorker(NamedTuple):
    """A worker as its log shows it, and the newest intact record."""

    state: WorkerState
    record: Record


def stored_workers(store: Store, prefix: str, *, run: str, levels: int = 2) -> list[StoredWorker]:
    """Read the newest record of every log that lies `levels` folders under `prefix`. A log without an intact record is left out."""
    folders: dict[str, None] = {}
    for key in store.list(prefix):
        folder, _, name = key[len(prefix) :].rpartition("/")
        if record_number(name) is not None and folder.count("/") + 1 == levels:
            folders[f"{prefix}{folder}/"] = None
    if not folders:
        return []

    def read(folder: str) -> StoredWorker | None:
        return _stored(StoredLog(store, folder), run)

    with ThreadPoolExecutor(min(READERS, len(folders)), "faultguard-view") as pool:
        try:
            found = pool.map(read, folders)
        except RuntimeError:  # the interpreter ends, and starts no more threads
            found = map(read, folders)
        return [worker for worker in found if worker is not None]


def _stored(log: StoredLog, run: str) -> StoredWorker | None:
    record = log.newest()
    if record is None:
        return None
    snapshot = record.snapshot
    if snapshot is None and record.points_to:
        data = log.store.get(log.prefix + record_name(record.points_to))
        pointed = decode_record(data, record.points_to) if data is not None else None
        snapshot = pointed.snapshot if pointed is not None else None
    return StoredWorker(state_of(record, snapshot, log, run), record)


def status_of(record: Record) -> Status:
    """What a newest record says of its worker."""
    if record.kind == "end":
        return record.outcome.status if record.outcome is not None else "completed"
    if record.ended is not None and record.ended.cause == "cancelled":
        return "cancelled"
    return "active" if record.attempt == 1 else "recovered"


def state_of(record: Record, snapshot: Snapshot | None, log: StoredLog, run: str) -> WorkerState:
    """A worker by its newest record, and the snapshot which that holds or points to."""
    holder = record.number if record.snapshot is not None else record.points_to
    position = snapshot.position if snapshot is not None else ()
    innermost = next((scope[-1] for scope in reversed(snapshot.loops) if scope), None) if snapshot is not None else None
    return WorkerState(
        worker_id=record.worker_id,
        status=status_of(record),
        last_checkpoint=log.path(holder) if holder else None,
        failure_count=record.charged,
        last_heartbeat=record.saved_at,
        current_batch=position[-1] if position else None,
        task=record.task,
        run=run,
        attempt=record.attempt,
        position=position,
        node_id=record.owner.node_id,
        pid=record.owner.pid,
        total_batches=innermost.length if innermost is not None else None,
        quarantined=positions(record.quarantined),
    )


# --- from the beats -------------------------------------------------------------------------------------------------


def merge(worker: StoredWorker, beat: Mapping[str, Any] | None) -> WorkerState:
    """The state of a worker by its log and its newest beat: the later attempt counts, and an end that is recorded is the end."""
    state, record = worker
    if beat is None:
        return state
    over = record.kind == "end" or (record.ended is not None and record.ended.cause != "drained")  # which it says before it leaves
    if beat["token"] < record.token or (over and beat["token"] == record.token):
        return replace(state, last_heartbeat=max(record.saved_at, beat["last_heartbeat"]))
    return replace(_beaten(beat), run=state.run, last_checkpoint=state.last_checkpoint)


def _beaten(beat: Mapping[str, Any]) -> WorkerState:
    """A worker by its newest beat alone."""
    return WorkerState(
        worker_id=beat["worker_id"],
        status=beat["status"],
        last_checkpoint=beat["last_checkpoint"],
        failure_count=beat["failure_count"],
        last_heartbeat=beat["last_heartbeat"],
        current_batch=beat["current_batch"],
        task=beat["task"],
        run=beat.get("run", ""),
        attempt=beat["attempt"],
        position=tuple(beat["position"]),
        node_id=beat["node_id"],
        pid=beat["pid"],
        total_batches=beat["total_batches"],
        quarantined=tuple(map(tuple, beat.get("quarantined", ()))),
        silent=beat["silent"],
    )
