"""A pair's distances added up with their gradient: mixes, sets, sets over ranks, samples of tokens."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from llmkd.losses.distance_sum import KNOWN, distance_sum, draw_seed, sampled, stood_for, terms_of
from llmkd.losses.set_distances import SET_DISTANCES

MASK = torch.tensor([[1, 1, 1, 0, 0, 0], [1, 1, 1, 1, 1, 1]]).bool()
AT = MASK.flatten().nonzero().flatten()
MIXES: list[dict[str, float]] = [
    *({name: 1.0} for name in SET_DISTANCES),
    {"procrustes": 1.0, "mse": 0.1},
    {"cosine": 0.5, "mse": 2.0, "gram": 3.0, "cka": 0.25},
    {"normalized_mse": 2.0},
]
each_mix = pytest.mark.parametrize("mix", MIXES, ids=lambda mix: "+".join(mix))


def two(dtype: torch.dtype = torch.float64, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    draw = torch.Generator().manual_seed(seed)
    make = lambda: torch.randn(2, 6, 5, generator=draw, dtype=torch.float64).to(dtype)  # noqa: E731
    return make().requires_grad_(), make()


def plain(mix: dict[str, float], student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """Of rows [N, H]: token-wise distances summed over the tokens, set-level ones N times."""
    wide = student.double(), teacher.double()
    return sum(
        (weight * KNOWN[name](*wide) * (len(student) if name in SET_DISTANCES else 1)).sum()
        for name, weight in mix.items()
    )  # type: ignore[return-value]


@each_mix
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_the_sum_and_its_gradient(mix: dict[str, float], dtype: torch.dtype) -> None:
    student, teacher = two(dtype)
    expected = plain(mix, student[MASK], teacher[MASK])
    (expected_gradient,) = torch.autograd.grad(expected, student)
    found = distance_sum(student, teacher, AT, terms_of(mix), factor=1.5)
    (gradient,) = torch.autograd.grad(2 * found, student)
    rough = dtype == torch.bfloat16
    assert found.item() == pytest.approx(1.5 * expected.item(), rel=1e-5 if rough else 1e-12)
    rtol, atol = (0.02, 0.02) if rough else (1e-10, 1e-12)
    torch.testing.assert_close(gradient, 3 * expected_gradient, rtol=rtol, atol=atol)


@each_mix
def test_what_other_positions_hold_changes_nothing(mix: dict[str, float]) -> None:
    results = []
    for fill in (None, torch.nan, torch.inf):
        student, teacher = (side.detach().clone() for side in two(torch.float32))
        if fill is not None:
            student[~MASK], teacher[~MASK] = fill, fill
        total = distance_sum(student.requires_grad_(), teacher, AT, terms_of(mix))
        results.append((total.detach(), torch.autograd.grad(total, student)[0]))
    assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other, strict=True))


@each_mix
def test_no_position_at_all(mix: dict[str, float]) -> None:
    student, teacher = two()
    total = distance_sum(student, teacher, AT[:0], terms_of(mix))
    assert total == 0 and not torch.autograd.grad(total, student)[0].any()


@each_mix
@pytest.mark.parametrize("split", [0, 2, 4])
def test_sets_over_ranks_are_one_ranks_set(mix: dict[str, float], split: int) -> None:
    """Values and gradients of two ranks' parts of the rows add up to those of all rows in one place; a rank may have none."""
    student, teacher = two()
    whole = distance_sum(student, teacher, AT, terms_of(mix))
    (expected,) = torch.autograd.grad(whole, student)
    shares = [AT[:split], AT[split:]]
    rows = {id(side): side.flatten(0, 1) for side in (student, teacher)}
    totals = []
    for rank, share in enumerate(shares):
        sides = iter((student, teacher))

        def gather(mine: torch.Tensor, sides: Any = sides, rank: int = rank) -> tuple[torch.Tensor, int]:
            everyones = rows[id(next(sides))][AT].detach()
            start = split if rank else 0
            assert torch.equal(everyones[start : start + len(mine)], mine)
            return everyones, start

        totals.append(distance_sum(student, teacher, share, terms_of(mix), all_rows=gather))
    total = torch.stack(totals).sum()
    torch.testing.assert_close(total, whole, rtol=1e-12, atol=1e-12)
    (gradient,) = torch.autograd.grad(total, student)
    torch.testing.assert_close(gradient, expected, rtol=1e-10, atol=1e-12)


@each_mix
@pytest.mark.parametrize("counts", [(3, 5), (2, 40), (40, 40)])
def test_samples_of_ranks_are_a_sample_in_one_place(mix: dict[str, float], counts: tuple[int, int]) -> None:
    """Two ranks that sample differently many of their tokens: values and gradients add up to those of one sample, of sets exactly and
    token by token with each rank's own factor."""
    student, teacher = two()
    parts = AT[:4], AT[4:]
    drawn = [
        sampled(part, count, draw_seed(0, 1, 0, rank))
        for rank, (part, count) in enumerate(zip(parts, counts, strict=True))
    ]
    union = torch.cat([at for at, _ in drawn])
    whole = torch.zeros((), dtype=torch.float64)
    for term in terms_of(mix):
        places = [(union, len(AT) / len(union))] if term.of_set else drawn
        whole = whole + sum(distance_sum(student, teacher, at, [term], factor=factor) for at, factor in places)
    (expected,) = torch.autograd.grad(whole, student)
    counted = lambda mine: (mine.new_tensor([[len(part)] for part in parts]), 0)  # noqa: E731
    total = torch.zeros((), dtype=torch.float64)
    for rank, (at, factor) in enumerate(drawn):
        sides = iter((student, teacher))

        def gather(mine: torch.Tensor, sides: Any = sides, rank: int = rank) -> tuple[torch.Tensor, int]:
            return next(sides).flatten(0, 1)[union].detach(), rank * len(drawn[0][0])

        settings: dict[str, Any] = dict(factor=factor, all_rows=gather, together=stood_for(parts[rank], counted))
        total = total + distance_sum(student, teacher, at, terms_of(mix), **settings)
    torch.testing.assert_close(total, whole, rtol=1e-12, atol=1e-12)
    (gradient,) = torch.autograd.grad(total, student)
    torch.testing.assert_close(gradient, expected, rtol=1e-10, atol=1e-12)


def test_two_sets_do_not_add_up_to_one() -> None:
    """Why accumulation changes a set-level distance."""
    student, teacher = two()
    for name in SET_DISTANCES:
        apart = sum(distance_sum(student, teacher, part, terms_of({name: 1.0})) for part in (AT[:4], AT[4:]))
        assert abs(apart - distance_sum(student, teacher, AT, terms_of({name: 1.0}))) > 1e-2
