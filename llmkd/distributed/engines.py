"""DeepSpeed engines, models built in shards, and what is read from shards and written into them."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Collection, Iterable, Iterator
from typing import Any

import torch
import torch._dynamo  # noqa: F401  (zero.Init patches tensor constructors; dynamo must be imported before it does)
from torch import Tensor, nn
from transformers.integrations.deepspeed import HfDeepSpeedConfig

from llmkd.distributed.compiled import check_asynchronous_io, check_cpu_adam
from llmkd.distributed.ds_configs import DsConfig, zero_stage
from llmkd.distributed.ranks import World, sum_counts

# isort: split
import deepspeed  # after llmkd.distributed.ranks, which sets the accelerator
from deepspeed.utils import set_z3_leaf_module

# With an engine DeepSpeed imports its Muon optimizer, of which nothing here is run; but for torch's variable, all of torch's compiler would
# be imported for a function of it, which takes a sixth of the time of all imports.
_before = os.environ.get("TORCHDYNAMO_DISABLE")
os.environ["TORCHDYNAMO_DISABLE"] = "1"
import deepspeed.runtime.zero.muon.muon_optimizer  # noqa: E402

if _before is None:
    del os.environ["TORCHDYNAMO_DISABLE"]
else:
    os.environ["TORCHDYNAMO_DISABLE"] = _before

log = logging.getLogger("llmkd")
OFFLOADED = ("param", "optimizer")
RATE = "rate_factor"
"""The key of a group of parameters that says what its learning rate is, of that of the run."""
GATHERED = 2**26
"""Weights of a sharded module that are whole at a time while all of them are read."""


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
    blocks: Iterable[nn.Module] = (),
    learning_rate: float,
    betas: tuple[float, float],
    epsilon: float,
    weight_decay: float,
    apart: Collection[nn.Parameter] = (),
    apart_rate: float = 0.0,
) -> Any:
    """A DeepSpeed engine that trains `module` with AdamW; vectors (norms, biases) do not decay. `blocks`: see `gather_whole`.

    `apart`: parameters that do not decay and whose learning rate is `apart_rate` where that of the others is `learning_rate`. Each group
    of the optimizer has under RATE what `learning_rate` is multiplied by.
    """
    own = {id(p) for p in apart}
    trained = [p for p in module.parameters() if p.requires_grad and id(p) not in own]
    groups: list[dict[str, Any]] = [
        {
            "params": [p for p in trained if full_shape(p).numel() and len(full_shape(p)) > 1],
            "weight_decay": weight_decay,
            RATE: 1.0,
        },
        {"params": [p for p in trained if len(full_shape(p)) <= 1], "weight_decay": 0.0, RATE: 1.0},
    ]
    if apart:  # without them a rate of 0, as benchmarks take, is no divisor
        groups.append({"params": [*apart], "weight_decay": 0.0, RATE: apart_rate / learning_rate})
    groups = [group for group in groups if group["params"]]
    options = {"lr": learning_rate, "betas": betas, "eps": epsilon}
    if config.get("zero_optimization", {}).get("offload_optimizer", {}).get("device", "none") != "none":
        check_cpu_adam()
        optimizer: torch.optim.Optimizer = deepspeed.ops.adam.DeepSpeedCPUAdam(groups, **options)
    else:
        optimizer = torch.optim.AdamW(groups, fused=True, **options)
    if "nvme" in (config.get("zero_optimization", {}).get(f"offload_{part}", {}).get("device") for part in OFFLOADED):
        check_asynchronous_io("train.deepspeed")
    gather_whole(blocks, config)
    engine, *_ = deepspeed.initialize(model=module, optimizer=optimizer, config=config)
    return engine


def gather_whole(blocks: Iterable[nn.Module], config: DsConfig) -> None:
    """Have a ZeRO-3 engine of `config`, which is still to be made, gather each of these blocks at once, not linear map by linear map.

    They become DeepSpeed's leaf modules: a block's gradients, too, are shared out together, when its backward pass is done. For that,
    a gradient must come to its output, and its input must be a positional argument. Blocks of other packages than transformers may
    not be called so, and weights that rest on NVMe come through a few buffers, one parameter each: these are gathered as before.
    """
    offloaded = config.get("zero_optimization", {}).get("offload_param") or {}
    if zero_stage(config) != 3 or offloaded.get("device") == "nvme":
        return
    others: set[str] = set()
    for block in blocks:
        if type(block).__module__.startswith("transformers."):
            set_z3_leaf_module(block, True)
        else:
            others.add(type(block).__name__)
    if others:
        log.info("blocks of a model's own code are gathered map by map, not whole: %s", ", ".join(sorted(others)))


def backward(engine: Any, loss: Tensor) -> None:
    """The backward pass of a loss that is divided already by all that it is to be divided by."""
    # The engine divides what comes back into its own output by the accumulation steps, unless a hook on the loss has told it before that
    # this is done. At stage 0 both hooks would be on one tensor, the engine's first.
    engine.backward(loss * 1, scale_wrt_gas=False)


def frozen_engine(module: nn.Module, config: DsConfig, blocks: Iterable[nn.Module] = ()) -> Any:
    """A DeepSpeed engine that only runs `module` forward: shards, no optimizer, no gradients. `blocks`: see `gather_whole`."""
    gather_whole(blocks, config)
    engine, *_ = deepspeed.initialize(model=module.requires_grad_(False), config=config)
    engine.eval()
    return engine


def last_line(text: str) -> str:
    return (text.strip().splitlines() or ["no reason given"])[-1]


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
        own = own_values(parameter, world.rank)
        with contextlib.nullcontext() if own is not None else gathered([parameter]):
            flags.append(int(not (parameter if own is None else own).isfinite().all()))
        names.append(name)
    return [name for name, count in zip(names, sum_counts(world, flags), strict=True) if count]


def own_values(parameter: nn.Parameter, rank: int) -> Tensor | None:
    """A parameter's values on this rank, all of one that is not partitioned; None where its shard is not in memory.

    Shards are of one size: what lies behind the parameter's last value is memory that nobody has written.
    """
    shard = getattr(parameter, "ds_tensor", None)
    if shard is None:
        return parameter
    if not shard.numel():
        return None
    return shard[: max(full_shape(parameter).numel() - rank * shard.numel(), 0)]


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


def whole_tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Each parameter's name and present values on this rank's device (all ranks take part).

    They are the parameter's own memory, good until the next is asked for: sharded ones are gathered some at a time.
    """
    group: list[tuple[str, nn.Parameter]] = []
    size = 0
    for name, parameter in module.named_parameters():
        if group and size + full_shape(parameter).numel() > GATHERED:
            yield from _whole(group)
            group, size = [], 0
        group.append((name, parameter))
        size += full_shape(parameter).numel()
    yield from _whole(group)


def _whole(group: list[tuple[str, nn.Parameter]]) -> Iterator[tuple[str, Tensor]]:
    with gathered(parameter for _, parameter in group):
        yield from ((name, parameter.detach()) for name, parameter in group)


def whole_state(module: nn.Module, *, here: bool) -> dict[str, Tensor]:
    """The module's weights in host memory, gathered some at a time (all ranks take part), where they are wanted `here`; else nothing."""
    state: dict[str, Tensor] = {}
    for name, values in whole_tensors(module):
        if here:
            state[name] = values.to("cpu", copy=True)
    if here:
        persistent = module.state_dict().keys()
        state.update(
            {name: value.detach().to("cpu", copy=True) for name, value in module.named_buffers() if name in persistent}
        )
    return state


def lent_tensors(module: nn.Module) -> dict[str, Tensor]:
    """A module's parameters whole on this rank's device, to read from until the next step (all ranks take part).

    They are its own memory where it is whole there, copies where it is sharded.
    """
    sharded = {name for name, parameter in module.named_parameters() if hasattr(parameter, "ds_id")}
    return {name: values.clone() if name in sharded else values for name, values in whole_tensors(module)}
