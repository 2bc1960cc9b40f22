"""The parts of a training run, built from its job: data, rates, engine settings, teacher, student, stones."""

from __future__ import annotations

import functools
import logging
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from transformers import PreTrainedConfig

from llmkd.data.batches import Batch, steps_per_epoch
from llmkd.distributed.clocks import StepClock
from llmkd.distributed.compiled import check_asynchronous_io
from llmkd.distributed.ds_configs import DsConfig, teacher_ds_config
from llmkd.distributed.engines import parameter_count, sharded_construction
from llmkd.distributed.pipeline_group import PipelineGroup
from llmkd.distributed.ranks import World, all_rows
from llmkd.errors import InputError
from llmkd.layer_map import MIXED
from llmkd.losses.distance_sum import AllRows
from llmkd.losses.schedules import learning_rate
from llmkd.models import families, load
from llmkd.models.compiled_blocks import compile_blocks
from llmkd.models.liger import check_liger, use_kernels
from llmkd.models.lora import adapt
from llmkd.models.parts import blocks
from llmkd.recipe import recipe
from llmkd.recipe.ds_config import completed_ds_config
from llmkd.recipe.models import Lora
from llmkd.student.connectors import fit_connectors, make_connectors
from llmkd.student.distiller import Distiller, make_projectors
from llmkd.student.mixtures import Mixtures, first_scores
from llmkd.student.stepping_stones import SteppingStones
from llmkd.teachers.base import Demand, Teacher
from llmkd.teachers.pipeline import PipelineTeacher
from llmkd.teachers.pipeline_schedule import stage_count
from llmkd.teachers.pipeline_stage import load_stage, teacher_cut
from llmkd.teachers.resident import ResidentTeacher
from llmkd.training.jobs import Job
from llmkd.training.pairs import preferred_of

log = logging.getLogger("llmkd")


def accumulation_steps(train: recipe.Train, world_size: int) -> int:
    """Micro-batches per rank and step. Raises InputError unless ranks * micro_batch_size divides batch_size."""
    together = world_size * train.micro_batch_size
    if train.batch_size % together:
        sizes = [str(n) for n in range(1, train.batch_size + 1) if train.batch_size % (n * world_size) == 0]
        fitting = [
            str(n) for n in range(1, train.batch_size + 1) if train.batch_size % (n * train.micro_batch_size) == 0
        ]
        smaller = f", or in a new run micro_batch_size {' or '.join(sizes)}" if sizes else ""
        raise InputError(
            f"train.{train.batch_text} can't be shared by {world_size} ranks x micro_batch_size {train.micro_batch_size}; "
            f"write {train.batch_multiple(together)}{smaller}, or use {' or '.join(fitting)} ranks"
        )
    return train.batch_size // together


def total_steps(train: recipe.Train, rows: int | None) -> int:
    """Optimizer steps of the run; `rows`: None of a stream, whose recipe says how many."""
    if rows is None:
        assert train.steps is not None
        return train.steps
    if rows < train.batch_size and train.batch_tokens is not None:
        raise InputError(
            f"train.{train.batch_text} per step, but the rows fill only {rows}; write fewer tokens, or give more rows"
        )
    per_epoch = steps_per_epoch(rows, train.batch_size)
    return train.steps if train.steps is not None else math.ceil((train.epochs or 0) * per_epoch)


def rate_of_step(train: recipe.Train, steps: int) -> Callable[[int], float]:
    """Step (from 0) -> learning rate. Raises InputError at once if the schedule makes no sense for so many steps."""
    rate = functools.partial(
        learning_rate,
        peak=train.learning_rate,
        final=train.final_learning_rate,
        warmup=train.warmup_steps,
        total=steps,
        shape=train.schedule,
    )
    try:
        rate(0) if steps else None
    except InputError as error:
        raise InputError(f"train.warmup_steps: {error}") from error
    return rate


def training_ds_config(world: World, train: recipe.Train, accumulation: int, folder: Path) -> DsConfig:
    """The DeepSpeed configuration of a run, completed from the recipe."""
    return completed_ds_config(train, ranks=world.size, accumulation=accumulation, nvme_path=str(folder / "nvme"))


def demand_of(job: Job) -> Demand:
    """What the job's student needs from the teacher."""
    blocks = [
        teacher for _, teacher in sorted(job.pairs, key=lambda pair: pair[0])
    ]  # as the student's blocks take them
    if job.redraws:  # any block may be drawn
        blocks = [*(block for block in blocks if block < 0), *range(sum(job.teacher_depths))]
    reads = bool(job.pairs) and job.recipe.matching.reads_logits
    return Demand(
        tuple(blocks),
        logits=job.weights.kl > 0 or bool(job.stones) or reads,
        normed_last=job.recipe.matching.final_state == "normed",
        stones=(*(block for _, block in job.stones), *[sum(job.teacher_depths) - 1] * reads),
    )


def load_teacher(world: World, job: Job, demand: Demand | None = None, *, clock: StepClock | None = None) -> Teacher:
    """The job's teacher in its placement, which must have weights: llmkd.training.cache_contents opens a cached teacher.

    `demand`: what the teacher must give; default: what the job's student needs. `clock`: of the steps that it is for.
    """
    demand = demand or demand_of(job)
    settings = job.recipe.teacher
    assert job.teacher is not None and settings.placed.has_weights
    config = load.load_config(job.teacher, trust_remote_code=settings.trust_remote_code)
    _use_kernels(job, config)
    depth = sum(families.depths(config))
    needed = demand.first_blocks(depth) if job.family.kind == "decoder" else depth  # other families are loaded whole
    group = None
    if settings.placed.is_staged:
        group = PipelineGroup(world, stage_count(settings.stages, world.size, world.local_size, depth))
        needed = max(needed, group.size)  # a stage has at least one block
    if needed < depth:
        log.info("%s: the teacher's first %d of %d blocks are loaded: no others are needed", job.title, needed, depth)
    part = load.student_config(config, range(needed), {})
    demand = replace(demand, normed_last=demand.normed_last and needed == depth)
    if group is not None:
        return _pipelined(world, job, job.teacher, demand, group, part, clock or StepClock(world.device))
    return resident(world, job, job.teacher, demand, part, first_blocks=needed if needed < depth else None)


def resident(
    world: World, job: Job, folder: Path, demand: Demand, part: PreTrainedConfig, first_blocks: int | None
) -> ResidentTeacher:
    """The teacher in this process, whole or sharded; `part`: the configuration of what is run of it."""
    settings = job.recipe.teacher
    ds_config = _sharded_config(job, part) if settings.placed.is_sharded else None
    model = load.load_model(
        folder,
        dtype=load.DTYPES[settings.dtype],
        ds_config=ds_config,
        attention=settings.attention,
        trust_remote_code=settings.trust_remote_code,
        first_blocks=first_blocks,
        quantize=settings.quantize,
    )
    if not demand.logits and job.family.kind == "decoder":
        model = load.without_head(model)
    if ds_config is None:
        cast(nn.Module, model).to(world.device)  # a student is placed by its engine
    _compile(job, blocks(model))
    return ResidentTeacher(
        model,
        demand.blocks,
        normed_last=demand.normed_last,
        ds_config=ds_config,
        logits=demand.logits,
        offload_to=torch.cuda.Stream() if settings.offload_states else None,
        stones=demand.stones,
        checkpointed=job.recipe.stones is None or job.recipe.stones.checkpoint,
    )


def _sharded_config(job: Job, part: PreTrainedConfig) -> DsConfig:
    """The DeepSpeed configuration of a zero3 teacher of this shape; its blocks are counted before any weight is loaded."""
    settings = job.recipe.teacher
    if settings.offload == "nvme":
        check_asynchronous_io("teacher.offload")
    stack = blocks(load.without_weights(part, trust_remote_code=settings.trust_remote_code))
    return teacher_ds_config(
        job.train.micro_batch_size,
        settings.dtype,
        settings.offload,
        block=max(parameter_count(block) for block in stack),
        nvme_path=str(job.folder / "nvme" / "teacher"),
    )


def _pipelined(
    world: World, job: Job, folder: Path, demand: Demand, group: PipelineGroup, part: PreTrainedConfig, clock: StepClock
) -> PipelineTeacher:
    """This rank's stage of the teacher, and the head where the divergence asks for it; `part` as in `resident`."""
    settings = job.recipe.teacher
    trusted, dtype = settings.trust_remote_code, load.DTYPES[settings.dtype]
    stages = teacher_cut(part, group.size, trust_remote_code=trusted)
    log.info("teacher: %s", ", ".join(f"stage {s} blocks {p.start}-{p.stop - 1}" for s, p in enumerate(stages)))
    head = load.load_head(folder, dtype=dtype, trust_remote_code=trusted)[0] if demand.logits else None
    body = load_stage(
        folder,
        stages[group.member],
        dtype=dtype,
        attention=settings.attention,
        device=world.device,
        trust_remote_code=trusted,
    )
    _compile(job, cast(Any, body).layers)
    return PipelineTeacher(
        body,
        stages,
        group,
        demand.blocks,
        head=None if head is None else head.to(world.device),
        normed_last=demand.normed_last,
        width=part.hidden_size,
        dtype=dtype,
        device=world.device,
        clock=clock,
    )


def teacher_width(job: Job) -> int | None:
    """The teacher's hidden size, from its configuration; None without a teacher."""
    if job.teacher is None:
        return None
    return load.load_config(job.teacher, trust_remote_code=job.recipe.teacher.trust_remote_code).hidden_size


def rows_of_all_ranks(world: World, job: Job) -> AllRows | None:
    """What gathers the rows of a set-level distance that is over all ranks; None where it is a rank's own."""
    return functools.partial(all_rows, world) if job.pairs and job.recipe.matching.scope == "batch" else None


def load_student(job: Job, ds_config: DsConfig, target_width: int | None, gather: AllRows | None = None) -> Distiller:
    """The job's student, with its projectors and losses, ready for an engine. `gather`: see `rows_of_all_ranks`."""
    dtype = load.DTYPES[job.train.dtype]
    settings, matching = job.recipe.student, job.recipe.matching
    attention = job.recipe.teacher.attention if job.makes_teacher else settings.attention
    _use_kernels(job, load.load_config(job.initial, trust_remote_code=students_trust(job)))
    model = load.load_model(
        job.initial,
        dtype=dtype,
        ds_config=ds_config,
        attention=attention,
        trust_remote_code=students_trust(job),
        quantize="none" if (lora := adapters(job)) is None else lora.quantize,
    )
    if lora is not None:
        with sharded_construction(ds_config):
            adapt(model, seed=job.seed, **lora.model_dump(exclude={"export", "quantize"}))
    width = model.config.hidden_size
    target = target_width or width
    projected = len(job.compared) if matching.projects(width, target) else 0
    without = matching.unprojected(projected)
    projectors = make_projectors(projected, width, target, bias=matching.projector_bias, seed=job.seed, without=without)
    module = Distiller(
        model,
        [block for block, _ in job.compared],
        normed_last=matching.final_state == "normed",
        **head_options(job),
        projectors=None if projectors is None else projectors.to(dtype),
        differences=matching.compare == "differences",
        mixtures=make_mixtures(job),
        tokens=matching.tokens,
        all_rows=gather,
        stones=make_stones(job, width, target) if job.stones else None,
    )
    if job.train.activation_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    _compile(job, blocks(model))
    return module


def adapters(job: Job) -> Lora | None:
    """The adapters that are trained in place of the model's weights, if any."""
    section = job.recipe.finetune if job.makes_teacher else job.recipe.student
    return None if section is None else section.lora


def export_options(job: Job) -> dict[str, Any]:
    """How `checkpoint.export` writes the job's model: in which form, and what its adapters are added to."""
    lora = None if job.makes_teacher else job.recipe.student.lora
    base = str(job.initial.resolve()) if job.initial.parent == job.folder else job.recipe.student.path
    return {"form": "merged" if lora is None else lora.export, "base": base or ""}


def make_mixtures(job: Job) -> Mixtures | None:
    """The mixtures of a learned map, none of them trained yet; None of another map."""
    matching = job.recipe.matching
    candidates = {
        student: [i for j, i in job.pairs if j == student] for student, teacher in job.compared if teacher == MIXED
    }
    if not candidates:
        return None
    scores = first_scores(candidates, preferred_of(job.recipe, job.student_depths, job.teacher_depths))
    dtype = load.DTYPES[job.train.dtype]  # an engine has one; its optimizer works in float32
    return Mixtures(candidates, scores.to(dtype), temperature=matching.temperature, entropy=matching.entropy)


def _use_kernels(job: Job, config: PreTrainedConfig) -> None:
    """Have the model of this configuration, which is loaded next, made of the parts that the job asks for."""
    if job.train.kernels == "liger":
        check_liger([config], gpu=torch.cuda.is_available())
    use_kernels(job.train.kernels, [config])


def _compile(job: Job, stack: Iterable[nn.Module]) -> None:
    """Compile these blocks where the job asks for it."""
    if job.train.compile == "blocks":
        compile_blocks(stack)


def students_trust(job: Job) -> bool:
    """Whether the student's own Python code may run; a copied or random student runs the code of its teacher."""
    own = job.recipe.student.init == "checkpoint" and not job.makes_teacher
    return (job.recipe.student if own else job.recipe.teacher).trust_remote_code


def head_options(job: Job) -> dict[str, Any]:
    """How the head's losses are computed on this machine: how many tokens at a time, and by which kernel."""
    gpu = torch.cuda.is_available()
    return {"chunk": job.train.tokens_at_once(gpu=gpu), "kernel": job.recipe.head_kernel if gpu else "none"}


def make_stones(job: Job, student_width: int, teacher_width: int) -> SteppingStones:
    """The job's stepping stones, their connectors not yet fitted."""
    connectors = make_connectors(len(job.stones), student_width, teacher_width).to(load.DTYPES[job.train.dtype])
    return SteppingStones(job.stones, connectors, **head_options(job))


def fit_stones(
    world: World, job: Job, student: Any, teacher: Teacher | None, rows: Callable[..., Iterable[Sequence[Batch]]]
) -> None:
    """Fit the stones' connectors on the run's first batches, which `rows` gives (all ranks take part)."""
    settings = job.recipe.stones
    assert settings is not None and teacher is not None and teacher.blocks is not None, "the recipe's checks see to it"
    stack = blocks(student.module.model), teacher.blocks
    connectors = student.module.stones.connectors
    steps = rows(start_step=0, steps=settings.connector_batches)
    fit_connectors(world, student, connectors, job.stones, *stack, teacher, steps)
