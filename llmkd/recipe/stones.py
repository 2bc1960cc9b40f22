"""Stepping stones: losses of the student's lower blocks under the teacher's upper ones. And what parts of an objective go together."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from llmkd.errors import InputError
from llmkd.layer_map import STRATEGIES
from llmkd.recipe.models import Teacher
from llmkd.recipe.objective import Loss, Matching
from llmkd.recipe.section import Section


class Stones(Section):
    """Stepping stones (block-wise logit distillation): the student's lower blocks under the teacher's upper ones, beside its own loss."""

    pairs: Literal["from_map"] | tuple[tuple[int, int], ...] = Field(
        "from_map", examples=["from_map", [[0, 3], [1, 7]]]
    )
    """One stone per (student block, teacher block): the teacher continues after its block. `from_map`: the layer map's pairs."""
    ce: float = Field(default=1.0, ge=0)
    """Weight of the stones' cross-entropy; of n stones in the order of student blocks, the i-th counts 1/2^(n-i)."""
    kl: float = Field(default=1.0, ge=0)
    """Weight of the stones' divergence from the teacher, with loss.divergence, loss.temperature and loss.kl_positions."""
    cross: float = Field(default=0.0, ge=0)
    """Weight of the divergence of each stone and of the student from the stones' mean logits, which get no gradient."""
    sample: Literal["all", "one"] = "all"
    """`one`: a single stone per step, drawn in proportion to its share and with the weight of all; unbiased, and much cheaper."""
    connector_batches: int = Field(default=4, gt=0)
    """Batches on which the connectors are fitted before the first step."""
    checkpoint: bool = True
    """Keep only the inputs of the teacher's blocks, and run each again for its gradient. A zero3 teacher needs it."""

    @model_validator(mode="after")
    def _consistent(self) -> Stones:
        if not (self.ce or self.kl or self.cross):
            raise ValueError("stones: ce, kl and cross are all 0; give one of them a weight, or leave out stones")
        if self.sample == "one" and self.cross:
            raise ValueError("stones.sample: the cross term needs every stone's logits; write all, or cross: 0")
        if isinstance(self.pairs, tuple):
            students = [student for student, _ in self.pairs]
            if not students or len(set(students)) != len(students):
                raise ValueError(
                    f"stones.pairs: {[list(pair) for pair in self.pairs]} must hold at least one pair, and each student block once; "
                    "write e.g. [[0, 3], [1, 7]]"
                )
        return self


def check_stones(stones: Stones | None, teacher: Teacher, matching: Matching) -> None:
    """Raise ValueError for stones that the recipe's teacher or map can't have."""
    if stones is None:
        return
    if not teacher.serving.runs_upper_blocks:
        raise ValueError(
            "stones: they run the teacher's upper blocks on the student's states, which is not possible with "
            f"{teacher.serving_name}; write teacher.placement: replicated or zero3, or leave out stones"
        )
    if teacher.placed.is_sharded and not stones.checkpoint:
        raise ValueError(
            "stones.checkpoint: a zero3 teacher's blocks are released between the passes; write true, or placement: replicated"
        )
    if stones.pairs == "from_map" and matching.redraw_every:
        raise ValueError(
            "stones.pairs: a connector is trained for one teacher block, and a redrawn map (matching.redraw_every) would change it; "
            "write the stones, e.g. [[0, 3], [1, 7]], or redraw_every: 0"
        )


def check_lens(matching: Matching, loss: Loss, teacher: Teacher) -> None:
    """Raise ValueError for a distance logit_lens that the recipe's teacher can't be read by, or whose gradient is to be reported."""
    if not matching.reads_logits or not loss.hidden or matching.strategy == "none":
        return
    if not teacher.serving.runs_upper_blocks:
        raise ValueError(
            "matching.distance: logit_lens reads the teacher's states through its final norm and head, which is not possible with "
            f"{teacher.serving_name}; write teacher.placement: replicated or zero3, or another distance"
        )
    if loss.report_norms_every:
        raise ValueError(
            "loss.report_norms_every: the gradient of logit_lens is not measured; write 0, or another distance"
        )


def check_something_to_learn(loss: Loss, strategy: str, *, pairs: bool, stones: bool) -> None:
    """Raise InputError where no part of the objective has a weight. `pairs`, `stones`: whether there are any."""
    if loss.ce or loss.kl or (loss.hidden and pairs) or stones:
        return
    if loss.hidden:
        raise InputError(
            f"loss: ce and kl are 0, and strategy {strategy} matches no pair for loss.hidden to weigh, so there is nothing to learn from; "
            "give ce or kl a weight, or write another matching.strategy"
        )
    raise InputError("loss: ce, kl and hidden are all 0, so there is nothing to learn from; give one of them a weight")


def check_mixed(matching: Matching, loss: Loss, teacher: Teacher, stones: Stones | None) -> None:
    """Raise ValueError for what needs one teacher block for each student block where a map mixes several."""
    if not STRATEGIES[matching.strategy].is_mixed:
        return
    why = f"strategy {matching.strategy} has no one teacher block for a student block"
    if stones is not None and stones.pairs == "from_map":
        raise ValueError(f"stones.pairs: {why}; write the stones, e.g. [[0, 3], [1, 7]]")
    if not loss.hidden:
        return
    if matching.compare == "differences":
        raise ValueError(
            f"matching.compare: {why}, so that nothing lies between two; write states, or another strategy"
        )
    if matching.reads_logits:
        raise ValueError(f"matching.distance: {why} that logit_lens could read; write another distance or strategy")
    if teacher.offload_states:
        raise ValueError(
            f"teacher.offload_states: strategy {matching.strategy} takes all states back for its first student block and keeps them to the "
            "last; write false, or fewer matching.candidates"
        )
