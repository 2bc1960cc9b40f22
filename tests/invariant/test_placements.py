"""Wherever the teacher lives, the student is the same: pipelines against plain PyTorch, and against the other placements."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from llmkd.recipe.recipe import load_recipe
from llmkd.training import initial
from tests.distributed.runner import run_on_ranks
from tests.invariant.test_same_student import OBJECTIVES, objective_changes
from tests.tiny import assert_same_weights, plain_run

FURTHER: dict[str, dict[str, Any]] = {
    "reverse": {"matching.strategy": "reverse"},
    "in_order_random": {"matching.strategy": "in_order_random"},
    "normed_without_logits": {"matching.final_state": "normed", "loss.kl": 0.0},
}


def _asked(tiny: Path, name: str) -> dict[str, Any]:
    return FURTHER[name] if name in FURTHER else objective_changes(tiny, name)


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
    "in_order_random": ("in_order_random", {"train.deepspeed": "zero2"}),
    "logits_only": ("logits_only", {"train.deepspeed": "zero2"}),
    "normed_without_logits": ("normed_without_logits", {}),
    "two_pipelines_of_one": ("forward", {"teacher.stages": 1, "train.deepspeed": "zero2"}),
    "tied": ("tied", {"train.micro_batch_size": 2}),
}


@pytest.fixture(scope="module")
def runs(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All the runs above, in one process group."""
    output = tmp_path_factory.mktemp("pipelines")
    named = {name: {**_asked(tiny, asked), **PIPELINE, **changes} for name, (asked, changes) in TWO_RANKS.items()}
    assert run_on_ranks(2, tiny / "recipe.yaml", _with_zero2(tiny, named), output) == {}
    return output


def _with_zero2(tiny: Path, scenarios: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    where = str(tiny / "zero2.json")
    return {n: {k: where if v == "zero2" else v for k, v in changes.items()} for n, changes in scenarios.items()}


STRATEGIES = ("forward", "reverse", "all_to_one", "random", "in_order_random", "none", "learned")
PLACEMENTS: dict[str, dict[str, Any]] = {
    "replicated": {"teacher.placement": "replicated"},
    "zero3": {"teacher.placement": "zero3"},
    "pipeline": PIPELINE,
    "pipeline_of_two": {**PIPELINE, "teacher.stages": 2},
}


@pytest.mark.parametrize(
    ("ranks", "strategies", "steps"),
    [
        (2, ("reverse", "all_to_one", "learned"), 3),
        pytest.param(2, STRATEGIES, 20, marks=pytest.mark.slow),
        pytest.param(4, STRATEGIES, 20, marks=pytest.mark.slow),
    ],
    ids=["2", "2-longer", "4"],
)
def test_every_placement_makes_the_same_student_of_every_strategy(
    tiny: Path, tmp_path: Path, ranks: int, strategies: tuple[str, ...], steps: int
) -> None:
    """Accumulated, of uneven lengths; narrow students with projectors every other time, packed every third.

    The slow runs are longer ones, of all strategies and on more ranks.
    """
    narrow = {k: v for k, v in OBJECTIVES["narrow_random"].items() if k.startswith("student")}
    scenarios = {}
    for number, strategy in enumerate(STRATEGIES):
        if strategy not in strategies:
            continue
        changes = {
            "matching.strategy": strategy,
            "matching.embedding": number % 2 == 1,
            "matching.final_state": "normed" if number % 3 == 1 else "raw",
            "data.batching": "packed" if number % 3 == 2 else "grouped",
            "train.steps": steps,
            "train.micro_batch_size": 2 if steps == 3 else 1,
            **(narrow if number % 2 == 0 else {}),
        }
        scenarios |= _in_every_placement(strategy, changes, tmp_path, ranks)
    assert run_on_ranks(ranks, tiny / "recipe.yaml", scenarios, tmp_path, timeout=3000) == {}
    for name in scenarios:
        if name.endswith("-written"):
            continue
        expected = load_file(tmp_path / f"{name.split('-')[0]}-replicated" / "model" / "model.safetensors")
        assert_same_weights(load_file(tmp_path / name / "model" / "model.safetensors"), expected, 1e-6)
        if name.startswith("learned-"):
            ours, theirs = (_learned_weights(tmp_path / run) for run in (name, "learned-replicated"))
            assert len(ours) == 18 * steps and ours == pytest.approx(theirs, rel=1e-5)


def _learned_weights(run: Path) -> list[float]:
    """Of all logged steps, one after another."""
    lines = [json.loads(line)["learned_map"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [weight for line in lines for of_block in line.values() for weight in of_block.values()]


def _in_every_placement(name: str, changes: dict[str, Any], folder: Path, ranks: int) -> dict[str, dict[str, Any]]:
    """The runs of these changes, one per placement; a cache is written before it is read."""
    runs = {
        f"{name}-{placement}": {**changes, **where}
        for placement, where in PLACEMENTS.items()
        if ranks > 2 or placement != "pipeline_of_two"
    }
    cache = {"cache.path": str(folder / f"cache-{name}"), "cache.dtype": "float32"}
    runs[f"{name}-written"] = {"only": "cache", **changes, **cache, "cache.teacher_placement": "pipeline"}
    runs[f"{name}-cache"] = {**changes, **cache, "teacher.placement": "cache"}
    return runs


def test_every_placement_makes_the_same_adapters(tiny: Path, tmp_path: Path) -> None:
    """A LoRA student's, on two ranks, accumulated: under a replicated, sharded, pipelined and cached teacher."""
    lora = {"student.lora": {"rank": 4, "alpha": 8}, "train.micro_batch_size": 2}
    scenarios = _in_every_placement("lora", lora, tmp_path, 2)
    scenarios["all"] = {"train.micro_batch_size": 2}  # what other weights look like
    assert run_on_ranks(2, tiny / "recipe.yaml", scenarios, tmp_path) == {}
    found = {
        name: load_file(tmp_path / name / "model" / "model.safetensors")
        for name in scenarios
        if not name.endswith("-written")
    }
    assert {name for name in found if name.startswith("lora")} == {
        f"lora-{place}" for place in ("replicated", "zero3", "pipeline", "cache")
    }
    for name in ("lora-zero3", "lora-pipeline", "lora-cache"):
        assert_same_weights(found[name], found["lora-replicated"], 1e-6)
    with pytest.raises(AssertionError):
        assert_same_weights(found["all"], found["lora-replicated"], 1e-6)


def test_in_bfloat16_the_placements_are_close(tiny: Path, tmp_path: Path) -> None:
    """Teacher and student in bfloat16: what a student learns differs from placement to placement by rounding alone."""
    changes: dict[str, Any] = {
        "matching.strategy": "forward",
        "teacher.dtype": "bfloat16",
        "train.dtype": "bfloat16",
    }
    runs = _in_every_placement("bf16", changes, tmp_path, 2)
    runs["bf16-written"]["cache.dtype"] = runs["bf16-cache"]["cache.dtype"] = "bfloat16"
    runs["bf16-other"] = {**changes, "matching.strategy": "reverse"}  # what a difference looks like
    assert run_on_ranks(2, tiny / "recipe.yaml", runs, tmp_path) == {}
    folders = {name.split("-")[1]: tmp_path / name / "model" for name in runs if not name.endswith("-written")}
    weights = {name: load_file(folder / "model.safetensors") for name, folder in folders.items()}
    expected = weights.pop("replicated")

    def apart(ours: dict[str, Any]) -> float:
        pairs = [(ours[key].double(), weight.double()) for key, weight in expected.items()]
        return max(float((a - b).norm() / b.norm()) for a, b in pairs)

    assert {"zero3", "pipeline", "cache", "other"} == set(weights)
    far = apart(weights.pop("other"))
    assert far > 1e-4
    for name, ours in weights.items():
        assert apart(ours) <= 0.1 * far, (name, apart(ours), far)


@pytest.mark.parametrize("name", TWO_RANKS)
def test_a_pipelined_teacher_makes_the_student_of_plain_pytorch(
    runs: Path, tiny: Path, tmp_path: Path, name: str
) -> None:
    asked, changes = TWO_RANKS[name]
    batching = changes.get("data.batching", "grouped")
    recipe = load_recipe(tiny / "recipe.yaml").changed({**_asked(tiny, asked), "data.batching": batching})
    teacher = Path(recipe.teacher_path)
    initial.initial_student(recipe, teacher, tmp_path / "student")
    weights, losses = plain_run(recipe, teacher, tmp_path / "student")
    logged = [json.loads(line) for line in (runs / name / "metrics.jsonl").read_text().splitlines()]
    assert len(logged) == len(losses) == 3
    parts = ("ce", *(["hidden"] if recipe.matching.strategy != "none" else []), *(["kl"] if recipe.loss.kl else []))
    for ours, theirs in zip(logged, losses, strict=True):
        for part in parts:
            assert ours[part] == pytest.approx(theirs[part], rel=2e-5, abs=1e-6), (part, ours, theirs)
    assert_same_weights(load_file(runs / name / "model" / "model.safetensors"), weights, 1e-6)
