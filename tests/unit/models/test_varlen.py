"""Attention within each document: packed rows give what masks give, and nothing of the size of a mask is made."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers as hf
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from llmkd.data.batches import Batch, Packed, collate, collate_sequences
from llmkd.models import parts, varlen
from llmkd.models.load import attention_implementation
from llmkd.models.model_types import types_with
from tests.unit.models.test_load_and_make import CONFIGS, SMALL

WINDOW = 4
SHARED = {**SMALL, "num_key_value_heads": 2}
SLIDING: dict[str, Callable[[], Any]] = {
    "qwen2": lambda: hf.Qwen2Config(
        **SHARED, use_sliding_window=True, sliding_window=WINDOW, layer_types=["sliding_attention", "full_attention"] * 2
    ),
    "mistral": lambda: hf.MistralConfig(**SHARED, sliding_window=WINDOW),
    "phi3": lambda: hf.Phi3Config(**SHARED, sliding_window=WINDOW),
    "gemma3": lambda: hf.Gemma3TextConfig(
        **SHARED, head_dim=8, sliding_window=WINDOW, layer_types=["sliding_attention", "full_attention"] * 2
    ),
    "qwen3_moe": lambda: hf.Qwen3MoeConfig(
        **SHARED, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16, use_sliding_window=True, sliding_window=WINDOW
    ),
    "smollm3": lambda: hf.SmolLM3Config(
        **SHARED, no_rope_layers=[1, 0, 1, 1], use_sliding_window=True, sliding_window=WINDOW,
        layer_types=["sliding_attention", "full_attention"] * 2,
    ),
}  # fmt: skip
NAMES = [*types_with(lambda row: row.varlen), *(f"{name} sliding" for name in SLIDING)]


def _config(name: str) -> Any:
    kind, _, sliding = name.partition(" ")
    return (SLIDING if sliding else CONFIGS)[kind]()


def _models(config: Any, dtype: torch.dtype) -> list[Any]:
    """The same model by sdpa and by varlen."""
    models = [
        hf.AutoModelForCausalLM.from_config(
            copy.deepcopy(config), dtype=dtype, attn_implementation=name, experts_implementation="eager"
        ).eval()
        for name in ("sdpa", varlen.NAME)
    ]
    assert [model.config._attn_implementation for model in models] == ["sdpa", "varlen"]
    models[1].load_state_dict(models[0].state_dict())
    return models


def _batch(sequences: Sequence[Sequence[int]], width: int) -> Batch:
    """Documents of these lengths, sequence by sequence, padded."""
    draw = torch.Generator().manual_seed(3)
    rows = [
        [{"input_ids": torch.randint(2, 64, (n,), generator=draw).tolist(), "trained": [True] * n} for n in lengths]
        for lengths in sequences
    ]
    return collate_sequences(rows, width=width, pad_id=0)


BATCH = ([5, 1, 9, 4], [11, 8, 2]), 24


def _given(attention: str, packed: Packed, kind: str = "qwen3") -> dict[str, Any]:
    """What the attention of a model of this kind is given of its documents."""
    config = CONFIGS[kind]()
    config._attn_implementation = attention
    return varlen.options(config, packed)


class Seen(TorchDispatchMode):
    """The most elements of a tensor that was made, and the reads whose result the host waits for."""

    def __init__(self) -> None:
        super().__init__()
        self.largest, self.reads = 0, Counter[str]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if (name := func.overloadpacket.__name__) in ("_local_scalar_dense", "is_nonzero", "equal", "nonzero"):
            self.reads[name] += 1
        made = func(*args, **(kwargs or {}))
        sizes = [
            leaf.untyped_storage().nbytes() // leaf.element_size()
            for leaf in tree_leaves(made)
            if isinstance(leaf, Tensor)
        ]
        self.largest = max([self.largest, *sizes])
        return made


@pytest.mark.parametrize("name", NAMES)
def test_models_have_the_states_and_gradients_that_masks_give(name: str) -> None:
    batch, found = _batch(*BATCH), []
    for model in _models(_config(name), torch.float64):
        final = parts.final_state(model, batch)
        weights = torch.linspace(-1, 1, final.numel(), dtype=final.dtype).view_as(final)
        (final * weights).flatten(0, 1)[batch.attended_at].sum().backward()
        gradients = [p.grad for p in model.base_model.parameters() if p.grad is not None]
        found.append([final[batch.attended], *gradients])
    assert len(found[0]) > 10
    for theirs, ours in zip(*found, strict=True):
        assert (ours - theirs).norm() <= 1e-12 * theirs.norm()


@pytest.mark.parametrize("window", [None, 2, 4, 9, 12])
def test_in_float32_it_is_attention_under_a_mask(window: int | None) -> None:
    """Queries of four heads, keys and values of two; two sequences of 24."""
    batch, draw = _batch(*BATCH), torch.Generator().manual_seed(0)
    packed = batch.packed
    assert packed is not None and packed.longest == 11
    document = torch.arange(48) - packed.positions.flatten()  # where it begins
    back = packed.positions.flatten()[:, None] - packed.positions.flatten()
    mask = (document[:, None] == document) & (back >= 0) & (back < (window or 24))

    def states() -> list[Tensor]:
        draw.manual_seed(1)
        return [torch.randn(2, heads, 24, 8, generator=draw).requires_grad_() for heads in (4, 2, 2)]

    ours, theirs = states(), states()
    found, _ = varlen.attention(
        torch.nn.Module(), *ours, scaling=0.3, sliding_window=window, **_given(varlen.NAME, packed)
    )  # fmt: skip
    flat = [states.transpose(0, 1).flatten(1, 2)[None] for states in theirs]
    expected = F.scaled_dot_product_attention(*flat, attn_mask=mask, scale=0.3, enable_gqa=True)
    expected = expected[0].transpose(0, 1).unflatten(0, (2, 24))
    weights = torch.randn(found.shape, generator=draw)
    for whole in (found, expected):
        (whole * weights).sum().backward()
    for mine, other in [(found, expected), *((a.grad, b.grad) for a, b in zip(ours, theirs, strict=True))]:
        assert (mine - other).norm() <= 1e-6 * other.norm()


@pytest.mark.parametrize("name", NAMES)
def test_no_mask_is_made_and_nothing_is_read(name: str) -> None:
    """One row of 512 tokens: nothing forward or backward has as many elements as a mask, which sdpa makes and reads for."""
    batch = _batch([[32] * 15 + [20]], 512)
    config = _config(name)
    config.max_position_embeddings, config.sliding_window = 512, 16
    seen = []
    for model in _models(config, torch.float32):
        with Seen() as of_model:
            parts.final_state(model, batch).sum().backward()
        seen.append(of_model)
    sdpa, ours = seen
    assert sdpa.largest >= 512 * 512 and sdpa.reads
    assert ours.largest < 512 * 512 / 2
    assert not ours.reads or "moe" in name  # the router of experts reads which it chose


def test_flash_attention_is_told_where_documents_begin() -> None:
    """Given so, it lays the rows of a batch end to end itself; from positions it would find documents in a batch of one row alone."""
    packed = _batch(*BATCH).packed
    assert packed is not None
    given = _given("flash_attention_2", packed)
    assert given["cu_seq_lens_q"] is given["cu_seq_lens_k"] is packed.starts and "attention_mask" not in given
    assert packed.starts.tolist() == [0, 5, 6, 15, 19, 24, 35, 43, 45, 48]
    assert given["max_length_q"] == given["max_length_k"] == 11
    assert given.keys() - _given("sdpa", packed).keys() == {name for name in given if name != "position_ids"}
    assert _given("flash_attention_2", packed, "stablelm").keys() == {"position_ids"}


def test_padded_rows_and_generation_are_sdpa() -> None:
    sdpa, ours = _models(CONFIGS["qwen3"](), torch.float32)
    rows = [{"input_ids": list(range(2, 2 + n)), "trained": [True] * n} for n in (9, 4, 6)]
    batch = collate(rows, pad_id=0, packed=False)
    assert torch.equal(parts.final_state(ours, batch), parts.final_state(sdpa, batch))
    assert batch.attention_mask is not None
    left = batch.attention_mask.flip(1)
    ids = batch.input_ids.flip(1)
    wrote = [
        m.generate(ids, attention_mask=left, max_new_tokens=5, do_sample=False, pad_token_id=0) for m in (sdpa, ours)
    ]
    assert torch.equal(*wrote) and wrote[0].shape[1] > ids.shape[1]


@pytest.mark.parametrize(
    ("name", "changes", "why"),
    [
        ("stablelm", {}, "has not been shown to keep documents apart in a 'stablelm' model"),
        ("opt", {}, "has not been shown to keep documents apart in a 'opt' model"),
        ("gpt2", {}, "this model drops attention at random"),
        ("llama", {"attention_dropout": 0.1}, "this model drops attention at random"),
    ],
)
def test_models_that_keep_their_attention_say_why(name: str, changes: dict[str, Any], why: str) -> None:
    config = CONFIGS[name]()
    config.update(changes)
    attention, reason = attention_implementation("auto", torch.float32, config)
    assert attention == "sdpa" and why in reason


@pytest.mark.parametrize(
    ("dtype", "size", "capability", "why"),
    [
        (torch.bfloat16, 8, (8, 0), None),
        (torch.float32, 8, (8, 0), "does not compute in float32"),
        (torch.bfloat16, 8, (7, 5), "older than compute capability 8.0"),
        (torch.bfloat16, 12, (9, 0), "a multiple of 8 numbers up to 256, this model's 12"),
        (torch.bfloat16, 264, (9, 0), "a multiple of 8 numbers up to 256, this model's 264"),
    ],
)
def test_on_a_gpu_it_takes_what_flash_attention_takes(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, size: int, capability: tuple[int, int], why: str | None
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    found = varlen.lacking(hf.Qwen3Config(**SMALL, head_dim=size), dtype)
    assert found is None if why is None else why in str(found)


def test_one_document_longer_than_a_window_makes_no_mask_of_its_length() -> None:
    """Blocks of queries as long as the window: their masks grow with the window, not with the document."""
    config = SLIDING["mistral"]()
    config.max_position_embeddings, config.sliding_window = 512, 128
    _, ours = _models(config, torch.float32)
    with Seen() as seen:
        parts.final_state(ours, _batch([[512]], 512)).sum().backward()
    assert seen.largest < 512 * 512 / 2


def test_on_a_gpu_it_takes_a_torch_that_has_all_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """In 2.11 it had no heads that share keys and values."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    config = hf.Qwen3Config(**SMALL, head_dim=8)
    assert varlen.lacking(config, torch.bfloat16) is None
    monkeypatch.setattr(varlen, "varlen_attn", lambda query, key, value, *, scale=None, window_size=(-1, -1): query)
    assert "is too old for it; 2.12" in str(varlen.lacking(config, torch.bfloat16))
