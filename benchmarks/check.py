"""What a contestant's loss must be, from whole fp32 logits and states, one row at a time. Different losses would prove nothing."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from benchmarks.contestants import Terms
from benchmarks.passes import HIDDEN_WEIGHT
from benchmarks.shapes import Work
from llmkd.distributed.ranks import World, sum_tensor
from llmkd.losses.distances import normalized_mse
from llmkd.losses.divergences import DIVERGENCES
from llmkd.models.parts import blocks, output_state

TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2e-2}  # relative
OWN_TYPE = {"trl/gkd": {torch.bfloat16: 0.3}, "trl/gkd liger": {torch.bfloat16: 0.3}}
"""Who computes softmax and divergence in the model's own type, and is off by so much for it. Their float32 is held to the others'."""


@torch.no_grad()
def expected_losses(
    world: World, student: PreTrainedModel, teacher: PreTrainedModel, work: Work, terms: Sequence[Terms]
) -> list[float]:
    """The whole batch's loss for each of these terms, over all ranks."""
    sums = torch.zeros(len(terms), dtype=torch.float64, device=work.batch.input_ids.device)
    for row in work.rows:
        ours, theirs = (_row(model, [*row.prompt, *row.completion]) for model in (student, teacher))
        at = slice(len(row.prompt) - 1, len(row.prompt) + len(row.completion) - 1)  # what predicts the completion
        s, t = ours["logits"][at], theirs["logits"][at]
        targets = torch.tensor(row.completion, device=s.device)
        for number, term in enumerate(terms):
            if term.ce:
                sums[number] += term.ce * F.cross_entropy(s, targets, reduction="sum") / work.trained
            sums[number] += DIVERGENCES[term.divergence](s, t, 1.0).sum() / work.trained
            for student_block, teacher_block in term.pairs:
                distance = normalized_mse(
                    _state(ours, student_block, term.normed_last), _state(theirs, teacher_block, term.normed_last)
                )
                sums[number] += HIDDEN_WEIGHT * distance.sum() / (work.attended * len(term.pairs))
    return sum_tensor(world, sums).tolist()


def _row(model: PreTrainedModel, tokens: list[int]) -> dict[str, Any]:
    """A row's logits and block states in fp32; the last block's state raw as well as normed."""
    raw: list[Tensor] = []

    def keep(module: nn.Module, args: object, output: object) -> None:
        raw.append(output_state(output))

    handle = blocks(model)[-1].register_forward_hook(keep)
    out = model(input_ids=torch.tensor([tokens], device=model.device), output_hidden_states=True, use_cache=False)
    handle.remove()
    return {"logits": out.logits[0].float(), "states": out.hidden_states[1:], "raw": raw[0]}


def _state(made: dict[str, Any], block: int, normed_last: bool) -> Tensor:
    is_raw_last = block == len(made["states"]) - 1 and not normed_last
    return (made["raw"] if is_raw_last else made["states"][block]).float()


def agrees(name: str, loss: float, expected: float, dtype: torch.dtype) -> bool:
    """Whether a contestant's loss is the expected one but for rounding in that type."""
    tolerance = OWN_TYPE.get(name, {}).get(dtype, TOLERANCE[dtype])
    return abs(loss - expected) <= tolerance * max(abs(expected), 1e-3)
