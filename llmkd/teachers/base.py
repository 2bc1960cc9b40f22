"""The interface of a teacher, and the signal that it gives for a micro-batch."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor, nn

from llmkd.data.batches import Batch
from llmkd.layer_map import EMBEDDING
from llmkd.losses.head_inputs import TopK
from llmkd.models.parts import output_state

Head = Callable[[], contextlib.AbstractContextManager[tuple[Tensor, Tensor | None]]]


class Upper(Protocol):
    """The teacher from after one of its blocks on: llmkd.teachers.upper_blocks.UpperBlocks."""

    @property
    def last(self) -> int:
        """The number of its last block."""
        ...

    def __call__(self, block: int, state: Tensor, batch: Batch, /) -> Tensor:
        """The final state that follows this state [B, T, H] in place of the block's output, with a gradient to the state."""
        ...


class States(Protocol):
    """States that wait for the student, by block: a dict, or llmkd.teachers.resident.OffloadedStates."""

    def __getitem__(self, block: int, /) -> Tensor: ...
    def __delitem__(self, block: int, /) -> None: ...
    def __len__(self) -> int: ...


class Signal:
    """The mapped blocks' states and the final state of one micro-batch. A state is released when its last pair has taken it.

    `final` [B, T, H] and `head` are None where no logits are needed; `top_k` (tensors [B, T, K]) takes their place where that is all a
    cache holds of the distribution. `upper` runs the teacher's upper blocks, where there are stones or
    states are read.
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
        self.final = final
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
        final, self.final = self.final, None
        return final

    @property
    def held(self) -> int:
        """How many of the mapped blocks' states are still held."""
        return len(self._states)


class Teacher(Protocol):
    """A placement of the teacher's weights."""

    @property
    def blocks(self) -> nn.ModuleList | None:
        """All its blocks, where a rank can run them itself (`Placement.runs_upper_blocks`); None elsewhere."""
        ...

    def expect(self, batches: Sequence[Batch]) -> None:
        """Announce the micro-batches of the next calls of `signals`, in order. Every rank calls it equally often."""
        ...

    def signals(self, batch: Batch, uses: Sequence[int] | None = None) -> Signal:
        """The teacher's signal for a micro-batch. Every rank calls it once per micro-batch, in the same order.

        `uses`: the blocks that the student takes, where they change from step to step; a placement that needs a fixed map has none given.
        """
        ...


@dataclass(frozen=True)
class Demand:
    """What a student needs from its teacher for a micro-batch."""

    blocks: tuple[int, ...]
    """The block of every pair, in the order in which the student takes them (a block of three pairs three times); EMBEDDING too."""
    logits: bool
    """The final state and the head are needed."""
    normed_last: bool = False
    """The last block's state is taken after the final norm."""
    stones: tuple[int, ...] = ()
    """The blocks after which the teacher goes on with a student's state."""

    def first_blocks(self, depth: int) -> int:
        """How many of the teacher's first blocks must be run; all where logits or the normed last state are needed."""
        last = max(self.blocks, default=EMBEDDING)
        return depth if self.logits or (self.normed_last and last == depth - 1) else last + 1


class Capture:
    """Forward hooks that keep the states of some modules until they are collected.

    `new` makes the container of a pass's states. `wanted` says which blocks' states are kept in the current pass.
    """

    def __init__(
        self, modules: dict[int, nn.Module], new: Callable[[], Any], wanted: Callable[[int], bool] = lambda _: True
    ) -> None:
        self._new = new
        self._wanted = wanted
        self._states = new()
        for block, module in modules.items():
            keep = self.keeper(block)
            module.register_forward_hook(lambda module, args, output, keep=keep: keep(output_state(output)))

    def keeper(self, block: int) -> Callable[[Tensor], None]:
        """The function that keeps a state as this block's."""

        def keep(state: Tensor) -> None:
            if self._wanted(block):
                self._states[block] = state

        return keep

    def collect(self) -> States:
        """The states of the last pass; they are held here no longer."""
        states, self._states = self._states, self._new()
        return states
