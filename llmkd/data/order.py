"""Which rows a step is trained on: a pure function of (seed, step), whatever the number of rows, ranks or steps before it.

The places of a run are counted through all steps. At a mixture's places the sources take turns by their weights; each source's own rows
come in an order that is drawn again in every pass over it. Nothing is kept from step to step, and nothing as long as the data is made.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

WINDOW = 32
"""Steps whose rows are sorted by length together, before they are cut into steps again."""
WEIGHTS = 2**20
"""What the weights of a mixture's sources add up to, about: they are whole numbers, so that no rounding adds up over a long run."""
_ROUNDS = 6
_HELD_OUT, _PASS, _STEPS = 1, 2, 3
PACKED = 6
"""What a permutation orders: part of its key (4 and 5: `llmkd.data.streams`)."""

Lengths = Callable[[np.ndarray], np.ndarray]
"""From row numbers to the rows' lengths."""


@dataclass(frozen=True)
class Source:
    """A part of the data that rows are drawn from."""

    first: int
    """The number of its first row."""
    rows: int
    held_out: int = 0
    """How many of the rows are never trained on: `held_out_rows`."""
    weight: int = WEIGHTS
    """Its share of a mixture."""

    @property
    def trained(self) -> int:
        """How many of its rows are trained on."""
        return self.rows - self.held_out


def weighed(weights: Sequence[float]) -> list[int]:
    """Weights as whole numbers in the same proportions, the smallest at least 1."""
    return [max(1, round(weight / sum(weights) * WEIGHTS)) for weight in weights]


def permuted(numbers: np.ndarray, size: int, key: Sequence[int]) -> np.ndarray:
    """Where a permutation of range(size) puts these numbers; the key draws the permutation, of which nothing else is made.

    A Feistel network over the next even power of two, walked until it lands below `size` (Black and Rogaway, "Ciphers with arbitrary
    finite domains", 2002).
    """
    half = np.uint64(max(1, -(-int(size - 1).bit_length() // 2)))
    mask = (np.uint64(1) << half) - np.uint64(1)
    keys = np.random.SeedSequence(list(key)).generate_state(_ROUNDS, np.uint64)
    values = np.asarray(numbers).astype(np.uint64)
    outside = np.ones(len(values), dtype=bool)
    while outside.any():
        left, right = values[outside] >> half, values[outside] & mask
        for round_key in keys:
            left, right = right, left ^ (_mixed(right + round_key) & mask)
        values[outside] = (left << half) | right
        outside = values >= size
    return values.astype(np.int64)


def _mixed(values: np.ndarray) -> np.ndarray:
    """A hash of each number, whose every bit depends on all of the number's (the finalizer of splitmix64)."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def held_out_rows(sources: Sequence[Source], seed: int) -> np.ndarray:
    """The numbers of all rows that are never trained on, in ascending order."""
    parts = [
        source.first + permuted(np.arange(source.trained, source.rows), source.rows, (seed, number, _HELD_OUT))
        for number, source in enumerate(sources)
    ]
    return np.sort(np.concatenate(parts))


def trained_rows(places: np.ndarray, number: int, source: Source, held_out_seed: int) -> np.ndarray:
    """The numbers of a source's rows at these places (below `trained`) among those that are trained on; `number`: the source's."""
    if source.held_out:
        places = permuted(places, source.rows, (held_out_seed, number, _HELD_OUT))
    return source.first + places


def counts(places: int, sources: Sequence[Source]) -> list[int]:
    """How many rows of each source the first so many places of a run take."""
    taken, left, weights = [], places, sum(source.weight for source in sources)
    for source in sources:
        taken.append(left * source.weight // weights)
        left, weights = left - taken[-1], weights - source.weight
    return taken


def drawn(places: np.ndarray, sources: Sequence[Source], *, seed: int, held_out_seed: int) -> np.ndarray:
    """The row number at each of these places of a run.

    A source of share w takes the places p at which floor((p + 1)·w) is above floor(p·w), so that its share is exact within one row at any
    place; the other sources share the places left in the same way.
    """
    rows = np.empty(len(places), dtype=np.int64)
    open_at, left = np.arange(len(places)), np.asarray(places, dtype=np.int64)
    weights = sum(source.weight for source in sources)
    for number, source in enumerate(sources):
        before = left * source.weight // weights
        taken = (left + 1) * source.weight // weights > before
        rows[open_at[taken]] = _in_turn(before[taken], number, source, seed=seed, held_out_seed=held_out_seed)
        open_at, left, weights = open_at[~taken], (left - before)[~taken], weights - source.weight
    return rows


def _in_turn(turns: np.ndarray, number: int, source: Source, *, seed: int, held_out_seed: int) -> np.ndarray:
    """The rows of a source at these turns; each pass over its rows has an order of its own."""
    passes, places = np.divmod(turns, source.trained)
    shuffled = np.empty(len(turns), dtype=np.int64)
    for turn in np.unique(passes):
        here = passes == turn
        shuffled[here] = permuted(places[here], source.trained, (seed, number, _PASS, int(turn)))
    return trained_rows(shuffled, number, source, held_out_seed)


def rows_of_window(
    window: int,
    sources: Sequence[Source],
    *,
    lengths: Lengths | None,
    batch_size: int,
    seed: int,
    held_out_seed: int = 0,
) -> np.ndarray:
    """[steps, batch_size] row numbers of the steps of a window, `window_steps` many. A pure function of its arguments.

    With `lengths` the window's rows are sorted by length before they are cut into steps, longest first in each, and the steps are
    shuffled; without (None), rows stay as they are drawn. A step has the same share of each source either way.
    """
    steps = window_steps(sources, batch_size)
    places = np.arange(window * steps * batch_size, (window + 1) * steps * batch_size)
    rows = drawn(places, sources, seed=seed, held_out_seed=held_out_seed)
    if lengths is None:
        return rows.reshape(steps, batch_size)
    longest_first = rows[np.argsort(-lengths(rows).astype(np.int64), kind="stable")]
    of_source = np.searchsorted([source.first for source in sources], rows.reshape(steps, batch_size), side="right") - 1
    by_length = np.argsort(permuted(np.arange(steps), steps, (seed, _STEPS, window)))  # the steps, the longest first
    grouped: list[list[np.ndarray]] = [[] for _ in range(steps)]
    for number, source in enumerate(sources):  # each step keeps its share of each source
        own = longest_first[(longest_first >= source.first) & (longest_first < source.first + source.rows)]
        shares = (of_source[by_length] == number).sum(axis=1)
        for step, part in zip(by_length, np.split(own, np.cumsum(shares)[:-1]), strict=True):
            grouped[step].append(part)
    parts = [np.concatenate(of_step) for of_step in grouped]
    return np.stack([part[np.argsort(-lengths(part).astype(np.int64), kind="stable")] for part in parts])


def rows_of_step(
    step: int, sources: Sequence[Source], *, lengths: Lengths | None, batch_size: int, seed: int
) -> np.ndarray:
    """[batch_size] row numbers of a step (from 0)."""
    window, place = divmod(step, window_steps(sources, batch_size))
    return rows_of_window(window, sources, lengths=lengths, batch_size=batch_size, seed=seed)[place]


def window_steps(sources: Sequence[Source], batch_size: int) -> int:
    """How many steps are sorted together: `WINDOW`, or as many as one pass over the data has."""
    return min(WINDOW, max(1, sum(source.trained for source in sources) // batch_size))
