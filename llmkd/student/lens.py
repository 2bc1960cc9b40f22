"""The logit lens: what a model's own head would say of a state within it, read through all that follows the last block.

A pair's states, the student's and the teacher's, are read each by its own model, and the two distributions are compared by a symmetric
divergence (`llmkd.losses.divergences.logit_lens`). Each reading is one more pass of the chunked head, in which [B, T, V] never exists;
the student's head and final norm learn from it too. DistillLens, arXiv 2602.13567; whether they learn there is not known.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor
from transformers import PreTrainedModel

from llmkd.data.batches import Batch
from llmkd.losses.chunked_head import Terms
from llmkd.losses.divergences import jsd
from llmkd.models.families import model_type
from llmkd.student.loss_head import LossHead
from llmkd.student.matching import Kept
from llmkd.teachers.base import Signal

SYMMETRIC = functools.partial(jsd, beta=0.5)
"""`llmkd.losses.divergences.logit_lens`, as the head's loss takes it."""


def readings_sum(model: PreTrainedModel, head: LossHead, batch: Batch, signal: Signal, pair: Kept) -> Tensor:
    """A pair's weighted divergence [], summed over its positions, with its gradient (all ranks take part).

    `head`: the student's. The signal must be able to go on from the teacher's last block (`Signal.upper`).
    """
    assert signal.upper is not None and signal.head is not None, "the recipe's checks see to it"
    with torch.no_grad():
        theirs = signal.upper(signal.upper.last, pair.theirs, batch)
    positions = replace(batch, attended_at=pair.at, trained_at=pair.at)
    terms = Terms(0.0, pair.weight, SYMMETRIC, 1.0)
    reading = head(
        final_of(model, pair.ours), positions, Signal({}, (), theirs, signal.head), terms, kl_positions="attended"
    )
    return reading.loss


def final_of(model: PreTrainedModel, state: Tensor) -> Tensor:
    """The final state that a model would have if its last block's output were this [B, T, H]."""
    for path in model_type(model.config).ends or ():
        module = model.get_submodule(path.rpartition(".")[0]) if "." in path else model
        end = getattr(module, path.rpartition(".")[2])
        state = state if end is None else end(state)
    return state


def with_readings(
    distances: Sequence[Tensor],
    kept: Sequence[Kept],
    model: PreTrainedModel,
    head: LossHead,
    batch: Batch,
    signal: Signal | None,
) -> list[Tensor]:
    """The pairs' sums with those of what is read from the states that were kept for it."""
    sums = list(distances)
    for pair in kept:
        assert signal is not None
        sums[pair.number] = sums[pair.number] + readings_sum(model, head, batch, signal, pair)
    return sums
