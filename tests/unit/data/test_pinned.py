"""Batches for a GPU wait in pinned memory, which is filled in the loader's thread, beside the training."""

from __future__ import annotations

import threading
from dataclasses import fields
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from llmkd.data import batches as data
from llmkd.data.batches import Batch, collate


class Rows:
    """Eight rows, two to a step."""

    def window_steps(self, batch_size: int) -> int:
        return 8 // batch_size

    def window(self, window: int, *, batch_size: int, seed: int) -> np.ndarray:
        return np.arange(8).reshape(-1, batch_size)


def _make(numbers: np.ndarray) -> Batch:
    rows = [{"input_ids": list(range(2, 6 + n)), "trained": [True] * (4 + n)} for n in numbers]
    return collate(rows, pad_id=0, packed=True, numbers=list(numbers))


@pytest.mark.parametrize("gpu", [True, False])
def test_a_batch_is_pinned_whole_where_there_is_a_gpu(monkeypatch: pytest.MonkeyPatch, *, gpu: bool) -> None:
    pinned: dict[int, int] = {}

    def pin_memory(tensor: Tensor) -> Tensor:
        pinned[id(tensor)] = threading.get_ident()
        return tensor

    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    monkeypatch.setattr(Tensor, "pin_memory", pin_memory)
    shared: dict[str, Any] = dict(seed=0, start_step=0, steps=3, batch_size=2, accumulation=1, rank=0, world_size=1)
    steps = [step for step in data.batches(Rows(), make=_make, **shared)]
    tensors = [getattr(batch, field.name) for (batch,) in steps for field in fields(batch)]
    tensors = [tensor for tensor in tensors if isinstance(tensor, Tensor)]
    assert len(steps) == 3 and len(tensors) >= 3 * 5
    assert {id(tensor) for tensor in tensors} == pinned.keys() if gpu else not pinned
    assert threading.get_ident() not in pinned.values()
