"""The student's head as a module of its own, under its chunked loss."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from llmkd.data.batches import Batch
from llmkd.losses.chunked_head import head_losses
from llmkd.losses.distance_sum import small_pass
from llmkd.losses.divergences import parts_of
from llmkd.losses.head_inputs import TeacherHead, Terms, TopK
from llmkd.losses.head_kernels import HeadKernel
from llmkd.losses.head_scores import head_scores
from llmkd.teachers.base import Signal


class HeadResult(NamedTuple):
    """The head's part of a pass: the scaled loss and the sums of cross-entropy and divergence, each []."""

    loss: Tensor
    ce: Tensor
    kl: Tensor
    gradients: tuple[Tensor | None, ...]
    """Of each of `gradients_of`, the gradient with respect to the final state [B, T, H]; None where its weight is 0."""
    teacher_ce: Tensor | None
    agreement: Tensor | None = None
    """[], at how many trained positions both find the same token likeliest, where that is asked for and a teacher's logits are at hand."""

    @classmethod
    def of_nothing(cls, device: torch.device, terms: int) -> HeadResult:
        """The result where the head is not run, with the gradients of so many terms."""
        zero = torch.zeros((), dtype=torch.float32, device=device)
        return cls(zero, zero, zero, (None,) * terms, None)


class LossHead(nn.Module):
    """The student's head under its chunked loss; `chunk` tokens' logits exist at a time.

    It owns the head's parameters (shared with the model), so that ZeRO-3 gathers them for it. BART's bias is no parameter.
    """

    def __init__(self, head: nn.Linear, bias: Tensor | None, *, chunk: int, kernel: HeadKernel = "none") -> None:
        super().__init__()
        self.weight = head.weight
        if bias is head.bias:
            self.bias = bias
        else:
            self.register_buffer("bias", bias, persistent=False)
        self._chunk = chunk
        self._kernel: HeadKernel = kernel

    def forward(
        self,
        final: Tensor,
        batch: Batch,
        signal: Signal | None,
        terms: Terms,
        *,
        kl_positions: str,
        gradients_of: Sequence[Terms] = (),
        teacher_ce: bool = False,
        scores: bool = False,
    ) -> HeadResult:
        """The loss of a final state [B, T, H]; logits exist only at the positions that count.

        `gradients_of`: the terms whose gradients are wanted beside the loss's own, each for one more pass of the head.
        `teacher_ce`: sum the teacher's cross-entropy, for one more product with its head (all ranks take part).
        `scores`: no loss, but the sums of `llmkd.losses.head_scores` over the trained positions, whatever the terms.
        """
        if scores:
            return self._scores(final, batch, signal)
        measured = self._teacher_ce(batch, signal, terms) if teacher_ce else None
        has_kl = terms.kl_scale > 0
        can_compare = signal is not None and (signal.head is not None or signal.top_k is not None)
        assert can_compare or not has_kl, "a divergence has a weight, and the signal has neither a head nor a top k"
        at = batch.attended_at if has_kl and kl_positions == "attended" else batch.trained_at
        targets = batch.targets.flatten()[at]
        compared = torch.full_like(targets, has_kl, dtype=torch.bool)
        states, weight, bias = final.flatten(0, 1)[at], self.weight, self.bias
        with _teacher_at(at, signal if has_kl else None) as teacher:

            def losses(
                states: Tensor, weight: Tensor, bias: Tensor | None, terms: Terms
            ) -> tuple[Tensor, Tensor, Tensor]:
                return self._losses(states, weight, bias, teacher, targets, compared, terms)

            def gradient(part: Terms) -> Tensor | None:
                if not part.ce_scale and (not part.kl_scale or teacher is None):
                    return None
                leaf = states.detach().requires_grad_()
                with small_pass():
                    loss, *_ = losses(leaf, weight.detach(), None if bias is None else bias.detach(), part)
                    (own,) = torch.autograd.grad(loss, leaf)
                return torch.zeros_like(final).flatten(0, 1).index_copy_(0, at, own).view(final.shape)

            gradients = tuple(gradient(part) for part in gradients_of)
            return HeadResult(*losses(states, weight, bias, terms), gradients, measured)

    def _scores(self, final: Tensor, batch: Batch, signal: Signal | None) -> HeadResult:
        at = batch.trained_at
        is_compared = signal is not None and (signal.head is not None or signal.top_k is not None)
        with _teacher_at(at, signal if is_compared else None) as teacher:
            states, targets = final.flatten(0, 1)[at], batch.targets.flatten()[at]
            ce, kl, agrees = head_scores(states, self.weight, self.bias, teacher, targets, self._chunk)
        zero = torch.zeros_like(ce[:0].sum())
        return HeadResult(
            zero, ce.sum(), zero if kl is None else kl.sum(), (), None, None if agrees is None else agrees.sum()
        )

    def _losses(self, *inputs: Any) -> tuple[Tensor, Tensor, Tensor]:
        return head_losses(*inputs, chunk=self._chunk, kernel=self._kernel)

    def _teacher_ce(self, batch: Batch, signal: Signal | None, terms: Terms) -> Tensor:
        assert signal is not None and signal.final is not None and signal.head is not None
        targets = batch.targets.flatten()[batch.trained_at]
        states, nowhere = signal.final.flatten(0, 1)[batch.trained_at], torch.zeros_like(targets, dtype=torch.bool)
        ce_alone = replace(terms, ce_scale=1.0, kl_scale=0.0)
        with signal.head() as (weight, bias):
            return self._losses(states, weight, bias, None, targets, nowhere, ce_alone)[1]


@contextlib.contextmanager
def _teacher_at(at: Tensor, signal: Signal | None) -> Iterator[TeacherHead | TopK | None]:
    """Inside, the teacher's side at flat positions [N], its head whole (all ranks take part); None without a signal."""
    if signal is None:
        yield None
    elif signal.top_k is not None:
        top_k = signal.top_k
        yield TopK(top_k.ids.flatten(0, 1), top_k.log_probabilities.flatten(0, 1), top_k.columns).at(at)
    else:
        assert signal.head is not None
        states = signal.take_final()
        assert states is not None, "a signal that lends its head has a final state"
        states = states.flatten(0, 1)[at]  # the whole state is let go
        with signal.head() as (weight, bias):
            yield TeacherHead(states, weight, bias)


def reported_terms(terms: Terms) -> list[Terms]:
    """The terms whose gradients a report names: cross-entropy, the divergence, and each divergence of a sum."""
    divergences = [
        replace(terms, ce_scale=0.0, kl_scale=terms.kl_scale * weight, divergence=divergence)
        for divergence, weight in parts_of(terms.divergence)
    ]
    return [replace(terms, kl_scale=0.0), replace(terms, ce_scale=0.0), *divergences]
