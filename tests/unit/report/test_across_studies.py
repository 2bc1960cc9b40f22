"""Several studies side by side: scores, recipes, and what is not measured alike."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from llmkd.cli import main
from llmkd.errors import InputError
from llmkd.report.across_studies import compare_studies
from llmkd.report.files import written_recipe
from tests.unit.report.study_folder import VERSIONS, Folder

RECIPE: dict[str, Any] = {
    "name": "x",
    "loss": {"kl": 1.0, "hidden": 3.0},
    "data": {"source": "records", "rows": 100},
    "evaluation": {"limit": None, "num_fewshot": None, "generation": {"source": None, "items": 3, "batch_size": 64}},
}


def study(
    folder: Path, name: str, bleu: float = 70.0, steps: tuple[str, ...] = ("evaluation",), **changes: Any
) -> Folder:
    """Two strategies over two seeds; `changes` are recipe keys with __ for the dot."""
    made = Folder(folder, name)
    for strategy, shift in (("none", 0.0), ("forward", 5.0)):
        for seed in (0, 1):
            entry = made.entry("student", strategy, seed, steps=steps)
            made.score(entry, bleu + shift + seed)
            if "generation" in steps:
                made.generated(entry, {"bleu": bleu + shift + seed})
                row = {"item": 0, "prompt": "p", "references": ["r"], "text": "t", "scores": {}}
                made.lines(f"generations/{entry}.jsonl", [row])
    recipe = yaml.safe_load(yaml.safe_dump({**RECIPE, "name": name}))
    for key, value in changes.items():
        *path, last = key.split("__")
        section = recipe
        for part in path:
            section = section[part]
        section[last] = value
    made.write("recipe.yaml", yaml.safe_dump(recipe))
    return made


@pytest.fixture
def one(tmp_path: Path) -> Folder:
    return study(tmp_path / "one", "one")


def test_scores_stand_side_by_side_with_their_intervals(tmp_path: Path, one: Folder) -> None:
    two = study(tmp_path / "two", "two", 60.0, loss__hidden=1.0)
    text = compare_studies([one.folder, two.folder], tmp_path / "comparison.md")
    written = (tmp_path / "comparison.md").read_text()
    # 65 and 66: mean 65.5, standard error 0.5, times 12.706
    assert "| forward | one | 2 of 2 | 75.5 ± 6.4 | 0.500 ± 0.000 |\n| forward | two | 2 of 2 | 65.5 ± 6.4 |" in written
    assert "| loss.hidden | 3.0 | 1.0 |" in written and "name" not in written.split("recipe key")[1]
    assert "(!)" not in written and "can't be compared" not in text
    for made in (one, two):
        assert f"- {made.study['name']}: {made.results().conclusion}" in written
    assert "65.5 ± 6.4" in text and "loss.hidden" in text and all(len(line) <= 100 for line in text.splitlines())


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"evaluation__limit": 20}, "evaluation.limit: none in one, 20 in two"),
        ({"evaluation__num_fewshot": 5}, "evaluation.num_fewshot: none in one, 5 in two"),
    ],
)
def test_another_measurement_is_flagged_with_its_reason(
    tmp_path: Path, one: Folder, change: dict[str, Any], why: str
) -> None:
    two = study(tmp_path / "two", "two", **change)
    text = " ".join(compare_studies([one.folder, two.folder], tmp_path / "comparison.md").split())
    assert f"say/bleu (!) can't be compared: {why}." in text
    assert "| say/bleu (!) | choose/acc (!) |" in (tmp_path / "comparison.md").read_text()


@pytest.mark.parametrize(
    ("more", "flagged", "why"),
    [
        ({"items": {"say": 20, "choose": 200}}, ["say/bleu"], "items: 200 in one, 20 in two"),
        ({"backend": "vllm"}, ["say/bleu", "choose/acc"], "backend: hf in one, vllm in two"),
        (
            {"versions": {**VERSIONS, "lm_eval": "0.5"}},
            ["say/bleu", "choose/acc"],
            "lm_eval: 0.4.13 in one, 0.5 in two",
        ),
    ],
)
def test_what_the_result_files_say_is_compared_too(
    tmp_path: Path, one: Folder, more: dict[str, Any], flagged: list[str], why: str
) -> None:
    two = study(tmp_path / "two", "two")
    for entry in two.study["entries"]:
        two.score(entry["name"], 70.0, **more)
    text = " ".join(compare_studies([one.folder, two.folder], tmp_path / "comparison.md").split())
    for metric in ("say/bleu", "choose/acc"):
        assert (f"{metric} (!) can't be compared: {why}." in text) == (metric in flagged)


def test_models_of_one_study_that_were_not_measured_alike(tmp_path: Path, one: Folder) -> None:
    two = study(tmp_path / "two", "two")
    two.score("none-s0", 70.0, backend="vllm")
    text = " ".join(compare_studies([one.folder, two.folder], tmp_path / "comparison.md").split())
    assert "two's own models were not measured alike" in text


def test_generated_texts_are_compared_by_their_prompts(tmp_path: Path) -> None:
    steps = ("evaluation", "generation")
    one = study(tmp_path / "one", "one", steps=steps)
    two = study(tmp_path / "two", "two", steps=steps, data__rows=50, evaluation__generation__batch_size=1)
    text = compare_studies([one.folder, two.folder], tmp_path / "comparison.md")
    assert "(!)" not in text  # more rows to train on, and another batch size, ask nothing else of a model
    for entry in two.study["entries"]:
        row = {"item": 0, "prompt": "another", "references": ["r"], "text": "t", "scores": {}}
        two.lines(f"generations/{entry['name']}.jsonl", [row])
    text = " ".join(compare_studies([one.folder, two.folder], tmp_path / "comparison.md").split())
    assert "BLEU (!) can't be compared: prompts and references: " in text and "say/bleu (!)" not in text


def test_studies_of_one_name_are_told_apart_and_a_missing_recipe_is_said(tmp_path: Path) -> None:
    one, two = study(tmp_path / "a", "same"), study(tmp_path / "b", "same")
    (two.folder / "recipe.yaml").unlink()
    compare_studies([one.folder, two.folder], tmp_path / "comparison.md")
    written = (tmp_path / "comparison.md").read_text()
    assert f"| forward | {one.folder} |" in written and f"| forward | {two.folder} |" in written
    assert "not all have a recipe.yaml" in written


def test_nothing_in_common(tmp_path: Path, one: Folder) -> None:
    two = Folder(tmp_path / "two", "two")
    two.entry("student", "reverse", 0)
    text = compare_studies([one.folder, two.folder], tmp_path / "comparison.md")
    assert (
        "The studies have no metric in common." in text
        and "| reverse | two | not yet |" in (tmp_path / "comparison.md").read_text()
    )


def test_too_few_studies(tmp_path: Path, one: Folder) -> None:
    for folders in ([one.folder], [one.folder, one.folder]):
        with pytest.raises(InputError, match="two or more different studies"):
            compare_studies(folders, tmp_path / "comparison.md")
    with pytest.raises(InputError, match="no study here"):
        compare_studies([one.folder, tmp_path], tmp_path / "comparison.md")
    assert not (tmp_path / "comparison.md").exists()


def test_the_command(tmp_path: Path, one: Folder, capsys: pytest.CaptureFixture[str]) -> None:
    two = study(tmp_path / "two", "two")
    main(["compare", str(one.folder), str(two.folder)])
    assert f"Comparison: {tmp_path / 'comparison.md'}" in capsys.readouterr().out
    assert (tmp_path / "comparison.md").is_file()
    with pytest.raises(SystemExit, match="2"):
        main(["compare", str(one.folder)])
    assert "two or more different studies" in capsys.readouterr().err


@pytest.mark.parametrize("text", [b"name: [", b"\xf3ame: a", b"3"])
def test_a_recipe_in_a_folder_that_is_damaged_is_named(tmp_path: Path, text: bytes) -> None:
    file = tmp_path / "recipe.yaml"
    assert written_recipe(file) == {}
    file.write_bytes(b"name: a\n")
    assert written_recipe(file) == {"name": "a"}
    file.write_bytes(text)
    with pytest.raises(InputError, match=r"recipe\.yaml: it is not what llmkd wrote; put it back, or remove it"):
        written_recipe(file)
