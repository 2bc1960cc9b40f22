"""The loss: one weighted sum with named parts.

Every part is a sum over positions; it is divided once, by the number of positions of the whole batch (all ranks, all
accumulation steps), so that neither world size, accumulation, packing nor padding can change the loss.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from llmkd.losses.schedules import Shape, scheduled

PARTS = ("ce", "kl", "hidden")


@dataclass(frozen=True)
class Weights:
    """The recipe's weight of each part, and which positions the part is summed over."""

    ce: float
    kl: float
    hidden: float
    kl_positions: str
    hidden_positions: str
    router: float = 0.0
    """Of the routers' load balance, which is summed over all tokens that are not padding."""
    pairs: tuple[float, ...] | None = None
    """What each pair counts in the hidden part; None: 1 each."""

    def of_pairs(self, count: int) -> tuple[float, ...]:
        """Each pair's weight."""
        return self.pairs or (1.0,) * count


@dataclass(frozen=True)
class Change:
    """How a weight moves while the student learns: the settings of `llmkd.losses.schedules.scheduled` other than the initial value."""

    shape: Shape
    final: float
    until: float

    def at(self, step: int, total: int, initial: float) -> float:
        """The value at `step` (0-based) of `total`."""
        return scheduled(step, total, initial=initial, final=self.final, until=self.until, shape=self.shape)


def weights_of_step(weights: Weights, changes: Mapping[str, Change], step: int, total: int) -> Weights:
    """The weights at `step` (0-based) of `total`; `changes` by the part's name."""
    moved = {part: change.at(step, total, getattr(weights, part)) for part, change in changes.items()}
    return replace(weights, **moved) if moved else weights


@dataclass(frozen=True)
class Divisors:
    """How many positions of the whole batch each part was summed over; `hidden` also counts the pairs."""

    ce: int
    kl: int
    hidden: int


def divisors(weights: Weights, *, trained: int, attended: int, pairs: int) -> Divisors:
    """The global divisors of a batch with so many trained and attended positions."""
    count = {"trained": trained, "attended": attended}
    return Divisors(
        ce=max(trained, 1),
        kl=max(count[weights.kl_positions], 1),
        hidden=max(count[weights.hidden_positions] * max(pairs, 1), 1),
    )


def scales(weights: Weights, by: Divisors, world_size: int) -> tuple[float, float, float]:
    """The factor of each rank's sums (ce, kl, hidden) in its loss. DeepSpeed averages gradients over ranks; `world_size` undoes it."""
    return weights.ce * world_size / by.ce, weights.kl * world_size / by.kl, weights.hidden * world_size / by.hidden


def means(sums: Sequence[float], weighted: Sequence[float], by: Divisors, weights: Weights) -> dict[str, float]:
    """Global sums -> the mean of each part and their weighted total, as they are logged.

    sums: CE, KL, each pair's distance. weighted: each part's sums times its weight of their step, pairs by theirs. The hidden part
    is shown with the pairs' weights and without its own.
    """
    ce, kl, *distances = sums
    hidden = sum(d * w for d, w in zip(distances, weights.of_pairs(len(distances)), strict=True))
    total = sum(part / count for part, count in zip(weighted, (by.ce, by.kl, by.hidden), strict=True))
    return {"loss": total, "ce": ce / by.ce, "kl": kl / by.kl, "hidden": hidden / by.hidden}
