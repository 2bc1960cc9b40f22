"""A study some of whose students write their own texts: trained, scored and reported as rows beside those that do not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from llmkd import study as module
from llmkd.distributed.launch import Ending
from llmkd.errors import InputError
from llmkd.files import read_lines
from llmkd.recipe.recipe import Recipe, load_recipe
from llmkd.recipe.study_entries import entry_recipe, study_entries
from llmkd.study import study
from llmkd.train import train
from llmkd.training import jobs
from tests.tiny import recipe_values

WRITES = {"rollouts": {"max_new_tokens": 8, "every": 2}, "loss.ce": 0.0}


@pytest.fixture
def recipe(tiny: Path, tmp_path: Path) -> Recipe:
    """One strategy with a variant that writes, validated on held-out rows, scored by what it writes in the end."""
    held_out = (tiny / "rows.jsonl").read_text().splitlines(keepends=True)[:4]
    (tmp_path / "held_out.jsonl").write_text("".join(held_out))
    values = recipe_values(tiny)
    values["output"] = str(tmp_path / "runs")
    values["data"]["validation"] = {"share": 0.2}
    values["train"]["validate_every"] = 2
    values["evaluation"] = {
        "generation": {"source": str(tmp_path / "held_out.jsonl"), "split": "train", "items": 4, "max_new_tokens": 4}
    }
    values["study"] = {
        "strategies": ["none"],
        "variants": {"on_policy": {"matching.strategy": "none", **WRITES}},
        "baselines": [],
        "seeds": [0],
        "ranks": 1,
    }
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(values))
    return load_recipe(tmp_path / "study.yaml")


def test_a_variant_that_writes_is_trained_scored_and_reported(
    recipe: Recipe, world: Any, monkeypatch: pytest.MonkeyPatch, inside: list[Any]
) -> None:
    entries = iter([entry for entry in study_entries(recipe) if entry.train])

    def launch_here(_: int, arguments: list[str]) -> Ending:
        entry = next(entries)
        folder = entry.run_folder(recipe.folder)
        train(world, jobs.distil_job(world, entry_recipe(recipe, entry), folder))
        return Ending(0, False)

    monkeypatch.setattr(
        module, "launch_each", lambda launches, *_: [launch_here(one.ranks, one.arguments) for one in launches]
    )
    written = study(recipe)
    assert written is not None
    results = written.results
    assert [row.name for row in results.rows] == ["teacher", "none", "on_policy"] and results.problems == {}
    assert all("generation/bleu" in row.cells for row in results.rows)
    compared = {(c.strategy, c.reference) for c in results.comparisons}
    assert compared == {("on_policy", "none")}
    lines = read_lines(recipe.folder / "students" / "on_policy-s0" / "rollouts.jsonl")
    assert [line["step"] for line in lines] == [0, 2] and all(len(line["samples"]) == 3 for line in lines)
    assert not (recipe.folder / "students" / "none-s0" / "rollouts.jsonl").exists()
    (written,) = results.rollouts.values()
    assert (written.rounds, written.texts, written.own_kl) == (2, 24, "forward_kl at temperature 1")
    assert written.seconds and written.weights_seconds and written.of_seconds
    assert written.weights_seconds < written.seconds < written.of_seconds
    page = (recipe.folder / "report.html").read_text()
    assert "What on_policy-s0 wrote after the same prompts" in page and "on_policy: divergence by step" in page
    assert json.loads((recipe.folder / "results.json").read_text())["rollouts"]["on_policy-s0"]["rounds"] == 2


def test_a_baseline_of_the_data_alone_writes_nothing(recipe: Recipe) -> None:
    all_write = recipe.changed({**WRITES, "study.baselines": ["ce_only"], "study.variants": {}})
    recipes = {entry.name: entry_recipe(all_write, entry) for entry in study_entries(all_write) if entry.train}
    assert recipes["ce_only-s0"].rollouts is None and recipes["ce_only-s0"].loss.ce == 1
    assert recipes["none-s0"].rollouts == all_write.rollouts is not None


@pytest.mark.parametrize("by", ["teacher", "both"])
def test_where_the_teacher_writes_the_rows_that_baseline_reads_them_too(recipe: Recipe, by: str) -> None:
    written = {"by": by, "share": 0.5, "max_new_tokens": 8} | ({"every": 2} if by == "both" else {})
    study_of_texts = recipe.changed(
        {**WRITES, "rollouts": written, "study.baselines": ["ce_only"], "study.variants": {}}
    )
    (entry,) = (entry for entry in study_entries(study_of_texts) if entry.strategy == "ce_only")
    section = entry_recipe(study_of_texts, entry).rollouts
    assert section is not None and section.before_training and not section.during_training
    assert section.share == (1.0 if by == "both" else 0.5) and section.max_new_tokens == 8


def test_the_baseline_of_the_data_alone_can_not_learn_from_prompts(recipe: Recipe) -> None:
    prompts = {"data.format": "prompts", "data.validation": None, "train.validate_every": 0}
    study_of_prompts = recipe.changed({**WRITES, **prompts, "study.baselines": ["ce_only"], "study.variants": {}})
    (entry,) = (entry for entry in study_entries(study_of_prompts) if entry.strategy == "ce_only")
    with pytest.raises(
        InputError, match="ce_only-s0: data.format: prompts have .*; or leave ce_only out of study.baselines"
    ):
        entry_recipe(study_of_prompts, entry)


def test_one_key_of_the_section_may_differ_from_student_to_student(recipe: Recipe) -> None:
    variants = {
        "half": {"rollouts.share": 0.5},
        "data": {"rollouts.share": 0.0, "loss.ce": 1.0},
        "none_at_all": {"rollouts": None, "loss.ce": 1.0},
    }
    varied = recipe.changed({**WRITES, "study.variants": variants})
    found = {entry.strategy: entry_recipe(varied, entry).rollouts for entry in study_entries(varied) if entry.train}
    assert varied.rollouts is not None and found["none"] == varied.rollouts
    assert found["half"] == varied.rollouts.model_copy(update={"share": 0.5})
    assert found["data"] is not None and not found["data"].writes and found["none_at_all"] is None
