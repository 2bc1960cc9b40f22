"""What a recipe may ask of the evaluation of which family of models, asked before anything is written."""

from __future__ import annotations

from pathlib import Path

from llmkd.data.batches import Kind
from llmkd.errors import InputError
from llmkd.models.families import KIND_NAMES
from llmkd.recipe.recipe import Data, Recipe


def check_evaluation(recipe: Recipe, kind: Kind) -> None:
    """Raise InputError for an evaluation that models of this kind can't have."""
    settings, kind_name = recipe.evaluation, KIND_NAMES[kind]
    if kind != "decoder" and settings.tasks:
        cure = "evaluation.classification" if kind == "encoder" else "evaluation.generation"
        raise InputError(
            f"evaluation.tasks: lm-eval is run on decoders, and this is {kind_name}; leave tasks out and write {cure}"
        )
    if kind == "encoder" and settings.generation is not None:
        raise InputError(
            "evaluation.generation: an encoder writes no texts; leave it out and write evaluation.classification"
        )
    if kind == "encoder_decoder" and settings.generation is not None and settings.generation.backend == "vllm":
        raise InputError(f"evaluation.generation.backend: vLLM does not run {kind_name} here; write hf")
    if kind != "encoder" and settings.classification is not None:
        raise InputError(
            f"evaluation.classification: only an encoder has classes, and this is {kind_name}; leave it out"
        )
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
