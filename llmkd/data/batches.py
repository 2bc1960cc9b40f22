"""Rows of text to micro-batches: which tokens are trained, in which order, padded or packed.

The order is a pure function of (seed, step), so a run resumes at the exact row by knowing its step, and the rows of a
step do not depend on the number of ranks or on accumulation.
"""

from __future__ import annotations

import functools
import itertools
import operator
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields, replace
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from llmkd.errors import InputError

Kind = Literal["decoder", "encoder", "encoder_decoder"]

IGNORE = -100
TokenRow = Mapping[str, Any]
"""A row as tokens: its columns as lists, by name."""
MULTIPLE = 8
"""Rows of a batch are padded to a multiple of this."""


class Drawn(Protocol):
    """What batches are drawn from: rows or sequences, by their numbers."""

    def window_steps(self, batch_size: int) -> int:
        """How many steps a window has."""
        ...

    def window(self, window: int, *, batch_size: int, seed: int) -> np.ndarray:
        """[steps, batch_size] the numbers that a window's steps are trained on."""
        ...


class Counts(NamedTuple):
    """How many tokens there are in some micro-batches, padding not counted."""

    trained: int
    attended: int
    source: int = 0
    """Of encoder-decoders: what their encoder reads; the other two are then their decoder's."""

    @property
    def tokens(self) -> int:
        """All tokens that the model reads."""
        return self.attended + self.source

    @property
    def source_weight(self) -> float:
        """What a position of the source counts, so that source and target weigh alike in the whole batch."""
        return self.attended / max(self.source, 1)


class Packed(NamedTuple):
    """Where documents stand end to end in the rows of a batch [B, T]; a row's padding counts as one more of them."""

    positions: Tensor  # [B, T], counted from 0 in each document
    starts: Tensor  # [D + 1] int32, the flat position where each document begins, and the end of the last
    longest: int  # the most tokens of a document

    @staticmethod
    def of(starts: Tensor, rows: int) -> Packed:
        """Documents that begin there (a tensor on the CPU), in so many rows of one length."""
        lengths = starts.diff()
        positions = torch.arange(int(starts[-1])) - starts[:-1].long().repeat_interleave(lengths)
        return Packed(positions.view(rows, -1), starts, int(lengths.max()))


@dataclass(frozen=True)
class Batch:
    """One micro-batch. Positions are those of states: `targets[b, t]` is the token that position t must predict."""

    input_ids: Tensor  # [B, T]
    position_ids: Tensor  # [B, T], counted from 0 in each row (packed: in each document)
    attention_mask: Tensor | None  # [B, T]; None when packed
    targets: Tensor  # [B, T], IGNORE where the next token is not trained
    attended: Tensor  # [B, T] bool, False at padding
    trained_at: Tensor  # [N] flat positions with a target
    attended_at: Tensor  # [M] flat positions that are not padding
    rows: tuple[int, ...] = ()  # the rows' numbers in the tokenized data, in this batch's order
    segments: Tensor | None = None  # [B, T] which of two texts a token belongs to, for encoders
    source_ids: Tensor | None = None  # [B, S] what an encoder-decoder's encoder reads; all else is then its decoder's
    source_attended: Tensor | None = None  # [B, S] bool, False at padding
    source_at: Tensor | None = None  # [K] flat positions of the source that are not padding
    own: bool = False  # all rows are texts that the student wrote, where these have a divergence of their own
    starts: Tensor | None = None  # see `packed`
    longest: int = 0

    def to(self, device: torch.device) -> Batch:
        """The same batch on the device."""
        parts = {field.name: getattr(self, field.name) for field in fields(self)}
        return replace(self, **{k: v.to(device, non_blocking=True) for k, v in parts.items() if isinstance(v, Tensor)})

    def pinned(self) -> Batch:
        """The same batch in memory from which a copy to a GPU goes on beside the host's work."""
        parts = {field.name: getattr(self, field.name) for field in fields(self)}
        return replace(self, **{k: v.pin_memory() for k, v in parts.items() if isinstance(v, Tensor)})

    @property
    def packed(self) -> Packed | None:
        """Its documents; None where each row is one."""
        return None if self.starts is None else Packed(self.position_ids, self.starts, self.longest)

    def of_rows(self) -> Tensor:
        """[R, M] float32: 1 where one of the tokens that are not padding is of the row, when packed of the document."""
        if self.starts is None:
            count, row = len(self.attended), self.attended_at // self.attended.shape[1]
        else:
            count = len(self.starts) - 1
            row = torch.searchsorted(self.starts.long(), self.attended_at, right=True) - 1
        return (row == torch.arange(count, device=row.device)[:, None]).float()

    @property
    def counts(self) -> Counts:
        """Its tokens; from shapes only, so nothing is read from the device."""
        source = 0 if self.source_at is None else self.source_at.numel()
        return Counts(self.trained_at.numel(), self.attended_at.numel(), source)


def steps_per_epoch(rows: int, batch_size: int) -> int:
    """Whole batches in one pass; the rows left over come first in the next."""
    if rows < batch_size:
        raise InputError(
            f"train.batch_size: {batch_size} rows per step, but the data has only {rows} (packed: sequences of rows); write a smaller "
            "batch, or give more rows"
        )
    return rows // batch_size


def micro_batch_rows(rows: np.ndarray, *, rank: int, world_size: int, accumulation: int) -> list[np.ndarray]:
    """This rank's micro-batches of a step; neighbours in length go to different ranks, so that none waits long."""
    return list(rows.reshape(accumulation, world_size, -1)[:, rank])


def collate(rows: Sequence[TokenRow], *, pad_id: int, packed: bool, numbers: Sequence[int] = ()) -> Batch:
    """Tokenized rows -> one Batch: padded on the right to a multiple of 8, or packed end to end in one row.

    `numbers`: the rows' numbers in the data (a cached teacher needs them).
    """
    if packed:
        return collate_sequences(
            [rows], width=sum(len(row["input_ids"]) for row in rows), pad_id=pad_id, numbers=numbers
        )
    input_ids, attended = padded([row["input_ids"] for row in rows], pad_id)
    return padded_batch(input_ids, attended, padded([_targets(row) for row in rows], IGNORE)[0], numbers)


def collate_sequences(
    sequences: Sequence[Sequence[TokenRow]], *, width: int, pad_id: int, numbers: Sequence[int] = ()
) -> Batch:
    """Sequences of rows laid end to end -> one Batch [B, width], filled up with padding.

    Positions begin anew in each row, and in the padding, which attention takes for one more row.
    """
    lengths = [[len(row["input_ids"]) for row in rows] for rows in sequences]
    used = torch.tensor([sum(of_rows) for of_rows in lengths])
    documents = [n for of_rows in lengths for n in (*of_rows, width - sum(of_rows)) if n]
    packed = Packed.of(torch.tensor([0, *itertools.accumulate(documents)], dtype=torch.int32), len(sequences))
    ids, targets = (
        torch.from_numpy(np.stack([_filled([part(row) for row in rows], width, fill) for rows in sequences]))
        for part, fill in ((operator.itemgetter("input_ids"), pad_id), (_targets, IGNORE))
    )
    batch = padded_batch(ids, torch.arange(width)[None] < used[:, None], targets, numbers)
    where = {"position_ids": packed.positions, "starts": packed.starts, "longest": packed.longest}
    return replace(batch, **where, attention_mask=None)


def _targets(row: TokenRow) -> np.ndarray:
    """What each position of a row predicts; the last nothing, so that no target crosses rows."""
    ids, trained = np.asarray(row["input_ids"], dtype=np.int64), np.asarray(row["trained"], dtype=bool)
    return np.append(np.where(trained[1:], ids[1:], IGNORE), IGNORE)


def _filled(parts: Sequence[Sequence[int] | np.ndarray], width: int, fill: int) -> np.ndarray:
    """The parts end to end, filled up to `width`."""
    whole = np.full(width, fill, dtype=np.int64)
    joined = np.concatenate([np.asarray(part, dtype=np.int64) for part in parts])
    whole[: len(joined)] = joined
    return whole


def padded(rows: Sequence[Sequence[int] | np.ndarray], fill: int) -> tuple[Tensor, Tensor]:
    """(numbers [B, T], which of them are the rows' own [B, T] bool), T a multiple of `MULTIPLE`."""
    width = -(-max(len(row) for row in rows) // MULTIPLE) * MULTIPLE
    lengths = torch.tensor([len(row) for row in rows])
    return torch.from_numpy(np.stack([_filled([row], width, fill) for row in rows])), torch.arange(width)[
        None
    ] < lengths[:, None]


def padded_batch(ids: Tensor, attended: Tensor, targets: Tensor, numbers: Sequence[int], **more: Tensor) -> Batch:
    """A Batch of rows padded on the right: ids [B, T], attended [B, T] bool, targets [B, T] (encoders: [B, 1], the classes)."""
    batch = Batch(
        input_ids=ids,
        position_ids=torch.arange(ids.shape[1]).expand(ids.shape).contiguous(),
        attention_mask=attended.long(),
        targets=targets,
        attended=attended,
        trained_at=(targets.flatten() != IGNORE).nonzero().flatten(),
        attended_at=attended.flatten().nonzero().flatten(),
        rows=tuple(int(number) for number in numbers),
    )
    return replace(batch, **more)


def left_out(batch: Batch, places: Sequence[int]) -> Batch:
    """The same padded batch, in which no token of the rows at these places counts: none is trained, none is compared."""
    targets, attended = batch.targets.clone(), batch.attended.clone()
    targets[places], attended[places] = IGNORE, False
    return replace(
        batch,
        targets=targets,
        attended=attended,
        trained_at=(targets.flatten() != IGNORE).nonzero().flatten(),
        attended_at=attended.flatten().nonzero().flatten(),
    )


def announced(
    steps: Iterable[tuple[list[Batch], bool]], announce: Callable[[list[Batch]], None]
) -> Iterator[list[Batch]]:
    """The same steps; `announce` is called with each one before the step before it is trained.

    With each step comes whether other batches are announced after it: then the next one is announced when it is done.
    """
    waiting: list[list[Batch]] = []
    for batches_of_step, others_follow in steps:
        announce(batches_of_step)
        waiting.append(batches_of_step)
        if len(waiting) == 2:
            yield waiting.pop(0)
        if others_follow:
            yield waiting.pop(0)
    yield from waiting


def batches(
    data: Drawn,
    *,
    seed: int,
    start_step: int,
    steps: int,
    batch_size: int,
    accumulation: int,
    rank: int,
    world_size: int,
    make: Callable[[np.ndarray], Batch],
) -> Iterator[list[Batch]]:
    """For each step from `start_step` on, this rank's micro-batches, prepared one step ahead; `make` makes one of its rows' numbers."""
    of_window = functools.lru_cache(maxsize=1)(functools.partial(data.window, batch_size=batch_size, seed=seed))
    window_length = data.window_steps(batch_size)

    def of_step(step: int) -> list[Batch]:
        window, place = divmod(step, window_length)
        rows = of_window(window)[place]
        mine = micro_batch_rows(rows, rank=rank, world_size=world_size, accumulation=accumulation)
        return [batch.pinned() if torch.cuda.is_available() else batch for batch in map(make, mine)]

    return ahead(of_step, start_step, steps)


def ahead(of_step: Callable[[int], list[Batch]], start_step: int, steps: int) -> Iterator[list[Batch]]:
    """What `of_step` gives for each step from `start_step` on, each prepared while the one before it is trained on."""
    # A thread, not a worker process: a process would be ended by the signal that asks this one to save and stop.
    with ThreadPoolExecutor(1) as worker:
        following = worker.submit(of_step, start_step) if start_step < steps else None
        for step in range(start_step, steps):
            assert following is not None
            ready = following.result()
            following = worker.submit(of_step, step + 1) if step + 1 < steps else None
            yield ready


@dataclass(frozen=True)
class Family:
    """A model's kind, and what its batches depend on."""

    kind: Kind
    labels: tuple[str, ...] = ()
    """An encoder's classes, in the order of its logits."""
    start: int = 0
    """The token id that an encoder-decoder's decoder starts with."""
