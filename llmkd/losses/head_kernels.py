"""The kernels that a GPU may run for all that follows the head's products, and what each of them takes in.

`compiled` is made by torch.compile of `llmkd.losses.compiled_rows`; `triton` is written by hand, `llmkd.losses.triton_rows`; with `none`,
and for what a kernel does not take in, `llmkd.losses.chunked_head` does one operation at a time.
"""

from __future__ import annotations

from functools import partial
from typing import Literal, NamedTuple

import torch

from llmkd.losses import divergences
from llmkd.losses.compiled_rows import ROW_BY_ROW, reads_row_by_row
from llmkd.losses.divergences import Divergence, parts_of

HeadKernel = Literal["compiled", "triton", "none"]


class Part(NamedTuple):
    """One divergence of a weighted sum."""

    name: str
    weight: float
    parameter: float
    """0 where it has none."""


def takes_in(
    kernel: HeadKernel, divergence: Divergence | None, *, stored_top_k: bool = False, dtype: torch.dtype = torch.float32
) -> bool:
    """Whether the kernel computes cross-entropy and this divergence (None: cross-entropy alone) from logits of that dtype.

    stored_top_k: the teacher is a `TopK`, for which the divergence is not read.
    """
    if kernel == "triton":
        wide = torch.promote_types(dtype, torch.float32) == torch.float32  # the kernel has no float64
        return wide and (stored_top_k or divergence is None or triton_parts(divergence) is not None)
    return kernel == "compiled" and not stored_top_k and (divergence is None or reads_row_by_row(divergence))


def triton_parts(divergence: Divergence) -> tuple[Part, ...] | None:
    """The sum that this divergence is, of the divergences that the Triton kernel has; None where it has not all of them.

    `akl` sorts the vocabulary, and two `top_k` in one sum would take two sets of tokens out of a row.
    """
    if parts := parts_of(divergence):
        found = [(triton_parts(part), weight) for part, weight in parts if weight]
        if any(own is None for own, _ in found):
            return None
        flat = tuple(part._replace(weight=weight * part.weight) for own, weight in found for part in own or ())
        return None if sum(part.name == "top_k" for part in flat) > 1 else flat
    function, keywords = (divergence.func, divergence.keywords) if isinstance(divergence, partial) else (divergence, {})
    if function not in (*ROW_BY_ROW, divergences.top_k):
        return None
    (by,) = keywords.values() or (0.0,)
    ends = {
        (divergences.jsd, 0): divergences.forward_kl,
        (divergences.jsd, 1): divergences.reverse_kl,
        (divergences.skew_kl, 0): divergences.forward_kl,
        (divergences.skew_reverse_kl, 0): divergences.reverse_kl,
    }
    return (Part(ends.get((function, by), function).__name__, 1.0, float(by)),)
