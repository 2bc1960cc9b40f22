"""The report page's section about cost: what a step took in seconds and CPU seconds, and memory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import median

from llmkd.report.cost import CPU_SECONDS, SECONDS, compared, cost_in_words, cpu, of_students, wall
from llmkd.report.page import html, svg
from llmkd.report.runs import TrainingRun
from llmkd.report.tables import COST_HEAD, cost_table, costs, run_state
from llmkd.text import amount

WITHIN = "the differences are within the spread"
Drawn = Mapping[
    str, Mapping[str, tuple[float, Sequence[float]]]
]  # strategy -> run -> its cost, and the ends of its line, if it has one


def cost_section(runs: Sequence[TrainingRun]) -> list[html.Content]:
    """Time of a step and memory of every run, and in words whether the students differ."""
    if not runs:
        return [html.missing("No training run has begun yet.")]
    unclear = {times.unit for times in compared(runs) if times.says_nothing}
    figures = [
        html.figure(cost(f"cost-{name}", label, drawn, WITHIN if unit in unclear else ""), label)
        for name, label, drawn, unit in (
            ("cpu-step", "CPU seconds per step", of_students(runs, cpu), CPU_SECONDS),
            ("step", "seconds per step", of_students(runs, wall), SECONDS),
            ("memory", "peak memory per rank, GiB", _memory(runs), None),
        )
        if drawn
    ]
    text = "Bars are medians over runs, rings the runs: of a run's time the median step, with a line over the middle half of its steps."
    if any(run.strategy is None for run in runs):
        text += " The teacher's own training is in the table only."
    head, *rows = cost_table(runs)
    numbers = [[run.name, run_state(run), *costs(run)] for run in runs]
    none = "No student has finished its training yet, so no cost is drawn."
    return [
        html.paragraph(cost_in_words(runs)),
        html.paragraph(text) if figures else html.missing(none),
        html.pictures(figures, "three"),
        html.details(f"All {len(runs)} runs", html.table("Cost of every training run", head, rows, "sortable")),
        html.paragraph(html.csv_link("cost", COST_HEAD, numbers), "small"),
    ]


def _memory(runs: Sequence[TrainingRun]) -> Drawn:
    found: dict[str, dict[str, tuple[float, Sequence[float]]]] = {}
    for run in runs:
        if run.strategy is not None and (peak := run.memory_gib) is not None:
            found.setdefault(run.strategy, {})[run.name] = peak, ()
    return found


@svg.drawn
def cost(name: str, label: str, drawn: Drawn, note: str = "") -> svg.Picture:
    """One cost: a row per strategy with the median over its runs as a bar, and each run as a ring on the line between its ends.

    `note` stands above the bars.
    """
    figure, ax = svg.axes(320, 22 * len(drawn) + 66, 108, 12, 22, 40)
    ax.text(0, 1.02, note, transform=ax.transAxes, size=svg.SMALL, color=svg.COLOUR["muted"])
    medians = {strategy: median(value for value, _ in spans.values()) for strategy, spans in drawn.items()}
    for place, (strategy, spans) in enumerate(drawn.items()):
        bar = {"color": svg.COLOUR["band"], "edgecolor": svg.COLOUR["accent"], "lw": 0.8}
        ax.barh([place], [medians[strategy]], height=0.62, zorder=1, **bar)
        ring = {"ms": 4, "mfc": svg.COLOUR["paper"], "mec": svg.COLOUR["ink"], "mew": 0.9}
        for number, (value, ends) in enumerate(spans.values()):
            height = place - 0.22 + 0.44 * (number + 0.5) / len(spans)
            ax.plot(ends, [height] * len(ends), color=svg.COLOUR["muted"], lw=1.1, zorder=2)
            ax.plot([value], [height], "o", ls="none", zorder=3, **ring)
    most = max(max((value, *ends)) for spans in drawn.values() for value, ends in spans.values())
    ax.set_xlim(0, most * 1.06 or 1)
    ax.set_ylim(len(drawn) - 0.5, -0.5)
    ax.set_yticks(
        range(len(drawn)), [svg.short(strategy) for strategy in drawn], color=svg.COLOUR["ink"], size=svg.TEXT
    )
    ax.grid(axis="x")
    svg.few_ticks(ax.xaxis, 4)
    if most >= 1000:
        svg.whole_numbers(ax.xaxis)
    ax.set_xlabel(label)

    words = f"Median over runs: {'; '.join(f'{strategy} {amount(value)}' for strategy, value in medians.items())}."
    words += f" {note[0].upper()}{note[1:]}." if note else ""
    rows = tuple(
        (strategy, run, value, *ends) for strategy, spans in drawn.items() for run, (value, ends) in spans.items()
    )
    head = ("strategy", "run", label, *(("lower quartile", "upper quartile") if len(rows[0]) > 3 else ()))
    return svg.picture(figure, name, f"Cost of training: {label}", words, svg.Numbers(head, rows))
