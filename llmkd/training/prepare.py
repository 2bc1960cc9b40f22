"""One training run, ready to begin or to resume from its newest checkpoint."""

from __future__ import annotations

import functools
import importlib.util
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from llmkd.data.batches import Batch, announced, batches
from llmkd.data.order import Source, counts
from llmkd.data.streams import Stream
from llmkd.distributed.checksums import damage_together
from llmkd.distributed.clocks import StepClock
from llmkd.distributed.ds_configs import on_other_ranks
from llmkd.distributed.engines import RATE, engine
from llmkd.distributed.ranks import World, on_main
from llmkd.distributed.traces import Trace
from llmkd.errors import InputError
from llmkd.models.parts import blocks
from llmkd.processes import Stopping
from llmkd.recipe.recipe import dump_recipe
from llmkd.recipe.rollouts import check_written
from llmkd.rollouts.by_teacher import teachers_texts, wrote_into
from llmkd.rollouts.source import Rollouts
from llmkd.student.distiller import Distiller
from llmkd.student.passes import StepSettings
from llmkd.teachers.base import Signal, Teacher
from llmkd.teachers.shared import SharedTeacher
from llmkd.training import build, cache_contents, checkpoint, finite, initial, nearest, tokens
from llmkd.training.jobs import Job
from llmkd.training.pairs import named_weights
from llmkd.training.validation_rows import RunRows, validation_batches
from llmkd.training.written_texts import rollouts_of, rows_of

log = logging.getLogger("llmkd")
Lend = Callable[..., Teacher]
"""Gives a job its teacher, as `own_teacher` does. `turns_done`: how often micro-batches were announced before the run goes on."""


@dataclass(frozen=True)
class RowSource:
    """Where a run's micro-batches come from."""

    rows: Callable[..., Iterator[list[Batch]]]
    """The micro-batches of each step, by `start_step` and `steps`."""
    count: int | None = None
    """How many rows or sequences are drawn from; None of a stream."""
    mixed: tuple[Source, ...] = ()
    """What is drawn from, where that is more than one."""
    digests: tuple[str, ...] = ()
    """A hash of each source's tokens; none of a stream."""
    stream: Stream | None = None
    """Where `rows` come from if they are streamed."""
    rollouts: Rollouts | None = None
    """Where they come from if texts are written as the run goes."""
    teachers_texts: Mapping[str, float] = field(default_factory=dict)
    """What the teacher wrote of them before training, in numbers; empty where it wrote nothing."""


@dataclass(frozen=True)
class PreparedRun:
    """The parts of one training run, ready to begin."""

    world: World
    job: Job
    engine: Any
    """DeepSpeed's, around `module`."""
    module: Distiller
    teacher: Teacher | None
    source: RowSource
    rate: Callable[[int], float]
    """The learning rate by step, from 0."""
    first: int
    """Steps that are done already."""
    steps: int
    clock: StepClock
    """Of its steps."""
    validation: Sequence[Batch] = ()
    """This rank's micro-batches of the rows it is validated on; as many as every other rank's."""
    validation_rows: int = 0
    """How many rows these are, over all ranks."""
    validations: tuple[tuple[int, float], ...] = ()
    """The validations of the steps that are done: each one's step, and what validations are compared by."""

    def taken(self, step: int) -> dict[str, int]:
        """How many rows (packed: sequences) of each source the steps up to this one were trained on; empty with a single source."""
        if not self.source.mixed:
            return {}
        of_sources = counts(step * self.job.train.batch_size, self.source.mixed)
        return dict(zip(self.job.data.names, of_sources, strict=True))

    @property
    def written(self) -> Mapping[str, float]:
        """What the texts that the last of `batches` come from are like, in numbers; empty where none are written."""
        return {} if self.source.rollouts is None else self.source.rollouts.present

    @property
    def learned_map(self) -> dict[str, dict[str, float]]:
        """What each teacher block weighs at present in what each student block learns from, by their names; empty of a map that is not
        learned (all ranks take part)."""
        mixtures = self.module.mixtures
        return {} if mixtures is None else named_weights(mixtures.weights(), self.job.encoders)

    def writing(self, seconds: float) -> Mapping[str, float]:
        """What the texts of this start of the run, which took so many seconds, took of it; empty where none are written."""
        return {} if self.source.rollouts is None else self.source.rollouts.spent.told(seconds)

    def batches(self) -> Iterator[list[Batch]]:
        """This rank's micro-batches of each step still to do, announced to the teacher ahead."""
        steps = self.source.rows(start_step=self.first, steps=self.steps)
        if self.teacher is not None:
            numbered = enumerate(steps, start=self.first + 1)
            steps = announced(((batches, self._is_end(step)) for step, batches in numbered), self.teacher.expect)
        stream = self.source.stream
        steps = steps if stream is None else stream.followed(steps)
        return self.trace.of(steps)

    def _is_end(self, step: int) -> bool:
        """Whether the next step's batches are to be asked for only when this step (from 1) is done."""
        return self.validates(step) or self.writes_after(step)

    def writes_after(self, step: int) -> bool:
        """Whether texts are written after this step (from 1), for the next ones."""
        rollouts = self.source.rollouts
        return rollouts is not None and rollouts.schedule.ends_round(step - 1)

    @property
    def place(self) -> dict[str, Any] | None:
        """Where the rows of the last of `batches` end in this rank's stream; None where rows are not streamed."""
        stream = self.source.stream
        return None if stream is None else stream.place.as_json()

    @functools.cached_property
    def trace(self) -> Trace:
        """Of some steps, where the recipe asks for it."""
        file = self.job.folder / "traces" / f"rank-{self.engine.global_rank}.json.gz"
        return Trace(self.job.train.profile_steps, file)

    def seconds_apart(self) -> float:
        """What has been done between the steps since this start of the run, while the next one was asked for: no step's own time."""
        return self.writing_seconds() + self.trace.seconds

    def begin(self) -> None:
        """Get the student ready to be trained: of a run that does not go on, fit what is fitted first (all ranks take part)."""
        self.module.train()
        if self.first == 0 and self.module.stones is not None:
            build.fit_stones(self.world, self.job, self.engine, self.teacher, self.source.rows)

    def others_turn(self, done: int) -> Iterator[int]:
        """Let the other students of this process have their turn; `done`: the steps that this one has done."""
        with self.clock.away():
            yield done

    def writing_seconds(self) -> float:
        """What the writing of texts has taken since this start of the run."""
        return 0.0 if self.source.rollouts is None else self.source.rollouts.spent.writing

    def validates(self, step: int) -> bool:
        """Whether the student is validated after this step, from 1."""
        return self.job.train.validates(step, self.steps)

    def set_rate(self, step: int) -> None:
        """Give the optimizer the learning rate of this step, from 1."""
        for group in self.engine.optimizer.param_groups:
            group["lr"] = self.rate(step - 1) * group[RATE]

    def signal(self, batch: Batch, settings: StepSettings) -> Signal | None:
        """The teacher's signal for a micro-batch of a step; None without a teacher."""
        redrawn = [block for _, block in settings.pairs] if self.job.redraws else None
        return None if self.teacher is None else self.teacher.signals(batch, redrawn)


def own_teacher(world: World, job: Job, *, clock: StepClock, turns_done: int) -> Teacher:
    """A teacher for this job alone."""
    return build.load_teacher(world, job, clock=clock)


class Seats:
    """Gives jobs, whose students take turns, seats at one teacher in place of `own_teacher`. The first one's job says how it is loaded;
    its waiting for other ranks counts as the teacher's time."""

    def __init__(self) -> None:
        self._shared: SharedTeacher | None = None

    def __call__(self, world: World, job: Job, *, clock: StepClock, turns_done: int) -> Teacher:
        """One more seat."""
        if self._shared is None:
            self._shared = SharedTeacher(lambda demand: build.load_teacher(world, job, demand))
        return self._shared.seat(build.demand_of(job), clock, turns_done)

    def load(self) -> None:
        """Load the teacher, if there are seats, once all are given (all ranks take part)."""
        if self._shared is not None:
            self._shared.load()


def prepare(world: World, job: Job, stopping: Stopping | None = None, lend: Lend | None = None) -> PreparedRun:
    """Build the parts of a run, restored from its newest checkpoint where there is one (all ranks take part).

    `lend`: gives the job's teacher, where its placement has weights; default: `own_teacher`. The user's mistakes are reported before
    anything is written. Raises StoppedTokenizing where `stopping` is asked to before that.
    """
    resume = checkpoint.newest(world, job.folder / "checkpoints", job.inputs)
    try:
        return _prepare(world, job, resume, stopping, lend or own_teacher)
    except InputError:
        if resume is None and world.is_main:
            initial.remove_initial(job)
            for name in (initial.BLOCKS, initial.WIDTH):
                (job.folder / name).unlink(missing_ok=True)
        raise


def _length(job: Job, rows: int | None) -> tuple[int, Callable[[int], float]]:
    """(the run's steps, the learning rate of each). Raises InputError where they are too few for what the recipe asks."""
    steps = build.total_steps(job.train, rows)
    check_written(None if job.makes_teacher else job.recipe.rollouts, job.train, steps)
    return steps, build.rate_of_step(job.train, steps)


def _prepare(
    world: World, job: Job, resume: checkpoint.Saved | None, stopping: Stopping | None, lend: Lend
) -> PreparedRun:
    settings = job.train
    accumulation = build.accumulation_steps(settings, world.size)
    if settings.wandb is not None and importlib.util.find_spec("wandb") is None:
        raise InputError("train.wandb: the package wandb is not installed; run pip install wandb, or leave the key out")
    ds_config = build.training_ds_config(world, settings, accumulation, job.folder)
    if resume is not None and resume.world_size != world.size:
        ds_config = on_other_ranks(ds_config)
    if resume is not None:
        _check_initial(world, job)
    tokenizer = initial.job_tokenizer(world, job, resuming=resume is not None)
    data = rows_of(world, job, tokenizer, stopping)
    checkpoint.check_rows(resume, data.training.digests, [f for f in data.training.folders if wrote_into(f)])
    pad_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    source = _source(world, job, data, tokenizer, pad_id, accumulation, resume)
    steps, rate = _length(job, source.count)
    cached = cache_contents.open_teacher(world, job, tokenizer, data.all)
    initial.write_initial(world, job, tokenizer, source.rows, resuming=resume is not None)  # written first
    validation = validation_batches(world, job, data, pad_id)
    if job.recipe.measures_map and not job.makes_teacher:
        job = nearest.settled(world, job, source.rows, resuming=resume is not None)
    module = build.load_student(job, ds_config, build.teacher_width(job), build.rows_of_all_ranks(world, job))
    clock = StepClock(world.device)
    clock.around(module.loss_head, "head")
    first = 0 if resume is None else resume.step
    turns_done = first + sum(settings.validates(step, steps) for step in range(1, first + 1))
    lent = {"clock": clock, "turns_done": turns_done}
    teacher = cached or (lend(world, job, **lent) if job.teacher is not None else None)
    student = engine(
        module,
        ds_config,
        blocks=blocks(module.model),
        learning_rate=settings.learning_rate,
        betas=settings.betas,
        epsilon=settings.epsilon,
        weight_decay=settings.weight_decay,
        apart=[] if module.mixtures is None else [module.mixtures.scores],
        apart_rate=job.recipe.matching.learning_rate,
    )
    torch.manual_seed(job.seed * 65536 + world.rank)  # dropout, where a model has it, differs from rank to rank
    if resume is not None:
        checkpoint.load(world, student, resume)
        log.info("%s: resumed from %s", job.title, resume.folder)
    else:
        finite.check_start(world, job, module)
    if world.is_main:
        job.folder.mkdir(parents=True, exist_ok=True)
        (job.folder / "recipe.yaml").write_text(dump_recipe(job.recipe))
    shared = dict(accumulation=accumulation, steps=steps)
    if (rollouts := rollouts_of(world, job, data.training, module.model, tokenizer, **shared)) is not None:
        source = replace(source, rows=rollouts.rows, rollouts=rollouts)
    _announce(world, job, steps, accumulation, source.count)
    validated = () if resume is None else resume.validations
    held_out = 0 if data.validation is None else len(data.validation)
    return PreparedRun(
        world, job, student, module, teacher, source, rate, first, steps, clock, validation, held_out, validated
    )


def _check_initial(world: World, job: Job) -> None:
    """Raise InputError where a run that is resumed started from what is no longer as it was written (all ranks take part)."""
    if job.initial != job.folder / "initial" or not on_main(world, (job.initial / "config.json").is_file):
        return
    fault = damage_together(world, job.initial)
    if fault is not None:
        again = (
            f"remove {job.folder} to begin again"
            if job.makes_teacher
            else "remove that folder, which is then made again"
        )
        raise InputError(f"{job.initial}: {fault}; put it back, or {again}")


def _source(
    world: World,
    job: Job,
    data: RunRows,
    tokenizer: Any,
    pad_id: int,
    accumulation: int,
    resume: checkpoint.Saved | None,
) -> RowSource:
    """The job's stream, or what its tokens on disk are drawn by (all ranks take part)."""
    if job.data.streaming:
        saved = None if resume is None else (resume.step, checkpoint.stream_place(world, resume))
        stream = tokens.stream(world, job, tokenizer, pad_id, accumulation, saved)
        return RowSource(stream.rows, stream=stream)
    drawn, make = tokens.drawn(world, job, data.training, pad_id)
    shared = dict(accumulation=accumulation, rank=world.rank, world_size=world.size, make=make)
    rows = functools.partial(batches, drawn, seed=job.seed, batch_size=job.train.batch_size, **shared)
    mixed = drawn.sources if len(drawn.sources) > 1 else ()
    return RowSource(
        rows, drawn.count, mixed, data.training.digests, teachers_texts=teachers_texts(data.training.folders)
    )


def _announce(world: World, job: Job, steps: int, accumulation: int, rows: int | None) -> None:
    settings = job.train
    spread = f"{world.size} ranks x {accumulation} accumulation x {settings.micro_batch_size}"
    unit = "sequences" if job.data.batching == "packed" else "rows"
    count = "a stream of" if rows is None else rows
    log.info("%s: %s %s, %d steps of %d = %s", job.title, count, unit, steps, settings.batch_size, spread)
    log.info("%s: %s on %s, %s", job.title, settings.deepspeed, world.device, settings.dtype)
