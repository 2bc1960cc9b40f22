"""States that wait in pinned host memory: they come back as they went. Run with `pytest -m gpu tests/gpu`."""

from __future__ import annotations

import pytest
import torch

from llmkd.teachers.resident import OffloadedStates

pytestmark = pytest.mark.gpu
BLOCKS, SHAPE = 8, (4, 1024, 2048)


@pytest.mark.parametrize("order", [range(BLOCKS), range(BLOCKS - 1, -1, -1)], ids=["forward", "reverse"])
def test_states_come_back_whole_while_both_streams_are_busy(order: range) -> None:
    if not torch.cuda.is_available():
        pytest.fail("this test was asked for by -m gpu, and there is no CUDA device")
    weight = torch.randn(SHAPE[-1], SHAPE[-1], device="cuda", dtype=torch.bfloat16) / SHAPE[-1] ** 0.5
    for _ in range(3):  # later rounds are given the memory of earlier ones
        state = torch.randn(SHAPE, device="cuda", dtype=torch.bfloat16)
        expected = []
        away = OffloadedStates(list(order), torch.cuda.Stream())
        for block in range(BLOCKS):
            state = state @ weight  # queued, not done, when the copy is asked for
            expected.append(state.float().sum())
            away[block] = state
        sums = []
        for block in order:
            back = away[block]
            sums.append((block, back.float().sum()))
            _ = back @ weight
            del away[block]
        torch.cuda.synchronize()
        for block, total in sums:
            assert torch.equal(total, expected[block])
        assert len(away) == 0
