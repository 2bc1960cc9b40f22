"""A NaN is named with its cause, and nothing that holds one is saved or exported."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from llmkd.distributed.engines import own_values
from llmkd.errors import ANOTHER_FOLDER, InputError
from llmkd.recipe.recipe import load_recipe
from llmkd.train import train
from llmkd.training import build, finite, jobs


def _spoilt_teacher(tiny: Path, folder: Path, tensor: str) -> Path:
    shutil.copytree(tiny / "teacher", folder)
    weights = load_file(folder / "model.safetensors")
    weights[tensor][0, 0] = torch.nan
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def _refusal(world: Any, recipe: Any, folder: Path) -> str:
    with pytest.raises(InputError) as refused:
        train(world, jobs.distil_job(world, recipe, folder))
    return str(refused.value)


def test_a_diverged_student_is_neither_saved_nor_exported(tiny: Path, world: Any, tmp_path: Path) -> None:
    """The update of the last step spoils it: the loss, which is taken before, is still finite."""
    options = {"train.steps": 1, "train.warmup_steps": 0, "train.learning_rate": 1e30, "train.weight_decay": 1e20}
    recipe = load_recipe(tiny / "recipe.yaml").changed(options)
    sentence = _refusal(world, recipe, tmp_path / "run")
    assert re.match(
        r"after step 1 \S+ and \d+ other parameters hold a NaN or an infinity: the training has diverged", sentence
    )
    assert f"lower train.learning_rate or train.clip, and {ANOTHER_FOLDER} or remove {tmp_path / 'run'}" in sentence
    assert not (tmp_path / "run" / "model").exists() and not list((tmp_path / "run").glob("checkpoints/*"))
    cured = recipe.changed({"train.learning_rate": 1e-3, "train.weight_decay": 0.1})
    assert train(world, jobs.distil_job(world, cured, tmp_path / "other"))


def test_a_gradient_that_is_not_finite_ends_the_run_though_the_loss_is(
    tiny: Path, world: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """DeepSpeed leaves the step out and goes on."""
    whole, passes = build.load_student, iter(range(100))

    def spoilt(*arguments: Any, **options: Any) -> Any:
        student = whole(*arguments, **options)
        weight = next(parameter for name, parameter in student.named_parameters() if "q_norm" in name)
        weight.register_hook(lambda gradient: gradient * torch.nan if next(passes) == 2 else gradient)
        return student

    monkeypatch.setattr(build, "load_student", spoilt)
    recipe = load_recipe(tiny / "recipe.yaml").changed({"train.steps": 6, "train.micro_batch_size": 8})
    sentence = _refusal(world, recipe, tmp_path / "run")
    left_out = r"step \d: a gradient holds a NaN or an infinity, so that step was left out; "
    assert re.match(left_out + r"lower train\.learning_rate or ", sentence)  # it is trained in float32 already
    assert not (tmp_path / "run" / "model").exists()
    narrow = jobs.distil_job(world, recipe.changed({"train.dtype": "bfloat16"}), tmp_path / "narrow")
    with pytest.raises(InputError, match=left_out + r"write train\.dtype: float32, or lower train\.learning_rate or "):
        finite.check_gradient(narrow, SimpleNamespace(skipped_steps=1), 3)


def test_a_nan_of_the_teacher_s_is_not_laid_to_the_learning_rate(tiny: Path, world: Any, tmp_path: Path) -> None:
    teacher = _spoilt_teacher(tiny, tmp_path / "teacher", "model.layers.1.mlp.up_proj.weight")
    recipe = load_recipe(tiny / "recipe.yaml").changed({"teacher.path": str(teacher), "student.copy_blocks": [0, 2, 4]})
    sentence = _refusal(world, recipe, tmp_path / "run")
    assert re.match(
        r"the loss is nan at step 1, though the student's weights are finite and so is its own cross-entropy", sentence
    )
    assert f"look for a NaN in the weights of {teacher}" in sentence and "learning_rate" not in sentence


def test_a_student_that_starts_with_a_nan_is_refused_and_nothing_is_left(
    tiny: Path, world: Any, tmp_path: Path
) -> None:
    teacher = _spoilt_teacher(tiny, tmp_path / "teacher", "model.layers.2.mlp.up_proj.weight")
    recipe = load_recipe(tiny / "recipe.yaml").changed({"teacher.path": str(teacher), "student.copy_blocks": [0, 2, 4]})
    sentence = _refusal(world, recipe, tmp_path / "run")
    assert "layers.1.mlp.up_proj.weight holds a NaN or an infinity before the first step" in sentence
    assert f"look into {teacher}" in sentence
    assert sentence.endswith(f"look into {teacher}")
    assert not (tmp_path / "run").exists()
    given = load_recipe(tiny / "recipe.yaml").changed(
        {"student.init": "checkpoint", "student.path": str(teacher), "student.blocks": None}
    )
    sentence = _refusal(world, given, tmp_path / "given")
    assert sentence.endswith("before the first step; give another student.path")


def test_an_infinite_loss_is_named(tiny: Path, world: Any, tmp_path: Path) -> None:
    """Weights so large that finite ones give no finite state."""
    options = {"train.steps": 3, "train.warmup_steps": 0, "train.learning_rate": 1e30, "train.weight_decay": 0.0}
    sentence = _refusal(world, load_recipe(tiny / "recipe.yaml").changed(options), tmp_path / "run")
    assert re.match(r"(the loss is (nan|inf) at step \d, though|after step \d)", sentence)
    assert ANOTHER_FOLDER in sentence


def test_the_unwritten_end_of_a_shard_is_not_looked_at() -> None:
    """Five values on four ranks: shards of two, behind whose fifth value lies memory that nobody has written."""
    parameter: Any = torch.nn.Parameter(torch.empty(0))
    parameter.ds_shape = torch.Size([5])
    shards = [([1.0, 2.0], 2), ([3.0, torch.nan], 2), ([5.0, torch.nan], 1), ([torch.nan, torch.nan], 0)]
    for rank, (shard, count) in enumerate(shards):
        parameter.ds_tensor = torch.tensor(shard)
        own = own_values(parameter, rank)
        assert own is not None and len(own) == count and bool(own.isfinite().all()) == (rank != 1)
    parameter.ds_tensor = torch.empty(0)
    assert own_values(parameter, 0) is None
    whole = torch.nn.Parameter(torch.ones(3))
    assert own_values(whole, 1) is whole
