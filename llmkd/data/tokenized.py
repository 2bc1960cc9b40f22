"""Tokenized rows as batches draw them: one by one, or packed into sequences of one length. What is as long as the data stays on disk."""

from __future__ import annotations

import bisect
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from datasets import Dataset, concatenate_datasets

from llmkd.data import order
from llmkd.data.batches import Batch, TokenRow, collate_sequences
from llmkd.data.order import Source


@dataclass(frozen=True)
class Tokens:
    """The rows of one source or several, over their files. Batches draw them one by one."""

    rows: Dataset
    """Source after source."""
    lengths: tuple[np.ndarray, ...]
    """By source, [rows] tokens of each."""
    sources: tuple[Source, ...]
    held_out_seed: int = 0
    folders: tuple[Path, ...] = ()
    """Where each source's files lie."""
    digests: tuple[str, ...] = ()
    """A hash of each source's tokens."""

    @cached_property
    def _tables(self) -> Any:
        return self.rows.with_format("arrow")

    @property
    def count(self) -> int:
        """How many rows are trained on."""
        return sum(source.trained for source in self.sources)

    @property
    def held_out(self) -> np.ndarray:
        """The numbers of the rows that are never trained on."""
        return order.held_out_rows(self.sources, self.held_out_seed)

    def row(self, number: int) -> TokenRow:
        """One row: its tokens as arrays, what else there is as numbers."""
        table = self._tables[int(number)]
        return {name: _value(column.chunk(0)) for name, column in zip(table.column_names, table.columns, strict=True)}

    def lengths_of(self, numbers: np.ndarray) -> np.ndarray:
        """The tokens of these rows."""
        found = np.empty(len(numbers), dtype=np.int32)
        for source, lengths in zip(self.sources, self.lengths, strict=True):
            here = (numbers >= source.first) & (numbers < source.first + source.rows)
            found[here] = lengths[numbers[here] - source.first]
        return found

    @property
    def all_lengths(self) -> np.ndarray:
        """[rows] of all rows, in memory."""
        return np.concatenate(self.lengths)

    def window_steps(self, batch_size: int) -> int:
        """How many steps a window has."""
        return order.window_steps(self.sources, batch_size)

    def window(self, window: int, *, batch_size: int, seed: int) -> np.ndarray:
        """[steps, batch_size] the rows of the steps of a window, those of a step of similar length."""
        how = {"batch_size": batch_size, "seed": seed, "held_out_seed": self.held_out_seed}
        return order.rows_of_window(window, self.sources, lengths=self.lengths_of, **how)

    def followed_by(self, others: Tokens) -> Tokens:
        """These rows, and after them the others: to look rows up in, not to draw them."""
        first = len(self.rows)
        return replace(
            self,
            rows=concatenate_datasets([self.rows, others.rows]),
            lengths=(*self.lengths, *others.lengths),
            sources=(*self.sources, *(replace(part, first=first + part.first) for part in others.sources)),
            folders=(*self.folders, *others.folders),
        )

    def only(self, numbers: np.ndarray) -> Tokens:
        """These rows alone, as one source without files of its own."""
        rows = self.rows.select(numbers).flatten_indices(
            keep_in_memory=True
        )  # else all that it is beside gets an index
        return Tokens(rows, (self.lengths_of(numbers),), (Source(0, len(numbers)),))

    def batch(self, numbers: np.ndarray, *, collate: Callable[..., Batch], pad_id: int, packed: bool = False) -> Batch:
        """One micro-batch of these rows, padded, or if `packed` end to end."""
        rows = [self.row(number) for number in numbers]
        return collate(rows, pad_id=pad_id, packed=packed, numbers=numbers.tolist())


def _value(column: pa.Array) -> Any:
    if isinstance(column, pa.ListArray):
        return column.flatten().to_numpy(zero_copy_only=False)
    return column[0].as_py()


@dataclass(frozen=True)
class PackedSource:
    """Which rows each sequence of a source holds: `llmkd.data.packing.packed_rows`, over files."""

    starts: np.ndarray
    rows: np.ndarray

    @property
    def count(self) -> int:
        return len(self.starts) - 1


@dataclass(frozen=True)
class PackedTokens:
    """The rows of `tokens` in sequences of `width` tokens, which batches draw in place of rows."""

    tokens: Tokens
    packed: tuple[PackedSource, ...]
    """By source."""
    width: int
    weights: tuple[int, ...] | None = None
    """The sources' shares of a mixture; None: each source's number of sequences."""
    flat: bool = False
    """Whether a micro-batch is one long sequence, for an attention that keeps rows apart only there."""

    @cached_property
    def sources(self) -> tuple[Source, ...]:
        """As the tokens', counted in sequences."""
        firsts = np.cumsum([0, *(source.count for source in self.packed)]).tolist()
        weights = self.weights or order.weighed([source.count for source in self.packed])
        return tuple(
            Source(first, packed.count, weight=weight)
            for first, packed, weight in zip(firsts, self.packed, weights, strict=False)
        )

    @property
    def count(self) -> int:
        """How many sequences are trained on."""
        return sum(source.count for source in self.packed)

    @property
    def full(self) -> float:
        """The share of the sequences' places that hold tokens."""
        trained = sum(int(lengths[p.rows].sum()) for lengths, p in zip(self.tokens.lengths, self.packed, strict=True))
        return trained / (self.count * self.width)

    def rows_of(self, sequence: int) -> np.ndarray:
        """The numbers of a sequence's rows, in their order."""
        number = bisect.bisect_right([source.first for source in self.sources], sequence) - 1
        packed, place = self.packed[number], sequence - self.sources[number].first
        return self.tokens.sources[number].first + packed.rows[packed.starts[place] : packed.starts[place + 1]]

    def window_steps(self, batch_size: int) -> int:
        """How many steps a window has."""
        return order.window_steps(self.sources, batch_size)

    def window(self, window: int, *, batch_size: int, seed: int) -> np.ndarray:
        """[steps, batch_size] the sequences of the steps of a window."""
        how = {"batch_size": batch_size, "seed": seed, "held_out_seed": self.tokens.held_out_seed}
        return order.rows_of_window(window, self.sources, lengths=None, **how)

    def batch(self, numbers: np.ndarray, *, pad_id: int) -> Batch:
        """One micro-batch of these sequences [B, width], or flat [1, B * width]."""
        rows = [self.rows_of(int(number)).tolist() for number in numbers]
        width = self.width
        if self.flat:
            rows, width = [sum(rows, [])], width * len(rows)
        sequences = [[self.tokens.row(row) for row in sequence] for sequence in rows]
        return collate_sequences(sequences, width=width, pad_id=pad_id, numbers=sum(rows, []))
