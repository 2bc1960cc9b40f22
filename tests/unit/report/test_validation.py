"""Validation in the report: the rule in one sentence, the exported steps, and numbers as the runs' files have them."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from llmkd.report.page.document import whole_page
from llmkd.report.page.validation import validation_part
from llmkd.report.runs import LogLine, Rule, RunValidations
from llmkd.report.validation import exported, of_students, rule_in_words, validation_table
from llmkd.report.write import report
from tests.unit.report.example_results import study
from tests.unit.report.page_reader import Page
from tests.unit.report.study_folder import Folder

BEST = {"every": 10, "rows": 256, "keep": "best", "by": "validation/kl", "patience": 3}


def lines(values: list[float]) -> list[dict[str, Any]]:
    """Three steps' log, a validation after each."""
    logged: list[dict[str, Any]] = []
    for place, value in enumerate(values, start=1):
        measured = {
            "ce": value + 1,
            "perplexity": 3.0,
            "kl": value,
            "agreement": 0.5,
            "pairs": {"0<3": 0.25},
            "seconds": 1,
        }
        logged += [
            {"step": 10 * place, "validation": measured},
            {"step": 10 * place, "loss": 1.0, "ce": 1.0, "kl": 0.5, "hidden": 0.5, "pairs": {"0<3": 0.5}},
        ]
    return logged


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    """Two students of one rule, the second still in training, and a teacher that was validated by its own."""
    made = Folder(tmp_path)
    made.entry("teacher", None, None, "teacher")
    for seed in (0, 1):
        made.entry("student", "forward", seed)
        made.lines(f"students/forward-s{seed}/metrics.jsonl", lines([0.5, 0.25 + seed, 0.4]))
    made.lines("teacher/metrics.jsonl", lines([9.0]))
    made.write(
        "students/forward-s0/summary.json", {"pairs": [[0, 3]], "validation": BEST, "kept": {"step": 20, "value": 0.25}}
    )
    return made


def test_validations_are_no_lines_of_the_training_and_stand_beside_them(folder: Folder) -> None:
    results = folder.results()
    assert [line.step for line in results.curves["forward-s0"].lines] == [10, 20, 30]
    run = results.validations["forward-s0"]
    assert run.rule == Rule(**BEST) and run.kept == 20
    first: dict[str, float | None] = {"ce": 1.5, "perplexity": 3.0, "kl": 0.5, "agreement": 0.5}
    assert run.lines[0] == LogLine(10, first, {"0<3": 0.25})
    assert exported(run).parts["kl"] == 0.25
    assert results.validations["forward-s1"].rule is None
    assert list(of_students(results)) == ["forward-s0", "forward-s1"]
    json.dumps(results.to_json(), allow_nan=False)
    written: Any = results.to_json()["validations"]
    assert written["forward-s0"]["rule"] == BEST and written["forward-s0"]["lines"][1]["kl"] == 0.25


def test_the_rule_is_one_sentence_where_it_is_one_rule() -> None:
    best, last = (RunValidations([LogLine(10, {"ce": 1.0})], rule) for rule in (Rule(**BEST), Rule(10, 8)))
    words = rule_in_words({"a-s0": best, "a-s1": best})
    assert words == (
        "The same for all students: validated on 256 held-out rows every 10 steps and after the last; exported is the student of the step "
        "with the lowest validation/kl; a run stops after 3 validations that are not its best by validation/kl."
    )
    several = rule_in_words({"a-s0": best, "b-s0": last})
    assert several.startswith("Not one rule for all students. a-s0: validated on 256 held-out rows")
    assert (
        "b-s0: validated on 8 held-out rows every 10 steps and after the last; exported is the student of the last"
        in several
    )
    more = replace(best, rule=Rule(1, 8, "best", "validation/agreement"))
    words = rule_in_words({"a-s0": more})
    assert "held-out rows after every step;" in words and "the step with the highest validation/agreement." in words
    assert rule_in_words({"a-s0": replace(best, rule=None)}) == "The rule is written when the first run has ended."


def test_a_line_for_each_run_has_the_numbers_of_its_exported_student(folder: Folder) -> None:
    _, first, second = validation_table(of_students(folder.results()))
    assert first == ["forward-s0", "20", "30", "1.25", "0.25", "0.5"]
    assert second == ["forward-s1", "", "30", "1.4", "0.4", "0.5"]


def test_every_form_of_the_report_has_it(folder: Folder) -> None:
    page = Page(report(folder.folder).page.read_text())
    assert "Validation while training" in [text for _, text in page.all("h3")]
    assert any("lowest validation/kl" in text for _, text in page.all("p"))
    assert "Validation: kl by step" in [about["aria-label"] for about, _ in page.all("svg")]
    assert page.csv("validation")[1] == ["forward-s0", "20", "30", "1.25", "0.25", "0.5"]
    text = (folder.folder / "report.md").read_text()
    assert "## Validation while training" in text and "| forward-s0 | 20 | 30 | 1.25 |" in text
    assert "forward-s0" in json.loads((folder.folder / "results.json").read_text())["validations"]


def test_a_ring_marks_the_exported_step_of_each_finished_run() -> None:
    results = study(seeds=(0,))
    runs = [run.name for run in results.runs if run.strategy is not None]
    made = [LogLine(step, {"ce": 5.0 + step / 10}) for step in range(10, 1000, 10)]  # more than are drawn
    marked = {name: RunValidations(made, Rule(**BEST), kept=20) for name in runs}
    pages = [
        Page("\n".join(map(str, validation_part(replace(results, validations=found)))))
        for found in (marked, {name: replace(run, rule=None) for name, run in marked.items()})
    ]
    with_rings, without = (len(page.all("use")) for page in pages)
    assert with_rings - without == len(runs)


@pytest.mark.usefixtures("undrawn")
def test_a_study_without_validation_says_nothing_of_it() -> None:
    assert "Validation while training" not in whole_page(study(seeds=(0,)), [], "")
