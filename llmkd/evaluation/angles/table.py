"""The angles of a call's students as a table for a terminal."""

from __future__ import annotations

import textwrap
from pathlib import Path

from llmkd.errors import InputError
from llmkd.evaluation.angles.results import WHEN, AngleResult, StudentView, mean_of_known
from llmkd.text import aligned, fixed


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
