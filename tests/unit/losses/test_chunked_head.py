"""The chunked head against whole logits in float64."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from llmkd.losses import chunked_head, compiled_rows
from llmkd.losses.chunked_head import head_losses
from llmkd.losses.divergences import DIVERGENCES, with_parameters
from llmkd.losses.head_inputs import TeacherHead, Terms, TopK
from tests import definitions
from tests.tensor_bytes import TensorBytes

N, V, H, HT = 13, 37, 8, 12


def _inputs(dtype: torch.dtype = torch.float64, teacher_columns: int = V, bias: bool = False) -> dict[str, Any]:
    torch.manual_seed(0)
    targets = torch.randint(0, V, (N,))
    targets[::4] = -100
    return {
        # of a size that gives logits of about 1: larger ones are themselves rounded by more than the tolerances below
        "states": (torch.randn(N, H) * 0.4).to(dtype).requires_grad_(),
        "weight": torch.randn(V, H, dtype=dtype, requires_grad=True),
        "bias": torch.randn(V, dtype=dtype, requires_grad=True) if bias else None,
        "teacher": TeacherHead(
            (torch.randn(N, HT) * 0.4).to(dtype), torch.randn(teacher_columns, HT, dtype=dtype), None
        ),
        "targets": targets,
        "compared": torch.arange(N) % 3 != 0,
    }


def _settings(chunk: int, divergence: str = "forward_kl", temperature: float = 2.0) -> dict[str, Any]:
    return dict(terms=Terms(0.3, 0.7, DIVERGENCES[divergence], temperature), chunk=chunk)


def _whole(i: dict[str, Any], divergence: str, temperature: float) -> tuple[Tensor, Tensor, Tensor]:
    """The definition, with whole logits in float64; columns only one side has are masked with -inf there."""
    logits = F.linear(i["states"].double(), i["weight"].double(), None if i["bias"] is None else i["bias"].double())
    teacher = F.linear(i["teacher"].states.double(), i["teacher"].weight.double())
    ce = F.cross_entropy(logits, i["targets"], ignore_index=-100, reduction="sum")
    shared = min(logits.shape[1], teacher.shape[1])
    wide = max(logits.shape[1], teacher.shape[1])
    mask = torch.arange(wide) >= shared
    ours = F.pad(logits, (0, wide - logits.shape[1])).masked_fill(mask, -torch.inf)
    theirs = F.pad(teacher, (0, wide - teacher.shape[1])).masked_fill(mask, -torch.inf)
    kl = definitions.divergence(divergence, ours, theirs, temperature)[i["compared"]].sum()
    return 0.3 * ce + 0.7 * kl, ce, kl


def _close(found: Tensor, expected: Tensor, tolerance: float) -> None:
    """Within `tolerance` of the largest entry."""
    assert (found.double() - expected.double()).abs().max() <= tolerance * max(expected.abs().max().item(), 1e-30)


@pytest.fixture(params=["few rows at once", "one chunk at once", "for one kernel"])
def at_once(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The work within a chunk in slices of two rows and a remainder, in one, or by the function that GPUs compile (here not compiled)."""
    if request.param == "few rows at once":
        monkeypatch.setitem(chunked_head.ELEMENTS_AT_ONCE, "cpu", 2 * V + 1)
    if request.param == "for one kernel":
        monkeypatch.setattr(compiled_rows, "_compile", _not_compiled)
        monkeypatch.setattr(compiled_rows, "_COMPILED", {})
        monkeypatch.setattr(chunked_head, "head_losses", functools.partial(head_losses, kernel="compiled"))


def _not_compiled(form: Any) -> Any:
    return torch.no_grad()(functools.partial(compiled_rows.rows_in_place, form=form))


@pytest.mark.usefixtures("at_once")
@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("columns", [V, V - 5, V + 5], ids=["same", "narrower", "wider"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-6)])
def test_chunked_is_whole(
    divergence: str, temperature: float, columns: int, dtype: torch.dtype, tolerance: float
) -> None:
    inputs = _inputs(dtype, teacher_columns=columns, bias=True)
    leaves = [inputs["states"], inputs["weight"], inputs["bias"]]
    expected = _whole(inputs, divergence, temperature)
    grads = torch.autograd.grad(expected[0], leaves)
    for chunk in (1, 5, 1000):
        found = chunked_head.head_losses(**inputs, **_settings(chunk, divergence, temperature))
        for a, b in zip(found, expected, strict=True):
            assert a.dtype == dtype
            _close(a, b, tolerance)
        # and it obeys the loss's own scale
        for a, b in zip(torch.autograd.grad(found[0] * 3, leaves), grads, strict=True):
            assert a.dtype == dtype
            _close(a, 3 * b, tolerance)


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_chunked_in_bfloat16_is_whole_up_to_its_rounding(divergence: str, temperature: float) -> None:
    """Logits and products are rounded to 8 bits, sums are not: as far from float64 as a whole bfloat16 head is, or nearer."""
    inputs = _inputs(torch.bfloat16)
    leaves = [inputs["states"], inputs["weight"]]
    expected = _whole(inputs, divergence, temperature)
    grads = torch.autograd.grad(expected[0], leaves)
    for chunk in (4, 1000):
        found = head_losses(**inputs, **_settings(chunk, divergence, temperature))
        for a, b in zip(found, expected, strict=True):
            assert a.dtype == torch.float32
            _close(a, b, 5e-3)
        for a, b in zip(torch.autograd.grad(found[0], leaves), grads, strict=True):
            assert a.dtype == torch.bfloat16
            _close(a, b, 1e-2)


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("columns", [V, V - 5, V + 5])
def test_the_closed_forms_are_autograds(divergence: str, temperature: float, columns: int) -> None:
    """A divergence that the head does not know goes through autograd; the same one that it knows must come out the same."""
    i = _inputs(teacher_columns=columns)
    leaves = [i["states"], i["weight"]]
    settings = _settings(4, divergence, temperature)
    unknown = {**settings, "terms": Terms(0.3, 0.7, lambda s, t, by: DIVERGENCES[divergence](s, t, by), temperature)}
    known, by_autograd = head_losses(**i, **settings), head_losses(**i, **unknown)
    torch.testing.assert_close(known, by_autograd, rtol=1e-11, atol=1e-11)
    theirs = torch.autograd.grad(by_autograd[0], leaves)
    torch.testing.assert_close(torch.autograd.grad(known[0], leaves), theirs, rtol=1e-11, atol=1e-12)


def test_a_column_at_minus_infinity_on_both_sides_changes_nothing() -> None:
    """A model may shut out padding tokens by its head's bias."""
    i = _inputs(bias=True)
    i["targets"].clamp_(max=V - 4)
    shut = torch.zeros(V, dtype=torch.float64).index_fill(0, torch.arange(V - 3, V), -torch.inf)
    i["bias"] = (i["bias"].detach() + shut).requires_grad_()
    i["teacher"] = TeacherHead(i["teacher"].states, i["teacher"].weight, shut)
    short = {**i, "weight": i["weight"][:-3], "bias": i["bias"][:-3].detach().requires_grad_()}
    short["teacher"] = TeacherHead(i["teacher"].states, i["teacher"].weight[:-3], None)
    for divergence in DIVERGENCES:
        for temperature in (1.0, 2.0):
            found, expected = (head_losses(**x, **_settings(4, divergence, temperature)) for x in (i, short))
            torch.testing.assert_close(found, expected)
            grads = [torch.autograd.grad(x[0], i["states"]) for x in (found, expected)]
            torch.testing.assert_close(*grads)


@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl"])
def test_a_column_that_one_side_alone_shuts_out_is_infinite(divergence: str) -> None:
    """As the definition says; a large finite number would pass the check of the loss."""
    i = _inputs(bias=True)
    i["targets"].clamp_(max=V - 4)
    shut = torch.zeros(V, dtype=torch.float64).index_fill(0, torch.arange(V - 3, V), -torch.inf)
    if divergence == "forward_kl":
        i["bias"] = (i["bias"].detach() + shut).requires_grad_()
    else:
        i["teacher"] = TeacherHead(i["teacher"].states, i["teacher"].weight, shut)
    loss, ce, kl = head_losses(**i, **_settings(4, divergence, 2.0))
    assert kl.isposinf() and loss.isposinf() and ce.isfinite()


@pytest.mark.parametrize("stored", [True, False], ids=["a stored top k", "of the teacher's head"])
def test_a_student_without_all_of_the_rest_is_infinite(stored: bool) -> None:
    """The bucket beside the top k has mass on the teacher's side and none on the student's; what is only tiny stays finite."""
    i = _inputs(torch.float32, bias=True)
    i["states"] = i["states"].detach()[:1].requires_grad_()
    i["targets"], i["compared"] = torch.tensor([-100]), torch.tensor([True])
    log_p = (i["teacher"].states[:1] @ i["teacher"].weight.T).log_softmax(-1)
    ids = log_p.topk(4).indices
    i["teacher"] = TeacherHead(i["teacher"].states[:1], i["teacher"].weight, None)
    if stored:
        i["teacher"] = TopK(ids, log_p.gather(-1, ids), V)
    terms = Terms(0.0, 1.0, with_parameters("top_k", {"top_k": 4}), 1.0)
    kept = torch.zeros(V, dtype=torch.bool).index_fill(0, ids[0], True)
    for shift, infinite in ((-torch.inf, True), (-300.0, False), (0.0, False)):
        shifted = {**i, "bias": torch.where(kept, i["bias"].detach(), i["bias"].detach() + shift).requires_grad_()}
        loss, _, kl = head_losses(**shifted, terms=terms, chunk=4)
        assert kl.isposinf() == infinite and kl.isfinite() != infinite, shift
        assert all(g.isfinite().all() for g in torch.autograd.grad(loss, [i["states"], i["weight"], shifted["bias"]]))
    whole = {**i, "teacher": TopK(torch.arange(V)[None], log_p, V)} if stored else i  # nothing is left for a bucket
    terms = Terms(0.0, 1.0, with_parameters("top_k", {"top_k": V}), 1.0)
    assert head_losses(**whole, terms=terms, chunk=4)[2].isfinite()


def test_a_token_without_mass_among_the_top_k_adds_nothing() -> None:
    """K = V: the divergence is forward KL itself, of a teacher that shuts two tokens out."""
    i = _inputs()
    shut = torch.zeros(V, dtype=torch.float64).index_fill(0, torch.arange(2), -torch.inf)
    whole = TeacherHead(i["teacher"].states, i["teacher"].weight, shut)
    log_p = (whole.states @ whole.weight.T + shut).log_softmax(-1)
    top_k = TopK(torch.arange(V).expand(len(log_p), V), log_p, V)
    results = [
        head_losses(**{**i, "teacher": teacher}, **_settings(4, "forward_kl", 1.0)) for teacher in (top_k, whole)
    ]
    torch.testing.assert_close(*results)
    torch.testing.assert_close(*(torch.autograd.grad(loss, i["states"]) for loss, *_ in results))


def test_gradient_is_that_of_finite_differences() -> None:
    i = _inputs()
    direction = [torch.randn_like(i["states"]), torch.randn_like(i["weight"])]

    def at(step: float) -> torch.Tensor:
        moved = {**i, "states": i["states"] + step * direction[0], "weight": i["weight"] + step * direction[1]}
        return head_losses(**moved, **_settings(4))[0]

    grads = torch.autograd.grad(at(0.0), [i["states"], i["weight"]])
    slope = torch.stack([(g * d).sum() for g, d in zip(grads, direction, strict=True)]).sum()
    assert slope.item() == pytest.approx(((at(1e-5) - at(-1e-5)) / 2e-5).item(), rel=1e-7)


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_same_student_and_teacher_give_no_divergence(divergence: str, temperature: float, dtype: torch.dtype) -> None:
    i = _inputs(dtype)
    teacher = TeacherHead(i["states"].detach(), i["weight"].detach(), None)
    nothing, everywhere = torch.full((N,), -100), torch.ones(N, dtype=torch.bool)
    settings = _settings(4, divergence, temperature)
    loss, _, kl = head_losses(i["states"], i["weight"], None, teacher, nothing, everywhere, **settings)
    assert kl == 0 and loss == 0
    assert not any(g.any() for g in torch.autograd.grad(loss, [i["states"], i["weight"]]))


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_positions_left_out_change_nothing_even_nan(divergence: str) -> None:
    """NaN in both sides' states where neither part counts, and in the teacher's where only the divergence does not."""
    i = _inputs()
    out = (i["targets"] == -100) & ~i["compared"]
    assert out.any() and (~i["compared"] & ~out).any()
    leaves = [i["states"], i["weight"]]
    expected = head_losses(**i, **_settings(4, divergence))
    grads = torch.autograd.grad(expected[0], leaves)
    i["teacher"].states[~i["compared"]] = torch.nan
    with torch.no_grad():
        i["states"][out] = torch.nan
    found = head_losses(**i, **_settings(4, divergence))
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    torch.testing.assert_close(torch.autograd.grad(found[0], leaves), grads, rtol=0, atol=0)
    assert not grads[0][out].any()


def test_positions_left_out_are_those_that_are_not_there() -> None:
    """The sums of the positions that count, with the others between them or without."""
    i = _inputs()
    there = (i["targets"] != -100) | i["compared"]
    teacher = TeacherHead(i["teacher"].states[there], i["teacher"].weight, None)
    fewer = {**i, "teacher": teacher, **{k: i[k][there] for k in ("states", "targets", "compared")}}
    torch.testing.assert_close(head_losses(**fewer, **_settings(4)), head_losses(**i, **_settings(4)))


def test_no_positions_at_all_give_zero_and_a_gradient_of_zeros() -> None:
    """A rank whose rows have nothing to train still takes part in the gradient's reduction."""
    i = _inputs()
    teacher = TeacherHead(i["teacher"].states[:0], i["teacher"].weight, None)
    none = {**i, "teacher": teacher, **{k: i[k][:0] for k in ("states", "targets", "compared")}}
    loss, ce, kl = head_losses(**none, **_settings(4))
    assert loss == ce == kl == 0
    grads = torch.autograd.grad(loss, [none["states"], i["weight"]])
    assert grads[0].shape == (0, H) and not grads[1].any()


def test_a_frozen_head_gets_no_gradient() -> None:
    i = _inputs()
    loss, _, _ = head_losses(**{**i, "weight": i["weight"].detach()}, **_settings(4))
    expected = torch.autograd.grad(head_losses(**i, **_settings(4))[0], i["states"])
    torch.testing.assert_close(torch.autograd.grad(loss, i["states"]), expected)


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_tensor_of_all_tokens_by_vocabulary_ever_exists(dtype: torch.dtype, divergence: str) -> None:
    """Every tensor an operation makes, forward and backward, is counted; the largest with the vocabulary in it is one chunk."""
    i = _inputs(dtype)
    with TensorBytes() as made:
        loss, _, _ = head_losses(**i, **_settings(4, divergence))
        loss.backward()
    rows = {shape.numel() // V for shape in made.shapes if V in shape} - {H, HT}
    assert max(rows) == 4 < N
    assert all(shape.numel() < N * V for shape in made.shapes)  # of whatever shape


def test_the_count_of_tensors_would_see_whole_logits() -> None:
    i = _inputs()
    with TensorBytes() as made:
        _whole(i, "forward_kl", 1.0)[0].backward()
    assert torch.Size((N, V)) in made.shapes


def test_bfloat16_sums_are_taken_in_float32() -> None:
    """4096 equal terms: in bfloat16 their sum would stop growing at 256 times a term."""
    one = {k: v[1:2].detach() for k, v in _inputs(torch.bfloat16).items() if k in ("states", "targets", "compared")}
    i = _inputs(torch.bfloat16)
    teacher = TeacherHead(i["teacher"].states[1:2], i["teacher"].weight, None)
    single = head_losses(one["states"], i["weight"], None, teacher, one["targets"], one["compared"], **_settings(512))
    many = {k: v.expand(4096, *v.shape[1:]) for k, v in one.items()}
    teacher = TeacherHead(teacher.states.expand(4096, HT), i["teacher"].weight, None)
    total = head_losses(many["states"], i["weight"], None, teacher, many["targets"], many["compared"], **_settings(512))
    for a, b in zip(total, single, strict=True):
        assert a.item() == pytest.approx(4096 * b.item(), rel=1e-5) and a > 0
