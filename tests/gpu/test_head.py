"""The head's losses as one kernel: those of the plain way, in its memory. Run with `pytest -m gpu tests/gpu`."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from llmkd.losses.chunked_head import head_losses
from llmkd.losses.divergences import DIVERGENCES, Divergence, with_parameters
from llmkd.losses.head_inputs import TeacherHead, Terms, TopK
from llmkd.losses.head_kernels import HeadKernel, takes_in

pytestmark = pytest.mark.gpu
VOCABULARY, WIDTH, TOKENS = 151_936, 512, 700
KERNELS: tuple[HeadKernel, ...] = ("compiled", "triton")
A_SUM = {
    "a sum": with_parameters({"forward_kl": 0.5, "reverse_kl": 0.5}, {}),
    "a sum with top_k": with_parameters({"top_k": 0.5, "tvd": 0.5}, {}),
}
ONE_KERNEL = {
    f"{kernel} {name}": (kernel, divergence)
    for kernel in KERNELS
    for name, divergence in (DIVERGENCES | A_SUM).items()
    if takes_in(kernel, divergence)
}


@pytest.fixture(autouse=True)
def gpu() -> None:
    if not torch.cuda.is_available():
        pytest.fail("this test was asked for by -m gpu, and there is no CUDA device")


def _inputs(dtype: torch.dtype, *, tokens: int = TOKENS, columns: int = VOCABULARY) -> dict[str, Any]:
    torch.manual_seed(0)

    def some(*shape: int) -> Tensor:
        return torch.randn(*shape, device="cuda", dtype=dtype)

    return {
        "states": some(tokens, WIDTH).requires_grad_(),
        "weight": (some(VOCABULARY, WIDTH) / WIDTH**0.5).requires_grad_(),
        "bias": None,
        "teacher": TeacherHead(some(tokens, WIDTH), some(columns, WIDTH) / WIDTH**0.5, None),
        "targets": torch.randint(0, VOCABULARY, (tokens,), device="cuda").masked_fill(
            torch.arange(tokens, device="cuda") % 5 == 0, -100
        ),
        "compared": torch.arange(tokens, device="cuda") % 7 != 0,
    }


def _gradients(inputs: dict[str, Any], terms: Terms, *, chunk: int, kernel: HeadKernel) -> tuple[Tensor, ...]:
    found = head_losses(**inputs, terms=terms, chunk=chunk, kernel=kernel)
    return *found, *torch.autograd.grad(found[0], [inputs["states"], inputs["weight"]])


def _close(ours: Tensor, theirs: Tensor, tolerance: float) -> None:
    assert (ours.float() - theirs.float()).norm() <= tolerance * theirs.float().norm()


@pytest.mark.parametrize(("kernel", "divergence"), ONE_KERNEL.values(), ids=ONE_KERNEL)
@pytest.mark.parametrize(("temperature", "chunk"), [(1.0, 4096), (2.0, 256)])
def test_one_kernel_gives_what_the_operations_give(
    kernel: HeadKernel, divergence: Divergence, temperature: float, chunk: int
) -> None:
    terms = Terms(0.3 / TOKENS, 0.7 / TOKENS, divergence, temperature)
    in_fp32 = kernel == "triton" or divergence is DIVERGENCES["forward_kl"]
    dtypes = {torch.bfloat16: 2e-3} | ({torch.float32: 1e-5} if in_fp32 else {})
    for dtype, tolerance in dtypes.items():
        inputs = _inputs(dtype, columns=VOCABULARY - 64)
        expected = _gradients(inputs, terms, chunk=chunk, kernel="none")
        for ours, theirs in zip(_gradients(inputs, terms, chunk=chunk, kernel=kernel), expected, strict=True):
            _close(ours, theirs, tolerance)


def test_the_triton_kernel_takes_a_stored_top_k() -> None:
    inputs = _inputs(torch.bfloat16)
    log_p = (inputs["teacher"].states.float() @ inputs["teacher"].weight.float().T).log_softmax(-1)
    likeliest = log_p.topk(64)
    inputs["teacher"] = TopK(likeliest.indices.int(), likeliest.values, VOCABULARY)
    terms = Terms(0.3 / TOKENS, 0.7 / TOKENS, DIVERGENCES["forward_kl"], 2.0)
    expected = _gradients(inputs, terms, chunk=256, kernel="none")
    for ours, theirs in zip(_gradients(inputs, terms, chunk=256, kernel="triton"), expected, strict=True):
        _close(ours, theirs, 2e-3)


def test_the_triton_kernel_on_a_student_that_is_its_teacher() -> None:
    """Exactly nothing, also with the device's own division, exponential and logarithm."""
    inputs = _inputs(torch.bfloat16)
    inputs["teacher"] = TeacherHead(inputs["states"].detach(), inputs["weight"].detach(), None)
    for divergence in (divergence for kernel, divergence in ONE_KERNEL.values() if kernel == "triton"):
        _, _, kl, *gradients = _gradients(inputs, Terms(0.0, 1.0, divergence, 1.0), chunk=4096, kernel="triton")
        assert kl == 0 and not any(gradient.any() for gradient in gradients), divergence


@pytest.mark.parametrize("kernel", KERNELS)
def test_one_kernel_holds_no_logits_in_fp32(kernel: HeadKernel) -> None:
    """Beside both models' logits in bf16 and the gradients: nothing of the vocabulary's width."""
    tokens = 4096
    inputs = _inputs(torch.bfloat16, tokens=tokens)
    terms = Terms(1 / tokens, 1 / tokens, DIVERGENCES["forward_kl"], 1.0)
    _gradients(inputs, terms, chunk=tokens, kernel=kernel)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    _gradients(inputs, terms, chunk=tokens, kernel=kernel)
    logits = 2 * tokens * VOCABULARY * 2
    gradients = 2 * 2 * WIDTH * (VOCABULARY + tokens)
    assert torch.cuda.max_memory_allocated() - before < 1.05 * (logits + gradients)
