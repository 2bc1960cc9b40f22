"""What is minimised: one weighted sum with named parts.

Every part is a sum over positions; it is divided once, by the number of positions of the whole batch (all ranks, all
accumulation steps), so that neither world size, accumulation, packing nor padding can change the loss.
"""

from __future__ import annotations

from dataclasses import dataclass

PARTS = ("ce", "kl", "hidden")


@dataclass(frozen=True)
class Weights:
    """The recipe's weight of each part, and which positions the part is summed over."""

    ce: float
    kl: float
    hidden: float
    kl_positions: str
    hidden_positions: str


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


def means(sums: dict[str, float], by: Divisors, weights: Weights) -> dict[str, float]:
    """Global sums -> the mean of each part and their weighted total, as they are logged."""
    parts = {"ce": sums["ce"] / by.ce, "kl": sums["kl"] / by.kl, "hidden": sums["hidden"] / by.hidden}
    total = weights.ce * parts["ce"] + weights.kl * parts["kl"] + weights.hidden * parts["hidden"]
    return {"loss": total, **parts}
