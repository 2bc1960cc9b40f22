"""Qwen3-shaped models with random weights, and rows of random tokens of which the completions alone are trained."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel, Qwen3Config

from llmkd.data.batches import Batch, collate
from llmkd.models import load

VOCABULARY = 151_936
PAD = 0
SEED = 7


@dataclass(frozen=True)
class Size:
    """The shape of both models, which share their width, and of one rank's micro-batch."""

    hidden: int
    intermediate: int
    heads: int
    key_value_heads: int
    head_dim: int
    teacher_blocks: int
    student_blocks: int
    tied: bool
    rows: int
    longest: int
    """Tokens of the longest row; the shortest has half as many."""
    vocabulary: int = VOCABULARY

    @property
    def block_parameters(self) -> int:
        """Weights of one block's matrices."""
        attention = 2 * self.hidden * self.head_dim * (self.heads + self.key_value_heads)
        return attention + 3 * self.hidden * self.intermediate


SIZES = {
    "tiny": Size(64, 192, 4, 2, 16, 6, 3, True, 4, 32),
    "small": Size(384, 1152, 6, 3, 64, 12, 3, True, 4, 128),
    "medium": Size(2048, 6144, 16, 8, 128, 28, 7, True, 8, 512),  # Qwen3-1.7B
    "large": Size(4096, 12288, 32, 8, 128, 36, 9, False, 8, 512),  # Qwen3-8B, at 4096 tokens
}


def make_model(size: Size, blocks: int, dtype: torch.dtype, device: torch.device, *, seed: int) -> PreTrainedModel:
    """A Qwen3 model of this size with random weights, the same for the same seed."""
    shape: dict[str, Any] = dict(
        vocab_size=size.vocabulary,
        hidden_size=size.hidden,
        intermediate_size=size.intermediate,
        num_hidden_layers=blocks,
        num_attention_heads=size.heads,
        num_key_value_heads=size.key_value_heads,
        head_dim=size.head_dim,
        max_position_embeddings=2 * size.longest,
        tie_word_embeddings=size.tied,
        initializer_range=0.02,
    )
    config = Qwen3Config(**shape, bos_token_id=None, eos_token_id=None, pad_token_id=PAD)
    attention, _ = load.attention_implementation("auto", dtype, config)
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []), device:
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=attention)
    model.config.use_cache = False
    return model


@dataclass(frozen=True)
class Row:
    """One example's tokens; the completion's are trained."""

    prompt: tuple[int, ...]
    completion: tuple[int, ...]


@dataclass(frozen=True)
class Work:
    """One rank's micro-batch, as llmkd takes it and as rows for those who pad in their own way; `trained` and `attended`
    are the global counts of tokens."""

    batch: Batch
    rows: tuple[Row, ...]
    trained: int
    attended: int


def make_rows(size: Size, *, seed: int) -> tuple[Row, ...]:
    """Rows of half to all of `longest` tokens, a quarter to a half of each the completion, like instruction data; one is the longest."""
    draw = random.Random(seed)
    rows = []
    for number in range(size.rows):
        length = size.longest if number == 0 else draw.randint(size.longest // 2, size.longest)
        completion = draw.randint(length // 4, length // 2)
        tokens = [draw.randrange(1, size.vocabulary) for _ in range(length)]
        rows.append(Row(tuple(tokens[: length - completion]), tuple(tokens[length - completion :])))
    return tuple(rows)


def as_batch(rows: Sequence[Row]) -> Batch:
    """The rows padded on the right, as llmkd's loader gives them."""
    made = [
        {"input_ids": [*r.prompt, *r.completion], "trained": [0] * len(r.prompt) + [1] * len(r.completion)}
        for r in rows
    ]
    return collate(made, pad_id=PAD, packed=False)


def labels(batch: Batch) -> Tensor:
    """[B, T]: the trained tokens at their own places, -100 elsewhere, as transformers' losses want them before they shift."""
    first = torch.full_like(batch.targets[:, :1], -100)
    return torch.cat([first, batch.targets[:, :-1]], 1)


def make_work(size: Size, *, rank: int, ranks: int, count: int, device: torch.device) -> list[Work]:
    """`count` micro-batches of this rank; the global counts include the other ranks' rows, which follow from their seeds."""
    made = []
    for number in range(count):
        everyone = [make_rows(size, seed=SEED + number * ranks + other) for other in range(ranks)]
        trained = sum(len(row.completion) for rows in everyone for row in rows)
        attended = sum(len(row.prompt) + len(row.completion) for rows in everyone for row in rows)
        made.append(Work(as_batch(everyone[rank]).to(device), everyone[rank], trained, attended))
    return made
