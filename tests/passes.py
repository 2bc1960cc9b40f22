"""A student's module and the settings of a step, with the usual values where a test does not say otherwise."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from llmkd.layer_map import Pairs
from llmkd.losses.distance_sum import Term
from llmkd.losses.distances import DISTANCES, Distance
from llmkd.losses.divergences import forward_kl
from llmkd.losses.objective import Divisors, Weights
from llmkd.student.distiller import Distiller
from llmkd.student.passes import StepSettings


def distiller(model: Any, pairs: Sequence[tuple[int, int]], **structure: Any) -> Distiller:
    """A module in training, for these pairs."""
    return Distiller(model, [block for block, _ in pairs], **{"normed_last": False, "chunk": 4, **structure}).train()


def step_settings(
    pairs: Pairs = (),
    scales: tuple[float, float, float] = (1.0, 1.0, 1.0),
    *,
    distance: Distance | Sequence[Term] | Sequence[Sequence[Term]] = DISTANCES["normalized_mse"],
    positions: str = "attended",
    kl_positions: str = "trained",
    pair_weights: tuple[float, ...] | None = None,
    **others: Any,
) -> StepSettings:
    """`scales`: of CE, divergence and hidden. `distance`: one or one sum for all pairs, or a sum for each."""
    if callable(distance):
        distance = [Term(distance)]
    each = [distance] * len(pairs) if all(isinstance(term, Term) for term in distance) else distance
    weights = Weights(*scales, kl_positions=kl_positions, hidden_positions=positions, pairs=pair_weights)
    values: dict[str, Any] = {"divergence": forward_kl, "temperature": 1.0, **others}
    terms = tuple(tuple(of_pair) for of_pair in each)  # type: ignore[arg-type]
    return StepSettings(weights=weights, divisors=Divisors(1, 1, 1), scales=scales, pairs=pairs, terms=terms, **values)
