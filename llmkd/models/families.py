"""The families of models: which kind a model is of, and its depths, classes and positions by its configuration.

A decoder continues a text, an encoder puts a text into a class, an encoder-decoder answers a text with another. llmkd.models.parts finds
the blocks and states of a model itself.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
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
from llmkd.models.model_types import MODEL_TYPES, ModelType, types_with

KIND_NAMES = {"encoder": "an encoder", "encoder_decoder": "an encoder-decoder", "decoder": "a decoder"}

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
    """Which kind a model is of. Raises InputError for an encoder or encoder-decoder that has not been shown to work.

    Encoders are recognised by their class for masked language modelling in transformers, which decoders lack; of the types that can be
    either, a decoder has `is_decoder` set.
    """
    if config.is_encoder_decoder:
        kind_: Kind = "encoder_decoder"
    elif getattr(config, "is_decoder", False) or config.model_type not in MODEL_FOR_MASKED_LM_MAPPING_NAMES:
        return "decoder"
    else:
        kind_ = "encoder"
    types = types_with(lambda row: row.kind == kind_)
    if config.model_type not in types:
        raise InputError(
            f"{KIND_NAMES[kind_]} of type {config.model_type!r} is not supported; give one of type {', '.join(types[:-1])} or {types[-1]}"
        )
    return kind_


def model_type(config: PreTrainedConfig) -> ModelType:
    """The row of a model's type; the empty one where the model is of another kind than the row (a BERT used as a decoder)."""
    row = MODEL_TYPES.get(config.model_type, ModelType())
    return row if row.kind == kind(config) else ModelType()


def family(config: PreTrainedConfig) -> Family:
    """The model's kind with what its batches need. Raises InputError where its configuration lacks that."""
    if kind(config) == "decoder":
        return Family("decoder")
    if kind(config) == "encoder":
        return Family("encoder", labels=tuple(str(name) for _, name in sorted((config.id2label or {}).items())))
    start = getattr(config, "decoder_start_token_id", None)
    if start is None:
        raise InputError(
            f"a {config.model_type!r} model does not say with which token its decoder begins; write decoder_start_token_id into its "
            "config.json"
        )
    return Family("encoder_decoder", start=start)


def depths(config: PreTrainedConfig) -> tuple[int, ...]:
    """How many blocks each stack has: (blocks,), or (the encoder's, the decoder's)."""
    first, second = config.num_hidden_layers, model_type(config).decoder_depth
    return (first,) if second is None else (first, getattr(config, second))


def set_depths(config: PreTrainedConfig, blocks: Sequence[int]) -> None:
    """Give each stack so many blocks."""
    config.num_hidden_layers = blocks[0]
    if (second := model_type(config).decoder_depth) is not None:
        setattr(config, second, blocks[1])


def by_stack(chosen: Sequence[int], blocks: Sequence[int]) -> list[list[int]]:
    """Block numbers counted through all stacks (of so many blocks each) -> each stack's own, counted from 0 in it."""
    firsts = itertools.accumulate(blocks, initial=0)
    return [[block - a for block in chosen if a <= block < b] for a, b in itertools.pairwise(firsts)]


def positions(config: PreTrainedConfig) -> int | None:
    """The longest row of tokens that a model takes; None where there is no bound.

    In encoders and encoder-decoders padding takes positions too, and rows are padded to a multiple of 8.
    """
    most = getattr(config, "max_position_embeddings", None)
    if most is None or kind(config) == "decoder":
        return most
    if model_type(config).positions_follow_padding:
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
    """Raise InputError where states that are to be compared are narrower than the blocks' (OPT-350m)."""
    narrow = getattr(config, "word_embed_proj_dim", config.hidden_size)
    if narrow == config.hidden_size:
        return
    widths = (
        f"this {config.model_type!r} model's embeddings and final states have {narrow} numbers, "
        f"its blocks' states {config.hidden_size}"
    )
    if normed:
        raise InputError(f"matching.final_state: {widths}; write raw")
    if embedding:
        raise InputError(f"matching.embedding: {widths}; write false")
