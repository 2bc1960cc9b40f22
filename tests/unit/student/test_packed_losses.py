"""Sequences that are packed by best fit give the losses of their rows, each on its own."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from torch import Tensor

from llmkd.data.batches import IGNORE, Batch, collate
from llmkd.data.order import Source
from llmkd.data.packing import packed_rows
from llmkd.data.tokenized import PackedSource, PackedTokens, Tokens
from llmkd.models import load
from llmkd.teachers.resident import ResidentTeacher
from tests.passes import distiller, step_settings

PAIRS, WIDTH, PAD = ((0, 1), (2, 4), (5, 5)), 24, 0


@pytest.fixture(scope="module")
def tokens() -> Tokens:
    """Rows of 2 to 23 tokens, so that sequences of 24 seldom end with the last of them."""
    draw = np.random.default_rng(0)
    rows = []
    for length in draw.integers(2, WIDTH, 30).tolist():
        ids, trained = draw.integers(2, 300, length).tolist(), draw.integers(0, 2, length).astype(bool).tolist()
        rows.append({"input_ids": ids, "trained": [*trained[:-1], True], "length": length})
    lengths = np.array([row["length"] for row in rows])
    return Tokens(Dataset.from_list(rows), (lengths,), (Source(0, len(rows)),))


@pytest.fixture(scope="module")
def losses(tiny: Path) -> Callable[[Batch], Tensor]:
    """(sum of CE, of KL, of each pair's distance) of a micro-batch, by the student's module and a resident teacher."""
    teacher, student = (
        load.load_causal_lm(tiny / "teacher", dtype=torch.float32, ds_config=None, attention="sdpa") for _ in range(2)
    )
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    source = ResidentTeacher(teacher, [block for _, block in PAIRS], normed_last=False, ds_config=None)
    module = distiller(student, PAIRS)
    settings = step_settings(PAIRS, kl_positions="attended")

    def sums(batch: Batch) -> Tensor:
        result: Any = module(batch, source.signals(batch), settings)
        return result.sums.double()

    return sums


@pytest.mark.parametrize("flat", [False, True])
def test_packed_sequences_have_the_losses_of_their_rows(
    tokens: Tokens, losses: Callable[[Batch], Tensor], flat: bool
) -> None:
    packed = PackedSource(*packed_rows(tokens.lengths[0], 0, tokens.sources[0], 0, WIDTH))
    sequences = PackedTokens(tokens, (packed,), WIDTH, flat=flat)
    numbers = np.arange(sequences.count)
    batch = sequences.batch(numbers, pad_id=PAD)
    ends = batch.attended.view(-1, WIDTH)
    assert batch.input_ids.shape == ((1, WIDTH * len(numbers)) if flat else (len(numbers), WIDTH))
    assert (~ends[:, -1]).sum() > 3 and ends.sum(1).max() == WIDTH, "some end with padding, and some are full"
    assert len(batch.rows) == 30 > len(numbers), "some hold several rows"
    alone = [collate([tokens.row(row)], pad_id=PAD, packed=False) for row in batch.rows]
    trained = sum(int((one.targets != IGNORE).sum()) for one in alone)
    assert batch.counts.trained == trained and batch.counts.attended == int(tokens.lengths[0].sum())
    expected = torch.stack([losses(one) for one in alone]).sum(0)
    assert (expected > 1).all()
    torch.testing.assert_close(losses(batch), expected, rtol=1e-6, atol=0)
