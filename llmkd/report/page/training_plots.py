"""The pictures of a study's training: loss parts and hidden distances by step, and what the runs cost."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from statistics import fmean
from typing import Any

from llmkd.report.page.svg import (
    COLOUR,
    DASHES,
    MARKERS,
    SMALL,
    TEXT,
    Picture,
    axes,
    drawn,
    few_ticks,
    log_axis,
    short,
    spread,
    svg,
    whole_numbers,
)

Row = dict[str, Any]
Groups = dict[str, dict[str, list[Row]]]  # strategy -> run -> log lines
Line = list[tuple[float, float]]
Lines = dict[str, dict[str, Line]]  # strategy -> run -> what is drawn


# ---------------------------------------------------------------------------------------------------------------------
# Losses and distances


@drawn
def curves(name: str, part: str, groups: Groups, strategies: Sequence[str], of: int) -> Picture:
    """One loss part by step: per strategy the mean over seeds (thick) and each seed (thin).

    `groups` is strategy -> run -> log lines; a strategy's look is its place in `strategies`; `of` is how many log lines the
    longest run wrote.
    """
    figure, ax = axes(380, 240, 42, 92, 20, 36)
    lines = {
        strategy: {run: [(line["step"], line[part]) for line in found] for run, found in runs.items()}
        for strategy, runs in groups.items()
    }
    means = {strategy: _mean_line(runs.values()) for strategy, runs in lines.items()}
    looks = {strategy: _look(strategies.index(strategy)) for strategy in lines}
    for strategy, runs in lines.items():
        for line in runs.values():
            ax.plot(*zip(*line, strict=True), color=looks[strategy]["color"], lw=0.7, alpha=0.45, zorder=2)
        ax.plot(*zip(*means[strategy], strict=True), **looks[strategy], lw=2, zorder=3)
    values = [value for runs in lines.values() for line in runs.values() for _, value in line]
    logarithmic = min(values) > 0 and max(values) > 8 * min(values)
    if logarithmic:
        log_axis(ax)
    else:
        few_ticks(ax.yaxis, 4)
    _labels(ax, [(strategy, line[-1], looks[strategy]) for strategy, line in means.items()])
    ax.grid(axis="y")
    few_ticks(ax.xaxis, 5)
    ax.set_xlabel("step")
    above = f"{part}{', log scale' if logarithmic else ''}"
    ax.text(0, 1.02, above, transform=ax.transAxes, size=SMALL, color=COLOUR["muted"])

    title = f"Training: {part} by step"
    shown = max(len(line) for runs in lines.values() for line in runs.values())
    words = "; ".join(f"{strategy} ends at {line[-1][1]:.4g}" for strategy, line in means.items()) + "."
    words += f" {shown} of {of} logged steps are drawn." if shown < of else ""
    head, rows = _columns("step", means, lines)
    return Picture(name, title, words, svg(figure, name, title, words), head, rows, 1 + len(means))


@drawn
def distances_at_end(name: str, groups: Groups, strategies: Sequence[str]) -> Picture:
    """The last logged hidden distance of each student block: per strategy the mean over seeds, each seed as a point."""
    figure, ax = axes(380, 240, 42, 92, 20, 36)
    lines: Lines = {
        strategy: {run: list(by_block(found[-1]["pairs"]).items()) for run, found in runs.items()}
        for strategy, runs in groups.items()
    }
    means = {strategy: _mean_line(runs.values()) for strategy, runs in lines.items()}
    looks = {strategy: _look(strategies.index(strategy)) for strategy in lines}
    for strategy, runs in lines.items():
        look, marker = looks[strategy], MARKERS[strategies.index(strategy) % len(MARKERS)]
        ring = {"ms": 3.4, "mfc": COLOUR["paper"], "mec": look["color"], "mew": 0.8}
        for line in runs.values():
            ax.plot(*zip(*line, strict=True), "o", ls="none", zorder=2, **ring)
        ax.plot(*zip(*means[strategy], strict=True), **look, marker=marker, ms=5, lw=1.6, zorder=3)
    blocks = sorted({int(block) for line in means.values() for block, _ in line})
    ax.set_ylim(bottom=0)
    ax.set_xticks(blocks, [_block(block) for block in blocks])
    ax.set_xlim(blocks[0] - 0.2, blocks[-1] + 0.2)
    _labels(ax, [(strategy, line[-1], looks[strategy]) for strategy, line in means.items()])
    ax.grid(axis="y")
    few_ticks(ax.yaxis, 4)
    ax.set_xlabel("student block")

    title = "Hidden distance of each student block at the end"
    said = [f"{strategy} {line[-1][1]:.4g} at block {_block(line[-1][0])}" for strategy, line in means.items()]
    words = "Mean over seeds; last block: " + "; ".join(said) + "."
    head, rows = _columns("student block", means, lines)
    rows = tuple((_block(row[0]), *row[1:]) for row in rows)
    return Picture(name, title, words, svg(figure, name, title, words), head, rows, 1 + len(means))


@drawn
def distances_by_step(name: str, strategy: str, runs: dict[str, list[Row]], top: float) -> Picture:
    """One strategy's hidden distance by step, a line per student block (mean over seeds); `top` is the common scale."""
    figure, ax = axes(230, 170, 40, 34, 8, 34)
    lines: dict[int, list[Line]] = {}
    for run in runs.values():
        found = [(line["step"], by_block(line["pairs"])) for line in run]
        for block in found[-1][1]:
            lines.setdefault(block, []).append([(step, there[block]) for step, there in found if block in there])
    means = {_block(block): _mean_line(there) for block, there in sorted(lines.items())}
    looks = {block: _look(place) for place, block in enumerate(means)}
    for block, line in means.items():
        ax.plot(*zip(*line, strict=True), **looks[block], lw=1.5)
    ax.set_ylim(0, top * 1.04)
    _labels(ax, [(block, line[-1], looks[block]) for block, line in means.items()])
    ax.grid(axis="y")
    few_ticks(ax.xaxis, 3)
    few_ticks(ax.yaxis, 3)
    ax.set_xlabel("step")

    title = f"{strategy}: hidden distance of each student block by step"
    words = "; ".join(f"block {block} ends at {line[-1][1]:.4g}" for block, line in means.items()) + "."
    head, rows = _columns("step", {f"block {block}": line for block, line in means.items()}, {})
    return Picture(name, title, words, svg(figure, name, title, words), head, rows)


def _columns(x: str, means: dict[str, Line], lines: Lines) -> tuple[tuple[str, ...], tuple[tuple[Any, ...], ...]]:
    """Lines as a table: a row per x, a column per mean, then one per run; None where a line has no such x."""
    named = {**means, **{run: line for runs in lines.values() for run, line in runs.items()}}
    found = [dict(line) for line in named.values()]
    rows = sorted({place for line in found for place in line})
    return (x, *named), tuple((place, *(line.get(place) for line in found)) for place in rows)


def by_block(pairs: dict[str, float | None]) -> dict[int, float]:
    """Student block -> mean distance over its pairs, from the log's `student<teacher` names; the embeddings are -1.

    Of an encoder-decoder (`enc 0<3`, `dec 1<7`) the decoder's blocks are counted after the encoder's, its embeddings are -2.
    """
    students = {pair: pair.partition("<")[0].rpartition(" ") for pair in pairs}
    encoder = [int(block) + 1 for stack, _, block in students.values() if stack == "enc" and block != "e"]
    found: dict[int, list[float]] = {}
    for pair, value in pairs.items():
        if value is None:  # not a finite number
            continue
        stack, _, student = students[pair]
        decodes = stack == "dec"
        block = (-2 if decodes else -1) if student == "e" else int(student) + decodes * max(encoder, default=0)
        found.setdefault(block, []).append(value)
    return {block: fmean(values) for block, values in sorted(found.items())}


def _block(block: float) -> str:
    return {-1: "embeddings", -2: "decoder's embeddings"}.get(int(block), str(int(block)))


def _look(place: int) -> dict[str, Any]:
    return {"color": COLOUR[f"series-{place % 8 + 1}"], "ls": DASHES[place % len(DASHES)]}


def _mean_line(lines: Iterable[Line]) -> Line:
    """The mean of several lines at every x that all of them have, or that any has where they share none."""
    found: dict[float, list[float]] = {}
    lines = list(lines)
    for line in lines:
        for x, y in line:
            found.setdefault(x, []).append(y)
    shared = [x for x, values in found.items() if len(values) == len(lines)]
    return [(x, fmean(found[x])) for x in sorted(shared or found)]


def _labels(ax: Any, ends: Sequence[tuple[str, tuple[float, float], dict[str, Any]]]) -> None:
    """Writes each line's name right of its end, apart from one another, with a thin line leading there."""
    low, high = ax.get_ylim()
    ax.set_ylim(low, high)
    to_share = ax.transScale.transform
    bottom, top = (to_share((1, limit))[1] for limit in (low, high))
    wanted = [(to_share((1, value))[1] - bottom) / (top - bottom) for _, (_, value), _ in ends]
    tall = ax.get_position().height * ax.figure.get_size_inches()[1] * 72
    for (label, _, look), want, place in zip(ends, wanted, spread(wanted, 13.5 / tall, 0.02, 0.98), strict=True):
        quiet = {"transform": ax.transAxes, "clip_on": False, "color": look["color"]}
        wide = ax.get_position().width * ax.figure.get_size_inches()[0] * 72
        ax.plot([1.005, 1 + 9 / wide, 1 + 12 / wide], [want, place, place], lw=0.8, **quiet)
        ax.text(1 + 15 / wide, place, short(label), va="center", size=SMALL, **quiet)


# ---------------------------------------------------------------------------------------------------------------------
# Cost


@drawn
def cost(name: str, key: str, label: str, runs: Sequence[Row]) -> Picture:
    """One cost of every finished run, a point each in its strategy's row, and the row's mean as a bar."""
    groups: dict[str, list[Row]] = {}
    for run in runs:
        groups.setdefault(run["strategy"], []).append(run)
    figure, ax = axes(320, 22 * len(groups) + 50, 108, 12, 6, 40)
    most = max(run[key] for run in runs)
    for place, members in enumerate(groups.values()):
        mean = fmean(run[key] for run in members)
        ax.barh([place], [mean], height=0.62, color=COLOUR["band"], edgecolor=COLOUR["accent"], lw=0.8, zorder=1)
        ring = {"ms": 4, "mfc": COLOUR["paper"], "mec": COLOUR["ink"], "mew": 0.9}
        ax.plot([run[key] for run in members], [place] * len(members), "o", ls="none", zorder=3, **ring)
    ax.set_xlim(0, most * 1.06 or 1)
    ax.set_ylim(len(groups) - 0.5, -0.5)
    ax.set_yticks(range(len(groups)), [short(group) for group in groups], color=COLOUR["ink"], size=TEXT)
    ax.grid(axis="x")
    few_ticks(ax.xaxis, 4)
    if most >= 1000:
        whole_numbers(ax.xaxis)
    ax.set_xlabel(label)

    title = f"Cost of training: {label}"
    said = [f"{group} {fmean(run[key] for run in members):,.4g}" for group, members in groups.items()]
    words = "Mean over runs: " + "; ".join(said) + "."
    rows = tuple((run["strategy"], run["name"], run[key]) for run in runs)
    return Picture(name, title, words, svg(figure, name, title, words), ("strategy", "run", label), rows)
