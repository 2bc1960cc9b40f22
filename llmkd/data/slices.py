"""Slices of rows that are there, as `datasets` counts them for data sets of the hub."""

from __future__ import annotations

from datasets import Dataset, ReadInstruction

from llmkd.data.splits import of_files
from llmkd.errors import InputError, first_line


def sliced(rows: Dataset, split: str) -> Dataset:
    """The rows of local files that `split` names (`train`, `train[:10%]`, `train[100:200]`). Raises InputError where that is none."""
    name, part = of_files(split)
    if not part:
        return rows
    try:
        (found,) = ReadInstruction.from_spec(name + part).to_absolute({name: len(rows)})
    except ValueError as error:
        raise InputError(
            f"data.split: {split!r} of {len(rows)} rows can't be taken ({first_line(error)}); write another slice"
        ) from error
    numbers = range(found.from_ or 0, len(rows) if found.to is None else found.to)
    if not numbers:
        raise InputError(
            f"data.split: {split!r} takes none of {len(rows)} rows; write another slice, or give more rows"
        )
    return rows.select(numbers)
