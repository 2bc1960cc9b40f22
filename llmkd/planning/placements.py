"""Where a teacher may live, compared before anything is loaded: weights per rank, bytes on the wire per step, bytes on disk.

`compare(recipe, ranks)` gives a `Cost` per placement, `placements_text` the table under `llmkd plan`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from transformers import PreTrainedConfig

from llmkd.errors import InputError
from llmkd.layer_map import Pairs
from llmkd.models.load import DTYPES
from llmkd.planning.memory import NODE, peak, pipeline, plan, run_shapes
from llmkd.planning.rows import GIB
from llmkd.planning.shapes import Shapes, initial_student_config, teacher_config
from llmkd.planning.stepping_stones import stones_wire
from llmkd.recipe.recipe import Recipe
from llmkd.teachers.pipeline import TOLD_BYTES
from llmkd.teachers.pipeline_schedule import drawing, states_per_item
from llmkd.teachers.pipeline_stage import check_pipelined
from llmkd.training.build import accumulation_steps
from llmkd.training.pairs import pairs_of, stones_of

USABLE = 0.9
"""Of a device's memory; the rest is for what a plan does not count."""


@dataclass(frozen=True)
class Cost:
    """What one placement asks of each rank. `impossible` says why a placement can't be had, where it can't."""

    placement: str
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
    pairs = pairs_of(recipe, depth, config.num_hidden_layers)
    costs = []
    for placement in ("replicated", "pipeline", "zero3", "cache"):
        try:
            if placement == "pipeline":
                check_pipelined(config)
            changed = _placed(recipe, placement)
            rows = plan(changed, ranks, config)
        except InputError as error:
            costs.append(Cost(placement, impossible=str(error)))
            continue
        kept = [row for row in rows if row.what.startswith("teacher") and "always" in row.phases]
        held = sum(row.bytes for row in kept if row.place != "disk" and "states" not in row.what)
        disk = sum(row.bytes for row in kept if row.place == "disk")
        wire, note = _wire(changed, config, pairs, ranks)
        costs.append(Cost(placement, weights=held, wire=wire, disk=disk, device=peak(rows)[0], note=note))
    return costs


def _placed(recipe: Recipe, placement: str) -> Recipe:
    """The recipe with its teacher elsewhere; what only another placement reads goes back to its default."""
    settings = recipe.teacher
    return recipe.changed(
        {
            "teacher.placement": placement,
            "teacher.stages": settings.stages if placement in ("pipeline", "cache") else None,
            "teacher.offload": settings.offload if placement in ("zero3", "cache") else "none",
            "teacher.offload_states": settings.offload_states and placement != "pipeline",
        }
    )


def recommended(costs: Sequence[Cost], device_bytes: float) -> Cost | None:
    """Of the placements that fit, the one that sends least, the first of equals. A cache, which has to be written first and to be read
    more than once, is for where no other fits."""
    fitting = [c for c in costs if c.impossible is None and c.device <= USABLE * device_bytes]
    return min(fitting, key=lambda cost: (cost.placement == "cache", cost.wire), default=None)


def _wire(recipe: Recipe, config: PreTrainedConfig, pairs: Pairs, ranks: int) -> tuple[int, str]:
    """Bytes per rank and optimizer step that the teacher's placement puts on the wire, and what they are."""
    rounds = accumulation_steps(recipe.train, ranks)
    size = DTYPES[recipe.teacher.dtype].itemsize
    if recipe.teacher.placement == "replicated":
        return 0, "each rank has the whole teacher"
    if recipe.teacher.placement == "cache":
        return 0, f"worth its disk where rows are seen more than once; here {_times(recipe)}"
    if recipe.teacher.placement == "zero3":
        shape = run_shapes(recipe, config, pairs)
        stones = stones_of(recipe, initial_student_config(recipe, config).num_hidden_layers, config.num_hidden_layers)
        more = stones_wire(recipe, shape, stones, ranks) if stones else 0
        note = "all weights, for each micro-batch" + (", and the upper blocks for each stone" if stones else "")
        return rounds * (zero3_wire(shape, size, ranks) + more), note
    shape, parts, sent = pipeline(recipe, config, pairs, ranks)
    states = states_per_item(sent, len(parts))
    tokens = recipe.train.micro_batch_size * recipe.data.max_length
    told = TOLD_BYTES * (len(parts) - 1)
    note = f"{states:g} states per micro-batch, {len(parts)} stages"
    return round(rounds * tokens * (states * shape.hidden * size + told)), note


def _times(recipe: Recipe) -> str:
    """How often a row is seen by all the students of the recipe's study."""
    students = max(1, len(recipe.study.students) * len(recipe.study.seeds))
    train, rows = recipe.train, recipe.data.rows
    epochs = (
        train.epochs if train.epochs is not None else (train.steps or 0) * train.batch_size / rows if rows else None
    )
    times = "" if epochs is None else f"{epochs:.3g} epochs x "
    return f"{times}{students} {'student' if students == 1 else 'students'}"


def stages_text(recipe: Recipe, ranks: int, teacher: PreTrainedConfig) -> str:
    """The stages of the recipe's pipelined teacher, cut as the run cuts it, and what each sends to whom."""
    depth = initial_student_config(recipe, teacher).num_hidden_layers
    pairs = pairs_of(recipe, depth, teacher.num_hidden_layers)
    shape, parts, _ = pipeline(recipe, teacher, pairs, ranks)
    normed = recipe.matching.final_state == "normed" and shape.depth == teacher.num_hidden_layers
    drawn = drawing(pairs, parts, final=recipe.loss.kl > 0, normed_last=normed)
    return f"the teacher's stages, on nodes of {NODE} ranks, cut by the weights of blocks and embeddings\n\n{drawn}"


def zero3_wire(shape: Shapes, size: int, ranks: int) -> int:
    """Bytes that each rank receives when a ZeRO-3 teacher is gathered for one micro-batch: (N - 1) / N of every weight.

    The head is gathered apart from the backbone, by the loss; where it is tied to the embeddings, these are gathered twice.
    """
    gathered = shape.parameters + (0 if shape.head_apart else shape.head)
    return gathered * size * (ranks - 1) // ranks


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
