"""Students that look at their teacher: each student block's state against all of the teacher's, one batch at a time.

`look(teacher, viewpoints, batches)` runs the teacher once per batch and every student against its states. The teacher's states of
that one batch are held; a student's state is looked from where it is born, by a hook, and let go.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from llmkd.cosines import CodeCosine, PairCosines
from llmkd.data import Batch
from llmkd.errors import InputError
from llmkd.families import final_state
from llmkd.models import blocks
from llmkd.teachers.base import Capture, output_state


class TeacherStates:
    """What the teacher holds out to look at: every block's state of one batch, and its final state."""

    def __init__(self, model: PreTrainedModel) -> None:
        self._model = model.eval()
        stack = blocks(model)
        self.depth, self.width = len(stack), int(model.config.hidden_size)
        self._capture = Capture(dict(enumerate(stack)), dict)

    def of(self, batch: Batch) -> tuple[list[Tensor], Tensor]:
        """(the raw state [B, T, H] of each block, the final state)"""
        final = final_state(self._model, batch)
        kept = self._capture.collect()
        return [kept[block] for block in range(self.depth)], final


class Viewpoint:
    """A student from whose blocks the teacher's states are seen, with the projector of each block where the widths differ.

    `normed_last`: the last blocks' states, of both models, are those after the final norm. `projectors`: by student block; a block
    without one is left out where the widths differ. Raises InputError where none is left.
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
        stack = blocks(model)
        self.depth, width = len(stack), int(model.config.hidden_size)
        self._projectors = dict(projectors or {}) if width != teacher.width else {}
        seen = [block for block in range(self.depth) if width == teacher.width or block in self._projectors]
        if not seen:
            raise InputError(
                f"its states are {width} wide and the teacher's {teacher.width}, and no projector stands between them; give a "
                "student of the teacher's width, or one that was trained with a distance that has projectors"
            )
        self._cosines = {block: PairCosines(teacher.depth, model.device) for block in seen}
        self._code = CodeCosine() if 0 in seen else None
        self._normed_last, self._one_block_teacher = normed_last, teacher.depth == 1
        for block in seen:
            stack[block].register_forward_hook(self._watcher(block))
        self._batch: Batch | None = None
        self._states: Sequence[Tensor] = ()
        self._teacher_final: Tensor | None = None

    def look(self, batch: Batch, states: Sequence[Tensor], teacher_final: Tensor) -> None:
        """Run the student on the batch; nothing of it is kept but sums."""
        self._states = [*states[:-1], teacher_final] if self._normed_last else states
        self._batch, self._teacher_final = batch, teacher_final
        final = final_state(self._model, batch)
        last = self.depth - 1
        if self._normed_last and last in self._cosines:
            self._add(last, final)
        if last == 0:
            self._add_code(final)
        self._batch, self._states, self._teacher_final = None, (), None

    def result(self) -> dict[str, Any]:
        """The cosines by student block and the paper code's own statistic, as JSON."""
        found = [{"block": block, **cosines.result()} for block, cosines in self._cosines.items()]
        return {"blocks": found, "paper_code": None if self._code is None else self._code.result()}

    def _watcher(self, block: int) -> Callable[..., None]:
        def watch(module: nn.Module, args: object, output: object) -> None:
            state, last = output_state(output), block == self.depth - 1
            if not (last and self._normed_last):
                self._add(block, state)
            if block == 0 and not last:
                self._add_code(state)

        return watch

    def _add(self, block: int, state: Tensor) -> None:
        assert self._batch is not None, "a block ran outside look()"
        self._cosines[block].add(state, self._states, self._batch.attended_at, self._projectors.get(block))

    def _add_code(self, state: Tensor) -> None:
        """As the paper's code reads hidden_states[1] and [L]: the last of a model's is the one after its final norm."""
        if self._code is None:
            return
        assert self._batch is not None and self._teacher_final is not None
        first = self._teacher_final if self._one_block_teacher else self._states[0]
        self._code.add(state, first, self._teacher_final, self._batch.attended, self._projectors.get(0))


@torch.no_grad()
def look(
    teacher: TeacherStates, viewpoints: Sequence[Viewpoint], batches: Iterable[Batch], device: torch.device
) -> None:
    """Let every viewpoint see the teacher's states of every batch, one batch after another."""
    for batch in batches:
        here = batch.to(device)
        states, final = teacher.of(here)
        for viewpoint in viewpoints:
            viewpoint.look(here, states, final)
        del states, final  # before the next batch's are made
