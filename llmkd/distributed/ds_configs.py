"""DeepSpeed configurations: files read, the recipe's numbers written into them, and those that we write ourselves."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from llmkd.distributed.ds_checks import DsConfig, misshapen, refused_by_deepspeed, unusable
from llmkd.errors import InputError, first_line

log = logging.getLogger("llmkd")

BY_RECIPE = ("recipe", "auto")
"""The values of a DeepSpeed JSON in whose place the recipe's number is written; "auto" is what other projects call it."""
AUTO = "auto"
MOST_NESTED = 20
"""Levels of sections in a file; DeepSpeed has four."""


def load_ds_config(name: str, folder: Path) -> DsConfig:
    """A DeepSpeed configuration by its name in `folder` (ds_configs/) or by a path of the user's own."""
    file = Path(name) if name.endswith(".json") else folder / f"{name}.json"
    if not file.is_file():
        known = ", ".join(sorted(p.stem for p in folder.glob("*.json")))
        raise InputError(
            f"train.deepspeed: no DeepSpeed configuration {name!r}; write one of {known}, or the path of a .json file"
        )
    try:
        config = json.loads(file.read_text(encoding="utf-8-sig"))
    except json.JSONDecodeError as error:
        raise InputError(f"{file}: not valid JSON at line {error.lineno}: {error.msg}") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{file}: not UTF-8 at byte {error.start}; save it in that encoding") from error
    except (ValueError, RecursionError) as error:  # an endless number, or brackets within brackets
        raise InputError(f"{file}: JSON that can't be read ({first_line(error)}); correct it") from error
    if not isinstance(config, dict):
        raise InputError(f"{file}: a DeepSpeed configuration is a JSON object")
    if _deeper(config, MOST_NESTED):
        raise InputError(f"{file}: sections within sections, more than {MOST_NESTED} deep; DeepSpeed has none so deep")
    return config


def _deeper(value: Any, levels: int) -> bool:
    """Whether JSON is nested more deeply than so many levels."""
    if not isinstance(value, dict | list):
        return False
    inside = value.values() if isinstance(value, dict) else value
    return levels == 0 or any(_deeper(item, levels - 1) for item in inside)


def complete_ds_config(
    config: DsConfig,
    *,
    world_size: int,
    micro_batch: int,
    accumulation: int,
    clip: float,
    dtype: str,
    nvme_path: str,
    name: str = "DeepSpeed configuration",
) -> DsConfig:
    """Write the recipe's numbers into a DeepSpeed configuration, and leave out what is switched off in it.

    Raises InputError, which begins with `name`, for a number of the user's own that disagrees, and for all that DeepSpeed or llmkd
    would refuse when it starts, saves or resumes.
    """
    decided: DsConfig = {
        "train_batch_size": world_size * micro_batch * accumulation,
        "train_micro_batch_size_per_gpu": micro_batch,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": clip,
        "bf16.enabled": dtype == "bfloat16",
        "zero_optimization.offload_param.nvme_path": nvme_path,
        "zero_optimization.offload_optimizer.nvme_path": nvme_path,
    }
    completed, defaults = _without_auto(config, decided.keys())
    if defaults:
        log.info("DeepSpeed configuration: %s: auto, which here is DeepSpeed's default", ", ".join(defaults))
    faults = misshapen(completed)
    if not faults:
        faults = [fault for key, value in decided.items() if (fault := _decide(completed, key, value))]
        faults += unusable(completed)
        if zero_stage(completed) == 0 and dtype == "bfloat16":
            faults.append(
                "without ZeRO (stage 0) DeepSpeed keeps no fp32 gradients of a bfloat16 model; write stage 1, or train.dtype: float32"
            )
    if faults := faults or refused_by_deepspeed(completed):
        raise InputError(f"{name}: {'; '.join(faults)}")
    return completed


def _without_auto(config: DsConfig, decided: Iterable[str], prefix: str = "") -> tuple[DsConfig, list[str]]:
    """(a copy without each "auto" at a key that the recipe does not decide, those keys): DeepSpeed takes its defaults there."""
    kept: DsConfig = {}
    dropped: list[str] = []
    for key, value in config.items():
        if isinstance(value, dict):
            kept[key], inside = _without_auto(value, decided, f"{prefix}{key}.")
            dropped += inside
        elif value == AUTO and f"{prefix}{key}" not in decided:
            dropped.append(f"{prefix}{key}")
        else:
            kept[key] = value
    return kept, dropped


def _decide(config: DsConfig, key: str, value: Any) -> str | None:
    """Write the recipe's value at a dotted key where the file leaves it open. What is wrong, where the file has another value."""
    *parents, last = key.split(".")
    section = config
    if last == "nvme_path":  # a file may have any path, and one that does not offload needs none
        for parent in parents:
            section = section.get(parent, {})
        if section.get(last) in BY_RECIPE:
            section[last] = value
        return None
    for parent in parents:
        section = section.setdefault(parent, {})
    if section.get(last, AUTO) in BY_RECIPE:
        section[last] = value
    if section[last] != value:
        return f'{key} is {section[last]}, the recipe gives {value}; write "auto" there, or leave it out'
    return None


def zero_stage(config: DsConfig) -> int:
    """The ZeRO stage a DeepSpeed configuration asks for."""
    stage = config.get("zero_optimization", {}).get("stage", 0)
    return 0 if stage == AUTO else int(stage)


def teacher_ds_config(micro_batch: int, dtype: str, offload: str, *, block: int, nvme_path: str = "") -> DsConfig:
    """ZeRO-3 for a frozen teacher: parameters only, and never more of them gathered than two blocks, or its embeddings alone.

    `block`: weights of the largest block. DeepSpeed gathers a block before it runs (`engines.gather_whole`), lets it go after, and
    meanwhile fetches the next one, in one message. Beside embeddings that are smaller than two blocks it fetches a part of the first,
    and may exceed `stage3_max_live_parameters` by a parameter. Its defaults (1e9 live, 5e7 ahead) would hold a whole 1B teacher.
    """
    zero: DsConfig = {
        "stage": 3,
        "stage3_max_live_parameters": 2 * block,
        "stage3_max_reuse_distance": 0,
        "stage3_prefetch_bucket_size": block,
        "stage3_param_persistence_threshold": 0,
    }
    config: DsConfig = {
        "train_micro_batch_size_per_gpu": micro_batch,
        "gradient_accumulation_steps": 1,
        "bf16": {"enabled": dtype == "bfloat16"},
        "zero_optimization": zero,
        "steps_per_print": 10**9,
    }
    if offload != "none":
        zero["offload_param"] = {"device": offload, "pin_memory": torch.cuda.is_available()}
    if offload == "nvme":
        zero["offload_param"] |= {"nvme_path": nvme_path, "buffer_count": 5, "max_in_cpu": 0}
        config["aio"] = {"block_size": 2**20, "queue_depth": 8, "single_submit": False, "overlap_events": True}
    return config


def on_other_ranks(config: DsConfig) -> DsConfig:
    """The configuration of an engine that is to load what another number of ranks saved."""
    if zero_stage(config) == 0:
        return config  # nothing is sharded
    return {**config, "checkpoint": {**config.get("checkpoint", {}), "load_universal": True}}
