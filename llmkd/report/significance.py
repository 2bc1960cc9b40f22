"""Which differences between strategies are shown, which are shown to be small, and which are neither.

Two uncertainties, two questions:

- Seeds: would another training run show the same? `paired`: strategies that share a seed share its data order, so seeds are
  pairs; a t-test asks whether the mean difference is zero, two one-sided tests (TOST) ask whether it is within a margin.
  The seeds decide the verdict, since a strategy is a way to train, and one lucky run is no property of it.
- Items: would another test sample show the same of these very models? `items_bootstrap` draws the test items anew. It is a
  second check beside the verdict: it can show that a difference hangs on few items, never that a strategy is better.

Both ask about one pair of strategies; `holm` keeps the chance of any false claim among several of them at `ALPHA`.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import isfinite
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import special, stats
from statsmodels.stats.weightstats import ttost_paired

ALPHA = 0.05
CONFIDENCE = 1 - ALPHA
RESAMPLES = 2000
NO_SPREAD = 1e-9  # a standard deviation below this share of the scores is rounding
Array = NDArray[np.float64]
Score = Callable[[Array], Any]
"""Sums of items' statistics `[..., k]` -> scores `[...]`."""


@dataclass(frozen=True)
class Paired:
    """One strategy against another over the seeds they share; what the seeds cannot show is None."""

    seeds: int
    difference: float
    interval: list[float] | None
    p_different: float | None
    p_equivalent: float | None


@dataclass(frozen=True)
class Resampled:
    """The same difference under other test items."""

    items: int
    difference: float
    interval: list[float]
    p: float


def half_width(values: Sequence[float]) -> float | None:
    """Half the 95 % interval of a mean, by Student's t with n-1 degrees of freedom; None below two values."""
    if len(values) < 2:
        return None
    # stats.t.ppf and stats.sem give the same and look at their arguments for a millisecond
    quantile = special.stdtrit(len(values) - 1, 0.5 + CONFIDENCE / 2)
    return float(quantile * np.std(values, ddof=1) / len(values) ** 0.5)


def paired(scores: Sequence[float], base: Sequence[float], margin: float | None = None) -> Paired:
    """`scores - base`, seed by seed: mean, 95 % t-interval, p of the paired t-test, and p of TOST against `margin` if there is one.

    Two things leave the interval and both p None: a single seed, and differences that are all the same. The second happens
    to scores of few items (two seeds with 199 of 200 right each): the spread it shows is zero, which would make every
    difference certain and every tie an equivalence, yet it only shows that the score is too coarse.
    """
    first, second = np.asarray(scores, float), np.asarray(base, float)
    assert len(first) == len(second) > 0 and np.isfinite([first, second]).all()
    differences = first - second
    mean = float(differences.mean())
    largest = np.abs([first, second]).max()
    if len(differences) < 2 or differences.std(ddof=1) <= NO_SPREAD * largest:
        return Paired(len(differences), mean, None, None, None)
    half = half_width(differences.tolist())
    assert half is not None
    test: Any = stats.ttest_rel(first, second)  # its stub knows no pvalue
    p_different = float(test.pvalue)
    p_equivalent = None if margin is None else float(ttost_paired(first, second, -margin, margin)[0])
    return Paired(len(differences), mean, [mean - half, mean + half], p_different, p_equivalent)


def holm(p_values: Sequence[float | None]) -> list[float | None]:
    """Holm's adjusted p-values of one family, in the same order (Holm 1979). None (not tested) stays None and is no member.

    statsmodels has them too, but `multipletests` collects garbage at every call: 0.2 s beside torch, half a minute a report.
    """
    tested = sorted((p, place) for place, p in enumerate(p_values) if p is not None)
    adjusted: list[float | None] = [None] * len(p_values)
    highest = 0.0
    for rank, (p, place) in enumerate(tested):
        assert isfinite(p)
        highest = max(highest, min(1.0, p * (len(tested) - rank)))
        adjusted[place] = highest
    return adjusted


def verdict(p_different: float | None, p_equivalent: float | None) -> str:
    """What two adjusted p-values say together; `p_equivalent` is None where no margin was stated."""
    if p_different is None:
        return "not tested"
    different, equivalent = p_different < ALPHA, p_equivalent is not None and p_equivalent < ALPHA
    if different and equivalent:
        return "different within the margin"
    return "different" if different else "equivalent" if equivalent else "undecided"


def mean_score(sums: Array) -> Array:
    """The score of a weighted mean: sums `[..., 2]` of weight x value and of weight -> `[...]`."""
    return sums[..., 0] / sums[..., 1]


def items_bootstrap(
    first: Array, second: Array, score: Score = mean_score, resamples: int = RESAMPLES
) -> Resampled | None:
    """`first - second` when the test items are drawn anew: percentile interval and two-sided p (Koehn 2004, paired).

    `first`, `second`: sufficient statistics `[seeds, items, k]` of two strategies on the same items (their seeds may differ in
    number); `score` makes a score of their sum over items. A draw takes the same items for all models of both, scores each
    model, and compares the means over seeds. The same input gives the same output. None below two items, or where a draw
    has no finite score.
    """
    items = first.shape[1]
    assert second.shape[1] == items and first.shape[2] == second.shape[2]
    if items < 2:
        return None
    statistics = np.concatenate([first, second]).astype(float)

    def difference(chosen: NDArray[np.int64], axis: int = -1) -> Array:
        """Chosen items `[..., items]` -> the difference of each draw `[...]`."""
        draws = chosen.reshape(-1, items)
        rows = np.arange(len(draws))[:, None] * items
        counts = np.bincount((draws + rows).ravel(), minlength=draws.size).reshape(draws.shape)
        scores = np.asarray(score(counts.astype(float) @ statistics))  # [models, draws]
        return (scores[: len(first)].mean(0) - scores[len(first) :].mean(0)).reshape(chosen.shape[:-1])

    with np.errstate(divide="ignore", invalid="ignore"), warnings.catch_warnings():
        warnings.simplefilter("ignore", stats.DegenerateDataWarning)  # a draw without a score is seen below
        drawn_anew = stats.bootstrap(
            (np.arange(items),),
            difference,
            n_resamples=resamples,
            batch=max(1, 2_000_000 // items),  # an index is 8 bytes: 16 MB at a time
            vectorized=True,
            method="percentile",
            confidence_level=CONFIDENCE,
            rng=np.random.default_rng(0),
        )
        observed = float(difference(np.arange(items)))
    drawn = drawn_anew.bootstrap_distribution
    if not (np.isfinite(drawn).all() and isfinite(observed)):
        return None
    tail = min((drawn <= 0).sum(), (drawn >= 0).sum())
    p = min(1.0, 2 * (int(tail) + 1) / (resamples + 1))
    interval = drawn_anew.confidence_interval
    return Resampled(items, observed, [float(interval.low), float(interval.high)], p)
