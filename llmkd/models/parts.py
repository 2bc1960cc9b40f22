"""Where a model's blocks, head and states are, and how a batch runs through it, whatever its family.

Blocks are counted through a model's stacks, the encoder's first: in a T5 of 6 + 6 blocks, block 6 is the first of its decoder. So a pair
stays two numbers. What a model is, is said by llmkd.models.families.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from llmkd.data.batches import Batch, Kind
from llmkd.errors import InputError
from llmkd.layer_map import DECODER_EMBEDDING, EMBEDDING
from llmkd.models.families import CLASSIFIERS, ROBERTAS, check_logits, depths, kind

Take = Callable[[Tensor], None]


@dataclass(frozen=True)
class Stack:
    """A run of blocks: the only one of a decoder or an encoder, or the encoder's or the decoder's of an encoder-decoder."""

    name: Literal["", "enc", "dec"]
    blocks: nn.ModuleList
    first: int
    """The number of its first block."""
    embedding: int
    """The number that stands for what its first block reads."""
    norm: nn.Module | None
    """What its last block's output passes before anything reads it, where `final_state` does not give that already."""


@dataclass(frozen=True)
class Tokens:
    """What stands where a stack's states are, in one batch."""

    ids: Tensor  # [B, T]
    positions: Tensor  # [B, T], counted from 0 in each row (packed: in each document)
    attended: Tensor  # [B, T] bool, False at padding
    at: Tensor  # [N] flat positions that are not padding


def backbone(model: PreTrainedModel) -> nn.Module:
    """A decoder below its head: its output is the final state."""
    base: Any = model.base_model
    return base.decoder if hasattr(base, "decoder") else base


def blocks(model: PreTrainedModel) -> nn.ModuleList:
    """All transformer blocks in order, an encoder-decoder's encoder first."""
    found = stacks(model)
    return found[0].blocks if len(found) == 1 else nn.ModuleList(block for stack in found for block in stack.blocks)


def stacks(model: PreTrainedModel) -> tuple[Stack, ...]:
    """The model's stacks of blocks, in the order in which they run."""
    if kind(model.config) != "encoder_decoder":
        return (Stack("", _list_of_blocks(model, backbone(model), depths(model.config)[0]), 0, EMBEDDING, None),)
    encoder, decoder = depths(model.config)
    parts: list[tuple[Literal["enc", "dec"], int, int, int]] = [
        ("enc", encoder, 0, EMBEDDING),
        ("dec", decoder, encoder, DECODER_EMBEDDING),
    ]
    found = []
    for name, depth, first, embedding in parts:
        body: Any = _side(model, name)
        norm = getattr(body, "final_layer_norm", None)  # T5's; BART's blocks end with their own
        found.append(Stack(name, _list_of_blocks(model, body, depth), first, embedding, norm))
    return tuple(found)


def _side(model: Any, name: Literal["enc", "dec"]) -> nn.Module:
    """An encoder-decoder's encoder or decoder."""
    return model.base_model.encoder if name == "enc" else model.base_model.decoder


def _list_of_blocks(model: PreTrainedModel, body: nn.Module, depth: int) -> nn.ModuleList:
    """The one ModuleList as long as the configuration says the model is deep."""
    found = [(name, m) for name, m in body.named_modules() if isinstance(m, nn.ModuleList) and len(m) == depth]
    shallowest = [m for name, m in found if name.count(".") == min(n.count(".") for n, _ in found)]
    if len(shallowest) != 1:
        raise InputError(
            f"{type(model).__name__}: found {len(shallowest)} lists of {depth} blocks where one was expected; give a model of "
            "another class"
        )
    return shallowest[0]


def head(model: PreTrainedModel) -> nn.Linear:
    """The linear map from final state to logits. Raises InputError for a model that does more than that to its logits."""
    check_logits(model.config)
    if kind(model.config) == "encoder":
        found: Any = model.get_submodule(CLASSIFIERS[model.config.model_type])
    else:
        found = model.get_output_embeddings()
    if not isinstance(found, nn.Linear):
        raise InputError(f"{type(model).__name__} has no linear language-model head; give a causal language model")
    return found


def head_bias(model: PreTrainedModel) -> Tensor | None:
    """What is added to the head's product [V]: its own bias, or BART's, which stands beside it and is not trained."""
    apart = getattr(model, "final_logits_bias", None)
    return head(model).bias if apart is None else apart[0]


def whole_head(model: PreTrainedModel) -> nn.Linear:
    """The head with all that is added to its product: BART's bias, which stands beside it, is its bias here."""
    found, bias = head(model), head_bias(model)
    if bias is None or bias is found.bias:
        return found
    made = nn.Linear(1, 1, bias=False)
    made.weight, made.bias = found.weight, nn.Parameter(bias, requires_grad=False)
    return made


def on_state(model: PreTrainedModel, block: int, take: Take, *, normed: bool) -> None:
    """Call `take` with a block's state, or with the embeddings' (EMBEDDING, DECODER_EMBEDDING), whenever the model is run.

    The embeddings' state of an encoder or encoder-decoder is what the first block reads (`hidden_states[0]`), as the layer-selection
    paper's code compares it; a decoder's is the word embedding alone. `normed`: the last block's state of each stack is taken after its
    final norm, where it has one, as the last of `hidden_states` is.
    """
    decodes = kind(model.config) == "decoder"

    def output(module: nn.Module, args: object, output: object) -> None:
        take(output_state(output))

    def final(module: nn.Module, args: object, output: Any) -> None:
        take(output.last_hidden_state)

    def first_input(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        take(args[0] if args else kwargs["hidden_states"])

    if block == EMBEDDING and decodes:
        model.get_input_embeddings().register_forward_hook(output)
        return
    for stack in stacks(model):
        place = block - stack.first
        if block == stack.embedding:
            stack.blocks[0].register_forward_pre_hook(first_input, with_kwargs=True)
        elif 0 <= place < len(stack.blocks):
            last = normed and place == len(stack.blocks) - 1
            if last and decodes:
                backbone(model).register_forward_hook(final)
            else:
                (stack.norm if last and stack.norm is not None else stack.blocks[place]).register_forward_hook(output)


def tokens_of(batch: Batch, stack: Stack) -> Tokens:
    """The tokens that a stack reads: of an encoder-decoder's encoder those of the source."""
    if stack.name != "enc":
        return Tokens(batch.input_ids, batch.position_ids, batch.attended, batch.attended_at)
    ids, attended, at = batch.source_ids, batch.source_attended, batch.source_at
    assert ids is not None and attended is not None and at is not None
    return Tokens(ids, torch.arange(ids.shape[1], device=ids.device).expand(ids.shape), attended, at)


def encoder_blocks(model: PreTrainedModel) -> range:
    """The numbers whose states stand at the source's tokens, the encoder's embeddings among them; none unless an encoder-decoder's."""
    found = stacks(model)
    return range(EMBEDDING, len(found[0].blocks)) if len(found) == 2 else range(0)


def final_state(model: PreTrainedModel, batch: Batch, opened: Tensor | None = None) -> Tensor:
    """What the head reads: [B, T, H] of a decoder or an encoder-decoder's decoder, [B, 1, H] of an encoder.

    `opened` [B, T, H]: what stands in place of the tokens' embeddings, of a decoder or an encoder.
    """
    return _RUN[kind(model.config)](model, batch, opened)


class Body(nn.Module):
    """A model as an engine runs it forward: a batch in, the final state out."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, batch: Batch) -> Tensor:
        """The final state."""
        return final_state(self.model, batch)


def _run_decoder(model: PreTrainedModel, batch: Batch, opened: Tensor | None) -> Tensor:
    return backbone(model)(
        **_read(batch, opened),
        attention_mask=batch.attention_mask,
        position_ids=batch.position_ids,
        use_cache=False,
    ).last_hidden_state


def _run_encoder(model: PreTrainedModel, batch: Batch, opened: Tensor | None) -> Tensor:
    # which of two texts a token belongs to is in its embedding
    segments = {} if batch.segments is None or opened is not None else {"token_type_ids": batch.segments}
    base: Any = model.base_model
    output = base(**_read(batch, opened), attention_mask=batch.attention_mask, **segments)
    return _POOLED[model.config.model_type](model, output)[:, None]


def _run_encoder_decoder(model: PreTrainedModel, batch: Batch, opened: Tensor | None) -> Tensor:
    assert opened is None and batch.source_ids is not None and batch.source_attended is not None
    mask = batch.source_attended.long()
    encoded = _side(model, "enc")(input_ids=batch.source_ids, attention_mask=mask).last_hidden_state
    final = _side(model, "dec")(
        input_ids=batch.input_ids,
        attention_mask=batch.attention_mask,
        encoder_hidden_states=encoded,
        encoder_attention_mask=mask,
        use_cache=False,
    ).last_hidden_state
    return scaled(model, final)


def scaled(model: PreTrainedModel, final: Tensor) -> Tensor:
    """What the head reads of a final state: T5's tied embeddings are drawn larger than a head's weight, and the state makes up for it."""
    return final * model.config.hidden_size**-0.5 if getattr(model.config, "scale_decoder_outputs", False) else final


def _read(batch: Batch, opened: Tensor | None) -> dict[str, Tensor]:
    """What a stack of blocks is given to begin with."""
    return {"input_ids": batch.input_ids} if opened is None else {"inputs_embeds": opened}


_RUN: dict[Kind, Callable[[PreTrainedModel, Batch, Tensor | None], Tensor]] = {
    "decoder": _run_decoder,
    "encoder": _run_encoder,
    "encoder_decoder": _run_encoder_decoder,
}


def _bert_pooled(model: Any, output: Any) -> Tensor:
    return model.dropout(output.pooler_output)


def _distilbert_pooled(model: Any, output: Any) -> Tensor:
    return model.dropout(torch.relu(model.pre_classifier(output.last_hidden_state[:, 0])))


def _roberta_pooled(model: Any, output: Any) -> Tensor:
    part = model.classifier
    return part.dropout(torch.tanh(part.dense(part.dropout(output.last_hidden_state[:, 0]))))


_POOLED: dict[str, Callable[[Any, Any], Tensor]] = {
    "bert": _bert_pooled,
    "distilbert": _distilbert_pooled,
    **dict.fromkeys(ROBERTAS, _roberta_pooled),
}
"""From an encoder's output to the state [B, H] that its classifier reads, by model type."""


def output_state(output: object) -> Tensor:
    """The state in a block's output, which is a tensor or a tuple that opens with it."""
    state = output[0] if isinstance(output, tuple) else output
    assert isinstance(state, Tensor)
    return state
