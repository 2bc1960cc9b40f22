"""A student and a teacher whose blocks ZeRO-3 gathers whole are, to the bit, those of ranks that have all weights.

Gathered linear map by linear map they are so but for rounding: DeepSpeed's functions around each map change the order in which autograd
adds up gradients.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.distributed.leaves import APART, nothing_kept
from tests.distributed.runner import run_on_ranks
from tests.tiny import zero_stages

SHARDED = {"teacher.placement": "zero3"}
NARROW = {
    "student.init": "random",
    "student.hidden_size": 24,
    "student.num_attention_heads": 3,
    "student.num_key_value_heads": 1,
}
SCENARIOS: dict[str, dict[str, Any]] = {
    "validated": {**SHARDED, "train.validate_every": 2, "data.validation.share": 0.2},
    "checkpointed": {**SHARDED, **NARROW, "train.activation_checkpointing": True, "loss.report_norms_every": 2},
    # no gradient comes from above to the student's block 1, nor to block 2 at all
    "lower_pair_alone": {"matching.strategy": "explicit", "matching.pairs": [[1, 2]], "loss.ce": 0.0, "loss.kl": 0.0},
    "sampled_stones": {
        **SHARDED,
        "matching.strategy": "none",
        "stones.kl": 1.0,
        "stones.sample": "one",
        "stones.pairs": [[0, 2], [1, 4]],
    },
}
WHOLE = "_whole"
"""Ends the name of a run whose ranks have all weights of both models."""


def forms(folder: Path, scenarios: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Each scenario sharded and whole."""
    zero_stages(folder)
    # DeepSpeed adds up a gradient's norm in an order of its own at each stage, so clipping would round otherwise.
    common = {"train.log_every": 1, "train.clip": 0}
    sharded = {**common, "train.deepspeed": nothing_kept(folder)}
    whole = {**common, "train.deepspeed": str(folder / "zero1.json")}
    return {name: {**sharded, **changes} for name, changes in scenarios.items()} | {
        name + WHOLE: {**whole, **changes, "teacher.placement": "replicated"} for name, changes in scenarios.items()
    }


def weights(run: Path) -> dict[str, torch.Tensor]:
    """The exported student's."""
    return load_file(run / "model" / "model.safetensors")


def losses(run: Path) -> list[dict[str, Any]]:
    """What is logged of each step's losses, its validation's and its gradients' parts among them."""
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    measured = [{key: line.get(key) for key in ("step", "loss", "norms", "validation")} for line in lines]
    for line in measured:
        (line["validation"] or {}).pop("seconds", None)
    return measured


def per_step(run: Path) -> dict[str, float]:
    """What the last step of rank 0 has called."""
    steps = json.loads((run / "leaves-0.json").read_text())
    return {kind: steps[-1][kind] - steps[-2][kind] for kind in steps[-1]}


def same_to_the_bit(output: Path, scenario: str) -> None:
    """A scenario's two forms."""
    ours, theirs = (weights(output / name) for name in (scenario, scenario + WHOLE))
    differ = [key for key in theirs if not torch.equal(ours[key], theirs[key])]
    assert ours.keys() == theirs.keys() and not differ, (scenario, differ)
    assert losses(output / scenario) == losses(output / (scenario + WHOLE)), scenario


def ran(tiny: Path, folder: Path, scenarios: list[str]) -> Path:
    """Where the forms of these scenarios are, run on two ranks; of `validated` a third, whose linear maps are gathered one by one."""
    runs = forms(folder, {name: SCENARIOS[name] for name in scenarios})
    if "validated" in runs:
        runs["validated" + APART] = dict(runs["validated"])
    output = folder / "two"
    assert run_on_ranks(2, tiny / "recipe.yaml", runs, output, module="tests.distributed.leaves") == {}
    return output


def close(ours: Path, theirs: Path) -> None:
    """Both runs' exported weights."""
    torch.testing.assert_close(weights(ours), weights(theirs), rtol=1e-6, atol=1e-6)


def test_blocks_gathered_whole_change_nothing_and_take_fewer_gathers(tiny: Path, tmp_path: Path) -> None:
    output = ran(tiny, tmp_path, ["validated"])
    same_to_the_bit(output, "validated")
    whole, apart = (output / f"validated{form}" for form in ("", APART))
    close(whole, apart)
    ours, theirs = per_step(whole), per_step(apart)
    assert 0 < ours["gathers"] < 0.3 * theirs["gathers"], (ours, theirs)
    assert 0 < ours["reductions"] <= theirs["reductions"], (ours, theirs)


@pytest.mark.slow
def test_so_they_do_where_blocks_run_again_or_get_no_gradient_and_under_stones(tiny: Path, tmp_path: Path) -> None:
    output = ran(tiny, tmp_path, ["checkpointed", "lower_pair_alone", "sampled_stones"])
    same_to_the_bit(output, "checkpointed")
    same_to_the_bit(output, "lower_pair_alone")
    # a stone's gradient is the first of three at a block's output, or is added to the sum of two
    close(output / "sampled_stones", output / f"sampled_stones{WHOLE}")
