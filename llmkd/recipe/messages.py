"""What is wrong with a recipe, in one sentence with the cure, from what pydantic found."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from typing import Any, get_origin

import yaml
from pydantic import ValidationError

from llmkd.recipe.section import InPlaceOf, Section


def sentence(error: ValidationError, values: dict[str, Any], recipe: type[Section]) -> str:
    """A pydantic error in one sentence with the cure: that of an unknown key (a missing one misspelt, perhaps), else the first."""
    problem = next((e for e in error.errors() if e["type"] == "extra_forbidden"), error.errors()[0])
    # without the kinds of value that pydantic tried, e.g. `str` or `dict[str,float]`
    location = [part for part in problem["loc"] if not (isinstance(part, str) and ("[" in part or part == "str"))]
    key = ".".join(str(part) for part in location)
    kind = problem["type"]
    message = problem["msg"].removeprefix("Value error, ")
    examples = [] if kind in ("extra_forbidden", "missing", "value_error") else _examples(location[:2], recipe)
    if examples:  # pydantic's own sentence would be about one of several kinds of value
        value: Any = values
        for part in location[:2]:
            value = value[part]
        return f"{'.'.join(map(str, location[:2]))}: {value!r} can't be read; write e.g. {' or '.join(examples)}"
    if kind == "extra_forbidden":
        known = _keys_at(location[:-1], recipe)
        near = difflib.get_close_matches(str(location[-1]), known, n=1, cutoff=0.5)
        return f"unknown key {key!r}; " + (f"did you mean {near[0]!r}?" if near else f"known here: {', '.join(known)}")
    if kind == "missing":
        return f"key {key!r} is missing; add it{_in_its_place(location, recipe)}"
    if kind == "value_error":  # a validator's own sentence, which starts with its key, whole or from the section on
        return message if not location or message.startswith(str(location[0])) else f"{key}.{message}"
    if kind in ("model_type", "model_attributes_type"):
        known = ", ".join(_keys_at(location, recipe))
        return f"{key}: a section is a mapping of keys (got {problem['input']!r}); write at least one of {known}"
    cure = "; write it in quotes" if kind == "string_type" else ""
    return f"{key}: {message[0].lower()}{message[1:]} (got {problem['input']!r}){cure}"


def _in_its_place(location: Sequence[Any], recipe: type[Section]) -> str:
    """The key that may be given for a missing one, as the end of a sentence."""
    section = section_at(location[:-1], recipe)
    marks = [] if section is None else section.model_fields[location[-1]].metadata
    return "".join(f", or {mark.where} {mark.other}" for mark in marks if isinstance(mark, InPlaceOf))


def _examples(location: Sequence[Any], recipe: type[Section]) -> list[str]:
    """The examples that the field at [section, key] declares, as YAML."""
    section = None if len(location) != 2 else section_at(location[:1], recipe)
    field = None if section is None else section.model_fields.get(location[1])
    examples = [] if field is None else field.examples or []
    return [yaml.safe_dump(e, default_flow_style=True, width=1000).removesuffix("...\n").strip() for e in examples]


def _keys_at(location: Sequence[Any], recipe: type[Section]) -> list[str]:
    section = section_at(location, recipe)
    if section is None:  # a list of sections
        section = section_at(location[:-1], recipe)
    assert section is not None, location
    return list(section.model_fields)


def section_at(location: Sequence[Any], recipe: type[Section]) -> type[Section] | None:
    """The class of the section at this place of a recipe; None for the place of a value."""
    section: Any = recipe
    for part in location:
        if get_origin(section) is dict:  # of sections by name
            section = section.__args__[1]
            continue
        if section not in _sections((section,)) or part not in section.model_fields:
            return None
        annotation = section.model_fields[part].annotation
        options = [annotation, *getattr(annotation, "__args__", ())]
        section = next(iter(_sections(options)), None) or next(
            (o for o in options if get_origin(o) is dict and _sections(o.__args__)), None
        )
    return next(iter(_sections((section,))), None)


def _sections(options: Iterable[Any]) -> list[type[Section]]:
    return [o for o in options if isinstance(o, type) and issubclass(o, Section)]
