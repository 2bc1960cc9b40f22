"""Teacher states that wait for the student in pinned host memory, the next one coming back while the last one is compared."""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Sequence

import torch
from torch import Tensor


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
            state.record_stream(self._stream)  # nor is its memory free before it is copied
        with self._beside():
            host.copy_(state, non_blocking=True)
        self._away[block] = host

    def __getitem__(self, block: int) -> Tensor:
        """The state, on the device again; the next one is sent for."""
        self._send_for(block)
        if self._stream is not None:
            torch.cuda.current_stream().wait_stream(self._stream)
            # The memory is the copying stream's: what computes with it now must be done before it is given out again.
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
