"""A teacher cut into stages over the ranks of a pipeline: no weight is ever sent, states stream to the rank that owns a micro-batch.

Each member of a pipeline holds one stage and owns micro-batches. `llmkd.teachers.pipeline_schedule` plans what is run and sent at each
tick; here it is done. No member ever waits for all others: a stage waits for the state from the stage before it, and an owner for the
states of its own micro-batch.
"""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from llmkd.data.batches import Batch, Packed
from llmkd.distributed.clocks import StepClock
from llmkd.distributed.pipeline_group import PendingTransfer, PipelineGroup
from llmkd.layer_map import EMBEDDING, OtherState, State
from llmkd.models.parts import decoder_options
from llmkd.teachers.base import Capture, Signal
from llmkd.teachers.pipeline_schedule import PipelineCut, last_tick, routes, transfers

TICKS_IN_FLIGHT = 1
"""Ticks whose sends may still be under way while a stage goes on; those of older ticks are waited for and their tensors released."""

ANNOUNCED_BYTES = 4
"""Per token: its id in 32 bits. Packed rows add as many for each document."""


@dataclass(frozen=True)
class Inputs:
    """What a stage needs of a micro-batch, small enough to be sent to all members."""

    input_ids: Tensor  # [B, T] int32
    starts: Tensor | None  # of packed rows, as `Packed.starts`

    @property
    def nbytes(self) -> int:
        return self.input_ids.nbytes + (0 if self.starts is None else self.starts.nbytes)

    def on(self, device: torch.device) -> Entering:
        """The same on the device; the copy to a GPU goes on while the host does."""
        if self.starts is None:
            return Entering(_on(self.input_ids, device), None)
        positions, starts, longest = Packed.of(self.starts, len(self.input_ids))
        return Entering(_on(self.input_ids, device), Packed(_on(positions, device), _on(starts, device), longest))


class Entering(NamedTuple):
    """What a stage reads of a micro-batch, on its device."""

    input_ids: Tensor  # [B, T] int32
    packed: Packed | None


@dataclass(frozen=True)
class Turn:
    """The micro-batches of one call of `expect`. Members may have different numbers of them."""

    mine: deque[int]
    """The rounds of this member's own ones whose signals have not been taken."""
    end: int
    """The round after the last one of any member."""


class PipelineTeacher:
    """One member of a pipelined teacher.

    `body`: this member's stage (`llmkd.teachers.pipeline_stage.load_stage`). `head`: the teacher's head [V, H], whole, because the loss
    is computed beside the student; None where no divergence needs it, and then no final state is sent.
    `clock`: of the steps that it is for.
    """

    blocks = None

    def __init__(
        self,
        body: nn.Module,
        parts: PipelineCut,
        group: PipelineGroup,
        uses: Sequence[int],
        *,
        head: Tensor | None,
        normed_last: bool,
        width: int,
        dtype: torch.dtype,
        device: torch.device,
        clock: StepClock,
    ) -> None:
        self._body: Any = body
        self._group, self._head = group, head
        self._uses = tuple(uses)
        self._normed = parts[-1].stop - 1 if normed_last else None
        self._routes = routes(uses, parts, final=head is not None, normed_last=normed_last)
        self._width, self._dtype, self._device = width, dtype, device
        self._here = [route.state for route in self._routes if route.stage == group.member]
        part = parts[group.member]
        modules = {block: self._body.layers[block - part.start] for block in part if block in self._here}
        if EMBEDDING in self._here:
            modules[EMBEDDING] = self._body.embed_tokens
        self._capture: Any = Capture(modules, dict)
        self._inputs: dict[int, Entering] = {}  # by item, as long as this member needs them
        self._rounds, self._clock = 0, clock
        self._turns: deque[Turn] = deque()  # announced and not yet finished
        self._tick = 0
        self._arriving: dict[int, dict[State, PendingTransfer | Tensor]] = {}  # by item, states here or on their way
        self._leaving: deque[list[PendingTransfer]] = deque()
        self.announced_bytes = 0

    @property
    def sent_bytes(self) -> int:
        """Bytes that this rank has sent: states, and the inputs of its micro-batches, which every member gets."""
        return self._group.sent_bytes + self.announced_bytes

    def expect(self, batches: Sequence[Batch]) -> None:
        """Announce this member's next micro-batches to all (all members take part; numbers and lengths may differ)."""
        size = self._group.size
        mine = [_inputs(batch) for batch in batches]
        self.announced_bytes += sum(inputs.nbytes for inputs in mine) * (size - 1)
        members: list[tuple[list[Inputs], int]] = self._group.gather((mine, self._tick))
        # A member that had nothing more to do may be past the ticks at which stage 0 would work on the next items.
        first = max(self._rounds, -(-max(tick for _, tick in members) // size))
        for owner, (theirs, _) in enumerate(members):
            here = [inputs.on(self._device) for inputs in theirs]
            self._inputs.update({(first + number) * size + owner: inputs for number, inputs in enumerate(here)})
        self._rounds = first + max(len(theirs) for theirs, _ in members)
        self._turns.append(Turn(deque(range(first, first + len(mine))), self._rounds))

    @torch.no_grad()
    def signals(self, batch: Batch, uses: Sequence[int] | None = None) -> Signal:
        """The teacher's signal for this member's next micro-batch; the stages have then begun to run the ones after it."""
        assert uses is None, "a pipeline's map is fixed"
        while not self._turns[0].mine:
            self._turns.popleft()
        turn = self._turns[0]
        item = turn.mine.popleft() * self._group.size + self._group.member
        if turn.mine:
            self._run_until(last_tick(turn.mine[0], self._group.size))
        else:
            self.finish()
        states: Any = {name: self._arrived(state) for name, state in self._arriving.pop(item, {}).items()}
        final = states.pop(OtherState.FINAL, None)
        if final is not None and self._normed in self._uses:
            states[self._normed] = final
        if self._head is None:
            return Signal(states, self._uses, None, None)
        return Signal(states, self._uses, final, self.head)

    @torch.no_grad()
    def finish(self) -> None:
        """Run this stage to the end of the turn, that is of the micro-batches announced at once.

        `signals` does so at a member's last micro-batch of a turn; a member without any in a turn calls this.
        """
        self._run_until(last_tick(self._turns.popleft().end, self._group.size))

    @contextlib.contextmanager
    def head(self) -> Iterator[tuple[Tensor, Tensor | None]]:
        """The head's weight [V, H]; the tested model types have no bias."""
        assert self._head is not None
        yield self._head, None

    def _run_until(self, tick: int) -> None:
        """Run the ticks up to this one, or up to the last one that has an item."""
        while self._tick <= min(tick, last_tick(self._rounds, self._group.size)):
            self._run_tick(self._tick)
            self._tick += 1

    def _run_tick(self, tick: int) -> None:
        """One tick: run this stage on its item, then start to send the states for others and to receive those for this member."""
        me, size = self._group.member, self._group.size
        item = tick - me
        outputs = self._run_stage(item) if item in self._inputs else {}
        planned = transfers(tick, self._inputs.__contains__, self._routes, size)
        mine = [t for t in planned if me in (t.source, t.target)]
        sends = [
            (outputs[t.state].contiguous(), t.target, True)
            if t.source == me
            else (self._empty_state(self._inputs[t.item]), t.source, False)
            for t in mine
        ]
        posted = self._group.post(sends)
        self._leaving.append([transfer for t, transfer in zip(mine, posted, strict=True) if t.source == me])
        for t, transfer in zip(mine, posted, strict=True):
            if t.target == me:
                self._arriving.setdefault(t.item, {})[t.state] = transfer
        if outputs and item % size == me:
            self._arriving.setdefault(item, {}).update({state: outputs[state] for state in self._here})
        self._release_sends(TICKS_IN_FLIGHT)
        self._inputs.pop(tick - size + 1, None)  # the last stage has run it now

    def _run_stage(self, item: int) -> dict[State, Tensor]:
        """Run this stage on an item: the states that students need, and the one for the next stage."""
        inputs, me = self._inputs[item], self._group.member
        if me == 0:
            entering = {"input_ids": inputs.input_ids.long()}
        else:
            entering = {"inputs_embeds": self._arrived(self._arriving[item].pop(OtherState.NEXT))}
            if not self._arriving[item]:
                del self._arriving[item]
        output = self._body(**entering, **decoder_options(self._body.config, inputs.packed)).last_hidden_state
        states = self._capture.collect()
        states[OtherState.FINAL if me == self._group.size - 1 else OtherState.NEXT] = output
        return states

    def _empty_state(self, inputs: Entering) -> Tensor:
        """An empty state [B, T, H] to receive into."""
        return torch.empty(*inputs.input_ids.shape, self._width, dtype=self._dtype, device=self._device)

    def _release_sends(self, ticks: int) -> None:
        """Wait for the sends of all but the last few ticks, and release their tensors."""
        while len(self._leaving) > ticks:
            for transfer in self._leaving.popleft():
                self._arrived(transfer)

    def _arrived(self, state: PendingTransfer | Tensor) -> Tensor:
        """The state, after it has been waited for if it was on its way."""
        if isinstance(state, Tensor):
            return state
        with self._clock.inside("wire"):
            return state.wait()


def _inputs(batch: Batch) -> Inputs:
    return Inputs(batch.input_ids.to("cpu", torch.int32), None if batch.starts is None else batch.starts.cpu())


def _on(tensor: Tensor, device: torch.device) -> Tensor:
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)
