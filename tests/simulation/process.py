"""One process of the simulation: an attempt of a task of Ray's, from the claim to the reply."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from faultguard._session import context
from faultguard.errors import (
    CheckpointStoreError,
    DuplicateWorkerError,
    FaultguardError,
    MaxFailuresExceeded,
    StalledError,
    SupersededError,
)
from tests.simulation.strands import Home, Killed

if TYPE_CHECKING:
    from types import SimpleNamespace

    from faultguard._ray import Identity
    from tests.simulation.cluster import Cluster, Task

__all__ = ["FreshError", "PlantedError", "Process"]

BITS = 4  # of a counter per batch: what is counted twice, or never, is seen


class PlantedError(Exception):
    """What the user's code raises."""


class FreshError(PlantedError):
    """After which the process is not trusted."""


class Process(Home):
    """An attempt of Ray's.

    A batch adds 1 to its digit of `a`, and later to its digit of `b`; a state in which they differ is half-updated.
    """

    def __init__(self, sim: Cluster, name: str, pid: int, task: Task, identity: Identity) -> None:
        super().__init__(name, pid)
        self.sim = sim
        self.task = task
        self.identity = identity
        self.globals: SimpleNamespace = sim.library.globals_of_a_process()
        self.sources: list[Any] = []  # what beats
        self.held: Any = None  # of the rules, once granted
        self.resumed_at = 0
        self.life = 1  # of the outcome that it gives
        self.begun = False  # the user's code
        self.last_begun = -1  # batch
        self.born = sim.now
        self.met_fault = False  # of the store
        self.handle: Any = None
        self.batch_awake_s = 0.0  # when its batch began, by its own time, and how often it had been absent by then
        self.batch_absences = 0
        self.done = False  # the attempt is over
        self.body = sim.spawn(self, self._main)

    @property
    def owner_task(self) -> str:
        """Of which task, of which driver."""
        return f"{self.task.ray_id}e{self.task.epoch}"

    @property
    def is_in_batch(self) -> bool:
        """Whether a batch is in hand, as far as its loop knows."""
        return self.handle is not None and bool(self.handle._cursors.in_hand)

    def _main(self) -> None:  # noqa: C901 - one line per way to end
        """What the wrapper runs in a worker process of Ray's."""
        sim = self.sim
        try:
            value = sim.library.attempt.run_task(sim.settings_of(self), self.identity, sim.options, sim.worker_id, sim.work_of(self))
            sim.sleep(0.0)  # it may still die, or be given up, before its reply arrives
        except Killed:
            raise
        except SupersededError:
            sim.demand(sim.has_rival(self), f"G6: {self.name} is told that it is superseded, and nobody is above it")
            self._over("is superseded")
        except DuplicateWorkerError:
            sim.demand(sim.has_rival(self), f"G6: {self.name} is told of another one, and there is none")
            self._over("has the id of another one")
            self.task.replied(self, None)
        except CheckpointStoreError as error:
            sim.demand(sim.store_failed(self), f"G6: {self.name} gives up, and the store works: {error}")
            self._over("gives up on the store")
            self.task.replied(self, None)
        except (MaxFailuresExceeded, PlantedError, StalledError) as error:
            self._over(f"has failed for good: {type(error).__name__}")
            sim.failed_for_good(self)
        except FaultguardError as error:
            sim.fails(AssertionError(f"{self.name} gets {error!r}"))
        except SystemExit:
            self._over("exits")
            sim.kill(self)
        except KeyboardInterrupt:
            self._over("is cancelled")
            self.task.replied(self, None)
        else:
            self._over("is over")
            self.task.replied(self, value)
        if sim.rng.random() < 0.5:
            sim.kill(self)

    def _over(self, text: str) -> None:
        self.done = True
        self.sim.world.say(f"{self.name}: {text}")

    def call(self) -> Any:
        """The user's function."""
        sim = self.sim
        try:
            task = context()
            assert task is not None
            ckpt = self.handle = task.handle
            sim.enters(self, ckpt)
            for batch in ckpt.batches(range(sim.batches)):
                self.batch_awake_s, self.batch_absences = self.awake_s, self.absences
                sim.begins(self, ckpt, batch)
                one = 1 << (BITS * batch)
                ckpt.state["a"] = ckpt.state.get("a", 0) + one
                sim.works(self, ckpt, batch)
                ckpt.state["b"] = ckpt.state.get("b", 0) + one
                sim.asks(self, ckpt)
        except Exception as error:
            if not isinstance(error, (PlantedError, StalledError, SupersededError, DuplicateWorkerError, CheckpointStoreError)):
                sim.fails(error)
            raise
        return sim.value_of(self)


def whole(state: dict[str, int], done: int, aside: set[int]) -> str:
    """What is wrong with a state at a boundary; nothing where it counts each batch once, but for what is set aside."""
    a, b = state.get("a", 0), state.get("b", 0)
    if a != b:
        return f"is half-updated: {a:x} and {b:x}"
    for batch in range(max(done, 1) + 1):
        digit = (a >> (BITS * batch)) & ((1 << BITS) - 1)
        wanted = {1} if batch < done else {0}
        if batch in aside:
            wanted = {0, 1}
        if digit not in wanted:
            return f"counts batch {batch} {digit} times at {done} done"
    return ""
