"""The order of rows: a pure function of (seed, step) that uses every row, in the shares of a mixture, whatever the number of rows."""

from __future__ import annotations

import tracemalloc
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmkd.data import order
from llmkd.data.order import Source, counts, drawn, held_out_rows, permuted, rows_of_step, rows_of_window, weighed


@settings(deadline=None)
@given(size=st.integers(1, 3000), key=st.lists(st.integers(0, 2**40), min_size=1, max_size=3))
def test_a_permutation_takes_each_number_once(size: int, key: list[int]) -> None:
    assert sorted(permuted(np.arange(size), size, key).tolist()) == list(range(size))


def test_a_part_of_a_permutation_is_the_same_as_that_part_of_the_whole() -> None:
    whole = permuted(np.arange(1000), 1000, (3, 1))
    assert permuted(np.array([999, 5, 0]), 1000, (3, 1)).tolist() == whole[[999, 5, 0]].tolist()
    assert permuted(np.arange(1000), 1000, (3, 2)).tolist() != whole.tolist()


def test_permutations_are_drawn_evenly() -> None:
    """All orders of 4 rows come up alike: the largest of 24 counts is within five standard deviations of their mean."""
    seen = Counter(tuple(permuted(np.arange(4), 4, (seed,)).tolist()) for seed in range(24 * 200))
    assert len(seen) == 24 and max(abs(count - 200) for count in seen.values()) < 5 * 200**0.5


def test_a_permutation_does_not_keep_neighbours_together() -> None:
    places = permuted(np.arange(10_000), 10_000, (0,))
    assert abs(np.corrcoef(places[:-1], places[1:])[0, 1]) < 0.05
    assert abs(np.corrcoef(places, np.arange(10_000))[0, 1]) < 0.05


def test_each_pass_takes_each_row_once_and_in_another_order() -> None:
    rows = drawn(np.arange(30), [Source(5, 10)], seed=1, held_out_seed=0).reshape(3, 10)
    assert [sorted(one) for one in rows.tolist()] == [list(range(5, 15))] * 3
    assert len({tuple(one) for one in rows.tolist()}) == 3


def mixture() -> list[Source]:
    first, second, third = weighed([0.5, 0.3, 0.2])
    return [Source(0, 100, weight=first), Source(100, 7, weight=second), Source(107, 1000, weight=third)]


def of_source(rows: np.ndarray) -> list[int]:
    return np.bincount(np.digitize(rows, [100, 107]), minlength=3).tolist()


def test_a_mixtures_shares_are_exact_at_every_place() -> None:
    rows = drawn(np.arange(4000), mixture(), seed=0, held_out_seed=0)
    for places in (1, 2, 10, 999, 4000):
        taken = of_source(rows[:places])
        assert taken == counts(places, mixture())
        assert all(abs(count - share * places) <= 1.01 for count, share in zip(taken, (0.5, 0.3, 0.2), strict=True))


def test_within_a_mixture_each_source_is_passed_over_row_by_row() -> None:
    rows = drawn(np.arange(4000), mixture(), seed=0, held_out_seed=0)
    for first, last in ((0, 100), (100, 107), (107, 1107)):
        own = rows[(rows >= first) & (rows < last)]
        seen = Counter(own[: len(own) // (last - first) * (last - first)].tolist())
        assert len(set(seen.values())) <= 1, "whole passes take each row as often as any other"


def test_weights_far_into_a_run_do_not_drift() -> None:
    far = 2**40
    assert sum(counts(far, mixture())) == far
    assert of_source(drawn(np.arange(far, far + 1000), mixture(), seed=0, held_out_seed=0)) == [500, 300, 200]


@pytest.mark.parametrize("lengths", [None, (np.arange(1107) % 50 + 1).__getitem__])
def test_a_step_is_a_function_of_its_number(lengths: order.Lengths | None) -> None:
    """Step 1,000,000 is drawn at once, and is what a run that came there would draw."""
    how = {"lengths": lengths, "batch_size": 8, "seed": 4}
    window, place = divmod(1_000_000, order.window_steps(mixture(), 8))
    assert (
        rows_of_step(1_000_000, mixture(), **how).tolist() == rows_of_window(window, mixture(), **how)[place].tolist()
    )
    assert rows_of_step(0, mixture(), **how).tolist() != rows_of_step(1_000_000, mixture(), **how).tolist()


def test_rows_of_similar_length_share_a_step() -> None:
    lengths = np.random.default_rng(0).integers(1, 500, 4096)
    steps = rows_of_window(0, [Source(0, 4096)], lengths=lengths.__getitem__, batch_size=16, seed=0)
    within = np.ptp(lengths[steps], axis=1).mean()
    apart = np.ptp(lengths[rows_of_window(0, [Source(0, 4096)], lengths=None, batch_size=16, seed=0)], axis=1).mean()
    assert within < apart / 10
    assert all((np.diff(lengths[step]) <= 0).all() for step in steps), "longest first"
    means = lengths[steps].mean(axis=1)
    assert abs(np.corrcoef(means, np.arange(len(means)))[0, 1]) < 0.5, "long steps do not all come first"


def test_a_grouped_step_has_its_share_of_each_source_and_rows_of_one_length() -> None:
    """Also where one source's rows are all longer than the other's."""
    lengths = np.concatenate([np.full(400, 10), np.full(400, 100)]) + np.arange(800) % 7
    sources = [Source(0, 400, weight=1), Source(400, 400, weight=1)]
    steps = np.concatenate(
        [rows_of_window(w, sources, lengths=lengths.__getitem__, batch_size=8, seed=0) for w in (0, 1)]
    )
    assert ((steps < 400).sum(axis=1) == 4).all() and (np.diff(lengths[steps], axis=1) <= 0).all()
    first = steps[:32]
    assert len(set(first.flatten().tolist())) == first.size
    within = [np.ptp(lengths[step[step < 400]]) for step in first]
    assert np.mean(within) < 1, "rows of similar length still meet"
    seen = np.cumsum((steps < 400).sum(axis=1))
    assert seen.tolist() == [counts(8 * (step + 1), sources)[0] for step in range(len(steps))]


def test_rows_held_out_are_never_drawn() -> None:
    sources = [Source(0, 50, held_out=5), Source(50, 30, held_out=10)]
    held = held_out_rows(sources, 7)
    assert len(held) == 15 == len(set(held.tolist())) and (held < 50).sum() == 5
    rows = drawn(np.arange(5000), sources, seed=3, held_out_seed=7)
    assert not set(held.tolist()) & set(rows.tolist()) and len(set(rows.tolist())) == 65
    assert held_out_rows(sources, 8).tolist() != held.tolist()


def test_nothing_as_long_as_the_data_is_made() -> None:
    rows_of_step(0, [Source(0, 100)], lengths=None, batch_size=64, seed=0)
    tracemalloc.start()
    rows_of_step(10**6, [Source(0, 10**12)], lengths=None, batch_size=64, seed=0)
    assert tracemalloc.get_traced_memory()[1] < 2**20
    tracemalloc.stop()
