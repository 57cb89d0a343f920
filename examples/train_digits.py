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
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"

import numpy as np
import ray
from sklearn.datasets import load_digits
from sklearn.linear_model import SGDClassifier

import faultguard

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

ALPHAS = {"alpha-0.001": 0.001, "alpha-0.01": 0.01, "alpha-0.1": 0.1}  # one worker for each strength of regularisation
EPOCHS = 30
BATCH = 32
TRAIN = 1437  # digits to learn from; the other 360 are the test
NOISE = 2.0  # added to pixels from 0 to 16, so that no epoch sees the same images
SEED = 7
LEARNED = ("classes_", "coef_", "intercept_", "t_")  # what partial_fit goes on from


@faultguard.recoverable(max_failures=3, every=50)  # a checkpoint every 50 batches; without `every`: as it costs at most 1 %
@ray.remote(num_cpus=0.5)
def train(worker_id: str, alpha: float, epochs: int = EPOCHS, diary: str | None = None) -> dict[str, Any]:  # noqa: ARG001 - faultguard reads the id
    """Train one classifier: epochs outside, shuffled mini-batches inside."""
    images, labels = load_digits(return_X_y=True)
    model = SGDClassifier(alpha=alpha, random_state=SEED)
    rng = np.random.default_rng(SEED)

    ckpt = faultguard.current()
    ckpt.track(model=(lambda: learned(model), vars(model).update), rng=rng)  # carried from here on, restored if there is a checkpoint
    for epoch in ckpt.batches(range(epochs), name="epochs"):
        # Runs again when the work goes on within this epoch: so it is drawn from the epoch's number, not from the carried generator.
        order = np.random.default_rng([SEED, epoch]).permutation(TRAIN)
        for start in ckpt.batches(range(0, TRAIN, BATCH), name="mini-batches"):
            note(diary, epoch, start)
            rows = order[start : start + BATCH]
            noise = rng.normal(scale=NOISE, size=images[rows].shape)  # in a batch the carried generator is right: each counts once
            model.partial_fit(images[rows] + noise, labels[rows], classes=range(10))

    return {
        "accuracy": float(model.score(images[TRAIN:], labels[TRAIN:])),
        "result": {**learned(model), "rng": rng.bit_generator.state},
        "failures": [(failure.cause, failure.pid) for failure in ckpt.failures],
    }


def learned(model: SGDClassifier) -> dict[str, Any]:
    """What the model has learned; nothing before its first batch."""
    return {name: vars(model)[name] for name in LEARNED if name in vars(model)}


def note(diary: str | None, epoch: int, start: int) -> None:
    """For the demo: write down outside of faultguard that this process begins this batch."""
    if diary is not None:
        with Path(diary).open("a", encoding="ascii") as file:
            file.write(f"{os.getpid()} {batch_number(epoch, start)} {time.monotonic():.6f}\n")


def batch_number(epoch: int, start: int = 0) -> int:
    """Number of a batch, counted over all epochs."""
    return epoch * len(range(0, TRAIN, BATCH)) + start // BATCH


def example() -> None:
    """Train all workers and print how good they are."""
    ray.init()
    trained = faultguard.get([train.remote(worker_id, alpha) for worker_id, alpha in ALPHAS.items()])
    for worker_id, model in zip(ALPHAS, trained, strict=True):
        print(f"{worker_id:12} accuracy {model['accuracy']:.3f}, {len(model['failures'])} failures survived")


# --- the demo: the diaries ------------------------------------------------------------------------------------------

FIRE_AT = "30 45 60 75"  # per cent of the work of a worker; the workers take turns
MANAGER_AT = 50
POLL_S = 0.01
BAR_WIDTH = 20
TTY_EVERY_S = 0.2
LINE_EVERY_S = 3.0
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
        self._file = path.open(encoding="ascii")
        self._rest = ""
        self.path = path
        self.attempts: list[Attempt] = []

    def read(self) -> Attempt | None:
        """Read on; gives the newest attempt, if there is one."""
        *lines, self._rest = (self._rest + self._file.read()).split("\n")
        for line in lines:
            pid, batch, moment = line.split()
            if not self.attempts or self.attempts[-1].pid != int(pid):
                self.attempts.append(Attempt(int(pid)))
            self.attempts[-1].batches.append(int(batch))
            self.attempts[-1].times.append(float(moment))
        return self.attempts[-1] if self.attempts else None

    @property
    def redone(self) -> int:
        """Batches that were begun more than once."""
        begun = [batch for attempt in self.attempts for batch in attempt.batches]
        return len(begun) - len(set(begun))

    @property
    def saved_s(self) -> float:
        """Work that starting from zero would have repeated: per resume, the measured seconds of the batches before it."""
        took = {
            batch: after - begun
            for attempt in self.attempts
            for batch, begun, after in zip(attempt.batches, attempt.times, attempt.times[1:], strict=False)
        }
        return sum(seconds for attempt in self.attempts[1:] for batch, seconds in took.items() if batch < attempt.batches[0])


# --- the demo: a run under fire -------------------------------------------------------------------------------------


@dataclass
class Kill:
    """A planned kill of the process of a worker, once it has come to batch `planned`; `hit` is where it died."""

    worker_id: str
    planned: int
    pid: int = 0
    hit: int | None = None


@dataclass
class Fire:
    """All that is to be killed during a run. The manager goes when any worker has come to batch `manager_at`."""

    kills: list[Kill] = field(default_factory=list)
    manager_at: int | None = None
    manager_pids: tuple[int, int] = (0, 0)  # before and after
    manager_hit: int | None = None  # where that worker was


@dataclass
class Trained:
    """What a run gave, and what the diaries say of it."""

    results: dict[str, dict[str, Any]]
    diaries: dict[str, Diary]
    wall_s: float

    @property
    def redone(self) -> int:
        """Batches that were begun more than once, over all workers."""
        return sum(diary.redone for diary in self.diaries.values())


@ray.remote(num_cpus=0.5, max_retries=20)
def train_plain(*arguments: Any) -> dict[str, Any]:
    """The same training as a plain Ray task: called directly, a decorated function saves nothing and retries nothing."""
    return train(*arguments)


def train_under_fire(task: Any, folder: Path, epochs: int, fire: Fire, say: Callable[[str], None]) -> Trained:
    """Start all workers, kill what the plan says while they are in their loops, wait for the results."""
    folder.mkdir()
    diaries = {worker_id: Diary(folder / worker_id) for worker_id in ALPHAS}
    if fire.manager_at is not None:
        fire.manager_pids = (manager_pid(), 0)
    started = time.monotonic()
    refs = {worker_id: task.remote(worker_id, alpha, epochs, str(diaries[worker_id].path)) for worker_id, alpha in ALPHAS.items()}
    progress = Progress(batch_number(epochs))
    waiting = list(refs.values())
    while waiting:
        _, waiting = ray.wait(waiting, num_returns=len(waiting), timeout=POLL_S)
        for worker_id, diary in diaries.items():
            known = len(diary.attempts)
            newest = diary.read()
            if newest is not None:
                if 0 < known < len(diary.attempts):
                    say(f"{worker_id} goes on in batch {newest.batches[0]}, pid {newest.pid}")
                shoot(fire, worker_id, diary, newest, batch_number(epochs), say)
        progress.show(diaries, time.monotonic() - started)
    results = dict(zip(refs, faultguard.get(list(refs.values()), progress=False), strict=True))
    progress.end(diaries, time.monotonic() - started)
    if fire.manager_hit is not None:
        fire.manager_pids = (fire.manager_pids[0], manager_pid(unlike=fire.manager_pids[0]))
        say(f"the manager is back: pid {fire.manager_pids[1]}")
    return Trained(results, diaries, time.monotonic() - started)


def shoot(fire: Fire, worker_id: str, diary: Diary, newest: Attempt, total: int, say: Callable[[str], None]) -> None:
    """Kill what is due now that this worker is where it is. A kill that is late never fires: it must hit a loop, or fail the demo."""
    due = next((kill for kill in fire.kills if kill.worker_id == worker_id and kill.hit is None), None)
    if due is not None and due.planned <= newest.batches[-1] < total - 1:
        due.pid = newest.pid
        os.kill(newest.pid, signal.SIGKILL)
        wait_until_gone(newest.pid)
        diary.read()
        due.hit = newest.batches[-1]  # its last line: it died in this batch, or before it could begin the next
        say(f"SIGKILL to {worker_id}, pid {newest.pid}, in batch {due.hit} of {total}")
    if fire.manager_at is not None and fire.manager_hit is None and fire.manager_at <= newest.batches[-1] < total - 1:
        os.kill(fire.manager_pids[0], signal.SIGKILL)
        fire.manager_hit = newest.batches[-1]
        say(f"SIGKILL to the manager, pid {fire.manager_pids[0]}, while {worker_id} is in batch {fire.manager_hit} of {total}")


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
    """The pid of the run's manager, once it is another one than `unlike`; 0 if that takes too long."""
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


class Progress:
    """How far the workers are: one line that changes on a terminal, a line every few seconds elsewhere."""

    def __init__(self, total: int) -> None:
        self._total = total
        self._tty = sys.stdout.isatty()
        self._next = 0.0 if self._tty else LINE_EVERY_S

    def show(self, diaries: dict[str, Diary], seconds: float) -> None:
        """Say it, if it is time."""
        if seconds >= self._next:
            self._next = seconds + (TTY_EVERY_S if self._tty else LINE_EVERY_S)
            self._print(diaries, seconds, "\r" if self._tty else "\n")

    def end(self, diaries: dict[str, Diary], seconds: float) -> None:
        """Leave the last line standing."""
        self._print(diaries, seconds, "\n")

    def _print(self, diaries: dict[str, Diary], seconds: float, end: str) -> None:
        parts = [f"{worker_id} {self._bar(diary)}" for worker_id, diary in diaries.items()]
        print(f"{seconds:5.1f} s  " + "  ".join(parts) + ("\033[K" if self._tty else ""), end=end, flush=True)

    def _bar(self, diary: Diary) -> str:
        done = diary.attempts[-1].batches[-1] + 1 if diary.attempts else 0
        filled = BAR_WIDTH * done // self._total if self._tty else 0
        bar = f"[{'#' * filled}{'.' * (BAR_WIDTH - filled)}]" if self._tty else ""
        return f"{bar}{100 * done // self._total:3d} %"


# --- the demo: what it shows ----------------------------------------------------------------------------------------


def bits(trained: dict[str, Any]) -> bytes:
    """The coefficients and the state of the random generator, to the last bit."""
    result = trained["result"]
    return b"".join(result[name].tobytes() for name in ("coef_", "intercept_")) + repr((result["t_"], result["rng"])).encode()


def judge(undisturbed: Trained, disturbed: Trained, fire: Fire, total: int) -> Iterator[tuple[bool, str]]:
    """What must hold, one after another: whether it does, and what it is."""
    yield bool(fire.kills), f"{len(fire.kills)} kills of worker processes were planned"
    for number, kill in enumerate(fire.kills):
        name = f"kill {number + 1}, of {kill.worker_id}"
        yield kill.hit is not None and 0 < kill.hit < total - 1, f"{name}, landed in its loop (planned at {kill.planned}, hit at {kill.hit})"
        after = next((b for a, b in _pairs(disturbed.diaries[kill.worker_id].attempts) if a.pid == kill.pid), None)
        resumed_at = after.batches[0] if after is not None else None
        yield bool(resumed_at), f"{name}: the work went on above batch 0 (at {resumed_at})"
    for worker_id, result in disturbed.results.items():
        killed = [("crash", kill.pid) for kill in fire.kills if kill.worker_id == worker_id and kill.hit is not None]
        recorded = [tuple(failure) for failure in result["failures"]]
        yield recorded == killed, f"{worker_id}: faultguard recorded {len(killed)} crashes of exactly these processes"
    before, after_pid = fire.manager_pids
    landed = fire.manager_hit is not None
    yield landed and 0 not in {before, after_pid} and before != after_pid, f"the manager's pid changed in mid-loop ({before} to {after_pid})"
    same = all(bits(undisturbed.results[worker_id]) == bits(disturbed.results[worker_id]) for worker_id in ALPHAS)
    yield same, "both results are identical, bit for bit: coefficients, intercepts, random generators"


def _pairs(attempts: list[Attempt]) -> Iterator[tuple[Attempt, Attempt]]:
    return zip(attempts, attempts[1:], strict=False)


def table(trained: Trained, causes: Callable[[str], list[str]]) -> str:
    """One row per worker."""
    heads = ("worker", "attempts", "causes", "cut in batch", "resumed at", "redone", "saved", "accuracy")
    rows = [heads]
    for worker_id, diary in trained.diaries.items():
        rows.append(
            (
                worker_id,
                str(len(diary.attempts)),
                ", ".join(causes(worker_id)) or "-",
                ", ".join(str(attempt.batches[-1]) for attempt in diary.attempts[:-1]) or "-",
                ", ".join(str(attempt.batches[0]) for attempt in diary.attempts[1:]) or "-",
                str(diary.redone),
                f"{diary.saved_s:.1f} s",
                f"{trained.results[worker_id]['accuracy']:.3f}",
            )
        )
    widths = [max(len(row[column]) for row in rows) for column in range(len(heads))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


def planned_fire(percents: list[float], total: int, *, manager: bool) -> Fire:
    """Kills at these parts of the work, the workers in turn."""
    ids = list(ALPHAS)
    kills = [Kill(ids[turn % len(ids)], round(total * percent / 100)) for turn, percent in enumerate(percents)]
    return Fire(kills, manager_at=total * MANAGER_AT // 100 if manager else None)


def demo(options: argparse.Namespace, folder: Path) -> bool:
    """Train undisturbed and under fire, show both, and say whether everything held."""
    total = batch_number(options.epochs)
    fire = planned_fire(options.kill_at, total, manager=not options.spare_manager)

    def say(text: str) -> None:
        print(f"{text}\033[K" if sys.stdout.isatty() else text, flush=True)

    def train_with_faultguard(name: str, fire: Fire) -> Trained:
        with faultguard.init(checkpoint_dir=folder / "checkpoints"):
            return train_under_fire(train, folder / name, options.epochs, fire, say)

    say(f"\n1. Undisturbed: {len(ALPHAS)} workers, {options.epochs} epochs, {total} batches each")
    undisturbed = train_with_faultguard("undisturbed", Fire())
    say(f"\n2. Again, under fire: {len(fire.kills)} worker processes and the manager get SIGKILL")
    disturbed = train_with_faultguard("disturbed", fire)

    say("\n" + table(disturbed, lambda worker_id: [cause for cause, _ in disturbed.results[worker_id]["failures"]]))
    saved_s = sum(diary.saved_s for diary in disturbed.diaries.values())
    say(f"\nUndisturbed {undisturbed.wall_s:.1f} s, under fire {disturbed.wall_s:.1f} s; {disturbed.redone} batches redone.")
    say(f"Starting from zero after each kill would have repeated {saved_s:.1f} s of work that was measured here, and that nobody repeated.\n")
    if options.plain_ray:
        show_plain_ray(options, folder, disturbed, say)

    verdicts = list(judge(undisturbed, disturbed, fire, total))
    for holds, text in verdicts:
        say(f"{'ok    ' if holds else 'FAILED'}  {text}")
    everything = all(holds for holds, _ in verdicts)
    say("\nVERDICT: " + ("killed or not, the results are identical, bit for bit." if everything else "the demo FAILED, see above."))
    return everything


def show_plain_ray(options: argparse.Namespace, folder: Path, disturbed: Trained, say: Callable[[str], None]) -> None:
    """The same kills again, with Ray's own retries."""
    fire = planned_fire(options.kill_at, batch_number(options.epochs), manager=False)
    say("3. The same kills of worker processes, as plain Ray tasks with max_retries")
    plain = train_under_fire(train_plain, folder / "plain", options.epochs, fire, say)
    say("\n" + table(plain, lambda worker_id: ["SIGKILL" for kill in fire.kills if kill.worker_id == worker_id and kill.hit is not None]))
    say(
        f"\nPlain Ray: {plain.wall_s:.1f} s, {plain.redone} batches redone. With faultguard: {disturbed.wall_s:.1f} s, "
        f"{disturbed.redone} batches redone.\n"
    )


def main(arguments: list[str] | None = None) -> int:
    """Run the example, or the demo; gives the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--demo", action="store_true", help="train twice, the second time under SIGKILLs, and compare")
    parser.add_argument("--plain-ray", action="store_true", help="with --demo: a third time, without faultguard")
    parser.add_argument("--epochs", type=int, default=EPOCHS, help="of each worker (%(default)s)")
    parser.add_argument(
        "--kill-at",
        type=float,
        nargs="*",
        default=[float(percent) for percent in FIRE_AT.split()],
        metavar="PERCENT",
        help=f"parts of a worker's work at which its process is killed, the workers in turn ({FIRE_AT})",
    )
    parser.add_argument("--spare-manager", action="store_true", help="do not kill the manager (then the demo cannot succeed)")
    options = parser.parse_args(arguments)
    if not options.demo:
        example()
        return 0
    folder = Path(tempfile.mkdtemp(prefix="fg-", dir="/tmp"))  # noqa: S108 - the paths of Ray's sockets must be short
    started = time.monotonic()
    try:
        ray.init(address="local", num_cpus=2, _temp_dir=str(folder / "ray"), include_dashboard=False, logging_level="error")
        success = demo(options, folder)
    finally:
        ray.shutdown()
        shutil.rmtree(folder, ignore_errors=True)
    print(f"({time.monotonic() - started:.0f} s in all)")
    return 0 if success else 1


if __name__ == "__main__":
    sys.exit(main())
