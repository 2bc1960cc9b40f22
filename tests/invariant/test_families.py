"""An encoder's and a T5's student on two ranks, both models sharded, is the student of one process in plain PyTorch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from llmkd.data.formats import RowFormat
from llmkd.data.other_families import collate_for, tokenize_for
from llmkd.losses.schedules import learning_rate
from llmkd.models import load
from llmkd.models.families import family
from llmkd.recipe.recipe import load_recipe
from llmkd.training import build, initial, jobs
from llmkd.training import pairs as recipe_map
from tests.distributed.runner import run_on_ranks
from tests.family_models import CLASSES, ENCODER_DECODERS, ENCODERS, family_recipe, new, plain_losses
from tests.tiny import rows_of_step

TEACHERS: dict[str, Any] = {
    "bert": ("encoder", lambda: ENCODERS["bert"](4)),
    "t5": ("encoder_decoder", lambda: ENCODER_DECODERS["t5"](4, 3)),
    "bart": ("encoder_decoder", lambda: ENCODER_DECODERS["bart"](4, 3)),
}
SCENARIOS: dict[str, dict[str, Any]] = {
    "zero3": {"teacher.placement": "zero3"},
    "accumulated": {"train.micro_batch_size": 1, "train.activation_checkpointing": True},
}


def plain_run(folder: Path, kind: str) -> dict[str, torch.Tensor]:
    """The recipe's two steps on whole batches, in float64: so the rounding that is seen is that of the runs alone."""
    recipe = load_recipe(folder / "recipe.yaml")
    initial.initial_student(recipe, folder / "teacher", folder / "start")
    teacher, student = (CLASSES[kind].from_pretrained(folder / name).double() for name in ("teacher", "start"))
    teacher.eval()
    student.train()
    shape = load.load_config(folder / "teacher")
    of, tokenizer = family(shape), load.load_tokenizer(folder / "teacher")
    lengths: dict[str, Any] = dict(max_length=recipe.data.max_length, too_long="drop")
    data = tokenize_for(of, jobs.read_rows(recipe.data), tokenizer, row_format=RowFormat(), **lengths)
    depths = recipe_map.depths_of(recipe, shape), build.families.depths(shape)
    pairs = recipe_map.maps_of(recipe, *depths)
    train = recipe.train
    assert train.steps is not None
    parameters = list(student.parameters())
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": train.weight_decay},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=train.learning_rate, betas=train.betas, eps=train.epsilon)
    for step in range(train.steps):
        batch = collate_for(of)(rows_of_step(data, recipe, step), pad_id=0)
        ce, kl, distances = plain_losses(teacher, student, pairs, batch)
        (ce + kl + 3 * torch.stack(distances).mean()).backward()
        torch.nn.utils.clip_grad_norm_(parameters, train.clip)
        rate = learning_rate(
            step,
            peak=train.learning_rate,
            final=train.final_learning_rate,
            warmup=0,
            total=train.steps,
            shape=train.schedule,
        )
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()
        optimizer.zero_grad()
    return {name: parameter.detach() for name, parameter in student.named_parameters()}


@pytest.mark.slow
@pytest.mark.parametrize("name", TEACHERS)
def test_two_ranks_with_everything_sharded_are_plain_pytorch(tmp_path: Path, name: str) -> None:
    kind, shape = TEACHERS[name]
    family_recipe(tmp_path, kind, new(shape(), kind))
    recipe = yaml.safe_load((tmp_path / "recipe.yaml").read_text())
    # T5 does not scale its attention, so float32 rounds its gradients by some 1e-6; a larger epsilon keeps that from becoming a step.
    recipe["train"]["epsilon"] = 1e-2
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    refused = run_on_ranks(2, tmp_path / "recipe.yaml", SCENARIOS, tmp_path / "two")
    assert refused == {}
    expected = plain_run(tmp_path, kind)
    start = load_file(tmp_path / "start" / "model.safetensors")
    assert max((expected[key] - start[key]).abs().max() for key in expected if key in start) > 1e-3
    for scenario in SCENARIOS:
        again = CLASSES[kind].from_pretrained(tmp_path / "two" / scenario / "model")
        for key, parameter in again.named_parameters():
            change = (parameter.detach() - expected[key]).abs().max()
            assert change <= 1e-6 * max(1.0, expected[key].abs().max()), (scenario, key, change)
