"""The divergences of the Triton kernel, column by column: what each adds to its value, and its slope.

The formulas, and what q, p, d and slope are, are those of `llmkd.losses.closed_forms`. Importing this file takes Triton.
"""

from __future__ import annotations

import torch
import triton  # pyright: ignore[reportMissingImports]: not with torch's CPU build
import triton.language as tl  # pyright: ignore[reportMissingImports]

LEAST = tl.constexpr(torch.finfo(torch.float32).min)
"""In place of -inf, so that 0 times it is 0."""
TINY = tl.constexpr(torch.finfo(torch.float32).tiny)


@triton.jit
def column_terms(log_q, log_p, mix, PARTS: tl.constexpr):
    """Of each column its (term of the value, slope q·d), added up over the divergences of the sum; mix: their weights, their parameters."""
    weights, parameters = mix
    q, p = tl.exp(log_q), tl.exp(log_p)
    value, slope = tl.zeros_like(q), tl.zeros_like(q)
    for part in tl.static_range(len(PARTS)):
        if PARTS[part] == "forward_kl":  # d = 1 - p/q, whose mean is 0
            own_value, own_slope = p * (log_p - log_q), q - p
        elif PARTS[part] == "reverse_kl":
            own_value = q * (log_q - log_p)
            own_slope = own_value
        elif PARTS[part] == "jsd":
            own_value, own_slope = _jsd(q, p, parameters[part])
        elif PARTS[part] == "skew_kl":
            own_value, own_slope = _skew_kl(q, p, parameters[part])
        elif PARTS[part] == "skew_reverse_kl":
            own_value, own_slope = _skew_reverse_kl(q, p, parameters[part])
        else:
            tl.static_assert(PARTS[part] == "tvd")
            own_value, own_slope = tl.abs(q - p) / 2, tl.where(q > p, q, tl.where(q < p, -q, 0.0)) / 2
        value += weights[part] * own_value
        slope += weights[part] * own_slope
    return value, slope


@triton.jit
def _jsd(q, p, beta):
    mixture = tl.maximum(q + beta * (p - q), TINY)
    slope = (1 - beta) * q * log_ratio(tl.div_rn(q, mixture))
    return beta * p * log_ratio(tl.div_rn(p, mixture)) + slope, slope


@triton.jit
def _skew_kl(q, p, skew):
    ratio = tl.div_rn(p, tl.maximum(q + skew * (p - q), TINY))
    return p * log_ratio(ratio), (skew - 1) * q * (ratio - 1)


@triton.jit
def _skew_reverse_kl(q, p, skew):
    ratio = tl.div_rn(q, tl.maximum(p + skew * (q - p), TINY))
    value = q * log_ratio(ratio)
    return value, value - skew * q * (ratio - 1)


@triton.jit
def log_ratio(ratio):
    """The logarithm; a ratio of 0 belongs to a probability of 0, and 0 times any finite number adds nothing."""
    return tl.log(tl.maximum(ratio, TINY))


@triton.constexpr_function
def needs_mean(parts):
    """Whether a gradient takes the mean of the slopes: forward KL's is 0, and `top_k` has its own gradient."""
    return any(part != "forward_kl" for part in parts)
