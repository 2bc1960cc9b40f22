"""Models made from nothing: the recipe's `architecture` as a configuration of each family that can be made so."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from transformers import BartConfig, BertConfig, PreTrainedConfig, T5Config

from llmkd.data.batches import Kind
from llmkd.models.make import qwen3_config

KINDS: dict[str, Kind] = {"qwen3": "decoder", "bert": "encoder", "bart": "encoder_decoder", "t5": "encoder_decoder"}
"""Model types that a recipe can make, and of what kind they are."""
STARTS = {"bart": 1, "t5": 0}
"""With which token a new model's decoder begins: as in the published ones BART with the end of sequence, T5 with the padding, by their
ids in `llmkd.models.make.new_tokenizer`."""
DEFAULT_RANGE = 0.02
"""The initializer_range that T5's own initializer_factor of 1 stands for."""


def new_config(shape: dict[str, Any], tokenizer: Any = None, labels: tuple[str, ...] = ()) -> PreTrainedConfig:
    """The configuration of a new model of this shape (the recipe's `architecture`), its special tokens those of the tokenizer."""
    ends = {} if tokenizer is None else {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    given = {key: value for key, value in shape.items() if key not in ("model_type", "decoder_layers")}
    depths = (shape["num_hidden_layers"], shape.get("decoder_layers") or shape["num_hidden_layers"])
    return _CONFIGS[shape.get("model_type", "qwen3")](given, ends, depths, labels)


def _qwen3(shape: dict[str, Any], ends: dict[str, Any], depths: tuple[int, int], labels: tuple[str, ...]) -> Any:
    return qwen3_config(shape, {"bos_token_id": None, **ends} if ends else {})


def _bert(shape: dict[str, Any], ends: dict[str, Any], depths: tuple[int, int], labels: tuple[str, ...]) -> Any:
    keys = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    keys += ("max_position_embeddings", "initializer_range")
    names: dict[str, Any] = {"id2label": dict(enumerate(labels)), "label2id": {n: i for i, n in enumerate(labels)}}
    return BertConfig(**{key: shape[key] for key in keys}, **ends, **(names if labels else {}))


def _t5(shape: dict[str, Any], ends: dict[str, Any], depths: tuple[int, int], labels: tuple[str, ...]) -> Any:
    sizes = dict(vocab_size=shape["vocab_size"], d_model=shape["hidden_size"], d_ff=shape["intermediate_size"])
    heads = shape["num_attention_heads"]
    start: dict[str, Any] = {"decoder_start_token_id": STARTS["t5"]}
    return T5Config(
        **sizes,
        num_heads=heads,
        d_kv=shape["head_dim"] or shape["hidden_size"] // heads,
        num_layers=depths[0],
        num_decoder_layers=depths[1],
        initializer_factor=shape["initializer_range"] / DEFAULT_RANGE,
        **ends,
        **start,
    )


def _bart(shape: dict[str, Any], ends: dict[str, Any], depths: tuple[int, int], labels: tuple[str, ...]) -> Any:
    width, heads = shape["intermediate_size"], shape["num_attention_heads"]
    return BartConfig(
        vocab_size=shape["vocab_size"],
        d_model=shape["hidden_size"],
        encoder_layers=depths[0],
        decoder_layers=depths[1],
        encoder_ffn_dim=width,
        decoder_ffn_dim=width,
        encoder_attention_heads=heads,
        decoder_attention_heads=heads,
        max_position_embeddings=shape["max_position_embeddings"],
        init_std=shape["initializer_range"],
        decoder_start_token_id=STARTS["bart"],
        forced_eos_token_id=None,
        bos_token_id=None,
        **ends,
    )


_CONFIGS: dict[str, Callable[..., Any]] = {"qwen3": _qwen3, "bert": _bert, "t5": _t5, "bart": _bart}
