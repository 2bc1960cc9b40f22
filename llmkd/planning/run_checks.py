"""What a run would refuse, asked of the functions that the run asks, before there is one: by `llmkd doctor` and at the start of a study."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import PreTrainedConfig

from llmkd.data.batches import Family
from llmkd.data.tokenized import PackedTokens, Tokens
from llmkd.errors import InputError
from llmkd.inference.vllm_setup import check_installed
from llmkd.models.folders import resolve
from llmkd.models.stored import read_config
from llmkd.recipe.recipe import Recipe
from llmkd.recipe.rollouts import check_written
from llmkd.rollouts.prompts import check_prompts
from llmkd.training import jobs
from llmkd.training.build import rate_of_step, total_steps


def student_shape(recipe: Recipe, teacher: PreTrainedConfig) -> tuple[PreTrainedConfig, Path | None]:
    """(the configuration that a student starts from, its checkpoint's or the teacher's; the checkpoint)."""
    if recipe.student.init != "checkpoint":
        return teacher, None
    trust = recipe.student.trust_remote_code
    checkpoint, config = read_config(recipe.student.path or "", "student.path", trust_remote_code=trust)
    return config, checkpoint


def check_trained(recipe: Recipe, family: Family, teacher: PreTrainedConfig, ranks: int) -> None:
    """Raise InputError for a student that its training would refuse, or that a study can't score.

    `teacher`: the configuration, whether the model is there or not.
    """
    if recipe.student.lora is not None and recipe.student.lora.export == "adapter":
        raise InputError(
            "student.lora.export: a study scores plain models, and adapter writes none; write both or merged, or train without a study"
        )
    student, checkpoint = student_shape(recipe, teacher)
    _, _, weights = jobs.check_student(recipe, family, teacher, student)
    if checkpoint is not None and (tokenizer := tokenizer_folder(recipe)) is not None:
        jobs.check_vocabularies(recipe, tokenizer, checkpoint)
    jobs.check_place(recipe, teacher, weights, ranks=ranks, ranks_per_node=ranks, gpu=torch.cuda.is_available())
    check_machine(recipe)


def tokenizer_folder(recipe: Recipe) -> Path | None:
    """The folder of the teacher, or of what it starts from; None where its tokenizer is still to be trained."""
    if recipe.finetune is None:
        return resolve(recipe.teacher.path or "", "teacher.path", recipe.teacher.revision)
    return None if recipe.finetune.path is None else resolve(recipe.finetune.path, "finetune.path")


def check_machine(recipe: Recipe) -> None:
    """Raise InputError where this machine lacks a device or a package that the recipe asks for."""
    jobs.check_devices(recipe, gpu=torch.cuda.is_available())
    if recipe.rollouts is not None and recipe.rollouts.writes and recipe.rollouts.backend == "vllm":
        check_installed("rollouts.backend")


def check_prompted(recipe: Recipe, tokens: Tokens) -> None:
    """Raise InputError for a row without a prompt, where texts are written after prompts."""
    if recipe.rollouts is not None and recipe.rollouts.writes:
        check_prompts(tokens)


def check_length(recipe: Recipe, drawn: Tokens | PackedTokens) -> None:
    """Raise InputError where there are too few rows or sequences for a batch, or steps for the schedule; a stream's are not counted."""
    steps = total_steps(recipe.train, None if recipe.data.streaming else drawn.count)
    rate_of_step(recipe.train, steps)
    check_written(recipe.rollouts, recipe.train, steps)
