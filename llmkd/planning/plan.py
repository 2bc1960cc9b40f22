"""All that `llmkd plan` prints."""

from __future__ import annotations

from llmkd.planning import memory
from llmkd.planning.in_turn import in_turn_text
from llmkd.planning.placements import compare, placements_text, stages_text
from llmkd.planning.rollouts import engines_text
from llmkd.planning.rows import GIB
from llmkd.planning.shapes import initial_student_config, shapes, teacher_config
from llmkd.provenance import card_bytes
from llmkd.recipe.recipe import Recipe

USUAL_GIB = 80.0
"""Of a GPU's memory, where there is none to ask."""


def whole_plan(recipe: Recipe, ranks: int, device_gib: float | None = None) -> str:
    """The memory that a run needs on each rank, other placements, and how many students fit, as text.

    `device_gib`: the memory of a GPU; default: this machine's smallest, and without any `USUAL_GIB`.
    """
    if device_gib is None:
        card = card_bytes()
        device_gib = USUAL_GIB if card is None else round(card / GIB, 1)
    teacher = teacher_config(recipe)
    planned, student = memory.plan(recipe, ranks, teacher), shapes(initial_student_config(recipe, teacher))
    parts = [
        memory.plan_text(planned, memory.planned_wire(recipe, ranks, teacher)),
        engines_text(recipe, student, shapes(teacher), planned, device_gib),
    ]
    if recipe.logits or (recipe.loss.hidden and recipe.matching.strategy != "none"):
        if recipe.teacher.placed.is_staged:
            parts.append(stages_text(recipe, ranks, teacher))
        parts.append(placements_text(compare(recipe, ranks, teacher), device_gib))
    parts.append(in_turn_text(recipe, ranks, teacher, device_gib))
    return "\n\n".join(part for part in parts if part)
