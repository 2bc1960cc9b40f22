"""The report page's sections about training: loss curves, hidden distances and cost."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

from markupsafe import Markup

from llmkd.report.page import html, training_plots
from llmkd.report.page.training_plots import Groups
from llmkd.report.results import Curve, LogLine, Results, TrainingRun
from llmkd.report.tables import COST_HEAD, cost_table, costs, run_state
from llmkd.report.training_runs import thinned

LOG_LINES = 40  # of one run's curve that the page draws, evenly spaced
MOST_BLOCKS = 12  # student blocks whose distances are drawn step by step
PARTS = {
    "ce": "cross-entropy with the data",
    "kl": "divergence from the teacher's distribution",
    "hidden": "distance between paired states",
}
SCHEDULED = {
    "temperature": "of both distributions",
    "stones": "the stepping stones' part of the loss",
    "weight of": "in the loss",
    "norm of": "gradient of this part of the loss where it enters the student's states",
}
"""What some runs log besides, by the beginning of its name."""
COSTS: dict[str, tuple[str, Callable[[TrainingRun], float | None]]] = {
    "tokens_per_second": ("tokens per second", lambda run: run.tokens_per_second),
    "seconds": ("seconds of training", lambda run: run.seconds),
    "memory_gib": ("peak memory per rank, GiB", lambda run: run.memory_gib),
}


def training_section(results: Results) -> list[html.Content]:
    """The loss parts by step, then the hidden distance by student block."""
    groups = _curves(results)
    if not groups:
        return [html.missing("No student has logged a training step yet.")]
    longest = max(len(curve.lines) for runs in groups.values() for curve in runs.values())
    figures = []
    for part, words in {**PARTS, **_scheduled(groups)}.items():
        runs = _with_part(groups, part)
        if runs:
            name = f"curve-{re.sub('[^a-z0-9]+', '-', part)}"
            drawn = training_plots.curves(name, part, runs, list(groups), longest)
            figures.append(html.figure(drawn, html.bold(part, f", {words}")))
    paired = _kept(groups, lambda curve, line: bool(training_plots.by_block(curve, line)))
    if paired:
        end = training_plots.distances_at_end("distance-end", paired, list(groups))
        figures.append(html.figure(end, html.bold("hidden distance", " of each student block, last logged step")))
    text = "Thick lines are means over seeds, thin ones the single seeds."
    if longest > LOG_LINES:
        text += f" Of the {longest} logged steps {LOG_LINES} are drawn, evenly spaced, the last among them."
    parts = [html.paragraph(text), html.pictures(figures)]
    return [*parts, *(_by_step(paired) if paired else []), _without_distances(groups, bool(paired))]


def _without_distances(groups: Groups, drawn: bool) -> html.Content:
    """Which runs' distances are not drawn by block, if any are left out."""
    curves = {name: curve for runs in groups.values() for name, curve in runs.items()}
    unknown = [name for name, curve in curves.items() if not curve.blocks and any(line.pairs for line in curve.lines)]
    if unknown:
        return html.missing(
            f"Not drawn by block before the run has ended: the hidden distances of {', '.join(unknown)}."
        )
    return Markup() if drawn else html.missing("No run has a pair of blocks, so there is no hidden distance.")


def _by_step(paired: Groups) -> list[html.Content]:
    """The hidden distance of every block by step, a picture per strategy on one scale."""
    distances = [
        training_plots.by_block(curve, line)
        for runs in paired.values()
        for curve in runs.values()
        for line in curve.lines
    ]
    most = max(map(len, distances))
    if most > MOST_BLOCKS:
        text = f"Distances step by step are not drawn for {most} student blocks; the log files hold them."
        return [html.paragraph(text)]
    top = max(value for by_block in distances for value in by_block.values())
    figures = [
        html.figure(training_plots.distances_by_step(f"distance-{place}", strategy, runs, top), html.bold(strategy))
        for place, (strategy, runs) in enumerate(paired.items())
    ]
    words = "Hidden distance by step, a line per student block (its number at the right), mean over seeds; one scale for all."
    return [html.tag("h3", "Hidden distance by block and step"), html.paragraph(words), html.pictures(figures, "maps")]


def _curves(results: Results) -> Groups:
    """The students' logs by strategy and run."""
    groups: Groups = {}
    for run in results.runs:
        curve = results.curves.get(run.name)
        if run.strategy is not None and curve is not None:
            lines = {line.step: line for line in curve.lines}  # a resumed run may have logged a step twice
            groups.setdefault(run.strategy, {})[run.name] = Curve(list(lines.values()), curve.blocks)
    return groups


def _scheduled(groups: Groups) -> dict[str, str]:
    """What any run logs besides the parts of the loss, in the order of `SCHEDULED`, each with its words."""
    curves = [curve for runs in groups.values() for curve in runs.values()]
    parts = {part: None for curve in curves for line in curve.lines for part in line.parts}
    return {part: words for begin, words in SCHEDULED.items() for part in parts if part.startswith(begin)}


def _with_part(groups: Groups, part: str) -> Groups:
    """The runs and lines in whose logs the part is a number; without a pair there is no hidden loss."""
    if part == "hidden":
        return _kept(groups, lambda _, line: line.parts.get(part) is not None and bool(line.pairs))
    return _kept(groups, lambda _, line: line.parts.get(part) is not None)


def _kept(groups: Groups, keep: Callable[[Curve, LogLine], bool]) -> Groups:
    """The runs with those lines alone, thinned; runs and strategies without any are left out."""
    kept: Groups = {}
    for strategy, runs in groups.items():
        for run, curve in runs.items():
            lines = list(thinned([line for line in curve.lines if keep(curve, line)], LOG_LINES))
            if lines:
                kept.setdefault(strategy, {})[run] = Curve(lines, curve.blocks)
    return kept


def cost_section(runs: Sequence[TrainingRun]) -> list[html.Content]:
    """Speed, time and memory of every run."""
    if not runs:
        return [html.missing("No training run has begun yet.")]
    figures = []
    for key, (label, cost) in COSTS.items():
        known = [(run, value) for run in runs if run.strategy is not None and (value := cost(run)) is not None]
        if known:
            figures.append(html.figure(training_plots.cost(f"cost-{key}", label, known), html.bold(label)))
    text = "Bars are means over runs, rings the runs."
    if any(run.strategy is None for run in runs):
        text += " The teacher's own training is in the table only."
    head, *rows = cost_table(runs)
    numbers = [[run.name, run_state(run), *costs(run)] for run in runs]
    return [
        html.paragraph(text)
        if figures
        else html.missing("No student has finished its training yet, so no cost is drawn."),
        html.pictures(figures, "three"),
        html.details(f"All {len(runs)} runs", html.table("Cost of every training run", head, rows, "sortable")),
        html.paragraph(html.csv_link("cost", COST_HEAD, numbers), "small"),
    ]
