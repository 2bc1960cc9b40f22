"""A student's width out of its teacher's: the channels, heads and MLP columns that stay, by how large their activations are (Minitron).

For decoders whose blocks are made of RMSNorm, SwiGLU and grouped-query attention under Llama's names (`ModelType.narrows`).
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig

from llmkd.data.batches import Batch
from llmkd.errors import InputError
from llmkd.models.families import model_type
from llmkd.models.model_types import types_with

SIZES = ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads")
"""What of a width may be smaller than the teacher's, in a configuration's names; the width of one head stays."""
NORMS, HEADS, COLUMNS = ("input_layernorm", "post_attention_layernorm"), "self_attn.o_proj", "mlp.down_proj"
"""The modules of a block that are measured: the norms by their output, the two maps by their input."""
AXES: dict[str, tuple[str | None, ...]] = {
    "model.embed_tokens": (None, "channels"),
    "model.norm": ("channels",),
    "lm_head": (None, "channels"),
    "input_layernorm": ("channels",),
    "post_attention_layernorm": ("channels",),
    "self_attn.q_proj": ("heads", "channels"),
    "self_attn.k_proj": ("groups", "channels"),
    "self_attn.v_proj": ("groups", "channels"),
    "self_attn.o_proj": ("channels", "heads"),
    "self_attn.q_norm": (None,),
    "self_attn.k_norm": (None,),
    "self_attn.rotary_emb": (None,),
    "mlp.gate_proj": ("columns", "channels"),
    "mlp.up_proj": ("columns", "channels"),
    "mlp.down_proj": ("channels", "columns"),
}
"""A module (of a block: without the block's name) -> what the dimensions of its weight run over; a bias has the first of them."""
Sums = dict[str, Tensor]
"""A measured module -> [blocks, units]: over rows, the squares of the unit's mean activation in the row."""


@dataclass(frozen=True)
class Kept:
    """What of its teacher's width a student keeps: numbers in order, for all but the channels those of each of its blocks."""

    channels: tuple[int, ...]
    heads: tuple[tuple[int, ...], ...]
    groups: tuple[tuple[int, ...], ...]
    """Key-value heads."""
    columns: tuple[tuple[int, ...], ...]

    @property
    def sizes(self) -> dict[str, int]:
        """The student's width, in a configuration's names."""
        counts = (len(self.channels), len(self.columns[0]), len(self.heads[0]), len(self.groups[0]))
        return dict(zip(SIZES, counts, strict=True))

    @classmethod
    def of(cls, stored: Mapping[str, Any]) -> Kept:
        """From what JSON makes of it."""
        by_block = (tuple(map(tuple, stored[name])) for name in ("heads", "groups", "columns"))
        return cls(tuple(stored["channels"]), *by_block)


def check_narrowed(teacher: PreTrainedConfig, width: Mapping[str, int]) -> None:
    """Raise InputError for a teacher that can't be narrowed to this width, in a configuration's names."""
    first = next(iter(width))
    if not model_type(teacher).narrows:
        known = types_with(lambda row: row.narrows)
        raise InputError(
            f"student.{first}: copied blocks of a {teacher.model_type!r} model can't be narrowed, only those of "
            f"{', '.join(known[:-1])} and {known[-1]}; leave it out, or write init: random"
        )
    for key, value in width.items():
        if value > getattr(teacher, key):
            raise InputError(
                f"student.{key}: {value} is more than the teacher's {getattr(teacher, key)}, and copied blocks get no new weights; write "
                f"at most {getattr(teacher, key)}, or init: random"
            )
    heads, groups = (width.get(key, getattr(teacher, key)) for key in SIZES[2:])
    most = teacher.num_attention_heads // teacher.num_key_value_heads  # type: ignore[attr-defined]
    if heads > groups * most:
        raise InputError(
            f"student.num_attention_heads: {heads} heads on {groups} key-value heads are {heads / groups:g} to each, and the teacher has "
            f"{most}; write at most {groups * most}"
        )


def zero_sums(config: PreTrainedConfig, blocks: int, device: torch.device) -> Sums:
    """Nothing measured yet, of so many blocks of a model of this configuration."""
    of: Any = config
    widths = {**dict.fromkeys(NORMS, of.hidden_size), HEADS: of.num_attention_heads, COLUMNS: of.intermediate_size}
    return {name: torch.zeros(blocks, width, dtype=torch.float64, device=device) for name, width in widths.items()}


@contextlib.contextmanager
def measured(stack: Sequence[nn.Module], head_dim: int, batch: Batch, sums: Sums) -> Iterator[None]:
    """Inside, one pass of the batch through these blocks adds its rows to `sums`; padding counts nothing, a packed document is a row."""
    rows = batch.of_rows()
    row_means = rows / rows.sum(1, keepdim=True).clamp(min=1)

    def add(name: str, place: int, activation: Tensor) -> None:
        tokens = activation.flatten(0, 1)[batch.attended_at].float()
        tokens = tokens.unflatten(-1, (-1, head_dim)).norm(dim=-1) if name == HEADS else tokens.abs()
        sums[name][place] += (row_means @ tokens).double().square().sum(0)

    def watch(name: str, place: int, module: nn.Module) -> Any:
        def took(module: nn.Module, args: tuple[Any, ...]) -> None:
            add(name, place, args[0])

        def gave(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            add(name, place, output)

        return module.register_forward_hook(gave) if name in NORMS else module.register_forward_pre_hook(took)

    hooks = [watch(name, place, block.get_submodule(name)) for place, block in enumerate(stack) for name in sums]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def chosen(sums: Sums, student: PreTrainedConfig, groups: int) -> Kept:
    """What a student of this configuration keeps: of equals the lower number. `groups`: the teacher's key-value heads.

    A unit's importance is the L2 norm, over rows, of its mean activation in a row. A channel runs through all blocks, so that its
    importance is summed over all norms. Each block chooses columns and heads of its own: as many heads on each key-value head as the
    student has, and of those the key-value heads whose remaining heads sum up to the most. Raises InputError where an importance is not a
    number.
    """
    if not all(bool(of.isfinite().all()) for of in sums.values()):
        raise InputError(
            "student.init: the teacher's activations were measured as no number; look for a NaN in its weights, or leave the width out"
        )
    of: Any = student
    importance = {name: values.sqrt().cpu() for name, values in sums.items()}
    channels = torch.stack([importance[name] for name in NORMS]).sum((0, 1))
    each = of.num_attention_heads // of.num_key_value_heads
    by_block = [_heads(values.view(groups, -1), of.num_key_value_heads, each) for values in importance[HEADS]]
    return Kept(
        channels=_largest(channels, of.hidden_size),
        heads=tuple(heads for heads, _ in by_block),
        groups=tuple(kept for _, kept in by_block),
        columns=tuple(_largest(values, of.intermediate_size) for values in importance[COLUMNS]),
    )


def _heads(importance: Tensor, groups: int, each: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """(heads, key-value heads) that stay of one block: so many key-value heads with so many heads each. `importance` [groups, heads]."""
    best = [_largest(of_group, each) for of_group in importance]
    remaining = torch.stack([of_group[list(kept)].sum() for of_group, kept in zip(importance, best, strict=True)])
    stay = _largest(remaining, groups)
    return tuple(group * importance.shape[1] + head for group in stay for head in best[group]), stay


def _largest(values: Tensor, count: int) -> tuple[int, ...]:
    return tuple(sorted(values.sort(descending=True, stable=True).indices[:count].tolist()))


def narrowed(name: str, tensor: Tensor, kept: Kept, head_dim: int) -> Tensor:
    """The student's tensor of this name, out of the teacher's that is copied there. Raises InputError for a name that is not known."""
    parts = re.fullmatch(r"(?:model\.layers\.(\d+)\.)?(.+)\.(\w+)", name)
    if parts is None or parts[2] not in AXES:
        raise InputError(
            f"student.init: nobody has said how the teacher's tensor {name!r} is narrowed; leave the width out, or give another teacher"
        )
    for dimension, units in enumerate(AXES[parts[2]][: tensor.dim()]):
        if units is not None:
            stay = torch.tensor(kept.channels if units == "channels" else getattr(kept, units)[int(parts[1])])
            if units in ("heads", "groups"):
                stay = (stay[:, None] * head_dim + torch.arange(head_dim)).flatten()
            tensor = tensor.index_select(dimension, stay)
    return tensor
