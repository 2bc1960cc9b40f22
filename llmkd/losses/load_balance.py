"""How evenly a model's routers spread the tokens of each row over its experts."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def load_balance(logits: Sequence[Tensor], at: Tensor, rows: Tensor, top_k: int) -> Tensor:
    """The load balancing loss of Switch Transformer (eq. 4 to 6) row by row, each row's times its tokens [].

    Of a row it is E x Σ_e (how many of a token's `top_k` choices are expert e) x (the probability of e), both means over the row's tokens
    and all routers, as `load_balancing_loss_func` of transformers takes them over a micro-batch: top_k where all experts are used alike.
    A product of two means is no sum over tokens; taken over a row, it does not depend on what else is in the micro-batch.

    logits: of each router [B*T, E]. at: [N], the tokens that count. rows: [R, N], 1 where a token is of a row. The choices carry no
    gradient.
    """
    lengths = rows.sum(1)
    chosen = probable = torch.zeros((), device=rows.device)
    for of_router in logits:
        probabilities = of_router.index_select(0, at).float().softmax(-1)
        choices = torch.zeros_like(probabilities).scatter_(1, probabilities.detach().topk(top_k).indices, 1.0)
        chosen, probable = chosen + rows @ choices, probable + rows @ probabilities
    products = (chosen * probable).sum(1) * logits[0].shape[-1]
    return (
        products / (lengths.clamp(min=1) * len(logits) ** 2)
    ).sum()  # one of the two lengths is what it is multiplied by
