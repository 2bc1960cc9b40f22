"""Pipelined and sharded teachers, with no student: what they say, what they put on the wire and what they hold, against the plan."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from llmkd.planning.memory import plan
from llmkd.planning.placements import compare
from llmkd.recipe.recipe import load_recipe
from tests.distributed.runner import start_ranks

PIPELINE = {"teacher.placement": "pipeline"}
EVERYTHING = {
    **PIPELINE,
    "matching.strategy": "reverse",
    "matching.final_state": "normed",
    "matching.embedding": True,
}
STEPS = {"train.batch_size": 16, "train.micro_batch_size": 2}
Scenario = tuple[str, dict[str, Any], dict[str, Any]]


def _scenarios(ranks: int) -> dict[str, Scenario]:
    few, many = [[1] * ranks, [2] * ranks], [[3, *[1] * (ranks - 1)], [0, *[2] * (ranks - 1)], [1] * ranks]
    ragged = [[(7 * c + 3 * r) % 4 for r in range(ranks)] for c in range(5)]
    scenarios: dict[str, Scenario] = {
        "even": ("uneven", EVERYTHING, {"chunks": few}),
        "a_rank_with_none": ("uneven", EVERYTHING, {"chunks": many}),
        "ragged_packed": ("uneven", {**PIPELINE, "data.batching": "packed"}, {"chunks": ragged}),
        "hidden_alone": ("uneven", {**PIPELINE, "loss.kl": 0.0, "student.blocks": 4}, {"chunks": ragged}),
        "one_block": (
            "uneven",
            {**PIPELINE, "loss.kl": 0.0, "matching.strategy": "all_to_one", "matching.target_block": 0},
            {"chunks": few},
        ),
        "measured_pipeline": ("measured", {**PIPELINE, **STEPS}, {}),
        "measured_hidden_alone": ("measured", {**EVERYTHING, **STEPS, "loss.kl": 0.0}, {}),
        "measured_zero3": ("measured", {**STEPS, "teacher.placement": "zero3"}, {}),
        "stones": ("stones", {**STEPS, "teacher.placement": "zero3", "loss.kl": 0.0, "stones.kl": 1.0}, {}),
    }
    if ranks == 4:
        scenarios["two_pipelines"] = ("uneven", {**EVERYTHING, "teacher.stages": 2}, {"chunks": ragged})
        scenarios["measured_two_pipelines"] = ("measured", {**PIPELINE, **STEPS, "teacher.stages": 2}, {})
    return scenarios


def _exams(tiny: Path, output: Path, ranks: int) -> list[dict[str, Any]]:
    scenarios = _scenarios(ranks)
    tasks = output / "tasks.json"
    tasks.write_text(json.dumps({"recipe": str(tiny / "recipe.yaml"), "scenarios": scenarios, "output": str(output)}))
    codes = [p.wait(timeout=600) for p in start_ranks(ranks, "tests.distributed.teachers", tasks, output)]
    assert codes == [0] * ranks, "\n".join((output / f"rank{r}.log").read_text()[-3000:] for r in range(ranks))
    return [json.loads((output / f"rank{rank}.json").read_text()) for rank in range(ranks)]


def _check(tiny: Path, results: list[dict[str, Any]]) -> None:
    ranks = len(results)
    for name, (exam, changes, arguments) in _scenarios(ranks).items():
        found = [result[name] for result in results]
        if exam == "uneven":
            assert all(f["same"] for f in found), (name, found)
            assert [f["checked"] for f in found] == [sum(c[r] for c in arguments["chunks"]) for r in range(ranks)]
            continue
        recipe = load_recipe(tiny / "recipe.yaml").changed(changes)
        (planned,) = [c for c in compare(recipe, ranks) if c.placement == recipe.teacher.placement]
        rows = plan(recipe, ranks)
        if recipe.teacher.placement == "pipeline":
            # What is told goes through gathers of Python objects, which bring their wrapping along and pad to the longest.
            mean = sum(f["received"] + f["gathered"] for f in found) / ranks
            assert [f["counted"] - f["told"] for f in found] == [f["sent"] for f in found]
            assert max(f["weights"] for f in found) == planned.weights
            buffers = [r.bytes for r in rows if r.what.startswith("teacher") and "teacher forward" in r.phases]
            for f in found:
                assert 0.3 * sum(buffers) < f["peak"] <= sum(buffers), (name, f["peak"], buffers)
        else:
            mean = sum(f["gathered"] for f in found) / ranks
        assert mean == pytest.approx(planned.wire, rel=0.05), name


def test_what_two_ranks_say_send_and_hold(tiny: Path, tmp_path: Path) -> None:
    _check(tiny, _exams(tiny, tmp_path, 2))


@pytest.mark.slow
def test_what_four_ranks_say_send_and_hold(tiny: Path, tmp_path: Path) -> None:
    _check(tiny, _exams(tiny, tmp_path, 4))
