"""What a run would refuse, asked of the functions that the run asks, before there is one: by `llmkd doctor` and at the start of a study."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import PreTrainedConfig

from llmkd.data.batches import Family
from llmkd.data.tokenized import PackedTokens, Tokens
from llmkd.errors import InputError
from llmkd.inference.vllm_setup import check_installed
from llmkd.layer_map import compared
from llmkd.models.families import depths
from llmkd.models.folders import resolve
from llmkd.models.stored import read_config
from llmkd.recipe.recipe import Recipe
from llmkd.recipe.rollouts import check_written
from llmkd.recipe.study_entries import StudyEntry, entry_recipe
from llmkd.rollouts.prompts import check_prompts
from llmkd.text import counted
from llmkd.training import jobs
from llmkd.training.build import rate_of_step, total_steps
from llmkd.training.pairs import depths_of, maps_of


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


def runs_at_once(recipe: Recipe, ranks: int) -> int:
    """How many training runs of a study there are at a time on this machine."""
    settings = recipe.study.parallel
    return max(torch.cuda.device_count() // ranks, 1) if settings == "auto" else settings


def check_beside(recipe: Recipe, ranks: int) -> None:
    """Raise InputError where this machine has too few GPUs for so many training runs at a time."""
    runs, gpus = runs_at_once(recipe, ranks), torch.cuda.device_count()
    if runs > 1 and recipe.rollouts is not None and recipe.rollouts.devices:
        raise InputError(
            "study.parallel: rollouts.devices names GPUs for one run, and several would meet there; write study.parallel: 1"
        )
    if runs > 1 and 0 < gpus < runs * ranks:
        raise InputError(
            f"study.parallel: {runs} runs of {counted(ranks, 'rank')} take {runs * ranks} GPUs, and there are {gpus}; "
            f"write study.parallel: {max(gpus // ranks, 1)}, or auto"
        )


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


def check_pair_weights(recipe: Recipe, entries: Sequence[StudyEntry], teacher: PreTrainedConfig) -> None:
    """Raise InputError where students that share the recipe's pair weights have maps of different numbers of pairs."""
    if recipe.matching.pair_weights is None:
        return
    counts: dict[str, int] = {}
    for entry in entries:
        name = entry.strategy or entry.name
        if entry.kind != "student" or "matching.pair_weights" in recipe.study.changes(name):
            continue
        own = entry_recipe(recipe, entry).changed({"matching.pair_weights": None})
        pairs = maps_of(own, depths_of(own, student_shape(own, teacher)[0]), depths(teacher))
        if pairs:  # where none is matched, no weight is read
            counts[name] = len(compared(own.matching.strategy, pairs))
    if len(set(counts.values())) > 1:
        listed = ", ".join(f"{name} has {count} pairs" for name, count in counts.items())
        name, count = min(counts.items(), key=lambda item: item[1])
        example = f"{{{name}_weighted: {{matching.strategy: {name}, matching.pair_weights: {[1.0] * count}}}}}"
        raise InputError(
            f"matching.pair_weights: {listed}, and one list can't weigh them all; take it out, and write under study.variants a student "
            f"for each strategy with weights of its own, e.g. {example}"
        )
