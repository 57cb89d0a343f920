"""faultguard: long Ray tasks that survive anything, from the last checkpoint on.

Decorate a Ray task with `recoverable`, wrap its loop in `batches`. `docs/` explains what is guaranteed.
"""

from typing import TYPE_CHECKING

from faultguard._checkpointed import batches, checkpointed, current
from faultguard._failover import recommended_ray_env
from faultguard._get import get
from faultguard._handle import Checkpoint
from faultguard._manager import RecoveryManager
from faultguard._recoverable import RecoverableFunction, recoverable
from faultguard._run import Run, cancel, init, shutdown
from faultguard._views import WorkerState, manager, workers
from faultguard.errors import (
    CheckpointCorruptError,
    CheckpointNotSerializableError,
    CheckpointStoreError,
    DuplicateWorkerError,
    FaultguardError,
    InputChangedError,
    ManagerUnavailableError,
    MaxFailuresExceeded,
    RunInUseError,
    RunMismatchError,
    StalledError,
    SupersededError,
    UsageError,
)
from faultguard.policy import Backoff

if TYPE_CHECKING:
    from faultguard import testing as testing
else:

    def __getattr__(name: str) -> object:
        """`faultguard.testing` is imported when it is asked for: no task has to pay for it."""
        if name == "testing":
            import importlib

            return importlib.import_module("faultguard.testing")
        raise AttributeError(f"module 'faultguard' has no attribute {name!r}")


__version__ = "0.1.0"

__all__ = [
    "Backoff",
    "Checkpoint",
    "CheckpointCorruptError",
    "CheckpointNotSerializableError",
    "CheckpointStoreError",
    "DuplicateWorkerError",
    "FaultguardError",
    "InputChangedError",
    "ManagerUnavailableError",
    "MaxFailuresExceeded",
    "RecoverableFunction",
    "RecoveryManager",
    "Run",
    "RunInUseError",
    "RunMismatchError",
    "StalledError",
    "SupersededError",
    "UsageError",
    "WorkerState",
    "batches",
    "cancel",
    "checkpointed",
    "current",
    "get",
    "init",
    "manager",
    "recommended_ray_env",
    "recoverable",
    "shutdown",
    "workers",
]
