"""Block-wise logit distillation: stepping stones, the teacher's upper blocks after the student's lower ones.

Yu, Zhang, Chen, Wang, Liu, Tan, Li, "Decoupling Dark Knowledge via Block-wise Logit Distillation for Feature-level Alignment",
arXiv 2411.01547, for decoders and for encoders with classes. Stone i of n, after student block s_i and in place of teacher block t_i:

    N_i  = head ∘ norm ∘ T_last ∘ … ∘ T_{t_i + 1} ∘ C_i ∘ S_{s_i} ∘ … ∘ S_0 ∘ embed
    loss = Σ_i 2^{i-n} (ce · CE(N_i) + kl · D(teacher ‖ N_i) + cross · D(ens ‖ N_i)) + cross · D(ens ‖ student)
    ens  = (1/n) Σ_i logits of N_i, detached

All of it beside the student's own loss. The student's blocks and the connectors C_i (linear, no bias) learn; the teacher's blocks and
head are frozen and pass the gradient on. D is the recipe's divergence at the step's temperature and the recipe's positions, forward KL by
default. What is `norm` here is, in an encoder, what its classes are read from (BERT's pooler), at one position per row. The head is linear
and one for all stones, so the ensemble's logits are the head's of the mean of the stones' final states: every term goes through the chunked
head, and [B, T, V] never exists.

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
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from llmkd.data.batches import Batch
from llmkd.distributed.ranks import World, sum_tensor
from llmkd.losses.chunked_head import IGNORED, TeacherHead, head_losses
from llmkd.losses.divergences import Divergence
from llmkd.models.parts import output_state
from llmkd.student.gradient_norms import before_projector
from llmkd.teachers.base import Signal

StudentHead = Callable[[Tensor, Batch, Signal, float, float, float | None], tuple[Tensor, Tensor, Tensor]]
PARTS = ("ce", "kl", "cross")


@dataclass(frozen=True)
class StoneWeights:
    """The recipe's weight of each term of a stone, before its share 2^{i-n}."""

    ce: float
    kl: float
    cross: float

    def alone(self, part: str) -> StoneWeights:
        """One of PARTS at its weight, the others at 0."""
        return StoneWeights(**{name: getattr(self, name) if name == part else 0.0 for name in PARTS})


@dataclass(frozen=True)
class Comparison:
    """How a stone's logits are compared: as the student's own are."""

    divergence: Divergence
    temperature: float
    """Of a step that is given no other."""
    positions: str
    """Where the divergence counts: `trained` or `attended`."""
    chunk: int


def shares(count: int) -> tuple[float, ...]:
    """What each stone's objective is multiplied by, from the first to the deepest: 2^{i-n}."""
    return tuple(2.0 ** (number + 1 - count) for number in range(count))


def drawn(count: int, seed: int, step: int) -> int:
    """The stone of a step where one is sampled, with a probability in proportion to its share; the same on every rank."""
    weights = shares(count)
    place = random.Random(f"stone {seed} {step}").random() * sum(weights)
    for number, weight in enumerate(weights):
        place -= weight
        if place < 0:
            return number
    return count - 1


class Stones(nn.Module):
    """The connectors of a student's stones, and their losses. It stands beside the student, so an exported student holds none.

    pairs: (student block, teacher block), by student block. `one`: each step trains one stone, drawn with probability p_i in proportion
    to its share w_i = 2^{i-n}, and its objective L_i counts Σw, so that the expectation Σ p_i (Σw) L_i = Σ w_i L_i is that of all
    stones: the gradient is unbiased.
    """

    def __init__(
        self,
        pairs: Sequence[tuple[int, int]],
        connectors: nn.ModuleList,
        *,
        weights: StoneWeights,
        comparison: Comparison,
        one: bool,
        seed: int,
    ) -> None:
        super().__init__()
        assert len(pairs) == len(connectors) > 0 and not (one and weights.cross)
        self.connectors = connectors
        self.pairs = tuple(pairs)
        self._weights = weights
        self._comparison = comparison
        self._one = one
        self._seed = seed
        self._states: dict[int, Tensor] | None = None
        self._factors: dict[int, float] | None = None  # of the step's stones; None before the first step
        self._weight = 1.0  # of all stones in this step
        self._scales = (0.0, 0.0)
        self._squares: dict[tuple[int, str], Tensor] = {}  # of the step, by stone (n: the student) and part
        self._reset()

    # -----------------------------------------------------------------------------------------------------------------
    # A step

    def watch(self, stack: nn.ModuleList) -> None:
        """Keep the states of the stones' student blocks in each pass to come."""
        for block in {student for student, _ in self.pairs}:
            stack[block].register_forward_hook(self._keeper(block))

    def _keeper(self, block: int) -> Callable[..., None]:
        def keep(module: nn.Module, args: object, output: object) -> None:
            if self._states is not None:  # a checkpointed block runs again, and its hook fires, in the backward pass
                self._states[block] = output_state(output)

        return keep

    def begin(self, step: int, *, trained: int, compared: int, ranks: int, weight: float = 1.0) -> None:
        """Choose the stones of a step (from 0); the global counts of positions with a target and with a divergence divide the sums.

        `weight`: a factor on the whole objective in this step; at 0 no stone is run.
        """
        weights = shares(len(self.pairs))
        self._factors = {drawn(len(weights), self._seed, step): sum(weights)} if self._one else dict(enumerate(weights))
        if weight == 0:
            self._factors = {}
        self._weight = weight
        self._scales = (ranks * weight / trained, ranks * weight / compared)
        self._squares = {}
        self._divisors = [a + b for a, b in zip(self._divisors, (trained, compared, compared), strict=True)]
        self._crossed += compared if self._factors else 0
        for number in self._factors:
            self._own[number] = [a + b for a, b in zip(self._own[number], (trained, compared, compared), strict=True)]

    def compare_by(self, divergence: Divergence) -> None:
        """From now on compare logits by this divergence."""
        self._comparison = replace(self._comparison, divergence=divergence)

    def open(self) -> None:
        """A pass of the student begins."""
        self._states = {}

    def forward(
        self,
        final: Tensor,
        batch: Batch,
        signal: Signal | None,
        head: StudentHead,
        *,
        temperature: float | None = None,
        report: bool = False,
    ) -> Tensor:
        """The stones' loss of the pass that has just been made; 0 before the first step has begun.

        final [B, T, H_s]: the student's final state, which `head` compares with the ensemble. `temperature`: of this step, where it
        changes. `report`: note the norms of the parts' gradients (see `norms`), each for one more pass of its stone and the gradient's.
        """
        states, self._states = self._states, None
        assert states is not None
        if self._factors is None:
            return final.new_zeros((), dtype=torch.float32)
        assert signal is not None and signal.upper is not None and signal.head is not None
        connected = {number: self._connected(number, states) for number in range(len(self.pairs))}
        loss = final.new_zeros((), dtype=torch.float32)
        if self._one or not self._factors:
            # ZeRO-3 repeats a parameter's last gradient where a step gives it none: what no drawn stone reaches gets one of zeros.
            idle = [connected.pop(n) for n in range(len(self.pairs)) if n not in self._factors]
            loss = torch.stack([nothing.float().sum() for nothing in (*idle, final[:, :0])]).sum()
        if not self._factors:
            return loss
        ensemble = self._ensemble(connected, batch, signal) if self._weights.cross else None
        how = self._comparison if temperature is None else replace(self._comparison, temperature=temperature)
        with signal.head() as lent:
            for number, factor in self._factors.items():
                given = dict(number=number, factor=factor, batch=batch, signal=signal, ensemble=ensemble, lent=lent)
                objective = functools.partial(self._objective, **given, how=how)
                value, sums = _AtOnce.apply(connected.pop(number), functools.partial(objective, weights=self._weights))  # type: ignore[no-untyped-call, misc]
                loss = loss + value
                self._add(number, sums)
                if report:
                    self._note_parts(number, states[self.pairs[number][0]], objective)
        if ensemble is not None:
            scale = self._weights.cross * self._scales[1]
            value, _, cross = head(final, batch, Signal({}, (), ensemble, signal.head), 0.0, scale, how.temperature)
            loss = loss + value
            self._add(len(self.pairs), torch.stack([torch.zeros_like(cross), torch.zeros_like(cross), cross]))
        return loss

    def _connected(self, number: int, states: dict[int, Tensor]) -> Tensor:
        """A stone's state [B, T, H_t] at teacher width; of a stone that is not of the step, [B, 0, H_t]."""
        state = states[self.pairs[number][0]]
        assert self._factors is not None
        return self.connectors[number](state if number in self._factors else state[:, :0])

    @torch.no_grad()
    def _ensemble(self, connected: dict[int, Tensor], batch: Batch, signal: Signal) -> Tensor:
        """The mean of the stones' final states [B, T, H_t], whose logits are the mean of theirs."""
        assert signal.upper is not None and signal.final is not None
        total = torch.zeros_like(signal.final, dtype=torch.promote_types(signal.final.dtype, torch.float32))
        for number, state in connected.items():
            total += signal.upper(self.pairs[number][1], state.to(signal.final.dtype), batch)
        return (total / len(connected)).to(signal.final.dtype)

    def _objective(
        self,
        state: Tensor,
        *,
        number: int,
        factor: float,
        batch: Batch,
        signal: Signal,
        ensemble: Tensor | None,
        lent: tuple[Tensor, Tensor | None],
        how: Comparison,
        weights: StoneWeights,
    ) -> tuple[Tensor, Tensor]:
        """(scaled loss, sums [3] of CE, divergence and cross term) of one stone from its state [B, T, H_t] at teacher width."""
        assert signal.upper is not None and signal.final is not None
        ce, compared = self._scales
        at = batch.attended_at if how.positions == "attended" else batch.trained_at
        ours = signal.upper(self.pairs[number][1], state.to(signal.final.dtype), batch).flatten(0, 1)[at]
        targets = batch.targets.flatten()[at]
        everywhere = torch.ones_like(targets, dtype=torch.bool)

        def against(theirs: Tensor, targets: Tensor, ce_scale: float, kl_scale: float) -> tuple[Tensor, Tensor, Tensor]:
            teacher = TeacherHead(theirs.flatten(0, 1)[at], *lent)
            return head_losses(
                ours,
                *lent,
                teacher,
                targets,
                everywhere if kl_scale else ~everywhere,
                ce_scale=factor * ce_scale,
                kl_scale=factor * kl_scale,
                divergence=how.divergence,
                temperature=how.temperature,
                chunk=how.chunk,
            )

        loss, ce_sum, kl_sum = against(signal.final, targets, weights.ce * ce, weights.kl * compared)
        cross = torch.zeros_like(kl_sum)
        if ensemble is not None and weights.cross:
            more, _, cross = against(ensemble, torch.full_like(targets, IGNORED), 0.0, weights.cross * compared)
            loss = loss + more
        return loss, torch.stack([ce_sum, kl_sum, cross])

    # -----------------------------------------------------------------------------------------------------------------
    # Norms

    def _note_parts(self, number: int, state: Tensor, objective: Callable[..., tuple[Tensor, Tensor]]) -> None:
        """Add each part's squared norm of its gradient at the student block's output, where a stone's losses enter its blocks."""
        connector: Any = self.connectors[number]
        for part in PARTS:
            weights = self._weights.alone(part)
            if weights != StoneWeights(0.0, 0.0, 0.0):
                loss = lambda _, connected, weights=weights: objective(connected, weights=weights)[0]  # noqa: E731
                self.note(number, part, before_projector(connector, state, loss))

    def note(self, number: int, part: str, gradient: Tensor) -> None:
        """Add the squared norm of a part's gradient; the student's own cross term is of number n."""
        square = torch.linalg.vector_norm(gradient, dtype=torch.promote_types(gradient.dtype, torch.float32)).square()
        self._squares[number, part] = self._squares.get((number, part), 0) + square

    def norms(self, world: World) -> dict[str, dict[str, float]]:
        """The step's norms by stone and part, the weights and shares in them, of the parts that a pass with `report` has noted (all ranks
        take part)."""
        if not self._squares:
            return {}
        # each rank's scales hold its share of the mean gradient, `world.size` times
        squares = sum_tensor(world, torch.stack([*self._squares.values()]).double()).div(world.size**2).tolist()
        names = [*(f"{student}<{teacher}" for student, teacher in self.pairs), "student"]
        found: dict[str, dict[str, float]] = {}
        for (number, part), square in zip(self._squares, squares, strict=True):
            found.setdefault(names[number], {})[part] = square**0.5
        return found

    # -----------------------------------------------------------------------------------------------------------------
    # What is logged

    def _reset(self) -> None:
        self._sums: Tensor | None = (
            None  # [2, n + 1, 3], bare and times the step's weight; the last row: the student's cross
        )
        self._crossed = 0
        self._divisors = [0, 0, 0]
        self._own = [[0, 0, 0] for _ in self.pairs]

    def _add(self, number: int, sums: Tensor) -> None:
        if self._sums is None:
            self._sums = torch.zeros(2, len(self.pairs) + 1, len(PARTS), dtype=torch.float64, device=sums.device)
        self._sums[0, number] += sums
        self._sums[1, number] += sums.double() * self._weight

    def flush(self, world: World) -> dict[str, float]:
        """The interval's means over all ranks (all ranks take part): `stones`, their weighted loss, and each stone's parts by name.

        A stone that was not drawn in the interval is left out. `stones` counts it as 0 then, so that it, too, is unbiased. In `stones` each
        step has its weight, elsewhere none.
        """
        if self._sums is None:  # the stones weighed nothing
            self._reset()
            return {"stones": 0.0}
        (*rows, own_cross), (*weighted, cross) = sum_tensor(world, self._sums).tolist()
        given = (self._weights.ce, self._weights.kl, self._weights.cross)
        all_shares = shares(len(self.pairs))
        factors = [sum(all_shares)] * len(rows) if self._one else all_shares
        total = given[2] * cross[2] / self._divisors[2]
        values: dict[str, float] = {}
        for (student, teacher), sums, counted, factor, own in zip(
            self.pairs, rows, weighted, factors, self._own, strict=True
        ):
            total += factor * sum(w * s / by for w, s, by in zip(given, counted, self._divisors, strict=True))
            if own[0]:
                read = zip(PARTS, given, sums, own, strict=True)
                values |= {f"stones/{student}<{teacher}/{part}": s / by for part, w, s, by in read if w}
        if given[2]:
            values["stones/student/cross"] = own_cross[2] / self._crossed
        self._reset()
        return {"stones": total, **values}


class _AtOnce(torch.autograd.Function):
    """A value whose gradient is computed at once, so that nothing of its making waits for the backward pass."""

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
