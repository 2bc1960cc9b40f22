"""The module the engine wraps: the student, its projectors, the hooks that match states where they are born, and the head's loss.

Projectors stand beside the student, never in it, so an exported student holds none.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from llmkd.data.batches import Batch
from llmkd.losses.distance_sum import AllRows, Term, distance_sum, kinds, of_each_pair, sampled, stood_for
from llmkd.losses.distances import Distance
from llmkd.losses.divergences import Divergence
from llmkd.models.families import kind
from llmkd.models.parts import blocks, encoder_blocks, final_state, head, head_bias, on_state
from llmkd.student.gradient_norms import Tail, before_projector
from llmkd.student.loss_head import LossHead
from llmkd.student.stepping_stones import Stones
from llmkd.teachers.base import Signal

Places = tuple[Tensor, float, Tensor | None]
"""(flat positions [N] that are compared, how many each of them stands for, how many all ranks' do where sets are of all ranks' samples)"""


class Distiller(nn.Module):
    """A student that computes its own losses from a batch and the teacher's signal.

    pairs: (student block, teacher block), EMBEDDING (-1) for the embeddings. `teacher_width` differs from the student's: each pair
    gets a projector Linear(H_s -> H_t), which distances of any widths pass by (nn.Identity: the pair has no others). `distance`: of all
    pairs, or the terms of each. `positions`: match "trained" or "attended" positions,
    `tokens` of them per micro-batch (None: all). `pair_weights`: what each pair's distance counts in the loss. `all_rows`: gathers the
    rows of all ranks, where a set-level distance is over all of them. `keeps_head`: run the head even in a pass in which neither of its
    parts counts: an engine would take a parameter without a gradient to have that of the step before.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        pairs: Sequence[tuple[int, int]],
        *,
        distance: Distance | Sequence[Term] | Sequence[Sequence[Term]],
        positions: str,
        normed_last: bool,
        divergence: Divergence,
        temperature: float,
        kl_positions: str,
        chunk: int,
        projectors: nn.ModuleList | None = None,
        tokens: int | None = None,
        pair_weights: Sequence[float] | None = None,
        all_rows: AllRows | None = None,
        keeps_head: bool = False,
        stones: Stones | None = None,
    ) -> None:
        super().__init__()
        self.model = model
        self.projectors = projectors
        self.stones = stones
        self.loss_head = LossHead(
            head(model),
            head_bias(model),
            divergence=divergence,
            temperature=temperature,
            kl_positions=kl_positions,
            chunk=chunk,
        )
        self._pairs = tuple(pairs)
        self._terms = of_each_pair(distance, len(pairs))
        self._positions = positions
        self._tokens = tokens
        self._pair_weights = (1.0,) * len(pairs) if pair_weights is None else tuple(pair_weights)
        self._all_rows = all_rows
        self._keeps_head = keeps_head
        stack, decodes = blocks(model), kind(model.config) == "decoder"
        self._normed = len(stack) - 1 if normed_last and decodes else None
        self._of_source = encoder_blocks(model)
        for block in {student for student, _ in pairs} - {self._normed}:
            on_state(model, block, self._matcher(block), normed=normed_last)
        if stones is not None:
            stones.watch(stack)
        self._signal: Signal | None = None
        self._matched: dict[int, Tensor] = {}  # pair number -> distance sum of this pass
        self._at: Places | None = None
        self._source_at: Places | None = None
        self._tail = Tail(model, normed_last=normed_last)
        self._squares: dict[int, Tensor] = {}
        self._of_kinds: dict[Distance, Tensor] = {}
        self.squares: Tensor | None = None
        """[2 + pairs + distances + divergences], after a pass with `report`: the squared norm of the gradient of each part of the loss
        (llmkd.student.gradient_norms). Each distance is over all pairs; distances and divergences are there where there are several."""

    def forward(
        self,
        batch: Batch,
        signal: Signal | None,
        scales: tuple[float, float, float],
        source_weight: float = 1.0,
        *,
        temperature: float | None = None,
        draw: int = 0,
        report: bool = False,
        hear_teacher: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """(loss, sums [2 + pairs]): the scaled loss of a micro-batch; the sums (CE, KL, each pair's distance) carry no gradient.

        `source_weight`: what a position of an encoder-decoder's source counts, so that source and target weigh alike in the whole batch.
        `temperature`: of this pass, where it changes. `draw`: the seed of a sample of tokens. `report`: see `squares`.
        `hear_teacher`: leave the teacher's own cross-entropy sum in `loss_head.teacher_ce`.
        """
        self._signal, self._matched = signal, {}
        positions = batch.attended_at if self._positions == "attended" else batch.trained_at
        self._at = self._places(positions, draw)
        self._source_at = None if batch.source_at is None else self._places(batch.source_at, draw)
        self._hidden_scale, self._source_weight = scales[2], source_weight
        self._squares, self._of_kinds, self.squares = {}, {}, None
        self.loss_head.report, self.loss_head.hear_teacher, self.loss_head.teacher_ce = report, False, None
        self.loss_head.report_mix = False
        self._tail.watch(report)
        if self.stones is not None:
            self.stones.open()
        final = final_state(self.model, batch)
        if self._normed is not None:
            self._match(self._normed, final)
        distances = [
            self._matched[number] * source_weight if student in self._of_source else self._matched[number]
            for number, (student, _) in enumerate(self._pairs)
        ]
        loss = ce = kl = torch.zeros((), dtype=torch.float32, device=final.device)
        # Before the head's loss, which takes the teacher's final state.
        of_stones = None if self.stones is None else self._of_stones(final, batch, signal, temperature, report)
        self.loss_head.report_mix = report  # not before: what the stones say through the head is not the teacher
        if scales[0] or scales[1] or self._keeps_head:  # else the head is not gathered nor run, and both parts read 0
            self.loss_head.hear_teacher = hear_teacher and (scales[1] > 0 or of_stones is not None)
            loss, ce, kl = self.loss_head(final, batch, signal, scales[0], scales[1], temperature)
        if distances:
            weighted = [d if w == 1 else d * w for d, w in zip(distances, self._pair_weights, strict=True)]
            loss = loss + scales[2] * torch.stack(weighted).sum()
        if of_stones is not None:
            loss = loss + of_stones
        sums = torch.stack([ce, kl, *(d.detach() for d in distances)])
        if report:
            self.squares = self._all_squares(final)
            self._tail.watch(False)
        self._signal, self._matched = None, {}
        return loss, sums

    def _of_stones(
        self, final: Tensor, batch: Batch, signal: Signal | None, temperature: float | None, report: bool
    ) -> Tensor:
        """The stones' loss of the pass just made."""
        assert self.stones is not None
        loss = self.stones(final, batch, signal, self.loss_head, temperature=temperature, report=report)
        _, cross = self.loss_head.take_gradients()
        if cross is not None:  # the student's own cross term, where it enters the blocks
            gradient = self._tail.before(final, cross.view(final.shape))
            self.stones.note(len(self.stones.pairs), "cross", gradient)
        return loss

    def _all_squares(self, final: Tensor) -> Tensor:
        """The squared gradient norms at the last block's output of what the head says, and the pairs' own, as `squares` has them."""
        of_head: list[Tensor] = []
        for gradient in self.loss_head.take_gradients():
            whole = None if gradient is None else gradient.view(final.shape)
            none = torch.zeros((), device=final.device)
            of_head.append(none if whole is None else _square(self._tail.before(final, whole)))
        of_pairs = [self._squares[number] for number in range(len(self._pairs))]
        return torch.stack([*of_head[:2], *of_pairs, *self._of_kinds.values(), *of_head[2:]])

    def _places(self, at: Tensor, draw: int) -> Places:
        """Those of the flat positions [N] that are compared in this pass."""
        over_ranks = self._all_rows if self._tokens is not None and self._pairs else None
        return *sampled(at, self._tokens, draw), None if over_ranks is None else stood_for(at, over_ranks)

    def rematch(self, pairs: Sequence[tuple[int, int]]) -> None:
        """From now on learn by these pairs, of the student blocks that it was made with."""
        assert [student for student, _ in pairs] == [student for student, _ in self._pairs]
        self._pairs = tuple(pairs)

    def reweigh(self, terms: Sequence[Sequence[Term]] | None, divergence: Divergence | None) -> None:
        """From now on learn by these terms of each pair, and by this divergence; None leaves them."""
        if terms is not None:
            self._terms = of_each_pair(terms, len(self._pairs))
        if divergence is not None:
            self.loss_head.compare_by(divergence)
            if self.stones is not None:
                self.stones.compare_by(divergence)

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
            theirs, at = self._signal.take(teacher), self._source_at if block in self._of_source else self._at
            self._matched[number] = self._compare(self._terms[number], state, projected, theirs=theirs, at=at)
            if self._tail.watching:
                self._report(number, state, theirs, at)

    def _report(self, number: int, state: Tensor, theirs: Tensor, at: Places | None) -> None:
        """Note the squared norm of a pair's gradient, and of each of its distances where the pairs have several."""
        block = self._pairs[number][0]
        projector: Any = None if self.projectors is None else self.projectors[number]
        projector = None if isinstance(projector, nn.Identity) else projector
        weight = self._hidden_scale * self._pair_weights[number]
        weight *= self._source_weight if block in self._of_source else 1.0

        def square(terms: Sequence[Term]) -> Tensor:
            compare = functools.partial(self._compare, terms, theirs=theirs, at=at)
            return _square(self._tail.before_norm(block, state, before_projector(projector, state, compare) * weight))

        terms = self._terms[number]
        self._squares[number] = square(terms)
        several = kinds(self._terms)
        if len(several) > 1:
            own = {term.distance: square([term]) for term in terms}
            none = torch.zeros_like(self._squares[number])
            self._of_kinds = {kind: self._of_kinds.get(kind, none) + own.get(kind, none) for kind in several}

    def _compare(
        self, terms: Sequence[Term], state: Tensor, projected: Tensor, *, theirs: Tensor, at: Places | None
    ) -> Tensor:
        """The weighted sum of distances between the student's state and the teacher's."""
        assert at is not None
        places, factor, together = at
        apart = self.projectors is not None
        as_it_is = [term for term in terms if apart and term.width_free]
        through = [term for term in terms if not (apart and term.width_free)]
        parts = [
            distance_sum(ours, theirs, places, some, factor=factor, all_rows=self._all_rows, together=together)
            for ours, some in ((state, as_it_is), (projected, through))
            if some
        ]
        return parts[0] if len(parts) == 1 else parts[0] + parts[1]


def make_projectors(
    pairs: int, student_width: int, teacher_width: int, *, bias: bool, seed: int, without: Collection[int] = ()
) -> nn.ModuleList | None:
    """One Linear(H_s -> H_t) per pair: drawn from the seed (Xavier uniform), the identity where the widths agree; None for no pair.

    `without`: the pairs that need none, where nn.Identity stands; None where these are all.
    """
    if len(without) == pairs:
        return None
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        projectors = nn.ModuleList(
            nn.Identity() if number in without else nn.Linear(student_width, teacher_width, bias=bias)
            for number in range(pairs)
        )
        for projector in projectors:
            if isinstance(projector, nn.Linear):
                equal = student_width == teacher_width
                nn.init.eye_(projector.weight) if equal else nn.init.xavier_uniform_(projector.weight)
                if bias and equal:
                    nn.init.zeros_(projector.bias)
    return projectors


def _square(gradient: Tensor) -> Tensor:
    """The squared norm in fp32, []."""
    return torch.linalg.vector_norm(gradient, dtype=torch.promote_types(gradient.dtype, torch.float32)).square()
