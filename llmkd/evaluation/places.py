"""Where models are scored: which devices there are, how many a model needs, and which models share a machine's cores."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence
from pathlib import Path

from llmkd.errors import InputError
from llmkd.evaluation.results import ScoredModel, StepResult
from llmkd.inference.choose import parameters

SMALL = 2**28
"""Bytes of weights up to which models are scored beside each other on a CPU: a core works through them faster than cores share them."""
BESIDE = 4
"""Processes beside each other on a CPU, at most: each holds a model."""
ITEM = {"float32": 4, "bfloat16": 2}
"""Bytes of a weight; by name, since each scoring process would import torch for its own."""
FULL = 0.6
"""Of a GPU's memory, what weights may take of it; the rest is for keys and values, states and logits."""


def visible_devices() -> list[str]:
    """The CUDA devices that this process may use, as CUDA_VISIBLE_DEVICES names them; `cpu` where there is none."""
    import torch  # heavy, and needed by the parent alone: a child is given its device

    count, named = torch.cuda.device_count(), os.environ.get("CUDA_VISIBLE_DEVICES")
    return (named.split(",") if named else [str(number) for number in range(count)])[:count] or ["cpu"]


def side_by_side(models: Sequence[StepResult]) -> int:
    """How many processes share these models on a CPU: several where all are small. Each takes two at least, which repay its start."""
    return max(1, min(len(models) // 2, len(os.sched_getaffinity(0)), BESIDE)) if all(map(_is_small, models)) else 1


def _is_small(result: StepResult) -> bool:
    """Whether what is scored is one model of few weights; of a result about several (angles) that is not known."""
    if not isinstance(result, ScoredModel):
        return False
    return sum(file.stat().st_size for file in Path(result.model).glob("*.safetensors")) <= SMALL


def weight_bytes(folders: Sequence[Path], dtype: str) -> int:
    """What models take on a device in that dtype, all of them at once; nothing for one that can't be read (loading reports it)."""
    total = 0
    for folder in folders:
        try:
            total += parameters(folder) * ITEM[dtype]
        except (OSError, ValueError, KeyError):
            continue
    return total


def devices_for(model: StepResult, weights: int, count: int, card: int | None) -> int:
    """Over how many devices a model is spread whose process holds so many bytes of weights, where `count` are there.

    `card`: the bytes of one of them; None on a CPU, where a model is never spread. Raises InputError where it does not fit.
    """
    if card is None or weights <= FULL * card:
        return 1
    needed = math.ceil(weights / (FULL * card))
    if (
        isinstance(model, ScoredModel) and model.backend == "vllm"
    ):  # which gives each device as many heads as the others
        needed = 2 ** math.ceil(math.log2(needed))
        heads = _heads(Path(model.model))
        if not _can_share(heads, needed):
            raise InputError(
                f"it needs {needed} GPUs, and vLLM can't share its {' and '.join(map(str, heads))} attention and key-value heads among "
                "them; write backend: hf"
            )
    if needed > count:
        raise InputError(
            f"its process holds {weights / 2**30:.1f} GiB of weights, which need {needed} GPUs of {card / 2**30:.1f} GiB (at most "
            f"{FULL:g} of each), and {count} {'is' if count == 1 else 'are'} here; use a machine with more, or write evaluation.dtype: "
            "bfloat16 where it is float32"
        )
    return needed


def _can_share(heads: Sequence[int], devices: int) -> bool:
    """Whether so many devices can each have as many heads; key-value heads (the second number) are doubled where they are fewer."""
    attention, *key_values = heads or [devices]
    return attention % devices == 0 and all(n % devices == 0 or devices % n == 0 for n in key_values)


def _heads(folder: Path) -> list[int]:
    """How many attention heads and key-value heads a decoder has, as far as its configuration says so."""
    try:
        config = json.loads((folder / "config.json").read_text())
    except (OSError, ValueError):  # loading it will report that
        return []
    return [config[key] for key in ("num_attention_heads", "num_key_value_heads") if config.get(key)]


def groups(devices: Sequence[str], size: int) -> tuple[list[list[str]], list[str]]:
    """(the devices in groups of that size, those that are left)."""
    whole = len(devices) - len(devices) % size
    return [list(devices[start : start + size]) for start in range(0, whole, size)], list(devices[whole:])
