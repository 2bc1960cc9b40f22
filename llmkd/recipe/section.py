"""What all sections of a recipe share."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

Dtype = Literal["float32", "bfloat16"]
Positions = Literal["trained", "attended"]
Backend = Literal["auto", "hf", "vllm"]
"""auto: vLLM where it is installed and the model is large enough to repay its start, else Hugging Face; the log says which and why."""


class Section(BaseModel):
    """A part of the recipe: immutable, closed to keys that it does not know and to values of another type."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


def weighted(key: str, weights: Mapping[str, float], known: Mapping[str, Any]) -> None:
    for name in weights:
        one_of(key, name, known)
    for name, weight in weights.items():
        if weight <= 0:
            raise ValueError(f"{key}.{name}: a weight of {weight}; write a number above 0, or leave {name} out")
    if not weights:
        raise ValueError(f"{key}: names none; write one of {', '.join(known)}, or several with their weights")


def one_of(key: str, value: str, known: Sequence[str] | Mapping[str, Any]) -> None:
    if value not in known:
        near = difflib.get_close_matches(value, list(known), n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise ValueError(f"{key}: {value!r} is not known; {hint}choose from {', '.join(known)}")
