"""The linear maps from a student's state to the teacher's width that open a stepping stone, and how they start.

A pre-norm block adds to the state it gets, so a stone's state must have the size and the directions of the teacher's: a smaller one would
be lost in what the teacher's blocks add, a larger one would hide it. So connectors start at the least squares fit of the teacher's states
to the student's on a few batches.
"""

from __future__ import annotations

import contextlib
import functools
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from llmkd.data.batches import Batch
from llmkd.distributed.engines import overwrite
from llmkd.distributed.ranks import World, sum_tensor
from llmkd.models.parts import output_state
from llmkd.student.passes import NO_LOSS
from llmkd.teachers.base import Teacher

log = logging.getLogger("llmkd")

RIDGE = 1e-8
"""A share of the mean square of the student's states. It keeps a connector at its start in directions that no state has."""


def make_connectors(pairs: int, student_width: int, teacher_width: int) -> nn.ModuleList:
    """One Linear(H_s -> H_t) without bias per stone: the identity where the widths agree, else zero, until it is fitted."""
    connectors = nn.ModuleList(nn.Linear(student_width, teacher_width, bias=False) for _ in range(pairs))
    for connector in connectors:
        with torch.no_grad():
            connector.weight.copy_(start(teacher_width, student_width))  # type: ignore[operator]
    return connectors


def start(rows: int, columns: int) -> Tensor:
    """The start of a connector [H_t, H_s], where it stays in directions that no state has."""
    return torch.eye(rows) if rows == columns else torch.zeros(rows, columns)


@torch.no_grad()
def fit_connectors(
    world: World,
    engine: Any,
    connectors: nn.ModuleList,
    pairs: Sequence[tuple[int, int]],
    student_blocks: nn.ModuleList,
    teacher_blocks: nn.ModuleList,
    teacher: Teacher,
    steps: Iterable[Sequence[Batch]],
) -> None:
    """Set each pair's connector to the least squares fit over the attended tokens of these steps' batches (all ranks take part).

    The engine's passes train nothing. A student block that is the teacher's gives the identity, to the bit where the widths agree.
    """
    sums = [_Sums(world.device) for _ in pairs]
    students, teachers = ({block for block in side} for side in zip(*pairs, strict=True))
    training = engine.module.training
    engine.eval()
    with (
        watched({block: student_blocks[block] for block in students}) as student_states,
        watched({block: teacher_blocks[block] for block in teachers}) as teacher_states,
    ):
        for batches in steps:
            for batch in (b.to(world.device) for b in batches):
                engine(batch, teacher.signals(batch), NO_LOSS)
                for (student, teacher_block), of_pair in zip(pairs, sums, strict=True):
                    at = batch.attended_at
                    sides = student_states[student], teacher_states[teacher_block]
                    of_pair.add(*(states.flatten(0, 1)[at] for states in sides))
    engine.train(training)
    for (student, teacher_block), connector, of_pair in zip(pairs, connectors, sums, strict=True):
        weight, unexplained = of_pair.solved(world)
        overwrite(world, connector.weight, weight)  # type: ignore[arg-type]
        log.info(
            "connector %d<%d: leaves %.4f of the teacher's states unexplained", student, teacher_block, unexplained
        )


class _Sums:
    """The normal equations of one connector in float64, added up batch by batch."""

    def __init__(self, device: torch.device) -> None:
        zero = torch.zeros((), dtype=torch.float64, device=device)
        self.squares, self.products, self.size = zero, zero, zero

    def add(self, student: Tensor, teacher: Tensor) -> None:
        """Tokens' states [N, H_s] and [N, H_t]."""
        student, teacher = student.double(), teacher.double()
        self.squares = self.squares + student.T @ student
        self.products = self.products + teacher.T @ student
        self.size = self.size + teacher.square().sum()

    def solved(self, world: World) -> tuple[Tensor, float]:
        """(connector [H_t, H_s], the share of the teacher's squares that it leaves) over all ranks' tokens (all ranks take part)."""
        squares, products, size = (sum_tensor(world, t) for t in (self.squares, self.products, self.size))
        weight = least_squares(squares, products)
        error = size - 2 * (weight * products).sum() + (weight @ squares * weight).sum()
        return weight, float(error / size)


def least_squares(squares: Tensor, products: Tensor) -> Tensor:
    """argmin_C Σ ‖C h - t‖² + λ ‖C - C_0‖²  from Σ h hᵀ [H_s, H_s] and Σ t hᵀ [H_t, H_s] in float64 -> [H_t, H_s].

    C_0 is the identity where the widths agree, else zero. λ, `RIDGE` of the mean square, makes the solution unique where the states
    do not span all directions; where they do, it is lost in fp32. For t = h the solution is C_0 to the bit.
    """
    at = start(products.shape[0], products.shape[1]).to(products)
    ridge = RIDGE * squares.diagonal().mean().clamp(min=torch.finfo(torch.float64).tiny)
    regular = squares + ridge * torch.eye(len(squares)).to(squares)
    change = torch.cholesky_solve((products - at @ squares).T, torch.linalg.cholesky(regular))
    return at + change.T


@contextlib.contextmanager
def watched(modules: Mapping[int, nn.Module]) -> Iterator[dict[int, Tensor]]:
    """Inside, the last state that each of these blocks has output, by its number."""
    states: dict[int, Tensor] = {}

    def keep(block: int, module: nn.Module, args: object, output: object) -> None:
        states[block] = output_state(output)

    handles = [module.register_forward_hook(functools.partial(keep, block)) for block, module in modules.items()]
    try:
        yield states
    finally:
        for handle in handles:
            handle.remove()
