"""Bytes per rank of a training run, before anything is loaded: a pure function of shapes, precision, ZeRO stage and placement.

`plan(recipe, ranks)` gives the rows, `plan_text(rows)` the table that `llmkd plan RECIPE --ranks N` prints. Shapes come from models
built on the meta device, so nothing but a `config.json` is read. Rows that live at one time only carry the phase of the step they
live in; a rank needs what is held always, plus the heaviest phase. Not counted: the CUDA context, NCCL's buffers, the allocator's
fragments, flash attention's own workspace; leave a tenth of the device free for them.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from transformers import PreTrainedConfig

from llmkd.distributed.engines import load_ds_config, zero_stage
from llmkd.files import ROOT
from llmkd.layer_map import EMBEDDING
from llmkd.losses.chunked_head import BUFFERS, rows_at_once
from llmkd.losses.distance_sum import terms_of
from llmkd.models.load import DTYPES, student_config
from llmkd.planning.rows import GIB, PHASES, WIDE, Phase, Place, Row, block_activations
from llmkd.planning.shapes import Shapes, initial_student_config, shapes, teacher_config
from llmkd.recipe.recipe import Recipe
from llmkd.teachers.base import blocks_needed
from llmkd.teachers.pipeline_schedule import Cut, Route, cut, routes, stage_count, states_held
from llmkd.training.build import accumulation_steps
from llmkd.training.pairs import pairs_of, stones_of

log = logging.getLogger("llmkd")
NODE = 8
"""Ranks of a node, as a pipeline's stages are planned."""
SET_COPIES = 16
"""Tensors of [tokens, H] that a set-level distance holds at its peak, its gradient included; its SVD's are counted in."""
MIX_COPIES = 3
"""More of them where several are summed: the sum of their gradients, and the rows' own graph, which waits for the next."""


def plan(recipe: Recipe, ranks: int, config: PreTrainedConfig | None = None) -> list[Row]:
    """What each of `ranks` ranks holds while it distils this recipe's student. `config`: the teacher's, where it is known.

    Raises InputError where the batch can't be shared by the ranks, or where the teacher's shape can't be read.
    """
    accumulation_steps(recipe.train, ranks)
    found = config or teacher_config(recipe)
    teacher, student = shapes(found), shapes(initial_student_config(recipe, found))
    pairs = pairs_of(recipe, student.depth, teacher.depth)
    projectors = projected_parameters(recipe, student, teacher, pairs)
    stones = stones_of(recipe, student.depth, teacher.depth)
    projectors += len(stones) * student.hidden * teacher.hidden
    zero = load_ds_config(recipe.train.deepspeed, ROOT / "ds_configs")
    taught = bool(pairs) or recipe.logits
    of_teacher: list[Row] = []
    if taught and recipe.teacher.placement == "cache":
        from llmkd.planning.cache import cache_rows

        of_teacher = cache_rows(recipe, teacher, student.depth, pairs)
    elif taught and recipe.teacher.placement == "pipeline":
        of_teacher = pipeline_rows(recipe, *pipeline(recipe, found, pairs, ranks))
    elif taught:
        of_teacher = teacher_rows(recipe, run_shapes(recipe, found, pairs), pairs, ranks)
    if stones:
        from llmkd.planning.stepping_stones import stone_rows

        of_teacher = [*of_teacher, *stone_rows(recipe, teacher, stones)]
    return [
        *of_teacher,
        *student_rows(recipe, student, projectors, zero, ranks),
        *activation_rows(recipe, student, teacher, pairs, ranks),
        *head_rows(recipe, student, teacher),
    ]


def run_shapes(
    recipe: Recipe, config: PreTrainedConfig, pairs: Sequence[tuple[int, int]], *, stages: int = 1
) -> Shapes:
    """The part of the teacher that is run: without logits no head, and no block after the last mapped one (a block per stage at least)."""
    logits, depth = recipe.logits, config.num_hidden_layers
    normed = recipe.matching.final_state == "normed"
    needed = max(blocks_needed([block for _, block in pairs], depth, logits=logits, normed_last=normed), stages)
    found = shapes(config if needed == depth else student_config(config, range(needed), {}))
    if logits:
        return found
    own = 0 if getattr(config, "tie_word_embeddings", False) else found.head
    return replace(found, parameters=found.parameters - own, head=0)


def teacher_rows(recipe: Recipe, shape: Shapes, pairs: Sequence[tuple[int, int]], ranks: int) -> list[Row]:
    """The teacher's weights where they live, what is gathered of them, and the states it hands to the student."""
    settings = recipe.teacher
    size = DTYPES[settings.dtype].itemsize
    tokens = recipe.train.micro_batch_size * recipe.data.max_length
    state = tokens * shape.hidden * size
    used = {block for _, block in pairs}
    rows = []
    if settings.placement == "replicated":
        how = f"{_m(shape.parameters)} x {size} B"
        rows.append(Row("teacher weights", shape.parameters * size, "device", ("always",), how))
    else:
        places: dict[str, Place] = {"none": "device", "cpu": "host", "nvme": "nvme"}
        place = places[settings.offload]
        shard = -(-shape.parameters // ranks)
        how = f"{_m(shape.parameters)} / {ranks} ranks x {size} B"
        rows.append(Row("teacher weights, shard", shard * size, place, ("always",), how))
        how = f"the larger of embeddings ({_m(shape.embedding)}) and one block ({_m(shape.largest_block)}), x {size} B"
        gathered = max(shape.largest_block, shape.embedding)
        rows.append(Row("teacher, gathered", gathered * size, "device", ("teacher forward",), how))
        if shape.head:
            how = f"{_m(shape.head)} x {size} B"
            rows.append(Row("teacher head, gathered", shape.head * size, "device", ("head",), how))
    working = block_activations(shape, size) * tokens
    how = "as a student's block; nothing is kept"
    rows.append(Row("teacher, one block at work", working, "device", ("teacher forward",), how))
    if used:
        name = "embeddings' and " if EMBEDDING in used else ""
        how = f"{name}{len(used - {EMBEDDING})} blocks' states [B, T, H] x {size} B; let go pair by pair"
        waiting: Place = "host" if settings.offload_states else "device"
        rows.append(Row("teacher states", len(used) * state, waiting, ("teacher forward", "head"), how))
        if settings.offload_states:
            how = "the state in use and the next"
            rows.append(Row("teacher states, back", 2 * state, "device", ("teacher forward", "head"), how))
    if shape.head:
        rows.append(Row("teacher final state", state, "device", ("teacher forward", "head"), f"[B, T, H] x {size} B"))
    return rows


def pipeline(
    recipe: Recipe, config: PreTrainedConfig, pairs: Sequence[tuple[int, int]], ranks: int
) -> tuple[Shapes, Cut, tuple[Route, ...]]:
    """The part of a pipelined teacher that is run, its stages, and what they send, on nodes of `NODE` ranks."""
    stages = stage_count(recipe.teacher.stages, ranks, NODE, config.num_hidden_layers)
    shape = run_shapes(recipe, config, pairs, stages=stages)
    parts = cut(shape.each_block, stages, embedding=shape.embedding)
    normed = recipe.matching.final_state == "normed" and shape.depth == config.num_hidden_layers
    return shape, parts, routes(tuple(pairs), parts, final=recipe.loss.kl > 0, normed_last=normed)


def pipeline_rows(recipe: Recipe, shape: Shapes, parts: Cut, sent: Sequence[Route]) -> list[Row]:
    """What the heaviest stage of a pipelined teacher holds, the head that every rank has, and the states that come and go."""
    size = DTYPES[recipe.teacher.dtype].itemsize
    tokens = recipe.train.micro_batch_size * recipe.data.max_length
    held = [sum(shape.each_block[block] for block in part) for part in parts]
    held[0] += shape.embedding
    norm = shape.hidden  # of the last stage
    held[-1] += norm
    heaviest = max(range(len(parts)), key=lambda stage: held[stage])
    part = parts[heaviest]
    what = f"blocks {part.start}-{part.stop - 1}" + (" and the embeddings" if heaviest == 0 else "")
    how = f"heaviest of {len(parts)} stages, {what}: {_m(held[heaviest])} x {size} B"
    rows = [Row("teacher weights, stage", held[heaviest] * size, "device", ("always",), how)]
    if recipe.loss.kl > 0:
        how = f"{_m(shape.head)} x {size} B: the loss is where the student is, so every rank has it whole"
        rows.append(Row("teacher head", shape.head * size, "device", ("always",), how))
    working = block_activations(shape, size) * tokens
    how = "as a student's block; nothing is kept"
    rows.append(Row("teacher, one block at work", working, "device", ("teacher forward",), how))
    count, own = states_held(sent, parts), len(sent)
    early = max(sum(r.stage + member <= len(parts) - 2 for r in sent) for member in range(len(parts)))
    how = f"{own} of this micro-batch and up to {early} of the next, [B, T, H] x {size} B"
    state = tokens * shape.hidden * size
    rows.append(Row("teacher states", (own + early) * state, "device", ("teacher forward", "head"), how))
    if in_flight := count - own - early:
        how = f"up to {in_flight} states that enter or leave the stage"
        rows.append(Row("teacher states, under way", in_flight * state, "device", ("teacher forward", "head"), how))
    return rows


def student_rows(recipe: Recipe, shape: Shapes, projectors: int, zero: dict[str, Any], ranks: int) -> list[Row]:
    """Parameters, gradients, master weights and Adam's moments under the ZeRO stage.

    Sharding as in Rajbhandari et al., arXiv 1910.02054, section 5: the optimizer's part is divided by the ranks from stage 1,
    gradients from stage 2, parameters at stage 3. Gradients are kept in fp32 here (ds_configs/), not in the paper's 2 bytes.
    """
    stage = zero_stage(zero)
    options = zero.get("zero_optimization", {})
    size = DTYPES[recipe.train.dtype].itemsize
    trained = shape.parameters + projectors
    whole = (trained, f"{_m(trained)} x")
    shard = (-(-trained // ranks), f"{_m(trained)} / {ranks} ranks x")
    # At stage 0, too, DeepSpeed's bf16 optimizer shares its states among the ranks.
    states, said = shard if stage or size < WIDE else whole
    weights, gradients = (shard if stage >= least else whole for least in (3, 2))
    optimizer_place = _place(options, "offload_optimizer")
    weight_place = _place(options, "offload_param") if stage == 3 else "device"
    # Reduced gradients stay in host memory where the optimizer works there, also when its states rest on NVMe.
    gradient_place: Place = "device" if optimizer_place == "device" else "host"
    rows = [
        Row("student weights", weights[0] * size, weight_place, ("always",), f"{weights[1]} {size} B"),
        Row("student gradients", gradients[0] * WIDE, gradient_place, ("always",), f"{gradients[1]} 4 B"),
        Row("Adam's two moments", 2 * states * WIDE, optimizer_place, ("always",), f"2 x {said} 4 B"),
    ]
    if size < WIDE:
        rows.append(Row("master weights", states * WIDE, optimizer_place, ("always",), f"{said} 4 B"))
    if bucket := int(options.get("reduce_bucket_size", 0)):
        when: Phase = "always" if stage == 3 else "backward"  # stage 3 makes it once, at the start
        how = f"reduce_bucket_size {_m(bucket)} x 4 B"
        rows.append(Row("gradients under reduction", bucket * WIDE, "device", (when,), how))
    largest = max(shape.largest_block, shape.embedding, shape.head)
    if stage == 3:
        live = min(max(int(options.get("stage3_max_live_parameters", 10**9)), largest), trained)
        how = f"at most {_m(live)} x {size} B (stage3_max_live_parameters)"
        rows.append(Row("student, gathered", live * size, "device", ("head", "backward"), how))
    how = f"largest module, {_m(largest)} x {size} B"
    rows.append(Row("gradient before reduction", largest * size, "device", ("backward",), how))
    if optimizer_place == "device":
        part = min(states, int(options.get("sub_group_size", states)))
        how = f"{_m(part)} x 4 B: the gradient it reads"
        rows.append(Row("AdamW at work", part * WIDE, "device", ("optimizer step",), how))
    return rows


def activation_rows(
    recipe: Recipe, student: Shapes, teacher: Shapes, pairs: Sequence[tuple[int, int]], ranks: int = 1
) -> list[Row]:
    """What the student keeps for its backward pass, with or without activation checkpointing, and the pairs' stashed gradients."""
    size = DTYPES[recipe.train.dtype].itemsize
    tokens = recipe.train.micro_batch_size * recipe.data.max_length
    block = block_activations(student, size) * tokens
    ends = tokens * student.hidden * (WIDE + 2 * size)  # final norm, and the final state the head reads
    if recipe.train.activation_checkpointing:
        kept = student.depth * tokens * student.hidden * size
        how = f"{student.depth} blocks' inputs [B, T, H] x {size} B (checkpointed), and the final norm"
        rows = [Row("one block, computed again", block, "device", ("backward",), f"B x T x {block // tokens:,} B")]
    else:
        kept, rows = student.depth * block, []
        how = f"{student.depth} blocks x B x T x {block // tokens:,} B, and the final norm"
    rows.insert(0, Row("student activations", kept + ends, "device", ("head", "backward"), how))
    return [*rows, *distance_rows(recipe, student, teacher, pairs, ranks)]


def projected_parameters(recipe: Recipe, student: Shapes, teacher: Shapes, pairs: Sequence[tuple[int, int]]) -> int:
    """How many numbers the pairs' projectors have."""
    if not recipe.matching.projects(student.hidden, teacher.hidden):
        return 0
    return (len(pairs) - len(recipe.matching.unprojected(len(pairs)))) * student.hidden * teacher.hidden


def distance_rows(
    recipe: Recipe, student: Shapes, teacher: Shapes, pairs: Sequence[tuple[int, int]], ranks: int
) -> list[Row]:
    """What waits of the pairs' distances for the backward pass, and what one set-level distance takes while it is worked out."""
    if not pairs:
        return []
    size, matching = DTYPES[recipe.train.dtype].itemsize, recipe.matching
    tokens = recipe.train.micro_batch_size * recipe.data.max_length
    tokens = tokens if matching.tokens is None else min(tokens, matching.tokens)
    sums = [terms_of(mix) for mix in matching.mixes_of(len(pairs))]
    projects = matching.projects(student.hidden, teacher.hidden)
    # a pair's distances through its projector leave one gradient, those of any widths beside it another
    through = sum(projects and not all(term.width_free for term in terms) for terms in sums)
    beside = sum(not projects or any(term.width_free for term in terms) for terms in sums)
    widths = through * teacher.hidden + beside * student.hidden
    shown = "[B, T, H]" if matching.tokens is None else f"[{tokens}, H]"
    how = f"{through + beside} x {shown} x {size} B, of {len(pairs)} pairs"
    rows = [Row("gradients of the distances", widths * tokens * size, "device", ("head", "backward"), how)]
    if of_set := max(sum(term.of_set for term in terms) for terms in sums):
        copies = SET_COPIES + (MIX_COPIES if of_set > 1 else 0)
        together = tokens * (ranks if matching.scope == "batch" else 1)
        wider = max(student.hidden, teacher.hidden)
        how = f"{copies} x [{together:,}, H] x {WIDE} B"
        rows.append(Row("a set-level distance at work", copies * together * wider * WIDE, "device", ("head",), how))
    return rows


def head_rows(recipe: Recipe, student: Shapes, teacher: Shapes) -> list[Row]:
    """The chunked head: its logits, and the gradient of its weight, which exists whole."""
    if not (recipe.loss.ce or recipe.loss.kl):
        return []
    size = DTYPES[recipe.train.dtype].itemsize
    chunk = min(recipe.train.head_chunk, recipe.train.micro_batch_size * recipe.data.max_length)
    logits, how = chunk * student.vocabulary * size, f"{chunk} tokens x {student.vocabulary:,} x {size} B"
    if recipe.loss.kl:
        theirs = DTYPES[recipe.teacher.dtype].itemsize
        shared = min(student.vocabulary, teacher.vocabulary)
        logits, how = logits + chunk * shared * theirs, f"{how}, the teacher's x {shared:,} x {theirs} B"
    rows = [Row("logits of a chunk", logits, "device", ("head",), how)]
    at_once = rows_at_once(chunk, student.vocabulary, "cuda")
    buffers = BUFFERS["kl" if recipe.loss.kl else "ce"]
    if recipe.loss.kl and not isinstance(recipe.loss.divergence, str):
        buffers += 4  # of a sum of divergences each but the last spoils copies, and their gradients are added up
    how = f"{buffers} x {at_once} tokens x {student.vocabulary:,} x {WIDE} B"
    held = buffers * at_once * student.vocabulary * WIDE
    rows.append(Row("logits at work", held, "device", ("head",), how))
    how = f"{_m(student.head)} x (4 + {size}) B"
    rows.append(Row("gradient of the head", student.head * (WIDE + size), "device", ("head",), how))
    how = f"{_m(student.head)} x {size} B"
    rows.append(Row("gradient of the head, waiting", student.head * size, "device", ("backward",), how))
    return rows


def _place(options: dict[str, Any], key: str) -> Place:
    device = options.get(key, {}).get("device", "none")
    places: dict[str, Place] = {"none": "device", "cpu": "host", "nvme": "nvme"}
    return places[device]


def peak(rows: Sequence[Row], place: Place = "device") -> tuple[int, str]:
    """The most bytes one rank holds in that place, and the phase it holds them in."""
    here = [row for row in rows if row.place == place]
    held = sum(row.bytes for row in here if "always" in row.phases)
    totals = {phase: held + sum(row.bytes for row in here if phase in row.phases) for phase in PHASES}
    phase = max(totals, key=lambda name: totals[name])
    return totals[phase], phase


def plan_text(rows: Sequence[Row]) -> str:
    """The rows as a table, in GiB of one rank, with each phase's total and the heaviest."""
    width = max(len(row.what) for row in rows)
    lines = [f"{'one rank holds':<{width}}  {'GiB':>9}  {'where':<6}  {'when':<22}  how it is counted"]
    lines += [
        f"{row.what:<{width}}  {row.bytes / GIB:9.3f}  {row.place:<6}  {', '.join(row.phases):<22}  {row.how}"
        for row in rows
    ]
    lines.append("")
    for place in ("device", "host", "nvme", "disk"):
        total, phase = peak(rows, place)
        if total:
            lines.append(f"{'needed on ' + place:<{width}}  {total / GIB:9.3f}  heaviest: {phase}")
    lines.append(
        "Not counted: CUDA context, NCCL buffers, fragmentation, attention workspace. Leave a tenth of the device free."
    )
    return "\n".join(lines)


def _m(count: int) -> str:
    return f"{count / 1e6:,.1f} M" if count < 1e9 else f"{count / 1e9:,.2f} B"
