"""Load the Unicode character database into SQLite, each row exactly once, whatever dies in between.

    python examples/etl_sqlite.py                        # load, and check what is in the database
    python examples/etl_sqlite.py --kill 3               # SIGKILL for three worker processes meanwhile
    python examples/etl_sqlite.py --kill 3 --careless    # without the key: rows are loaded twice

A database that is written to does not go back when a task does: the batch that was cut, and those since the newest checkpoint, run
again. So each transaction carries `ckpt.idempotency_key()`, the same in every attempt and another one for every batch, under a
unique constraint: a batch that was committed before is refused by the database itself, and skipped.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import sqlite3
import sys
import tempfile
import time
import unicodedata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ray

import faultguard

if TYPE_CHECKING:
    from collections.abc import Sequence

WORKERS = 4
CHARACTERS = 0x32000  # the planes in which nearly all named characters are
BATCH = 64
EVERY = 20  # batches to a checkpoint: what was committed after the newest one is tried again, and refused
BUSY_S = 60.0  # how long a writer waits for the others
POLL_S = 0.02
LAST_KILL_AT = 0.5  # of the work
IN_LOOP = 0.9  # of the batches of a worker: who has come further may have left its loop
SCHEMA = """
PRAGMA journal_mode = WAL; -- whoever reads, such as the one who kills, waits for no writer
CREATE TABLE loads (key TEXT UNIQUE, worker TEXT, pid INTEGER);
CREATE TABLE characters (code INTEGER, name TEXT, category TEXT); -- nothing is unique here, so that a row loaded twice is seen
"""


@faultguard.recoverable(max_failures=5)
@ray.remote(num_cpus=0.5)
def load(worker_id: str, starts: Sequence[int], database: str, careless: bool) -> int:  # noqa: FBT001 - Ray types only positions
    """Load batches of characters; gives how many rows they have."""
    with (
        contextlib.closing(sqlite3.connect(database, timeout=BUSY_S, isolation_level=None)) as sink,
        faultguard.checkpointed(worker_id, state={"rows": 0}, every=EVERY) as ckpt,
    ):
        for start in ckpt.batches(starts):
            rows = named_characters(start)
            key = None if careless else ckpt.idempotency_key()
            commit(sink, rows, (key, worker_id, os.getpid()))
            ckpt.state["rows"] += len(rows)
    return int(ckpt.state["rows"])


def commit(sink: sqlite3.Connection, rows: list[tuple[int, str, str]], entry: tuple[str | None, str, int]) -> None:
    """The rows and the key of their batch in one transaction; nothing, if the key is there: then so are the rows."""
    sink.execute("BEGIN IMMEDIATE")
    try:
        sink.execute("INSERT INTO loads VALUES (?, ?, ?)", entry)
    except sqlite3.IntegrityError:
        sink.execute("ROLLBACK")
        return
    sink.executemany("INSERT INTO characters VALUES (?, ?, ?)", rows)
    sink.execute("COMMIT")


def named_characters(start: int) -> list[tuple[int, str, str]]:
    """The characters of a batch that have a name."""
    codes = range(start, min(start + BATCH, CHARACTERS))
    return [(code, name, unicodedata.category(chr(code))) for code in codes if (name := unicodedata.name(chr(code), ""))]


def shard(number: int) -> range:
    """The batches of a worker: where each begins."""
    return range(number * BATCH, CHARACTERS, WORKERS * BATCH)


def kill_while(refs: list[Any], database: str, kills: int) -> int:
    """SIGKILL for processes of workers spread over the work: the one furthest on, of those that cannot have left their loops."""
    killed: set[int] = set()
    total = sum(len(shard(number)) for number in range(WORKERS))
    with contextlib.closing(sqlite3.connect(database, timeout=BUSY_S)) as sink:
        waiting = refs
        while waiting and len(killed) < kills:
            _, waiting = ray.wait(waiting, num_returns=len(waiting), timeout=POLL_S)
            pids: dict[str, list[int]] = {}
            for worker_id, pid in sink.execute("SELECT worker, pid FROM loads ORDER BY rowid"):
                pids.setdefault(worker_id, []).append(pid)
            reached = {
                loads[-1]: len(loads) for loads in pids.values() if loads[-1] not in killed and len(loads) < total * IN_LOOP / WORKERS
            }
            if reached and sum(map(len, pids.values())) >= total * LAST_KILL_AT * (len(killed) + 1) / kills:
                pid = max(reached, key=lambda pid: reached[pid])
                os.kill(pid, signal.SIGKILL)
                killed.add(pid)
                print(f"SIGKILL to pid {pid}, after {reached[pid]} of {total // WORKERS} batches", flush=True)
    return len(killed)


def differences(database: str, counted: int) -> list[str]:
    """What is not as it should be, compared with what Python knows of the characters."""
    expected = {row for start in range(0, CHARACTERS, BATCH) for row in named_characters(start)}
    with contextlib.closing(sqlite3.connect(database)) as sink:
        rows = sink.execute("SELECT code, name, category FROM characters").fetchall()
    missing, doubled = len(expected - set(rows)), len(rows) - len(set(rows))
    print(f"{len(rows)} rows in the database, {doubled} of them twice, {missing} missing; {counted} counted in state")
    right = {"missing": missing == 0, "twice": doubled == 0, "miscounted": counted == len(expected), "wrong": set(rows) <= expected}
    return [fault for fault, holds in right.items() if not holds]


def main() -> int:
    """Load, perhaps under fire, and check; gives the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--kill", type=int, default=0, metavar="N", help="kill so many worker processes meanwhile (%(default)s)")
    parser.add_argument("--careless", action="store_true", help="commit without the key")
    options = parser.parse_args()
    ray.init()
    with tempfile.TemporaryDirectory(prefix="fg-etl-") as folder:
        database = str(Path(folder, "characters.db"))
        with contextlib.closing(sqlite3.connect(database)) as sink:
            sink.executescript(SCHEMA)
        with faultguard.init(checkpoint_dir=Path(folder, "checkpoints")):
            refs = [load.remote(f"shard-{number}", shard(number), database, options.careless) for number in range(WORKERS)]
            killed = kill_while(refs, database, options.kill)
            faults = differences(database, sum(faultguard.get(refs)))
    if killed < options.kill:
        faults.append(f"only {killed} of {options.kill} processes were killed")
    print(f"FAILED: {', '.join(faults)}" if faults else "Each row is there exactly once.")
    return 1 if faults else 0


if __name__ == "__main__":
    started = time.monotonic()
    code = main()
    print(f"({time.monotonic() - started:.0f} s in all)")
    sys.exit(code)
