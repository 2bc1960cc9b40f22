"""Data at scale, in one run: the speed of tokenizing, how often a study does it, the start of a run on many rows, waiting for batches.

python -m benchmarks.data [speed] [packing] [once] [start] [waiting]        (default: all)

speed: rows a second of llmkd's token files and of `datasets.map` with the bare tokenizer, each with all cores, in turn.
packing: how full best fit makes sequences, and how full any packing of whole rows could.
once: how often the rows of a study of five students on two ranks are tokenized.
start: seconds to the first step and memory of a rank, on 1,000, 10,000 and 1,000,000 rows that are tokens already.
waiting: the share of a run's steps that is spent waiting for batches, on the quickstart and on packed rows of 2,048 tokens.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import resource
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from datasets import Dataset
from scipy.optimize import linprog

from benchmarks.start import first_step
from benchmarks.tables import table
from llmkd import starting
from llmkd.data import records, token_files
from llmkd.data.batches import Batch, Family
from llmkd.data.formats import RowFormat
from llmkd.data.order import Source
from llmkd.data.other_families import encoder_for, tokenize_for
from llmkd.data.packing import packed_rows
from llmkd.distributed import ranks
from llmkd.distributed.launch import launch
from llmkd.models import make
from llmkd.models.architectures import new_config
from llmkd.models.load import DTYPES
from llmkd.recipe.recipe import Recipe, dump_recipe, load_recipe
from llmkd.train import train
from llmkd.training import jobs
from llmkd.training.prepare import PreparedRun

CUT: dict[str, Any] = {"max_length": 512, "too_long": "drop"}
REPEATS = 3


def rows_of(count: int) -> Dataset:
    examples = records.rows("train", 0, 0, count)
    return Dataset.from_list([{key: e[key] for key in ("prompt", "completion")} for e in examples])


def tokenizer_of(rows: Dataset) -> Any:
    return make.new_tokenizer((text for column in ("prompt", "completion") for text in rows[:5000][column]), 2000)


def speed(folder: Path) -> str:
    """Of the same rows: tokens, trained positions, lengths, files and hashes; and ids alone."""
    rows = rows_of(100_000)
    tokenizer = tokenizer_of(rows)
    cores = len(os.sched_getaffinity(0))

    def plain(number: int) -> None:
        rows.map(
            lambda columns: {
                "prompt_ids": tokenizer(columns["prompt"])["input_ids"],
                "completion_ids": tokenizer(columns["completion"])["input_ids"],
            },
            batched=True,
            num_proc=cores,
            remove_columns=rows.column_names,
            new_fingerprint=f"plain-{number}-{time.time_ns()}",
            cache_file_name=str(folder / f"plain-{number}.arrow"),
        )

    def ours(number: int) -> None:
        encode = encoder_for(Family("decoder"), rows.column_names, tokenizer, row_format=RowFormat(), **CUT)
        token_files.made(folder / f"ours-{number}", lambda: (rows, encode), identity={}, **CUT)

    wall: dict[str, list[float]] = {"plain": [], "ours": []}
    cpu: dict[str, list[float]] = {"plain": [], "ours": []}
    for number in range(REPEATS):
        for name, run in (("plain", plain), ("ours", ours)):
            began, spent = time.perf_counter(), cpu_seconds()
            run(number)
            wall[name].append(len(rows) / (time.perf_counter() - began))
            cpu[name].append(len(rows) / (cpu_seconds() - spent))
    lines = [[name, *(f"{statistics.median(of[name]):,.0f}" for of in (wall, cpu))] for name in wall]
    head = [f"100,000 rows, {cores} processes", f"rows/s (median of {REPEATS})", "rows a CPU second"]
    said = [table(head, lines), ""]
    for kind, of in (("wall", wall), ("CPU", cpu)):
        ratios = [a / b for a, b in zip(of["ours"], of["plain"], strict=True)]
        said.append(f"ours / plain, {kind}: {statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})")
    return "\n".join(said)


def cpu_seconds() -> float:
    """Of this process and of those it has waited for: where other work shares the cores, wall time is half that work's."""
    return sum(
        used.ru_utime + used.ru_stime
        for used in map(resource.getrusage, (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    )


def fewest(lengths: np.ndarray, width: int) -> int:
    """A number of sequences of `width` tokens that no packing of whole rows can go below, by linear programming.

    The linear relaxation of cutting stock, whose patterns (how many rows of each length one sequence holds) are made when they would
    help (Gilmore and Gomory 1961); whole sequences seldom take more than one above it.
    """
    sizes, counts = np.unique(lengths, return_counts=True)
    patterns = np.diag(width // sizes)
    while True:
        solved: Any = linprog(np.ones(patterns.shape[1]), A_ub=-patterns, b_ub=-counts)
        worth, pattern = _worthiest(sizes, -solved.ineqlin.marginals, width)
        if worth <= 1 + 1e-9:
            return math.ceil(solved.fun - 1e-6)
        patterns = np.column_stack([patterns, pattern])


def _worthiest(sizes: np.ndarray, worths: np.ndarray, width: int) -> tuple[float, np.ndarray]:
    """(its worth, how many rows of each size) of the sequence that holds the rows worth most."""
    best, last = np.zeros(width + 1), np.full(width + 1, -1)
    for room in range(1, width + 1):
        fitting = np.flatnonzero(sizes <= room)
        values = best[room - sizes[fitting]] + worths[fitting]
        if len(fitting) and values.max() > 0:
            best[room], last[room] = values.max(), fitting[values.argmax()]
    pattern, room = np.zeros(len(sizes), dtype=int), width
    while last[room] >= 0:
        pattern[last[room]] += 1
        room -= sizes[last[room]]
    return float(best[width]), pattern


def packing(folder: Path) -> str:
    """The built-in task's rows in sequences of several lengths."""
    rows = rows_of(9600)
    tokens = tokenize_for(Family("decoder"), rows, tokenizer_of(rows), row_format=RowFormat(), **CUT)
    lengths = np.array(tokens["length"])
    lines = []
    for width in (128, 256, 512, 2048):
        count = len(packed_rows(lengths, 0, Source(0, len(lengths)), 0, width)[0]) - 1
        full = [f"{lengths.sum() / width / sequences:.1%}" for sequences in (count, fewest(lengths, width))]
        lines.append([str(width), str(count), *full])
    head = [
        f"tokens of a sequence (rows: {lengths.mean():.0f} on average, {lengths.max()} at most)",
        "sequences",
        "full",
        "at most, by any packing",
    ]
    return table(head, lines)


def small_recipe(folder: Path, name: str, rows: Path, **changes: Any) -> Recipe:
    """One step of a small student of a small teacher, which is made where it is not there yet."""
    teacher = folder / "teacher"
    if not teacher.exists():
        tokenizer = tokenizer_of(rows_of(5000))
        shape = load_recipe("quickstart").finetune
        assert shape is not None and shape.architecture is not None
        config = new_config({**shape.architecture.model_dump(), "max_position_embeddings": 4096}, tokenizer)
        make.new_model(config, teacher, seed=0, dtype=DTYPES["float32"], tokenizer=tokenizer.save_pretrained)
    values = {
        "name": name,
        "output": str(folder / "runs"),
        "teacher.path": str(teacher),
        "finetune": None,
        "data.source": str(rows),
        "data.rows": None,
        "data.validation": None,
        "evaluation.generation.source": "records",
        "train.validate_every": 0,
        "train.steps": 1,
        "train.warmup_steps": 0,
        "train.log_every": 1,
    }
    return load_recipe("quickstart").changed({**values, **changes})


def written(folder: Path, count: int) -> Path:
    """A file of so many rows."""
    file = folder / f"{count}.jsonl"
    if not file.exists():
        with file.open("w") as lines:
            for start in range(0, count, 50_000):
                for example in records.rows("train", 0, start, min(50_000, count - start)):
                    lines.write(json.dumps({key: example[key] for key in ("prompt", "completion")}) + "\n")
    return file


def once(folder: Path) -> str:
    """Five launches of two ranks; token files keep the time at which they were written."""
    times: dict[Path, set[int]] = {}
    for strategy in ("forward", "reverse", "all_to_one", "random", "none"):
        recipe = small_recipe(folder, "once", written(folder, 20_000), **{"matching.strategy": strategy})
        file = folder / f"{strategy}.yaml"
        file.write_text(dump_recipe(recipe))
        assert launch(2, ["--recipe", str(file), "--output", str(folder / strategy)]).code == 0
        for shard in recipe.tokens_folder(recipe.data).rglob("*.arrow"):
            times.setdefault(shard, set()).add(shard.stat().st_mtime_ns)
    made = max(map(len, times.values()))
    folders = {shard.parent for shard in times}
    assert len(folders) == 1
    return f"5 students x 2 ranks, 20,000 rows: {len(times)} shards, each written {made} time(s)"


@contextlib.contextmanager
def most_held() -> Iterator[dict[str, int]]:
    """Inside, the most KiB that a process forked by the server held at once: of its own, and of mapped files; looked at all the time."""
    most, over = {"RssAnon": 0, "RssFile": 0}, threading.Event()

    def look() -> None:
        while not over.wait(0.002):
            if (server := starting.running()) is not None:
                number = server.process.pid
                for child in Path(f"/proc/{number}/task/{number}/children").read_text().split():
                    with contextlib.suppress(OSError):  # it has ended
                        lines = Path(f"/proc/{child}/status").read_text().splitlines()
                        for name, _, value in (line.partition(":") for line in lines):
                            if name in most:
                                most[name] = max(most[name], int(value.split()[0]))

    watcher = threading.Thread(target=look)
    watcher.start()
    try:
        yield most
    finally:
        over.set()
        watcher.join()


def start(folder: Path) -> str:
    """Each launch twice, to make the tokens and to know the source's hash, then alternately; ranks are forked by the server.

    A rank's memory is what is its own: the pages of mapped files are the page cache's, shared by all ranks and given back when the machine
    has no other.
    """
    counts = (1_000, 10_000, 1_000_000)
    seconds: dict[int, list[float]] = {count: [] for count in counts}
    cpu: dict[int, list[float]] = {count: [] for count in counts}
    own: dict[int, list[float]] = {count: [] for count in counts}
    mapped: dict[int, list[float]] = {count: [] for count in counts}
    for number in range(-2, REPEATS):
        for count in counts:
            recipe = small_recipe(folder, "start", written(folder, count))
            file, run = folder / f"{count}.yaml", folder / f"{count}-{number}"
            file.write_text(dump_recipe(recipe))
            with most_held() as most:
                taken, spent = first_step(1, ["--recipe", str(file), "--output", str(run)], run)
            if number >= 0:
                seconds[count].append(taken)
                cpu[count].append(spent)
                own[count].append(most["RssAnon"] / 2**20)
                mapped[count].append(most["RssFile"] / 2**20)
    middle, busy, peak, pages = (
        {count: statistics.median(of[count]) for count in counts} for of in (seconds, cpu, own, mapped)
    )
    lines = [
        [f"{count:,}", f"{middle[count]:.2f}", f"{busy[count]:.2f}", f"{peak[count]:.3f}", f"{pages[count]:.3f}"]
        for count in counts
    ]
    few, some, many = counts
    head = ["rows, tokenized before", "s to step 1", "CPU s", "GiB of its own", "GiB of mapped files' pages"]
    time_said = f"{middle[many] / middle[few]:.2f} of the time, {busy[many] / busy[few]:.2f} of the CPU time"
    memory_said = f"{peak[many] / peak[some]:.3f} of the memory of its own"
    return f"{table(head, lines)}\n\n{many:,} rows / {few:,}: {time_said}; {many:,} / {some:,}: {memory_said}"


def waiting(folder: Path) -> str:
    """The time inside `next` of the loop's batches, of the time from the first of them to the end of the last step."""
    world = ranks.start()
    quick = {"train.steps": 60, "train.log_every": 20, "train.warmup_steps": 0}
    long = {
        "data.batching": "packed",
        "data.max_length": 2048,
        "train.batch_size": 2,
        "train.micro_batch_size": 1,
        "train.steps": 8,
    }
    lines = []
    for name, changes in (
        ("quickstart's student", quick),
        ("packed, 2,048 tokens", {**quick, **long, "train.log_every": 4}),
    ):
        recipe = small_recipe(folder, "waiting", written(folder, 20_000), **changes)
        spent: list[float] = []
        original: Callable[[PreparedRun], Iterator[list[Batch]]] = PreparedRun.batches

        def timed(self: PreparedRun, spent: list[float] = spent, original: Any = original) -> Iterator[list[Batch]]:
            batches = original(self)
            while True:
                began = time.perf_counter()
                try:
                    step = next(batches)
                except StopIteration:
                    return
                spent.append(time.perf_counter() - began)
                yield step

        PreparedRun.batches = timed  # type: ignore[method-assign]
        run = folder / name.replace(" ", "-")
        assert train(world, jobs.distil_job(world, recipe, run))
        PreparedRun.batches = original  # type: ignore[method-assign]
        whole = json.loads((run / "summary.json").read_text())["seconds"]
        lines.append([name, str(len(spent)), f"{whole:.1f}", f"{sum(spent[1:]) / whole:.2%}", f"{spent[0]:.2f}"])
    ranks.stop()
    return table(["run", "steps", "s of all", "waiting, without the first", "s for the first"], lines)


def main() -> None:
    datasets.disable_progress_bars()
    parts = {"speed": speed, "packing": packing, "once": once, "start": start, "waiting": waiting}
    asked = sys.argv[1:] or list(parts)
    for name in asked:
        with tempfile.TemporaryDirectory() as folder:
            print(f"## {name}\n\n{parts[name](Path(folder))}\n", flush=True)


if __name__ == "__main__":
    main()
