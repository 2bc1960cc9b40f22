"""Runs with weights in 4 bits: the student of plain PyTorch, what checkpoints hold, resuming, export, a cache."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from llmkd.errors import InputError
from llmkd.models import load
from llmkd.models.lora import adapt
from llmkd.processes import Stopping
from llmkd.recipe.recipe import Recipe, load_recipe
from llmkd.rollouts.weights import InFolder, Lent
from llmkd.train import train
from llmkd.training import initial, jobs, write_cache
from tests.distributed.runner import run_on_ranks
from tests.distributed.test_lora import TRAINED, _begun, _logits, _numbers, _weights
from tests.quantized import needs_bitsandbytes, plain_folder
from tests.tiny import assert_same_weights, logged_part, plain_run, quick

LORA = {"rank": 2, "alpha": 4, "quantize": "nf4"}
PLAIN = {"teacher.quantize": "none", "student.lora.quantize": "none"}
BOTH = {"teacher.quantize": "nf4", "student.lora": LORA, "matching.projector": "always", "train.steps": 4}
SCENARIOS: dict[str, dict[str, Any]] = {
    "zero2": {**BOTH, "train.save_every": 2},
    "teacher_with_full_student_zero3": {"teacher.quantize": "nf4", "train.deepspeed": "zero3.json"},
}
MORE: dict[str, dict[str, Any]] = {
    "zero0_dora_checkpointed": {
        **BOTH,
        "train.deepspeed": "zero0.json",
        "student.lora": {**LORA, "dora": True},
        "train.activation_checkpointing": True,
    },
    "teacher_packed": {"teacher.quantize": "nf4", "data.batching": "packed", "train.micro_batch_size": 2},
    "bfloat16": {**BOTH, "train.dtype": "bfloat16", "teacher.dtype": "bfloat16"},
}


def _scenario(tiny: Path, name: str) -> dict[str, Any]:
    changes = {"train.deepspeed": "zero2.json", **(SCENARIOS | MORE)[name]}
    return {**changes, "train.deepspeed": str(tiny / changes["train.deepspeed"])}


@pytest.fixture(scope="module")
def on_two(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The scenarios' runs on two ranks."""
    needs_bitsandbytes()
    folder = tmp_path_factory.mktemp("on-two")
    scenarios = {name: _scenario(tiny, name) for name in SCENARIOS}
    assert run_on_ranks(2, tiny / "recipe.yaml", scenarios, folder) == {}
    return folder


def _expected(tiny: Path, recipe: Recipe, folder: Path) -> Any:
    """The run in plain PyTorch, of plain models with the weights that those in 4 bits are computed with."""
    initial.initial_student(recipe, tiny / "teacher", folder / "student")
    teacher, start = plain_folder(tiny / "teacher", folder / "teacher"), folder / "student"
    if recipe.student.lora is not None:
        start = plain_folder(start, folder / "start")
    plain = {key: value for key, value in PLAIN.items() if recipe.student.lora is not None or "lora" not in key}
    return plain_run(recipe.changed(plain), teacher, start)


def _assert_plain(tiny: Path, run: Path, folder: Path, tolerance: float = 1e-5) -> None:
    """A scenario's run has the losses of plain PyTorch, and in float32 its weights."""
    recipe = load_recipe(tiny / "recipe.yaml").changed(_scenario(tiny, run.name))
    weights, losses = _expected(tiny, recipe, folder)
    if recipe.train.dtype == "float32":
        assert_same_weights(_weights(run), weights, tolerance)
    logged = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for ours, theirs in zip(logged, losses, strict=True):
        assert logged_part(ours, "loss") == pytest.approx(theirs["loss"], rel=tolerance)


@pytest.mark.parametrize("name", SCENARIOS)
def test_the_student_is_that_of_plain_pytorch(on_two: Path, tiny: Path, tmp_path: Path, name: str) -> None:
    _assert_plain(tiny, on_two / name, tmp_path)


@pytest.mark.slow
def test_so_it_is_in_other_settings(tiny: Path, tmp_path: Path) -> None:
    """A broader matrix of the fast test above."""
    needs_bitsandbytes()
    assert run_on_ranks(2, tiny / "recipe.yaml", {name: _scenario(tiny, name) for name in MORE}, tmp_path) == {}
    for name in MORE:
        folder = tmp_path / "plain" / name
        folder.mkdir(parents=True)
        _assert_plain(tiny, tmp_path / name, folder, tolerance=0.02 if name == "bfloat16" else 1e-5)


def test_a_checkpoint_holds_what_is_trained_alone_and_resumes_to_the_bit(
    on_two: Path, tiny: Path, tmp_path: Path
) -> None:
    run = on_two / "zero2"
    shards = sorted((run / "checkpoints" / "step-00000002").rglob("*.pt"))
    states = [torch.load(file, weights_only=False) for file in shards]
    names = {key for state in states for key in state.get("module", ())}
    assert names and all("lora_" in key or key.startswith("projectors.") for key in names)
    held = sum(
        _numbers(state.get("optimizer_state_dict"), "exp_avg") for state in states if "optimizer_state_dict" in state
    )
    assert TRAINED <= held <= 1.01 * TRAINED
    _begun(run, tmp_path / "zero2")
    assert run_on_ranks(2, tiny / "recipe.yaml", {"zero2": _scenario(tiny, "zero2")}, tmp_path) == {}
    ours, theirs = _weights(tmp_path / "zero2"), _weights(run)
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


def test_one_rank_makes_the_same_student(on_two: Path, tiny: Path, world: Any, tmp_path: Path) -> None:
    recipe = load_recipe(tiny / "recipe.yaml").changed(_scenario(tiny, "zero2"))
    assert train(world, jobs.distil_job(world, recipe, tmp_path / "run"))
    assert_same_weights(_weights(tmp_path / "run"), _weights(on_two / "zero2"), 1e-6)


def test_the_exported_folders_say_it_and_give_the_logits_of_training(tiny: Path, world: Any, tmp_path: Path) -> None:
    """Merged, and as adapters on the weights in 4 bits; on the weights as they were before, adapters give others."""
    needs_bitsandbytes()
    changes = {**BOTH, **quick(tiny), "student.lora": {**LORA, "export": "both"}, "train.learning_rate": 0.05}
    recipe = load_recipe(tiny / "recipe.yaml").changed(changes)
    assert train(world, jobs.distil_job(world, recipe, tmp_path / "run"))
    model, base = tmp_path / "run" / "model", tmp_path / "run" / "initial"
    merged = _logits(model)
    apart = _logits(plain_folder(base, tmp_path / "base"), model / "adapter")
    assert (merged - apart).norm() < 1e-5 * merged.norm()
    assert (merged - _logits(base, model / "adapter")).norm() > 0.01 * merged.norm()
    assert (merged - _logits(base)).norm() > 0.01 * merged.norm()
    card, meta = (model / "README.md").read_text(), json.loads((model / "llmkd.json").read_text())
    said = "the blocks' weights kept in 4 bits (nf4)\n"
    assert f"- trained: adapters of rank 2 alone, {said}" in card
    assert f"- teacher: {tiny / 'teacher'}, {said}" in card
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    for record in (meta, summary):
        assert record["inputs"]["teacher.quantize"] == record["inputs"]["student.lora.quantize"] == "nf4"


def test_a_cache_knows_its_teacher(tiny: Path, world: Any, tmp_path: Path) -> None:
    """Trained from it, the student is that of the teacher beside it; a cache of the teacher as it is stored is another."""
    needs_bitsandbytes()
    changes = {
        **quick(tiny),
        "teacher.quantize": "nf4",
        "cache.path": str(tmp_path / "cache"),
        "cache.dtype": "float32",
    }
    recipe = load_recipe(tiny / "recipe.yaml").changed(changes)
    cached = recipe.changed({"teacher.placement": "cache"})
    assert write_cache.cache(world, cached, Stopping())
    for name, one in (("beside", recipe), ("cached", cached)):
        assert train(world, jobs.distil_job(world, one, tmp_path / name))
    assert_same_weights(_weights(tmp_path / "cached"), _weights(tmp_path / "beside"), 1e-6)
    stored = cached.changed({"teacher.quantize": "none"})
    with pytest.raises(InputError, match=r"teacher\.quantize"):
        train(world, jobs.distil_job(world, stored, tmp_path / "stored"))
    with pytest.raises(InputError, match=r"teacher\.quantize"):
        write_cache.cache(world, stored, Stopping())
    shutil.rmtree(tmp_path / "cache")
    assert write_cache.cache(world, stored, Stopping())
    with pytest.raises(InputError, match=r"teacher\.quantize"):
        train(world, jobs.distil_job(world, cached, tmp_path / "again"))


def test_a_teacher_tuned_beside_weights_in_4_bits(tiny: Path, world: Any, tmp_path: Path) -> None:
    needs_bitsandbytes()
    own = load_recipe(tiny / "recipe.yaml").changed({"train.deepspeed": str(tiny / "zero1.json")})
    lora = {"rank": 2, "alpha": 4, "targets": ["q_proj", "up_proj"]}
    tuned = {"path": str(tiny / "teacher"), "train": own.train.model_dump(mode="json"), "seed": 5}
    recipe = own.changed({"teacher.path": None, "finetune": {**tuned, "lora": {**lora, "quantize": "nf4"}}})
    assert train(world, jobs.finetune_job(world, recipe, tmp_path / "teacher"))
    start = plain_folder(tiny / "teacher", tmp_path / "start")
    alone = {"matching.strategy": "none", "loss.kl": 0.0, "loss.hidden": 0.0, "student.lora": lora, "seed": 5}
    alone |= {"student.init": "checkpoint", "student.path": str(start), "student.blocks": None}
    expected, _ = plain_run(own.changed(alone), start, start)
    assert_same_weights(_weights(tmp_path / "teacher"), expected, 1e-5)


@pytest.mark.parametrize("how", ["in_folder", "lent"])
def test_writers_have_the_weights_that_are_trained(tiny: Path, world: Any, tmp_path: Path, how: str) -> None:
    """Also of maps without adapters."""
    needs_bitsandbytes()
    where: dict[str, Any] = dict(dtype=torch.float32, ds_config=None, attention="sdpa")
    model: Any = load.load_model(tiny / "teacher", **where, quantize="nf4").eval()
    adapt(model, rank=2, alpha=4.0, dropout=0.0, targets=["q_proj"], rslora=False, dora=False, seed=1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data += 0.1
    ids = torch.arange(4, 36).reshape(2, 16)
    with torch.no_grad():
        expected = model(input_ids=ids).logits
        if how == "in_folder":
            with InFolder(model, tmp_path).handed_over(world) as folder:
                found = _logits(folder)
        else:
            lent = Lent(model, tiny / "teacher", lambda folder: load.load_model(folder, **where).eval())
            with lent.handed_over(world), lent.writing() as writer:
                found = writer(input_ids=ids).logits
    assert (found - expected).norm() < 1e-5 * expected.norm()
    assert (_logits(tiny / "teacher") - expected).norm() > 1e-2 * expected.norm()
