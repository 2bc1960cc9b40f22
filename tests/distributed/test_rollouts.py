"""Rollouts: the student's texts and what is learned from them are those of plain loops, on any ranks, killed and resumed or not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from llmkd.recipe.recipe import load_recipe
from llmkd.rollouts.texts import round_file
from llmkd.training import initial
from tests.distributed.runner import run_on_ranks
from tests.tiny import assert_same_weights, plain_run

ON_POLICY: dict[str, Any] = {"loss.ce": 0.0, "loss.divergence": "reverse_kl", "rollouts": {"max_new_tokens": 20}}


def with_rollouts(changes: dict[str, Any] | None = None, **rollouts: Any) -> dict[str, Any]:
    """The changes of an on-policy run."""
    return {**ON_POLICY, "rollouts": {**ON_POLICY["rollouts"], **rollouts}, **(changes or {})}


# What is computed: each is compared with a plain loop of its own.
OBJECTIVES: dict[str, dict[str, Any]] = {
    "strict": with_rollouts(),
    "rounds": with_rollouts({"matching.strategy": "none"}, every=3, share=0.6),
    "samples": with_rollouts({"loss.kl": 0.0}, samples=3, temperature=0.7, top_p=0.8, every=2),
    "greedy": with_rollouts({"loss.divergence": "jsd", "train.deepspeed": "zero2"}, temperature=0.0),
    "dropped": with_rollouts(
        {"train.micro_batch_size": 2, "train.batch_size": 20}, truncated="drop", share=0.5, max_new_tokens=45
    ),
    "mixed": with_rollouts(by="mixed", alpha=0.4, every=2),
}
RANKS = {
    1: {"strict": {}, "rounds": {"train.deepspeed": "zero2"}, "samples": {}, "greedy": {}, "mixed": {}},
    2: {
        "strict": {"train.deepspeed": "zero3"},
        "rounds": {"train.micro_batch_size": 2},
        "dropped": {"train.deepspeed": "zero3"},
        "staged": {"teacher.placement": "pipeline"},
        "sharded": {"teacher.placement": "zero3"},
        "none": {},
    },
}
OBJECTIVES["staged"] = OBJECTIVES["sharded"] = OBJECTIVES["rounds"]
OBJECTIVES["none"] = {}


@pytest.fixture(scope="module")
def runs(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every objective's run, on one rank and on two."""
    folder = tmp_path_factory.mktemp("rollouts")
    for ranks, scenarios in RANKS.items():
        changes = {name: {**OBJECTIVES[name], **how} for name, how in scenarios.items()}
        refused = run_on_ranks(ranks, tiny / "recipe.yaml", changes, folder / str(ranks))
        assert refused == {}
    return folder


@pytest.mark.parametrize(("ranks", "name"), [(ranks, name) for ranks, names in RANKS.items() for name in names])
def test_texts_and_student_are_those_of_a_plain_loop(
    tiny: Path, runs: Path, tmp_path: Path, ranks: int, name: str
) -> None:
    recipe = load_recipe(tiny / "recipe.yaml").changed({**OBJECTIVES[name], **RANKS[ranks][name]})
    initial.initial_student(recipe, tiny / "teacher", tmp_path / "initial")
    weights, losses = plain_run(recipe, tiny / "teacher", tmp_path / "initial")
    run = runs / str(ranks) / name
    # a token drawn otherwise would change all that follows, so the texts are the same
    assert_same_weights(load_file(run / "model" / "model.safetensors"), weights, 1e-5)
    logged = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for ours, theirs in zip(logged, losses, strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-5, abs=1e-6)
    if name != "none":
        assert round_file(run, 0).is_file()
