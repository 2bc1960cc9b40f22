"""What would keep every model of a study from being scored, found before any is trained."""

from __future__ import annotations

from llmkd.errors import InputError
from llmkd.evaluation.generation import check as check_generation
from llmkd.evaluation.held_out import classification_data
from llmkd.evaluation.lm_eval_step import check_tasks
from llmkd.recipe.recipe import Recipe
from llmkd.training import jobs


def check_scores(recipe: Recipe) -> None:
    """Raise InputError for scoring steps that would fail for every model."""
    settings = recipe.evaluation
    if not any(step not in ((), None) for step in (settings.tasks, settings.generation, settings.classification)):
        raise InputError(
            "evaluation: a study needs something to score by; name lm-eval tasks under evaluation.tasks, or write evaluation.generation: {}"
        )
    if settings.classification is not None:
        jobs.read_rows(classification_data(recipe))
    if settings.tasks:
        check_tasks(settings)
    if settings.generation is not None:
        check_generation(settings, recipe.data)
