"""How numbers, names and tables are written for people: the same in the log, the terminal, Markdown and on the report's page."""

from __future__ import annotations

from collections.abc import Sequence

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
