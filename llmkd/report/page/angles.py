"""The report page's section about angles: for each student block a map of the cosines between teacher blocks, before and after."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from itertools import combinations_with_replacement, groupby
from statistics import fmean
from typing import Any, NamedTuple

from matplotlib.patches import PathPatch, Rectangle
from matplotlib.path import Path

from llmkd.evaluation.angles.results import WHEN, Matrix
from llmkd.report import numbers
from llmkd.report.angles import angle_table, sentence, setting
from llmkd.report.page.html import Content, figure, missing, paragraph, pictures, table
from llmkd.report.page.svg import COLOUR, SMALL, TEXT, Numbers, Picture, drawn, picture, pixel_axes
from llmkd.report.results import Angles, StrategyAngles
from llmkd.text import fixed

SIDE, LEFT, TOP, GAP = 144, 46, 24, 26  # of a map and around it, in pixels
LEVELS = 10  # of a colour's strength
Point = tuple[float, float]


class Stroke(NamedTuple):
    """How a line is drawn; strokes sort in the order of their layers."""

    layer: int
    colour: str
    alpha: float
    width: float
    cap: str


def angle_section(angles: Angles | None) -> list[Content]:
    """The sentence, the table, and a picture per strategy and stack; nothing where no angles were measured."""
    if angles is None:
        return []
    problems = [paragraph(f"{name}: {why}.", "small") for name, why in angles.problems.items()]
    if not angles.students:
        return [missing("No student's angles could be measured."), *problems]
    head, *lines = angle_table(angles)
    figures = []
    for place, student in enumerate(angles.students):
        about = f", init {student.init}, mean of {len(student.seeds)}"
        figures.append(figure(cosine_maps(f"angles-{place}", student), _title(student), about))
    words = (
        "Each square is one student block; its rows and columns are the teacher's blocks, block 0 on top and at the left. A cell is "
        "the mean cosine between the directions to its two blocks: blue is above zero, and the stronger the nearer to one; orange, "
        "with a dot, is below zero; a stroke is a block that lies where the student's state does, so that there is no direction."
    )
    return [
        paragraph(sentence(angles)),
        table("Angles by strategy, mean over students ± half the 95 % interval", head, lines),
        paragraph(setting(angles), "small"),
        *problems,
        paragraph(words),
        pictures(figures),
    ]


def _title(student: StrategyAngles) -> str:
    return f"{student.strategy}, {student.stack}" if student.stack else student.strategy


def _note(student: StrategyAngles) -> str:
    """What is left out or taken together."""
    shown, whole = len(student.after.blocks), student.after.student_blocks
    parts = [f"{shown} of {whole} student blocks are shown"] if shown < whole else []
    if any(len(side) > 1 for side in student.teacher_blocks):
        parts.append("neighbouring teacher blocks are taken together, their pairs' mean in one cell")
    return f"{'; '.join(parts)}; the study's folder angles/ holds all." if parts else ""


def _summary(student: StrategyAngles) -> Numbers:
    """Of each student block shown: mean, share and lowest mean over the cells of two different places, before and after."""
    rows = []
    for before, after in zip(student.before.blocks, student.after.blocks, strict=True):
        row: list[float | None] = [after.block]
        for seen in (before, after):
            means, shares = _off_diagonal(seen.mean), _off_diagonal(seen.above_zero)
            values = (fmean(means), fmean(shares), min(means)) if means and shares else (None,) * 3
            row += [None if value is None else round(value, 3) for value in values]
        rows.append(tuple(row))
    head = (f"{what} {when}" for when in WHEN for what in ("mean", "share above zero", "lowest"))
    return Numbers(("student block", *head), tuple(rows))


def _cells(student: StrategyAngles) -> Numbers:
    """Every cell of the pictures: student block, the two places, and the numbers before and after."""
    names = _names(student)
    rows = (
        (a.block, names[i], names[j], b.mean[i][j], b.above_zero[i][j], a.mean[i][j], a.above_zero[i][j])
        for b, a in zip(student.before.blocks, student.after.blocks, strict=True)
        for i, j in combinations_with_replacement(range(len(names)), 2)
    )
    head = (f"{what} {when}" for when in WHEN for what in ("mean", "share above zero"))
    return Numbers(("student block", "i", "j", *head), tuple(rows))


def _names(student: StrategyAngles) -> list[str]:
    """What the places along a map's sides are called."""
    return [str(side[0]) if len(side) == 1 else f"{side[0]}-{side[-1]}" for side in student.teacher_blocks]


def _off_diagonal(matrix: Matrix) -> list[float]:
    return [value for i, row in enumerate(matrix) for j, value in enumerate(row) if i < j and value is not None]


# --- The drawing


@drawn
def cosine_maps(name: str, student: StrategyAngles) -> Picture:
    """Two squares per student block: the mean cosines of teacher blocks before training and after."""
    blocks = student.after.blocks
    width, height = LEFT + 2 * SIDE + GAP + 8, TOP + len(blocks) * (SIDE + GAP) + 30
    figure, ax = pixel_axes(width, height)
    size = SIDE / len(student.teacher_blocks)
    lines: dict[Stroke, list[Point]] = defaultdict(list)  # those of one look are one path: pages stay small
    for column, when in enumerate(WHEN):
        left = LEFT + column * (SIDE + GAP)
        _write(ax, left + SIDE / 2, 12, when, TEXT, ha="center")
        for row, seen in enumerate(student.at(when).blocks):
            top = TOP + row * (SIDE + GAP)
            _add_cells(lines, seen.mean, left, top, size)
            _frame(ax, left, top, _names(student))
    for row, block in enumerate(blocks):
        middle = TOP + row * (SIDE + GAP) + SIDE / 2
        _write(ax, 12, middle, f"student block {block.block}", TEXT, ha="center", rotation=90)
    for stroke in sorted(lines):
        _draw(ax, lines[stroke], stroke)
    _legend(ax, height - 10)

    summary = _summary(student)
    words = [
        f"student block {block}: mean {_cosine(before)} before and {_cosine(after)} after, lowest {_cosine(low)} and {_cosine(then_low)}"
        for block, before, _, low, after, _, then_low in summary.rows
    ]
    title = f"Mean cosine between teacher blocks, {_title(student)}"
    table = _cells(student)
    return picture(figure, name, title, "; ".join(words) + ".", table, table=summary, note=_note(student))


def _cosine(value: float | None) -> str:
    return "not known" if value is None else fixed(value, 2)


def _add_cells(lines: dict[Stroke, list[Point]], matrix: Matrix, left: float, top: float, size: float) -> None:
    """The strokes of a square whose upper left corner is there; neighbours of one colour are one line."""
    for i, row in enumerate(matrix):
        y, column = top + (i + 0.5) * size, 0
        for level, run in groupby(row, _level):
            x, column = left + column * size, column + len(list(run))
            if level:
                cell = Stroke(0, "series-2" if level < 0 else "series-1", abs(level) / LEVELS, size, "butt")
                lines[cell] += [(x, y), (left + column * size, y)]
        for j, value in enumerate(row):
            x, half = left + (j + 0.5) * size, size / 2
            if value is None:  # no direction
                lines[Stroke(2, "muted", 1.0, 0.06 * size, "butt")] += [(x - half, y - half), (x + half, y + half)]
            elif value < 0:
                lines[Stroke(1, "ink", 1.0, 0.3 * size, "round")] += [(x, y), (x, y)]


def _level(value: float | None) -> int:
    """The strength of a cell's colour, with the value's sign; 0 for what is not coloured."""
    level = 0 if value is None else min(round(abs(value) * LEVELS), LEVELS)
    return -level if value is not None and value < 0 else level


def _draw(ax: Any, ends: Sequence[Point], stroke: Stroke) -> None:
    """Lines from each first point to the second, as one path."""
    path = Path(ends, [Path.MOVETO, Path.LINETO] * (len(ends) // 2))
    path.should_simplify = False  # a line of no length is a dot
    look: Any = {"ec": COLOUR[stroke.colour], "lw": stroke.width, "capstyle": stroke.cap, "alpha": stroke.alpha}
    ax.add_patch(PathPatch(path, fill=False, **look, clip_on=False))


def _frame(ax: Any, left: float, top: float, names: Sequence[str]) -> None:
    """A square's border; its first and last block are named at its sides."""
    ax.add_patch(Rectangle((left, top), SIDE, SIDE, fill=False, ec=COLOUR["rule"], lw=1.0, clip_on=False))
    for place in dict.fromkeys((0, len(names) - 1)):
        middle = (place + 0.5) * SIDE / len(names)
        _write(ax, left - 4, top + middle, names[place], SMALL - 0.5, ha="right")
        _write(ax, left + middle, top + SIDE + 8, names[place], SMALL - 0.5, ha="center")


def _legend(ax: Any, y: float) -> None:
    """Swatches from -1 to 1."""
    for place, value in enumerate((-1.0, -0.5, 0.0, 0.5, 1.0)):
        x = LEFT + place * 64
        colour = "series-2" if value < 0 else "series-1"
        _draw(ax, [(x, y), (x + 12, y)], Stroke(0, colour, abs(value), 12, "butt"))
        if value < 0:
            _draw(ax, [(x + 6, y), (x + 6, y)], Stroke(1, "ink", 1.0, 3.6, "round"))
        ax.add_patch(Rectangle((x, y - 6), 12, 12, fill=False, ec=COLOUR["rule"], lw=1.0, clip_on=False))
        _write(ax, x + 17, y, numbers.margin(value), SMALL - 0.5, ha="left")


def _write(ax: Any, x: float, y: float, text: str, size: float, **how: Any) -> None:
    ax.text(x, y, text, size=size, va="center", **how)
