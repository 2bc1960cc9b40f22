"""Texts written during training in the report: numbers as the files have them, texts side by side, nothing where none were written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from llmkd.report.page.document import whole_page
from llmkd.report.rollouts import rollout_numbers, rollout_table, shown_runs, side_by_side
from llmkd.report.runs import LogLine
from llmkd.report.write import report
from llmkd.rollouts.texts import Wrote
from tests.unit.report.example_results import study
from tests.unit.report.page_reader import Page
from tests.unit.report.study_folder import Folder

HEADING = "Texts written during training"
EVIL = "<img src=x onerror=alert(1)> | 2"


def rounds(lengths: list[float], every: int = 10) -> list[dict[str, Any]]:
    """A line per round; the texts of the fixed prompts say which round they are of."""
    return [
        {
            "step": every * number,
            "texts": 80,
            "tokens": round(80 * length),
            "length": length,
            "ended": 0.25 * (number + 1),
            "empty": 0,
            "repetition": 0.125,
            "weights_seconds": 1.0,
            "seconds": 4.0,
            "samples": [{"prompt": f"p{place}", "text": f"{EVIL} {number}" * place} for place in range(3)],
        }
        for number, length in enumerate(lengths)
    ]


def metrics(kl: list[float], validated: list[float]) -> list[dict[str, Any]]:
    lines: list[dict[str, Any]] = []
    for number, (own, data) in enumerate(zip(kl, validated, strict=True), start=1):
        lines.append({"step": 10 * number, "loss": own, "ce": 0.0, "kl": own, "hidden": 0.0})
        lines.append({"step": 10 * number, "validation": {"ce": 1.0, "kl": data}})
    return lines


def recipe(share: float = 1.0, kl: float = 1.0) -> str:
    loss = {"ce": 0.0, "kl": kl, "divergence": "reverse_kl", "temperature": 2.0}
    return json.dumps({"rollouts": {"share": share}, "loss": loss})  # which is YAML too


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    """Two seeds of a student that writes, the second still in training, and one that does not."""
    made = Folder(tmp_path, reference="none")
    for seed in (0, 1):
        name = made.entry("student", "on_policy", seed)
        made.lines(f"students/{name}/rollouts.jsonl", rounds([20.0, 10.0, 12.0, 8.0]))
        made.lines(f"students/{name}/metrics.jsonl", metrics([0.5, 0.25, 0.2, 0.125], [0.75, 0.6, 0.5, 0.5]))
        made.write(f"students/{name}/recipe.yaml", recipe())
    spent = {"weights": 4.0, "writing": 16.0, "rounds": 4, "texts": 320, "tokens": 4000}
    times = {"seconds": 64.0, "teacher_seconds": 8.0, "validation_seconds": 8.0}
    made.write("students/on_policy-s0/summary.json", {**times, "rollouts": spent})
    made.entry("student", "none", 0)
    made.lines("students/none-s0/metrics.jsonl", metrics([0.5], [0.5]))
    return made


def test_rounds_stand_at_the_first_step_that_trains_on_them(folder: Folder) -> None:
    results = folder.results()
    assert list(results.rollouts) == ["on_policy-s0", "on_policy-s1"]
    run = results.rollouts["on_policy-s0"]
    assert run.lines[1] == LogLine(11, {"length": 10.0, "ended": 0.5, "repetition": 0.125})
    assert (run.rounds, run.texts, run.tokens) == (4, 320, 4000)
    written: Any = results.to_json()["rollouts"]
    json.dumps(written, allow_nan=False)
    assert written["on_policy-s0"]["lines"][1] == {"step": 11, **run.lines[1].parts, "pairs": {}}


def test_shares_are_of_the_training_and_of_the_writing(folder: Folder) -> None:
    rollouts = folder.results().rollouts
    assert rollout_numbers(rollouts["on_policy-s0"]) == [4, 320, 4000, 16.0, 25.0, 12.5, 50.0, 25.0]
    assert rollout_table(rollouts)[1] == ["on_policy-s0", "4", "320", "4,000", "16", "25", "12.5", "50", "25"]
    assert rollout_table(rollouts)[2] == [
        "on_policy-s1",
        "4",
        "320",
        "4,000",
        "",
        "",
        "",
        "",
        "",
    ]  # not known before its end


def test_texts_of_the_first_the_middle_and_the_last_round_are_side_by_side(folder: Folder) -> None:
    (name, run), *others = shown_runs(folder.results()).items()
    assert name == "on_policy-s0" and others == []  # one run of each student
    head, first, second, _ = side_by_side(run)
    assert head == ["prompt", "before step 1", "before step 21", "before step 31"]
    assert first == ["p0", "–", "–", "–"]
    assert second == ["p1", f"{EVIL} 0", f"{EVIL} 2", f"{EVIL} 3"]


def test_rounds_without_fixed_prompts_are_rounds_all_the_same(folder: Folder) -> None:
    lines = rounds([20.0, 10.0, 12.0, 8.0])
    for line in lines[1:3]:
        line["samples"] = []
    folder.lines("students/on_policy-s0/rollouts.jsonl", lines)
    run = folder.results().rollouts["on_policy-s0"]
    assert len(run.lines) == 4 and [shown.step for shown in run.shown] == [1, 31]


def test_every_form_of_the_report_has_it(folder: Folder) -> None:
    page = Page(report(folder.folder).page.read_text())
    assert HEADING in [text for _, text in page.all("h2")]
    labels = [about["aria-label"] for about, _ in page.all("svg")]
    for measure in ("length", "ended", "repetition"):
        assert f"Written texts: {measure} by step" in labels
    assert page.csv("rollouts")[1] == ["on_policy-s0", "4", "320", "4000", "16.0", "25.0", "12.5", "50.0", "25.0"]
    assert page.csv("rollouts-length")[2] == ["11", "10.0", "10.0", "10.0"]
    assert "before step 21" in [text for _, text in page.all("th")] and f"{EVIL} 2" in [
        text for _, text in page.all("td")
    ]
    assert page.all("img") == []
    text = (folder.folder / "report.md").read_text()
    assert f"## {HEADING}" in text and "| on_policy-s0 | 4 | 320 | 4,000 | 16 | 25 | 12.5 | 50 | 25 |" in text
    assert "### What on_policy-s0 wrote" in text and "<img" not in text
    assert "on_policy-s0" in json.loads((folder.folder / "results.json").read_text())["rollouts"]


@pytest.mark.usefixtures("undrawn")
def test_the_divergence_on_its_own_text_is_beside_that_on_the_data(folder: Folder) -> None:
    page = Page(whole_page(folder.results(), [], ""))
    assert "On its own text and on the data" in [text for _, text in page.all("h3")]
    assert [about["aria-label"] for about, _ in page.all("svg") if "divergence" in about["aria-label"]] == [
        "on_policy: divergence by step"
    ]
    caption = "on_policy: own text: reverse_kl at temperature 2; data: forward_kl at temperature 1"
    assert caption in [text for _, text in page.all("figcaption")]
    head, *lines = page.csv("own-kl-0")
    assert head[:3] == ["step", "own text", "data"] and lines[1][:3] == ["20", "0.25", "0.6"]


@pytest.mark.parametrize("changed", [{"share": 0.5}, {"kl": 0.0}])
@pytest.mark.usefixtures("undrawn")
def test_a_divergence_that_is_not_of_own_texts_alone_is_not_called_so(
    folder: Folder, changed: dict[str, float]
) -> None:
    for seed in (0, 1):
        folder.write(f"students/on_policy-s{seed}/recipe.yaml", recipe(**changed))
    results = folder.results()
    assert [run.own_kl for run in results.rollouts.values()] == [None, None]
    page = Page(whole_page(results, [], ""))
    assert HEADING in [text for _, text in page.all("h2")]
    assert "On its own text and on the data" not in [text for _, text in page.all("h3")]


def test_a_mixed_divergence_is_named_with_its_weights(folder: Folder) -> None:
    loss = {"ce": 0.0, "kl": 1.0, "divergence": {"forward_kl": 0.5, "reverse_kl": 0.5}, "temperature": 1.0}
    folder.write("students/on_policy-s0/recipe.yaml", json.dumps({"rollouts": {"share": 1.0}, "loss": loss}))
    assert folder.results().rollouts["on_policy-s0"].own_kl == "0.5 forward_kl + 0.5 reverse_kl at temperature 1"


@pytest.mark.usefixtures("undrawn")
def test_a_study_without_written_texts_says_nothing_of_them() -> None:
    assert HEADING not in whole_page(study(seeds=(0,)), [], "")


def test_what_the_teacher_wrote_before_training_is_said_once(folder: Folder, tmp_path: Path) -> None:
    assert folder.results().teachers_texts == []
    wrote = {"texts": 200, "tokens": 4321, "unended": 3, "empty": 1, "left_out": 4, "seconds": 12.3}
    for name in ("on_policy-s0", "none-s0"):
        made: dict[str, Any] = {"seconds": 64.0, "teachers_texts": wrote}
        folder.write(f"students/{name}/summary.json", made)
    results = folder.results()
    assert results.teachers_texts == [Wrote(**wrote)] and results.to_json()["teachers_texts"] == [wrote]
    sentence = (
        "Before training the teacher wrote 200 texts of 4,321 tokens in 12.3 s: 3 did not end within their tokens, 1 were empty, "
        "4 were left out."
    )
    assert whole_page(results, [], "").count(sentence) == 1
    report(tmp_path)
    assert (tmp_path / "report.md").read_text().replace("\\", "").count(sentence) == 1
