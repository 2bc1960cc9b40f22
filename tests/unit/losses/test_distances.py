import pytest
import torch
from torch.nn import functional as F

from llmkd.errors import InputError
from llmkd.losses.closed_forms import CLOSED_DISTANCES
from llmkd.losses.distances import DISTANCES, SMALLEST_NORM, cosine, mse, normalized_mse

every_distance = pytest.mark.parametrize("distance", DISTANCES.values(), ids=DISTANCES.keys())


def gradients(value, *leaves):
    return torch.autograd.grad(value.sum(), leaves)


def states(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


# The definitions once more, written another way, in float64.
REFERENCE = {
    "mse": lambda s, t: F.mse_loss(s, t, reduction="none").mean(-1),
    "normalized_mse": lambda s, t: (F.normalize(s, dim=-1) - F.normalize(t, dim=-1)).pow(2).sum(-1),
    "cosine": lambda s, t: 1 - F.cosine_similarity(s, t, dim=-1),
}


@pytest.mark.parametrize("name", DISTANCES)
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 1e-5)]
)
def test_value_against_torch_in_float64(name, dtype, tolerance):
    student, teacher = states(2, 5, 16, dtype=dtype), states(2, 5, 16, seed=1, dtype=dtype)
    value = DISTANCES[name](student, teacher)
    assert value.shape == (2, 5)
    assert value.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    torch.testing.assert_close(
        value.double(), REFERENCE[name](student.double(), teacher.double()), rtol=tolerance, atol=tolerance
    )


def test_values_worked_by_hand():
    student, teacher = torch.tensor([[3.0, 4.0]]), torch.tensor([[0.0, 10.0]])
    assert mse(student, teacher).item() == pytest.approx((9 + 36) / 2)
    assert normalized_mse(student, teacher).item() == pytest.approx(0.6**2 + 0.2**2)  # (0.6, 0.8) against (0, 1)
    assert cosine(student, teacher).item() == pytest.approx(1 - 0.8)
    assert cosine(teacher, -teacher).item() == pytest.approx(2)
    assert normalized_mse(teacher, -teacher).item() == pytest.approx(4)


@every_distance
def test_gradient_in_float64(distance):
    student = states(3, 6, dtype=torch.float64).requires_grad_()
    teacher = states(3, 6, seed=1, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(distance, (student, teacher))
    assert torch.autograd.gradgradcheck(distance, (student, teacher))


@every_distance
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
def test_equal_states_give_exactly_zero_and_no_gradient(distance, dtype, scale):
    teacher = (states(4, 7, 33) * scale).to(dtype)
    student = teacher.clone().requires_grad_()
    value = distance(student, teacher)
    assert torch.equal(value, torch.zeros_like(value))
    assert torch.equal(gradients(value, student)[0], torch.zeros_like(teacher))


@every_distance
def test_equal_states_in_another_memory_order_give_exactly_zero(distance):
    teacher = states(64, 3, 129)
    student = teacher.transpose(0, 2).contiguous().transpose(0, 2)
    assert not student.is_contiguous()
    assert not distance(student, teacher).any()


@every_distance
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_zero_states_are_finite(distance, dtype):
    """Row 0: both zero, row 1: the student, row 2: the teacher."""
    student, teacher = states(3, 8, dtype=dtype), states(3, 8, seed=1, dtype=dtype)
    student[:2] = 0
    teacher[::2] = 0
    student.requires_grad_()
    teacher.requires_grad_()
    value = distance(student, teacher)
    to_student, to_teacher = gradients(value, student, teacher)
    assert value.isfinite().all() and to_student.isfinite().all() and to_teacher.isfinite().all()
    assert value[0] == 0 and (value[1:] > 0).all()
    if distance is not mse:
        assert not to_student[:2].any()  # no direction, no gradient


@pytest.mark.parametrize(("distance", "expected"), [(normalized_mse, 1.0), (cosine, 0.5)])
def test_a_state_without_direction_is_a_zero_unit_vector(distance, expected):
    assert distance(torch.zeros(1, 4), torch.ones(1, 4)).item() == pytest.approx(expected)


@pytest.mark.parametrize("distance", [normalized_mse, cosine])
def test_gradient_of_a_tiny_state_is_bounded(distance):
    student = (states(5, 8) * 1e-6).requires_grad_()
    (gradient,) = gradients(distance(student, states(5, 8, seed=1)), student)
    assert gradient.isfinite().all() and gradient.norm(dim=-1).max() <= 2.01 / SMALLEST_NORM


@pytest.mark.parametrize("distance", [normalized_mse, cosine])
def test_size_does_not_count_in_normalized_distances(distance):
    student, teacher = states(5, 8), states(5, 8, seed=1)
    torch.testing.assert_close(distance(student * 100, teacher * 0.01), distance(student, teacher))


def test_mse_does_not_grow_with_the_width():
    wide = mse(states(2000, 512), states(2000, 512, seed=1)).mean()
    narrow = mse(states(2000, 8), states(2000, 8, seed=1)).mean()
    torch.testing.assert_close(wide, narrow, rtol=0.05, atol=0)


def test_cosine_keeps_small_angles_in_float32():
    """An angle of 1e-5: 1 - cos is 5e-11, far below what is left of a float32 cosine next to 1."""
    angle = 1e-5
    student = torch.tensor([[1.0, angle]])
    assert cosine(student, torch.tensor([[1.0, 0.0]])).item() == pytest.approx(angle**2 / 2, rel=1e-3)


@every_distance
def test_half_precision_is_worked_in_float32(distance):
    """bfloat16 states whose squares and small differences bfloat16 could not hold."""
    student = torch.tensor([[1.0, 256.0, -3.0]], dtype=torch.bfloat16)
    teacher = torch.tensor([[1.0078125, 258.0, -3.0]], dtype=torch.bfloat16)
    torch.testing.assert_close(
        distance(student, teacher), distance(student.double(), teacher.double()).float(), rtol=1e-3, atol=1e-9
    )


@every_distance
def test_float16_states_too_large_to_square_in_float16(distance):
    student = torch.full((1, 64), 6e4, dtype=torch.float16).requires_grad_()
    value = distance(student, torch.full((1, 64), -6e4, dtype=torch.float16))
    assert value.isfinite().all() and gradients(value, student)[0].isfinite().all()


@every_distance
def test_not_a_number_is_passed_on_and_stays_in_its_row(distance):
    student, teacher = states(3, 4), states(3, 4, seed=1)
    student[1, 2] = float("nan")
    assert distance(student, teacher).isnan().tolist() == [False, True, False]


@every_distance
@pytest.mark.parametrize("shape", [(2, 5, 8), (2, 5, 1), (2, 1, 4), (5, 4)])
def test_unequal_shapes_are_refused_and_not_broadcast(distance, shape):
    with pytest.raises(InputError, match=r"student states are \[2, 5, 4\].*projector"):
        distance(torch.zeros(2, 5, 4), torch.zeros(shape))


# ---------------------------------------------------------------------------------------------------------------------
# Closed forms


def by_form(distance, student, teacher):
    form = CLOSED_DISTANCES.get(distance)
    assert form is not None
    wide = torch.promote_types(student.dtype, torch.float32)
    return form(student.detach().to(wide, copy=True), teacher.detach().to(wide, copy=True))


@every_distance
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 2e-6)])
@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
def test_closed_form_is_the_definition_and_its_gradient(distance, dtype, tolerance, scale):
    student, teacher = (states(50, 17, dtype=dtype) * scale).requires_grad_(), states(50, 17, seed=1, dtype=dtype)
    expected = distance(student.double(), teacher.double())
    (expected_gradient,) = gradients(expected, student)
    value, gradient = by_form(distance, student, teacher)
    torch.testing.assert_close(value.double(), expected, rtol=tolerance, atol=0)
    torch.testing.assert_close(
        gradient, expected_gradient, rtol=tolerance, atol=tolerance * gradient.abs().max().item()
    )


@every_distance
def test_closed_form_where_a_state_has_no_direction(distance):
    student, teacher = states(4, 8), states(4, 8, seed=1)
    student[:2], teacher[::2] = 0, 0
    student[3] *= 1e-8
    student.requires_grad_()
    expected = distance(student, teacher)
    value, gradient = by_form(distance, student, teacher)
    torch.testing.assert_close(value, expected, rtol=1e-6, atol=0)
    torch.testing.assert_close(gradient, gradients(expected, student)[0], rtol=1e-6, atol=1e-7)


@every_distance
@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
def test_closed_form_of_equal_states_is_exactly_zero(distance, scale):
    student = states(40, 33) * scale
    value, gradient = by_form(distance, student, student)
    assert not value.any() and not gradient.any()


@every_distance
def test_closed_form_passes_on_what_is_not_a_number(distance):
    student = states(3, 4)
    student[1, 2] = float("nan")
    value, gradient = by_form(distance, student, states(3, 4, seed=1))
    assert value.isnan().tolist() == [False, True, False] and gradient.isnan().any(-1).tolist() == [False, True, False]
