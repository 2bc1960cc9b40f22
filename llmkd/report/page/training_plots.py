"""The pictures of a study's training: loss parts and hidden distances by step, and what the runs cost."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from statistics import fmean
from typing import Any, TypedDict

from llmkd.layer_map import DECODER_EMBEDDING, EMBEDDING
from llmkd.report.page import svg
from llmkd.report.results import Curve, LogLine, TrainingRun
from llmkd.text import amount

Groups = dict[str, dict[str, Curve]]  # strategy -> run -> its log
Line = list[tuple[float, float]]
Lines = dict[str, dict[str, Line]]  # strategy -> run -> what is drawn


class Look(TypedDict):
    """How a line is drawn."""

    color: str
    ls: Any


EMBEDDINGS = {EMBEDDING: "embeddings", DECODER_EMBEDDING: "decoder's embeddings"}


# ---------------------------------------------------------------------------------------------------------------------
# Losses and distances


@svg.drawn
def curves(name: str, part: str, groups: Groups, strategies: Sequence[str], longest: int) -> svg.Picture:
    """One loss part by step: per strategy the mean over seeds (thick) and each seed (thin).

    A strategy's look is its place in `strategies`; `longest` is how many log lines the longest run wrote.
    """
    figure, ax = svg.axes(380, 240, 42, 92, 20, 36)
    lines: Lines = {group: {run: _values(curve, part) for run, curve in runs.items()} for group, runs in groups.items()}
    means, looks = _mean_lines(lines), _looks(lines, strategies)
    for strategy, runs in lines.items():
        for line in runs.values():
            ax.plot(*zip(*line, strict=True), color=looks[strategy]["color"], lw=0.7, alpha=0.45, zorder=2)
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
    return svg.picture(figure, name, f"Training: {part} by step", words, numbers, 1 + len(means))


@svg.drawn
def distances_at_end(name: str, groups: Groups, strategies: Sequence[str]) -> svg.Picture:
    """The last logged hidden distance of each student block: per strategy the mean over seeds, each seed as a point."""
    figure, ax = svg.axes(380, 240, 42, 92, 20, 36)
    lines: Lines = {
        strategy: {run: list(by_block(curve, curve.lines[-1]).items()) for run, curve in runs.items()}
        for strategy, runs in groups.items()
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
    title, words = (
        "Hidden distance of each student block at the end",
        f"Mean over seeds; last block: {'; '.join(ends)}.",
    )
    return svg.picture(figure, name, title, words, table, 1 + len(means))


@svg.drawn
def distances_by_step(name: str, strategy: str, runs: Mapping[str, Curve], top: float) -> svg.Picture:
    """One strategy's hidden distance by step, a line per student block (mean over seeds); `top` is the common scale."""
    figure, ax = svg.axes(230, 170, 40, 34, 8, 34)
    lines: dict[int, dict[str, Line]] = {}
    for run, curve in runs.items():
        steps = [(line.step, by_block(curve, line)) for line in curve.lines]
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


def by_block(curve: Curve, line: LogLine) -> dict[int, float]:
    """Student block, counted through all stacks -> the mean distance over its pairs in one line of the log.

    Embeddings are -1, those of a decoder beside an encoder -2. Empty while the blocks of the pairs are not known.
    """
    distances: dict[int, list[float]] = {}
    for pair, distance in line.pairs.items():
        if distance is not None and pair in curve.blocks:
            distances.setdefault(curve.blocks[pair], []).append(distance)
    return {block: fmean(values) for block, values in sorted(distances.items())}


def _values(curve: Curve, part: str) -> Line:
    return [(line.step, value) for line in curve.lines if (value := line.parts.get(part)) is not None]


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
    places = {name: order.index(name) for name in names}
    return {
        name: {"color": svg.COLOUR[f"series-{place % 8 + 1}"], "ls": svg.DASHES[place % len(svg.DASHES)]}
        for name, place in places.items()
    }


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
    """Label the lines, once the y axis is final, and the x axis."""
    _label_ends(ax, lines, looks)
    ax.grid(axis="y")
    svg.few_ticks(ax.xaxis, ticks)
    ax.set_xlabel(x)


def _label_ends(ax: Any, lines: Mapping[str, Line], looks: Mapping[str, Look]) -> None:
    """Writes each line's name right of its end, apart from one another, with a thin line leading there."""
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


# ---------------------------------------------------------------------------------------------------------------------
# Cost


@svg.drawn
def cost(name: str, label: str, costs: Sequence[tuple[TrainingRun, float]]) -> svg.Picture:
    """One cost of every finished run, a point each in its strategy's row, and the row's mean as a bar."""
    groups: dict[str, list[float]] = {}
    for run, value in costs:
        groups.setdefault(str(run.strategy), []).append(value)
    figure, ax = svg.axes(320, 22 * len(groups) + 50, 108, 12, 6, 40)
    most = max(value for _, value in costs)
    for place, values in enumerate(groups.values()):
        bar = {"color": svg.COLOUR["band"], "edgecolor": svg.COLOUR["accent"], "lw": 0.8}
        ax.barh([place], [fmean(values)], height=0.62, zorder=1, **bar)
        ring = {"ms": 4, "mfc": svg.COLOUR["paper"], "mec": svg.COLOUR["ink"], "mew": 0.9}
        ax.plot(values, [place] * len(values), "o", ls="none", zorder=3, **ring)
    ax.set_xlim(0, most * 1.06 or 1)
    ax.set_ylim(len(groups) - 0.5, -0.5)
    ax.set_yticks(range(len(groups)), [svg.short(group) for group in groups], color=svg.COLOUR["ink"], size=svg.TEXT)
    ax.grid(axis="x")
    svg.few_ticks(ax.xaxis, 4)
    if most >= 1000:
        svg.whole_numbers(ax.xaxis)
    ax.set_xlabel(label)

    means = [f"{group} {amount(fmean(values))}" for group, values in groups.items()]
    words = f"Mean over runs: {'; '.join(means)}."
    rows = tuple((run.strategy, run.name, value) for run, value in costs)
    return svg.picture(figure, name, f"Cost of training: {label}", words, svg.Numbers(("strategy", "run", label), rows))
