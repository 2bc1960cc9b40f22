"""The table of divergences against `tests/definitions.py`, and what each must hold at its edges."""

import math
from functools import partial

import pytest
import torch
from torch.distributions import Categorical, kl_divergence
from torch.nn import functional as F

from llmkd.errors import InputError
from llmkd.losses.chunked_head import head_losses
from llmkd.losses.closed_forms import CLOSED_FORMS, closed_form
from llmkd.losses.divergences import (
    DIVERGENCES,
    akl,
    forward_kl,
    head_share,
    jsd,
    mixed,
    parameters,
    reverse_kl,
    skew_kl,
    skew_reverse_kl,
    tvd,
    with_parameters,
)
from llmkd.losses.head_inputs import Terms, TopK
from tests import definitions

every_divergence = pytest.mark.parametrize("divergence", DIVERGENCES.values(), ids=DIVERGENCES.keys())
MASKED = float("-inf")
OTHERS = {"beta": (0.1, 0.9), "skew": (0.01, 0.5), "akl_mu": (0.0, 0.8), "top_k": (1, 5)}
"""Further values of each parameter to test."""
EVERY = [(name, {}) for name in DIVERGENCES] + [
    (name, {key: value}) for name in DIVERGENCES for key in parameters(DIVERGENCES[name]) for value in OTHERS[key]
]
every_setting = pytest.mark.parametrize(("name", "given"), EVERY, ids=lambda value: str(value).replace(" ", ""))
UNBOUNDED = ("forward_kl", "reverse_kl", "akl", "top_k")
"""Those that grow without end as the distributions part."""


def gradients(value, *leaves):
    return torch.autograd.grad(value.sum(), leaves)


def logits(*shape, seed=0, dtype=torch.float32, scale=3.0):
    return (torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * scale).to(dtype)


def by_form(name, given, student, teacher, temperature):
    """The closed form's (value, gradient) as the head uses it."""
    form = closed_form(with_parameters(name, given))
    assert form is not None
    log_q, log_p = ((x / temperature).log_softmax(-1) for x in (student, teacher))
    q = log_q.exp()
    kept = q.clone()
    value, gradient = form(q, log_q, log_p.exp(), log_p)
    assert torch.equal(q, kept)
    return value * temperature**2, gradient * temperature


@every_setting
@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-11), (torch.float32, 1e-5), (torch.bfloat16, 1e-5)]
)
def test_value_and_gradient_are_the_definitions(name, given, temperature, dtype, tolerance):
    student, teacher = logits(6, 40, dtype=dtype).requires_grad_(), logits(6, 40, seed=1, dtype=dtype)
    value = with_parameters(name, given)(student, teacher, temperature)
    assert value.shape == (6,)
    assert value.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    exact = student.detach().double().requires_grad_()
    expected = definitions.divergence(name, exact, teacher, temperature, **given)
    torch.testing.assert_close(value.double(), expected, rtol=tolerance, atol=tolerance)
    (ours,), (theirs,) = gradients(value, student), gradients(expected, exact)
    rough = 1e-2 if dtype == torch.bfloat16 else tolerance  # the gradient is given in the logits' own dtype
    torch.testing.assert_close(ours.double(), theirs, rtol=rough, atol=rough)


@every_setting
@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-11), (torch.float32, 1e-5)])
def test_closed_form_is_the_definition(name, given, temperature, dtype, tolerance):
    student, teacher = logits(6, 40, dtype=dtype), logits(6, 40, seed=1, dtype=dtype)
    value, gradient = by_form(name, given, student, teacher, temperature)
    exact = student.double().requires_grad_()
    expected = definitions.divergence(name, exact, teacher, temperature, **given)
    torch.testing.assert_close(value.double(), expected, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(gradient.double(), gradients(expected, exact)[0], rtol=tolerance, atol=tolerance)


MIXES = [{"forward_kl": 0.5, "reverse_kl": 0.5}, {"jsd": 2.0, "tvd": 0.1, "akl": 1.0, "top_k": 0.3}, {"skew_kl": 3.0}]


@pytest.mark.parametrize("mix", MIXES, ids=lambda mix: "+".join(mix))
@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_a_mix_is_the_weighted_sum_by_autograd_and_by_closed_form(mix, temperature):
    student, teacher = logits(6, 40, dtype=torch.float64).requires_grad_(), logits(6, 40, seed=1, dtype=torch.float64)
    given = {"beta": 0.3} if "jsd" in mix else {}
    expected = torch.zeros((), dtype=student.dtype)
    for name, weight in mix.items():
        parameters = given if name == "jsd" else {}
        expected = expected + weight * definitions.divergence(name, student, teacher, temperature, **parameters)
    value = with_parameters(mix, given)(student, teacher, temperature)
    torch.testing.assert_close(value, expected)
    (slope,) = gradients(expected, student)
    torch.testing.assert_close(gradients(value, student)[0], slope)
    by_closed_form, gradient = by_form(mix, given, student.detach(), teacher, temperature)
    torch.testing.assert_close((by_closed_form, gradient), (expected.detach(), slope))


def test_a_mix_with_a_part_that_has_no_closed_form_has_none():
    assert closed_form(partial(mixed, parts=((forward_kl, 1.0), (lambda s, t, temperature: s.sum(-1), 1.0)))) is None


def test_a_mix_reads_what_one_of_its_parts_reads():
    with pytest.raises(
        InputError, match="loss.skew: forward_kl and jsd does not read it; .*skew_kl or skew_reverse_kl"
    ):
        with_parameters({"forward_kl": 1.0, "jsd": 1.0}, {"skew": 0.2})


def test_every_divergence_of_the_table_has_a_closed_form():
    assert all(closed_form(divergence) is not None for divergence in DIVERGENCES.values())
    assert len(CLOSED_FORMS) == len(DIVERGENCES) + 1  # and that of their weighted sum
    assert closed_form(lambda student, teacher, temperature: student) is None


@pytest.mark.parametrize("direction", ["forward_kl", "reverse_kl"])
@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
def test_both_kls_are_torchs_own(direction, temperature):
    student, teacher = logits(6, 40, dtype=torch.float64), logits(6, 40, seed=1, dtype=torch.float64)
    value = DIVERGENCES[direction](student, teacher, temperature)
    log_q, log_p = F.log_softmax(student / temperature, -1), F.log_softmax(teacher / temperature, -1)
    q, p = Categorical(logits=student / temperature), Categorical(logits=teacher / temperature)
    if direction == "reverse_kl":
        log_q, log_p, q, p = log_p, log_q, p, q
    by_kl_div = F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1)
    torch.testing.assert_close(value, by_kl_div * temperature**2, rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(value, kl_divergence(p, q) * temperature**2, rtol=1e-11, atol=1e-11)


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
    if "akl_mu" in parameters(divergence):  # its share carries no gradient: the same sum with the share held fixed
        share = head_share(
            teacher.detach().div(temperature).softmax(-1), student.detach().div(temperature).softmax(-1), 0.5
        )
        fixed = lambda s, t: share * forward_kl(s, t, temperature) + (1 - share) * reverse_kl(s, t, temperature)  # noqa: E731
        assert torch.autograd.gradcheck(fixed, (student, teacher))
        for ours, theirs in zip(
            gradients(divergence(student, teacher, temperature), student, teacher),
            gradients(fixed(student, teacher), student, teacher),
            strict=True,
        ):
            torch.testing.assert_close(ours, theirs)
        return
    assert torch.autograd.gradcheck(lambda s, t: divergence(s, t, temperature), (student, teacher))


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_forward_gradient_is_temperature_times_q_minus_p(temperature):
    student, teacher = logits(4, 9, dtype=torch.float64).requires_grad_(), logits(4, 9, seed=1, dtype=torch.float64)
    (gradient,) = gradients(forward_kl(student, teacher, temperature), student)
    expected = temperature * ((student / temperature).softmax(-1) - (teacher / temperature).softmax(-1))
    torch.testing.assert_close(gradient, expected)


CURVATURE = {
    "forward_kl": 1,
    "reverse_kl": 1,
    "jsd": 0.25,
    "skew_kl": 0.81,
    "skew_reverse_kl": 0.81,
    "akl": 1,
    "tvd": None,
    "top_k": 1,  # 64 of 9 tokens are all of them
}


@pytest.mark.parametrize("name", DIVERGENCES)
def test_high_temperature_keeps_the_gradients_size(name):
    """What temperature² is for: all tend to half the mean square of the centred difference, times the share that is not skewed.

    tvd is of first order and grows with the temperature instead.
    """
    student, teacher = logits(4, 9, dtype=torch.float64), logits(4, 9, seed=1, dtype=torch.float64)
    gap = student - teacher
    centred = gap - gap.mean(-1, keepdim=True)
    curvature = CURVATURE[name]
    limit = centred.abs().mean(-1) / 2 * 1e4 if curvature is None else curvature * centred.square().mean(-1) / 2
    torch.testing.assert_close(DIVERGENCES[name](student, teacher, 1e4), limit, rtol=1e-2, atol=0)


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


@every_setting
@pytest.mark.parametrize("masked", [False, True])
def test_equal_distributions_give_a_closed_form_exactly_nothing(name, given, masked):
    log_p = logits(6, 1000).log_softmax(-1)
    if masked:  # the head writes the least finite number for -inf
        log_p[:, -100:] = torch.finfo(log_p.dtype).min
    form = closed_form(with_parameters(name, given))
    assert form is not None
    value, gradient = form(log_p.exp(), log_p.clone(), log_p.exp(), log_p.clone())
    assert not value.any() and not gradient.any()


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
    for side, pair in (("teacher", (student, zeroed[1])), ("student", (zeroed[0], teacher))):
        if divergence in (forward_kl, reverse_kl) and (divergence is forward_kl) != (side == "teacher"):
            continue  # infinite: the next test
        if "akl_mu" in parameters(divergence):
            continue  # has one of the two infinite terms either way
        if "top_k" in parameters(divergence) and side == "student":
            continue  # as forward KL
        value = divergence(*pair, 1.0)
        assert value.isfinite().all() and (value > 0).all() and gradients(value, student)[0].isfinite().all()


def test_a_zero_of_the_second_distribution_alone_is_infinite():
    full, blocked = torch.zeros(1, 3), torch.tensor([[0.0, 0.0, MASKED]])
    assert forward_kl(blocked, full, 1.0).isposinf().all()
    assert reverse_kl(full, blocked, 1.0).isposinf().all()


@pytest.mark.parametrize("name", DIVERGENCES)
def test_probabilities_too_small_for_float32_are_finite(name):
    student, teacher = torch.tensor([[0.0, 500.0]]).requires_grad_(), torch.tensor([[500.0, 0.0]])
    value = DIVERGENCES[name](student, teacher, 1.0)
    expected = definitions.divergence(name, student, teacher, 1.0).item()
    assert value.item() == pytest.approx(expected)
    assert (expected == pytest.approx(500)) == (name in UNBOUNDED)
    assert gradients(value, student)[0].isfinite().all()
    by_formula, gradient = by_form(name, {}, student.detach(), teacher, 1.0)
    assert by_formula.item() == pytest.approx(expected) and gradient.isfinite().all()


def test_the_two_directions_mirror_each_other():
    student, teacher = logits(4, 9), logits(4, 9, seed=1)
    torch.testing.assert_close(forward_kl(student, teacher, 2.0), reverse_kl(teacher, student, 2.0))
    assert not torch.allclose(forward_kl(student, teacher, 2.0), reverse_kl(student, teacher, 2.0))


def test_jsd_is_symmetric_at_one_half_and_bounded_by_log_two():
    student, teacher = logits(8, 9, scale=9.0), logits(8, 9, seed=1, scale=9.0)
    value = jsd(student, teacher, 1.0, beta=0.5)
    torch.testing.assert_close(value, jsd(teacher, student, 1.0, beta=0.5))
    assert (value < math.log(2)).all() and (value > 0).all()
    torch.testing.assert_close(jsd(student, teacher, 1.0, beta=0.2), jsd(teacher, student, 1.0, beta=0.8))
    assert not torch.allclose(jsd(student, teacher, 1.0, beta=0.2), jsd(student, teacher, 1.0, beta=0.8))


@pytest.mark.parametrize(
    ("name", "given", "limit"),
    [
        ("skew_kl", {"skew": 0.0}, "forward_kl"),
        ("skew_reverse_kl", {"skew": 0.0}, "reverse_kl"),
        ("jsd", {"beta": 0.0}, "forward_kl"),
        ("jsd", {"beta": 1.0}, "reverse_kl"),
    ],
)
def test_at_its_end_a_divergence_is_the_kl_it_generalises(name, given, limit):
    student, teacher = logits(8, 9).requires_grad_(), logits(8, 9, seed=1)
    value, expected = with_parameters(name, given)(student, teacher, 2.0), DIVERGENCES[limit](student, teacher, 2.0)
    torch.testing.assert_close(value, expected)
    torch.testing.assert_close(gradients(value, student), gradients(expected, student))
    theirs = by_form(limit, {}, student.detach(), teacher, 2.0)
    torch.testing.assert_close(by_form(name, given, student.detach(), teacher, 2.0), theirs)


def test_a_small_skew_is_near_the_kl():
    student, teacher = (
        logits(8, 9, dtype=torch.float64, scale=1.0),
        logits(8, 9, seed=1, dtype=torch.float64, scale=1.0),
    )
    for skewed, limit in ((skew_kl, forward_kl), (skew_reverse_kl, reverse_kl)):
        near = [
            (skewed(student, teacher, 1.0, skew=s) - limit(student, teacher, 1.0)).abs().max() for s in (1e-3, 1e-6)
        ]
        assert near[1] < near[0] / 100 and near[1] < 1e-3


def test_tvd_lies_between_zero_and_one():
    value = tvd(logits(64, 9, scale=9.0), logits(64, 9, seed=1, scale=9.0), 1.0)
    assert (value > 0).all() and (value <= 1).all() and value.max() > 0.9


def test_akl_shares_by_what_lies_in_the_teachers_head():
    """p = (0.4, 0.3, 0.2, 0.1): at μ = 0.5 the head is the first token, at 0.7 the first two."""
    teacher = torch.tensor([[0.1, 0.4, 0.2, 0.3]], dtype=torch.float64)
    student = torch.tensor([[0.25, 0.25, 0.25, 0.25]], dtype=torch.float64)  # gaps 0.15, 0.15, 0.05, 0.05
    assert head_share(teacher, student, 0.5).item() == pytest.approx(0.15 / 0.4)
    assert head_share(teacher, student, 0.7 + 1e-9).item() == pytest.approx(0.20 / 0.4)
    assert head_share(teacher, student, 0.0).item() == pytest.approx(0.15 / 0.4)  # the first token always
    assert head_share(teacher, teacher, 0.5).item() == 0
    share = 0.15 / 0.4
    kls = forward_kl(student.log(), teacher.log(), 1.0), reverse_kl(student.log(), teacher.log(), 1.0)
    found = akl(student.log(), teacher.log(), 1.0, akl_mu=0.5)
    torch.testing.assert_close(found, share * kls[0] + (1 - share) * kls[1])


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


@pytest.mark.parametrize("value", [-0.1, 1.5, float("nan")])
@pytest.mark.parametrize("name", [name for name in DIVERGENCES if parameters(DIVERGENCES[name]) and name != "top_k"])
def test_a_parameter_out_of_its_range_is_refused(name, value):
    (key,) = parameters(DIVERGENCES[name])
    with pytest.raises(InputError, match=f"{key} .*from 0 to 1"):
        with_parameters(name, {key: value})(torch.zeros(3, 4), torch.zeros(3, 4), 1.0)


def test_a_parameter_is_given_to_the_divergence_that_reads_it_alone():
    assert parameters(with_parameters("jsd", {"beta": 0.3, "skew": None})) == {"beta": 0.3}
    assert with_parameters("tvd", {"beta": None}) is tvd
    with pytest.raises(
        InputError, match=r"loss\.beta: skew_kl does not read it; leave it out, or write divergence: jsd$"
    ):
        with_parameters("skew_kl", {"beta": 0.3})
    with pytest.raises(InputError, match=r"loss\.skew: forward_kl .* skew_kl or skew_reverse_kl"):
        with_parameters("forward_kl", {"skew": 0.3})


# ---------------------------------------------------------------------------------------------------------------------
# A teacher known by its top k


def test_top_k_of_more_tokens_than_there_are_is_forward_kl():
    student, teacher = logits(8, 9), logits(8, 9, seed=1)
    torch.testing.assert_close(DIVERGENCES["top_k"](student, teacher, 2.0), forward_kl(student, teacher, 2.0))
    with pytest.raises(InputError, match="top_k 0: write a whole number from 1 up"):
        with_parameters("top_k", {"top_k": 0})(student, teacher, 1.0)


def top_k(teacher, k):
    log_probabilities, ids = teacher.log_softmax(-1).topk(k)
    return ids, log_probabilities


def top_k_kl(student, ids, log_probabilities, temperature):
    """What the head makes of a teacher's top k, token by token."""
    identity, nowhere, everywhere = torch.eye(student.shape[1]).to(student), torch.tensor([-100]), torch.tensor([True])
    terms = Terms(0.0, 1.0, forward_kl, temperature)
    losses = [
        head_losses(row[None], identity, None, TopK(i[None], p[None], len(row)), nowhere, everywhere, terms, chunk=1)[0]
        for row, i, p in zip(student, ids, log_probabilities, strict=True)
    ]
    return torch.stack(losses)


@pytest.mark.parametrize("k", [1, 5, 39, 40])
@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_top_k_is_the_definition(k, temperature):
    student, teacher = logits(6, 40, dtype=torch.float64).requires_grad_(), logits(6, 40, seed=1, dtype=torch.float64)
    value = top_k_kl(student, *top_k(teacher, k), temperature)
    expected = definitions.top_k_kl(student, *top_k(teacher, k), temperature)
    torch.testing.assert_close(value, expected, rtol=1e-7, atol=1e-7)
    torch.testing.assert_close(gradients(value, student), gradients(expected, student), rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_top_k_of_the_whole_vocabulary_is_forward_kl(temperature):
    student, teacher = logits(6, 40).requires_grad_(), logits(6, 40, seed=1)
    value = top_k_kl(student, *top_k(teacher, 40), temperature)
    expected = forward_kl(student, teacher, temperature)
    torch.testing.assert_close(value, expected)
    torch.testing.assert_close(gradients(value, student), gradients(expected, student), rtol=1e-4, atol=1e-5)


def test_top_k_at_temperature_one_is_the_kl_of_what_is_known():
    """Merging columns can only lose: more of them known, the nearer to the whole KL, from below."""
    student, teacher = logits(6, 40, dtype=torch.float64), logits(6, 40, seed=1, dtype=torch.float64)
    values = [top_k_kl(student, *top_k(teacher, k), 1.0) for k in (1, 5, 20, 40)]
    assert all((less <= more + 1e-12).all() for less, more in zip(values, values[1:], strict=False))
    torch.testing.assert_close(values[-1], forward_kl(student, teacher, 1.0))


def test_top_k_of_equal_distributions_is_zero():
    student = logits(6, 1000).requires_grad_()
    value = top_k_kl(student, *top_k(student.detach(), 50), 1.0)
    assert value.abs().max() < 1e-6 and gradients(value, student)[0].abs().max() < 1e-6


def test_top_k_with_all_the_mass_known_is_finite():
    """A stored top k may add up to a little over 1: nothing is left for the rest, and it adds nothing."""
    student = logits(2, 5).requires_grad_()
    log_probabilities = torch.tensor([[0.5, 0.5], [0.6, 0.4000001]]).log()
    value = top_k_kl(student, torch.tensor([[0, 1], [3, 2]]), log_probabilities, 2.0)
    assert value.isfinite().all() and gradients(value, student)[0].isfinite().all()
