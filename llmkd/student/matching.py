"""The hidden part of a pass: a pair's states are compared where the student's state is born, and only a sum stays."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from llmkd.data.batches import Batch
from llmkd.losses.distance_sum import AllRows, Term, distance_sum, kinds, sampled, stood_for
from llmkd.losses.distances import Distance
from llmkd.student.gradient_norms import TailPass, before_projector, square
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
    """How many tokens of a micro-batch are compared (None: all), and what gathers the rows of all ranks for sets over all of them."""

    tokens: int | None = None
    all_rows: AllRows | None = None

    def places(self, at: Tensor, settings: StepSettings, micro_batch: int, weight: float = 1.0) -> Places:
        """The places among the flat positions [N] in this pass (all ranks take part where sets are over all ranks)."""
        seed = 0 if self.tokens is None else settings.sample_seeds[micro_batch]
        over_ranks = None if self.tokens is None else self.all_rows
        together = None if over_ranks is None else stood_for(at, over_ranks)
        return Places(*sampled(at, self.tokens, seed), together, weight)


class Stacks:
    """Whose tokens a block's states stand at. An encoder-decoder's encoder (`source`: its blocks) reads the source; all else reads the
    batch's own tokens, and every block of other models does."""

    def __init__(self, source: range) -> None:
        self._source = source

    def places(
        self, blocks: Sequence[int], batch: Batch, sampling: Sampling, settings: StepSettings, micro_batch: int
    ) -> list[Places]:
        """The places of each of these blocks."""
        if not blocks:
            return []
        at = batch.attended_at if settings.weights.hidden_positions == "attended" else batch.trained_at
        own = sampling.places(at, settings, micro_batch)
        if batch.source_at is None:
            return [own] * len(blocks)
        source = sampling.places(batch.source_at, settings, micro_batch, settings.source_weight)
        return [source if block in self._source else own for block in blocks]


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
    ) -> None:
        self._signal, self._settings, self._places = signal, settings, places
        self._all_rows, self._projectors, self._tail = all_rows, projectors, tail
        self._sums: dict[int, Tensor] = {}
        self._squares: dict[int, Tensor] = {}
        self._squares_of_kinds: dict[Distance, Tensor] = {}

    def compare(self, number: int, state: Tensor, projected: Tensor) -> None:
        """Compare a pair's state [B, T, H_s], and what its projector makes of it, with the teacher's; the teacher's is let go."""
        if not self._settings.pairs:  # nothing is compared in this pass
            return
        assert self._signal is not None
        theirs = self._signal.take(self._settings.pairs[number][1])
        terms = self._settings.terms[number]
        self._sums[number] = self._distance(number, terms, theirs, state, projected) * self._places[number].weight
        if self._tail is not None:
            self._note_squares(self._tail, number, state, theirs)

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

    def _distance(self, number: int, terms: Sequence[Term], theirs: Tensor, state: Tensor, projected: Tensor) -> Tensor:
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
        return parts[0] if len(parts) == 1 else parts[0] + parts[1]

    def _note_squares(self, tail: TailPass, number: int, state: Tensor, theirs: Tensor) -> None:
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
