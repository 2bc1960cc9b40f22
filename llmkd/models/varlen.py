"""`varlen`: attention within each document of packed rows, beside transformers' own kinds of attention. No mask is made of them.

On a GPU it is `torch.nn.attention.varlen`, FlashAttention over documents laid end to end; on a CPU scaled_dot_product_attention, document
by document. Rows that are not packed, and generation, are `sdpa` to it. Importing this module makes it known to transformers.
"""

from __future__ import annotations

import inspect
import itertools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.varlen import varlen_attn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from llmkd.data.batches import Packed
from llmkd.models.families import model_type

NAME, FLASH = "varlen", "flash_attention_2"
HEAD_MULTIPLE, LARGEST_HEAD, OLDEST_GPU = 8, 256, (8, 0)
"""What FlashAttention asks of a head's size and of a GPU."""


def lacking(config: Any, dtype: torch.dtype) -> str | None:
    """Why a model of this configuration can't have it here; None where it can."""
    if not model_type(config).varlen:
        return f"it has not been shown to keep documents apart in a {config.model_type!r} model"
    if getattr(config, "attention_dropout", 0.0) or getattr(config, "attn_pdrop", 0.0):
        return "this model drops attention at random"
    if not torch.cuda.is_available():
        return None
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    if not {"window_size", "enable_gqa"} <= inspect.signature(varlen_attn).parameters.keys():
        return f"torch {torch.__version__} is too old for it; 2.12 has all that it takes"
    if dtype == torch.float32:
        return "FlashAttention does not compute in float32"
    if torch.cuda.get_device_capability() < OLDEST_GPU:
        return f"this GPU is older than compute capability {'.'.join(map(str, OLDEST_GPU))}"
    if size % HEAD_MULTIPLE or size > LARGEST_HEAD:
        return f"FlashAttention's heads have a multiple of {HEAD_MULTIPLE} numbers up to {LARGEST_HEAD}, this model's {size}"
    return None


def options(config: Any, packed: Packed) -> dict[str, Any]:
    """What a model is given so that its attention keeps packed documents apart: their positions, and where they begin to an attention that
    takes it. transformers' own flash_attention_2 does, and with several rows in a batch it looks nowhere else."""
    name = config._attn_implementation
    if name not in (NAME, FLASH) or not model_type(config).varlen:
        return {"position_ids": packed.positions}
    # transformers takes a mask of four dimensions for a ready one, and makes none
    ready = {"attention_mask": packed.positions.new_empty(0, 0, 0, 0)} if name == NAME else {}
    begins, longest = packed.starts, packed.longest
    limits = {"cu_seq_lens_q": begins, "cu_seq_lens_k": begins, "max_length_q": longest, "max_length_k": longest}
    return {"position_ids": packed.positions, **limits, **ready}


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    cu_seq_lens_q: Tensor | None = None,
    max_length_q: int = 0,
    **others: Any,
) -> tuple[Tensor, None]:
    """What attention gives [B, T, heads, size] of queries [B, heads, T, size], keys and values; transformers calls it in each block.

    A token sees the tokens of its document up to itself, and of them the last `sliding_window`, where one is given.
    """
    if cu_seq_lens_q is None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **others
        )
    assert dropout == 0.0, "see `lacking`"
    window = None if sliding_window is None or sliding_window >= max_length_q else sliding_window
    q, k, v = (states.transpose(1, 2).flatten(0, 1) for states in (query, key, value))  # [B * T, heads, size]
    if query.is_cuda:
        limits: Any = (cu_seq_lens_q, cu_seq_lens_q, max_length_q, max_length_q)
        left = -1 if window is None else window - 1
        flat: Any = varlen_attn(q, k, v, *limits, scale=scaling, window_size=(left, 0), enable_gqa=True)
    else:
        flat = _one_by_one(q, k, v, cu_seq_lens_q, scaling, window)  # type: ignore[call-arg]
    return flat.unflatten(0, (query.shape[0], query.shape[2])), None


@torch.compiler.disable  # it reads the documents' lengths, which are others in each batch
def _one_by_one(
    query: Tensor, key: Tensor, value: Tensor, starts: Tensor, scaling: float | None, window: int | None
) -> Tensor:
    """Attention [N, heads, size] of each document by itself."""
    lengths = [end - begin for begin, end in itertools.pairwise(starts.tolist())]
    documents = zip(query.split(lengths), key.split(lengths), value.split(lengths), strict=True)
    return torch.cat([_of_document(q, k, v, scaling, window) for q, k, v in documents])


def _of_document(query: Tensor, key: Tensor, value: Tensor, scaling: float | None, window: int | None) -> Tensor:
    """Attention [n, heads, size] within one document; under a window as many queries at a time as it is long."""
    query, key, value = (states.transpose(0, 1)[None] for states in (query, key, value))
    n = query.shape[2]
    if window is None or n <= window:
        return _sdpa(query, key, value, scaling)
    parts = []
    for first in range(0, n, window):
        end, seen = min(first + window, n), max(0, first - window + 1)
        back = torch.arange(first, end)[:, None] - torch.arange(seen, end)
        mask = (back >= 0) & (back < window)
        parts.append(_sdpa(query[:, :, first:end], key[:, :, seen:end], value[:, :, seen:end], scaling, mask))
    return torch.cat(parts)


def _sdpa(query: Tensor, key: Tensor, value: Tensor, scaling: float | None, mask: Tensor | None = None) -> Tensor:
    """[n, heads, size] of [1, heads, n, size]; causal without a mask."""
    found = F.scaled_dot_product_attention(
        query, key, value, attn_mask=mask, is_causal=mask is None, scale=scaling, enable_gqa=True
    )
    return found[0].transpose(0, 1)


AttentionInterface.register(NAME, attention)
AttentionMaskInterface.register(NAME, sdpa_mask)
