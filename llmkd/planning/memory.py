"""Bytes per rank of a training run, before anything is loaded: a pure function of shapes, precision, ZeRO stage and placement.

`plan(recipe, ranks)` gives the rows, `plan_text(rows)` the table that `llmkd plan RECIPE --ranks N` prints. Shapes come from models
built on the meta device, so nothing but a `config.json` is read. Rows that live at one time only carry the phase of the step they
live in; a rank needs what is held always, plus the heaviest phase. Not counted: the CUDA context, NCCL's buffers, the allocator's
fragments, flash attention's own workspace; leave a tenth of the device free for them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedConfig

from llmkd.distributed.ds_configs import load_ds_config, zero_stage
from llmkd.files import ROOT
from llmkd.layer_map import STRATEGIES, compared
from llmkd.losses.chunked_head import BUFFERS, rows_at_once
from llmkd.losses.distance_sum import terms_of
from llmkd.losses.head_kernels import takes_in
from llmkd.models.adapter_folders import summed_dtype
from llmkd.models.load import DTYPES
from llmkd.planning.cache import cache_rows, cache_traffic
from llmkd.planning.four_bit import student_weights
from llmkd.planning.rollouts import rollout_rows
from llmkd.planning.rows import BEFORE, GIB, OFFLOADED, PHASES, WIDE, Phase, Place, Row, block_activations, millions
from llmkd.planning.shapes import Shapes, Trained, initial_student_config, shapes, teacher_config, trained_part
from llmkd.planning.stepping_stones import stone_rows
from llmkd.planning.teacher import (
    PlannedTeacher,
    no_traffic,
    pipeline_rows,
    pipeline_traffic,
    sharded_traffic,
    weight_rows,
)
from llmkd.planning.wire import student_wire, wire_text
from llmkd.recipe.placements import PlacementName
from llmkd.recipe.recipe import Recipe
from llmkd.training.build import accumulation_steps

SET_COPIES = 16
"""Tensors of [tokens, H] that a set-level distance holds at its peak, its gradient included; its SVD's are counted in."""
MIX_COPIES = 3
"""More of them where several are summed: the sum of their gradients, and the rows' own graph, which waits for the next."""

MIXTURE_COPIES = 3, 9
"""More of them against a learned mixture, of one distance and of several: the mixture, its gradient, and a block's product with that; each
further distance's graph has two sides."""


@dataclass(frozen=True)
class Placed:
    """How the cost of a placement is counted."""

    rows: Callable[[PlannedTeacher], list[Row]]
    traffic: Callable[[PlannedTeacher], tuple[int, str]]
    """(bytes that a rank sends or receives for the teacher in an optimizer step, what they are)."""


PLACED: dict[PlacementName, Placed] = {
    "replicated": Placed(weight_rows, no_traffic),
    "pipeline": Placed(pipeline_rows, pipeline_traffic),
    "zero3": Placed(weight_rows, sharded_traffic),
    "cache": Placed(cache_rows, cache_traffic),
}


def plan(recipe: Recipe, ranks: int, config: PreTrainedConfig | None = None) -> list[Row]:
    """What each of `ranks` ranks holds while it distils this recipe's student. `config`: the teacher's, where it was read already.

    Raises InputError where the batch can't be shared by the ranks, or where the teacher's shape can't be read.
    """
    accumulation_steps(recipe.train, ranks)
    config = config or teacher_config(recipe)
    placed = PlannedTeacher(recipe, config, ranks)
    student_shape = initial_student_config(recipe, config)
    teacher, student = shapes(config), shapes(student_shape)
    trained = trained_part(recipe, student_shape, student)
    projectors = projected_parameters(placed, student, teacher)
    zero = load_ds_config(recipe.train.deepspeed, ROOT / "ds_configs")
    return [
        *(PLACED[recipe.teacher.placement].rows(placed) if placed.pairs or recipe.logits else ()),
        *(stone_rows(recipe, teacher, placed.stones) if placed.stones else ()),
        *student_rows(recipe, trained, projectors, zero, ranks),
        *activation_rows(recipe, student, teacher, placed.pairs, ranks, in_adapters=trained.for_activations),
        *head_rows(recipe, student, teacher),
        *router_rows(recipe, student),
        *rollout_rows(recipe, student, teacher, sharded=zero_stage(dict(zero)) == 3),
        *sum_rows("teacher", recipe.teacher.adapter, config, teacher, recipe.teacher.dtype),
        *sum_rows("student", recipe.student.adapter, student_shape, student, recipe.train.dtype),
    ]


def sum_rows(who: str, adapter: str | None, config: PreTrainedConfig, shape: Shapes, dtype: str) -> list[Row]:
    """A model and its adapter, while the one is added to the other, and the folder of their sum."""
    if adapter is None:
        return []
    size = summed_dtype(config, DTYPES[dtype]).itemsize
    what, how = f"{who} and its adapter's sum", f"{millions(shape.parameters)} x {size} B, by one rank for all"
    held = shape.parameters * size
    return [Row(what, held, how, BEFORE, place="host"), Row(what, held, how, place="disk")]


def student_rows(recipe: Recipe, student: Trained, projectors: int, zero: Mapping[str, Any], ranks: int) -> list[Row]:
    """Parameters, gradients, master weights and Adam's moments under the ZeRO stage.

    Sharding as in Rajbhandari et al., arXiv 1910.02054, section 5: the optimizer's part is divided by the ranks from stage 1,
    gradients from stage 2, parameters at stage 3. Gradients are kept in fp32 here (ds_configs/), not in the paper's 2 bytes.
    """
    stage = zero_stage(dict(zero))
    options = zero.get("zero_optimization", {})

    def place(key: str) -> Place:
        return OFFLOADED[options.get(key, {}).get("device", "none")]

    size = DTYPES[recipe.train.dtype].itemsize
    trained = student.parameters + projectors

    def counts(number: int, *, shared: bool) -> tuple[int, str]:
        return (
            (-(-number // ranks), f"{millions(number)} / {ranks} ranks x")
            if shared
            else (number, f"{millions(number)} x")
        )

    # At stage 0, too, DeepSpeed's bf16 optimizer shares its states among the ranks.
    states, counted = counts(trained, shared=stage > 0 or size < WIDE)
    gradients = counts(trained, shared=stage >= 2)
    weights = counts(trained + student.frozen, shared=stage == 3)
    optimizer_place = place("offload_optimizer")
    weight_place = place("offload_param") if stage == 3 else "device"
    # Reduced gradients stay in host memory where the optimizer works there, also when its states rest on NVMe.
    gradient_place: Place = "device" if optimizer_place == "device" else "host"
    rows = [
        *student_weights(student, trained, weights, size, weight_place),
        Row("student gradients", gradients[0] * WIDE, f"{gradients[1]} 4 B", place=gradient_place),
        Row("Adam's two moments", 2 * states * WIDE, f"2 x {counted} 4 B", place=optimizer_place),
    ]
    if size < WIDE:
        rows.append(Row("master weights", states * WIDE, f"{counted} 4 B", place=optimizer_place))
    bucket = int(options.get("reduce_bucket_size", 0))
    if bucket:
        when: Phase = "always" if stage == 3 else "backward"  # stage 3 makes it once, at the start
        copies = 2 if stage in (1, 2) and options.get("overlap_comm") else 1  # one is filled while the other is sent
        how = f"{'2 x ' if copies > 1 else ''}reduce_bucket_size {millions(bucket)} x 4 B"
        rows.append(Row("gradients under reduction", copies * bucket * WIDE, how, (when,)))
    if stage == 3:
        live = min(
            max(int(options.get("stage3_max_live_parameters", 10**9)), student.largest), trained + student.frozen
        )
        how = f"at most {millions(live)} x {size} B (stage3_max_live_parameters)"
        rows.append(Row("student, gathered", live * size, how, ("head", "backward")))
    how = f"largest module, {millions(student.largest)} x {size} B"
    rows.append(Row("gradient before reduction", student.largest * size, how, ("backward",)))
    if stage == 3 and bucket < student.single:
        rows += _reduced_alone(student.single, size, in_fp32=zero.get("communication_data_type") == "fp32", ranks=ranks)
    if optimizer_place == "device":
        part = min(states, int(options.get("sub_group_size", states)))
        how = f"{millions(part)} x 4 B: the gradient it reads"
        rows.append(Row("AdamW at work", part * WIDE, how, ("optimizer step",)))
    return rows


def _reduced_alone(single: int, size: int, *, in_fp32: bool, ranks: int) -> list[Row]:
    """The copies that ZeRO-3 makes of the gradient of a parameter of so many numbers, which is larger than a bucket."""
    rows = []
    if in_fp32 and size < WIDE:
        how = f"{millions(single)} x 4 B, more than a bucket holds (stage3.py, __avg_scatter_grads)"
        rows.append(Row("that gradient in fp32", single * WIDE, how, ("backward",)))
    if single % ranks:
        wide = WIDE if in_fp32 else size
        how = f"{millions(single)} x {wide} B, padded for {ranks} ranks (coalesced_collectives.py, reduce_scatter_coalesced)"
        rows.append(Row("that gradient, padded", single * wide, how, ("backward",)))
    return rows


def activation_rows(
    recipe: Recipe,
    student: Shapes,
    teacher: Shapes,
    pairs: Sequence[tuple[int, int]],
    ranks: int = 1,
    in_adapters: int = 0,
) -> list[Row]:
    """What the student keeps for its backward pass, with or without activation checkpointing, and the pairs' stashed gradients.

    `in_adapters`: numbers that a token leaves in a block's adapters.
    """
    size = DTYPES[recipe.train.dtype].itemsize
    tokens = recipe.train.micro_batch_size * recipe.data.max_length
    block = (block_activations(student, size) + in_adapters * size) * tokens
    ends = tokens * student.hidden * (WIDE + 2 * size)  # final norm, and the final state the head reads
    if recipe.train.activation_checkpointing:
        kept = student.depth * tokens * student.hidden * size
        how = f"{student.depth} blocks' inputs [B, T, H] x {size} B (checkpointed), and the final norm"
        rows = [Row("one block, computed again", block, f"B x T x {block // tokens:,} B", ("backward",))]
    else:
        kept, rows = student.depth * block, []
        how = f"{student.depth} blocks x B x T x {block // tokens:,} B, and the final norm"
    rows.insert(0, Row("student activations", kept + ends, how, ("head", "backward")))
    return [*rows, *distance_rows(recipe, student, teacher, pairs, ranks)]


def projected_parameters(placed: PlannedTeacher, student: Shapes, teacher: Shapes) -> int:
    """How many numbers the projectors of pairs and stones have, and the scores of a learned map."""
    matching = placed.recipe.matching
    each = compared(matching.strategy, tuple(placed.pairs))
    projects = matching.projects(student.hidden, teacher.hidden)
    projectors = (len(each) - len(matching.unprojected(len(each))) if projects else 0) + len(placed.stones)
    scores = sum(block >= 0 for block, _ in placed.pairs) if STRATEGIES[matching.strategy].is_mixed else 0
    return projectors * student.hidden * teacher.hidden + scores


def planned_wire(recipe: Recipe, ranks: int, config: PreTrainedConfig) -> str:
    """What a rank sends for the student in an optimizer step, as a table; nothing on one rank. `config`: the teacher's."""
    placed = PlannedTeacher(recipe, config, ranks)
    student_shape = initial_student_config(recipe, config)
    teacher, student = shapes(config), shapes(student_shape)
    part = trained_part(recipe, student_shape, student)
    trained = part.parameters + projected_parameters(placed, student, teacher)
    zero = load_ds_config(recipe.train.deepspeed, ROOT / "ds_configs")
    beside = {"frozen": part.frozen, "forward_only": part.forward_only}
    sent = student_wire(recipe, trained, zero, ranks, **beside)
    return wire_text(sent, recipe, ranks) if sent else ""


def distance_rows(
    recipe: Recipe, student: Shapes, teacher: Shapes, pairs: Sequence[tuple[int, int]], ranks: int
) -> list[Row]:
    """The distances' gradients that wait for the backward pass, and the working memory of one set-level distance."""
    if not pairs:
        return []
    size, matching = DTYPES[recipe.train.dtype].itemsize, recipe.matching
    pairs, is_mixed = compared(matching.strategy, tuple(pairs)), STRATEGIES[matching.strategy].is_mixed
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
    rows = [Row("gradients of the distances", widths * tokens * size, how, ("head", "backward"))]
    if matching.reads_logits:
        whole = recipe.train.micro_batch_size * recipe.data.max_length
        theirs = sum("logit_lens" in mix for mix in matching.mixes_of(len(pairs))) * teacher.hidden
        read = 2 * student.hidden * size + teacher.hidden * DTYPES[recipe.teacher.dtype].itemsize
        how = "the teacher's states of their pairs, kept, and of one pair what the heads read [B, T, H]"
        held = whole * (theirs * DTYPES[recipe.teacher.dtype].itemsize + read)
        rows.append(Row("states for the logit lens", held, how, ("head",)))
    if matching.compare == "differences":
        whole = recipe.train.micro_batch_size * recipe.data.max_length
        theirs = 2 * teacher.hidden * DTYPES[recipe.teacher.dtype].itemsize
        how = "the teacher's state of the pair before, and both models' differences [B, T, H]"
        rows.append(Row("differences of states", whole * (theirs + student.hidden * size), how, ("head",)))
    if of_set := max(sum(term.of_set for term in terms) for terms in sums):
        copies = SET_COPIES + (MIX_COPIES if of_set > 1 else 0) + (MIXTURE_COPIES[of_set > 1] if is_mixed else 0)
        together = tokens * (ranks if matching.scope == "batch" else 1)
        wider = max(student.hidden, teacher.hidden)
        how = f"{copies} x [{together:,}, H] x {WIDE} B"
        rows.append(Row("a set-level distance at work", copies * together * wider * WIDE, how, ("head",)))
    return rows


def head_rows(recipe: Recipe, student: Shapes, teacher: Shapes) -> list[Row]:
    """The chunked head: its logits, and the gradient of its weight, which exists whole."""
    if not (recipe.loss.ce or recipe.logits):
        return []
    size = DTYPES[recipe.train.dtype].itemsize
    tokens = recipe.train.micro_batch_size * recipe.data.max_length
    chunk = min(recipe.train.tokens_at_once(gpu=True), tokens)
    logits, how = chunk * student.vocabulary * size, f"{chunk} tokens x {student.vocabulary:,} x {size} B"
    if recipe.logits:
        theirs = DTYPES[recipe.teacher.dtype].itemsize
        shared = min(student.vocabulary, teacher.vocabulary)
        logits, how = logits + chunk * shared * theirs, f"{how}, the teacher's x {shared:,} x {theirs} B"
    rows = [Row("logits of a chunk", logits, how, ("head",))]
    if not _in_one_kernel(recipe):
        at_once = rows_at_once(chunk, student.vocabulary, "cuda")
        buffers = BUFFERS["kl" if recipe.logits else "ce"]
        if recipe.loss.kl and max(len(recipe.loss.divergences), len(recipe.loss.own_divergences)) > 1:
            buffers += 4  # of a sum of divergences each but the last spoils copies, and their gradients are added up
        how = f"{buffers} x {at_once} tokens x {student.vocabulary:,} x {WIDE} B"
        held = buffers * at_once * student.vocabulary * WIDE
        rows.append(Row("logits at work", held, how, ("head",)))
    if recipe.student.lora is not None:  # the head is frozen
        return rows
    wide, how = (WIDE, f"(4 + {size})") if chunk < tokens else (0, str(size))  # several chunks are summed in fp32
    rows.append(
        Row("gradient of the head", student.head * (wide + size), f"{millions(student.head)} x {how} B", ("head",))
    )
    how = f"{millions(student.head)} x {size} B"
    rows.append(Row("gradient of the head, waiting", student.head * size, how, ("backward",)))
    return rows


def router_rows(recipe: Recipe, student: Shapes) -> list[Row]:
    """What the routers' load balance keeps for the backward pass."""
    if not recipe.loss.router:
        return []
    tokens = recipe.train.micro_batch_size * recipe.data.max_length
    how = f"[{tokens:,}, {student.routed}] x {WIDE} B"
    return [Row("the routers' probabilities", tokens * student.routed * WIDE, how, ("head", "backward"))]


def _in_one_kernel(recipe: Recipe) -> bool:
    """Whether a GPU works on the logits in one kernel, which holds fp32 to itself."""
    if not recipe.loss.kl:
        return takes_in(recipe.head_kernel, None)
    stored = recipe.teacher.placement == "cache" and recipe.cache.top_k is not None
    mixes = (recipe.loss.divergence, *([] if recipe.loss.own_divergence is None else [recipe.loss.own_divergence]))
    return all(takes_in(recipe.head_kernel, recipe.loss.divergence_of(mix), stored_top_k=stored) for mix in mixes)


def peak(rows: Sequence[Row], place: Place = "device") -> tuple[int, str]:
    """The most bytes one rank holds in that place, and the phase it holds them in."""
    here = [row for row in rows if row.place == place]
    held = sum(row.bytes for row in here if "always" in row.phases)
    starts: dict[Phase, int] = {**dict.fromkeys(PHASES, held), **dict.fromkeys(BEFORE, 0)}
    totals = {phase: start + sum(row.bytes for row in here if phase in row.phases) for phase, start in starts.items()}
    phase = max(totals, key=lambda name: totals[name])
    return totals[phase], phase


def plan_text(rows: Sequence[Row], wire: str = "") -> str:
    """The rows as a table, in GiB of one rank, with the heaviest phase's total; then the table of what is sent, if any."""
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
    return "\n".join([*lines, *(["", wire] if wire else [])])
