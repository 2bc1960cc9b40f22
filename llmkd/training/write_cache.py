"""Write a teacher's cache: run the teacher once over the recipe's rows and keep what its students will need.

The rows are divided into shards by their lengths alone; the ranks take shards in turn, so that any number of them writes the same files.
Nothing is done twice: whole shards are kept, and a shard that a signal interrupted continues at its next row. A killed run loses only the
shards under way.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from llmkd.data.batches import Batch, collate
from llmkd.data.tokenized import Tokens
from llmkd.distributed.ranks import World, barrier, on_main, sum_counts
from llmkd.distributed.shared_folder import only_run_in
from llmkd.errors import InputError
from llmkd.layer_map import OtherState
from llmkd.models import folders
from llmkd.models.families import KIND_NAMES
from llmkd.processes import Stopping
from llmkd.progress import Advance, progress
from llmkd.provenance import commit, versions
from llmkd.recipe.placements import PLACEMENTS
from llmkd.recipe.recipe import Recipe
from llmkd.teachers import cache_files
from llmkd.teachers.base import Demand, Signal, Teacher
from llmkd.teachers.cache_files import DONE, IDS, LOG_PROBABILITIES, OFFSETS, Contents
from llmkd.teachers.quantization import stored
from llmkd.training import build, cache_contents, initial, jobs
from llmkd.training.cache_progress import Plan, prepare
from llmkd.training.tokens import StoppedTokenizing
from llmkd.training.written_texts import rows_of

log = logging.getLogger("llmkd")


def cache(world: World, recipe: Recipe, stopping: Stopping, *, trusted: bool = False) -> bool:
    """Write the recipe's cache, or what is missing of it; True when it is whole. The same call resumes (all ranks take part).

    An existing cache's bytes are compared with their checksums; a `trusted` cache's only where `cache.verify` has training compare them.
    """
    if recipe.data.streaming:
        raise InputError("data.streaming: a cache holds what the teacher says of all rows; write streaming: false")
    recipe = writing_recipe(recipe)
    with only_run_in(world, recipe.cache_folder):
        return _cache(world, recipe, stopping, trusted=trusted)


def _cache(world: World, recipe: Recipe, stopping: Stopping, *, trusted: bool) -> bool:
    folder = recipe.cache_folder
    job = jobs.distil_job(world, recipe, folder)
    if job.family.kind != "decoder":
        raise InputError(
            f"llmkd cache is for decoders, and this teacher is {KIND_NAMES[job.family.kind]}; train without a cache"
        )
    teacher = on_main(world, lambda: folders.resolve(recipe.teacher_path, "teacher.path", recipe.teacher.revision))
    tokenizer = initial.job_tokenizer(world, job, resuming=False)
    try:
        data = rows_of(world, job, tokenizer, stopping).all
    except StoppedTokenizing:
        log.info("cache: stopped by %s before all rows were there; the same command goes on", stopping.name)
        return False
    wanted = on_main(
        world,
        lambda: cache_contents.contents_of(
            recipe, cache_contents.students(recipe, *cache_contents.depths(recipe)), teacher, tokenizer, data
        ),
    )
    plan = on_main(world, lambda: prepare(recipe, wanted, data.all_lengths.tolist(), trusted=trusted))
    if not plan.left and (folder / "manifest.json").is_file():
        log.info("cache: already whole, %s", folder)
        return True
    # Each block's raw output, once, whatever the number of pairs that will read it.
    demand = Demand(plan.contents.blocks, logits=plan.contents.final or plan.contents.top_k is not None)
    model = build.load_teacher(world, replace(job, teacher=teacher), demand)
    pad_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    rows = _Rows(data, data.all_lengths, pad_id, recipe.data.batching == "packed")
    whole = _write(world, plan, model, rows, recipe, stopping)
    barrier(world)
    if whole:
        on_main(world, lambda: _finish(plan, recipe))
        log.info("cache: done, %s", folder)
    else:
        log.info("cache: stopped by %s and saved %s; the same command resumes from it", stopping.name, folder)
    return whole


def writing_recipe(recipe: Recipe) -> Recipe:
    """The recipe by which the cache is written: its teacher has weights, and its micro-batch size is set."""
    placement = recipe.cache.teacher_placement or recipe.teacher.placement
    return recipe.changed(
        {
            "teacher.placement": placement if PLACEMENTS[placement].has_weights else "replicated",
            "cache.micro_batch_size": recipe.cache.micro_batch_size or recipe.train.micro_batch_size,
        }
    )


@dataclass(frozen=True)
class _Rows:
    """The recipe's rows, and how they are collated for the teacher."""

    data: Tokens
    lengths: np.ndarray
    pad_id: int
    packed: bool

    def batch(self, numbers: Sequence[int]) -> Batch:
        return collate(
            [self.data.row(n) for n in numbers], pad_id=self.pad_id, packed=self.packed, numbers=list(numbers)
        )


class _Shard:
    """A shard under way in memory: tensors of their final size, filled row by row in any order."""

    def __init__(self, folder: Path, number: int, rows: tuple[int, int], contents: Contents, lengths: np.ndarray):
        self._partial = cache_files.shard_file(folder, number, partial=True)
        self._file = cache_files.shard_file(folder, number)
        self._rows = rows
        self._offsets = np.concatenate([[0], np.cumsum(lengths)])
        partial = cache_files.read_partial(self._partial)
        self._done = torch.zeros(len(lengths), dtype=torch.bool) if partial is None else partial[DONE]
        self._tensors = partial or {
            **{
                name: torch.zeros(s, dtype=d)
                for name, (s, d) in cache_files.layout(contents, int(lengths.sum())).items()
            },
            OFFSETS: torch.from_numpy(self._offsets),
        }

    def micro_batches(self, size: int) -> Iterator[list[int]]:
        """The missing rows, in groups of similar length, the longest first."""
        left = (~self._done).nonzero().flatten().numpy()
        left = left[np.argsort(-np.diff(self._offsets)[left], kind="stable")]
        for start in range(0, len(left), size):
            yield (left[start : start + size] + self._rows[0]).tolist()

    def put(self, rows: Sequence[int], values: dict[str, Tensor]) -> None:
        """Fill in these rows; `values` holds them end to end."""
        places = [row - self._rows[0] for row in rows]
        lengths = [int(self._offsets[place + 1] - self._offsets[place]) for place in places]
        for name, value in values.items():
            for place, part in zip(places, value.split(lengths), strict=True):
                self._tensors[name][self._offsets[place] : self._offsets[place + 1]] = part
        self._done[places] = True

    @property
    def held(self) -> int:
        """The rows that are there."""
        return int(self._done.sum())

    @property
    def whole(self) -> bool:
        """Whether every row is there."""
        return bool(self._done.all())

    def publish(self) -> None:
        """Put the whole shard in place, and remove what an interrupted run left of it."""
        assert self.whole
        cache_files.write_shard(self._file, {k: v for k, v in self._tensors.items() if k != DONE}, self._rows)
        cache_files.remove(self._partial)

    def publish_partial(self) -> None:
        """Keep the rows that are done."""
        cache_files.write_shard(self._partial, {**self._tensors, DONE: self._done}, self._rows)


class _Disk:
    """Takes rows as they come; a thread writes each full shard while the next is filled, and at the end the last one, full or not."""

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(1)
        self._written: Future[None] | None = None
        self._shard: _Shard | None = None

    def __enter__(self) -> _Disk:
        return self

    def put(self, shard: _Shard, rows: Sequence[int], values: dict[str, Tensor]) -> None:
        """Fill in some rows of a shard, one shard after another."""
        shard.put(rows, values)
        self._shard = shard
        if shard.whole:
            self._wait()  # no more than one shard waits in memory
            self._written, self._shard = self._pool.submit(shard.publish), None

    def _wait(self) -> None:
        if self._written is not None:
            self._written.result()

    def __exit__(self, kind: object, *_: object) -> None:
        with self._pool:
            self._wait()
            if self._shard is not None and kind is None:
                self._shard.publish_partial()


def _write(world: World, plan: Plan, teacher: Teacher, rows: _Rows, recipe: Recipe, stopping: Stopping) -> bool:
    """Run the teacher over the missing rows; True unless a signal stopped it (all ranks take part).

    Ranks that share the teacher's weights work in step, on as many micro-batches at a time as a pipeline has in flight; a rank that has
    run out of work runs a row whose signal is dropped.
    """
    assert recipe.cache.micro_batch_size is not None  # set by writing_recipe
    total = sum(last - first for first, last in map(plan.ranges.__getitem__, plan.left[world.rank :: world.size]))
    bar = progress("cache, rank 0", total=total, unit="rows", shown=world.is_main)
    chunk = recipe.train.tokens_at_once(gpu=world.device.type == "cuda")
    alone, idle = recipe.teacher.placed.is_whole, rows.batch([0])
    together = 1 if alone else world.size
    with bar as advance, _Disk() as disk:
        work = _work(plan, rows, world, recipe.cache.micro_batch_size, advance)
        while True:
            items = list(itertools.islice(work, together))
            busy, asked = sum_counts(world, [len(items), int(stopping.asked)])
            if not busy or asked:
                break
            asked_for = [rows.batch(micro).to(world.device) for _, micro in items]
            asked_for += [] if alone else [idle.to(world.device)] * (together - len(items))
            teacher.expect(asked_for)
            for number, batch in enumerate(asked_for):
                values = stored_values(teacher.signals(batch), batch, plan.contents, chunk)
                if number < len(items):
                    disk.put(*items[number], values)
    return not asked


def _work(
    plan: Plan, rows: _Rows, world: World, micro_batch_size: int, advance: Advance
) -> Iterator[tuple[_Shard, list[int]]]:
    """This rank's shards, each with its micro-batches; the rows of a micro-batch are done when the next is asked for."""
    mine = plan.left[world.rank :: world.size]
    for done, number in enumerate(mine):
        first, last = plan.ranges[number]
        shard = _Shard(plan.folder, number, (first, last), plan.contents, rows.lengths[first:last])
        log.info("cache: shard %d, %d of %d on this rank", number, done + 1, len(mine))
        advance(shard.held)
        for micro in shard.micro_batches(micro_batch_size):
            yield shard, micro
            advance(len(micro))


@torch.no_grad()
def stored_values(signal: Signal, batch: Batch, wanted: Contents, chunk: int) -> dict[str, Tensor]:
    """The tensors to store of a signal: their values at the batch's tokens, end to end, on the CPU."""
    states = {cache_files.state_name(block): signal.take(block) for block in wanted.blocks}
    last = signal.take_final()
    if wanted.final:
        assert last is not None
        states[cache_files.state_name(OtherState.FINAL)] = last
    tensors: dict[str, Tensor] = {}
    for name, state in states.items():
        values, scales = stored(state.flatten(0, 1)[batch.attended_at], wanted.dtype)
        tensors[name] = values.cpu()
        if scales is not None:
            tensors[f"{name}.scale"] = scales.cpu()
    if wanted.top_k is not None:
        assert last is not None and signal.head is not None and wanted.columns is not None
        with signal.head() as (weight, bias):
            final = last.flatten(0, 1)[batch.attended_at]
            head = weight[: wanted.columns], None if bias is None else bias[: wanted.columns]
            parts = [_likeliest(part, *head, wanted.top_k) for part in final.split(chunk)]
        tensors[IDS], tensors[LOG_PROBABILITIES] = (torch.cat(column) for column in zip(*parts, strict=True))
    return tensors


def _likeliest(final: Tensor, weight: Tensor, bias: Tensor | None, k: int) -> tuple[Tensor, Tensor]:
    """(ids, log-probabilities) [n, k] of the likeliest tokens."""
    likeliest = F.linear(final, weight, bias).float().log_softmax(-1).topk(k, dim=-1)
    return likeliest.indices.int().cpu(), likeliest.values.cpu()


def _finish(plan: Plan, recipe: Recipe) -> None:
    files = [cache_files.shard_file(plan.folder, number) for number in range(len(plan.ranges))]
    shards = [shard for file in files if (shard := cache_files.record(file)) is not None]
    assert len(shards) == len(files), "a shard is missing"
    written_by = {**versions("torch", "transformers"), "commit": commit(), "recipe": recipe.name}
    cache_files.finish(plan.folder, plan.contents, shards, written_by)
