"""A study's models dealt out to machines, and the recipe of each student."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from llmkd.recipe.options import Part
from llmkd.recipe.recipe import dump_recipe, load_recipe
from llmkd.recipe.study_entries import dealt, entry_recipe, groups, measured_start, shared_by_parts, study_entries


@pytest.fixture
def file(tiny: Path) -> Path:
    return tiny / "recipe.yaml"


def test_parts_deal_out_every_model_once(file: Path) -> None:
    recipe = load_recipe(file, ["study.seeds=[0, 1]", "study.strategies=[none, all_to_one]"])
    entries = study_entries(recipe)
    names = [[entry.name for entry in dealt(recipe, entries, Part(number, 3))] for number in (1, 2, 3)]
    assert names == [
        ["teacher", "undistilled", "none-s0", "all_to_one-s1"],
        ["ce_only-s0", "none-s1"],
        ["ce_only-s1", "all_to_one-s0"],
    ]
    assert dealt(recipe, entries, Part(1, 1)) == entries


def test_students_of_a_seed_are_trained_at_once_and_dealt_out_so(file: Path) -> None:
    """Those that see other rows, or another number of them at a time, in a group of their own."""
    sets = ["study.seeds=[0, 1]", "study.strategies=[none, all_to_one]", "study.together=3"]
    recipe = load_recipe(file, [*sets, "study.variants.slow={train.micro_batch_size: 1}"])
    entries = study_entries(recipe)
    names = [[entry.name for entry in group] for group in groups(recipe, entries)]
    assert names == [
        ["ce_only-s0", "none-s0", "all_to_one-s0"],
        ["ce_only-s1", "none-s1", "all_to_one-s1"],
        ["slow-s0"],
        ["slow-s1"],
    ]
    parts = [{entry.name for entry in dealt(recipe, entries, Part(number, 2))} for number in (1, 2)]
    assert parts == [
        {"teacher", "undistilled", *names[1], *names[3]},
        {*names[0], *names[2]},
    ]
    two = recipe.changed({"study.together": 2})
    assert [len(group) for group in groups(two, entries)] == [2, 1, 2, 1, 1, 1]
    alone = recipe.changed({"study.together": 1})
    assert [len(group) for group in groups(alone, entries)] == [1] * 8


def test_a_measured_baseline_goes_with_the_student_that_measures_it(file: Path) -> None:
    """So that no part waits for another's student."""
    recipe = load_recipe(
        file,
        [
            "study.seeds=[0, 1]",
            "student.copy_blocks=influence",
            "study.baselines=[undistilled]",
            "study.strategies=[none, forward]",
        ],
    )
    entries = study_entries(recipe)
    for count in range(1, 5):
        parts = [dealt(recipe, entries, Part(number, count)) for number in range(1, count + 1)]
        assert sorted(entry.name for part in parts for entry in part) == sorted(entry.name for entry in entries)
        for part in parts:
            for entry in part:
                assert entry.strategy != "undistilled" or measured_start(recipe, entries, entry) in part


def test_parts_of_another_recipe_are_told_apart(file: Path) -> None:
    def shared(*sets: str) -> str:
        recipe = load_recipe(file, sets)
        return shared_by_parts(recipe, study_entries(recipe))

    same = ["train.log_every=7", "output=elsewhere", "study.ranks=2"]
    others = ["evaluation.limit=2", "study.seeds=[1]", "teacher.dtype=bfloat16", "study.strategies=[none]"]
    assert {shared(change) for change in same} == {shared()}
    assert len({shared(), *map(shared, others)}) == 1 + len(others)


def test_a_students_own_recipe_has_not_the_studys_variants(file: Path, tmp_path: Path) -> None:
    """One may not go with this student's keys, and need not."""
    lens = {"lens": {"matching.distance": "logit_lens"}}
    recipe = load_recipe(file, ["study.strategies=[learned]", f"study.variants={json.dumps(lens)}"])
    learned = next(entry for entry in study_entries(recipe) if entry.strategy == "learned")
    own = tmp_path / "learned.yaml"
    own.write_text(dump_recipe(entry_recipe(recipe, learned)))
    assert load_recipe(own).matching.strategy == "learned"
