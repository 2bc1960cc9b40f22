"""What a teacher says of a micro-batch, and the words for it."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Protocol

from torch import Tensor, nn

from llmkd.data import Batch
from llmkd.stages import EMBEDDING as EMBEDDING

Head = Callable[[], contextlib.AbstractContextManager[tuple[Tensor, Tensor | None]]]


class Signal:
    """The mapped blocks' states and the final state of one micro-batch. A state is let go when its last pair has taken it."""

    def __init__(self, states: dict[int, Tensor], uses: Iterable[int], final: Tensor | None, head: Head | None) -> None:
        self._states = states
        self._left = Counter(uses)
        self.final = final
        self.head = head

    def take(self, block: int) -> Tensor:
        """The state [B, T, H] of a mapped block, once per pair that uses it."""
        state = self._states[block]
        self._left[block] -= 1
        if self._left[block] == 0:
            del self._states[block]
        return state

    @property
    def held(self) -> int:
        """How many states are still held."""
        return len(self._states)


class Teacher(Protocol):
    """A placement of the teacher's weights."""

    def expect(self, batches: Sequence[Batch]) -> None:
        """Hear of the micro-batches that will be asked for next, in order. Every rank calls it equally often, ahead of `signals`."""
        ...

    def signals(self, batch: Batch) -> Signal:
        """What the teacher says of a micro-batch. Every rank calls it once per micro-batch, in the same order."""
        ...


def output_state(output: object) -> Tensor:
    """The state in a block's output, which is a tensor or a tuple that opens with it."""
    state = output[0] if isinstance(output, tuple) else output
    assert isinstance(state, Tensor)
    return state


class Capture:
    """Forward hooks that keep the states of some modules, and of no others, until they are collected."""

    def __init__(self, modules: dict[int, nn.Module]) -> None:
        self._states: dict[int, Tensor] = {}
        for block, module in modules.items():
            module.register_forward_hook(self._keeper(block))

    def _keeper(self, block: int) -> Callable[..., None]:
        def keep(module: nn.Module, args: object, output: object) -> None:
            self._states[block] = output_state(output)

        return keep

    def collect(self) -> dict[int, Tensor]:
        """The states of the pass just made; they are held here no longer."""
        states, self._states = self._states, {}
        return states
