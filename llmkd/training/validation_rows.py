"""Which rows a run trains on and which it is validated on: no row is both."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset, concatenate_datasets

from llmkd.data.batches import Batch
from llmkd.data.rows import local_files
from llmkd.distributed.ranks import World, on_main
from llmkd.errors import InputError
from llmkd.recipe.data import Data
from llmkd.training import build
from llmkd.training.jobs import Job, read_rows


@dataclass(frozen=True)
class RunRows:
    """A run's rows as tokens."""

    training: Dataset
    validation: Dataset | None
    """None where the recipe's data has no section `validation`."""

    @property
    def all(self) -> Dataset:
        """Those of training and after them those of validation: by its place here a cache knows a row."""
        return self.training if self.validation is None else concatenate_datasets([self.training, self.validation])


def run_rows(world: World, job: Job, tokenizer: Any) -> RunRows:
    """The job's rows (all ranks take part). Raises InputError where rows are both trained and validated on, or none is left to train on."""
    given, apart = job.data.validation, job.data.held_out
    on_main(world, lambda: check_apart(job.data))
    rows = build.tokenized(world, job, tokenizer)
    if given is None:
        return RunRows(rows, None)
    if apart is not None:
        with _named():
            return RunRows(rows, build.tokenized(world, replace(job, data=apart), tokenizer))
    assert given.share is not None
    trained, held_out = divided(rows, given.share, given.seed)
    return RunRows(trained, held_out.select(range(min(given.rows, len(held_out)))))


def validation_batches(
    world: World, job: Job, rows: RunRows, make: Callable[..., Batch], *, pad_id: int, packed: bool
) -> list[Batch]:
    """This rank's micro-batches of the rows of validation, as many as every other rank's, the longest rows first; none without such rows.

    They have `train.micro_batch_size` rows or one less; one more only where the ranks could not have as many each otherwise. Raises
    InputError where there are fewer rows than ranks.
    """
    data, first = rows.validation, len(rows.training)
    if data is None or not job.train.validate_every:
        return []
    size, count = world.size * job.train.micro_batch_size, len(data)
    if count < world.size:
        raise InputError(
            f"data.validation: {count} rows for {world.size} ranks, and each needs one; give more of them, or start fewer ranks"
        )
    rounds = min(-(-count // size), count // world.size)
    order = np.argsort(-np.array(data["length"]), kind="stable")

    def batch(numbers: Sequence[int]) -> Batch:
        return make([data[n] for n in numbers], pad_id=pad_id, packed=packed, numbers=[first + n for n in numbers])

    return [batch(part.tolist()) for part in np.array_split(order, rounds * world.size)[world.rank :: world.size]]


def divided(rows: Dataset, share: float, seed: int) -> tuple[Dataset, Dataset]:
    """(rows to train on, in their order; the share that is held out, in a random order), a function of these arguments alone."""
    order = np.random.default_rng(seed).permutation(len(rows))
    count = held_out_count(len(rows), share)
    return rows.select(np.sort(order[count:])), rows.select(order[:count])


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


def held_out_rows(data: Data) -> Dataset | None:
    """The rows of validation that are in a split or source of their own, as text. Raises InputError where they can't be read."""
    check_apart(data)
    with _named():
        return None if data.held_out is None else read_rows(data.held_out)


@contextlib.contextmanager
def _named() -> Iterator[None]:
    """Inside, a mistake in the section data is one in data.validation."""
    try:
        yield
    except InputError as error:
        raise InputError(re.sub("^data", "data.validation", str(error))) from error


def check_apart(data: Data) -> None:
    """Raise InputError where a file is read for training and for validation: a file has no splits."""
    if data.held_out is None:
        return
    with _named():
        validation = _files(data.held_out)
    both = _files(data) & validation
    if both:
        raise InputError(
            f"data.validation: {min(both)} is trained on too; give a file of held-out rows as source, or write share: 0.05"
        )


def _files(data: Data) -> set[Path]:
    return {file.resolve() for file in local_files(data.source, data.split)}
