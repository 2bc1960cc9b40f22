"""Students in turn, off one pass of one teacher, become to the bit what each becomes alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.distributed.in_turn import AHEAD
from tests.distributed.runner import run_on_ranks

STEPS = 4
STUDENTS: dict[str, dict[str, Any]] = {
    "forward": {"matching.strategy": "forward"},
    "all_to_one": {"matching.strategy": "all_to_one", "loss.divergence": "reverse_kl"},
    "none": {"matching.strategy": "none"},
    "ce_only": {"matching.strategy": "none", "loss.kl": 0.0, "loss.hidden": 0.0},
}
RESIDENT: dict[str, dict[str, Any]] = {
    "redrawn": {"matching.strategy": "in_order_random", "matching.redraw_every": 2},
    "nearest": {"matching.strategy": "nearest"},
    "lens": {"matching.distance": "logit_lens"},
    "stones": {"stones": {"pairs": [[1, 3]], "connector_batches": 1}},
    "hidden_alone": {"matching.strategy": "reverse", "loss.kl": 0.0},
    "lora": {"student.lora": {"rank": 4, "alpha": 8}},
    "learned": {"matching.strategy": "learned"},
}
PLACEMENTS: dict[str, dict[str, Any]] = {
    "replicated": {"teacher.placement": "replicated"},
    "zero3": {"teacher.placement": "zero3"},
    "pipeline": {"teacher.placement": "pipeline", "teacher.stages": 2},
    "cache": {"teacher.placement": "cache", "cache.dtype": "float32"},
}


def shared(tiny: Path, stage: int) -> dict[str, Any]:
    return {
        "train.steps": STEPS,
        "train.warmup_steps": 1,
        "train.save_every": 1,
        "train.keep_checkpoints": 9,
        "train.log_every": 1,
        "train.micro_batch_size": 2,
        "train.validate_every": 2,
        "data.validation": {"share": 0.2},
        "train.deepspeed": str(tiny / f"zero{stage}.json"),
    }


def logged(run: Path) -> list[dict[str, Any]]:
    """What metrics.jsonl holds but times and memory."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    apart = ("seconds", "tokens_per_second", "memory")
    return [
        {
            key: {k: v for k, v in value.items() if k != "seconds"} if isinstance(value, dict) else value
            for key, value in line.items()
            if not key.startswith(apart)
        }
        for line in lines
    ]


def assert_as_alone(folder: Path, students: dict[str, Any]) -> None:
    for student in students:
        alone = folder / "alone" / student
        expected = load_file(alone / "model" / "model.safetensors")
        for way in (way for way in ("in_turn", "resumed", "damaged") if (folder / way).is_dir()):
            run = folder / way / student
            if way == "damaged" and student == next(iter(students)):  # it could not be trained
                assert not (run / "model").exists()
                continue
            weights = load_file(run / "model" / "model.safetensors")
            assert weights.keys() == expected.keys()
            different = [name for name, value in weights.items() if not torch.equal(value, expected[name])]
            assert not different, f"{folder.name} {way} {student}: {different}"
            first = AHEAD if way == "resumed" and student == next(iter(students)) else 0
            assert logged(run) == [line for line in logged(alone) if line["step"] > first]


def scenarios(tiny: Path, placements: dict[str, list[str]], stage: int, caches: Path) -> dict[str, Any]:
    """By placement, the recipe changes of its students."""
    made: dict[str, Any] = {}
    for placement, names in placements.items():
        made[placement] = {
            name: {**shared(tiny, stage), **PLACEMENTS[placement], **{**STUDENTS, **RESIDENT}[name]} for name in names
        }
        if placement == "cache":
            for name in names:
                made[placement][name]["cache.path"] = str(caches / name)
    return made


def check(tiny: Path, out: Path, given: dict[str, Any], ranks: int) -> dict[str, int]:
    run_on_ranks(ranks, tiny / "recipe.yaml", given, out, module="tests.distributed.in_turn")
    for placement, students in given.items():
        assert_as_alone(out / placement, students)
    return json.loads((out / "passes.json").read_text())


def test_students_in_turn_are_those_trained_alone(tiny: Path, tmp_path: Path) -> None:
    placements = {"zero3": ["forward", "all_to_one", "ce_only"], "pipeline": ["none", "forward"]}
    passes = check(tiny, tmp_path / "out", scenarios(tiny, placements, 3, tmp_path), 2)
    # one whose only checkpoint is damaged costs the others nothing, on any rank
    assert json.loads((tmp_path / "out" / "damaged.json").read_text()).startswith("forward: ")
    assert (tmp_path / "out" / "zero3" / "damaged" / "ce_only" / "model").is_dir()
    # once each, whatever the number of students: 2 micro-batches in each of 4 steps, and in both validations as many as rows ask for
    validation = 2 * 2
    assert passes == {"zero3": 2 * STEPS + validation, "pipeline": 2 * STEPS + validation}


@pytest.mark.slow
@pytest.mark.parametrize(("stage", "ranks"), [(3, 2), (0, 1)])
def test_every_kind_of_student_in_turn_in_every_placement(tiny: Path, tmp_path: Path, stage: int, ranks: int) -> None:
    placements = {name: [*STUDENTS, *RESIDENT] for name in ("replicated", "zero3")}
    placements |= {name: [*STUDENTS] for name in ("pipeline", "cache")}
    if ranks == 1:
        del placements["pipeline"]
    if stage == 3:  # adapters are trained under other stages
        for names in placements.values():
            names[:] = [name for name in names if name != "lora"]
    check(tiny, tmp_path / "out", scenarios(tiny, placements, stage, tmp_path), ranks)


ROWS: dict[str, dict[str, Any]] = {
    "stream": {"data.streaming": True, "data.shuffle_rows": 8, "data.validation": None, "train.validate_every": 0},
    "packed": {"data.batching": "packed", "train.batch_size": 4},
    "teachers_texts": {"rollouts": {"by": "teacher", "max_new_tokens": 8}, "data.max_length": 48},
    "chosen": {"train.keep": "best", "train.patience": 1, "train.validate_every": 1},
}


@pytest.mark.slow
def test_in_turn_over_every_kind_of_rows(tiny: Path, tmp_path: Path) -> None:
    """And where one ends before the others, for want of a better validation."""
    given = {
        rows: {name: {**shared(tiny, 0), **changes, **STUDENTS[name]} for name in ("forward", "none", "ce_only")}
        for rows, changes in ROWS.items()
    }
    given["chosen"]["none"] |= {"train.learning_rate": 1.0, "train.final_learning_rate": 1.0}
    check(tiny, tmp_path / "out", given, 2)
    ends = {name: logged(tmp_path / "out" / "chosen" / "in_turn" / name)[-1]["step"] for name in given["chosen"]}
    assert ends["none"] < ends["forward"] == STEPS
