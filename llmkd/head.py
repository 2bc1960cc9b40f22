"""Cross-entropy and divergence from final states and head weights, a chunk of tokens at a time; [B, T, V] never exists.

The gradients are computed in the forward pass, so no logit outlives its chunk. Pure tensors: what is sharded is gathered by the
caller (llmkd.student).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

Divergence = Callable[[Tensor, Tensor, float], Tensor]


@dataclass(frozen=True)
class TeacherHead:
    """The teacher's side at the same positions: final states [N, H_t], head weight [V_t, H_t] and bias [V_t] or None."""

    states: Tensor
    weight: Tensor
    bias: Tensor | None


def head_losses(
    states: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    teacher: TeacherHead | None,
    targets: Tensor,
    compared: Tensor,
    *,
    ce_scale: float,
    kl_scale: float,
    divergence: Divergence,
    temperature: float,
    chunk: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """(loss, cross-entropy sum, divergence sum) of N positions; the loss = ce_scale * CE + kl_scale * KL carries the gradient.

    states [N, H], weight [V, H], targets [N] (-100: no cross-entropy there), compared [N] bool (where the divergence counts).
    The divergence is over the columns both heads have; a wider head's further columns are left out on that side, as if masked
    with -inf. Products run in the states' dtype, everything after them in fp32 (float64 stays).
    """
    return _HeadLosses.apply(
        states, weight, bias, teacher, targets, compared, ce_scale, kl_scale, divergence, temperature, chunk
    )  # type: ignore[no-any-return, no-untyped-call]


class _HeadLosses(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        states: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        teacher: TeacherHead | None,
        targets: Tensor,
        compared: Tensor,
        ce_scale: float,
        kl_scale: float,
        divergence: Divergence,
        temperature: float,
        chunk: int,
    ) -> tuple[Tensor, Tensor, Tensor]:
        wide = torch.promote_types(states.dtype, torch.float32)
        needs_state, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        ce_sum = kl_sum = torch.zeros((), dtype=wide, device=states.device)
        grad_states = torch.zeros_like(states) if needs_state else None
        grad_weight = torch.zeros(weight.shape, dtype=wide, device=weight.device) if needs_weight else None
        grad_bias = torch.zeros(weight.shape[0], dtype=wide, device=weight.device) if needs_bias else None
        for start in range(0, states.shape[0], chunk):
            part = slice(start, start + chunk)
            ce, kl, grad = _chunk(
                states[part],
                weight,
                bias,
                teacher,
                targets[part],
                compared[part],
                part,
                ce_scale,
                kl_scale,
                divergence,
                temperature,
                wide,
            )
            ce_sum, kl_sum = ce_sum + ce, kl_sum + kl
            if grad_bias is not None:
                grad_bias += grad.sum(0)
            grad = grad.to(states.dtype)
            if grad_states is not None:
                grad_states[part] = grad @ weight
            if grad_weight is not None:
                grad_weight += grad.T @ states[part]
        # Not save_for_backward: activation checkpointing would drop these and ask for the pass again.
        ctx.gradients = (
            grad_states,
            None if grad_weight is None else grad_weight.to(weight.dtype),
            None if grad_bias is None or bias is None else grad_bias.to(bias.dtype),
        )
        ctx.mark_non_differentiable(ce_sum, kl_sum)
        return ce_scale * ce_sum + kl_scale * kl_sum, ce_sum, kl_sum

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        gradients = [None if g is None else g * grads[0] for g in ctx.gradients]
        ctx.gradients = None
        return (*gradients, *(None,) * 8)


def _chunk(
    states: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    teacher: TeacherHead | None,
    targets: Tensor,
    compared: Tensor,
    part: slice,
    ce_scale: float,
    kl_scale: float,
    divergence: Divergence,
    temperature: float,
    wide: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    """(CE sum, KL sum, gradient of their weighted sum w.r.t. the chunk's logits [n, V])."""
    logits = F.linear(states, weight, bias).to(wide).requires_grad_()
    with torch.enable_grad():
        ce = F.cross_entropy(logits, targets, ignore_index=-100, reduction="sum")
        kl = torch.zeros((), dtype=wide, device=logits.device)
        if teacher is not None and kl_scale != 0:
            shared = min(logits.shape[1], teacher.weight.shape[0])
            bias_t = None if teacher.bias is None else teacher.bias[:shared]
            teacher_logits = F.linear(teacher.states[part], teacher.weight[:shared], bias_t).to(wide)
            per_token = divergence(logits[:, :shared], teacher_logits, temperature)
            kl = torch.where(compared, per_token, 0.0).sum()
        (grad,) = torch.autograd.grad(ce_scale * ce + kl_scale * kl, logits)
    return ce.detach(), kl.detach(), grad
