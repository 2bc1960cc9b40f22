"""Cross-entropy, divergence from the teacher and agreement with it, position by position and without gradients.

By these a student is validated while it is trained, and compared with its teacher afterwards: forward KL at temperature 1, whatever the
student was trained on, so that students with different losses compare.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from llmkd.losses.chunked_head import rows_at_once
from llmkd.losses.divergences import forward_kl, stored_top_k_kl
from llmkd.losses.head_inputs import IGNORED, TeacherHead, TopK


class HeadScores(NamedTuple):
    """Of N positions, in fp32 (float64 stays). The last two are None without a teacher."""

    ce: Tensor
    """[N], 0 where there is no target."""
    kl: Tensor | None
    """[N], KL(teacher ‖ student) over the columns that both heads have; of a `TopK` with all other tokens in one bucket."""
    agrees: Tensor | None
    """[N], 1 where both find the same token likeliest, else 0."""


@torch.no_grad()
def head_scores(
    states: Tensor, weight: Tensor, bias: Tensor | None, teacher: TeacherHead | TopK | None, targets: Tensor, chunk: int
) -> HeadScores:
    """Of final states [N, H] under a head [V, H]; targets [N], -100 where there is none. `chunk` tokens' logits exist at a time.

    Products run in the states' dtype, what follows in fp32 on a few rows at a time, as in `llmkd.losses.chunked_head`.
    """
    columns = teacher.weight.shape[0] if isinstance(teacher, TeacherHead) else 0
    rows = rows_at_once(chunk, max(weight.shape[0], columns), states.device.type)
    scores = []
    for start in range(0, max(len(states), 1), chunk):
        part = slice(start, start + chunk)
        ours = F.linear(states[part], weight, bias)
        theirs: Tensor | TopK | None = None
        if isinstance(teacher, TopK):
            theirs = teacher.at(part)
        elif teacher is not None:
            theirs = F.linear(teacher.states[part], teacher.weight, teacher.bias)
        for few in (slice(row, row + rows) for row in range(0, max(len(ours), 1), rows)):
            of_teacher = None if theirs is None else theirs.at(few) if isinstance(theirs, TopK) else theirs[few]
            scores.append(_few_rows(ours[few], of_teacher, targets[part][few]))
    ce, kl, agrees = zip(*scores, strict=True)
    return HeadScores(torch.cat(ce), *(None if teacher is None else torch.cat(each) for each in (kl, agrees)))


def _few_rows(ours: Tensor, theirs: Tensor | TopK | None, targets: Tensor) -> HeadScores:
    """Of logits [r, V] and the teacher's [r, V_t]."""
    ours = ours.to(torch.promote_types(ours.dtype, torch.float32))
    ce = F.cross_entropy(ours, targets, ignore_index=IGNORED, reduction="none")
    if theirs is None:
        return HeadScores(ce, None, None)
    if isinstance(theirs, TopK):
        shared, ids = ours[:, : theirs.columns], theirs.ids.long()
        kl = stored_top_k_kl(shared, ids, theirs.log_probabilities)
        likeliest = ids.gather(1, theirs.log_probabilities.argmax(-1, keepdim=True))[:, 0]
    else:
        columns = min(ours.shape[1], theirs.shape[1])
        shared, theirs = ours[:, :columns], theirs[:, :columns]
        kl, likeliest = forward_kl(shared, theirs, 1.0), theirs.argmax(-1)
    return HeadScores(ce, kl, (shared.argmax(-1) == likeliest).to(ce.dtype))
