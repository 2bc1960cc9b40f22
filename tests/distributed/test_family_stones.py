"""Runs with stones of other families than the tiny recipe's: one plain PyTorch run, on one rank, and on two with both models sharded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from llmkd.data.formats import RowFormat
from llmkd.data.other_families import collate_for, tokenize_for
from llmkd.losses.schedules import learning_rate, scheduled
from llmkd.models import families, load
from llmkd.models import parts as model_parts
from llmkd.models.parts import output_state
from llmkd.recipe.recipe import dump_recipe
from llmkd.student.connectors import RIDGE, make_connectors
from llmkd.train import train
from llmkd.training import initial, jobs, pairs
from tests.distributed.runner import run_on_ranks
from tests.family_models import CLASSES, DECODERS, ENCODERS, family_recipe, new, plain_losses
from tests.tiny import rows_of_step
from tests.unit.student.test_stepping_stones_families import WEIGHTS, logits_of, plain

KINDS = {"bert": "encoder", "roberta": "encoder", "opt_narrow": "decoder", "gemma3_text": "decoder"}
ASKED: dict[str, Any] = {
    "student.copy_blocks": (0, 2),
    "loss.hidden": 0.0,
    "matching.embedding": False,
    "stones": {"ce": WEIGHTS.ce, "kl": WEIGHTS.kl, "cross": WEIGHTS.cross, "connector_batches": 2},
    "loss.schedules": {"temperature": {"shape": "linear", "final": 3.0}},
    "train.steps": 3,
}
SHARDED = {"teacher.placement": "zero3", "train.micro_batch_size": 2, "train.activation_checkpointing": True}


def _recipe(folder: Path, name: str) -> Any:
    """A teacher of four blocks, rows, and a recipe of a student of two of them."""
    teacher = new({**DECODERS, **ENCODERS}[name](4), KINDS[name])
    torch.manual_seed(0)
    for key, parameter in teacher.named_parameters():
        if (
            "norm.bias" in key.lower()
        ):  # else a LayerNorm's states have a mean of nearly 0, and rounding settles a connector there
            parameter.data += torch.randn_like(parameter)
    return family_recipe(folder, KINDS[name], teacher, **ASKED)


def plain_run(folder: Path, recipe: Any) -> tuple[dict[str, torch.Tensor], list[float]]:
    """(weights, each step's stones' loss) of the recipe on whole batches, in one process."""
    initial.initial_student(recipe, folder / "teacher", folder / "start")
    shape = load.load_config(folder / "teacher")
    of, tokenizer = families.family(shape), load.load_tokenizer(folder / "teacher")
    teacher, student = (CLASSES[of.kind].from_pretrained(folder / name) for name in ("teacher", "start"))
    teacher.eval().requires_grad_(False)
    student.train()
    lengths: dict[str, Any] = dict(max_length=recipe.data.max_length, too_long="drop")
    data = tokenize_for(of, jobs.read_rows(recipe.data), tokenizer, row_format=RowFormat(), **lengths)
    stones = pairs.stones_of(recipe, 2, 4)
    settings = recipe.train
    rows_of = [rows_of_step(data, recipe, step) for step in range(max(settings.steps, 2))]
    batches = [collate_for(of)(rows, pad_id=0, packed=False) for rows in rows_of]
    connectors: Any = make_connectors(len(stones), student.config.hidden_size, shape.hidden_size)
    for (s, t), connector in zip(stones, connectors, strict=True):
        sides = [
            torch.cat([_states(model.eval(), block, batch) for batch in batches[:2]])
            for model, block in ((student, s), (teacher, t))
        ]
        with torch.no_grad():
            connector.weight.copy_(_fitted(*sides))
    student.train()
    parameters = [*student.parameters(), *connectors.parameters()]
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": settings.weight_decay},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=1.0, betas=settings.betas, eps=settings.epsilon)
    losses = []
    for step in range(settings.steps):
        warmth = scheduled(step, settings.steps, initial=1.0, final=3.0, until=1.0, shape="linear")
        ce, kl, _ = plain_losses(teacher, student, (), batches[step], temperature=warmth)
        parts, _ = plain(student, teacher, connectors, batches[step], warmth)
        beside = torch.stack([*parts.values()]).sum()
        (ce + kl + beside).backward()
        nn.utils.clip_grad_norm_(parameters, settings.clip)
        rate = learning_rate(
            step,
            peak=settings.learning_rate,
            final=settings.final_learning_rate,
            warmup=0,
            total=settings.steps,
            shape=settings.schedule,
        )
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()
        optimizer.zero_grad()
        losses.append(beside.item())
    return {name: parameter.detach() for name, parameter in student.named_parameters()}, losses


def _fitted(ours: torch.Tensor, theirs: torch.Tensor) -> torch.Tensor:
    """The ridge as rows of its own: a LayerNorm's states have nearly no length in one direction, where it is not lost."""
    ridge = (RIDGE * ours.square().sum() / ours.shape[1]).sqrt() * torch.eye(ours.shape[1], dtype=ours.dtype)
    return torch.linalg.lstsq(torch.cat([ours, ridge]), torch.cat([theirs, ridge])).solution.T


def _states(model: Any, block: int, batch: Any) -> torch.Tensor:
    kept: list[torch.Tensor] = []
    hook = model_parts.blocks(model)[block].register_forward_hook(
        lambda m, a, output: kept.append(output_state(output))
    )
    with torch.no_grad():
        logits_of(model, batch)
    hook.remove()
    return kept[0][batch.attended].double()


def _check(run: Path, start: Path, kind: str, expected: dict[str, torch.Tensor], losses: list[float]) -> None:
    logged = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["stones"] for line in logged] == pytest.approx(losses, rel=2e-5)
    assert [line["temperature"] for line in logged] == [1.0, 2.0, 3.0]
    again = CLASSES[kind].from_pretrained(run / "model")
    for key, parameter in again.named_parameters():
        change = (parameter.detach() - expected[key]).abs().max()
        assert change <= 1e-6 * max(1.0, expected[key].abs().max()), (key, change)
    saved, begun = (load_file(at / "model.safetensors") for at in (run / "model", start))
    assert len(saved) == len(begun) and not any(
        "connector" in key for key in saved
    )  # transformers may write a LayerNorm's old names


def test_an_encoders_stones_in_one_process_are_plain_pytorch(tmp_path: Path, world: Any) -> None:
    recipe = _recipe(tmp_path, "bert")
    assert train(world, jobs.distil_job(world, recipe, tmp_path / "run"))
    expected = plain_run(tmp_path, recipe)
    _check(tmp_path / "run", tmp_path / "start", "encoder", *expected)


@pytest.mark.slow
@pytest.mark.parametrize("name", KINDS)
def test_stones_on_two_ranks_with_everything_sharded_are_plain_pytorch(tmp_path: Path, name: str) -> None:
    recipe = _recipe(tmp_path, name)
    (tmp_path / "recipe.yaml").write_text(dump_recipe(recipe))
    assert run_on_ranks(2, tmp_path / "recipe.yaml", {"sharded": SHARDED}, tmp_path / "two") == {}
    expected = plain_run(tmp_path, recipe)
    _check(tmp_path / "two" / "sharded", tmp_path / "start", KINDS[name], *expected)
