"""Blocks whose forward pass torch.compile makes a few kernels of.

What is compiled is what a block computes: hooks that compare its state, ZeRO-3's gathering and activation checkpointing stay around it.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn
from torch.fx.experimental import _config as shapes

from llmkd.errors import InputError


def compile_blocks(blocks: Iterable[nn.Module]) -> None:
    """Compile each block's forward pass, at its first call. The names of modules and weights stay as they are.

    Blocks that compute the same share their graphs, in which the sizes are symbols: other lengths compile nothing anew. Raises InputError
    for blocks of a model's own code, in which ZeRO-3 would gather weights map by map, and each map would end a graph.
    """
    # Or a first batch that is as long as a head is wide would be compiled for that length alone: PyTorch takes equal sizes for one.
    shapes.use_duck_shape = False
    for block in blocks:
        if not type(block).__module__.startswith("transformers."):
            raise InputError(
                f"train.compile: {type(block).__name__} is a model's own code, and only transformers' blocks are compiled; write none"
            )
        block.forward = torch.compile(block.forward, dynamic=True)  # of this block; its class is left alone
