"""The report page's part about validation while training: what was measured by step, and which steps were exported."""

from __future__ import annotations

from llmkd.report.page import html
from llmkd.report.page.training import Groups, curves, logged
from llmkd.report.results import Results
from llmkd.report.runs import Curve
from llmkd.report.validation import (
    HEAD,
    exported,
    measured,
    of_students,
    rule_in_words,
    validation_numbers,
    validation_table,
)


def validation_part(results: Results) -> list[html.Content]:
    """The rule, a curve per measure with the exported steps marked, and a line per run; nothing where no student was validated."""
    validations = of_students(results)
    if not validations:
        return []
    groups: Groups = {}
    for run in results.runs:
        if run.strategy is not None and run.name in validations:
            groups.setdefault(run.strategy, {})[run.name] = Curve(validations[run.name].lines)
    longest = max(len(run.lines) for run in validations.values())
    chosen = {name: exported(run) for name, run in validations.items() if run.rule is not None}
    figures = []
    for measure, words in measured(list(validations.values())).items():
        lines = logged(groups, lambda _, line, measure=measure: line.parts.get(measure))
        marks = {
            run: (line.step, value) for run, line in chosen.items() if (value := line.parts.get(measure)) is not None
        }
        name = f"validation-{measure}"
        picture = curves(name, measure, lines, list(groups), longest, "Validation", marks)
        figures.append(html.figure(picture, f"validation: {measure}", f", {words}"))
    head, *rows = validation_table(validations)
    numbers = [[name, *validation_numbers(run)] for name, run in validations.items()]
    return [
        html.tag("h3", "Validation while training"),
        html.paragraph(f"{rule_in_words(validations)} Rings mark the steps that were exported."),
        html.pictures(figures),
        html.details(
            f"All {len(rows)} runs", html.table("Validation of every exported student", head, rows, "sortable")
        ),
        html.paragraph(html.csv_link("validation", HEAD, numbers), "small"),
    ]
