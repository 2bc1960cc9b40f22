"""A teacher whose signals were written to disk once, for every row, and are read from there by memory map."""

from __future__ import annotations

import bisect
import contextlib
import itertools
import logging
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from llmkd.data.batches import Batch
from llmkd.layer_map import OtherState
from llmkd.losses.head_inputs import TopK
from llmkd.teachers import cache_files
from llmkd.teachers.base import Signal
from llmkd.teachers.cache_files import IDS, LOG_PROBABILITIES, OFFSETS, Manifest, Shard, state_name
from llmkd.teachers.quantization import LARGEST, restored

log = logging.getLogger("llmkd")

FINAL = state_name(OtherState.FINAL)
AHEAD = 2
"""Micro-batches read ahead; each is held once, in the cache's own dtype."""

HeadWeights = tuple[Tensor, Tensor | None]


@dataclass
class _Coming:
    rows: tuple[int, ...]
    values: Future[dict[str, Tensor]] | None = None


class CacheTeacher:
    """Signals from a whole cache, in any order of rows. No weight of the teacher is held but its head, where the divergence needs it.

    `uses` names the teacher block of every pair; `normed_last` is the block whose pair reads the final state, or None. The divergence
    reads the final state through `head`, or the cache's top k (`top_k`), or nothing. Signals are in `dtype`, as if the teacher itself
    were run in it.
    """

    blocks = None

    def __init__(
        self,
        folder: Path,
        manifest: Manifest,
        uses: Sequence[int],
        *,
        normed_last: int | None,
        head: HeadWeights | None,
        top_k: bool,
        dtype: torch.dtype,
        verify_reads: bool,
    ) -> None:
        self._shards = _Shards(folder, manifest, verify_reads)
        self._contents = manifest.contents
        self._uses = tuple(uses)
        self._names = {block: FINAL if block == normed_last else state_name(block) for block in uses}
        self._weights = head
        self._top_k = top_k
        self._dtype = dtype
        self._tensors = self._needed_tensors()
        self._coming: deque[_Coming] = deque()
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="cache")

    def _needed_tensors(self) -> list[str]:
        states = {*self._names.values(), *([FINAL] if self._weights is not None else [])}
        scales = [f"{name}.scale" for name in sorted(states)] if self._contents.dtype in LARGEST else []
        return [*sorted(states), *scales, *([IDS, LOG_PROBABILITIES] if self._top_k else [])]

    def expect(self, batches: Sequence[Batch]) -> None:
        """Read the first of these micro-batches now, and the others as those are taken."""
        self._coming.extend(_Coming(batch.rows) for batch in batches)
        self._read_ahead()

    def _read_ahead(self) -> None:
        for coming in itertools.islice(self._coming, AHEAD):
            if coming.values is None:
                coming.values = self._pool.submit(self._read, coming.rows)

    def signals(self, batch: Batch, uses: Sequence[int] | None = None) -> Signal:
        """The states of the batch's rows at their places [B, T, H], zeros at padding; each is put there when it is taken."""
        assert uses is None, "a cache's map is fixed"
        values = self._values(batch)

        def here(name: str) -> Tensor:
            return values[name].to(batch.input_ids.device, non_blocking=True)

        def state(name: str) -> Tensor:
            scales = here(f"{name}.scale") if f"{name}.scale" in values else None
            return _placed(restored(here(name), scales, self._dtype), batch)

        likeliest = None
        if self._top_k:
            assert self._contents.columns is not None
            ids, log_p = (_placed(here(name), batch) for name in (IDS, LOG_PROBABILITIES))
            likeliest = TopK(ids, log_p, self._contents.columns)
        waiting = _Waiting(self._names, state)
        if self._weights is None:
            return Signal(waiting, self._uses, None, None, likeliest)
        return Signal(waiting, self._uses, state(FINAL), self.head)

    def _values(self, batch: Batch) -> dict[str, Tensor]:
        """The batch's values as they are stored, end to end; read ahead where they were announced."""
        assert batch.rows, "a cached teacher needs the rows' numbers"
        coming = self._coming.popleft() if self._coming else None
        self._read_ahead()
        if coming is None:
            return self._read(batch.rows)
        assert coming.rows == batch.rows, "signals are taken in the order in which batches were announced"
        return self._read(coming.rows) if coming.values is None else coming.values.result()

    def _read(self, rows: Sequence[int]) -> dict[str, Tensor]:
        parts = [self._shards.row(row, self._tensors) for row in rows]
        return {name: _joined([part[name] for part in parts]) for name in self._tensors}

    @contextlib.contextmanager
    def head(self) -> Iterator[HeadWeights]:
        """The head's weight [V, H] and bias."""
        assert self._weights is not None
        yield self._weights


class _Waiting:
    """A signal's states as they were read. Each is put in place, in its dtype, when it is first taken, and released after the last time."""

    def __init__(self, names: dict[int, str], state: Callable[[str], Tensor]) -> None:
        self._names = dict(names)
        self._state = state
        self._here: dict[int, Tensor] = {}

    def __getitem__(self, block: int) -> Tensor:
        if block not in self._here:
            self._here[block] = self._state(self._names[block])
        return self._here[block]

    def __delitem__(self, block: int) -> None:
        del self._names[block]
        self._here.pop(block, None)

    def __len__(self) -> int:
        return len(self._names)


class _Shards:
    """The shards' tensors over their files, opened when first read."""

    def __init__(self, folder: Path, manifest: Manifest, verify: bool) -> None:
        self._folder = folder
        self._shards = manifest.shards
        self._contents = manifest.contents
        self._verify = verify
        self._firsts = [shard.first for shard in manifest.shards]
        self._open: dict[int, tuple[list[int], dict[str, Tensor]]] = {}

    def row(self, row: int, names: Sequence[str]) -> dict[str, Tensor]:
        """The named tensors' part of one row: views of the file."""
        number = bisect.bisect_right(self._firsts, row) - 1
        if number not in self._open:
            self._open[number] = self._opened(self._shards[number], names)
        offsets, tensors = self._open[number]
        place = row - self._firsts[number]
        return {name: tensors[name][offsets[place] : offsets[place + 1]] for name in names}

    def _opened(self, shard: Shard, names: Sequence[str]) -> tuple[list[int], dict[str, Tensor]]:
        what = cache_files.problem(self._folder, shard, self._contents) or (
            cache_files.changed(self._folder, shard) if self._verify else None
        )
        if what is not None:
            raise cache_files.damage(self._folder, shard, what)
        tensors = cache_files.mapped(self._folder, shard, names)
        return tensors[OFFSETS].tolist(), tensors


def _joined(parts: Sequence[Tensor]) -> Tensor:
    """The parts end to end in new memory; where there is a GPU in pinned memory, from which it can copy in the background."""
    shape = (sum(len(part) for part in parts), *parts[0].shape[1:])
    whole = torch.empty(shape, dtype=parts[0].dtype, pin_memory=torch.cuda.is_available())
    at = 0
    for part in parts:
        whole[at : at + len(part)].copy_(part)
        at += len(part)
    return whole


def _placed(values: Tensor, batch: Batch) -> Tensor:
    """[N, ...] of the batch's tokens, row after row -> [B, T, ...], zeros at padding."""
    rows, width = batch.input_ids.shape
    assert len(values) == len(batch.attended_at), "the cache's rows are as long as the batch's: the same tokens"
    if len(values) == rows * width:
        return values.reshape(rows, width, *values.shape[1:])
    placed = values.new_zeros(rows * width, *values.shape[1:])
    return placed.index_copy_(0, batch.attended_at, values).view(rows, width, *values.shape[1:])
