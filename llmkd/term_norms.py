"""The gradient of each part of the loss where it enters the residual stream, so that its norm says how strongly it pulls.

Cross-entropy and divergence enter at the last block's output, before the final norm; a pair's distance enters at its student block's
output (the embeddings' for their pair). These gradients are computed in the forward pass anyway, so no backward pass through a block is
needed, and nothing is asked of the engine: it works under any ZeRO stage, and with activation checkpointing. What they become on their
way down to the parameters is not in them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from transformers import PreTrainedModel

from llmkd.engines import full_shape, gathered
from llmkd.matching import small_pass
from llmkd.models import backbone, blocks


class FinalNorm:
    """Finds a model's final norm, in a pass that asks for it, as the module that made the final state; a model may have none."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.watching = False
        self._seen: list[tuple[nn.Module, Tensor, Tensor]] = []
        inside = {id(module) for block in blocks(model) for module in block.modules()}
        for module in backbone(model).modules():
            if id(module) not in inside and not any(True for _ in module.children()):
                module.register_forward_hook(self._keep)

    def _keep(self, module: nn.Module, args: tuple[Any, ...], output: object) -> None:
        if self.watching and args and isinstance(args[0], Tensor) and isinstance(output, Tensor):
            self._seen.append((module, args[0].detach(), output.detach()))

    def watch(self, wanted: bool) -> None:
        """Forget the last pass; note the next one if it is wanted."""
        self.watching, self._seen = wanted, []

    def before(self, final: Tensor, gradient: Tensor) -> Tensor:
        """The gradient [B, T, H] with respect to what went into the final norm, from that with respect to the final state."""
        for module, state, output in self._seen:
            # by its memory: an engine's own hooks may have passed on another view of it
            if output.data_ptr() == final.data_ptr() and output.shape == final.shape:
                return _through(module.forward, list(module.parameters()), state, gradient)
        return gradient


def before_projector(
    projector: nn.Linear | None, state: Tensor, distance: Callable[[Tensor, Tensor], Tensor]
) -> Tensor:
    """The gradient of `distance(state, projected state)` with respect to the state [B, T, H_s], with the projector taken as it is."""
    leaf = state.detach().requires_grad_()
    weights = [] if projector is None else list(projector.parameters())
    with small_pass(), _whole(weights):
        # not by calling the projector: the engine's hooks count its calls
        projected = leaf if projector is None else linear(leaf, projector.weight, projector.bias)
        return torch.autograd.grad(distance(leaf, projected), leaf)[0]


def _whole(weights: list[nn.Parameter]) -> contextlib.AbstractContextManager[Any]:
    """Gathers those that are not whole already: an engine keeps small parameters whole, and would not have them taken apart here."""
    return gathered(weight for weight in weights if weight.numel() != full_shape(weight).numel())


def _through(run: Callable[[Tensor], Tensor], weights: list[nn.Parameter], state: Tensor, gradient: Tensor) -> Tensor:
    leaf = state.requires_grad_()
    with small_pass(), _whole(weights):
        return torch.autograd.grad(run(leaf), leaf, gradient)[0]
