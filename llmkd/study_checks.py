"""What would stop a study hours later, asked before anything is written."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedConfig

from llmkd.build import accumulation_steps, total_steps
from llmkd.caching import writing_recipe
from llmkd.checkpoint import check_same
from llmkd.config import Recipe
from llmkd.errors import InputError
from llmkd.evaluation import check_tasks
from llmkd.families import Family, depths, kind
from llmkd.family_rules import check_evaluation, held_out_data, teacher_shape
from llmkd.generation import check as check_generation
from llmkd.jobs import (
    check_place,
    check_student,
    check_vocabularies,
    read_rows,
    student_inputs,
    teacher_family,
    teacher_inputs,
)
from llmkd.model_folders import resolve
from llmkd.models import load_config
from llmkd.recipe_map import depths_of, maps_of
from llmkd.study import entry_recipe


def check(recipe: Recipe, entries: Sequence[dict[str, Any]], ranks: int) -> None:
    """Raise InputError, before anything is written, for what would stop the study hours later.

    Students that can't be trained as their recipe says, ranks that do not share the batch, tasks that are not there, and students or a
    teacher already there that another recipe made.
    """
    _check_scores(recipe)
    teacher = teacher_shape(recipe)
    check_evaluation(recipe, kind(teacher))
    runs = [(recipe.train, recipe.data)]
    if recipe.finetune is not None:
        runs.append((recipe.finetune.train, recipe.finetune.data or recipe.data))
    for train, data in runs:
        accumulation_steps(train, ranks)
        total_steps(train, len(read_rows(data)))
    family = teacher_family(recipe, teacher)
    _check_pair_weights(recipe, entries, teacher)
    if recipe.teacher.share_cache:
        _check_trained(writing_recipe(recipe), family, teacher, ranks)
    for entry in entries:
        if entry["train"] is None:
            continue
        if entry["kind"] == "teacher":
            inputs = teacher_inputs(recipe)
        else:
            one = entry_recipe(recipe, entry)
            _check_trained(one, family, teacher, ranks)
            inputs = student_inputs(one)
        meta = recipe.folder / entry["model"] / "llmkd.json"
        if meta.is_file():
            check_same(json.loads(meta.read_text())["inputs"], inputs, meta.parent.parent)


def _check_scores(recipe: Recipe) -> None:
    """Raise InputError for scores that can't be had of any model."""
    settings = recipe.evaluation
    if not any(step not in ((), None) for step in (settings.tasks, settings.generation, settings.classification)):
        raise InputError(
            "evaluation: a study with nothing to score by; name lm-eval tasks under evaluation.tasks, or write evaluation.generation: {}"
        )
    if settings.classification is not None:
        read_rows(held_out_data(recipe))
    if settings.tasks:
        check_tasks(settings)
    if settings.generation is not None:
        check_generation(settings, recipe.data)


def _check_pair_weights(recipe: Recipe, entries: Sequence[dict[str, Any]], teacher: PreTrainedConfig) -> None:
    """Raise InputError where students that share the recipe's pair weights have maps of different numbers of pairs."""
    if recipe.matching.pair_weights is None:
        return
    counts: dict[str, int] = {}
    for entry in entries:
        name = entry["strategy"]
        if entry["kind"] != "student" or "matching.pair_weights" in recipe.study.changes(name):
            continue
        one = entry_recipe(recipe, entry).changed({"matching.pair_weights": None})
        pairs = maps_of(one, depths_of(one, _student_shape(one, teacher)[0]), depths(teacher))
        if pairs:  # where none is matched, no weight is read
            counts[name] = len(pairs)
    if len(set(counts.values())) > 1:
        said = ", ".join(f"{name} has {count} pairs" for name, count in counts.items())
        name, count = min(counts.items(), key=lambda item: item[1])
        example = f"{{{name}_weighted: {{matching.strategy: {name}, matching.pair_weights: {[1.0] * count}}}}}"
        raise InputError(
            f"matching.pair_weights: {said}, and one list can't weigh them all; take it out, and write under study.variants a student for "
            f"each strategy with weights of its own, e.g. {example}"
        )


def _student_shape(recipe: Recipe, teacher: PreTrainedConfig) -> tuple[PreTrainedConfig, Path | None]:
    """What a student is made of, its checkpoint's configuration or the teacher's, and the checkpoint."""
    if recipe.student.init != "checkpoint":
        return teacher, None
    checkpoint = resolve(recipe.student.path or "", "student.path")
    return load_config(checkpoint, trust_remote_code=recipe.student.trust_remote_code), checkpoint


def _check_trained(recipe: Recipe, family: Family, teacher: PreTrainedConfig, ranks: int) -> None:
    """Raise InputError for a student that its training would refuse; `teacher`: of that shape, be it there or not yet made."""
    student, checkpoint = _student_shape(recipe, teacher)
    _, _, weights = check_student(recipe, family, teacher, student)
    if checkpoint is not None and (known := _tokenizer_folder(recipe)) is not None:
        check_vocabularies(recipe, known, checkpoint)
    check_place(recipe, teacher, weights, ranks=ranks, ranks_per_node=ranks, gpu=torch.cuda.is_available())


def _tokenizer_folder(recipe: Recipe) -> Path | None:
    """The folder of the teacher, or of what it starts from; None where its tokenizer is still to be trained."""
    if recipe.finetune is None:
        return resolve(recipe.teacher.path or "", "teacher.path", recipe.teacher.revision)
    return None if recipe.finetune.path is None else resolve(recipe.finetune.path, "finetune.path")
