"""Texts that models write, as rows to train on: by the teacher before training, by the student while it is trained."""

from __future__ import annotations

import functools
import logging
from pathlib import Path
from typing import Any

import torch

from llmkd.data.tokenized import Tokens
from llmkd.distributed.ranks import World, on_main
from llmkd.inference.backends import stop_ids, writing_model
from llmkd.inference.choose import WORTH_VLLM, choose_backend
from llmkd.inference.vllm_setup import check_installed
from llmkd.models import folders, load
from llmkd.processes import Stopping
from llmkd.recipe.inputs import fingerprint
from llmkd.recipe.rollouts import Rollouts as Section
from llmkd.rollouts.by_teacher import ByTeacher, rewritten
from llmkd.rollouts.prompts import check_prompts
from llmkd.rollouts.source import Micro, Rollouts
from llmkd.rollouts.texts import KnownTokens
from llmkd.rollouts.wanted import Schedule
from llmkd.rollouts.weights import InFolder, Lent
from llmkd.rollouts.writer import Writing, writer_of, writer_variables
from llmkd.training.build import students_trust
from llmkd.training.cache_contents import student_vocabulary
from llmkd.training.jobs import Job
from llmkd.training.tokens import StoppedTokenizing
from llmkd.training.validation_rows import RunRows, run_rows

log = logging.getLogger("llmkd")


def rows_of(world: World, job: Job, tokenizer: Any, stopping: Stopping | None = None) -> RunRows:
    """The job's rows, with the teacher's texts as completions where the recipe asks for them (all ranks take part).

    Raises StoppedTokenizing where `stopping` is asked to before all are there, and InputError as `run_rows`.
    """
    rows, settings = run_rows(world, job, tokenizer, stopping), job.recipe.rollouts
    if settings is None or not settings.before_training or job.makes_teacher:
        return rows
    section = job.recipe.teacher
    teacher = on_main(world, lambda: folders.resolve(job.recipe.teacher_path, "teacher.path", section.revision))
    on_main(world, lambda: check_prompts(rows.training))
    writing = Writing(
        backend=_backend(world, settings, teacher, settings.teachers_share * rows.training.count),
        dtype=section.dtype,
        stops=stop_ids(teacher, tokenizer),
        trust_remote_code=section.trust_remote_code,
        same_weights=True,
        **_section(job, settings),
    )
    place = job.recipe.tokens_folder(job.data)
    how = ByTeacher(
        teacher,
        on_main(world, lambda: folders.folder_contents(teacher, weights_alone=True)),
        writing,
        settings.teachers_share,
        settings.truncated == "drop",
        on_main(world, lambda: known_tokens(job, teacher)),
        place,
        by_rows=not any(job.data.weights),
    )
    variables = writer_variables(world, settings.devices, settings.tensor_parallel)
    new_writer = functools.partial(writer_of, writing, place / f"writer-{world.rank}.log", variables)
    training = rewritten(world, rows.training, how, new_writer, lambda: stopping is not None and stopping.asked)
    if training is None:
        raise StoppedTokenizing
    if rows.validation is None:
        return RunRows(training, training, None)
    return RunRows.apart(training, rows.all.only(rows.validation))


def known_tokens(job: Job, teacher: Path) -> KnownTokens:
    """The tokens that the job's student and this teacher both have."""
    size = load.load_config(teacher, trust_remote_code=job.recipe.teacher.trust_remote_code).vocab_size
    return KnownTokens(min(size, student_vocabulary(job.recipe) or size), frozenset(job.further_tokens))


def _backend(world: World, settings: Section, model: Path, texts: float) -> str:
    """What runs a model that writes so many texts at one time."""
    backend, why = settings.backend, "as the recipe says"
    if settings.by == "mixed":
        backend, why = "hf", "each token is drawn from two models"
    elif backend == "auto":
        tokens = texts * settings.max_new_tokens
        backend, why = on_main(world, lambda: choose_backend("auto", model, tokens, WORTH_VLLM))
    if backend == "vllm":
        check_installed("rollouts.backend")
    log.info("rollouts: by %s (%s)", backend, why)
    return backend


def _section(job: Job, settings: Section) -> dict[str, Any]:
    """What of a section `rollouts` says how and where texts are written."""
    names = ("max_new_tokens", "temperature", "top_p", "batch_size", "engines", "tensor_parallel")
    return {**{name: getattr(settings, name) for name in names}, "max_length": job.data.max_length}


def rollouts_of(
    world: World, job: Job, tokens: Tokens, student: Any, tokenizer: Any, *, accumulation: int, steps: int
) -> Rollouts | None:
    """The source of the batches of a job whose texts are written as it goes; None of any other. `student`: transformers' model."""
    settings, train = job.recipe.rollouts, job.train
    if settings is None or not settings.during_training or job.makes_teacher:
        return None
    teacher = job.teacher
    assert teacher is not None, "the recipe's checks see to it"
    schedule = Schedule(settings.every, settings.share, settings.samples, job.seed, steps)
    writing = Writing(
        backend=_backend(world, settings, job.initial, round(settings.share * train.batch_size * settings.every)),
        dtype=train.dtype,
        stops=stop_ids(job.initial, tokenizer),
        trust_remote_code=students_trust(job),
        mixed_with=str(job.teacher) if settings.by == "mixed" else None,
        mixed_share=settings.alpha if settings.by == "mixed" else 0.0,
        mixed_dtype=job.recipe.teacher.dtype,
        mixed_trusts=job.recipe.teacher.trust_remote_code,
        gpu_share=settings.gpu_share if settings.devices is None else None,
        **_section(job, settings),
    )
    on_main(world, lambda: check_prompts(tokens))
    apart = None if job.recipe.loss.own_divergence is None else train.micro_batch_size
    pad_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    log_file = job.folder / "rollouts" / f"writer-{world.rank}.log"
    variables = writer_variables(world, settings.devices, settings.tensor_parallel)
    lent = None if writing.backend == "vllm" else _lent(job, student, writing)
    return Rollouts(
        world,
        job.folder,
        tokens,
        schedule,
        Micro(train.batch_size, accumulation, job.seed, pad_id, apart),
        writing,
        InFolder(student, job.folder) if lent is None else lent,
        functools.partial(writer_of, writing, log_file, variables, lent),
        drops_truncated=settings.truncated == "drop",
        tokenizer=tokenizer,
        known=on_main(world, lambda: known_tokens(job, teacher)),
        run=fingerprint(job.inputs),
    )


def _lent(job: Job, student: Any, writing: Writing) -> Lent:
    """The model by which Hugging Face writes while `student` lends it its weights."""
    how = {"trust_remote_code": writing.trust_remote_code, "devices": [torch.device("cpu")]}
    return Lent(student, job.initial, lambda folder: writing_model(folder, writing.dtype, **how))
