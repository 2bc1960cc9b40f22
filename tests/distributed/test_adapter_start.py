"""A teacher or a student that is a model with an adapter: every run is that of the model in which peft has merged them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from llmkd import study as module
from llmkd.distributed.launch import Ending
from llmkd.errors import InputError
from llmkd.files import read
from llmkd.recipe.recipe import Recipe, load_recipe
from llmkd.recipe.study_entries import entry_recipe, study_entries
from llmkd.train import train
from llmkd.training import initial, jobs
from tests.distributed.runner import run_on_ranks
from tests.in_process import in_process
from tests.tiny import assert_same_weights, plain_run


@pytest.fixture(scope="module")
def merged(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`adapter`, of the tiny teacher, and `plain`, what peft's own merge makes of the two."""
    folder = tmp_path_factory.mktemp("adapted")
    torch.manual_seed(1)
    base: Any = AutoModelForCausalLM.from_pretrained(tiny / "teacher", dtype=torch.float32)
    adapters = peft.LoraConfig(r=4, lora_alpha=6, target_modules=["q_proj", "down_proj"], use_dora=True)
    model: Any = peft.get_peft_model(base, adapters)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data += 0.1 * torch.randn_like(parameter)
    model.save_pretrained(str(folder / "adapter"))
    model.merge_and_unload().save_pretrained(folder / "plain")
    for file in (tiny / "teacher").glob("*token*"):
        (folder / "plain" / file.name).write_bytes(file.read_bytes())
    return folder


def _weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def test_a_teacher_in_every_placement(tiny: Path, merged: Path, tmp_path: Path) -> None:
    """Replicated, sharded, cut into stages, cached; its blocks are copied with their adapters."""
    recipe = load_recipe(tiny / "recipe.yaml").changed({"output": str(tmp_path), "name": "study"})
    given = {"teacher.adapter": str(merged / "adapter"), "output": str(tmp_path), "name": "study"}
    initial.merged_teacher(recipe.changed(given))
    cache = {"cache.path": str(tmp_path / "cache"), "cache.dtype": "float32"}
    scenarios: dict[str, dict[str, Any]] = {
        **{place: {**given, "teacher.placement": place} for place in ("replicated", "zero3", "pipeline")},
        "written": {"only": "cache", **given, **cache},
        "cache": {**given, **cache, "teacher.placement": "cache"},
    }
    assert run_on_ranks(2, tiny / "recipe.yaml", scenarios, tmp_path) == {}
    plain = recipe.changed({"teacher.path": str(merged / "plain")})
    initial.initial_student(plain, merged / "plain", tmp_path / "copied")
    expected, _ = plain_run(plain, merged / "plain", tmp_path / "copied")
    unadapted, _ = plain_run(plain.changed({"name": "other"}), tiny / "teacher", tmp_path / "copied")
    assert any((expected[name] - unadapted[name]).abs().max() > 1e-4 for name in expected)
    for name in ("replicated", "zero3", "pipeline", "cache"):
        assert_same_weights(_weights(tmp_path / name / "model"), expected, 2e-6)


def test_a_student(tiny: Path, merged: Path, world: Any, tmp_path: Path) -> None:
    """Also with new adapters of its own; the sum is written into the run's folder, and gone when the run is done."""
    own = load_recipe(tiny / "recipe.yaml").changed(
        {"student.init": "checkpoint", "student.path": str(tiny / "teacher")}
    )
    own = own.changed({"student.blocks": None, "student.lora": {"rank": 2, "alpha": 4}})
    recipe = own.changed({"student.adapter": str(merged / "adapter")})
    assert train(world, jobs.distil_job(world, recipe, tmp_path / "run"))
    expected, _ = plain_run(own, tiny / "teacher", merged / "plain")
    assert_same_weights(_weights(tmp_path / "run" / "model"), expected, 2e-6)
    assert not (tmp_path / "run" / "initial").exists()


def _changed(folder: Path, copy: Path) -> Path:
    """A copy of an adapter with other numbers."""
    copy.mkdir()
    for file in folder.iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    weights = copy / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-4] + b"\0\0\0\0")
    return copy


def test_adapters_are_among_what_identifies_a_run(tiny: Path, merged: Path, tmp_path: Path) -> None:
    """By their files: with other numbers in the same place it is another teacher, and what was made of the first is refused."""
    copied = _changed(merged / "adapter", tmp_path / "other")
    recipe = load_recipe(tiny / "recipe.yaml").changed({"output": str(tmp_path), "teacher.adapter": str(copied)})
    before = jobs.student_inputs(recipe)
    initial.merged_teacher(recipe)
    first = _weights(Path(recipe.teacher_path))
    initial.merged_teacher(recipe)
    weights = copied / "adapter_model.safetensors"
    weights.write_bytes((merged / "adapter" / weights.name).read_bytes())
    after = jobs.student_inputs(recipe)
    assert {key for key in before if before[key] != after[key]} == {"teacher.adapter:contents"}
    with pytest.raises(InputError, match=r"was made by another recipe: teacher\.adapter:contents was .*remove"):
        initial.merged_teacher(recipe)
    assert_same_weights(_weights(Path(recipe.teacher_path)), first, 0.0)


def test_what_a_recipe_can_not_mean(tiny: Path, merged: Path) -> None:
    recipe = load_recipe(tiny / "recipe.yaml")
    with pytest.raises(
        InputError, match=r"student\.adapter: only init checkpoint reads it \(now teacher\); write teacher\.ad"
    ):
        recipe.changed({"student.adapter": str(merged / "adapter")})
    train_values = recipe.train.model_dump(mode="json")
    tuned = {"teacher.path": None, "finetune": {"path": str(tiny / "teacher"), "train": train_values}}
    with pytest.raises(
        InputError, match=r"teacher\.adapter: it is added to a model's weights; write teacher\.path too"
    ):
        recipe.changed({**tuned, "teacher.adapter": str(merged / "adapter")})


def test_a_student_that_is_refused_leaves_no_sum_behind(tiny: Path, merged: Path, tmp_path: Path) -> None:
    """Of a large teacher it would fill the disk, and its dtype could no longer be changed."""
    changes = {"teacher.adapter": str(merged / "adapter"), "output": str(tmp_path), "matching.pair_weights": [1.0] * 9}
    with pytest.raises(InputError, match="matching.pair_weights"):
        initial.merged_teacher(load_recipe(tiny / "recipe.yaml").changed(changes))
    assert list(tmp_path.iterdir()) == []


def _study(tiny: Path, merged: Path, folder: Path) -> Recipe:
    (folder / "held_out.jsonl").write_text('{"prompt": "green tree", "completion": " wind"}\n')
    scored = {"source": str(folder / "held_out.jsonl"), "items": 1, "max_new_tokens": 2}
    start = {"student.init": "checkpoint", "student.path": str(tiny / "teacher"), "student.blocks": None}
    return load_recipe(tiny / "recipe.yaml").changed(
        {
            **start,
            "teacher.adapter": str(merged / "adapter"),
            "student.adapter": str(merged / "adapter"),
            "output": str(folder / "runs"),
            "evaluation.generation": scored,
            "study.strategies": ["forward"],
            "study.baselines": ["undistilled"],
        }
    )


def test_a_study_scores_the_sums(
    tiny: Path, merged: Path, world: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    in_process(monkeypatch)
    recipe = _study(tiny, merged, tmp_path)
    entries = iter([entry for entry in study_entries(recipe) if entry.train])

    def launch_here(_: int, arguments: list[str]) -> Ending:
        entry = next(entries)
        train(world, jobs.distil_job(world, entry_recipe(recipe, entry), entry.run_folder(recipe.folder)))
        return Ending(0, False)

    monkeypatch.setattr(
        module, "launch_each", lambda launches, *_: [launch_here(one.ranks, one.arguments) for one in launches]
    )
    module.study(recipe)
    expected = _weights(merged / "plain")
    for folder in ("teacher/model", "undistilled/copied"):
        assert_same_weights(_weights(recipe.folder / folder), expected, 2e-6)
    scored = {path.stem for path in (recipe.folder / "generations").glob("*.json")}
    assert scored == {"teacher", "undistilled", "forward-s0"}
    assert read(recipe.folder / "teacher" / "model" / "llmkd.json")["inputs"]["teacher.adapter"] == str(
        merged / "adapter"
    )


def test_a_study_refuses_adapters_of_another_model_before_it_writes_anything(
    tiny: Path, merged: Path, tmp_path: Path
) -> None:
    config = (merged / "adapter" / "adapter_config.json").read_text()
    other = _changed(merged / "adapter", tmp_path / "other")
    (other / "adapter_config.json").write_text(config.replace('"r": 4', '"r": 5'))
    for key in ("teacher.adapter", "student.adapter"):
        recipe = _study(tiny, merged, tmp_path).changed({key: str(other)})
        with pytest.raises(InputError, match=rf"{key}: .* is for another model"):
            module.study(recipe)
        assert not recipe.folder.exists()
