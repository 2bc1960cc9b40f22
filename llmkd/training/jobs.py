"""From a recipe to one training run, checked before anything is written.

A `Job` is all that the loop needs; there is one for distilling a student and one for fine-tuning a teacher.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass, field
from operator import attrgetter
from pathlib import Path
from typing import Any

from datasets import Dataset

from llmkd.data.batches import Family
from llmkd.data.other_families import check_format, label_names
from llmkd.data.rows import HASHES, load_rows, source_contents, stream_contents
from llmkd.distributed.checksums import is_finished, meta_of
from llmkd.distributed.ds_configs import load_ds_config
from llmkd.distributed.ranks import World, on_main
from llmkd.errors import InputError
from llmkd.files import ROOT
from llmkd.layer_map import Pairs, compared
from llmkd.losses.objective import Weights
from llmkd.models import families, folders, load, make
from llmkd.models.architectures import new_config
from llmkd.models.stored import read_config
from llmkd.models.vocabularies import check_same_tokens
from llmkd.recipe.data import Data, Rows
from llmkd.recipe.inputs import finetune_inputs, fingerprint, training_inputs
from llmkd.recipe.models import Student, Teacher
from llmkd.recipe.recipe import Recipe
from llmkd.recipe.rollouts import check_writers
from llmkd.recipe.run import Train
from llmkd.recipe.stones import check_something_to_learn
from llmkd.teachers import pipeline_stage as stage
from llmkd.teachers.pipeline_schedule import stage_count
from llmkd.training import checks
from llmkd.training.checkpoint import check_same
from llmkd.training.pairs import depths_of, encoders_of, maps_of, pair_names, stones_of


@dataclass(frozen=True)
class Job:
    """One training run. `teacher` is None where none is needed (fine-tuning; cross-entropy alone)."""

    folder: Path
    recipe: Recipe
    inputs: dict[str, Any]
    """The keys and file hashes that decide the result; a folder with a checkpoint or a model of other inputs is refused."""
    initial: Path
    tokenizer: Path | None
    """The folder whose tokenizer is used; None where one is trained on the data."""
    teacher: Path | None
    pairs: Pairs
    weights: Weights
    train: Train
    data: Data
    seed: int
    makes_teacher: bool
    family: Family
    student_depths: tuple[int, ...] = ()
    """How many blocks each of the student's stacks has."""
    teacher_depths: tuple[int, ...] = ()
    stones: Pairs = ()
    """(student block, teacher block) of each stepping stone, by student block."""
    further_tokens: Mapping[int, str] = field(default_factory=dict)
    """The tokens that only one of the student and its teacher has, by id: no row may hold one."""

    @property
    def title(self) -> str:
        """The run's name in logs: its folder's."""
        return self.folder.name

    @property
    def encoders(self) -> tuple[int, int] | None:
        """Of encoder-decoders, how many blocks the student's and the teacher's encoder have."""
        return encoders_of(self.student_depths, self.teacher_depths)

    @property
    def compared(self) -> Pairs:
        """The pairs, or of a learned map one of each student block."""
        return compared(self.recipe.matching.strategy, self.pairs)

    @property
    def names(self) -> list[str]:
        """What these are called in logs."""
        return pair_names(self.compared, self.encoders, redraws=self.redraws)

    @property
    def redraws(self) -> bool:
        """Whether the map is drawn again during training; `pairs` is then the first draw."""
        return bool(self.pairs) and self.recipe.matching.redraw_every > 0


def distil_job(world: World, recipe: Recipe, folder: Path) -> Job:
    """A student under the recipe's strategy. Raises InputError before anything is written."""
    teacher = checked_folder(world, recipe.teacher_path, "teacher.path", recipe.teacher)
    teacher_config = load.load_config(teacher, trust_remote_code=recipe.teacher.trust_remote_code)
    family = families.family(teacher_config)
    checkpoint = None
    student_config = teacher_config
    if recipe.student.init == "checkpoint":
        path = recipe.student.path or ""
        checkpoint = checked_folder(world, path, "student.path", recipe.student)
        student_config = load.load_config(checkpoint, trust_remote_code=recipe.student.trust_remote_code)
    pairs, stones, weights = check_student(recipe, family, teacher_config, student_config)
    further = {} if checkpoint is None else check_vocabularies(recipe, teacher, checkpoint)
    written = recipe.rollouts is not None and recipe.rollouts.before_training
    ranks = {"ranks": world.size, "ranks_per_node": world.local_size}
    check_place(recipe, teacher_config, weights, **ranks, gpu=world.device.type == "cuda")
    job = Job(
        folder=folder,
        recipe=recipe,
        inputs=on_main(world, lambda: student_inputs(recipe)),
        initial=folder / "initial" if checkpoint is None or recipe.student.adapter else checkpoint,
        tokenizer=checkpoint or teacher,
        teacher=teacher if weights.kl or weights.hidden or stones else None,
        pairs=pairs,
        weights=weights,
        train=recipe.train,
        data=recipe.data,
        seed=recipe.seed,
        makes_teacher=False,
        family=family,
        student_depths=depths_of(recipe, student_config),
        teacher_depths=families.depths(teacher_config),
        stones=stones,
        further_tokens=further if weights.kl or weights.hidden or stones or written else {},
    )
    on_main(world, lambda: finished(job))  # refuses a folder of another recipe
    return job


def checked_folder(world: World, path: str, what: str, section: Teacher | Student) -> Path:
    """The local folder of a model whose configuration is that of its weights. Raises InputError elsewhere; rank 0 alone looks."""
    revision = section.revision if isinstance(section, Teacher) and what == "teacher.path" else None
    return on_main(world, lambda: read_config(path, what, revision, trust_remote_code=section.trust_remote_code)[0])


def check_student(recipe: Recipe, family: Family, teacher: Any, student: Any) -> tuple[Pairs, Pairs, Weights]:
    """(pairs, stones, weights) of a student. `teacher`, `student`: configurations; `student` is its checkpoint's, else the teacher's.

    Raises InputError for all that configurations alone can show to be wrong, so that a study can check before its teacher is trained.
    """
    checks.check_training(recipe, family)
    checks.check_tuned(recipe, family, teacher)
    checks.check_adapter_folders(recipe, teacher, student)
    checkpoint = recipe.student.init == "checkpoint"
    if checkpoint:
        checks.check_same_classes(family, families.family(student))
    depths, student_depths = families.depths(teacher), depths_of(recipe, student)
    pairs = maps_of(recipe, student_depths, depths)
    stones = stones_of(recipe, student_depths[0], depths[0])
    checks.check_upper_blocks(recipe, teacher, student, pairs=pairs, stones=stones)
    checks.check_adapted(recipe, family, student, pairs=pairs)
    checks.check_quantized(recipe, family, teacher)
    weights = _weights(recipe, pairs, stones)
    checks.check_projected(recipe, teacher, student, pairs=pairs)
    shape = student
    if not checkpoint:
        checks.check_measured(recipe, teacher)
        chosen = make.stack_choices(recipe.student.planned_blocks, student_depths, depths)
        shape, whole = (load.student_config(teacher, chosen, width) for width in (recipe.student.width, {}))
        if recipe.student.init == "teacher" and family.kind == "decoder":
            load.check_copied_config(teacher, whole, chosen, trust_remote_code=recipe.teacher.trust_remote_code)
    checks.check_routed(recipe, shape)
    teacher_name, _ = recipe.teacher_start or ("finetune.architecture", None)
    _check_shape(recipe, "teacher", teacher, teacher_name, compared=bool(pairs))
    _check_shape(recipe, "student", student, recipe.student.path or "", compared=bool(pairs))
    return pairs, stones, weights


def check_place(recipe: Recipe, teacher: Any, weights: Weights, *, ranks: int, ranks_per_node: int, gpu: bool) -> None:
    """Raise InputError where the ranks of a run, or their devices, can't hold its teacher as the recipe asks."""
    if recipe.teacher.placed.is_staged and (weights.kl or weights.hidden):
        stage.check_pipelined(teacher)
        stage_count(recipe.teacher.stages, ranks, ranks_per_node, sum(families.depths(teacher)))
    check_devices(recipe, gpu=gpu)


def check_devices(recipe: Recipe, *, gpu: bool) -> None:
    """Raise InputError where this machine has not what the recipe asks of it; `gpu`: whether ranks run on GPUs."""
    if recipe.teacher.offload_states and not gpu:
        raise InputError("teacher.offload_states: there is no GPU here whose memory it would spare; write false")
    checks.check_kernels(recipe, gpu=gpu)
    check_writers(recipe.rollouts, gpu=gpu)


def _weights(recipe: Recipe, pairs: Pairs, stones: Pairs) -> Weights:
    """The weights of the loss's parts. Raises InputError where nothing is left to learn from."""
    weights = Weights(
        ce=recipe.loss.ce,
        kl=recipe.loss.kl,
        hidden=recipe.loss.hidden if pairs else 0.0,
        router=recipe.loss.router,
        kl_positions=recipe.loss.kl_positions,
        hidden_positions=recipe.matching.positions,
        pairs=recipe.matching.pair_weights if pairs else None,
    )
    check_something_to_learn(recipe.loss, recipe.matching.strategy, pairs=bool(pairs), stones=bool(stones))
    return weights


def teacher_family(recipe: Recipe, shape: Any) -> Family:
    """The family of a recipe's teacher with this configuration; an encoder that the recipe fine-tunes has its data's classes."""
    family = families.family(shape)
    if recipe.finetune is None or family.kind != "encoder":
        return family
    return Family("encoder", labels=labels_of(recipe.finetune.data or recipe.data))


def check_vocabularies(recipe: Recipe, teacher: Path, student: Path) -> dict[int, str]:
    """The tokens that only one of a student's checkpoint and its teacher has, by id. Raises InputError where the others differ."""
    return check_same_tokens(
        load.load_tokenizer(teacher, trust_remote_code=recipe.teacher.trust_remote_code),
        load.load_tokenizer(student, trust_remote_code=recipe.student.trust_remote_code),
    )


def _check_shape(recipe: Recipe, section: str, shape: Any, name: str, *, compared: bool) -> None:
    """Raise InputError for a model that can't be run with its section's settings, or on rows of data.max_length, or compared by states."""
    attention = recipe.teacher.attention if section == "teacher" else recipe.student.attention
    load.check_usable(shape, section=section, attention=attention, packed=recipe.data.batching == "packed")
    _check_lengths(recipe.data.max_length, families.positions(shape), name)
    if compared:
        normed = recipe.matching.final_state == "normed"
        families.check_states(shape, normed=normed, embedding=recipe.matching.embedding)


def finetune_job(world: World, recipe: Recipe, folder: Path) -> Job:
    """The teacher of a recipe with a `finetune` section: the same loop, cross-entropy alone."""
    settings = recipe.finetune
    if settings is None:
        raise InputError("the recipe has no finetune section; there is no teacher to make")
    start = settings.path
    data = settings.data or recipe.data
    checkpoint = None if start is None else checked_folder(world, start, "finetune.path", recipe.teacher)
    if checkpoint is None:
        assert settings.architecture is not None
        family = families.family(new_config(settings.architecture.model_dump()))
        _check_lengths(data.max_length, settings.architecture.max_position_embeddings, "finetune.architecture")
        if data.batching == "packed" and family.kind != "decoder":
            raise InputError("data.batching: only a decoder's rows are packed; write grouped")
    else:
        shape = load.load_config(checkpoint, trust_remote_code=recipe.teacher.trust_remote_code)
        _check_lengths(data.max_length, families.positions(shape), start or "")
        packed = data.batching == "packed"
        load.check_usable(shape, section="teacher", attention=recipe.teacher.attention, packed=packed)
        family = families.family(shape)
        checks.check_tuned(recipe, family, shape)
    for part in data.parts:
        check_format(family, part.row_format)
    if family.kind == "encoder":  # its classes are the data's, not the checkpoint's
        family = Family("encoder", labels=on_main(world, lambda: labels_of(data)))
    job = Job(
        folder=folder,
        recipe=recipe,
        inputs=on_main(world, lambda: teacher_inputs(recipe)),
        initial=folder / "initial" if checkpoint is None or family.kind == "encoder" else checkpoint,
        tokenizer=checkpoint,
        teacher=None,
        pairs=(),
        weights=Weights(ce=1.0, kl=0.0, hidden=0.0, kl_positions="trained", hidden_positions="trained"),
        train=settings.train,
        data=data,
        seed=settings.seed,
        makes_teacher=True,
        family=family,
    )
    on_main(world, lambda: finished(job))  # refuses a folder of another recipe
    return job


def student_inputs(recipe: Recipe) -> dict[str, Any]:
    """All that decides a student's weights: keys of the recipe, and hashes of the local files that it names."""
    inputs = {**training_inputs(recipe), **_contents(recipe, recipe.train, recipe.data)}
    keys = ("teacher.path", "teacher.adapter", "student.path", "student.adapter")
    inputs |= folders.contents_of({key: attrgetter(key)(recipe) for key in keys})
    return {**inputs, **(teacher_inputs(recipe) if recipe.finetune else {})}


def teacher_inputs(recipe: Recipe) -> dict[str, Any]:
    """As `student_inputs`, for the recipe's own teacher."""
    assert recipe.finetune is not None
    hashes = _contents(recipe, recipe.finetune.train, recipe.finetune.data or recipe.data)
    hashes |= folders.contents_of({"path": recipe.finetune.path})
    return {**finetune_inputs(recipe), **{f"finetune.{key}": value for key, value in hashes.items()}}


def _contents(recipe: Recipe, train: Train, data: Data) -> dict[str, str]:
    """Hashes of the local files that these sections name; what is on the hub is identified by its name alone."""
    hashes = {}
    of_source = functools.partial(source_contents, hashes=recipe.tokens_folder(data) / HASHES)
    contents = stream_contents if data.streaming else of_source
    for number, part in enumerate(data.parts):
        if (rows := contents(part.source, part.split)) is not None:
            hashes[f"data.sources.{number}:contents" if data.sources else "data.source:contents"] = rows
    held_out = data.held_out if train.chooses else None
    for number, part in enumerate(() if held_out is None else held_out.parts):
        if (rows := of_source(part.source, part.split)) is not None:
            hashes[f"data.validation.{number}:contents" if number else "data.validation.source:contents"] = rows
    if train.deepspeed.endswith(".json"):
        hashes["train.deepspeed:contents"] = fingerprint(load_ds_config(train.deepspeed, ROOT / "ds_configs"))
    return hashes


def finished(job: Job) -> bool:
    """Whether the job's model is there. Raises InputError if it was trained with other inputs."""
    if not (job.folder / "model" / "llmkd.json").is_file():
        return False
    done = is_finished(job.folder)
    check_same(meta_of(job.folder)["inputs"], job.inputs, job.folder)
    return done


def _check_lengths(max_length: int, positions: int | None, where: str) -> None:
    if positions is not None and max_length > positions:
        raise InputError(
            f"data.max_length: {max_length} tokens are more than the {positions} positions of {where}; write at most {positions}"
        )


def read_rows(part: Rows) -> Dataset:
    """The rows of a source, as text."""
    which = {"name": part.name, "split": part.split, "rows": part.rows, "records_seed": part.records_seed}
    return load_rows(part.source, **which, columns=part.columns)


def labels_of(data: Data) -> tuple[str, ...]:
    """The classes of an encoder's rows."""
    if data.sources:
        raise InputError(
            "data.sources: an encoder is trained on one source, whose labels are its classes; write data.source"
        )
    if data.streaming:
        raise InputError(
            "data.streaming: an encoder's classes are the labels of all rows, and a stream is not read to its end; write streaming: false"
        )
    return label_names(read_rows(data))
