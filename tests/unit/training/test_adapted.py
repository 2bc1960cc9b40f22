"""What adapters do not go together with is one sentence with the cure, before anything is written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from llmkd import study
from llmkd.data.batches import Family
from llmkd.errors import InputError
from llmkd.layer_map import EMBEDDING
from llmkd.models.load import load_config
from llmkd.recipe.recipe import Recipe, load_recipe
from llmkd.recipe.study_entries import study_entries
from llmkd.training import checks, jobs

LORA = {"rank": 2, "alpha": 4}
NEW = {"vocab_size": 320, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
NEW |= {"num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64}


def _tuned(tiny: Path, changes: dict[str, Any] | None = None) -> Recipe:
    """The tiny recipe, its teacher fine-tuned by adapters."""
    recipe = load_recipe(tiny / "recipe.yaml")
    tuned = {"path": str(tiny / "teacher"), "lora": LORA, "train": recipe.train.model_dump(mode="json")}
    return recipe.changed({"name": "tuned", "teacher.path": None, "finetune": tuned, **(changes or {})})


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"student.init": "random"}, r"student\.lora: the new weights .*; leave lora out, or write init: teacher or"),
        (
            {"stones": {"pairs": [[1, 3]]}},
            r"stones: .* \(student\.lora\); leave the section out, or leave student\.lora",
        ),
        ({"train.compile": "blocks"}, r"train\.compile: .*; write none, or leave student\.lora out"),
        ({"student.lora.targets": []}, r"student\.lora\.targets: is empty; write all_linear, or the names"),
        ({"student.lora.rank": 0}, r"student\.lora\.rank"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_in_a_recipe(tiny: Path, changes: dict[str, Any], sentence: str) -> None:
    recipe = load_recipe(tiny / "recipe.yaml").changed({"student.lora": LORA})
    with pytest.raises(InputError, match=sentence):
        recipe.changed(changes)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        (
            {"train.compile": "blocks"},
            r"finetune\.train\.compile: .*\(finetune\.lora\); write none, or leave finetune\.lora out",
        ),
        ({"lora.targets": []}, r"finetune\.lora\.targets: is empty; write all_linear"),
        (
            {"path": None, "architecture": NEW},
            r"finetune\.lora: the new weights of finetune\.architecture .*; leave lora out, or write finetune\.path",
        ),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_of_a_teacher_in_a_recipe(tiny: Path, changes: dict[str, Any], sentence: str) -> None:
    recipe = _tuned(tiny)
    with pytest.raises(InputError, match=sentence):
        recipe.changed({f"finetune.{key}": value for key, value in changes.items()})


@pytest.mark.parametrize("check", ["teacher", "study"])
def test_of_a_teacher_with_a_model(tiny: Path, world: Any, tmp_path: Path, check: str) -> None:
    """Its own run refuses it, and a study does so before it trains anything."""
    held_out = tmp_path / "held_out.jsonl"
    held_out.write_text('{"prompt": "green tree", "completion": " wind"}\n')
    scored = {"evaluation.generation": {"source": str(held_out)}, "study.strategies": ["forward"]}
    recipe = _tuned(tiny, {"finetune.lora.targets": ["query"], **scored})
    with pytest.raises(InputError, match=r"finetune\.lora\.targets: no linear map .*'query'; choose from down_proj"):
        if check == "teacher":
            jobs.finetune_job(world, recipe, tmp_path / "run")
        else:
            study.check(recipe, study_entries(recipe), ranks=1)
    assert not (tmp_path / "run").exists() and not recipe.folder.exists()


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"matching.embedding": True}, r"matching\.embedding: under student\.lora .* frozen.*; write false"),
        (
            {"student.lora.targets": ["query"]},
            r"student\.lora\.targets: no linear map .*'query'; choose from down_proj",
        ),
    ],
    ids=["embedding", "targets"],
)
def test_with_a_model(tiny: Path, world: Any, tmp_path: Path, changes: dict[str, Any], sentence: str) -> None:
    recipe = load_recipe(tiny / "recipe.yaml").changed({"student.lora": LORA, **changes})
    with pytest.raises(InputError, match=sentence):
        jobs.distil_job(world, recipe, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_with_other_families_and_shards(tiny: Path, tmp_path: Path) -> None:
    recipe = load_recipe(tiny / "recipe.yaml").changed({"student.lora": {**LORA, "dora": True}})
    shape = load_config(tiny / "teacher")
    decoder = Family("decoder")
    checks.check_adapted(recipe, decoder, shape, pairs=((0, 1),))
    with pytest.raises(InputError, match=r"student\.lora: only decoders' .* an encoder-decoder; leave it out"):
        checks.check_adapted(recipe, Family("encoder_decoder"), shape, pairs=())
    with pytest.raises(InputError, match=r"finetune\.lora: only decoders' .* an encoder; leave it out"):
        checks.check_tuned(_tuned(tiny), Family("encoder"), shape)
    with pytest.raises(InputError, match=r"matching\.embedding: .* write false"):
        checks.check_adapted(recipe, decoder, shape, pairs=((EMBEDDING, EMBEDDING),))
    with pytest.raises(InputError, match=r"student\.lora\.dora: .*trust_remote_code runs a folder's; write false"):
        checks.check_adapted(recipe.changed({"teacher.trust_remote_code": True}), decoder, shape, pairs=())
    config = json.loads((tiny / "zero3.json").read_text())
    config["zero_optimization"]["offload_param"] = {"device": "nvme"}
    (tmp_path / "nvme.json").write_text(json.dumps(config))
    changed = recipe.changed({"train.deepspeed": str(tmp_path / "nvme.json")})
    with pytest.raises(InputError, match=r"student\.lora\.dora: .*NVMe.*; write false, or a train\.deepspeed"):
        checks.check_adapted(changed, decoder, shape, pairs=())
    tuned = _tuned(tiny, {"finetune.lora.dora": True, "finetune.train.deepspeed": str(tmp_path / "nvme.json")})
    with pytest.raises(
        InputError, match=r"finetune\.lora\.dora: .*NVMe.*; write false, or a finetune\.train\.deepspeed"
    ):
        checks.check_tuned(tuned, decoder, shape)
