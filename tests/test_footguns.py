"""Loops that would count wrong after a resume: each is told once, with what to write, and the correct twin is left alone."""

from __future__ import annotations

import logging
import operator
import os
import queue
import re
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from faultguard import _footguns
from faultguard._handle import Checkpoint
from faultguard.errors import UsageError
from faultguard.storage.memory import MemoryStore
from tests.attempts import Attempt, Worker, write_inline

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    Prepare = Callable[[Checkpoint], None]

WAIT_S = 30


class Told:
    """What was told of footguns: the events, and the sentences."""

    def __init__(self, caplog: pytest.LogCaptureFixture) -> None:
        self._caplog = caplog

    @property
    def events(self) -> list[str]:
        return [vars(record)["event"].removeprefix("faultguard.") for record in self._caplog.records]

    @property
    def text(self) -> str:
        """Of the only one."""
        (record,) = self._caplog.records
        assert record.levelno == logging.WARNING
        return record.getMessage()


@pytest.fixture
def told(caplog: pytest.LogCaptureFixture) -> Told:
    """Of this test."""
    return Told(caplog)


@pytest.fixture(autouse=True)
def _inline(monkeypatch: pytest.MonkeyPatch) -> None:
    write_inline(monkeypatch)


# --- batches drawn ahead of the work --------------------------------------------------------------------------------


def _by_a_thread(batches: Iterator[int]) -> list[int]:
    """Read ahead through a queue."""
    items: queue.Queue[int] = queue.Queue()
    reader = threading.Thread(target=lambda: any(map(items.put, batches)), daemon=True)
    reader.start()
    reader.join(WAIT_S)
    return [items.get(timeout=WAIT_S) for _ in range(items.qsize())]


def _by_a_pool(batches: Iterator[int]) -> list[int]:
    with ThreadPool(1) as pool:
        return list(pool.imap(abs, batches))


def _by_an_executor(batches: Iterator[int]) -> list[int]:
    with ThreadPoolExecutor(1) as pool:
        return list(pool.map(abs, batches))


AHEAD: dict[str, tuple[Callable[[Iterator[int]], Iterable[int]], str]] = {
    "list": (list, "list(batches(...)) or the like"),
    "tuple": (tuple, "list(batches(...)) or the like"),
    "sorted": (sorted, "list(batches(...)) or the like"),
    "unpacked": (lambda batches: [*batches], "list(batches(...)) or the like"),
    "reversed": (lambda batches: reversed(list(batches)), "list(batches(...)) or the like"),
    "executor": (_by_an_executor, "an executor"),
    "pool": (_by_a_pool, "an executor"),
    "thread": (_by_a_thread, "another thread than the one that called batches()"),
}


@pytest.mark.parametrize("way", AHEAD)
def test_batches_drawn_ahead(way: str, told: Told) -> None:
    """Whoever draws all batches before it works on the first is told in the first, undisturbed attempt, and once."""
    draw, how = AHEAD[way]
    ckpt = Checkpoint.in_memory(task="embed", worker_id="w0")
    assert sorted(draw(ckpt.batches(range(5), name="shards"))) == [0, 1, 2, 3, 4]
    assert told.text == (
        f"faultguard: 'embed/w0' has the batches of loop 'shards' drawn ahead of the work, by {how}. A batch counts as done when the next "
        "one is drawn, so a checkpoint counts work that has not begun, and what resumes leaves it out. Write `for batch in "
        "batches(items):` and do the work inside, or hand on few batches at a time: batches(groups)."
    )
    list(ckpt.batches(range(5), name="again"))
    list(Checkpoint.in_memory(task="embed", worker_id="w1").batches(range(5)))
    assert told.events == ["drawn_ahead"]


def _statement(batches: Iterator[int]) -> list[int]:
    done = []
    for batch in batches:
        done.append(batch)  # noqa: PERF402 - a loop is what is tried
    return done


def _by_hand(batches: Iterator[int]) -> list[int]:
    done = [next(batches)]
    while (batch := next(batches, None)) is not None:
        done.append(batch)
    return done


def _with_a_bar(batches: Iterator[int]) -> list[int]:
    """As progress bars do: ask how many there will be, then loop."""
    operator.length_hint(batches)
    return _statement(_tracked(batches))


def _tracked(batches: Iterator[int]) -> Iterator[int]:
    operator.length_hint(batches)
    yield from batches


def _groups(batches: Iterator[int]) -> list[int]:
    """Hand one batch at a time to an executor, and wait for it."""
    with ThreadPoolExecutor(2) as pool:
        return [pool.submit(abs, batch).result(WAIT_S) for batch in batches]


def _left_early(batches: Iterator[int]) -> list[int]:
    for batch in batches:
        if batch:
            break
    return [0, 1, 2, 3, 4]


@pytest.mark.parametrize(
    "draw",
    [
        _statement,
        _by_hand,
        _with_a_bar,
        _groups,
        _left_early,
        lambda batches: [batch for batch in batches],  # noqa: C416 - likewise
        lambda batches: [batch for _, batch in enumerate(batches)],
        lambda batches: [batch for batch, _ in zip(batches, range(9), strict=False)],
        lambda batches: map(abs, batches),
    ],
    ids=["for", "next", "bar", "groups", "break", "comprehension", "enumerate", "zip", "map"],
)
def test_one_batch_at_a_time(draw: Callable[[Iterator[int]], Iterable[int]], told: Told) -> None:
    """Each batch is drawn when the one before it was worked on: nothing is told."""
    assert _statement(iter(draw(Checkpoint.in_memory().batches(range(5))))) == [0, 1, 2, 3, 4]
    assert told.events == []


def test_a_loop_in_a_thread_of_its_own(told: Told) -> None:
    """A thread that has the whole loop draws nothing ahead."""
    ckpt = Checkpoint.in_memory()
    thread = threading.Thread(target=lambda: _statement(ckpt.batches(range(5))), daemon=True)
    thread.start()
    thread.join(WAIT_S)
    assert ckpt.current_batch == 5
    assert told.events == []


# --- state that is changed before the loop that resumes -------------------------------------------------------------


def resumed(prepare: Prepare, *, state: dict[str, Any] | None = None) -> Attempt:
    """The second attempt of a loop that died in its batch 5, before which the body did `prepare`; it has gone on to the end."""
    worker = Worker(MemoryStore())
    for dies_at in (5, 99):
        attempt = worker.attempt(state=state)
        ckpt = attempt.ckpt
        prepare(ckpt)
        for batch in ckpt.batches(range(8)):
            if batch == dies_at:
                break
            ckpt.state["rows"] = ckpt.state.get("rows", 0) + 1
            ckpt.state.setdefault("seen", []).append(batch)
            ckpt.state["best"] = min(ckpt.state.get("best", 9.0), float(batch))
        attempt.die()
    return attempt


def _rows(ckpt: Checkpoint) -> None:
    ckpt.state["rows"] = 0


def _seen(ckpt: Checkpoint) -> None:
    ckpt.state["seen"] = []


def _best(ckpt: Checkpoint) -> None:
    ckpt.state["best"] = float("inf")


def _all(ckpt: Checkpoint) -> None:
    ckpt.state = {"rows": 0, "seen": []}


@pytest.mark.parametrize(
    ("prepare", "key", "before", "now"),
    [(_rows, "rows", "5", "0"), (_seen, "seen", "a list of 5", "[]"), (_best, "best", "0.0", "inf"), (_all, "rows", "5", "0")],
)
def test_state_is_reset_before_the_loop_that_resumes(prepare: Prepare, key: str, before: str, now: str, told: Told) -> None:
    """What the batches before had added is lost, and the text says which key, and what to write."""
    attempt = resumed(prepare)
    assert attempt.ckpt.state.get("rows") in {3, 8}
    assert told.text == (
        f"faultguard: 'task/w0' has set state['{key}'], which was restored as {before}, to {now} before loop 'batches' goes on at batch 5: "
        f"what the batches before it had added is lost. The code before a loop runs again on resume. Write checkpointed(state={{'{key}': "
        f"{now}}}) or ckpt.state.setdefault('{key}', {now}) before the loop."
    )


def _by_default(ckpt: Checkpoint) -> None:
    ckpt.state.setdefault("rows", 0)
    ckpt.state.setdefault("seen", [])


def _if_new(ckpt: Checkpoint) -> None:
    if not ckpt.resumed:
        ckpt.state["rows"] = 0


def _settings(ckpt: Checkpoint) -> None:
    ckpt.state["rate"] = 0.1
    ckpt.state["names"] = []
    ckpt.state["flag"] = False


def _attempts(ckpt: Checkpoint) -> None:
    ckpt.state["attempts"] = ckpt.state.get("attempts", 0) + 1


def _moments(ckpt: Checkpoint) -> None:
    ckpt.state["begun"] = time.time()
    ckpt.state["where"] = f"pid {os.getpid()}, attempt {ckpt.attempt}"


@pytest.mark.parametrize("prepare", [_by_default, _if_new, _settings, _attempts, _moments])
def test_state_that_is_prepared_well(prepare: Prepare, told: Told) -> None:
    """Defaults, constants, and what is of the attempt and not of its batches: nothing is told, and nothing is lost."""
    assert resumed(prepare).ckpt.state["rows"] == 8
    assert told.events == []


def test_the_option_state_is_a_default(told: Told) -> None:
    """It gives way to what was saved."""
    assert resumed(lambda ckpt: None, state={"rows": 0, "seen": [], "best": float("inf")}).ckpt.state["rows"] == 8
    assert told.events == []


def nested(before: Prepare, after: Prepare, *, dies_at: tuple[int, int] = (2, 3)) -> dict[str, Any]:
    """The state after epochs of steps, of which one attempt died in a step; each epoch does `before` and `after` around its steps."""
    worker = Worker(MemoryStore())
    for stop in (dies_at, (-1, -1)):
        attempt = worker.attempt(state={"epochs": 0, "log": [], "sum": 0, "total": 0})
        ckpt = attempt.ckpt
        _epochs(ckpt, before, after, stop)
        attempt.die()
    return dict(ckpt.state)


def _epochs(ckpt: Checkpoint, before: Prepare, after: Prepare, stop: tuple[int, int]) -> None:
    for epoch in ckpt.batches(range(4), name="epochs"):
        before(ckpt)
        for step in ckpt.batches(range(6), name="steps"):
            if (epoch, step) == stop:
                return
            ckpt.state["sum"] += 1
            ckpt.state["total"] += 1
        after(ckpt)


def _nothing(ckpt: Checkpoint) -> None:
    pass


def _count(ckpt: Checkpoint) -> None:
    ckpt.state["epochs"] += 1


def _log(ckpt: Checkpoint) -> None:
    ckpt.state["log"].append(ckpt.position[0])


def _new_sum(ckpt: Checkpoint) -> None:
    ckpt.state["sum"] = 0


@pytest.mark.parametrize(("before", "key"), [(_count, "epochs"), (_log, "log")])
def test_state_is_added_to_before_an_inner_loop(before: Prepare, key: str, told: Told) -> None:
    """The outer body runs again on resume, and adds again; told where the inner loop goes on."""
    state = nested(before, _nothing)
    assert state["epochs"] + len(state["log"]) == 5, "wrong: there are four epochs"
    assert told.text == (
        f"faultguard: 'task/w0' has added to state['{key}'] before loop 'steps', which goes on at batch 3 of a batch around it that had "
        "done so already: it counts twice. The code before an inner loop runs again on resume. Add behind the inner loop, or set a value "
        "that is the same each time."
    )


def test_state_is_reset_before_an_inner_loop(told: Told) -> None:
    """What the inner batches had added is lost; the text says where to set it back."""
    nested(_new_sum, _nothing)
    assert told.events == ["state_reset"]
    assert told.text.endswith("before the loop, and set it back behind loop 'steps', at the end of the batch around it.")


def _same(ckpt: Checkpoint) -> None:
    ckpt.state["epoch"] = ckpt.position[0]
    ckpt.state["begun"] = time.time()
    ckpt.state["stamp"] = time.time_ns()


@pytest.mark.parametrize(
    ("before", "after", "dies_at"),
    [
        (_nothing, _count, (2, 3)),
        (_nothing, _log, (2, 3)),
        (_nothing, _new_sum, (2, 3)),
        (_same, _nothing, (2, 3)),
        (_count, _nothing, (2, 0)),  # no step is done yet: what the outer body did is not saved either
        (_new_sum, _nothing, (2, 0)),
    ],
)
def test_state_around_an_inner_loop_that_is_right(before: Prepare, after: Prepare, dies_at: tuple[int, int], told: Told) -> None:
    """Added behind the inner loop, or the same each time: nothing is told, and the state is that of an undisturbed run."""
    state = nested(before, after, dies_at=dies_at)
    undisturbed = nested(before, after, dies_at=(-1, -1))
    for ignored in ("begun", "stamp"):
        state.pop(ignored, None), undisturbed.pop(ignored, None)
    assert state == undisturbed
    assert state["total"] == 24
    assert told.events == []


# --- state that grows -----------------------------------------------------------------------------------------------


def grown(sizes: Callable[[int], int], batches: int) -> None:
    """A loop whose state has these sizes, each of which is encoded."""
    growth, ckpt = _footguns.Growth(), Checkpoint.in_memory()
    for done in range(1, batches + 1):
        if (size := sizes(done)) > _footguns.LARGE_BYTES:
            growth.add(ckpt, size, done)


def test_state_grows(told: Told) -> None:
    """A list that each batch adds to is told of in the first attempt, when it is large and has always grown."""
    ckpt = Checkpoint.in_memory(task="embed", worker_id="w0")
    ckpt.configure(every=1)
    for batch in ckpt.batches(range(100)):
        ckpt.state.setdefault("texts", []).append(f"{batch:0100000}")
    size, done = re.findall(r"state of ([0-9.]+) MB after (\d+) batches", told.text)[0]
    assert float(size) == pytest.approx(int(done) / 10, abs=0.1)
    assert told.text == (
        f"faultguard: 'embed/w0' has a state of {size} MB after {done} batches, which grows with every batch, and each checkpoint writes "
        "all of it: with twice the batches checkpoints cost four times as much. Write results to a file, table or object per batch "
        "(ckpt.idempotency_key() names it), and keep in state where they are."
    )


@pytest.mark.parametrize("per_batch", [700, 5_000, 90_000])
def test_state_that_grows_is_seen_at_any_pace(per_batch: int, told: Told) -> None:
    """Whatever a batch adds."""
    grown(lambda done: 300 + per_batch * done, 20_000_000 // per_batch)
    assert told.events == ["state_grows"]


@pytest.mark.parametrize(
    "sizes",
    [
        lambda done: 50_000_000,
        lambda done: 1_000 if done < 10 else 50_000_000,
        lambda done: min(done * 9_000_000, 50_000_000),
        lambda done: 60_000 * int(done**0.5),
        lambda done: min(done * 1_000, 3_000_000),
        lambda done: 20_000_000 + done,
    ],
    ids=["large", "at once", "in steps", "ever slower", "bounded", "hardly"],
)
def test_state_that_does_not_grow_with_the_batches(sizes: Callable[[int], int], told: Told) -> None:
    """Large from the beginning, after some batches, or ever slower: a model, or the words of a language."""
    grown(sizes, 20_000)
    assert told.events == []


# --- results kept outside of state ----------------------------------------------------------------------------------


def returned(n: int, dies_at: int, body: Callable[[Checkpoint, list[int], int], None], result: Callable[[list[int]], object]) -> None:
    """What the second attempt of a loop returns, of which the first one died."""
    worker = Worker(MemoryStore())
    for stop in (dies_at, -1):
        attempt = worker.attempt()
        results: list[int] = []
        for batch in attempt.ckpt.batches(range(n)):
            if batch == stop:
                break
            body(attempt.ckpt, results, batch)
        else:
            attempt.ckpt.returns(result(results))
            attempt.complete()
        attempt.die()


def _append(_: Checkpoint, results: list[int], batch: int) -> None:
    results.append(batch)


def _keep(ckpt: Checkpoint, _: list[int], batch: int) -> None:
    ckpt.state.setdefault("results", []).append(batch)


def test_results_are_kept_outside_of_state(told: Told) -> None:
    """A list that has the results of this attempt only is told of, with how many are missing."""
    returned(10, 6, _append, lambda results: results)
    assert told.text == (
        "faultguard: 'task/w0' went on at batch 6 of 10 and returns a list of 4, one for each batch since: the results of those before are "
        "not in it, because only what is in state comes back. Write results = ckpt.state.setdefault('results', []), or write each result "
        "to a file and return the paths."
    )


@pytest.mark.parametrize(
    ("dies_at", "body", "result"),
    [
        (6, _keep, lambda results: list(range(10))),
        (6, _keep, lambda results: [1, 2, 3, 4]),
        (6, _append, lambda results: [f"part-{batch}" for batch in range(10)]),
        (6, _append, lambda results: None),
        (6, _append, len),
        (8, _append, lambda results: results),
        (0, _append, lambda results: results),
    ],
    ids=["state", "of state", "all paths", "none", "number", "too few to tell", "from zero"],
)
def test_results_that_are_whole(dies_at: int, body: Any, result: Any, told: Told) -> None:
    """Kept in state, made of something else, or not certain: nothing is told."""
    returned(10, dies_at, body, result)
    assert told.events == []


# --- a handle in another process ------------------------------------------------------------------------------------


def _in_a_child(use: Callable[[], object]) -> int:
    """Fork, and use something there: 0 if it is refused, 1 if not."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            use()
        except UsageError as error:
            code = (
                0 if "on the handle of worker 'w0' is refused in a forked process: the attempt is that of its parent" in str(error) else 2
            )
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


@pytest.mark.parametrize("call", ["batches", "advance", "save", "track", "check", "section", "boundary"])
def test_a_handle_used_after_a_fork(call: str) -> None:
    """A child that counts or saves would write as its parent; it is refused, and the parent goes on."""
    worker = Worker(MemoryStore())
    ckpt = worker.attempt().ckpt
    uses: dict[str, Callable[[], object]] = {
        "batches": lambda: ckpt.batches([1]),
        "advance": ckpt.advance,
        "save": ckpt.save,
        "track": ckpt.track,
        "check": ckpt.check,
        "section": lambda: ckpt.section("download", None),
    }
    if call != "boundary":
        assert _in_a_child(uses[call]) == 0
        ckpt.advance()
        return
    batches = iter(ckpt.batches(range(3)))
    next(batches)
    assert _in_a_child(lambda: next(batches)) == 0
    assert list(batches) == [1, 2]


def test_what_a_child_may_ask_for_while_the_claim_is_not_durable() -> None:
    """Only the parent can make it so: the child gets no token then, and no key, and touches no log."""
    worker = Worker(MemoryStore())
    ckpt = worker.attempt(volatile=True).ckpt
    assert _in_a_child(lambda: ckpt.token) == 0
    assert _in_a_child(ckpt.idempotency_key) == 0
    assert len(worker.records()) == 1
    assert ckpt.token == 1
    assert _in_a_child(lambda: ckpt.token) == _in_a_child(ckpt.idempotency_key) == 1
    ckpt.advance(wait=True)


def test_a_handle_of_the_child() -> None:
    """One that is made there is its own; and what its parent knew may be read."""
    ckpt = Worker(MemoryStore()).attempt(state={"rows": 7}).ckpt
    assert _in_a_child(lambda: Checkpoint.in_memory().advance(ckpt.state["rows"])) == 1


# --- on a real cluster ----------------------------------------------------------------------------------------------

PROGRAM = """
import contextlib, os, signal, sys
import ray, faultguard

DIES_AT = 4

def die_once(ckpt, batch):
    if batch == DIES_AT and ckpt.attempt == 1:
        ckpt.advance(wait=True)
        os.kill(os.getpid(), signal.SIGKILL)

@faultguard.recoverable
@ray.remote
def ahead(worker_id):
    return len(list(faultguard.batches(range(8))))

@faultguard.recoverable
@ray.remote
def reset(worker_id):
    ckpt = faultguard.current()
    ckpt.state["rows"] = 0
    for batch in ckpt.batches(range(8)):
        ckpt.state["rows"] += 1
        die_once(ckpt, batch)
    return ckpt.state["rows"]

@faultguard.recoverable
@ray.remote
def beside(worker_id):
    ckpt, results = faultguard.current(), []
    for batch in ckpt.batches(range(8)):
        results.append(batch)
        die_once(ckpt, batch)
    return results

@faultguard.recoverable
@ray.remote
def right(worker_id):
    ckpt = faultguard.current()
    results = ckpt.state.setdefault("results", [])
    for batch in ckpt.batches(range(8)):
        results.append(batch)
        die_once(ckpt, batch)
    return results

ray.init(num_cpus=2)
with faultguard.init(checkpoint_dir=sys.argv[1]):
    print(faultguard.get([ahead.remote(f"w{i}") for i in range(6)]))
    print(faultguard.get([reset.remote("w0"), beside.remote("w0"), right.remote("w0")]))
for cut in (True, False):
    with contextlib.suppress(KeyError), faultguard.init(run="nightly", checkpoint_dir=sys.argv[1]):
        print(faultguard.get(right.remote("w1")))
        if cut:
            raise KeyError("the driver's own")
with faultguard.init(run="nightly", checkpoint_dir=sys.argv[1], resume="always"):
    print(faultguard.get(right.remote("w1")))
"""


@pytest.mark.ray
def test_footguns_of_real_tasks(tmp_path: Path, ray_temp_dir: str) -> None:
    """Processes that die of SIGKILL resume and tell, each once per process and task; right tasks beside them are left alone."""
    script = tmp_path / "program.py"
    script.write_text(PROGRAM, encoding="utf-8")
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_ADDRESS", "FAULTGUARD_"))}
    environment = {**inherited, "RAY_ADDRESS": "local", "RAY_TMPDIR": ray_temp_dir}
    command = [sys.executable, str(script), str(tmp_path / "checkpoints")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, check=False, cwd=tmp_path, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    said = [line for line in done.stdout.splitlines() if line.startswith("[")]
    every = str(list(range(8)))
    assert said == [str([8] * 6), f"[3, [5, 6, 7], {every}]", every, every, every]
    logs = [path.read_text("utf-8") for path in Path(ray_temp_dir).glob("ray/session_2*/logs/worker-*.err")]
    for sentence, processes in (
        ("has the batches of loop 'batches' drawn ahead of the work, by list(batches(...)) or the like", range(1, 7)),
        ("'reset/w0' has set state['rows'], which was restored as 5, to 0 before loop 'batches' goes on at batch 5", range(1, 2)),
        ("'beside/w0' went on at batch 5 of 8 and returns a list of 3, one for each batch since", range(1, 2)),
    ):
        assert sum(sentence in log for log in logs) in processes, sentence
        assert max(log.count(sentence) for log in logs) == 1, sentence
    of_right = [line for log in logs for line in log.splitlines() if "'right/" in line]
    assert of_right
    assert [line for line in of_right if "resumes at batch 5" not in line] == []
    nothing_ran = "\n".join(line for line in done.stderr.splitlines() if "every result" in line)
    assert nothing_ran == (
        "faultguard: every result of run 'nightly' (#1) came from the record of an earlier driver, and nothing was run: what has changed "
        "in code or data since then shows in none of them. To compute them anew, write init(run='nightly', resume='never')."
    )
