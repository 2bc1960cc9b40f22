"""Wherever the teacher lives, the student is the same: pipelines against plain PyTorch, and against the other placements."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from llmkd import build
from llmkd.config import load_recipe
from tests.distributed.runner import run_on_ranks
from tests.invariant.test_same_student import OBJECTIVES
from tests.tiny import plain_run

ASKED: dict[str, dict[str, Any]] = {
    **OBJECTIVES,
    "reverse": {"matching.strategy": "reverse"},
    "in_order_random": {"matching.strategy": "in_order_random"},
    "normed_without_logits": {"matching.final_state": "normed", "loss.kl": 0.0},
}
PIPELINE: dict[str, Any] = {"teacher.placement": "pipeline"}
# How it is computed on two ranks, where a pipeline has two stages unless it is said: (objective, changes)
TWO_RANKS: dict[str, tuple[str, dict[str, Any]]] = {
    "forward": ("forward", {}),
    "forward_accumulated": ("forward", {"train.micro_batch_size": 1}),
    "reverse_normed_all_packed_accumulated": (
        "reverse_normed_all",
        {"data.batching": "packed", "train.micro_batch_size": 2},
    ),
    "reverse_checkpointed": ("reverse", {"train.activation_checkpointing": True}),
    "one_trained_student_zero2": ("one_trained", {"train.deepspeed": "zero2"}),
    "narrow_random_accumulated": ("narrow_random", {"train.micro_batch_size": 2}),
    "in_order_random": ("in_order_random", {}),
    "logits_only": ("logits_only", {}),
    "normed_without_logits": ("normed_without_logits", {}),
    "two_pipelines_of_one": ("forward", {"teacher.stages": 1}),
}


@pytest.fixture(scope="module")
def runs(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All the runs above, in one process group."""
    output = tmp_path_factory.mktemp("pipelines")
    named = {name: {**ASKED[asked], **PIPELINE, **changes} for name, (asked, changes) in TWO_RANKS.items()}
    assert run_on_ranks(2, tiny / "recipe.yaml", _with_zero2(tiny, named), output) == {}
    return output


def _with_zero2(tiny: Path, scenarios: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    from llmkd.config import ROOT

    cpu = json.loads((ROOT / "ds_configs" / "cpu.json").read_text())
    (tiny / "cpu_zero2.json").write_text(
        json.dumps({**cpu, "zero_optimization": {**cpu["zero_optimization"], "stage": 2}})
    )
    where = str(tiny / "cpu_zero2.json")
    return {n: {k: where if v == "zero2" else v for k, v in changes.items()} for n, changes in scenarios.items()}


STRATEGIES = ("forward", "reverse", "all_to_one", "random", "in_order_random", "none")
PLACEMENTS: dict[str, dict[str, Any]] = {
    "replicated": {"teacher.placement": "replicated"},
    "zero3": {"teacher.placement": "zero3"},
    "pipeline": PIPELINE,
    "pipeline_of_two": {**PIPELINE, "teacher.stages": 2},
}


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [2, 4])
def test_every_placement_makes_the_same_student_of_every_strategy(tiny: Path, tmp_path: Path, ranks: int) -> None:
    """Twenty steps, accumulated, of uneven lengths; narrow students with projectors every other time, packed every third."""
    narrow = {k: v for k, v in OBJECTIVES["narrow_random"].items() if k.startswith("student")}
    scenarios = {}
    for number, strategy in enumerate(STRATEGIES):
        changes = {
            "matching.strategy": strategy,
            "matching.embedding": number % 2 == 1,
            "matching.final_state": "normed" if number % 3 == 1 else "raw",
            "data.batching": "packed" if number % 3 == 2 else "grouped",
            "train.steps": 20,
            "train.micro_batch_size": 1,
            **(narrow if number % 2 == 0 else {}),
        }
        for placement, where in PLACEMENTS.items():
            if ranks > 2 or placement != "pipeline_of_two":
                scenarios[f"{strategy}-{placement}"] = {**changes, **where}
    assert run_on_ranks(ranks, tiny / "recipe.yaml", scenarios, tmp_path, timeout=3000) == {}
    for name in scenarios:
        expected = load_file(tmp_path / f"{name.split('-')[0]}-replicated" / "model" / "model.safetensors")
        _assert_same(load_file(tmp_path / name / "model" / "model.safetensors"), expected)


def _assert_same(ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    assert ours.keys() == theirs.keys()
    for key, expected in theirs.items():
        change = (ours[key] - expected).abs().max()
        assert change <= 1e-6 * max(1.0, expected.abs().max()), (key, change)


@pytest.mark.parametrize("name", TWO_RANKS)
def test_a_pipelined_teacher_makes_the_student_of_plain_pytorch(
    runs: Path, tiny: Path, tmp_path: Path, name: str
) -> None:
    asked, changes = TWO_RANKS[name]
    batching = changes.get("data.batching", "grouped")
    recipe = load_recipe(tiny / "recipe.yaml").changed({**ASKED[asked], "data.batching": batching})
    build.initial_student(recipe, tiny / "teacher", tmp_path / "student")
    weights, losses = plain_run(recipe, tiny / "teacher", tmp_path / "student")
    logged = [json.loads(line) for line in (runs / name / "metrics.jsonl").read_text().splitlines()]
    assert len(logged) == len(losses) == 4
    parts = ("ce", "hidden", *(["kl"] if recipe.loss.kl else []))
    for ours, theirs in zip(logged, losses, strict=True):
        for part in parts:
            assert ours[part] == pytest.approx(theirs[part], rel=2e-5, abs=1e-6), (part, ours, theirs)
    _assert_same(load_file(runs / name / "model" / "model.safetensors"), weights)
