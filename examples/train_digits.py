"""Train classifiers on scikit-learn's digits (1 797 real scans, bundled: no download) with tasks that survive SIGKILL.

    python examples/train_digits.py                      # train, print accuracies; kill a worker process meanwhile, if you like
    python examples/train_digits.py --demo               # train twice, undisturbed and under fire; compare bit for bit
    python examples/train_digits.py --demo --plain-ray   # and a third time under the same fire, without faultguard

The first part is the example. The rest is the demo, which believes nothing that faultguard says of itself: each batch leaves a
line in a diary of its worker, and where a kill hit, where work went on and what was redone is counted there. The batches are
paced by nothing but their own work.
"""

from __future__ import annotations

import argparse
import itertools
import logging
import os
import shutil
import signal
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

if "--demo" in sys.argv:  # Ray reads these when it is imported: the demo tells of its kills itself, and phones nobody
    os.environ["RAY_DEDUP_LOGS_SKIP_REGEX"] = r"A worker died or was killed|Task \w+ failed\. There are"
    os.environ["RAY_DEDUP_LOGS_ALLOW_REGEX"] = "faultguard"
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"

import numpy as np
import ray
from sklearn.datasets import load_digits
from sklearn.linear_model import SGDClassifier

import faultguard

if TYPE_CHECKING:
    from collections.abc import Iterator

ALPHAS = {"alpha-0.001": 0.001, "alpha-0.01": 0.01, "alpha-0.1": 0.1}  # one worker for each strength of regularisation
EPOCHS = 16
BATCH = 32
TRAIN = 1437  # digits to learn from; the other 360 are the test
NOISE = 2.0  # added to pixels from 0 to 16, so that no epoch sees the same images
SEED = 7
LEARNED = ("classes_", "coef_", "intercept_", "t_")  # what partial_fit goes on from


@faultguard.recoverable(max_failures=3, every=50)  # batches between checkpoints; by default as few as cost 1 % of the time
@ray.remote(num_cpus=0.5)
def train(worker_id: str, alpha: float, epochs: int, diaries: str = "") -> dict[str, Any]:
    """Train one classifier: epochs outside, shuffled mini-batches inside."""
    images, labels = load_digits(return_X_y=True)
    model = SGDClassifier(alpha=alpha, random_state=SEED)
    rng = np.random.default_rng(SEED)

    ckpt = faultguard.current()
    ckpt.track(model=(lambda: learned(model), vars(model).update), rng=rng)  # carried from here on, restored if there is a checkpoint
    for epoch in ckpt.batches(range(epochs), name="epochs"):
        # This line runs again when the work goes on within the epoch, with `rng` as it was further on: so it draws from the epoch's number.
        order = np.random.default_rng([SEED, epoch]).permutation(TRAIN)
        for start in ckpt.batches(range(0, TRAIN, BATCH), name="mini-batches"):
            note(diaries, worker_id, epoch, start)
            rows = order[start : start + BATCH]
            noise = rng.normal(scale=NOISE, size=images[rows].shape)  # each batch counts once, and so does what it draws
            model.partial_fit(images[rows] + noise, labels[rows], classes=range(10))

    return {
        "accuracy": float(model.score(images[TRAIN:], labels[TRAIN:])),
        "result": {**learned(model), "rng": rng.bit_generator.state},
        "failures": [(failure.cause, failure.pid) for failure in ckpt.failures],
    }


def learned(model: SGDClassifier) -> dict[str, Any]:
    """What the model has learned; nothing before its first batch."""
    return {name: vars(model)[name] for name in LEARNED if name in vars(model)}


def note(diaries: str, worker_id: str, epoch: int, start: int) -> None:
    """For the demo: write down, outside of faultguard, that this process begins this batch."""
    if diaries:
        with Path(diaries, worker_id).open("a", encoding="ascii") as file:
            file.write(f"{os.getpid()} {batch_number(epoch, start)} {time.monotonic():.6f}\n")


def batch_number(epoch: int, start: int = 0) -> int:
    """Number of a batch, counted over all epochs."""
    return epoch * len(range(0, TRAIN, BATCH)) + start // BATCH


def example(epochs: int) -> None:
    """Train all workers and print how good they are."""
    ray.init()
    trained = faultguard.get([train.remote(worker_id, alpha, epochs) for worker_id, alpha in ALPHAS.items()])
    for worker_id, model in zip(ALPHAS, trained, strict=True):
        print(f"{worker_id:12} accuracy {model['accuracy']:.3f}, {len(model['failures'])} failures survived")


# --- the demo: the diaries ------------------------------------------------------------------------------------------

FIRE_AT = (30.0, 45.0, 60.0, 75.0)  # per cent of the work of a worker; the workers take turns
MANAGER_AT = 50.0
POLL_S = 0.01
PATIENCE_S = 20.0


@dataclass
class Attempt:
    """The batches that one process worked on, with the moments when it began them."""

    pid: int
    batches: list[int] = field(default_factory=list)
    times: list[float] = field(default_factory=list)


class Diary:
    """What a worker did, in its own lines. A line that is written survives SIGKILL: the kernel has it."""

    def __init__(self, path: Path) -> None:
        path.touch()
        self._path = path
        self._read = 0
        self.attempts: list[Attempt] = []

    def read(self) -> None:
        """Read what is new."""
        with self._path.open(encoding="ascii") as file:
            file.seek(self._read)
            whole = file.read().rpartition("\n")
        self._read += len("".join(whole[:2]))
        for line in whole[0].splitlines():
            pid, batch, moment = line.split()
            if not self.attempts or self.attempts[-1].pid != int(pid):
                self.attempts.append(Attempt(int(pid)))
            self.attempts[-1].batches.append(int(batch))
            self.attempts[-1].times.append(float(moment))

    @property
    def redone(self) -> int:
        """Batches that were begun more than once."""
        begun = [batch for attempt in self.attempts for batch in attempt.batches]
        return len(begun) - len(set(begun))

    @property
    def saved_s(self) -> float:
        """Work that starting from zero would have repeated: for each resume, the measured seconds of the batches before it."""
        saved_s = 0.0
        took: dict[int, float] = {}
        for before, after in itertools.pairwise(self.attempts):
            for batch, (begun, ended) in zip(before.batches, itertools.pairwise(before.times), strict=False):
                took[batch] = ended - begun
            saved_s += sum(seconds for batch, seconds in took.items() if batch < after.batches[0])
        return saved_s


# --- the demo: training under fire ----------------------------------------------------------------------------------


@dataclass
class Kill:
    """A planned SIGKILL of the process of a worker, once it has come to batch `planned`. `hit` is the batch in which it died."""

    worker_id: str
    planned: int
    pid: int = 0
    hit: int | None = None


@dataclass
class Fire:
    """All that is to be killed while the workers are in their loops of `total` batches."""

    total: int
    kills: list[Kill] = field(default_factory=list)
    manager_at: int | None = None  # when any worker has come to this batch
    manager_hit: int | None = None  # where that worker was
    manager_pids: tuple[int, int] = (0, 0)  # before and after

    def shoot(self, worker_id: str, diary: Diary) -> None:
        """Kill what is due now that this worker is where it is. Nothing is killed late: a plan that misses the loops fails the demo."""
        newest = diary.attempts[-1]
        if newest.batches[-1] >= self.total - 1 or any(kill.pid == newest.pid for kill in self.kills):
            return
        due = next((kill for kill in self.kills if kill.worker_id == worker_id and kill.hit is None), None)
        if due is not None and newest.batches[-1] >= due.planned:
            os.kill(newest.pid, signal.SIGKILL)
            wait_until_gone(newest.pid)
            diary.read()
            due.pid, due.hit = newest.pid, newest.batches[-1]  # its last line: it died in this batch, or before it began the next
            say(f"SIGKILL to {worker_id}, pid {due.pid}, in batch {due.hit} of {self.total}")
        elif self.manager_at is not None and self.manager_hit is None and newest.batches[-1] >= self.manager_at:
            os.kill(self.manager_pids[0], signal.SIGKILL)
            self.manager_hit = newest.batches[-1]
            say(f"SIGKILL to the manager, pid {self.manager_pids[0]}, while {worker_id} is in batch {self.manager_hit} of {self.total}")


def plan(percents: list[float], total: int, *, manager: bool) -> Fire:
    """Kills at these parts of the work, the workers in turn."""
    kills = [Kill(worker_id, round(total * percent / 100)) for worker_id, percent in zip(itertools.cycle(ALPHAS), percents, strict=False)]
    return Fire(total, kills, manager_at=round(total * MANAGER_AT / 100) if manager else None)


@dataclass
class Trained:
    """What a run gave, and what the diaries say of it."""

    results: dict[str, dict[str, Any]]
    diaries: dict[str, Diary]
    seconds: float  # from the first batch on: starting processes for the first time is nobody's merit or fault

    @property
    def redone(self) -> int:
        """Batches that were begun more than once, over all workers."""
        return sum(diary.redone for diary in self.diaries.values())


@ray.remote(num_cpus=0.5, max_retries=20)
def train_plain(*arguments: Any) -> dict[str, Any]:
    """The same training as a plain Ray task: a decorated function that is called directly saves nothing and retries nothing."""
    trained: dict[str, Any] = train(*arguments)
    return trained


def train_under_fire(task: Any, folder: Path, epochs: int, fire: Fire) -> Trained:
    """Start all workers, kill what the plan says while they are in their loops, and wait for the results."""
    folder.mkdir()
    diaries = {worker_id: Diary(folder / worker_id) for worker_id in ALPHAS}
    if fire.manager_at is not None:
        fire.manager_pids = (manager_pid(), 0)
    refs = [task.remote(worker_id, alpha, epochs, str(folder)) for worker_id, alpha in ALPHAS.items()]
    progress = Progress(fire.total)
    waiting = refs
    while waiting:
        _, waiting = ray.wait(waiting, num_returns=len(waiting), timeout=POLL_S)
        for worker_id, diary in diaries.items():
            known = len(diary.attempts)
            diary.read()
            if 0 < known < len(diary.attempts):
                say(f"{worker_id} goes on in batch {diary.attempts[-1].batches[0]}, pid {diary.attempts[-1].pid}")
            if diary.attempts:
                fire.shoot(worker_id, diary)
        progress.show(diaries)
    ended = time.monotonic()
    results = faultguard.get(refs, progress=False)
    progress.show(diaries, last=True)
    if fire.manager_hit is not None:
        fire.manager_pids = (fire.manager_pids[0], manager_pid(unlike=fire.manager_pids[0]))
        say(f"The manager is back, pid {fire.manager_pids[1]}")
    began = min(diary.attempts[0].times[0] for diary in diaries.values())
    return Trained(dict(zip(ALPHAS, results, strict=True)), diaries, ended - began)


def wait_until_gone(pid: int) -> None:
    """Until the process is gone, or a zombie, so that its diary says all that it ever will."""
    deadline = time.monotonic() + PATIENCE_S
    while time.monotonic() < deadline:
        try:
            state = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[0]
        except OSError:
            return
        if state in "ZX":
            return
        time.sleep(0.001)
    raise TimeoutError(f"process {pid} is still there {PATIENCE_S:.0f} s after SIGKILL")


def manager_pid(unlike: int = 0) -> int:
    """The pid of the run's manager, as soon as it is another one than `unlike`; 0 if that takes too long."""
    deadline = time.monotonic() + PATIENCE_S
    while time.monotonic() < deadline:
        try:
            pid = int(ray.get(faultguard.manager().__ray_call__.remote(lambda _: os.getpid()), timeout=PATIENCE_S))
        except (ray.exceptions.RayError, faultguard.ManagerUnavailableError):  # it is being started again
            pid = 0
        if pid not in {0, unlike}:
            return pid
        time.sleep(POLL_S)
    return 0


# --- the demo: what one sees ----------------------------------------------------------------------------------------

BAR_WIDTH = 16
TTY_EVERY_S = 0.2
LINE_EVERY_S = 2.0


def say(text: str) -> None:
    """Print lines; on a terminal over the line of the progress."""
    print(text.replace("\n", "\033[K\n") + "\033[K" if sys.stdout.isatty() else text, flush=True)


class Progress:
    """How far the workers are: one line that changes on a terminal, a line every few seconds elsewhere."""

    def __init__(self, total: int) -> None:
        self._total = total
        self._tty = sys.stdout.isatty()
        self._every_s = TTY_EVERY_S if self._tty else LINE_EVERY_S
        self._began = time.monotonic()
        self._next = self._began + self._every_s

    def show(self, diaries: dict[str, Diary], *, last: bool = False) -> None:
        """Print it, if it is time."""
        now = time.monotonic()
        if now < self._next and not last:
            return
        self._next = now + self._every_s
        parts = [f"{worker_id} {self._part(diary)}" for worker_id, diary in diaries.items()]
        line = f"{now - self._began:5.1f} s  {'  '.join(parts)}"
        print(f"{line}\033[K" if self._tty else line, end="\r" if self._tty and not last else "\n", flush=True)

    def _part(self, diary: Diary) -> str:
        done = diary.attempts[-1].batches[-1] + 1 if diary.attempts else 0
        filled = BAR_WIDTH * done // self._total
        bar = f"[{'#' * filled}{'.' * (BAR_WIDTH - filled)}]" if self._tty else ""
        return f"{bar}{100 * done // self._total:3d} %"


def table(trained: Trained, causes: dict[str, list[str]]) -> str:
    """One row per worker."""
    heads = ("worker", "attempts", "causes", "cut in batch", "resumed at", "batches redone", "work saved", "accuracy")
    rows = [heads]
    for worker_id, diary in trained.diaries.items():
        row = (
            worker_id,
            str(len(diary.attempts)),
            ", ".join(causes[worker_id]) or "-",
            ", ".join(str(attempt.batches[-1]) for attempt in diary.attempts[:-1]) or "-",
            ", ".join(str(attempt.batches[0]) for attempt in diary.attempts[1:]) or "-",
            str(diary.redone),
            f"{diary.saved_s:.1f} s",
            f"{trained.results[worker_id]['accuracy']:.3f}",
        )
        rows.append(row)
    widths = [max(len(row[column]) for row in rows) for column in range(len(heads))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


# --- the demo: the verdict ------------------------------------------------------------------------------------------


def bits(trained: dict[str, Any]) -> bytes:
    """The coefficients and the state of the random generator, to the last bit."""
    result = trained["result"]
    return b"".join(result[name].tobytes() for name in ("coef_", "intercept_")) + repr((result["t_"], result["rng"])).encode()


def judge(undisturbed: Trained, disturbed: Trained, fire: Fire) -> Iterator[tuple[bool, str]]:
    """What must hold, one after another: whether it does, and what it is."""
    yield bool(fire.kills), f"{len(fire.kills)} kills of worker processes were planned"
    for number, kill in enumerate(fire.kills, start=1):
        landed = kill.hit is not None and 0 < kill.hit < fire.total - 1
        yield landed, f"kill {number} landed in the loop of {kill.worker_id}: planned for batch {kill.planned}, hit in {kill.hit}"
        attempts = itertools.pairwise(disturbed.diaries[kill.worker_id].attempts)
        resumed_at = next((after.batches[0] for before, after in attempts if before.pid == kill.pid), None)
        yield bool(resumed_at), f"kill {number}: {kill.worker_id} went on above batch 0: in {resumed_at}"
    for worker_id, result in disturbed.results.items():
        killed = [("crash", kill.pid) for kill in fire.kills if kill.worker_id == worker_id and kill.hit is not None]
        recorded = [tuple(failure) for failure in result["failures"]]
        yield recorded == killed, f"faultguard's record of {worker_id} has {len(recorded)} crashes, of the processes that were killed"
    before_pid, after_pid = fire.manager_pids
    changed = fire.manager_hit is not None and 0 not in fire.manager_pids and before_pid != after_pid
    yield changed, f"the manager was killed while workers were in their loops, and has another pid: {before_pid}, now {after_pid}"
    same = all(bits(undisturbed.results[worker_id]) == bits(disturbed.results[worker_id]) for worker_id in ALPHAS)
    yield same, "coefficients, intercepts and random generators of both runs are identical, bit for bit"


def demo(options: argparse.Namespace, folder: Path) -> bool:
    """Train undisturbed and under fire, show both, and say whether everything held."""
    total = batch_number(options.epochs)
    fire = plan(options.kill_at, total, manager=not options.spare_manager)

    say(f"\n1. Undisturbed: {len(ALPHAS)} workers, {options.epochs} epochs, {total} batches each")
    with faultguard.init(checkpoint_dir=folder / "checkpoints"):
        undisturbed = train_under_fire(train, folder / "undisturbed", options.epochs, Fire(total))

    say(f"\n2. Under fire: SIGKILL for {len(fire.kills)} worker processes{'' if options.spare_manager else ' and the manager'}")
    with faultguard.init(checkpoint_dir=folder / "checkpoints"):
        disturbed = train_under_fire(train, folder / "disturbed", options.epochs, fire)

    causes = {worker_id: [cause for cause, _ in result["failures"]] for worker_id, result in disturbed.results.items()}
    saved_s = sum(diary.saved_s for diary in disturbed.diaries.values())
    say(f"\n{table(disturbed, causes)}\n")
    say(f"Undisturbed {undisturbed.seconds:.1f} s, under fire {disturbed.seconds:.1f} s; {disturbed.redone} batches redone.")
    say(f"Time saved: {saved_s:.1f} s of work, as measured, that retries from zero would have done again.\n")
    if options.plain_ray:
        show_plain_ray(options, folder, disturbed)

    verdicts = list(judge(undisturbed, disturbed, fire))
    for holds, text in verdicts:
        say(f"{'ok    ' if holds else 'FAILED'}  {text}")
    everything = all(holds for holds, _ in verdicts)
    say("\nVERDICT: " + ("killed or not, the results are identical, bit for bit." if everything else "FAILED, see above."))
    return everything


def show_plain_ray(options: argparse.Namespace, folder: Path, disturbed: Trained) -> None:
    """The same kills again, with Ray's own retries."""
    say("3. The same kills of worker processes, as plain Ray tasks with max_retries")
    fire = plan(options.kill_at, batch_number(options.epochs), manager=False)
    plain = train_under_fire(train_plain, folder / "plain", options.epochs, fire)
    causes = {worker_id: ["SIGKILL"] * (len(diary.attempts) - 1) for worker_id, diary in plain.diaries.items()}
    say(f"\n{table(plain, causes)}\n")
    say(f"Plain Ray:       {plain.seconds:5.1f} s, {plain.redone:5d} batches redone.")
    say(f"With faultguard: {disturbed.seconds:5.1f} s, {disturbed.redone:5d} batches redone.\n")


def main() -> int:
    """Run the example, or the demo; gives the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--epochs", type=int, default=EPOCHS, help="of each worker (%(default)s)")
    parser.add_argument("--demo", action="store_true", help="train twice, the second time under SIGKILLs, and compare")
    parser.add_argument("--plain-ray", action="store_true", help="with --demo: a third time, without faultguard")
    parser.add_argument(
        "--kill-at",
        type=float,
        nargs="*",
        default=list(FIRE_AT),
        metavar="PERCENT",
        help="with --demo: parts of the work at which a worker is killed, the workers in turn (%(default)s)",
    )
    parser.add_argument("--spare-manager", action="store_true", help="with --demo: do not kill the manager, and so fail")
    options = parser.parse_args()
    if not options.demo:
        example(options.epochs)
        return 0
    started = time.monotonic()
    folder = Path(tempfile.mkdtemp(prefix="fg-", dir="/tmp"))  # the paths of Ray's sockets must be short
    try:
        ray.init(address="local", num_cpus=2, _temp_dir=str(folder / "ray"), include_dashboard=False, logging_level=logging.ERROR)
        success = demo(options, folder)
    finally:
        ray.shutdown()
        shutil.rmtree(folder, ignore_errors=True)
    say(f"({time.monotonic() - started:.0f} s in all)")
    return 0 if success else 1


if __name__ == "__main__":
    sys.exit(main())
