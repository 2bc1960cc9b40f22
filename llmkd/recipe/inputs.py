"""A run's inputs: the recipe keys that decide its result, by which a folder is recognised as one of the same recipe."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from pydantic_core import to_jsonable_python

from llmkd.recipe.data import Data, Validation
from llmkd.recipe.messages import section_at
from llmkd.recipe.recipe import Recipe
from llmkd.recipe.run import Cache, Finetune, Train
from llmkd.recipe.section import NO_EFFECT, Section


def training_inputs(recipe: Recipe) -> dict[str, Any]:
    """The keys that decide what a student becomes, flat and dotted.

    A key at its default is left out, so that a key added to recipes later leaves the inputs of older runs unchanged; so are keys marked
    NO_EFFECT. A teacher that the recipe makes counts by how it is made, so that the run's folder may be renamed or moved.
    """
    changes: dict[str, Any] = {"finetune": None if recipe.finetune is None else _with_own_data(recipe)}
    changes["train"], changes["data"] = deciding(recipe.train, recipe.data)
    if recipe.teacher.placed.has_weights:
        changes["cache"] = Cache()  # not read
    return _inputs(recipe.model_copy(update=changes))


def finetune_inputs(recipe: Recipe) -> dict[str, Any]:
    """The keys that decide what the recipe's own teacher becomes, as `training_inputs` names them."""
    return {f"finetune.{key}": value for key, value in _inputs(_with_own_data(recipe)).items()}


def _with_own_data(recipe: Recipe) -> Finetune:
    """The finetune section with the data that it uses written into it."""
    assert recipe.finetune is not None
    train, data = deciding(recipe.finetune.train, recipe.finetune.data or recipe.data)
    return recipe.finetune.model_copy(update={"train": train, "data": data})


def deciding(train: Train, data: Data) -> tuple[Train, Data]:
    """The same sections without what has no effect: where no validation chooses a student, only the rows it takes from training count."""
    if train.chooses or data.validation is None:
        return train, data
    given = data.validation
    kept = None if given.share is None else Validation(share=given.share, seed=given.seed)
    return train.model_copy(update={"validate_every": 0}), data.model_copy(update={"validation": kept})


def _inputs(section: Section) -> dict[str, Any]:
    """A section's keys that are not at their default, as JSON values; of a section within it, its own."""
    values: dict[str, Any] = {}
    plain = section.model_dump(mode="json")
    for key, field in type(section).model_fields.items():
        value = getattr(section, key)
        default = field.get_default(call_default_factory=True)
        if NO_EFFECT in field.metadata or value == default:
            continue
        if isinstance(value, Section):
            values[key] = _inputs(value)
            if not values[key] and default is not None:
                del values[key]
        elif isinstance(value, Mapping):
            values[key] = {k: _inputs(v) if isinstance(v, Section) else plain[key][k] for k, v in value.items()}
        elif isinstance(value, tuple) and value and isinstance(value[0], Section):
            values[key] = [_inputs(part) for part in value]
        else:
            values[key] = plain[key]
    return flat(values)


def input_text(inputs: Mapping[str, Any], key: str) -> str:
    """The value of a key among a run's inputs, for messages; of a key that is not among them, its default."""
    if key in inputs:
        return repr(inputs[key])
    *place, name = key.split(".")
    section = section_at(place, Recipe)
    field = None if section is None else section.model_fields.get(name)
    default = (
        None
        if field is None or field.is_required()
        else to_jsonable_python(field.get_default(call_default_factory=True))
    )
    return "unset" if default is None else f"{default!r} (the default)"


def fingerprint(values: Mapping[str, Any]) -> str:
    """A short hash of JSON-like values, the same on every machine."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:16]


def flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested sections -> one level of dotted keys; an empty section keeps its key, as its presence may matter."""
    result: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            result.update(flat(value, f"{prefix}{key}."))
        else:
            result[f"{prefix}{key}"] = value
    return result
