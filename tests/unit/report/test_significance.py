"""The tests of differences: against scipy, statsmodels and closed forms, and their error rates by simulation."""

from typing import Any

import numpy as np
import pytest
from scipy import stats
from statsmodels.stats.multitest import multipletests
from statsmodels.stats.weightstats import DescrStatsW

from llmkd.report.significance import ALPHA, Array, half_width, holm, items_bootstrap, mean_score, paired, verdict

T_1, T_2 = 12.706204736, 4.302652730  # the 97.5 % points of Student's t with 1 and 2 degrees of freedom, from tables
FORWARD, REVERSE = [70.0, 72.0, 71.5, 69.0, 73.5], [69.2, 72.4, 70.1, 68.9, 72.0]


def pairs_of_values(values: Array) -> Array:
    """Values `[seeds, items]` -> the statistics of a plain mean `[seeds, items, 2]`."""
    return np.stack([values, np.ones_like(values)], axis=-1)


# ---------------------------------------------------------------------------------------------------------------------
# Seeds


def test_half_width_by_hand() -> None:
    # standard deviation of 70 and 72 is sqrt(2); divided by sqrt(2) seeds it is 1
    assert half_width([70.0, 72.0]) == pytest.approx(T_1 * 1.0)
    assert half_width([1.0, 2.0, 3.0]) == pytest.approx(T_2 * 1.0 / 3**0.5)
    assert half_width([1.0]) is None


def test_paired_equals_scipy_and_statsmodels() -> None:
    found = paired(FORWARD, REVERSE, margin=1.5)
    test = stats.ttest_rel(FORWARD, REVERSE)
    interval = test.confidence_interval(0.95)
    differences = DescrStatsW(np.subtract(FORWARD, REVERSE))
    assert found.seeds == 5 and found.difference == pytest.approx(0.68)
    assert found.interval == pytest.approx((interval.low, interval.high))
    assert found.p_different == pytest.approx(test.pvalue)
    assert found.p_equivalent == pytest.approx(differences.ttost_mean(-1.5, 1.5)[0])


def test_tost_in_closed_form_for_two_seeds() -> None:
    """With one degree of freedom t is Cauchy: P(T > t) = 1/2 - arctan(t) / pi."""
    found = paired([10.1, 10.3], [10.0, 10.0], margin=2.0)  # differences 0.1 and 0.3: mean 0.2, standard error 0.1
    assert found.p_equivalent == pytest.approx(0.5 - np.arctan((2.0 - 0.2) / 0.1) / np.pi)
    assert found.p_different == pytest.approx(2 * (0.5 - np.arctan(0.2 / 0.1) / np.pi))


def test_equivalence_at_alpha_is_the_90_percent_interval_inside_the_margin() -> None:
    differences = np.subtract(FORWARD, REVERSE)
    low, high = stats.ttest_1samp(differences, 0).confidence_interval(1 - 2 * ALPHA)
    edge = max(-low, high)
    assert paired(FORWARD, REVERSE, edge).p_equivalent == pytest.approx(ALPHA)
    assert (
        (paired(FORWARD, REVERSE, edge * 0.99).p_equivalent or 0)
        > ALPHA
        > (paired(FORWARD, REVERSE, edge * 1.01).p_equivalent or 1)
    )


def test_order_turns_the_sign_and_nothing_else() -> None:
    one, other = paired(FORWARD, REVERSE, 1.0), paired(REVERSE, FORWARD, 1.0)
    assert one.difference == -other.difference
    assert one.interval is not None and other.interval == [-one.interval[1], -one.interval[0]]
    assert (one.p_different, one.p_equivalent) == pytest.approx((other.p_different, other.p_equivalent))


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ([70.0], [60.0]),
        ([0.995, 0.995], [0.995, 0.995]),
        ([0.0, 0.0], [0.0, 0.0]),
        ([0.995, 0.990, 0.3], [0.990, 0.985, 0.295]),  # all differ by 0.005, but for rounding
        ([94.0, 95.0], [94.0 + 1e-14, 95.0 - 1e-14]),
    ],
)
def test_what_shows_no_spread_proves_nothing(one: list[float], other: list[float]) -> None:
    found = paired(one, other, margin=0.5)
    assert found.difference == pytest.approx(one[0] - other[0])
    assert (found.interval, found.p_different, found.p_equivalent) == (None, None, None)


def test_no_margin_no_equivalence() -> None:
    found = paired(FORWARD, REVERSE)
    assert found.p_equivalent is None and found.p_different is not None


def test_a_score_that_is_no_number_never_gets_here() -> None:
    with pytest.raises(AssertionError):
        paired([1.0, float("nan")], [1.0, 2.0])


# ---------------------------------------------------------------------------------------------------------------------
# Many comparisons


def test_holm_by_hand() -> None:
    # sorted: 0.01 x 4, 0.02 x 3, 0.03 x 2, 0.04 x 1, none below the one before
    assert holm([0.04, 0.01, 0.03, 0.02]) == pytest.approx([0.06, 0.04, 0.06, 0.06])
    assert holm([0.9, 0.8]) == pytest.approx([1.0, 1.0])


def test_holm_equals_statsmodels() -> None:
    rng = np.random.default_rng(10)
    for size in range(1, 13):
        p_values = (rng.uniform(0, 0.2, size) ** 2).round(3).tolist()  # with ties
        assert holm(p_values) == pytest.approx(list(np.asarray(multipletests(p_values, method="holm")[1])))


def test_what_was_not_tested_is_no_member_of_the_family() -> None:
    assert holm([None, 0.02, None, 0.03]) == [None, pytest.approx(0.04), None, pytest.approx(0.04)]
    assert holm([None]) == [None] and holm([]) == []


@pytest.mark.parametrize(
    ("p_different", "p_equivalent", "said"),
    [
        (0.01, 0.5, "different"),
        (0.5, 0.01, "equivalent"),
        (0.01, 0.01, "different within the margin"),
        (0.5, 0.5, "undecided"),
        (ALPHA, ALPHA, "undecided"),
        (0.01, None, "different"),
        (0.5, None, "undecided"),
        (None, None, "not tested"),
    ],
)
def test_verdicts(p_different: float | None, p_equivalent: float | None, said: str) -> None:
    assert verdict(p_different, p_equivalent) == said


# ---------------------------------------------------------------------------------------------------------------------
# Items


def test_bootstrap_of_a_mean_equals_scipys() -> None:
    rng = np.random.default_rng(1)
    one, other = rng.normal(0.3, 1, (1, 80)), rng.normal(0, 1, (1, 80))
    found = items_bootstrap(pairs_of_values(one), pairs_of_values(other), resamples=4000)
    assert found is not None and found.items == 80
    assert found.difference == pytest.approx(one.mean() - other.mean())
    theirs = stats.bootstrap(
        ((one - other)[0],), np.mean, n_resamples=4000, method="percentile", rng=np.random.default_rng(0)
    ).confidence_interval
    assert found.interval == pytest.approx((theirs.low, theirs.high))  # the same draws, summed in another way


def test_bootstrap_of_a_corpus_score_equals_a_loop() -> None:
    """A score that is no mean of the items' own: the ratio of sums, over three seeds against two."""
    rng = np.random.default_rng(2)
    one, other = rng.uniform(1, 2, (3, 30, 2)), rng.uniform(1, 2, (2, 30, 2))
    found = items_bootstrap(one, other, lambda sums: 100 * sums[..., 0] / sums[..., 1], resamples=500)
    draws = np.random.default_rng(0).integers(0, 30, (500, 30))

    def score(models: Array, chosen: Any) -> float:
        return float(np.mean([100 * m[chosen, 0].sum() / m[chosen, 1].sum() for m in models]))

    drawn = np.array([score(one, chosen) - score(other, chosen) for chosen in draws])
    assert found is not None
    assert found.difference == pytest.approx(score(one, np.arange(30)) - score(other, np.arange(30)))
    assert found.interval == pytest.approx(tuple(np.quantile(drawn, [0.025, 0.975])))
    assert found.p == pytest.approx(2 * (min((drawn <= 0).sum(), (drawn >= 0).sum()) + 1) / 501)


def test_weights_count_as_often_as_they_say() -> None:
    """An item of weight 3 is as good as a mean over its three tokens."""
    weights, values = np.array([1.0, 3.0, 2.0]), np.array([0.5, 0.2, 0.9])
    sums = np.stack([weights * values, weights], axis=-1).sum(0)
    assert mean_score(sums) == pytest.approx(np.average(values, weights=weights))


def test_the_same_texts_are_no_difference() -> None:
    same = pairs_of_values(np.random.default_rng(3).normal(size=(2, 20)))
    found = items_bootstrap(same, same)
    assert found is not None and found.interval == [0.0, 0.0] and found.p == 1.0


def test_too_few_items_or_no_score_is_said_by_none() -> None:
    assert items_bootstrap(np.ones((2, 1, 2)), np.ones((2, 1, 2))) is None
    one = pairs_of_values(np.random.default_rng(4).normal(size=(1, 3)))
    one[:, :2, 1] = 0.0  # a draw of the first two items has no weight at all

    assert items_bootstrap(one, one) is None


# ---------------------------------------------------------------------------------------------------------------------
# Error rates, by simulation. Bands: a share of n runs is off its expectation by more than 4 sqrt(p (1 - p) / n) once in 16,000.


def band(rate: float, runs: int) -> float:
    return 4 * float(np.sqrt(rate * (1 - rate) / runs))


@pytest.mark.parametrize("seeds", [2, 3, 5])
def test_tost_is_wrong_at_the_margin_as_often_as_alpha_says(seeds: int) -> None:
    """The true difference is the margin itself: to call it equivalent is an error, and the most frequent one."""
    rng, runs = np.random.default_rng(5), 2000
    one, shared = rng.normal(1.0, 0.1, (runs, seeds)), rng.normal(0.0, 2.0, (runs, seeds))
    wrong = np.mean([(paired(a + s, s, 1.0).p_equivalent or 0) < ALPHA for a, s in zip(one, shared, strict=True)])
    assert abs(wrong - ALPHA) < band(ALPHA, runs)


def test_tost_has_power_when_strategies_are_equal_and_never_doubles_as_a_t_test() -> None:
    rng, runs = np.random.default_rng(6), 1000
    found = [paired(d, [0.0] * 5, 1.0) for d in rng.normal(0.0, 0.4, (runs, 5)).tolist()]
    assert np.mean([(p.p_equivalent or 0) < ALPHA for p in found]) > 0.9
    assert abs(np.mean([(p.p_different or 0) < ALPHA for p in found]) - ALPHA) < band(ALPHA, runs)


def test_pairs_see_what_the_seeds_noise_hides_from_an_unpaired_test() -> None:
    rng = np.random.default_rng(7)
    noise = rng.normal(0, 5, (200, 5))
    pairs = [(n + 1.0 + rng.normal(0, 0.3, 5), n) for n in noise]
    assert np.mean([(paired(a, b).p_different or 0) < ALPHA for a, b in pairs]) > 0.9
    assert np.mean([stats.ttest_ind(a, b)[1] < ALPHA for a, b in pairs]) < 0.1


def test_holm_keeps_the_chance_of_any_false_claim() -> None:
    """Five strategies that differ from the reference in nothing; the reference's noise is in all of the differences."""
    rng, runs = np.random.default_rng(8), 1500
    raw, adjusted = [], []
    for _ in range(runs):
        reference, others = rng.normal(0, 1, 5).tolist(), rng.normal(0, 1, (5, 5))
        p_values = [paired(other, reference).p_different for other in others.tolist()]
        raw.append(min(p for p in p_values if p is not None) < ALPHA)
        adjusted.append(min(p for p in holm(p_values) if p is not None) < ALPHA)
    assert np.mean(adjusted) < ALPHA + band(ALPHA, runs)
    assert np.mean(raw) > 2 * ALPHA  # what it protects from


def test_bootstrap_intervals_cover_the_truth() -> None:
    """A skewed score over 100 items, two models of 3 seeds each; the true difference is 0.2."""
    rng, runs = np.random.default_rng(9), 400
    covered, found_by_p = 0, 0
    for _ in range(runs):
        items = rng.exponential(1.0, 100)  # how hard an item is, for both
        one, other = (items + rng.exponential(size, (3, 100)) for size in (1.2, 1.0))
        found = items_bootstrap(pairs_of_values(one), pairs_of_values(other), resamples=400)
        assert found is not None
        low, high = found.interval
        covered += low <= 0.2 <= high
        found_by_p += (found.p < ALPHA) == (not low <= 0 <= high)
    assert abs(covered / runs - 0.95) < band(0.95, runs)
    assert found_by_p / runs > 0.97  # the interval and p say the same, but for the +1 in p
