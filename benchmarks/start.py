"""The start of a study's launches: ranks forked by the server against ranks with an interpreter of their own, in one run.

python -m benchmarks.start [--ranks 2] [--students 3]

The quickstart's teacher and students, of one step each; first all by interpreters, then all by a server that is started for it. Seconds are
from the launch to the first step's line in metrics.jsonl.
"""

from __future__ import annotations

import argparse
import os
import resource
import statistics
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

from benchmarks.tables import table
from llmkd import starting
from llmkd.distributed.launch import launch
from llmkd.recipe.recipe import dump_recipe, load_recipe

ONE_STEP = {"train.steps": 1, "train.warmup_steps": 0, "train.log_every": 1}


def cpu_seconds() -> float:
    """User and system time so far of all processes that this one has started: of the server too, and of what it has waited for."""
    ended = resource.getrusage(resource.RUSAGE_CHILDREN)
    seconds = ended.ru_utime + ended.ru_stime
    running = starting.running()
    if running is not None:
        ticks = Path(f"/proc/{running.process.pid}/stat").read_text().rpartition(")")[2].split()[11:15]
        seconds += sum(map(int, ticks)) / os.sysconf("SC_CLK_TCK")
    return seconds


def first_step(ranks: int, arguments: list[str], run: Path) -> tuple[float, float]:
    """(seconds until the first step is logged, CPU seconds of the whole launch)."""
    logged: list[float] = []

    def watch() -> None:
        while not (run / "metrics.jsonl").is_file():
            time.sleep(0.01)
        logged.append(time.perf_counter())

    before, began = cpu_seconds(), time.perf_counter()
    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    ending = launch(ranks, arguments)
    assert ending.code == 0, f"{arguments} ended with {ending.code}"
    watcher.join()
    return logged[0] - began, cpu_seconds() - before


def study(folder: Path, ranks: int, students: int) -> list[tuple[float, float]]:
    """Of the teacher's launch and of each student's: `first_step`."""
    changes: dict[str, Any] = {"output": str(folder), **ONE_STEP}
    changes |= {f"finetune.{key}": value for key, value in ONE_STEP.items()}
    recipe = load_recipe("quickstart").changed(changes)
    file = folder / "given.yaml"
    file.write_text(dump_recipe(recipe))
    given = ["--recipe", str(file)]
    launches = [first_step(ranks, [*given, "--teacher-only"], recipe.folder / "teacher")]
    for number in range(students):
        run = recipe.folder / f"student{number}"
        launches.append(first_step(ranks, [*given, "--strategy", "forward", "--output", str(run)], run))
    return launches


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--students", type=int, default=3)
    options = parser.parse_args()
    found = {}
    can_fork = starting.can_fork
    for way, forks in (("an interpreter for each rank", lambda: False), ("the server", can_fork)):
        starting.can_fork = forks
        with tempfile.TemporaryDirectory() as folder:
            found[way] = study(Path(folder), options.ranks, options.students)
    rows = []
    for way, launches in found.items():
        (first, first_cpu), others = launches[0], launches[1:]
        seconds, cpu = (statistics.median(values) for values in zip(*others, strict=True))
        rows.append([way, f"{first:.1f}", f"{first_cpu:.1f}", f"{seconds:.1f}", f"{cpu:.1f}"])
    print(table(["ranks from", "teacher: s to step 1", "CPU s", "a student: s to step 1", "CPU s"], rows))
    before, after = (statistics.median(cpu for _, cpu in launches[1:]) for launches in found.values())
    print(f"\nA student's launch takes {after / before:.2f} of the CPU time.")


if __name__ == "__main__":
    main()
