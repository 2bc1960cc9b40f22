"""What of a recipe decides a result: the part that a run's folder is known again by."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from llmkd.recipe.recipe import Recipe

LATER = {"redraw_every": 0, "pair_weights": None, "tokens": None, "scope": "micro_batch", "projector": "if_needed"}
"""Keys of `matching` that came after the first runs, with the values that change nothing."""
SAVING = tuple(f"train.{key}" for key in ("save_every", "keep_checkpoints", "log_every", "timeout_seconds", "wandb"))


def training_inputs(recipe: Recipe) -> dict[str, Any]:
    """The part of a recipe that decides what a student becomes, flat and dotted; logging and saving are left out.

    A teacher that the recipe makes counts by how it is made, so that the run's folder may be renamed or moved.
    """
    values = recipe.model_dump(mode="json", exclude={"name", "output", "evaluation", "study", "finetune"})
    for key in ("architecture", "offload_states", "share_cache", "stages"):  # stages, like ranks, change nothing
        values["teacher"].pop(key)
    values["loss"] = {key: value for key, value in values["loss"].items() if value is not None}
    for key in ("stones", "distances", "divergences"):  # schedules that came later
        if "schedules" in values["loss"] and values["loss"]["schedules"][key] is None:
            values["loss"]["schedules"].pop(key)
    for key in (
        "decoder_blocks",
        "classifier",
    ):  # of other families; left out, they are not part of a decoder's fingerprint
        if values["student"][key] is None:
            values["student"].pop(key)
    # What came later and is not asked for is not named, so that a run begun before it came goes on.
    values["matching"] = {key: value for key, value in values["matching"].items() if value != LATER.get(key, ...)}
    cache = values.pop("cache")
    if values["stones"] is None:
        values.pop("stones")
    if not recipe.teacher.placed.has_weights:
        values["cache"] = {"dtype": cache["dtype"], "top_k": cache["top_k"]}
    values["loss"].pop("report_norms_every")
    inputs = {key: value for key, value in flat(values).items() if key not in SAVING}
    return {**inputs, **(finetune_inputs(recipe) if recipe.finetune else {})}


def finetune_inputs(recipe: Recipe) -> dict[str, Any]:
    """The part of a recipe that decides what its teacher becomes, flat and dotted; logging and saving are left out."""
    assert recipe.finetune is not None
    values = recipe.finetune.model_dump(mode="json")
    values["data"] = (recipe.finetune.data or recipe.data).model_dump(mode="json")
    if values["architecture"] is not None:  # other families' keys, as in training_inputs
        for key, usual in (("model_type", "qwen3"), ("decoder_layers", None)):
            if values["architecture"][key] == usual:
                values["architecture"].pop(key)
    return {f"finetune.{key}": value for key, value in flat(values).items() if key not in SAVING}


def fingerprint(values: Mapping[str, Any]) -> str:
    """A short hash of JSON-like values, the same on every machine."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:16]


def flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested sections -> one level of dotted keys."""
    result: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            result.update(flat(value, f"{prefix}{key}."))
        else:
            result[f"{prefix}{key}"] = value
    return result
