"""How many students of a study a rank can hold, where they are trained in turn off one teacher (`study.together`), and what `auto` is."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from transformers import PreTrainedConfig

from llmkd.errors import InputError
from llmkd.planning.memory import peak, plan
from llmkd.planning.placements import USABLE
from llmkd.planning.rows import GIB, WAITING, Place, Row
from llmkd.planning.run_checks import runs_at_once
from llmkd.planning.shapes import teacher_config
from llmkd.planning.teacher import PlannedTeacher
from llmkd.provenance import card_bytes
from llmkd.recipe.recipe import Recipe
from llmkd.recipe.study_entries import StudyEntry, entry_recipe, groups, study_entries
from llmkd.training.checks import check_in_turn

log = logging.getLogger("llmkd")


@dataclass(frozen=True)
class Member:
    """What one student takes of a rank."""

    name: str
    alone: int
    """Bytes of the device that its run takes by itself, the teacher included."""
    at_work: int
    """The same where the teacher's signals stay there until the next student has had its turn."""
    held: int
    """Bytes of the device that it holds also while others have their turn: weights, gradients, the optimizer's states."""
    host: int
    """Bytes of the machine's memory that it holds all the time: what is offloaded there."""
    teacher: int
    """Bytes of the teacher's weights that it needs."""
    blocks: frozenset[int]
    """The teacher's blocks whose states it takes."""
    state: int
    """Bytes of a state [B, T, H]."""


class Needed(NamedTuple):
    """Bytes of a rank's device, and of the machine's memory beside it."""

    device: int
    host: int


class Step(NamedTuple):
    """A student, and what a rank needs for it and all before it in turn."""

    name: str
    needed: Needed


def member(recipe: Recipe, entry: StudyEntry, ranks: int, config: PreTrainedConfig) -> Member:
    """One student of a study. `config`: the teacher's."""
    own = entry_recipe(recipe, entry)
    planned, rows = PlannedTeacher(own, config, ranks), plan(own, ranks, config)
    teacher = sum(row.bytes for row in rows if _always(row, "device") and row.part == "teacher weights")
    held = sum(row.bytes for row in rows if _always(row, "device")) - teacher
    host = sum(row.bytes for row in rows if _always(row, "host"))
    staying = [replace(row, phases=("always",)) if row.phases == WAITING else row for row in rows]
    if not own.teacher.placed.has_weights:  # each reads the cache by itself
        held, teacher, staying = held + teacher, 0, rows
    state = planned.tokens * config.hidden_size * planned.size
    alone, at_work = peak(rows)[0], peak(staying)[0]
    return Member(entry.name, alone, at_work, held, host, teacher, frozenset(planned.blocks), state)


def _always(row: Row, place: Place) -> bool:
    return row.place == place and "always" in row.phases


def needed(members: Sequence[Member]) -> Needed:
    """What a rank needs for these students in turn: the heaviest at work, what the others hold, and the states of all."""
    if len(members) == 1:
        return Needed(members[0].alone, members[0].host)
    heaviest = max(members, key=lambda one: one.at_work)
    others = sum(one.held for one in members) - heaviest.held
    teacher = max(one.teacher for one in members) - heaviest.teacher
    states = len(frozenset().union(*(one.blocks for one in members))) - len(heaviest.blocks)
    device = heaviest.at_work + others + teacher + states * heaviest.state
    return Needed(device, sum(one.host for one in members))


def costs(recipe: Recipe, ranks: int, config: PreTrainedConfig) -> list[list[Step]]:
    """What the students of the first seed take, the heaviest first; those apart that can't share a pass of the teacher."""
    entries = [entry for entry in study_entries(recipe) if entry.seed == recipe.study.seeds[0]]
    found = []
    for alike in groups(recipe.changed({"study.together": max(len(entries), 2)}), entries):
        members = sorted((member(recipe, entry, ranks, config) for entry in alike), key=lambda one: -one.alone)
        found.append([Step(one.name, needed(members[: count + 1])) for count, one in enumerate(members)])
    return found


def fitting(steps: Sequence[Step], room: Needed) -> int:
    """How many of these students fit in turn, with a tenth left free; 0 where not even one does."""
    fit = (
        count
        for count, (_, has) in enumerate(steps, start=1)
        if has.device <= USABLE * room.device and has.host <= USABLE * room.host
    )
    return max(fit, default=0)


def in_turn_text(recipe: Recipe, ranks: int, config: PreTrainedConfig, device_gib: float) -> str:
    """How much the students of a seed take, one after another and up to all in turn; nothing where no two can share a pass."""
    if not recipe.study.students or (recipe.rollouts is not None and recipe.rollouts.during_training):
        return ""
    largest = max(costs(recipe, ranks, config), key=len)
    if len(largest) < 2:
        return ""
    most = fitting(largest, Needed(round(device_gib * GIB), sys.maxsize))
    offloads = any(step.needed.host for step in largest)
    lines = ["study.together  run needs   (GiB per rank, the heaviest students first)"]
    for count, (name, has) in enumerate(largest, start=1):
        mark = "*" if count == most else " "
        host = f" + {has.host / GIB:.3f} of the host" if offloads else ""
        lines.append(f"{mark} {count:>12}  {has.device / GIB:9.3f}{host}   {'' if count == 1 else '+ '}{name}")
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
    found = costs(recipe, ranks, teacher_config(recipe))
    count = _most(found, runs_at_once(recipe, ranks) * ranks)
    if asked == "auto":
        log.info("study.together: auto is %d: so many fit, as llmkd plan counts them", count)
        return recipe.changed({"study.together": count})
    if min(asked, max(map(len, found))) > count:
        message = "study.together: as llmkd plan counts them, %d students in turn fit this machine, and the recipe asks for %d; a study "
        message += "that runs out of memory goes on by the same command with --set study.together=%d"
        log.warning(message, count, asked, count)
    return recipe


def _apart(recipe: Recipe) -> str | None:
    """Why no two students of a recipe can be trained in turn; None where nothing stands against it."""
    try:
        check_in_turn({"one": recipe, "another": recipe})
    except InputError as error:
        return str(error)
    return None


def _most(found: Sequence[Sequence[Step]], ranks: int) -> int:
    """How many students in turn fit each of so many ranks of this machine, whichever students of those that share a pass they are."""
    share = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // ranks
    if (card := card_bytes()) is None:  # all is in the machine's memory
        found = [[Step(name, Needed(sum(has), 0)) for name, has in steps] for steps in found]
    fits = [max(fitting(steps, Needed(card or share, share)), 1) for steps in found]
    return min(
        (most for most, steps in zip(fits, found, strict=True) if most < len(steps)), default=max(map(len, found))
    )
