"""However a run is spread over ranks, stages, accumulation, padding and packing, the student is that of plain PyTorch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from llmkd.recipe.recipe import load_recipe
from llmkd.training import initial
from tests.distributed.runner import run_on_ranks
from tests.tiny import assert_same_weights, logged_part, plain_run

# What is computed: each is compared with a plain run of its own.
OBJECTIVES: dict[str, dict[str, Any]] = {
    "forward": {},
    "reverse_normed_all": {
        "matching.strategy": "reverse",
        "matching.final_state": "normed",
        "matching.embedding": True,
        "loss.kl_positions": "attended",
        "loss.temperature": 2.0,
    },
    "one_trained": {
        "matching.strategy": "all_to_one",
        "matching.positions": "trained",
        "loss.divergence": "reverse_kl",
    },
    "narrow_random": {
        "matching.strategy": "random",
        "matching.projector_bias": True,
        "student.init": "random",
        "student.hidden_size": 24,
        "student.num_attention_heads": 3,
        "student.num_key_value_heads": 1,
    },
    "narrowed": {
        "matching.strategy": "reverse",
        "student.hidden_size": 24,
        "student.intermediate_size": 32,
        "student.num_attention_heads": 1,
        "student.num_key_value_heads": 1,
    },
    "logits_only": {"matching.strategy": "none"},
    "ce_only": {"matching.strategy": "none", "loss.kl": 0.0},
    "jsd": {"matching.strategy": "none", "loss.divergence": "jsd", "loss.beta": 0.3, "loss.temperature": 2.0},
    "akl": {"loss.divergence": "akl", "loss.kl_positions": "attended"},
    "projected": {"matching.projector": "always"},
    "redrawn": {
        "matching.strategy": "in_order_random",
        "matching.redraw_every": 2,
        "loss.divergence": {"forward_kl": 0.5, "reverse_kl": 0.5},
    },
    "differences": {"matching.compare": "differences", "matching.embedding": True},
    "differences_projected": {
        "matching.compare": "differences",
        "matching.strategy": "reverse",
        "matching.projector": "always",
        "matching.positions": "trained",
    },
    "learned": {"matching.strategy": "learned", "matching.temperature": 0.7, "matching.learning_rate": 0.1},
    "learned_projected": {
        "matching.strategy": "learned",
        "matching.projector": "always",
        "matching.final_state": "normed",
        "matching.candidates": 3,
        "matching.start": "uniform",
        "matching.entropy": 0.2,
        "matching.positions": "trained",
    },
    "lens": {"matching.distance": "logit_lens"},
    "lens_alone": {"matching.distance": "logit_lens", "matching.positions": "trained", "loss.ce": 0.0, "loss.kl": 0.0},
    "lora": {"matching.strategy": "reverse", "student.lora": {"rank": 4, "alpha": 8}},
    "lora_projected": {
        "matching.projector": "always",
        "student.lora": {"rank": 3, "alpha": 3, "targets": ["q_proj", "down_proj"], "rslora": True, "dora": True},
    },
    # nothing is asked of the head, nor of the teacher's later blocks
    "hidden_only": {"matching.strategy": "all_to_one", "loss.ce": 0.0, "loss.kl": 0.0},
    "tied": {
        "teacher.path": "tied"
    },  # the folder of tests/tiny.py: head and embeddings are one tensor, and add up their gradients
}


def objective_changes(tiny: Path, name: str) -> dict[str, Any]:
    """The recipe changes of an objective."""
    return {key: str(tiny / v) if key == "teacher.path" else v for key, v in OBJECTIVES[name].items()}


# How it is computed: none of it may matter. (objective, changes)
ONE_RANK: dict[str, tuple[str, dict[str, Any]]] = {
    "zero0": ("forward", {"train.deepspeed": "zero0", "train.micro_batch_size": 8}),
    "zero1_accumulated": ("forward", {"train.deepspeed": "zero1", "train.micro_batch_size": 2}),
    "zero2": ("forward", {"train.deepspeed": "zero2"}),
    "zero3": ("forward", {}),
    "packed": ("forward", {"data.batching": "packed", "train.micro_batch_size": 8}),
    "checkpointed_narrow": ("narrow_random", {"train.activation_checkpointing": True}),
    "reverse_normed_all_zero1": ("reverse_normed_all", {"train.deepspeed": "zero1"}),
    "one_trained": ("one_trained", {"train.micro_batch_size": 8}),
    "narrowed_packed": ("narrowed", {"data.batching": "packed", "train.micro_batch_size": 8}),
    "logits_only_zero2": ("logits_only", {"train.deepspeed": "zero2"}),
    "ce_only": ("ce_only", {"train.micro_batch_size": 8}),
    "jsd_zero1": ("jsd", {"train.deepspeed": "zero1"}),
    "akl_zero0": ("akl", {"train.deepspeed": "zero0"}),
    "hidden_only_zero2": ("hidden_only", {"train.deepspeed": "zero2"}),
    "projected": ("projected", {}),
    "differences_checkpointed": ("differences", {"train.activation_checkpointing": True}),
    "differences_projected_packed": ("differences_projected", {"data.batching": "packed", "train.micro_batch_size": 8}),
    "learned_checkpointed": ("learned", {"train.activation_checkpointing": True}),
    "learned_zero0": ("learned", {"train.deepspeed": "zero0", "train.micro_batch_size": 8}),
    "learned_projected_packed": ("learned_projected", {"data.batching": "packed", "train.micro_batch_size": 8}),
    "lens_checkpointed": ("lens", {"train.activation_checkpointing": True}),
    "lens_alone_packed": (
        "lens_alone",
        {"data.batching": "packed", "train.deepspeed": "zero0", "train.micro_batch_size": 8},
    ),
    "redrawn_zero2": ("redrawn", {"train.deepspeed": "zero2"}),
    "tied": ("tied", {}),
    "lora_zero0": ("lora", {"train.deepspeed": "zero0", "train.micro_batch_size": 8}),
    "lora_checkpointed": ("lora", {"train.activation_checkpointing": True}),
    "lora_projected_packed": ("lora_projected", {"data.batching": "packed", "train.micro_batch_size": 8}),
}
TWO_RANKS: dict[str, tuple[str, dict[str, Any]]] = {
    "zero0": ("forward", {"train.deepspeed": "zero0"}),
    "zero1": ("forward", {"train.deepspeed": "zero1"}),
    "zero2_accumulated": ("forward", {"train.deepspeed": "zero2", "train.micro_batch_size": 1}),
    "zero3": ("forward", {}),
    "zero3_accumulated": ("forward", {"train.micro_batch_size": 2}),
    "teacher_zero3": ("forward", {"teacher.placement": "zero3"}),
    "redrawn_teacher_zero3_student_zero1": (
        "redrawn",
        {"teacher.placement": "zero3", "train.deepspeed": "zero1"},
    ),
    "teacher_zero3_offloaded": ("reverse_normed_all", {"teacher.placement": "zero3", "teacher.offload": "cpu"}),
    "teacher_zero3_student_zero2": ("one_trained", {"teacher.placement": "zero3", "train.deepspeed": "zero2"}),
    "packed_accumulated": ("reverse_normed_all", {"data.batching": "packed", "train.micro_batch_size": 2}),
    "narrowed": ("narrowed", {"teacher.placement": "zero3", "train.micro_batch_size": 2}),
    "narrow_checkpointed": ("narrow_random", {"train.activation_checkpointing": True, "train.micro_batch_size": 2}),
    "logits_only": ("logits_only", {"teacher.placement": "zero3", "train.deepspeed": "zero2"}),
    "differences": ("differences", {"teacher.placement": "zero3", "train.micro_batch_size": 2}),
    "differences_projected": ("differences_projected", {"train.deepspeed": "zero2"}),
    "learned": ("learned", {"teacher.placement": "zero3", "train.micro_batch_size": 2}),
    "learned_zero1": ("learned", {"train.deepspeed": "zero1"}),
    "learned_pipeline": ("learned", {"teacher.placement": "pipeline", "train.activation_checkpointing": True}),
    "learned_projected_zero2": ("learned_projected", {"train.deepspeed": "zero2", "train.micro_batch_size": 1}),
    "learned_projected": ("learned_projected", {"teacher.placement": "pipeline"}),
    "lens": ("lens", {"teacher.placement": "zero3", "train.micro_batch_size": 2}),
    "lens_alone": ("lens_alone", {}),
    "akl": ("akl", {"train.micro_batch_size": 2, "train.deepspeed": "zero2"}),
    "hidden_only": ("hidden_only", {"teacher.placement": "zero3"}),
    "tied": ("tied", {"teacher.placement": "zero3"}),
    "lora": ("lora", {"teacher.placement": "zero3", "train.micro_batch_size": 2}),
    "lora_zero1": ("lora", {"train.deepspeed": "zero1"}),
    "lora_projected_zero2": ("lora_projected", {"train.deepspeed": "zero2"}),
    "lora_projected": ("lora_projected", {}),
}
# On two ranks too: each joins what is tested above by itself, or on one rank.
SLOW: dict[str, tuple[str, dict[str, Any]]] = {
    "checkpointed": ("forward", {"train.activation_checkpointing": True, "teacher.placement": "zero3"}),
    "narrow": ("narrow_random", {}),
    "ce_only": ("ce_only", {}),
    "jsd": ("jsd", {}),
    "tied_zero2": ("tied", {"train.deepspeed": "zero2"}),
}


def _changes(tiny: Path, objective: str, spread: dict[str, Any]) -> dict[str, Any]:
    """Recipe changes; packed and padded runs must take the same rows, so all of them take the packed (ungrouped) order."""
    changes = {**objective_changes(tiny, objective), **spread}
    if changes.get("train.deepspeed", "").startswith("zero"):
        changes["train.deepspeed"] = str(tiny / f"{changes['train.deepspeed']}.json")
    return changes


@pytest.fixture(scope="module")
def runs(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All the runs above but the slow ones, in two process groups."""
    output = tmp_path_factory.mktemp("runs")
    for ranks, scenarios in ((1, ONE_RANK), (2, TWO_RANKS)):
        _run(tiny, ranks, scenarios, output / str(ranks))
    return output


@pytest.fixture(scope="module")
def slow_runs(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The slow runs."""
    output = tmp_path_factory.mktemp("slow")
    _run(tiny, 2, SLOW, output)
    return output


def _run(tiny: Path, ranks: int, scenarios: dict[str, tuple[str, dict[str, Any]]], output: Path) -> None:
    named = {name: _changes(tiny, *what) for name, what in scenarios.items()}
    assert run_on_ranks(ranks, tiny / "recipe.yaml", named, output) == {}


@pytest.fixture(scope="module")
def plain(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """objective, batching, a run of it -> (weights, losses) of the plain run, each computed once.

    A student whose start is measured is made of what the run has measured; tests/distributed/test_narrowed.py is about that.
    """
    done: dict[tuple[str, str], Any] = {}

    def run(objective: str, batching: str, of: Path) -> Any:
        if (objective, batching) not in done:
            recipe = load_recipe(tiny / "recipe.yaml").changed(
                {**objective_changes(tiny, objective), "data.batching": batching}
            )
            teacher = Path(recipe.teacher_path)
            student = tmp_path_factory.mktemp("initial") / "student"
            initial.initial_student(recipe, teacher, student, initial.kept_width(recipe, of))
            done[objective, batching] = plain_run(recipe, teacher, student)
        return done[objective, batching]

    return run


CASES = [(1, name, *what) for name, what in ONE_RANK.items()] + [(2, name, *what) for name, what in TWO_RANKS.items()]


@pytest.mark.parametrize(("ranks", "name", "objective", "spread"), CASES, ids=[f"{c[0]}-{c[1]}" for c in CASES])
def test_world_size_accumulation_packing_and_padding_change_nothing(
    runs: Path, plain: Any, ranks: int, name: str, objective: str, spread: dict[str, Any]
) -> None:
    _check(runs / str(ranks) / name, plain, objective, spread)


@pytest.mark.slow
@pytest.mark.parametrize("name", SLOW)
def test_what_joins_two_of_them_changes_nothing_either(slow_runs: Path, plain: Any, name: str) -> None:
    """A broader matrix of the fast test above."""
    _check(slow_runs / name, plain, *SLOW[name])


def _check(run: Path, plain: Any, objective: str, spread: dict[str, Any]) -> None:
    weights, losses = plain(objective, spread.get("data.batching", "grouped"), run)
    logged = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert len(logged) == len(losses) == 3
    for ours, theirs in zip(logged, losses, strict=True):
        for part in ("loss", "ce", "kl", "hidden"):
            logged_as = logged_part(ours, part)
            if logged_as is None:  # it was not computed, as nothing of the loss takes it
                assert part != "loss" and (OBJECTIVES[objective].get(f"loss.{part}") == 0 or theirs[part] == 0)
            else:
                assert logged_as == pytest.approx(theirs[part], rel=2e-5, abs=1e-6), (part, ours, theirs)
        shares = [weight for of_block in ours.get("learned_map", {}).values() for weight in of_block.values()]
        assert shares == pytest.approx(theirs.get("weights", []), rel=1e-5)
    trained = load_file(run / "model" / "model.safetensors")
    assert ("lm_head.weight" in trained) == (objective != "tied")
    assert_same_weights(trained, weights, 1e-6)  # an exported student holds no projector


def test_a_teacher_of_whom_no_logits_are_asked_is_cut_after_its_last_mapped_block(runs: Path) -> None:
    for ranks, name in ((1, "hidden_only_zero2"), (2, "hidden_only")):
        log = (runs / str(ranks) / "rank0.log").read_text()
        assert f"{name}: the teacher's first 3 of 6 blocks are loaded" in log
        assert "forward: the teacher's first" not in log


def test_the_runs_did_move_the_student(runs: Path, tiny: Path, tmp_path: Path) -> None:
    recipe = load_recipe(tiny / "recipe.yaml")
    initial.initial_student(recipe, tiny / "teacher", tmp_path / "student")
    before, after = (
        load_file(tmp_path / "student" / "model.safetensors"),
        load_file(runs / "2" / "zero3" / "model" / "model.safetensors"),
    )
    assert all((before[key] - after[key]).abs().max() > 1e-4 for key in before)


def test_hidden_loss_changes_the_student(runs: Path) -> None:
    with_map, without = (
        load_file(runs / "2" / name / "model" / "model.safetensors") for name in ("zero3", "logits_only")
    )
    assert max((with_map[key] - without[key]).abs().max() for key in with_map) > 1e-4
    assert torch.isfinite(with_map["model.norm.weight"]).all()
