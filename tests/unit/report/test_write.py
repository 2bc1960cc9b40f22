"""The report's files of made-up studies: the same numbers as in the files, the answer first, and nothing that is not there."""

import csv
import json
import re
import textwrap
from pathlib import Path
from typing import Any

import pytest
from markdown_it import MarkdownIt

from llmkd.errors import InputError
from llmkd.report import write
from llmkd.report.tables import COLUMNS
from llmkd.report.write import report, terminal_text
from tests.unit.report.study_folder import TWO_STEPS, Folder, small_study


@pytest.fixture(autouse=True)
def page(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """The calls of the page's maker, which has tests of its own."""
    calls: list[tuple[Any, ...]] = []

    def whole_page(*arguments: Any) -> str:
        calls.append(arguments)
        return "<!doctype html>"

    monkeypatch.setattr(write, "whole_page", whole_page)
    return calls


@pytest.fixture
def study(tmp_path: Path) -> Folder:
    return small_study(tmp_path)


def markdown(study: Folder) -> str:
    report(study.folder)
    return (study.folder / "report.md").read_text()


def test_all_forms_are_written_from_the_same_results(study: Folder, page: list[tuple[Any, ...]]) -> None:
    study.write("recipe.yaml", "name: made-up\n")
    assert report(study.folder).page == study.folder / "report.html"
    results = study.results()
    assert json.loads((study.folder / "results.json").read_text()) == results.to_json()
    assert page == [(results, [], "name: made-up\n")]
    text = (study.folder / "report.md").read_text()
    assert text.startswith(f"# Study made-up\n\n**{results.conclusion}**\n")
    assert all(f"\n- {note}" in text for note in results.notes)


def test_what_models_wrote_and_named_is_text_in_markdown(study: Folder) -> None:
    """A model's text comes into the report by the sentence of a failure, names by the study's files, all else by the recipe."""
    evil = "</details></td><script>alert(1)</script> ![a](http://b) | ```\n# not a heading\n```\n<img src=x>"
    study.score("none-s1", None, None, error=f"ValueError: {evil}")
    study.score("none-s0", 40.0, 0.5, versions={"torch": evil})
    study.study["name"] = f"made-up {evil}"
    study.write("study.json", study.study)
    study.write("recipe.yaml", f"name: |\n{textwrap.indent(evil, '  ')}\n")
    viewer = MarkdownIt("gfm-like", {"html": True, "linkify": False})
    text = markdown(study)
    html = viewer.render(text)
    assert not re.search(r"<(script|img|a )", html)
    assert re.findall(r"<h1>.*", html) and "<h1>not a heading" not in html
    assert html.count("</details>") == html.count("<details>") == text.count("<details><summary>")
    assert html.count("alert(1)") >= 4  # in the title, a table, the problems and the recipe
    lines = html[html.index("<h2>Scores") :].split("</table>")[0]
    assert len(set(row.count("<td") for row in lines.split("<tr>")[2:])) == 1


def test_every_score_is_a_line_of_the_csv(study: Folder) -> None:
    study.score("none-s1", 0.1 + 0.2)  # not a round number
    report(study.folder)
    with (study.folder / "results.csv").open() as file:
        lines = list(csv.DictReader(file))
    assert len(lines) == 12
    for line in lines:
        found = json.loads((study.folder / f"evaluations/{line['name']}.json").read_text())
        task, metric = line["metric"].split("/")
        assert float(line["value"]) == found["tasks"][task][metric]
    assert {(line["strategy"], line["seed"], line["kind"]) for line in lines if line["name"] == "none-s1"} == {
        ("none", "1", "student")
    }
    assert {line["seed"] for line in lines if line["name"] == "teacher"} == {""}


def test_scores_and_reasons_in_the_table(study: Folder) -> None:
    study.score("forward-s1", None, error="ValueError: " + "long " * 30)
    (study.folder / "evaluations/none-s0.json").unlink()
    (study.folder / "evaluations/none-s1.json").unlink()
    text = markdown(study)
    assert "| teacher | teacher | 1 of 1 | 90.0 | 0.990 |" in text
    assert "| forward | student | 1 of 2 | 70.0 (n=1) | 0.500 (n=1) |" in text
    assert "| none | student | not yet | not yet | not yet |" in text
    assert f"- forward-s1: lm-eval failed: ValueError: {('long ' * 30).strip()}" in text
    assert "- none-s0: lm-eval not yet" in text


def test_a_model_whose_turn_has_not_come_is_no_failure(tmp_path: Path) -> None:
    """Each table counts by its own step."""
    study = Folder(tmp_path)
    names = [study.entry("student", "forward", seed, steps=TWO_STEPS) for seed in (0, 1)]
    for name in names:
        study.generated(name, {"bleu": 50.0})
    study.score(names[0], 70.0)
    of_texts, of_tasks = markdown(study).split("### lm-eval")
    assert (
        "| forward | student | 2 of 2 | " in of_texts and "| forward | student | 1 of 2 so far | 70.0 (n=1)" in of_tasks
    )
    row = study.row("forward")
    assert (row.scored("generation"), row.scored("lm-eval"), row.scored()) == (
        "2 of 2",
        "1 of 2 so far",
        "1 of 2 so far",
    )
    study.score(names[1], None, error="ValueError: no")
    assert study.row("forward").scored("lm-eval") == "1 of 2" and not study.row("forward").waits()


def test_a_failure_stands_in_its_cells_and_never_a_zero(study: Folder) -> None:
    for seed in (0, 1):
        study.score(f"forward-s{seed}", None, error="ValueError: " + "long " * 30)
    row = next(line for line in markdown(study).splitlines() if line.startswith("| forward "))
    cells = [cell.strip() for cell in row.split("|")[4:-1]]
    assert len(cells) == 2 and all(cell.startswith("failed: ValueError: long") and cell.endswith("…") for cell in cells)


def test_a_step_that_was_not_asked_for_is_no_problem(tmp_path: Path) -> None:
    study = Folder(tmp_path)
    study.score(study.entry("teacher", None, None, "teacher"), 90.0)
    name = study.entry("student", "forward", 0, steps=("evaluation", "agreement"))
    study.score(name, 70.0)
    study.write(f"agreement/{name}.json", {"error": None, "metrics": {"kl": 0.25}})
    text = markdown(study)
    assert "| teacher | teacher | 1 of 1 | – |" in text and "| forward | student | 1 of 1 | 0.250 |" in text
    assert "### lm-eval" in text and "### agreement" in text and "## Problems" not in text


def test_comparisons_with_their_verdicts(study: Folder) -> None:
    """forward - none is 30 and 31: mean 30.5, standard error 0.5, t(1) at 61: p = 1 - 2 arctan(61) / pi = 0.0104."""
    text = markdown(study)
    main, rest = text.split("## Comparisons")[1].split("## Layer maps")[0].split("<details>")
    line = next(line for line in main.splitlines() if "| forward | none |" in line)
    assert line == "| say/bleu | forward | none | +30.50 | +24.15 to +36.85 | different | 2 | 0.010 (0.010) | – | – |"
    assert "| choose/acc | forward | none | +0.0000 | – | not tested | 2 | – | – | – |" in rest


def test_maps_and_costs(study: Folder) -> None:
    study.write("teacher/model/config.json", {"num_hidden_layers": 12})
    made = {"hardware": {"cpu": "A | B", "cores": 2, "gpus": []}, "commit": "abc123", "versions": {"torch": "2.13.0"}}
    summary: dict[str, Any] = {
        "steps": 60,
        "seconds": 33.4,
        "tokens": 54321,
        "tokens_per_second": 1626.4,
        "memory_gib": 0.512,
        **made,
    }
    summary["step"] = {"steps": 57, "median_seconds": 0.5, "quartiles": [0.4, 0.6]}
    summary["step"] |= {"cpu_seconds": 0.25, "cpu_quartiles": [0.245, 0.255]}
    for strategy, pairs in (("forward", [[0, 3], [1, 7], [2, 11]]), ("none", [])):
        for seed in (0, 1):
            run = f"students/{strategy}-s{seed}"
            study.write(f"{run}/summary.json", {**summary, "pairs": pairs, "world_size": 2})
            study.write(f"{run}/model/config.json", {"num_hidden_layers": 3})
    study.write("teacher/metrics.jsonl", '{"step": 10}\n{"step": 20}\n{"st')
    text = markdown(study)
    assert text.count("```text") == 1  # one drawing for both seeds, none for a strategy without pairs
    assert "**forward** (forward-s0, forward-s1)" in text and "student <- teacher" in text
    assert "| forward-s0 | done | 2 | 60 | 0.5 | 0.2 | 0.25 | 0.01 | 33.4 | 54,321 | 1,626 | 0.512 |" in text
    assert "| teacher | unfinished, at step 20 |  |  |  |  |  |  |  |  |  |  |" in text
    assert "CPU seconds of rank 0 of a step: from 0.25 (none) to 0.25 (forward), 0 apart" in text
    assert "- hardware: cpu A | B, cores 2\n- commit: abc123" in text and "torch 2.13.0" in text


def test_maps_of_unknown_depth_are_listed(study: Folder) -> None:
    study.write("students/forward-s0/summary.json", {"pairs": [[0, 3], [1, 7]]})
    assert "**forward** (forward-s0)\n\n```text\n0 <- 3\n1 <- 7\n```" in markdown(study)


def test_what_was_run(study: Folder) -> None:
    study.write("recipe.yaml", "name: made-up\n")
    text = markdown(study)
    assert "```yaml\nname: made-up\n```" in text and "lm_eval 0.4.13" in text and "say 200" in text
    assert "- lm-eval ran on hf (6 models)" in text and "- seeds: 0, 1" in text


def test_the_same_files_give_the_same_report(study: Folder) -> None:
    first = markdown(study), (study.folder / "results.json").read_text()
    assert (markdown(study), (study.folder / "results.json").read_text()) == first
    assert not list(study.folder.glob("*.tmp"))


def test_a_study_not_begun_has_a_report(tmp_path: Path) -> None:
    empty = Folder(tmp_path)
    empty.entry("teacher", None, None, "teacher")
    empty.entry("student", "forward", 0)
    text = markdown(empty)
    assert "| forward | student | not yet | not yet |" in text
    assert "No trained student" in text and "None yet" in text


def test_a_folder_without_a_study_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no study here"):
        report(tmp_path)
    assert not list(tmp_path.iterdir())


# ---------------------------------------------------------------------------------------------------------------------
# The terminal


def test_table_for_the_terminal(study: Folder) -> None:
    lines = terminal_text(study.results()).splitlines()
    assert lines[0].split(" | ") == ["model      ", "kind    ", "n     ", "say/bleu   ", "choose/acc"]
    assert lines[2].startswith("teacher     | teacher  | 1 of 1 | 90.0        | 0.990")
    assert "| 71.0 ± 12.7 | 0.500 ± 0.000" in lines[5]
    assert " ".join(lines[-2:]).endswith(study.results().conclusion)


def test_fifteen_metrics_stay_readable_and_the_main_ones_come_first(tmp_path: Path) -> None:
    study = Folder(tmp_path, margins={"task14/accuracy": 0.01})
    tasks = {f"task{n}": {"accuracy": n / 20} for n in range(15)}
    for seed in (0, 1):
        study.score(study.entry("student", "forward", seed), None, tasks=tasks)
    failed = study.entry("student", "reverse", 0)
    study.score(failed, None, error="ValueError: " + "long " * 30)
    lines = terminal_text(study.results()).splitlines()
    table = lines[: lines.index("")]
    assert all(len(line) <= COLUMNS for line in table)
    assert (
        table[0].split(" | ")[3].strip() == "task14/accuracy" and table[0].split(" | ")[4].strip() == "task0/accuracy"
    )
    shown = len(table[0].split(" | ")) - 3
    assert f"{15 - shown} more metrics are in the report." in lines
    assert f"reverse-s0: lm-eval failed: ValueError: {'long ' * 30}".strip() in "\n".join(lines)
