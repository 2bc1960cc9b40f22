"""Which texts a run wants: a pure function of (seed, step), like the order of the rows.

A round is the steps for which texts are written at one time. In a step some of the batch's rows keep their own completions; the others are
written: their prompts are continued, each prompt `samples` times.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from llmkd.data.order import permuted
from llmkd.recipe.rollouts import written_until

LOOKS = 20
"""At about so many rounds, evenly spaced, the fixed prompts are continued too: as often as anybody looks at, and no more."""
_PLACES, _SEED, _SHOWN = 7, 8, 9
"""What a number is drawn for: part of its key (1 to 6: llmkd.data)."""


@dataclass(frozen=True)
class Wanted:
    """The texts that a step wants, in the order of their places in its batch."""

    step: int
    """From 0."""
    places: np.ndarray
    """[n] where in the batch's rows each text stands."""
    rows: np.ndarray
    """[n] the number of the row whose prompt it continues."""
    seeds: np.ndarray
    """[n] what its tokens are drawn by."""


@dataclass(frozen=True)
class Schedule:
    """The rounds of a run."""

    every: int
    share: float
    samples: int
    seed: int
    steps: int
    """Of the whole run."""

    def round_of(self, step: int) -> range:
        """The steps of the round that a step (from 0) is in."""
        first = step - step % self.every
        return range(first, min(first + self.every, self.steps))

    def ends_round(self, step: int) -> bool:
        """Whether a step (from 0) is the last of its round: the next steps' texts are written when it is done."""
        return step + 1 == self.round_of(step).stop

    def shows(self, first: int) -> bool:
        """Whether the fixed prompts are continued in the round that begins with this step: in some rounds, the last among them."""
        number, last = first // self.every, (self.steps - 1) // self.every
        return number == last or number % max(1, last // LOOKS) == 0

    def shown_seeds(self, count: int) -> list[int]:
        """What the texts of the fixed prompts are drawn by: the same in every round, so that the weights alone change them."""
        return _seeds([self.seed, _SHOWN], count).tolist()

    def wanted(self, step: int, rows: np.ndarray) -> Wanted:
        """The texts of a step (from 0), whose batch has these rows. The share of written rows is exact within one row at any step."""
        before, after = (written_until(number, len(rows), self.share) for number in (step, step + 1))
        chosen = np.arange(after - before)
        places = np.sort(permuted(chosen, len(rows), (self.seed, _PLACES, step)))
        prompts = rows[places[chosen - chosen % self.samples]]
        return Wanted(step, places, prompts, _seeds([self.seed, _SEED, step], len(chosen)))


def _seeds(key: list[int], count: int) -> np.ndarray:
    """[count] int64, none negative: vLLM keeps seeds as such."""
    return (np.random.SeedSequence(key).generate_state(max(1, count), np.uint64)[:count] >> np.uint64(1)).astype(
        np.int64
    )
