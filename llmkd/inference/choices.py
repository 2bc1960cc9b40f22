"""How each next token is chosen in Hugging Face's `generate`: drawn by a seed of each text's own, from one model or from two.

`generate` itself draws a batch's tokens from one generator, so that a text depends on what it is batched with. As a processor of its
`Draws` leaves one token possible, which `generate`, told to take the likeliest, then takes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import LogitsProcessor, TemperatureLogitsWarper, TopPLogitsWarper


class Draws(LogitsProcessor):
    """Draws each text's next token by the text's own seed: the token at which the cumulative probability passes a uniform number.

    `count`: the most tokens of a text.
    """

    def __init__(
        self, seeds: Sequence[int], count: int, temperature: float, top_p: float, device: torch.device
    ) -> None:
        uniform = np.stack([np.random.default_rng(int(seed)).random(count) for seed in seeds])
        self._uniform = torch.from_numpy(uniform).to(device)
        self._warpers: list[Any] = [TemperatureLogitsWarper(temperature)] if temperature != 1 else []
        if top_p < 1:
            self._warpers.append(TopPLogitsWarper(top_p))
        self._token = 0

    def tokens(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """The next tokens [B] by their logits [B, V]."""
        for warper in self._warpers:
            scores = warper(input_ids, scores)
        cumulative = scores.double().softmax(-1).cumsum(-1)
        at = self._uniform[:, self._token, None] * cumulative[:, -1:]
        self._token += 1
        return torch.searchsorted(cumulative, at, right=True)[:, 0].clamp(max=scores.shape[-1] - 1)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        token = self.tokens(input_ids, scores)
        return torch.full_like(scores, -torch.inf).scatter(1, token[:, None], 0.0)


def likeliest(input_ids: Tensor, scores: Tensor) -> Tensor:
    """The likeliest next tokens [B] by their logits [B, V]."""
    return scores.argmax(-1)


class Mixed(LogitsProcessor):
    """The logarithm of a mixture of two models' distributions, α·p + (1 − α)·q; q is that of the model that `generate` runs.

    model: gives p. share: α. mask: [B, T] of the prompts, padded on the left. MiniLLM (2306.08543), section 2.2, teacher-mixed sampling.
    """

    def __init__(self, model: Any, share: float, mask: Tensor) -> None:
        self._model, self._mask, self._cache = model, mask, None
        self._log_shares = torch.tensor([share, 1 - share], dtype=torch.float64, device=mask.device).log()

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        read = 0 if self._cache is None else self._mask.shape[1]
        new = input_ids[:, read:]
        self._mask = torch.nn.functional.pad(self._mask, (0, input_ids.shape[1] - self._mask.shape[1]), value=1)
        positions = (self._mask.cumsum(-1) - 1).clamp(min=0)[:, read:]
        given = {"input_ids": new, "attention_mask": self._mask, "position_ids": positions}
        result = self._model(**given, past_key_values=self._cache, use_cache=True, logits_to_keep=1)
        self._cache = result.past_key_values
        own = scores.double().log_softmax(-1)
        other = result.logits[:, -1].double().log_softmax(-1)
        # heads may be padded to different widths: what only one of them has, the other never says
        other = torch.nn.functional.pad(other, (0, max(0, own.shape[1] - other.shape[1])), value=-torch.inf)
        pair = torch.stack([other[:, : own.shape[1]] + self._log_shares[0], own + self._log_shares[1]])
        return pair.logsumexp(0).to(scores.dtype)
