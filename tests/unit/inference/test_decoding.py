"""Texts decoded token by token here are those of transformers' `generate`, by every family of decoders."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import transformers as hf

from llmkd.inference import backends, decoding
from llmkd.inference.cache import roomy_cache
from llmkd.inference.sampling import Ids, Sampling
from tests.family_models import DECODERS, new

PROMPTS = [[5, 6, 7], [8], [9, 10, 11, 12, 13, 14, 15, 16], [300, 2], [7, 8, 9, 10, 11]]
HOW = Sampling(24, tuple(range(40)), temperature=1.0, limits=(24, 9, 24, 3, 24), batch_size=4)
OWN = {"bloom": lambda n: hf.BloomConfig(vocab_size=320, hidden_size=32, n_layer=n, n_head=4, initializer_range=0.3)}


def spied(monkeypatch: pytest.MonkeyPatch, model: Any) -> dict[str, int]:
    """How often a model's texts are decoded here, how often `generate` is asked, and how many passes there are."""
    calls = {"decoded": 0, "generate": 0, "forward": 0}

    def counting(name: str, original: Any) -> Any:
        def call(*given: Any, **named: Any) -> Any:
            calls[name] += 1
            return original(*given, **named)

        return call

    monkeypatch.setattr(backends, "decoded", counting("decoded", decoding.decoded))
    monkeypatch.setattr(model, "generate", counting("generate", model.generate))
    model.register_forward_pre_hook(lambda *_: calls.update(forward=calls["forward"] + 1))
    return calls


@pytest.mark.parametrize("how", [HOW, replace(HOW, temperature=0.7, top_p=0.8), replace(HOW, temperature=0.0)])
@pytest.mark.parametrize("family", [*DECODERS, *OWN])
def test_texts_are_those_of_generate(monkeypatch: pytest.MonkeyPatch, family: str, how: Sampling) -> None:
    model = new({**DECODERS, **OWN}[family](2), "decoder")
    calls = spied(monkeypatch, model)
    ours = backends.continued(model, PROMPTS, how)
    # windows, and ALiBi, which takes no places, are left to it
    plain = family not in ("mistral", "gemma3_text", "bloom")
    assert (calls["decoded"], calls["generate"]) == ((2, 0) if plain else (0, 2))
    monkeypatch.setattr(backends, "runs_plainly", lambda model: False)
    assert ours == backends.continued(model, PROMPTS, how)
    if how.temperature == 1:
        assert len({*map(len, ours)}) > 1 and any(text[-1] in how.stops for text in ours)


def test_passes_end_when_all_texts_have(monkeypatch: pytest.MonkeyPatch) -> None:
    model = new(DECODERS["llama"](2), "decoder")
    calls = spied(monkeypatch, model)
    texts = backends.continued(model, PROMPTS, replace(HOW, batch_size=5))
    assert calls["forward"] == max(map(len, texts)) < HOW.max_new_tokens


def test_a_text_that_is_over_needs_no_place_that_the_model_lacks() -> None:
    """A long prompt beside a short one: the model has 64 places, and the batch goes on for longer than the long prompt may."""
    model = new(DECODERS["opt"](2), "decoder")
    prompts: list[Ids] = [[5] * 60, [6, 7]]
    how = Sampling(62, (1,), limits=(4, 62))
    assert roomy_cache(model, 64) is not None
    alone = [
        backends.continued(model, [prompt], replace(how, limits=(limit,)))[0]
        for prompt, limit in zip(prompts, (4, 62), strict=True)
    ]
    assert backends.continued(model, prompts, how) == alone and len(alone[1]) > 8


def test_a_model_with_experts_is_left_to_generate() -> None:
    shape: dict[str, Any] = dict(vocab_size=320, hidden_size=32, intermediate_size=48, num_attention_heads=4)
    config = hf.MixtralConfig(**shape, num_hidden_layers=2, num_key_value_heads=2, num_local_experts=2)
    assert not decoding.runs_plainly(new(config, "decoder"))
    assert decoding.runs_plainly(new(DECODERS["llama"](2), "decoder"))
