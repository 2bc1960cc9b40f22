"""Drawings as SVG that lives inside a page: text stays text, and the page's style sheet gives each colour.

A drawing is made with one stand-in colour per role; `inline` puts the style sheet's variable in its place, so that the
same drawing serves light, dark and print. The same numbers give the same bytes.
"""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple
from xml.etree import ElementTree

import matplotlib
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator, StrMethodFormatter

from llmkd.text import shortened

# Roles; page.css gives each its colour as a variable of that name.
ROLES = ("ink", "muted", "rule", "paper", "accent", "band", *(f"series-{number}" for number in range(1, 9)))
COLOUR = {role: f"#a1b0{number:02x}" for number, role in enumerate(ROLES)}

# Lines of one drawing differ in colour, dashes and marker, so that none of the three is needed alone.
DASHES: tuple[Any, ...] = ("solid", (0, (6, 2)), (0, (2, 1.6)), (0, (8, 2, 2, 2)), (0, (1, 1.4)), (0, (10, 3)))
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")

LONG_NUMBER = re.compile(r"-?\d+\.\d{3,}")  # in path data, transforms and styles alike
TEXT, SMALL = 11.5, 10.5  # font sizes in pixels
LONGEST_NAME = 18  # characters of a name inside a picture


class Numbers(NamedTuple):
    """A table of plain values: the names of its columns, and its rows."""

    head: tuple[str, ...]
    rows: tuple[tuple[Any, ...], ...]


@dataclass(frozen=True)
class Picture:
    """A drawing with what it shows in words and in numbers: all of them for the CSV, and the table that is shown beside it."""

    name: str
    title: str
    description: str
    svg: Markup
    numbers: Numbers
    table: Numbers
    note: str = ""


def picture(
    figure: Figure,
    name: str,
    title: str,
    description: str,
    numbers: Numbers,
    columns: int | None = None,
    table: Numbers | None = None,
    note: str = "",
) -> Picture:
    """A figure as a picture. The table beside it is `table`, or the first `columns` of the numbers, or all of them."""
    shown = table or Numbers(numbers.head[:columns], tuple(row[:columns] for row in numbers.rows))
    return Picture(name, title, description, inline(figure, name, title, description), numbers, shown, note)


SETTINGS: Any = {
    "svg.fonttype": "none",
    "svg.hashsalt": "llmkd",
    "text.parse_math": False,  # a $ in a name is a $
    "axes.formatter.useoffset": False,
    "axes.unicode_minus": True,
    "axes.labelcolor": COLOUR["muted"],
    "axes.labelsize": SMALL,
    "axes.edgecolor": COLOUR["rule"],
    "axes.linewidth": 1.0,
    "axes.spines.left": False,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "xtick.color": COLOUR["rule"],
    "ytick.color": COLOUR["rule"],
    "xtick.labelcolor": COLOUR["muted"],
    "ytick.labelcolor": COLOUR["muted"],
    "xtick.labelsize": SMALL,
    "ytick.labelsize": SMALL,
    "xtick.major.size": 3.0,
    "ytick.major.size": 0.0,
    "grid.color": COLOUR["rule"],
    "grid.linewidth": 0.7,
    "text.color": COLOUR["ink"],
    "font.size": TEXT,
}
drawn = matplotlib.rc_context(SETTINGS)
"""Decorates what draws: under these settings, and matplotlib's own are left as they were."""


def axes(width: float, height: float, left: float, right: float, top: float, bottom: float) -> tuple[Figure, Axes]:
    """A figure of `width` x `height` pixels with one set of axes inside the given borders."""
    figure = Figure(figsize=(width / 72, height / 72), dpi=72)
    figure.patch.set_visible(False)
    box = (left / width, bottom / height, (width - left - right) / width, (height - top - bottom) / height)
    ax = figure.add_axes(box)
    ax.patch.set_visible(False)
    ax.set_axisbelow(True)
    return figure, ax


def pixel_axes(width: float, height: float) -> tuple[Figure, Axes]:
    """A figure without scales, whose coordinates are pixels from its upper left corner."""
    figure, ax = axes(width, height, 0, 0, 0, 0)
    ax.set_xlim(0, width)
    ax.set_ylim(height, 0)
    ax.axis("off")
    return figure, ax


def few_ticks(axis: Any, count: int) -> None:
    """At most about `count` round numbers along an axis."""
    axis.set_major_locator(MaxNLocator(count, steps=[1, 2, 2.5, 5, 10]))


def whole_numbers(axis: Any) -> None:
    """Numbers in the thousands, without decimals and with separators."""
    axis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))


def log_axis(ax: Any) -> None:
    """A logarithmic y axis with plain numbers at 1, 2 and 5."""
    ax.set_yscale("log")
    ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    ax.yaxis.set_minor_locator(NullLocator())
    ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


def short(name: str) -> str:
    """A name cut to what a picture has room for."""
    return shortened(name, LONGEST_NAME)


def spread(wanted: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """Places for labels: near the wanted ones, in their order, at least `gap` apart, between `low` and `high`.

    Where there is no room for all, they stand closer, evenly.
    """
    gap = min(gap, (high - low) / max(len(wanted) - 1, 1))
    order = sorted(range(len(wanted)), key=lambda i: wanted[i])
    places = list(wanted)
    least = low
    for i in order:
        places[i] = least = max(places[i], least)
        least += gap
    most = high
    for i in reversed(order):
        places[i] = most = min(places[i], most)
        most -= gap
    return places


# --- From matplotlib's file to an element of the page


def inline(figure: Figure, name: str, title: str, description: str) -> Markup:
    """The figure as an inline `<svg>` with an accessible name and description; `name` makes its ids its own."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    drawing = ElementTree.fromstring(buffer.getvalue())
    for element in drawing.iter():
        _tidy(element, name)
    _prune(drawing)
    width, height = (f"{72 * inches:.0f}" for inches in figure.get_size_inches())
    about = {"class": "picture", "role": "img", "aria-label": title, "aria-describedby": f"{name}-words"}
    svg = ElementTree.Element("svg", {**about, "viewBox": f"0 0 {width} {height}", "width": width, "height": height})
    ElementTree.SubElement(svg, "desc", {"id": f"{name}-words"}).text = description
    svg.extend(drawing)
    return Markup(ElementTree.tostring(svg, encoding="unicode"))


def _tidy(element: ElementTree.Element, name: str) -> None:
    """Strip an element of namespaces and white space; make its ids the picture's own, its colours roles and its numbers short."""
    element.tag = element.tag.rpartition("}")[2]
    attributes = {key.rpartition("}")[2]: " ".join(value.split()) for key, value in element.attrib.items()}
    element.attrib.clear()
    for key, value in attributes.items():
        if key == "id":
            if element.tag == "g":  # matplotlib numbers its groups; nothing refers to them
                continue
            value = f"{name}-{value}"
        elif key == "href":
            value = f"#{name}-{value.removeprefix('#')}"
        elif key == "style":
            value = "; ".join(part for part in value.split("; ") if not part.startswith("font-family"))
        elif key == "transform" and value.startswith(("rotate(-0 ", "rotate(0 ")):
            continue
        value = value.replace("url(#", f"url(#{name}-")
        for role, colour in COLOUR.items():
            value = value.replace(colour, f"var(--{role})")
        element.set(key, LONG_NUMBER.sub(lambda number: f"{float(number[0]):.2f}".rstrip("0").rstrip("."), value))
    element.text = element.text if (element.text or "").strip() else None
    element.tail = None


def _prune(element: ElementTree.Element) -> None:
    """Drop what nobody sees: metadata, style sheets (one would style the whole page), groups of nothing."""
    for child in list(element):
        _prune(child)
        if child.tag in ("metadata", "style") or (child.tag in ("g", "defs") and not len(child)):
            element.remove(child)
