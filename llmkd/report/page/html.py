"""Pieces of HTML: escaped text, tables, data links and figures with their numbers."""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Sequence
from html import escape
from typing import Any
from urllib.parse import quote

from llmkd.report.page.svg import Picture

TABLE_ROWS = 150  # rows of a figure's numbers that are shown as a table; the CSV holds all


def hidden(text: str) -> str:
    """Text for those who do not see the page."""
    return f'<span class="unseen">{escape(text)}</span>'


def section(name: str, heading: str, *parts: str) -> str:
    """A part of the page with its heading; empty parts are left out."""
    inner = "\n".join(part for part in parts if part)
    return f'<section id="{name}" aria-labelledby="{name}-heading">\n<h2 id="{name}-heading">{escape(heading)}</h2>\n{inner}\n</section>'


def paragraph(text: str, kind: str = "") -> str:
    """A paragraph of plain text."""
    return f"<p{_classed(kind)}>{escape(text)}</p>"


def missing(text: str) -> str:
    """Says what a part has not got yet."""
    return paragraph(text, "missing-part")


def details(summary: str, inner: str, kind: str = "", open_: bool = False) -> str:
    """A part that opens; `summary` and `inner` are HTML."""
    return f"<details{_classed(kind)}{' open' if open_ else ''}><summary>{summary}</summary>\n{inner}\n</details>"


def table(caption: str, head: Sequence[str], rows: Sequence[Sequence[Any]], kind: str = "") -> str:
    """A table of plain values in a box that scrolls by itself; the first column heads its row."""
    heads = "".join(f'<th scope="col">{escape(name)}</th>' for name in head)
    lines = "\n".join(
        f'<tr><th scope="row">{escape(text(row[0]))}</th>' + "".join(_cell(value) for value in row[1:]) + "</tr>"
        for row in rows
    )
    return scrolling(
        caption,
        f"<table{_classed(kind)}><caption>{escape(caption)}</caption>\n<thead><tr>{heads}</tr></thead>\n<tbody>\n{lines}\n</tbody></table>",
    )


def scrolling(name: str, inner: str) -> str:
    """A box that scrolls sideways, by keyboard too."""
    return f'<div class="scroll" role="region" tabindex="0" aria-label="{escape(name)}">{inner}</div>'


def text(value: Any) -> str:
    """A value as a table shows it: floats to five digits, nothing for None."""
    if value is None:
        return ""
    return f"{value:.5g}" if isinstance(value, float) else str(value)


def csv_link(name: str, head: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """A link that saves a table as CSV, every number whole; the data is in the link itself."""
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(head)
    writer.writerows(rows)
    data = quote(buffer.getvalue(), safe=",;:/=()!*@ ").replace(" ", "%20")
    return f'<a class="csv" download="{escape(name)}.csv" href="data:text/csv;charset=utf-8,{data}">CSV{hidden(f" of {name}")}</a>'


def figure(picture: Picture, caption: str) -> str:
    """A picture with its caption (HTML) and, to be opened, its numbers as a table and as CSV."""
    head, rows = picture.head[: picture.columns], [row[: picture.columns] for row in picture.rows[:TABLE_ROWS]]
    less = [f"the first {len(rows)} of {len(picture.rows)} rows"] if len(rows) < len(picture.rows) else []
    less += [f"{len(head)} of {len(picture.head)} columns"] if len(head) < len(picture.head) else []
    cut = paragraph(f"Shown: {', '.join(less)}; the CSV holds all.", "small") if less else ""
    link = csv_link(picture.name, picture.head, picture.rows)
    below = details(
        f"Numbers{hidden(f': {picture.title}')}",
        f"<p>{link}</p>{table(picture.title, head, rows, 'numbers')}{cut}",
        "figure-numbers",
    )
    return f"<figure>{picture.svg}\n<figcaption>{caption}</figcaption>\n{below}</figure>"


def pairs(items: Sequence[tuple[str, str]], kind: str = "") -> str:
    """A list of names and what they are; the second is HTML."""
    inner = "\n".join(f"<div><dt>{escape(name)}</dt><dd>{value}</dd></div>" for name, value in items)
    return f"<dl{_classed(kind)}>\n{inner}\n</dl>"


def data_script(name: str, value: Any) -> str:
    """JSON that the page's script reads. No character of it can end the element."""
    body = json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    for character in "<>&\u2028\u2029":
        body = body.replace(character, f"\\u{ord(character):04x}")
    return f'<script type="application/json" id="{name}">{body}</script>'


def _cell(value: Any) -> str:
    shown = text(value)
    kind = "number" if re.fullmatch(r"[-+]?[\d,]+(\.\d+)?(e[-+]\d+)?", shown) else ""
    return f"<td{_classed(kind)}>{escape(shown)}</td>"


def _classed(kind: str) -> str:
    return f' class="{kind}"' if kind else ""
