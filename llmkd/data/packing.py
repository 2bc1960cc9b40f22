"""Rows laid end to end into sequences of one length, by best fit."""

from __future__ import annotations

import bisect

import numpy as np

from llmkd.data.order import PACKED, Source, permuted, trained_rows

WINDOW = 16_384
"""Rows that are packed together: enough for the last, half-empty sequences of a window to be few."""


def best_fit(lengths: np.ndarray, capacity: int) -> list[list[int]]:
    """The places of rows by sequence: from the longest down, each goes where it leaves the least space free."""
    sequences: list[list[int]] = []
    with_space: dict[int, list[int]] = {}
    spaces: list[int] = []  # the keys of with_space, ascending
    for place in np.argsort(-lengths.astype(np.int64), kind="stable").tolist():
        length = int(lengths[place])
        at = bisect.bisect_left(spaces, length)
        if at == len(spaces):
            space, sequence = capacity, len(sequences)
            sequences.append([])
        else:
            space = spaces[at]
            sequence = with_space[space].pop()
            if not with_space[space]:
                del with_space[space], spaces[at]
        sequences[sequence].append(place)
        left = space - length
        if left and left not in with_space:
            with_space[left] = []
            bisect.insort(spaces, left)
        if left:
            with_space[left].append(sequence)
    return sequences


def packed_rows(
    lengths: np.ndarray, number: int, source: Source, held_out_seed: int, capacity: int
) -> list[np.ndarray]:
    """(where each sequence begins, and the end of the last [sequences + 1]; the rows' numbers within the source, sequence after sequence).

    `lengths`: of the source's rows; `number`: the source's. The rows are shuffled first, so that neighbours in the data are not all put
    into one sequence; which rows share a sequence is the same in every pass and for every seed of a run.
    """
    starts, rows = [0], []
    for first in range(0, source.trained, WINDOW):
        window = np.arange(first, min(first + WINDOW, source.trained))
        places = permuted(window, source.trained, (held_out_seed, number, PACKED))
        numbers = trained_rows(places, number, source, held_out_seed) - source.first
        for sequence in best_fit(lengths[numbers], capacity):
            rows.append(numbers[sequence])
            starts.append(starts[-1] + len(sequence))
    return [np.array(starts, dtype=np.int64), np.concatenate(rows)]
