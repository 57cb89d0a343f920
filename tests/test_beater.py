"""Beats: they come by themselves, they come back by themselves, and they leave nothing behind."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from typing import TYPE_CHECKING, Any

import pytest
import ray

import faultguard
from faultguard import _beater, _events
from faultguard._manager import find, forget
from faultguard._session import current_settings
from faultguard._settings import Settings
from faultguard.errors import ManagerUnavailableError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from tests.conftest import StartRun

ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # type: ignore[no-untyped-call] # workers cannot import a test

BOUND_S = 60.0
THREAD = "faultguard-beater"
QUICK: dict[str, Any] = {"heartbeat_interval": 0.2, "heartbeat_timeout": 2.0}


def wait_until(condition: Callable[[], Any], bound_s: float = BOUND_S) -> None:
    """Wait for a condition, not for ever."""
    deadline = time.monotonic() + bound_s
    while not condition():
        assert time.monotonic() < deadline, f"it did not happen in {bound_s} s"
        time.sleep(0.02)


def is_running() -> bool:
    """Whether this process has a beater thread."""
    return any(thread.name == THREAD for thread in threading.enumerate())


class FakeSource:
    """A worker that says how often it was asked."""

    def __init__(self, settings: Settings, worker_id: str = "w0", *, broken: bool = False) -> None:
        self.settings = settings
        self.worker_id = worker_id
        self.broken = broken
        self.asked = 0
        self.lasted = 0
        self.replies: list[str] = []

    def told(self, reply: str) -> None:
        """Note the answer."""
        self.replies.append(reply)

    def beat(self) -> dict[str, object]:
        """What it says."""
        self.asked += 1
        if self.broken:
            raise RuntimeError("no beat today")
        return {
            "cancels": 0,
            "task": "fake",
            "worker_id": self.worker_id,
            "run": self.settings.run,
            "attempt": 1,
            "token": 1,
            "status": "active",
            "current_batch": self.asked,
            "position": (self.asked,),
            "total_batches": None,
            "node_id": "",
            "pid": os.getpid(),
            "started_at": 0.0,
            "last_checkpoint": None,
            "failure_count": 0,
        }

    def lasts(self) -> None:
        """Note that it was told so."""
        self.lasted += 1

    def begins(self) -> None:
        """Nothing to do."""

    def final_beat(self) -> dict[str, object]:
        """The last thing it says."""
        return {**self.beat(), "status": "completed"}


# --- without Ray ----------------------------------------------------------------------------------------------------


class FakeManager:
    """What `find_or_make` gives: notes the beats; `alive` False: cannot be reached."""

    def __init__(self) -> None:
        self.calls: list[list[dict[str, Any]]] = []
        self.alive = True
        self.slow = False
        self.error: Exception = ray.exceptions.ActorUnavailableError("gone", b"0" * 16)
        self.forgotten = 0
        self.answers: dict[str, str] = {}
        self.interval_s: float | None = None

    @property
    def beat(self) -> FakeManager:
        """The method of the actor."""
        return self

    def remote(self, beats: list[dict[str, Any]]) -> FakeManager:
        """Call it."""
        self.calls.append(beats)
        return self

    def find_or_make(self, settings: Settings, wait_s: float) -> FakeManager:
        """Instead of `manager.find_or_make`."""
        if not self.alive and self.forgotten:
            raise ManagerUnavailableError("it is not there")
        return self

    def forget(self, settings: Settings) -> None:
        """Instead of `manager.forget`."""
        self.forgotten += 1

    def wait(self, refs: list[Any], timeout: float) -> tuple[list[Any], list[Any]]:
        """Instead of `ray.wait`."""
        return ([], refs) if self.slow else (refs, [])

    def get(self, ref: Any, timeout: float) -> tuple[list[str], float]:
        """Instead of `ray.get`."""
        if not self.alive:
            raise self.error
        said = self.calls[-1]
        answers = [self.answers.get(str(beat["worker_id"]), "ok") for beat in said]
        return answers, self.interval_s or float(said[0]["interval_s"])


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> FakeManager:
    """A manager without Ray."""
    manager = FakeManager()
    monkeypatch.setattr(_beater, "find_or_make", manager.find_or_make)
    monkeypatch.setattr(_beater, "known", lambda settings: manager)
    monkeypatch.setattr(_beater, "forget", manager.forget)
    monkeypatch.setattr(_beater, "FIRST_BEAT_S", 0.05)
    monkeypatch.setattr(_beater, "RETRY_S", 0.02)
    monkeypatch.setattr("faultguard._ray.is_ready", lambda: True)
    monkeypatch.setattr(ray, "wait", manager.wait)
    monkeypatch.setattr(ray, "get", manager.get)
    _beater._lines.clear()
    return manager


@pytest.fixture
def events(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The keys of what is said."""
    said: list[str] = []
    monkeypatch.setattr(_beater, "_said", set())
    monkeypatch.setattr(_events, "emit", lambda level, event, sentence, **fields: said.append(event))
    return said


@pytest.fixture
def beating() -> Iterator[Callable[[FakeSource], FakeSource]]:
    """Registers sources; they are unregistered at the end."""
    sources: list[FakeSource] = []

    def start(source: FakeSource) -> FakeSource:
        _beater.register(source)
        sources.append(source)
        return source

    yield start
    for source in sources:
        _beater.unregister(source)


def settings(run: str = "r", interval: float = 0.03) -> Settings:
    """Of a run that is nowhere."""
    return Settings(run, "/nowhere", "id", "01", heartbeat_interval=interval, heartbeat_timeout=60.0)


def test_short_work_beats_not_at_all(fake: FakeManager, beating: Callable[[FakeSource], FakeSource]) -> None:
    """A worker that ends before its first beat is due costs no call, not even a final one."""
    source = beating(FakeSource(settings()))
    _beater.unregister(source)
    _beater.unregister(source)
    time.sleep(0.1)
    assert fake.calls == []
    assert source.asked == 0


def test_what_lasts_is_told_so_whoever_listens(
    monkeypatch: pytest.MonkeyPatch, fake: FakeManager, beating: Callable[[FakeSource], FakeSource]
) -> None:
    """After a tenth of a second, though the thread that beats stands still in a call: a power failure does not wait."""
    stands = threading.Event()

    def find_or_make(*_: object) -> None:
        stands.wait(BOUND_S)
        raise ManagerUnavailableError("it is not there")

    monkeypatch.setattr(_beater, "find_or_make", find_or_make)
    try:
        first = beating(FakeSource(settings()))
        wait_until(lambda: first.asked > 0)
        second = beating(FakeSource(settings(), "w1"))
        wait_until(lambda: second.lasted > 0)
        assert (second.asked, first.lasted) == (0, 1)
    finally:
        stands.set()


def test_workers_of_a_run_beat_in_one_call(fake: FakeManager, beating: Callable[[FakeSource], FakeSource]) -> None:
    """All workers of a process and a run share a call; another run has its own."""
    for worker_id in ("a", "b"):
        beating(FakeSource(settings(), worker_id))
    beating(FakeSource(settings("other"), "c"))
    wait_until(lambda: len(fake.calls) > 8)
    batches = {tuple(said["worker_id"] for said in call) for call in fake.calls[-4:]}
    assert batches == {("a", "b"), ("c",)}


def test_each_worker_hears_its_own_answer(fake: FakeManager, events: list[str], beating: Callable[[FakeSource], FakeSource]) -> None:
    """Also where one of them could not beat, and where one cannot take what it is told."""

    class Deaf(FakeSource):
        def told(self, reply: str) -> None:
            raise RuntimeError("does not listen")

    fake.answers = {"b": "superseded", "c": "drained"}
    here = settings("answers")
    beating(FakeSource(here, "a", broken=True))
    beating(Deaf(here, "d"))
    sources = [beating(FakeSource(here, worker_id)) for worker_id in ("b", "c", "e")]
    wait_until(lambda: all(source.replies for source in sources))
    assert [set(source.replies) for source in sources] == [{"superseded"}, {"drained"}, {"ok"}]
    assert "faultguard.thread_error" in events


@pytest.mark.parametrize("late", [False, True])
def test_a_process_beats_as_seldom_as_it_is_told(fake: FakeManager, late: bool) -> None:
    """Also where the reply comes late: from a manager that is busy, one more beat at once is the last thing it needs."""
    fake.interval_s, fake.slow = 3600.0, late
    line = _beater._Line(settings(interval=900.0))
    clients = [_beater._Client(FakeSource(settings()), 0.0)]
    again = line.step(clients)
    if late:
        assert again - time.monotonic() <= _beater.REPLY_S
        fake.slow = False
        again = line.step(clients)
    assert 900.0 < again - time.monotonic() <= 3600.0
    assert [beat["interval_s"] for call in fake.calls for beat in call] == [900.0]
    line._due = 0.0
    line.step(clients)
    assert [beat["interval_s"] for call in fake.calls for beat in call] == [900.0, 3600.0]


def test_final_beat_is_sent_once(fake: FakeManager, beating: Callable[[FakeSource], FakeSource]) -> None:
    """Who was ever beaten for says its end."""
    source = beating(FakeSource(settings()))
    wait_until(lambda: fake.calls)
    _beater.unregister(source)
    _beater.unregister(source)
    finals = [said for call in fake.calls for said in call if said.get("final")]
    assert [said["status"] for said in finals] == ["completed"]


def test_outage_is_told_once(fake: FakeManager, events: list[str], beating: Callable[[FakeSource], FakeSource]) -> None:
    """However many beats are lost, one warning and one all-clear; and beats come back by themselves."""
    beating(FakeSource(settings()))
    wait_until(lambda: fake.calls)
    for error in (ray.exceptions.ActorUnavailableError("restarting", b"0" * 16), ray.exceptions.ActorDiedError()):
        fake.error, fake.alive = error, False
        lost = events.count("faultguard.manager_lost")
        wait_until(lambda lost=lost: events.count("faultguard.manager_lost") > lost)  # type: ignore[misc] # binds the loop variable
        time.sleep(0.3)
        fake.alive = True
        back = events.count("faultguard.manager_back")
        wait_until(lambda back=back: events.count("faultguard.manager_back") > back)  # type: ignore[misc] # as above
    assert events == ["faultguard.manager_lost", "faultguard.manager_back"] * 2
    assert fake.forgotten > 0, "a dead actor is looked for by its name"


def test_one_call_in_flight(fake: FakeManager, beating: Callable[[FakeSource], FakeSource], monkeypatch: pytest.MonkeyPatch) -> None:
    """While a reply is due, beats are dropped, not queued."""
    monkeypatch.setattr(_beater, "REPLY_S", 0.01)
    fake.slow = True
    beating(FakeSource(settings()))
    wait_until(lambda: fake.calls)
    time.sleep(0.3)
    assert len(fake.calls) == 1
    fake.slow = False
    wait_until(lambda: len(fake.calls) > 2)


def test_the_first_beat_is_waited_for(fake: FakeManager, beating: Callable[[FakeSource], FakeSource]) -> None:
    """Who asks for it has it before it is due, and does not wait for a second one."""
    source = FakeSource(settings("hurried"))
    beating(source)
    _beater.hurry(source, BOUND_S)
    assert fake.calls
    _beater.hurry(source, threading.TIMEOUT_MAX)


@pytest.mark.parametrize("trouble", ["frozen", "gone"])
def test_where_nobody_listens_nobody_waits(
    trouble: str, fake: FakeManager, beating: Callable[[FakeSource], FakeSource], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A manager that does not answer, or cannot be reached, holds up no work."""
    monkeypatch.setattr(_beater, "REPLY_S", 0.01)
    monkeypatch.setattr(_beater, "STUCK_S", 0.05)
    beating(FakeSource(settings(trouble), "before"))
    if trouble == "frozen":
        fake.slow = True
        wait_until(lambda: fake.calls)
    else:
        fake.alive, fake.forgotten = False, 1
    source = beating(FakeSource(settings(trouble), "after"))
    _beater.hurry(source, BOUND_S)
    assert _beater._clients[id(source)].tried.is_set()
    assert "after" not in {said["worker_id"] for call in fake.calls for said in call}


def test_reply_that_never_comes_is_an_outage(
    fake: FakeManager, events: list[str], beating: Callable[[FakeSource], FakeSource], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A call without a reply is given up after the timeout, and told."""
    monkeypatch.setattr(_beater, "REPLY_S", 0.01)
    fake.slow = True
    hasty = Settings("r", "/nowhere", "id", "01", heartbeat_interval=0.03, heartbeat_timeout=0.1)
    beating(FakeSource(hasty))
    wait_until(lambda: events == ["faultguard.manager_lost"] and len(fake.calls) > 1)


def test_broken_worker_silences_no_other(fake: FakeManager, events: list[str], beating: Callable[[FakeSource], FakeSource]) -> None:
    """A worker that cannot say a beat is reported once, costs no call, and the others beat on."""
    broken = beating(FakeSource(settings(), "broken", broken=True))
    wait_until(lambda: broken.asked > 2)
    assert fake.calls == []
    good = beating(FakeSource(settings(), "good"))
    wait_until(lambda: good.asked > 9)
    assert events == ["faultguard.thread_error"]
    assert {said["worker_id"] for call in fake.calls for said in call} == {"good"}


def test_errors_that_take_turns_are_said_once_each(events: list[str]) -> None:
    """A thread that meets two of them again and again fills no log; nor does one whose errors always differ."""
    for _ in range(3):
        for text in ("one", "the other"):
            _beater._report("beater of a test", RuntimeError(text))
    assert len(events) == 2
    for number in range(2 * _beater.MAX_SAID):
        _beater._report("beater of a test", RuntimeError(str(number)))
    assert len(events) <= _beater.MAX_SAID


def test_broken_manager_reaches_no_user(
    fake: FakeManager, events: list[str], beating: Callable[[FakeSource], FakeSource], monkeypatch: pytest.MonkeyPatch
) -> None:
    """An error that nobody thought of is reported; the thread and the work go on."""

    def broken(*_: object) -> Any:
        raise RuntimeError("unthought of")

    monkeypatch.setattr(_beater, "find_or_make", broken)
    monkeypatch.setattr("faultguard._sidecar.ERROR_PAUSE_S", 0.01)
    source = beating(FakeSource(settings()))
    wait_until(lambda: events)
    time.sleep(0.1)
    assert events == ["faultguard.thread_error"], "the same error is said once"
    monkeypatch.setattr(_beater, "find_or_make", fake.find_or_make)
    wait_until(lambda: fake.calls)
    monkeypatch.setattr(_beater, "known", broken)
    _beater.unregister(source)


def test_waits_for_ray(fake: FakeManager, beating: Callable[[FakeSource], FakeSource], monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a connection nothing is called, or Ray would start a cluster of its own."""
    monkeypatch.setattr("faultguard._ray.is_ready", lambda: False)
    monkeypatch.setattr(_beater, "IDLE_S", 0.01)
    beating(FakeSource(settings()))
    time.sleep(0.2)
    assert fake.calls == []


def test_nothing_after_the_end_of_the_interpreter(fake: FakeManager, beating: Callable[[FakeSource], FakeSource]) -> None:
    """From the exit hook on no call is made."""
    source = beating(FakeSource(settings()))
    wait_until(lambda: fake.calls)
    _beater._at_exit()
    try:
        before = len(fake.calls)
        time.sleep(0.15)
        _beater.unregister(source)
        assert len(fake.calls) == before
    finally:
        _beater._exiting.clear()


# --- in Ray ---------------------------------------------------------------------------------------------------------


def live() -> dict[str, dict[str, Any]]:
    """What the manager of the run has heard, by worker; does not make one."""
    handle = find(current_settings())
    if handle is None:
        return {}
    try:
        return {said["worker_id"]: said for said in ray.get(handle.live_workers.remote(), timeout=BOUND_S)}
    except ray.exceptions.RayActorError:
        return {}


def pid_of_manager() -> int:
    """Its process."""
    return int(ray.get(faultguard.manager().hello.remote(1, "", ""), timeout=BOUND_S)["pid"])


@ray.remote(num_cpus=0)
class Flag:
    """Something to wait for."""

    def __init__(self) -> None:
        self.up = False

    def raise_it(self) -> None:
        """Now."""
        self.up = True

    def is_up(self) -> bool:
        """Whether it was."""
        return self.up


@ray.remote
def beat_until(flag: Any, worker_id: str) -> dict[str, Any]:
    """A task that beats until the flag is up; says what it logged, and whether its thread went."""
    import logging

    said: list[str] = []

    class Handler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            said.append(f"{record.levelname} {record.getMessage()}")

    logger = logging.getLogger("faultguard")
    logger.addHandler(handler := Handler())
    logger.setLevel(logging.INFO)
    source = FakeSource(current_settings(), worker_id)
    before = set(sys.modules)
    _beater.register(source)
    while not ray.get(flag.is_up.remote()):
        time.sleep(0.05)
    _beater.unregister(source)
    started = time.monotonic()
    while is_running() and time.monotonic() - started < BOUND_S:
        time.sleep(0.02)
    logger.removeHandler(handler)
    return {
        "said": said,
        "asked": source.asked,
        "gone_s": time.monotonic() - started,
        "structlog": "structlog" in sys.modules.keys() - before,
    }


@pytest.mark.ray
def test_beats_of_a_real_task(start_run: StartRun) -> None:
    """A task beats from its own process; its end is seen at once; its thread is gone within seconds, and it said nothing."""
    start_run(**QUICK)
    flag = Flag.remote()  # type: ignore[attr-defined] # Ray adds it
    pending = beat_until.remote(flag, "../../x")
    wait_until(lambda: live().get("../../x", {}).get("current_batch", 0) > 3)
    ray.get(flag.raise_it.remote())
    wait_until(lambda: live()["../../x"]["final"])
    assert live()["../../x"]["status"] == "completed"
    result = ray.get(pending, timeout=BOUND_S)
    assert result["said"] == []
    assert not result["structlog"], "a process that has nothing to say does not pay for saying it"
    assert result["gone_s"] < 5.0
    ray.kill(faultguard.manager())


@pytest.mark.ray
@pytest.mark.parametrize("how", ["SIGKILL", "ray.kill"])
def test_beats_come_back_by_themselves(start_run: StartRun, how: str) -> None:
    """The manager dies while a task beats: it restarts, or is made anew, and the beats find it. One warning, one all-clear."""
    start_run(**QUICK)
    flag = Flag.remote()  # type: ignore[attr-defined] # Ray adds it
    pending = beat_until.remote(flag, "w")
    wait_until(lambda: "w" in live())
    before = pid_of_manager()
    if how == "SIGKILL":
        os.kill(before, signal.SIGKILL)
    else:
        ray.kill(faultguard.manager())
        forget(current_settings())
    killed = time.monotonic()
    wait_until(lambda: live().get("w", {}).get("age_s", 99.0) < 0.5 and pid_of_manager() != before)
    print(f"beats are back after {time.monotonic() - killed:.2f} s")
    ray.get(flag.raise_it.remote())
    said = ray.get(pending, timeout=BOUND_S)["said"]
    assert len(said) == 2, said
    assert said[0].startswith("WARNING faultguard: the manager of run")
    assert said[1].endswith("is back.")
    ray.kill(faultguard.manager())
