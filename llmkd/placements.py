"""Where a teacher may live, compared before anything is loaded: weights per rank, bytes on the wire per step, bytes on disk.

`compare(recipe, ranks, memory)` gives a `Cost` per placement, `placements_text` the table under `llmkd plan`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from llmkd.build import accumulation_steps, pairs_of
from llmkd.config import Recipe
from llmkd.errors import InputError
from llmkd.layer_map import Pairs
from llmkd.models import DTYPES
from llmkd.planner import GIB, Shapes, initial_student_config, peak, pipeline, plan, shapes, teacher_config
from llmkd.stages import bubble, states_per_item
from llmkd.teachers.pipeline import TOLD_BYTES
from llmkd.teachers.stage import check_pipelined

DEVICE_GIB = 80.0
USABLE = 0.9
"""Of a device's memory; the rest is for what a plan does not count."""


@dataclass(frozen=True)
class Cost:
    """What one placement asks of each rank. `impossible` says why a placement can't be had, where it can't."""

    placement: str
    weights: int
    """Bytes of the teacher's weights that a rank holds."""
    wire: int
    """Bytes that a rank sends, and receives, per optimizer step for the teacher; a mean over the ranks."""
    disk: int
    device: int
    """Bytes that the whole run needs on a rank's device."""
    note: str
    impossible: str | None = None


def compare(recipe: Recipe, ranks: int) -> list[Cost]:
    """The placements in the order they are to be preferred where they fit, all else of the recipe unchanged."""
    found = teacher_config(recipe)
    teacher, student = shapes(found), shapes(initial_student_config(recipe, found))
    pairs = pairs_of(recipe, student.depth, teacher.depth)
    steps = accumulation_steps(recipe.train, ranks)
    costs = []
    for placement in ("replicated", "pipeline", "zero3"):
        changes = {
            "teacher.placement": placement,
            "teacher.stages": recipe.teacher.stages if placement == "pipeline" else None,
            "teacher.offload": recipe.teacher.offload if placement == "zero3" else "none",
        }
        changed = recipe.changed(changes)
        try:
            if placement == "pipeline":
                check_pipelined(found)
            rows = plan(changed, ranks)
        except InputError as error:
            costs.append(Cost(placement, 0, 0, 0, 0, "", str(error)))
            continue
        weights = sum(
            row.bytes
            for row in rows
            if row.what.startswith(("teacher weights", "teacher head")) and "always" in row.phases
        )
        wire, note = _wire(changed, teacher, pairs, ranks, steps)
        costs.append(Cost(placement, weights, wire, 0, peak(rows)[0], note))
    return costs


def recommended(costs: Sequence[Cost], device_bytes: float) -> Cost | None:
    """The first placement that fits. All compute alike; those before send less, and wait less for one another."""
    return next((c for c in costs if c.impossible is None and c.device <= USABLE * device_bytes), None)


def _wire(recipe: Recipe, shape: Shapes, pairs: Pairs, ranks: int, steps: int) -> tuple[int, str]:
    """Bytes per rank and optimizer step that the teacher's placement puts on the wire, and what they are."""
    size = DTYPES[recipe.teacher.dtype].itemsize
    tokens = recipe.train.micro_batch_size * recipe.data.max_length
    if recipe.teacher.placement == "replicated":
        return 0, "each rank has the whole teacher"
    if recipe.teacher.placement == "zero3":
        return zero3_wire(shape, size, ranks, steps, logits=recipe.loss.kl > 0), "all weights, gathered per micro-batch"
    parts, sent = pipeline(recipe, shape, pairs, ranks)
    states = states_per_item(sent, len(parts))
    told = TOLD_BYTES * tokens * (len(parts) - 1)
    note = f"{states:g} states per micro-batch; idle at the run's ends alone, {bubble(len(parts), steps):.0%} of its first step"
    return round(steps * (states * tokens * shape.hidden * size + told)), note


def zero3_wire(shape: Shapes, size: int, ranks: int, steps: int, *, logits: bool) -> int:
    """Bytes that each rank receives when a ZeRO-3 teacher is gathered once per micro-batch: (N - 1) / N of every weight.

    The head is gathered apart from the backbone, by the loss; where it is tied to the embeddings, these are gathered twice.
    """
    backbone = shape.parameters - (shape.head if shape.head_apart else 0)
    gathered = backbone + (shape.head if logits else 0)
    return steps * gathered * size * (ranks - 1) // ranks


def placements_text(costs: Sequence[Cost], device_gib: float) -> str:
    """The placements as a table, in GiB of one rank, the recommended one marked."""
    best = recommended(costs, device_gib * GIB)
    lines = [
        f"{'the teacher, by placement':<26} {'weights':>9} {'wire/step':>10} {'disk':>9} {'run needs':>10}   in GiB per rank"
    ]
    for cost in costs:
        if cost.impossible is not None:
            lines.append(f"  {cost.placement:<24} {cost.impossible}")
            continue
        numbers = [cost.weights, cost.wire, cost.disk, cost.device]
        cells = " ".join(f"{n / GIB:{w}.3f}" for n, w in zip(numbers, (9, 10, 9, 10), strict=True))
        mark = "* " if cost is best else "  "
        lines.append(f"{mark}{cost.placement:<24} {cells}   {cost.note}")
    said = f"* recommended: the first that fits a device of {device_gib:g} GiB, a tenth left free"
    lines.append(
        said if best else f"none fits a device of {device_gib:g} GiB; more ranks, or smaller micro-batches, would help"
    )
    return "\n".join(lines)
