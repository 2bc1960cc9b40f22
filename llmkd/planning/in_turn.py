"""How many students of a study a rank can hold, where they are trained in turn off one teacher (`study.together`), and what `auto` is."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from transformers import PreTrainedConfig

from llmkd.errors import InputError
from llmkd.evaluation.places import card_bytes
from llmkd.planning.memory import peak, plan
from llmkd.planning.placements import USABLE
from llmkd.planning.rows import GIB, Row
from llmkd.planning.run_checks import runs_at_once
from llmkd.planning.shapes import teacher_config
from llmkd.planning.teacher import PlannedTeacher
from llmkd.recipe.recipe import Recipe
from llmkd.recipe.study_entries import StudyEntry, entry_recipe, groups, study_entries
from llmkd.training.checks import check_in_turn

log = logging.getLogger("llmkd")


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


class Step(NamedTuple):
    """A student, and what a rank's device needs for it and all before it in turn."""

    name: str
    bytes: int


def costs(recipe: Recipe, ranks: int, config: PreTrainedConfig) -> list[list[Step]]:
    """What the students of the first seed take, the heaviest first; those apart that can't share a pass of the teacher."""
    entries = [entry for entry in study_entries(recipe) if entry.seed == recipe.study.seeds[0]]
    found = []
    for alike in groups(recipe.changed({"study.together": max(len(entries), 2)}), entries):
        members = sorted((member(recipe, entry, ranks, config) for entry in alike), key=lambda one: -one.alone)
        found.append([Step(one.name, needed(members[: count + 1])) for count, one in enumerate(members)])
    return found


def fitting(steps: Sequence[Step], device_bytes: float) -> int:
    """How many of these students fit in turn; 0 where not even one does."""
    return max((count for count, step in enumerate(steps, start=1) if step.bytes <= USABLE * device_bytes), default=0)


def in_turn_text(recipe: Recipe, ranks: int, config: PreTrainedConfig, device_gib: float) -> str:
    """How much the students of a seed take, one after another and up to all in turn; nothing where no two can share a pass."""
    if not recipe.study.students or (recipe.rollouts is not None and recipe.rollouts.during_training):
        return ""
    largest = max(costs(recipe, ranks, config), key=len)
    if len(largest) < 2:
        return ""
    most = fitting(largest, device_gib * GIB)
    lines = ["study.together  run needs   (GiB per rank, the heaviest students first)"]
    for count, step in enumerate(largest, start=1):
        mark = "*" if count == most else " "
        lines.append(f"{mark} {count:>12}  {step.bytes / GIB:9.3f}   {'' if count == 1 else '+ '}{step.name}")
    room = f"a device of {device_gib:g} GiB, a tenth left free"
    lines.append(f"* the most that fit {room}" if most else f"not even one fits {room}")
    return "\n".join(lines)


def settled(recipe: Recipe, ranks: int) -> Recipe:
    """The recipe with a number for `study.together: auto`: the most students in turn that fit this machine, by the plan.

    A number that the recipe gives stays; the log says where so many do not fit by the plan.
    """
    asked = recipe.study.together
    if asked == 1 or not recipe.study.students:
        return recipe
    if asked == "auto" and (why := _apart(recipe)) is not None:
        log.info("study.together: auto is 1: %s", why)
        return recipe.changed({"study.together": 1})
    room = device_bytes(runs_at_once(recipe, ranks) * ranks)
    found = costs(recipe, ranks, teacher_config(recipe))
    most = [max(fitting(steps, room), 1) for steps in found]
    heavy = [fits for fits, steps in zip(most, found, strict=True) if fits < len(steps)]
    if asked == "auto":
        count = min(heavy, default=max(map(len, found)))
        log.info(
            "study.together: auto is %d: so many fit %.3g GiB a rank, as llmkd plan counts them", count, room / GIB
        )
        return recipe.changed({"study.together": count})
    if heavy and min(heavy) < asked:
        log.warning(
            "study.together: %d students in turn take more than the %.3g GiB that a rank has, as llmkd plan counts them; %d fit; a study "
            "that runs out of memory goes on by the same command with --set study.together=auto",
            asked, room / GIB, min(heavy),
        )  # fmt: skip
    return recipe


def _apart(recipe: Recipe) -> str | None:
    """Why no two students of a recipe can be trained in turn; None where nothing stands against it."""
    try:
        check_in_turn({"one": recipe, "another": recipe})
    except InputError as error:
        return str(error)
    return None


def device_bytes(ranks: int) -> float:
    """The memory that a rank has: the smallest GPU's, or without GPUs a share of the machine's among so many ranks."""
    return card_bytes() or os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / ranks
