"""Drawings as SVG that lives inside a page: text stays text, and the page's style sheet says each colour.

A drawing is made with one stand-in colour per role; `svg` puts the style sheet's variable in its place, so that the same
drawing serves light, dark and print. The same numbers give the same bytes.
"""

from __future__ import annotations

import functools
import io
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Roles; page.css gives each its colour as a variable of that name.
ROLES = ("ink", "muted", "rule", "paper", "accent", "band", *(f"series-{number}" for number in range(1, 9)))
COLOUR = {role: f"#a1b0{number:02x}" for number, role in enumerate(ROLES)}

# Lines of one drawing differ in colour, dashes and marker, so that none of the three is needed alone.
DASHES: tuple[Any, ...] = ("solid", (0, (6, 2)), (0, (2, 1.6)), (0, (8, 2, 2, 2)), (0, (1, 1.4)), (0, (10, 3)))
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")

TEXT, SMALL = 11.5, 10.5  # font sizes in pixels
LONGEST_NAME = 18  # characters of a name inside a picture

Given = ParamSpec("Given")
Made = TypeVar("Made")


@dataclass(frozen=True)
class Picture:
    """A drawing with what it shows in words and in numbers: `head` names the columns of `rows`.

    The first `columns` of them make the table beside it (all, where it is None); the CSV holds all.
    """

    name: str
    title: str
    description: str
    svg: str
    head: tuple[str, ...]
    rows: tuple[tuple[Any, ...], ...]
    columns: int | None = None


def drawn(function: Callable[Given, Made]) -> Callable[Given, Made]:
    """Draws under this module's settings and leaves matplotlib's own as they were."""

    @functools.wraps(function)
    def wrapper(*args: Given.args, **kwargs: Given.kwargs) -> Made:
        import matplotlib

        settings: Any = {
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
        with matplotlib.rc_context(settings):
            return function(*args, **kwargs)

    return wrapper


def axes(width: float, height: float, left: float, right: float, top: float, bottom: float) -> tuple[Figure, Axes]:
    """A figure of `width` x `height` pixels with one set of axes inside the given borders."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width / 72, height / 72), dpi=72)
    figure.patch.set_visible(False)
    box = (left / width, bottom / height, (width - left - right) / width, (height - top - bottom) / height)
    made = figure.add_axes(box)
    made.patch.set_visible(False)
    made.set_axisbelow(True)
    return figure, made


def few_ticks(axis: Any, count: int) -> None:
    """At most about `count` round numbers along an axis."""
    from matplotlib.ticker import MaxNLocator

    axis.set_major_locator(MaxNLocator(count, steps=[1, 2, 2.5, 5, 10]))


def whole_numbers(axis: Any) -> None:
    """Numbers in the thousands, without decimals and with separators."""
    from matplotlib.ticker import StrMethodFormatter

    axis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))


def log_axis(ax: Any) -> None:
    """A logarithmic y axis with plain numbers at 1, 2 and 5."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    ax.set_yscale("log")
    ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    ax.yaxis.set_minor_locator(NullLocator())
    ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


def short(name: str) -> str:
    """A name cut to what a picture has room for."""
    return name if len(name) <= LONGEST_NAME else name[: LONGEST_NAME - 1] + "…"


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


def svg(figure: Figure, name: str, title: str, description: str) -> str:
    """The figure as an inline `<svg>` with an accessible name and description; `name` makes its ids its own."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    text = buffer.getvalue()
    body = text[text.index(">", text.index("<svg ")) + 1 : text.rindex("</svg>")]
    body = re.sub(r"<metadata>.*?</metadata>", "", body, flags=re.S)
    body = re.sub(r"<defs>\s*<style.*?</style>\s*</defs>", "", body, flags=re.S)  # it would style the whole page
    body = re.sub(r"<[^>]+>", lambda tag: _tidied(tag[0], name), body)
    body = re.sub(r">\s+<", "><", body)
    while body != (body := re.sub(r"<g></g>|<defs></defs>", "", body)):
        pass
    width, height = figure.get_size_inches() * 72
    return (
        f'<svg class="picture" role="img" aria-label="{escape(title)}" aria-describedby="{name}-words" '
        f'viewBox="0 0 {width:.0f} {height:.0f}" width="{width:.0f}" height="{height:.0f}">'
        f'<desc id="{name}-words">{escape(description)}</desc>{body.strip()}</svg>'
    )


def _tidied(tag: str, name: str) -> str:
    """One tag with ids of the picture's own, colours by role, no font family, and two decimals."""
    tag = " ".join(tag.split())
    tag = re.sub(r' id="[a-z0-9.]+_\d+"', "", tag)  # matplotlib numbers its groups; nothing refers to them
    tag = tag.replace(' id="', f' id="{name}-').replace('xlink:href="#', f'href="#{name}-')
    tag = tag.replace("url(#", f"url(#{name}-")
    tag = re.sub(r" ?transform=\"rotate\(-?0 [^)]*\)\"", "", tag)
    tag = re.sub(r" ?font-family: [^;\"]*;?", "", tag)
    tag = re.sub(r"#a1b0([0-9a-f]{2})", lambda found: f"var(--{ROLES[int(found[1], 16)]})", tag)
    tag = re.sub(r"-?\d+\.\d{3,}", lambda number: f"{float(number[0]):.2f}".rstrip("0").rstrip("."), tag)
    return tag
