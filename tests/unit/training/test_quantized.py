"""What weights in 4 bits do not go together with is one sentence with the cure, before anything is written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from llmkd.data.batches import Family
from llmkd.errors import InputError
from llmkd.models import four_bit
from llmkd.models.load import load_config
from llmkd.recipe.recipe import load_recipe
from llmkd.training import checks, jobs, write_cache

LORA = {"rank": 2, "alpha": 4, "quantize": "nf4"}


@pytest.mark.parametrize("placement", ["zero3", "pipeline"])
def test_a_teacher_in_parts(tiny: Path, placement: str) -> None:
    recipe = load_recipe(tiny / "recipe.yaml").changed({"teacher.quantize": "nf4"})
    sentence = rf"teacher\.quantize: .* a {placement} teacher's .*; write placement: replicated .*, or quantize: none"
    with pytest.raises(InputError, match=sentence):
        recipe.changed({"teacher.placement": placement})
    cached = recipe.changed({"teacher.placement": "cache", "cache.teacher_placement": placement})
    with pytest.raises(InputError, match=sentence):
        write_cache.writing_recipe(cached)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        (
            {"teacher.quantize": "nf4", "train.compile": "blocks"},
            r"train\.compile: .*; write none, or teacher\.quantize",
        ),
        (
            {"teacher.quantize": "nf4", "stones": {"pairs": [[1, 3]]}},
            r"stones: .*; leave the section out, or teacher\.quantize",
        ),
        (
            {"student.lora": LORA, "train.deepspeed": "zero3"},
            r"student\.lora\.quantize: ZeRO-3 .*; write train\.deepspeed: zero2, or quantize: none",
        ),
    ],
    ids=["compiled", "stones", "sharded"],
)
def test_with_a_model(
    tiny: Path, world: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], sentence: str
) -> None:
    monkeypatch.setattr(checks, "check_installed", lambda key: None)  # it is said before a missing package
    recipe = load_recipe(tiny / "recipe.yaml").changed(changes)
    with pytest.raises(InputError, match=sentence):
        jobs.distil_job(world, recipe, tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("key", ["teacher", "student.lora", "finetune.lora"])
def test_without_the_package(tiny: Path, world: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, key: str) -> None:
    monkeypatch.setattr(four_bit.importlib.util, "find_spec", lambda name: None)
    recipe = load_recipe(tiny / "recipe.yaml").changed({"train.deepspeed": str(tiny / "zero2.json")})
    made = {"path": str(tiny / "teacher"), "lora": LORA, "train": recipe.train.model_dump(mode="json")}
    changes = {"teacher": {"teacher.quantize": "nf4"}, "student.lora": {"student.lora": LORA}}
    changes["finetune.lora"] = {"teacher.path": None, "finetune": made}
    job = jobs.finetune_job if key == "finetune.lora" else jobs.distil_job
    with pytest.raises(
        InputError, match=rf"{key}\.quantize: .*bitsandbytes.* pip install 'llmkd\[bnb\]', or write none"
    ):
        job(world, recipe.changed(changes[key]), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_other_families(tiny: Path) -> None:
    recipe = load_recipe(tiny / "recipe.yaml").changed({"teacher.quantize": "nf4"})
    with pytest.raises(InputError, match=r"teacher\.quantize: only decoders .* an encoder; write none"):
        checks.check_quantized(recipe, Family("encoder"), load_config(tiny / "teacher"))
