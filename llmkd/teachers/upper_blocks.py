"""A frozen teacher's upper blocks and what follows them, run on any state, with a gradient to that state and to no weight.

What is run are shells: models of the teacher's own class without what makes the first block's input, so that masks, rotary positions,
packed documents and each block's kind of attention are made by the same code as in the whole model. A shell holds no weights. Its blocks
and what follows them borrow the teacher's weights while they run, whole on every rank, and again while their gradient is computed. So a
sharded teacher never has more than one block gathered, and neither its hooks nor DeepSpeed's see these passes.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from transformers import PreTrainedConfig, PreTrainedModel

from llmkd.data.batches import Batch
from llmkd.distributed.engines import gathered
from llmkd.errors import InputError
from llmkd.models.families import check_logits, model_type
from llmkd.models.load import student_config
from llmkd.models.model_types import types_with
from llmkd.models.parts import backbone, blocks, final_state, output_state


def check_upper(config: PreTrainedConfig) -> None:
    """Raise InputError for a teacher whose upper blocks have not been shown to be the whole model's."""
    check_logits(config)
    if model_type(config).ends is None:
        raise InputError(
            f"stones: a {config.model_type!r} teacher has not been shown to work from one of its blocks on; leave out stones, or give "
            f"a teacher of another type ({', '.join(types_with(lambda row: row.ends is not None))})"
        )
    if getattr(config, "scale_attn_by_inverse_layer_idx", False):
        raise InputError(
            "stones: this teacher's blocks scale their attention by their place (scale_attn_by_inverse_layer_idx), which an upper block "
            "run alone does not know; leave out stones, or give another teacher"
        )


class UpperBlocks:
    """The teacher from after one of its blocks to its final state; `starts`: the blocks after which it may begin.

    `recompute`: keep only a block's input for the backward pass and run the block again there. Without it all activations are kept, which
    a sharded teacher cannot do: its weights are gone by then.
    """

    def __init__(self, model: PreTrainedModel, starts: Iterable[int], *, recompute: bool) -> None:
        self.last = len(blocks(model)) - 1
        """The number of its last block, after which only the way to the final state is left."""
        self._shells = {start: _shell(model, start, recompute) for start in set(starts)}

    def __call__(self, block: int, state: Tensor, batch: Batch) -> Tensor:
        """The teacher's final state (models.parts.final_state) with `state` [B, T, H] as this block's output (all ranks take part)."""
        shell = self._shells[block]
        rotary = getattr(backbone(shell), "rotary_emb", None)
        if rotary is not None:
            rotary.to(state.device)
        return final_state(shell, batch, state)


def _shell(model: PreTrainedModel, start: int, recompute: bool) -> PreTrainedModel:
    """The model from after its block `start` on, in eval mode; it holds no weight."""
    stack = blocks(model)
    part = range(start + 1, len(stack))
    small = student_config(model.config, part or range(1), {})
    with torch.device("meta"):
        shell: Any = type(model)._from_config(
            small, dtype=model.dtype, attn_implementation=model.config._attn_implementation
        )
    shell.eval().requires_grad_(False)
    row = model_type(model.config)
    own = blocks(shell)
    for place, block in enumerate(part):
        own[place] = Borrowing(own[place], stack[block], recompute)
    del own[len(part) :]
    for path, stand_in in row.starts.items():
        _put(shell, path, stand_in())
    for path in row.ends or ():
        parent, _, name = path.rpartition(".")
        lender = getattr(model.get_submodule(parent), name)
        if lender is not None:
            _put(shell, path, Borrowing(shell.get_submodule(path), lender, recompute))
    body: Any = backbone(shell)
    if hasattr(body, "rotary_emb"):
        body.rotary_emb = type(body.rotary_emb)(config=small)  # computed: float32 whatever the model's dtype
    return shell


def _put(model: PreTrainedModel, path: str, module: nn.Module | None) -> None:
    """Give a model another module in this place."""
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, module)


class Borrowing(nn.Module):
    """A module without weights that borrows another's, of the same class, for each pass; they get no gradient."""

    def __init__(self, empty: nn.Module, lender: nn.Module, recompute: bool) -> None:
        super().__init__()
        self.empty = empty
        self._lent = [*lender.named_parameters(), *lender.named_buffers()]  # in a list, so that they stay the lender's
        self._recompute = recompute

    def forward(self, state: Tensor, *args: Any, **options: Any) -> Tensor:
        """The lender's output for the state [B, T, H]."""

        def run(state: Tensor) -> Tensor:
            weights = {name: tensor.detach() for name, tensor in self._lent}
            return output_state(functional_call(self.empty, weights, (state, *args), options))

        if self._recompute:
            return _Recomputed.apply(state, run, self._borrowed)  # type: ignore[no-any-return, no-untyped-call]
        with self._borrowed():
            return run(state)

    @contextlib.contextmanager
    def _borrowed(self) -> Iterator[None]:
        with gathered([tensor for _, tensor in self._lent]):
            yield


class _Recomputed(torch.autograd.Function):
    """A pass that keeps only its input, and is run again for the gradient of that input."""

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
