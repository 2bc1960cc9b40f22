"""What a teacher says of a micro-batch, and the words for it."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Protocol

from torch import Tensor, nn

from llmkd.data.batches import Batch
from llmkd.layer_map import EMBEDDING
from llmkd.losses.chunked_head import TopK
from llmkd.models.parts import output_state

Head = Callable[[], contextlib.AbstractContextManager[tuple[Tensor, Tensor | None]]]
Upper = Callable[[int, Tensor, Batch], Tensor]
"""(block, state in place of its output, batch) -> the final state, with a gradient to the state:
llmkd.teachers.upper_blocks.UpperBlocks."""


class States(Protocol):
    """States that wait for the student, by block: a dict, or llmkd.teachers.resident.OffloadedStates."""

    def __getitem__(self, block: int, /) -> Tensor: ...
    def __setitem__(self, block: int, state: Tensor, /) -> None: ...
    def __delitem__(self, block: int, /) -> None: ...
    def __len__(self) -> int: ...


class Signal:
    """The mapped blocks' states and the final state of one micro-batch. A state is let go when its last pair has taken it.

    `final` and `head` are None where no logits are asked for; `top_k` (tensors [B, T, K]) stands in for them where a cache holds no
    more of the distribution. `upper` runs the teacher's upper blocks, where stones ask for them.
    """

    def __init__(
        self,
        states: States,
        uses: Iterable[int],
        final: Tensor | None,
        head: Head | None,
        top_k: TopK | None = None,
        upper: Upper | None = None,
    ) -> None:
        self._states = states
        self._left = Counter(uses)
        self._final = final
        self.head = head
        self.top_k = top_k
        self.upper = upper

    def take(self, block: int) -> Tensor:
        """The state [B, T, H] of a mapped block, once per pair that uses it."""
        state = self._states[block]
        self._left[block] -= 1
        if self._left[block] == 0:
            del self._states[block]
        return state

    def take_final(self) -> Tensor | None:
        """The final state [B, T, H], once; it is held here no longer, so that none waits for the backward pass."""
        final, self._final = self._final, None
        return final

    @property
    def final(self) -> Tensor | None:
        """The final state [B, T, H], until it is taken."""
        return self._final

    @property
    def held(self) -> int:
        """How many of the mapped blocks' states are still held."""
        return len(self._states)


class Teacher(Protocol):
    """A placement of the teacher's weights."""

    def expect(self, batches: Sequence[Batch]) -> None:
        """Hear of the micro-batches that will be asked for next, in order. Every rank calls it equally often, ahead of `signals`."""
        ...

    def signals(self, batch: Batch) -> Signal:
        """What the teacher says of a micro-batch. Every rank calls it once per micro-batch, in the same order."""
        ...


def blocks_needed(uses: Iterable[int], depth: int, *, logits: bool, normed_last: bool) -> int:
    """How many of a teacher's first blocks must be run for these uses; all of them where logits or the normed last state are asked for."""
    last = max(uses, default=EMBEDDING)
    return depth if logits or (normed_last and last == depth - 1) else last + 1


class Capture:
    """Forward hooks that keep the states of some modules, and of no others, until they are collected.

    `new` makes what they are kept in, once per pass. `wanted` says which blocks' states are kept in the pass under way.
    """

    def __init__(
        self, modules: dict[int, nn.Module], new: Callable[[], States], wanted: Callable[[int], bool] = lambda _: True
    ) -> None:
        self._new = new
        self._wanted = wanted
        self._states = new()
        for block, module in modules.items():
            keep = self.keeper(block)
            module.register_forward_hook(lambda module, args, output, keep=keep: keep(output_state(output)))

    def keeper(self, block: int) -> Callable[[Tensor], None]:
        """What keeps a state as this block's until they are collected."""

        def keep(state: Tensor) -> None:
            if self._wanted(block):
                self._states[block] = state

        return keep

    def collect(self) -> States:
        """The states of the pass just made; they are held here no longer."""
        states, self._states = self._states, self._new()
        return states
