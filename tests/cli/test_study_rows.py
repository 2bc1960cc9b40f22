"""Rows on which a student of a study could not be trained are refused before the study: in the run's own words, and nothing is written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from llmkd.errors import InputError
from llmkd.planning import study_rows
from llmkd.recipe.recipe import Recipe, load_recipe
from llmkd.recipe.study_entries import study_entries
from llmkd.study import check
from tests.cli.test_study_checks import refused, variant

WRITTEN: dict[str, Any] = {"loss.ce": 0.0, "rollouts": {"max_new_tokens": 8}}
ON_GPUS: dict[str, Any] = {"loss.ce": 0.0, "rollouts": {"max_new_tokens": 8, "backend": "vllm", "devices": [7]}}
VALIDATED = ["train.validate_every=2"]


def sets_of(changes: dict[str, Any]) -> list[str]:
    return [f"{key}={json.dumps(value)}" for key, value in changes.items()]


def rows_in(place: Path, *rows: dict[str, Any]) -> str:
    """A file of rows of its own."""
    path = place.parent / "own.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def is_made(place: Path) -> bool:
    """Whether the study makes its teacher, so that no tokenizer is there before."""
    return load_recipe(place).finetune is not None


@pytest.mark.parametrize("as_variant", [False, True])
def test_texts_are_no_prompts(file: Path, capsys: pytest.CaptureFixture[str], as_variant: bool) -> None:
    texts = f"data.source={rows_in(file, *[{'text': f'red bird {n}'} for n in range(20)])}"
    check_good(load_recipe(file, [texts]))
    written = [variant(**WRITTEN)] if as_variant else sets_of(WRITTEN)
    assert "data.format: a text has no prompt to continue; give rows" in refused(file, capsys, texts, *written)


@pytest.mark.parametrize("as_variant", [False, True])
def test_rows_that_begin_with_what_is_trained(
    file: Path,
    capsys: pytest.CaptureFixture[str],
    as_variant: bool,
) -> None:
    rows = [{"prompt": "red", "completion": " bird"}] * 10 + [{"prompt": "", "completion": "red bird"}] * 10
    source = f"data.source={rows_in(file, *rows)}"
    check_good(load_recipe(file, [source]))
    written = [variant(**WRITTEN)] if as_variant else sets_of(WRITTEN)
    if is_made(file):  # nobody knows its tokens yet
        check_good(load_recipe(file, [source, *written]))
    else:
        assert "rollouts: row 10 has no prompt, all of it is trained" in refused(file, capsys, source, *written)


@pytest.mark.parametrize("as_variant", [False, True])
def test_gpus_that_are_not_there(file: Path, capsys: pytest.CaptureFixture[str], as_variant: bool) -> None:
    written = [variant(**ON_GPUS)] if as_variant else sets_of(ON_GPUS)
    assert "rollouts.devices: there is no GPU here; leave the key out" in refused(file, capsys, *written)


def test_rows_of_validation(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = [f"data.validation={{source: {file.parent / 'own.jsonl'}}}", *VALIDATED]
    rows_in(file, {"question": "red", "answer": "bird"})
    assert "data.validation.format: the columns question, answer are none of" in refused(file, capsys, *source)
    rows_in(file, {"prompt": "red", "completion": " bird"})
    recipe = load_recipe(file, source)
    check_good(recipe)
    with pytest.raises(InputError, match=r"data\.validation: 1 rows for 2 ranks, and each needs one"):
        check(recipe, study_entries(recipe), 2)
    rows_in(file, {"prompt": "red", "completion": " bird" * 100}, {"prompt": "red", "completion": " door" * 100})
    if is_made(file):
        check_good(recipe)
    else:
        said = refused(file, capsys, *source)
        assert "data.validation.max_length: no row has a token to train within 64 tokens" in said


def test_a_batch_that_a_variant_can_not_fill(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    said = refused(file, capsys, variant(**{"train.batch_size": 64}))
    assert "train.batch_size: 64 rows per step, but the data has only 40" in said


def test_sequences_that_do_not_fill_a_batch(
    file: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    sets = ["data.batching=packed", "train.batch_size=16"]
    if is_made(file):
        check_good(load_recipe(file, sets))
        return
    assert "train.batch_size: 16 rows per step, but the data has only" in refused(file, capsys, *sets)
    check_good(load_recipe(file, ["data.batching=packed", "train.batch_size=4"]))
    monkeypatch.setattr(study_rows, "LOOKED_AT", 30)  # what the other rows hold is not known
    check_good(load_recipe(file, sets))


def test_rows_are_tokenized_once_for_all_students(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if is_made(file):
        return
    made: list[str] = []

    def first_tokens(*given: Any) -> Any:
        made.append(given[2].source)
        return real(*given)

    real = study_rows._first_tokens  # pyright: ignore[reportPrivateUsage]
    monkeypatch.setattr(study_rows, "_first_tokens", first_tokens)
    rows_in(file, {"prompt": "red", "completion": " bird"})
    validated = f"data.validation={{source: {file.parent / 'own.jsonl'}}}"
    variants = {"one": {"loss.kl": 0.5}, "two": {"loss.kl": 0.2, "train.batch_size": 4}}
    recipe = load_recipe(file, [validated, f"study.variants={json.dumps(variants)}"])
    check_good(recipe)
    assert made == [recipe.data.source, str(file.parent / "own.jsonl")]


def check_good(recipe: Recipe) -> None:
    """A study that is not refused."""
    check(recipe, study_entries(recipe), 1)
