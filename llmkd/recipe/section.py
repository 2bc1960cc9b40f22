"""What all sections of a recipe share."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

Dtype = Literal["float32", "bfloat16"]
Positions = Literal["trained", "attended"]
Backend = Literal["auto", "hf", "vllm"]
NO_EFFECT = "no effect on the result"
"""Marks a key on which a run's result does not depend, `Annotated[int, NO_EFFECT]`: it may differ when the run is resumed."""


class Section(BaseModel):
    """A part of the recipe: immutable; an unknown key or a value of another type is an error. Below each field stands its meaning."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, allow_inf_nan=False, use_attribute_docstrings=True
    )


def check_weights(key: str, weights: Mapping[str, float], known: Mapping[str, Any]) -> None:
    for name in weights:
        check_name(key, name, known)
    for name, weight in weights.items():
        if weight <= 0:
            raise ValueError(f"{key}.{name}: a weight of {weight}; write a number above 0, or leave {name} out")
    if not weights:
        raise ValueError(f"{key}: is empty; write one of {', '.join(known)}, or several with their weights")


def check_name(key: str, value: str, known: Sequence[str] | Mapping[str, Any]) -> None:
    if value not in known:
        near = difflib.get_close_matches(value, list(known), n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise ValueError(f"{key}: {value!r} is not known; {hint}choose from {', '.join(known)}")
