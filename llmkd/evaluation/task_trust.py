"""Which tasks of a folder run Python, and whether the recipe trusts that folder.

lm-eval imports what a YAML names by `!function`, and a metric that is a path, when it builds the task. Its templates are text, and are
kept from Python by a sandbox.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml

from llmkd.errors import InputError
from llmkd.files import ROOT


def check_trust(manager: Any, tasks: Sequence[str], *, trusted: bool) -> None:
    """Raise InputError for a task that runs Python of a folder that is neither llmkd's, lm-eval's nor trusted by the recipe.

    `manager` is lm-eval's index of tasks, which it makes without running anything.
    """
    if trusted:
        return
    import lm_eval.tasks  # heavy; a study without tasks needs none of it

    own = (ROOT / "eval").resolve(), Path(lm_eval.tasks.__file__).resolve().parent
    for task in tasks:
        for file in _files(manager.task_index, task):
            code = None if any(file.is_relative_to(folder) for folder in own) else _code(file)
            if code is not None:
                raise InputError(
                    f"evaluation.tasks: {task} runs Python of its folder ({file}: {code}); read that code, and write "
                    "evaluation.trust_include: true if you trust it"
                )


def sandbox_templates() -> None:
    """Have lm-eval fill in its tasks' templates in a sandbox: the same text, but no way to Python's inside."""
    from jinja2.sandbox import SandboxedEnvironment  # with lm-eval alone
    from lm_eval import utils  # heavy, as above

    if not isinstance(utils.env, SandboxedEnvironment):
        sandbox = SandboxedEnvironment(undefined=utils.env.undefined, keep_trailing_newline=True)
        sandbox.filters.update(utils.env.filters)
        utils.env = sandbox


def _files(index: Any, task: str) -> Iterator[Path]:
    """The YAML files that a task, or any task of a group or tag, is made of."""
    names, files = [task], []
    for name in names:  # grows while it is read
        entry = index[name]
        members = (*entry.tags, *strings(entry.cfg))
        names += [member for member in dict.fromkeys(members) if member in index and member not in names]
        files += [] if entry.yaml_path is None else [Path(entry.yaml_path).resolve()]
    files = list(dict.fromkeys(files))
    for file in files:  # as well
        yield file
        included = (file.parent / base for base in strings(plain_yaml(file).get("include")))
        files += [path for path in dict.fromkeys(path.resolve() for path in included) if path not in files]


def _code(file: Path) -> str | None:
    """What a YAML file has run as Python; None if nothing."""
    for event in yaml.parse(file.read_text(), Loader=yaml.SafeLoader):
        if getattr(event, "tag", None) == "!function":
            return f"!function {getattr(event, 'value', '')}"
    metrics = plain_yaml(file).get("metric_list") or []
    return next((f"metric {name}" for name in strings(metrics) if "/" in name or "\\" in name), None)


def plain_yaml(file: Path) -> dict[str, Any]:
    """A task's YAML, with None in place of what its tags would have run; empty if it is no mapping."""
    values = yaml.load(file.read_text(), Loader=_AnyTag)
    return values if isinstance(values, dict) else {}


def strings(value: Any) -> list[str]:
    """All strings in a YAML value, at any depth."""
    if isinstance(value, dict | list):
        return [text for item in (value.values() if isinstance(value, dict) else value) for text in strings(item)]
    return [value] if isinstance(value, str) else []


class _AnyTag(yaml.SafeLoader):
    """YAML whose `!function` and the like are read as None: only plain values are asked of it."""


_AnyTag.add_multi_constructor("!", lambda loader, suffix, node: None)
