"""Low-rank adapters (LoRA) on the linear maps of a model's blocks, by `peft`, and the plain model that they amount to.

They are put into the model in place: it keeps its class, so that blocks, head and hooks are found as in any other.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from llmkd.distributed.engines import full_shape
from llmkd.errors import InputError
from llmkd.models.four_bit import four_bit
from llmkd.models.parts import blocks, stacks

NAME = "default"
"""peft's name of a model's only adapter."""
Targets = Literal["all_linear"] | Sequence[str]


def adapt(
    model: PreTrainedModel,
    *,
    rank: int,
    alpha: float,
    dropout: float,
    targets: Targets,
    rslora: bool,
    dora: bool,
    seed: int,
) -> None:
    """Freeze a model and give the linear maps of its blocks adapters: x W' + scale * x A' B', A drawn from the seed, B zero.

    The scale is alpha / rank, with `rslora` alpha / sqrt(rank) (arXiv 2312.03732); `dora` trains each output's norm apart (arXiv
    2402.09353). Under ZeRO-3 `llmkd.distributed.engines.sharded_construction` must be around the call. Raises InputError as `targeted`.
    """
    from peft import LoraConfig, inject_adapter_in_model  # heavy; only such students take it

    names = targeted(model, targets)
    config = LoraConfig(
        r=rank,
        lora_alpha=alpha,  # pyright: ignore[reportArgumentType]  (it is only divided)
        lora_dropout=dropout,
        target_modules=list(names),
        use_rslora=rslora,
        use_dora=dora,
        fan_in_fan_out=any(isinstance(module, Conv1D) for module in names.values()),
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        inject_adapter_in_model(config, model, NAME)
    assert set(adapted(model)) == set(names), "peft adapted other maps than it was asked to"
    for stack in stacks(model):
        stack.blocks[0].register_forward_pre_hook(_with_gradient, with_kwargs=True)


def targeted(model: PreTrainedModel, targets: Targets, key: str = "student.lora") -> Mapping[str, nn.Module]:
    """The linear maps that get adapters, by name: all of the model's blocks, or those with one of these last names. `key`: the recipe's.

    Raises InputError for a name that no block has, and for `all_linear` where blocks hold other matrices (as experts).
    """
    names = {id(module): name for name, module in model.named_modules()}
    inside = [module for block in blocks(model) for module in block.modules()]
    maps = {names[id(module)]: module for module in inside if isinstance(module, nn.Linear | Conv1D)}
    if targets == "all_linear":
        found = {id(parameter) for module in maps.values() for parameter in module.parameters()}
        for module in inside:
            for name, parameter in module.named_parameters(recurse=False):
                if len(full_shape(parameter)) > 1 and id(parameter) not in found:
                    raise InputError(
                        f"{key}.targets: all_linear would leave out {names[id(module)]}.{name}, a matrix that is no linear map; "
                        "write the names of the maps that adapters are for, e.g. [q_proj, v_proj]"
                    )
        return maps
    known = {name.rsplit(".", 1)[-1] for name in maps}
    for name in targets:
        if name not in known:
            raise InputError(
                f"{key}.targets: no linear map of a block is called {name!r}; choose from {', '.join(sorted(known))}, or write "
                "all_linear"
            )
    return {name: module for name, module in maps.items() if name.rsplit(".", 1)[-1] in targets}


def adapter_sizes(module: nn.Module, rank: int, *, dora: bool) -> list[int]:
    """How many numbers each adapter tensor of a linear map has: A, B, and DoRA's norms."""
    first, second = full_shape(module.weight)  # type: ignore[arg-type]
    outputs = second if isinstance(module, Conv1D) else first
    return [rank * (first + second - outputs), rank * outputs, *([outputs] if dora else [])]


def _with_gradient(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], Any]:
    """Pre-hook of a first block: a gradient is asked of its input.

    Of a module whose inputs ask for none, torch calls the backward hook before its parameters have their gradients, and ZeRO-3 would
    share out zeros for the block's adapters.
    """
    if torch.is_grad_enabled():
        if args and not args[0].requires_grad:
            args = (args[0].detach().requires_grad_(), *args[1:])
        elif not args and not kwargs["hidden_states"].requires_grad:
            kwargs = {**kwargs, "hidden_states": kwargs["hidden_states"].detach().requires_grad_()}
    return args, kwargs


def adapted(model: nn.Module) -> dict[str, Any]:
    """The maps that have adapters, by name: peft's layers. None in a model that `adapt` was not called with."""
    return {name: module for name, module in model.named_modules() if hasattr(module, "lora_A")}


@torch.no_grad()
def merged(model: nn.Module, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A model's state with the adapters added to the weights, under the names of a model without them; products in float32.

    `state`: by the model's own names; it is changed. That of a model without adapters stays as it is. Weights that are kept in 4 bits are
    the plain ones that the model computes with.
    """
    for name, layer in four_bit(model).items() if state else ():
        state[f"{name}.weight"] = layer.weight.to(next(iter(state.values())).device)
    for name, layer in adapted(model).items() if state else ():
        weight = state.pop(f"{name}.base_layer.weight")
        down, up = (state.pop(f"{name}.lora_{part}.{NAME}.weight") for part in "AB")
        magnitude = state.pop(f"{name}.lora_magnitude_vector.{NAME}.weight", None)
        state[f"{name}.weight"] = _sum(layer, weight, down, up, magnitude)
        if (bias := state.pop(f"{name}.base_layer.bias", None)) is not None:
            state[f"{name}.bias"] = bias
    return state


@torch.no_grad()
def merge(model: nn.Module) -> None:
    """Add a model's adapters to its weights in place, one map after another; it is the plain model then."""
    for name, layer in adapted(model).items():
        base = layer.base_layer
        magnitude = layer.lora_magnitude_vector[NAME].weight if NAME in layer.lora_magnitude_vector else None
        base.weight.data = _sum(layer, base.weight, layer.lora_A[NAME].weight, layer.lora_B[NAME].weight, magnitude)
        model.set_submodule(name, base)


def _sum(layer: Any, weight: Tensor, down: Tensor, up: Tensor, magnitude: Tensor | None) -> Tensor:
    """A map's weight with its adapter added, in float32, in the weight's dtype."""
    wide = torch.promote_types(weight.dtype, torch.float32)
    update = layer.scaling[NAME] * (up.to(wide) @ down.to(wide))
    whole = weight.to(wide) + (update.T if layer.fan_in_fan_out else update)
    if magnitude is not None:
        inputs = 0 if layer.fan_in_fan_out else 1
        scale = magnitude.to(wide) / torch.linalg.vector_norm(whole, dim=inputs)
        whole = whole * scale.unsqueeze(inputs)
    return whole.to(weight.dtype)
