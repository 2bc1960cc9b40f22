"""DeepSpeed engines: their configurations, models built in shards, and the reading and writing of shards."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import pickle
import shutil
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch._dynamo  # noqa: F401  (zero.Init patches tensor constructors; dynamo must be imported before it does)
from torch import Tensor, nn
from transformers.integrations.deepspeed import HfDeepSpeedConfig

from llmkd.distributed.ranks import World, sum_counts
from llmkd.errors import InputError

# isort: split
import deepspeed  # after llmkd.distributed.ranks, which sets the accelerator
from deepspeed.runtime.fp16.loss_scaler import LossScaler
from deepspeed.runtime.zero.config import ZeroStageEnum
from deepspeed.utils.tensor_fragment import fragment_address
from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

# DeepSpeed reads checkpoints by torch.load(weights_only=False), which runs whatever code a file from elsewhere holds. torch's own switch
# overrides that everywhere in this process and its children: tensors, numbers, texts and these three classes are all that is made.
os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"] = "1"
torch.serialization.add_safe_globals([LossScaler, ZeroStageEnum, fragment_address])

log = logging.getLogger("llmkd")

OFFLOADED = ("param", "optimizer")
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


def check_asynchronous_io(key: str) -> None:
    """Build (once per machine) or load DeepSpeed's NVMe reader. Raises InputError where that is not possible."""
    try:
        deepspeed.ops.op_builder.AsyncIOBuilder().load(verbose=False)
    except Exception as error:  # a missing compiler, header or library, each with an error of its own
        raise InputError(
            f"{key}: nvme needs DeepSpeed's asynchronous I/O, which is compiled on first use and could not be ({_last_line(str(error))}); "
            "install libaio and a C++ compiler (Debian: apt-get install libaio-dev g++ ninja-build), or write cpu"
        ) from error


@contextlib.contextmanager
def sharded_construction(config: DsConfig | None) -> Iterator[None]:
    """Inside, transformers builds and loads a model straight into ZeRO-3 shards, if `config` asks for stage 3."""
    if config is None or zero_stage(config) != 3:
        yield
        return
    keep = HfDeepSpeedConfig(config)  # transformers holds a weak reference to it
    try:
        yield
    finally:
        del keep


def engine(
    module: nn.Module,
    config: DsConfig,
    *,
    learning_rate: float,
    betas: tuple[float, float],
    epsilon: float,
    weight_decay: float,
) -> Any:
    """A DeepSpeed engine that trains `module` with AdamW; vectors (norms, biases) do not decay."""
    trained = [p for p in module.parameters() if p.requires_grad]
    groups = [
        {
            "params": [p for p in trained if full_shape(p).numel() and len(full_shape(p)) > 1],
            "weight_decay": weight_decay,
        },
        {"params": [p for p in trained if len(full_shape(p)) <= 1], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    options = {"lr": learning_rate, "betas": betas, "eps": epsilon}
    if config.get("zero_optimization", {}).get("offload_optimizer", {}).get("device", "none") != "none":
        if shutil.which(os.environ.get("CXX", "c++")) is None:
            raise InputError(
                "DeepSpeed configuration: an offloaded optimizer is compiled on first use, and there is no C++ compiler; install one "
                "(Debian: apt-get install g++), or use a configuration without offload_optimizer"
            )
        optimizer: torch.optim.Optimizer = deepspeed.ops.adam.DeepSpeedCPUAdam(groups, **options)
    else:
        optimizer = torch.optim.AdamW(groups, fused=True, **options)
    if "nvme" in (config.get("zero_optimization", {}).get(f"offload_{part}", {}).get("device") for part in OFFLOADED):
        check_asynchronous_io("train.deepspeed")
    engine, *_ = deepspeed.initialize(model=module, optimizer=optimizer, config=config)
    return engine


def frozen_engine(module: nn.Module, config: DsConfig) -> Any:
    """A DeepSpeed engine that only runs `module` forward: shards, no optimizer, no gradients."""
    engine, *_ = deepspeed.initialize(model=module.requires_grad_(False), config=config)
    engine.eval()
    return engine


def on_other_ranks(config: DsConfig) -> DsConfig:
    """The configuration of an engine that is to load what another number of ranks saved."""
    if zero_stage(config) == 0:
        return config  # nothing is sharded
    return {**config, "checkpoint": {**config.get("checkpoint", {}), "load_universal": True}}


def merge_shards(shards: Path, whole: Path) -> None:
    """Write a checkpoint's shards as whole tensors, which any number of ranks can load, into a folder of a new folder (rank 0 alone).

    DeepSpeed's own converter, in a process of its own. Without ZeRO there are no shards to merge.
    """
    shutil.rmtree(whole.parent, ignore_errors=True)
    whole.parent.mkdir()
    if not list(shards.glob("*_optim_states.pt")):
        shutil.copytree(shards, whole)
        return
    folders = ["--input_folder", str(shards), "--output_folder", str(whole)]
    workers = ["--num_extract_workers", "1", "--num_merge_workers", "1"]  # more would hold more of it in memory
    program = f"import runpy, {__name__}; runpy.run_module('deepspeed.checkpoint.ds_to_universal', run_name='__main__')"
    process = subprocess.run(
        [sys.executable, "-c", program, *folders, *workers, "--inject_missing_state"], capture_output=True, text=True
    )
    if process.returncode:
        shutil.rmtree(whole.parent, ignore_errors=True)
        raise InputError(
            f"{shards}: DeepSpeed could not merge its shards for another number of ranks ({_last_line(process.stderr)}); "
            "resume with the number of ranks that wrote it"
        )


def saved_weights(shards: Path, prefix: str) -> dict[str, Tensor]:
    """The parameters of a checkpoint whose names start with the prefix, which is cut off; float32, on the CPU (any one process).

    The checkpoint's shards are read whole into memory, optimizer states included.
    """
    with _plain_values(shards):
        if list(shards.glob("*_optim_states.pt")):
            state: Any = get_fp32_state_dict_from_zero_checkpoint(str(shards.parent), tag=shards.name, lazy_mode=True)
        else:  # without ZeRO each rank's file holds whole tensors
            state = torch.load(shards / "mp_rank_00_model_states.pt", map_location="cpu", weights_only=True)["module"]
    kept = {name: tensor for name, tensor in state.items() if name.startswith(prefix)}
    return {name.removeprefix(prefix): tensor.contiguous().float().clone() for name, tensor in kept.items()}


@contextlib.contextmanager
def _plain_values(folder: Path) -> Iterator[None]:
    """Inside, a file of the folder that holds more than tensors, numbers and texts is an InputError."""
    try:
        yield
    except pickle.UnpicklingError as error:
        raise InputError(
            f"{folder}: its files hold Python objects that could run code, so llmkd did not write them and does not open them; use a "
            "checkpoint of your own run"
        ) from error


def _last_line(text: str) -> str:
    return (text.strip().splitlines() or ["no reason given"])[-1]


def load_shards(engine: Any, folder: Path) -> None:
    """Load what `save_checkpoint` or `merge_shards` wrote (all ranks take part)."""
    decays = [group["weight_decay"] for group in engine.optimizer.param_groups]
    with _plain_values(folder):
        loaded, _ = engine.load_checkpoint(str(folder.parent), tag=folder.name)
    if loaded is None:
        raise InputError(f"{folder}: DeepSpeed could not load it; remove {folder.parent} to resume from the one before")
    # From whole tensors DeepSpeed gives every group the first one's settings, so that norms would decay, and one tensor as the
    # count of steps, which each group would then count up.
    for group, decay in zip(engine.optimizer.param_groups, decays, strict=True):
        group["weight_decay"] = decay
    for state in engine.optimizer.state.values():
        if isinstance(state.get("step"), Tensor):
            state["step"] = state["step"].clone()


def full_shape(parameter: nn.Parameter) -> torch.Size:
    """The shape of a parameter, partitioned or not."""
    return getattr(parameter, "ds_shape", parameter.shape)


def parameter_count(module: nn.Module) -> int:
    """The number of weights of a module, partitioned or not."""
    return sum(full_shape(p).numel() for p in module.parameters())


def gathered(parameters: Iterable[Tensor | None]) -> contextlib.AbstractContextManager[Any]:
    """Inside, these parameters are whole on every rank (all ranks take part)."""
    sharded = [p for p in parameters if p is not None and hasattr(p, "ds_id")]
    return deepspeed.zero.GatheredParameters(sharded) if sharded else contextlib.nullcontext()


@torch.no_grad()
def unusable_weights(world: World, module: nn.Module) -> list[str]:
    """The parameters that hold a NaN or an infinity; each rank reads its shards (all ranks take part).

    What rests on NVMe is gathered for it.
    """
    names, flags = [], []
    for name, parameter in module.named_parameters():
        shard = getattr(parameter, "ds_tensor", parameter)
        with contextlib.nullcontext() if shard.numel() else gathered([parameter]):
            values = shard if shard.numel() else parameter
            flags.append(int(not values.isfinite().all()))
        names.append(name)
    return [name for name, count in zip(names, sum_counts(world, flags), strict=True) if count]


@torch.no_grad()
def overwrite(world: World, parameter: nn.Parameter, value: Tensor) -> None:
    """Give a parameter of an engine another value, the same on every rank, in its shards and in the optimizer's fp32 copy of them."""
    value = value.to(device=world.device, dtype=torch.float32)
    if not hasattr(parameter, "ds_id"):
        parameter.copy_(value)
        deepspeed.utils.safe_set_full_fp32_param(parameter, value)
        return
    with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0):
        parameter.copy_(value)
    # DeepSpeed's own setter fails where the ranks do not divide the parameter's size. Shards are of one size, the last one padded.
    size = parameter.ds_tensor.numel()  # type: ignore[attr-defined]
    filled = torch.nn.functional.pad(value.flatten(), (0, size * world.size - value.numel()))
    deepspeed.utils.safe_set_local_fp32_param(parameter, filled[world.rank * size : (world.rank + 1) * size])


def whole_state(world: World, module: nn.Module) -> dict[str, Tensor]:
    """The module's weights on rank 0's CPU, gathered one at a time (all ranks take part); empty on the others."""
    state: dict[str, Tensor] = {}
    for name, parameter in module.named_parameters():
        with gathered([parameter]):
            if world.is_main:
                state[name] = parameter.detach().to("cpu", copy=True)
    if world.is_main:
        persistent = module.state_dict().keys()
        state.update(
            {name: value.detach().to("cpu", copy=True) for name, value in module.named_buffers() if name in persistent}
        )
    return state
