"""A teacher's upper blocks: from any block on they are the whole model, for every type of model that stones may have as a teacher."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor, nn

from llmkd.data.batches import Batch, collate
from llmkd.data.other_families import collate_classified
from llmkd.errors import InputError
from llmkd.models import parts
from llmkd.models.model_types import MODEL_TYPES, types_with
from llmkd.models.parts import output_state
from llmkd.teachers.upper_blocks import UpperBlocks, check_upper
from tests import family_models
from tests.family_models import ENCODERS
from tests.unit.models.test_families import encoder_rows
from tests.unit.models.test_load_and_make import CONFIGS, SMALL, new
from tests.unit.teachers.test_pipeline_stage import KINDS

SHOWN = types_with(lambda row: row.ends is not None)
KINDS_OF_DECODERS: dict[str, Callable[[], Any]] = {
    **{kind: config for kind, config in CONFIGS.items() if kind in SHOWN},
    **KINDS,
    "gemma3_sliding": lambda: hf.Gemma3TextConfig(
        **SMALL, head_dim=8, sliding_window=4, layer_types=["sliding_attention", "full_attention"] * 2
    ),
    "opt_narrow": lambda: family_models.DECODERS["opt_narrow"](
        4
    ),  # no final norm, a final state narrower than the blocks'
}


def test_every_type_is_tested() -> None:
    assert set(SHOWN) == {KINDS_OF_DECODERS[kind]().model_type for kind in KINDS_OF_DECODERS} | ENCODERS.keys()


@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("kind", KINDS_OF_DECODERS)
def test_from_any_block_of_a_decoder_on_it_is_the_whole_model(kind: str, checkpointed: bool) -> None:
    model = new(KINDS_OF_DECODERS[kind]())
    rows = [{"input_ids": [3 + n] * n, "trained": [True] * n} for n in (5, 1, 9)]
    for packed in (False, True):
        if not packed or MODEL_TYPES[model.config.model_type].packs:
            batch = collate(rows, pad_id=0, packed=packed)
            _check(model, batch, checkpointed, batch.attended)


@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("kind", ENCODERS)
def test_from_any_block_of_an_encoder_on_it_is_the_whole_model(kind: str, checkpointed: bool) -> None:
    model = family_models.new(ENCODERS[kind](4), "encoder")
    batch = collate_classified(encoder_rows(segments=kind == "bert"), pad_id=0)
    _check(model, batch, checkpointed, torch.ones(3, 1, dtype=torch.bool))
    segments = {} if batch.segments is None else {"token_type_ids": batch.segments}
    logits = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, **segments).logits
    final = UpperBlocks(model, [1], recompute=checkpointed)(1, _state(model, batch, 1), batch)
    torch.testing.assert_close(parts.head(model)(final)[:, 0], logits)


def _state(model: Any, batch: Batch, block: int) -> Tensor:
    kept: list[Tensor] = []
    hook = parts.blocks(model)[block].register_forward_hook(lambda m, a, output: kept.append(output_state(output)))
    parts.final_state(model, batch)
    hook.remove()
    return kept[0]


def _check(model: Any, batch: Batch, checkpointed: bool, where: Tensor) -> None:
    """Final state to the bit, and the gradient of a hook that lets the state be changed, at positions [B, T] that count."""
    model.eval().requires_grad_(False)
    stack = parts.blocks(model)
    upper = UpperBlocks(model, range(len(stack)), recompute=checkpointed)
    for block, module in enumerate(stack):
        states: list[Tensor] = []

        def opened(m: nn.Module, a: Any, output: Any, states: list[Tensor] = states) -> Any:
            states.append(output_state(output).detach().requires_grad_())
            return (states[0], *output[1:]) if isinstance(output, tuple) else states[0]

        hook = module.register_forward_hook(opened)
        final = parts.final_state(model, batch)
        hook.remove()
        torch.manual_seed(0)
        towards = torch.randn_like(final) * where[..., None]
        (expected,) = torch.autograd.grad((final * towards).sum(), states[0])
        leaf = states[0].detach().requires_grad_()
        found = upper(block, leaf, batch)
        assert torch.equal(found, final)
        (gradient,) = torch.autograd.grad((found * towards).sum(), leaf)
        torch.testing.assert_close(gradient, expected, rtol=1e-6, atol=1e-6)
        assert expected.abs().max() > 1e-4


def test_a_teacher_not_shown_to_work_is_refused() -> None:
    for kind in KINDS_OF_DECODERS:
        check_upper(KINDS_OF_DECODERS[kind]())
    for kind in ENCODERS:
        check_upper(ENCODERS[kind](2))
    with pytest.raises(InputError, match=r"stones: a 'olmo' teacher has not been shown .* leave out stones, or give"):
        check_upper(hf.OlmoConfig(**{**SMALL, "num_key_value_heads": 4}))
    with pytest.raises(InputError, match=r"stones: a 'bert' teacher has not been shown"):
        check_upper(hf.BertConfig(is_decoder=True))
    with pytest.raises(InputError, match=r"scale_attn_by_inverse_layer_idx.*; leave out stones"):
        check_upper(hf.GPT2Config(scale_attn_by_inverse_layer_idx=True))
    with pytest.raises(InputError, match="a 'gemma2' model changes its logits after the head"):
        check_upper(hf.Gemma2Config(**SMALL, head_dim=8))
