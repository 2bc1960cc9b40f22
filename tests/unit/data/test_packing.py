"""Best-fit packing: every row once, no sequence too long, hardly any place left empty."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from llmkd.data.order import Source, held_out_rows
from llmkd.data.packing import WINDOW, best_fit, packed_rows


@settings(deadline=None)
@given(lengths=st.lists(st.integers(1, 64), min_size=1, max_size=200))
def test_each_row_is_in_one_sequence_and_none_is_too_long(lengths: list[int]) -> None:
    sequences = best_fit(np.array(lengths), 64)
    assert sorted(sum(sequences, [])) == list(range(len(lengths)))
    used = [sum(lengths[place] for place in sequence) for sequence in sequences]
    assert max(used) <= 64
    assert sum(places <= 32 for places in used) <= 1, "the later of two would have gone into the earlier"


def test_a_row_goes_where_it_leaves_the_least_space() -> None:
    assert best_fit(np.array([6, 5, 4, 3]), 10) == [[0, 2], [1, 3]]


def test_sequences_of_text_like_lengths_are_full() -> None:
    lengths = np.minimum(2048, np.random.default_rng(0).lognormal(5.5, 0.8, 2 * WINDOW).astype(int) + 1)
    starts, rows = packed_rows(lengths, 0, Source(0, len(lengths)), 0, 2048)
    assert sorted(rows.tolist()) == list(range(len(lengths)))
    assert lengths.sum() / (2048 * (len(starts) - 1)) > 0.99


def test_neighbours_in_the_data_are_not_packed_together() -> None:
    """Without the shuffle the first rows would share the first sequences; held out or not."""
    for held_out in (0, 100):
        _, rows = packed_rows(np.full(1000, 8), 0, Source(0, 1000, held_out=held_out), 0, 64)
        assert len(set(rows.tolist())) == 1000 - held_out
        assert (np.abs(np.diff(rows)) == 1).mean() < 0.05


def test_rows_held_out_are_in_no_sequence() -> None:
    source = Source(100, 40, held_out=10)
    _, rows = packed_rows(np.full(40, 3), 0, source, 5, 16)
    held = held_out_rows([source], 5)
    assert len(rows) == 30 and not set((rows + 100).tolist()) & set(held.tolist())
