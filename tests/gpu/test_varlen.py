"""Attention within each document on a GPU: what masks give, and no mask. Run with `pytest -m gpu tests/gpu`."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoModelForCausalLM, Qwen3Config

from llmkd.data.batches import Batch, Packed, collate_sequences
from llmkd.models import parts, varlen
from llmkd.models.load import attention_implementation

pytestmark = pytest.mark.gpu
HEADS, SHARED, SIZE = 8, 2, 64


@pytest.fixture(autouse=True)
def gpu() -> None:
    if not torch.cuda.is_available():
        pytest.fail("this test was asked for by -m gpu, and there is no CUDA device")


def _packed(sequences: list[list[int]], width: int) -> Packed:
    """Documents of these lengths, sequence by sequence, with what padding they leave."""
    packed = _batch(sequences, width).to(torch.device("cuda")).packed
    assert packed is not None
    return packed


def _batch(sequences: list[list[int]], width: int) -> Batch:
    draw = torch.Generator().manual_seed(0)
    rows = [
        [{"input_ids": torch.randint(2, 512, (n,), generator=draw).tolist(), "trained": [True] * n} for n in lengths]
        for lengths in sequences
    ]
    return collate_sequences(rows, width=width, pad_id=0)


def _states(rows: int, width: int, dtype: torch.dtype) -> list[Tensor]:
    torch.manual_seed(1)
    made = [
        torch.randn(rows, heads, width, SIZE, device="cuda", dtype=torch.float32) for heads in (HEADS, SHARED, SHARED)
    ]
    return [states.to(torch.bfloat16).to(dtype).requires_grad_() for states in made]


@pytest.mark.parametrize("window", [None, 100])
@pytest.mark.parametrize(
    ("sequences", "width"),
    [([[130, 1, 257, 90, 34]], 512), ([[300, 200], [512]], 512), ([[77], [128], [3]], 128)],
    ids=["packed", "two_sequences", "padded"],
)
def test_it_is_attention_under_a_mask_to_bf16s_rounding(
    sequences: list[list[int]], width: int, window: int | None
) -> None:
    """Values and gradients, beside fp32 under a mask; they may be twice as far from it as bf16 under a mask is."""
    packed = _packed(sequences, width)
    rows, flat = len(sequences), packed.positions.flatten()
    begins = torch.arange(len(flat), device="cuda") - flat
    back = flat[:, None] - flat
    mask = (begins[:, None] == begins) & (back >= 0) & (back < (window or width))

    def found(dtype: torch.dtype, *, masked: bool) -> list[Tensor]:
        states = _states(rows, width, dtype)
        if masked:
            query, *others = (s.transpose(0, 1).flatten(1, 2)[None] for s in states)
            key, value = (s.repeat_interleave(HEADS // SHARED, dim=1) for s in others)
            whole = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=0.1)[0]
            whole = whole.transpose(0, 1).unflatten(0, (rows, width))
        else:
            config = Qwen3Config(head_dim=SIZE)
            config._attn_implementation = varlen.NAME
            options: Any = varlen.options(config, packed)
            whole, _ = varlen.attention(torch.nn.Module(), *states, scaling=0.1, sliding_window=window, **options)
        assert whole.shape == (rows, width, HEADS, SIZE)
        torch.manual_seed(2)
        (whole.float() * torch.randn(whole.shape, device="cuda")).sum().backward()
        return [part.detach().float() for part in (whole, *(state.grad for state in states)) if part is not None]

    exact, masked, ours = (
        found(dtype, masked=m) for dtype, m in ((torch.float32, True), (torch.bfloat16, True), (torch.bfloat16, False))
    )
    assert len(ours) == 4
    for expected, theirs, mine in zip(exact, masked, ours, strict=True):
        assert (mine - expected).norm() <= max(2 * (theirs - expected).norm(), 1e-3 * expected.norm())


def _model(attention: str, positions: int) -> Any:
    config = Qwen3Config(
        vocab_size=512, hidden_size=256, intermediate_size=512, num_hidden_layers=2, num_attention_heads=HEADS,
        num_key_value_heads=SHARED, head_dim=SIZE, max_position_embeddings=positions,
    )  # fmt: skip
    torch.manual_seed(0)
    with torch.device("cuda"):
        return AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, attn_implementation=attention)


def test_a_row_of_16384_tokens_makes_no_mask_and_waits_for_nothing() -> None:
    """Sixteen documents of 1,024 tokens in one row take the memory that they take as sixteen rows; one mask would be 256 MiB more."""
    length, tokens = 1024, 16_384
    name, why = attention_implementation("auto", torch.bfloat16, Qwen3Config(head_dim=SIZE))
    assert name == varlen.NAME, why
    model = _model(name, tokens)
    row, rows = (
        _batch(sequences, width).to(torch.device("cuda"))
        for sequences, width in (([[length] * 16], tokens), ([[length]] * 16, length))
    )
    rows = replace(rows, starts=None)  # as padded rows are, by sdpa
    finals, needed = [], []
    for batch in (rows, row):
        parts.final_state(model, batch).sum().backward()  # with what is made once
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        torch.cuda.set_sync_debug_mode("error" if batch is row else "default")
        try:
            final = parts.final_state(model, batch)
            final.sum().backward()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        needed.append(torch.cuda.max_memory_allocated() - before)
        finals.append(final.detach().float().flatten(0, 1))
    assert needed[1] < needed[0] + 128 * 2**20
    assert (finals[0] - finals[1]).norm() <= 0.02 * finals[0].norm()
