"""Texts that students wrote while they were trained: a line per run, and what they wrote after the same prompts, side by side."""

from __future__ import annotations

from collections.abc import Mapping

from llmkd.report.results import Results
from llmkd.report.runs import RunRollouts
from llmkd.text import ABSENT, Table, amount

HEADING = "Texts written during training"
BEFORE = "Texts written before training"
MEASURES = {
    "length": "mean tokens of a text",
    "ended": "share of texts that ended by themselves",
    "repetition": "share of a text's sequences of four tokens that stand in it before",
}
"""What is drawn of the rounds, with its words."""
HEAD = [
    "run",
    "rounds",
    "texts",
    "tokens",
    "seconds of writing",
    "writing, % of the time",
    "teacher, % of the time",
    "student, % of the time",
    "handing weights over, % of writing",
]


def rollout_numbers(run: RunRollouts) -> list[int | float | None]:
    """A run's line of `HEAD` after its name; no time before it has ended."""
    parts = (run.seconds, run.teacher_seconds, run.student_seconds)
    shares = [_percent(part, run.of_seconds) for part in parts]
    return [run.rounds, run.texts, run.tokens, run.seconds, *shares, _percent(run.weights_seconds, run.seconds)]


def _percent(part: float | None, whole: float | None) -> float | None:
    """A part of a whole; None where either is not known."""
    return None if part is None or not whole else 100 * part / whole


def rollout_table(rollouts: Mapping[str, RunRollouts]) -> Table:
    """A line per run, with numbers as people read them."""
    return [HEAD, *([name, *map(amount, rollout_numbers(run))] for name, run in rollouts.items())]


def of_teacher(results: Results) -> str:
    """What the teacher wrote before training, in a sentence each; empty where it wrote nothing."""
    return " ".join(
        f"Before training the teacher wrote {amount(wrote.texts)} texts of {amount(wrote.tokens)} tokens in {amount(wrote.seconds)} s: "
        f"{amount(wrote.unended)} did not end within their tokens, {amount(wrote.empty)} were empty, "
        f"{amount(wrote.left_out)} were left out."
        for wrote in results.teachers_texts
    )


def own_kl(results: Results) -> dict[str, str]:
    """The students whose log has a divergence on their own texts alone: run -> which."""
    return {name: run.own_kl for name, run in results.rollouts.items() if run.own_kl is not None}


def in_words(rollouts: Mapping[str, RunRollouts]) -> str:
    """How the numbers are to be read."""
    words = (
        "A round is what a student wrote at one time, for the steps until the next round. Times are those of a run's last part, known when "
        "it has ended; what is left of its time beside writing, teacher and student was validation."
    )
    if any(run.shown for run in rollouts.values()):
        words += (
            " A few prompts were continued again and again, by the same random numbers, so that the student's weights alone make the "
            "difference. Nothing is trained on these texts, and no number counts them."
        )
    return words


def shown_runs(results: Results) -> dict[str, RunRollouts]:
    """The runs whose texts are shown, by name: each student's first that has any."""
    found: dict[str, tuple[str, RunRollouts]] = {}
    for run in results.runs:
        written = results.rollouts.get(run.name)
        if run.strategy is not None and written is not None and written.shown:
            found.setdefault(run.strategy, (run.name, written))
    return dict(found.values())


def side_by_side(run: RunRollouts) -> Table:
    """A line per prompt: what was written after it before each of some steps."""
    head = ["prompt", *(f"before step {shown.step:,}" for shown in run.shown)]
    columns = [shown.prompts if place == 0 else shown.texts for place, shown in enumerate([run.shown[0], *run.shown])]
    return [head, *([cell or ABSENT for cell in line] for line in zip(*columns, strict=True))]
