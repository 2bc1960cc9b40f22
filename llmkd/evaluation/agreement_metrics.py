"""Two models at the same tokens: KL and top-1 from their final states, a few hundred tokens' logits at a time; likelihood of texts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llmkd.data.batches import IGNORE, Batch, Family
from llmkd.data.other_families import collate_for
from llmkd.losses.divergences import DIVERGENCES
from llmkd.models.families import family
from llmkd.models.parts import final_state, whole_head

Ids = list[int]

CHUNK = 256  # tokens whose logits exist at one time
ROWS = 8  # texts at once


def token_agreement(ours: Sequence[int], theirs: Sequence[int]) -> float:
    """The share of positions with the same token, over the longer of two texts; 1 for two empty ones."""
    longer = max(len(ours), len(theirs))
    return sum(a == b for a, b in zip(ours, theirs, strict=False)) / longer if longer else 1.0


@torch.no_grad()
def final_states(model: Any, batch: Batch) -> Tensor:
    """The final states [N, H] from which a batch's N trained tokens are predicted."""
    batch = batch.to(model.device)
    return final_state(model, batch).flatten(0, 1)[batch.trained_at]


@torch.no_grad()
def kl_and_same_top(
    ours: Tensor, our_head: nn.Linear, theirs: Tensor, their_head: nn.Linear, chunk: int = CHUNK
) -> tuple[Tensor, Tensor]:
    """(KL(teacher ‖ student) [N], whether both find the same token likeliest [N]) of states [N, H_s] and [N, H_t], in fp32.

    Over the columns that both heads have. The logits of `chunk` tokens exist at one time.
    """
    shared = min(our_head.weight.shape[0], their_head.weight.shape[0])
    kl, same = [], []
    for our_part, their_part in zip(ours.split(chunk), theirs.split(chunk), strict=True):
        student, teacher = (
            _logits(part, layer)[:, :shared] for part, layer in ((our_part, our_head), (their_part, their_head))
        )
        kl.append(DIVERGENCES["forward_kl"](student, teacher, 1.0))
        same.append((student.argmax(-1) == teacher.argmax(-1)).float())
    return torch.cat(kl), torch.cat(same)


def _logits(states: Tensor, layer: nn.Linear) -> Tensor:
    return F.linear(states, layer.weight, layer.bias).float()


@torch.no_grad()
def text_likelihoods(
    model: Any, texts: dict[int, tuple[Ids, Ids]], *, pad_id: int, chunk: int = CHUNK
) -> dict[int, float]:
    """By item, the log-probability that a model gives to a text's tokens after its prompt's; texts are (prompt, text) by item."""
    found, layer, of = {}, whole_head(model), family(model.config)
    collate = collate_for(of)
    for part in _parts(sorted(texts), ROWS):
        rows = [_row(*texts[item], of) for item in part]
        batch = collate(rows, pad_id=pad_id, packed=False)
        states = final_states(model, batch)
        targets = batch.targets.flatten()[batch.trained_at].to(states.device)
        scores = [
            _logits(some, layer).log_softmax(-1).gather(1, wanted[:, None])[:, 0]
            for some, wanted in zip(states.split(chunk), targets.split(chunk), strict=True)
        ]
        per_row = (batch.targets != IGNORE).sum(1).tolist()
        for item, values in zip(part, torch.cat(scores).split(per_row), strict=True):
            found[item] = values.double().sum().item()
    return found


def _row(prompt: Ids, text: Ids, of: Family) -> dict[str, Any]:
    if of.kind == "encoder_decoder":
        return {"source_ids": prompt, "target_ids": [of.start, *text]}
    return {"input_ids": [*prompt, *text], "trained": [False] * len(prompt) + [True] * len(text)}


def _parts(items: Sequence[int], size: int) -> Iterator[Sequence[int]]:
    for start in range(0, len(items), size):
        yield items[start : start + size]
