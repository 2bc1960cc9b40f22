"""What the documents name exists: links, paths, tests, commands with their options, and recipe keys."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import click
import pytest
from pydantic import BaseModel

from llmkd.cli import cli
from llmkd.files import ROOT
from llmkd.recipe.recipe import Recipe
from llmkd.recipe.yaml_files import find_recipe

DOCUMENTS = sorted(
    [
        *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "eval/README.md", "ds_configs/README.md")),
        ROOT / "benchmarks" / "RESULTS.md",
        *(ROOT / "docs").glob("*.md"),
    ]
)
BASES = ("", "llmkd", "tests")
"""The folders that a path in a document may start from."""
ELSEWHERE = {"classification/dist_utils.py", "my.yaml"}
"""Files of a paper's own code, and of the reader."""
PATH = re.compile(
    r"(?<![\w./{-])((?:[\w.-]+/)*[\w-]+\.(?:py|sh|yaml|json|toml|css|js))(?![\w/])(?:::(\w+))?|(?<!\w)::(\w+)"
)
LINK = re.compile(r"\]\(([^)\s]+)\)")
CODE = re.compile(r"```\w*\n(.*?)```|`([^`\n]+)`", flags=re.DOTALL)
COMMAND = re.compile(r"(?:^|\$ |&& )llmkd ([a-z]+)(.*)", flags=re.MULTILINE)
KEY = re.compile(r"(?<![\w./])((?:[a-z_]+)(?:\.[a-z_0-9]+)+)(?=[`=:, ])")


def documents() -> pytest.MarkDecorator:
    return pytest.mark.parametrize("document", DOCUMENTS, ids=lambda file: str(file.relative_to(ROOT)))


def code(document: Path) -> list[str]:
    """What stands in a document as code, in blocks and within sentences; a continued line is one line."""
    return [(block or span).replace("\\\n", " ") for block, span in CODE.findall(document.read_text())]


def files_named(text: str) -> Iterator[tuple[str, str | None]]:
    """Each path in a text and, of a test, its function: `::test_x` alone is one of the file named last."""
    last = ""
    for path, function, alone in PATH.findall(text):
        last = path if path.rpartition("/")[2].startswith("test_") else last
        yield path or last, function or alone or None


def anchors(file: Path) -> set[str]:
    """The headings of a document as GitHub links to them."""
    headings = re.findall(r"^#+ (.*)$", file.read_text(), flags=re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@documents()
def test_every_link_leads_somewhere(document: Path) -> None:
    for link in LINK.findall(document.read_text()):
        if link.startswith("http"):
            continue
        name, _, anchor = link.partition("#")
        target = document.parent / name if name else document
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


@documents()
def test_every_file_that_is_named_exists(document: Path) -> None:
    for path, function in files_named(document.read_text()):
        if path in ELSEWHERE or path.startswith("runs/") or ("/" not in path and not path.endswith(".py")):
            continue
        files = [file for base in (*BASES, document.parent) if (file := ROOT / base / path).is_file()]
        assert files, f"{path} is not in the repository, nor in its folders {BASES[1:]}"
        assert function is None or f"def {function}(" in files[0].read_text(), f"{path} has no {function}"


@documents()
def test_every_command_has_the_options_that_are_shown(document: Path) -> None:
    for name, rest in COMMAND.findall("\n".join(code(document))):
        command = cli.commands.get(name)
        assert isinstance(command, click.Command), f"llmkd {name}"
        known = {option for parameter in command.params for option in parameter.opts}
        shown = set(re.findall(r"(?<=\s)--[a-z-]+", rest.partition("#")[0]))
        assert shown <= known, f"llmkd {name} has no {shown - known}"
        recipe = re.match(r" ((?:recipes/|papers/|qwen3_|quickstart)[\w/.]*)", rest)
        if name in ("study", "plan", "cache", "doctor", "finetune") and recipe:
            assert find_recipe(recipe[1]).is_file()


@documents()
def test_every_module_that_is_run_exists(document: Path) -> None:
    for module in re.findall(r"python (?:-\w+ \w+ )?-m ((?:llmkd|benchmarks)[\w.]*)", document.read_text()):
        assert (ROOT / (module.replace(".", "/") + ".py")).is_file(), module


@documents()
def test_every_recipe_key_exists(document: Path) -> None:
    for key in (key for span in code(document) for key in KEY.findall(f"{span} ")):
        sections = key.split(".")
        if sections[0] in Recipe.model_fields and sections[-1] not in ("py", "md", "yaml", "jsonl", "json", "txt"):
            assert has_key(Recipe, sections), key


def has_key(section: type[BaseModel], path: list[str]) -> bool:
    """Whether a recipe may have a value at this place; below a mapping anything may be written."""
    if path[0] not in section.model_fields:
        return False
    annotation = section.model_fields[path[0]].annotation
    options = [annotation, *getattr(annotation, "__args__", ())]
    sections = [o for o in options if isinstance(o, type) and issubclass(o, BaseModel)]
    mappings = any(getattr(option, "__origin__", option) is dict for option in options)
    return len(path) == 1 or mappings or any(has_key(o, path[1:]) for o in sections)
