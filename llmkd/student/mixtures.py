"""The learned map: each student block is compared with a mixture of teacher blocks, whose weights are trained with the student.

For student block j the target is the sum of w_ji t_i over its candidates i, w_j = softmax(a_j / temperature). The scores a of all student
blocks are one vector, which stands beside the student as projectors do: no weight decay touches it, it is in checkpoints, not in the
exported student.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from llmkd.distributed.engines import full_shape, gathered
from llmkd.layer_map import Pairs


class Mix(NamedTuple):
    """What one student block learns from in one pass."""

    blocks: tuple[int, ...]
    """The teacher blocks."""
    weights: Tensor
    """[k]"""
    penalty: Tensor | None
    """[], per position: the entropy of these, times its weight; None where that is 0."""


class Mixtures(nn.Module):
    """The scores of every pair of a learned map, and the weights that they stand for."""

    def __init__(self, candidates: Mapping[int, Sequence[int]], scores: Tensor, *, temperature: float, entropy: float):
        """`candidates`: student block -> teacher blocks. `scores` [pairs]: the first ones, student block after student block."""
        super().__init__()
        self.candidates = {student: tuple(blocks) for student, blocks in candidates.items()}
        self.scores = nn.Parameter(scores)
        self._temperature, self._entropy = temperature, entropy

    @property
    def _sizes(self) -> list[int]:
        return [len(blocks) for blocks in self.candidates.values()]

    def forward(self) -> Tensor:
        """The logarithms of all weights [pairs], in float32; a sharded engine gathers the scores for this call."""
        return self._logarithms()

    def _logarithms(self) -> Tensor:
        wide = self.scores.to(torch.promote_types(self.scores.dtype, torch.float32)) / self._temperature
        return torch.cat([part.log_softmax(0) for part in wide.split(self._sizes)])

    def of_pass(self) -> dict[int, Mix]:
        """By student block, what it learns from in a pass.

        Worked out before the student's blocks run, since activation checkpointing runs these twice.
        """
        mixes = {}
        for (student, blocks), logs in zip(self.candidates.items(), self().split(self._sizes), strict=True):
            weights = logs.exp()
            # by the logarithms, for a weight may have underflowed to 0
            penalty = -(weights * logs).sum() * self._entropy if self._entropy else None
            mixes[student] = Mix(blocks, weights, penalty)
        return mixes

    @torch.no_grad()
    def weights(self) -> dict[int, dict[int, float]]:
        """Student block -> teacher block -> its weight at present (all ranks take part where the scores are sharded)."""
        # not by a call, which the engine's hooks would count; what an engine keeps whole must stay whole
        sharded = [self.scores] if self.scores.numel() != full_shape(self.scores).numel() else []
        with gathered(sharded):
            values = iter(self._logarithms().exp().tolist())
        return {student: {block: next(values) for block in blocks} for student, blocks in self.candidates.items()}


def first_scores(candidates: Mapping[int, Sequence[int]], preferred: Pairs | None) -> Tensor:
    """[pairs]: 1 for the candidate nearest to each student block's `preferred` teacher block, of two the shallower; 0 for the others.

    None prefers none.
    """
    wanted = dict(preferred or ())
    scores = []
    for student, blocks in candidates.items():
        nearest = min(blocks, key=lambda block: abs(block - wanted[student])) if wanted else None
        scores += [float(block == nearest) for block in blocks]
    return torch.tensor(scores)
