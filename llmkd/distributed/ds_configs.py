"""DeepSpeed configurations: files read, the recipe's numbers written into them, and those that we write ourselves."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from llmkd.errors import InputError

log = logging.getLogger("llmkd")

DsConfig = dict[str, Any]
"""A DeepSpeed configuration: nested JSON whose keys are DeepSpeed's."""
BY_RECIPE = ("recipe", "auto")
"""The values of a DeepSpeed JSON in whose place the recipe's number is written; "auto" is what other projects call it."""
AUTO = "auto"


def load_ds_config(name: str, folder: Path) -> DsConfig:
    """A DeepSpeed configuration by its name in `folder` (ds_configs/) or by a path of the user's own."""
    file = Path(name) if name.endswith(".json") else folder / f"{name}.json"
    if not file.is_file():
        known = ", ".join(sorted(p.stem for p in folder.glob("*.json")))
        raise InputError(
            f"train.deepspeed: no DeepSpeed configuration {name!r}; write one of {known}, or the path of a .json file"
        )
    try:
        config = json.loads(file.read_text())
    except json.JSONDecodeError as error:
        raise InputError(f"{file}: not valid JSON at line {error.lineno}: {error.msg}") from error
    if not isinstance(config, dict):
        raise InputError(f"{file}: a DeepSpeed configuration is a JSON object")
    return config


def complete_ds_config(
    config: DsConfig,
    *,
    world_size: int,
    micro_batch: int,
    accumulation: int,
    clip: float,
    dtype: str,
    nvme_path: str,
) -> DsConfig:
    """Write the recipe's numbers into a DeepSpeed configuration. Raises InputError where a number of the user's own disagrees."""
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
    faults = [fault for key, value in decided.items() if (fault := _decide(completed, key, value))]
    if zero_stage(completed) == 0 and dtype == "bfloat16":
        faults.append(
            "without ZeRO (stage 0) DeepSpeed keeps no fp32 gradients of a bfloat16 model; write stage 1, or train.dtype: float32"
        )
    for section in ("optimizer", "scheduler", "fp16", "amp"):
        on = section in ("optimizer", "scheduler")  # the others are on only if they say so
        if section in completed and completed[section].get("enabled", on):
            faults.append(f"{section!r} is set by the recipe (train.*); remove it")
    if faults:
        raise InputError(f"DeepSpeed configuration: {'; '.join(faults)}")
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


def teacher_ds_config(
    micro_batch: int, dtype: str, offload: str, *, block: int, parameter: int, nvme_path: str = ""
) -> DsConfig:
    """ZeRO-3 for a frozen teacher: parameters only, and never more of them gathered than one block, or its embeddings alone.

    `block` and `parameter`: weights of the largest block and of the largest parameter in one. DeepSpeed gathers a module's parameters
    before it runs, lets them go after, and meanwhile fetches ahead until as many are there as `stage3_max_live_parameters` says,
    which the last one fetched may exceed; so the limit is a block less its largest parameter. Its defaults (1e9 live, 5e7 ahead)
    would hold a whole 1B teacher on every rank.
    """
    ahead = max(block - parameter, 1)
    zero: DsConfig = {
        "stage": 3,
        "stage3_max_live_parameters": ahead,
        "stage3_max_reuse_distance": 0,
        "stage3_prefetch_bucket_size": ahead,
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
