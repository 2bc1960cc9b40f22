"""Students that look at their teacher: each student block's state against all of the teacher's, one batch at a time.

`look(teacher, viewpoints, batches)` runs the teacher once per batch and every student against its states. The teacher's states of
that one batch are held; a student's state is looked from where it is born, by a hook, and let go.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from llmkd.data.batches import Batch
from llmkd.errors import InputError
from llmkd.evaluation.angle_cosines import CodeCosine, PairCosines
from llmkd.models.parts import Stack, Tokens, final_state, on_state, stacks, tokens_of
from llmkd.teachers.base import Capture

STACKS = {"": "", "enc": "encoder", "dec": "decoder"}
"""What a stack is called in results: nothing where a model has but one."""


@dataclass(frozen=True)
class Sight:
    """One stack of the teacher's on one batch, as students see it."""

    tokens: Tokens
    states: list[Tensor]
    """The raw state [B, T, H] of each block."""
    last: Tensor
    """The last block's state after the stack's final norm, where it has one."""


class TeacherStates:
    """What the teacher holds out to look at: every block's state of one batch, stack by stack."""

    def __init__(self, model: PreTrainedModel) -> None:
        self._model = model.eval()
        self.stacks, self.width = stacks(model), int(model.config.hidden_size)
        self.last_width = int(
            getattr(model.config, "word_embed_proj_dim", self.width)
        )  # OPT-350m's final states are narrower
        self._raw, self._last = Capture({}, dict), Capture({}, dict)
        for stack in self.stacks:
            for block in _numbers(stack):
                on_state(model, block, self._raw.keeper(block), normed=False)
            on_state(model, _numbers(stack)[-1], self._last.keeper(_numbers(stack)[-1]), normed=True)

    @property
    def depths(self) -> list[int]:
        """How many blocks each stack has."""
        return [len(stack.blocks) for stack in self.stacks]

    def of(self, batch: Batch) -> list[Sight]:
        """Each stack's states on the batch."""
        final_state(self._model, batch)
        raw, last = self._raw.collect(), self._last.collect()
        return [
            Sight(tokens_of(batch, stack), [raw[block] for block in _numbers(stack)], last[_numbers(stack)[-1]])
            for stack in self.stacks
        ]


def _numbers(stack: Stack) -> range:
    """Of a stack's blocks, counted through all stacks."""
    return range(stack.first, stack.first + len(stack.blocks))


class Viewpoint:
    """A student from whose blocks the teacher's states are seen, with the projector of each block where the widths differ.

    The blocks of an encoder-decoder's encoder see those of the teacher's encoder, its decoder's those of the decoder. `normed_last`: the
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
            seen = [block for block in _numbers(stack) if width == teacher.width or block in self._projectors]
            self._cosines.append({block: PairCosines(depth, model.device) for block in seen})
            coded = stack.first in seen and teacher.last_width == teacher.width
            self._codes.append(CodeCosine() if coded else None)
            for block in seen:
                on_state(model, block, partial(self._add, number, block), normed=normed_last)
            if coded:  # the paper's code reads hidden_states, whose last is the one after the final norm
                on_state(model, stack.first, partial(self._add_code, number, stack.first), normed=True)
        if not any(self._cosines):
            raise InputError(
                f"its states are {width} wide and the teacher's {teacher.width}, and no projector stands between them; give a "
                "student of the teacher's width, or one that was trained with a distance that has projectors"
            )
        self._seen: Sequence[Sight] = ()

    @property
    def depths(self) -> list[int]:
        """How many blocks each stack has."""
        return [len(stack.blocks) for stack in self._stacks]

    def look(self, batch: Batch, seen: Sequence[Sight]) -> None:
        """Run the student on the batch; nothing of it is kept but sums."""
        self._seen = seen
        final_state(self._model, batch)
        self._seen = ()

    def result(self) -> list[dict[str, Any]]:
        """Stack by stack the cosines by student block, counted in its stack, and the paper code's own statistic, as JSON."""
        return [
            {
                "blocks": [{"block": block - stack.first, **found.result()} for block, found in cosines.items()],
                "paper_code": None if code is None else code.result(),
            }
            for stack, cosines, code in zip(self._stacks, self._cosines, self._codes, strict=True)
        ]

    def _sight(self, number: int) -> Sight:
        assert self._seen, "a block ran outside look()"
        return self._seen[number]

    def _add(self, number: int, block: int, state: Tensor) -> None:
        seen = self._sight(number)
        states = [*seen.states[:-1], seen.last] if self._normed_last else seen.states
        self._cosines[number][block].add(state, states, seen.tokens.at, self._projectors.get(block))

    def _add_code(self, number: int, block: int, state: Tensor) -> None:
        """As the paper's code reads hidden_states[1] and [L]."""
        seen, code = self._sight(number), self._codes[number]
        assert code is not None
        first = seen.last if len(seen.states) == 1 else seen.states[0]
        code.add(state, first, seen.last, seen.tokens.attended, self._projectors.get(block))


@torch.no_grad()
def look(
    teacher: TeacherStates, viewpoints: Sequence[Viewpoint], batches: Iterable[Batch], device: torch.device
) -> None:
    """Let every viewpoint see the teacher's states of every batch, one batch after another."""
    for batch in batches:
        here = batch.to(device)
        seen = teacher.of(here)
        for viewpoint in viewpoints:
            viewpoint.look(here, seen)
        del seen  # before the next batch's are made
