"""Settings of a configuration that belong to single blocks: where blocks are copied or left out, they follow their blocks or are refused.

The fields are those of the decoders in transformers 5.19 (`layer_idx` in modeling_*.py, lists in configuration_*.py). What a setting
makes of a block can also be seen in the block itself: `check_copies` compares each with the one it is copied from.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from torch import nn
from transformers import PreTrainedConfig

from llmkd.errors import InputError

Chosen = Sequence[int]
"""The teacher's block at each place of the student."""
Fields = dict[str, Any]
"""Configuration fields and their new values."""
Rule = Callable[[PreTrainedConfig, str, Chosen], Fields]

PLACES = re.compile(r"layer_idx|layer_id|layer_index|layer_number|block_idx")
"""Attributes in which a block keeps its own number."""


def fields_of(config: PreTrainedConfig, chosen: Chosen) -> Fields:
    """The per-block fields of a model of these blocks of a decoder. Raises InputError where a field can't describe such a model."""
    stored = config.to_dict()  # without what is computed from other fields
    others = [key for key in stored if "layer" in key and key not in PER_BLOCK]  # lists of a folder's own code
    changed: Fields = {}
    for key, rule in (PER_BLOCK | dict.fromkeys(others, _list)).items():
        if stored.get(key) is not None:
            changed.update(rule(config, key, chosen))
    return changed


def check_lists(config: PreTrainedConfig, folder: object) -> None:
    """Raise InputError where a list with one entry for each block has another length; `folder`: the model's, for the sentence."""
    for key in (key for key, rule in PER_BLOCK.items() if rule is _list):
        value = getattr(config, key, None)
        if isinstance(value, list | tuple) and not _one_for_each(config, value):
            raise InputError(
                f"{folder}: config.json has {len(value)} entries in {key} for {config.num_hidden_layers} blocks; write one for each block"
            )


def check_copies(teacher: Sequence[nn.Module], student: Sequence[nn.Module], chosen: Chosen) -> None:
    """Raise InputError unless each of the student's blocks is built as the teacher's block that is copied into it.

    The blocks may be on the meta device: kinds of modules, shapes and plain settings are compared, their own numbers left out.
    """
    for place, (block, old) in enumerate(zip(student, chosen, strict=True)):
        ours, theirs = _description(block), _description(teacher[old])
        if different := sorted(key for key in ours.keys() | theirs.keys() if ours.get(key) != theirs.get(key)):
            raise InputError(
                f"student.copy_blocks: the teacher's block {old} would not be the same block at place {place} of the student "
                f"({different[0]} differs, which this model type sets by a block's place); write other blocks, or student.init: random"
            )


def are_alike(blocks: Iterable[nn.Module]) -> bool:
    """Whether all blocks are of one kind, so that each may stand in any place: kinds of modules, shapes and plain settings, as above."""
    first, *others = map(_description, blocks)
    return all(other == first for other in others)


def _description(block: nn.Module) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for name, module in block.named_modules():
        values[name or "its kind"] = type(module)
        for key, value in vars(module).items():
            if isinstance(value, bool | int | float | str | None) and not PLACES.search(key):
                values[f"{name}.{key}".lstrip(".")] = re.sub(r"\d+", "", value) if isinstance(value, str) else value
    tensors = [*block.named_parameters(), *block.named_buffers()]
    return {**values, **{name: tuple(tensor.shape) for name, tensor in tensors}}


def _one_for_each(config: PreTrainedConfig, value: Any) -> bool:
    return isinstance(value, list | tuple) and len(value) == config.num_hidden_layers


def _refuse(key: str, value: Any) -> InputError:
    return InputError(
        f"student.copy_blocks: the teacher's {key} is {value!r}, which no value can say of these blocks in this order; write the blocks in "
        "the teacher's order, or give another teacher"
    )


def _list(config: PreTrainedConfig, key: str, chosen: Chosen) -> Fields:
    """One entry for each block."""
    value = getattr(config, key)
    return {key: [value[block] for block in chosen]} if _one_for_each(config, value) else {}


def _numbers(config: PreTrainedConfig, key: str, chosen: Chosen) -> Fields:
    """The numbers of the blocks that are of a kind, counted from 0."""
    listed = set(getattr(config, key))
    return {key: [place for place, block in enumerate(chosen) if block in listed]}


def _numbers_from_1(config: PreTrainedConfig, key: str, chosen: Chosen) -> Fields:
    listed = set(getattr(config, key))
    return {key: [place + 1 for place, block in enumerate(chosen) if block + 1 in listed]}


def _first(config: PreTrainedConfig, key: str, chosen: Chosen, overruled_by: str = "") -> Fields:
    """How many of the first blocks are of a kind."""
    value = getattr(config, key)
    inside = [block < value for block in chosen]
    if sorted(inside, reverse=True) != inside and getattr(config, overruled_by, None) is None:
        raise _refuse(key, value)
    return {key: sum(inside)}


def _first_unless(list_of_kinds: str) -> Rule:
    """As `_first`, for a count that transformers reads only where this list is missing."""
    return lambda config, key, chosen: _first(config, key, chosen, list_of_kinds)


def _sparse_step(config: PreTrainedConfig, key: str, chosen: Chosen) -> Fields:
    """Qwen's: every nth block has experts, but for those in mlp_only_layers, which then lists all the others."""
    step: int = config.decoder_sparse_step  # type: ignore[attr-defined]
    if step == 1:
        return {}
    dense = set(getattr(config, "mlp_only_layers", None) or ())
    places = [place for place, block in enumerate(chosen) if block in dense or (block + 1) % step]
    return {key: 1, "mlp_only_layers": places}


def _expert_range(config: PreTrainedConfig, key: str, chosen: Chosen) -> Fields:
    """ERNIE's: every nth block from a first to a last one has experts."""
    settings: Any = config
    first, last = settings.moe_layer_start_index, settings.moe_layer_end_index
    places = [p for p, b in enumerate(chosen) if first <= b <= last and (b + 1) % settings.moe_layer_interval == 0]
    if not places:  # a range that is empty
        return {"moe_layer_start_index": len(chosen), "moe_layer_end_index": len(chosen), "moe_layer_interval": 1}
    if places != list(range(places[0], places[-1] + 1)):
        raise _refuse(key, settings.moe_layer_interval)
    return {"moe_layer_start_index": places[0], "moe_layer_end_index": places[-1], "moe_layer_interval": 1}


def _attention_types(config: PreTrainedConfig, key: str, chosen: Chosen) -> Fields:
    """GPT-Neo's: [[kinds, how often], ...], which it writes out in attention_layers."""
    return {key: [[[config.attention_layers[block]], 1] for block in chosen]}  # type: ignore[attr-defined]


def _first_blocks_only(config: PreTrainedConfig, key: str, chosen: Chosen) -> Fields:
    """A block computes by its own number, or with others' keys and values: it can't be moved."""
    value = getattr(config, key)
    if value and list(chosen) != list(range(len(chosen))):
        raise InputError(
            f"student.copy_blocks: the teacher's {key} is {value!r}, so that its blocks compute by their place and can't be moved; give "
            "another teacher, or student.init: random"
        )
    return {}


def _shared_last(config: PreTrainedConfig, key: str, chosen: Chosen) -> Fields:
    """Gemma's: so many of the last blocks read the keys and values of those before them."""
    _first_blocks_only(config, key, chosen)
    cut = config.num_hidden_layers - len(chosen)
    return {key: max(0, getattr(config, key) - cut)} if getattr(config, key) else {}


PER_BLOCK: dict[str, Rule] = {
    "layer_types": _list,
    "mlp_layer_types": _list,
    "layers_block_type": _list,
    "no_rope_layers": _list,
    "layer_rope_theta": _list,
    "attention_layers": _list,
    "indexer_types": _list,
    "activation_sparsity_pattern": _list,
    "num_attention_heads_per_layer": _list,
    "mlp_only_layers": _numbers,
    "moe_layers": _numbers,
    "full_attn_idxs": _numbers,
    "attn_layer_indices": _numbers,
    "local_layer_ids": _numbers,
    "ple_layer_ids": _numbers_from_1,
    "first_k_dense_replace": _first_unless("mlp_layer_types"),
    "num_dense_layers": _first,
    "max_window_layers": _first_unless("layer_types"),
    "decoder_sparse_step": _sparse_step,
    "moe_layer_interval": _expert_range,
    "attention_types": _attention_types,
    "num_kv_shared_layers": _shared_last,
    "scale_attn_by_inverse_layer_idx": _first_blocks_only,
}
"""Field -> how it follows the blocks. decoder_sparse_step comes after mlp_only_layers, which it may write anew."""
