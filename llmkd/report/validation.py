"""How a study's students were validated while they were trained, and which of their steps were exported: in words, and a line per run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from llmkd.report.results import Results
from llmkd.report.runs import LogLine, Rule, RunValidations
from llmkd.text import Table, amount

MEASURES = {
    "ce": "cross-entropy with the data",
    "kl": "forward KL from the teacher, temperature 1",
    "agreement": "share of tokens where the teacher's likeliest is the student's",
}
"""What is drawn of a validation, with its words."""
HEAD = ["run", "exported step", "of", *MEASURES]


def of_students(results: Results) -> dict[str, RunValidations]:
    """The validations of the students, by run; the teacher's own training is left out."""
    names = [run.name for run in results.runs if run.strategy is not None]
    return {name: results.validations[name] for name in names if name in results.validations}


def rule_in_words(validations: Mapping[str, RunValidations]) -> str:
    """The rule by which students were validated and chosen; one sentence for all where it is the same, else one for each rule."""
    names: dict[Rule, list[str]] = {}
    for name, run in validations.items():
        if run.rule is not None:
            names.setdefault(run.rule, []).append(name)
    if not names:
        return "The rule is written when the first run has ended."
    if len(names) == 1:
        (rule,) = names
        return f"The same for all students: {_words(rule)}"
    rules = " ".join(f"{', '.join(runs)}: {_words(rule)}" for rule, runs in names.items())
    return f"Not one rule for all students. {rules}"


def _words(rule: Rule) -> str:
    """A rule as one sentence."""
    when = "after every step" if rule.every == 1 else f"every {rule.every} steps and after the last"
    words = f"validated on {rule.rows} held-out rows {when}; exported is "
    if rule.keep == "best":
        most = "highest" if rule.by == "validation/agreement" else "lowest"
        words += f"the student of the step with the {most} {rule.by}"
    else:
        words += "the student of the last step"
    if rule.patience is not None:
        words += f"; a run stops after {rule.patience} validations that are not its best by {rule.by}"
    return words + "."


def exported(run: RunValidations) -> LogLine:
    """The validation of the student that is exported, or of the last one so far."""
    return next((line for line in run.lines if line.step == run.kept), run.lines[-1])


def validation_numbers(run: RunValidations) -> list[int | float | None]:
    """A run's line of `HEAD` after its name; no step is exported before it has ended."""
    line = exported(run)
    step = None if run.rule is None else line.step
    return [step, run.lines[-1].step, *(line.parts.get(measure) for measure in MEASURES)]


def validation_table(validations: Mapping[str, RunValidations]) -> Table:
    """A line per run, with numbers as people read them."""
    return [HEAD, *([name, *map(amount, validation_numbers(run))] for name, run in validations.items())]


def measured(runs: Sequence[RunValidations]) -> dict[str, str]:
    """The measures that any of these runs has."""
    known = {name for run in runs for line in run.lines for name, value in line.parts.items() if value is not None}
    return {name: words for name, words in MEASURES.items() if name in known}
