"""The gradient of each part of the loss where it enters the residual stream, so that its norm says how strongly it pulls.

Cross-entropy and divergence enter at the last block's output (an encoder-decoder's decoder's), from where the final state is made: before a
final norm, before an encoder's pooler. A pair's distance enters at its student block's output (the embeddings' for their pair). These
gradients are computed in the forward pass anyway, so no backward pass through a block is needed, and nothing is asked of the engine: it
works under any ZeRO stage, and with activation checkpointing. What they become on their way down to the parameters is not in them.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from transformers import PreTrainedModel

from llmkd.distributed.engines import full_shape, gathered
from llmkd.errors import InputError
from llmkd.losses.distance_sum import small_pass
from llmkd.models.families import model_type
from llmkd.models.model_types import Step
from llmkd.models.parts import backbone, blocks, output_state, stacks


class Tail:
    """What a model does between its last block and its final state, run once more for gradients that come down through it.

    `normed_last`: the pairs of the last blocks compare the states after their stacks' final norms.
    """

    def __init__(self, model: PreTrainedModel, *, normed_last: bool) -> None:
        self.watching = False
        self._name = type(model).__name__
        tail = model_type(model.config).tail
        self._steps = None if tail is None else tail(model)
        found = stacks(model)
        self._ends = {stack.first + len(stack.blocks) - 1: stack.norm for stack in found}
        self._last = max(self._ends)
        self._normed_last = normed_last
        self._outputs: dict[int, Tensor] = {}
        self._random: Tensor | None = None
        self._seen: list[tuple[nn.Module, Tensor, Tensor]] = []
        for stack, block in zip(found, self._ends, strict=True):
            stack.blocks[-1].register_forward_hook(functools.partial(self._end, block))
        if self._steps is None:
            inside = {id(module) for block in blocks(model) for module in block.modules()}
            for module in backbone(model).modules():
                if id(module) not in inside and not any(True for _ in module.children()):
                    module.register_forward_hook(self._keep)

    def _end(self, block: int, module: nn.Module, args: object, output: object) -> None:
        if self.watching:
            self._outputs[block] = state = output_state(output).detach()
            if block == self._last:
                self._random = _generator_state(state.device)

    def _keep(self, module: nn.Module, args: tuple[Any, ...], output: object) -> None:
        if self.watching and args and isinstance(args[0], Tensor) and isinstance(output, Tensor):
            self._seen.append((module, args[0].detach(), output.detach()))

    def watch(self, wanted: bool) -> None:
        """Forget the last pass; note the next one if it is wanted."""
        self.watching, self._seen, self._outputs, self._random = wanted, [], {}, None

    def before(self, final: Tensor, gradient: Tensor) -> Tensor:
        """The gradient [B, T, H] with respect to the last block's output, from that with respect to the final state."""
        steps = self._between(final) if self._steps is None else self._steps
        state = self._outputs[self._last]
        with _as_it_was(self._random, state.device):  # the same numbers are dropped out
            return _through(steps, state, gradient)

    def before_norm(self, block: int, state: Tensor, gradient: Tensor) -> Tensor:
        """The gradient with respect to a block's output, from that with respect to its state as pairs compare it."""
        if not self._normed_last or block not in self._ends:
            return gradient
        if self._steps is None:
            return self.before(state, gradient)
        norm = self._ends[block]
        return gradient if norm is None else _through([norm], self._outputs[block], gradient)

    def _between(self, final: Tensor) -> list[Step]:
        """A decoder's modules between its last block and its final state, by the memory of what each was given and has made: an engine's
        own hooks may have passed on another view of it."""
        steps: list[Step] = []
        state = final
        for module, given, made in reversed(self._seen):
            if _same(made, state):
                steps.insert(0, module)
                state = given
        if not _same(state, self._outputs[self._last]):
            raise InputError(
                f"loss.report_norms_every: what {self._name} does between its last block and its head is not known here; write 0"
            )
        return steps


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


def _through(steps: Sequence[Step], state: Tensor, gradient: Tensor) -> Tensor:
    """The gradient with respect to the state, from that with respect to what the steps make of it."""
    leaf = made = state.detach().requires_grad_()
    modules = [step for step in steps if isinstance(step, nn.Module)]
    with small_pass(), _whole([weight for module in modules for weight in module.parameters()]):
        for step in steps:
            made = step.forward(made) if isinstance(step, nn.Module) else step(made)
        return gradient if made is leaf else torch.autograd.grad(made, leaf, gradient)[0]


def _same(one: Tensor, other: Tensor) -> bool:
    return one.data_ptr() == other.data_ptr() and one.shape == other.shape


def _generator_state(device: torch.device) -> Tensor:
    """Of the random numbers that a dropout on this device draws."""
    return torch.cuda.get_rng_state(device) if device.type == "cuda" else torch.get_rng_state()


@contextlib.contextmanager
def _as_it_was(state: Tensor | None, device: torch.device) -> Iterator[None]:
    """Random numbers are drawn from this generator state on, and afterwards as if none had been."""
    assert state is not None, "no pass was watched"
    on_gpu = device.type == "cuda"
    with torch.random.fork_rng([device] if on_gpu else []):
        torch.cuda.set_rng_state(state, device) if on_gpu else torch.set_rng_state(state)
        yield
