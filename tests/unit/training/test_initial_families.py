"""A student of every family is copied from its teacher, trained by the real loop, exported, and loaded again by transformers alone."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from llmkd.distributed.engines import gathered
from llmkd.models import load as models
from llmkd.models import make as encoders
from llmkd.models import make as making
from llmkd.models import parts
from llmkd.models.families import depths
from llmkd.models.model_types import MODEL_TYPES
from llmkd.recipe.recipe import Recipe, load_recipe
from llmkd.train import train
from llmkd.training import build, initial, jobs
from tests.family_models import CLASSES, DECODERS, ENCODER_DECODERS, ENCODERS, family_recipe, new
from tests.tiny import make, quick, recipe_values, zero_stages

FAST = ("opt", "bert", "t5")


def some(*names: str) -> list[Any]:
    """Each name as a case, the families' first in every run and the others among the slow tests."""
    return [pytest.param(name, marks=[] if name in FAST else [pytest.mark.slow]) for name in names]


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

    with monkeypatch.context() as patch:
        patch.setattr(build, "load_student", kept)
        at_once = recipe.changed({"train.micro_batch_size": recipe.train.batch_size})
        assert train(world, jobs.distil_job(world, at_once, folder))
    model = made[0].model
    with gathered(list(model.parameters())):
        return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("name", some(*DECODERS))
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
    making.copied_student(tmp_path / "teacher", (0, 3), tmp_path / "initial", dtype=torch.float32)
    start = dict(CLASSES["decoder"].from_pretrained(tmp_path / "initial").named_parameters())
    assert max((parameter - start[key]).abs().max() for key, parameter in weights.items()) > 1e-4


# ---------------------------------------------------------------------------------------------------------------------
# Encoders and encoder-decoders


@pytest.mark.parametrize("name", some(*ENCODERS))
def test_encoder_is_trained_exported_and_loaded_again(
    world: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    teacher = new(ENCODERS[name](4), "encoder")
    recipe = family_recipe(tmp_path, "encoder", teacher, **{"student.copy_blocks": (0, 3)})
    weights = trained(world, recipe, tmp_path / "run", monkeypatch)
    again = CLASSES["encoder"].from_pretrained(tmp_path / "run" / "model").eval()
    assert again.config.num_hidden_layers == 2 and again.config.id2label == {0: "first", 1: "second", 2: "third"}
    assert all(torch.equal(parameter, weights[key]) for key, parameter in again.named_parameters())
    logged = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert list(logged[0]["pairs"]) == ["e<e", "0<1", "1<3"]
    assert all(step[part] > 0 for step in logged for part in ("ce", "kl", "hidden"))
    assert not (tmp_path / "run" / "model" / "generation_config.json").exists()


@pytest.mark.parametrize("classifier", [None, "copied"])
@pytest.mark.parametrize("name", ENCODERS)
def test_copied_encoder_is_the_chosen_blocks_of_its_teacher(tmp_path: Path, name: str, classifier: str | None) -> None:
    teacher = new(ENCODERS[name](4), "encoder")
    changes = {"student.copy_blocks": (0, 3), "student.classifier": classifier}
    recipe = family_recipe(tmp_path, "encoder", teacher, **changes)
    for target in ("one", "two"):
        initial.initial_student(recipe, tmp_path / "teacher", tmp_path / target)
    initial.initial_student(recipe.changed({"seed": 1}), tmp_path / "teacher", tmp_path / "other")
    one, two, other = (
        CLASSES["encoder"].from_pretrained(tmp_path / target).state_dict() for target in ("one", "two", "other")
    )
    whole = teacher.state_dict()
    block = encoders.blocks_name(teacher)
    place = f"{MODEL_TYPES[name].classifier}."
    for key, tensor in one.items():
        source = key.replace(f"{block}1.", f"{block}3.")
        drawn = classifier is None and key.startswith(place)
        assert torch.equal(tensor, whole[source]) != drawn, key
        assert torch.equal(tensor, two[key])
        assert torch.equal(tensor, other[key]) != (drawn and key.endswith("weight")), key


@pytest.mark.parametrize("name", some(*ENCODER_DECODERS))
def test_encoder_decoder_is_trained_exported_and_loaded_again(
    world: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    teacher = new(ENCODER_DECODERS[name](4, 3), "encoder_decoder")
    changes = {"student.decoder_blocks": 1, "matching.final_state": "normed", "data.max_length": 30}
    recipe = family_recipe(tmp_path, "encoder_decoder", teacher, **changes)
    weights = trained(world, recipe, tmp_path / "run", monkeypatch)
    again = CLASSES["encoder_decoder"].from_pretrained(tmp_path / "run" / "model").eval()
    assert depths(again.config) == (2, 1)
    assert all(torch.equal(parameter, weights[key]) for key, parameter in again.named_parameters())
    if name == "bart":
        assert torch.equal(again.final_logits_bias, teacher.final_logits_bias) and again.final_logits_bias.any()
    logged = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert list(logged[0]["pairs"]) == ["enc e<e", "enc 0<1", "enc 1<3", "dec e<e", "dec 0<2"]
    assert all(step[part] > 0 for step in logged for part in ("ce", "kl", "hidden"))
    assert (tmp_path / "run" / "model" / "generation_config.json").exists()


def test_a_decoders_blocks_learn_from_pairs_of_their_own(world: Any, tmp_path: Path) -> None:
    """T5 of 4 + 3 blocks -> 2 + 1: the encoder's second block has a pair, which one list for both stacks could not give it."""
    teacher = new(ENCODER_DECODERS["t5"](4, 3), "encoder_decoder")
    pairs = {"encoder": [[0, 1], [1, 3]], "decoder": [[0, 2]]}
    changes = {"student.decoder_blocks": 1, "matching.strategy": "explicit", "matching.embedding": False}
    recipe = family_recipe(tmp_path, "encoder_decoder", teacher, **changes, **{"matching.pairs": pairs})
    job = jobs.distil_job(world, recipe, tmp_path / "run")
    assert job.pairs == ((0, 1), (1, 3), (2, 6))
    assert train(world, job)
    logged = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert list(logged[0]["pairs"]) == ["enc 0<1", "enc 1<3", "dec 0<2"]
    assert all(value > 0 for value in logged[0]["pairs"].values())
    assert logged[0]["hidden"] == pytest.approx(sum(logged[0]["pairs"].values()) / 3)


@pytest.mark.parametrize("rule", ["spread", "matched"])
@pytest.mark.parametrize("name", ENCODER_DECODERS)
@torch.no_grad()
def test_copied_encoder_decoder_is_the_chosen_blocks_of_both_stacks(tmp_path: Path, name: str, rule: str) -> None:
    teacher = new(ENCODER_DECODERS[name](4, 6), "encoder_decoder")
    recipe = family_recipe(tmp_path, "encoder_decoder", teacher, **{"student.blocks": 2, "student.copy_blocks": rule})
    initial.initial_student(recipe, tmp_path / "teacher", tmp_path / "student")
    student = models.load_model(tmp_path / "student", dtype=torch.float32, ds_config=None, attention="sdpa")
    chosen = [0, 3, 4 + 0, 4 + 5] if rule == "spread" else [1, 3, 4 + 2, 4 + 5]
    stack, theirs = parts.blocks(student), parts.blocks(teacher)
    assert len(stack) == 4
    for block, old in zip(stack, chosen, strict=True):
        for key, tensor in block.state_dict().items():
            # T5 keeps the positions of a whole stack in its first block
            source = theirs[0 if old < 4 else 4] if "relative_attention_bias" in key else theirs[old]
            assert torch.equal(tensor, source.state_dict()[key]), key
    own, outside = student.state_dict(), [n for n in teacher.state_dict() if not re.search(r"\.\d+\.", n)]
    assert len(outside) >= 3 and all(torch.equal(own[key], teacher.state_dict()[key]) for key in outside)


@pytest.mark.parametrize("name", some("bert", "distilbert", "t5", "bart", "opt"))
def test_narrow_random_student_learns_through_projectors(
    world: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    kind = "encoder" if name in ENCODERS else "decoder" if name in DECODERS else "encoder_decoder"
    shape = {**ENCODERS, **DECODERS}[name](4) if kind != "encoder_decoder" else ENCODER_DECODERS[name](4, 3)
    widths = {"student.hidden_size": 24, "student.intermediate_size": 40, "student.num_attention_heads": 3}
    changes = {"student.init": "random", **widths, "matching.strategy": "reverse", "data.max_length": 30}
    recipe = family_recipe(tmp_path, kind, new(shape, kind), **changes)
    weights = trained(world, recipe, tmp_path / "run", monkeypatch)
    again = CLASSES[kind].from_pretrained(tmp_path / "run" / "model")
    assert again.config.hidden_size == 24 and not any("projector" in key for key in again.state_dict())
    assert all(torch.equal(parameter, weights[key]) for key, parameter in again.named_parameters())
    assert {40} <= {size for parameter in again.parameters() for size in parameter.shape}
    assert 48 not in {size for parameter in again.parameters() for size in parameter.shape}


@pytest.mark.parametrize("name", ["bert", "t5", "bart"])
def test_a_sharded_teacher_teaches_what_a_whole_one_does(
    world: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """On one rank; the same on two, beside plain PyTorch, in tests/invariant/test_families.py."""
    kind = "encoder" if name in ENCODERS else "encoder_decoder"
    shape = ENCODERS[name](4) if kind == "encoder" else ENCODER_DECODERS[name](4, 3)
    recipe = family_recipe(tmp_path, kind, new(shape, kind), **{"matching.strategy": "reverse"})
    zero_stages(tmp_path)
    losses = []
    for placement in ("replicated", "zero3"):
        folder = tmp_path / placement
        trained(world, recipe.changed({**quick(tmp_path), "teacher.placement": placement}), folder, monkeypatch)
        lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        losses.append([(line["ce"], line["kl"], *line["pairs"].values()) for line in lines])
    assert len(losses[0]) == recipe.train.steps
    torch.testing.assert_close(*map(torch.tensor, losses), rtol=1e-5, atol=1e-6)
