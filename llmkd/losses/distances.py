"""How far a student's state is from a teacher's, token by token. The caller masks, weights and sums.

`DISTANCES["mse"](student, teacher)` takes two `[..., H]` of any float dtype and gives `[...]`, in float32 (float64 when
either is float64). Equal states give exactly 0 and a gradient of exactly 0. A state of norm <= `SMALLEST_NORM` has no
direction: its unit vector is taken as zero and gets no gradient, so an all-zero position is finite both ways. NaN is
passed on: positions that may hold it are cut out before.

These are the definitions, differentiable by autograd. `llmkd.losses.closed_forms` has the gradients that training uses.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from llmkd.errors import InputError

Distance = Callable[[Tensor, Tensor], Tensor]

SMALLEST_NORM = 1e-6  # also the bound on the gradient of a unit vector: 1/norm at most


def mse(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean over H of the squared difference, `[..., H]`, `[..., H]` -> `[...]`: does not grow with the width.

    BERT's runs of arXiv 2502.04499 sum over H instead (this times H); its T5 and BART runs take this mean. Raises
    InputError on unequal shapes.
    """
    student, teacher = same_shape(student, teacher)
    return (student - teacher).square().mean(-1)


def normalized_mse(student: Tensor, teacher: Tensor) -> Tensor:
    """`‖s/‖s‖ - t/‖t‖‖²`, summed over H, `[..., H]`, `[..., H]` -> `[...]` from 0 to 4; equal to 2 - 2cos.

    The Qwen3 loss of arXiv 2502.04499 (`llm/sft_trainer.py`). Raises InputError on unequal shapes.
    """
    student, teacher = same_shape(student, teacher)
    return (_unit(student) - _unit(teacher)).square().sum(-1)


def cosine(student: Tensor, teacher: Tensor) -> Tensor:
    """`1 - cos(s, t)`, `[..., H]`, `[..., H]` -> `[...]` from 0 to 2, worked out as half of `normalized_mse`.

    The two are equal for unit vectors, but one minus a rounded cosine loses all digits near 0, and equal states would
    not give exactly 0. Against a state without direction it is 1/2. Raises InputError on unequal shapes.
    """
    return normalized_mse(student, teacher) / 2


DISTANCES: dict[str, Distance] = {
    "mse": mse,
    "normalized_mse": normalized_mse,
    "cosine": cosine,
}


def same_shape(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """Both in one dtype of at least float32 and contiguous, so that equal states are summed in the same order."""
    if student.shape != teacher.shape:
        raise InputError(
            f"student states are {list(student.shape)} and teacher states {list(teacher.shape)}: "
            "this distance compares states of one shape; where the widths differ, use a projector, or cka, procrustes or gram"
        )
    dtype = torch.promote_types(torch.promote_types(student.dtype, teacher.dtype), torch.float32)
    return student.to(dtype).contiguous(), teacher.to(dtype).contiguous()


def _unit(states: Tensor) -> Tensor:
    norm = torch.linalg.vector_norm(states, dim=-1, keepdim=True)
    # `<=` and not its opposite: a NaN state must stay NaN. The inner fill keeps the unused branch's gradient finite.
    no_direction = norm <= SMALLEST_NORM
    return (states / norm.masked_fill(no_direction, 1.0)).masked_fill(no_direction, 0.0)
