"""The module the engine wraps: the student, its projectors, the hooks that match states where they are born, and the head's loss.

Projectors stand beside the student, never in it, so an exported student holds none.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from llmkd.closed_forms import ClosedDistance, closed_distance
from llmkd.data import Batch
from llmkd.distances import Distance
from llmkd.divergences import Divergence
from llmkd.head import TeacherHead, TopK, head_losses, rows_at_once
from llmkd.models import backbone, blocks, head
from llmkd.teachers.base import EMBEDDING, Signal, output_state


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
            head(model), divergence=divergence, temperature=temperature, kl_positions=kl_positions, chunk=chunk
        )
        self._pairs = tuple(pairs)
        self._distance = distance
        self._positions = positions
        stack = blocks(model)
        self._normed = len(stack) - 1 if normed_last else None
        for block in {student for student, _ in pairs} - {self._normed}:
            module = model.get_input_embeddings() if block == EMBEDDING else stack[block]
            module.register_forward_hook(self._matcher(block))
        self._batch: Batch | None = None
        self._signal: Signal | None = None
        self._matched: dict[int, Tensor] = {}  # pair number -> distance sum of this pass

    def forward(self, batch: Batch, signal: Signal | None, scales: tuple[float, float, float]) -> tuple[Tensor, Tensor]:
        """(loss, sums [2 + pairs]): the scaled loss of a micro-batch; the sums (CE, KL, each pair's distance) carry no gradient."""
        self._batch, self._signal, self._matched = batch, signal, {}
        final = backbone(self.model)(
            input_ids=batch.input_ids,
            attention_mask=batch.attention_mask,
            position_ids=batch.position_ids,
            use_cache=False,
        ).last_hidden_state
        if self._normed is not None:
            self._match(self._normed, final)
        distances = [self._matched[number] for number in range(len(self._pairs))]
        loss = ce = kl = torch.zeros((), dtype=torch.float32, device=final.device)
        if scales[0] or scales[1]:  # else the head is neither gathered nor run, and both parts read 0
            loss, ce, kl = self.loss_head(final, batch, signal, scales[0], scales[1])
        if distances:
            loss = loss + scales[2] * torch.stack(distances).sum()
        sums = torch.stack([ce, kl, *(d.detach() for d in distances)])
        self._signal, self._matched = None, {}
        return loss, sums

    def _matcher(self, block: int) -> Callable[..., None]:
        def match(module: nn.Module, args: object, output: object) -> None:
            if torch.is_grad_enabled() or not self.training:
                self._match(block, output_state(output))

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
            at = self._batch.attended_at if self._positions == "attended" else self._batch.trained_at
            self._matched[number] = distance_sum(projected, self._signal.take(teacher), at, self._distance)


class LossHead(nn.Module):
    """The student's head under its chunked loss. It owns the head's parameters (shared), so the engine gathers them for it."""

    def __init__(
        self, head: nn.Linear, *, divergence: Divergence, temperature: float, kl_positions: str, chunk: int
    ) -> None:
        super().__init__()
        self.weight = head.weight
        self.bias = head.bias
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
        assert taught or kl_scale == 0, "a divergence is asked for, and the signal has neither a head nor a top k"
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


def distance_sum(student: Tensor, teacher: Tensor, at: Tensor, distance: Distance) -> Tensor:
    """The sum of a distance over some positions; what other positions hold, NaN included, changes nothing.

    student [B, T, H], teacher [B, T, H], at [N] (flat positions, each once). The gradient is computed at once, a few rows at a time,
    and all that waits for the backward pass is one [N, H] of the student's dtype. `llmkd.distances` has the definitions.
    """
    return _DistanceSum.apply(student, teacher, at, distance)  # type: ignore[no-any-return, no-untyped-call]


class _DistanceSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, student: Tensor, teacher: Tensor, at: Tensor, distance: Distance) -> Tensor:
        ours, theirs = student.flatten(0, 1), teacher.flatten(0, 1)
        wide = torch.promote_types(torch.promote_types(ours.dtype, theirs.dtype), torch.float32)
        width = ours.shape[1]
        gradient = ours.new_empty(at.numel(), width)
        form = closed_distance(distance) or _by_autograd(distance)
        few = rows_at_once(len(gradient), width, at.device.type)
        sums = []
        for rows, part in zip(at.split(few), gradient.split(few), strict=True):
            value, slope = form(ours.index_select(0, rows).to(wide), theirs.index_select(0, rows).to(wide))
            sums.append(value.sum())
            part.copy_(slope)
        # Not save_for_backward: activation checkpointing would drop these and ask for the teacher's state again.
        ctx.gradient, ctx.at, ctx.shape = gradient, at, student.shape
        return torch.stack(sums).sum() if sums else gradient.new_zeros((), dtype=wide)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        gradient, ctx.gradient = ctx.gradient.mul_(grads[0]), None
        if len(gradient) < ctx.shape[:-1].numel():
            gradient = gradient.new_zeros(ctx.shape).flatten(0, 1).index_copy_(0, ctx.at, gradient)
        return gradient.view(ctx.shape), None, None, None


def _by_autograd(distance: Distance) -> ClosedDistance:
    """(value, gradient) of a distance that is known by its value alone."""

    def form(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
        leaf = student.requires_grad_()
        # Within a checkpointed block every tensor saved for a backward pass is dropped and made again by running the block a second
        # time; identity hooks keep this small pass, which is over before the block is, out of that.
        with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(lambda x: x, lambda x: x):
            value = distance(leaf, teacher)
            (gradient,) = torch.autograd.grad(value.sum(), leaf)
        return value.detach(), gradient

    return form
