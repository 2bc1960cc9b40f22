"""Students whose blocks, and their teachers', are compiled are those of the same blocks run as they are, and compile once."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from tests.distributed.compiled import TRACED
from tests.distributed.runner import run_on_ranks
from tests.tiny import zero_stages

COMMON: dict[str, Any] = {
    "student.blocks": 2,
    "train.steps": 3,
    "train.log_every": 1,
    "train.clip": 0,
    "train.micro_batch_size": 4,
}
SHARDED = {"teacher.placement": "zero3"}
SCENARIOS: dict[str, dict[str, Any]] = {
    "sharded": SHARDED,
    "checkpointed": {**SHARDED, "train.activation_checkpointing": True, "matching.strategy": "reverse"},
    TRACED: {**SHARDED, "train.activation_checkpointing": True},
    "zero0": {"train.deepspeed": "zero0", "train.activation_checkpointing": True, "loss.report_norms_every": 2},
    "validated": {"train.validate_every": 2, "data.validation.share": 0.2},
    "pipeline": {"teacher.placement": "pipeline"},
}
EAGER = "_eager"


def compare(tiny: Path, folder: Path, ranks: int, names: list[str], module: str) -> Path:
    """Run these scenarios compiled and not; weights and losses must agree to 1e-6."""
    zero_stages(folder)
    runs = {}
    for name in names:
        changes = {**COMMON, **SCENARIOS[name]}
        if "train.deepspeed" in changes:
            changes["train.deepspeed"] = str(folder / f"{changes['train.deepspeed']}.json")
        runs |= {name: {**changes, "train.compile": "blocks"}, name + EAGER: changes}
    output = folder / "runs"
    assert run_on_ranks(ranks, tiny / "recipe.yaml", runs, output, module=module) == {}
    for name in names:
        ours, theirs = (output / form / "model" / "model.safetensors" for form in (name, name + EAGER))
        torch.testing.assert_close(load_file(ours), load_file(theirs), rtol=1e-6, atol=1e-6)
        lines = [
            [json.loads(line).get("loss") for line in (output / form / "metrics.jsonl").read_text().splitlines()]
            for form in (name, name + EAGER)
        ]
        losses = [torch.tensor([loss for loss in each if loss is not None]) for each in lines]
        assert len(losses[0]) >= 2
        torch.testing.assert_close(*losses, rtol=1e-6, atol=0)
    return output


def compiled_once(run: Path, *, kinds: int) -> None:
    """One graph for each kind of block, none after the first batch, which is as long as a head is wide; nothing ends a graph."""
    steps = json.loads((run / "graphs-0.json").read_text())
    assert steps == [{"graphs": kinds, "breaks": 0}] * len(steps) and len(steps) >= 4


def test_compiled_blocks_of_both_models_sharded_change_nothing_and_compile_once(tiny: Path, tmp_path: Path) -> None:
    output = compare(tiny, tmp_path, 1, [TRACED], "tests.distributed.compiled")
    compiled_once(output / TRACED, kinds=2)  # the student's, with gradients, and the teacher's
    exported = AutoModelForCausalLM.from_pretrained(output / TRACED / "model")
    assert sum("_orig_mod" in name for name, _ in exported.named_parameters()) == 0
    stored = load_file(output / TRACED / "model" / "model.safetensors")
    state = exported.state_dict()
    assert state.keys() == stored.keys() and all(torch.equal(state[name], stored[name]) for name in stored)


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
def test_so_it_is_at_stage_0_validated_and_under_any_teacher(tiny: Path, tmp_path: Path, ranks: int) -> None:
    names = ["sharded", "checkpointed", "zero0", "validated", *(["pipeline"] if ranks == 2 else [])]
    output = compare(tiny, tmp_path, ranks, names, "tests.distributed.compiled")
    if ranks == 1:
        compiled_once(output / "checkpointed", kinds=2)


@pytest.mark.slow
def test_with_the_kernels_that_a_cpu_gets(tiny: Path, tmp_path: Path) -> None:
    """By torch's own compiler, which needs a C++ compiler."""
    compare(tiny, tmp_path, 1, ["checkpointed"], "tests.distributed.runner")
