"""Frozen and thawed processes on a real disk: whatever an attempt that has a successor still does, it changes nothing.

Each incarnation is a process of its own; all use one directory. They do what they are asked through a pipe, are stopped with
SIGSTOP, from outside or at an exact step of a write, and go on when the test says so.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import sqlite3
import subprocess
import sys
import threading
import time
import traceback
import uuid
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import pytest

import faultguard
from faultguard import _codec, _journal
from faultguard._core import log as rules
from faultguard._core.names import encode_name
from faultguard._core.records import Ended, Owner
from faultguard._core.schedule import Schedule
from faultguard._log import StoredLog
from faultguard.errors import AmbiguousReplyError, FaultguardError
from faultguard.storage import leftovers, local, store_id
from faultguard.storage.local import LocalStore
from tests.attempts import RUN, TASK, Attempt, Worker

if TYPE_CHECKING:
    import builtins
    from collections.abc import Callable, Iterator

REPOSITORY = Path(faultguard.__file__).parent.parent
WAIT_S = 60.0
POLL_S = 0.001
TASK_ID = "0123456789abcdef"
KEEP = 2
SINK = "sink.sqlite"
W = "w0"
SAVES = ["wait", "advance", "loop"]  # the first on the thread of the loop, the others on the writer's
LAST_WORDS = ["end", "leave", "retry", "check"]
MOMENTS = {"claimed": 0, "saved": 1, "cleaned": 3, "ended": 1}  # what the replacement has done, and in how many batches
SUPERSEDED = "SupersededError"
REFUSED = "Refused"


# --- in the process of an incarnation -------------------------------------------------------------------------------


def stop_here() -> None:
    """Stop this process at this very instruction; a signal to the process could find another thread first."""
    signal.pthread_kill(threading.get_ident(), signal.SIGSTOP)


def claim(store: Any, worker_id: str, ray_attempt: int) -> tuple[StoredLog, Any]:
    """Let an attempt of the one Ray task claim a worker."""
    log = StoredLog(store, f"{RUN}/{TASK}/{encode_name(worker_id)}/")
    owner = Owner(uuid.uuid4().hex, task_id=TASK_ID, ray_attempt=ray_attempt, pid=os.getpid())
    return log, log.run(rules.claim(rules.Claimant(owner, TASK, worker_id, max_failures=-1), time.time()))


def trail_of(snapshot: Any) -> list[int]:
    """Who did the batches that are in a snapshot."""
    trail: list[int] = _codec.decode(bytes(snapshot.state))["trail"] if snapshot is not None else []
    return trail


def durable_batch(attempt: Attempt) -> int:
    """How many batches it believes to be durable."""
    durable = attempt.journal.held.durable
    return durable.batch if durable is not None else 0


def insert_naively(sink: sqlite3.Connection, _: Any, rows: int) -> None:
    """What the recipe is there to replace."""
    with sink:
        sink.execute("INSERT INTO batches VALUES (?, ?)", (uuid.uuid4().hex, rows))


def commit_recipe() -> dict[str, Any]:
    """What docs/external-commits.md defines."""
    text = (REPOSITORY / "docs" / "external-commits.md").read_text("utf-8")
    recipe: dict[str, Any] = {}
    exec(text.split("```python\n")[1].split("```")[0], recipe)  # noqa: S102 - what the reader copies is what is tested
    recipe["naive"] = insert_naively
    return recipe


# How an incarnation writes: on which file system, and whether files may be without a name.
FILES = {"tmpfile": "btrfs", "named": "btrfs", "promised": "ext4", "kept": "ext4"}  # kept: a promise is seen as one of long ago


class UnclearStore:
    """A store that, once armed, freezes in a create and has no clear answer when it thaws."""

    def __init__(self, store: LocalStore) -> None:
        self._store = store
        self.url = store.url
        self.armed = ""

    def create(self, key: str, data: bytes, *, durable: bool = True) -> bool:
        """Create, freeze and lose the reply; or freeze and lose the request."""
        armed, self.armed = self.armed, ""
        if not armed:
            return self._store.create(key, data, durable=durable)
        if armed == "created":
            assert self._store.create(key, data, durable=durable)
        stop_here()
        msg = "the reply was lost"
        raise AmbiguousReplyError(msg)

    def get(self, key: str) -> bytes | None:
        """As it is."""
        return self._store.get(key)

    def list(self, prefix: str, start_after: str = "") -> builtins.list[str]:
        """As it is."""
        return self._store.list(prefix, start_after)

    def delete(self, key: str) -> None:
        """As it is."""
        self._store.delete(key)


class Incarnation:
    """What one process can be asked to do."""

    def __init__(self, root: str, ray_attempt: int, files: str) -> None:
        self._root = root
        self._ray_attempt = ray_attempt
        local._file_system = lambda path: FILES[files]  # in this process, which serves the tests only
        leftovers._UNDER_WAY_S = 0.0 if files == "kept" else 1e6  # type: ignore[misc]
        self._store = UnclearStore(LocalStore(root, tmpfile=files != "named"))
        self._attempts: dict[str, tuple[Attempt, Iterator[int]]] = {}

    def claim(self, worker_id: str) -> object:
        """Claim a worker, restore it and take its first batch in hand; gives whose batches were restored."""
        log, answer = claim(self._store, worker_id, self._ray_attempt)
        if not isinstance(answer, rules.Granted):
            return type(answer).__name__
        attempt = Attempt(log, answer.held, Schedule(1, time.monotonic()), {"trail": []}, KEEP)
        restored = list(attempt.ckpt.state["trail"])
        loop = attempt.ckpt.batches(range(100))
        assert next(loop) == len(restored)
        self._attempts[worker_id] = attempt, loop
        return restored

    def open_worker(self) -> object:
        """Claim as a decorated task does; only for an attempt that is refused."""
        from faultguard import _attempt, _ray
        from faultguard._settings import Settings

        store = store_id(LocalStore(self._root), create=False)
        settings = Settings(run=RUN, checkpoint_dir=self._root, store_id=store, job_id="job")
        identity = _ray.Identity("job", "node", TASK_ID, self._ray_attempt, TASK, TASK)
        return type(_attempt.open_worker(settings, identity, _attempt.TaskOptions(TASK), W, max_failures=-1)).__name__

    def batch(self, worker_id: str, way: str) -> object:
        """Do the batch in hand and let it be saved in one of the ways; gives the number of batches that are durable."""
        attempt, loop = self._attempts[worker_id]
        if not attempt.ckpt._cursors.in_hand:  # it was refused as it advanced: the loop is not asked for another batch
            attempt.ckpt.save(wait=True)
        attempt.ckpt.state["trail"].append(self._ray_attempt)
        if way != "loop":
            attempt.ckpt.advance(wait=way == "wait")
        next(loop)
        deadline = time.monotonic() + WAIT_S
        while not attempt.journal.superseded and durable_batch(attempt) != attempt.ckpt.current_batch:
            assert time.monotonic() < deadline, "the writer has no answer"
            time.sleep(POLL_S)
        attempt.journal._tidy()
        return durable_batch(attempt)

    def durable(self, worker_id: str) -> object:
        """How many batches it believes to be durable."""
        return durable_batch(self._attempts[worker_id][0])

    def last_words(self, worker_id: str, way: str) -> object:
        """Everything else that an attempt does to its log."""
        attempt, loop = self._attempts[worker_id]
        if way == "end":
            loop.close()  # type: ignore[attr-defined]  # a generator
            attempt.complete()
        elif way == "leave":
            attempt.journal.leave(Ended("drain", charged=False))
        elif way == "retry":
            attempt.fail()
        else:
            attempt.ckpt.check()
        return None

    def commit(self, worker_id: str, how: str, freeze: bool) -> object:
        """Commit what the batch in hand has found to the sink, as the recipe says, right after a check."""
        attempt, _ = self._attempts[worker_id]
        recipe = commit_recipe()
        attempt.ckpt.check()
        if freeze:
            stop_here()
        with contextlib.closing(sqlite3.connect(Path(self._root).with_name(SINK), timeout=WAIT_S)) as sink:
            sink.executescript(recipe["SCHEMA"])
            recipe[how](sink, attempt.ckpt, attempt.ckpt.current_batch + 1)
        return None

    def unclear(self, happened: str) -> object:
        """Let the next create freeze and be answered by nothing."""
        self._store.armed = happened
        return None

    def stop_at(self, wanted: str) -> object:
        """Freeze when the store comes to that step, once."""
        if wanted == "inside_link":
            link, become = os.link, leftovers.become

            def stopping(function: Callable[..., None]) -> Callable[..., None]:
                def call(*args: Any, **kwargs: Any) -> None:
                    function(*args, **kwargs)
                    os.link, leftovers.become = link, become
                    stop_here()

                return call

            os.link, leftovers.become = stopping(link), stopping(become)
            return None

        def hook(step: str, key: str) -> None:
            if step == wanted:
                local.step_hook = None
                stop_here()

        local.step_hook = hook
        return None

    def close(self) -> None:
        """Make room for another incarnation in this process."""
        local.step_hook = None
        for attempt, _ in self._attempts.values():
            attempt.die()


def serve(descriptor: int) -> None:
    """Do what the tests ask, until they have nothing more to say; an error of ours is answered by its name."""
    incarnation: Incarnation | None = None
    _journal.TIDY_DELAY_S = 1e6  # the tests look right after each batch, and want to know when it deletes
    with Connection(descriptor) as connection:
        while True:
            try:
                name, *arguments = connection.recv()
            except EOFError:
                return
            try:
                if name == "begin":
                    if incarnation is not None:
                        incarnation.close()
                    incarnation, answer = Incarnation(*arguments), None
                else:
                    answer = getattr(incarnation, name)(*arguments)
            except FaultguardError as error:
                answer = type(error).__name__
            except Exception:  # noqa: BLE001 - the test shows it
                answer = traceback.format_exc()
            connection.send(answer)


# --- in the test ----------------------------------------------------------------------------------------------------


class Process:
    """One incarnation, from outside."""

    def __init__(self) -> None:
        self._connection, theirs = multiprocessing.Pipe()
        script = "import sys; from tests.test_zombies import serve; serve(int(sys.argv[1]))"
        self._process = subprocess.Popen([sys.executable, "-c", script, str(theirs.fileno())], cwd=REPOSITORY, pass_fds=[theirs.fileno()])
        theirs.close()
        self._frozen = False
        self._unanswered = 0

    @property
    def is_idle(self) -> bool:
        """Whether it can become another incarnation."""
        return not self._connection.closed and not self._frozen and not self._unanswered

    def send(self, name: str, *arguments: object) -> None:
        """Ask for something, and do not wait."""
        self._connection.send((name, *arguments))
        self._unanswered += 1

    def receive(self) -> object:
        """Take an answer."""
        assert self._connection.poll(WAIT_S), "no answer"
        answer: object = self._connection.recv()
        self._unanswered -= 1
        return answer

    def ask(self, name: str, *arguments: object) -> object:
        """Ask and take the answer."""
        self.send(name, *arguments)
        return self.receive()

    def wait_until_frozen(self) -> None:
        """Return when every thread of it is stopped."""
        self._frozen = True
        deadline = time.monotonic() + WAIT_S
        while True:
            found = os.waitid(os.P_PID, self._process.pid, os.WSTOPPED | os.WEXITED | os.WNOHANG | os.WNOWAIT)
            if found is not None:
                assert found.si_code == os.CLD_STOPPED, f"it ended: {found}"
                return
            assert time.monotonic() < deadline, "it did not stop"
            time.sleep(POLL_S)

    def freeze(self) -> None:
        """Stop it wherever it is."""
        self._process.send_signal(signal.SIGSTOP)
        self.wait_until_frozen()

    def freeze_at(self, step: str, name: str, *arguments: str) -> None:
        """Ask for something, and let it freeze at a step of the store."""
        assert self.ask("stop_at", step) is None
        self.send(name, *arguments)
        self.wait_until_frozen()

    def thaw(self) -> None:
        """Let it go on."""
        self._frozen = False
        self._process.send_signal(signal.SIGCONT)

    def die(self) -> None:
        """Kill it, frozen or not."""
        self._process.kill()
        self._process.wait(WAIT_S)
        self._connection.close()

    def save(self, worker_id: str = W, *, batches: int = 1) -> None:
        """Do some batches, each durable before the next."""
        for _ in range(batches):
            answer = self.ask("batch", worker_id, "wait")
            assert isinstance(answer, int), answer


class Start(Protocol):
    """Starts the incarnation of a Ray attempt."""

    def __call__(self, ray_attempt: int) -> Process:
        """Returns when it can be asked."""


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """The checkpoint directory, known as a store."""
    path = tmp_path / "store"
    path.mkdir()
    store_id(LocalStore(str(path)))
    return path


@pytest.fixture(scope="module")
def idle() -> Iterator[list[Process]]:
    """Processes that live on from test to test: to start one takes longer than a test."""
    processes: list[Process] = []
    yield processes
    for process in processes:
        process.die()


@pytest.fixture
def start(root: Path, idle: list[Process], request: pytest.FixtureRequest) -> Iterator[Start]:
    """Starts incarnations; none outlives the test. Its parameter says how they write files."""
    used: list[Process] = []

    def begin(ray_attempt: int) -> Process:
        used.append(process := idle.pop() if idle else Process())
        assert process.ask("begin", str(root), ray_attempt, getattr(request, "param", "promised")) is None
        return process

    yield begin
    for process in used:
        if process.is_idle:
            idle.append(process)
        else:
            process.die()


def contents(root: Path) -> dict[str, bytes]:
    """Every record of every worker."""
    store = LocalStore(str(root))
    return {key: store.get(key) or b"" for key in store.list(f"{RUN}/")}


def resumed(root: Path, ray_attempt: int, worker_id: str = W) -> list[int]:
    """Whose batches a further attempt finds, or the outcome holds."""
    _, answer = claim(LocalStore(str(root)), worker_id, ray_attempt)
    assert isinstance(answer, (rules.Granted, rules.Finished)), answer
    return trail_of(answer.snapshot if isinstance(answer, rules.Granted) else answer.record.snapshot)


def assert_superseded(old: Process, way: str, worker_id: str = W) -> None:
    """Whatever it tries, it is told that it has a successor, and believes no more to be durable than before."""
    durable = old.ask("durable", worker_id)
    answer = old.ask("last_words" if way in LAST_WORDS else "batch", worker_id, way)
    if way in {"advance", "loop"} and answer == durable:  # the writer learns it first; the loop is told at its next boundary
        answer = old.ask("batch", worker_id, way)
    assert answer == SUPERSEDED
    assert old.ask("durable", worker_id) == durable


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_thawed_attempt_changes_nothing(moment: str, root: Path, start: Start) -> None:
    """Frozen in the middle of its loop, it thaws beside its replacement: every way to write is refused, and no record changes."""
    ways = SAVES + LAST_WORDS  # each on a worker of its own
    done = MOMENTS[moment]
    old, new = start(0), start(1)
    for way in ways:
        assert old.ask("claim", way) == []
        old.save(way, batches=3)
    old.freeze()
    for way in ways:
        assert new.ask("claim", way) == [0, 0, 0]
        new.save(way, batches=done)
        if moment == "ended":
            assert new.ask("last_words", way, "end") is None
    if moment == "cleaned":
        holders = [record for way in ways for record in Worker(LocalStore(str(root)), way).records() if record.snapshot is not None]
        assert {record.owner.ray_attempt for record in holders} == {1}
    before = contents(root)
    old.thaw()
    for way in ways:
        assert_superseded(old, way, way)
    assert contents(root) == before
    if moment != "ended":
        for way in ways:
            new.save(way)
        done += 1
    new.die()
    for way in ways:
        assert resumed(root, 2, way) == [0, 0, 0] + [1] * done


@pytest.mark.parametrize("way", SAVES)
@pytest.mark.parametrize("batches", [0, 1, 3])
def test_a_late_retention_deletes_only_what_is_superfluous(batches: int, way: str, root: Path, start: Start) -> None:
    """Frozen between its durable save and its retention, it deletes when its replacement is far ahead."""
    old, new = start(0), start(1)
    assert old.ask("claim", W) == []
    old.save(batches=2)
    old.freeze_at("before_delete", "batch", W, way)
    assert new.ask("claim", W) == [0, 0, 0]
    new.save(batches=batches)
    before = contents(root)
    old.thaw()
    assert old.receive() == 3  # it was durable before it had a successor
    assert_superseded(old, way)
    after = contents(root)
    assert after.items() <= before.items()
    assert {key.rpartition("/")[2] for key in before.keys() - after.keys()} <= {"000000002.json"}
    new.die()
    assert resumed(root, 2) == [0, 0, 0] + [1] * batches


@pytest.mark.parametrize("way", ["wait", "advance"])
@pytest.mark.parametrize("happened", ["created", "nothing"])
@pytest.mark.parametrize("moment", ["alone", "claimed", "cleaned"])
def test_a_lost_reply_is_resolved_after_the_thaw(moment: str, happened: str, way: str, root: Path, start: Start) -> None:
    """The reply to a create is lost while the process is frozen: it counts only if it was created and is there, or nobody is above."""
    old = start(0)
    assert old.ask("claim", W) == []
    old.save()
    assert old.ask("unclear", happened) is None
    old.send("batch", W, way)
    old.wait_until_frozen()
    base = [0, 0] if happened == "created" or moment == "alone" else [0]
    done = 0
    if moment != "alone":
        new = start(1)
        assert new.ask("claim", W) == base
        new.save(batches=(done := 3 if moment == "cleaned" else 0))
    before = contents(root)
    old.thaw()
    if moment == "alone" or (happened, moment) == ("created", "claimed"):
        assert old.receive() == 2
    else:
        assert old.receive() == (SUPERSEDED if way == "wait" else 1)
        assert old.ask("durable", W) == 1
    if moment != "alone":
        assert_superseded(old, way)
        assert contents(root) == before
    assert resumed(root, 2) == base + [1] * done


@pytest.mark.parametrize("start", FILES, indirect=True)
@pytest.mark.parametrize("moment", ["claimed", "cleaned"])
@pytest.mark.parametrize("step", ["before_link", "inside_link", "after_link", "before_dir_fsync"])
@pytest.mark.parametrize("way", ["wait", "advance"])
def test_frozen_at_a_step_of_its_save(way: str, step: str, moment: str, root: Path, start: Start, request: pytest.FixtureRequest) -> None:
    """A save that was linked, or promised long ago, is loaded by the replacement; one that was not never comes."""
    unlinked = step == "before_link" and request.node.callspec.params["start"] != "kept"
    old, new = start(0), start(1)
    assert old.ask("claim", W) == []
    old.save()
    old.freeze_at(step, "batch", W, way)
    base = [0] if unlinked else [0, 0]
    assert new.ask("claim", W) == base
    new.save(batches=(done := 3 if moment == "cleaned" else 0))
    before = contents(root)
    old.thaw()
    told = old.receive()
    if unlinked or (step in {"before_link", "inside_link"} and moment == "cleaned"):
        assert told == (SUPERSEDED if way == "wait" else 1)
        assert old.ask("durable", W) == 1
    else:
        assert told == 2
    assert_superseded(old, way)
    assert contents(root) == before
    new.save()
    new.die()
    assert resumed(root, 2) == base + [1] * (done + 1)


def test_four_incarnations_never_go_back(root: Path, start: Start) -> None:
    """1 and 2 are frozen; 1 thaws and saves; 3 resumes and dies; 2 thaws and saves; 4 resumes where 3 was."""
    first, second, third, fourth = (start(attempt) for attempt in range(4))
    assert first.ask("claim", W) == []
    first.save()
    first.freeze()
    assert second.ask("claim", W) == [0]
    second.freeze()
    first.thaw()
    assert_superseded(first, "wait")
    assert third.ask("claim", W) == [0]
    third.save()
    third.die()
    second.thaw()
    assert_superseded(second, "wait")
    assert fourth.ask("claim", W) == [0, 2]
    fourth.save()
    assert_superseded(first, "check")
    assert_superseded(second, "check")
    assert resumed(root, 4) == [0, 2, 3]


@pytest.mark.parametrize("how", ["add_once", "overwrite_fenced", "naive"])
def test_an_external_commit_that_a_zombie_cannot_repeat(how: str, root: Path, start: Start) -> None:
    """Frozen between its check and its commit, each of three old attempts commits under the next one; a naive sink counts that."""
    zombies = []
    for ray_attempt in range(3):
        zombies.append(zombie := start(ray_attempt))
        zombie.ask("claim", W)
        zombie.send("commit", W, how, True)
        zombie.wait_until_frozen()
    last = start(3)
    assert last.ask("claim", W) == []
    assert last.ask("commit", W, how, False) is None
    answers = []
    for zombie in zombies:
        zombie.thaw()
        answers.append(zombie.receive())
    last.save()
    with contextlib.closing(sqlite3.connect(root.with_name(SINK))) as sink:
        added = sorted(rows for (rows,) in sink.execute("SELECT rows FROM batches"))
        newest = list(sink.execute("SELECT rows FROM progress"))
    if how == "add_once":
        assert (answers, added) == ([None] * 3, [1])
    elif how == "overwrite_fenced":
        assert (answers, newest) == ([SUPERSEDED] * 3, [(1,)])
    else:
        assert added == [1, 1, 1, 1]


@pytest.mark.parametrize("start", FILES, indirect=True)
@pytest.mark.parametrize("way", ["wait", "advance"])
def test_four_incarnations_with_two_saves_under_way(way: str, root: Path, start: Start, request: pytest.FixtureRequest) -> None:
    """The same, with 1 and 2 frozen where nothing but the link of their save is left to do; a promise of long ago is kept by others."""
    kept = request.node.callspec.params["start"] == "kept"
    first, second, third, fourth = (start(attempt) for attempt in range(4))
    assert first.ask("claim", W) == []
    first.save()
    first.freeze_at("before_link", "batch", W, way)
    assert second.ask("claim", W) == ([0, 0] if kept else [0])
    second.freeze_at("before_link", "batch", W, way)
    first.thaw()
    assert first.receive() == (2 if kept else SUPERSEDED if way == "wait" else 1)
    assert_superseded(first, way)
    base = [0, 0, 1] if kept else [0]
    assert third.ask("claim", W) == base
    third.save(batches=2)
    third.die()
    second.thaw()
    assert second.receive() == (SUPERSEDED if way == "wait" else 2 if kept else 1)  # what 1 or 3 has linked for it, 3 has deleted since
    assert_superseded(second, way)
    assert fourth.ask("claim", W) == [*base, 2, 2]
    fourth.die()
    assert resumed(root, 4) == [*base, 2, 2]


@pytest.mark.parametrize("start", FILES, indirect=True)
@pytest.mark.parametrize("step", ["before_link", "inside_link", "after_link", "before_dir_fsync"])
def test_four_incarnations_with_a_save_and_a_claim_under_way(step: str, root: Path, start: Start, request: pytest.FixtureRequest) -> None:
    """1 is frozen in a save and 2 in its claim: either 1 saves, or 2 was first; 3 resumes there, 2 is refused, 4 goes on from 3."""
    first, second, third, fourth = (start(attempt) for attempt in range(4))
    assert first.ask("claim", W) == []
    first.save()
    first.freeze_at("before_link", "batch", W, "wait")
    second.freeze_at(step, "claim", W)
    first.thaw()
    saved = step == "before_link" or request.node.callspec.params["start"] == "kept"  # then the claim has linked it
    assert first.receive() == (2 if saved else SUPERSEDED)
    base = [0, 0] if saved else [0]
    assert third.ask("claim", W) == base
    third.save()
    third.die()
    before = contents(root)
    second.thaw()
    assert second.receive() == REFUSED
    assert_superseded(first, "wait")
    assert contents(root) == before
    assert fourth.ask("claim", W) == [*base, 2]


def sleep_then_claim(process: Process) -> None:
    """Freeze before anything is read."""
    process.freeze()
    process.send("claim", W)


def read_then_claim(process: Process) -> None:
    """Freeze between the listing, which is empty, and the link of the claim."""
    process.freeze_at("before_link", "claim", W)


def sleep_then_open(process: Process) -> None:
    """Freeze before anything is read, and claim as a decorated task does."""
    process.freeze()
    process.send("open_worker")


def read_then_open(process: Process) -> None:
    """Freeze between the listing and the link, and claim as a decorated task does."""
    process.freeze_at("before_link", "open_worker")


@pytest.mark.parametrize(
    ("begin", "expected"),
    [(sleep_then_claim, REFUSED), (read_then_claim, REFUSED), (sleep_then_open, SUPERSEDED), (read_then_open, SUPERSEDED)],
)
@pytest.mark.parametrize("batches", [0, 3])
def test_an_attempt_that_comes_late_is_refused_at_birth(
    begin: Callable[[Process], None], expected: str, batches: int, root: Path, start: Start
) -> None:
    """Frozen before its claim, it thaws when Ray's next attempt holds the worker."""
    old, new = start(0), start(1)
    begin(old)
    assert new.ask("claim", W) == []
    new.save(batches=batches)
    before = contents(root)
    old.thaw()
    assert old.receive() == expected
    assert contents(root) == before
    new.save()
    new.die()
    assert resumed(root, 2) == [1] * (batches + 1)
