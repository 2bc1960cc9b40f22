"""The rules by which blocks stay, over numbers; and models run without some of their blocks."""

from __future__ import annotations

import math
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf

from llmkd.errors import InputError
from llmkd.models import load, make, removal
from llmkd.models.model_types import MODEL_TYPES
from llmkd.models.parts import blocks
from llmkd.models.per_block import are_alike
from tests.unit.models.test_load_and_make import CONFIGS, SMALL, new


def test_the_most_influential_stay_in_order_and_of_equals_the_shallower() -> None:
    assert removal.most_influential([0.1, 0.9, 0.3, 0.8], 2) == (1, 3)
    assert removal.most_influential([0.5, 0.2, 0.5, 0.5], 2) == (0, 2)
    assert removal.most_influential([0.5, 0.2], 2) == (0, 1)
    with pytest.raises(
        InputError, match="influence was measured as no number; look for a NaN in the teacher's weights"
    ):
        removal.most_influential([0.5, math.nan], 1)


def test_removal_is_greedy_and_each_step_is_the_best_of_all_there_are() -> None:
    """Four blocks to two, against every pair: here the best pair is not what greedy removal finds, and must not be."""
    ce = {kept: 1.0 + sum(kept) / 10 for n in (2, 3) for kept in combinations(range(4), n)}
    ce |= {(0, 1, 3): 0.5, (0, 3): 0.8, (1, 3): 0.7, (0, 1): 0.9, (2, 3): 0.1}
    asked = []

    def measure(lists: Any) -> list[float]:
        asked.append(lists)
        return [ce[kept] for kept in lists]

    kept, removed = removal.least_harmful(4, 2, measure)
    assert kept == (1, 3) and removed == [removal.Removal(2, 0.5), removal.Removal(0, 0.7)]
    assert [sorted(lists) for lists in asked] == [sorted(combinations(range(4), 3)), sorted(combinations((0, 1, 3), 2))]


def test_of_equally_harmless_blocks_the_deeper_goes() -> None:
    kept, removed = removal.least_harmful(5, 2, lambda lists: [2.0] * len(lists))
    assert kept == (0, 1) and [one.block for one in removed] == [4, 3, 2]
    assert removal.least_harmful(3, 3, lambda lists: pytest.fail("nothing is removed")) == ((0, 1, 2), [])
    with pytest.raises(InputError, match="perplexity was measured as no number"):
        removal.least_harmful(2, 1, lambda lists: [math.nan, 1.0])


ALIKE = [kind for kind in CONFIGS if kind not in ("smollm3", "gemma3_text")]


@pytest.mark.parametrize("kind", ["qwen3", "qwen2", "llama", "gpt_neox", "gemma", "gpt2", "opt"])
@torch.no_grad()
def test_a_model_run_without_some_blocks_is_the_copied_student(tmp_path: Path, kind: str) -> None:
    new(CONFIGS[kind]()).save_pretrained(tmp_path / "teacher")
    make.new_tokenizer(["one two"], 300).save_pretrained(tmp_path / "teacher")
    make.copied_student(tmp_path / "teacher", (0, 2), tmp_path / "student", dtype=torch.float32)
    options: dict[str, Any] = dict(dtype=torch.float32, ds_config=None, attention="sdpa")
    teacher, student = (load.load_causal_lm(tmp_path / name, **options) for name in ("teacher", "student"))
    ids = torch.arange(12).view(2, 6) + 2
    whole, every = teacher(ids).logits, list(blocks(teacher))
    with removal.run_of(blocks(teacher)) as only:
        for kept in ((1, 2, 3), (0, 2)):
            only(kept)
            short = teacher(ids).logits
        assert torch.equal(short, student(ids).logits) and not torch.equal(short, whole)
    assert torch.equal(teacher(ids).logits, whole) and list(blocks(teacher)) == every


def test_blocks_of_several_kinds_are_told() -> None:
    """By place: positions, attention within a window, and experts."""
    small: dict[str, Any] = {**SMALL, "head_dim": 8}
    sparse: dict[str, Any] = dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16, mlp_only_layers=[1])
    mixed = {
        "windows": hf.Qwen3Config(**small, use_sliding_window=True, sliding_window=4, max_window_layers=2),
        "gemma3": hf.Gemma3TextConfig(**small, layer_types=["sliding_attention"] * 3 + ["full_attention"]),
        "positions": CONFIGS["smollm3"](),
        "experts": hf.Qwen3MoeConfig(**SMALL, **sparse),
    }
    for name, config in mixed.items():
        assert not are_alike(blocks(load.without_weights(config))), name
    for kind in ALIKE:
        assert are_alike(blocks(load.without_weights(CONFIGS[kind]()))), kind


@pytest.mark.parametrize("kind", [kind for kind, row in MODEL_TYPES.items() if row.kind == "decoder"])
@torch.no_grad()
def test_the_first_block_reads_the_embeddings_where_influence_takes_them_for_its_input(kind: str) -> None:
    """But for a factor (Gemma's): an angle does not see it."""
    model, seen = new(CONFIGS[kind]()), []
    model.get_input_embeddings().register_forward_hook(lambda module, args, output: seen.append(output))
    blocks(model)[0].register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(args[0] if args else kwargs["hidden_states"]), with_kwargs=True
    )
    model(torch.arange(12).view(2, 6) + 2)
    same = torch.allclose(torch.cosine_similarity(*seen, dim=-1), torch.ones(2, 6), atol=1e-5)
    assert same == (not MODEL_TYPES[kind].starts)
