"""Several studies side by side: what their recipes differ in, their scores, and which scores can't be compared.

`compare([Path("runs/a"), Path("runs/b")], Path("runs/comparison.md"))` writes Markdown and returns the same for a terminal.
Studies are not tested against each other: what differs between them is more than a layer map.
"""

from __future__ import annotations

import hashlib
import json
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import yaml

from llmkd.errors import InputError
from llmkd.files import publish
from llmkd.recipe.inputs import flat
from llmkd.report.files import generations
from llmkd.report.gather import gather
from llmkd.report.write import (
    COLUMNS,
    LONGEST_IN_TERMINAL,
    LONGEST_REASON,
    Table,
    aligned,
    cell_text,
    markdown_table,
    plain,
)

Study = dict[str, Any]
Metric = dict[str, Any]
UNIMPORTANT = ("name", "output")
DECIDES = {
    "generation": ("evaluation.generation.", "data."),
    "classification": ("evaluation.classification.", "data."),
    "lm-eval": (
        "evaluation.limit",
        "evaluation.num_fewshot",
        "evaluation.seed",
        "evaluation.max_length",
        "evaluation.include",
    ),
    "agreement": (
        "evaluation.agreement_rows",
        "evaluation.generation.",
        "teacher.path",
        "teacher.revision",
        "finetune.",
    ),
}
"""Step -> how the recipe's keys begin that decide what it measures."""
HOW_ONLY = (
    "evaluation.generation.batch_size",
    "evaluation.generation.backend",
)  # what ran is in the results themselves
TRAINING_DATA_ONLY = ("data.rows", "data.split", "data.batching", "data.max_length", "data.too_long")
FLAG = " (!)"


def compare(folders: Sequence[Path], file: Path) -> str:
    """Write the comparison of several studies as Markdown; the same for a terminal. Raises InputError for less than two studies."""
    if len({folder.resolve() for folder in folders}) < max(2, len(folders)):
        raise InputError("compare: give two or more different studies' folders, e.g. llmkd compare runs/a runs/b")
    studies = _studies(folders)
    metrics = _common(studies)
    reasons = {metric["name"]: _reasons(studies, metric) for metric in metrics}
    differing = _differing(studies)
    answers = [f"{study['name']}: {study['results']['conclusion']}" for study in studies]
    notes = [
        f"{metric['label']}{FLAG} can't be compared: {'; '.join(why)}."
        for metric in metrics
        if (why := reasons[metric["name"]])
    ]
    if not metrics:
        notes.append("The studies have no metric in common.")
    publish(file, _markdown(studies, metrics, reasons, differing, answers, notes))
    return _text(studies, metrics, reasons, differing, answers, notes)


def _studies(folders: Sequence[Path]) -> list[Study]:
    """Each study's results, recipe and the fingerprint of its prompts, by a name that no other has."""
    found = []
    for folder in folders:
        file = folder / "recipe.yaml"
        recipe = flat(yaml.safe_load(file.read_text())) if file.is_file() else {}
        asked = [[item["prompt"], item["references"]] for item in generations(folder)]
        prompts = hashlib.sha256(json.dumps(asked).encode()).hexdigest()[:12] if asked else None
        found.append(
            {"folder": folder, "results": gather(folder, with_items=False), "recipe": recipe, "prompts": prompts}
        )
    names = [study["results"]["name"] for study in found]
    unique = len(set(names)) == len(names)
    return [
        {**study, "name": name if unique else str(study["folder"])} for study, name in zip(found, names, strict=True)
    ]


def _common(studies: Sequence[Study]) -> list[Metric]:
    """The metrics that all studies have; those with a margin in one of them first."""
    known = [{metric["name"]: metric for metric in study["results"]["metrics"]} for study in studies]
    shared = [metric for name, metric in known[0].items() if all(name in names for names in known)]
    return sorted(
        shared, key=lambda metric: not any(metric["name"] in study["results"]["margins"] for study in studies)
    )


def _differing(studies: Sequence[Study]) -> dict[str, list[Any]]:
    """Recipe key -> each study's value, for the keys whose values are not all the same; absent is None."""
    keys = dict.fromkeys(key for study in studies for key in study["recipe"] if key not in UNIMPORTANT)
    values = {key: [study["recipe"].get(key) for study in studies] for key in keys}
    return {key: found for key, found in values.items() if any(value != found[0] for value in found)}


# ---------------------------------------------------------------------------------------------------------------------
# What can't be compared


def _reasons(studies: Sequence[Study], metric: Metric) -> list[str]:
    """Why a metric's numbers do not mean the same in all the studies; empty where nothing speaks against it."""
    step, task = metric["step"], metric["name"].partition("/")[0]
    found = [_differ(studies, key, lambda study, key=key: study["recipe"].get(key)) for key in _deciding(studies, step)]
    if step == "generation":
        found.append(_differ(studies, "prompts and references", lambda study: study["prompts"]))
    conditions = [study["results"]["conditions"][step] for study in studies]
    found.append(_differ(studies, "items", lambda study: _at(study, step, "items").get(task)))
    for key in ("backend", "dtype"):
        found.append(_differ(studies, key, lambda study, key=key: study["results"]["conditions"][step].get(key)))
    packages = dict.fromkeys(name for condition in conditions for name in _dict(condition.get("versions")))
    found += [
        _differ(studies, name, lambda study, name=name: _at(study, step, "versions").get(name)) for name in packages
    ]
    if any(not study["recipe"] for study in studies):
        found.append("not all have a recipe.yaml that says how it was measured")
    found += [f"{study['name']}'s own models were not measured alike" for study in studies if _mixed(study, step)]
    return [reason for reason in found if reason]


def _deciding(studies: Sequence[Study], step: str) -> list[str]:
    """The recipe's keys that decide what a step measures; the training data only as far as the prompts come from it."""
    keys = dict.fromkeys(key for study in studies for key in study["recipe"] if key.startswith(DECIDES[step]))
    own_prompts = all(study["recipe"].get("evaluation.generation.source") for study in studies)
    return [
        key
        for key in keys
        if key not in HOW_ONLY and not (key.startswith("data.") and (own_prompts or key in TRAINING_DATA_ONLY))
    ]


def _differ(studies: Sequence[Study], what: str, of: Callable[[Study], Any]) -> str:
    """`what: A in one, B in another`, or nothing where all are the same."""
    values = [of(study) for study in studies]
    if all(value == values[0] for value in values):
        return ""
    return f"{what}: " + ", ".join(
        f"{_said(value)} in {study['name']}" for value, study in zip(values, studies, strict=True)
    )


def _mixed(study: Study, step: str) -> bool:
    """Whether a study's own models differ in how they were measured: `conditions` then holds lists."""
    return any(isinstance(value, list) for value in study["results"]["conditions"][step].values())


def _at(study: Study, step: str, key: str) -> dict[str, Any]:
    return _dict(study["results"]["conditions"][step].get(key))


def _dict(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _said(value: Any) -> str:
    return "none" if value is None else plain(value)


# ---------------------------------------------------------------------------------------------------------------------
# Writing


def _scores(studies: Sequence[Study], metrics: Sequence[Metric], reasons: dict[str, list[str]], longest: int) -> Table:
    """A line per strategy and study, the studies of a strategy together."""
    heads = [metric["label"] + (FLAG if reasons[metric["name"]] else "") for metric in metrics]
    names = dict.fromkeys(row["name"] for study in studies for row in study["results"]["rows"])
    lines = [["model", "study", "n", *heads]]
    for name in names:
        for study in studies:
            row = next((row for row in study["results"]["rows"] if row["name"] == name), None)
            if row is not None:
                scored = f"{row['models'] - len(row['problems'])} of {row['models']}"
                lines.append([name, study["name"], scored, *(cell_text(row, metric, longest) for metric in metrics)])
    return lines


def _recipes(studies: Sequence[Study], differing: dict[str, list[Any]]) -> Table:
    return [
        ["recipe key", *(study["name"] for study in studies)],
        *([key, *map(_said, found)] for key, found in differing.items()),
    ]


def _markdown(
    studies: Sequence[Study],
    metrics: Sequence[Metric],
    reasons: dict[str, list[str]],
    differing: dict[str, list[Any]],
    answers: Sequence[str],
    notes: Sequence[str],
) -> str:
    parts = [f"# {' and '.join(study['name'] for study in studies)}", "\n".join(f"- {answer}" for answer in answers)]
    parts += ["## Scores", markdown_table(_scores(studies, metrics, reasons, LONGEST_REASON))]
    parts.append(
        "Mean over seeds ± half the 95 % t-interval of that mean. The studies are set side by side and not tested against each other."
    )
    if notes:
        parts.append("\n".join(f"- {note}" for note in notes))
    parts += ["## What the recipes differ in"]
    parts.append(markdown_table(_recipes(studies, differing)) if differing else "Nothing but their names.")
    return "\n\n".join(parts) + "\n"


def _text(
    studies: Sequence[Study],
    metrics: Sequence[Metric],
    reasons: dict[str, list[str]],
    differing: dict[str, list[Any]],
    answers: Sequence[str],
    notes: Sequence[str],
) -> str:
    shown = len(metrics)
    while shown > 1 and _width(_scores(studies, metrics[:shown], reasons, LONGEST_IN_TERMINAL)) > COLUMNS:
        shown -= 1
    parts = [aligned(_scores(studies, metrics[:shown], reasons, LONGEST_IN_TERMINAL))]
    if shown < len(metrics):
        parts.append(f"{len(metrics) - shown} more metrics are in the file.")
    if differing:
        parts.append(
            aligned(
                [
                    [cell if len(cell) <= 30 else cell[:27] + "..." for cell in line]
                    for line in _recipes(studies, differing)
                ]
            )
        )
    return "\n\n".join([*parts, *(textwrap.fill(said, COLUMNS) for said in (*notes, *answers))])


def _width(table: Table) -> int:
    return max(len(line) for line in aligned(table).splitlines())
