"""Whether two splits may share rows is what `datasets` would take of them."""

from __future__ import annotations

import itertools

from datasets import ReadInstruction

from llmkd.data.splits import may_overlap

NAMES = [
    *(
        "train",
        "test",
        "train[:50%]",
        "train[50%:]",
        "train[25%:75%]",
        "train[:90%]",
        "train[-10%:]",
        "train[:-50%]",
        "train[-20%:]",
        "train[80%:100%]",
    ),
    *("train[:30]", "train[30:]", "train[0:10]", "train[10:30]", "train[:-30]", "train[-30:]", "train[-40:-30]"),
    *("train[:10%]+test", "train[10%:20%] + train[90%:]", "test[:5]", "train[:]"),
]


SIZES = (10, 25, 75, 30, 40, 50, 100, 1000)


def rows_of(split: str, count: int) -> set[tuple[str, int]]:
    """The rows that datasets reads, of splits of so many rows; none where it refuses them as too few for a slice."""
    try:
        parts = ReadInstruction.from_spec(split).to_absolute({"train": count, "test": count})
    except ValueError:
        return set()
    return {
        (part.splitname, row) for part in parts for row in range(part.from_ or 0, count if part.to is None else part.to)
    }


def test_splits_that_share_a_row_at_some_size_may_overlap_and_no_others() -> None:
    for one, other in itertools.product(NAMES, NAMES):
        shared = any(rows_of(one, count) & rows_of(other, count) for count in SIZES)
        assert may_overlap(one, other) == shared, (one, other)


def test_a_split_of_all_overlaps_each() -> None:
    assert may_overlap("all", "test[:5]") and may_overlap("train", "all")
