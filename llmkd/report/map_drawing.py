"""A layer map in plain text: a table of its pairs, and a picture."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

from llmkd.errors import InputError
from llmkd.layer_map import RULES, STRATEGIES, Pairs, check_read, is_trained, layer_map, needs_states
from llmkd.teachers.pipeline_schedule import cut_into_stages, pipeline_drawing

CONVENTION = "block i = output of block i, hidden_states[i+1] in HF's count"
MAX_WIDTH = 100
"""Columns of a drawing."""


def table(pairs: Pairs, student_blocks: int, teacher_blocks: int) -> str:
    """The pairs as an aligned text table. The depth of block i of L is (i+1)/L: the share of the blocks passed."""
    assert all(0 <= s < student_blocks and 0 <= t < teacher_blocks for s, t in pairs), pairs
    headings = ("student block", "teacher block", "student depth", "teacher depth")
    rows = [(str(s), str(t), f"{(s + 1) / student_blocks:.2f}", f"{(t + 1) / teacher_blocks:.2f}") for s, t in pairs]
    lines = [CONVENTION, "", " | ".join(headings), "-|-".join("-" * len(heading) for heading in headings)]
    lines += [" | ".join(cell.rjust(len(heading)) for cell, heading in zip(row, headings, strict=True)) for row in rows]
    return "\n".join(lines if pairs else [*lines, "(no pair)"])


def drawing(pairs: Pairs, student_blocks: int, teacher_blocks: int) -> str:
    """The map as a picture: a row per student block, a column per teacher block, # where they are paired.

    forward falls, reverse rises, all_to_one is a wall. Plain ASCII, at most `MAX_WIDTH` columns: two characters to a
    teacher block while they fit, then one, then several blocks to a column (as a line above the picture says).
    """
    assert all(0 <= s < student_blocks and 0 <= t < teacher_blocks for s, t in pairs), pairs
    targets = {j: sorted(t for s, t in pairs if s == j) for j in range(student_blocks)}
    labels = {j: _label(j, blocks, student_blocks, teacher_blocks) for j, blocks in targets.items()}
    margin = max(len(label) for label in labels.values()) + 2
    width = MAX_WIDTH - margin - len(str(teacher_blocks))  # the last number may stand on the last column
    step = 2 if 2 * teacher_blocks <= width else 1  # characters from one column to the next
    per_column = -(-teacher_blocks // width)
    columns = -(-teacher_blocks // per_column)

    lines = [CONVENTION, _caption(pairs, student_blocks, teacher_blocks)]
    if per_column > 1:
        lines.append(f"one column stands for {per_column} teacher blocks")
    numbers, ticks = " " * margin, " " * margin
    for column in range(0, columns, 10 // step):
        numbers = numbers.ljust(margin + column * step) + str(column * per_column)
        ticks = ticks.ljust(margin + column * step) + "|"
    lines += ["", "student <- teacher", numbers, ticks]
    for j, blocks in targets.items():
        marked = {t // per_column for t in blocks}
        cells = (" " * (step - 1)).join("#" if column in marked else "." for column in range(columns))
        lines.append(labels[j].ljust(margin) + cells)
    return "\n".join(lines)


def _label(student_block: int, targets: Sequence[int], student_blocks: int, teacher_blocks: int) -> str:
    student = str(student_block).rjust(len(str(student_blocks - 1)) + 2)
    if not targets:
        return student
    digits = len(str(teacher_blocks - 1))
    shown = [str(t).rjust(digits) for t in targets[:3]]
    return f"{student} <- {', '.join(shown)}" + (f", +{len(targets) - 3}" if len(targets) > 3 else "")


def _caption(pairs: Pairs, student_blocks: int, teacher_blocks: int) -> str:
    if not pairs:
        return f"no pair between {student_blocks} student and {teacher_blocks} teacher blocks"
    students, teachers = len({s for s, _ in pairs}), len({t for _, t in pairs})
    learn = f"{students} of {student_blocks} student blocks learn from {teachers} of {teacher_blocks} teacher blocks"
    return f"{learn}; # is a pair"


def maps_text(
    strategies: Sequence[str],
    student_blocks: int,
    teacher_blocks: int,
    *,
    seed: int,
    options: Mapping[str, Any],
    stages: int | None,
) -> str:
    """The maps of some strategies (none: of all, or of `explicit` where pairs are given) with their pictures; with `stages`, what the
    stages of a pipelined teacher send. Raises InputError for an option that none of them reads, and for more stages than blocks."""
    if stages is not None and stages > teacher_blocks:
        raise InputError(f"--stages {stages}: each needs a block; write at most {teacher_blocks}, the teacher's blocks")
    rules = [name for name in RULES if STRATEGIES[name].least_student_blocks <= student_blocks]
    names = strategies or (["explicit"] if "pairs" in options else [*rules, "nearest", "learned"])
    check_read(names, options)
    parts = []
    for name in names:
        if STRATEGIES[name].is_measured:
            parts += [needs_states(name), ""]
            continue
        if STRATEGIES[name].is_mixed:
            parts += [textwrap.fill(is_trained(name), MAX_WIDTH), ""]
            continue
        own = {key: value for key, value in options.items() if key in STRATEGIES[name].options}
        pairs = layer_map(name, student_blocks, teacher_blocks, seed=seed, **own)
        parts += [f"{name}: {student_blocks} student blocks, {teacher_blocks} teacher blocks", ""]
        if stages is None:
            picture = drawing(pairs, student_blocks, teacher_blocks).removeprefix(f"{CONVENTION}\n")
            parts += [table(pairs, student_blocks, teacher_blocks), "", picture, ""]
        else:
            cut = cut_into_stages([1] * teacher_blocks, stages)
            note = "blocks of equal cost; embeddings not counted; llmkd plan draws a recipe's own cut"
            parts += [pipeline_drawing(pairs, cut), note, ""]
    return "\n".join(parts)
