"""Count the identifiers in Python's standard library: tasks over shards of its files, one file is one batch.

    python examples/tokenize_stdlib.py                 # every file: tens of seconds; kill a worker process meanwhile, if you like
    python examples/tokenize_stdlib.py --files 100     # the first ones only

The short form: a decorator, and `faultguard.batches` around what the loop goes through. What the loop carries is in `state`.
"""

from __future__ import annotations

import argparse
import keyword
import sysconfig
import tokenize
from collections import Counter
from pathlib import Path

import ray

import faultguard

SHARDS = 8
SHOWN = 10
INSTALLED = {"site-packages", "dist-packages"}  # inside of the standard library's directory, and no part of it


@faultguard.recoverable
@ray.remote
def count_identifiers(paths: list[str]) -> dict[str, int]:
    """How often each identifier occurs in these files."""
    counts: dict[str, int] = faultguard.current().state.setdefault("counts", {})
    for path in faultguard.batches(paths):
        for identifier in identifiers(path):
            counts[identifier] = counts.get(identifier, 0) + 1
    return counts


def identifiers(path: str) -> list[str]:
    """The identifiers of a file; none, if it is one of those that test what Python says of broken ones."""
    try:
        with tokenize.open(path) as file:
            names = [token.string for token in tokenize.generate_tokens(file.readline) if token.type == tokenize.NAME]
    except (SyntaxError, UnicodeDecodeError, tokenize.TokenError):
        return []
    return [name for name in names if not keyword.iskeyword(name)]


def stdlib_files() -> list[str]:
    """The files, always in the same order: the work goes on by their number."""
    root = Path(sysconfig.get_path("stdlib"))
    return sorted(str(path) for path in root.rglob("*.py") if not INSTALLED.intersection(path.parts))


def main() -> None:
    """Count, and print the totals."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--files", type=int, help="only so many (all)")
    options = parser.parse_args()
    paths = stdlib_files()[: options.files]
    ray.init()
    shards = [paths[start::SHARDS] for start in range(SHARDS)]
    counts: Counter[str] = Counter()
    for counted in faultguard.get([count_identifiers.remote(shard) for shard in shards]):
        counts.update(counted)
    print(f"{len(paths)} files: {counts.total()} identifiers, {len(counts)} different ones")
    for identifier, times in sorted(counts.items(), key=lambda item: (-item[1], item[0]))[:SHOWN]:
        print(f"{times:8} {identifier}")


if __name__ == "__main__":
    main()
