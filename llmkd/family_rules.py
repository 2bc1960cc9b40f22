"""What a recipe may ask of which family of models; asked before anything is written."""

from __future__ import annotations

from pathlib import Path

from transformers import PreTrainedConfig

from llmkd.architectures import new_config
from llmkd.config import Data, Recipe
from llmkd.errors import InputError
from llmkd.families import Family, Kind
from llmkd.family_data import check_format
from llmkd.model_folders import resolve
from llmkd.models import load_config

SAID = {"encoder": "an encoder", "encoder_decoder": "an encoder-decoder", "decoder": "a decoder"}


def teacher_shape(recipe: Recipe) -> PreTrainedConfig:
    """The configuration of the recipe's teacher, or of what it starts from, before it is there."""
    if recipe.finetune is not None and recipe.finetune.architecture is not None:
        return new_config(recipe.finetune.architecture.model_dump())
    start = recipe.finetune.path if recipe.finetune is not None else recipe.teacher.path
    where = "teacher.path" if recipe.finetune is None else "finetune.path"
    folder = resolve(start or "", where, recipe.teacher.revision)
    return load_config(folder, trust_remote_code=recipe.teacher.trust_remote_code)


def check_training(recipe: Recipe, family: Family) -> None:
    """Raise InputError for a student's training that this family's models can't have."""
    check_format(family, recipe.data.format)
    student, said = recipe.student, SAID[family.kind]
    if student.decoder_blocks is not None and family.kind != "encoder_decoder":
        raise InputError(f"student.decoder_blocks: {said} has one stack of blocks; leave it out")
    if student.classifier is not None and family.kind != "encoder":
        raise InputError(f"student.classifier: {said} has no classes; leave it out")
    if family.kind == "decoder":
        return
    if recipe.teacher.placement not in ("replicated", "zero3") or recipe.teacher.share_cache:
        key = "share_cache" if recipe.teacher.share_cache else "placement"
        cure = "false" if recipe.teacher.share_cache else "replicated or zero3"
        raise InputError(
            f"teacher.{key}: only a decoder can be cut into stages or cached, and this is {said}; write {cure}"
        )
    if recipe.teacher.offload_states:
        raise InputError(f"teacher.offload_states: not made for {said} yet; write false")
    if recipe.stones is not None and family.kind == "encoder_decoder":
        raise InputError(
            f"stones: a stone goes on with the upper blocks of one stack, and this is {said}; leave the section out, or give a decoder or "
            "an encoder"
        )
    if family.kind == "encoder":
        _check_encoder(recipe)


def _check_encoder(recipe: Recipe) -> None:
    if recipe.loss.kl_positions != "trained":
        raise InputError(
            "loss.kl_positions: an encoder has one distribution per row, that of its classes; write trained"
        )
    if recipe.matching.positions != "attended":
        raise InputError("matching.positions: no token of an encoder's text is trained, its class is; write attended")


def check_same_classes(teacher: Family, student: Family) -> None:
    """Raise InputError where a student that is given is of another kind than its teacher, or knows other classes."""
    if teacher.kind != student.kind:
        raise InputError(
            f"student.path: the teacher is {SAID[teacher.kind]}, the student {SAID[student.kind]}; give two of one kind"
        )
    if teacher.labels != student.labels:
        raise InputError(
            f"student.path: the teacher's classes are {', '.join(teacher.labels)}, the student's {', '.join(student.labels)}; give a "
            "student of the same classes in the same order"
        )


def check_evaluation(recipe: Recipe, kind: Kind) -> None:
    """Raise InputError for an evaluation that models of this kind can't have."""
    settings, said = recipe.evaluation, SAID[kind]
    if kind != "decoder" and settings.tasks:
        cure = "evaluation.classification" if kind == "encoder" else "evaluation.generation"
        raise InputError(
            f"evaluation.tasks: lm-eval is run on decoders, and this is {said}; leave tasks out and write {cure}"
        )
    if kind == "encoder" and settings.generation is not None:
        raise InputError(
            "evaluation.generation: an encoder writes no texts; leave it out and write evaluation.classification"
        )
    if kind == "encoder_decoder" and settings.generation is not None and settings.generation.backend == "vllm":
        raise InputError(f"evaluation.generation.backend: vLLM does not run {said} here; write hf")
    if kind != "encoder" and settings.classification is not None:
        raise InputError(f"evaluation.classification: only an encoder has classes, and this is {said}; leave it out")
    if settings.classification is not None:
        check_held_out(recipe)


def check_held_out(recipe: Recipe) -> None:
    """Raise InputError if the rows to classify are those that the students are trained on."""
    settings, data = recipe.evaluation.classification, recipe.data
    assert settings is not None
    if settings.source is None and settings.split == data.split:
        raise InputError(
            f"evaluation.classification.split: the students are trained on the split {data.split!r} of {data.source!r}; write a split "
            "that is held out"
        )
    path = Path(data.source).expanduser()
    if settings.source is None and path.is_file():
        raise InputError(
            f"evaluation.classification.source: the students are trained on all of {data.source!r}; name a file of held-out rows"
        )


def held_out_data(recipe: Recipe) -> Data:
    """The rows to classify, as a data section: tokenized as the students' own rows are."""
    settings = recipe.evaluation.classification
    assert settings is not None
    ours = settings.source is None
    return recipe.data.model_copy(
        update={
            "source": recipe.data.source if settings.source is None else settings.source,
            "name": settings.name or (recipe.data.name if ours else None),
            "split": settings.split,
            "rows": settings.rows,
            "too_long": "truncate",  # every row is scored
        }
    )
