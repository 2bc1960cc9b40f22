"""What all sections of a recipe share."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, model_validator

Dtype = Literal["float32", "bfloat16"]
Positions = Literal["trained", "attended"]
Backend = Literal["auto", "hf", "vllm"]
LARGEST_WHOLE = 2**47
"""Seeds are multiplied by 65536 and stay 63 bits; no count of anything comes near it."""
SEEDS_END = 2**32
"""numpy, which lm-eval seeds, takes seeds below it."""
SMALLEST, LARGEST = 1e-30, 1e30
"""Of the numbers that training computes with; float32 holds a little more."""
NO_EFFECT = "no effect on the result"
"""Marks a key on which a run's result does not depend, `Annotated[int, NO_EFFECT]`: it may differ when the run is resumed."""


@dataclass(frozen=True)
class InPlaceOf:
    """Marks a required key for which another may be given: `Annotated[int, InPlaceOf("batch_tokens", "where rows are packed")]`."""

    other: str
    where: str


@dataclass(frozen=True)
class TakenFrom:
    """Marks a key that has another one's value where it is left out: `Annotated[Dtype, TakenFrom("train.dtype")]`."""

    key: str


class Section(BaseModel):
    """A part of the recipe: immutable; an unknown key or a value of another type is an error. Below each field stands its meaning."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, allow_inf_nan=False, use_attribute_docstrings=True
    )

    @model_validator(mode="after")
    def _texts_can_be_paths(self) -> Self:
        for name in type(self).model_fields:
            value = getattr(self, name)
            if isinstance(value, str) and "\0" in value:
                raise ValueError(f"{name}: {value!r} holds the character \\0, which no file's name may; take it out")
        return self

    @model_validator(mode="after")
    def _numbers_can_be_computed_with(self) -> Self:
        for name in type(self).model_fields:
            for number in _numbers(getattr(self, name)):
                if isinstance(number, int) and abs(number) >= LARGEST_WHOLE:
                    raise ValueError(f"{name}: {number} is too large; write a number below {LARGEST_WHOLE}")
                if isinstance(number, float) and number and not SMALLEST <= abs(number) <= LARGEST:
                    raise ValueError(
                        f"{name}: {number:g} can't be computed with; write 0 or a number of {SMALLEST:g} to {LARGEST:g}"
                    )
        return self


def _numbers(value: object) -> Iterator[int | float]:
    """The numbers of a field's value; a section looks after its own."""
    if isinstance(value, int | float):
        yield value
    elif isinstance(value, Mapping):
        yield from (number for part in value.values() for number in _numbers(part))
    elif isinstance(value, tuple | list):
        yield from (number for part in value for number in _numbers(part))


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
