"""Block-wise logit distillation: stepping stones, the teacher's upper blocks after the student's lower ones.

Yu, Zhang, Chen, Wang, Liu, Tan, Li, "Decoupling Dark Knowledge via Block-wise Logit Distillation for Feature-level Alignment",
arXiv 2411.01547, for decoders and for encoders with classes. Stone i of n, after student block s_i and in place of teacher block t_i:

    N_i  = head ∘ norm ∘ T_last ∘ … ∘ T_{t_i + 1} ∘ C_i ∘ S_{s_i} ∘ … ∘ S_0 ∘ embed
    loss = Σ_i 2^{i-n} (ce · CE(N_i) + kl · D(teacher ‖ N_i) + cross · D(ens ‖ N_i)) + cross · D(ens ‖ student)
    ens  = (1/n) Σ_i logits of N_i, detached

All of this is added to the student's own loss. The student's blocks and the connectors C_i (linear, no bias) learn; the teacher's blocks
and head are frozen and pass the gradient on. D is the recipe's divergence at the step's temperature and the recipe's positions, forward KL
by default. In an encoder, `norm` stands for what its classes are read from (BERT's pooler), at one position per row. The head is linear and
the same for all stones, so the ensemble's logits are the head's of the mean of the stones' final states: every term goes through the
chunked head, and [B, T, V] never exists.

What the paper's public descriptions leave unknown, and what is done here: the weights of the three terms (the recipe's), the
temperature (the loss's), the connectors' kind (linear), whether the ensemble is detached (it is), what D of the cross terms is (the
same D, from the ensemble to each), and whether a stone's cross term is divided by 2^{n-i} too (it is; the student's is not).

Cost: stone i runs the L - 1 - t_i teacher blocks above its own, forward, and as much again for the gradient of its input, and once
more forward where they are run again for it (`checkpoint`). With n even cuts the forward passes come to (n - 1) / 2 whole teachers.
Each stone also takes three products with the head: its logits, the teacher's, and the gradient. The cross term takes each forward pass
once more, and three products more. Where one stone is sampled, the likeliest is the deepest, which is the cheapest. A stone's gradient
is computed at once, so that what waits for the backward pass is one [B, T, H_t] per stone.
"""

from __future__ import annotations

import functools
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from llmkd.data.batches import Batch
from llmkd.losses.chunked_head import head_losses
from llmkd.losses.head_inputs import IGNORED, TeacherHead, Terms
from llmkd.losses.head_kernels import HeadKernel
from llmkd.student.gradient_norms import TailPass, before_projector, square
from llmkd.student.loss_head import LossHead
from llmkd.student.passes import STONE_PARTS, StepSettings, StoneSums, StoneWeights
from llmkd.teachers.base import Signal


def shares(count: int) -> tuple[float, ...]:
    """What each stone's objective is multiplied by, from the first to the deepest: 2^{i-n}."""
    return tuple(2.0 ** (number + 1 - count) for number in range(count))


def drawn(count: int, seed: int, step: int) -> int:
    """The stone of a step (from 0) where one is sampled, with a probability in proportion to its share; the same on every rank."""
    weights = shares(count)
    place = random.Random(f"stone {seed} {step}").random() * sum(weights)
    for number, weight in enumerate(weights):
        place -= weight
        if place < 0:
            return number
    return count - 1


def factors(count: int, *, sampled: bool, seed: int, step: int) -> dict[int, float]:
    """By number, what the objective of each stone of a step (from 0) is multiplied by.

    `sampled`: the step trains one stone, drawn with probability p_i in proportion to its share w_i = 2^{i-n}, and its objective L_i counts
    Σw, so that the expectation Σ p_i (Σw) L_i = Σ w_i L_i is that of all stones: the gradient is unbiased.
    """
    weights = shares(count)
    return {drawn(count, seed, step): sum(weights)} if sampled else dict(enumerate(weights))


class StonesResult(NamedTuple):
    """The stones' part of a pass; `sums` is None where no stone was run."""

    loss: Tensor
    sums: StoneSums | None


@dataclass(frozen=True)
class _Pass:
    """What all stones of one pass share."""

    batch: Batch
    signal: Signal
    settings: StepSettings
    weights: StoneWeights
    scales: tuple[float, float]
    ensemble: Tensor | None
    """The mean of the stones' final states [B, T, H_t], where there is a cross term."""
    head: tuple[Tensor, Tensor | None]
    """The teacher's head: weight and bias."""


class SteppingStones(nn.Module):
    """The connectors of a student's stones, and their losses. It stands beside the student, so an exported student holds none.

    pairs: (student block, teacher block), by student block. `chunk`: tokens whose logits exist at a time.
    """

    def __init__(
        self, pairs: Sequence[tuple[int, int]], connectors: nn.ModuleList, *, chunk: int, kernel: HeadKernel = "none"
    ) -> None:
        super().__init__()
        assert len(pairs) == len(connectors) > 0
        self.connectors = connectors
        self.pairs = tuple(pairs)
        self._chunk = chunk
        self._kernel: HeadKernel = kernel

    def forward(
        self,
        final: Tensor,
        batch: Batch,
        signal: Signal,
        settings: StepSettings,
        *,
        states: Mapping[int, Tensor],
        head: LossHead,
        tail: TailPass | None,
    ) -> StonesResult:
        """The stones' loss of the student's pass that has just been made.

        final [B, T, H_s]: the student's final state, which its `head` compares with the ensemble. states: the outputs [B, T, H_s] of the
        stones' student blocks. `tail`: given where norms are reported, each part's for one more pass of its stone and the gradient's.
        """
        stones = settings.stones
        assert stones is not None and signal.upper is not None and signal.head is not None
        # [B, T, H_t]; of a stone that is not trained in this step [B, 0, H_t]
        connected = {
            number: self.connectors[number](states[block] if number in stones.factors else states[block][:, :0])
            for number, (block, _) in enumerate(self.pairs)
        }
        loss = final.new_zeros((), dtype=torch.float32)
        if stones.sampled or not stones.factors:
            # A parameter without a gradient would get that of the step before under ZeRO-3: what no stone reaches gets zeros.
            idle = [connected.pop(n) for n in range(len(self.pairs)) if n not in stones.factors]
            loss = torch.stack([nothing.float().sum() for nothing in (*idle, final[:, :0])]).sum()
        if not stones.factors:
            return StonesResult(loss, None)
        ensemble = self._ensemble(connected, batch, signal) if stones.weights.cross else None
        sums, squares = dict[int, Tensor](), dict[int, Tensor]()
        with signal.head() as lent:
            this = _Pass(batch, signal, settings, stones.weights, stones.scales, ensemble, lent)
            for number, factor in stones.factors.items():
                objective = functools.partial(self._objective, this, number, factor)
                value, sums[number] = _AtOnce.apply(  # type: ignore[no-untyped-call, misc]
                    connected.pop(number), functools.partial(objective, weights=stones.weights)
                )
                loss = loss + value
                if tail is not None:
                    squares[number] = self._squares(number, states[self.pairs[number][0]], objective, stones.weights)
        if ensemble is not None:
            terms = Terms(0.0, stones.weights.cross * stones.scales[1], settings.divergence, settings.temperature)
            own = head(
                final,
                batch,
                Signal({}, (), ensemble, signal.head),
                terms,
                kl_positions=settings.weights.kl_positions,
                gradients_of=[] if tail is None else [terms],
            )
            loss = loss + own.loss
            sums[len(self.pairs)] = _cross_alone(own.kl)
            if tail is not None:
                squares[len(self.pairs)] = _cross_alone(tail.square_before(final, own.gradients[0]))
        rows = len(self.pairs) + 1
        norms = _with_zeros(squares, rows) if squares else None
        return StonesResult(loss, StoneSums(_with_zeros(sums, rows).double(), norms))

    @torch.no_grad()
    def _ensemble(self, connected: Mapping[int, Tensor], batch: Batch, signal: Signal) -> Tensor:
        """The mean of the stones' final states [B, T, H_t], whose logits are the mean of theirs."""
        assert signal.upper is not None and signal.final is not None
        total = torch.zeros_like(signal.final, dtype=torch.promote_types(signal.final.dtype, torch.float32))
        for number, state in connected.items():
            total += signal.upper(self.pairs[number][1], state.to(signal.final.dtype), batch)
        return (total / len(connected)).to(signal.final.dtype)

    def _objective(
        self, this: _Pass, number: int, factor: float, state: Tensor, *, weights: StoneWeights
    ) -> tuple[Tensor, Tensor]:
        """(scaled loss, sums [3] by STONE_PARTS) of one stone from its state [B, T, H_t] at teacher width."""
        batch, signal, settings = this.batch, this.signal, this.settings
        assert signal.upper is not None and signal.final is not None
        at = batch.attended_at if settings.weights.kl_positions == "attended" else batch.trained_at
        ours = signal.upper(self.pairs[number][1], state.to(signal.final.dtype), batch).flatten(0, 1)[at]
        targets = batch.targets.flatten()[at]
        everywhere = torch.ones_like(targets, dtype=torch.bool)

        def against(theirs: Tensor, targets: Tensor, ce_scale: float, kl_scale: float) -> tuple[Tensor, Tensor, Tensor]:
            terms = Terms(factor * ce_scale, factor * kl_scale, settings.divergence, settings.temperature)
            teacher = TeacherHead(theirs.flatten(0, 1)[at], *this.head)
            compared = everywhere if kl_scale else ~everywhere
            return head_losses(
                ours, *this.head, teacher, targets, compared, terms, chunk=self._chunk, kernel=self._kernel
            )

        ce_scale, kl_scale = this.scales
        loss, ce_sum, kl_sum = against(signal.final, targets, weights.ce * ce_scale, weights.kl * kl_scale)
        cross = torch.zeros_like(kl_sum)
        if this.ensemble is not None and weights.cross:
            more, _, cross = against(this.ensemble, torch.full_like(targets, IGNORED), 0.0, weights.cross * kl_scale)
            loss = loss + more
        return loss, torch.stack([ce_sum, kl_sum, cross])

    def _squares(
        self, number: int, state: Tensor, objective: Callable[..., tuple[Tensor, Tensor]], weights: StoneWeights
    ) -> Tensor:
        """[3], each part's squared norm of its gradient at the student block's output, where a stone's losses enter its blocks."""
        connector: Any = self.connectors[number]
        squares: dict[int, Tensor] = {}
        for column, part in enumerate(STONE_PARTS):
            if getattr(weights, part):
                loss = lambda _, connected, part=part: objective(connected, weights=weights.alone(part))[0]  # noqa: E731
                squares[column] = square(before_projector(connector, state, loss))
        return _with_zeros(squares, len(STONE_PARTS))


def _cross_alone(value: Tensor) -> Tensor:
    """[3], by STONE_PARTS, of the student's own row."""
    return torch.stack([torch.zeros_like(value), torch.zeros_like(value), value])


def _with_zeros(rows: Mapping[int, Tensor], count: int) -> Tensor:
    """[count, ...] of rows [...] by their numbers, zeros where there is none."""
    zero = torch.zeros_like(next(iter(rows.values())))
    return torch.stack([rows.get(number, zero) for number in range(count)])


class _AtOnce(torch.autograd.Function):
    """A value whose gradient is computed in the forward pass, so that no tensor in between is kept for the backward pass."""

    @staticmethod
    def forward(ctx: Any, state: Tensor, value: Callable[[Tensor], tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
        with torch.enable_grad():
            leaf = state.detach().requires_grad_()
            loss, sums = value(leaf)
            (ctx.gradient,) = torch.autograd.grad(loss, leaf)
        loss, sums = loss.detach(), sums.detach()
        ctx.mark_non_differentiable(sums)
        return loss, sums

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        gradient, ctx.gradient = ctx.gradient, None
        return gradient.mul_(grads[0]), None
