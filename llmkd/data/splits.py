"""Names of splits as `datasets` reads them: `train`, `train[:5%]`, `train[100:200]`, `train[:5%]+test`."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from llmkd.errors import InputError

_SLICE = re.compile(r"([^\[]+)\[(-?[\d_]+)?(%?):(-?[\d_]+)?(%?)\](?:\([^)]*\))?")


@dataclass(frozen=True)
class _Part:
    """A split, or a slice of one."""

    name: str
    in_percent: bool = False
    first: float = -math.inf
    end: float = math.inf
    sides: frozenset[tuple[float, bool]] = frozenset()
    """Of each place where it is cut (none if it is a whole split): whether it was counted from the end."""


def may_overlap(split: str, other: str) -> bool:
    """Whether a row may be in both; of slices that are counted in different ways (% and rows, from the start and the end) it may be."""
    return any(_meet(one, two) for one in _parts(split) for two in _parts(other))


def of_files(split: str, *, whole: bool = False) -> tuple[str, str]:
    """(the name, the slice) of a split of local files; the slice of a whole one is empty. `whole`: it must be.

    Raises InputError for what is no name and no slice.
    """
    name, bracket, rest = split.partition("[")
    if not name.replace("_", "").isalnum():
        raise InputError(
            f"data.split: {split!r} is not the name of a split, which is all that local files have; write e.g. train, or train[:10%]"
        )
    if not bracket:
        return name, ""
    if whole:
        raise InputError(
            f"data.split: {split!r} is a slice, and rows of files that are streamed are not counted; write streaming: false, or {name}"
        )
    if _SLICE.fullmatch(split) is None:
        raise InputError(
            f"data.split: {split!r} is not one slice of rows or percent, as local files have it; write e.g. {name}[:10%] or "
            f"{name}[100:200], and several slices as data.sources"
        )
    return name, bracket + rest


def slices_meet(split: str, other: str) -> bool:
    """As `may_overlap` for splits of the same files, whose names say nothing."""
    return may_overlap("rows" + of_files(split)[1], "rows" + of_files(other)[1])


def _meet(one: _Part, other: _Part) -> bool:
    if one.name != other.name and "all" not in (one.name, other.name):
        return False
    if not one.sides or not other.sides or one.in_percent != other.in_percent:
        return True
    sides, first, end = one.sides | other.sides, max(one.first, other.first), min(one.end, other.end)
    if one.in_percent:  # of 25 rows 90 % are rounded to 22 from the start, and to 23 from the end
        return first < end or (first == end and {(first, True), (first, False)} <= sides)
    return first < end or len({from_the_end for _, from_the_end in sides}) > 1


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
    begins, ends = begins if begins else -math.inf, math.inf if in_percent and ends == 100 else ends
    cuts = ((begins, first), (ends, end))
    sides = frozenset((place, bound.startswith("-")) for place, bound in cuts if bound and math.isfinite(place))
    return _Part(name, in_percent, begins, ends, sides)
