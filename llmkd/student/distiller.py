"""The module that the engine wraps: the student, its projectors, hooks that compare states as they arise, and the head's loss.

Projectors stand beside the student, never in it, so an exported student holds none.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Collection, Iterator, Sequence

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from llmkd.data.batches import Batch
from llmkd.losses.distance_sum import AllRows
from llmkd.losses.head_inputs import Terms
from llmkd.losses.head_kernels import HeadKernel
from llmkd.losses.load_balance import load_balance
from llmkd.models.families import kind
from llmkd.models.parts import blocks, encoder_blocks, final_state, head, head_bias, on_state, routers
from llmkd.student.connectors import watched
from llmkd.student.gradient_norms import Tail, TailPass
from llmkd.student.lens import with_readings
from llmkd.student.loss_head import HeadResult, LossHead, reported_terms
from llmkd.student.matching import Matching, Sampling
from llmkd.student.mixtures import Mixtures
from llmkd.student.passes import PassResult, StepSettings
from llmkd.student.stepping_stones import SteppingStones
from llmkd.teachers.base import Signal


class Distiller(nn.Module):
    """A student that computes its own losses from a batch and the teacher's signal. It keeps nothing from one pass to the next.

    student_blocks: the student block of each pair, EMBEDDING for the embeddings. `projectors`: for each pair a Linear(H_s -> H_t), or
    nn.Identity where all its distances compare states of any widths. `differences`: compare what each pair's states add to those of the
    pair before. `mixtures`: what the pairs with MIXED learn from. `tokens`: how many positions of a micro-batch each pair compares
    (None: all). `all_rows`: gathers the rows of all ranks, where a set-level distance is over all of them. `chunk`, `kernel`: see
    `llmkd.losses.chunked_head.head_losses`.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        student_blocks: Sequence[int],
        *,
        normed_last: bool,
        chunk: int,
        kernel: HeadKernel = "none",
        projectors: nn.ModuleList | None = None,
        differences: bool = False,
        mixtures: Mixtures | None = None,
        tokens: int | None = None,
        all_rows: AllRows | None = None,
        stones: SteppingStones | None = None,
    ) -> None:
        super().__init__()
        self.model = model
        self.projectors = projectors
        self.mixtures = mixtures
        self.stones = stones
        self.loss_head = LossHead(head(model), head_bias(model), chunk=chunk, kernel=kernel)
        self._student_blocks = list(student_blocks)
        self._sampling = Sampling(encoder_blocks(model), tokens, all_rows)
        self._firsts = self._first_pairs() if differences else None
        stack = blocks(model)
        self._stone_blocks = {} if stones is None else {block: stack[block] for block, _ in stones.pairs}
        # A decoder's normed last state is its final state, which `forward` has anyway; hooks take the others.
        self._final_block = len(stack) - 1 if normed_last and kind(model.config) == "decoder" else None
        for block in set(student_blocks) - {self._final_block}:
            on_state(model, block, functools.partial(self._match, block), normed=normed_last)
        self._routers = dict(enumerate(routers(model)))
        self._tail = Tail(model, normed_last=normed_last)
        self._matching: Matching | None = None  # for the hooks, while `forward` runs

    def forward(self, batch: Batch, signal: Signal | None, settings: StepSettings, micro_batch: int = 0) -> PassResult:
        """The losses of a micro-batch, the one of this number in its step on this rank."""
        settings = settings.on(batch)
        with (
            self._tail.recorded(settings.report_norms) as tail,
            watched(self._stone_blocks if settings.stones is not None else {}) as stone_states,
            watched(self._routers if settings.router_scale else {}) as routed,
            self._matched(batch, signal, settings, micro_batch, tail) as matching,
        ):
            final = final_state(self.model, batch)
            if self._final_block is not None:
                self._match(self._final_block, final)
        # Before the head's own loss, which takes the teacher's final state away.
        distances = with_readings(matching.distances, matching.kept, self.model, self.loss_head, batch, signal)
        terms = Terms(*settings.scales[:2], settings.divergence, settings.temperature)
        stones = None
        if self.stones is not None and settings.stones is not None:
            assert signal is not None
            head = self.loss_head
            stones = self.stones(final, batch, signal, settings, states=stone_states, head=head, tail=tail)
        reported = reported_terms(terms) if settings.report_norms else []
        if settings.runs_head:
            result = self.loss_head(
                final,
                batch,
                signal,
                terms,
                kl_positions=settings.weights.kl_positions,
                gradients_of=reported,
                teacher_ce=settings.teacher_ce and (terms.kl_scale > 0 or settings.stones is not None),
                scores=settings.validates,
            )
        else:  # the head is not gathered either
            result = HeadResult.of_nothing(final.device, len(reported))
        loss = result.loss
        if not settings.runs_head:
            # A block whose output gets no gradient would not be gathered for its backward pass under ZeRO-3: this is a gradient of zeros.
            loss = loss + final[:, :0].float().sum()
        if distances:
            weights = settings.weights.of_pairs(len(distances))
            weighted = [distance * weight for distance, weight in zip(distances, weights, strict=True)]
            loss = loss + settings.scales[2] * torch.stack(weighted).sum()
        router = None
        if routed:
            chosen = self.model.config.num_experts_per_tok
            router = load_balance(list(routed.values()), batch.attended_at, batch.of_rows(), chosen)
            loss = loss + settings.router_scale * router
        return PassResult(
            loss if stones is None else loss + stones.loss,
            torch.stack([result.ce, result.kl, *(distance.detach() for distance in distances)]),
            None if tail is None else _squares(tail, final, result.gradients, matching),
            result.teacher_ce,
            None if stones is None else stones.sums,
            None if router is None else router.detach(),
            result.agreement,
        )

    @contextlib.contextmanager
    def _matched(
        self, batch: Batch, signal: Signal | None, settings: StepSettings, micro_batch: int, tail: TailPass | None
    ) -> Iterator[Matching]:
        """Inside, the states of the pairs are compared as the student makes them."""
        student_blocks = [block for block, _ in settings.pairs]
        assert not student_blocks or (signal is not None and student_blocks == self._student_blocks)
        places = self._sampling.places(batch, settings, micro_batch)
        self._matching = Matching(
            signal,
            settings,
            places,
            all_rows=self._sampling.all_rows,
            projectors=self.projectors,
            tail=tail,
            firsts=self._firsts,
            mixes=self.mixtures.of_pass() if self.mixtures is not None and settings.pairs else None,
        )
        try:
            yield self._matching
        finally:
            self._matching = None

    def _first_pairs(self) -> set[int]:
        """The first pair of each stack."""
        in_encoder = [block in self._sampling.source_blocks for block in self._student_blocks]
        return {number for number, side in enumerate(in_encoder) if side not in in_encoder[:number]}

    def _match(self, block: int, state: Tensor) -> None:
        """Compare the state with the teacher's, for each pair of this block.

        Under activation checkpointing a block runs, and its hook fires, again in the backward pass. Then the projector alone is
        repeated, whose saved tensors checkpointing asks for; the distance keeps its own gradient.
        """
        for number, student_block in enumerate(self._student_blocks):
            if student_block == block:
                compared = state if self._matching is None else self._matching.compared(number, state)
                projected = compared if self.projectors is None else self.projectors[number](compared)
                if self._matching is not None:
                    self._matching.compare(number, compared, projected)


def _squares(tail: TailPass, final: Tensor, gradients: Sequence[Tensor | None], matching: Matching) -> Tensor:
    """`PassResult.squares`, from the gradients of `reported_terms`."""
    ce, kl, *divergences = (tail.square_before(final, gradient) for gradient in gradients)
    return torch.stack([ce, kl, *matching.squares, *divergences])


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
