"""New models: the recipe's `architecture` as a configuration of transformers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from transformers import BartConfig, BertConfig, PreTrainedConfig, Qwen3Config, T5Config

PAD, EOS = 0, 1
"""The ids of these tokens in an encoder-decoder's `llmkd.models.make.new_tokenizer`."""
DEFAULT_RANGE = 0.02
"""The initializer_range that T5's own initializer_factor of 1 stands for."""


def new_config(shape: Mapping[str, Any], tokenizer: Any = None, labels: tuple[str, ...] = ()) -> PreTrainedConfig:
    """The configuration of a new model of this shape (the recipe's `architecture`), its special tokens those of the tokenizer."""
    ends = {} if tokenizer is None else {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    return _CONFIGS[shape.get("model_type", "qwen3")](shape, ends, labels)


def _qwen3(shape: Mapping[str, Any], ends: Mapping[str, Any], labels: tuple[str, ...]) -> PreTrainedConfig:
    sizes = {key: value for key, value in shape.items() if key not in ("model_type", "decoder_layers")}
    return Qwen3Config(**sizes, **({"bos_token_id": None, **ends} if ends else {}), use_cache=True)


def _bert(shape: Mapping[str, Any], ends: Mapping[str, Any], labels: tuple[str, ...]) -> PreTrainedConfig:
    keys = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    keys += ("max_position_embeddings", "initializer_range")
    names = {"id2label": dict(enumerate(labels)), "label2id": {name: number for number, name in enumerate(labels)}}
    return BertConfig(**{key: shape[key] for key in keys}, **ends, **(names if labels else {}))


def _t5(shape: Mapping[str, Any], ends: Mapping[str, Any], labels: tuple[str, ...]) -> PreTrainedConfig:
    width, heads, depth = shape["hidden_size"], shape["num_attention_heads"], shape["num_hidden_layers"]
    return T5Config(
        vocab_size=shape["vocab_size"],
        d_model=width,
        d_ff=shape["intermediate_size"],
        num_heads=heads,
        d_kv=shape["head_dim"] or width // heads,
        num_layers=depth,
        num_decoder_layers=shape.get("decoder_layers") or depth,
        initializer_factor=shape["initializer_range"] / DEFAULT_RANGE,
        **{**ends, "decoder_start_token_id": PAD},  # as in the published models
    )


def _bart(shape: Mapping[str, Any], ends: Mapping[str, Any], labels: tuple[str, ...]) -> PreTrainedConfig:
    width, heads, depth = shape["intermediate_size"], shape["num_attention_heads"], shape["num_hidden_layers"]
    return BartConfig(
        vocab_size=shape["vocab_size"],
        d_model=shape["hidden_size"],
        encoder_layers=depth,
        decoder_layers=shape.get("decoder_layers") or depth,
        encoder_ffn_dim=width,
        decoder_ffn_dim=width,
        encoder_attention_heads=heads,
        decoder_attention_heads=heads,
        max_position_embeddings=shape["max_position_embeddings"],
        init_std=shape["initializer_range"],
        decoder_start_token_id=EOS,  # as in the published models
        forced_eos_token_id=None,
        bos_token_id=None,
        **ends,
    )


_CONFIGS: dict[str, Callable[[Mapping[str, Any], Mapping[str, Any], tuple[str, ...]], PreTrainedConfig]] = {
    "qwen3": _qwen3,
    "bert": _bert,
    "t5": _t5,
    "bart": _bart,
}
"""By model type, as `recipe.models.Architecture.model_type` lists them."""
