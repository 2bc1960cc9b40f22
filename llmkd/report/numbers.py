"""How the report writes scores, differences and intervals; other numbers are written by `llmkd.text`."""

from __future__ import annotations

from collections.abc import Sequence

from llmkd.report.results import Average, Cell, Metric
from llmkd.text import ABSENT, figures, fixed


def score(value: float, metric: Metric) -> str:
    """One decimal where the metric runs from 0 to 100; else three, two from 100 up, and none from 1,000 up."""
    return fixed(value, _decimals(value, metric))


def mean(cell: Cell, metric: Metric, between: str = " ± ") -> str:
    """A mean with half its interval, if it has one, to the same decimals."""
    text = score(cell.mean, metric)
    return text if cell.half_width is None else f"{text}{between}{half_width(cell, metric)}"


def half_width(cell: Cell, metric: Metric) -> str:
    """Half the interval of a mean, to the decimals of the mean."""
    return fixed(cell.half_width, _decimals(cell.mean, metric))


def size(value: float, metric: Metric) -> str:
    """A difference without its sign: one decimal more than a score has."""
    return fixed(abs(value), _decimals(value, metric) + 1)


def signed(value: float, metric: Metric) -> str:
    """A difference with its sign, `+` too."""
    return ("\N{MINUS SIGN}" if value < 0 else "+") + size(value, metric)


def interval(ends: Sequence[float] | None, metric: Metric) -> str:
    """The interval of a difference."""
    return ABSENT if ends is None else f"{signed(ends[0], metric)} to {signed(ends[1], metric)}"


def p_value(value: float | None) -> str:
    """A p-value to three decimals."""
    return "< 0.001" if value is not None and value < 0.001 else fixed(value, 3)


def margin(value: float | None) -> str:
    """A margin as the recipe states it."""
    return figures(value, 6)


def average(value: Average) -> str:
    """A mean cosine or share with half its interval."""
    return fixed(value.mean, 3) + ("" if value.half_width is None else f" ± {fixed(value.half_width, 3)}")


def _decimals(value: float, metric: Metric) -> int:
    return 1 if metric.percent else 3 if abs(value) < 100 else 2 if abs(value) < 1000 else 0
