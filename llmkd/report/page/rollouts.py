"""The report page's section about texts that students wrote while they were trained."""

from __future__ import annotations

from llmkd.report.page import html
from llmkd.report.page.training import Groups, Lines, curves, logged
from llmkd.report.results import Results
from llmkd.report.rollouts import (
    HEAD,
    MEASURES,
    in_words,
    own_kl,
    rollout_numbers,
    rollout_table,
    shown_runs,
    side_by_side,
)
from llmkd.report.runs import Curve, LogLine

OWN, DATA = "own text", "data"


def rollout_section(results: Results) -> list[html.Content]:
    """Curves by round, the divergence on own texts beside that on the data, a line per run, and texts side by side; nothing where none were
    written."""
    if not results.rollouts:
        return []
    groups = _groups(results, {name: run.lines for name, run in results.rollouts.items()})
    longest = max(run.rounds for run in results.rollouts.values())
    figures = []
    for measure, words in MEASURES.items():
        lines = logged(groups, lambda _, line, measure=measure: line.parts.get(measure))
        if lines:
            picture = curves(f"rollouts-{measure}", measure, lines, list(groups), longest, "Written texts")
            figures.append(html.figure(picture, measure, f", {words}"))
    head, *rows = rollout_table(results.rollouts)
    numbers = [[name, *rollout_numbers(run)] for name, run in results.rollouts.items()]
    return [
        html.paragraph(in_words(results.rollouts)),
        html.pictures(figures, "three"),
        *_own_and_data(results),
        html.table("Written texts of every run", head, rows, "sortable"),
        html.paragraph(html.csv_link("rollouts", HEAD, numbers), "small"),
        *_texts(results),
    ]


def _groups(results: Results, lines: dict[str, list[LogLine]]) -> Groups:
    """Lines by strategy and run."""
    groups: Groups = {}
    for run in results.runs:
        if run.strategy is not None and run.name in lines:
            groups.setdefault(run.strategy, {})[run.name] = Curve(lines[run.name])
    return groups


def _own_and_data(results: Results) -> list[html.Content]:
    """A picture per student: how far it is from the teacher on its own texts and on the data's, where both were measured."""
    measures = {name: kl for name, kl in own_kl(results).items() if name in results.validations}
    own, data = (
        logged(_groups(results, lines), lambda _, line: line.parts.get("kl"))
        for lines in (
            {name: results.curves[name].lines for name in measures if name in results.curves},
            {name: results.validations[name].lines for name in measures},
        )
    )
    figures = []
    for place, strategy in enumerate(name for name in own if name in data):
        lines: Lines = {OWN: own[strategy], DATA: data[strategy]}
        longest = max(len(results.curves[name].lines) for name in own[strategy])
        picture = curves(f"own-kl-{place}", "divergence", lines, list(lines), longest, strategy)
        kinds = ", ".join(dict.fromkeys(measures[name] for name in own[strategy]))
        figures.append(html.figure(picture, strategy, f": {OWN}: {kinds}; {DATA}: forward_kl at temperature 1"))
    if not figures:
        return []
    words = (
        f"How far each student is from the teacher: on what it has just written ({OWN}: the training's log) and on held-out rows "
        f"({DATA}: the validations). The two compare as numbers where both are the same divergence at the same temperature."
    )
    return [html.tag("h3", "On its own text and on the data"), html.paragraph(words), html.pictures(figures)]


def _texts(results: Results) -> list[html.Content]:
    parts: list[html.Content] = []
    for name, run in shown_runs(results).items():
        head, *rows = side_by_side(run)
        parts.append(html.table(f"What {name} wrote after the same prompts", head, rows, "samples"))
    return [html.tag("h3", "The same prompts through training"), *parts] if parts else []
