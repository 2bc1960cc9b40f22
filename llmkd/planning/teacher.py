"""What a teacher costs in each placement that runs it: the bytes on a rank, and those it sends or receives in a step."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

from transformers import PreTrainedConfig

from llmkd.layer_map import EMBEDDING, STRATEGIES, Pairs
from llmkd.models.load import DTYPES, student_config
from llmkd.planning.four_bit import whole_rows
from llmkd.planning.rows import FORWARD, OFFLOADED, WAITING, Place, Row, block_activations, millions
from llmkd.planning.shapes import Shapes, initial_student_config, shapes
from llmkd.planning.stepping_stones import stones_wire
from llmkd.recipe.recipe import Recipe
from llmkd.teachers.base import Demand
from llmkd.teachers.pipeline import ANNOUNCED_BYTES
from llmkd.teachers.pipeline_schedule import (
    PipelineCut,
    Route,
    cut_into_stages,
    routes,
    stage_count,
    states_held,
    states_per_item,
)
from llmkd.training.build import accumulation_steps
from llmkd.training.pairs import pairs_of, stones_of

NODE = 8
"""Ranks of a node, as a pipeline's stages are planned."""


@dataclass(frozen=True)
class PlannedTeacher:
    """A teacher as a recipe uses it. `config` is the whole model's."""

    recipe: Recipe
    config: PreTrainedConfig
    ranks: int

    @cached_property
    def student_depth(self) -> int:
        return initial_student_config(self.recipe, self.config).num_hidden_layers

    @cached_property
    def depth(self) -> int:
        return self.config.num_hidden_layers

    @cached_property
    def pairs(self) -> Pairs:
        return pairs_of(self.recipe, self.student_depth, self.depth)

    @property
    def blocks(self) -> tuple[int, ...]:
        """The teacher block of every pair."""
        return tuple(teacher for _, teacher in self.pairs)

    @cached_property
    def stones(self) -> Pairs:
        return stones_of(self.recipe, self.student_depth, self.depth)

    @cached_property
    def whole(self) -> Shapes:
        return shapes(self.config)

    @property
    def size(self) -> int:
        """Bytes of a number."""
        return DTYPES[self.recipe.teacher.dtype].itemsize

    @property
    def tokens(self) -> int:
        """Of a micro-batch without padding."""
        return self.recipe.train.micro_batch_size * self.recipe.data.max_length

    @property
    def rounds(self) -> int:
        """Micro-batches of a rank in an optimizer step."""
        return accumulation_steps(self.recipe.train, self.ranks)

    @property
    def normed(self) -> bool:
        return self.recipe.matching.final_state == "normed"

    def run(self, *, stages: int = 1) -> Shapes:
        """The part that is run: without logits no head, and no block after the last mapped one (a block per stage at least)."""
        logits = self.recipe.logits
        needed = max(Demand(self.blocks, logits, self.normed).first_blocks(self.depth), stages)
        shape = shapes(self.config if needed == self.depth else student_config(self.config, range(needed), {}))
        if logits:
            return shape
        own = 0 if getattr(self.config, "tie_word_embeddings", False) else shape.head
        return replace(shape, parameters=shape.parameters - own, head=0)

    def pipeline(self) -> tuple[Shapes, PipelineCut, tuple[Route, ...]]:
        """The part of a pipelined teacher that is run, its stages, and what they send, on nodes of `NODE` ranks."""
        stages = stage_count(self.recipe.teacher.stages, self.ranks, NODE, self.depth)
        shape = self.run(stages=stages)
        parts = cut_into_stages(shape.each_block, stages, embedding=shape.embedding)
        normed = self.normed and shape.depth == self.depth
        return shape, parts, routes(self.blocks, parts, final=self.recipe.loss.kl > 0, normed_last=normed)


def weight_rows(teacher: PlannedTeacher) -> list[Row]:
    """The weights of a teacher that a rank runs whole, or gathers a block ahead, and the states it hands to the student."""
    settings, size, shape = teacher.recipe.teacher, teacher.size, teacher.run()
    if settings.placed.is_sharded:
        shard = -(-shape.parameters // teacher.ranks)
        how = f"{millions(shape.parameters)} / {teacher.ranks} ranks x {size} B"
        place = OFFLOADED[settings.offload]
        rows = [Row("teacher weights, shard", shard * size, how, place=place, part="teacher weights")]
        blocks = min(shape.depth, 1 if settings.offload == "nvme" else 2)  # from a drive none is fetched ahead
        gathered = max(blocks * shape.largest_block, shape.embedding)
        which = f"{blocks} block{'s'[: blocks - 1]} (of {millions(shape.largest_block)})"
        how = f"the larger of embeddings ({millions(shape.embedding)}) and {which}, x {size} B"
        rows.append(Row("teacher, gathered", gathered * size, how, FORWARD))
        if shape.head:
            how = f"{millions(shape.head)} x {size} B"
            rows.append(Row("teacher head, gathered", shape.head * size, how, ("head",)))
    elif settings.quantize != "none":
        plain = shape.parameters - shape.linear
        rows = whole_rows("teacher", plain, shape.linear, shape.largest_map, size, FORWARD, "teacher weights")
    else:
        how = f"{millions(shape.parameters)} x {size} B"
        rows = [Row("teacher weights", shape.parameters * size, how, part="teacher weights")]
    return [*rows, _working(teacher, shape), *_state_rows(teacher, shape)]


def _working(teacher: PlannedTeacher, shape: Shapes) -> Row:
    working = block_activations(shape, teacher.size) * teacher.tokens
    return Row("teacher, one block at work", working, "as a student's block; nothing is kept", FORWARD)


def _state_rows(teacher: PlannedTeacher, shape: Shapes) -> list[Row]:
    """The states that wait for the student."""
    size, offloaded = teacher.size, teacher.recipe.teacher.offload_states
    state = teacher.tokens * shape.hidden * size
    used = set(teacher.blocks)
    rows = []
    if used:
        name = "embeddings' and " if EMBEDDING in used else ""
        mixed = STRATEGIES[teacher.recipe.matching.strategy].is_mixed
        until = "all held to the last student block, which mixes them too" if mixed else "let go pair by pair"
        how = f"{name}{len(used - {EMBEDDING})} blocks' states [B, T, H] x {size} B; {until}"
        place: Place = "host" if offloaded else "device"
        rows.append(Row("teacher states", len(used) * state, how, WAITING, place))
        if offloaded:
            rows.append(Row("teacher states, back", 2 * state, "the state in use and the next", WAITING))
    if shape.head:
        rows.append(Row("teacher final state", state, f"[B, T, H] x {size} B", WAITING))
    return rows


def pipeline_rows(teacher: PlannedTeacher) -> list[Row]:
    """What the heaviest stage of a pipelined teacher holds, the head that every rank has, and the states that come and go."""
    shape, parts, sent = teacher.pipeline()
    size, logits = teacher.size, teacher.recipe.loss.kl > 0
    held = [sum(shape.each_block[block] for block in part) for part in parts]
    held[0] += shape.embedding
    norm = shape.hidden  # of the last stage
    held[-1] += norm
    heaviest = max(range(len(parts)), key=lambda stage: held[stage])
    part = parts[heaviest]
    what = f"blocks {part.start}-{part.stop - 1}" + (" and the embeddings" if heaviest == 0 else "")
    how = f"heaviest of {len(parts)} stages, {what}: {millions(held[heaviest])} x {size} B"
    rows = [Row("teacher weights, stage", held[heaviest] * size, how, part="teacher weights")]
    if logits:
        how = f"{millions(shape.head)} x {size} B: the loss is where the student is, so every rank has it whole"
        rows.append(Row("teacher head", shape.head * size, how, part="teacher weights"))
    rows.append(_working(teacher, shape))
    state = teacher.tokens * shape.hidden * size
    count, own = states_held(sent, parts), len(sent)
    early = max(sum(r.stage + member <= len(parts) - 2 for r in sent) for member in range(len(parts)))
    how = f"{own} of this micro-batch and up to {early} of the next, [B, T, H] x {size} B"
    rows.append(Row("teacher states", (own + early) * state, how, WAITING))
    if in_flight := count - own - early:
        how = f"up to {in_flight} states that enter or leave the stage"
        rows.append(Row("teacher states, under way", in_flight * state, how, WAITING))
    return rows


def no_traffic(teacher: PlannedTeacher) -> tuple[int, str]:
    """A whole teacher sends nothing."""
    return 0, "each rank has the whole teacher"


def sharded_traffic(teacher: PlannedTeacher) -> tuple[int, str]:
    """A ZeRO-3 teacher is gathered for every micro-batch, its upper blocks again for the stepping stones."""
    shape = teacher.run()
    stones = stones_wire(teacher.recipe, shape, teacher.stones, teacher.ranks) if teacher.stones else 0
    note = "all weights, for each micro-batch" + (", and the upper blocks for each stone" if teacher.stones else "")
    return teacher.rounds * (gathered_bytes(shape, teacher.size, teacher.ranks) + stones), note


def gathered_bytes(shape: Shapes, size: int, ranks: int) -> int:
    """Bytes that each rank receives when a ZeRO-3 teacher is gathered for one micro-batch: (N - 1) / N of every weight.

    The head is gathered apart from the backbone, by the loss; where it is tied to the embeddings, these are gathered twice.
    """
    gathered = shape.parameters + (0 if shape.head_apart else shape.head)
    return gathered * size * (ranks - 1) // ranks


def pipeline_traffic(teacher: PlannedTeacher) -> tuple[int, str]:
    """States from stage to stage and to the micro-batch's owner, and the inputs that every member gets."""
    shape, parts, sent = teacher.pipeline()
    states = states_per_item(sent, len(parts))
    announced = ANNOUNCED_BYTES * (len(parts) - 1)
    note = f"{states:g} states per micro-batch, {len(parts)} stages"
    return round(teacher.rounds * teacher.tokens * (states * shape.hidden * teacher.size + announced)), note
