"""Models whose blocks are partly dense and partly have experts (Qwen3-MoE), through whole runs."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, Qwen3Config, Qwen3MoeConfig

from llmkd.errors import InputError
from llmkd.models import load as models
from llmkd.models import make as making
from llmkd.recipe.recipe import load_recipe
from llmkd.training import initial, jobs
from tests.distributed.runner import run_on_ranks
from tests.tiny import assert_same_weights, plain_run, quick

SHAPE: dict[str, Any] = dict(
    vocab_size=320,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=6,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    max_position_embeddings=64,
    initializer_range=0.3,
    bos_token_id=None,
)
EXPERTS: dict[str, Any] = dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16, norm_topk_prob=True)
COMMON: dict[str, Any] = {"train.micro_batch_size": 4, "student.copy_blocks": [1, 2, 5], "matching.strategy": "reverse"}
RUNS: dict[str, dict[str, Any]] = {
    "zero3": {"teacher.placement": "zero3", "train.micro_batch_size": 2},
    "zero1": {},
    "random": {"student.init": "random", "student.copy_blocks": "spread"},
    "dense": {"student.init": "checkpoint", "student.blocks": None, "student.copy_blocks": "spread"},
}


@pytest.fixture(scope="module")
def experts(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """tests/tiny.py's folder with a teacher of which every other block has experts, but for one of these; and `dense`, of none."""
    folder = tmp_path_factory.mktemp("experts")
    tokenizer = models.load_tokenizer(tiny / "teacher")
    special = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    mixed = Qwen3MoeConfig(**SHAPE, **special, **EXPERTS, decoder_sparse_step=2, mlp_only_layers=[3])
    dense = Qwen3Config(**{**SHAPE, "num_hidden_layers": 3}, **special)
    for name, config in (("teacher", mixed), ("dense", dense)):
        making.new_model(config, folder / name, seed=3, dtype=torch.float32, tokenizer=tokenizer.save_pretrained)
    return folder


def changes(tiny: Path, experts: Path, name: str) -> dict[str, Any]:
    """The recipe changes of a run."""
    given = {**COMMON, "teacher.path": str(experts / "teacher"), **RUNS[name]}
    if name == "dense":
        given["student.path"] = str(experts / "dense")
    if name == "zero1":
        given["train.deepspeed"] = str(tiny / "zero1.json")
    return given


@pytest.fixture(scope="module")
def runs(tiny: Path, experts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Each of these runs on two ranks."""
    folder = tmp_path_factory.mktemp("runs")
    scenarios = {name: changes(tiny, experts, name) for name in RUNS}
    assert run_on_ranks(2, tiny / "recipe.yaml", scenarios, folder) == {}
    return folder


@pytest.mark.parametrize("name", RUNS)
def test_a_run_is_that_of_plain_pytorch(name: str, runs: Path, tiny: Path, experts: Path, tmp_path: Path) -> None:
    recipe = load_recipe(tiny / "recipe.yaml").changed(changes(tiny, experts, name))
    student = experts / "dense"
    if name != "dense":
        student = tmp_path / "student"
        initial.initial_student(recipe, experts / "teacher", student)
    expected, _ = plain_run(recipe, experts / "teacher", student)
    model: Any = AutoModelForCausalLM.from_pretrained(runs / name / "model", dtype=torch.float32)
    assert_same_weights({key: p.detach() for key, p in model.named_parameters()}, expected, 1e-6)


@pytest.mark.parametrize(
    ("name", "kinds"), [("zero3", [True, False, True]), ("random", [False, False, True]), ("dense", [False] * 3)]
)
def test_each_block_keeps_its_kind(name: str, kinds: list[bool], runs: Path, experts: Path) -> None:
    """Blocks 1 and 5 of the teacher have experts; its block 3, at the place of a sparse step, has none by the list."""
    model: Any = AutoModelForCausalLM.from_pretrained(runs / name / "model")
    assert [hasattr(block.mlp, "experts") for block in model.model.layers] == kinds
    config = json.loads((runs / name / "model" / "config.json").read_text())
    if name != "dense":
        dense = [place for place, has_experts in enumerate(kinds) if not has_experts]
        assert (config["decoder_sparse_step"], config["mlp_only_layers"]) == (1, dense)
