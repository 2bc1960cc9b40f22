"""Several studies side by side: what their recipes differ in, their scores, and which scores can't be compared.

`compare_studies([Path("runs/a"), Path("runs/b")], Path("runs/comparison.md"))` writes Markdown and returns the same for a
terminal. Studies are not tested against each other: what differs between them is more than a layer map.
"""

from __future__ import annotations

import hashlib
import json
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from llmkd.errors import InputError
from llmkd.files import write_text
from llmkd.recipe.inputs import flat
from llmkd.report import tables
from llmkd.report.files import generations, written_recipe
from llmkd.report.gather import gather
from llmkd.report.results import Metric, Results
from llmkd.report.tables import plain
from llmkd.text import Table, aligned, bullets, escaped, shortened

UNIMPORTANT = ("name", "output")
DECIDES = {
    "generation": ("evaluation.generation.", "data."),
    "classification": ("evaluation.classification.", "data."),
    "lm-eval": tuple(f"evaluation.{key}" for key in ("limit", "num_fewshot", "seed", "max_length", "include")),
    "agreement": (
        "evaluation.agreement_rows",
        "evaluation.generation.",
        "teacher.path",
        "teacher.adapter",
        "teacher.revision",
        "finetune.",
    ),
}
"""Step -> how the recipe's keys begin that decide what it measures."""
HOW_ONLY = ("evaluation.generation.batch_size", "evaluation.generation.backend")  # the results hold what ran
TRAINING_DATA_ONLY = ("data.rows", "data.split", "data.batching", "data.max_length", "data.too_long")
FLAG = " (!)"


@dataclass(frozen=True)
class ComparedStudy:
    """A study by a name that no other has, its recipe by dotted keys, and a fingerprint of its prompts if texts were generated."""

    name: str
    results: Results
    recipe: Mapping[str, object]
    prompts: str | None


def compare_studies(folders: Sequence[Path], file: Path) -> str:
    """Write the comparison of several studies as Markdown; the same for a terminal. Raises InputError for less than two studies."""
    if len({folder.resolve() for folder in folders}) < max(2, len(folders)):
        raise InputError("compare: give two or more different studies' folders, e.g. llmkd compare runs/a runs/b")
    studies = [_read(folder) for folder in folders]
    if len({study.name for study in studies}) < len(studies):
        studies = [replace(study, name=str(folder)) for study, folder in zip(studies, folders, strict=True)]
    metrics = _common_metrics(studies)
    reasons = {metric.name: _reasons(studies, metric) for metric in metrics}
    unlike = [metric for metric in metrics if reasons[metric.name]]
    notes = [f"{metric.label}{FLAG} can't be compared: {'; '.join(reasons[metric.name])}." for metric in unlike]
    if not metrics:
        notes.append("The studies have no metric in common.")
    flagged = [replace(metric, label=metric.label + FLAG) if metric in unlike else metric for metric in metrics]
    answers = [f"{study.name}: {study.results.conclusion}" for study in studies]
    recipes = _recipe_table(studies)
    parts = [
        f"# {escaped(' and '.join(study.name for study in studies))}",
        bullets(answers),
        "## Scores",
        tables.markdown(_score_table(studies, flagged, tables.LONGEST_REASON)),
        "Mean over seeds ± half the 95 % t-interval of that mean. The studies are set side by side and not tested against each other.",
        bullets(notes),
        "## What the recipes differ in",
        tables.markdown(recipes) if len(recipes) > 1 else "Nothing but their names.",
    ]
    write_text(file, "\n\n".join(part for part in parts if part) + "\n")
    shown = tables.fitting(_score_table(studies, flagged, tables.LONGEST_IN_TERMINAL), tables.COLUMNS, "file")
    if len(recipes) > 1:
        shown.append(aligned([[shortened(cell, 30) for cell in line] for line in recipes]))
    return "\n\n".join([*shown, *(textwrap.fill(sentence, tables.COLUMNS) for sentence in [*notes, *answers])])


def _read(folder: Path) -> ComparedStudy:
    recipe = flat(written_recipe(folder / "recipe.yaml"))
    prompts = json.dumps([[item.prompt, item.references] for item in generations(folder)])
    fingerprint = None if prompts == "[]" else hashlib.sha256(prompts.encode()).hexdigest()[:12]
    results = gather(folder, with_items=False)
    return ComparedStudy(results.name, results, recipe, fingerprint)


def _common_metrics(studies: Sequence[ComparedStudy]) -> list[Metric]:
    """The metrics that all studies have; those with a margin in one of them first."""
    first, *others = (study.results for study in studies)
    shared = [metric for metric in first.metrics if all(other.metric(metric.name) for other in others)]
    margins = {name for study in studies for name in study.results.margins}
    return sorted(shared, key=lambda metric: metric.name not in margins)


def _reasons(studies: Sequence[ComparedStudy], metric: Metric) -> list[str]:
    """Why a metric's numbers do not mean the same in all the studies; empty where nothing speaks against it."""
    own_prompts = all(study.recipe.get("evaluation.generation.source") for study in studies)
    measured = [_measured_with(study, metric, own_prompts) for study in studies]
    reasons = []
    for what in dict.fromkeys(what for conditions in measured for what in conditions):
        values = [conditions.get(what) for conditions in measured]
        if any(value != values[0] for value in values):
            parts = [f"{_value(value)} in {study.name}" for value, study in zip(values, studies, strict=True)]
            reasons.append(f"{what}: {', '.join(parts)}")
    if any(not study.recipe for study in studies):
        reasons.append("not all have a recipe.yaml, so it is not known how each was measured")
    for study in studies:
        if any(isinstance(value, list) for value in study.results.conditions[metric.step].values()):
            reasons.append(f"{study.name}'s own models were not measured alike")
    return reasons


def _measured_with(study: ComparedStudy, metric: Metric, own_prompts: bool) -> dict[str, object]:
    """All that decides what a study's numbers of a metric mean.

    The training data do only as far as the prompts come from them: not where all studies have `own_prompts`.
    """
    step, task = metric.step, metric.name.partition("/")[0]
    decides = tuple(key for key in DECIDES[step] if not (own_prompts and key == "data."))
    decided = [key for key in study.recipe if key.startswith(decides) and key not in (*HOW_ONLY, *TRAINING_DATA_ONLY)]
    conditions = study.results.conditions[step]
    items, versions = (value if isinstance(value := conditions.get(key), dict) else {} for key in ("items", "versions"))
    return {
        **{key: study.recipe[key] for key in decided},
        **({"prompts and references": study.prompts} if step == "generation" else {}),
        "items": items.get(task),
        "backend": conditions.get("backend"),
        "dtype": conditions.get("dtype"),
        **versions,
    }


def _value(value: object) -> str:
    return "none" if value is None else plain(value)


def _score_table(studies: Sequence[ComparedStudy], metrics: Sequence[Metric], longest: int) -> Table:
    """A line per strategy and study, the studies of a strategy together."""
    names = dict.fromkeys(row.name for study in studies for row in study.results.rows)
    lines = [["model", "study", "n", *(metric.label for metric in metrics)]]
    for name in names:
        for study in studies:
            row = study.results.row(name)
            if row is not None:
                cells = [tables.score_cell(row, metric, longest) for metric in metrics]
                lines.append([name, study.name, row.scored(), *cells])
    return lines


def _recipe_table(studies: Sequence[ComparedStudy]) -> Table:
    """The recipe keys whose values are not all the same, with each study's; empty below the header where there are none."""
    keys = dict.fromkeys(key for study in studies for key in study.recipe if key not in UNIMPORTANT)
    values = {key: [study.recipe.get(key) for study in studies] for key in keys}
    differing = [[key, *map(_value, row)] for key, row in values.items() if any(value != row[0] for value in row)]
    return [["recipe key", *(study.name for study in studies)], *differing]
