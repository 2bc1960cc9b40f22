"""What a run starts from: a student not yet distilled, a teacher not yet tuned, a tokenizer."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path
from typing import Any

from llmkd.distributed.ranks import World, on_main
from llmkd.errors import InputError
from llmkd.models import families, folders, load, make
from llmkd.models.architectures import new_config
from llmkd.recipe.recipe import Recipe
from llmkd.training.jobs import Job, read_rows
from llmkd.training.pairs import depths_of

log = logging.getLogger("llmkd")
TEXT_COLUMNS = ("prompt", "completion", "text", "text_a", "text_b")
"""Of rows, the columns that a new tokenizer is trained on."""


def initial_student(recipe: Recipe, teacher: Path, folder: Path) -> None:
    """Write the HF folder an undistilled student starts from (rank 0 alone)."""
    dtype = load.DTYPES[recipe.train.dtype]
    trust = recipe.teacher.trust_remote_code
    shape = load.load_config(teacher, trust_remote_code=trust)
    depths, wanted = families.depths(shape), depths_of(recipe, shape)
    if recipe.student.init == "random":
        make.random_student(
            teacher, wanted, recipe.student.width, folder, seed=recipe.seed, dtype=dtype, trust_remote_code=trust
        )
        return
    chosen = make.stack_choices(recipe.student.copy_blocks, wanted, depths)
    if families.kind(shape) == "encoder":
        kept = recipe.student.classifier == "copied"
        make.copied_encoder(teacher, chosen, folder, seed=recipe.seed, dtype=dtype, classifier=kept)
    else:
        make.copied_student(teacher, chosen, folder, dtype=dtype, trust_remote_code=trust)
    log.info("student: %s blocks copied from the teacher's %s", " + ".join(map(str, wanted)), list(chosen))


def initial_teacher(recipe: Recipe, tokenizer: Any, job: Job) -> None:
    """Write the HF folder a teacher starts from: a new model of `finetune.architecture` with this tokenizer, or an encoder's checkpoint
    with new classes (rank 0 alone)."""
    settings, folder = recipe.finetune, job.initial
    assert settings is not None
    if settings.path is not None:
        assert job.tokenizer is not None
        dtype = load.DTYPES[settings.train.dtype]
        make.new_classifier(job.tokenizer, job.family.labels, folder, seed=settings.seed, dtype=dtype)
        return
    assert settings.architecture is not None
    shape = new_config(settings.architecture.model_dump(), tokenizer, job.family.labels)
    make.new_model(
        shape,
        folder,
        seed=settings.seed,
        dtype=load.DTYPES[settings.train.dtype],
        tokenizer=tokenizer.save_pretrained,
    )


def teacher_tokenizer(recipe: Recipe) -> Any:
    """The tokenizer of a new teacher, trained on its data (rank 0 alone)."""
    settings = recipe.finetune
    assert settings is not None and settings.architecture is not None
    sources = [read_rows(part) for part in (settings.data or recipe.data).parts]
    if any("messages" in rows.column_names for rows in sources):
        raise InputError(
            "finetune.architecture: a new tokenizer has no chat template; give prompt/completion or text data"
        )
    texts = (
        text for rows in sources for column in TEXT_COLUMNS if column in rows.column_names for text in rows[column]
    )
    kind = families.kind(new_config(settings.architecture.model_dump()))
    return make.new_tokenizer(texts, settings.architecture.vocab_size, kind)


def job_tokenizer(world: World, job: Job, *, resuming: bool) -> Any:
    """The job's tokenizer, before anything is written."""
    if job.tokenizer is not None or resuming:
        return load.load_tokenizer(job.tokenizer or job.initial, trust_remote_code=job.recipe.teacher.trust_remote_code)
    return on_main(world, lambda: teacher_tokenizer(job.recipe))


def write_initial(world: World, job: Job, tokenizer: Any, *, resuming: bool) -> None:
    """Write the folder the model starts from, over an older one (it may be another recipe's) unless the run resumes."""
    if job.initial != job.folder / "initial" or (resuming and (job.initial / "config.json").is_file()):
        return
    recipe = job.recipe
    if job.makes_teacher:
        on_main(world, lambda: initial_teacher(recipe, tokenizer, job))
    else:
        teacher = on_main(world, lambda: folders.resolve(recipe.teacher_path, "teacher.path", recipe.teacher.revision))
        on_main(world, lambda: initial_student(recipe, teacher, job.initial))


def remove_initial(job: Job) -> None:
    """Remove the run's folder `initial`, which the exported model replaces, and the teacher's offloaded weights."""
    if job.initial == job.folder / "initial":
        shutil.rmtree(job.initial, ignore_errors=True)
    shutil.rmtree(job.folder / "nvme" / "teacher", ignore_errors=True)
