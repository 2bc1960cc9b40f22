"""Students that observe their teacher: each student block's state against all of the teacher's, one batch at a time.

`observe(teacher, observers, batches, device)` runs the teacher once per batch and every student against its states. The teacher's states
of that one batch are held; a student's state is compared by a hook, as soon as its block gives it, and let go.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from llmkd.data.batches import Batch
from llmkd.errors import InputError
from llmkd.evaluation.angles.cosines import CodeCosine, PairCosines
from llmkd.evaluation.angles.results import StudentView
from llmkd.models.parts import Stack, Tokens, final_state, on_state, stacks, tokens_of
from llmkd.teachers.base import Capture

STACKS = {"": "", "enc": "encoder", "dec": "decoder"}
"""What a stack is called in results: nothing where a model has but one."""


@dataclass(frozen=True)
class StackStates:
    """One stack of the teacher on one batch, as students observe it."""

    tokens: Tokens
    states: list[Tensor]
    """The raw state [B, T, H] of each block."""
    last: Tensor
    """The last block's state after the stack's final norm, where it has one."""


class TeacherStates:
    """The teacher, with every block's state of one batch, stack by stack."""

    def __init__(self, model: PreTrainedModel) -> None:
        self._model = model.eval()
        self.stacks, self.width = stacks(model), int(model.config.hidden_size)
        # OPT-350m's final states are narrower.
        self.last_width = int(getattr(model.config, "word_embed_proj_dim", self.width))
        self._raw, self._last = Capture({}, dict), Capture({}, dict)
        for stack in self.stacks:
            for block in _numbers(stack):
                on_state(model, block, self._raw.keeper(block), normed=False)
            on_state(model, _numbers(stack)[-1], self._last.keeper(_numbers(stack)[-1]), normed=True)

    @property
    def depths(self) -> list[int]:
        """How many blocks each stack has."""
        return [len(stack.blocks) for stack in self.stacks]

    def of(self, batch: Batch) -> list[StackStates]:
        """Each stack's states on the batch."""
        final_state(self._model, batch)
        raw, last = self._raw.collect(), self._last.collect()
        return [
            StackStates(tokens_of(batch, stack), [raw[block] for block in _numbers(stack)], last[_numbers(stack)[-1]])
            for stack in self.stacks
        ]


def _numbers(stack: Stack) -> range:
    """The numbers of a stack's blocks, counted through all stacks."""
    return range(stack.first, stack.first + len(stack.blocks))


class StudentObserver:
    """A student whose blocks observe the teacher's states, with the projector of each block where the widths differ.

    The blocks of an encoder-decoder's encoder observe the teacher's encoder, its decoder's the decoder. `normed_last`: the
    last blocks' states, of both models, are those after the final norm. `projectors`: by student block, counted through all stacks; a
    block without one is left out where the widths differ. Raises InputError where none is left.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        teacher: TeacherStates,
        *,
        normed_last: bool,
        projectors: Mapping[int, nn.Module] | None = None,
    ) -> None:
        self._model = model.eval()
        self._stacks, width = stacks(model), int(model.config.hidden_size)
        self._projectors = dict(projectors or {}) if width != teacher.width else {}
        self._normed_last = normed_last
        self._cosines: list[dict[int, PairCosines]] = []
        self._codes: list[CodeCosine | None] = []
        for number, (stack, depth) in enumerate(zip(self._stacks, teacher.depths, strict=True)):
            observing = [block for block in _numbers(stack) if width == teacher.width or block in self._projectors]
            self._cosines.append({block: PairCosines(depth, model.device) for block in observing})
            coded = stack.first in observing and teacher.last_width == teacher.width
            self._codes.append(CodeCosine() if coded else None)
            for block in observing:
                on_state(model, block, partial(self._add, number, block), normed=normed_last)
            if coded:  # the paper's code reads hidden_states, whose last is the one after the final norm
                on_state(model, stack.first, partial(self._add_code, number, stack.first), normed=True)
        if not any(self._cosines):
            raise InputError(
                f"its states are {width} wide and the teacher's {teacher.width}, and no projector stands between them; give a "
                "student of the teacher's width, or one that was trained with a distance that has projectors"
            )
        self._teacher_states: Sequence[StackStates] = ()

    @property
    def depths(self) -> list[int]:
        """How many blocks each stack has."""
        return [len(stack.blocks) for stack in self._stacks]

    def observe(self, batch: Batch, teacher_states: Sequence[StackStates]) -> None:
        """Run the student on the batch; nothing of it is kept but sums."""
        self._teacher_states = teacher_states
        final_state(self._model, batch)
        self._teacher_states = ()

    def views(self) -> list[StudentView]:
        """Stack by stack the cosines by student block, counted in its stack, and the paper code's own statistic."""
        return [
            StudentView(
                blocks=[sums.result(block - stack.first) for block, sums in cosines.items()],
                paper_code=None if code is None else code.result(),
            )
            for stack, cosines, code in zip(self._stacks, self._cosines, self._codes, strict=True)
        ]

    def _states_of(self, number: int) -> StackStates:
        assert self._teacher_states, "a block ran outside observe()"
        return self._teacher_states[number]

    def _add(self, number: int, block: int, state: Tensor) -> None:
        teacher = self._states_of(number)
        states = [*teacher.states[:-1], teacher.last] if self._normed_last else teacher.states
        self._cosines[number][block].add(state, states, teacher.tokens.at, self._projectors.get(block))

    def _add_code(self, number: int, block: int, state: Tensor) -> None:
        """As the paper's code reads hidden_states[1] and [L]."""
        teacher, code = self._states_of(number), self._codes[number]
        assert code is not None
        first = teacher.last if len(teacher.states) == 1 else teacher.states[0]
        code.add(state, first, teacher.last, teacher.tokens.attended, self._projectors.get(block))


@torch.no_grad()
def observe(
    teacher: TeacherStates, observers: Sequence[StudentObserver], batches: Iterable[Batch], device: torch.device
) -> None:
    """Let every student observe the teacher's states of every batch, one batch after another."""
    for batch in batches:
        here = batch.to(device)
        states = teacher.of(here)
        for observer in observers:
            observer.observe(here, states)
        del states  # before the next batch's are made
