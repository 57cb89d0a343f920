"""The soak, for a moment: every fault at least once. And its checks, which must see what they are there for."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from msgspec import Raw

from faultguard._core.log import replace_record
from faultguard._core.records import FailureRecord, Mark, Outcome, Owner, Record, Snapshot
from tests.soak import OF_ALL, OF_NODES, OF_WORKERS, SUITS, Deck
from tests.soak_check import ENDS, Fault, newest_of, problems_of
from tests.soak_tasks import KINDS

REPOSITORY = Path(__file__).parents[1]
NODE = "ab"
TIMEOUT_S = 280
TOKENS_OF = {1: 1, 2: 3, 3: 5}  # the claims of `log` and those that follow


def record(number: int, kind: str, attempt: int, **fields: Any) -> Record:
    """One of a worker whose every attempt has a process of its own."""
    owner = Owner(f"writer {attempt}", pid=100 + attempt, node_id=NODE)
    base = {"task": "soak", "worker_id": "w1", "owner": owner, "saved_at": 0.0, "life": 1, "token": number}
    return Record(**{"kind": kind, "number": number, "attempt": attempt, **base, **fields})


def log(cause: str = "crash", *, charged: int = 1) -> list[Record]:
    """Of a worker whose first attempt ended so; the second one completed."""
    failures = (FailureRecord(cause, 1, 2),) * charged
    return [
        record(1, "claim", 1),
        record(2, "save", 1),
        record(3, "claim", 2, predecessor=cause, charged=charged, failures=failures),
        record(4, "end", 2, charged=charged, failures=failures, outcome=Outcome("completed")),
    ]


def notes(*begins: int, durable: int = 0) -> list[dict[str, Any]]:
    """Five batches of each attempt, from where it began; the first was told that so many were durable."""
    return [
        {"what": "batch", "attempt": attempt, "token": TOKENS_OF[attempt], "batch": batch, "durable": durable if attempt == 1 else 0}
        for attempt, begin in enumerate(begins, start=1)
        for batch in range(begin, begin + 5)
    ]


def problems(trace: list[dict[str, Any]], records: list[Record], *faults: Fault, kind: str = "each") -> list[str]:
    """What is found."""
    return list(problems_of("w1", kind, trace, records, faults))


@pytest.mark.parametrize(
    "fault",
    [Fault("SIGKILL", "w1", 1, 101), Fault("SIGKILL", "w7", 3, 101), Fault("exit", pid=101), Fault("node killed", node=NODE)],
    ids=["worker", "process", "beside", "node"],
)
def test_an_end_that_was_caused_is_none(fault: Fault) -> None:
    """It met the attempt, the process that it ran in, or the node."""
    assert problems(notes(0, 3, durable=3), log(), fault) == []


@pytest.mark.parametrize(
    ("fault", "cause", "charged", "said"),
    [
        (None, "crash", 1, "nobody caused"),
        (Fault("SIGKILL", "w1", 2, 102), "crash", 1, "nobody caused"),
        (Fault("SIGSTOP and SIGCONT", "w1", 1, 101), "crash", 1, "nobody caused"),
        (Fault("SIGTERM", "w1", 1, 101), "crash", 1, "nobody caused"),
        (Fault("SIGTERM", "w1", 1, 101), "terminated", 1, "1 charged"),
        (Fault("ray.cancel", "w1", 1), "cancelled", 1, "1 charged"),
        (Fault("SIGKILL", "w1", 1, 101), "crash", 0, "not charged"),
        (Fault("SIGKILL", "w1", 1, 101), "crash", 2, "2 charged"),
    ],
)
def test_what_is_charged_must_be_right(fault: Fault | None, cause: str, charged: int, said: str) -> None:
    """Nothing that nobody caused, nothing that is excused, nothing twice; and what was caused is."""
    found = problems(notes(0, 3), log(cause, charged=charged), *([fault] if fault else []))
    assert len(found) == 1
    assert said in found[0]


def test_a_fault_explains_one_end() -> None:
    """A process dies once."""
    killed = Fault("SIGKILL", "w1", 1, 101)
    again = record(5, "claim", 3, predecessor="crash", charged=2)
    records = [
        *log()[:3],
        again,
        record(6, "end", 3, charged=2, failures=(FailureRecord("crash", 1, 2),) * 2, outcome=Outcome("completed")),
    ]
    assert len(problems(notes(0, 3, 3), records, killed)) == 1
    assert problems(notes(0, 3, 3), records, killed, Fault("SIGKILL", "w1", 2, 102)) == []


def test_a_process_that_was_killed_long_before_is_another_one() -> None:
    """Its number has come again."""
    late = [replace_record(one, saved_at=1000.0) for one in log()]
    assert problems(notes(0, 3), late, Fault("SIGKILL", "w7", 3, 101, time=990.0)) == []
    assert "nobody caused" in problems(notes(0, 3), late, Fault("SIGKILL", "w7", 3, 101, time=900.0))[0]


def test_what_meets_all_on_a_node_explains_first() -> None:
    """Or what may meet any attempt would be used up, and be missing for the end that nothing else explains."""
    failures = (FailureRecord("crash", 1, 2), FailureRecord("crash", 2, 2))
    elsewhere = Owner("writer 2", pid=102, node_id="another")
    records = [
        *log()[:2],
        record(3, "claim", 2, predecessor="crash", charged=1, failures=failures[:1], owner=elsewhere),
        record(5, "claim", 3, predecessor="crash", charged=2, failures=failures),
        record(6, "end", 3, charged=2, failures=failures, outcome=Outcome("completed")),
    ]
    assert problems(notes(0, 3, 3), records, Fault("driver frozen", "w1"), Fault("node killed", node=NODE)) == []


def test_what_a_zombie_notes_is_not_the_newest() -> None:
    """It thaws after its successor has begun."""
    assert newest_of([*notes(0, 3), *notes(5)]) == notes(0, 3)[-1]
    assert newest_of([]) == {}


def test_what_takes_place_where_the_task_waits_meets_its_attempt_elsewhere() -> None:
    """That one leaves with the node on which its result is awaited; no other does."""
    began = {"what": "begin", "attempt": 1, "token": 1, "node": NODE, "home": "cd"}
    drained = Fault("node drained", node="cd")
    assert problems([began, *notes(0, 3)], log("drained", charged=0), drained) == []
    assert len(problems([{**began, "home": ""}, *notes(0, 3)], log("drained", charged=0), drained)) == 1
    assert len(problems([{**began, "attempt": 2, "token": 3}, *notes(0, 3)], log("drained", charged=0), drained)) == 1


def test_a_note_that_the_store_did_not_take_is_a_crash() -> None:
    """An end that is excused is charged then, as is documented; not where the store was well."""
    told = Fault("SIGTERM", "w1", 1, 101, time=100.0)
    assert list(problems_of("w1", "each", notes(0, 3), log(), [told], [(90.0, 101.0)])) == []
    assert len(list(problems_of("w1", "each", notes(0, 3), log(), [told], [(80.0, 99.0)]))) == 1
    hung = Fault("hang in Python", "w1", 1, time=100.0)
    assert list(problems_of("w1", "threaded", notes(0, 3), log(), [hung], [(90.0, 101.0)])) == []
    assert len(list(problems_of("w1", "each", notes(0, 3), log(), [hung], [(90.0, 101.0)]))) == 1


def test_a_block_does_not_wait_until_the_store_takes_its_note() -> None:
    """What it raises goes on at once, to whoever retries it; a decorated task retries itself, and waits."""
    hung = {"what": "fault", "attempt": 1, "token": 1, "batch": 2, "kind": "hang in Python", "time": 100.0}
    trace = [*notes(0, 3), hung]
    trace.sort(key=lambda note: note["token"])
    for kind, begin, wrong in (("block", 99.0, 0), ("each", 99.0, 1), ("block", 120.0, 1)):
        assert len(list(problems_of("w1", kind, trace, log(), [], [(begin, begin + 5)]))) == wrong


def test_what_was_durable_is_not_behind() -> None:
    """Also where it was told after the successor had begun: that is a zombie whose save was accepted."""
    killed = Fault("SIGKILL", "w1", 1, 101)
    assert "began at 3; 4 were durable" in problems(notes(0, 3, durable=4), log(), killed)[0]
    thawed = [*notes(0, 3), {"what": "ack", "attempt": 1, "token": 1, "batch": 7}]
    assert "began at 3; 7 were durable" in problems(thawed, log(), killed)[0]


def test_a_damaged_record_costs_what_it_held() -> None:
    """And nothing more: not what lies below it, and nothing of another attempt or worker."""
    damaged = Fault("record damaged", "w1", 1, 101, token=1, left=3)
    assert problems(notes(0, 3, durable=4), log(), damaged) == []
    assert "began at 2; 3 were durable" in problems(notes(0, 2, durable=4), log(), damaged)[0]
    assert "began at 2; 3 were durable" in problems(notes(0, 2), log(), damaged)[0]
    failures = (FailureRecord("crash", 1, 2), FailureRecord("crash", 2, 2))
    records = [
        *log()[:3],
        record(5, "claim", 3, predecessor="crash", charged=2, failures=failures),
        record(6, "end", 3, charged=2, failures=failures, outcome=Outcome("completed")),
    ]
    told = {"what": "ack", "attempt": 2, "token": 3, "batch": 5}
    faults = damaged, Fault("SIGKILL", "w1", 2, 102)
    assert problems([*notes(0, 3, 5, durable=4), told], records, *faults) == []
    assert "attempt 3 began at 4; 5 were durable" in problems([*notes(0, 3, 4, durable=4), told], records, *faults)[0]
    beside = Fault("record damaged", "w7", 1, 101, token=1, left=3)
    assert "began at 3; 4 were durable" in problems(notes(0, 3, durable=4), log(), beside)[0]


@pytest.mark.parametrize(("position", "flat", "nested"), [((), 0, 0), ((7,), 7, 70), ((2, 3), None, 23), ((2, 10), None, 30)], ids=str)
def test_the_batches_of_a_save_are_those_of_its_loops(position: tuple[int, ...], flat: int | None, nested: int) -> None:
    """Of a loop in a loop its number is that of the notes."""
    loops = tuple((Mark(name, done),) for name, done in zip(("epochs", "steps"), position, strict=False))
    save = record(2, "save", 1, snapshot=Snapshot(Raw(b"{}"), loops))
    assert KINDS["nested"].done(save) == nested
    assert flat is None or KINDS["each"].done(save) == flat
    assert KINDS["each"].done(record(2, "save", 1)) == 0


@pytest.mark.parametrize(
    ("cause", "kind", "other"),
    [("oom", "out of memory", "SIGKILL"), ("stopped", "SIGSTOP", "SIGKILL"), ("stall", "hang with the GIL", "exit")],
)
def test_the_history_says_of_what_a_process_died(cause: str, kind: str, other: str) -> None:
    """That, and no other fault, explains the end."""
    records = [replace_record(one, predecessor="crash") if one.predecessor else one for one in log(cause)]
    assert problems(notes(0, 3), records, Fault(kind, pid=101)) == []
    assert "nobody caused" in problems(notes(0, 3), records, Fault(other, pid=101))[0]


def test_what_should_have_ended_must_not_go_on() -> None:
    """An attempt that was told to die has no further batch."""
    trace = notes(0, 3)
    trace.insert(2, {"what": "fault", "attempt": 1, "token": 1, "batch": 1, "kind": "exit", "time": 100.0})
    assert "went on at batch 2" in problems(trace, log())[0]


def test_there_is_one_outcome() -> None:
    """At the end of the log, and nowhere else."""
    killed = Fault("SIGKILL", "w1", 1, 101)
    assert len(problems(notes(0, 3), log()[:3], killed)) == 2
    twice = [*log(), record(5, "end", 2, charged=1, failures=(FailureRecord("crash", 1, 2),), outcome=Outcome("completed"))]
    assert problems(notes(0, 3), twice, killed) == ["w1: not one outcome"]


def test_a_cancel_that_meets_the_end_may_come_too_late() -> None:
    """Ray says "cancelled", the log says "completed", and who is started again begins from zero; nothing else ends a worker so."""
    failures = (FailureRecord("crash", 1, 2),)
    records = [
        *log(),
        record(5, "claim", 3, predecessor="completed", life=2),
        record(6, "end", 3, life=2, outcome=Outcome("completed")),
    ]
    told = {"what": "ack", "attempt": 2, "token": 3, "batch": 8}
    trace = [*notes(0, 3, 0, durable=3), told]
    killed, cancelled = Fault("SIGKILL", "w1", 1, 101), Fault("ray.cancel", "w1", 2, time=1.0)
    assert problems(trace, records, killed, cancelled) == []
    assert "ended by 'completed', which nobody caused" in problems(trace, records, killed, Fault("faultguard.cancel", "w1", 2, time=1.0))[0]
    behind = record(7, "claim", 4, predecessor="crash", charged=1, failures=failures, life=2)
    more = [*records[:5], behind, record(8, "end", 4, charged=1, failures=failures, life=2, outcome=Outcome("completed"))]
    late = [*trace, {"what": "ack", "attempt": 3, "token": 5, "batch": 4}, {"what": "batch", "attempt": 4, "token": 7, "batch": 3}]
    faults = killed, cancelled, Fault("exit", "w1", 3)
    assert problems(late, more, *faults) == ["w1 attempt 4 began at 3; 4 were durable"]
    assert "not one outcome" in problems(trace, [*records[:3], *records[4:]], killed, cancelled)[-1]
    early = Fault("ray.cancel", "w1", 2, time=1000.0)
    assert "which nobody caused" in problems(trace, records, killed, early)[0]
    assert "began at 3; it was to begin from zero" in problems([*notes(0, 3, 3, durable=3), told], records, killed, cancelled)[0]
    charged = replace_record(records[3], charged=2, failures=failures * 2)
    assert "ended by 'completed' after 5 batches: 1 charged" in problems(trace, [*records[:3], charged, *records[4:]], killed, cancelled)[0]
    whole = [replace_record(one, snapshot=Snapshot(Raw(b"{}"), ((Mark("", 8, finished=True),),))) for one in (records[3], records[5])]
    assert problems(trace, [*records[:3], whole[0], records[4], whole[1]], killed, cancelled) == []
    part = replace_record(records[3], snapshot=Snapshot(Raw(b"{}"), ((Mark("", 4),),)))
    cut = [*records[:3], part, records[4], whole[1]]
    assert problems(trace, cut, killed, cancelled) == ["w1: one of its outcomes is not of all of its work"]


def test_a_bounded_budget_is_spent_and_begins_anew() -> None:
    """No attempt more than it allows, and none of it is left over for the next start; without a bound nothing fails for good."""
    failures = tuple(FailureRecord("exception", attempt, 2) for attempt in (1, 2))
    records = [
        record(1, "claim", 1),
        record(2, "claim", 2, predecessor="exception", charged=1, failures=failures[:1]),
        record(3, "end", 2, charged=2, failures=failures, outcome=Outcome("failed")),
        record(4, "claim", 3, predecessor="failed"),
        record(5, "end", 3, outcome=Outcome("completed")),
    ]
    raised = [Fault("exception", "w1", attempt) for attempt in (1, 2)]
    assert problems(notes(0, 3, 3), records, *raised, kind="bounded") == []
    assert "its budget has no bound" in problems(notes(0, 3, 3), records, *raised)[0]
    assert "which nobody caused" in problems(notes(0, 3, 3), records, raised[0], kind="bounded")[0]
    left_over = [*records[:3], record(4, "claim", 3, predecessor="failed", charged=1), records[4]]
    assert "begins with 1 charged" in problems(notes(0, 3, 3), left_over, *raised, kind="bounded")[0]
    too_many = [*records[:2], record(3, "end", 2, charged=3, failures=failures * 2, outcome=Outcome("failed")), *records[3:]]
    assert any("3 charged, with a budget of 1" in found for found in problems(notes(0, 3, 3), too_many, *raised, kind="bounded"))


def test_a_deck_is_its_seed() -> None:
    """The same faults in the same order, each as often as the others."""
    kinds = {**OF_WORKERS, **OF_NODES, **{kind: fate for kind, fate in OF_ALL.items() if kind.startswith("driver")}}
    drawn = [[deck.draw()[0] for _ in range(2 * len(kinds))] for deck in (Deck(kinds, "7"), Deck(kinds, "7"), Deck(kinds, "8"))]
    assert drawn[0] == drawn[1] != drawn[2]
    assert sorted(drawn[0]) == sorted([*kinds] * 2)
    assert set(ENDS) >= kinds.keys() >= SUITS.keys()


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(TIMEOUT_S + 20)
def test_a_short_soak() -> None:
    """Everything happens at least once, and nothing is wrong."""
    command = [sys.executable, "-m", "tests.soak", "--minutes", "0.1"]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=TIMEOUT_S, check=False)
    print(done.stdout)
    assert done.returncode == 0, done.stderr[-2000:]
    happened = {line[9:].partition(":")[0] for line in done.stdout.splitlines()}
    assert happened >= {*OF_WORKERS, *OF_NODES, *OF_ALL}
    assert "nothing was wrong" in done.stdout
