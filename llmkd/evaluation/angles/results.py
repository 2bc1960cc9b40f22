"""The result files of the angles as dataclasses, read and written here and nowhere else; and their table for a terminal."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any, Literal, Self

from llmkd.errors import InputError
from llmkd.evaluation.results import StepResult
from llmkd.text import aligned, fixed

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


def angles_text(files: dict[str, Path]) -> str:
    """A table of two lines per student, and what went wrong. Raises InputError if no student could be measured."""
    results = [AngleResult.read(file) for file in files.values()]
    failed = [f"{result.name}: {result.error}" for result in results if result.error is not None]
    measured = [(result, result.measured) for result in results if result.measured is not None]
    if not measured:
        raise InputError(failed[0])
    stacks = [(result, stack) for result, angles in measured for stack in angles.stacks]
    named = any(stack.stack for _, stack in stacks)
    head = ["mean cos", "share > 0", "lowest pair", "paper_code", "with padding"]
    lines = [["student", "init", *["stack"] * named, "", *head]]
    for result, stack in stacks:
        about = [result.name, result.init, *[stack.stack] * named]
        lines += [[*about, when, *_cells(stack.view(when))] for when in WHEN]
    first = measured[0][1]
    final_states = " or ".join(dict.fromkeys(angles.final_state for _, angles in measured))
    teacher_blocks = " + ".join(str(stack.teacher_blocks) for stack in first.stacks)
    note = (
        f"cos(T_i - S, T_j - S) over {first.tokens_read()} of {first.rows} held-out rows, mean over student blocks and pairs "
        f"i < j of {teacher_blocks} teacher blocks; the last blocks' states are {final_states}; paper_code: the mean "
        "of cos(T_first - S_first, T_last - S_first) as the paper's code takes it"
    )
    return "\n".join([aligned(lines), "", textwrap.fill(note, 100), *failed])


def _cells(view: StudentView) -> list[str]:
    code = view.paper_code
    values = [
        mean_of_known([block.mean_of_pairs for block in view.blocks]),
        mean_of_known([block.above_zero_of_pairs for block in view.blocks]),
        min((value for block in view.blocks for row in block.mean for value in row if value is not None), default=None),
        None if code is None else code.tokens.mean,
        None if code is None else code.with_padding.mean,
    ]
    return [fixed(value, 3) for value in values]
