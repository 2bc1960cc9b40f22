"""What training cost, in words: what a step of each student took, and whether the students differ by more than the times themselves do."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median

from llmkd.report.runs import StepTimes, TrainingRun
from llmkd.text import amount, listed

CPU_SECONDS, SECONDS = "CPU seconds of rank 0", "Seconds"
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


@dataclass(frozen=True)
class Compared:
    """The students' steps by one clock, and how far the same work lies apart by it."""

    unit: str
    students: dict[str, float]
    """Strategy -> the median over its runs."""
    within: float
    """The middle half of a run's steps, the median over runs."""
    between: float | None
    """The most that runs of one student lie apart; None where each has one run."""
    drift: float | None
    """How many times as long the same CPU seconds took in one run as in another; None of CPU seconds, and where they are not known."""

    @property
    def apart(self) -> float:
        """How far the students lie apart."""
        return max(self.students.values()) - min(self.students.values())

    @property
    def says_nothing(self) -> bool:
        """Whether the students differ by no more than the same work does."""
        drifted = 0.0 if self.drift is None else (self.drift - 1) * min(self.students.values())
        return len(self.students) > 1 and max(self.within, self.between or 0.0, drifted) >= self.apart


def compared(runs: Sequence[TrainingRun]) -> list[Compared]:
    """By the clocks that the students' runs have: first CPU seconds, which other work on the machine does not lengthen."""
    found = []
    for unit, kind in ((CPU_SECONDS, cpu), (SECONDS, wall)):
        if times := of_students(runs, kind):
            medians = [[of_run for of_run, _ in spans.values()] for spans in times.values()]
            repeated = any(len(of_runs) > 1 for of_runs in medians)
            students = {strategy: median(of_runs) for strategy, of_runs in zip(times, medians, strict=True)}
            within = median(high - low for spans in times.values() for _, (low, high) in spans.values())
            between = max(max(of_runs) - min(of_runs) for of_runs in medians) if repeated else None
            found.append(Compared(unit, students, within, between, _drift(runs) if kind is wall else None))
    return found


def _drift(runs: Sequence[TrainingRun]) -> float | None:
    steps = [run.step for run in runs if run.strategy is not None and run.step is not None]
    slowness = [step.median_seconds / step.cpu_seconds for step in steps if step.cpu_seconds]
    return max(slowness) / min(slowness) if len(slowness) == len(steps) > 1 else None


def cost_in_words(runs: Sequence[TrainingRun]) -> str:
    """How far the students' steps lie apart, beside how far the times of the same work do; nothing before a student is trained."""
    sentences = [_in_words(times) for times in compared(runs)]
    unknown = [run.name for run in runs if run.strategy is not None and run.state == "done" and run.step is None]
    if unknown:
        sentences.append(f"The time of a step was not recorded for {listed(unknown)}.")
    if (most := max((run.students_in_turn for run in runs), default=1)) > 1:
        sentences.append(
            f"Up to {most} students took turns in one process: a student's time is that of its own turns, with an equal part of "
            "the teacher's passes, and its peak memory is that of all."
        )
    return " ".join(sentences)


def _in_words(times: Compared) -> str:
    spread = f"the middle half of a run's steps spans {amount(times.within)}"
    if times.between is not None:
        spread += f", and runs of one student lie up to {amount(times.between)} apart"
    ordered = sorted(times.students, key=times.students.__getitem__)
    ends = [f"{amount(times.students[strategy])} ({strategy})" for strategy in (ordered[0], ordered[-1])]
    if len(times.students) == 1:
        return f"{times.unit} of a step: {ends[0]}; {spread}."
    if times.drift is not None:
        spread += f", and the same CPU seconds took up to {amount(times.drift)} times as long in one run as in another"
    text = f"{times.unit} of a step: from {ends[0]} to {ends[1]}, {amount(times.apart)} apart; {spread}: "
    if times.says_nothing:
        text += "this spread is larger than the differences between the students, so that they say nothing about what a student costs."
        return text + (" The CPU seconds are what to compare." if times.drift is not None else "")
    text += "this spread is smaller than the difference between the students."
    if times.between is None and times.drift is None and times.unit == SECONDS:
        text += " With one run of each, it is not known how the machine's own speed changed from run to run."
    return text
