"""Cross-entropy plus forward KL at temperature 1 and nothing else: four products per chunk and the fewest passes over the logits.

It is what the benchmark calls unavoidable. `llmkd.losses.chunked_head` does more (other divergences, temperatures, widths, biases,
masks) and is compared with this.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

ELEMENTS_AT_ONCE = {"cpu": 2**20, "cuda": 2**25}


def cheapest_losses(
    states: Tensor,
    weight: Tensor,
    teacher_states: Tensor,
    teacher_weight: Tensor,
    targets: Tensor,
    *,
    scale: float,
    chunk: int,
) -> Tensor:
    """scale * Σ (CE + KL(teacher ‖ student)) over N positions: states [N, H], weights [V, H], targets [N]."""
    return _Cheapest.apply(states, weight, teacher_states, teacher_weight, targets, scale, chunk)  # type: ignore[no-any-return, no-untyped-call]


class _Cheapest(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        states: Tensor,
        weight: Tensor,
        teacher_states: Tensor,
        teacher_weight: Tensor,
        targets: Tensor,
        scale: float,
        chunk: int,
    ) -> Tensor:
        total = torch.zeros((), device=states.device)
        grad_states = torch.empty_like(states)
        grad_weight: Tensor | None = None
        for part in torch.arange(states.shape[0]).split(chunk):
            at = slice(int(part[0]), int(part[-1]) + 1)
            logits, theirs = states[at] @ weight.T, teacher_states[at] @ teacher_weight.T
            total += _loss_and_gradient(logits, theirs, targets[at], scale)
            torch.mm(logits, weight, out=grad_states[at])
            product = logits.T @ states[at]
            grad_weight = product if grad_weight is None else grad_weight.float().add_(product)
        assert grad_weight is not None, "every micro-batch has a trained position"
        ctx.gradients = grad_states, grad_weight.to(weight.dtype)
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        gradients, ctx.gradients = ctx.gradients, None
        return (*(g.mul_(grads[0]) for g in gradients), *(None,) * 5)


def _loss_and_gradient(logits: Tensor, theirs: Tensor, targets: Tensor, scale: float) -> Tensor:
    """The scaled loss of a chunk [n, V]; its gradient takes the place of `logits`. A few rows at a time stay in the cache."""
    total = torch.zeros((), device=logits.device)
    rows = max(1, ELEMENTS_AT_ONCE[logits.device.type] // logits.shape[1])
    for s, t, target in zip(logits.split(rows), theirs.split(rows), targets[:, None].split(rows), strict=True):
        ours, theirs_wide = s.float(), t.float()
        at_target = ours.gather(1, target).squeeze(1)
        q, p = ours.softmax(-1), theirs_wide.softmax(-1)
        log_total = ours.amax(-1) - q.amax(-1).log()
        log_total_t = theirs_wide.amax(-1) - p.amax(-1).log()
        # CE = log_total - at_target; KL = Σ p (t - s) - log_total_t + log_total
        mean_gap = theirs_wide.sub_(ours).mul_(p).sum(-1)
        total += (2 * log_total - at_target + mean_gap - log_total_t).sum()
        s.copy_(q.mul_(2).sub_(p).scatter_add_(1, target, torch.full_like(target, -1, dtype=q.dtype)).mul_(scale))
    return total * scale
