"""What a notebook sees whose cells are run twice in one driver: with an unnamed run, a named one, and a named one that was cut.

    python examples/notebook.py

Paste the cells into a notebook, or open the file where `# %%` divides cells. As a script it runs all cells a second time by itself.
"""

# %% The task. `diary` is only there to show which batches were really worked on.
from __future__ import annotations

import tempfile
from pathlib import Path

import ray

import faultguard

if not ray.is_initialized():
    ray.init()
    TEMPORARY = tempfile.TemporaryDirectory(prefix="fg-notebook-")  # until the notebook ends
    FOLDER = Path(TEMPORARY.name)
    NUMBERS = list(range(30))
    PASSES: list[int] = []
PASSES.append(len(PASSES) + 1)
print(f"--- pass {PASSES[-1]} ---")


@faultguard.recoverable(every=1, give_up_on=FileNotFoundError)
@ray.remote
def add(worker_id: str, numbers: list[int], folder: Path, needs: str) -> int:
    """The sum of the numbers; the twentieth batch needs a file."""
    ckpt = faultguard.current()
    ckpt.state.setdefault("sum", 0)
    for number in ckpt.batches(numbers):
        with (folder / "diary").open("a", encoding="ascii") as diary:
            diary.write(f"{worker_id}\n")
        if needs and number == 20:  # noqa: PLR2004 - somewhere in the middle
            (folder / needs).read_bytes()
        ckpt.state["sum"] += number
    return int(ckpt.state["sum"])


def worked() -> str:
    """How many batches each worker has worked on since this was last asked."""
    lines = (FOLDER / "diary").read_text(encoding="ascii").split() if (FOLDER / "diary").exists() else []
    (FOLDER / "diary").unlink(missing_ok=True)
    return ", ".join(f"{worker_id}: {lines.count(worker_id)} batches" for worker_id in ("left", "right"))


# %% An unnamed run. It needs no init, and ends with the driver or with shutdown(). Run again, it is new work: everything runs.
sums = faultguard.get([add.remote("left", NUMBERS, FOLDER, ""), add.remote("right", NUMBERS, FOLDER, "")])
faultguard.shutdown()  # a driver has one run at a time, and the next cell begins another one
print(f"unnamed         {sums}  {worked()}")

# %% A named run that comes to its end is closed. Run again, the name begins anew; init(resume="always") would give the results again.
with faultguard.init(run="closed", checkpoint_dir=FOLDER / "checkpoints"):
    sums = faultguard.get([add.remote("left", NUMBERS, FOLDER, ""), add.remote("right", NUMBERS, FOLDER, "")])
print(f"named, closed   {sums}  {worked()}")

# %% A named run that an exception cuts stays open. Run again, it goes on: "left" comes from the record, "right" where it failed.
try:
    with faultguard.init(run="cut", checkpoint_dir=FOLDER / "checkpoints"):
        sums = faultguard.get([add.remote("left", NUMBERS, FOLDER, ""), add.remote("right", NUMBERS, FOLDER, "a file")])
    print(f"named, was cut  {sums}  {worked()}")
except FileNotFoundError:  # in a notebook you would see it, mend it, and run the cell again
    (FOLDER / "a file").touch()
    print(f"named, cut      {worked()}")

# %% The second time. (A notebook has no file.)
if len(PASSES) == 1 and "__file__" in globals():
    exec(compile(Path(__file__).read_text(encoding="utf-8"), __file__, "exec"))  # noqa: S102 - what a notebook does with its cells
