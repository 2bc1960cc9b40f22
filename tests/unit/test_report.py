"""The report of made-up studies, its numbers worked out by hand."""

import json
from pathlib import Path
from typing import Any

import pytest

from llmkd import report as module
from llmkd.errors import InputError
from llmkd.report import report, table_text

T_1, T_2 = 12.706204736, 4.302652730  # the 97.5 % points of Student's t with 1 and 2 degrees of freedom, from tables


class Folder:
    """A study's folder, written piece by piece."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.entries: list[dict[str, Any]] = []

    def entry(self, kind: str, strategy: str | None, seed: int | None, name: str | None = None) -> str:
        name = name or f"{strategy}-s{seed}"
        train = {"teacher": "teacher"}.get(name, f"students/{name}" if seed is not None else None)
        model = f"{train}/model" if train else f"{name}/model"
        self.entries.append(
            {
                "name": name,
                "kind": kind,
                "strategy": strategy,
                "seed": seed,
                "model": model,
                "evaluation": f"evaluations/{name}.json",
                "train": train,
            }
        )
        self.write("study.json", {"name": "made-up", "entries": self.entries})
        return name

    def write(self, path: str, value: Any) -> None:
        file = self.folder / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(value if isinstance(value, str) else json.dumps(value))

    def score(self, name: str, bleu: float | None, acc: float | None = 0.5, error: str | None = None) -> None:
        tasks = {} if error else {"say": {"bleu": bleu}, "choose": {"acc": acc}}
        found = {"name": name, "tasks": tasks, "stderr": {}, "error": error, "versions": {"lm_eval": "0.4.13"}}
        self.write(f"evaluations/{name}.json", {**found, "items": {"say": 200}})

    def results(self) -> dict[str, Any]:
        report(self.folder)
        return json.loads((self.folder / "results.json").read_text())

    def row(self, name: str) -> dict[str, Any]:
        return next(row for row in self.results()["rows"] if row["name"] == name)

    def markdown(self) -> str:
        return report(self.folder).read_text()


@pytest.fixture
def study(tmp_path: Path) -> Folder:
    """Teacher, undistilled and two strategies over two seeds, all scored: forward 70 and 72, none 40 and 41."""
    made = Folder(tmp_path)
    made.score(made.entry("teacher", None, None, "teacher"), 90.0, 0.99)
    made.score(made.entry("baseline", "undistilled", None, "undistilled"), 3.0, 0.25)
    for strategy, scores in (("none", (40.0, 41.0)), ("forward", (70.0, 72.0))):
        for seed, bleu in enumerate(scores):
            made.score(made.entry("student", strategy, seed), bleu)
    return made


def test_mean_and_interval_by_hand(study: Folder) -> None:
    cell = study.row("forward")["cells"]["say/bleu"]
    assert cell["mean"] == 71.0 and cell["n"] == 2 and cell["values"] == [70.0, 72.0]
    # standard deviation of 70 and 72 is sqrt(2); divided by sqrt(2) seeds it is 1
    assert cell["half_width"] == pytest.approx(T_1 * 1.0)
    assert study.row("teacher")["cells"]["say/bleu"] == {"mean": 90.0, "half_width": None, "n": 1, "values": [90.0]}


def test_three_seeds_use_two_degrees_of_freedom() -> None:
    assert module.half_width([1.0, 2.0, 3.0]) == pytest.approx(T_2 * 1.0 / 3**0.5)
    assert module.half_width([1.0]) is None


def test_separate_intervals_are_concluded(study: Folder) -> None:
    """forward: 71 ± 12.7 from 58.3; none: 40.5 ± 6.4 up to 46.9. They are apart, and both above 3."""
    said = study.results()["conclusion"]
    assert said == (
        "On say/bleu, the 95 % intervals over 2 seeds of none, forward put forward above none; no other difference between them is shown."
        " Intervals wholly above the undistilled student's 3.0: none, forward."
    )
    assert study.markdown().startswith(f"# Study made-up\n\n{said}\n")


def test_overlapping_intervals_are_not(study: Folder) -> None:
    study.score("none-s0", 60.0)
    study.score("none-s1", 62.0)
    said = study.results()["conclusion"]
    assert "intervals over 2 seeds of none, forward overlap, so no difference between them is shown" in said
    assert "put" not in said


def test_two_seeds_that_tie_are_no_certainty(study: Folder) -> None:
    """An interval of width 0 would put a strategy above or below every other."""
    study.score("none-s0", 71.5)
    study.score("none-s1", 71.5)
    assert study.results()["conclusion"].startswith("Nothing can be concluded about differences between strategies")


def test_one_seed_concludes_nothing(tmp_path: Path) -> None:
    one = Folder(tmp_path)
    for strategy, bleu in (("none", 10.0), ("forward", 90.0)):
        one.score(one.entry("student", strategy, 0), bleu)
    said = one.results()["conclusion"]
    assert said.startswith("Nothing can be concluded about differences between strategies")
    assert "±" not in one.markdown().split("## Scores")[1].split("Mean over")[0]


def test_a_failed_evaluation_is_no_number(study: Folder) -> None:
    study.score("forward-s1", None, error="OutOfMemoryError: no room for 3 GiB")
    results = study.results()
    cell = study.row("forward")["cells"]["say/bleu"]
    assert cell == {"mean": 70.0, "half_width": None, "n": 1, "values": [70.0]}
    assert results["problems"] == {"forward-s1": "failed: OutOfMemoryError: no room for 3 GiB"}
    assert results["conclusion"].startswith(
        "This report is partial: 5 of 6 models have scores. Nothing can be concluded"
    )
    text = study.markdown()
    assert "| forward | student | 1 of 2 | 70.0 (n=1) |" in text
    assert "- forward-s1: failed: OutOfMemoryError: no room for 3 GiB" in text


def test_a_row_without_any_score_says_why_in_its_cells(study: Folder) -> None:
    for seed in (0, 1):
        study.score(f"forward-s{seed}", None, error="ValueError: " + "long " * 30)
        (study.folder / f"evaluations/none-s{seed}.json").unlink()
    text = study.markdown()
    row = next(line for line in text.splitlines() if line.startswith("| forward "))
    assert row.count("failed: ValueError: long") == 2 and row.count("...") == 2
    assert "| none | student | 0 of 2 | not run | not run |" in text
    assert not any(char.isdigit() for char in row.split("|", 4)[4])


def test_a_half_written_evaluation_is_no_number(study: Folder) -> None:
    study.write("evaluations/none-s0.json", '{"name": "none-s0", "tasks": {"say": {"bl')
    assert study.results()["problems"] == {"none-s0": "unreadable evaluation file"}


def test_a_metric_without_value_is_no_number(study: Folder) -> None:
    study.score("teacher", None)
    assert "say/bleu" not in study.row("teacher")["cells"]
    assert "| teacher | teacher | 1 of 1 | no value | 0.500 |" in study.markdown()


def test_a_study_not_begun(tmp_path: Path) -> None:
    empty = Folder(tmp_path)
    empty.entry("teacher", None, None, "teacher")
    empty.entry("student", "forward", 0)
    said = empty.results()["conclusion"]
    assert said == "This report is partial: 0 of 2 models have scores. Nothing can be concluded: no model has a score."
    assert "| forward | student | 0 of 1 | not run |" in empty.markdown()


def test_maps_and_costs(study: Folder) -> None:
    study.write("teacher/model/config.json", {"num_hidden_layers": 12})
    summary = {"steps": 60, "seconds": 33.4, "tokens": 54321, "tokens_per_second": 1626.4, "memory_gib": 0.512}
    for strategy, pairs in (("forward", [[0, 3], [1, 7], [2, 11]]), ("none", [])):
        for seed in (0, 1):
            run = f"students/{strategy}-s{seed}"
            study.write(f"{run}/summary.json", {**summary, "pairs": pairs, "world_size": 2})
            study.write(f"{run}/model/config.json", {"num_hidden_layers": 3})
    study.write("teacher/metrics.jsonl", '{"step": 10}\n{"step": 20}\n{"st')
    text = study.markdown()
    assert text.count("```text") == 1  # one drawing for both seeds, none for a strategy without pairs
    assert "**forward** (forward-s0, forward-s1)" in text and "student <- teacher" in text
    assert "| forward-s0 | done | 2 | 60 | 33 | 1,626 | 0.51 |" in text
    assert "| teacher | unfinished, at step 20 |  |  |  |  |  |" in text


def test_random_maps_are_drawn_for_each_seed_and_unknown_depths_not_at_all(study: Folder) -> None:
    for seed, pairs in ((0, [[0, 3], [1, 7]]), (1, [[0, 7], [1, 3]])):
        study.write(f"students/forward-s{seed}/summary.json", {"pairs": pairs})
    text = study.markdown()
    assert "**forward** (forward-s0)\n\n```text\n0 <- 3\n1 <- 7\n```" in text
    assert "**forward** (forward-s1)\n\n```text\n0 <- 7\n1 <- 3\n```" in text


def test_recipe_and_versions_are_in_the_report(study: Folder) -> None:
    study.write("recipe.yaml", "name: made-up\n")
    text = study.markdown()
    assert "```yaml\nname: made-up\n```" in text and "lm_eval 0.4.13" in text and "say 200" in text


def test_the_same_files_give_the_same_report(study: Folder) -> None:
    first = study.markdown(), study.results()
    assert (study.markdown(), study.results()) == first
    assert not list(study.folder.glob("*.tmp"))


def test_table_for_the_terminal(study: Folder) -> None:
    lines = table_text(study.results()).splitlines()
    assert lines[0].split(" | ") == ["model      ", "kind    ", "n     ", "say/bleu   ", "choose/acc"]
    assert lines[2].startswith("teacher     | teacher  | 1 of 1 | 90.0        | 0.990")
    assert "| 71.0 ± 12.7 | 0.500 ± 0.000" in lines[5]
    assert lines[-1] == study.results()["conclusion"]


def test_no_study_is_said(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no study here"):
        report(tmp_path)
    assert not list(tmp_path.iterdir())
