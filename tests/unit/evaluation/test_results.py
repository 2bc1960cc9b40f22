"""The result files of the scoring steps: their keys, and what a reader makes of old, failed and broken ones."""

import json
from math import nan
from pathlib import Path
from typing import Any

import pytest

from llmkd.evaluation.angles.results import AngleResult
from llmkd.evaluation.results import (
    RESULT_CLASSES,
    AgreementResult,
    ClassificationResult,
    ComparedItem,
    GeneratedText,
    GenerationResult,
    LmEvalResult,
    ScoredModel,
    StepResult,
    read_items,
    read_result,
)
from llmkd.recipe.study_entries import STEPS

HEADER = {"name", "fingerprint", "error", "seconds", "versions", "written"}
MODEL = HEADER | {"model", "dtype"}
KEYS: dict[type[StepResult], set[str]] = {
    GenerationResult: MODEL | {"backend", "why", "load_seconds", "new_tokens", "thoughts", "items", "metrics"},
    AgreementResult: MODEL | {"teacher", "rows", "tokens", "metrics"},
    ClassificationResult: MODEL | {"rows", "classes", "metrics"},
    LmEvalResult: MODEL
    | {"backend", "why", "tasks", "stderr", "items", "higher_is_better", "num_fewshot", "command", "batch_size"},
    AngleResult: HEADER | {"kind", "strategy", "seed", "init", "settings"},
}
VIEW = {
    "blocks": [
        {"block": 0, "mean": [[1.0]], "above_zero": [[1.0]], "mean_of_pairs": None, "above_zero_of_pairs": None}
    ],
    "paper_code": {"with_padding": {"mean": 0.5}, "tokens": {"mean": None}},
}
STACK = {"stack": "encoder", "tokens": 1200, "teacher_blocks": 1, "student_blocks": 1, "before": VIEW, "after": VIEW}
MEASURED = {"rows": 4, "final_state": "raw", "projector": None, "stacks": [STACK, {**STACK, "stack": "decoder"}]}


@pytest.mark.parametrize("kind", KEYS)
def test_a_file_holds_these_keys_and_is_read_as_it_was_written(kind: type[StepResult]) -> None:
    backend: dict[str, Any] = {"backend": "hf"} if "backend" in KEYS[kind] else {}
    made = kind(name="m", fingerprint="f", error="why", **backend)
    assert set(made.to_json()) == KEYS[kind]
    assert kind.from_json(json.loads(json.dumps(made.to_json()))) == made


def test_items_and_tasks_are_those_of_the_file() -> None:
    texts = GenerationResult.from_json({"items": 3, "metrics": {"bleu": 50.0}})
    assert (texts.tasks, texts.items) == ({"generation": {"bleu": 50.0}}, {"generation": 3})
    scored = LmEvalResult.from_json(
        {"tasks": {"t": {"acc": 1.0}}, "items": {"t": 9}, "higher_is_better": {"t": {"acc": True}}}
    )
    assert (scored.tasks, scored.items, scored.higher_is_better) == (
        {"t": {"acc": 1.0}},
        {"t": 9},
        {"t": {"acc": True}},
    )
    assert scored.to_json()["tasks"] == scored.tasks and scored.to_json()["items"] == {"t": 9}
    assert AgreementResult.from_json({"metrics": {"kl": 0.25}}).items == {}  # written by hand, without rows


@pytest.mark.parametrize("value", [None, nan, "N/A", True])
def test_what_is_no_number_is_none(value: object) -> None:
    assert ClassificationResult.from_json({"metrics": {"f1": value, "accuracy": 0}}).metrics == {
        "f1": None,
        "accuracy": 0,
    }
    assert LmEvalResult.from_json({"tasks": {"t": {"acc": value}}}).tasks == {"t": {"acc": None}}


def test_a_failed_step_may_have_scores() -> None:
    assert LmEvalResult.from_json({"error": "theirs: no file", "tasks": {"mine": {"acc": 1.0}}}).has_scores
    assert not LmEvalResult.from_json({"error": "no model", "tasks": {}}).has_scores
    assert not GenerationResult.from_json({"error": "no model", "metrics": {}}).has_scores


@pytest.mark.parametrize("text", ["", '{"name": "m", "tasks": {"say": {"bl', "[1]", '{"metrics": 1}'])
def test_a_file_that_is_not_whole_or_holds_something_else_is_none(text: str, tmp_path: Path) -> None:
    (tmp_path / "m.json").write_text(text)
    assert read_result(tmp_path / "m.json", ScoredModel) is None
    assert read_result(tmp_path / "none.json", ScoredModel) is None


def test_lines_of_older_files_and_half_written_ones(tmp_path: Path) -> None:
    (tmp_path / "m.jsonl").write_text(
        '{"item": 0, "prompt": "p", "references": ["r"], "text": "t", "newer": 1}\n{"item": 1, "pr'
    )
    assert read_items(tmp_path / "m.jsonl", GeneratedText) == [
        GeneratedText(item=0, prompt="p", references=["r"], text="t")
    ]
    assert ComparedItem.from_json({"item": 2, "kl": 0.5}).scores == {
        "token_agreement": None, "kl": 0.5, "top1": None, "likelihood": None
    }  # fmt: skip


def test_angles_are_read_stack_by_stack() -> None:
    made = AngleResult.from_json({"name": "m", "error": None, **MEASURED})
    assert (
        made.measured is not None
        and made.measured.tokens_read() == "1,200 tokens in the encoder and 1,200 in the decoder"
    )
    assert [stack.stack for stack in made.measured.stacks] == ["encoder", "decoder"]
    code = made.measured.stacks[1].view("after").paper_code
    assert code is not None and code.with_padding.mean == 0.5 and not made.measured.projector_left_out
    assert {"rows", "final_state", "projector", "projector_left_out", "bins", "stacks"} <= set(made.to_json())
    assert AngleResult.from_json(json.loads(json.dumps(made.to_json()))) == made


def test_angles_that_failed_or_are_of_an_earlier_form_hold_no_measurement() -> None:
    for value in ({"name": "m", "error": "no"}, {"name": "m", "error": None, "before": {}, "after": {}}):
        assert AngleResult.from_json(value).measured is None


def test_every_step_with_scores_has_a_class_of_results_and_of_lines() -> None:
    assert RESULT_CLASSES.keys() == STEPS.keys()
    assert all(RESULT_CLASSES[step].STEP == step for step in STEPS)
    assert len({RESULT_CLASSES[step].ITEM for step in STEPS}) == len(STEPS)


def test_a_line_of_the_log_shows_the_first_scores() -> None:
    scored = GenerationResult(name="m", model="m", fingerprint="", metrics={f"m{number}": 0.5 for number in range(7)})
    assert scored.summary() == "m0 0.5 m1 0.5 m2 0.5 m3 0.5 m4 0.5 and 2 more"
