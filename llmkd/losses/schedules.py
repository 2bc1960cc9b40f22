"""What changes with the step: the learning rate, a weight of the loss, the temperature. Pure functions, so a resumed run needs no state.

`learning_rate(0, peak=1e-4, final=0.0, warmup=100, total=1000, shape="cosine")` gives 1e-6, the first of 100 warm-up
steps.
"""

import math
from typing import Literal, get_args

from llmkd.errors import InputError

Shape = Literal["cosine", "linear", "constant"]


def learning_rate(step: int, *, peak: float, final: float, warmup: int, total: int, shape: Shape) -> float:
    """The rate of `step` (0-based) of `total`: `peak * (step+1)/warmup` while warming up, then down to `final`.

    The first step always has a rate above 0. The peak is met at the last warm-up step (step 0 without warm-up), `final`
    exactly at step `total-1` and kept after it. `constant` stays at the peak and does not read `final`. A run of one
    step takes it at the peak. Raises InputError on an unknown shape, a peak that is not above 0, a final outside
    0..peak, or a warm-up that leaves no step after it.
    """
    _check(step, peak, final, warmup, total, shape)
    if step < warmup:
        return peak * (step + 1) / warmup
    if shape == "constant" or total == 1:
        return peak
    peak_step = max(warmup - 1, 0)
    progress = min((step - peak_step) / (total - 1 - peak_step), 1.0)
    left = 1.0 - progress if shape == "linear" else 0.5 * (1.0 + math.cos(math.pi * progress))
    return final + (peak - final) * left


def scheduled(step: int, total: int, *, initial: float, final: float, until: float, shape: Shape) -> float:
    """A weight or temperature at `step` (0-based) of `total`: from `initial` to `final` over the share `until` of the run.

    `initial` exactly at step 0, `final` exactly at the last step of that share and after it. `constant` stays at `initial` and
    does not read the rest. Raises InputError on a share outside 0 to 1, 0 not included.
    """
    if not 0 < until <= 1:
        raise InputError(
            f"until {until!r}: write the share of the run after which the value stands, above 0 and up to 1"
        )
    if shape == "constant" or step == 0:
        return initial
    last = max(round(until * total) - 1, 1)
    progress = min(step / last, 1.0)
    left = 1.0 - progress if shape == "linear" else 0.5 * (1.0 + math.cos(math.pi * progress))
    return final + (initial - final) * left


def dynamic_temperature(
    current: float,
    step: int,
    total: int,
    *,
    initial: float,
    minimum: float,
    maximum: float,
    student_ce: float,
    teacher_ce: float,
) -> float:
    """The next temperature after `step` of `total` steps, by the code of the DTS authors (arXiv 2511.13767, DATS_enhanced).

    Aim: `initial · ½(1 + cos(π step/total))`, times a = d/(d+1) where a > 1 (1.35 where a > 2), d = the teacher's cross-entropy less
    the student's: only a student that is more than one nat worse raises it. The aim is kept within minimum..maximum, and the
    temperature goes a tenth of the way to it. The paper's own formula may differ; it was not read.
    """
    gap = teacher_ce - student_ce
    factor = math.inf if gap == -1 else gap / (gap + 1)
    annealed = initial * 0.5 * (1.0 + math.cos(math.pi * step / total))
    aim = annealed * (1.0 if factor <= 1 else 1.35 if factor > 2 else factor)
    return 0.9 * current + 0.1 * min(max(aim, minimum), maximum)


def _check(step: int, peak: float, final: float, warmup: int, total: int, shape: str) -> None:
    assert step >= 0, step
    if shape not in get_args(Shape):
        raise InputError(f"learning rate shape {shape!r} is not known: choose from {', '.join(get_args(Shape))}")
    if not (math.isfinite(peak) and peak > 0):
        raise InputError(f"peak learning rate {peak!r}: write a finite number above 0")
    if not 0 <= final <= peak:
        raise InputError(f"final learning rate {final!r}: write a number from 0 to the peak, {peak!r}")
    if total < 1:
        raise InputError(f"{total} training steps: write a whole number from 1 up")
    if not 0 <= warmup < total:
        raise InputError(f"{warmup} warm-up steps in {total} training steps: write a number from 0 to {total - 1}")
