"""The report page's section about angles: for each student block a map of the cosines between teacher blocks, before and after."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from itertools import groupby
from typing import Any

from llmkd.evaluation.angle_files import WHEN
from llmkd.report.angles import Values, angle_table, sentence, setting
from llmkd.report.page.html import csv_link, details, hidden, missing, paragraph, table

Results = dict[str, Any]
Row = dict[str, Any]

SIDE, LEFT, TOP, GAP = 150, 46, 24, 26  # of a map and around it, in pixels
LEVELS = 10  # of a colour's strength


def angle_section(results: Results) -> list[str]:
    """The sentence, the table, and a picture per strategy and stack."""
    angles = results["angles"]
    problems = [paragraph(f"{name}: {why}.", "small") for name, why in angles["problems"].items()]
    if not angles["students"]:
        return [missing("No student's angles could be measured."), *problems]
    head, *lines = angle_table(angles)
    known: dict[str, str] = {}
    drawn = "".join(_figure(f"angles-{place}", one, known) for place, one in enumerate(angles["students"]))
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
        f'<div class="pictures">{drawn}</div>',
    ]


def _figure(name: str, one: Row, known: dict[str, str]) -> str:
    """The picture of a strategy's stack with, to be opened, a line per student block, and every cell as CSV."""
    who = f"{one['strategy']}, {one['stack']}" if one["stack"] else one["strategy"]
    title = f"Mean cosine between teacher blocks, {who}"
    summary = _summary(one)
    head = ("student block", *(f"{what} {when}" for when in WHEN for what in ("mean", "share above zero", "lowest")))
    link = csv_link(name, ("student block", "i", "j", *_columns()), _cells(one))
    cut = _cut(one)
    numbers = details(
        f"Numbers{hidden(f': {title}')}",
        f"<p>{link}</p>{table(title, head, summary, 'numbers')}{paragraph(cut, 'small') if cut else ''}",
        "figure-numbers",
    )
    caption = f"<b>{escape(who)}</b>, init {escape(one['init'])}, mean of {len(one['seeds'])}"
    return f"<figure>{_svg(name, title, one, summary, known)}\n<figcaption>{caption}</figcaption>\n{numbers}</figure>"


def _cut(one: Row) -> str:
    """What is left out or taken together."""
    shown, whole = len(one["after"]["blocks"]), one["after"]["student_blocks"]
    said = [f"{shown} of {whole} student blocks are shown"] if shown < whole else []
    if any(len(side) > 1 for side in one["teacher_blocks"]):
        said.append("neighbouring teacher blocks are taken together, their pairs' mean in one cell")
    return f"{'; '.join(said)}; the study's folder angles/ holds all." if said else ""


def _columns() -> list[str]:
    return [f"{what} {when}" for when in WHEN for what in ("mean", "share above zero")]


def _summary(one: Row) -> list[tuple[Any, ...]]:
    """Of each student block shown: mean, share and lowest mean over the cells of two different places, before and after."""
    lines = []
    for place, block in enumerate(one["after"]["blocks"]):
        values: list[Any] = []
        for when in WHEN:
            seen = one[when]["blocks"][place]
            means, shares = _off_diagonal(seen["mean"]), _off_diagonal(seen["above_zero"])
            values += [_mean(means), _mean(shares), min(means, default=None)]
        lines.append((block["block"], *(None if value is None else round(value, 3) for value in values)))
    return lines


def _cells(one: Row) -> list[tuple[Any, ...]]:
    """Every cell of the pictures: student block, the two places, and the numbers before and after."""
    names = [_name(side) for side in one["teacher_blocks"]]
    lines = []
    for place, block in enumerate(one["after"]["blocks"]):
        for i in range(len(names)):
            for j in range(i, len(names)):
                seen = [one[when]["blocks"][place] for when in WHEN]
                numbers = [found[key][i][j] for found in seen for key in ("mean", "above_zero")]
                lines.append((block["block"], names[i], names[j], *numbers))
    return lines


def _name(side: Sequence[int]) -> str:
    return str(side[0]) if len(side) == 1 else f"{side[0]}-{side[-1]}"


def _off_diagonal(matrix: Values) -> list[float]:
    return [value for i, row in enumerate(matrix) for j, value in enumerate(row) if i < j and value is not None]


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None


# ---------------------------------------------------------------------------------------------------------------------
# The drawing


def _svg(name: str, title: str, one: Row, summary: Sequence[tuple[Any, ...]], known: dict[str, str]) -> str:
    """Two squares per student block, with an accessible name and description.

    Small: cells of one colour share a path, and a square that the page has already (`known`: cells -> id; students that began alike) is
    referred to.
    """
    blocks = len(one["after"]["blocks"])
    width, height = LEFT + 2 * SIDE + GAP + 8, TOP + blocks * (SIDE + GAP) + 30
    parts = [_text(LEFT + column * (SIDE + GAP) + SIDE / 2, 12, when, "middle") for column, when in enumerate(WHEN)]
    names = [_name(side) for side in one["teacher_blocks"]]
    for row in range(blocks):
        top = TOP + row * (SIDE + GAP)
        label = f"student block {one['after']['blocks'][row]['block']}"
        parts.append(
            f'<text transform="translate(12 {top + SIDE / 2:g}) rotate(-90)" text-anchor="middle" font-size="11.5">{label}</text>'
        )
        for column, when in enumerate(WHEN):
            parts.append(_square(LEFT + column * (SIDE + GAP), top, one[when]["blocks"][row]["mean"], names, known))
    parts.append(_legend(LEFT, height - 16))
    told = [
        f"student block {line[0]}: mean {_told(line[1])} before and {_told(line[4])} after, lowest {_told(line[3])} and {_told(line[6])}"
        for line in summary
    ]
    words = escape("; ".join(told) + ".")
    return (
        f'<svg class="picture" role="img" aria-label="{escape(title)}" aria-describedby="{name}-words" viewBox="0 0 {width} {height}" '
        f'width="{width}" height="{height}"><desc id="{name}-words">{words}</desc>{"".join(parts)}</svg>'
    )


def _told(value: float | None) -> str:
    return "not known" if value is None else f"{value:.2f}"


def _text(x: float, y: float, text: str, anchor: str, size: float = 11.5) -> str:
    return f'<text x="{x:g}" y="{y:g}" text-anchor="{anchor}" font-size="{size}">{escape(text)}</text>'


def _square(left: float, top: float, matrix: Values, names: Sequence[str], known: dict[str, str]) -> str:
    """A matrix as a square of coloured cells; first and last block are named at its sides."""
    size = len(matrix)
    cell = SIDE / size
    inner = _coloured(matrix)
    if inner in known:
        inner = f'<use href="#{known[inner]}"/>'
    else:
        known[inner] = f"angle-cells-{len(known)}"
        inner = f'<g id="{known[inner]}">{inner}</g>'
    ends = dict.fromkeys((0, size - 1))
    numbers = [_text(left - 4, top + (place + 0.5) * cell + 4, names[place], "end", 10) for place in ends]
    numbers += [_text(left + (place + 0.5) * cell, top + SIDE + 11, names[place], "middle", 10) for place in ends]
    frame = f'<rect x="{left}" y="{top:g}" width="{SIDE}" height="{SIDE}" fill="none" stroke="var(--rule)"/>'
    return f'<g transform="translate({left} {top:g}) scale({cell:.4g})">{inner}</g>{frame}{"".join(numbers)}'


def _coloured(matrix: Values) -> str:
    """The cells, one unit wide, with dots where they are below zero and strokes where there is none."""
    paths: dict[tuple[bool, int], str] = {}
    dots = "".join(
        f"M{x}.5 {y}.5h0" for y, row in enumerate(matrix) for x, v in enumerate(row) if v is not None and v < 0
    )
    strokes = "".join(f"M{x} {y}l1 1" for y, row in enumerate(matrix) for x, v in enumerate(row) if v is None)
    for y, row in enumerate(matrix):
        x = 0
        for colour, run in groupby(row, _colour):
            long = len(list(run))
            if colour is not None:
                paths[colour] = paths.get(colour, "") + f"M{x} {y}h{long}v1h-{long}z"
            x += long
    inner = "".join(
        f'<path fill="var(--series-{2 if negative else 1})" fill-opacity="{level / LEVELS:g}" d="{path}"/>'
        for (negative, level), path in sorted(paths.items())
    )
    if dots:
        inner += f'<path stroke="var(--ink)" stroke-width=".3" stroke-linecap="round" d="{dots}"/>'
    if strokes:
        inner += f'<path stroke="var(--muted)" stroke-width=".06" d="{strokes}"/>'
    return inner


def _colour(value: float | None) -> tuple[bool, int] | None:
    """(below zero, level from 1 up); None for what is not coloured."""
    level = 0 if value is None else min(round(abs(value) * LEVELS), LEVELS)
    return (value is not None and value < 0, level) if level else None


def _legend(left: float, top: float) -> str:
    """Swatches from -1 to 1."""
    parts = []
    for place, value in enumerate((-1.0, -0.5, 0.0, 0.5, 1.0)):
        x = left + place * 64
        fill = f'fill="var(--series-{2 if value < 0 else 1})" fill-opacity="{abs(value):g}"'
        parts.append(f'<rect x="{x}" y="{top}" width="12" height="12" {fill} stroke="var(--rule)"/>')
        if value < 0:
            dot = f"M{x + 6} {top + 6}h0"
            parts.append(f'<path stroke="var(--ink)" stroke-width="3.6" stroke-linecap="round" d="{dot}"/>')
        parts.append(_text(x + 17, top + 10, f"{value:g}".replace("-", "\N{MINUS SIGN}"), "start", 10))
    return "".join(parts)
