"""Looking changes nothing: with and without validation the same student, to the bit, wherever weights and teacher are."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from llmkd.recipe.recipe import load_recipe
from llmkd.train import train
from llmkd.training import jobs
from tests.distributed.runner import run_on_ranks
from tests.tiny import zero_stages
from tests.unit.training.test_validation import logged

SHARE: dict[str, Any] = {"data.validation": {"share": 0.2, "rows": 7}}
LOOKING: dict[str, Any] = {**SHARE, "train.validate_every": 2}
KEEPING = {"train.validate_every": 1, "train.keep": "best", "train.keep_by": "validation/kl"}
STEPS = {"train.steps": 3, "train.micro_batch_size": 4}
PLACES: dict[str, dict[str, Any]] = {
    "zero0_replicated": {"train.deepspeed": "zero0"},
    "zero3_pipeline_sampled_packed": {
        "train.micro_batch_size": 2,
        "teacher.placement": "pipeline",
        "matching.tokens": 8,
        "matching.distance": "cka",
        "matching.scope": "batch",
        "data.batching": "packed",
    },
    "zero3_zero3_redrawn_stones": {
        "teacher.placement": "zero3",
        "train.activation_checkpointing": True,
        "matching.strategy": "in_order_random",
        "matching.redraw_every": 2,
        "stones": {"sample": "one", "pairs": [[0, 1], [1, 4]]},
    },
    "zero2_cached": {"train.deepspeed": "zero2", "teacher.placement": "cache", "cache.dtype": "float32"},
}


@pytest.fixture(scope="module")
def forgetful(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny recipe with a teacher whose student drops attention at random, so that a random number drawn by a validation would show."""
    folder = tmp_path_factory.mktemp("forgetful")
    shutil.copytree(tiny / "teacher", folder / "teacher")
    shutil.copy(tiny / "recipe.yaml", folder)
    config = json.loads((folder / "teacher" / "config.json").read_text())
    (folder / "teacher" / "config.json").write_text(json.dumps({**config, "attention_dropout": 0.2}))
    zero_stages(folder)
    return folder


def scenarios(folder: Path, names: tuple[str, ...]) -> dict[str, dict[str, Any]]:
    """Each place with and without validation; the cache is written first."""
    asked: dict[str, dict[str, Any]] = {}
    for name in names:
        changes = {**STEPS, "teacher.path": str(folder / "teacher"), **PLACES[name]}
        if (file := folder / f"{changes.get('train.deepspeed')}.json").is_file():
            changes["train.deepspeed"] = str(file)
        if changes.get("teacher.placement") == "cache":
            changes["cache.path"] = str(folder / "cache")
            asked["cache"] = {**changes, **LOOKING, "only": "cache"}
        if name == "zero3_zero3_redrawn_stones":
            asked[f"{name}_keeping"] = {**changes, **LOOKING, **KEEPING}
        asked |= {f"{name}_looking": {**changes, **LOOKING}, f"{name}_not": {**changes, **SHARE}}
    return asked


@pytest.fixture(scope="module")
def two_ranks(forgetful: Path) -> Path:
    output = forgetful / "two"
    assert run_on_ranks(2, forgetful / "recipe.yaml", scenarios(forgetful, tuple(PLACES)), output) == {}
    return output


def same_to_the_bit(ours: Path, theirs: Path) -> None:
    mine, others = (load_file(run / "model" / "model.safetensors") for run in (ours, theirs))
    assert mine.keys() == others.keys() and all(torch.equal(mine[name], others[name]) for name in mine)


@pytest.mark.parametrize("name", PLACES)
def test_invariant_11_with_and_without_validation_the_same_weights_on_two_ranks(two_ranks: Path, name: str) -> None:
    same_to_the_bit(two_ranks / f"{name}_looking", two_ranks / f"{name}_not")
    assert [line["step"] for line in logged(two_ranks / f"{name}_looking")] == [2, 3]
    assert logged(two_ranks / f"{name}_not") == []


def test_two_ranks_keep_the_best_student_and_train_as_if_they_did_not(two_ranks: Path) -> None:
    keeping, looking = (two_ranks / f"zero3_zero3_redrawn_stones_{name}" for name in ("keeping", "looking"))
    summary = json.loads((keeping / "summary.json").read_text())
    values = {line["step"]: line["kl"] for line in logged(keeping)}
    assert summary["kept"] == {"step": min(values, key=lambda step: values[step]), "value": min(values.values())}
    of_step = {line["step"]: line["kl"] for line in logged(looking)}
    assert {step: values[step] for step in of_step} == of_step
    if summary["kept"]["step"] == 3:
        same_to_the_bit(keeping, looking)


def test_invariant_11_on_one_rank(forgetful: Path, world: Any, tmp_path: Path) -> None:
    for name, changes in scenarios(forgetful, ("zero3_zero3_redrawn_stones",)).items():
        if name.endswith("_keeping"):
            continue
        recipe = load_recipe(forgetful / "recipe.yaml").changed({**changes, "train.micro_batch_size": 8})
        assert train(world, jobs.distil_job(world, recipe, tmp_path / name))
    same_to_the_bit(*(tmp_path / f"zero3_zero3_redrawn_stones_{name}" for name in ("looking", "not")))


def test_a_pipelines_time_on_the_wire_is_a_part_of_its_own(two_ranks: Path) -> None:
    parts = {
        name: json.loads((two_ranks / f"{name}_not" / "summary.json").read_text())["seconds_by_part"] for name in PLACES
    }
    assert {name for name in PLACES if parts[name].get("wire", 0.0) > 0} == {"zero3_pipeline_sampled_packed"}
    assert all(of_run["teacher"] > 0 for of_run in parts.values())


def test_placements_agree_on_every_number(two_ranks: Path) -> None:
    """The students differ by rounding alone, and so does what is measured of them."""
    first, cached = (logged(two_ranks / f"{name}_looking") for name in ("zero0_replicated", "zero2_cached"))
    for ours, theirs in zip(cached, first, strict=True):
        for key in ("ce", "kl", "agreement", "pairs"):
            assert ours[key] == pytest.approx(theirs[key], rel=1e-4), key
