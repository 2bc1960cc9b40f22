"""Recipes as YAML text: read strictly and within bounds, and written so that reading gives the same values.

Scalars are YAML 1.2's (https://yaml.org/spec/1.2.2, the core schema): `1:30`, `yes` and `2026-11-26` are texts, `1e-4` is a number.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from llmkd.errors import InputError
from llmkd.files import ROOT

MOST_BYTES = 2**20
MOST_VALUES = 20_000
"""Of a file after its aliases are written out."""
MOST_LEVELS = 32
LARGEST = 2**63

_SCALARS = {
    "null": (r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    "bool": (r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    "int": (r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+", list("-+0123456789")),
    "float": (
        r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
        list("-+.0123456789"),
    ),
    "merge": (r"<<", ["<"]),
}


class _Loader(yaml.SafeLoader):
    """YAML whose keys are plain words, each written once, and whose values are texts, numbers, true, false, null, lists and mappings."""

    yaml_implicit_resolvers: dict[str, list[Any]] = {}
    levels = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        self.levels += 1
        if self.levels > MOST_LEVELS:
            raise _refused(f"more than {MOST_LEVELS} levels, one in another", self.peek_event())
        node = super().compose_node(parent, index)
        self.levels -= 1
        return node

    def get_single_data(self) -> Any:
        node = self.get_single_node()
        if node is None:
            return None
        _check_extent(node)
        return self.construct_document(node)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key_node, _ in node.value:
            if not isinstance(key_node, yaml.ScalarNode):
                raise _refused("a key must be one word", key_node)
            if key_node.value in seen:
                raise _refused(f"key {key_node.value!r} is written twice", key_node)
            seen.add(key_node.value)
        return super().construct_mapping(node, deep)

    def construct_yaml_int(self, node: yaml.ScalarNode) -> int:
        text = self.construct_scalar(node)
        # the length first: Python takes long over a number of thousands of digits
        if (
            len(text) > len(str(LARGEST)) + 1
            or abs(value := int(text, 0 if text[:2] in ("0x", "0o") else 10)) >= LARGEST
        ):
            raise _refused("a whole number of more than 63 bits", node)
        return value

    def construct_yaml_float(self, node: yaml.ScalarNode) -> float:
        text = self.construct_scalar(node).lower()
        return float(text.replace(".inf", "inf").replace(".nan", "nan") if text[-1] in "fn" else text)

    def construct_undefined(self, node: yaml.Node) -> Any:
        raise _refused(f"a value of the type {node.tag.rpartition(':')[2]!r}, which no key takes", node)


class RecipeDumper(yaml.SafeDumper):
    """YAML that `_Loader` reads back unchanged; what an older YAML reads otherwise (`yes`, `1:30`) it quotes."""


for _name, (_pattern, _starts) in _SCALARS.items():
    for _side in (_Loader, RecipeDumper):
        _side.add_implicit_resolver(f"tag:yaml.org,2002:{_name}", re.compile(f"^(?:{_pattern})$"), _starts)
_PLAIN = (*_SCALARS, "str", "seq", "map")
_Loader.yaml_constructors = {
    **{
        f"tag:yaml.org,2002:{name}": yaml.SafeLoader.yaml_constructors[f"tag:yaml.org,2002:{name}"]
        for name in _PLAIN
        if name != "merge"
    },
    "tag:yaml.org,2002:int": _Loader.construct_yaml_int,
    "tag:yaml.org,2002:float": _Loader.construct_yaml_float,
    None: _Loader.construct_undefined,
}


def _refused(problem: str, at: Any) -> yaml.constructor.ConstructorError:
    return yaml.constructor.ConstructorError(None, None, problem, at.start_mark)


def _check_extent(root: yaml.Node) -> None:
    """Refuse a tree that its aliases make endless or enormous: each value is counted wherever an alias repeats it."""
    count, waiting = 0, [(root, 1)]
    while waiting:
        node, level = waiting.pop()
        count += 1
        if level > MOST_LEVELS:
            raise _refused(f"more than {MOST_LEVELS} levels, one in another (an alias inside what it names?)", node)
        if count > MOST_VALUES:
            raise _refused(f"more than {MOST_VALUES} values once its aliases are written out", root)
        if isinstance(node, yaml.MappingNode):
            waiting += [(part, level + 1) for pair in node.value for part in pair]
        elif isinstance(node, yaml.SequenceNode):
            waiting += [(part, level + 1) for part in node.value]


def read_text(file: Path) -> str:
    """The text of a recipe's file. Raises InputError where it is none, or too long for one."""
    try:
        with file.open("rb") as stream:
            content = stream.read(MOST_BYTES + 1)
        if len(content) > MOST_BYTES:
            raise InputError(f"{file}: more than {MOST_BYTES} bytes; give a recipe, a YAML file")
        return content.decode("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{file}: can't be read as text ({error}); give a YAML file") from error


def parse_yaml(text: str, where: str) -> Any:
    """The values of a YAML text. Raises InputError with the line where it is not a recipe's kind of YAML."""
    try:
        return yaml.load(text, Loader=_Loader)  # a SafeLoader: makes no objects
    except (yaml.YAMLError, ValueError) as error:
        mark = getattr(error, "problem_mark", None)
        place = f" at line {mark.line + 1}" if mark is not None else ""
        problem = " ".join(str(getattr(error, "problem", None) or error).split())
        raise InputError(f"{where}: not valid YAML{place} ({problem}); fix it") from error


def find_recipe(path: str | Path) -> Path:
    """The recipe file: the path itself, or a bare name in recipes/."""
    for candidate in (Path(path), ROOT / "recipes" / f"{path}.yaml", ROOT / path):
        if candidate.is_file():
            return candidate
    folder = ROOT / "recipes"
    known = sorted(str(p.relative_to(folder).with_suffix("")) for p in folder.rglob("*.yaml"))
    raise InputError(f"recipe {str(path)!r}: no such file; give the path of a YAML file, or one of {', '.join(known)}")
