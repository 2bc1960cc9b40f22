"""Cross-entropy and divergence of a chunk's logits as one compiled function: on a GPU an operation each would be bound by memory.

torch.compile makes of it one kernel per row: it reads both models' logits three times, keeps fp32 to itself, and writes the gradient where
the student's logits were. `llmkd.losses.chunked_head` has the same mathematics one operation at a time, for CPUs and as its reference.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from llmkd.losses import divergences
from llmkd.losses.closed_forms import Form, closed_form, infinite_where_blocked
from llmkd.losses.divergences import Divergence
from llmkd.losses.head_inputs import IGNORED, Terms

ROW_BY_ROW = (
    divergences.forward_kl,
    divergences.reverse_kl,
    divergences.jsd,
    divergences.skew_kl,
    divergences.skew_reverse_kl,
    divergences.tvd,
)
"""Divergences whose closed forms go from one end of a row to the other. The others sort it, which no kernel takes in."""
VERSIONS = 32
"""How many versions torch.compile may keep: a few for each divergence that a process runs (its own limit is 8)."""


CompiledRows = Callable[..., tuple[Tensor, Tensor]]
_COMPILED: dict[Hashable, CompiledRows] = {}


def reads_row_by_row(divergence: Divergence) -> bool:
    """Whether this divergence can be compiled into one kernel; a sum can if all its parts can."""
    if isinstance(divergence, partial):
        parts = divergence.keywords.get("parts")
        return divergence.func in ROW_BY_ROW if parts is None else all(reads_row_by_row(part) for part, _ in parts)
    return divergence in ROW_BY_ROW


def losses_compiled(
    ours: Tensor, theirs: Tensor | None, targets: Tensor, compared: Tensor, terms: Terms
) -> tuple[Tensor, Tensor]:
    """`rows_in_place` of these terms, compiled."""

    def number(value: float) -> Tensor:  # on the device, where another value is no reason to compile again
        return torch.full((), value, dtype=torch.float64, device=ours.device)

    temperature = None if terms.temperature == 1 else number(terms.temperature)
    with_any_number_of_rows(ours, theirs, targets, compared)
    rows = compiled_rows(terms.divergence)
    return rows(ours, theirs, targets, compared, number(terms.ce_scale), number(terms.kl_scale), temperature)


def rows_in_place(
    ours: Tensor,
    theirs: Tensor | None,
    targets: Tensor,
    compared: Tensor,
    ce_scale: Tensor,
    kl_scale: Tensor,
    temperature: Tensor | None,
    form: Form | None,
) -> tuple[Tensor, Tensor]:
    """(CE sum, divergence sum) of logits `ours` [n, V], which become the gradient of ce_scale * CE + kl_scale * divergence.

    theirs [n, V_t <= V]: the teacher's logits; without them `form`, the divergence's closed form, is not used. targets [n] (-100: no
    cross-entropy there), compared [n] bool. The scales and the temperature are numbers on the device, which change without a new
    compilation; a temperature of None is 1, for which both losses read one softmax.
    """
    wide = torch.promote_types(ours.dtype, torch.float32)
    logits, scored, at = ours.to(wide), targets != IGNORED, targets.clamp(min=0)[:, None]
    log_q = logits.log_softmax(-1)
    ce = torch.where(scored, -log_q.gather(-1, at).squeeze(-1), 0.0)
    is_target = torch.arange(ours.shape[-1], device=ours.device) == at
    gradient = (log_q.exp() - is_target.to(wide)) * torch.where(scored, ce_scale.to(wide), 0.0)[:, None]
    divergence = torch.zeros_like(ce)
    if theirs is not None:
        assert form is not None
        shared = theirs.shape[-1]
        divergence, slope = _compared(logits[:, :shared], theirs.to(wide), log_q, temperature, form)
        divergence = torch.where(compared, divergence, 0.0)
        slope = torch.where(compared, kl_scale.to(wide), 0.0)[:, None] * slope
        gradient = gradient + F.pad(slope, (0, ours.shape[-1] - shared))
    ours.copy_(gradient)
    return ce.sum(), divergence.sum()


def _compared(
    logits: Tensor, theirs: Tensor, log_q: Tensor, temperature: Tensor | None, form: Form
) -> tuple[Tensor, Tensor]:
    """(divergence [n], its gradient [n, shared columns] with respect to the logits), as `chunked_head` has them."""
    if temperature is not None:
        temperature = temperature.to(logits.dtype)
        log_q, theirs = (logits / temperature).log_softmax(-1), theirs / temperature
    elif logits.shape != log_q.shape:
        log_q = logits.log_softmax(-1)
    log_p = theirs.log_softmax(-1)
    least = torch.finfo(logits.dtype).min  # for -inf, so that 0 times it is 0
    value, slope = form(log_q.exp(), log_q.clamp(min=least), log_p.exp(), log_p.clamp(min=least))
    value = infinite_where_blocked(value)
    return (value, slope) if temperature is None else (value * temperature.square(), slope * temperature)


def compiled_rows(divergence: Divergence) -> CompiledRows:
    """`rows_in_place` of this divergence, compiled at its first call; an equal divergence gets the same function.

    It takes Triton and a C compiler, as all that PyTorch compiles for a GPU.
    """
    key = _by_value(divergence)
    if key not in _COMPILED:
        _COMPILED[key] = _compile(closed_form(divergence))
    return _COMPILED[key]


def _compile(form: Form | None) -> CompiledRows:
    def rows(*of_a_chunk: Any) -> tuple[Tensor, Tensor]:
        return rows_in_place(*of_a_chunk, form=form)

    import torch._dynamo as dynamo  # two seconds, for what compiles alone

    dynamo.config.recompile_limit = max(dynamo.config.recompile_limit, VERSIONS)
    return torch.compile(rows, fullgraph=True)


def _by_value(divergence: Divergence) -> Hashable:
    """A key that is equal for divergences of equal parameters, which are different partials."""
    if not isinstance(divergence, partial):
        return divergence
    keywords = divergence.keywords
    if "parts" in keywords:
        return divergence.func, tuple((_by_value(part), weight) for part, weight in keywords["parts"])
    return divergence.func, tuple(sorted(keywords.items()))


def with_any_number_of_rows(*tensors: Tensor | None) -> None:
    """Tell torch.compile that the rows of these tensors differ in number from call to call, so that it compiles once."""
    import torch._dynamo as dynamo  # as above

    for tensor in tensors:
        if tensor is not None:
            dynamo.maybe_mark_dynamic(tensor, 0)
