"""Numbers of a study's files, worked out by hand: what is there, what is not, and what failed."""

import json
from math import inf, nan
from pathlib import Path
from typing import Any

import pytest

from llmkd.errors import InputError
from llmkd.report.files import CURVE_POINTS, GeneratedItem, generations
from llmkd.report.gather import gather
from llmkd.report.results import Cell, LayerMap
from tests.unit.report.study_folder import VERSIONS, Folder, small_study

T_1 = 12.706204736  # the 97.5 % point of Student's t with 1 degree of freedom, from tables
ALL_STEPS = ("evaluation", "generation", "agreement")


@pytest.fixture
def study(tmp_path: Path) -> Folder:
    return small_study(tmp_path)


def test_mean_and_interval_by_hand(study: Folder) -> None:
    cell = study.row("forward").cells["say/bleu"]
    # standard deviation of 70 and 72 is sqrt(2); divided by sqrt(2) seeds it is 1
    assert cell.half_width == pytest.approx(T_1 * 1.0)
    assert cell == Cell(mean=71.0, half_width=cell.half_width, n=2, values=[70.0, 72.0], seeds=[0, 1])
    assert study.row("teacher").cells["say/bleu"] == Cell(90.0, None, 1, [90.0], [None])


def test_every_number_of_the_files_is_there_once(study: Folder) -> None:
    rows = {row.name: row for row in study.results().rows}
    for entry in study.study["entries"]:
        found = json.loads((study.folder / entry["evaluation"]).read_text())
        for task, values in found["tasks"].items():
            for metric, value in values.items():
                cell = rows[entry["strategy"] or entry["name"]].cells[f"{task}/{metric}"]
                assert cell.values[cell.seeds.index(entry["seed"])] == value
    assert sum(cell.n for row in rows.values() for cell in row.cells.values()) == 12


def test_the_three_steps_stand_side_by_side(tmp_path: Path) -> None:
    study = Folder(tmp_path, margins={"generation/bleu": 0.5})
    study.generated(study.entry("teacher", None, None, "teacher", ALL_STEPS[:2]), {"bleu": 99.0, "length_ratio": 1.1})
    study.score("teacher", 90.0)
    name = study.entry("student", "forward", 0, steps=ALL_STEPS)
    study.score(name, 70.0)
    study.generated(name, {"bleu": 64.5, "repetition": 0.1})
    study.write(f"agreement/{name}.json", {"name": name, "error": None, "metrics": {"kl": 0.2}, "rows": 50})
    results = study.results()
    shown = {m.name: (m.label, m.higher_is_better, m.percent, m.step) for m in results.metrics}
    assert shown == {
        "generation/bleu": ("BLEU", True, True, "generation"),
        "generation/length_ratio": ("length ratio", None, False, "generation"),
        "generation/repetition": ("repeated 4-grams", False, False, "generation"),
        "say/bleu": ("say/bleu", True, True, "lm-eval"),
        "choose/acc": ("choose/acc", True, False, "lm-eval"),
        "agreement/kl": ("KL to the teacher", False, False, "agreement"),
    }
    assert results.primary == "generation/bleu"
    assert results.scored == results.models == 2 and results.problems == {}
    assert results.items == {"generation": 3, "say": 200, "choose": 200, "agreement": 50}
    assert results.backends == {"generation": {"hf": ["teacher", name]}, "lm-eval": {"hf": ["teacher", name]}}
    assert study.row("teacher").steps == ["generation", "lm-eval"]


def test_a_metric_is_lower_is_better_where_the_file_or_its_name_says(study: Folder) -> None:
    name = study.entry("student", "reverse", 0)
    study.score(name, 1.0, tasks={"web": {"word_perplexity": 9.0, "bits_per_byte": 1.1}, "own": {"loss": 2.0}})
    study.score("none-s0", 1.0, tasks={"own": {"loss": 2.0}}, higher_is_better={"own": {"loss": False}})
    better = {metric.name: metric.higher_is_better for metric in study.results().metrics}
    assert not (better["web/word_perplexity"] or better["web/bits_per_byte"] or better["own/loss"])
    assert better["say/bleu"] and better["choose/acc"]


# ---------------------------------------------------------------------------------------------------------------------
# What is not there


def test_a_failed_evaluation_is_no_number(study: Folder) -> None:
    study.score("forward-s1", None, error="OutOfMemoryError: no room for 3 GiB")
    results = study.results()
    row = study.row("forward")
    assert row.cells["say/bleu"] == Cell(70.0, None, 1, [70.0], [0])
    assert row.missing == {"lm-eval": ["failed: OutOfMemoryError: no room for 3 GiB"]}
    assert results.problems == {"forward-s1": "lm-eval failed: OutOfMemoryError: no room for 3 GiB"}
    assert (results.scored, results.models) == (5, 6)


def test_one_failed_step_leaves_the_others_numbers(tmp_path: Path) -> None:
    study = Folder(tmp_path)
    name = study.entry("student", "forward", 0, steps=ALL_STEPS)
    study.score(name, 70.0)
    study.generated(name, None, error="vLLM did not start")
    results = study.results()
    assert results.problems == {name: "generation failed: vLLM did not start; agreement not yet"}
    assert set(study.row("forward").cells) == {"say/bleu", "choose/acc"}
    assert results.scored == 0


@pytest.mark.parametrize("text", ['{"name": "none-s0", "tasks": {"say": {"bl', ""])
def test_a_half_written_evaluation_is_no_number(study: Folder, text: str) -> None:
    study.write("evaluations/none-s0.json", text)
    assert study.results().problems == {"none-s0": "lm-eval unreadable result file"}


@pytest.mark.parametrize("value", [None, nan, "N/A", True])
def test_a_metric_without_value_is_no_number(study: Folder, value: float | None) -> None:
    study.score("teacher", value)
    assert "say/bleu" not in study.row("teacher").cells and "choose/acc" in study.row("teacher").cells
    json.dumps(study.results().to_json(), allow_nan=False)


def test_a_study_not_begun(tmp_path: Path) -> None:
    empty = Folder(tmp_path)
    empty.entry("teacher", None, None, "teacher")
    empty.entry("student", "forward", 0)
    results = empty.results()
    assert results.problems == {"teacher": "lm-eval not yet", "forward-s0": "lm-eval not yet"}
    assert (results.metrics, results.primary, results.comparisons, results.curves) == ([], None, [], {})


def test_a_folder_without_a_study_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no study here"):
        gather(tmp_path)


# ---------------------------------------------------------------------------------------------------------------------
# Training runs and texts


def test_maps_cost_and_provenance(study: Folder) -> None:
    study.write("teacher/model/config.json", {"num_hidden_layers": 12})
    made = {"hardware": {"cpu": "A", "cores": 2, "gpus": []}, "commit": "abc123", "versions": {"torch": "2.13.0"}}
    summary = {"steps": 60, "seconds": 33.4, "tokens": 54321, "tokens_per_second": 1626.4, "memory_gib": 0.512, **made}
    for strategy, pairs in (("forward", [[0, 3], [1, 7], [2, 11]]), ("none", [])):
        for seed in (0, 1):
            run = f"students/{strategy}-s{seed}"
            study.write(f"{run}/summary.json", {**summary, "pairs": pairs, "world_size": 2})
            study.write(f"{run}/model/config.json", {"num_hidden_layers": 3})
    study.write("teacher/metrics.jsonl", '{"step": 10}\n{"step": 20}\n{"st')
    results = study.results()
    pairs = [[0, 3], [1, 7], [2, 11]]
    assert results.maps == [
        LayerMap("forward", ["forward-s0", "forward-s1"], pairs, student_blocks=3, teacher_blocks=12)
    ]
    runs = {run.name: run for run in results.runs}
    assert (runs["teacher"].state, runs["teacher"].last_step) == ("unfinished", 20)
    assert runs["forward-s1"].state == "done" and runs["forward-s1"].tokens_per_second == 1626.4
    assert results.hardware == made["hardware"] and results.commit == "abc123"
    assert results.versions == {**VERSIONS, "torch": "2.13.0"}


def test_random_maps_are_one_per_seed(study: Folder) -> None:
    for seed, pairs in ((0, [[0, 7], [1, 3]]), (1, [[0, 3], [1, 7]])):
        study.write(f"students/forward-s{seed}/summary.json", {"pairs": pairs})
    maps = study.results().maps
    assert [(m.runs, m.pairs) for m in maps] == [
        (["forward-s0"], [[0, 7], [1, 3]]),
        (["forward-s1"], [[0, 3], [1, 7]]),
    ]
    assert maps[0].teacher_blocks is None


def test_curves_are_the_logged_lines_thinned_with_both_ends(study: Folder) -> None:
    short = [{"step": n, "loss": 3.0 / n, "ce": 1.0, "kl": nan, "hidden": 0.5, "pairs": {"0<3": 0.5}} for n in (1, 2)]
    study.lines("students/none-s0/metrics.jsonl", short)
    study.lines("students/none-s1/metrics.jsonl", [{**short[0], "step": n} for n in range(1, 1001)])
    curves = study.results().curves
    assert curves["none-s0"].to_json() == [{**line, "kl": None} for line in short]
    steps = [line.step for line in curves["none-s1"].lines]
    assert len(steps) == CURVE_POINTS and (steps[0], steps[-1]) == (1, 1000) and steps == sorted(set(steps))


def test_curves_hold_what_a_run_steers_and_reports(study: Folder) -> None:
    plain: dict[str, Any] = {"step": 1, "loss": 1.0, "ce": 1.0, "kl": 0.5, "hidden": 0.5, "pairs": {"0<3": 0.5}}
    norms = {"ce": 0.25, "kl": nan, "hidden": 0.5, "pairs": {"0<3": 0.5}, "stones": {"0<3": {"ce": 0.125}}}
    norms |= {"distances": {"mse": 0.0625, "cka": 2.0}, "divergences": {"tvd": 1.0, "forward_kl": inf}}
    steered = {**plain, "step": 2, "temperature": 1.5, "weights": {"kl": 0.75}, "norms": norms, "stones": 3.0}
    study.lines("students/none-s0/metrics.jsonl", [plain, steered])
    first, second = study.results().curves["none-s0"].to_json()
    assert first == plain
    assert {key: value for key, value in second.items() if key not in plain} == {
        "temperature": 1.5,
        "stones": 3.0,
        "weight of kl": 0.75,
        "norm of ce": 0.25,
        "norm of kl": None,
        "norm of hidden": 0.5,
        "norm of mse": 0.0625,
        "norm of cka": 2.0,
        "norm of tvd": 1.0,
        "norm of forward_kl": None,
        "norm of 0<3 ce": 0.125,
    }


def test_a_learned_map_is_in_the_log_and_no_map_of_pairs(study: Folder) -> None:
    """Of 12 pairs two are compared; the distances are known by student block, and no line is drawn for each pair."""
    pairs = [[j, i] for j in range(2) for i in range(6)]
    study.write("students/none-s0/summary.json", {"pairs": pairs, "strategy": "learned"})
    learned = {"0": {"0": 0.25, "1": 0.75}, "1": {"0": 0.5, "1": 0.5}}
    line = {"step": 1, "loss": 1.0, "ce": 1.0, "kl": 0.5, "hidden": 0.5, "pairs": {"0<mix": 0.25, "1<mix": 0.75}}
    study.lines("students/none-s0/metrics.jsonl", [{**line, "learned_map": learned}])
    results = study.results()
    curve = results.curves["none-s0"]
    assert curve.to_json() == [{**line, "learned_map": learned}] and curve.lines[0].learned == learned
    assert curve.blocks == {"0<mix": 0, "1<mix": 1}
    assert "none-s0" not in {run for layer_map in results.maps for run in layer_map.runs}


def test_a_part_that_was_not_computed_is_unknown_and_one_without_a_weight_is_marked(study: Folder) -> None:
    lines = [{"step": 1, "loss": 0.5, "kl": 0.5, "not_in_loss": {"ce": 3.0}}, {"step": 2, "loss": 3.0, "ce": 3.0}]
    study.lines("students/none-s0/metrics.jsonl", lines)
    first, second = study.results().curves["none-s0"].lines
    assert first.parts == {"loss": 0.5, "ce": 3.0, "kl": 0.5, "hidden": None} and first.not_in_loss == ("ce",)
    assert second.parts == {"loss": 3.0, "ce": 3.0, "kl": None, "hidden": None} and second.not_in_loss == ()


def test_generations_side_by_side(tmp_path: Path) -> None:
    study = Folder(tmp_path)
    for seed in (0, 1, 2):
        name = study.entry("student", "forward", seed, steps=("generation",))
        study.generated(name, {"bleu": 1.0}, error="no room" if seed == 2 else None)
        lines = [
            {"item": n, "prompt": f"p{n}", "references": [f"r{n}"], "text": f"{name} {n}", "scores": {"slots": n}}
            for n in range(300)
        ]
        study.lines(f"generations/{name}.jsonl", lines[: 150 if seed else 300])
    found = generations(tmp_path)
    assert len(found) == 200
    outputs = {"forward-s0": "forward-s0 3", "forward-s1": "forward-s1 3"}
    assert found[3] == GeneratedItem(3, "p3", ["r3"], outputs, {"forward-s0": {"slots": 3}, "forward-s1": {"slots": 3}})
    assert list(found[150].outputs) == ["forward-s0"]


def test_a_failed_task_costs_the_others_nothing(tmp_path: Path) -> None:
    study = Folder(tmp_path)
    name = study.entry("student", "forward", 0)
    partial = {"tasks": {"good": {"acc": 0.5}}, "error": "bad: no data", "versions": {}, "items": {"good": 4}}
    study.write(f"evaluations/{name}.json", partial)
    results = gather(tmp_path)
    assert results.rows[0].cells["good/acc"].values == [0.5]
    assert results.problems == {name: "lm-eval failed: bad: no data"} and results.scored == 0
