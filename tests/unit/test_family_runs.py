"""A student of every family is copied from its teacher, trained by the real loop, exported, and loaded again by transformers alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from llmkd import build, models
from llmkd.config import Recipe, load_recipe
from llmkd.distributed import gathered
from llmkd.train import train
from tests.family_models import CLASSES, DECODERS, new
from tests.tiny import make, recipe_values


@pytest.fixture(scope="module")
def ground(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with rows.jsonl and a tokenizer beside the tiny recipe's own files."""
    folder = tmp_path_factory.mktemp("families")
    make(folder)
    return folder


def recipe_of(ground: Path, teacher: Any, folder: Path, **changes: Any) -> Recipe:
    """Write the teacher with the tokenizer of `ground`, and a recipe of two steps for it."""
    teacher.save_pretrained(folder / "teacher")
    models.load_tokenizer(ground / "teacher").save_pretrained(folder / "teacher")
    values = recipe_values(ground)
    values["output"] = str(folder / "runs")
    values["teacher"] = {"path": str(folder / "teacher"), "dtype": "float32"}
    values["student"] = {"blocks": 2}
    values["train"] |= {"steps": 2, "warmup_steps": 0, "micro_batch_size": 8}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(values))
    return load_recipe(folder / "recipe.yaml").changed(changes)


def trained(world: Any, recipe: Recipe, folder: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, torch.Tensor]:
    """Train the recipe's student; the weights it had at the end, before its export."""
    made: list[Any] = []
    load = build.load_student

    def kept(*args: Any) -> Any:
        made.append(load(*args))
        return made[0]

    monkeypatch.setattr(build, "load_student", kept)
    assert train(world, build.distil_job(world, recipe, folder))
    model = made[0].model
    with gathered(list(model.parameters())):
        return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("name", DECODERS)
def test_decoder_is_trained_exported_and_loaded_again(
    ground: Path, world: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    recipe = recipe_of(ground, new(DECODERS[name](4), "decoder"), tmp_path)
    weights = trained(world, recipe, tmp_path / "run", monkeypatch)
    again = CLASSES["decoder"].from_pretrained(tmp_path / "run" / "model").eval()
    assert type(again) is type(CLASSES["decoder"].from_pretrained(tmp_path / "teacher"))
    assert again.config.num_hidden_layers == 2
    assert all(torch.equal(parameter, weights[key]) for key, parameter in again.named_parameters())
    logged = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert all(step[part] > 0 for step in logged for part in ("ce", "kl", "hidden"))
    models.copied_student(tmp_path / "teacher", (0, 3), tmp_path / "initial", dtype=torch.float32)
    start = dict(CLASSES["decoder"].from_pretrained(tmp_path / "initial").named_parameters())
    assert max((parameter - start[key]).abs().max() for key, parameter in weights.items()) > 1e-4
