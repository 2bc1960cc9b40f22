"""Set-level distances: closed forms, gradients against finite differences, what changes nothing, and what CKA can't see."""

from __future__ import annotations

import pytest
import torch

from llmkd.errors import InputError
from llmkd.losses.set_distances import (
    SET_DISTANCES,
    WIDTH_FREE,
    centred_gram,
    cka,
    gram,
    procrustes,
    similarity,
    standardized_mse,
)

every = pytest.mark.parametrize("name", SET_DISTANCES)
width_free = pytest.mark.parametrize("name", WIDTH_FREE)
SHAPES = [(20, 6, 6), (20, 4, 6), (20, 6, 4), (5, 6, 6), (5, 7, 9), (5, 9, 7), (6, 6, 6), (7, 6, 9)]
"""(tokens, student width, teacher width), more and fewer tokens than widths."""


def states(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def two(shape, dtype=torch.float64):
    tokens, ours, theirs = shape
    return states(tokens, ours, dtype=dtype) + 1, states(tokens, theirs, seed=1, dtype=dtype) - 2


def rotation(width, seed=5):
    return torch.linalg.qr(states(width, width, seed=seed))[0]


def centred(x):
    x = x - x.mean(0)
    return x / x.norm()


def value_and_gradient(distance, student, teacher):
    leaf = student.clone().requires_grad_()
    value = distance(leaf, teacher)
    return value.detach(), torch.autograd.grad(value, leaf)[0]


# ---------------------------------------------------------------------------------------------------------------------
# Two ways to the same number


@pytest.mark.parametrize("shape", SHAPES)
def test_values_by_their_other_forms(shape):
    student, teacher = two(shape)
    x, y = centred(student), centred(teacher)
    k, other = x @ x.T, y @ y.T
    nuclear = torch.linalg.matrix_norm(x.T @ y, "nuc")
    torch.testing.assert_close(procrustes(student, teacher), 2 - 2 * nuclear)
    torch.testing.assert_close(gram(student, teacher), (k - other).square().sum())
    torch.testing.assert_close(cka(student, teacher), 1 - (k * other).sum() / (k.norm() * other.norm()))


@pytest.mark.parametrize("shape", SHAPES)
def test_procrustes_is_the_least_over_rotations(shape):
    """No drawn rotation, of the padded square space, comes nearer; small turns of the best one do not either."""
    student, teacher = two(shape)
    best = procrustes(student, teacher)
    width = max(shape[1:])
    pad = lambda side: torch.nn.functional.pad(centred(side), (0, width - side.shape[1]))  # noqa: E731
    for seed in range(50):
        assert (pad(student) @ rotation(width, seed) - pad(teacher)).square().sum() >= best


def test_standardized_mse_is_t5s_layer_norm_over_the_whole_tensor():
    student, teacher = two((20, 6, 6))
    plain = [(side - side.mean()) / (side.var(correction=0) + 1e-5).sqrt() for side in (student, teacher)]
    torch.testing.assert_close(standardized_mse(student, teacher), (plain[0] - plain[1]).square().mean())


@every
@pytest.mark.parametrize("shape", SHAPES)
def test_gradient_by_finite_differences(name, shape):
    if name == "standardized_mse":
        shape = (shape[0], shape[1], shape[1])
    student, teacher = two(shape)
    distance = SET_DISTANCES[name]
    assert torch.autograd.gradcheck(lambda s: distance(s, teacher), student.requires_grad_(), rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("shape", [s for s in SHAPES if s[1] <= s[2]])
def test_gradients_by_their_closed_forms(shape):
    """2 (X - YQᵀ) and 4 (XXᵀ - YYᵀ) X, for a student that is centred and of unit norm, less what its norm takes away."""
    student, teacher = (centred(side) for side in two(shape))
    left, _, right = torch.linalg.svd(student.T @ teacher, full_matrices=False)
    for distance, free in (
        (procrustes, 2 * (student - teacher @ (left @ right).T)),
        (gram, 4 * (student @ student.T - teacher @ teacher.T) @ student),
    ):
        free = free - free.mean(0)
        expected = free - (free * student).sum() * student
        torch.testing.assert_close(value_and_gradient(distance, student, teacher)[1], expected)


# ---------------------------------------------------------------------------------------------------------------------
# What changes nothing


@width_free
@pytest.mark.parametrize("shape", SHAPES)
def test_rotation_scale_and_shift_of_either_side_change_nothing(name, shape):
    student, teacher = two(shape)
    distance = SET_DISTANCES[name]
    value = distance(student, teacher)
    for changed in (
        (student @ rotation(shape[1]), teacher),
        (student, teacher @ rotation(shape[2])),
        (student * 7, teacher * 0.01),
        (student + states(shape[1], seed=3), teacher - 4),
    ):
        torch.testing.assert_close(distance(*changed), value)


@every
def test_the_order_of_tokens_changes_nothing_and_their_pairing_does(name):
    student, teacher = two((20, 6, 6))
    order = torch.randperm(20, generator=torch.Generator().manual_seed(0))
    value = SET_DISTANCES[name](student, teacher)
    torch.testing.assert_close(SET_DISTANCES[name](student[order], teacher[order]), value)
    assert abs(SET_DISTANCES[name](student[order], teacher) - value) > 1e-3


@every
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(64, 16), (9, 16), (33, 33)])
@pytest.mark.parametrize("scale", [1e-2, 1.0, 1e3])
def test_equal_states_give_exactly_zero(name, dtype, shape, scale):
    same = (states(*shape) * scale + 1).to(dtype)
    value, gradient = value_and_gradient(SET_DISTANCES[name], same, same.clone())
    assert value == 0
    other = value_and_gradient(SET_DISTANCES[name], same, (states(*shape, seed=1) * scale).to(dtype))[1]
    assert gradient.abs().max() <= 1e-5 * other.abs().max()


@width_free
@pytest.mark.parametrize("shape", SHAPES)
def test_a_turned_copy_is_no_distance_away(name, shape):
    tokens, _, width = shape
    teacher = states(tokens, width)
    assert SET_DISTANCES[name](teacher @ rotation(width), teacher).abs() < 1e-12
    wider = torch.cat([teacher @ rotation(width), torch.zeros(tokens, 3)], 1)
    assert SET_DISTANCES[name](wider, teacher).abs() < 1e-12
    assert SET_DISTANCES[name](teacher, wider).abs() < 1e-12


# ---------------------------------------------------------------------------------------------------------------------
# Where derivatives might break


@every
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("tokens", [4, 12])
def test_tied_and_zero_singular_values_give_finite_gradients(name, dtype, tokens):
    """XᵀY = 0, XᵀY = a multiple of the identity, and one direction alone, where the derivative of an SVD is infinite."""
    basis = torch.linalg.qr(states(tokens, tokens) - states(tokens, tokens).mean(0))[0][:, :4].to(dtype)
    basis = basis - basis.mean(0)
    one = states(tokens, 1) @ states(1, 4, seed=2)
    cases = [
        (basis, basis @ rotation(4).to(dtype)),
        (basis[:, :2] @ states(2, 4).to(dtype), basis[:, 2:] @ states(2, 4, seed=1).to(dtype)),
        (one.to(dtype), states(tokens, 4, seed=3, dtype=dtype)),
        (one.to(dtype), one.flip(1).to(dtype)),
    ]
    for student, teacher in cases:
        value, gradient = value_and_gradient(SET_DISTANCES[name], student, teacher)
        assert value.isfinite() and gradient.isfinite().all()


@every
def test_a_side_without_spread_is_finite_and_gets_no_gradient(name):
    some, flat = states(8, 5, dtype=torch.float32), torch.full((8, 5), 3.1)
    for student, teacher in ((flat, some), (some, flat), (flat, flat), (torch.zeros(8, 5), some)):
        value, gradient = value_and_gradient(SET_DISTANCES[name], student, teacher)
        assert value.isfinite() and gradient.isfinite().all()
        if student is not some and name in WIDTH_FREE:
            assert not gradient.any()
    assert SET_DISTANCES[name](flat, flat.clone()) == 0
    if name in WIDTH_FREE:
        assert SET_DISTANCES[name](flat, some) > 0


def test_one_token_has_no_shape():
    assert procrustes(states(1, 4), states(1, 4, seed=1)) == cka(states(1, 4), states(1, 4, seed=1)) == 0


@every
def test_not_a_number_is_passed_on(name):
    student, teacher = two((8, 5, 5))
    student[2, 1] = torch.nan
    assert SET_DISTANCES[name](student, teacher).isnan()


@every
def test_half_precision_is_worked_in_float32(name):
    student, teacher = two((40, 8, 8), dtype=torch.bfloat16)
    value = SET_DISTANCES[name](student, teacher)
    assert value.dtype == torch.float32
    torch.testing.assert_close(
        value, SET_DISTANCES[name](student.double(), teacher.double()).float(), rtol=1e-5, atol=1e-6
    )


def test_mistakes_are_named():
    with pytest.raises(InputError, match=r"\[4, 3\].*\[4, 5\].*projector, or cka"):
        standardized_mse(torch.ones(4, 3), torch.ones(4, 5))
    with pytest.raises(InputError, match=r"\[2, 4, 3\].*\[N, H\]"):
        cka(torch.ones(2, 4, 3), torch.ones(8, 3))


# ---------------------------------------------------------------------------------------------------------------------
# What CKA can't see


def antipodal(tokens, moved=0):
    """n/2 antipodal pairs of unit vectors along one axis, the first `moved` of them pushed off it by orthogonal unit steps."""
    rows = torch.zeros(tokens, tokens + 1, dtype=torch.float64)
    rows[:, 0] = torch.tensor([1.0, -1.0]).repeat(tokens // 2)
    rows[:moved, 1 : moved + 1] = torch.eye(moved)
    return rows


@pytest.mark.parametrize(("moved", "by_procrustes", "by_gram"), [(64, 0.114, 0.0124), (256, 0.366, 0.111)])
def test_cka_can_not_see_what_procrustes_sees(moved, by_procrustes, by_gram):
    """A figure of arXiv 2509.25253 made again: to a copy of one dimension, by CKA, both sets are the same to a few in 10,000."""
    copy, straight, bent = antipodal(512)[:, :1], antipodal(512), antipodal(512, moved)
    for distance in (cka, procrustes, gram):
        assert abs(distance(copy, straight)) < 1e-12
    assert 0 < cka(copy, bent) < 6e-4
    assert procrustes(copy, bent).item() == pytest.approx(by_procrustes, rel=5e-3)
    assert gram(copy, bent).item() == pytest.approx(by_gram, rel=5e-3)


def test_similarity_is_cka_of_every_pair():
    ours, theirs = [states(9, 4, seed=s) for s in range(2)], [states(9, 6, seed=s) for s in range(2, 5)]
    found = similarity(*(torch.stack([centred_gram(side) for side in sides]) for sides in (ours, theirs)))
    expected = torch.tensor([[1 - cka(a, b).item() for b in theirs] for a in ours], dtype=torch.float64)
    torch.testing.assert_close(found, expected)
