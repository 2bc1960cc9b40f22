"""A teacher in the student's own process: whole on every rank (replicated), or sharded over the ranks (zero3)."""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from llmkd.data.batches import Batch
from llmkd.distributed.ds_configs import DsConfig
from llmkd.distributed.engines import frozen_engine, gathered
from llmkd.models.parts import Body, blocks, head, head_bias, on_state
from llmkd.teachers.base import Capture, Signal
from llmkd.teachers.upper_blocks import UpperBlocks


class ResidentTeacher:
    """A frozen model that is run forward for every micro-batch.

    `uses` names the teacher block of every pair, in the order the student takes them (a block used by three pairs three times); only
    these are captured. The backbone is run without its head: the head's weight is lent, whole, to the chunked loss, or with
    `logits=False` is not kept at all. `offload_to`: the stream that takes waiting states to host memory and back. `stones`: the teacher
    blocks after which the student's stones go on with the teacher's, and whether these are `checkpointed`.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        uses: Sequence[int],
        *,
        normed_last: bool,
        ds_config: DsConfig | None,
        logits: bool = True,
        offload_to: torch.cuda.Stream | None = None,
        stones: Sequence[int] = (),
        checkpointed: bool = True,
    ) -> None:
        model.eval().requires_grad_(False)
        self._head = head(model) if logits else None
        self._model = model
        self._uses = self._taken = tuple(uses)
        self.blocks = blocks(model)
        self._upper = UpperBlocks(model, stones, recompute=checkpointed) if stones else None
        body = Body(model)
        self._body = body if ds_config is None else frozen_engine(body, ds_config, self.blocks)
        new: Callable[[], Any] = dict if offload_to is None else lambda: OffloadedStates(self._taken, offload_to)
        self._capture = Capture({}, new, lambda block: block in self._taken)
        for block in set(uses):
            on_state(model, block, self._capture.keeper(block), normed=normed_last)

    def expect(self, batches: Sequence[Batch]) -> None:
        """Nothing: it runs on a micro-batch in `signals`."""

    @torch.no_grad()
    def signals(self, batch: Batch, uses: Sequence[int] | None = None) -> Signal:
        """Run the teacher on the batch: the mapped blocks' states and, where logits are asked for, the final state and the head.

        `uses`: the blocks that the student takes this time, all among those the teacher was made with; default: these.
        """
        self._taken = self._uses if uses is None else tuple(uses)
        self._capture.collect()  # an empty place for the states of these blocks
        final = self._body(batch)
        states = self._capture.collect()
        if self._head is None:
            return Signal(states, self._taken, None, None)
        return Signal(states, self._taken, final, self.head, upper=self._upper)

    @contextlib.contextmanager
    def head(self) -> Iterator[tuple[Tensor, Tensor | None]]:
        """The head's weight [V, H] and bias, whole while the context lasts (all ranks take part)."""
        assert self._head is not None, "a teacher without logits has no head to lend"
        bias = head_bias(self._model)
        with gathered([self._head.weight, bias]):
            yield self._head.weight, bias


class OffloadedStates:
    """States by block. Copies run on a stream of their own (None: at once, on a machine without one), beside the computation.

    `order`: the blocks as the student will ask for them, a block asked for three times three times. At most two states are on the
    device at a time: the one that was asked for and the next.
    """

    def __init__(self, order: Sequence[int], stream: torch.cuda.Stream | None) -> None:
        self._coming = deque(order)
        self._stream = stream
        self._away: dict[int, Tensor] = {}
        self._here: dict[int, Tensor] = {}
        self._device = torch.device("cpu")

    def __setitem__(self, block: int, state: Tensor) -> None:
        """Send a state away; the caller lets go of it."""
        self._device = state.device
        host = torch.empty(state.shape, dtype=state.dtype, pin_memory=self._stream is not None)
        if self._stream is not None:
            self._stream.wait_stream(torch.cuda.current_stream())  # the state is not computed yet
            state.record_stream(self._stream)  # its memory is not free before it is copied
        with self._beside():
            host.copy_(state, non_blocking=True)
        self._away[block] = host

    def __getitem__(self, block: int) -> Tensor:
        """The state, on the device again; the next one is sent for."""
        self._send_for(block)
        if self._stream is not None:
            torch.cuda.current_stream().wait_stream(self._stream)
            # The memory belongs to the copying stream, which must not reuse it before this stream is done with it.
            self._here[block].record_stream(torch.cuda.current_stream())
        state = self._here[block]
        self._coming.remove(block)
        if self._coming:
            self._send_for(self._coming[0])
        return state

    def __delitem__(self, block: int) -> None:
        """Let go of a state that is on the device."""
        del self._here[block]

    def __len__(self) -> int:
        return len(self._away.keys() | self._here.keys())

    def _send_for(self, block: int) -> None:
        if block not in self._here:
            with self._beside():
                self._here[block] = self._away.pop(block).to(self._device, non_blocking=True, copy=True)

    def _beside(self) -> contextlib.AbstractContextManager[object]:
        return contextlib.nullcontext() if self._stream is None else torch.cuda.stream(self._stream)
