"""What gathering each block whole saves: collectives and CPU seconds of a step, counted on CPU ranks.

python -m benchmarks.leaves [--ranks 2] [--steps 6]
"""

from __future__ import annotations

import json
import statistics
import tempfile
from pathlib import Path
from typing import Any

import click

from benchmarks.placements import SHAPE, TOKENS, prepare
from llmkd.provenance import commit, hardware, versions
from tests.distributed.leaves import APART, nothing_kept
from tests.distributed.runner import run_on_ranks

RELEASED = "released"
"""Marks a student of which each block is let go after use, as of one above 1e9 weights."""
MODELS: dict[str, dict[str, Any]] = {
    "student of 12 blocks that stays gathered, teacher zero3": {"student.blocks": 12, "teacher.placement": "zero3"},
    "student of 12 blocks that does not, teacher replicated": {"student.blocks": 12, RELEASED: True},
    "student of 3 blocks that stays gathered, teacher zero3": {"student.blocks": 3, "teacher.placement": "zero3"},
}
"""Below 1e9 weights a student stays gathered from its first block's forward pass to that block's backward pass."""


def per_step(run: Path, ranks: int) -> dict[str, float]:
    """What a rank calls in a step, and the CPU seconds of all ranks in it: medians over the steps from the third on."""
    of_ranks = [json.loads((run / f"leaves-{rank}.json").read_text()) for rank in range(ranks)]
    later = range(2, len(of_ranks[0]))

    def median(kind: str, told: list[list[dict[str, float]]]) -> float:
        return statistics.median(sum(steps[n][kind] - steps[n - 1][kind] for steps in told) for n in later)

    calls = {kind: median(kind, of_ranks[:1]) for kind in ("gathers", "reductions")}
    return {**calls, "cpu_seconds": median("cpu_seconds", of_ranks)}


@click.command()
@click.option("--ranks", type=int, default=2, show_default=True)
@click.option("--steps", type=int, default=6, show_default=True)
def main(ranks: int, steps: int) -> None:
    """Print the table of benchmarks/RESULTS.md's section on gathered blocks."""
    click.echo(f"commit {commit()}, {hardware()}, {versions('torch', 'deepspeed', 'transformers')}\n")
    click.echo(f"Teacher {SHAPE}, float32, 16 rows of {TOKENS} tokens per step, one micro-batch per rank\n")
    click.echo("| models | blocks | gathers | reductions | CPU s of all ranks |")
    click.echo("|---|---|---|---|---|")
    changes: dict[str, Any] = {"train.steps": steps, "train.micro_batch_size": 16 // ranks}
    names = {f"{number}{form}": (models, form) for number, models in enumerate(MODELS) for form in (APART, "")}
    runs = {name: {**changes, **MODELS[models]} for name, (models, _) in names.items()}
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "runs"
        recipe = prepare(Path(folder))
        for run in runs.values():
            if run.pop(RELEASED, False):
                run["train.deepspeed"] = nothing_kept(Path(folder))
        assert run_on_ranks(ranks, recipe, runs, output, timeout=3000, module="tests.distributed.leaves") == {}
        for name, (models, form) in names.items():
            found = per_step(output / name, ranks)
            gathered = "map by map" if form else "whole"
            click.echo(
                f"| {models} | {gathered} | {found['gathers']:g} | {found['reductions']:g} | {found['cpu_seconds']:.2f} |"
            )


if __name__ == "__main__":
    main()
