"""The pictures of a study's scores, differences and layer maps, from the plain numbers of `results.json`.

Each picture carries those numbers as rows. The pictures of training are in `curves.py`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from llmkd.report.page.svg import COLOUR, SMALL, TEXT, Picture, axes, drawn, few_ticks, short, svg

Row = dict[str, Any]


# ---------------------------------------------------------------------------------------------------------------------
# Scores and differences


@drawn
def scores(name: str, metric: Row, rows: Sequence[Row], reference: str, margin: float | None) -> Picture:
    """One metric: each strategy's seeds, mean and 95 % interval; baselines and the teacher as reference lines.

    The band is the stated margin around the reference strategy's mean.
    """
    students = [row for row in rows if row["kind"] == "student"]
    others = [row for row in rows if row["kind"] == "baseline"] + [row for row in rows if row["kind"] == "teacher"]
    places = {row["name"]: float(number) for number, row in enumerate(students)}
    places |= {row["name"]: len(students) + 0.4 + number for number, row in enumerate(others)}
    last = max(places.values(), default=0.0)
    height = 24 * (last + 1) + 50
    figure, ax = axes(380, height, 108, 78, 6, 40)
    ax.set_ylim(last + 0.6, -0.6)

    centre = next((_mean(row, metric) for row in rows if row["name"] == reference), None)
    band = (centre - margin, centre + margin) if margin is not None and centre is not None else None
    low, high = _limits(students, others, metric, band)
    ax.set_xlim(low, high)
    if band:
        ax.axvspan(*band, color=COLOUR["band"], lw=0, zorder=0)
    for row in others:
        value = _mean(row, metric)
        if value is not None and low <= value <= high:
            style = "solid" if row["kind"] == "teacher" else (0, (4, 3))
            ax.plot([value, value], [-0.6, places[row["name"]]], color=COLOUR["muted"], lw=0.9, ls=style, zorder=1)
    for row in rows:
        _score_row(ax, row, metric, places[row["name"]], (low, high))
    ax.set_yticks(list(places.values()), [short(row) for row in places], color=COLOUR["ink"], size=TEXT)
    ax.grid(axis="x")
    few_ticks(ax.xaxis, 4)
    ax.set_xlabel(f"{metric['label']} ({_better(metric)})")

    title = f"{metric['label']} of each strategy"
    seeds = sorted({seed for row in rows for seed in row["seeds"]})
    said = [f"{row['name']} {_told(row, metric)}" for row in (*students, *others)]
    if band:
        said.append(f"margin of {margin:g} around {reference}: {band[0]:.4g} to {band[1]:.4g}")
    words = "; ".join(said) + "."
    head = ("model", "mean", "interval low", "interval high", "n", *(f"seed {seed}" for seed in seeds))
    numbers = tuple(_score_numbers(row, metric, seeds) for row in (*students, *others))
    return Picture(name, title, words, svg(figure, name, title, words), head, numbers)


def _score_row(ax: Any, row: Row, metric: Row, place: float, limits: tuple[float, float]) -> None:
    """One line of `scores`: interval and mean, the seeds below, the number at the right."""
    cell = row["cells"].get(metric["name"])
    if cell is None:
        why = (problem(row, metric) or "no value").partition(":")[0]
        ax.text(0.03, place, why, transform=ax.get_yaxis_transform(), va="center", size=SMALL, color=COLOUR["muted"])
        return
    mean, half = cell["mean"], cell["half_width"]
    student = row["kind"] == "student"
    colour = COLOUR["accent" if student else "muted"]
    text = number(mean, metric) + (f" ± {number(half, metric)}" if half is not None else "")
    ax.text(1.03, place, text, transform=ax.get_yaxis_transform(), va="center", size=SMALL)
    if not limits[0] <= mean <= limits[1]:
        left = mean < limits[0]
        ax.annotate(
            "",
            (0 if left else 1, place),
            (0.09 if left else 0.91, place),
            xycoords=ax.get_yaxis_transform(),
            textcoords=ax.get_yaxis_transform(),
            arrowprops={"arrowstyle": "->", "color": colour, "lw": 1.2, "shrinkA": 0, "shrinkB": 0},
        )
        return
    if half is not None:
        ax.plot([mean - half, mean + half], [place, place], color=colour, lw=2.4, solid_capstyle="butt", zorder=3)
    ax.plot([mean], [place], "D", color=colour, ms=6 if student else 5, zorder=4)
    if len(cell["values"]) > 1:
        ring = {"ms": 3.6, "mfc": COLOUR["paper"], "mec": colour, "mew": 0.9}
        ax.plot(cell["values"], [place + 0.32] * len(cell["values"]), "o", ls="none", zorder=3, **ring)


def _limits(
    students: Sequence[Row], others: Sequence[Row], metric: Row, band: tuple[float, float] | None
) -> tuple[float, float]:
    """The span of the strategies' seeds and intervals; a reference line is let in where it at most triples the span."""
    values = [value for row in students for value in _extent(row, metric)] + list(band or ())
    lines = [value for value in (_mean(row, metric) for row in others) if value is not None]
    values = values or lines or [0.0, 1.0]
    low, high = min(values), max(values)
    widest = 3 * (high - low)
    for value in sorted(lines, key=lambda line: max(low - line, line - high)):
        if max(high, value) - min(low, value) <= widest:
            low, high = min(low, value), max(high, value)
    room = 0.06 * (high - low) or 0.05 * abs(high) or 0.5
    return low - room, high + room


@drawn
def differences(name: str, metric: Row, comparisons: Sequence[Row]) -> Picture:
    """One metric's differences to the reference with 95 % intervals, the margin as a band and the verdict in words."""
    reference = comparisons[0]["reference"]
    margin = next((found["margin"] for found in comparisons if found["margin"] is not None), None)
    figure, ax = axes(380, 34 * len(comparisons) + 46, 142, 46, 4, 40)
    ax.set_ylim(len(comparisons) - 0.5, -0.5)
    ends = [0.0, *(end for found in comparisons for end in _ends(found)), *((-margin, margin) if margin else ())]
    room = 0.08 * (max(ends) - min(ends)) or 0.5
    ax.set_xlim(min(ends) - room, max(ends) + room)
    if margin:
        ax.axvspan(-margin, margin, color=COLOUR["band"], lw=0, zorder=0)
        for edge in (-margin, margin):
            ax.axvline(edge, color=COLOUR["muted"], lw=0.8, ls=(0, (3, 2)), zorder=1)
    ax.axvline(0, color=COLOUR["ink"], lw=1, zorder=1)
    side = ax.get_yaxis_transform()
    for place, found in enumerate(comparisons):
        difference = found["difference"]
        ax.text(-0.04, place - 0.17, short(found["strategy"]), transform=side, ha="right", va="center", size=TEXT)
        quiet = {"size": SMALL - 0.5, "color": COLOUR["muted"]}
        ax.text(-0.04, place + 0.2, found["verdict"], transform=side, ha="right", va="center", **quiet)
        if difference is None:
            continue
        if found["items_interval"] is not None:
            ax.plot(found["items_interval"], [place + 0.2] * 2, color=COLOUR["muted"], lw=1.1, zorder=2)
        if found["interval"] is not None:
            ax.plot(found["interval"], [place] * 2, color=COLOUR["accent"], lw=2.6, solid_capstyle="butt", zorder=3)
        full = found["verdict"] in ("equivalent", "different within the margin")
        face = COLOUR["accent" if full else "paper"]
        marker = "s" if found["verdict"].startswith("different") else "o"
        ax.plot([difference], [place], marker, ms=7, mfc=face, mec=COLOUR["accent"], mew=1.5, zorder=4)
        ax.text(1.03, place, signed(difference, metric), transform=side, va="center", size=SMALL)
    ax.set_yticks([])
    ax.grid(axis="x")
    few_ticks(ax.xaxis, 4)
    ax.set_xlabel(f"difference to {reference}, {metric['label']} ({_better(metric)})")

    title = f"{metric['label']}: difference to {reference}"
    said = [f"{found['strategy']} {_difference_told(found)}" for found in comparisons]
    words = (
        "; ".join(said) + "." + (f" The margin is {margin:g} to either side." if margin else " No margin is stated.")
    )
    head = ("strategy", "difference", "interval low", "interval high", "margin", "verdict")
    numbers = tuple(
        (f["strategy"], f["difference"], *(f["interval"] or (None, None)), f["margin"], f["verdict"])
        for f in comparisons
    )
    return Picture(name, title, words, svg(figure, name, title, words), head, numbers)


def problem(row: Row, metric: Row) -> str | None:
    """Why a row has no score by a metric; None where its models were not asked for one, or gave none."""
    if "missing" in row:  # problems by step
        found = row["missing"].get(metric["step"], [])
    else:
        found = row["problems"]
    return found[0] if found else None


def number(value: float, metric: Row) -> str:
    """A score as text: one decimal where the metric runs from 0 to 100, else three (two from 100 up)."""
    return f"{value:.1f}" if metric["percent"] else f"{value:.3f}" if abs(value) < 100 else f"{value:,.2f}"


def signed(value: float, metric: Row) -> str:
    """A difference as text, with its sign and one decimal more than a score has."""
    return (f"{value:+.2f}" if metric["percent"] else f"{value:+.4f}").replace("-", "\N{MINUS SIGN}")


def _score_numbers(row: Row, metric: Row, seeds: Sequence[int]) -> tuple[Any, ...]:
    cell = row["cells"].get(metric["name"])
    if cell is None:
        return (row["name"], None, None, None, 0, *(None for _ in seeds))
    mean, half = cell["mean"], cell["half_width"]
    ends = (None, None) if half is None else (mean - half, mean + half)
    by_seed = dict(zip(cell["seeds"], cell["values"], strict=False))  # a model without a seed has a value all the same
    return (row["name"], mean, *ends, cell["n"], *(by_seed.get(seed) for seed in seeds))


def _told(row: Row, metric: Row) -> str:
    cell = row["cells"].get(metric["name"])
    if cell is None:
        return "without a score"
    half = cell["half_width"]
    return number(cell["mean"], metric) + (f" plus or minus {number(half, metric)}" if half is not None else "")


def _difference_told(found: Row) -> str:
    if found["difference"] is None:
        return found["verdict"]
    interval = "" if found["interval"] is None else " ({:.4g} to {:.4g})".format(*found["interval"])
    return f"{found['difference']:+.4g}{interval}, {found['verdict']}"


def _mean(row: Row, metric: Row) -> float | None:
    cell = row["cells"].get(metric["name"])
    return None if cell is None else cell["mean"]


def _extent(row: Row, metric: Row) -> list[float]:
    cell = row["cells"].get(metric["name"])
    if cell is None:
        return []
    half = cell["half_width"] or 0.0
    return [*cell["values"], cell["mean"] - half, cell["mean"] + half]


def _ends(found: Row) -> list[float]:
    points = [found["difference"], *(found["interval"] or ()), *(found["items_interval"] or ())]
    return [point for point in points if point is not None]


def _better(metric: Row) -> str:
    said = {True: "higher is better", False: "lower is better", None: "neither end is better"}
    return said[metric["higher_is_better"]]


# ---------------------------------------------------------------------------------------------------------------------
# Layer maps


@drawn
def layer_map(name: str, found: Row) -> Picture:
    """A strategy's pairs as lines from the student's blocks (left) to the teacher's (right); block 0 is on top.

    Both models are drawn equally tall, so a map that follows depth is made of nearly level lines.
    """
    pairs, student_blocks, teacher_blocks = found["pairs"], found["student_blocks"], found["teacher_blocks"]
    tall = min(max(15.0 * teacher_blocks, 150.0), max(9.2 * teacher_blocks, 330.0))
    figure, ax = axes(230, tall + 30, 0, 0, 24, 6)
    ax.set_xlim(0, 230)
    ax.set_ylim(tall, 0)
    ax.axis("off")
    columns = (
        ("student", student_blocks, 34.0, {s for s, _ in pairs}),
        ("teacher", teacher_blocks, 156.0, {t for _, t in pairs}),
    )
    for side, blocks, left, used in columns:
        ax.text(left + 20, -8, side, ha="center", va="bottom", size=SMALL, color=COLOUR["muted"], clip_on=False)
        _column(ax, blocks, left, tall, used, numbers_right=side == "teacher")
    for student, teacher in pairs:
        ends = [(student + 0.5) * tall / student_blocks, (teacher + 0.5) * tall / teacher_blocks]
        ax.plot([74, 156], ends, color=COLOUR["accent"], lw=1.6, marker="o", ms=3.4, zorder=4)

    strategy = found["strategy"]
    title = f"Layer map of {strategy}"
    told = ", ".join(f"{s} from {t}" for s, t in pairs)
    words = f"{student_blocks} student blocks and {teacher_blocks} teacher blocks; " + (
        f"student block from teacher block: {told}." if pairs else "no pair."
    )
    return Picture(
        name, title, words, svg(figure, name, title, words), ("student block", "teacher block"), _pairs(pairs)
    )


def _pairs(pairs: Iterable[Sequence[int]]) -> tuple[tuple[int, int], ...]:
    return tuple((student, teacher) for student, teacher in pairs)


def _column(ax: Any, blocks: int, left: float, tall: float, used: set[int], numbers_right: bool) -> None:
    """A model as a column of boxes with their numbers, those in a pair filled.

    Where the boxes are too flat for every number, those in a pair have theirs, and every fourth that is far from one.
    """
    from matplotlib.patches import Rectangle

    step = tall / blocks
    gap = min(2.5, step * 0.25)
    for block in range(blocks):
        paired = block in used
        face, edge = COLOUR["band"] if paired else "none", COLOUR["accent" if paired else "muted"]
        corner = (left, block * step + gap / 2)
        ax.add_patch(Rectangle(corner, 40, step - gap, fc=face, ec=edge, lw=1.1 if paired else 0.7))
        if paired or step >= 11 or (block % 4 == 0 and not {block - 1, block + 1} & used):
            x, side = (left + 46, "left") if numbers_right else (left - 6, "right")
            tone = COLOUR["ink" if paired else "muted"]
            ax.text(x, (block + 0.5) * step, str(block), ha=side, va="center", size=SMALL - 1, color=tone)
