"""The routers' load balance against transformers' own and against its definition written out."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers.models.qwen3_moe.modeling_qwen3_moe import load_balancing_loss_func

from llmkd.data.batches import Batch, collate
from llmkd.losses.load_balance import load_balance

ROWS: list[Any] = [{"input_ids": [5] * n, "trained": [True] * n} for n in (7, 1, 12, 3)]
EXPERTS, CHOSEN = 6, 2


def _logits(batch: Batch, routers: int = 3) -> list[torch.Tensor]:
    """The same numbers for a token wherever it stands; NaN at padding."""
    torch.manual_seed(0)
    of_tokens = torch.randn(routers, sum(len(row["input_ids"]) for row in ROWS), EXPERTS, dtype=torch.float64)
    whole = torch.full((routers, batch.input_ids.numel(), EXPERTS), torch.nan, dtype=torch.float64)
    whole[:, batch.attended_at] = of_tokens
    return list(whole.requires_grad_().unbind())


def _ours(batch: Batch, logits: list[torch.Tensor]) -> torch.Tensor:
    return load_balance(logits, batch.attended_at, batch.of_rows(), CHOSEN)


def _row_by_row(batch: Batch, logits: list[torch.Tensor]) -> torch.Tensor:
    """E x the sum over experts of the mean number of choices x the mean probability, by loops, in float64."""
    total, first = torch.zeros((), dtype=torch.float64), 0
    for row in ROWS:
        at = batch.attended_at[first : first + len(row["input_ids"])]
        first += len(at)
        shares = torch.cat([of_router[at].softmax(-1) for of_router in logits])
        counts = torch.zeros(EXPERTS, dtype=torch.float64)
        for share in shares:
            counts[share.topk(CHOSEN).indices] += 1
        total = total + len(at) * EXPERTS * (counts / len(shares) * shares.mean(0)).sum()
    return total


@pytest.mark.parametrize("packed", [False, True])
def test_value_and_gradient_are_those_of_the_definition(packed: bool) -> None:
    """Padding counts nothing, whatever it holds, and packed documents are rows."""
    batch = collate(ROWS, pad_id=0, packed=packed)
    logits, plain = _logits(batch), _logits(batch)
    ours, expected = _ours(batch, logits), _row_by_row(batch, plain)
    assert ours.item() == pytest.approx(expected.item(), rel=1e-6)
    for mine, theirs in zip(torch.autograd.grad(ours, logits), torch.autograd.grad(expected, plain), strict=True):
        assert torch.allclose(mine, theirs, rtol=1e-5, atol=1e-7) and mine.abs().max() > 0


def test_of_one_row_it_is_the_loss_of_transformers() -> None:
    batch = collate(ROWS[2:3], pad_id=0, packed=False)
    torch.manual_seed(1)
    logits = list(torch.randn(4, batch.input_ids.numel(), EXPERTS).unbind())
    as_theirs: Any = tuple(logits)
    theirs = load_balancing_loss_func(as_theirs, EXPERTS, CHOSEN, batch.attention_mask)
    assert isinstance(theirs, torch.Tensor)
    assert _ours(batch, logits).item() / 12 == pytest.approx(theirs.item(), rel=1e-6)


def test_micro_batches_add_up() -> None:
    whole = collate(ROWS, pad_id=0, packed=False)
    logits = _logits(whole)
    at, parts = whole.attended_at, []
    for rows, first, last in ((ROWS[:1], 0, 7), (ROWS[1:], 7, 23)):
        batch = collate(rows, pad_id=0, packed=False)
        own = torch.zeros(len(logits), batch.input_ids.numel(), EXPERTS, dtype=torch.float64)
        own[:, batch.attended_at] = torch.stack(logits)[:, at[first:last]].detach()
        parts.append(_ours(batch, list(own)).item())
    assert sum(parts) == pytest.approx(_ours(whole, logits).item(), rel=1e-6)


def test_even_use_of_all_experts_gives_the_number_of_choices() -> None:
    batch = collate([{"input_ids": [5] * 6, "trained": [True] * 6}], pad_id=0, packed=True)
    logits = torch.stack([torch.eye(EXPERTS)[n] + torch.eye(EXPERTS)[(n + 1) % EXPERTS] for n in range(6)])
    assert _ours(batch, [logits]).item() / 6 == pytest.approx(CHOSEN)
    one_sided = torch.tensor([[9.0, 8.0, 0, 0, 0, 0]]).repeat(6, 1)
    assert _ours(batch, [one_sided]).item() / 6 > 2 * CHOSEN
