"""Pieces of HTML. A string is text and is escaped; what is HTML already is a `Markup`, so that the two can't be confused."""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Iterable, Sequence
from typing import Any
from urllib.parse import quote

from markupsafe import Markup

from llmkd.report.page.svg import Picture
from llmkd.text import figures

TABLE_ROWS = 150  # rows of a figure's numbers that are shown as a table; the CSV holds all
NUMBER = re.compile(r"[-+−]?[\d,]+(\.\d+)?(e[-+−]\d+)?")
Content = str | Markup
"""Text, or HTML."""


def tag(name: str, *content: Content, **attributes: str | int | None) -> Markup:
    """An element; text inside it is escaped. Attributes that are None or empty are left out, `class_` is class, `_` is `-`."""
    given = {key.rstrip("_").replace("_", "-"): value for key, value in attributes.items() if value not in (None, "")}
    written = [Markup(' {}="{}"').format(key, value) for key, value in given.items()]
    return Markup("<{0}{1}>{2}</{0}>").format(name, join(written), join(content))


def join(parts: Iterable[Content], between: str = "") -> Markup:
    """Parts one after another."""
    return Markup(between).join(parts)


def hidden(text: str) -> Markup:
    """Text for those who do not see the page."""
    return tag("span", text, class_="unseen")


def paragraph(text: Content, kind: str = "") -> Markup:
    """A paragraph; nothing where there is no text."""
    return tag("p", text, class_=kind) if text else Markup()


def missing(text: str) -> Markup:
    """Names what a part has not got yet."""
    return paragraph(text, "missing-part")


def section(name: str, heading: str, parts: Iterable[Content]) -> Markup:
    """A part of the page with its heading; empty parts are left out."""
    inner = [tag("h2", heading, id=f"{name}-heading"), *(part for part in parts if part)]
    return tag("section", join(["", *inner, ""], "\n"), id=name, aria_labelledby=f"{name}-heading")


def details(summary: Content, inner: Content, kind: str = "") -> Markup:
    """A part that opens."""
    return tag("details", tag("summary", summary), "\n", inner, "\n", class_=kind)


def pictures(figures: Iterable[Content], kind: str = "") -> Markup:
    """Figures side by side, as many as there is room for; nothing where there is none."""
    inner = join(figures)
    return tag("div", inner, class_=f"pictures {kind}".strip()) if inner else Markup()


def table(caption: str, head: Iterable[Content], rows: Iterable[Sequence[Any]], kind: str = "") -> Markup:
    """A table of plain values in a box that scrolls by itself; the first column heads its row."""
    lines = [tag("tr", tag("th", text(row[0]), scope="row"), *map(cell, row[1:])) for row in rows]
    return whole_table(caption, [row_of_heads(head)], lines, kind)


def row_of_heads(head: Iterable[Content]) -> Markup:
    """The line that names a table's columns."""
    return tag("tr", *(tag("th", name, scope="col") for name in head))


def whole_table(caption: str, head: Iterable[Markup], lines: Iterable[Markup], kind: str) -> Markup:
    """A table of lines that are HTML already, in a box that scrolls sideways, by keyboard too."""
    inner = [tag("caption", caption), tag("thead", *head), tag("tbody", "\n", join(lines, "\n"), "\n")]
    whole = tag("table", join(inner, "\n"), class_=kind)
    return tag("div", whole, class_="scroll", role="region", tabindex="0", aria_label=caption)


def cell(value: Any) -> Markup:
    """A value in a table; numbers stand at the right."""
    shown = text(value)
    return tag("td", shown, class_="number" if NUMBER.fullmatch(shown) else "")


def text(value: Any) -> Content:
    """A value as a table shows it; nothing for None."""
    if value is None:
        return ""
    return figures(value, 5) if isinstance(value, float) else value if isinstance(value, str) else str(value)


def csv_link(name: str, head: Sequence[str], rows: Iterable[Sequence[Any]]) -> Markup:
    """A link that saves a table as CSV, every number whole; the data is in the link itself."""
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(head)
    writer.writerows(rows)
    data = quote(buffer.getvalue(), safe=",;:/=()!*@ ").replace(" ", "%20")
    address = f"data:text/csv;charset=utf-8,{data}"
    return tag("a", "CSV", hidden(f" of {name}"), class_="csv", download=f"{name}.csv", href=address)


def figure(picture: Picture, name: str, about: str = "") -> Markup:
    """A picture with its caption, `name` in bold, and, to be opened, its numbers as a table and as CSV."""
    shown = picture.table
    rows = shown.rows[:TABLE_ROWS]
    note = [f"the first {len(rows)} of {len(shown.rows)} rows"] if len(rows) < len(shown.rows) else []
    if len(shown.head) < len(picture.numbers.head):
        note.append(f"{len(shown.head)} of {len(picture.numbers.head)} columns")
    parts = [
        tag("p", csv_link(picture.name, picture.numbers.head, picture.numbers.rows)),
        table(picture.title, shown.head, rows, "numbers"),
        paragraph(f"Shown: {', '.join(note)}; the CSV holds all." if note else "", "small"),
        paragraph(picture.note, "small"),
    ]
    below = details(join(["Numbers", hidden(f": {picture.title}")]), join(parts), "figure-numbers")
    return tag("figure", picture.svg, "\n", tag("figcaption", tag("b", name), about), "\n", below)


def definitions(items: Iterable[tuple[str, Content]], kind: str) -> Markup:
    """A list of names and what they are."""
    return tag("dl", *(tag("div", tag("dt", name), tag("dd", value)) for name, value in items), class_=kind)


def data_script(name: str, value: Any) -> Markup:
    """JSON that the page's script reads. No character of it can end the element."""
    body = json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    for character in "<>&\u2028\u2029":
        body = body.replace(character, f"\\u{ord(character):04x}")
    return tag("script", Markup(body), type="application/json", id=name)
