"""The module the engine wraps: the student, its projectors, the hooks that match states where they are born, and the head's loss.

Projectors stand beside the student, never in it, so an exported student holds none.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from llmkd.data import Batch
from llmkd.divergences import Divergence
from llmkd.families import blocks, encoder_blocks, final_state, head, head_bias, kind, on_state
from llmkd.head import TeacherHead, TopK, head_losses
from llmkd.teachers.base import Signal

Distance = Callable[[Tensor, Tensor], Tensor]


class Distiller(nn.Module):
    """A student that computes its own losses from a batch and the teacher's signal.

    pairs: (student block, teacher block), EMBEDDING (-1) for the embeddings. `teacher_width` differs from the student's: each pair
    gets a projector Linear(H_s -> H_t). `positions`: match "trained" or "attended" positions.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        pairs: Sequence[tuple[int, int]],
        *,
        distance: Distance,
        positions: str,
        normed_last: bool,
        divergence: Divergence,
        temperature: float,
        kl_positions: str,
        chunk: int,
        projectors: nn.ModuleList | None = None,
    ) -> None:
        super().__init__()
        self.model = model
        self.projectors = projectors
        self.loss_head = LossHead(
            head(model),
            head_bias(model),
            divergence=divergence,
            temperature=temperature,
            kl_positions=kl_positions,
            chunk=chunk,
        )
        self._pairs = tuple(pairs)
        self._distance = distance
        self._positions = positions
        decodes = kind(model.config) == "decoder"
        self._normed = len(blocks(model)) - 1 if normed_last and decodes else None
        self._of_source = encoder_blocks(model)
        for block in {student for student, _ in pairs} - {self._normed}:
            on_state(model, block, self._matcher(block), normed=normed_last)
        self._batch: Batch | None = None
        self._signal: Signal | None = None
        self._matched: dict[int, Tensor] = {}  # pair number -> distance sum of this pass

    def forward(
        self, batch: Batch, signal: Signal | None, scales: tuple[float, float, float], source_weight: float = 1.0
    ) -> tuple[Tensor, Tensor]:
        """(loss, sums [2 + pairs]): the scaled loss of a micro-batch; the sums (CE, KL, each pair's distance) carry no gradient.

        `source_weight`: what a position of an encoder-decoder's source counts, so that source and target weigh alike in the whole batch.
        """
        self._batch, self._signal, self._matched = batch, signal, {}
        final = final_state(self.model, batch)
        if self._normed is not None:
            self._match(self._normed, final)
        distances = [
            self._matched[number] * source_weight if student in self._of_source else self._matched[number]
            for number, (student, _) in enumerate(self._pairs)
        ]
        loss = ce = kl = torch.zeros((), dtype=torch.float32, device=final.device)
        if scales[0] or scales[1]:  # else the head is neither gathered nor run, and both parts read 0
            loss, ce, kl = self.loss_head(final, batch, signal, scales[0], scales[1])
        if distances:
            loss = loss + scales[2] * torch.stack(distances).sum()
        sums = torch.stack([ce, kl, *(d.detach() for d in distances)])
        self._signal, self._matched = None, {}
        return loss, sums

    def _matcher(self, block: int) -> Callable[[Tensor], None]:
        def match(state: Tensor) -> None:
            if torch.is_grad_enabled() or not self.training:
                self._match(block, state)

        return match

    def _match(self, block: int, state: Tensor) -> None:
        """Compare the state with the teacher's, for each pair of this block; only the sum stays.

        Under activation checkpointing a block runs, and its hook fires, again in the backward pass. Then the projector alone is
        repeated, whose saved tensors checkpointing asks for; the distance keeps its own gradient.
        """
        for number, (student, teacher) in enumerate(self._pairs):
            if student != block:
                continue
            projected = state if self.projectors is None else self.projectors[number](state)
            if self._signal is None or number in self._matched:
                continue
            assert self._batch is not None
            mask = self._mask(block, self._batch)
            self._matched[number] = distance_sum(projected, self._signal.take(teacher), mask, self._distance)

    def _mask(self, block: int, batch: Batch) -> Tensor:
        """Which positions of a block's state are compared."""
        if block in self._of_source:
            assert batch.source_attended is not None
            return batch.source_attended
        return batch.attended if self._positions == "attended" else batch.targets != -100


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

    def forward(
        self, final: Tensor, batch: Batch, signal: Signal | None, ce_scale: float, kl_scale: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(loss, CE sum, KL sum); logits exist only at the positions that count, a chunk at a time."""
        lent = None if signal is None or kl_scale == 0 else signal.head
        known = None if signal is None or kl_scale == 0 else signal.top_k
        taught = lent is not None or known is not None
        at = batch.attended_at if taught and self._kl_positions == "attended" else batch.trained_at
        states = final.flatten(0, 1)[at]
        targets = batch.targets.flatten()[at]
        settings: dict[str, Any] = dict(
            ce_scale=ce_scale,
            kl_scale=kl_scale,
            divergence=self._divergence,
            temperature=self._temperature,
            chunk=self._chunk,
        )
        compared = torch.full_like(targets, taught, dtype=torch.bool)
        if known is not None:
            teacher = TopK(known.ids.flatten(0, 1), known.log_probabilities.flatten(0, 1), known.columns).at(at)
            return head_losses(states, self.weight, self.bias, teacher, targets, compared, **settings)
        if lent is None:
            return head_losses(states, self.weight, self.bias, None, targets, compared, **settings)
        assert signal is not None
        theirs = signal.take_final()
        assert theirs is not None, "a signal that lends its head has a final state"
        theirs = theirs.flatten(0, 1)[at]
        with lent() as (weight, bias):
            teacher = TeacherHead(theirs, weight, bias)
            return head_losses(states, self.weight, self.bias, teacher, targets, compared, **settings)


def make_projectors(
    pairs: int, student_width: int, teacher_width: int, *, bias: bool, seed: int
) -> nn.ModuleList | None:
    """One Linear(H_s -> H_t) per pair where the widths differ, drawn from the seed (Xavier uniform); None where they agree."""
    if pairs == 0 or student_width == teacher_width:
        return None
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        projectors = nn.ModuleList(nn.Linear(student_width, teacher_width, bias=bias) for _ in range(pairs))
        for projector in projectors:
            nn.init.xavier_uniform_(projector.weight)  # type: ignore[arg-type]
    return projectors


def distance_sum(student: Tensor, teacher: Tensor, mask: Tensor, distance: Distance) -> Tensor:
    """The sum of a distance over the positions of `mask`; what other positions hold, NaN included, changes nothing.

    student [B, T, H], teacher [B, T, H], mask [B, T]. The gradient is computed at once, and all that waits for the backward pass is
    one tensor of the student's size and dtype.
    """
    return _DistanceSum.apply(student, teacher, mask, distance)  # type: ignore[no-any-return, no-untyped-call]


class _DistanceSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, student: Tensor, teacher: Tensor, mask: Tensor, distance: Distance) -> Tensor:
        leaf = student.detach().requires_grad_()
        # Within a checkpointed block every tensor saved for a backward pass is dropped and made again by running the block a second
        # time; identity hooks keep this small pass, which is over before the block is, out of that.
        with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(lambda x: x, lambda x: x):
            keep = mask[..., None]
            value = distance(torch.where(keep, leaf, 0.0), torch.where(keep, teacher, 0.0))
            total = torch.where(mask, value, 0.0).sum()
            # Not save_for_backward: activation checkpointing would drop it and ask for the teacher's state again.
            (ctx.gradient,) = torch.autograd.grad(total, leaf)
        return total.detach()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        gradient, ctx.gradient = ctx.gradient, None
        return gradient.mul_(grads[0]), None, None, None
