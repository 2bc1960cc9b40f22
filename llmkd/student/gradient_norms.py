"""The gradient of each part of the loss where it enters the residual stream, so that its norm says how strongly it pulls.

Cross-entropy and divergence enter at the last block's output (an encoder-decoder's decoder's), from where the final state is made: before a
final norm, before an encoder's pooler. A pair's distance enters at its student block's output (the embeddings' for their pair). These
gradients are computed in the forward pass anyway, so no backward pass through a block is needed and the engine is not involved: this works
under any ZeRO stage, and with activation checkpointing. How the blocks change a gradient on its way to the parameters is not measured.
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
        self.model_name = type(model).__name__
        self.normed_last = normed_last
        tail = model_type(model.config).tail
        self.steps = None if tail is None else tail(model)
        model_stacks = stacks(model)
        self.norms = {stack.first + len(stack.blocks) - 1: stack.norm for stack in model_stacks}
        """By the number of each stack's last block."""
        self._last_blocks = [stack.blocks[-1] for stack in model_stacks]
        self._between: list[nn.Module] = []
        if self.steps is None:
            inside = {id(module) for block in blocks(model) for module in block.modules()}
            every = backbone(model).modules()
            self._between = [m for m in every if id(m) not in inside and not any(True for _ in m.children())]

    @contextlib.contextmanager
    def recorded(self, is_on: bool) -> Iterator[TailPass | None]:
        """Inside, hooks record the model's pass if `is_on`; otherwise and outside there are no hooks."""
        if not is_on:
            yield None
            return
        record = TailPass(self)
        handles = [
            module.register_forward_hook(functools.partial(record.keep_output, block))
            for block, module in zip(self.norms, self._last_blocks, strict=True)
        ]
        handles += [module.register_forward_hook(record.keep_call) for module in self._between]
        try:
            yield record
        finally:
            for handle in handles:
                handle.remove()


class TailPass:
    """One pass of a model, as much of it as its tail needs to be run again."""

    def __init__(self, tail: Tail) -> None:
        self._tail = tail
        self._last = max(tail.norms)
        self._outputs: dict[int, Tensor] = {}
        self._random: Tensor | None = None
        self._calls: list[tuple[nn.Module, Tensor, Tensor]] = []

    def keep_output(self, block: int, module: nn.Module, args: object, output: object) -> None:
        """Hook of the last block of a stack."""
        self._outputs[block] = state = output_state(output).detach()
        if block == self._last:
            self._random = _generator_state(state.device)

    def keep_call(self, module: nn.Module, args: tuple[Any, ...], output: object) -> None:
        """Hook of a decoder's module outside its blocks."""
        if args and isinstance(args[0], Tensor) and isinstance(output, Tensor):
            self._calls.append((module, args[0].detach(), output.detach()))

    def square_before(self, final: Tensor, gradient: Tensor | None) -> Tensor:
        """The squared norm [] of `before(final, gradient)`; 0 for None."""
        return torch.zeros((), device=final.device) if gradient is None else square(self.before(final, gradient))

    def before(self, final: Tensor, gradient: Tensor) -> Tensor:
        """The gradient [B, T, H] with respect to the last block's output, from that with respect to the final state."""
        steps = self._between(final) if self._tail.steps is None else self._tail.steps
        state = self._outputs[self._last]
        with _generator_at(self._random, state.device):  # the same numbers are dropped out
            return _through(steps, state, gradient)

    def before_norm(self, block: int, state: Tensor, gradient: Tensor) -> Tensor:
        """The gradient with respect to a block's output, from that with respect to its state as pairs compare it."""
        if not self._tail.normed_last or block not in self._tail.norms:
            return gradient
        if self._tail.steps is None:
            return self.before(state, gradient)
        norm = self._tail.norms[block]
        return gradient if norm is None else _through([norm], self._outputs[block], gradient)

    def _between(self, final: Tensor) -> list[Step]:
        """A decoder's modules between its last block and its final state, found by which output is whose input.

        Compared by memory, because an engine's own hooks may pass on another view of a tensor.
        """
        steps: list[Step] = []
        state = final
        for module, entering, output in reversed(self._calls):
            if _same_memory(output, state):
                steps.insert(0, module)
                state = entering
        if not _same_memory(state, self._outputs[self._last]):
            raise InputError(
                f"loss.report_norms_every: llmkd does not know what {self._tail.model_name} does between its last block and its head; "
                "write 0"
            )
        return steps


def before_projector(
    projector: nn.Linear | None, state: Tensor, distance: Callable[[Tensor, Tensor], Tensor]
) -> Tensor:
    """The gradient of `distance(state, projected state)` with respect to the state [B, T, H_s]; the projector gets none."""
    leaf = state.detach().requires_grad_()
    weights = [] if projector is None else list(projector.parameters())
    with small_pass(), _whole(weights):
        # not by calling the projector: the engine's hooks count its calls
        projected = leaf if projector is None else linear(leaf, projector.weight, projector.bias)
        return torch.autograd.grad(distance(leaf, projected), leaf)[0]


def _whole(weights: list[nn.Parameter]) -> contextlib.AbstractContextManager[Any]:
    """Gathers the sharded weights only: an engine keeps small parameters whole, and they must stay whole afterwards."""
    return gathered(weight for weight in weights if weight.numel() != full_shape(weight).numel())


def _through(steps: Sequence[Step], state: Tensor, gradient: Tensor) -> Tensor:
    """The gradient with respect to the state, from that with respect to the steps' output."""
    leaf = output = state.detach().requires_grad_()
    modules = [step for step in steps if isinstance(step, nn.Module)]
    with small_pass(), _whole([weight for module in modules for weight in module.parameters()]):
        for step in steps:
            output = step.forward(output) if isinstance(step, nn.Module) else step(output)
        return gradient if output is leaf else torch.autograd.grad(output, leaf, gradient)[0]


def _same_memory(first: Tensor, second: Tensor) -> bool:
    return first.data_ptr() == second.data_ptr() and first.shape == second.shape


def square(gradient: Tensor) -> Tensor:
    """The squared norm [] in float32 (float64 stays)."""
    return torch.linalg.vector_norm(gradient, dtype=torch.promote_types(gradient.dtype, torch.float32)).square()


def _generator_state(device: torch.device) -> Tensor:
    """The state of the generator from which a dropout on this device draws."""
    return torch.cuda.get_rng_state(device) if device.type == "cuda" else torch.get_rng_state()


@contextlib.contextmanager
def _generator_at(state: Tensor | None, device: torch.device) -> Iterator[None]:
    """Inside, random numbers come from this generator state on; afterwards the generator is as it was before."""
    assert state is not None, "no pass was recorded"
    on_gpu = device.type == "cuda"
    with torch.random.fork_rng([device] if on_gpu else []):
        torch.cuda.set_rng_state(state, device) if on_gpu else torch.set_rng_state(state)
        yield
