"""What `llmkd doctor` says of texts that are written: by whom, of which rows, when, how long, and what runs the model that writes."""

from __future__ import annotations

from pathlib import Path

from llmkd.inference.choose import WORTH_VLLM, choose_backend
from llmkd.inference.vllm_setup import vllm_version
from llmkd.models.folders import resolve
from llmkd.planning.rows import millions
from llmkd.recipe.recipe import Recipe
from llmkd.recipe.rollouts import Rollouts
from llmkd.text import counted

_NAMES = {"hf": "Hugging Face", "vllm": "vLLM"}


def writing_text(recipe: Recipe, teacher: Path | None, rows: int) -> str | None:
    """The section rollouts in a sentence; None where nothing is written. `teacher`: its folder, if there is one; `rows`: to train on."""
    settings = recipe.rollouts
    if settings is None or not settings.writes:
        return None
    parts = []
    if settings.before_training:
        runs = _runs(settings, teacher, settings.teachers_share * rows)
        parts.append(
            f"before training the teacher continues the prompts of {settings.teachers_share:.0%} of the {rows:,} rows, {runs}"
        )
    if settings.during_training:
        parts.append(_during(settings, recipe))
    kept = {"train": "trained on", "drop": "left out"}[settings.truncated]
    length = f"a text has at most {counted(settings.max_new_tokens, 'new token')}, and one that has not ended by then is {kept}"
    return f"rollouts: {'; '.join([*parts, length])}; what is said and shown of trained tokens is the data's own"


def _during(settings: Rollouts, recipe: Recipe) -> str:
    batch = recipe.train.batch_size
    who = "the student"
    if settings.by == "mixed":
        who = f"the student and the teacher ({settings.alpha:.0%} of each token's distribution)"
    share = f"{settings.share:.0%} of each step's {counted(batch, 'row')}"
    when = "before each step" if settings.every == 1 else f"every {settings.every} steps"
    each = counted(settings.samples, "text") + (" of a prompt" if settings.samples == 1 else " of each prompt")
    folder = None
    if recipe.student.init == "checkpoint":
        folder = resolve(recipe.student.path or "", "student.path")
    return f"{when} {who} writes {share}, {each}, {_runs(settings, folder, round(settings.share * batch * settings.every))}"


def _runs(settings: Rollouts, model: Path | None, texts: float) -> str:
    """What runs the model that writes so many texts at one time, and why. A model that is not there yet has no size to choose by."""
    if settings.by == "mixed":
        return "by Hugging Face (each token is drawn from two models)"
    tokens = texts * settings.max_new_tokens
    if model is None and settings.backend == "auto" and vllm_version() is not None:
        least = millions(round(WORTH_VLLM / max(1.0, tokens)))
        return f"by vLLM if it has {least} parameters or more (fewer do not repay vLLM's start), else by Hugging Face"
    backend, why = choose_backend(settings.backend, model or Path(), tokens, WORTH_VLLM)
    return f"by {_NAMES[backend]} ({why})"
