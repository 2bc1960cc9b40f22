import pytest
import torch
from torch.distributions import Categorical, kl_divergence
from torch.nn import functional as F

from llmkd.divergences import DIVERGENCES, forward_kl, reverse_kl
from llmkd.errors import InputError

every_divergence = pytest.mark.parametrize("divergence", DIVERGENCES.values(), ids=DIVERGENCES.keys())
MASKED = float("-inf")


def gradients(value, *leaves):
    return torch.autograd.grad(value.sum(), leaves)


def logits(*shape, seed=0, dtype=torch.float32, scale=3.0):
    return (torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * scale).to(dtype)


def by_kl_div(student, teacher, temperature, direction):
    log_q, log_p = F.log_softmax(student / temperature, -1), F.log_softmax(teacher / temperature, -1)
    first, second = (log_q, log_p) if direction == "forward_kl" else (log_p, log_q)
    return F.kl_div(first, second, reduction="none", log_target=True).sum(-1) * temperature**2


def by_distributions(student, teacher, temperature, direction):
    q, p = Categorical(logits=student / temperature), Categorical(logits=teacher / temperature)
    return (kl_divergence(p, q) if direction == "forward_kl" else kl_divergence(q, p)) * temperature**2


@pytest.mark.parametrize("name", DIVERGENCES)
@pytest.mark.parametrize("reference", [by_kl_div, by_distributions])
@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-11), (torch.float32, 1e-5), (torch.bfloat16, 1e-5)]
)
def test_value_against_torch_in_float64(name, reference, temperature, dtype, tolerance):
    student, teacher = logits(6, 40, dtype=dtype), logits(6, 40, seed=1, dtype=dtype)
    value = DIVERGENCES[name](student, teacher, temperature)
    assert value.shape == (6,)
    assert value.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    expected = reference(student.double(), teacher.double(), temperature, name)
    torch.testing.assert_close(value.double(), expected, rtol=tolerance, atol=tolerance)


def test_values_worked_by_hand():
    """p = (1/2, 1/2), q = (1/4, 3/4)."""
    teacher, student = torch.tensor([[0.5, 0.5]]).log(), torch.tensor([[0.25, 0.75]]).log()
    assert forward_kl(student, teacher, 1.0).item() == pytest.approx(0.5 * 0.6931472 + 0.5 * -0.4054651)  # ln 2, ln 2/3
    assert reverse_kl(student, teacher, 1.0).item() == pytest.approx(0.25 * -0.6931472 + 0.75 * 0.4054651)


@every_divergence
@pytest.mark.parametrize("temperature", [0.7, 1.0, 2.0])
def test_gradient_in_float64(divergence, temperature):
    student = logits(3, 5, dtype=torch.float64).requires_grad_()
    teacher = logits(3, 5, seed=1, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(lambda s, t: divergence(s, t, temperature), (student, teacher))


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_forward_gradient_is_temperature_times_q_minus_p(temperature):
    student, teacher = logits(4, 9, dtype=torch.float64).requires_grad_(), logits(4, 9, seed=1, dtype=torch.float64)
    (gradient,) = gradients(forward_kl(student, teacher, temperature), student)
    expected = temperature * ((student / temperature).softmax(-1) - (teacher / temperature).softmax(-1))
    torch.testing.assert_close(gradient, expected)


@every_divergence
def test_high_temperature_keeps_the_gradients_size(divergence):
    """What temperature² is for: both tend to half the mean square of the centred difference."""
    student, teacher = logits(4, 9, dtype=torch.float64), logits(4, 9, seed=1, dtype=torch.float64)
    gap = student - teacher
    limit = (gap - gap.mean(-1, keepdim=True)).square().mean(-1) / 2
    torch.testing.assert_close(divergence(student, teacher, 1e4), limit, rtol=1e-2, atol=0)


@every_divergence
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("masked", [False, True])
def test_equal_logits_give_exactly_zero_and_no_gradient(divergence, dtype, temperature, masked):
    teacher = logits(6, 1000, dtype=dtype)
    if masked:
        teacher[:, -100:] = MASKED
    student = teacher.clone().requires_grad_()
    value = divergence(student, teacher, temperature)
    assert torch.equal(value, torch.zeros_like(value))
    assert gradients(value, student)[0].abs().max() < 1e-6


@every_divergence
def test_equal_logits_in_another_memory_order_give_exactly_zero(divergence):
    teacher = logits(64, 1001)
    student = teacher.t().contiguous().t()
    assert not student.is_contiguous()
    assert not divergence(student, teacher, 1.0).any()


@every_divergence
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_masked_columns_change_nothing(divergence, dtype):
    """Heads of unequal width: the rest is -inf on both sides. Value and gradient are those of the shared columns."""
    student, teacher = logits(4, 12, dtype=dtype), logits(4, 12, seed=1, dtype=dtype)
    shared = student[:, :9].clone().requires_grad_(), teacher[:, :9].clone().requires_grad_()
    student[:, 9:], teacher[:, 9:] = MASKED, MASKED
    student.requires_grad_()
    teacher.requires_grad_()
    value, expected = divergence(student, teacher, 2.0), divergence(*shared, 2.0)
    torch.testing.assert_close(value, expected)
    for whole, part in zip(gradients(value, student, teacher), gradients(expected, *shared), strict=True):
        torch.testing.assert_close(whole[:, :9], part)
        assert not whole[:, 9:].any()


@every_divergence
def test_a_zero_of_the_first_distribution_alone_adds_nothing(divergence):
    """KL(p ‖ q) takes 0 log 0/q as 0: the teacher's zero for forward, the student's for reverse."""
    student, teacher = logits(2, 5).requires_grad_(), logits(2, 5, seed=1)
    blocked = torch.tensor([False, True, False, False, False])
    zeroed = student.masked_fill(blocked, MASKED), teacher.masked_fill(blocked, MASKED)
    pair = (student, zeroed[1]) if divergence is forward_kl else (zeroed[0], teacher)
    value = divergence(*pair, 1.0)
    assert value.isfinite().all() and (value > 0).all() and gradients(value, student)[0].isfinite().all()


def test_a_zero_of_the_second_distribution_alone_is_infinite():
    full, blocked = torch.zeros(1, 3), torch.tensor([[0.0, 0.0, MASKED]])
    assert forward_kl(blocked, full, 1.0).isposinf().all()
    assert reverse_kl(full, blocked, 1.0).isposinf().all()


@every_divergence
def test_probabilities_too_small_for_float32_are_finite(divergence):
    student, teacher = torch.tensor([[0.0, 500.0]]).requires_grad_(), torch.tensor([[500.0, 0.0]])
    value = divergence(student, teacher, 1.0)
    assert value.item() == pytest.approx(500)
    assert gradients(value, student)[0].isfinite().all()


def test_the_two_directions_mirror_each_other():
    student, teacher = logits(4, 9), logits(4, 9, seed=1)
    torch.testing.assert_close(forward_kl(student, teacher, 2.0), reverse_kl(teacher, student, 2.0))
    assert not torch.allclose(forward_kl(student, teacher, 2.0), reverse_kl(student, teacher, 2.0))


@every_divergence
def test_a_constant_added_to_the_logits_changes_nothing(divergence):
    student, teacher = logits(4, 9, dtype=torch.float64), logits(4, 9, seed=1, dtype=torch.float64)
    torch.testing.assert_close(divergence(student + 7, teacher - 3, 1.0), divergence(student, teacher, 1.0))


@every_divergence
def test_not_a_number_is_passed_on_and_stays_in_its_row(divergence):
    student, teacher = logits(3, 4), logits(3, 4, seed=1)
    student[1, 2] = float("nan")
    assert divergence(student, teacher, 1.0).isnan().tolist() == [False, True, False]


@every_divergence
@pytest.mark.parametrize("shape", [(3, 5), (3, 1), (1, 4), (4,)])
def test_unequal_shapes_are_refused_and_not_broadcast(divergence, shape):
    with pytest.raises(InputError, match=r"student logits are \[3, 4\].*shared columns"):
        divergence(torch.zeros(3, 4), torch.zeros(shape), 1.0)


@every_divergence
@pytest.mark.parametrize("temperature", [0.0, -1.0, float("inf"), float("nan")])
def test_temperature_must_be_above_zero(divergence, temperature):
    with pytest.raises(InputError, match="temperature .* above 0"):
        divergence(torch.zeros(3, 4), torch.zeros(3, 4), temperature)
