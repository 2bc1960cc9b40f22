"""The measure itself, on code whose bytes are known."""

from __future__ import annotations

import torch

from tests.tensor_bytes import TensorBytes


def test_live_and_peak_are_those_of_storages() -> None:
    before = torch.zeros(1000)
    with TensorBytes() as made:
        a = before + 1
        b = a[:10].view(2, 5)  # no bytes of its own
        assert made.live == made.peak == 4000
        c = torch.empty(500, dtype=torch.bfloat16)
        assert (made.live, made.peak) == (5000, 5000)
        del a
        assert made.live == 5000  # b holds it
        del b
        assert (made.live, made.peak) == (1000, 5000)
        c.add_(1)
        before.mul_(2)
        assert (made.live, made.peak) == (1000, 5000)
    del c
    assert made.live == 0
    assert torch.Size((2, 5)) in made.shapes


def test_what_autograd_keeps_is_seen() -> None:
    leaf = torch.zeros(100, requires_grad=True)
    with TensorBytes() as made:
        loss = (leaf.exp() * 2).sum()
        assert made.live == 400 + 4  # the exponential, kept for its own derivative, and the sum
        loss.backward()
        assert made.live == 400 + 4  # the gradient, and the sum
    assert leaf.grad is not None
