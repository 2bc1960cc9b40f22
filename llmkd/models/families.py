"""The families of models: of what kind one is, and what its configuration says of its depths, classes and positions.

A decoder continues a text, an encoder puts a text into a class, an encoder-decoder answers a text with another. Where a model itself has
its blocks and states is found by llmkd.models.parts.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    PreTrainedConfig,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

from llmkd.data.batches import MULTIPLE, Family, Kind
from llmkd.errors import InputError

KIND_NAMES = {"encoder": "an encoder", "encoder_decoder": "an encoder-decoder", "decoder": "a decoder"}

ROBERTAS = ("roberta", "xlm-roberta", "camembert")
"""One model under several names."""
CLASSIFIERS = {"bert": "classifier", "distilbert": "classifier", **dict.fromkeys(ROBERTAS, "classifier.out_proj")}
"""Encoders by model type, and where the linear map to their classes is; each is tested."""
DECODER_DEPTH = {"bart": "decoder_layers", "mt5": "num_decoder_layers", "t5": "num_decoder_layers"}
"""Encoder-decoders by model type, and what their configuration calls the decoder's depth; each is tested."""
WIDTHS = {
    "bart": {
        "intermediate_size": ("encoder_ffn_dim", "decoder_ffn_dim"),
        "num_attention_heads": ("encoder_attention_heads", "decoder_attention_heads"),
    },
    "distilbert": {"intermediate_size": ("hidden_dim",)},
    "opt": {"intermediate_size": ("ffn_dim",)},
    **dict.fromkeys(("mt5", "t5"), {"intermediate_size": ("d_ff",)}),
}
"""By model type, what its configuration calls a width that a recipe knows by another name."""
AUTO_CLASSES: dict[Kind, Any] = {
    "decoder": AutoModelForCausalLM,
    "encoder": AutoModelForSequenceClassification,
    "encoder_decoder": AutoModelForSeq2SeqLM,
}
CHANGED_LOGITS = (
    "final_logit_softcapping",
    "logits_soft_cap",
    "logit_scale",
    "logits_scaling",
    "lm_head_multiplier",
    "output_multiplier",
)
"""Settings by which a model does more to its logits than its head's linear map."""
LAYER_DROPS = ("layerdrop", "encoder_layerdrop", "decoder_layerdrop")
"""Settings by which a model in training leaves out blocks at random."""


def kind(config: PreTrainedConfig) -> Kind:
    """Of what kind a model is. Raises InputError for an encoder or encoder-decoder that has not been shown to work.

    An encoder is told by its class in transformers for words left out, which no decoder has (those that may be either say `is_decoder`).
    """
    if config.is_encoder_decoder:
        if config.model_type not in DECODER_DEPTH:
            raise InputError(
                f"an encoder-decoder of type {config.model_type!r} is not supported; {_one_of(DECODER_DEPTH)}"
            )
        return "encoder_decoder"
    if getattr(config, "is_decoder", False) or config.model_type not in MODEL_FOR_MASKED_LM_MAPPING_NAMES:
        return "decoder"
    if config.model_type not in CLASSIFIERS:
        raise InputError(f"an encoder of type {config.model_type!r} is not supported; {_one_of(CLASSIFIERS)}")
    return "encoder"


def _one_of(types: Iterable[str]) -> str:
    *others, last = types
    return f"give one of type {', '.join(others)} or {last}"


def family(config: PreTrainedConfig) -> Family:
    """The model's kind with what its batches need. Raises InputError where its configuration does not say it."""
    found = kind(config)
    if found == "encoder":
        names: dict[Any, Any] = config.id2label or {}
        return Family(found, labels=tuple(str(names[number]) for number in sorted(names)))
    if found == "decoder":
        return Family(found)
    start = getattr(config, "decoder_start_token_id", None)
    if start is None:
        raise InputError(
            f"a {config.model_type!r} model does not say with which token its decoder begins; write decoder_start_token_id into its "
            "config.json"
        )
    return Family(found, start=start)


def depths(config: PreTrainedConfig) -> tuple[int, ...]:
    """How many blocks each stack has: (blocks,), or (the encoder's, the decoder's)."""
    first: int = config.num_hidden_layers
    return (first, getattr(config, DECODER_DEPTH[config.model_type])) if kind(config) == "encoder_decoder" else (first,)


def set_depths(config: PreTrainedConfig, blocks: Sequence[int]) -> None:
    """Give each stack so many blocks."""
    config.num_hidden_layers = blocks[0]
    if len(blocks) == 2:
        setattr(config, DECODER_DEPTH[config.model_type], blocks[1])


def width_settings(config: PreTrainedConfig, key: str) -> tuple[str, ...]:
    """What a model type's configuration calls the width that a recipe calls `key`."""
    return WIDTHS.get(config.model_type, {}).get(key, (key,))


def by_stack(chosen: Sequence[int], blocks: Sequence[int]) -> list[list[int]]:
    """Block numbers counted through all stacks (of so many blocks each) -> each stack's own, counted from 0 in it."""
    found, first = [], 0
    for depth in blocks:
        found.append([block - first for block in chosen if first <= block < first + depth])
        first += depth
    return found


def positions(config: PreTrainedConfig) -> int | None:
    """The longest row of tokens that a model takes; None where there is no bound.

    Encoders and encoder-decoders give padding positions too, and rows are padded to a multiple of 8.
    """
    most = getattr(config, "max_position_embeddings", None)
    if most is None or kind(config) == "decoder":
        return most
    if config.model_type in ROBERTAS:  # they count them from the padding's id on
        most -= config.pad_token_id + 1
    return most - most % MULTIPLE


def check_logits(config: PreTrainedConfig) -> None:
    """Raise InputError for a model that does more to its logits than its head's linear map."""
    for key in CHANGED_LOGITS:
        if getattr(config, key, None) not in (None, 1.0):
            raise InputError(
                f"a {config.model_type!r} model changes its logits after the head ({key}), which is not supported yet; "
                "give another model"
            )


def check_blocks(config: PreTrainedConfig) -> None:
    """Raise InputError for a model that leaves out blocks at random: a pair's state would be missing."""
    for key in LAYER_DROPS:
        if getattr(config, key, 0.0):
            raise InputError(
                f"a {config.model_type!r} model that leaves out blocks in training ({key}) can't be matched by blocks; write {key}: 0.0 "
                "into its config.json"
            )


def check_states(config: PreTrainedConfig, *, normed: bool, embedding: bool) -> None:
    """Raise InputError where states that a recipe's matching asks for are not of the width of the blocks' (OPT-350m)."""
    narrow = getattr(config, "word_embed_proj_dim", config.hidden_size)
    if narrow == config.hidden_size:
        return
    said = f"this {config.model_type!r} model's embeddings and final states have {narrow} numbers, its blocks' states {config.hidden_size}"
    if normed:
        raise InputError(f"matching.final_state: {said}; write raw")
    if embedding:
        raise InputError(f"matching.embedding: {said}; write false")
