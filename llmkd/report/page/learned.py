"""The report page's part about learned maps: how much each teacher block weighs for each student block, as training goes on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from matplotlib.patches import PathPatch, Rectangle
from matplotlib.path import Path

from llmkd.report.page import html, svg
from llmkd.report.results import Results
from llmkd.report.runs import LogLine
from llmkd.text import fixed

WHEN = ("first", "middle", "last")  # of a run's logged lines
LEVELS = 10  # of a colour's strength
LEFT, TOP, GAP = 84, 40, 26  # around a square, in pixels
WIDTH, ROW = 168, 18  # of a square; of a student block, at most

Weights = Mapping[str, Mapping[str, float]]  # student block -> teacher block -> weight, by the names in the log


@dataclass(frozen=True)
class LearnedMap:
    """The weights of one strategy's runs, as a mean over these, at the three times of `WHEN`."""

    strategy: str
    runs: int
    steps: tuple[int | None, ...]
    """The step of each time; None where the runs' differ."""
    weights: tuple[Weights, ...]

    @property
    def teacher_blocks(self) -> list[str]:
        """The columns of a square; of an encoder-decoder both stacks count from 0."""
        return sorted({name for of_block in self.weights[-1].values() for name in of_block}, key=int)

    @property
    def times(self) -> list[str]:
        """What each time is called."""
        return [
            f"{when} logged step" if step is None else f"step {step}"
            for when, step in zip(WHEN, self.steps, strict=True)
        ]


def learned_maps(results: Results) -> list[LearnedMap]:
    """By strategy, the maps that its runs have learned, or have so far."""
    groups: dict[str, list[list[LogLine]]] = {}
    for run in results.runs:
        curve = results.curves.get(run.name)
        lines = [] if curve is None else [line for line in curve.lines if line.learned]
        if run.strategy is not None and lines:
            groups.setdefault(run.strategy, []).append([lines[0], lines[(len(lines) - 1) // 2], lines[-1]])
    return [_mean(strategy, runs) for strategy, runs in groups.items()]


def _mean(strategy: str, runs: Sequence[Sequence[LogLine]]) -> LearnedMap:
    steps, weights = [], []
    for lines in zip(*runs, strict=True):
        numbers = {line.step for line in lines}
        steps.append(numbers.pop() if len(numbers) == 1 else None)
        values: dict[str, dict[str, list[float]]] = {}
        for line in lines:
            for student, of_blocks in line.learned.items():
                for teacher, weight in of_blocks.items():
                    values.setdefault(student, {}).setdefault(teacher, []).append(weight)
        weights.append({s: {t: fmean(each) for t, each in of_block.items()} for s, of_block in values.items()})
    return LearnedMap(strategy, len(runs), tuple(steps), tuple(weights))


def in_words(learned: LearnedMap) -> str:
    """From which teacher block each student block learns most at the end."""
    parts = []
    for student, weights in learned.weights[-1].items():
        block = max(weights, key=lambda name: weights[name])
        parts.append(f"{student} from {block} ({fixed(weights[block], 2)})")
    return (
        f"student block, from which teacher block it learns most at the end (that block's weight): {', '.join(parts)}."
    )


def learned_part(results: Results) -> list[html.Content]:
    """A picture for each learned map; nothing where there is none."""
    maps = learned_maps(results)
    if not maps:
        return []
    figures = [
        html.figure(learned_map(f"learned-{place}", found), found.strategy, f", mean of {found.runs}")
        for place, found in enumerate(maps)
    ]
    words = (
        "A learned map compares each student block with a mixture of teacher blocks and learns the mixture's weights. A row is a student "
        "block, a column a teacher block, block 0 on top and at the left; the stronger the colour, the more the block weighs; a dot marks "
        "the block that weighs most. The three squares are the first, the middle and the last logged step."
    )
    return [html.tag("h3", "Learned maps"), html.paragraph(words), html.pictures(figures)]


# --- The drawing


@svg.drawn
def learned_map(name: str, learned: LearnedMap) -> svg.Picture:
    """Three squares of cells, student block by teacher block."""
    students, teachers = list(learned.weights[-1]), learned.teacher_blocks
    tall = ROW * len(students)
    figure, ax = svg.pixel_axes(LEFT + len(WHEN) * (WIDTH + GAP), TOP + tall + 52)
    cell = WIDTH / len(teachers)
    for number, (time, weights) in enumerate(zip(learned.times, learned.weights, strict=True)):
        left = LEFT + number * (WIDTH + GAP)
        _write(ax, left + WIDTH / 2, 20, time, svg.TEXT, ha="center")
        _cells(ax, weights, students, teachers, left, cell)
        ax.add_patch(Rectangle((left, TOP), WIDTH, tall, fill=False, ec=svg.COLOUR["rule"], lw=1.0, clip_on=False))
        for place in dict.fromkeys((0, len(teachers) - 1)):
            _write(ax, left + (place + 0.5) * cell, TOP + tall + 10, teachers[place], svg.SMALL, ha="center")
    for row, student in enumerate(students):
        _write(ax, LEFT - 8, TOP + (row + 0.5) * ROW, student, svg.SMALL, ha="right")
    _write(ax, LEFT - 8, 20, "student block", svg.SMALL, ha="right")
    _write(ax, LEFT, TOP + tall + 34, "teacher block; colour: weight from 0 to 1", svg.SMALL, ha="left")
    numbers = svg.Numbers(
        ("student block", "teacher block", *learned.times),
        tuple((s, t, *(w[s].get(t) for w in learned.weights)) for s in students for t in learned.weights[-1][s]),
    )
    table = svg.Numbers(
        ("student block", *(f"likeliest, {time}" for time in learned.times)),
        tuple((s, *(_likeliest(w[s]) for w in learned.weights)) for s in students),
    )
    words = in_words(learned)
    return svg.picture(figure, name, f"Learned map of {learned.strategy}", words, numbers, table=table)


def _likeliest(weights: Mapping[str, float]) -> str:
    block = max(weights, key=lambda name: weights[name])
    return f"{block} ({fixed(weights[block], 2)})"


def _cells(
    ax: Any, weights: Weights, students: Sequence[str], teachers: Sequence[str], left: float, cell: float
) -> None:
    """The cells of one square, those of one colour as one path, and a dot in the heaviest cell of each row."""
    by_level: dict[int, list[tuple[float, float]]] = {}
    for row, student in enumerate(students):
        y, of_block = TOP + (row + 0.5) * ROW, weights[student]
        for teacher, weight in of_block.items():
            x = left + teachers.index(teacher) * cell
            if level := round(weight * LEVELS):
                by_level.setdefault(level, []).extend([(x, y), (x + cell, y)])
        heaviest = teachers.index(max(of_block, key=lambda name: of_block[name]))
        x = left + (heaviest + 0.5) * cell
        ax.plot([x], [y], "o", ms=min(0.3 * cell, 4.0), color=svg.COLOUR["ink"], zorder=3, clip_on=False)
    for level, ends in sorted(by_level.items()):
        path = Path(ends, [Path.MOVETO, Path.LINETO] * (len(ends) // 2))
        look: Any = {"ec": svg.COLOUR["series-1"], "lw": ROW, "capstyle": "butt", "alpha": level / LEVELS}
        ax.add_patch(PathPatch(path, fill=False, **look, clip_on=False))


def _write(ax: Any, x: float, y: float, text: str, size: float, **how: Any) -> None:
    ax.text(x, y, text, size=size, va="center", **how)
