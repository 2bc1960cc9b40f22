"""The student's head as a module of its own: it gathers what its chunked loss needs, and tells what else is asked of a pass."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn

from llmkd.data.batches import Batch
from llmkd.losses.chunked_head import TeacherHead, TopK, head_losses
from llmkd.losses.distance_sum import small_pass
from llmkd.losses.divergences import Divergence, parts_of
from llmkd.teachers.base import Signal


class LossHead(nn.Module):
    """The student's head under its chunked loss. It owns the head's parameters (shared), so the engine gathers them for it."""

    def __init__(
        self,
        head: nn.Linear,
        bias: Tensor | None,
        *,
        divergence: Divergence,
        temperature: float,
        kl_positions: str,
        chunk: int,
    ) -> None:
        super().__init__()
        self.weight = head.weight
        if bias is head.bias:
            self.bias = bias
        else:  # BART's, which is no parameter
            self.register_buffer("bias", bias, persistent=False)
        self._divergence = divergence
        self._temperature = temperature
        self._kl_positions = kl_positions
        self._chunk = chunk
        self.report = False
        """Whether the next pass keeps both parts' own gradients for `take_gradients`, each at the price of the head's products."""
        self.report_mix = False
        """Whether with `report` it keeps those of each divergence of a sum, too."""
        self._gradients: list[Tensor | None] = []
        self.hear_teacher = False
        self.teacher_ce: Tensor | None = None
        """After a pass with `hear_teacher`: the teacher's cross-entropy sum over the trained positions, for one product more."""

    def take_gradients(self) -> list[Tensor | None]:
        """CE's and KL's gradients with respect to the final state [B * T, H], then with `report_mix` those of each divergence of a sum,
        once; None for a part that was not run."""
        parts = self.divergences if self.report_mix else ()
        gradients, self._gradients = self._gradients, []
        return gradients or [None] * (2 + len(parts))

    def compare_by(self, divergence: Divergence) -> None:
        """From now on compare logits by this divergence."""
        self._divergence = divergence

    @property
    def divergences(self) -> tuple[tuple[Divergence, float], ...]:
        """The divergences of a sum with their weights; none where there is one divergence."""
        return parts_of(self._divergence)

    def forward(
        self,
        final: Tensor,
        batch: Batch,
        signal: Signal | None,
        ce_scale: float,
        kl_scale: float,
        temperature: float | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(loss, CE sum, KL sum); logits exist only at the positions that count, a chunk at a time."""
        if self.hear_teacher:
            self.teacher_ce = self._heard(batch, signal)
        lent = None if signal is None or kl_scale == 0 else signal.head
        known = None if signal is None or kl_scale == 0 else signal.top_k
        taught = lent is not None or known is not None
        assert taught or kl_scale == 0, "a divergence is asked for, and the signal has neither a head nor a top k"
        at = batch.attended_at if taught and self._kl_positions == "attended" else batch.trained_at
        states = final.flatten(0, 1)[at]
        targets = batch.targets.flatten()[at]
        settings: dict[str, Any] = dict(
            ce_scale=ce_scale,
            kl_scale=kl_scale,
            divergence=self._divergence,
            temperature=self._temperature if temperature is None else temperature,
            chunk=self._chunk,
        )
        compared = torch.full_like(targets, taught, dtype=torch.bool)
        losses = functools.partial(
            self._losses, final, at, states, targets=targets, compared=compared, settings=settings
        )
        if known is not None:
            return losses(TopK(known.ids.flatten(0, 1), known.log_probabilities.flatten(0, 1), known.columns).at(at))
        if lent is None:
            return losses(None)
        assert signal is not None
        theirs = signal.take_final()
        assert theirs is not None, "a signal that lends its head has a final state"
        theirs = theirs.flatten(0, 1)[at]
        with lent() as (weight, bias):
            return losses(TeacherHead(theirs, weight, bias))

    def _heard(self, batch: Batch, signal: Signal | None) -> Tensor:
        """The teacher's own cross-entropy sum over the trained positions (all ranks take part)."""
        assert signal is not None and signal.final is not None and signal.head is not None
        targets = batch.targets.flatten()[batch.trained_at]
        settings: dict[str, Any] = dict(
            ce_scale=1.0, kl_scale=0.0, divergence=self._divergence, temperature=1.0, chunk=self._chunk
        )
        theirs, nowhere = signal.final.flatten(0, 1)[batch.trained_at], torch.zeros_like(targets, dtype=torch.bool)
        with signal.head() as (weight, bias):
            return head_losses(theirs, weight, bias, None, targets, nowhere, **settings)[1]

    def _losses(
        self,
        final: Tensor,
        at: Tensor,
        states: Tensor,
        teacher: TeacherHead | TopK | None,
        *,
        targets: Tensor,
        compared: Tensor,
        settings: dict[str, Any],
    ) -> tuple[Tensor, Tensor, Tensor]:
        """As `forward`, of states [N, H] gathered at flat positions `at` of the final state."""
        if self.report:
            self._gradients = [
                self._gradient_alone(final, at, states, teacher, targets, compared, {**settings, **alone})
                for alone in self._parts(settings["kl_scale"])
            ]
        return head_losses(states, self.weight, self.bias, teacher, targets, compared, **settings)

    def _parts(self, kl_scale: float) -> list[dict[str, Any]]:
        """Of each part that is reported, what is other than in the whole loss."""
        mix = self.divergences if self.report_mix else ()
        alone = [
            {"ce_scale": 0.0, "kl_scale": kl_scale * weight, "divergence": divergence} for divergence, weight in mix
        ]
        return [{"kl_scale": 0.0}, {"ce_scale": 0.0}, *alone]

    def _gradient_alone(
        self,
        final: Tensor,
        at: Tensor,
        states: Tensor,
        teacher: TeacherHead | TopK | None,
        targets: Tensor,
        compared: Tensor,
        settings: dict[str, Any],
    ) -> Tensor | None:
        """The gradient [B * T, H] of one part with respect to the final state, for a pass of the head; None where the part is not run."""
        if not settings["ce_scale"] and (not settings["kl_scale"] or teacher is None):
            return None
        leaf, bias = states.detach().requires_grad_(), None if self.bias is None else self.bias.detach()
        with small_pass():
            part = head_losses(leaf, self.weight.detach(), bias, teacher, targets, compared, **settings)[0]
            (gradient,) = torch.autograd.grad(part, leaf)
        return torch.zeros_like(final).flatten(0, 1).index_copy_(0, at, gradient)
