"""Keys and values in room that is made once are those of transformers' own cache."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    MistralConfig,
    MistralForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)
from transformers.cache_utils import DynamicLayer

from llmkd.inference import backends
from llmkd.inference.cache import RoomyLayer, roomy_cache
from llmkd.inference.sampling import Sampling

SHAPE: dict[str, Any] = dict(
    vocab_size=50, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
    head_dim=8, initializer_range=0.3, pad_token_id=0, eos_token_id=1, bos_token_id=None,
)  # fmt: skip


def test_states_are_those_of_the_growing_cache_and_are_never_moved() -> None:
    ours, theirs = RoomyLayer(9), DynamicLayer()
    places = set()
    for tokens in (4, 1, 3, 1):
        assert ours.get_mask_sizes(tokens) == theirs.get_mask_sizes(tokens)
        new = torch.randn(3, 2, tokens, 8), torch.randn(3, 2, tokens, 16)
        for own, expected in zip(ours.update(*new), theirs.update(*new), strict=True):
            assert torch.equal(own, expected)
        assert ours.keys is not None
        places.add(ours.keys.data_ptr())
    assert len(places) == 1 and ours.get_seq_length() == 9


@pytest.mark.parametrize("plainly", [True, False])
def test_texts_are_the_same(monkeypatch: pytest.MonkeyPatch, plainly: bool) -> None:
    torch.manual_seed(0)
    model = Qwen3ForCausalLM(Qwen3Config(**SHAPE)).eval()
    prompts = [[5, 6, 7], [8], [9, 10, 11, 12, 13]]
    how = Sampling(30, (1,), temperature=1.0)
    assert roomy_cache(model, 40) is not None
    monkeypatch.setattr(backends, "runs_plainly", lambda model: plainly)
    ours = backends.continued(model, prompts, how)
    monkeypatch.setattr(backends, "roomy_cache", lambda model, room: None)
    assert ours == backends.continued(model, prompts, how)
    assert max(map(len, ours)) > 10


@pytest.mark.parametrize(
    "model",
    [
        lambda: MistralForCausalLM(MistralConfig(**SHAPE, sliding_window=4)),
        lambda: Gemma3ForCausalLM(Gemma3TextConfig(**SHAPE, layer_types=["sliding_attention", "full_attention"])),
    ],
)
def test_a_window_stays_transformers_own(model: Any) -> None:
    assert roomy_cache(model(), 40) is None
