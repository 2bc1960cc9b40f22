"""The head alone: its value and gradients against the products it can't do without, an operation at a time and by each kernel.

python -m benchmarks.head                      4,096 positions of 151,936 logits, at three widths; on a CPU 64 of 8,192, plain
python -m benchmarks.head --divergence jsd     another divergence than forward KL
python -m benchmarks.head --count              launches and bytes of all but the products, counted; needs no GPU
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.head_counts import counted
from benchmarks.measure import synchronise
from benchmarks.tables import table
from llmkd.losses.chunked_head import head_losses
from llmkd.losses.divergences import DIVERGENCES
from llmkd.losses.head_inputs import TeacherHead, Terms
from llmkd.losses.head_kernels import HeadKernel, takes_in

GPU = torch.cuda.is_available()
POSITIONS, VOCABULARY = (4096, 151_936) if GPU else (64, 8192)
WIDTHS = ((4096, 4096), (2560, 2560), (1024, 4096)) if GPU else ((256, 256), (64, 256))
"""(the student's, the teacher's)."""
WAYS: tuple[tuple[HeadKernel, int], ...] = (
    ("none", POSITIONS // 4),
    ("compiled", POSITIONS // 4),
    ("compiled", POSITIONS),
    ("triton", POSITIONS // 4),
    ("triton", POSITIONS),
)
"""(`train.head_kernel`, `train.head_chunk`)."""
REPEAT = 5


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--divergence", choices=list(DIVERGENCES), default="forward_kl")
    parser.add_argument("--count", action="store_true", help="launches and bytes in place of times")
    given = parser.parse_args()
    if given.count:
        print(counted())
        return
    print(
        f"{torch.cuda.get_device_name() if GPU else 'CPU'}, torch {torch.__version__}, {POSITIONS} positions, {given.divergence}\n"
    )
    divergence = DIVERGENCES[given.divergence]
    # llmkd runs no kernel on a CPU
    ways = [way for way in WAYS if way[0] == "none" or (GPU and takes_in(way[0], divergence))]
    header = ["H, H_t", "products", *(f"{kernel}, chunk {chunk}" for kernel, chunk in ways), "peak of the last, GiB"]
    terms = Terms(1 / POSITIONS, 1 / POSITIONS, divergence, 1.0)
    print(table(header, [row(*widths, terms, ways) for widths in WIDTHS]))


def row(width: int, teacher_width: int, terms: Terms, ways: list[tuple[HeadKernel, int]]) -> list[str]:
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

    def products() -> None:
        logits = states @ weight.T
        for a, b in ((theirs, head.T), (logits, weight), (logits.T, states)):
            torch.mm(a, b)

    def losses(kernel: HeadKernel, chunk: int) -> None:
        leaves = [states.detach().requires_grad_(), weight.detach().requires_grad_()]
        teacher = TeacherHead(theirs, head, None)
        loss, *_ = head_losses(
            leaves[0], leaves[1], None, teacher, targets, everywhere, terms, chunk=chunk, kernel=kernel
        )
        torch.autograd.grad(loss, leaves)

    least = seconds(products)
    speed = 2 * VOCABULARY * POSITIONS * (3 * width + teacher_width) / least / 1e12
    shares = [f"{least / seconds(lambda way=way: losses(*way)):.0%}" for way in ways]
    peak = "-"
    if GPU:
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        losses(*ways[-1])
        peak = f"{(torch.cuda.max_memory_allocated() - before) / 2**30:.1f}"
    return [f"{width}, {teacher_width}", f"{least * 1e3:.1f} ms, {speed:.3g} TFLOP/s", *shares, peak]


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
