"""Which of a teacher's blocks a student keeps, by what was measured of each: rules over numbers, and a model run without some blocks."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from torch import nn

from llmkd.errors import InputError

Kept = tuple[int, ...]
"""Numbers of the blocks that stay, in order."""


@dataclass(frozen=True)
class Removal:
    """One block that was taken out, after those before it."""

    block: int
    ce: float
    """The cross-entropy per token of the model that is left."""


def most_influential(influence: Sequence[float], keep: int) -> Kept:
    """The `keep` blocks of highest influence, in the teacher's order; of equals the shallower stays.

    As ShortGPT prunes (arXiv 2403.03853). Raises InputError where an influence is not a number.
    """
    _check_numbers(influence, "influence")
    ranked = sorted(range(len(influence)), key=lambda block: (-influence[block], block))
    return tuple(sorted(ranked[:keep]))


def least_harmful(
    depth: int, keep: int, measure: Callable[[Sequence[Kept]], Sequence[float]]
) -> tuple[Kept, list[Removal]]:
    """(the blocks that stay, those that went): one by one, each time the block without which the model is best; of equals the deeper goes.

    `measure`: the cross-entropy of the model of each of some lists of blocks; all lists of one removal at once. Raises InputError where
    one is not a number.
    """
    kept: Kept = tuple(range(depth))
    removed = []
    while len(kept) > keep:
        without = [kept[:place] + kept[place + 1 :] for place in range(len(kept))]
        measured = measure(without)
        _check_numbers(measured, "perplexity")
        place = min(range(len(kept)), key=lambda place: (measured[place], -place))
        removed.append(Removal(kept[place], measured[place]))
        kept = without[place]
    return kept, removed


def _check_numbers(values: Sequence[float], rule: str) -> None:
    if any(math.isnan(value) for value in values):
        raise InputError(
            f"student.copy_blocks: {rule} was measured as no number; look for a NaN in the teacher's weights, or write a list of blocks"
        )


@contextlib.contextmanager
def run_of(stack: nn.ModuleList) -> Iterator[Callable[[Kept], None]]:
    """Inside, a function that leaves these blocks alone in the model's list of blocks, which all of them are in again afterwards.

    For blocks of one kind that keep nothing by their numbers (no cache of keys and values).
    """
    every = list(stack)

    def only(kept: Kept) -> None:
        del stack[:]
        stack.extend(every[block] for block in kept)

    try:
        yield only
    finally:
        only(tuple(range(len(every))))
