"""A frozen teacher's upper blocks and final norm, run on any state, with a gradient to that state and to no weight.

What is run are shells: backbones of the teacher's own class without embeddings, so that masks, rotary positions, packed documents and
each block's kind of attention are made by the same code as in the whole model. A shell's blocks hold no weights. Each borrows those
of the teacher's block while it runs, whole on every rank, and again while its gradient is computed; a sharded teacher so never has
more than one block gathered, and neither its hooks nor DeepSpeed's see these passes.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from transformers import PreTrainedConfig, PreTrainedModel

from llmkd.data import Batch
from llmkd.engines import gathered
from llmkd.errors import InputError
from llmkd.models import backbone, blocks, student_config
from llmkd.teachers.base import output_state
from llmkd.teachers.stage import PIPELINED


def check_upper(config: PreTrainedConfig) -> None:
    """Raise InputError for a teacher whose upper blocks have not been shown to be the whole model's."""
    if config.model_type not in PIPELINED:
        raise InputError(
            f"stones: a {config.model_type!r} teacher has not been shown to work from one of its blocks on; leave out stones, or give "
            f"a teacher of another type ({', '.join(PIPELINED)})"
        )


class UpperBlocks:
    """The teacher from after one of its blocks to its final state; `starts` names the blocks that can be asked for.

    `again`: keep a block's input alone for the backward pass and run the block again there; else all that the blocks make is kept,
    which a sharded teacher's weights do not outlive.
    """

    def __init__(self, model: PreTrainedModel, starts: Iterable[int], *, again: bool) -> None:
        body: Any = backbone(model)
        self._stack = blocks(model)
        self._norm = Borrowing(_empty(model, range(1)).norm, body.norm, again)
        self._shells = {start: self._shell(model, start, again) for start in set(starts)}

    def _shell(self, model: PreTrainedModel, start: int, again: bool) -> Any:
        part = range(start + 1, len(self._stack))
        if not part:
            return None
        shell = _empty(model, part)
        shell.embed_tokens = None
        shell.rotary_emb = type(shell.rotary_emb)(config=shell.config)  # computed: float32 whatever the model's dtype
        for place, block in enumerate(part):
            shell.layers[place] = Borrowing(shell.layers[place], self._stack[block], again)
        shell.norm = self._norm
        return shell

    def __call__(self, block: int, state: Tensor, batch: Batch) -> Tensor:
        """The final state [B, T, H] that the teacher makes of `state` [B, T, H], were it the output of this block (all ranks take part)."""
        shell = self._shells[block]
        if shell is None:
            return self._norm(state)
        shell.rotary_emb.to(state.device)
        return shell(
            inputs_embeds=state, attention_mask=batch.attention_mask, position_ids=batch.position_ids, use_cache=False
        ).last_hidden_state


def _empty(model: PreTrainedModel, part: range) -> Any:
    """A backbone of these blocks of the model, in eval mode; it holds no weight."""
    small = student_config(model.config, part, {})
    with torch.device("meta"):
        shell = type(model)._from_config(
            small, dtype=model.dtype, attn_implementation=model.config._attn_implementation
        )
    return backbone(shell).eval().requires_grad_(False)


class Borrowing(nn.Module):
    """A module without weights that borrows another's, of the same class, for each pass; they get no gradient."""

    def __init__(self, empty: nn.Module, lender: nn.Module, again: bool) -> None:
        super().__init__()
        self.empty = empty
        self._lent = [*lender.named_parameters(), *lender.named_buffers()]  # in a list, so that they stay the lender's
        self._again = again

    def forward(self, state: Tensor, *args: Any, **options: Any) -> Tensor:
        """What the lender makes of the state [B, T, H]."""

        def run(state: Tensor) -> Tensor:
            weights = {name: tensor.detach() for name, tensor in self._lent}
            return output_state(functional_call(self.empty, weights, (state, *args), options))

        if self._again:
            return _Again.apply(state, run, self._borrowed)  # type: ignore[no-any-return, no-untyped-call]
        with self._borrowed():
            return run(state)

    @contextlib.contextmanager
    def _borrowed(self) -> Iterator[None]:
        with gathered([tensor for _, tensor in self._lent]):
            yield


class _Again(torch.autograd.Function):
    """A pass that keeps its input alone and is made again for the gradient of that input."""

    @staticmethod
    def forward(
        ctx: Any,
        state: Tensor,
        run: Callable[[Tensor], Tensor],
        borrowed: Callable[[], contextlib.AbstractContextManager[None]],
    ) -> Tensor:
        ctx.save_for_backward(state)
        ctx.run, ctx.borrowed = run, borrowed
        with borrowed():
            return run(state)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (state,) = ctx.saved_tensors
        with ctx.borrowed(), torch.enable_grad():
            leaf = state.detach().requires_grad_()
            (gradient,) = torch.autograd.grad(ctx.run(leaf), leaf, grads[0])
        return gradient, None, None
