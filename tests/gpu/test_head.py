"""The head's losses as one kernel: those of the plain way, in its memory. Run with `pytest -m gpu tests/gpu`."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from llmkd.losses import compiled_rows
from llmkd.losses.chunked_head import TeacherHead, Terms, head_losses
from llmkd.losses.divergences import DIVERGENCES, Divergence, with_parameters

pytestmark = pytest.mark.gpu
VOCABULARY, WIDTH, TOKENS = 151_936, 512, 700
ONE_KERNEL = {name: d for name, d in DIVERGENCES.items() if compiled_rows.reads_row_by_row(d)} | {
    "a sum": with_parameters({"forward_kl": 0.5, "reverse_kl": 0.5}, {})
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


def _gradients(inputs: dict[str, Any], terms: Terms, *, chunk: int, compiled: bool) -> tuple[Tensor, ...]:
    found = head_losses(**inputs, terms=terms, chunk=chunk, compiled=compiled)
    return *found, *torch.autograd.grad(found[0], [inputs["states"], inputs["weight"]])


def _close(ours: Tensor, theirs: Tensor, tolerance: float) -> None:
    assert (ours.float() - theirs.float()).norm() <= tolerance * theirs.float().norm()


@pytest.mark.parametrize("divergence", ONE_KERNEL.values(), ids=ONE_KERNEL)
@pytest.mark.parametrize(("temperature", "chunk"), [(1.0, 4096), (2.0, 256)])
def test_one_kernel_gives_what_the_operations_give(divergence: Divergence, temperature: float, chunk: int) -> None:
    terms = Terms(0.3 / TOKENS, 0.7 / TOKENS, divergence, temperature)
    dtypes = {torch.bfloat16: 2e-3} | ({torch.float32: 1e-5} if divergence is DIVERGENCES["forward_kl"] else {})
    for dtype, tolerance in dtypes.items():
        inputs = _inputs(dtype, columns=VOCABULARY - 64)
        expected = _gradients(inputs, terms, chunk=chunk, compiled=False)
        for ours, theirs in zip(_gradients(inputs, terms, chunk=chunk, compiled=True), expected, strict=True):
            _close(ours, theirs, tolerance)


def test_one_kernel_holds_no_logits_in_fp32() -> None:
    """Beside both models' logits in bf16 and the gradients: nothing of the vocabulary's width."""
    tokens = 4096
    inputs = _inputs(torch.bfloat16, tokens=tokens)
    terms = Terms(1 / tokens, 1 / tokens, DIVERGENCES["forward_kl"], 1.0)
    _gradients(inputs, terms, chunk=tokens, compiled=True)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    _gradients(inputs, terms, chunk=tokens, compiled=True)
    logits = 2 * tokens * VOCABULARY * 2
    gradients = 2 * 2 * WIDTH * (VOCABULARY + tokens)
    assert torch.cuda.max_memory_allocated() - before < 1.05 * (logits + gradients)
