"""One line of a plan: what a rank holds, where and when."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from llmkd.planning.shapes import Shapes

GIB = 2**30
WIDE = 4
"""Bytes of a master weight, an Adam moment, an accumulated or a communicated gradient: fp32 (ds_configs/)."""
Phase = Literal["always", "teacher forward", "head", "backward", "optimizer step", "writing", "before training"]
Place = Literal["device", "host", "nvme", "disk"]
Part = Literal["teacher weights", "student"]
PHASES: tuple[Phase, ...] = ("teacher forward", "head", "backward", "optimizer step", "writing")
BEFORE: tuple[Phase, ...] = ("before training",)
"""When nothing of what is always held in training is there yet."""
FORWARD: tuple[Phase, ...] = ("teacher forward",)
WAITING: tuple[Phase, ...] = ("teacher forward", "head")
"""While a teacher's state waits for the student to compare it."""
OFFLOADED: dict[str, Place] = {"none": "device", "cpu": "host", "nvme": "nvme"}
"""By the name of an offload device in a recipe or a DeepSpeed file."""


@dataclass(frozen=True)
class Row:
    """One thing that one rank holds."""

    what: str
    bytes: int
    how: str
    """How the bytes were counted."""
    phases: tuple[Phase, ...] = ("always",)
    """When in a step it is held."""
    place: Place = "device"
    part: Part = "student"
    """What it is a part of; the teacher's weights are those that stay on the rank, not what is gathered for a moment."""


def millions(count: int) -> str:
    """A count of numbers as tables write it, e.g. `3.1 M`."""
    return f"{count / 1e6:,.1f} M" if count < 1e9 else f"{count / 1e9:,.2f} B"


def block_activations(shape: Shapes, size: int) -> int:
    """Bytes per token that one block keeps for its backward pass, for transformers' RMSNorm + attention + gated-MLP blocks.

    Counted as Korthikanti et al., arXiv 2205.05198, section 4.1 count GPT's, for sdpa or flash attention (no [T, T] matrix):
    two norms, each its fp32 input and its normalized output, and the weighted output that the linear layers read; queries, keys
    and values as attention reads them (keys and values repeated to the queries' heads), its output twice and its fp32
    log-sums; gate, activated gate, up, and their product.
    """
    norms = 2 * shape.hidden * (WIDE + 2 * size)
    query_norms = (shape.queries + shape.keys) * (WIDE + size) if shape.normed_queries else 0
    attention = 5 * shape.queries * size + WIDE * shape.heads
    return norms + query_norms + attention + 4 * shape.intermediate * size
