"""What a soak must have left: for every end of an attempt a fault that explains it, in the log, in the trace, and nowhere more."""

from __future__ import annotations

import itertools
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

    from faultguard._core.records import Record

ENDS = {
    "exception": {"exception"},
    "exit": {"crash"},
    "hang in Python": {"stall"},
    "hang in C": {"stall"},
    "hang with the GIL": {"crash", "stall"},
    "burn": set(),
    "SIGKILL": {"crash"},
    "SIGTERM": {"terminated"},
    "SIGSTOP": {"crash", "stopped"},
    "SIGSTOP and SIGCONT": set(),
    "record damaged": {"crash"},
    "faultguard.cancel": {"cancelled"},
    "ray.cancel": {"cancelled", "completed"},  # Ray says so to the caller also where the worker completes at that moment
    "driver killed": {"crash", "terminated"},  # Ray gives the workers of a dead driver some milliseconds
    "driver frozen": {"crash", "terminated"},
    "node killed": {"crash", "terminated"},  # whose raylet dies before them may get a signal, and the time for a note
    "node frozen": {"crash"},
    "raylet frozen": {"crash", "terminated"},
    "out of memory": {"oom", "crash"},  # Ray's table may not say it yet
    "node drained": {"drained", "crash"},  # who does not leave in time dies with it; only a worker without progress is charged
    "node given up": {"crash"},  # by Ray itself, on a machine that is too busy
    "process given up": {"crash", "terminated"},  # likewise
    "owner lost": {"crash", "terminated"},  # of an attempt on another node: whatever ends the process that waits for it
}
"""How each fault may end the attempt that it meets."""

BUDGET = 1
"""What the workers survive whose budget is bounded."""

KILLED_BY_US = frozenset({"SIGSTOP", "hang with the GIL"})
BOUNDED = "bounded"
COMPLETED = "completed"  # who is started again after that begins from zero
UNDECORATED = frozenset({"block", "actor", "threaded", "async"})  # their exceptions are their callers' business
EXCUSED = frozenset({"terminated", "drained"})
TOKENS = 10**9  # per driver of a named run; the rest is the number of the claim
NOTES = frozenset({"cancelled", "terminated", "drained"})  # ends of which nothing is known if the store takes no note
NOTE_S = 15.0
NO_PROGRESS = 3  # an attempt that began no more batches may have saved nothing


@dataclass
class Fault:
    """One that took place: it meets a worker's attempt (0: whichever works when it arrives), a process, or a node.

    Where it damaged the newest record of the attempt with that token, `left` is how many batches the one below holds.
    """

    kind: str
    worker: str = ""
    attempt: int = 0
    pid: int = 0
    node: str = ""
    token: int = 0
    left: int = 0
    time: float = field(default_factory=time.time)

    def explains(self, cause: str, sick: Sequence[tuple[float, float]] = (), notes: frozenset[str] = NOTES) -> bool:
        """Whether an attempt that it meets may end so; `sick`: when the store took nothing, `notes`: what is known by a note alone."""
        if cause in ENDS[self.kind]:
            return True
        unnoted = any(begin < self.time + NOTE_S and self.time < end for begin, end in sick)
        return cause == "crash" and unnoted and bool(notes & ENDS[self.kind])

    def reach(self) -> tuple[bool, bool]:
        """What is there for all on a node explains an end before what meets one attempt, and that before what may meet any."""
        return not self.node, not self.attempt

    def meets(self, claim: Record, home: str = "") -> bool:
        """Whether it was there that it took place; `home`: the node where the task waits that runs on another one."""
        owner = claim.owner
        if self.node:
            return self.node in {owner.node_id, home}
        if self.pid and self.pid == owner.pid and claim.saved_at < self.time + NOTE_S:  # later that is another process
            return True
        return self.worker == claim.worker_id and self.attempt in {0, claim.attempt}


def newest_of(notes: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The last one of the newest attempt: one before it may thaw after that, and note something, too."""
    return max(reversed(notes), key=lambda note: int(note["token"])) if notes else {}


def problems_of(
    worker: str,
    kind: str,
    notes: Sequence[dict[str, Any]],
    log: Sequence[Record],
    faults: Sequence[Fault],
    sick: Sequence[tuple[float, float]] = (),
) -> Iterator[str]:
    """Everything that is wrong with one worker that has completed.

    Args:
        worker: its id.
        kind: of it.
        notes: its trace.
        log: its records, oldest first.
        faults: all of the soak.
        sick: from when to when the store took nothing.
    """
    if not log:
        yield f"{worker}: it has completed, and has no log"
        return
    claims = [record for record in log if record.kind == "claim"]
    ordered = [Fault(note["kind"], worker, note["attempt"], time=note.get("time", 0.0)) for note in notes if note["what"] == "fault"]
    lives = [claim.number for claim in claims if claim.predecessor == COMPLETED]
    yield from _unexplained(worker, kind, claims, notes, [*faults, *ordered], [record for record in log if record.outcome], sick)
    yield from _misses(worker, notes)
    yield from _behind(worker, notes, {fault.token: fault.left for fault in faults if fault.token and fault.worker == worker}, lives)
    end = log[-1]
    if any(_loops(record) != _loops(end) for record in log if record.outcome is not None and record.outcome.status == COMPLETED):
        yield f"{worker}: one of its outcomes is not of all of its work"
    if end.kind != "end" or end.outcome is None or end.outcome.status != COMPLETED:
        yield f"{worker}: its log ends with a {end.kind}, not with an outcome"
    if sum(record.outcome is not None and record.outcome.status == COMPLETED for record in log) != 1 + len(lives):
        yield f"{worker}: not one outcome"
    if kind != BOUNDED and _failed(log):
        yield f"{worker}: failed for good, and its budget has no bound"
    if kind == BOUNDED and (spent := max(record.charged for record in log)) > BUDGET + 1:
        yield f"{worker}: {spent} charged, with a budget of {BUDGET}"
    if end.charged != len(end.failures):
        yield f"{worker}: {end.charged} charged, {len(end.failures)} failures in its history"


def _loops(record: Record) -> list[tuple[str, int, bool]]:
    """What is done of its loops; what was done is known to be right by the value of the last outcome."""
    marks = itertools.chain.from_iterable(record.snapshot.loops) if record.snapshot is not None else ()
    return [(mark.name, mark.done, mark.finished) for mark in marks]


def _failed(log: Sequence[Record]) -> list[Record]:
    """The ends after which a caller has started the worker again, with a new budget."""
    return [record for record in log if record.outcome is not None and record.outcome.status == "failed"]


def _unexplained(
    worker: str,
    kind: str,
    claims: Sequence[Record],
    notes: Sequence[dict[str, Any]],
    faults: Iterable[Fault],
    outcomes: Sequence[Record],
    sick: Sequence[tuple[float, float]],
) -> Iterator[str]:
    """Ends of attempts that nobody caused, and those that were charged and should not have been, or the other way round."""
    left = list(faults)
    by_note = NOTES | {"exception", "stall"} if kind in UNDECORATED else NOTES  # nobody waits for the store there
    for claim, after in itertools.pairwise(claims):
        if claim.owner.writer == after.owner.writer and claim.attempt == after.attempt:
            continue  # tried twice: nothing ran under the first one
        end = next((end for end in outcomes if claim.number < end.number < after.number), None)
        charged = (after if end is None else end).charged - claim.charged
        failures = end.failures if end is not None else after.failures if charged else ()
        cause = after.predecessor
        if failures and cause != COMPLETED:
            cause = failures[-1].cause  # of a crash the history knows more
        where = f"{worker} attempt {claim.attempt} (pid {claim.owner.pid})"
        noted = [note for note in notes if (note.get("attempt"), note.get("token", 0) % TOKENS) == (claim.attempt, claim.number)]
        home = next((note["home"] for note in noted if note["what"] == "begin"), "")
        there = [fault for fault in left if fault.meets(claim, home)]
        if cause == COMPLETED and end is not None:  # only who was cancelled at that moment is started again
            there = [fault for fault in there if abs(fault.time - end.saved_at) < NOTE_S]
        found = min((fault for fault in there if fault.explains(cause, sick, by_note)), key=Fault.reach, default=None)
        if found is None:
            yield f"{where} ended by {cause!r}, which nobody caused; what took place there: {sorted({fault.kind for fault in there})}"
        else:
            left.remove(found)
        begun = sum(note["what"] == "batch" for note in noted)
        if end is not None and after.charged:
            yield f"{where} was the last of its budget, and the next one begins with {after.charged} charged"
        if charged not in {0, 1} or (charged and (cause in {"cancelled", COMPLETED} or (cause in EXCUSED and begun > NO_PROGRESS))):
            yield f"{where} ended by {cause!r} after {begun} batches: {charged} charged"
        if not charged and cause in ({"crash"} if kind in UNDECORATED else {"crash", "exception", "stall"}):
            yield f"{where} ended by {cause!r}, not charged"


def _misses(worker: str, notes: Sequence[dict[str, Any]]) -> Iterator[str]:
    """Faults after which the attempt that they should have ended went on."""
    ended: set[int] = set()
    for note in notes:
        if note["what"] == "fault" and ENDS[note["kind"]]:
            ended.add(note["token"])
        elif note["what"] == "batch" and note["token"] in ended:
            yield f"{worker} attempt {note['attempt']} went on at batch {note['batch']} after its end"
            return


def _behind(worker: str, notes: Sequence[dict[str, Any]], left: Mapping[int, int], lives: Sequence[int]) -> Iterator[str]:
    """Attempts that began before what an earlier one was told is durable: it was lost, or a zombie was told so.

    Whenever it was told: a zombie may thaw, and note, after its successor has begun. Of an attempt whose newest record was damaged
    what is `left` counts, by its token. With each of the claims in `lives` the work begins from zero.
    """
    begins: dict[int, dict[str, Any]] = {}
    told: dict[int, int] = {}
    for note in notes:
        if note["what"] == "batch":
            begins.setdefault(note["token"], note)
        durable = note["batch"] if note["what"] == "ack" else note.get("durable", 0)
        if durable:
            told[note["token"]] = max(told.get(note["token"], 0), durable)
    told.update(left)
    for token, first in begins.items():
        since = max((number for number in lives if number <= token % TOKENS), default=0)
        if since == token % TOKENS and first["batch"] != 0:
            yield f"{worker} attempt {first['attempt']} began at {first['batch']}; it was to begin from zero"
        durable = max((batch for earlier, batch in told.items() if since <= earlier % TOKENS and earlier < token), default=0)
        if first["batch"] < durable:
            yield f"{worker} attempt {first['attempt']} began at {first['batch']}; {durable} were durable"
