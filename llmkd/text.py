"""How numbers, names and tables are written for people: the same in the log, the terminal, Markdown and on the report's page."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

ABSENT = "–"  # where there is no number
Table = list[list[str]]
"""A header, then lines of as many cells."""


def fixed(value: float | None, decimals: int) -> str:
    """A number with so many decimals, separators at thousands, and a true minus sign."""
    return ABSENT if value is None else _minus(f"{value:,.{decimals}f}")


def figures(value: float | None, count: int) -> str:
    """A number with at most so many figures, and a true minus sign."""
    return ABSENT if value is None else _minus(f"{value:.{count}g}")


def amount(value: float | None) -> str:
    """A loss, a cost or a count: three figures below 1,000, whole with separators above; small whole numbers as they are."""
    if value is None:
        return ""
    if abs(value) >= 999.5:
        return fixed(value, 0)
    return str(value) if isinstance(value, int) else figures(value, 3)


def _minus(number: str) -> str:
    return number.replace("-", "\N{MINUS SIGN}")


def counted(count: int, one: str) -> str:
    """`1 rank`, `2 ranks`."""
    return f"{count:,} {one}" if count == 1 else f"{count:,} {one}s"


def listed(names: Sequence[str]) -> str:
    """`a, b and c`."""
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)


def shortened(text: str, longest: int) -> str:
    """A text cut to so many characters."""
    return text if len(text) <= longest else text[: longest - 1] + "…"


def aligned(table: Table) -> str:
    """A table in columns of spaces."""
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    lines = [" | ".join(map(str.ljust, line, widths)).rstrip() for line in table]
    return "\n".join([lines[0], "-+-".join("-" * width for width in widths), *lines[1:]])


def escaped(text: str) -> str:
    """A text on one line of Markdown that a viewer shows as it is: no HTML, no link or image, no emphasis, no heading or list."""
    line = " ".join(text.split())
    line = re.sub(r"&(?=#?\w+;)", "&amp;", line)
    line = re.sub(r"<(?=[A-Za-z/!?])", "&lt;", line)
    line = re.sub(r"([\\`*~\[\]]|(?<!\S)#|(?<![A-Za-z0-9])_|_(?![A-Za-z0-9]))", r"\\\1", line)
    return re.sub(
        r"^(\d*)(>|[-=](?=[-=])|[-+=.)](?!\S))", r"\1\\\2", line
    )  # what would begin a heading, a quotation or a list


def bullets(texts: Iterable[str]) -> str:
    """Texts as a list in Markdown."""
    return "\n".join(f"- {escaped(text)}" for text in texts)


def fenced(text: str, language: str) -> str:
    """A text as a block of code in Markdown, whatever backticks it holds."""
    longest = max(map(len, re.findall("`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}{language}\n{text.rstrip()}\n{fence}"
