"""How far the student's distribution is from the teacher's, token by token. The caller masks, weights and sums.

`DIVERGENCES["forward_kl"](student_logits, teacher_logits, 1.0)` takes two `[N, V]` of any float dtype and gives `[N]`,
in float32 (float64 when either is float64), times temperature² so that the gradient keeps its size. Below, p is the
teacher's softmax and q the student's. A column at -inf on both sides is outside the vocabulary: it adds 0 and gets no
gradient. Equal logits give exactly 0.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from llmkd.errors import InputError


def forward_kl(student_logits: Tensor, teacher_logits: Tensor, temperature: float) -> Tensor:
    """`temperature² · Σ_v p log(p/q)`, `[N, V]` x 2 -> `[N]`: the student must cover what the teacher finds likely.

    Hinton et al., arXiv 1503.02531; `torch.nn.functional.kl_div(log q, log p, log_target=True)` summed over V, times
    temperature². Infinite where the teacher gives weight to a column that is -inf for the student alone. Raises
    InputError on unequal shapes or temperature <= 0.
    """
    student, teacher = _log_probabilities(student_logits, teacher_logits, temperature)
    return _kl(teacher, student) * temperature**2


def reverse_kl(student_logits: Tensor, teacher_logits: Tensor, temperature: float) -> Tensor:
    """`temperature² · Σ_v q log(q/p)`, `[N, V]` x 2 -> `[N]`: the student must keep to what the teacher finds likely.

    The token-level form of arXiv 2306.08543. Infinite where the student gives weight to a column that is -inf for the
    teacher alone. Raises InputError on unequal shapes or temperature <= 0.
    """
    student, teacher = _log_probabilities(student_logits, teacher_logits, temperature)
    return _kl(student, teacher) * temperature**2


DIVERGENCES: dict[str, Callable[[Tensor, Tensor, float], Tensor]] = {"forward_kl": forward_kl, "reverse_kl": reverse_kl}


def _kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL(p ‖ q) from log-probabilities `[N, V]` -> `[N]`."""
    # Where p = 0 the term is 0 (its limit), but 0 * (-inf - log q) is NaN. Filling the difference, before the product,
    # keeps the gradient clean too: a subtraction passes on the 0 it gets, a product would make 0 * inf of it.
    gap = (log_p - log_q).masked_fill(log_p.isneginf(), 0.0)
    return (log_p.exp() * gap).sum(-1)


def _log_probabilities(student_logits: Tensor, teacher_logits: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    if student_logits.shape != teacher_logits.shape:
        raise InputError(
            f"student logits are {list(student_logits.shape)} and teacher logits {list(teacher_logits.shape)}: "
            "a divergence compares logits of one shape; where the heads differ in width, compare their shared columns"
        )
    if not (temperature > 0 and math.isfinite(temperature)):
        raise InputError(
            f"temperature {temperature!r}: write a finite number above 0 (1.0 leaves the logits as they are)"
        )
    dtype = torch.promote_types(torch.promote_types(student_logits.dtype, teacher_logits.dtype), torch.float32)
    student, teacher = student_logits.to(dtype), teacher_logits.to(dtype)
    return (student / temperature).log_softmax(-1), (teacher / temperature).log_softmax(-1)
