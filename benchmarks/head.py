"""The head alone: its value and gradients against the products it can't do without, an operation at a time and as one kernel.

python -m benchmarks.head                 4,096 positions of 151,936 logits, at three widths; on a CPU 64 of 8,192, plain
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.measure import synchronise
from benchmarks.tables import table
from llmkd.losses.chunked_head import TeacherHead, Terms, head_losses
from llmkd.losses.divergences import forward_kl

GPU = torch.cuda.is_available()
POSITIONS, VOCABULARY = (4096, 151_936) if GPU else (64, 8192)
WIDTHS = ((4096, 4096), (2560, 2560), (1024, 4096)) if GPU else ((256, 256), (64, 256))
"""(the student's, the teacher's)."""
WAYS = (("plain", False, POSITIONS // 4), ("one kernel", True, POSITIONS // 4), ("one kernel", True, POSITIONS))
WAYS = WAYS if GPU else WAYS[:1]  # llmkd makes no kernel for a CPU
REPEAT = 5


def main() -> None:
    """Print the table."""
    print(f"{torch.cuda.get_device_name() if GPU else 'CPU'}, torch {torch.__version__}, {POSITIONS} positions\n")
    header = ["H, H_t", "products", *(f"{name}, chunk {chunk}" for name, _, chunk in WAYS), "peak, GiB"]
    print(table(header, [row(*widths) for widths in WIDTHS]))


def row(width: int, teacher_width: int) -> list[str]:
    """The products' milliseconds and speed, and each way's share of that speed."""
    torch.manual_seed(0)
    states, weight, theirs, head = (
        some(*shape)
        for shape in ((POSITIONS, width), (VOCABULARY, width), (POSITIONS, teacher_width), (VOCABULARY, teacher_width))
    )
    weight.div_(width**0.5)
    head.div_(teacher_width**0.5)
    targets = torch.randint(0, VOCABULARY, (POSITIONS,), device=states.device)
    everywhere = torch.ones_like(targets, dtype=torch.bool)
    terms = Terms(1 / POSITIONS, 1 / POSITIONS, forward_kl, 1.0)

    def products() -> None:
        logits = states @ weight.T
        for a, b in ((theirs, head.T), (logits, weight), (logits.T, states)):
            torch.mm(a, b)

    def losses(compiled: bool, chunk: int) -> None:
        leaves = [states.detach().requires_grad_(), weight.detach().requires_grad_()]
        teacher = TeacherHead(theirs, head, None)
        loss, *_ = head_losses(
            leaves[0], leaves[1], None, teacher, targets, everywhere, terms, chunk=chunk, compiled=compiled
        )
        torch.autograd.grad(loss, leaves)

    least = seconds(products)
    speed = 2 * VOCABULARY * POSITIONS * (3 * width + teacher_width) / least / 1e12
    shares, peak = [], "-"
    for _, compiled, chunk in WAYS:
        taken = seconds(lambda compiled=compiled, chunk=chunk: losses(compiled, chunk))
        shares.append(f"{least / taken:.0%}")
    if GPU:
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        losses(True, POSITIONS)
        peak = f"{(torch.cuda.max_memory_allocated() - before) / 2**30:.1f}"
    return [
        f"{width}, {teacher_width}",
        f"{least * 1e3:.1f} ms, {speed:.3g} TFLOP/s",
        *shares,
        f"{peak:.1f}" if GPU else "-",
    ]


def some(*shape: int) -> Tensor:
    """Normal numbers in bfloat16."""
    return torch.randn(*shape, device="cuda" if GPU else "cpu", dtype=torch.bfloat16)


def seconds(work: Callable[[], None]) -> float:
    """Of one call, the mean of several after two that warm up."""
    for _ in range(2):
        work()
    repeat = REPEAT if GPU else 1
    synchronise()
    began = time.perf_counter()
    for _ in range(repeat):
        work()
    synchronise()
    return (time.perf_counter() - began) / repeat


if __name__ == "__main__":
    sys.exit(main())
