"""The report page's section about training: the loss and hidden distances by step."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from statistics import fmean
from typing import Any, TypedDict, TypeVar

from markupsafe import Markup

from llmkd.layer_map import DECODER_EMBEDDING, EMBEDDING
from llmkd.report.files import thinned
from llmkd.report.page import html, svg
from llmkd.report.results import Results
from llmkd.report.runs import Curve, LogLine
from llmkd.text import amount, listed

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
EMBEDDINGS = {EMBEDDING: "embeddings", DECODER_EMBEDDING: "decoder's embeddings"}

Groups = dict[str, dict[str, Curve]]  # strategy -> run -> its log
Line = Sequence[tuple[float, float]]
Lines = Mapping[str, Mapping[str, Line]]  # strategy -> run -> what is drawn
Distances = list[tuple[int, dict[int, float]]]  # a run's steps, and by student block the mean distance of its pairs
Value = TypeVar("Value")
NO_MARKS: Mapping[str, tuple[float, float]] = {}


class Look(TypedDict):
    """How a line is drawn."""

    color: str
    ls: Any


def training_section(results: Results) -> list[html.Content]:
    """The loss parts by step, then the hidden distance by student block."""
    groups = _curves(results)
    if not groups:
        return [html.missing("No student has logged a training step yet.")]
    longest = max(len(curve.lines) for runs in groups.values() for curve in runs.values())
    figures = []
    for part, words in {**PARTS, **_scheduled(groups)}.items():
        lines = logged(groups, lambda _, line, part=part: _part(line, part))
        if lines:
            name = f"curve-{re.sub('[^a-z0-9]+', '-', part)}"
            picture = curves(name, part, lines, list(groups), longest)
            figures.append(html.figure(picture, part, f", {words}{_beside_the_loss(groups, part, lines)}"))
    distances = logged(groups, lambda curve, line: by_block(curve, line) or None)
    if distances:
        end = distances_at_end("distance-end", distances, list(groups))
        figures.append(html.figure(end, "hidden distance", " of each student block, last logged step"))
    text = "Thick lines are means over seeds, thin ones the single seeds."
    if longest > LOG_LINES:
        text += f" Of the {longest} logged steps {LOG_LINES} are drawn, evenly spaced, the last among them."
    parts = [html.paragraph(text), html.pictures(figures)]
    return [*parts, *(_by_step(distances) if distances else []), _without_distances(groups, bool(distances))]


def _beside_the_loss(groups: Groups, part: str, lines: Iterable[str]) -> str:
    """Which strategies do not learn from a part that a picture shows, as the end of its caption. `lines`: those that are drawn."""
    apart = [
        strategy
        for strategy, runs in groups.items()
        if any(part in line.not_in_loss for curve in runs.values() for line in curve.lines)
    ]
    unknown = [strategy for strategy in groups if part in PARTS and strategy not in set(lines)]
    text = f"; measured, but not in the loss, of {listed(apart)}" if apart else ""
    return f"{text}; not computed for {listed(unknown)}" if unknown else text


def _without_distances(groups: Groups, drawn: bool) -> html.Content:
    """Which runs' distances are not drawn by block, if any are left out."""
    curves = {name: curve for runs in groups.values() for name, curve in runs.items()}
    unknown = [name for name, curve in curves.items() if not curve.blocks and any(line.pairs for line in curve.lines)]
    if unknown:
        waiting = ", ".join(unknown)
        return html.missing(f"Not drawn by block before the run has ended: the hidden distances of {waiting}.")
    return Markup() if drawn else html.missing("No run has a pair of blocks, so there is no hidden distance.")


def _by_step(distances: Mapping[str, Mapping[str, Distances]]) -> list[html.Content]:
    """The hidden distance of every block by step, a picture per strategy on one scale."""
    drawn = [blocks for runs in distances.values() for steps in runs.values() for _, blocks in steps]
    most = max(map(len, drawn))
    if most > MOST_BLOCKS:
        text = f"Distances step by step are not drawn for {most} student blocks; the log files hold them."
        return [html.paragraph(text)]
    top = max(value for blocks in drawn for value in blocks.values())
    figures = [
        html.figure(distances_by_step(f"distance-{place}", strategy, runs, top), strategy)
        for place, (strategy, runs) in enumerate(distances.items())
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


def logged(
    groups: Groups, value: Callable[[Curve, LogLine], Value | None]
) -> dict[str, dict[str, list[tuple[int, Value]]]]:
    """Strategy -> run -> steps with a value, thinned; runs and strategies without any are left out."""
    logged: dict[str, dict[str, list[tuple[int, Value]]]] = {}
    for strategy, runs in groups.items():
        for run, curve in runs.items():
            points = [(line.step, found) for line in curve.lines if (found := value(curve, line)) is not None]
            if points:
                logged.setdefault(strategy, {})[run] = list(thinned(points, LOG_LINES))
    return logged


def _part(line: LogLine, part: str) -> float | None:
    """A part of the loss; without a pair there is no hidden loss."""
    return line.parts.get(part) if line.pairs or part != "hidden" else None


def by_block(curve: Curve, line: LogLine) -> dict[int, float]:
    """Student block, counted through all stacks -> the mean distance over its pairs in one line of the log.

    Embeddings are -1, those of a decoder beside an encoder -2. Empty while the blocks of the pairs are not known.
    """
    distances: dict[int, list[float]] = {}
    for pair, distance in line.pairs.items():
        if distance is not None and pair in curve.blocks:
            distances.setdefault(curve.blocks[pair], []).append(distance)
    return {block: fmean(values) for block, values in sorted(distances.items())}


# --- The pictures


@svg.drawn
def curves(
    name: str,
    part: str,
    lines: Lines,
    strategies: Sequence[str],
    longest: int,
    what: str = "Training",
    marks: Mapping[str, tuple[float, float]] = NO_MARKS,
) -> svg.Picture:
    """One loss part by step: per strategy the mean over seeds (thick) and each seed (thin).

    A strategy's look is its place in `strategies`; `longest` is how many log lines the longest run wrote. `marks`: of a run, where it
    gets a ring.
    """
    figure, ax = svg.axes(380, 240, 42, 92, 20, 36)
    means, looks = _mean_lines(lines), _looks(lines, strategies)
    for strategy, runs in lines.items():
        for line in runs.values():
            ax.plot(*zip(*line, strict=True), color=looks[strategy]["color"], lw=0.7, alpha=0.45, zorder=2)
        ring = {"ms": 5, "mfc": svg.COLOUR["paper"], "mec": looks[strategy]["color"], "mew": 1.2}
        for place in (marks[run] for run in runs if run in marks):
            ax.plot(*place, "o", ls="none", zorder=4, **ring)
        ax.plot(*zip(*means[strategy], strict=True), **looks[strategy], lw=2, zorder=3)
    values = [value for runs in lines.values() for line in runs.values() for _, value in line]
    logarithmic = min(values) > 0 and max(values) > 8 * min(values)
    if logarithmic:
        svg.log_axis(ax)
    else:
        svg.few_ticks(ax.yaxis, 4)
    _finish(ax, means, looks, "step", 5)
    above = f"{part}{', log scale' if logarithmic else ''}"
    ax.text(0, 1.02, above, transform=ax.transAxes, size=svg.SMALL, color=svg.COLOUR["muted"])

    shown = max(len(line) for runs in lines.values() for line in runs.values())
    words = _ends_in_words(means) + (f" {shown} of {longest} logged steps are drawn." if shown < longest else "")
    numbers = _columns("step", means, lines)
    return svg.picture(figure, name, f"{what}: {part} by step", words, numbers, 1 + len(means))


@svg.drawn
def distances_at_end(
    name: str, distances: Mapping[str, Mapping[str, Distances]], strategies: Sequence[str]
) -> svg.Picture:
    """The last logged hidden distance of each student block: per strategy the mean over seeds, each seed as a point."""
    figure, ax = svg.axes(380, 240, 42, 92, 20, 36)
    lines: Lines = {
        strategy: {run: list(steps[-1][1].items()) for run, steps in runs.items()}
        for strategy, runs in distances.items()
    }
    means, looks = _mean_lines(lines), _looks(lines, strategies)
    for strategy, runs in lines.items():
        look, marker = looks[strategy], svg.MARKERS[strategies.index(strategy) % len(svg.MARKERS)]
        ring = {"ms": 3.4, "mfc": svg.COLOUR["paper"], "mec": look["color"], "mew": 0.8}
        for line in runs.values():
            ax.plot(*zip(*line, strict=True), "o", ls="none", zorder=2, **ring)
        ax.plot(*zip(*means[strategy], strict=True), **look, marker=marker, ms=5, lw=1.6, zorder=3)
    blocks = sorted({int(block) for line in means.values() for block, _ in line})
    ax.set_ylim(bottom=0)
    svg.few_ticks(ax.yaxis, 4)
    _finish(ax, means, looks, "student block")
    ax.set_xticks(blocks, list(map(_block_name, blocks)))
    ax.set_xlim(blocks[0] - 0.2, blocks[-1] + 0.2)

    ends = [f"{group} {amount(line[-1][1])} at block {_block_name(line[-1][0])}" for group, line in means.items()]
    table = _columns("student block", means, lines)
    table = table._replace(rows=tuple((_block_name(block), *values) for block, *values in table.rows))
    words = f"Mean over seeds; last block: {'; '.join(ends)}."
    return svg.picture(figure, name, "Hidden distance of each student block at the end", words, table, 1 + len(means))


@svg.drawn
def distances_by_step(name: str, strategy: str, runs: Mapping[str, Distances], top: float) -> svg.Picture:
    """One strategy's hidden distance by step, a line per student block (mean over seeds); `top` is the common scale."""
    figure, ax = svg.axes(230, 170, 40, 34, 8, 34)
    lines: dict[int, dict[str, Line]] = {}
    for run, steps in runs.items():
        for block in steps[-1][1]:
            lines.setdefault(block, {})[run] = [(step, values[block]) for step, values in steps if block in values]
    means = _mean_lines({_block_name(block): of_runs for block, of_runs in sorted(lines.items())})
    looks = _looks(means, list(means))
    for block, line in means.items():
        ax.plot(*zip(*line, strict=True), **looks[block], lw=1.5)
    ax.set_ylim(0, top * 1.04)
    svg.few_ticks(ax.yaxis, 3)
    _finish(ax, means, looks, "step", 3)

    named = {f"block {block}": line for block, line in means.items()}
    title = f"{strategy}: hidden distance of each student block by step"
    return svg.picture(figure, name, title, _ends_in_words(named), _columns("step", named, {}))


def _ends_in_words(lines: Mapping[str, Line]) -> str:
    return "; ".join(f"{name} ends at {amount(line[-1][1])}" for name, line in lines.items()) + "."


def _columns(x: str, means: Mapping[str, Line], lines: Lines) -> svg.Numbers:
    """Lines as a table: a row per x, a column per mean, then one per run; None where a line has no such x."""
    named = {**means, **{run: line for runs in lines.values() for run, line in runs.items()}}
    columns = [dict(line) for line in named.values()]
    places = sorted({place for column in columns for place in column})
    return svg.Numbers((x, *named), tuple((place, *(column.get(place) for column in columns)) for place in places))


def _block_name(block: float) -> str:
    return EMBEDDINGS.get(int(block), str(int(block)))


def _looks(names: Iterable[str], order: Sequence[str]) -> dict[str, Look]:
    """Each line's colour and dashes, by its name's place in `order`."""
    colours = [svg.COLOUR[f"series-{place % 8 + 1}"] for place in range(len(order))]
    dashes = [svg.DASHES[place % len(svg.DASHES)] for place in range(len(order))]
    return {name: {"color": colours[order.index(name)], "ls": dashes[order.index(name)]} for name in names}


def _mean_lines(lines: Lines) -> dict[str, Line]:
    """The mean of each group's lines at every x that all of them have, or that any has where they share none."""
    means = {}
    for name, runs in lines.items():
        values: dict[float, list[float]] = {}
        for x, y in (point for line in runs.values() for point in line):
            values.setdefault(x, []).append(y)
        shared = [x for x, ys in values.items() if len(ys) == len(runs)]
        means[name] = [(x, fmean(values[x])) for x in sorted(shared or values)]
    return means


def _finish(ax: Any, lines: Mapping[str, Line], looks: Mapping[str, Look], x: str, ticks: int = 5) -> None:
    """Label the x axis and, the y axis being final, each line right of its end: apart from one another, led there by a thin line."""
    low, high = ax.get_ylim()
    ax.set_ylim(low, high)
    to_share = ax.transScale.transform
    bottom, top = (to_share((1, limit))[1] for limit in (low, high))
    wanted = [(to_share((1, line[-1][1]))[1] - bottom) / (top - bottom) for line in lines.values()]
    wide, tall = 72 * ax.figure.get_size_inches() * (ax.get_position().width, ax.get_position().height)
    for name, want, place in zip(lines, wanted, svg.spread(wanted, 13.5 / tall, 0.02, 0.98), strict=True):
        quiet = {"transform": ax.transAxes, "clip_on": False, "color": looks[name]["color"]}
        ax.plot([1.005, 1 + 9 / wide, 1 + 12 / wide], [want, place, place], lw=0.8, **quiet)
        ax.text(1 + 15 / wide, place, svg.short(name), va="center", size=svg.SMALL, **quiet)
    ax.grid(axis="y")
    svg.few_ticks(ax.xaxis, ticks)
    ax.set_xlabel(x)
