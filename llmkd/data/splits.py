"""Names of splits as `datasets` reads them: `train`, `train[:5%]`, `train[100:200]`, `train[:5%]+test`."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

_SLICE = re.compile(r"([^\[]+)\[(-?[\d_]+)?(%?):(-?[\d_]+)?(%?)\](?:\([^)]*\))?")


@dataclass(frozen=True)
class _Part:
    """A split, or a slice of one."""

    name: str
    in_percent: bool = False
    first: float = -math.inf
    end: float = math.inf

    @property
    def bounds(self) -> list[float]:
        """Where it is cut; nowhere if it is a whole split."""
        return [bound for bound in (self.first, self.end) if math.isfinite(bound)]


def may_overlap(split: str, other: str) -> bool:
    """Whether a row may be in both; of slices that are counted in different ways (% and rows, from the start and the end) it may be."""
    return any(_meet(one, two) for one in _parts(split) for two in _parts(other))


def _meet(one: _Part, other: _Part) -> bool:
    if one.name != other.name and "all" not in (one.name, other.name):
        return False
    bounds = one.bounds + other.bounds
    from_the_end = {bound < 0 for bound in bounds}
    if not one.bounds or not other.bounds or one.in_percent != other.in_percent or len(from_the_end) > 1:
        return True
    return max(one.first, other.first) < min(one.end, other.end)


def _parts(split: str) -> list[_Part]:
    return [_part(part.strip()) for part in split.split("+")]


def _part(text: str) -> _Part:
    found = _SLICE.fullmatch(text)
    if found is None:  # a whole split, or what datasets will refuse
        return _Part(text.partition("[")[0])
    name, first, first_in_percent, end, end_in_percent = found.groups()
    in_percent = bool(first_in_percent or end_in_percent)

    def place(bound: str) -> float:
        return int(bound) + (100 if in_percent and bound.startswith("-") else 0)

    begins, ends = place(first) if first else -math.inf, place(end) if end else math.inf
    return _Part(name, in_percent, begins if begins else -math.inf, math.inf if in_percent and ends == 100 else ends)
