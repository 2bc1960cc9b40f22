"""Recipes as YAML text: read strictly, and written so that reading gives the same values."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from llmkd.errors import InputError


class _Loader(yaml.SafeLoader):
    """YAML that refuses a key written twice (the first would be silently dropped) and reads 1e-4 as a number."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key_node, _ in node.value:
            if not isinstance(key_node, yaml.ScalarNode):
                raise yaml.constructor.ConstructorError(None, None, "a key must be one word", key_node.start_mark)
            if key_node.value in seen:
                problem = f"key {key_node.value!r} is written twice"
                raise yaml.constructor.ConstructorError(None, None, problem, key_node.start_mark)
            seen.add(key_node.value)
        return super().construct_mapping(node, deep)


class RecipeDumper(yaml.SafeDumper):
    """YAML that `_Loader` reads back unchanged."""


for _side in (_Loader, RecipeDumper):  # YAML 1.1 requires a point and a sign, 1.0e-4; people write 1e-4
    _side.add_implicit_resolver(
        "tag:yaml.org,2002:float", re.compile(r"^[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
    )


def read_text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{file}: can't be read as text ({error}); give a YAML file") from error


def parse_yaml(text: str, where: str) -> Any:
    try:
        return yaml.load(text, Loader=_Loader)  # a SafeLoader: makes no objects
    except (yaml.YAMLError, ValueError) as error:
        mark = getattr(error, "problem_mark", None)
        place = f" at line {mark.line + 1}" if mark is not None else ""
        problem = " ".join(str(getattr(error, "problem", None) or error).split())
        raise InputError(f"{where}: not valid YAML{place} ({problem}); fix it") from error
