"""The hidden part of a pass: a pair's states are compared as soon as the student's arises, and only a sum is kept."""

from __future__ import annotations

import functools
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from llmkd.data.batches import Batch
from llmkd.errors import InputError
from llmkd.layer_map import MIXED
from llmkd.losses.distance_sum import AllRows, Mixture, Term, distance_sum, kinds, sampled, stood_for
from llmkd.losses.distances import Distance
from llmkd.student.gradient_norms import TailPass, before_projector, square
from llmkd.student.mixtures import Mix
from llmkd.student.passes import StepSettings
from llmkd.teachers.base import Signal


@dataclass(frozen=True)
class Places:
    """Where the states of some blocks are compared."""

    at: Tensor
    """[N], flat positions."""
    factor: float
    """How many positions each of these stands for."""
    together: Tensor | None
    """How many positions those of all ranks stand for, where sets are over all ranks' samples."""
    weight: float
    """What each position counts in the sums."""


@dataclass(frozen=True)
class Sampling:
    """Which tokens of a micro-batch are compared.

    An encoder-decoder's encoder has states at the tokens of the source; every other block at the batch's own.
    """

    source_blocks: range
    """An encoder-decoder's encoder; empty for other models."""
    tokens: int | None = None
    """How many tokens of a micro-batch; None for all."""
    all_rows: AllRows | None = None
    """Gathers the rows of all ranks, where sets are over all of them."""

    def places(self, batch: Batch, settings: StepSettings, micro_batch: int) -> list[Places]:
        """The places of each pair in this pass (all ranks take part where sets are over all ranks)."""
        if not settings.pairs:
            return []
        attended = settings.weights.hidden_positions == "attended"
        own = self._of(batch.attended_at if attended else batch.trained_at, 1.0, settings, micro_batch)
        if batch.source_at is None:
            return [own] * len(settings.pairs)
        source = self._of(batch.source_at, settings.counts.source_weight, settings, micro_batch)
        return [source if block in self.source_blocks else own for block, _ in settings.pairs]

    def _of(self, at: Tensor, weight: float, settings: StepSettings, micro_batch: int) -> Places:
        if self.tokens is None:
            return Places(at, 1.0, None, weight)
        together = None if self.all_rows is None else stood_for(at, self.all_rows)
        return Places(*sampled(at, self.tokens, settings.sample_seeds[micro_batch]), together, weight)


class Kept(NamedTuple):
    """A pair whose states are read after the pass."""

    number: int
    weight: float
    """Of the sum over its positions."""
    ours: Tensor
    """[B, T, H_s]"""
    theirs: Tensor
    """[B, T, H_t]"""
    at: Tensor
    """[N], flat positions."""


class Matching:
    """The pairs of one pass. It lives as long as the student's forward pass; `tail` is given where norms are reported."""

    def __init__(
        self,
        signal: Signal | None,
        settings: StepSettings,
        places: Sequence[Places],
        *,
        all_rows: AllRows | None,
        projectors: nn.ModuleList | None,
        tail: TailPass | None,
        firsts: Collection[int] | None = None,
        mixes: Mapping[int, Mix] | None = None,
    ) -> None:
        """`firsts`: where differences are compared, the pairs that have none before them. `mixes`: by student block, the mixture of each
        pair with MIXED."""
        self._signal, self._settings, self._places = signal, settings, places
        self._all_rows, self._projectors, self._tail = all_rows, projectors, tail
        self._firsts, self._mixes = firsts, mixes or {}
        self._ours: Tensor | None = None  # of the pair before, where differences are compared
        self._theirs: Tensor | None = None
        self._is_trained = torch.is_grad_enabled()
        self.kept: list[Kept] = []
        self._sums: dict[int, Tensor] = {}
        self._squares: dict[int, Tensor] = {}
        self._squares_of_kinds: dict[Distance, Tensor] = {}

    def compared(self, number: int, state: Tensor) -> Tensor:
        """What is compared of a pair's state [B, T, H_s]: the state itself, or what it adds to that of the pair before."""
        if self._firsts is None:
            return state
        before, self._ours = self._ours, state
        return state if number in self._firsts or before is None else state - before

    def compare(self, number: int, state: Tensor, projected: Tensor) -> None:
        """Compare what is `compared` of a pair [B, T, H_s], and its projection, with the teacher's, which is then released."""
        if not self._settings.pairs:  # nothing is compared in this pass
            return
        if self._is_trained and not torch.is_grad_enabled():
            # transformers asks for the other form, but a model's own code from before transformers 4.35 chooses for itself.
            raise InputError(
                "train.activation_checkpointing: this model's code checkpoints its blocks in torch's re-entrant form, which runs them "
                "without gradients, so that no pair could teach them; write false"
            )
        assert self._signal is not None
        theirs = self._target(number, self._signal)
        if self._firsts is not None:
            assert isinstance(theirs, Tensor), "differences of mixtures are refused"
            before, self._theirs = self._theirs, theirs
            theirs = theirs if number in self._firsts or before is None else theirs - before
        terms, places = self._settings.terms[number], self._places[number]
        for term in terms:
            if term.of_readings:
                assert isinstance(theirs, Tensor), "mixtures are not read"
                weight = term.weight * places.factor * places.weight
                self.kept.append(Kept(number, weight, state, theirs, places.at))
        terms = [term for term in terms if not term.of_readings]
        distance = self._distance(number, terms, theirs, state, projected)
        mix = self._mixes.get(self._settings.pairs[number][0])
        if mix is not None and mix.penalty is not None:
            distance = distance + mix.penalty * (places.at.numel() * places.factor)
        self._sums[number] = distance * places.weight
        if self._tail is not None:
            self._note_squares(self._tail, number, state, theirs)

    def _target(self, number: int, signal: Signal) -> Tensor | Mixture:
        """What a pair's state is compared with."""
        student, teacher = self._settings.pairs[number]
        if teacher != MIXED:
            return signal.take(teacher)
        mix = self._mixes[student]
        return Mixture([signal.take(block) for block in mix.blocks], mix.weights)

    @property
    def distances(self) -> list[Tensor]:
        """Each pair's sum []."""
        return [self._sums[number] for number in range(len(self._settings.pairs))]

    @property
    def squares(self) -> list[Tensor]:
        """The squared gradient norm of each pair, then of each distance over all pairs where there are several."""
        return [
            *(self._squares[number] for number in range(len(self._settings.pairs))),
            *self._squares_of_kinds.values(),
        ]

    def _distance(
        self, number: int, terms: Sequence[Term], theirs: Tensor | Mixture, state: Tensor, projected: Tensor
    ) -> Tensor:
        """The weighted sum of distances; those of any widths compare the states as they are where there are projectors."""
        places, passed_by = self._places[number], self._projectors is not None
        as_it_is = [term for term in terms if passed_by and term.width_free]
        through = [term for term in terms if not (passed_by and term.width_free)]
        parts = [
            distance_sum(
                ours, theirs, places.at, some, factor=places.factor, all_rows=self._all_rows, together=places.together
            )
            for ours, some in ((state, as_it_is), (projected, through))
            if some
        ]
        return sum(parts[1:], parts[0]) if parts else state.new_zeros((), dtype=torch.float32)

    def _note_squares(self, tail: TailPass, number: int, state: Tensor, theirs: Tensor | Mixture) -> None:
        settings, projector = self._settings, None if self._projectors is None else self._projectors[number]
        linear = projector if isinstance(projector, nn.Linear) else None
        weight = settings.scales[2] * settings.weights.of_pairs(len(settings.pairs))[number]
        weight *= self._places[number].weight

        def squared(terms: Sequence[Term]) -> Tensor:
            distance = functools.partial(self._distance, number, terms, theirs)
            gradient = before_projector(linear, state, distance) * weight
            return square(tail.before_norm(settings.pairs[number][0], state, gradient))

        terms = settings.terms[number]
        self._squares[number] = squared(terms)
        several = kinds(settings.terms)
        if len(several) > 1:
            own = {term.distance: squared([term]) for term in terms}
            none = torch.zeros_like(self._squares[number])
            self._squares_of_kinds = {
                kind: self._squares_of_kinds.get(kind, none) + own.get(kind, none) for kind in several
            }
