"""What the losses of the head are computed from: the teacher's side, in one of two forms, and the terms of the loss."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from llmkd.losses.divergences import Divergence, top_k_masses

IGNORED = -100
"""The target of a position that has no cross-entropy."""


@dataclass(frozen=True)
class TeacherHead:
    """The teacher's side at the same positions: final states [N, H_t], head weight [V_t, H_t] and bias [V_t] or None."""

    states: Tensor
    weight: Tensor
    bias: Tensor | None


@dataclass(frozen=True)
class TopK:
    """The teacher's K likeliest tokens in place of its head: ids and log-probabilities [N, K], normalised over the first `columns`."""

    ids: Tensor
    log_probabilities: Tensor
    columns: int

    def at(self, rows: slice | Tensor) -> TopK:
        """The same at some of the positions."""
        return TopK(self.ids[rows], self.log_probabilities[rows], self.columns)

    def masses(self, columns: int, temperature: float, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        """(p [N, K], log p [N, K], p of the rest [N]) at that temperature among so many columns; in log p the least number for -inf."""
        log_p, log_rest = top_k_masses(self.log_probabilities.to(dtype), columns, temperature)
        return log_p.exp(), log_p.clamp(min=torch.finfo(dtype).min), log_rest.exp()


@dataclass(frozen=True)
class Terms:
    """What is summed over the positions, and the factor of each sum in the loss."""

    ce_scale: float
    kl_scale: float
    divergence: Divergence
    temperature: float
