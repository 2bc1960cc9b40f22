"""What the report says of a step's cost: the machine's noise is not taken for a student's cost."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from llmkd.report.cost import compared, cost_in_words
from llmkd.report.page import html
from llmkd.report.page.cost import WITHIN, cost_section
from llmkd.report.runs import StepTimes, TrainingRun
from llmkd.report.write import report
from tests.unit.report.page_reader import Page
from tests.unit.report.study_folder import Folder, small_study


def run(strategy: str | None, seed: int, seconds: float, half: float, **others: Any) -> TrainingRun:
    """A finished run whose steps lie `half` to either side of their median."""
    step = StepTimes(37, seconds, (seconds - half, seconds + half), **others)
    return TrainingRun(f"{strategy}-s{seed}", strategy, seed, "done", 40, step=step)


def test_a_spread_within_runs_larger_than_the_difference_is_told() -> None:
    words = cost_in_words([run("ce_only", 0, 0.2, 0.05), run("random", 0, 0.26, 0.05)])
    assert words.startswith("Seconds of a step: from 0.2 (ce_only) to 0.26 (random), 0.06 apart; ")
    assert "the middle half of a run's steps spans 0.1: this spread is larger than the differences" in words
    assert "runs of one student" not in words


def test_runs_of_one_student_that_lie_apart_are_a_spread_too() -> None:
    """A machine that is busy for a while slows whole runs: their own steps are alike."""
    runs = [run("ce_only", 0, 0.2, 0.001), run("random", 0, 0.3, 0.001), run("random", 1, 0.9, 0.001)]
    words = cost_in_words(runs)
    assert (
        "0.4 apart; the middle half of a run's steps spans 0.002, and runs of one student lie up to 0.6 apart" in words
    )
    assert "larger than the differences" in words


def test_a_difference_above_the_spread_is_told_and_the_teacher_is_no_student() -> None:
    runs = [
        run(None, 0, 9.0, 4.0),
        *(run(name, seed, at, 0.01) for name, at in (("a", 0.2), ("b", 0.4)) for seed in (0, 1)),
    ]
    words = cost_in_words(runs)
    assert words.endswith("up to 0 apart: this spread is smaller than the difference between the students.")


def test_one_run_of_each_does_not_tell_how_the_machine_changed() -> None:
    words = cost_in_words([run("ce_only", 0, 0.2, 0.01), run("random", 0, 0.4, 0.01)])
    assert words.endswith(
        "students. With one run of each, it is not known how the machine's own speed changed from run to run."
    )


def on_cpu(seconds: float, low: float, high: float) -> dict[str, Any]:
    return {"cpu_seconds": seconds, "cpu_quartiles": (low, high)}


def test_a_machine_that_was_slower_in_one_run_is_not_a_students_cost() -> None:
    """Each run's own steps are alike, and so is the work; the wall clock was four times slower in one."""
    cpu = on_cpu(0.1, 0.09, 0.12)
    words = cost_in_words([run("ce_only", 0, 0.2, 0.01, **cpu), run("random", 0, 0.8, 0.01, **cpu)])
    of_cpu, seconds = words.split(" Seconds of a step: ")
    assert of_cpu.startswith("CPU seconds of rank 0 of a step: from 0.1 (ce_only) to 0.1 (random), 0 apart; ")
    assert "larger than the differences" in of_cpu
    assert "the same CPU seconds took up to 4 times as long in one run as in another: this spread is larger" in seconds
    assert seconds.endswith("The CPU seconds are what to compare.")


def test_cpu_seconds_tell_students_apart_where_the_wall_clock_does_not() -> None:
    runs = [run("a", 0, 0.3, 0.01, **on_cpu(0.1, 0.099, 0.101)), run("b", 0, 0.4, 0.01, **on_cpu(0.2, 0.199, 0.201))]
    of_cpu, seconds = (times.says_nothing for times in compared(runs))
    assert not of_cpu and seconds
    steady = [run("a", 0, 0.2, 0.01, **on_cpu(0.1, 0.099, 0.101)), run("b", 0, 0.4, 0.01, **on_cpu(0.2, 0.199, 0.201))]
    assert not any(times.says_nothing for times in compared(steady))


def test_the_pictures_say_which_of_them_show_nothing() -> None:
    runs = [run("a", 0, 0.3, 0.01, **on_cpu(0.1, 0.099, 0.101)), run("b", 0, 0.4, 0.01, **on_cpu(0.2, 0.199, 0.201))]
    page = Page(html.join(cost_section(runs), ""))
    assert [a["download"] for a, _ in page.all("a", "csv")][:2] == ["cost-cpu-step.csv", "cost-step.csv"]
    of_cpu, of_wall = (text for _, text in page.all("svg"))
    assert WITHIN not in of_cpu and WITHIN in of_wall


def test_one_student_is_compared_with_none() -> None:
    assert cost_in_words([run("forward", 0, 0.2, 0.01)]) == (
        "Seconds of a step: 0.2 (forward); the middle half of a run's steps spans 0.02."
    )


@pytest.mark.parametrize("step", ({}, {"step": None}))
def test_a_summary_without_a_steps_time_is_read(tmp_path: Path, step: dict[str, None]) -> None:
    """It was written before steps were timed, or of a run that was too short."""
    study = small_study(tmp_path)
    summary = {"steps": 60, "seconds": 33.4, "tokens": 54321, "tokens_per_second": 1626.4, "memory_gib": 0.512, **step}
    study.write("students/forward-s0/summary.json", summary)
    results = study.results()
    (done,) = [found for found in results.runs if found.state == "done"]
    assert done.step is None and done.seconds == 33.4
    assert cost_in_words(results.runs) == "The time of a step was not recorded for forward-s0."
    page = "".join(map(str, cost_section(results.runs)))
    assert "peak memory" in page and "cost-step" not in page and "1,626" in page


def test_the_times_of_steps_are_those_of_the_summary(tmp_path: Path) -> None:
    study: Folder = small_study(tmp_path)
    times = {"steps": 37, "median_seconds": 0.5, "quartiles": [0.4, 0.7]}
    study.write("students/forward-s0/summary.json", {"steps": 40, "step": times})
    (done,) = [found for found in study.results().runs if found.state == "done"]
    assert done.step is not None and (done.step.median_seconds, list(done.step.quartiles)) == (0.5, [0.4, 0.7])
    report(tmp_path)
    assert "| 0.5 | 0.3 |  |  |" in (tmp_path / "report.md").read_text()
