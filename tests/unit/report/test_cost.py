"""What the report says of a step's cost: the machine's noise is not taken for a student's cost."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from llmkd.report.cost import cost_in_words
from llmkd.report.page.cost import cost_section
from llmkd.report.results import StepTimes, TrainingRun
from llmkd.report.write import report
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
    words = cost_in_words([run(None, 0, 9.0, 4.0), run("ce_only", 0, 0.2, 0.01), run("random", 0, 0.4, 0.01)])
    assert words.endswith("spans 0.02: this spread is smaller than the difference between the students.")


def test_cpu_seconds_have_a_sentence_of_their_own() -> None:
    """The wall clock was four times slower, the work was the same."""
    cpu = {"cpu_seconds": 0.1, "cpu_quartiles": (0.09, 0.12)}
    words = cost_in_words([run("ce_only", 0, 0.2, 0.01, **cpu), run("random", 0, 0.8, 0.01, **cpu)])
    seconds, of_cpu = words.split("CPU seconds of rank 0 of a step: ")
    assert "smaller than the difference" in seconds
    assert (
        of_cpu.startswith("from 0.1 (ce_only) to 0.1 (random), 0 apart; ") and "larger than the differences" in of_cpu
    )


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
