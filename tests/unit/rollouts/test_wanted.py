"""Which texts a run wants: exact shares, prompts of their batch, seeds of their own, the same whatever was asked before."""

from __future__ import annotations

import numpy as np
import pytest

from llmkd.rollouts.wanted import Schedule


def schedule(**changes: float) -> Schedule:
    return Schedule(**{"every": 4, "share": 1.0, "samples": 1, "seed": 3, "steps": 10, **changes})  # type: ignore[arg-type]


def test_rounds_cover_the_steps_and_the_last_one_may_be_shorter() -> None:
    rounds = schedule()
    assert [rounds.round_of(step) for step in range(10)] == [
        *[range(0, 4)] * 4,
        *[range(4, 8)] * 4,
        *[range(8, 10)] * 2,
    ]
    assert [step for step in range(10) if rounds.ends_round(step)] == [3, 7, 9]


@pytest.mark.parametrize("share", [0.0, 0.1, 1 / 3, 0.5, 0.875, 1.0])
def test_the_share_is_exact_within_a_row_at_any_step(share: float) -> None:
    rows = np.arange(16)
    counts = np.cumsum([len(schedule(share=share).wanted(step, rows).places) for step in range(200)])
    assert np.abs(counts - share * 16 * np.arange(1, 201)).max() < 1.01
    written = schedule(share=share).wanted(7, rows)
    assert sorted(set(written.places)) == list(written.places)  # each place once, in order


def test_samples_continue_the_same_prompt_with_other_seeds() -> None:
    rows = np.arange(100, 108)
    wanted = schedule(samples=3).wanted(2, rows)
    assert list(wanted.rows) == [100, 100, 100, 103, 103, 103, 106, 106]
    assert len(set(wanted.seeds.tolist())) == 8


def test_a_step_is_the_same_whatever_was_asked_before_and_differs_from_others() -> None:
    rows = np.arange(12)
    one, again = (schedule(share=0.5).wanted(5, rows) for _ in range(2))
    assert all(np.array_equal(getattr(one, name), getattr(again, name)) for name in ("places", "rows", "seeds"))
    other = schedule(share=0.5).wanted(6, rows)
    assert not set(one.seeds) & set(other.seeds) and list(one.places) != list(other.places)
    assert not set(one.seeds) & set(schedule(share=0.5, seed=4).wanted(5, rows).seeds)


def test_seeds_are_such_as_every_backend_keeps() -> None:
    seeds = np.concatenate([schedule().wanted(step, np.arange(64)).seeds for step in range(50)])
    assert seeds.dtype == np.int64 and seeds.min() >= 0 and len(set(seeds.tolist())) == 3200
