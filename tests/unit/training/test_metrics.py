"""What is logged of an interval in which the weights moved."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from llmkd.data.batches import Counts
from llmkd.distributed import clocks
from llmkd.losses.objective import PARTS, Change, Divisors, Weights, weights_of_step
from llmkd.student.passes import PassResult, StepSettings, StoneSettings, StoneSums, StoneWeights
from llmkd.training import journal
from llmkd.training.metrics import Meter, Moving, StoneMeter
from tests.passes import step_settings


def _settings(weights: Weights, by: Divisors, **others: Any) -> StepSettings:
    return replace(step_settings(**others), weights=weights, divisors=by, counts=Counts(0, 10))


def _halves(*sums: float) -> list[PassResult]:
    """A quarter and three quarters of these sums, of two micro-batches."""
    return [PassResult(torch.zeros(()), part * torch.tensor(sums)) for part in (0.25, 0.75)]


def _add(meter: Meter, settings: StepSettings, results: list[PassResult]) -> None:
    """A step of these results."""
    for _ in meter.clock.timed([0]):
        meter.add(settings, results)


def test_an_interval_whose_weights_move(world: Any) -> None:
    """loss is the weighted sum of each step's own sums; a part's mean leaves out the steps in which it was not worked out."""
    start = Weights(ce=1.0, kl=2.0, hidden=3.0, kl_positions="trained", hidden_positions="trained", pairs=(1.0, 0.5))
    changes = {"kl": Change("linear", 0.0, 1.0), "hidden": Change("linear", 5.0, 1.0)}
    meter = Meter(world, start, ["0<1", "1<3"])
    for step, (kl, kl_weight, hidden_weight) in enumerate([(8.0, 2.0, 3.0), (4.0, 1.0, 4.0), (0.0, 0.0, 5.0)]):
        weights = weights_of_step(start, changes, step, 3)
        assert (weights.ce, weights.kl, weights.hidden) == (1.0, kl_weight, hidden_weight)
        _add(meter, _settings(weights, Divisors(ce=2, kl=2, hidden=4)), _halves(6.0, kl, 2.0, 12.0))
    interval = meter.flush(Moving(), learning_rate=0.1, grad_norm=2.0)
    hidden = 2.0 + 0.5 * 12
    assert interval.ce == pytest.approx(18 / 6) and interval.kl == pytest.approx(12 / 4)
    assert interval.hidden == pytest.approx(3 * hidden / 12)
    assert interval.pairs == pytest.approx({"0<1": 3 * 2.0 * 2 / 12, "1<3": 3 * 12.0 * 2 / 12})
    assert interval.loss == pytest.approx(18 / 6 + (2 * 8 + 1 * 4) / 4 + (3 + 4 + 5) * hidden / 12)


def test_weights_that_stand_give_the_weighted_sum_of_the_means(world: Any) -> None:
    weights = Weights(ce=0.5, kl=2.0, hidden=3.0, kl_positions="trained", hidden_positions="trained")
    meter = Meter(world, weights, ["0<1"])
    for scale in (1.0, 3.0):
        _add(meter, _settings(weights, Divisors(2, 3, 4)), _halves(scale, 2 * scale, 3 * scale))
    interval = meter.flush(Moving(), learning_rate=0.1, grad_norm=2.0)
    assert interval.ce is not None and interval.kl is not None and interval.hidden is not None
    assert interval.loss == pytest.approx(0.5 * interval.ce + 2 * interval.kl + 3 * interval.hidden)
    assert interval.hidden == interval.pairs["0<1"] == pytest.approx(12 / 8)


@pytest.mark.parametrize(
    ("ce", "kl", "hidden", "pairs", "loss", "text"),
    [
        (1.0, 0.0, 0.0, [], 6.0, "loss 6.0000 ce 6.0000 grad"),
        (0.0, 2.0, 0.0, [], 8.0, "loss 8.0000 kl 4.0000 (not in the loss: ce 6.0000) grad"),
        (0.0, 0.0, 3.0, ["0<1"], 15.0, "loss 15.0000 hidden 5.0000 grad"),
    ],
)
def test_what_is_not_in_the_loss_does_not_look_like_it(
    world: Any, ce: float, kl: float, hidden: float, pairs: list[str], loss: float, text: str
) -> None:
    """A part that was not computed is absent; cross-entropy, which comes with a divergence for nothing, stands apart."""
    weights = Weights(ce, kl, hidden, kl_positions="trained", hidden_positions="trained")
    sums = (6.0 if ce or kl else 0.0, 4.0 if kl else 0.0, *(5.0 for _ in pairs))
    meter = Meter(world, weights, pairs)
    settings = _settings(weights, Divisors(1, 1, 1), scales=(ce, kl, hidden), report_norms=True)
    squares = torch.ones(2 + len(pairs))
    _add(meter, settings, [PassResult(torch.zeros(()), torch.tensor(sums), squares)])
    interval = meter.flush(Moving(), learning_rate=0.1, grad_norm=2.0)
    values = interval.values()
    computed = {part: value for part, value in values.items() if part in PARTS}
    norms: Any = values.pop("norms")
    assert computed.keys() == norms.keys() - {"pairs"} == {p for p, w in zip(PARTS, (ce, kl, hidden), strict=True) if w}
    assert values["loss"] == loss and values.get("not_in_loss") == ({"ce": 6.0} if kl else None)
    assert text in journal.line(1, 2, replace(interval, norms=None))
    assert f"norms {next(iter(computed))}:1 grad" in journal.line(1, 2, interval)


def test_norms_are_the_roots_of_the_last_steps_squares_and_named(world: Any) -> None:
    """Over the micro-batches the squares add up; a step that reports none has none, and its line has no such key."""
    weights = Weights(1.0, 1.0, 1.0, kl_positions="trained", hidden_positions="trained")
    stones = StoneMeter(world, ((0, 1), (1, 3)))
    meter = Meter(
        world, weights, ["0<1"], distances=["mse", "cka"], divergences=["forward_kl", "reverse_kl"], stones=stones
    )
    laid = StoneSettings(StoneWeights(1.0, 0.0, 0.5), {1: 1.0})
    squares, of_stones = torch.arange(1.0, 8.0), torch.arange(9.0).view(3, 3)
    for report in (True, False):
        settings = _settings(weights, Divisors(1, 1, 1), report_norms=report, stones=laid)
        result = PassResult(
            torch.zeros(()),
            torch.ones(3),
            squares=squares if report else None,
            stones=StoneSums(torch.ones(3, 3).double(), of_stones if report else None),
        )
        _add(meter, settings, [result, result])
        values = meter.flush(Moving(weights={"ce": 0.5}), learning_rate=0.1, grad_norm=2.0).values()
        assert ("norms" in values) == report and values["weights"] == {"ce": 0.5} and "temperature" not in values
        if report:
            root = [(2 * square) ** 0.5 for square in range(9)]
            assert values["norms"] == {
                "ce": root[1],
                "kl": root[2],
                "hidden": root[3],
                "pairs": {"0<1": root[3]},
                "distances": {"mse": root[4], "cka": root[5]},
                "divergences": {"forward_kl": root[6], "reverse_kl": root[7]},
                "stones": {"1<3": {"ce": root[3], "cross": root[5]}, "student": {"cross": root[8]}},
            }


def test_an_intervals_rate_is_that_of_its_steps(world: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """And its log line tells the parts of a step that are not next to nothing."""
    now = 100.0
    monkeypatch.setattr(clocks, "time", SimpleNamespace(perf_counter=lambda: now, process_time=lambda: now))
    weights = Weights(ce=1.0, kl=1.0, hidden=1.0, kl_positions="trained", hidden_positions="trained")
    meter = Meter(world, weights, ["0<1"])
    settings = _settings(weights, Divisors(2, 3, 4))
    for _ in meter.clock.timed(range(2)):
        now += 0.005
        meter.clock.part("teacher")
        now += 0.495
        meter.clock.part("backward")
        now += 1.5
        meter.add(settings, _halves(1.0, 2.0, 3.0))
        now += 60.0  # it validates
    interval = meter.flush(Moving(), learning_rate=0.1, grad_norm=2.0)
    assert interval.seconds_per_step == pytest.approx(2.0)
    assert interval.seconds_by_part == pytest.approx({"data": 0.005, "teacher": 0.495, "backward": 1.5})
    assert interval.tokens_per_second == pytest.approx(2 * settings.counts.tokens / 4.0)
    assert journal.line(1, 2, interval).endswith(" GiB teacher:25% backward:75%")
