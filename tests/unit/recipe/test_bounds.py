"""Numbers that nothing can be computed with are refused by their key when a recipe is read, and so is a study's file of another form."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from llmkd.cli import main
from llmkd.errors import InputError
from llmkd.evaluation.angles.measure import angles
from llmkd.recipe.recipe import dump_recipe, load_recipe
from llmkd.recipe.study_entries import StudyFile, read_study, study_entries


def architecture(**changes: int) -> str:
    """An override that gives the teacher a shape with one number of its own."""
    shape = dict(vocab_size=320, hidden_size=32, intermediate_size=48, num_hidden_layers=6, num_attention_heads=4)
    shape |= dict(num_key_value_heads=2, head_dim=8, max_position_embeddings=64)
    return f"teacher.architecture={json.dumps({**shape, **changes})}"


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
    (
        "study.seeds=[0, -1]",
        r"recipe\.yaml with --set: study\.seeds\.1: input should be greater than or equal to 0 \(got -1\)",
    ),
    ("evaluation.seed=-5", r"evaluation\.seed: input should be greater than or equal to 0"),
    ("evaluation.seed=8589934592", r"evaluation\.seed: input should be less than 4294967296"),
    (
        architecture(num_hidden_layers=1025),
        r"teacher\.architecture\.num_hidden_layers: input should be less than or equal to",
    ),
    (architecture(hidden_size=16777217), r"teacher\.architecture\.hidden_size: input should be less than or equal to"),
    (architecture(vocab_size=16777217), r"teacher\.architecture\.vocab_size: input should be less than or equal to"),
    (architecture(num_attention_heads=65537), r"teacher\.architecture\.num_attention_heads: input should be less"),
    ("student.blocks=10000000", r"student\.blocks: input should be less than or equal to 1024"),
    ('output="a\\0b"', r"output: 'a\\x00b' holds the character \\0, which no file's name may; take it out"),
    ('cache.path="a\\0b"', r"cache\.path: 'a\\x00b' holds the character"),
    ("name=" + "x" * 200, "name: string should have at most 100 characters"),
]


@pytest.mark.parametrize(("override", "sentence"), OUT_OF_BOUNDS, ids=[override[:30] for override, _ in OUT_OF_BOUNDS])
def test_a_number_out_of_bounds_is_refused_by_its_key(tiny: Path, override: str, sentence: str) -> None:
    with pytest.raises(InputError, match=sentence):
        load_recipe(tiny / "recipe.yaml", [override])


def test_an_output_may_begin_with_the_home_folder(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    recipe = load_recipe(tiny / "recipe.yaml", ["output=~/runs", "cache.path=~/cache"])
    assert recipe.folder == tmp_path / "runs" / "tiny" and recipe.cache_folder == tmp_path / "cache"


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
        {"strategy": ["a"]},
        {"seed": "x"},
        {"seed": -1},
        {"train": ""},
        {"train": "students/a-s0", "seed": None},
        {"train": "students/a-s0", "strategy": None},
        {"train": "students/a-s0", "model": "../model"},
    ],
)
def test_a_study_file_of_another_form_is_one_sentence(tmp_path: Path, change: dict[str, Any]) -> None:
    file = tmp_path / "study.json"
    file.write_text(json.dumps({"name": "s", "entries": [ENTRY]}))
    assert [entry.name for entry in read_study(tmp_path).entries] == ["a-s0"]
    file.write_text(json.dumps({"name": "s", "entries": [{**ENTRY, **change}]}))
    with pytest.raises(
        InputError, match=r"study\.json: not as llmkd writes it \(.*\); remove it, and run the study again"
    ):
        read_study(tmp_path)


MALFORMED: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "history of numbers": (lambda study: study.update(margins_history=[1]), "margins_history.0: "),
    "history that is a text": (lambda study: study.update(margins_history="abc"), "margins_history: "),
    "history of other keys": (lambda study: study.update(margins_history=[{"a": 1}]), "margins_history.0.margins: "),
    "margin that is no number": (lambda study: study.update(margins={"a": float("nan")}), "margins.a: "),
    "strategy that is a list": (lambda study: study["entries"][-1].update(strategy=["a"]), "entries.1.strategy: "),
    "trained without a seed": (lambda study: study["entries"][-1].update(seed=None), "none-s0 is trained, and has no"),
    "twice the same": (lambda study: study["entries"].append(study["entries"][-1]), "two entries are called none-s0"),
}


@pytest.mark.parametrize(("spoil", "problem"), MALFORMED.values(), ids=MALFORMED)
@pytest.mark.parametrize("command", ["report", "angles", "study", "generate"])
def test_every_command_refuses_a_malformed_study_file(
    tiny: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    command: str,
    spoil: Callable[[dict[str, Any]], object],
    problem: str,
) -> None:
    sets = ["study.strategies=[none]", "study.baselines=[]", f"output={tmp_path}"]
    held_out = "evaluation.generation={source: records, items: 2, max_new_tokens: 4}"
    recipe = load_recipe(tiny / "recipe.yaml", [*sets, held_out])
    recipe.folder.mkdir()
    file, recipe_file = recipe.folder / "study.json", recipe.folder / "recipe.yaml"
    recipe_file.write_text(dump_recipe(recipe))
    StudyFile("tiny", "none", {}, [], study_entries(recipe)).write(recipe.folder)
    study = json.loads(file.read_text())
    spoil(study)
    file.write_text(json.dumps(study))
    with pytest.raises(SystemExit) as left:
        main([command, str(recipe_file if command == "study" else recipe.folder)])
    *_, sentence = capsys.readouterr().err.splitlines()
    assert left.value.code == 2
    assert sentence.startswith(f"Error: {file}: not as llmkd writes it ({problem}"), sentence
    assert sentence.endswith("); remove it, and run the study again, which writes it anew")


def test_angles_need_the_teacher_that_a_study_file_leaves_out(tiny: Path, tmp_path: Path) -> None:
    recipe = load_recipe(tiny / "recipe.yaml", ["study.strategies=[none]", "study.baselines=[]"])
    (tmp_path / "recipe.yaml").write_text(dump_recipe(recipe))
    StudyFile("tiny", "none", {}, [], study_entries(recipe)[1:]).write(tmp_path)
    with pytest.raises(InputError, match=r"study\.json: names no teacher; remove it, and run the study again"):
        angles(tmp_path)


@pytest.mark.parametrize(
    "content", ["[]", "3", '{"name": "s"}', '{"name": "s", "entries": 3}', '{"name": "s", "entries": [3]}']
)
def test_a_study_file_that_is_none_is_one_sentence(tmp_path: Path, content: str) -> None:
    (tmp_path / "study.json").write_text(content)
    with pytest.raises(InputError, match=r"study\.json: not as llmkd writes it"):
        read_study(tmp_path)
