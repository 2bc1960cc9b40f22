"""What is logged of an interval in which the weights moved."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from llmkd.losses.objective import Change, Divisors, Weights, weights_of_step
from llmkd.training.metrics import Meter


def test_an_interval_whose_weights_move(world: Any) -> None:
    """loss is the weighted sum of each step's own sums; a part's mean leaves out the steps in which it was not worked out."""
    start = Weights(ce=1.0, kl=2.0, hidden=3.0, kl_positions="trained", hidden_positions="trained", pairs=(1.0, 0.5))
    changes = {"kl": Change("linear", 0.0, 1.0), "hidden": Change("linear", 5.0, 1.0)}
    meter = Meter(world, start, ["0<1", "1<3"])
    for step, (kl, kl_weight, hidden_weight) in enumerate([(8.0, 2.0, 3.0), (4.0, 1.0, 4.0), (0.0, 0.0, 5.0)]):
        weights = weights_of_step(start, changes, step, 3)
        assert (weights.ce, weights.kl, weights.hidden) == (1.0, kl_weight, hidden_weight)
        for half in (0.25, 0.75):
            meter.add(half * torch.tensor([6.0, kl, 2.0, 12.0]), weights)
        meter.step(Divisors(ce=2, kl=2, hidden=4), 10, weights)
    values = meter.flush()
    hidden = 2.0 + 0.5 * 12
    assert values["ce"] == pytest.approx(18 / 6) and values["kl"] == pytest.approx(12 / 4)
    assert values["hidden"] == pytest.approx(3 * hidden / 12)
    assert values["pairs"] == pytest.approx({"0<1": 3 * 2.0 * 2 / 12, "1<3": 3 * 12.0 * 2 / 12})
    assert values["loss"] == pytest.approx(18 / 6 + (2 * 8 + 1 * 4) / 4 + (3 + 4 + 5) * hidden / 12)


def test_weights_that_stand_give_the_weighted_sum_of_the_means(world: Any) -> None:
    weights = Weights(ce=0.5, kl=2.0, hidden=3.0, kl_positions="trained", hidden_positions="trained")
    meter = Meter(world, weights, ["0<1"])
    for scale in (1.0, 3.0):
        meter.add(scale * torch.tensor([1.0, 2.0, 3.0]), weights)
        meter.step(Divisors(2, 3, 4), 1, weights)
    values = meter.flush()
    assert values["loss"] == pytest.approx(0.5 * values["ce"] + 2 * values["kl"] + 3 * values["hidden"])
    assert values["hidden"] == values["pairs"]["0<1"] == pytest.approx(12 / 8)
