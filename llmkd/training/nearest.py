"""The map that is measured: each student block learns from the teacher block that it is most like before the first step.

Likeness is linear CKA (llmkd.losses.set_distances), which compares states of any two widths, of about `TOKENS` tokens of the first
step's batch. An encoder-decoder's two stacks are measured by themselves, each over its own tokens. The map stands in the run's folder,
so that a resumed run learns by the same.
"""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import cast

import torch
from torch import Tensor, nn

from llmkd.data.batches import Batch
from llmkd.distributed.ranks import World, all_rows, on_main, sum_counts
from llmkd.errors import InputError
from llmkd.files import read_checked, write_checked
from llmkd.layer_map import Pairs, nearest
from llmkd.losses.set_distances import centred_gram, similarity
from llmkd.models import load
from llmkd.models.parts import Stack, Tokens, stacks, tokens_of
from llmkd.teachers.base import Demand, Teacher
from llmkd.teachers.resident import ResidentTeacher
from llmkd.training import build
from llmkd.training.jobs import Job
from llmkd.training.pairs import pair_names, through_stacks

log = logging.getLogger("llmkd")

TOKENS = 1024
"""About how many tokens of a stack are compared. Their Gram matrix, 4 MiB in fp32, is all that is kept of a block; while they are gathered,
the tokens' states of all blocks wait in host memory (8B teacher, 36 blocks: 0.6 GB shared by the ranks)."""
FILE = "map.json"


def settled(world: World, job: Job, rows: Callable[..., Iterator[list[Batch]]], *, resuming: bool) -> Job:
    """The job with its map: measured on the first step of `rows`, or read from the file of a resumed run (all ranks take part)."""
    file = job.folder / FILE
    if resuming:
        found = on_main(world, lambda: read_checked(file))
        if found is None:
            raise InputError(
                f"{file}: the map that this run began with is missing or damaged; put it back, or remove "
                f"{job.folder / 'checkpoints'} to begin again"
            )
        return _with_map(job, _pairs(found["pairs"]))
    [micro_batches] = rows(start_step=0, steps=1)
    measures = measured(world, job, micro_batches)

    def kept() -> Pairs:
        maps = [nearest(similarities.tolist()) for similarities in measures.values()]
        pairs = through_stacks(job.recipe, maps, job.encoders)
        names = pair_names(pairs, job.encoders)
        job.folder.mkdir(parents=True, exist_ok=True)
        cka = {stack: similarities.tolist() for stack, similarities in measures.items()}
        write_checked(file, {"pairs": pairs, "names": names, "cka": cka})
        return pairs

    pairs = _pairs(on_main(world, kept))
    log.info("%s: nearest by linear CKA: %s", job.title, ", ".join(pair_names(pairs, job.encoders)))
    return _with_map(job, pairs)


def _with_map(job: Job, pairs: Pairs) -> Job:
    """The job with the map's pairs, and its stones where they are to be the map's (without the embeddings' pair)."""
    mapped = replace(job, pairs=pairs if job.pairs else ())
    settings = job.recipe.stones
    if settings is None or settings.pairs != "from_map":
        return mapped
    return replace(mapped, stones=tuple(sorted((student, teacher) for student, teacher in pairs if student >= 0)))


def measured(world: World, job: Job, micro_batches: Sequence[Batch]) -> dict[str, Tensor]:
    """By stack ("enc" and "dec", or "blocks" where there is one), linear CKA of every student block with every teacher block, [L_s, L_t],
    over the same tokens on any number of ranks.

    Both models are loaded for this alone: the teacher in its placement, the student whole on every rank.
    """
    assert job.teacher is not None
    settings, normed = job.recipe.student, job.recipe.matching.final_state == "normed"
    every_block = Demand(tuple(range(sum(job.teacher_depths))), logits=False, normed_last=normed)
    model = load.load_model(
        job.initial,
        dtype=load.DTYPES[job.train.dtype],
        ds_config=None,
        attention=settings.attention,
        trust_remote_code=(settings if settings.init == "checkpoint" else job.recipe.teacher).trust_remote_code,
        quantize="none" if settings.lora is None else settings.lora.quantize,
    )
    cast(nn.Module, model).to(world.device)
    parts = stacks(model)
    every = [_every(world, micro_batches, stack) for stack in parts]
    student = ResidentTeacher(model, range(sum(job.student_depths)), normed_last=normed, ds_config=None, logits=False)
    ours = _grams(world, student, job.student_depths, micro_batches, parts, every)
    theirs = _grams(world, build.load_teacher(world, job, every_block), job.teacher_depths, micro_batches, parts, every)
    names = [stack.name or "blocks" for stack in parts]
    del student, model, parts
    gc.collect()
    return {name: similarity(*grams) for name, *grams in zip(names, ours, theirs, strict=True)}


def _every(world: World, micro_batches: Sequence[Batch], stack: Stack) -> int:
    """The n of "one token in n is compared", for a stack."""
    [attended] = sum_counts(world, [sum(tokens_of(batch, stack).at.numel() for batch in micro_batches)])
    return -(-attended // TOKENS)


def _grams(
    world: World,
    model: Teacher,
    depths: Sequence[int],
    micro_batches: Sequence[Batch],
    parts: Sequence[Stack],
    every: Sequence[int],
) -> list[Tensor]:
    """By stack, the centred Gram matrix of each block's states at the stack's chosen tokens, [blocks, N, N] on the CPU."""
    rows: list[list[list[Tensor]]] = [[[] for _ in range(depth)] for depth in depths]
    model.expect(micro_batches)
    for batch in micro_batches:
        here = batch.to(world.device)
        signal, block = model.signals(here), 0
        for stack, one_in, of_stack in zip(parts, every, rows, strict=True):
            at = _chosen(tokens_of(here, stack), one_in)
            for kept in of_stack:
                kept.append(signal.take(block).flatten(0, 1)[at].float().cpu())
                block += 1
    return [torch.stack([_gram(world, kept) for kept in of_stack]) for of_stack in rows]


def _gram(world: World, parts: list[Tensor]) -> Tensor:
    """Of the rows [n, H] of all micro-batches and ranks, [N, N] on the CPU."""
    return centred_gram(all_rows(world, torch.cat(parts).to(world.device))[0]).cpu()


def _chosen(tokens: Tokens, every: int) -> Tensor:
    """About one in `every` of the tokens, flat positions [n]: by the token and its place in its row, so that neither ranks, micro-batches
    nor packing change which."""
    mixed = tokens.positions.flatten() * 40503 + tokens.ids.flatten() * 2654435761
    return tokens.at[(mixed % 1000003 % every == 0)[tokens.at]]


def _pairs(pairs: Sequence[Sequence[int]]) -> Pairs:
    return tuple((student, teacher) for student, teacher in pairs)
