"""Numbers that nothing can be computed with are refused by their key when a recipe is read, and so is a study's file of another form."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from llmkd.errors import InputError
from llmkd.recipe.recipe import load_recipe
from llmkd.recipe.study_entries import read_study

OUT_OF_BOUNDS = [
    ("seed=281474976710656", "seed: 281474976710656 is too large; write a number below 140737488355328"),
    ("train.betas=[0.9, 1.0]", r"train\.betas\.1: input should be less than 1"),
    ("train.betas=[-0.1, 0.9]", r"train\.betas\.0: input should be greater than or equal to 0"),
    (
        "train.learning_rate=1e300",
        r"train\.learning_rate: 1e\+300 can't be computed with; write 0 or a number of 1e-30 to",
    ),
    ("train.learning_rate=1e-320", r"train\.learning_rate: .* can't be computed with"),
    (
        "train.final_learning_rate=5",
        r"train\.final_learning_rate: 5 is above learning_rate 0\.003; it falls, so write less",
    ),
    ("train.steps=1000000000000000", r"train\.steps: 1000000000000000 is too large"),
    ("train.timeout_seconds=99999999999", r"train\.timeout_seconds: input should be less than or equal to"),
    ("loss.temperature=1e40", r"loss\.temperature: input should be less than or equal to 1000"),
    ("loss.temperature=1e-320", r"loss\.temperature: input should be greater than or equal to 0\.01"),
    ("matching.pair_weights=[1e308, 1.0, 1.0]", r"matching\.pair_weights: 1e\+308 can't be computed with"),
    ("matching.distance={mse: 1e-320}", r"matching\.distance: .* can't be computed with"),
    (
        "study.margins=[5]",
        r"study\.margins\.0: a section is a mapping of keys \(got 5\); write at least one of metric, within",
    ),
    ("study.seeds=[281474976710656]", r"study\.seeds: 281474976710656 is too large"),
    ("name=" + "x" * 200, "name: string should have at most 100 characters"),
]


@pytest.mark.parametrize(("override", "sentence"), OUT_OF_BOUNDS, ids=[override[:30] for override, _ in OUT_OF_BOUNDS])
def test_a_number_out_of_bounds_is_refused_by_its_key(tiny: Path, override: str, sentence: str) -> None:
    with pytest.raises(InputError, match=sentence):
        load_recipe(tiny / "recipe.yaml", [override])


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"train.learning_rate": -1}, "train.learning_rate: input should be greater than 0"),
        ({"matching.strategy": "forwards"}, "matching.strategy: 'forwards' is not known; did you mean 'forward'"),
        ({"loss.no": 1}, "unknown key 'loss.no'"),
    ],
)
def test_a_variant_is_checked_where_the_study_is_not_run(tiny: Path, changes: dict[str, Any], sentence: str) -> None:
    with pytest.raises(InputError, match=f"study.variants.mine: {sentence}"):
        load_recipe(tiny / "recipe.yaml", [f"study.variants={json.dumps({'mine': changes})}"])


def test_a_variant_may_leave_out_what_only_others_read(tiny: Path) -> None:
    study = {"strategies": ["all_to_one"], "variants": {"mine": {"matching.strategy": "reverse"}}}
    overrides = [f"study.{key}={json.dumps(value)}" for key, value in study.items()]
    recipe = load_recipe(tiny / "recipe.yaml", [*overrides, "matching.target_block=1"])
    assert recipe.study.students == ("all_to_one", "mine")


ENTRY: dict[str, Any] = {
    "name": "a-s0",
    "kind": "student",
    "strategy": "a",
    "seed": 0,
    "model": "students/a-s0/model",
    "train": None,
}


@pytest.mark.parametrize(
    "change",
    [
        {"name": "../../outside"},
        {"name": 3},
        {"name": "a/b"},
        {"train": "/etc"},
        {"train": "students/../../outside"},
        {"generation": "../generations/a.json"},
        {"generation": "/tmp/a.json"},
        {"kind": "thing"},
        {"model": None},
    ],
)
def test_a_study_file_of_another_form_is_one_sentence(tmp_path: Path, change: dict[str, Any]) -> None:
    file = tmp_path / "study.json"
    file.write_text(json.dumps({"name": "s", "entries": [ENTRY]}))
    assert [entry.name for entry in read_study(tmp_path).entries] == ["a-s0"]
    file.write_text(json.dumps({"name": "s", "entries": [{**ENTRY, **change}]}))
    with pytest.raises(InputError, match=r"study\.json: not as llmkd writes it \(.*\); run the study again"):
        read_study(tmp_path)


@pytest.mark.parametrize(
    "content", ["[]", "3", '{"name": "s"}', '{"name": "s", "entries": 3}', '{"name": "s", "entries": [3]}']
)
def test_a_study_file_that_is_none_is_one_sentence(tmp_path: Path, content: str) -> None:
    (tmp_path / "study.json").write_text(content)
    with pytest.raises(InputError, match=r"study\.json: not as llmkd writes it"):
        read_study(tmp_path)
