"""Where a teacher may live, compared before anything is loaded: weights per rank, bytes on the wire per step, bytes on disk.

`compare(recipe, ranks)` gives a `Cost` per placement, `placements_text` the table under `llmkd plan`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from transformers import PreTrainedConfig

from llmkd.errors import InputError
from llmkd.planning.memory import PLACED, peak, plan
from llmkd.planning.rows import GIB
from llmkd.planning.shapes import initial_student_config, teacher_config
from llmkd.planning.teacher import NODE, PlannedTeacher
from llmkd.recipe.placements import PLACEMENTS, PlacementName
from llmkd.recipe.recipe import Recipe
from llmkd.teachers.pipeline_schedule import pipeline_drawing
from llmkd.teachers.pipeline_stage import check_pipelined
from llmkd.training.pairs import pairs_of

USABLE = 0.9
"""Of a device's memory; the rest is for what a plan does not count."""


@dataclass(frozen=True)
class Cost:
    """What one placement costs each rank. `impossible`: why the recipe can't have it, where it can't."""

    placement: PlacementName
    weights: int = 0
    """Bytes of the teacher's weights that a rank holds, the heaviest where they differ."""
    wire: int = 0
    """Bytes that a rank sends (and receives) per optimizer step for the teacher, a mean over the ranks."""
    disk: int = 0
    device: int = 0
    """Bytes that the whole run needs on a rank's device."""
    note: str = ""
    impossible: str | None = None


def compare(recipe: Recipe, ranks: int, teacher: PreTrainedConfig | None = None) -> list[Cost]:
    """What each placement would cost, the simplest first, all else of the recipe unchanged."""
    config = teacher or teacher_config(recipe)
    depth = initial_student_config(recipe, config).num_hidden_layers
    pairs_of(recipe, depth, config.num_hidden_layers)  # a wrong map is refused here: it is no placement's fault
    costs = []
    for name, placement in PLACEMENTS.items():
        try:
            if placement.is_staged:
                check_pipelined(config)
            changed = _placed(recipe, name)
            rows = plan(changed, ranks, config)
        except InputError as error:
            costs.append(Cost(name, impossible=str(error)))
            continue
        weights = sum(row.bytes for row in rows if row.part == "teacher weights")
        disk = sum(row.bytes for row in rows if row.place == "disk")
        wire, note = PLACED[name].traffic(PlannedTeacher(changed, config, ranks))
        costs.append(Cost(name, weights=weights, wire=wire, disk=disk, device=peak(rows)[0], note=note))
    return costs


def _placed(recipe: Recipe, name: PlacementName) -> Recipe:
    """The recipe with its teacher elsewhere; what only another placement reads goes back to its default."""
    settings, placement = recipe.teacher, PLACEMENTS[name]
    written = not placement.has_weights  # a cache is written by a teacher of any other placement
    return recipe.changed(
        {
            "teacher.placement": name,
            "teacher.stages": settings.stages if placement.is_staged or written else None,
            "teacher.offload": settings.offload if placement.is_sharded or written else "none",
            "teacher.offload_states": settings.offload_states and not placement.is_staged,
        }
    )


def recommended(costs: Sequence[Cost], device_bytes: float) -> Cost | None:
    """Of the placements that fit, the one that sends least, the first of equals; a cache, which pays off only when it is read more than
    once, only where no other fits."""
    fitting = [c for c in costs if c.impossible is None and c.device <= USABLE * device_bytes]
    return min(fitting, key=lambda cost: (not PLACEMENTS[cost.placement].has_weights, cost.wire), default=None)


def stages_text(recipe: Recipe, ranks: int, teacher: PreTrainedConfig) -> str:
    """The stages of the recipe's pipelined teacher, cut as the run cuts it, and what each sends to whom."""
    planned = PlannedTeacher(recipe, teacher, ranks)
    shape, parts, _ = planned.pipeline()
    normed = planned.normed and shape.depth == planned.depth
    drawing = pipeline_drawing(planned.pairs, parts, final=recipe.loss.kl > 0, normed_last=normed)
    return f"the teacher's stages, on nodes of {NODE} ranks, cut by the weights of blocks and embeddings\n\n{drawing}"


def placements_text(costs: Sequence[Cost], device_gib: float) -> str:
    """The placements as a table, in GiB of one rank, the recommended one marked."""
    best = recommended(costs, device_gib * GIB)
    heading = f"{'teacher.placement':<20} {'weights':>9} {'wire/step':>10} {'disk':>9} {'run needs':>10}"
    lines = [f"{heading}   (GiB per rank)"]
    for cost in costs:
        mark = "*" if cost is best else " "
        if cost.impossible is not None:
            lines.append(f"{mark} {cost.placement:<18} not possible: {cost.impossible}")
            continue
        numbers = zip((cost.weights, cost.wire, cost.disk, cost.device), (9, 10, 9, 10), strict=True)
        cells = " ".join(f"{bytes_ / GIB:{width}.3f}" for bytes_, width in numbers)
        lines.append(f"{mark} {cost.placement:<18} {cells}   {cost.note}")
    room = f"a device of {device_gib:g} GiB, a tenth left free"
    cure = f"none fits {room}: more ranks or a smaller micro-batch would help"
    lines.append(f"* recommended: of those that fit {room}, the one that sends least" if best else cure)
    return "\n".join(lines)
