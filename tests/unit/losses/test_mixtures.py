"""The distance from a mixture of teacher states: value and gradients, those of the mixture's weights too, by autograd in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from llmkd.losses.distance_sum import Mixture, distance_sum, terms_of
from tests.unit.losses.test_distance_sum import AT, MASK, MIXES, plain, two

each_mix = pytest.mark.parametrize("mix", [*MIXES, {"mse": 1.0}, {"cosine": 1.0}], ids=lambda mix: "+".join(mix))


def _sides(dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, Mixture]:
    """A student's states and a mixture of three blocks' states."""
    weights = torch.tensor([0.2, 0.7, 0.1], dtype=torch.float64).to(torch.promote_types(dtype, torch.float32))
    return two(dtype)[0], Mixture([two(dtype, seed)[1] for seed in (1, 2, 3)], weights.requires_grad_())


def _blended(mixture: Mixture) -> torch.Tensor:
    return torch.stack([w * s.double() for w, s in zip(mixture.weights, mixture.states, strict=True)]).sum(0)


@each_mix
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_the_sum_and_its_gradients(mix: dict[str, float], dtype: torch.dtype) -> None:
    student, mixture = _sides(dtype)
    expected = plain(mix, student[MASK], _blended(mixture)[MASK])
    slopes = torch.autograd.grad(expected, (student, mixture.weights))
    found = distance_sum(student, mixture, AT, terms_of(mix), factor=1.5)
    gradients = torch.autograd.grad(2 * found, (student, mixture.weights))
    rough = dtype == torch.bfloat16
    near: dict[str, Any] = dict(rtol=0.02, atol=0.02) if rough else TIGHT
    nearer: dict[str, Any] = dict(rtol=1e-4, atol=1e-5) if rough else TIGHT
    assert found.item() == pytest.approx(1.5 * expected.item(), rel=1e-5 if rough else 1e-12)
    torch.testing.assert_close(gradients[0], 3 * slopes[0], **near)
    assert gradients[1].dtype == (torch.float32 if rough else torch.float64)
    torch.testing.assert_close(gradients[1], 3 * slopes[1], **nearer)


TIGHT: dict[str, Any] = {"rtol": 1e-10, "atol": 1e-12}


@each_mix
def test_worked_on_a_token_at_a_time_it_is_the_same(mix: dict[str, float], monkeypatch: pytest.MonkeyPatch) -> None:
    results = []
    for few in (None, 1):
        student, mixture = _sides()
        if few is not None:
            monkeypatch.setattr("llmkd.losses.distance_sum.rows_at_once", lambda *args: 1)
        total = distance_sum(student, mixture, AT, terms_of(mix))
        results.append((total.detach(), *torch.autograd.grad(total, (student, mixture.weights))))
    torch.testing.assert_close(results[0], results[1], **TIGHT)


@each_mix
def test_what_other_positions_hold_changes_nothing(mix: dict[str, float]) -> None:
    results = []
    for fill in (None, torch.nan, torch.inf):
        student, mixture = _sides(torch.float32)
        student = student.detach().clone()
        if fill is not None:
            for side in (student, *mixture.states):
                side[~MASK] = fill
        total = distance_sum(student.requires_grad_(), mixture, AT, terms_of(mix))
        results.append((total.detach(), *torch.autograd.grad(total, (student, mixture.weights))))
    assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other, strict=True))


@each_mix
def test_no_position_at_all(mix: dict[str, float]) -> None:
    student, mixture = _sides()
    total = distance_sum(student, mixture, AT[:0], terms_of(mix))
    assert total == 0 and not any(g.any() for g in torch.autograd.grad(total, (student, mixture.weights)))


@each_mix
def test_of_one_block_alone_it_is_the_distance_from_that_block(mix: dict[str, float]) -> None:
    """Zero, and without a gradient to either side, where the student's states are that block's."""
    student, mixture = _sides()
    one = mixture._replace(weights=torch.tensor([0.0, 1.0, 0.0], dtype=torch.float64, requires_grad=True))
    found = distance_sum(student, one, AT, terms_of(mix))
    expected = distance_sum(student, mixture.states[1], AT, terms_of(mix))
    torch.testing.assert_close(found, expected, **TIGHT)
    torch.testing.assert_close(torch.autograd.grad(found, student), torch.autograd.grad(expected, student), **TIGHT)
    itself = mixture.states[1].clone().requires_grad_()
    zero = distance_sum(itself, one, AT, terms_of(mix))
    assert zero.abs() < 1e-12 and torch.autograd.grad(zero, itself)[0].abs().max() < 1e-12


@each_mix
@pytest.mark.parametrize("split", [0, 2, 4])
def test_sets_over_ranks_are_one_ranks_set(mix: dict[str, float], split: int) -> None:
    """Values and gradients of two ranks' parts of the rows add up to those of all rows in one place; a rank may have none."""
    student, mixture = _sides()
    whole = distance_sum(student, mixture, AT, terms_of(mix))
    expected = torch.autograd.grad(whole, (student, mixture.weights))
    everyones = [side.flatten(0, 1)[AT].detach() for side in (student, _blended(mixture))]
    totals = []
    for rank, share in enumerate((AT[:split], AT[split:])):
        sides = iter(everyones)

        def gather(mine: torch.Tensor, sides: Any = sides, rank: int = rank) -> tuple[torch.Tensor, int]:
            rows, start = next(sides), split if rank else 0
            torch.testing.assert_close(rows[start : start + len(mine)], mine)
            return rows, start

        totals.append(distance_sum(student, mixture, share, terms_of(mix), all_rows=gather))
    total = torch.stack(totals).sum()
    torch.testing.assert_close(total, whole, **TIGHT)
    torch.testing.assert_close(torch.autograd.grad(total, (student, mixture.weights)), expected, **TIGHT)
