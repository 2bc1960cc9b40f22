"""The chunked head against whole logits in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from llmkd.divergences import DIVERGENCES
from llmkd.head import TeacherHead, head_losses

N, V, H, HT = 13, 37, 8, 12


def _inputs(dtype: torch.dtype = torch.float64, teacher_columns: int = V, bias: bool = False) -> dict[str, Any]:
    torch.manual_seed(0)
    targets = torch.randint(0, V, (N,))
    targets[::4] = -100
    return {
        "states": torch.randn(N, H, dtype=dtype, requires_grad=True),
        "weight": torch.randn(V, H, dtype=dtype, requires_grad=True),
        "bias": torch.randn(V, dtype=dtype, requires_grad=True) if bias else None,
        "teacher": TeacherHead(torch.randn(N, HT, dtype=dtype), torch.randn(teacher_columns, HT, dtype=dtype), None),
        "targets": targets,
        "compared": torch.arange(N) % 3 != 0,
    }


def _settings(chunk: int, divergence: str = "forward_kl", temperature: float = 2.0) -> dict[str, Any]:
    return dict(ce_scale=0.3, kl_scale=0.7, divergence=DIVERGENCES[divergence], temperature=temperature, chunk=chunk)


def _whole(i: dict[str, Any], divergence: str, temperature: float) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The definition, with whole logits; columns only one side has are masked with -inf there."""
    logits = F.linear(i["states"], i["weight"], i["bias"])
    teacher = F.linear(i["teacher"].states, i["teacher"].weight, i["teacher"].bias)
    ce = F.cross_entropy(logits, i["targets"], ignore_index=-100, reduction="sum")
    shared = min(logits.shape[1], teacher.shape[1])
    wide = max(logits.shape[1], teacher.shape[1])
    mask = torch.arange(wide) >= shared
    ours = F.pad(logits, (0, wide - logits.shape[1])).masked_fill(mask, -torch.inf)
    theirs = F.pad(teacher, (0, wide - teacher.shape[1])).masked_fill(mask, -torch.inf)
    kl = torch.where(i["compared"], DIVERGENCES[divergence](ours, theirs, temperature), 0.0).sum()
    return 0.3 * ce + 0.7 * kl, ce, kl


@pytest.mark.parametrize("chunk", [1, 4, N, 1000])
@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("columns", [V, V - 5, V + 5], ids=["same", "narrower", "wider"])
def test_chunked_is_whole(chunk: int, divergence: str, columns: int) -> None:
    inputs = _inputs(teacher_columns=columns, bias=True)
    leaves = [inputs["states"], inputs["weight"], inputs["bias"]]
    expected = _whole(inputs, divergence, 2.0)
    grads = torch.autograd.grad(expected[0], leaves)
    found = head_losses(**inputs, **_settings(chunk, divergence))
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
    for a, b in zip(torch.autograd.grad(found[0] * 3, leaves), grads, strict=True):  # and it obeys the loss's own scale
        torch.testing.assert_close(a, 3 * b, rtol=1e-11, atol=1e-12)


def test_gradient_is_that_of_finite_differences() -> None:
    i = _inputs()
    direction = [torch.randn_like(i["states"]), torch.randn_like(i["weight"])]

    def at(step: float) -> torch.Tensor:
        moved = {**i, "states": i["states"] + step * direction[0], "weight": i["weight"] + step * direction[1]}
        return head_losses(**moved, **_settings(4))[0]

    grads = torch.autograd.grad(at(0.0), [i["states"], i["weight"]])
    slope = torch.stack([(g * d).sum() for g, d in zip(grads, direction, strict=True)]).sum()
    assert slope.item() == pytest.approx(((at(1e-5) - at(-1e-5)) / 2e-5).item(), rel=1e-7)


def test_same_student_and_teacher_give_no_divergence() -> None:
    i = _inputs()
    teacher = TeacherHead(i["states"].detach(), i["weight"].detach(), None)
    loss, _, kl = head_losses(
        i["states"], i["weight"], None, teacher, torch.full((N,), -100), torch.ones(N, dtype=torch.bool), **_settings(4)
    )
    assert kl == 0
    assert max(g.abs().max() for g in torch.autograd.grad(loss, [i["states"], i["weight"]])) < 1e-14


def test_positions_left_out_change_nothing_even_nan() -> None:
    i = _inputs()
    out = (i["targets"] == -100) & ~i["compared"]
    assert out.any()
    expected = head_losses(**i, **_settings(4))
    i["teacher"].states[out] = torch.nan
    found = head_losses(**i, **_settings(4))
    torch.testing.assert_close(found[2], expected[2], rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_tensor_of_all_tokens_by_vocabulary_ever_exists(dtype: torch.dtype) -> None:
    """Every tensor an operation makes, forward and backward, is counted; the largest with the vocabulary in it is one chunk."""
    seen: set[tuple[int, ...]] = set()

    class Shapes(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = func(*args, **(kwargs or {}))
            seen.update(tuple(t.shape) for t in tree_leaves(out) if isinstance(t, torch.Tensor))
            return out

    i = _inputs(dtype)
    with Shapes():
        loss, _, _ = head_losses(**i, **_settings(4))
        loss.backward()
    assert (4, V) in seen
    assert not [shape for shape in seen if V in shape and max(s for s in (*shape, 0) if s != V) > H + HT]
    assert (N, V) not in seen


def test_bfloat16_sums_are_taken_in_float32() -> None:
    i = _inputs(torch.bfloat16)
    _, ce, kl = head_losses(**i, **_settings(4))
    assert ce.dtype == kl.dtype == torch.float32
    exact = {
        k: v.detach().double() if isinstance(v, torch.Tensor) and v.is_floating_point() else v for k, v in i.items()
    }
    exact["teacher"] = TeacherHead(i["teacher"].states.double(), i["teacher"].weight.double(), None)
    _, ce64, kl64 = _whole(exact, "forward_kl", 2.0)
    assert ce == pytest.approx(ce64.item(), rel=0.01)
    assert kl == pytest.approx(kl64.item(), rel=0.02)
