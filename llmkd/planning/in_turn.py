"""How many students of a study a rank can hold, where they are trained in turn off one teacher (`study.together`)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from transformers import PreTrainedConfig

from llmkd.planning.memory import peak, plan
from llmkd.planning.placements import USABLE
from llmkd.planning.rows import GIB, Row
from llmkd.planning.teacher import PlannedTeacher
from llmkd.recipe.recipe import Recipe
from llmkd.recipe.study_entries import StudyEntry, entry_recipe, groups, study_entries


@dataclass(frozen=True)
class Member:
    """What one student takes of a rank's device."""

    name: str
    alone: int
    """Bytes of the whole run, its teacher included."""
    held: int
    """Bytes that it holds also while others have their turn: weights, gradients, the optimizer's states."""
    teacher: int
    """Bytes of the teacher's weights that it needs."""
    blocks: frozenset[int]
    """The teacher's blocks whose states it takes."""
    state: int
    """Bytes of a state [B, T, H]."""


def member(recipe: Recipe, entry: StudyEntry, ranks: int, config: PreTrainedConfig) -> Member:
    """One student of a study. `config`: the teacher's."""
    own = entry_recipe(recipe, entry)
    planned, rows = PlannedTeacher(own, config, ranks), plan(own, ranks, config)
    teacher = sum(row.bytes for row in rows if _always(row) and row.part == "teacher weights")
    held = sum(row.bytes for row in rows if _always(row)) - teacher
    if not own.teacher.placed.has_weights:  # each reads the cache by itself
        held, teacher = held + teacher, 0
    state = planned.tokens * config.hidden_size * planned.size
    return Member(entry.name, peak(rows)[0], held, teacher, frozenset(planned.blocks), state)


def _always(row: Row) -> bool:
    return row.place == "device" and "always" in row.phases


def needed(members: Sequence[Member]) -> int:
    """Bytes of a rank's device that these students take in turn: the heaviest at work, what the others hold, and the states of all."""
    heaviest = max(members, key=lambda one: one.alone)
    others = sum(one.held for one in members) - heaviest.held
    teacher = max(one.teacher for one in members) - heaviest.teacher
    states = len(frozenset().union(*(one.blocks for one in members))) - len(heaviest.blocks)
    return heaviest.alone + others + teacher + states * heaviest.state


def in_turn_text(recipe: Recipe, ranks: int, config: PreTrainedConfig, device_gib: float) -> str:
    """How much the students of a seed take, one after another and up to all in turn; nothing where no two can share a pass."""
    if not recipe.study.students or (recipe.rollouts is not None and recipe.rollouts.during_training):
        return ""
    entries = [entry for entry in study_entries(recipe) if entry.seed == recipe.study.seeds[0]]
    whole = recipe.model_copy(update={"study": recipe.study.model_copy(update={"together": max(len(entries), 2)})})
    largest = max(groups(whole, entries), key=len)
    if len(largest) < 2:
        return ""
    members = sorted((member(recipe, entry, ranks, config) for entry in largest), key=lambda one: -one.alone)
    costs = {count: needed(members[:count]) for count in range(1, len(members) + 1)}
    fitting = [count for count, cost in costs.items() if cost <= USABLE * device_gib * GIB]
    lines = ["study.together  run needs   (GiB per rank, the heaviest students first)"]
    for count, cost in costs.items():
        mark = "*" if fitting and count == fitting[-1] else " "
        lines.append(f"{mark} {count:>12}  {cost / GIB:9.3f}   {'' if count == 1 else '+ '}{members[count - 1].name}")
    room = f"a device of {device_gib:g} GiB, a tenth left free"
    lines.append(f"* the most that fit {room}" if fitting else f"not even one fits {room}")
    return "\n".join(lines)
