"""What a pass of the student is given, and what it returns.

A pass is one micro-batch through the student. `StepSettings` holds all that may differ from one optimizer step to the next; it is made
once at the top of a step and never changed. Results are named tuples and not dataclasses, because DeepSpeed looks for the tensors of a
module's output in tuples, lists and dicts alone: it would not see that a backward pass begins at a loss that stands anywhere else.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import NamedTuple

from torch import Tensor

from llmkd.data.batches import Batch, Counts
from llmkd.layer_map import Pairs
from llmkd.losses.distance_sum import Term
from llmkd.losses.divergences import Divergence, forward_kl
from llmkd.losses.objective import Divisors, Weights

STONE_PARTS = ("ce", "kl", "cross")
"""The terms of a stepping stone's loss, in the order of their sums."""


@dataclass(frozen=True)
class StoneWeights:
    """The recipe's weight of each term of a stone, before its share 2^{i-n}."""

    ce: float
    kl: float
    cross: float

    def alone(self, part: str) -> StoneWeights:
        """One of STONE_PARTS at its weight, the others at 0."""
        return StoneWeights(**{name: getattr(self, name) if name == part else 0.0 for name in STONE_PARTS})


@dataclass(frozen=True)
class StoneSettings:
    """The stepping stones of one step."""

    weights: StoneWeights
    factors: Mapping[int, float]
    """By the number of each stone that is trained in this step, what its objective is multiplied by; empty: none is."""
    weight: float = 1.0
    """A factor on the whole objective, already in the scales."""
    scales: tuple[float, float] = (1.0, 1.0)
    """The factors of this rank's sums of cross-entropy and of divergences in its loss."""
    sampled: bool = False
    """Whether each step draws one stone, so that the others must be given gradients of zeros."""


@dataclass(frozen=True)
class StepSettings:
    """What a step's passes are trained on."""

    weights: Weights
    """Of the loss's parts and of its pairs, and the positions over which each part is summed."""
    divisors: Divisors
    """How many positions of the whole batch, over all ranks, each part is summed over."""
    scales: tuple[float, float, float]
    """The factors of this rank's sums (CE, divergence, hidden) in its loss: llmkd.losses.objective.scales."""
    pairs: Pairs
    """(student block, teacher block), EMBEDDING for the embeddings; the student blocks are the same in every step."""
    terms: tuple[tuple[Term, ...], ...]
    """The distances of each pair."""
    divergence: Divergence
    temperature: float
    own_divergence: Divergence | None = None
    """On texts that the student wrote, where it is another."""
    sample_seeds: tuple[int, ...] = ()
    """By micro-batch, the seed of its sample of tokens; empty where all tokens are compared."""
    router_scale: float = 0.0
    """The factor of this rank's sum of the routers' load balance in its loss."""
    stones: StoneSettings | None = None
    keeps_head: bool = False
    """Run the head even where the weights of both its parts have become 0: DeepSpeed gives a parameter without a gradient that of the
    step before."""
    report_norms: bool = False
    """Measure the gradient of each part of the loss (`PassResult.squares`)."""
    teacher_ce: bool = False
    """Measure the teacher's own cross-entropy."""
    validates: bool = False
    """Measure in place of training: no loss, and of the head cross-entropy, forward KL and agreement (llmkd.losses.head_scores)."""
    step: int = 0
    """The number of the step, from 1."""
    counts: Counts = Counts(0, 0)
    """The tokens of the step's whole batch, over all ranks."""

    def on(self, batch: Batch) -> StepSettings:
        """With the divergence of this micro-batch."""
        own = self.own_divergence if batch.own else None
        return self if own is None else replace(self, divergence=own)

    @property
    def runs_head(self) -> bool:
        """Whether the student's head is run for its own loss."""
        return self.scales[0] > 0 or self.scales[1] > 0 or self.keeps_head or self.validates


NO_LOSS = StepSettings(
    weights=Weights(0.0, 0.0, 0.0, kl_positions="trained", hidden_positions="trained"),
    divisors=Divisors(1, 1, 1),
    scales=(0.0, 0.0, 0.0),
    pairs=(),
    terms=(),
    divergence=forward_kl,
    temperature=1.0,
)
"""For a pass that runs the student's blocks and compares nothing."""


class StoneSums(NamedTuple):
    """The stepping stones' part of a pass. Row n, after the n stones, is the student's own cross term."""

    sums: Tensor
    """[n + 1, 3] in float64, by STONE_PARTS, over this rank's positions; 0 for a stone that was not run."""
    squares: Tensor | None
    """[n + 1, 3], the squared norm of each part's gradient with its weight and share, where norms are reported."""


class PassResult(NamedTuple):
    """What a pass returns. Only the loss carries a gradient."""

    loss: Tensor
    """[], scaled."""
    sums: Tensor
    """[2 + pairs]: CE, divergence and each pair's distance, summed over this rank's positions, without weights."""
    squares: Tensor | None = None
    """[2 + pairs + distances + divergences], where norms are reported: the squared norm of the gradient of each part of the loss. Each
    distance is over all pairs; distances and divergences are there where there are several."""
    teacher_ce: Tensor | None = None
    """[], the teacher's own cross-entropy summed over the trained positions, where it is asked for and a teacher's logits are at hand."""
    stones: StoneSums | None = None
    """None where no stone was run."""
    router: Tensor | None = None
    """[], the routers' load balance summed over this rank's tokens, without its weight, where it has one."""
    agreement: Tensor | None = None
    """[], at how many trained positions student and teacher find the same token likeliest, in a validation with the teacher's logits."""
