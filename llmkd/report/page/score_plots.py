"""The pictures of a study's scores, differences and layer maps; each carries its numbers as rows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from matplotlib.patches import Rectangle

from llmkd.report import numbers
from llmkd.report.page import svg
from llmkd.report.results import Comparison, LayerMap, Metric, Row

Span = tuple[float, float]


# --- Scores


@svg.drawn
def scores(name: str, metric: Metric, rows: Sequence[Row], reference: str, margin: float | None) -> svg.Picture:
    """One metric: each strategy's seeds, mean and 95 % interval; baselines and the teacher as reference lines.

    The band is the stated margin around the reference strategy's mean.
    """
    students = [row for row in rows if row.kind == "student"]
    others = [row for kind in ("baseline", "teacher") for row in rows if row.kind == kind]
    places = {row.name: float(number) for number, row in enumerate(students)}
    places |= {row.name: len(students) + 0.4 + number for number, row in enumerate(others)}
    last = max(places.values(), default=0.0)
    figure, ax = svg.axes(380, 24 * (last + 1) + 50, 108, 78, 6, 40)
    ax.set_ylim(last + 0.6, -0.6)

    centre = next((_mean(row, metric) for row in rows if row.name == reference), None)
    band = (centre - margin, centre + margin) if margin is not None and centre is not None else None
    span = _span(students, others, metric, band)
    ax.set_xlim(*span)
    if band:
        ax.axvspan(*band, color=svg.COLOUR["band"], lw=0, zorder=0)
    for row in others:
        value = _mean(row, metric)
        if value is not None and span[0] <= value <= span[1]:
            style = "solid" if row.kind == "teacher" else (0, (4, 3))
            ax.plot([value, value], [-0.6, places[row.name]], color=svg.COLOUR["muted"], lw=0.9, ls=style, zorder=1)
    for row in rows:
        _draw_row(ax, row, metric, places[row.name], span)
    ax.set_yticks(list(places.values()), [svg.short(row) for row in places], color=svg.COLOUR["ink"], size=svg.TEXT)
    ax.grid(axis="x")
    svg.few_ticks(ax.xaxis, 4)
    ax.set_xlabel(f"{metric.label} ({_better(metric)})")

    cells = {row.name: row.cells.get(metric.name) for row in (*students, *others)}
    means = {row: numbers.mean(cell, metric, " plus or minus ") if cell else None for row, cell in cells.items()}
    parts = [f"{row} {mean or 'without a score'}" for row, mean in means.items()]
    if band and margin is not None:
        low, high = (numbers.score(edge, metric) for edge in band)
        parts.append(f"margin of {numbers.margin(margin)} around {reference}: {low} to {high}")
    table = _score_numbers([*students, *others], metric)
    return svg.picture(figure, name, f"{metric.label} of each strategy", "; ".join(parts) + ".", table)


def _draw_row(ax: Any, row: Row, metric: Metric, place: float, span: Span) -> None:
    """One line of `scores`: interval and mean, the seeds below, the number at the right."""
    side, cell = ax.get_yaxis_transform(), row.cells.get(metric.name)
    if cell is None:
        why = (row.problem(metric.step) or "no value").partition(":")[0]
        ax.text(0.03, place, why, transform=side, va="center", size=svg.SMALL, color=svg.COLOUR["muted"])
        return
    mean, half = cell.mean, cell.half_width
    student = row.kind == "student"
    colour = svg.COLOUR["accent" if student else "muted"]
    ax.text(1.03, place, numbers.mean(cell, metric), transform=side, va="center", size=svg.SMALL)
    if not span[0] <= mean <= span[1]:
        tip, tail = (0, 0.09) if mean < span[0] else (1, 0.91)
        arrow = {"arrowstyle": "->", "color": colour, "lw": 1.2, "shrinkA": 0, "shrinkB": 0}
        ax.annotate("", (tip, place), (tail, place), xycoords=side, textcoords=side, arrowprops=arrow)
        return
    if half is not None:
        ax.plot([mean - half, mean + half], [place, place], color=colour, lw=2.4, solid_capstyle="butt", zorder=3)
    ax.plot([mean], [place], "D", color=colour, ms=6 if student else 5, zorder=4)
    if len(cell.values) > 1:
        ring = {"ms": 3.6, "mfc": svg.COLOUR["paper"], "mec": colour, "mew": 0.9}
        ax.plot(cell.values, [place + 0.32] * len(cell.values), "o", ls="none", zorder=3, **ring)


def _span(students: Sequence[Row], others: Sequence[Row], metric: Metric, band: Span | None) -> Span:
    """The span of the strategies' seeds and intervals; a reference line is let in where it at most triples the span."""
    values = list(band or ())
    for row in students:
        if metric.name in row.cells:
            cell = row.cells[metric.name]
            half = cell.half_width or 0.0
            values += [*cell.values, cell.mean - half, cell.mean + half]
    lines = [value for row in others if (value := _mean(row, metric)) is not None]
    values = values or lines or [0.0, 1.0]
    low, high = min(values), max(values)
    widest = 3 * (high - low)
    for value in sorted(lines, key=lambda line: max(low - line, line - high)):
        if max(high, value) - min(low, value) <= widest:
            low, high = min(low, value), max(high, value)
    room = 0.06 * (high - low) or 0.05 * abs(high) or 0.5
    return low - room, high + room


def _score_numbers(rows: Sequence[Row], metric: Metric) -> svg.Numbers:
    seeds = sorted({seed for row in rows for seed in row.seeds})
    lines: list[tuple[Any, ...]] = []
    for row in rows:
        cell = row.cells.get(metric.name)
        if cell is None:
            lines.append((row.name, None, None, None, 0, *(None for _ in seeds)))
            continue
        ends = (None, None) if cell.half_width is None else (cell.mean - cell.half_width, cell.mean + cell.half_width)
        lines.append((row.name, cell.mean, *ends, cell.n, *map(cell.by_seed.get, seeds)))
    head = ("model", "mean", "interval low", "interval high", "n", *(f"seed {seed}" for seed in seeds))
    return svg.Numbers(head, tuple(lines))


def _mean(row: Row, metric: Metric) -> float | None:
    cell = row.cells.get(metric.name)
    return None if cell is None else cell.mean


def _better(metric: Metric) -> str:
    words = {True: "higher is better", False: "lower is better", None: "neither end is better"}
    return words[metric.higher_is_better]


# --- Differences


@svg.drawn
def differences(name: str, metric: Metric, comparisons: Sequence[Comparison]) -> svg.Picture:
    """One metric's differences to the reference with 95 % intervals, the margin as a band and the verdict in words."""
    reference = comparisons[0].reference
    margin = next((comparison.margin for comparison in comparisons if comparison.margin is not None), None)
    figure, ax = svg.axes(380, 34 * len(comparisons) + 46, 142, 46, 4, 40)
    ax.set_ylim(len(comparisons) - 0.5, -0.5)
    ends = [0.0, *((-margin, margin) if margin else ())]
    for comparison in comparisons:
        ends += [comparison.difference, *(comparison.interval or ()), *(comparison.items_interval or ())]
    room = 0.08 * (max(ends) - min(ends)) or 0.5
    ax.set_xlim(min(ends) - room, max(ends) + room)
    if margin:
        ax.axvspan(-margin, margin, color=svg.COLOUR["band"], lw=0, zorder=0)
        for edge in (-margin, margin):
            ax.axvline(edge, color=svg.COLOUR["muted"], lw=0.8, ls=(0, (3, 2)), zorder=1)
    ax.axvline(0, color=svg.COLOUR["ink"], lw=1, zorder=1)
    for place, comparison in enumerate(comparisons):
        _draw_difference(ax, comparison, metric, place)
    ax.set_yticks([])
    ax.grid(axis="x")
    svg.few_ticks(ax.xaxis, 4)
    ax.set_xlabel(f"difference to {reference}, {metric.label} ({_better(metric)})")

    words = "; ".join(_difference_in_words(comparison, metric) for comparison in comparisons) + "."
    words += f" The margin is {numbers.margin(margin)} to either side." if margin else " No margin is stated."
    head = ("strategy", "difference", "interval low", "interval high", "margin", "verdict")
    rows = tuple((c.strategy, c.difference, *(c.interval or (None, None)), c.margin, c.verdict) for c in comparisons)
    return svg.picture(figure, name, f"{metric.label}: difference to {reference}", words, svg.Numbers(head, rows))


def _draw_difference(ax: Any, comparison: Comparison, metric: Metric, place: int) -> None:
    """One line of `differences`: a full mark lies within the margin, a square is shown not to be zero."""
    side = ax.get_yaxis_transform()
    ax.text(-0.04, place - 0.17, svg.short(comparison.strategy), transform=side, ha="right", va="center", size=svg.TEXT)
    quiet = {"size": svg.SMALL - 0.5, "color": svg.COLOUR["muted"]}
    ax.text(-0.04, place + 0.2, comparison.verdict, transform=side, ha="right", va="center", **quiet)
    if comparison.items_interval is not None:
        ax.plot(comparison.items_interval, [place + 0.2] * 2, color=svg.COLOUR["muted"], lw=1.1, zorder=2)
    if comparison.interval is not None:
        ax.plot(comparison.interval, [place] * 2, color=svg.COLOUR["accent"], lw=2.6, solid_capstyle="butt", zorder=3)
    within = comparison.verdict in ("equivalent", "different within the margin")
    marker = "s" if comparison.verdict.startswith("different") else "o"
    face = svg.COLOUR["accent" if within else "paper"]
    ax.plot([comparison.difference], [place], marker, ms=7, mfc=face, mec=svg.COLOUR["accent"], mew=1.5, zorder=4)
    difference = numbers.signed(comparison.difference, metric)
    ax.text(1.03, place, difference, transform=side, va="center", size=svg.SMALL)


def _difference_in_words(comparison: Comparison, metric: Metric) -> str:
    interval = "" if comparison.interval is None else f" ({numbers.interval(comparison.interval, metric)})"
    difference = numbers.signed(comparison.difference, metric)
    return f"{comparison.strategy} {difference}{interval}, {comparison.verdict}"


# --- Layer maps


@svg.drawn
def layer_map(name: str, layer_map: LayerMap) -> svg.Picture:
    """A strategy's pairs as lines from the student's blocks (left) to the teacher's (right); block 0 is on top.

    Both models are drawn equally tall, so a map that follows depth is made of nearly level lines.
    """
    students, teachers = layer_map.student_blocks, layer_map.teacher_blocks
    assert students and teachers
    tall = min(max(15.0 * teachers, 150.0), max(9.2 * teachers, 330.0))
    figure, ax = svg.axes(230, tall + 30, 0, 0, 24, 6)
    ax.set_xlim(0, 230)
    ax.set_ylim(tall, 0)
    ax.axis("off")
    pairs = tuple((student, teacher) for student, teacher in layer_map.pairs)
    for side, blocks, left, paired in (
        ("student", students, 34.0, {student for student, _ in pairs}),
        ("teacher", teachers, 156.0, {teacher for _, teacher in pairs}),
    ):
        ax.text(left + 20, -8, side, ha="center", va="bottom", size=svg.SMALL, color=svg.COLOUR["muted"], clip_on=False)
        _column(ax, blocks, left, tall, paired, numbers_right=side == "teacher")
    for student, teacher in pairs:
        ends = [(student + 0.5) * tall / students, (teacher + 0.5) * tall / teachers]
        ax.plot([74, 156], ends, color=svg.COLOUR["accent"], lw=1.6, marker="o", ms=3.4, zorder=4)

    words = ", ".join(f"{student} from {teacher}" for student, teacher in pairs)
    words = f"student block from teacher block: {words}." if pairs else "no pair."
    words = f"{students} student blocks and {teachers} teacher blocks; {words}"
    table = svg.Numbers(("student block", "teacher block"), pairs)
    return svg.picture(figure, name, f"Layer map of {layer_map.strategy}", words, table)


def _column(ax: Any, blocks: int, left: float, tall: float, paired: set[int], numbers_right: bool) -> None:
    """A model as a column of boxes with their numbers, those in a pair filled.

    Where the boxes are too flat for every number, those in a pair have theirs, and every fourth that is far from one.
    """
    step = tall / blocks
    gap = min(2.5, step * 0.25)
    for block in range(blocks):
        in_pair = block in paired
        face, edge = svg.COLOUR["band"] if in_pair else "none", svg.COLOUR["accent" if in_pair else "muted"]
        corner = (left, block * step + gap / 2)
        ax.add_patch(Rectangle(corner, 40, step - gap, fc=face, ec=edge, lw=1.1 if in_pair else 0.7))
        if in_pair or step >= 11 or (block % 4 == 0 and not {block - 1, block + 1} & paired):
            x, side = (left + 46, "left") if numbers_right else (left - 6, "right")
            tone = svg.COLOUR["ink" if in_pair else "muted"]
            ax.text(x, (block + 0.5) * step, str(block), ha=side, va="center", size=svg.SMALL - 1, color=tone)
