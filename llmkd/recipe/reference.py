"""Every key of a recipe with its type, default and meaning: `python -m llmkd.recipe.reference > docs/recipes.md`."""

from __future__ import annotations

import types
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import yaml
from annotated_types import Ge, Gt, Le, Lt
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from llmkd.recipe.recipe import Recipe
from llmkd.recipe.section import NO_EFFECT, InPlaceOf, Section, TakenFrom

HEAD = """# Recipes: every key

A recipe is one YAML file that describes one run completely. Keys that you leave out have the default below; a key that does not exist
is an error that names the nearest one. `--set train.steps=100` overrides a key on the command line, with its value in YAML.
`llmkd plan RECIPE --ranks N` shows what a recipe needs and `llmkd doctor RECIPE` what it trains on. Complete recipes to start from
are in [`recipes/`](../recipes).

In the column "default", **required** marks a key that must be given and "–" one that is unset. A key marked † has no effect on the
result of a run and may be changed before a run is resumed. The others identify a run: a folder with a run of other values is refused.

This page is generated from the docstrings of `llmkd/recipe/`; do not edit it by hand, but run
`python -m llmkd.recipe.reference > docs/recipes.md`.
"""
PLAIN = {int: "whole number", float: "number", str: "text", bool: "true or false", Any: "any value"}
BOUNDS = ((Gt, "gt", "> "), (Ge, "ge", "≥ "), (Lt, "lt", "< "), (Le, "le", "≤ "))


def reference() -> str:
    """The page, in Markdown."""
    return "\n".join([HEAD, *(_section_text(section, places) for section, places in _sections().items())])


def _sections() -> dict[type[Section], list[str]]:
    """Every section, those of the recipe first, then those within them -> the dotted places where it stands."""
    places: dict[type[Section], list[str]] = {Recipe: []}
    queue: list[tuple[type[Section], str]] = [(Recipe, "")]
    for section, path in queue:  # grows while it is read
        for key, field in section.model_fields.items():
            for inner in _inner_sections(field.annotation):
                place = f"{path}.{key}".removeprefix(".")
                places.setdefault(inner, []).append(place)
                queue.append((inner, place))
    return places


def _inner_sections(annotation: Any) -> list[type[Section]]:
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return [annotation]
    return [inner for part in get_args(annotation) for inner in _inner_sections(part)]


def _title(section: type[Section]) -> str:
    return section.__name__ if section is not Recipe else "The whole recipe"


def _anchor(section: type[Section]) -> str:
    return _title(section).lower().replace(" ", "-")


def _section_text(section: type[Section], places: list[str]) -> str:
    rows = [_row(section, key, field) for key, field in section.model_fields.items()]
    where = [f"Where: {', '.join(f'`{place}`' for place in places)}"] if places else []
    meaning = [section.__doc__] if section.__doc__ else []
    table = "\n".join(["| key | type | default | meaning |", "| --- | --- | --- | --- |", *rows])
    return "\n\n".join([f"## {_title(section)}", *where, *meaning, table]) + "\n"


def _row(section: type[Section], key: str, field: FieldInfo) -> str:
    if field.description is None:
        raise ValueError(f"{section.__name__}.{key}: no text below the field says what the key means; write it")
    mark = " †" if NO_EFFECT in field.metadata else ""
    cells = [f"`{key}`{mark}", _type_text(field.annotation, field.metadata), _default(field), field.description]
    return "| " + " | ".join(" ".join(cell.replace("|", "\\|").split()) for cell in cells) + " |"


def _default(field: FieldInfo) -> str:
    if field.is_required():
        others = [mark for mark in field.metadata if isinstance(mark, InPlaceOf)]
        return ", or ".join(["**required**", *(f"`{mark.other}` {mark.where}" for mark in others)])
    if taken := [mark.key for mark in field.metadata if isinstance(mark, TakenFrom)]:
        return f"that of `{taken[0]}`"
    value = field.get_default(call_default_factory=True)
    if value is None or value is PydanticUndefined:
        return "–"
    if isinstance(value, Section):
        return "its own defaults"
    plain = list(value) if isinstance(value, tuple) else value
    return f"`{yaml.safe_dump(plain, default_flow_style=True, width=1000).removesuffix('...' + chr(10)).strip()}`"


def _type_text(annotation: Any, metadata: list[Any]) -> str:
    """A type in plain words, with its bounds."""
    origin, parts = get_origin(annotation), get_args(annotation)
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return f"section [{_title(annotation)}](#{_anchor(annotation)})"
    if origin is Annotated:
        text = _type_text(parts[0], list(parts[1:]))
    elif origin in (Union, types.UnionType):
        text = " or ".join(_type_text(part, []) for part in parts if part is not type(None))
    elif origin is Literal:
        text = ", ".join(f"`{part}`" for part in parts)
    elif origin is tuple:
        text = _list_text(parts)
    elif origin is dict:
        text = f"mapping of {_type_text(parts[0], [])} to {_type_text(parts[1], [])}"
    else:
        text = PLAIN[annotation]
    return text + _bounds(metadata)


def _list_text(parts: tuple[Any, ...]) -> str:
    if parts[-1] is ...:
        return f"list of: {_type_text(parts[0], [])}"
    return f"[{', '.join(_type_text(part, []) for part in parts)}]"


def _number_text(number: float) -> str:
    return str(number) if isinstance(number, int) else f"{number:g}"


def _bounds(metadata: list[Any]) -> str:
    bounds = [
        f"{sign}{_number_text(getattr(m, name))}"
        for m in metadata
        for kind, name, sign in BOUNDS
        if isinstance(m, kind)
    ]
    return f" ({', '.join(bounds)})" if bounds else ""


if __name__ == "__main__":
    print(reference(), end="")
