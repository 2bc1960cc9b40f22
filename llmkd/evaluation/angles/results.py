"""The result files of the angles as dataclasses, read and written here and nowhere else."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any, Literal, Self

from llmkd.evaluation.results import StepResult

Matrix = list[list[float | None]]
"""By teacher block and teacher block."""
When = Literal["before", "after"]
WHEN: tuple[When, When] = ("before", "after")
"""Of a student's training: when its angles are measured."""


@dataclass(frozen=True, kw_only=True)
class BlockAngles:
    """The cosines between all pairs of teacher blocks, seen from one student block.

    Matrices [L, L] by teacher block: mean cosine and share above zero (1 on the diagonal; None where no token counts). Lists by pair
    i < j: tokens counted, and the histogram's counts; by teacher block: tokens at which its state has no direction.
    """

    block: int
    mean: Matrix
    above_zero: Matrix
    mean_of_pairs: float | None
    above_zero_of_pairs: float | None
    counted: list[int] = field(default_factory=list)
    without_direction: list[int] = field(default_factory=list)
    histogram: list[list[int]] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True)
class CosineSummary:
    """One stream of cosines."""

    mean: float | None
    above_zero: float | None = None
    counted: int = 0
    not_finite: int = 0
    histogram: list[int] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True)
class PaperCode:
    """The statistic of the paper's own code, with padding as there and over tokens alone."""

    with_padding: CosineSummary
    tokens: CosineSummary


@dataclass(frozen=True, kw_only=True)
class StudentView:
    """What one stack of a student sees of the teacher's."""

    blocks: list[BlockAngles]
    paper_code: PaperCode | None


@dataclass(frozen=True, kw_only=True)
class StackAngles:
    """One stack of blocks before and after training: a decoder's only one, or an encoder-decoder's `encoder` or `decoder`."""

    stack: str
    """Empty where a model has but one."""
    tokens: int
    positions: int = 0
    """Tokens and padding."""
    teacher_blocks: int
    student_blocks: int
    pairs: list[tuple[int, int]] = field(default_factory=list)
    before: StudentView
    after: StudentView

    def view(self, when: When) -> StudentView:
        return self.before if when == "before" else self.after


@dataclass(frozen=True, kw_only=True)
class MeasuredAngles:
    """What was measured of one student."""

    rows: int
    final_state: str
    projector: dict[str, str] | None = None
    """When -> whose projectors the states were seen through; None where the widths are the same."""
    projector_left_out: bool = False
    """Whether the student was trained through a projector that these angles leave out."""
    bins: int = 0
    stacks: list[StackAngles]

    def tokens_read(self) -> str:
        """As the function `tokens_read`, of all stacks."""
        return tokens_read({stack.stack: stack.tokens for stack in self.stacks})


@dataclass(frozen=True, kw_only=True)
class AngleResult(StepResult):
    """How a student's blocks see the teacher's. `measured` is None of a step that failed, and of a file by an earlier llmkd."""

    kind: str = ""
    strategy: str = ""
    seed: int | None = None
    init: str = ""
    measured: MeasuredAngles | None = None
    settings: dict[str, object] = field(default_factory=dict)

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Self:
        whole = value.get("error") is None and "stacks" in value
        return super().from_json({**value, "measured": value if whole else None})

    def to_json(self) -> dict[str, object]:
        """What was measured stands among the other keys of the file."""
        whole = super().to_json()
        measured = whole.pop("measured")
        return {**whole, **measured} if isinstance(measured, dict) else whole

    def to_text(self) -> str:
        """In one line: histograms are long."""
        return json.dumps(self.to_json(), allow_nan=False, separators=(",", ":"))


def tokens_read(tokens: Mapping[str, int]) -> str:
    """How many tokens the stacks read, by stack: `12 tokens`, or `12 tokens in the encoder and 9 in the decoder`."""
    first, *others = [f"{count:,}" for count in tokens.values()]
    where = [f" in the {stack}" if stack else "" for stack in tokens]
    return f"{first} tokens{where[0]}" + "".join(f" and {n}{at}" for n, at in zip(others, where[1:], strict=True))


def mean_of_known(values: Sequence[float | None]) -> float | None:
    """The mean of the values that are not None; None where there is none."""
    known = [value for value in values if value is not None]
    return fmean(known) if known else None
