"""A study taught from one cache, or in turn off one teacher, against as many online runs; a cached step against one without a teacher.

python -m benchmarks.cached_study [--steps 60] [--ranks 1] [--repeats 3] [--keep FOLDER]

On the quickstart's model (12 blocks of width 128 teach 3), data and batch of 16; every student sees every row once. The two sides of a
ratio take turns on the same machine, so that what else runs there falls on both, and CPU time, which feels little of it, stands beside
the wall's.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.start import cpu_seconds
from llmkd.data.batches import Counts, announced, batches
from llmkd.distributed.engines import engine
from llmkd.distributed.launch import launch
from llmkd.distributed.ranks import World, start
from llmkd.planning.rows import GIB
from llmkd.provenance import commit, hardware
from llmkd.recipe.recipe import Recipe, dump_recipe, load_recipe
from llmkd.training import build, cache_contents, initial, jobs
from llmkd.training.steps import Steps
from llmkd.training.tokens import drawn, tokens_of

STRATEGIES = ("none", "forward", "reverse", "all_to_one", "random")
NO_TEACHER = {"matching.strategy": "none", "loss.kl": 0.0}


def prepared(folder: Path, steps: int, teacher_steps: int, depth: int, width: int) -> Recipe:
    """The quickstart's recipe with its teacher made, which every run then reads as a folder."""
    shape = {"num_hidden_layers": depth, "hidden_size": width, "intermediate_size": 2 * width, "head_dim": width // 4}
    recipe = load_recipe("quickstart").changed({
        "output": str(folder), "finetune.train.steps": teacher_steps, "finetune.train.warmup_steps": 1,
        "data.rows": 16 * steps, "train.steps": steps, "train.log_every": steps,
        **{f"finetune.architecture.{key}": value for key, value in shape.items()},
    })  # fmt: skip
    file = folder / "teacher.yaml"
    file.write_text(dump_recipe(recipe))
    _run(file, 1, ["--teacher-only"])
    return recipe.changed({"teacher.path": recipe.teacher_path, "finetune": None})


def _run(file: Path, ranks: int, arguments: list[str]) -> tuple[float, float]:
    """(seconds, CPU seconds) of one launch; the first one's has the imports of all."""
    began, before = time.perf_counter(), cpu_seconds()
    ending = launch(ranks, ["--recipe", str(file), *arguments])
    assert ending.code == 0, f"{arguments} ended with {ending.code}"
    return time.perf_counter() - began, cpu_seconds() - before


def trained(recipe: Recipe, changes: dict[str, Any], folder: Path, ranks: int) -> tuple[float, float, float]:
    """(seconds of the launch, its CPU seconds, seconds of the loop) of one student."""
    folder.mkdir(parents=True)
    file = folder / "given.yaml"
    file.write_text(dump_recipe(recipe.changed(changes)))
    taken = _run(file, ranks, ["--output", str(folder / "run")])
    return *taken, json.loads((folder / "run" / "summary.json").read_text())["seconds"]


def cached(recipe: Recipe, folder: Path, ranks: int, dtype: str) -> tuple[float, float, dict[str, Any]]:
    """(seconds, CPU seconds, the changes by which a run reads it) of writing the cache of all strategies."""
    folder.mkdir(parents=True)
    file = folder / "given.yaml"
    reads = {"teacher.placement": "cache", "cache.path": str(folder / "cache"), "cache.dtype": dtype}
    reads |= {"cache.top_k": recipe.cache.top_k}
    file.write_text(dump_recipe(recipe.changed({**reads, "study.strategies": list(STRATEGIES), "study.seeds": [0]})))
    return *_run(file, ranks, ["--cache-only"]), reads


def study(recipe: Recipe, folder: Path, ranks: int, dtype: str | None) -> dict[str, dict[str, float]]:
    """Five online runs, one cache with five runs from it (`dtype`: its; None: none is written), and five in turn off one teacher: by
    whole launches, by their CPU time, by the loops alone."""
    found: dict[str, dict[str, float]] = {"online": dict.fromkeys(("launches", "CPU", "loops"), 0.0)}
    ways: list[tuple[str, dict[str, Any]]] = [("online", {})]
    if dtype is not None:
        wall, cpu, reads = cached(recipe, folder / "cached", ranks, dtype)
        found["cached"] = {"launches": wall, "CPU": cpu, "loops": wall}
        ways.append(("cached", reads))
    for strategy in STRATEGIES:
        for name, changes in ways:
            taken = trained(recipe, {"matching.strategy": strategy, **changes}, folder / f"{name}-{strategy}", ranks)
            for kind, seconds in zip(("launches", "CPU", "loops"), taken, strict=True):
                found[name][kind] += seconds
    found["in turn"] = in_turn(recipe, folder / "in-turn", ranks)
    return found


def in_turn(recipe: Recipe, folder: Path, ranks: int) -> dict[str, float]:
    """The five students online in one launch, off one pass of the teacher."""
    folder.mkdir(parents=True)
    arguments: list[str] = []
    for strategy in STRATEGIES:
        file = folder / f"{strategy}.yaml"
        file.write_text(dump_recipe(recipe.changed({"matching.strategy": strategy})))
        where = str(folder / strategy)
        arguments += ["--beside", str(file), where] if arguments else ["--output", where]
    wall, cpu = _run(folder / f"{STRATEGIES[0]}.yaml", ranks, arguments)
    loops = sum(json.loads((folder / name / "summary.json").read_text())["seconds"] for name in STRATEGIES)
    return {"launches": wall, "CPU": cpu, "loops": loops}


class Stepper:
    """One training run that can be asked for one step at a time."""

    def __init__(self, world: World, recipe: Recipe, folder: Path) -> None:
        job = jobs.distil_job(world, recipe, folder)
        accumulation = build.accumulation_steps(job.train, world.size)
        ds_config = build.training_ds_config(world, job.train, accumulation, folder)
        tokenizer = initial.job_tokenizer(world, job, resuming=False)
        data = tokens_of(world, job, tokenizer)
        cached = cache_contents.open_teacher(world, job, tokenizer, data)
        rows = functools.partial(
            batches, data, seed=0, batch_size=job.train.batch_size, accumulation=accumulation, rank=world.rank,
            world_size=world.size, make=drawn(world, job, data, tokenizer.pad_token_id)[1],
        )  # fmt: skip
        initial.write_initial(world, job, tokenizer, rows, resuming=False)
        module = build.load_student(job, ds_config, build.teacher_width(job))
        self._teacher = cached or (build.load_teacher(world, job) if job.teacher is not None else None)
        train = job.train
        options: dict[str, Any] = dict(betas=train.betas, epsilon=train.epsilon, weight_decay=train.weight_decay)
        self._engine = engine(module, ds_config, learning_rate=train.learning_rate, **options)
        loader = rows(start_step=0, steps=train.steps or 0)
        self._loader = (
            loader if self._teacher is None else announced(((made, False) for made in loader), self._teacher.expect)
        )
        self._steps, self._number = Steps(world, job, train.steps or 0, start_step=0), 0
        module.train()

    def step(self) -> tuple[float, float]:
        """(seconds, seconds of this process's CPU) of one optimizer step, as the training loop does it."""
        began = time.perf_counter(), time.process_time()
        micro_batches = next(self._loader)
        counts = Counts(*map(sum, zip(*(batch.counts for batch in micro_batches), strict=True)))
        self._number += 1
        settings = self._steps.settings(self._number, counts, len(micro_batches))
        for number, batch in enumerate(micro_batches):
            signal = self._teacher.signals(batch) if self._teacher is not None else None
            self._engine.backward(self._engine(batch, signal, settings, number).loss, scale_wrt_gas=False)
            self._engine.step()
        return time.perf_counter() - began[0], time.process_time() - began[1]


def steps_in_turn(recipe: Recipe, folder: Path, dtype: str) -> dict[str, list[tuple[float, float]]]:
    """Each kind's step times; the kinds take turns, a step each, in one process, and the first five turns are left out."""
    _, _, reads = cached(recipe, folder / "cache-states", 1, dtype)
    _, _, knows = cached(recipe.changed({"cache.top_k": 32}), folder / "cache-top_k", 1, dtype)
    forward = {"matching.strategy": "forward"}
    kinds = {
        "no teacher": NO_TEACHER,
        "cached, hidden alone": {**forward, **reads, "loss.kl": 0.0},
        "cached": {**forward, **reads},
        "cached, top 32": {**forward, **knows},
        "online": forward,
    }
    world = start()
    runs = {name: Stepper(world, recipe.changed(changes), folder / name) for name, changes in kinds.items()}
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in runs}
    assert recipe.train.steps is not None
    for turn in range(recipe.train.steps):
        for name, one in runs.items():
            taken = one.step()
            if turn >= 5:
                found[name].append(taken)
    return found


def spread(values: list[float]) -> str:
    """The median with the quartiles, or of fewer than eight values with the lowest and the highest."""
    ordered = sorted(values)
    low, high = (
        (ordered[len(ordered) // 4], ordered[-1 - len(ordered) // 4])
        if len(ordered) >= 8
        else (ordered[0], ordered[-1])
    )
    return f"{statistics.median(ordered):.3f} [{low:.3f}, {high:.3f}]"


def run(arguments: list[str] | None = None) -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument(
        "--teacher-steps", type=int, default=20, help="Of the teacher's own training; its worth is not measured."
    )
    parser.add_argument("--depth", type=int, default=12, help="Of the teacher.")
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--only", choices=["study", "in turn", "step"])
    parser.add_argument("--keep", type=Path, help="Leave the runs in this folder.")
    given = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as scratch:
        folder = given.keep or Path(scratch)
        folder.mkdir(parents=True, exist_ok=True)
        recipe = prepared(folder, given.steps, given.teacher_steps, given.depth, given.width)
        print(f"{hardware()}; commit {commit()}; {vars(given)}")
        if given.only != "step":
            dtype = None if given.only == "in turn" else given.dtype
            studies = [study(recipe, folder / f"study{n}", given.ranks, dtype) for n in range(given.repeats)]
            sides = {"in turn": "in turn, off one teacher"}
            if dtype is not None:
                size = sum(f.stat().st_size for f in (folder / "study0" / "cached" / "cache").iterdir())
                sides["cached"] = f"from one cache of {size / GIB:.3f} GiB, its writing counted"
            print(json.dumps(studies))
            for kind, (side, what) in itertools.product(studies[0]["online"], sides.items()):
                said = spread([one[side][kind] / one["online"][kind] for one in studies])
                print(f"five students {what} / five online, by {kind}: {said}")
        if given.only not in ("study", "in turn"):
            taken = steps_in_turn(recipe, folder / "steps", given.dtype)
            for name, times in taken.items():
                for what, place in (("wall", 0), ("CPU", 1)):
                    pairs = zip(taken["no teacher"], times, strict=True)
                    said = spread([bare[place] / one[place] for bare, one in pairs])
                    median = statistics.median(one[place] for one in times)
                    print(f"speed of a step, {name} / no teacher, {what}: {said} ({median * 1000:.1f} ms)")


if __name__ == "__main__":
    run()
