"""A study taught from one cache against as many online runs, and a cached step against one without a teacher.

python -m benchmarks.cached_study [--steps 60] [--ranks 1] [--repeats 3] [--keep FOLDER]

On the quickstart's model (12 blocks of width 128 teach 3), data and batch. Every figure is a ratio of two runs that took turns on the same
machine, so that what else runs there falls on both; each is given with the lowest and the highest of its repeats.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from llmkd.config import Recipe, dump_recipe, load_recipe
from llmkd.launch import launch
from llmkd.planner import GIB
from llmkd.provenance import commit, hardware

STRATEGIES = ("none", "forward", "reverse", "all_to_one", "random")
NO_TEACHER = {"matching.strategy": "none", "loss.kl": 0.0}


def prepared(folder: Path, steps: int, teacher_steps: int, depth: int, width: int) -> Recipe:
    """The quickstart's recipe with its teacher made, which every run then reads as a folder."""
    shape = {"num_hidden_layers": depth, "hidden_size": width, "intermediate_size": 2 * width, "head_dim": width // 4}
    recipe = load_recipe("quickstart").changed({
        "output": str(folder), "finetune.train.steps": teacher_steps, "finetune.train.warmup_steps": 1,
        "data.rows": 2400, "train.steps": steps, "train.log_every": steps,
        **{f"finetune.architecture.{key}": value for key, value in shape.items()},
    })  # fmt: skip
    file = folder / "teacher.yaml"
    file.write_text(dump_recipe(recipe))
    _run(file, 1, ["--teacher-only"])
    return recipe.changed({"teacher.path": recipe.teacher_path, "finetune": None})


def _run(file: Path, ranks: int, arguments: list[str]) -> float:
    """Seconds of one launch, interpreter's start included."""
    began = time.perf_counter()
    ending = launch(ranks, ["--recipe", str(file), *arguments])
    assert ending.code == 0, f"{arguments} ended with {ending.code}"
    return time.perf_counter() - began


def trained(recipe: Recipe, changes: dict[str, Any], folder: Path, ranks: int) -> tuple[float, dict[str, Any]]:
    """(seconds of the launch, summary) of one student."""
    folder.mkdir(parents=True)
    file = folder / "given.yaml"
    file.write_text(dump_recipe(recipe.changed(changes)))
    seconds = _run(file, ranks, ["--output", str(folder / "run")])
    return seconds, json.loads((folder / "run" / "summary.json").read_text())


def cached(recipe: Recipe, folder: Path, ranks: int, dtype: str) -> tuple[float, dict[str, Any]]:
    """(seconds to write the cache of all strategies, the changes by which a run reads it)."""
    folder.mkdir(parents=True)
    file = folder / "given.yaml"
    reads = {"teacher.placement": "cache", "cache.path": str(folder / "cache"), "cache.dtype": dtype}
    file.write_text(dump_recipe(recipe.changed({**reads, "study.strategies": list(STRATEGIES), "study.seeds": [0]})))
    return _run(file, ranks, ["--cache-only"]), reads


def study(recipe: Recipe, folder: Path, ranks: int, dtype: str) -> dict[str, float]:
    """Seconds of five online runs and of one cache with five runs from it, in turns; of whole launches and of the loops alone."""
    writing, reads = cached(recipe, folder / "cached", ranks, dtype)
    found = {"online": 0.0, "cached": writing, "online loops": 0.0, "cached loops": 0.0, "writing": writing}
    for strategy in STRATEGIES:
        for name, changes in (("online", {}), ("cached", reads)):
            given = {"matching.strategy": strategy, **changes}
            seconds, summary = trained(recipe, given, folder / f"{name}-{strategy}", ranks)
            found[name] += seconds
            found[f"{name} loops"] += summary["seconds"]
    return found


def step(recipe: Recipe, folder: Path, ranks: int, dtype: str) -> dict[str, float]:
    """Seconds per step without a teacher, with a cached one, and with one that is there; each without the first steps."""
    _, reads = cached(recipe, folder / "cached", ranks, dtype)
    known = {**reads, "cache.path": str(folder / "top_k"), "cache.top_k": 32}
    file = folder / "top_k.yaml"
    file.write_text(dump_recipe(recipe.changed({**known, "matching.strategy": "all_to_one"})))
    _run(file, ranks, ["--cache-only"])
    forward = {"matching.strategy": "forward"}
    kinds = {
        "no teacher": NO_TEACHER,
        "states alone, cached": {**forward, **reads, "loss.kl": 0.0},
        "cached": {**forward, **reads},
        "top 32, cached": {"matching.strategy": "all_to_one", **known},
        "online": forward,
    }
    return {name: _seconds_per_step(recipe, changes, folder / name, ranks) for name, changes in kinds.items()}


def _seconds_per_step(recipe: Recipe, changes: dict[str, Any], folder: Path, ranks: int) -> float:
    """The median over the run's log intervals but the first, in which everything is done for the first time."""
    trained(recipe, {**changes, "train.log_every": 5}, folder, ranks)
    lines = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    return statistics.median(line["seconds_per_step"] for line in lines[1:])


def ratios(measured: list[dict[str, float]], ratio: Callable[[dict[str, float]], float]) -> str:
    """The median of a ratio over the repeats, with its lowest and highest."""
    values = sorted(ratio(one) for one in measured)
    return f"{statistics.median(values):.3f} [{values[0]:.3f}, {values[-1]:.3f}]"


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
    parser.add_argument("--only", choices=["study", "step"])
    parser.add_argument("--keep", type=Path, help="Leave the runs in this folder.")
    given = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as scratch:
        folder = given.keep or Path(scratch)
        folder.mkdir(parents=True, exist_ok=True)
        recipe = prepared(folder, given.steps, given.teacher_steps, given.depth, given.width)
        print(f"{hardware()}; commit {commit()}; {vars(given)}")
        if given.only != "step":
            studies = [study(recipe, folder / f"study{n}", given.ranks, given.dtype) for n in range(given.repeats)]
            size = sum(f.stat().st_size for f in (folder / "study0" / "cached" / "cache").iterdir())
            print(
                f"one cache of {size / GIB:.3f} GiB; seconds of each repeat: {[{k: round(v, 1) for k, v in s.items()} for s in studies]}"
            )
            print(
                f"study of five from one cache / five online, whole launches: {ratios(studies, lambda s: s['cached'] / s['online'])}"
            )
            loops = ratios(studies, lambda s: (s["writing"] + s["cached loops"]) / s["online loops"])
            print(f"the same, loops alone (the cache's whole launch counted): {loops}")
        if given.only != "study":
            steps = [step(recipe, folder / f"step{n}", given.ranks, given.dtype) for n in range(given.repeats)]
            print(f"seconds per step: {[{k: round(v, 4) for k, v in s.items()} for s in steps]}")
            for kind in steps[0]:
                print(
                    f"speed of a step, {kind} / no teacher: {ratios(steps, lambda s, kind=kind: s['no teacher'] / s[kind])}"
                )


if __name__ == "__main__":
    run()
