"""Cross-entropy and divergence of a chunk's logits in one Triton kernel: a program per row, which reads it twice or three times.

First pass: maxima and sums of the softmaxes. Second, where a gradient needs it: the mean under q of the divergence's slope. Last: the
values, and the gradient in the place of the student's logits. All between a load and a store is fp32 and stays on the chip. The formulas
are those of `llmkd.losses.closed_forms`, and q, p, value, slope and mean are what they are there; of a sum of divergences the values are
added up, and the slopes. Importing this file takes Triton; `llmkd.losses.chunked_head` does so where a recipe asks for it.

`top_k` takes its K tokens out of the row before the rest is added up, so that a small rest loses no digit to a difference: their logits
wait in registers, -inf stands in their place, and in the end their gradients are written there.
"""

from __future__ import annotations

import torch
import triton  # pyright: ignore[reportMissingImports]: not with torch's CPU build
import triton.language as tl  # pyright: ignore[reportMissingImports]
from torch import Tensor

from llmkd.losses.head_inputs import IGNORED, Terms, TopK
from llmkd.losses.head_kernels import Part, triton_parts
from llmkd.losses.triton_terms import LEAST, TINY, column_terms, log_ratio, needs_mean

BLOCK, WARPS = 2048, 4
"""Columns that a program works on at a time, and by how many warps."""
NO_TARGET = tl.constexpr(IGNORED)
UNREACHED = tl.constexpr(1e12)
"""As in `llmkd.losses.closed_forms`: what is above it has a column that one side alone shuts out."""


def losses_by_triton(
    ours: Tensor, theirs: Tensor | TopK | None, targets: Tensor, compared: Tensor, terms: Terms
) -> tuple[Tensor, Tensor]:
    """(CE sum, divergence sum) of logits `ours` [n, V], which become the gradient of the loss that `terms` weights.

    theirs: the teacher's logits [n, V_t <= V], lost where `top_k` is among the divergences; or its stored top k. targets [n] (-100: no
    cross-entropy there), compared [n] bool. Logits are bfloat16, float16 or float32, each row contiguous. Nothing is read back from the
    device, and no number among the terms compiles anew; only whether the temperature is 1, where one softmax serves both losses.
    """
    rows, columns = ours.shape
    shared, teacher, ids, stored, parts = columns, ours, None, (ours, ours), ()
    top_k = Part("top_k", 1.0, 0.0)
    if isinstance(theirs, TopK):
        shared, ids = min(theirs.columns, columns), theirs.ids
        _, *stored = theirs.masses(shared, terms.temperature, torch.float32)
    elif theirs is not None:
        shared, teacher, parts = theirs.shape[1], theirs, triton_parts(terms.divergence) or ()
        for top_k in (part for part in parts if part.name == "top_k"):
            ids = theirs.topk(min(int(top_k.parameter), shared), dim=-1).indices
    parts = [part for part in parts if part.name != "top_k"]
    k = 0 if ids is None else ids.shape[1]
    losses = torch.empty(rows, 2, dtype=torch.float32, device=ours.device)
    assert all(part.is_contiguous() for part in (ours, teacher, targets, compared))
    _rows[(rows,)](  # pyright: ignore[reportIndexIssue]
        *(ours, teacher, targets, compared.view(torch.uint8), losses),
        tuple(part.contiguous() for part in (ours if ids is None else ids, *stored)),
        *(columns, shared, k),
        (float(terms.ce_scale), float(terms.kl_scale), top_k.weight),
        float(terms.temperature),
        (tuple(part.weight for part in parts), tuple(part.parameter for part in parts)),
        PARTS=tuple(part.name for part in parts),
        LOGITS=isinstance(theirs, Tensor),
        ONE_SOFTMAX=terms.temperature == 1 and shared == columns,
        K=triton.next_power_of_2(k) if k else 0,
        BLOCK=min(BLOCK, triton.next_power_of_2(columns)),
        num_warps=WARPS,
    )
    ce, divergence = losses.sum(0).unbind()
    return ce, divergence


@triton.jit
def _rows(
    student,
    teacher,
    targets,
    compared,
    losses,
    likeliest,
    columns,
    shared,
    k,
    scales,
    temperature,
    mix,
    PARTS: tl.constexpr,
    LOGITS: tl.constexpr,
    ONE_SOFTMAX: tl.constexpr,
    K: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One row. PARTS: the divergences of the sum but `top_k`, with which K is not 0. LOGITS: whether the teacher's are there."""
    row = tl.program_id(0).to(tl.int64)
    student, teacher, losses = student + row * columns, teacher + row * shared, losses + row * 2
    target, counted = tl.load(targets + row), tl.load(compared + row) != 0
    scored, sharpness = target != NO_TARGET, tl.div_rn(1.0, temperature)
    z_target = tl.load(student + tl.where(scored, target, 0)).to(tl.float32)
    ce_factor = tl.where(scored, scales[0], 0.0)
    kl_factor = tl.where(counted, scales[1] * temperature, 0.0)  # temperature², over that of the logits
    if K:
        at = row * k + tl.arange(0, K)
        out = (tl.arange(0, K) < k) & counted
        tokens = tl.load(likeliest[0] + at, mask=out, other=0)
        z_out = _take_out(student, tokens, out)
        t_out = _take_out(teacher, tokens, out) if LOGITS else z_out
    sides = (student, teacher, columns, shared, sharpness)
    z, q, p = _first_pass(sides, LOGITS, K, ONE_SOFTMAX, BLOCK)
    q_rest, p_rest = q, p
    if K:
        z, q = _with_more(z[0], z[1], z_out), _with_more(q[0], q[1], z_out * sharpness)
        p = _with_more(p[0], p[1], t_out * sharpness)
    totals = (_log_total(z), _log_total(q), _log_total(p))
    tl.store(losses, tl.where(scored, totals[0] - z_target, 0.0))

    mean = _second_pass(sides, totals, mix, PARTS, BLOCK)
    value, q_factor = 0.0, 0.0
    if K:
        log_q = _log_probability(z_out * sharpness, totals[1])
        log_p, p_of_rest = _of_teacher(t_out * sharpness, totals[2], p_rest, likeliest, row, at, out, LOGITS)
        values, slope_out = column_terms(log_q, log_p, mix, PARTS)
        mean += tl.sum(slope_out, 0) if needs_mean(PARTS) else 0.0
        value, q_factor, own_slope = _top_k(log_q, log_p, q_rest[1], _mass(q_rest, totals[1]), p_of_rest, scales[2])
        value += tl.sum(values, 0)
        slope_out += own_slope - tl.exp(log_q) * mean
    factors = (ce_factor, kl_factor, q_factor - mean)
    value += _last_pass(sides, totals, mix, target, factors, PARTS, LOGITS, K, BLOCK)
    if K:
        gradient = ce_factor * _ce_slope(z_out, totals[0], tokens, target) + kl_factor * slope_out
        tl.debug_barrier()  # after all that the last pass wrote
        tl.store(student + tokens, gradient.to(student.dtype.element_ty), mask=out)
    value = tl.where(value > UNREACHED, float("inf"), value) * temperature * temperature
    tl.store(losses + 1, tl.where(counted, value, 0.0))


@triton.jit
def _first_pass(sides, LOGITS: tl.constexpr, K: tl.constexpr, ONE_SOFTMAX: tl.constexpr, BLOCK: tl.constexpr):
    """(maximum, sum of exp(logit - maximum)) of three softmaxes: the student's, and both models' in the divergence.

    There the student has a softmax of its own where the temperature is not 1, or the columns are fewer.
    """
    student, teacher, columns, shared, sharpness = sides
    z_top, z_sum = tl.full((), LEAST, tl.float32), tl.full((), 0.0, tl.float32)
    q_top, q_sum, p_top, p_sum = z_top, z_sum, z_top, z_sum
    for start in range(0, columns, BLOCK):
        at = start + tl.arange(0, BLOCK)
        z = _logits(student, at, columns)
        z_top, z_sum = _with_more(z_top, z_sum, z)
        if (LOGITS or K) and not ONE_SOFTMAX:
            q_top, q_sum = _with_more(q_top, q_sum, tl.where(at < shared, z, -float("inf")) * sharpness)
        if LOGITS:
            p_top, p_sum = _with_more(p_top, p_sum, _logits(teacher, at, shared) * sharpness)
    if ONE_SOFTMAX:
        q_top, q_sum = z_top, z_sum
    return (z_top, z_sum), (q_top, q_sum), (p_top, p_sum)


@triton.jit
def _second_pass(sides, totals, mix, PARTS: tl.constexpr, BLOCK: tl.constexpr):
    """The mean under q of d, where a gradient needs it."""
    student, teacher, _, shared, sharpness = sides
    mean = tl.full((), 0.0, tl.float32)
    if needs_mean(PARTS):
        for start in range(0, shared, BLOCK):
            at = start + tl.arange(0, BLOCK)
            log_q = _log_probability(_logits(student, at, shared) * sharpness, totals[1])
            log_p = _log_probability(_logits(teacher, at, shared) * sharpness, totals[2])
            mean += tl.sum(column_terms(log_q, log_p, mix, PARTS)[1], 0)
    return mean


@triton.jit
def _last_pass(
    sides, totals, mix, target, factors, PARTS: tl.constexpr, LOGITS: tl.constexpr, K: tl.constexpr, BLOCK: tl.constexpr
):
    """The value. factors: of cross-entropy's gradient, of the divergence's, and of q within the latter."""
    student, teacher, columns, shared, sharpness = sides
    value = tl.full((), 0.0, tl.float32)
    for start in range(0, columns, BLOCK):
        at = start + tl.arange(0, BLOCK)
        z = _logits(student, at, columns)
        gradient = factors[0] * _ce_slope(z, totals[0], at, target)
        if LOGITS or K:
            log_q = _log_probability(tl.where(at < shared, z, -float("inf")) * sharpness, totals[1])
            slope = tl.exp(log_q) * factors[2]
            if LOGITS:
                log_p = _log_probability(_logits(teacher, at, shared) * sharpness, totals[2])
                values, slopes = column_terms(log_q, log_p, mix, PARTS)
                value += tl.sum(values, 0)
                slope += slopes
            gradient += factors[1] * slope
        tl.store(student + at, gradient.to(student.dtype.element_ty), mask=at < columns)
    return value


@triton.jit
def _of_teacher(t_out, log_p_total, p_rest, likeliest, row, at, out, LOGITS: tl.constexpr):
    """(log p of the tokens that were taken out, p of the rest)."""
    if LOGITS:
        log_p, rest = _log_probability(t_out, log_p_total), _mass(p_rest, log_p_total)
    else:
        log_p, rest = tl.load(likeliest[1] + at, mask=out, other=LEAST), tl.load(likeliest[2] + row)
    return log_p, rest


@triton.jit
def _top_k(log_q, log_p, q_rest_sum, q_rest, p_rest, weight):
    """(value, q's factor in the slope of the rest, slope of the tokens that were taken out), as `closed_forms.buckets` has them."""
    q, p = tl.exp(log_q), tl.exp(log_p)
    ratio = tl.div_rn(p_rest, tl.maximum(q_rest, TINY))
    log_of_it = tl.where(q_rest_sum == 0.0, -LEAST, log_ratio(ratio))  # 0: the student shuts all of the rest out
    return weight * (tl.sum(p * (log_p - log_q), 0) + p_rest * log_of_it), weight * (1 - ratio), weight * (q - p)


@triton.jit
def _take_out(row, tokens, out):
    """The logits of these tokens; -inf stands in their place now, for all threads."""
    logits = tl.load(row + tokens, mask=out, other=-float("inf")).to(tl.float32)
    tl.debug_barrier()  # several threads may read one of them
    tl.store(row + tokens, -float("inf"), mask=out)
    tl.debug_barrier()
    return logits


@triton.jit
def _logits(row, at, columns):
    return tl.load(row + at, mask=at < columns, other=-float("inf")).to(tl.float32)


@triton.jit
def _with_more(top, total, logits):
    """The maximum and the sum of exp(logit - maximum), with more logits; -inf adds nothing, also where there was nothing else yet."""
    higher = tl.maximum(top, tl.max(logits, 0))
    return higher, total * tl.exp(top - higher) + tl.sum(tl.exp(logits - higher), 0)


@triton.jit
def _log_total(sums):
    return sums[0] + tl.log(sums[1])


@triton.jit
def _mass(sums, log_total):
    """The probability of the columns that were summed."""
    return sums[1] * tl.exp(sums[0] - log_total)


@triton.jit
def _ce_slope(logits, log_total, at, target):
    return tl.exp(logits - log_total) - tl.where(
        at == target, 1.0, 0.0
    )  # none where there is no target: no column has its number


@triton.jit
def _log_probability(logits, log_total):
    return tl.maximum(logits - log_total, LEAST)
