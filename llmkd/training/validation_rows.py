"""Which rows a run trains on and which it is validated on: no row is both."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from llmkd.data.batches import Batch
from llmkd.data.file_hashes import file_hash
from llmkd.data.order import permuted
from llmkd.data.other_families import collate_for
from llmkd.data.rows import local_files
from llmkd.data.splits import slices_meet
from llmkd.data.tokenized import Tokens
from llmkd.distributed.ranks import World, on_main
from llmkd.errors import InputError
from llmkd.processes import Stopping
from llmkd.recipe.data import Data, Rows
from llmkd.training.jobs import Job
from llmkd.training.tokens import no_tokens, tokens_of

_SHARED = (
    "and what data.validation.share holds out of the one is trained on in the other; write it once, with the sum of the weights, or give "
    "data.validation a source of its own"
)
_HELD_OUT = "give a file of held-out rows as source, or write share: 0.05"


@dataclass(frozen=True)
class RunRows:
    """A run's rows as tokens."""

    all: Tokens
    """Those that are trained on, and those of validation; by its number here a cache knows a row."""
    training: Tokens
    """All but rows of validation that have a source or a split of their own; none of a stream."""
    validation: np.ndarray | None
    """Numbers in `all`; None where the recipe's data has no section `validation`."""

    @staticmethod
    def apart(training: Tokens, validation: Tokens) -> RunRows:
        """Rows to train on and others to be validated on."""
        first = len(training.rows)
        return RunRows(training.followed_by(validation), training, np.arange(first, first + len(validation.rows)))


def run_rows(world: World, job: Job, tokenizer: Any, stopping: Stopping | None = None) -> RunRows:
    """The job's rows (all ranks take part). Raises InputError where rows are both trained and validated on, or none is left to train on."""
    given, apart = job.data.validation, job.data.held_out
    on_main(world, lambda: check_apart(job.data))
    rows = no_tokens() if job.data.streaming else tokens_of(world, job, tokenizer, stopping)
    if given is None:
        return RunRows(rows, rows, None)
    if apart is not None:
        with named_validation():
            own = tokens_of(world, replace(job, data=apart), tokenizer, stopping)
        check_tokens_apart(job.data, rows.digests, own.digests)
        if job.data.streaming:
            return RunRows(own, rows, np.arange(len(own.rows)))
        return RunRows.apart(rows, own)
    check_tokens_apart(job.data, rows.digests, ())
    apart_by_share = divided(job.data, rows)
    held_out = apart_by_share.held_out
    some = permuted(np.arange(min(given.rows, len(held_out))), len(held_out), (given.seed,))
    return RunRows(apart_by_share, apart_by_share, held_out[some])


def divided(data: Data, rows: Tokens) -> Tokens:
    """The rows with those of each source set apart that `data.validation.share` holds out; as they are where there is no share."""
    given = data.validation
    if given is None or given.share is None:
        return rows
    sources = [replace(part, held_out=held_out_count(part.rows, given.share)) for part in rows.sources]
    return replace(rows, sources=tuple(sources), held_out_seed=given.seed)


def validation_batches(world: World, job: Job, rows: RunRows, pad_id: int) -> list[Batch]:
    """This rank's micro-batches of the rows of validation, as many as every other rank's, the longest rows first; none without such rows.

    They have `train.micro_batch_size` rows or one less; one more only where the ranks could not have as many each otherwise. Raises
    InputError where there are fewer rows than ranks.
    """
    numbers = rows.validation
    if numbers is None or not job.train.validate_every:
        return []
    size, count = world.size * job.train.micro_batch_size, len(numbers)
    check_row_for_each(count, world.size)
    rounds = min(-(-count // size), count // world.size)
    order = numbers[np.argsort(-rows.all.lengths_of(numbers), kind="stable")]
    collate, packed = collate_for(job.family), job.data.batching == "packed"
    return [
        rows.all.batch(part, collate=collate, pad_id=pad_id, packed=packed)
        for part in np.array_split(order, rounds * world.size)[world.rank :: world.size]
    ]


def check_row_for_each(rows: int, ranks: int) -> None:
    """Raise InputError where ranks would have no row to validate."""
    if rows < ranks:
        raise InputError(
            f"data.validation: {rows} rows for {ranks} ranks, and each needs one; give more of them, or start fewer ranks"
        )


def held_out_count(rows: int, share: float) -> int:
    """How many of so many rows a share holds out, at least one. Raises InputError where that is all."""
    count = max(1, round(rows * share))
    if count >= rows:
        raise InputError(
            f"data.validation.share: {share:g} of {rows} rows leaves none to train on; write a smaller share, or give more rows"
        )
    return count


def trained_count(data: Data, rows: int) -> int:
    """How many of a section's rows are trained on."""
    share = None if data.validation is None else data.validation.share
    return rows if share is None else rows - held_out_count(rows, share)


@contextlib.contextmanager
def named_validation() -> Iterator[None]:
    """Inside, a mistake in the section data is one in data.validation."""
    try:
        yield
    except InputError as error:
        raise InputError(re.sub("^data", "data.validation", str(error))) from error


def check_apart(data: Data) -> None:
    """Raise InputError where a file, or a copy of it, is read for training and for validation, but for slices that share no row."""
    share = data.validation is not None and data.validation.share is not None
    if data.held_out is None and not share:
        return
    seen: dict[int, list[tuple[Path, Rows]]] = {}
    for file, part in _files(data):
        of_size = seen.setdefault(file.stat().st_size, [])
        same = _same_content(file, part, of_size) if share else None
        if same is not None:
            which = f"{file} is read twice" if file == same else f"{file} holds what {same} does"
            raise InputError(f"data.sources: {which}, {_SHARED}")
        of_size.append((file, part))
    if data.held_out is None:
        return
    with named_validation():
        validation = _files(data.held_out)
    for file, part in validation:
        same = _same_content(file, part, seen.get(file.stat().st_size, []))
        if same is not None:
            which = (
                f"{file} is trained on too" if file == same else f"{file} holds what {same} does, which is trained on"
            )
            raise InputError(f"data.validation: {which}; {_HELD_OUT}")


def _same_content(file: Path, part: Rows, others: Sequence[tuple[Path, Rows]]) -> Path | None:
    """The first of other files of one size that is this one or, to the byte, a copy of it; slices of the same files may be apart."""
    empty = not file.stat().st_size
    for other, of in others:
        if other == file and _resolved(part) == _resolved(of) and not slices_meet(part.split, of.split):
            continue
        if other == file or (not empty and file_hash(other) == file_hash(file)):
            return other
    return None


def check_tokens_apart(data: Data, trained: Sequence[str], validated: Sequence[str]) -> None:
    """Raise InputError where sources are the same rows as tokens, whatever their files, and one is trained on and the other validated.

    `trained`, `validated`: the digests of the sources' tokens; none are validated where a share is.
    """
    names = [part.source for part in data.parts]
    for place, digest in enumerate(trained if not validated else ()):
        if digest in trained[:place]:
            same = names[trained.index(digest)]
            raise InputError(f"data.sources: {names[place]} has the rows of {same}, {_SHARED}")
    for part, digest in zip(() if data.held_out is None else data.held_out.parts, validated, strict=True):
        if digest in trained:
            same = names[trained.index(digest)]
            raise InputError(f"data.validation: {part.source} has the rows of {same}, which is trained on; {_HELD_OUT}")


def _files(data: Data) -> list[tuple[Path, Rows]]:
    return [(file, part) for part in data.parts for file in _resolved(part)]


def _resolved(part: Rows) -> list[Path]:
    return [file.resolve() for file in local_files(part.source, part.split)]
