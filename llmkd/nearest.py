"""The map that is measured: each student block learns from the teacher block that it is most like before the first step.

Likeness is linear CKA (llmkd.geometry), which compares states of any two widths, of about `TOKENS` tokens of the first step's batch.
The map stands in the run's folder, so that a resumed run learns by the same.
"""

from __future__ import annotations

import gc
import json
import logging
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, cast

import torch
from datasets import Dataset
from torch import Tensor, nn

from llmkd import build, models, recipe_map
from llmkd.data import Batch, batches
from llmkd.distributed import World, all_rows, on_main, sum_counts
from llmkd.errors import InputError
from llmkd.geometry import centred_gram, similarity
from llmkd.jobs import Job
from llmkd.layer_map import Pairs, nearest
from llmkd.teachers.base import Teacher
from llmkd.teachers.resident import ResidentTeacher

log = logging.getLogger("llmkd")

TOKENS = 1024
"""About how many tokens are compared. Their Gram matrix, 4 MiB in fp32, is all that is kept of a block; while they are gathered,
the tokens' states of all blocks wait in host memory (8B teacher, 36 blocks: 0.6 GB shared by the ranks)."""
FILE = "map.json"


def settled(world: World, job: Job, data: Dataset, reading: dict[str, Any], *, resuming: bool) -> Job:
    """The job with its map: measured now, or the one it was begun with. All ranks take part and get the same."""
    file = job.folder / FILE
    if resuming:
        pairs = on_main(world, lambda: json.loads(file.read_text())["pairs"] if file.is_file() else None)
        if pairs is None:
            raise InputError(
                f"{file}: the map that this run was begun with is gone; put it back, or remove {job.folder / 'checkpoints'} to begin again"
            )
        return _with_map(job, _pairs(pairs))
    [micro_batches] = batches(data, start_step=0, steps=1, **reading)
    found = measured(world, job, micro_batches)

    def kept() -> Pairs:
        pairs = recipe_map.with_embedding(job.recipe, nearest(found.tolist()))
        job.folder.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps({"pairs": pairs, "cka": found.tolist()}))
        return pairs

    pairs = _pairs(on_main(world, kept))
    log.info("%s: nearest by linear CKA: %s", job.title, ", ".join(recipe_map.pair_names(pairs)))
    return _with_map(job, pairs)


def _with_map(job: Job, pairs: Pairs) -> Job:
    """The job with the map's pairs, and its stones where they are to be the map's (without the embeddings' pair)."""
    found = replace(job, pairs=pairs if job.pairs else ())
    settings = job.recipe.stones
    if settings is None or settings.pairs != "from_map":
        return found
    return replace(found, stones=tuple(sorted((student, teacher) for student, teacher in pairs if student >= 0)))


def measured(world: World, job: Job, micro_batches: Sequence[Batch]) -> Tensor:
    """Linear CKA of every student block with every teacher block, [L_s, L_t], over the same tokens on any number of ranks.

    Each model is loaded for it and let go: the teacher in its placement, the student whole on every rank.
    """
    assert job.teacher is not None
    settings, normed = job.recipe.student, job.recipe.matching.final_state == "normed"
    trust = job.recipe.teacher.trust_remote_code
    depth = models.load_config(job.teacher, trust_remote_code=trust).num_hidden_layers
    whole = replace(job, pairs=tuple((0, block) for block in range(depth)), weights=replace(job.weights, kl=0.0))
    student = models.load_causal_lm(
        job.initial,
        dtype=models.DTYPES[job.train.dtype],
        ds_config=None,
        attention=settings.attention,
        trust_remote_code=(settings if settings.init == "checkpoint" else job.recipe.teacher).trust_remote_code,
    )
    blocks = len(models.blocks(student))
    cast(nn.Module, student).to(world.device)
    [attended] = sum_counts(world, [sum(batch.counts[1] for batch in micro_batches)])
    grams = []
    for model, count in (
        (ResidentTeacher(student, range(blocks), normed_last=normed, ds_config=None, logits=False), blocks),
        (build.load_teacher(world, whole), depth),
    ):
        grams.append(_grams(world, model, count, micro_batches, every=-(-attended // TOKENS)))
    del student, model
    gc.collect()
    return similarity(*grams)


def _grams(world: World, model: Teacher, blocks: int, micro_batches: Sequence[Batch], *, every: int) -> Tensor:
    """The centred Gram matrix of each block's states at the chosen tokens, [blocks, N, N] on the CPU."""
    rows: list[list[Tensor]] = [[] for _ in range(blocks)]
    model.expect(micro_batches)
    for batch in micro_batches:
        here = batch.to(world.device)
        at, signal = _chosen(here, every), model.signals(here)
        for block in range(blocks):
            rows[block].append(signal.take(block).flatten(0, 1)[at].float().cpu())
    return torch.stack([centred_gram(all_rows(world, torch.cat(parts).to(world.device))[0]).cpu() for parts in rows])


def _chosen(batch: Batch, every: int) -> Tensor:
    """About one in `every` of the batch's tokens, flat positions [n]: by the token and its place in its row, so that neither ranks,
    micro-batches nor packing change which."""
    mixed = batch.position_ids.flatten() * 40503 + batch.input_ids.flatten() * 2654435761
    return batch.attended_at[(mixed % 1000003 % every == 0)[batch.attended_at]]


def _pairs(pairs: Sequence[Sequence[int]]) -> Pairs:
    return tuple((student, teacher) for student, teacher in pairs)
