"""A loaded model on the devices of its process: whole on one, or its blocks spread over several.

Several devices hold a model that one can't; they work on its blocks one after another, and are no faster than one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from llmkd.models.parts import blocks


def all_devices() -> list[torch.device]:
    """The GPUs that this process sees; the CPU where there is none."""
    return [torch.device("cuda", number) for number in range(torch.cuda.device_count())] or [torch.device("cpu")]


def placed(model: Any, devices: Sequence[torch.device]) -> Any:
    """The model ready to run, over all of these devices. Whoever runs it or reads its states sees the first one alone.

    On the first one is all but the blocks. A block's inputs are moved to its own device and its outputs back, so that neither the code
    between two blocks nor a hook on one meets another device. Each device has its share of the weights.
    """
    first = devices[0]
    if len(devices) == 1:
        return model.to(first).eval()
    listed = list(blocks(model))
    inside = {id(module) for block in listed for module in block.modules()}
    for module in model.modules():
        if id(module) not in inside:
            module._apply(lambda tensor: tensor.to(first), recurse=False)
    for block, number in zip(listed, shares(model, listed, len(devices)), strict=True):
        _run_on(block, devices[number], first)
    return model.eval()


def shares(model: nn.Module, listed: Sequence[nn.Module], count: int) -> list[int]:
    """Which of so many devices each block is on, in the order of the blocks, where the first device holds all else too."""
    sizes = [sum(weight.nbytes for weight in block.parameters()) for block in listed]
    total = sum(weight.nbytes for weight in model.parameters())
    before, numbers = total - sum(sizes), []
    for size in sizes:
        numbers.append(min(count - 1, int((before + size / 2) * count / total)))
        before += size
    return numbers


def _run_on(block: nn.Module, device: torch.device, first: torch.device) -> None:
    block.to(device)
    block.register_forward_pre_hook(
        lambda _, args, options: (_moved(args, device), _moved(options, device)), with_kwargs=True
    )
    block.register_forward_hook(lambda _, args, output: _moved(output, first))


def _moved(value: Any, device: torch.device) -> Any:
    """A value with its tensors on the device; a cache of keys and values stays as it is, each block's beside that block."""
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, tuple | list):
        return type(value)(_moved(part, device) for part in value)
    return {key: _moved(part, device) for key, part in value.items()} if type(value) is dict else value
