"""What each placement of the teacher costs per step, measured on this machine's CPU ranks and counted for large ones.

python -m benchmarks.placements [--ranks 2 --ranks 4] [--steps 12]
"""

from __future__ import annotations

import json
import statistics
import tempfile
from pathlib import Path
from typing import Any

import click
import torch
import yaml
from transformers import Qwen3Config

from llmkd.models import load
from llmkd.models import make as making
from llmkd.models.architectures import new_config
from llmkd.planning.placements import compare
from llmkd.provenance import commit, hardware, versions
from llmkd.recipe.recipe import load_recipe
from tests.distributed.runner import run_on_ranks, start_ranks
from tests.tiny import make, recipe_values

PLACEMENTS: dict[str, dict[str, Any]] = {
    "replicated": {"teacher.placement": "replicated"},
    "zero3": {"teacher.placement": "zero3"},
    "pipeline": {"teacher.placement": "pipeline"},
    "cache": {"teacher.placement": "cache"},
}
"""Name -> recipe changes; another placement is one more line."""
SHAPE: dict[str, Any] = dict(
    vocab_size=4096,
    hidden_size=256,
    intermediate_size=768,
    num_hidden_layers=12,
    num_attention_heads=8,
    num_key_value_heads=4,
    head_dim=32,
    max_position_embeddings=256,
)
TOKENS = 128
MIB = 2**20


def prepare(folder: Path) -> Path:
    """A random teacher of `SHAPE`, rows of exactly `TOKENS` tokens, and the recipe of three students' blocks."""
    make(folder)
    tokenizer = load.load_tokenizer(folder / "teacher")
    special = {"bos_token_id": None, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    shape = Qwen3Config(**SHAPE, **special)
    making.new_model(
        shape, folder / "large", seed=0, dtype=torch.float32, tokenizer=lambda tmp: tokenizer.save_pretrained(tmp)
    )
    word = next(w for w in (" red", " a", "a") if len(tokenizer(w, add_special_tokens=False)["input_ids"]) == 1)
    row = {"prompt": word * (TOKENS // 2), "completion": word * (TOKENS // 2 - 1)}
    (folder / "rows.jsonl").write_text((json.dumps(row) + "\n") * 256)
    recipe = recipe_values(folder)
    recipe["teacher"]["path"] = str(folder / "large")
    recipe["data"]["max_length"] = TOKENS
    recipe["train"] |= {"batch_size": 16, "micro_batch_size": 2, "head_chunk": 1024}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    return folder / "recipe.yaml"


def measured(recipe: Path, ranks: int, steps: int, folder: Path) -> list[dict[str, Any]]:
    """Per placement: the median wall of a training step, and of the teacher alone what is held and sent."""
    cache = {"cache.path": str(folder / f"cache{ranks}"), "cache.dtype": "float32"}
    placements = {name: {**changes, **cache} for name, changes in PLACEMENTS.items()}
    runs: dict[str, Any] = {"written": {"only": "cache", **cache, "train.steps": steps}}
    runs |= {name: {**changes, "train.steps": steps} for name, changes in placements.items()}
    assert run_on_ranks(ranks, recipe, runs, folder / f"train{ranks}", timeout=3000) == {}
    output = folder / f"teacher{ranks}"
    output.mkdir()
    exams = {name: ("measured", changes, {}) for name, changes in placements.items()}
    tasks = output / "tasks.json"
    tasks.write_text(json.dumps({"recipe": str(recipe), "scenarios": exams, "output": str(output)}))
    codes = [process.wait(timeout=3000) for process in start_ranks(ranks, "tests.distributed.teachers", tasks, output)]
    assert codes == [0] * ranks, (output / "rank0.log").read_text()[-3000:]
    told = [json.loads((output / f"rank{rank}.json").read_text()) for rank in range(ranks)]
    rows = []
    for name in PLACEMENTS:
        lines = (folder / f"train{ranks}" / name / "metrics.jsonl").read_text().splitlines()
        seconds = [json.loads(line)["seconds_per_step"] for line in lines[2:]]
        found = [each[name] for each in told]
        wire = statistics.mean(f.get("received", 0) + f["gathered"] for f in found)
        weights, peak = max(f["weights"] for f in found), max(f["peak"] for f in found)
        rows.append(
            {"placement": name, "seconds": statistics.median(seconds), "wire": wire, "weights": weights, "peak": peak}
        )
    return rows


def counted(ranks: int) -> list[dict[str, Any]]:
    """Qwen3-8B into 9 blocks, 4 x 2048 tokens per rank, one micro-batch per step."""
    changes = {"data.max_length": 2048, "train.micro_batch_size": 4, "train.batch_size": 4 * ranks}
    recipe = load_recipe("qwen3_8b_to_9_blocks").changed(changes)
    assert recipe.teacher.architecture is not None
    config = new_config(recipe.teacher.architecture.model_dump())
    costs = compare(recipe, ranks, config)
    return [{"placement": c.placement, "weights": c.weights, "wire": c.wire, "disk": c.disk} for c in costs]


@click.command()
@click.option("--ranks", multiple=True, type=int, default=(2, 4), show_default=True)
@click.option("--steps", type=int, default=12, show_default=True)
def main(ranks: tuple[int, ...], steps: int) -> None:
    """Print the tables of benchmarks/RESULTS.md's section on placements."""
    click.echo(f"commit {commit()}, {hardware()}, {versions('torch', 'deepspeed', 'transformers')}\n")
    click.echo(
        f"Measured: teacher {SHAPE}, float32, 3-block student, 16 rows of {TOKENS} tokens per step, 2 per micro-batch\n"
    )
    click.echo(
        "| ranks | placement | step, s | wire per step and rank, MiB | teacher weights, MiB | further tensors at most, MiB |"
    )
    click.echo("|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as name:
        recipe = prepare(Path(name))
        for count in ranks:
            for row in measured(recipe, count, steps, Path(name)):
                sizes = " | ".join(f"{row[key] / MIB:.1f}" for key in ("wire", "weights", "peak"))
                click.echo(f"| {count} | {row['placement']} | {row['seconds']:.3f} | {sizes} |")
    click.echo("\nCounted: Qwen3-8B into 9 blocks, bfloat16, 4 x 2048 tokens per rank and step\n")
    click.echo("| ranks | placement | teacher weights per rank, GiB | wire per step and rank, GiB | of zero3's |")
    click.echo("|---|---|---|---|---|")
    for count in (8, 16, 32, 64):
        rows = counted(count)
        (sharded,) = [row["wire"] for row in rows if row["placement"] == "zero3"]
        for row in rows:
            sizes = f"{row['weights'] / 2**30:.2f} | {row['wire'] / 2**30:.3f}"
            click.echo(f"| {count} | {row['placement']} | {sizes} | {row['wire'] / sharded:.3f} |")


if __name__ == "__main__":
    main()
