"""The report of a study, for people: made at any time from the study's files, of a half-done study too.

`report(folder)` writes `report.html` (to look at), `report.md`, `results.json` (all numbers) and `results.csv` (every score,
one per line); `terminal_text(results)` has the answer and the main numbers.
"""

from __future__ import annotations

import csv
import io
import json
import textwrap
from pathlib import Path
from typing import NamedTuple

from llmkd.files import write_text
from llmkd.recipe.study_entries import read_study
from llmkd.report import rollouts, tables
from llmkd.report.angles import angle_table, sentence, setting
from llmkd.report.cost import cost_in_words
from llmkd.report.files import generations
from llmkd.report.gather import gather, outcome
from llmkd.report.map_drawing import drawing
from llmkd.report.page.document import whole_page
from llmkd.report.page.learned import in_words, learned_maps
from llmkd.report.results import Angles, Results
from llmkd.report.validation import of_students, rule_in_words, validation_table
from llmkd.text import bullets, escaped, fenced


class Report(NamedTuple):
    """A report that was written: the page's path, and what all its forms were made from."""

    page: Path
    results: Results


def report(folder: Path) -> Report:
    """Write a study's report in all its forms. Raises InputError if the folder holds no study."""
    results = gather(folder)
    file = folder / "recipe.yaml"
    recipe = file.read_text(errors="replace") if file.is_file() else ""
    write_text(folder / "results.json", json.dumps(results.to_json(), indent=1, allow_nan=False))
    write_text(folder / "results.csv", _scores_csv(folder))
    write_text(folder / "report.md", _markdown(results, recipe))
    write_text(folder / "report.html", whole_page(results, generations(folder), recipe))
    return Report(folder / "report.html", results)


def _scores_csv(folder: Path) -> str:
    """Every model's every score, one per line."""
    text = io.StringIO()
    lines = csv.writer(text, lineterminator="\n")
    lines.writerow(["name", "kind", "strategy", "seed", "metric", "value"])
    for entry in read_study(folder).entries:
        about = [entry.name, entry.kind, entry.strategy, entry.seed]
        lines.writerows([*about, metric, value] for metric, value in outcome(folder, entry).scores.items())
    return text.getvalue()


def terminal_text(results: Results, columns: int = tables.COLUMNS) -> str:
    """The scores for a terminal, the metrics with a margin first and as many as fit, and below them the answer."""
    metrics = sorted(results.metrics, key=lambda metric: metric.name not in results.margins)  # sorted is stable
    parts = tables.fitting(tables.score_table(results, metrics, tables.LONGEST_IN_TERMINAL), columns, "report")
    if results.problems:
        problems = [f"{name}: {why}" for name, why in results.problems.items()]
        more = [f"and {len(problems) - 5} more"] * (len(problems) > 5)
        parts.append("\n".join(["Without scores:", *problems[:5], *more]))
    return "\n\n".join([*parts, textwrap.fill(results.conclusion, columns)])


# --- Markdown


def _markdown(results: Results, recipe: str) -> str:
    parts = [f"# Study {escaped(results.name)}", f"**{escaped(results.conclusion)}**", bullets(results.notes)]
    parts += ["## Scores", *_scores(results), "## Comparisons", *_comparisons(results)]
    parts += ["## Layer maps", *_maps(results), *_angles(results.angles)]
    if validations := of_students(results):
        parts += ["## Validation while training", escaped(rule_in_words(validations))]
        parts.append(tables.markdown(validation_table(validations)))
    if results.teachers_texts:
        parts += [f"## {rollouts.BEFORE}", escaped(rollouts.of_teacher(results))]
    if results.rollouts:
        parts += [f"## {rollouts.HEADING}", escaped(rollouts.in_words(results.rollouts))]
        parts.append(tables.markdown(rollouts.rollout_table(results.rollouts)))
        for name, student in rollouts.shown_runs(results).items():
            parts += [f"### What {escaped(name)} wrote", tables.markdown(rollouts.side_by_side(student))]
    parts += ["## Cost of training", escaped(cost_in_words(results.runs))]
    parts.append(tables.markdown(tables.cost_table(results.runs)))
    if results.problems:
        parts += ["## Problems", bullets(f"{name}: {why}" for name, why in results.problems.items())]
    parts += ["## What was run", bullets(_conditions(results))]
    if recipe:
        parts.append(_folded("recipe.yaml", fenced(recipe, "yaml")))
    return "\n\n".join(part for part in parts if part) + "\n"


def _folded(summary: str, text: str) -> str:
    return f"<details><summary>{summary}</summary>\n\n{text}\n\n</details>"


def _scores(results: Results) -> list[str]:
    """A table of scores per step."""
    steps = list(dict.fromkeys(metric.step for metric in results.metrics))
    if not steps:
        return [tables.markdown(tables.score_table(results, []))]
    parts = []
    for step in steps:
        metrics = [metric for metric in results.metrics if metric.step == step]
        parts += [f"### {step}"] * (len(steps) > 1) + [tables.markdown(tables.score_table(results, metrics))]
    parts.append(
        "Mean over seeds ± half the 95 % t-interval of that mean; n: models with all scores of the table, of those planned. The intervals "
        "hold the differences between seeds, not the choice of test items. Every model's scores are in results.csv."
    )
    return parts


def _comparisons(results: Results) -> list[str]:
    """The comparisons: those of the main metric and of the metrics with a margin in the open, the others folded."""
    if not results.comparisons:
        return ["None yet: it takes two strategies with a score for the same seed."]
    metrics = {metric.name: metric for metric in results.metrics}
    main = [c for c in results.comparisons if c.metric in results.main_metrics]
    others = [c for c in results.comparisons if c.metric not in results.main_metrics]
    parts = [tables.markdown(tables.comparison_table(main, metrics))] if main else []
    parts.append(
        "Differences are paired by seed; the interval and p are those of a paired t-test, the second p is that of two one-sided tests "
        "against the margin (TOST). In brackets: after Holm's correction over the strategies that are compared with the same one by "
        "the same metric, which decides the verdict. different: the first is below 0.05; equivalent: the second is; undecided: neither, "
        "which is no sign of equality. The columns on items are a second check: the same models on test items drawn anew (paired "
        "bootstrap)."
    )
    if others:
        parts.append(_folded("The other metrics", tables.markdown(tables.comparison_table(others, metrics))))
    return parts


def _maps(results: Results) -> list[str]:
    parts = []
    for layer_map in results.maps:
        pairs = tuple((student, teacher) for student, teacher in layer_map.pairs)
        if layer_map.student_blocks and layer_map.teacher_blocks:
            picture = drawing(pairs, layer_map.student_blocks, layer_map.teacher_blocks)
        else:  # a model's config.json is not at hand, so its depth is not known
            picture = "\n".join(f"{student} <- {teacher}" for student, teacher in pairs)
        runs = escaped(", ".join(layer_map.runs))
        parts.append(f"**{escaped(layer_map.strategy)}** ({runs})\n\n{fenced(picture, 'text')}")
    parts += [f"**{escaped(learned.strategy)}**: {escaped(in_words(learned))}" for learned in learned_maps(results)]
    return parts or ["No trained student with a layer map yet."]


def _angles(angles: Angles | None) -> list[str]:
    """The angles between teacher blocks, where they were measured."""
    if angles is None:
        return []
    parts = ["## Angles between teacher blocks"]
    if angles.students:
        parts += [escaped(sentence(angles)), tables.markdown(angle_table(angles)), escaped(setting(angles))]
    return [*parts, bullets(f"{name}: {why}" for name, why in angles.problems.items())]


def _conditions(results: Results) -> list[str]:
    """Seeds, items, backends, versions, hardware and commit."""
    lines = [f"seeds: {', '.join(map(str, results.seeds)) or 'none'}"]
    if results.items:
        lines.append(f"test items: {tables.plain(results.items)}")
    for step, backends in results.backends.items():
        parts = [f"{backend} ({len(names)} models)" for backend, names in backends.items()]
        lines.append(f"{step} ran on {', '.join(parts)}")
    about = {"versions": results.versions, "hardware": results.hardware, "commit": results.commit}
    return lines + [f"{name}: {tables.plain(value) or 'not known'}" for name, value in about.items()]
