"""What training cost, in words: what a step of each student took, and whether the students differ by more than the times themselves do."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from statistics import median

from llmkd.report.results import StepTimes, TrainingRun
from llmkd.text import amount, listed

Span = tuple[float, tuple[float, float]]
"""A run's median step and the quartiles of its steps."""


def wall(step: StepTimes) -> Span:
    """Seconds."""
    return step.median_seconds, step.quartiles


def cpu(step: StepTimes) -> Span | None:
    """CPU seconds of rank 0, known where the students were trained on a CPU."""
    return None if step.cpu_seconds is None or step.cpu_quartiles is None else (step.cpu_seconds, step.cpu_quartiles)


def of_students(runs: Sequence[TrainingRun], kind: Callable[[StepTimes], Span | None]) -> dict[str, dict[str, Span]]:
    """Strategy -> run -> its steps' times, for the runs of students that have them."""
    found: dict[str, dict[str, Span]] = {}
    for run in runs:
        if run.strategy is not None and run.step is not None and (span := kind(run.step)) is not None:
            found.setdefault(run.strategy, {})[run.name] = span
    return found


def cost_in_words(runs: Sequence[TrainingRun]) -> str:
    """How far the students' steps lie apart, beside how far the times of one student do; nothing before a student is trained."""
    kinds = {"Seconds": wall, "CPU seconds of rank 0": cpu}
    sentences = [_compared(unit, times) for unit, kind in kinds.items() if (times := of_students(runs, kind))]
    unknown = [run.name for run in runs if run.strategy is not None and run.state == "done" and run.step is None]
    if unknown:
        sentences.append(f"The time of a step was not recorded for {listed(unknown)}.")
    return " ".join(sentences)


def _compared(unit: str, times: dict[str, dict[str, Span]]) -> str:
    students = {strategy: median(of_run for of_run, _ in spans.values()) for strategy, spans in times.items()}
    within = median(high - low for spans in times.values() for _, (low, high) in spans.values())
    medians = [[of_run for of_run, _ in spans.values()] for spans in times.values()]
    between = max(max(of_runs) - min(of_runs) for of_runs in medians)
    spread = f"the middle half of a run's steps spans {amount(within)}"
    if any(len(of_runs) > 1 for of_runs in medians):
        spread += f", and runs of one student lie up to {amount(between)} apart"
    ordered = sorted(students, key=students.__getitem__)
    low, high = ordered[0], ordered[-1]
    if len(students) == 1:
        return f"{unit} of a step: {amount(students[low])} ({low}); {spread}."
    apart = students[high] - students[low]
    text = f"{unit} of a step: from {amount(students[low])} ({low}) to {amount(students[high])} ({high}), {amount(apart)} apart; {spread}: "
    if max(within, between) >= apart:
        return (
            text
            + "this spread is larger than the differences between the students, so that they say nothing about what a student costs."
        )
    return text + "this spread is smaller than the difference between the students."
