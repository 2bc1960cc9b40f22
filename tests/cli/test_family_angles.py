"""`llmkd angles` on real tiny students of encoders and encoder-decoders: copied, random and narrow; which rows, which stacks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from llmkd.errors import InputError
from llmkd.evaluation.angles import measure
from llmkd.evaluation.angles.results import angles_text
from llmkd.train import train
from llmkd.training import jobs
from tests.family_models import ENCODER_DECODERS, ENCODERS, family_recipe, new

ROWS = 6
NARROW = {"student.init": "random", "student.hidden_size": 24, "student.num_attention_heads": 3}
STILL = {"train.learning_rate": 1e-12, "train.final_learning_rate": 0.0, "train.weight_decay": 0.0}


def trained(world: Any, folder: Path, name: str, **changes: Any) -> Path:
    """A training folder of one step, its held-out rows named in it."""
    kind = "encoder" if name in ENCODERS else "encoder_decoder"
    shape = ENCODERS[name](4) if kind == "encoder" else ENCODER_DECODERS[name](4, 3)
    rows = {"source": str(folder / "rows.jsonl"), "split": "train"}
    section = {"evaluation.classification" if kind == "encoder" else "evaluation.generation": rows}
    run = {"train.steps": 1, "data.max_length": 30, "student.copy_blocks": "spread", **section, **changes}
    recipe = family_recipe(folder, kind, new(shape, kind), **run)
    assert train(world, jobs.distil_job(world, recipe, folder / "forward-s0"))
    return folder / "forward-s0"


def measured(folder: Path) -> dict[str, Any]:
    found = json.loads(measure.angles(folder, rows=ROWS)["forward-s0"].read_text())
    assert found["error"] is None and found["rows"] == ROWS
    return found


@pytest.mark.parametrize("name", ["bert", "bart"])
def test_a_copied_students_first_block_has_no_direction_to_its_teachers_before(
    world: Any, tmp_path: Path, inside: list[Any], name: str
) -> None:
    folder = trained(world, tmp_path, name)
    found = measured(folder)
    assert found["projector"] is None
    shape = [(stack["stack"], stack["student_blocks"], stack["teacher_blocks"]) for stack in found["stacks"]]
    assert shape == ([("", 2, 4)] if name == "bert" else [("encoder", 2, 4), ("decoder", 2, 3)])
    for stack in found["stacks"]:
        before, after = (stack[when]["blocks"] for when in ("before", "after"))
        assert [block["block"] for block in before] == [0, 1] and stack["tokens"] < stack["positions"]
        if stack["stack"] == "decoder":  # the encoder's last state is another than the teacher's
            assert before[0]["without_direction"] == [0] * 3
        else:
            assert before[0]["without_direction"] == [stack["tokens"], 0, 0, 0]
            assert stack["before"]["paper_code"]["tokens"]["mean"] == 0
        assert after[0]["without_direction"] == [0] * stack["teacher_blocks"] and after[0]["mean"] != before[0]["mean"]
    said = angles_text(measure.angles(folder, rows=ROWS))
    assert len(inside) == 1  # what is there is not measured again
    if name == "bert":
        assert "forward-s0 | teacher | before" in said and f"over {stack['tokens']} tokens of 6 held-out" in said
    else:
        tokens = [stack["tokens"] for stack in found["stacks"]]
        assert f"{tokens[0]} tokens in the encoder and {tokens[1]} in the decoder of" in " ".join(said.split())
        assert "forward-s0 | teacher | decoder | after" in said and "of 4 + 3 teacher blocks" in " ".join(said.split())


@pytest.mark.parametrize("name", ["distilbert", "t5"])
def test_a_narrow_random_student_sees_through_its_projectors(
    world: Any, tmp_path: Path, inside: list[Any], name: str
) -> None:
    """Training that moves nothing leaves start and projectors as they were drawn."""
    found = measured(trained(world, tmp_path, name, **NARROW, **STILL, **{"matching.final_state": "normed"}))
    assert found["projector"]["after"] == "trained, from checkpoints/step-00000001"
    assert [stack["stack"] for stack in found["stacks"]] == ([""] if name == "distilbert" else ["encoder", "decoder"])
    for stack in found["stacks"]:
        assert len(stack["before"]["blocks"]) == 2
        for ours, theirs in zip(stack["before"]["blocks"], stack["after"]["blocks"], strict=True):
            assert ours["counted"] == theirs["counted"] and ours["mean"][0][1] != 1
            for row, other in zip(ours["mean"], theirs["mean"], strict=True):
                assert row == pytest.approx(other, abs=1e-5)
        codes = [stack[when]["paper_code"]["tokens"]["mean"] for when in ("before", "after")]
        assert codes[0] == pytest.approx(codes[1], abs=1e-5)


def test_an_encoders_rows_are_those_it_classifies(world: Any, tmp_path: Path, inside: list[Any]) -> None:
    folder = trained(world, tmp_path, "bert")
    with pytest.raises(
        InputError,
        match=r"evaluation\.classification: the recipe has no such section, which names the held-out rows; add it",
    ):
        measure.angles(folder, recipe=str(tmp_path / "recipe.yaml"))
