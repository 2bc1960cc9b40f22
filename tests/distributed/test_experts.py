"""Models whose blocks are partly dense and partly have experts (Qwen3-MoE), through whole runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, Qwen3Config, Qwen3MoeConfig

from llmkd.errors import InputError
from llmkd.models import load as models
from llmkd.models import make as making
from llmkd.planning.memory import plan
from llmkd.recipe.recipe import load_recipe
from llmkd.training import initial, jobs
from tests.distributed.runner import run_on_ranks
from tests.tiny import assert_same_weights, plain_run

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
    "dense_random": {"student.init": "random", "student.copy_blocks": "spread", "student.num_experts": 0},
    "balanced": {"loss.router": 0.5, "teacher.placement": "zero3", "train.micro_batch_size": 2},
    "balanced_alone": {
        "loss.router": 0.5,
        "loss.kl": 0.0,
        "loss.hidden": 0.0,
        "matching.strategy": "none",
        "data.batching": "packed",
        "train.activation_checkpointing": True,
    },
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
    expected, losses = plain_run(recipe, experts / "teacher", student)
    model: Any = AutoModelForCausalLM.from_pretrained(runs / name / "model", dtype=torch.float32)
    assert_same_weights({key: p.detach() for key, p in model.named_parameters()}, expected, 1e-6)
    logged = [json.loads(line) for line in (runs / name / "metrics.jsonl").read_text().splitlines()]
    assert all(line.keys() >= {"loss", "ce"} for line in logged) and len(logged) == len(losses) == 3
    for ours, theirs in zip(logged, losses, strict=True):
        for part in ("loss", "router") if name.startswith("balanced") else ("loss",):
            assert ours[part] == pytest.approx(theirs[part], rel=2e-5), part
    assert ("router" in logged[0]) == name.startswith("balanced")


@pytest.mark.parametrize(
    ("name", "kinds"),
    [
        ("zero3", [True, False, True]),
        ("random", [False, False, True]),
        ("dense", [False] * 3),
        ("dense_random", [False] * 3),
    ],
)
def test_each_block_keeps_its_kind(name: str, kinds: list[bool], runs: Path, experts: Path) -> None:
    """Blocks 1 and 5 of the teacher have experts; its block 3, at the place of a sparse step, has none by the list."""
    model: Any = AutoModelForCausalLM.from_pretrained(runs / name / "model")
    assert [hasattr(block.mlp, "experts") for block in model.model.layers] == kinds
    config = json.loads((runs / name / "model" / "config.json").read_text())
    assert (config["model_type"] == "qwen3") == name.startswith("dense")
    if not name.startswith("dense"):
        dense = [place for place, has_experts in enumerate(kinds) if not has_experts]
        assert (config["decoder_sparse_step"], config["mlp_only_layers"]) == (1, dense)


def test_what_is_not_for_these_models_is_refused_before_anything_is_written(
    tiny: Path, experts: Path, world: Any, tmp_path: Path
) -> None:
    recipe = load_recipe(tiny / "recipe.yaml").changed({**changes(tiny, experts, "zero1"), "loss.router": 0.01})
    jobs.distil_job(world, recipe, tmp_path / "run")
    refused: list[tuple[dict[str, Any], str]] = [
        ({"student.copy_blocks": [0, 2, 4]}, "loss.router: no block of the student, a 'qwen3_moe' model, has a router"),
        (
            {**changes(tiny, experts, "dense"), "train.deepspeed": "cpu"},
            "loss.router: no block of the student, a 'qwen3' model, has .* write 0, or copy blocks with experts",
        ),
        (
            {"teacher.placement": "pipeline"},
            "teacher.placement: a 'qwen3_moe' model has not been shown to work cut into stages; write zero3 or replic",
        ),
        (
            {**changes(tiny, experts, "dense_random"), "train.deepspeed": "cpu"},
            "loss.router: no block of the student, a 'qwen3' model, has a router",
        ),
        (
            {**changes(tiny, experts, "dense_random"), "loss.router": 0.0, "teacher.path": str(tiny / "teacher")},
            "student.num_experts: blocks without experts are known of qwen3_moe, and the teacher is a 'qwen3' model; leave",
        ),
        (
            {"student.intermediate_size": 16},
            "student.intermediate_size: copied blocks of a 'qwen3_moe' model can't be narrowed",
        ),
    ]
    for more, sentence in refused:
        with pytest.raises(InputError, match=sentence):
            jobs.distil_job(world, recipe.changed(more), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_dense_student_is_refused_where_its_blocks_are_given(tiny: Path) -> None:
    recipe = load_recipe(tiny / "recipe.yaml")
    with pytest.raises(
        InputError, match="student.num_experts: copied blocks keep their experts; .* write init: random"
    ):
        recipe.changed({"student.num_experts": 0})
    start = {"student.init": "checkpoint", "student.path": "x", "student.blocks": None, "student.num_experts": 0}
    with pytest.raises(InputError, match="student.num_experts: a checkpoint has its own width; leave it out"):
        recipe.changed(start)


def test_the_plan_is_that_of_the_dense_student(tiny: Path, experts: Path) -> None:
    recipe = load_recipe(tiny / "recipe.yaml").changed(changes(tiny, experts, "dense_random"))
    start = {"student.init": "checkpoint", "student.path": str(experts / "dense"), "student.blocks": None}
    assert plan(recipe, 1) == plan(recipe.changed({**start, "student.num_experts": None}), 1)


def test_the_plan_counts_the_routers(tiny: Path, experts: Path) -> None:
    """Of a student with two routers of four experts, on micro-batches of 4 x 64 tokens."""
    recipe = load_recipe(tiny / "recipe.yaml").changed(changes(tiny, experts, "zero1"))
    without, balanced = plan(recipe, 1), plan(recipe.changed({"loss.router": 0.01}), 1)
    [row] = [row for row in balanced if row not in without]
    assert (row.what, row.bytes) == ("the routers' probabilities", 4 * 64 * 2 * 4 * 4)
