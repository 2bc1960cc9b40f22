"""Rows of text to micro-batches: which tokens are trained, in which order, padded or packed.

The order is a pure function of (seed, step), so a run resumes at the exact row by knowing its step, and the rows of a
step do not depend on the number of ranks or on accumulation.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields, replace
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor

from llmkd.errors import InputError

Kind = Literal["decoder", "encoder", "encoder_decoder"]

IGNORE = -100
TokenRow = Mapping[str, Any]
"""A row as tokens: its columns as lists, by name."""
MULTIPLE = 8
"""Rows of a batch are padded to a multiple of this."""


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


@dataclass(frozen=True)
class Batch:
    """One micro-batch. Positions are those of states: `targets[b, t]` is the token that position t must predict."""

    input_ids: Tensor  # [B, T]
    position_ids: Tensor  # [B, T], counted from 0 in each row (packed: in each document)
    attention_mask: Tensor | None  # [B, T]; None when packed, where position_ids keep documents apart
    targets: Tensor  # [B, T], IGNORE where the next token is not trained
    attended: Tensor  # [B, T] bool, False at padding
    trained_at: Tensor  # [N] flat positions with a target
    attended_at: Tensor  # [M] flat positions that are not padding
    rows: tuple[int, ...] = ()  # the rows' numbers in the tokenized data, in this batch's order
    segments: Tensor | None = None  # [B, T] which of two texts a token belongs to, for encoders
    source_ids: Tensor | None = None  # [B, S] what an encoder-decoder's encoder reads; all else is then its decoder's
    source_attended: Tensor | None = None  # [B, S] bool, False at padding
    source_at: Tensor | None = None  # [K] flat positions of the source that are not padding

    def to(self, device: torch.device) -> Batch:
        """The same batch on the device."""
        parts = {field.name: getattr(self, field.name) for field in fields(self)}
        return replace(self, **{k: v.to(device, non_blocking=True) for k, v in parts.items() if isinstance(v, Tensor)})

    def pinned(self) -> Batch:
        """The same batch in memory from which a copy to a GPU goes on beside the host's work."""
        parts = {field.name: getattr(self, field.name) for field in fields(self)}
        return replace(self, **{k: v.pin_memory() for k, v in parts.items() if isinstance(v, Tensor)})

    @property
    def counts(self) -> Counts:
        """Its tokens; from shapes only, so nothing is read from the device."""
        source = 0 if self.source_at is None else self.source_at.numel()
        return Counts(self.trained_at.numel(), self.attended_at.numel(), source)


def steps_per_epoch(rows: int, batch_size: int) -> int:
    """Whole batches in one pass. Rows left over are not used in that pass; each pass leaves out others."""
    if rows < batch_size:
        raise InputError(
            f"train.batch_size: {batch_size} rows per step, but the data has only {rows}; write a smaller batch, or "
            "give more rows"
        )
    return rows // batch_size


def epoch_batches(lengths: np.ndarray, *, batch_size: int, seed: int, epoch: int, grouped: bool) -> np.ndarray:
    """[steps, batch_size] row numbers of one pass, longest first in each step. A pure function of its arguments.

    Grouped: within windows of about 32 batches rows are sorted by length before they are cut into batches, and the
    batches shuffled.
    """
    steps = steps_per_epoch(len(lengths), batch_size)
    random = np.random.default_rng([seed, epoch])
    order = random.permutation(len(lengths))[: steps * batch_size]
    if grouped:
        windows = np.array_split(order, math.ceil(steps / 32))
        order = np.concatenate([w[np.argsort(-lengths[w], kind="stable")] for w in windows])
    cut = order.reshape(steps, batch_size)
    if grouped:
        cut = cut[random.permutation(steps)]
    return np.stack([b[np.argsort(-lengths[b], kind="stable")] for b in cut])


def micro_batch_rows(rows: np.ndarray, *, rank: int, world_size: int, accumulation: int) -> list[np.ndarray]:
    """This rank's micro-batches of a step; neighbours in length go to different ranks, so that none waits long."""
    return list(rows.reshape(accumulation, world_size, -1)[:, rank])


def collate(rows: Sequence[TokenRow], *, pad_id: int, packed: bool, numbers: Sequence[int] = ()) -> Batch:
    """Tokenized rows -> one Batch: padded on the right to a multiple of 8, or packed end to end in one row.

    `numbers`: the rows' numbers in the data (a cached teacher needs them).
    """
    ids = [row["input_ids"] for row in rows]
    # The last position of a row predicts nothing, so that no target crosses documents.
    targets = [
        [*(token if is_trained else IGNORE for token, is_trained in pairs[1:]), IGNORE]
        for pairs in (list(zip(row["input_ids"], row["trained"], strict=True)) for row in rows)
    ]
    if not packed:
        input_ids, attended = padded(ids, pad_id)
        return padded_batch(input_ids, attended, padded(targets, IGNORE)[0], numbers)
    input_ids = torch.tensor([list(itertools.chain(*ids))])
    attended = torch.ones_like(input_ids, dtype=torch.bool)
    positions = torch.cat([torch.arange(len(i)) for i in ids])[None]
    batch = padded_batch(input_ids, attended, torch.tensor([list(itertools.chain(*targets))]), numbers)
    return replace(batch, position_ids=positions, attention_mask=None)


def padded(rows: Sequence[Sequence[int]], fill: int) -> tuple[Tensor, Tensor]:
    """(numbers [B, T], which of them are the rows' own [B, T] bool), T a multiple of `MULTIPLE`."""
    width = -(-max(len(row) for row in rows) // MULTIPLE) * MULTIPLE
    numbers = torch.tensor([[*row, *[fill] * (width - len(row))] for row in rows])
    lengths = torch.tensor([len(row) for row in rows])
    return numbers, torch.arange(width)[None] < lengths[:, None]


def padded_batch(ids: Tensor, attended: Tensor, targets: Tensor, numbers: Sequence[int], **more: Tensor) -> Batch:
    """A Batch of rows padded on the right: ids [B, T], attended [B, T] bool, targets [B, T] (encoders: [B, 1], the classes)."""
    return Batch(
        input_ids=ids,
        position_ids=torch.arange(ids.shape[1]).expand(ids.shape).contiguous(),
        attention_mask=attended.long(),
        targets=targets,
        attended=attended,
        trained_at=(targets.flatten() != IGNORE).nonzero().flatten(),
        attended_at=attended.flatten().nonzero().flatten(),
        rows=tuple(int(number) for number in numbers),
        **more,
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
    data: Dataset,
    *,
    seed: int,
    start_step: int,
    steps: int,
    batch_size: int,
    accumulation: int,
    rank: int,
    world_size: int,
    pad_id: int,
    packed: bool,
    make: Callable[..., Batch] = collate,
) -> Iterator[list[Batch]]:
    """For each step from `start_step` on, this rank's micro-batches, prepared one step ahead; `make` collates the rows of one."""
    lengths = np.array(data["length"])
    per_epoch = steps_per_epoch(len(lengths), batch_size)

    @functools.lru_cache(maxsize=1)
    def of_epoch(epoch: int) -> np.ndarray:
        return epoch_batches(lengths, batch_size=batch_size, seed=seed, epoch=epoch, grouped=not packed)

    def of_step(step: int) -> list[Batch]:
        epoch, place = divmod(step, per_epoch)
        mine = micro_batch_rows(of_epoch(epoch)[place], rank=rank, world_size=world_size, accumulation=accumulation)
        made = (
            make([data[int(r)] for r in micro], pad_id=pad_id, packed=packed, numbers=micro.tolist()) for micro in mine
        )
        return [batch.pinned() if torch.cuda.is_available() else batch for batch in made]

    # A thread, not a worker process: a process would be ended by the signal that asks this one to save and stop.
    with ThreadPoolExecutor(1) as ahead:
        following = ahead.submit(of_step, start_step) if start_step < steps else None
        for step in range(start_step, steps):
            assert following is not None
            ready = following.result()
            following = ahead.submit(of_step, step + 1) if step + 1 < steps else None
            yield ready


@dataclass(frozen=True)
class Family:
    """A model's kind, and what its batches depend on."""

    kind: Kind
    labels: tuple[str, ...] = ()
    """An encoder's classes, in the order of its logits."""
    start: int = 0
    """The token id that an encoder-decoder's decoder starts with."""
