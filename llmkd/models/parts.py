"""Where a model's blocks, head and states are, and how a batch runs through it, whatever its family.

Blocks are counted through a model's stacks, the encoder's first: in a T5 of 6 + 6 blocks, block 6 is the first of its decoder. So a pair
stays two numbers. The kinds and types of models are in llmkd.models.families and llmkd.models.model_types.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from llmkd.data.batches import Batch, Kind, Packed
from llmkd.errors import InputError
from llmkd.layer_map import DECODER_EMBEDDING, EMBEDDING
from llmkd.models import varlen
from llmkd.models.families import check_logits, depths, kind, model_type
from llmkd.models.model_types import scaled

Take = Callable[[Tensor], None]


@dataclass(frozen=True)
class Stack:
    """A run of blocks: the only one of a decoder or an encoder, or the encoder's or the decoder's of an encoder-decoder."""

    name: Literal["", "enc", "dec"]
    blocks: nn.ModuleList
    first: int
    """The number of its first block."""
    embedding: int
    """The number that stands for its first block's input."""
    norm: nn.Module | None
    """The final norm, where `final_state` does not apply it."""
    opening: nn.Module | None = None
    """The module whose output is the embeddings' state; None: that state is the first block's input."""
    closing: nn.Module | None = None
    """The module whose output is the last block's state after the final norm; None: there is no such norm."""


@dataclass(frozen=True)
class Tokens:
    """The tokens at a stack's states, in one batch."""

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
    first, *others = stacks(model)
    return nn.ModuleList(block for stack in (first, *others) for block in stack.blocks) if others else first.blocks


def routers(model: PreTrainedModel) -> list[nn.Module]:
    """The routers of the blocks that have experts, in order; none of a model type whose routers are not known."""
    wanted = model_type(model.config).router
    return [module for block in blocks(model) for name, module in block.named_modules() if name == wanted]


def stacks(model: PreTrainedModel) -> tuple[Stack, ...]:
    """The model's stacks of blocks, in the order in which they run."""
    return _KINDS[kind(model.config)].stacks(model)


def _decoder_stack(model: PreTrainedModel) -> tuple[Stack, ...]:
    body = backbone(model)
    listed = _list_of_blocks(model, body, depths(model.config)[0])
    return (Stack("", listed, 0, EMBEDDING, None, opening=model.get_input_embeddings(), closing=body),)


def _encoder_stack(model: PreTrainedModel) -> tuple[Stack, ...]:
    return (Stack("", _list_of_blocks(model, backbone(model), depths(model.config)[0]), 0, EMBEDDING, None),)


def _two_stacks(model: PreTrainedModel) -> tuple[Stack, ...]:
    encoder, decoder = depths(model.config)

    def stack(name: Literal["enc", "dec"], depth: int, first: int, embedding: int) -> Stack:
        body = _side(model, name)
        norm = getattr(body, "final_layer_norm", None)  # T5's; BART's blocks end with their own
        return Stack(name, _list_of_blocks(model, body, depth), first, embedding, norm, closing=norm)

    return (stack("enc", encoder, 0, EMBEDDING), stack("dec", decoder, encoder, DECODER_EMBEDDING))


def _side(model: Any, name: Literal["enc", "dec"]) -> nn.Module:
    """An encoder-decoder's encoder or decoder."""
    return model.base_model.encoder if name == "enc" else model.base_model.decoder


def _list_of_blocks(model: PreTrainedModel, body: nn.Module, depth: int) -> nn.ModuleList:
    """The only ModuleList whose length is the configured depth."""
    lists = [
        (name.count("."), m) for name, m in body.named_modules() if isinstance(m, nn.ModuleList) and len(m) == depth
    ]
    shallowest = [m for level, m in lists if level == min(level for level, _ in lists)]
    if len(shallowest) != 1:
        raise InputError(
            f"{type(model).__name__}: found {len(shallowest)} lists of {depth} blocks where one was expected; give a model of "
            "another class"
        )
    return shallowest[0]


def head(model: PreTrainedModel) -> nn.Linear:
    """The linear map from final state to logits. Raises InputError for a model that does more than that to its logits."""
    check_logits(model.config)
    place = model_type(model.config).classifier
    module: Any = model.get_output_embeddings() if place is None else model.get_submodule(place)
    if not isinstance(module, nn.Linear):
        raise InputError(f"{type(model).__name__} has no linear language-model head; give a causal language model")
    return module


def head_bias(model: PreTrainedModel) -> Tensor | None:
    """The bias of the logits [V]: the head's own, or BART's, which is separate and not trained."""
    apart = getattr(model, "final_logits_bias", None)
    return head(model).bias if apart is None else apart[0]


def whole_head(model: PreTrainedModel) -> nn.Linear:
    """The head as one linear map; BART's separate bias becomes its bias."""
    own, bias = head(model), head_bias(model)
    if bias is None or bias is own.bias:
        return own
    whole = nn.Linear(1, 1, bias=False)
    whole.weight, whole.bias = own.weight, nn.Parameter(bias, requires_grad=False)
    return whole


def on_state(model: PreTrainedModel, block: int, take: Take, *, normed: bool) -> None:
    """Call `take` with a block's state, or with the embeddings' (EMBEDDING, DECODER_EMBEDDING), whenever the model is run.

    The embeddings' state of an encoder or encoder-decoder is what the first block reads (`hidden_states[0]`), as the layer-selection
    paper's code compares it; a decoder's is the word embedding alone. `normed`: the last block's state of each stack is taken after its
    final norm, where it has one, as the last of `hidden_states` is.
    """

    def output(module: nn.Module, args: object, output: object) -> None:
        take(output_state(output))

    def first_input(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        take(args[0] if args else kwargs["hidden_states"])

    for stack in stacks(model):
        place, last = block - stack.first, len(stack.blocks) - 1
        if block == stack.embedding:
            if stack.opening is None:
                stack.blocks[0].register_forward_pre_hook(first_input, with_kwargs=True)
            else:
                stack.opening.register_forward_hook(output)
        elif 0 <= place <= last:
            closes = normed and place == last and stack.closing is not None
            (stack.closing if closes else stack.blocks[place]).register_forward_hook(output)  # type: ignore[union-attr]


def tokens_of(batch: Batch, stack: Stack) -> Tokens:
    """The tokens that a stack reads: of an encoder-decoder's encoder those of the source."""
    if stack.name != "enc":
        return Tokens(batch.input_ids, batch.position_ids, batch.attended, batch.attended_at)
    ids, attended, at = batch.source_ids, batch.source_attended, batch.source_at
    assert ids is not None and attended is not None and at is not None
    return Tokens(ids, torch.arange(ids.shape[1], device=ids.device).expand(ids.shape), attended, at)


def encoder_blocks(model: PreTrainedModel) -> range:
    """The numbers whose states stand at the source's tokens, the encoder's embeddings among them; none unless an encoder-decoder's."""
    encoder, *decoder = stacks(model)
    return range(EMBEDDING, len(encoder.blocks)) if decoder else range(0)


def final_state(model: PreTrainedModel, batch: Batch, opened: Tensor | None = None) -> Tensor:
    """What the head reads: [B, T, H] of a decoder or an encoder-decoder's decoder, [B, 1, H] of an encoder.

    `opened` [B, T, H]: what stands in place of the tokens' embeddings, of a decoder or an encoder.
    """
    return _KINDS[kind(model.config)].run(model, batch, opened)


class Body(nn.Module):
    """A model as an engine runs it forward: a batch in, the final state out. It does not hold a decoder's head."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model: Any = _KINDS[kind(model.config)].body(model)

    def forward(self, batch: Batch) -> Tensor:
        """The final state."""
        return final_state(self.model, batch)


def _run_decoder(model: PreTrainedModel, batch: Batch, opened: Tensor | None) -> Tensor:
    return backbone(model)(**_read(batch, opened), **decoder_options(model.config, batch.packed)).last_hidden_state


def decoder_options(config: Any, packed: Packed | None) -> dict[str, Any]:
    """What a decoder is given beside its tokens: packed rows their documents, padded ones (None) nothing.

    Padding stands behind a row's tokens, and no token looks ahead: no mask is needed, and attention is at its fastest without one. Some
    models are told so, because they would look for packed rows in the positions, which waits for the device.
    """
    if packed is not None:
        return {**varlen.options(config, packed), "use_cache": False}
    causal_by_itself = config._attn_implementation != "eager"  # eager attention hides what is ahead by a mask alone
    if causal_by_itself and model_type(config).takes_masks and set(config.layer_types) == {"full_attention"}:
        return {"attention_mask": {"full_attention": None}, "use_cache": False}
    return {"use_cache": False}


def _run_encoder(model: PreTrainedModel, batch: Batch, opened: Tensor | None) -> Tensor:
    # which of two texts a token belongs to is in its embedding
    segments = {} if batch.segments is None or opened is not None else {"token_type_ids": batch.segments}
    base: Any = model.base_model
    output = base(**_read(batch, opened), attention_mask=batch.attention_mask, **segments)
    pooled = model_type(model.config).pooled
    assert pooled is not None, model.config.model_type
    return pooled(model, output)[:, None]


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


def _read(batch: Batch, opened: Tensor | None) -> dict[str, Tensor]:
    """A stack's input: token ids, or the state in place of their embeddings."""
    return {"input_ids": batch.input_ids} if opened is None else {"inputs_embeds": opened}


@dataclass(frozen=True)
class _Ways:
    """What differs between decoders, encoders and encoder-decoders."""

    stacks: Callable[[PreTrainedModel], tuple[Stack, ...]]
    run: Callable[[PreTrainedModel, Batch, Tensor | None], Tensor]
    body: Callable[[PreTrainedModel], nn.Module]
    """The part of a model that an engine runs forward."""


_KINDS: dict[Kind, _Ways] = {
    "decoder": _Ways(_decoder_stack, _run_decoder, backbone),
    "encoder": _Ways(_encoder_stack, _run_encoder, lambda model: model),
    "encoder_decoder": _Ways(_two_stacks, _run_encoder_decoder, lambda model: model),
}


def output_state(output: Any) -> Tensor:
    """The state in the output of a block (a tensor, or a tuple that begins with it) or of a backbone."""
    state = getattr(output, "last_hidden_state", output)
    state = state[0] if isinstance(state, tuple) else state
    assert isinstance(state, Tensor)
    return state
