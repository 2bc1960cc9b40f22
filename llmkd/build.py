"""From a recipe to the parts of one training run, checked before anything is written.

A `Job` is all that the loop needs to know; distilling a student and fine-tuning a teacher are two ways to make one.
"""

from __future__ import annotations

import functools
import json
import logging
import math
import shutil
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from datasets import Dataset
from torch import nn

from llmkd import config, encoders, families, family_rules, models
from llmkd.architectures import KINDS, STARTS, new_config
from llmkd.checkpoint import check_same
from llmkd.config import ROOT, Recipe, finetune_inputs, fingerprint, training_inputs
from llmkd.connectors import fit_connectors, make_connectors
from llmkd.data import Batch, load_rows, source_contents, steps_per_epoch
from llmkd.distributed import (
    Wire,
    World,
    all_rows,
    check_asynchronous_io,
    complete_ds_config,
    load_ds_config,
    on_main,
    parameter_count,
    teacher_ds_config,
)
from llmkd.divergences import Divergence, with_parameters
from llmkd.errors import InputError
from llmkd.families import DECODER_EMBEDDING, Family
from llmkd.family_data import check_format, label_names, tokenize_for
from llmkd.geometry import WIDTH_FREE
from llmkd.layer_map import Pairs, in_order_random, layer_map
from llmkd.matching import AllRows, terms_of
from llmkd.objective import Weights
from llmkd.schedules import learning_rate
from llmkd.stages import stage_count
from llmkd.stones import Comparison, Stones, StoneWeights
from llmkd.student import Distiller, make_projectors
from llmkd.teachers import stage
from llmkd.teachers.base import EMBEDDING, Teacher, blocks_needed
from llmkd.teachers.pipeline import PipelineTeacher
from llmkd.teachers.resident import ResidentTeacher
from llmkd.teachers.upper import check_upper

log = logging.getLogger("llmkd")

TEXT_COLUMNS = ("prompt", "completion", "text", "text_a", "text_b")
"""Of rows, the columns that a new tokenizer is trained on."""
DECODER_SEED = 2**16
"""Added to a recipe's seed where an encoder-decoder's decoder draws its map."""


@dataclass(frozen=True)
class Job:
    """One training run. `teacher` is None where nothing is asked of one (fine-tuning; cross-entropy alone)."""

    folder: Path
    recipe: Recipe
    inputs: dict[str, Any]
    """What decides the result; a checkpoint or a model of other inputs is refused."""
    initial: Path
    tokenizer: Path | None
    """The folder whose tokenizer is used; None where one is trained on the data."""
    teacher: Path | None
    pairs: Pairs
    weights: Weights
    train: config.Train
    data: config.Data
    seed: int
    makes_teacher: bool
    family: Family
    encoders: tuple[int, int] | None = None
    """Of encoder-decoders, how many blocks the student's and the teacher's encoder have."""
    stones: Pairs = ()
    """(student block, teacher block) of each stepping stone, by student block."""

    @property
    def title(self) -> str:
        """What the run is called in logs: its folder."""
        return self.folder.name

    @property
    def redraws(self) -> bool:
        """Whether the map is drawn again while the student learns; `pairs` is then the first draw."""
        return bool(self.pairs) and self.recipe.matching.redraw_every > 0


# ---------------------------------------------------------------------------------------------------------------------
# The two kinds of job


def distil_job(world: World, recipe: Recipe, folder: Path) -> Job:
    """A student under the recipe's strategy. Raises InputError before anything is written."""
    teacher = on_main(world, lambda: models.resolve(recipe.teacher_path, "teacher.path", recipe.teacher.revision))
    teacher_config = models.load_config(teacher, trust_remote_code=recipe.teacher.trust_remote_code)
    family = families.family(teacher_config)
    family_rules.check_training(recipe, family)
    depths = families.depths(teacher_config)
    checkpoint = None
    student_config = teacher_config
    if recipe.student.init == "checkpoint":
        path = recipe.student.path or ""
        checkpoint = on_main(world, lambda: models.resolve(path, "student.path"))
        student_config = models.load_config(checkpoint, trust_remote_code=recipe.student.trust_remote_code)
        family_rules.check_same_classes(family, families.family(student_config))
    student_depths = depths_of(recipe, student_config)
    pairs = maps_of(recipe, student_depths, depths)
    stones = stones_of(recipe, student_depths[0], depths[0])
    if stones:
        check_upper(teacher_config)
    weights = Weights(
        ce=recipe.loss.ce,
        kl=recipe.loss.kl,
        hidden=recipe.loss.hidden if pairs else 0.0,
        kl_positions=recipe.loss.kl_positions,
        hidden_positions=recipe.matching.positions,
        pairs=recipe.matching.pair_weights if pairs else None,
    )
    width = recipe.student.width.get("hidden_size", student_config.hidden_size)
    if recipe.matching.redraw_every and width != teacher_config.hidden_size and recipe.matching.needs_projector:
        raise InputError(
            f"matching.redraw_every: the student's states have {width} numbers and the teacher's {teacher_config.hidden_size}, and a "
            "projector is learned for one teacher block; write redraw_every: 0, or a distance that needs none "
            f"({', '.join(WIDTH_FREE)})"
        )
    if not (weights.ce or weights.kl or weights.hidden or stones):
        raise InputError(
            "loss: ce, kl and hidden are all 0, so there is nothing to learn from; give one of them a weight"
        )
    if checkpoint is None:
        rule = recipe.student.copy_blocks if recipe.student.init == "teacher" else "spread"
        models.student_config(teacher_config, models.stack_choices(rule, student_depths, depths), recipe.student.width)
    else:
        theirs = models.load_tokenizer(checkpoint, trust_remote_code=recipe.student.trust_remote_code)
        models.check_same_tokens(
            models.load_tokenizer(teacher, trust_remote_code=recipe.teacher.trust_remote_code), theirs
        )
    for section, settings, shape, where in (
        ("teacher", recipe.teacher, teacher_config, recipe.teacher_path),
        ("student", recipe.student, student_config, recipe.student.path or ""),
    ):
        models.check_usable(
            shape, section=section, attention=settings.attention, packed=recipe.data.batching == "packed"
        )
        _check_lengths(recipe.data.max_length, families.positions(shape), where)
        if pairs:
            normed = recipe.matching.final_state == "normed"
            families.check_states(shape, normed=normed, embedding=recipe.matching.embedding)
    if recipe.teacher.placement == "pipeline" and (weights.kl or weights.hidden):
        stage.check_pipelined(teacher_config)
        stage_count(recipe.teacher.stages, world.size, world.local_size, sum(depths))
    if recipe.teacher.offload_states and world.device.type != "cuda":
        raise InputError("teacher.offload_states: there is no GPU here whose memory it would spare; write false")
    job = Job(
        folder=folder,
        recipe=recipe,
        inputs=on_main(world, lambda: student_inputs(recipe)),
        initial=checkpoint or folder / "initial",
        tokenizer=checkpoint or teacher,
        teacher=teacher if weights.kl or weights.hidden or stones else None,
        pairs=pairs,
        weights=weights,
        train=recipe.train,
        data=recipe.data,
        seed=recipe.seed,
        makes_teacher=False,
        family=family,
        encoders=(student_depths[0], depths[0]) if len(depths) == 2 else None,
        stones=stones,
    )
    refuse_other_recipe(world, job)
    return job


def initial_student(recipe: Recipe, teacher: Path, folder: Path) -> None:
    """Write the HF folder an undistilled student starts from (rank 0 alone)."""
    dtype = models.DTYPES[recipe.train.dtype]
    trust = recipe.teacher.trust_remote_code
    shape = models.load_config(teacher, trust_remote_code=trust)
    depths, wanted = families.depths(shape), depths_of(recipe, shape)
    if recipe.student.init == "random":
        models.random_student(
            teacher, wanted, recipe.student.width, folder, seed=recipe.seed, dtype=dtype, trust_remote_code=trust
        )
        return
    chosen = models.stack_choices(recipe.student.copy_blocks, wanted, depths)
    if families.kind(shape) == "encoder":
        kept = recipe.student.classifier == "copied"
        encoders.copied_encoder(teacher, chosen, folder, seed=recipe.seed, dtype=dtype, classifier=kept)
    else:
        models.copied_student(teacher, chosen, folder, dtype=dtype, trust_remote_code=trust)
    log.info("student: %s blocks copied from the teacher's %s", " + ".join(map(str, wanted)), list(chosen))


def finetune_job(world: World, recipe: Recipe, folder: Path) -> Job:
    """The teacher of a recipe with a `finetune` section: the same loop, cross-entropy alone."""
    settings = recipe.finetune
    if settings is None:
        raise InputError("the recipe has no finetune section; there is no teacher to make")
    start = settings.path
    data = settings.data or recipe.data
    given = None if start is None else on_main(world, lambda: models.resolve(start, "finetune.path"))
    if given is None:
        assert settings.architecture is not None
        type_ = settings.architecture.model_type
        family = Family(KINDS[type_], start=STARTS.get(type_, 0))
        _check_lengths(data.max_length, settings.architecture.max_position_embeddings, "finetune.architecture")
        if data.batching == "packed" and family.kind != "decoder":
            raise InputError("data.batching: only a decoder's rows are packed; write grouped")
    else:
        shape = models.load_config(given, trust_remote_code=recipe.teacher.trust_remote_code)
        _check_lengths(data.max_length, families.positions(shape), start or "")
        packed = data.batching == "packed"
        models.check_usable(shape, section="teacher", attention=recipe.teacher.attention, packed=packed)
        family = families.family(shape)
    check_format(family, data.format)
    if family.kind == "encoder":  # its classes are the data's, whatever the checkpoint knew before
        family = Family("encoder", labels=on_main(world, lambda: label_names(read_rows(data))))
    job = Job(
        folder=folder,
        recipe=recipe,
        inputs=on_main(world, lambda: teacher_inputs(recipe)),
        initial=folder / "initial" if given is None or family.kind == "encoder" else given,
        tokenizer=given,
        teacher=None,
        pairs=(),
        weights=Weights(ce=1.0, kl=0.0, hidden=0.0, kl_positions="trained", hidden_positions="trained"),
        train=settings.train,
        data=data,
        seed=settings.seed,
        makes_teacher=True,
        family=family,
    )
    refuse_other_recipe(world, job)
    return job


def teacher_tokenizer(recipe: Recipe) -> Any:
    """The tokenizer of a teacher that is made from nothing, trained on its data (rank 0 alone)."""
    settings = recipe.finetune
    assert settings is not None and settings.architecture is not None
    rows = read_rows(settings.data or recipe.data)
    if "messages" in rows.column_names:
        raise InputError(
            "finetune.architecture: a new tokenizer has no chat template; give prompt/completion or text data"
        )
    texts = (text for column in TEXT_COLUMNS if column in rows.column_names for text in rows[column])
    return models.new_tokenizer(texts, settings.architecture.vocab_size, KINDS[settings.architecture.model_type])


def initial_teacher(recipe: Recipe, tokenizer: Any, job: Job) -> None:
    """Write the HF folder a teacher starts from: a new model of `finetune.architecture` with this tokenizer, or an encoder's checkpoint
    with new classes (rank 0 alone)."""
    settings, folder = recipe.finetune, job.initial
    assert settings is not None
    if settings.path is not None:
        assert job.tokenizer is not None
        dtype = models.DTYPES[settings.train.dtype]
        encoders.new_classifier(job.tokenizer, job.family.labels, folder, seed=settings.seed, dtype=dtype)
        return
    assert settings.architecture is not None
    shape = new_config(settings.architecture.model_dump(), tokenizer, job.family.labels)
    models.new_model(
        shape,
        folder,
        seed=settings.seed,
        dtype=models.DTYPES[settings.train.dtype],
        tokenizer=tokenizer.save_pretrained,
    )


def depths_of(recipe: Recipe, shape: Any) -> tuple[int, ...]:
    """How many blocks each stack of the student has; `shape` is the configuration of its teacher, or of its own checkpoint."""
    settings = recipe.student
    if settings.blocks is None:
        return families.depths(shape)
    return (settings.blocks, settings.decoder_blocks or settings.blocks)[: len(families.depths(shape))]


def maps_of(recipe: Recipe, student: Sequence[int], teacher: Sequence[int]) -> Pairs:
    """The recipe's pairs of models whose stacks have these depths, each stack's by itself, the encoder's first.

    Random maps of encoder and decoder are drawn independently.
    """
    if len(teacher) == 1:
        return pairs_of(recipe, student[0], teacher[0])
    after = {EMBEDDING: DECODER_EMBEDDING}
    first = _of_stack(recipe, student[0], teacher[0], recipe.seed)
    second = _of_stack(recipe, student[1], teacher[1], recipe.seed + DECODER_SEED)
    moved = ((after.get(s, s + student[0]), after.get(t, t + teacher[0])) for s, t in second)
    return _asked_for(recipe, (*first, *moved), (student[0], teacher[0]))


def pairs_of(recipe: Recipe, student_depth: int, teacher_depth: int) -> Pairs:
    """The recipe's pairs at these depths, the embedding pair first if it is asked for; none where `loss.hidden` is 0.

    Of `nearest`, which is not known before it is measured (llmkd.nearest), those of `forward`: as many, and no block of the teacher lies
    deeper, so that what is planned by them is enough.
    """
    return _asked_for(recipe, _of_stack(recipe, student_depth, teacher_depth, recipe.seed))


def _of_stack(recipe: Recipe, student_depth: int, teacher_depth: int, seed: int) -> Pairs:
    """The map of one stack of blocks, the embedding pair first if it is asked for."""
    matching = recipe.matching
    pairs = layer_map(
        "forward" if matching.strategy == "nearest" else matching.strategy,
        student_depth,
        teacher_depth,
        seed=seed,
        target_block=matching.target_block,
        pairs=matching.pairs,
    )
    return with_embedding(recipe, pairs)


def _asked_for(recipe: Recipe, pairs: Pairs, encoders: tuple[int, int] | None = None) -> Pairs:
    """The pairs, each with a weight if the recipe gives any; none where `loss.hidden` is 0."""
    given = recipe.matching.pair_weights
    if given is not None and pairs and len(given) != len(pairs):
        names = pair_names(pairs, encoders=encoders)
        raise InputError(
            f"matching.pair_weights: {len(given)} weights for the {len(pairs)} pairs {', '.join(names)}; "
            "write one for each, in this order"
        )
    return () if recipe.loss.hidden == 0 else pairs


def with_embedding(recipe: Recipe, pairs: Pairs) -> Pairs:
    """The pairs, after the embeddings' where the recipe matches them too."""
    return ((EMBEDDING, EMBEDDING), *pairs) if recipe.matching.embedding and pairs else pairs


def rematch(job: Job, step: int, module: Distiller, teacher: Teacher | None) -> None:
    """Give student and teacher the map of this step (from 0): a function of (seed, step // redraw_every), the same on every rank."""
    assert isinstance(teacher, ResidentTeacher) and job.teacher is not None  # config.py refuses other placements
    matching = job.recipe.matching
    blocks = sum(student != EMBEDDING for student, _ in job.pairs)
    depth = models.load_config(job.teacher, trust_remote_code=job.recipe.teacher.trust_remote_code).num_hidden_layers
    drawn = in_order_random(blocks, depth, job.recipe.seed, step // matching.redraw_every)
    pairs = with_embedding(job.recipe, drawn)
    module.rematch(pairs)
    teacher.use([block for _, block in pairs])


def stones_of(recipe: Recipe, student_depth: int, teacher_depth: int) -> Pairs:
    """The recipe's stepping stones at these depths, by student block; none where it has no `stones` section."""
    settings = recipe.stones
    if settings is None:
        return ()
    if settings.pairs == "from_map":
        matching = recipe.matching
        options: dict[str, Any] = dict(seed=recipe.seed, target_block=matching.target_block, pairs=matching.pairs)
        pairs = layer_map(matching.strategy, student_depth, teacher_depth, **options)
        if not pairs:
            raise InputError(
                f"stones.pairs: the layer map of strategy {matching.strategy!r} has no pairs; write them, e.g. [[0, 3]], or another "
                "matching.strategy"
            )
    else:
        pairs = settings.pairs
    for side, blocks, depth in (
        ("student", [s for s, _ in pairs], student_depth),
        ("teacher", [t for _, t in pairs], teacher_depth),
    ):
        for block in blocks:
            if not 0 <= block < depth:
                raise InputError(f"stones.pairs: {block} is not a block of the {side} (0 to {depth - 1})")
    return tuple(sorted(pairs))


def student_inputs(recipe: Recipe) -> dict[str, Any]:
    """What decides what a student becomes: the recipe's part of it, and the contents of the files it names."""
    inputs = {**training_inputs(recipe), **_contents(recipe.train, recipe.data)}
    for key, path in (("teacher.path", recipe.teacher.path), ("student.path", recipe.student.path)):
        if path is not None and Path(path).is_dir():
            inputs[f"{key}:contents"] = models.folder_contents(Path(path))
    return {**inputs, **(teacher_inputs(recipe) if recipe.finetune else {})}


def teacher_inputs(recipe: Recipe) -> dict[str, Any]:
    """What decides what a recipe's own teacher becomes, as `student_inputs` does a student's."""
    assert recipe.finetune is not None
    start = recipe.finetune.path
    found = _contents(recipe.finetune.train, recipe.finetune.data or recipe.data)
    if start is not None and Path(start).is_dir():
        found["path:contents"] = models.folder_contents(Path(start))
    return {**finetune_inputs(recipe), **{f"finetune.{key}": value for key, value in found.items()}}


def _contents(train: config.Train, data: config.Data) -> dict[str, str]:
    """Hashes of the local files that these sections name; of what lies on the hub the name must do."""
    found = {}
    if (rows := source_contents(data.source, data.split)) is not None:
        found["data.source:contents"] = rows
    if train.deepspeed.endswith(".json"):
        found["train.deepspeed:contents"] = fingerprint(load_ds_config(train.deepspeed, ROOT / "ds_configs"))
    return found


def refuse_other_recipe(world: World, job: Job) -> None:
    """Raise InputError if the folder holds the checkpoints or the model of another recipe."""
    on_main(world, lambda: finished(job))


def finished(job: Job) -> bool:
    """Whether the job's model is already there, whole and of the same inputs. Raises InputError if it is of others."""
    meta = job.folder / "model" / "llmkd.json"
    if not meta.is_file():
        return False
    check_same(json.loads(meta.read_text())["inputs"], job.inputs, job.folder)
    return True


def _check_lengths(max_length: int, positions: int | None, where: str) -> None:
    if positions is not None and max_length > positions:
        raise InputError(
            f"data.max_length: {max_length} tokens are more than the {positions} positions of {where}; write at most {positions}"
        )


# ---------------------------------------------------------------------------------------------------------------------
# Parts


def accumulation_steps(train: config.Train, world_size: int) -> int:
    """Micro-batches per rank and step. Raises InputError unless ranks * micro_batch_size divides batch_size."""
    together = world_size * train.micro_batch_size
    if train.batch_size % together:
        fitting = [n for n in range(1, train.batch_size + 1) if train.batch_size % (n * train.micro_batch_size) == 0]
        raise InputError(
            f"train.batch_size: {train.batch_size} rows can't be shared by {world_size} ranks x micro_batch_size {train.micro_batch_size}; "
            f"write a multiple of {together}, or use {' or '.join(map(str, fitting))} ranks"
        )
    return train.batch_size // together


def total_steps(train: config.Train, rows: int) -> int:
    """Optimizer steps of the run."""
    per_epoch = steps_per_epoch(rows, train.batch_size)
    return train.steps if train.steps is not None else math.ceil((train.epochs or 0) * per_epoch)


def rate_of_step(train: config.Train, steps: int) -> Callable[[int], float]:
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


def training_ds_config(world: World, train: config.Train, accumulation: int, folder: Path) -> dict[str, Any]:
    """The DeepSpeed configuration of a run, completed from the recipe."""
    return complete_ds_config(
        load_ds_config(train.deepspeed, ROOT / "ds_configs"),
        world_size=world.size,
        micro_batch=train.micro_batch_size,
        accumulation=accumulation,
        clip=train.clip,
        dtype=train.dtype,
        nvme_path=str(folder / "nvme"),
    )


def tokenized(world: World, data: config.Data, tokenizer: Any, family: Family = Family("decoder")) -> Dataset:  # noqa: B008 (frozen)
    """The job's rows as tokens; rank 0 reads them first, so that downloads and caches are made once."""
    first: list[Dataset] = []
    on_main(world, lambda: first.append(read_rows(data)))
    rows = first[0] if first else read_rows(data)
    lengths: dict[str, Any] = dict(max_length=data.max_length, too_long=data.too_long)
    return tokenize_for(family, rows, tokenizer, format=data.format, **lengths)


def read_rows(data: config.Data) -> Dataset:
    """The rows that a recipe's data section names, as text."""
    return load_rows(data.source, name=data.name, split=data.split, rows=data.rows, records_seed=data.records_seed)


def load_teacher(world: World, job: Job) -> Teacher:
    """The job's teacher in its placement."""
    settings = job.recipe.teacher
    assert job.teacher is not None and settings.placement != "cache", "llmkd.cache_contents opens a cached teacher"
    sharded = settings.placement == "zero3"
    logits = job.weights.kl > 0 or bool(job.stones)
    normed_last = job.recipe.matching.final_state == "normed"
    uses = [teacher for _, teacher in sorted(job.pairs, key=lambda pair: pair[0])]  # as the student's blocks take them
    config = models.load_config(job.teacher, trust_remote_code=settings.trust_remote_code)
    depth = sum(families.depths(config))
    decodes = job.family.kind == "decoder"  # other families are loaded whole
    if job.redraws:
        uses = [EMBEDDING] * job.recipe.matching.embedding + list(range(depth))  # any of them may be drawn
    needed = blocks_needed(uses, depth, logits=logits, normed_last=normed_last) if decodes else depth
    wire = None
    if settings.placement == "pipeline":
        wire = Wire(world, stage_count(settings.stages, world.size, world.local_size, depth))
        needed = max(needed, wire.size)  # a stage has at least one block
    if needed < depth:
        log.info("%s: the teacher's first %d of %d blocks are loaded: no more is asked of it", job.title, needed, depth)
    if wire is not None:
        return _pipelined(world, job, job.teacher, wire, models.student_config(config, range(needed), {}))
    ds = _sharded_config(job, models.student_config(config, range(needed), {})) if sharded else None
    model = models.load_model(
        job.teacher,
        dtype=models.DTYPES[settings.dtype],
        ds_config=ds,
        attention=settings.attention,
        trust_remote_code=settings.trust_remote_code,
        first_blocks=needed if needed < depth else None,
    )
    if not logits and decodes:
        model = models.without_head(model)
    if not sharded:
        cast(nn.Module, model).to(world.device)  # a student is placed by its engine
    return ResidentTeacher(
        model,
        uses,
        normed_last=normed_last and needed == depth,
        ds_config=ds,
        logits=logits,
        offload_to=torch.cuda.Stream() if settings.offload_states else None,
        stones=[block for _, block in job.stones],
        checkpointed=job.recipe.stones is None or job.recipe.stones.checkpoint,
    )


def _sharded_config(job: Job, shape: Any) -> dict[str, Any]:
    """The DeepSpeed configuration of a zero3 teacher of this shape, whose blocks are counted before any is made."""
    settings = job.recipe.teacher
    if settings.offload == "nvme":
        check_asynchronous_io("teacher.offload")
    stack = models.blocks(models.without_weights(shape, trust_remote_code=settings.trust_remote_code))
    return teacher_ds_config(
        job.train.micro_batch_size,
        settings.dtype,
        settings.offload,
        block=max(parameter_count(block) for block in stack),
        parameter=max(parameter.numel() for parameter in stack.parameters()),
        nvme_path=str(job.folder / "nvme" / "teacher"),
    )


def _pipelined(world: World, job: Job, folder: Path, wire: Wire, shape: Any) -> PipelineTeacher:
    """This rank's stage of the job's teacher, `shape` the part of it that is run, and the head where the divergence asks for it."""
    settings = job.recipe.teacher
    depth = models.load_config(folder, trust_remote_code=settings.trust_remote_code).num_hidden_layers
    parts = stage.teacher_cut(shape, wire.size, trust_remote_code=settings.trust_remote_code)
    log.info("teacher: %s", ", ".join(f"stage {s} blocks {p.start}-{p.stop - 1}" for s, p in enumerate(parts)))
    where: dict[str, Any] = dict(
        dtype=models.DTYPES[settings.dtype], device=world.device, trust_remote_code=settings.trust_remote_code
    )
    head = None
    if job.weights.kl:
        weight, _ = models.load_head(folder, dtype=where["dtype"], trust_remote_code=settings.trust_remote_code)
        head = weight.to(world.device)
    return PipelineTeacher(
        stage.load_stage(folder, parts[wire.member], attention=settings.attention, **where),
        parts,
        wire,
        job.pairs,
        head=head,
        normed_last=job.recipe.matching.final_state == "normed" and parts[-1].stop == depth,
        width=shape.hidden_size,
        dtype=where["dtype"],
        device=world.device,
    )


def teacher_width(job: Job) -> int | None:
    """The teacher's hidden size, from its configuration; None without a teacher."""
    if job.teacher is None:
        return None
    return models.load_config(job.teacher, trust_remote_code=job.recipe.teacher.trust_remote_code).hidden_size


def rows_of_all_ranks(world: World, job: Job) -> AllRows | None:
    """What gathers the rows of a set-level distance that is over all ranks; None where it is a rank's own."""
    return functools.partial(all_rows, world) if job.pairs and job.recipe.matching.scope == "batch" else None


def load_student(
    job: Job, ds_config: dict[str, Any], target_width: int | None, gather: AllRows | None = None
) -> Distiller:
    """The job's student, with its projectors and losses, ready for an engine. `gather`: see `rows_of_all_ranks`."""
    dtype = models.DTYPES[job.train.dtype]
    settings, matching = job.recipe.student, job.recipe.matching
    attention = job.recipe.teacher.attention if job.makes_teacher else settings.attention
    model = models.load_model(
        job.initial,
        dtype=dtype,
        ds_config=ds_config,
        attention=attention,
        # a copied or random student runs the code of its teacher
        trust_remote_code=(
            settings if settings.init == "checkpoint" and not job.makes_teacher else job.recipe.teacher
        ).trust_remote_code,
    )
    width = model.config.hidden_size
    target = target_width or width
    projected = len(job.pairs) if matching.needs_projector else 0
    projectors = make_projectors(projected, width, target, bias=matching.projector_bias, seed=job.seed)
    divergence = with_parameters(job.recipe.loss.divergence, job.recipe.loss.parameters)
    module = Distiller(
        model,
        job.pairs,
        distance=terms_of(matching.distances),
        positions=matching.positions,
        normed_last=matching.final_state == "normed",
        divergence=divergence,
        temperature=job.recipe.loss.temperature,
        kl_positions=job.recipe.loss.kl_positions,
        chunk=job.train.head_chunk,
        projectors=None if projectors is None else projectors.to(dtype),
        tokens=matching.tokens,
        pair_weights=job.weights.pairs,
        keeps_head=job.weights.ce > 0 or job.weights.kl > 0,
        all_rows=gather,
        stones=make_stones(job, width, target, divergence) if job.stones else None,
    )
    if job.train.activation_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return module


def make_stones(job: Job, student_width: int, teacher_width: int, divergence: Divergence) -> Stones:
    """The job's stones, their connectors not yet fitted."""
    settings, loss = job.recipe.stones, job.recipe.loss
    assert settings is not None
    return Stones(
        job.stones,
        make_connectors(len(job.stones), student_width, teacher_width).to(models.DTYPES[job.train.dtype]),
        weights=StoneWeights(ce=settings.ce, kl=settings.kl, cross=settings.cross),
        comparison=Comparison(divergence, loss.temperature, loss.kl_positions, job.train.head_chunk),
        one=settings.sample == "one",
        seed=job.seed,
    )


def fit_stones(
    world: World, job: Job, student: Any, teacher: Teacher | None, rows: Callable[..., Iterable[Sequence[Batch]]]
) -> None:
    """Fit the stones' connectors on the run's first batches, which `rows` gives (all ranks take part)."""
    settings = job.recipe.stones
    assert settings is not None and isinstance(teacher, ResidentTeacher)
    stack = models.blocks(student.module.model), teacher.blocks
    connectors = student.module.stones.connectors
    steps = rows(start_step=0, steps=settings.connector_batches)
    fit_connectors(world, student, connectors, job.stones, *stack, teacher, steps)


def job_tokenizer(world: World, job: Job, *, resuming: bool) -> Any:
    """The job's tokenizer, before anything is written."""
    if job.tokenizer is not None or resuming:
        return models.load_tokenizer(
            job.tokenizer or job.initial, trust_remote_code=job.recipe.teacher.trust_remote_code
        )
    return on_main(world, lambda: teacher_tokenizer(job.recipe))


def write_initial(world: World, job: Job, tokenizer: Any, *, resuming: bool) -> None:
    """Write the folder the model starts from; one that is there may be another recipe's, unless a checkpoint goes with it."""
    if job.initial != job.folder / "initial" or (resuming and (job.initial / "config.json").is_file()):
        return
    recipe = job.recipe
    if job.makes_teacher:
        on_main(world, lambda: initial_teacher(recipe, tokenizer, job))
    else:
        teacher = on_main(world, lambda: models.resolve(recipe.teacher_path, "teacher.path", recipe.teacher.revision))
        on_main(world, lambda: initial_student(recipe, teacher, job.initial))


def pair_names(
    pairs: Sequence[tuple[int, int]], encoders: tuple[int, int] | None = None, *, redraws: bool = False
) -> list[str]:
    """How pairs are written in logs: `student<teacher`, `e` for the embeddings, `*` for a teacher block that is drawn again and again;
    of encoder-decoders `enc 0<3` and `dec 1<7`."""

    def name(block: int, encoder: int) -> str:
        return "e" if block < 0 else str(block - encoder if block >= encoder else block)

    if encoders is None:
        return [f"{name(s, 0)}<{'*' if redraws and t >= 0 else name(t, 0)}" for s, t in pairs]
    return [
        f"{'enc' if EMBEDDING <= s < encoders[0] else 'dec'} {name(s, encoders[0])}<{name(t, encoders[1])}"
        for s, t in pairs
    ]


def remove_initial(job: Job) -> None:
    """The starting folder is not needed once the model is exported; a study keeps its own."""
    if job.initial == job.folder / "initial":
        shutil.rmtree(job.initial, ignore_errors=True)
    shutil.rmtree(job.folder / "nvme" / "teacher", ignore_errors=True)
