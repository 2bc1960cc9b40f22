"""The table of model types, every row of it tested. A decoder of a type without a row is a plain `ModelType()`."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from llmkd.data.batches import Kind

Step = Callable[[Tensor], Tensor]
"""A module, which is run by its own `forward` (an engine's hooks count its calls), or a function."""


class Passing(nn.Module):
    """Stands in for an encoder's embeddings and passes on the state that it is called with."""

    def forward(self, *args: Any, **options: Any) -> Tensor:
        """The only tensor among the arguments."""
        [state] = [value for value in (*args, *options.values()) if isinstance(value, Tensor)]
        return state


class Nothing(nn.Module):
    """Stands in for learned positions, which the state already contains."""

    def forward(self, *args: Any, **options: Any) -> Tensor:
        """A zero."""
        return torch.zeros(())


@dataclass(frozen=True)
class ModelType:
    """A type of model, by its `model_type`. Its list of blocks is found by its length (llmkd.models.parts)."""

    kind: Kind = "decoder"
    packs: bool = False
    """It keeps packed documents apart by their position ids."""
    varlen: bool = False
    """Its attention can be `varlen` (llmkd.models.varlen): what the model is given of the documents reaches its attention."""
    takes_masks: bool = False
    """It takes ready masks, one for each kind of its blocks."""
    has_stages: bool = False
    """It may be cut into stages: it does nothing else to its embeddings (Gemma scales them), and its parts are called model.embed_tokens,
    model.layers.N, model.norm and lm_head."""
    narrows: bool = False
    """Its blocks are RMSNorm, SwiGLU and grouped-query attention under Llama's names, and its head_dim stands in its configuration: a
    student can be made of a part of its width (llmkd.models.width)."""
    router: str | None = None
    """The router of a block that has experts, by its name in the block; its output begins with the logits [B*T, experts]."""
    dense: str | None = None
    """The type of model that is the same but for its experts."""
    ends: tuple[str, ...] | None = None
    """The modules between the last block and the head, by name; a model may lack some. None: stepping stones have not been tested on it."""
    starts: Mapping[str, Callable[[], nn.Module | None]] = field(default_factory=dict)
    """The modules before the first block, by name -> their stand-ins in a model that begins at a later block."""
    classifier: str | None = None
    """Encoders: the name of the linear map to the classes."""
    pooled: Callable[[Any, Any], Tensor] | None = None
    """Encoders: (model, output below the head) -> the state [B, H] that the classifier reads."""
    tail: Callable[[Any], list[Step]] | None = None
    """The steps from the last block's output to the final state; a decoder's are found in a pass (llmkd.student.gradient_norms)."""
    decoder_depth: str | None = None
    """Encoder-decoders: what the configuration calls the decoder's depth."""
    widths: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """A recipe's name of a width -> the configuration's names of it, where they differ."""
    positions_follow_padding: bool = False
    """Positions are counted from the padding's id on."""


def scaled(model: PreTrainedModel, final: Tensor) -> Tensor:
    """The final state as the head reads it: scaled down in a T5, whose tied embeddings are larger than a head's weights."""
    return final * model.config.hidden_size**-0.5 if getattr(model.config, "scale_decoder_outputs", False) else final


def _first(states: Tensor) -> Tensor:
    """The first token's state alone, [B, 1, H]."""
    return states[:, :1]


def _bert_pooled(model: Any, output: Any) -> Tensor:
    return model.dropout(output.pooler_output)


def _bert_tail(model: Any) -> list[Step]:
    return [_first, model.bert.pooler.dense, model.bert.pooler.activation, model.dropout]


def _distilbert_pooled(model: Any, output: Any) -> Tensor:
    return model.dropout(torch.relu(model.pre_classifier(output.last_hidden_state[:, 0])))


def _distilbert_tail(model: Any) -> list[Step]:
    return [_first, model.pre_classifier, torch.relu, model.dropout]


def _roberta_pooled(model: Any, output: Any) -> Tensor:
    part = model.classifier
    return part.dropout(torch.tanh(part.dense(part.dropout(output.last_hidden_state[:, 0]))))


def _roberta_tail(model: Any) -> list[Step]:
    part = model.classifier
    return [_first, part.dropout, part.dense, torch.tanh, part.dropout]


def _t5_tail(model: Any) -> list[Step]:
    return [model.decoder.final_layer_norm, model.decoder.dropout, functools.partial(scaled, model)]


_LLAMA = ModelType(packs=True, varlen=True, has_stages=True, ends=("model.norm",))
_ROBERTA = ModelType(
    kind="encoder",
    ends=("classifier.dense",),
    starts={"roberta.embeddings": Passing},
    classifier="classifier.out_proj",
    pooled=_roberta_pooled,
    tail=_roberta_tail,
    positions_follow_padding=True,
)
_T5 = ModelType(
    kind="encoder_decoder", tail=_t5_tail, decoder_depth="num_decoder_layers", widths={"intermediate_size": ("d_ff",)}
)
MODEL_TYPES: dict[str, ModelType] = {
    "bart": ModelType(
        kind="encoder_decoder",
        tail=lambda model: [],
        decoder_depth="decoder_layers",
        widths={
            "intermediate_size": ("encoder_ffn_dim", "decoder_ffn_dim"),
            "num_attention_heads": ("encoder_attention_heads", "decoder_attention_heads"),
        },
    ),
    "bert": ModelType(
        kind="encoder",
        ends=("bert.pooler",),
        starts={"bert.embeddings": Passing},
        classifier="classifier",
        pooled=_bert_pooled,
        tail=_bert_tail,
    ),
    "camembert": _ROBERTA,
    "distilbert": ModelType(
        kind="encoder",
        ends=("pre_classifier",),
        starts={"distilbert.embeddings": Passing},
        classifier="classifier",
        pooled=_distilbert_pooled,
        tail=_distilbert_tail,
        widths={"intermediate_size": ("hidden_dim",)},
    ),
    "gemma": replace(_LLAMA, has_stages=False),
    "gemma3_text": replace(_LLAMA, has_stages=False),
    "gpt2": ModelType(packs=True, varlen=True, ends=("transformer.ln_f",), starts={"transformer.wpe": Nothing}),
    "gpt_neox": ModelType(packs=True, varlen=True, ends=("gpt_neox.final_layer_norm",)),
    "llama": replace(_LLAMA, narrows=True),
    "mistral": replace(_LLAMA, narrows=True),
    "mt5": _T5,
    "olmo2": _LLAMA,
    "opt": ModelType(
        ends=("model.decoder.final_layer_norm", "model.decoder.project_out"),
        starts={"model.decoder.embed_positions": Nothing, "model.decoder.project_in": lambda: None},
        widths={"intermediate_size": ("ffn_dim",)},
    ),
    "phi": ModelType(packs=True, varlen=True, ends=("model.final_layernorm",)),
    "phi3": _LLAMA,
    "qwen2": replace(_LLAMA, takes_masks=True),
    "qwen3": replace(_LLAMA, takes_masks=True, narrows=True),
    "qwen3_moe": replace(_LLAMA, has_stages=False, router="mlp.gate", dense="qwen3"),
    "roberta": _ROBERTA,
    "smollm3": replace(_LLAMA, takes_masks=True),
    "stablelm": replace(_LLAMA, varlen=False),
    "t5": _T5,
    "xlm-roberta": _ROBERTA,
}


def types_with(property_: Callable[[ModelType], object]) -> list[str]:
    """The model types whose rows have a property, in alphabetical order."""
    return sorted(name for name, row in MODEL_TYPES.items() if property_(row))
