"""The report of a study, for people: made at any time from the study's files, of a half-done study too.

`report(folder)` writes `report.html` (to look at), `report.md`, `results.json` (all numbers) and `results.csv` (every score,
one per line); `table_text(results)` is the answer and the main numbers for a terminal.
"""

from __future__ import annotations

import csv
import io
import json
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from llmkd.files import publish
from llmkd.layer_map import drawing
from llmkd.recipe.study_entries import read_study
from llmkd.report.angles import angle_table, sentence, setting
from llmkd.report.files import generations
from llmkd.report.gather import gather, scored

LONGEST_REASON = 60  # characters of a failure inside a table; the whole sentence stands below it
LONGEST_IN_TERMINAL = 20
COLUMNS = 100  # of a terminal
Results = dict[str, Any]
Table = list[list[str]]


def report(folder: Path) -> Path:
    """Write a study's report in all its forms and return the page's path. Raises InputError if the folder holds no study."""
    from llmkd.report.page.document import html

    results = gather(folder)
    file = folder / "recipe.yaml"
    recipe = file.read_text() if file.is_file() else ""
    publish(folder / "results.json", json.dumps(results, indent=1, allow_nan=False))
    publish(folder / "results.csv", _scores_csv(folder))
    publish(folder / "report.md", _markdown(results, recipe))
    publish(folder / "report.html", html(results, generations(folder), recipe))
    return folder / "report.html"


def _scores_csv(folder: Path) -> str:
    """Every model's every score, one per line."""
    text = io.StringIO()
    lines = csv.writer(text, lineterminator="\n")
    lines.writerow(["name", "kind", "strategy", "seed", "metric", "value"])
    for entry in read_study(folder).entries:
        model = [entry.name, entry.kind, entry.strategy, entry.seed]
        lines.writerows([*model, metric, value] for metric, value in scored(folder, entry).scores.items())
    return text.getvalue()


# ---------------------------------------------------------------------------------------------------------------------
# Tables


def table_text(results: Results, columns: int = COLUMNS) -> str:
    """The scores for a terminal, the metrics with a margin first and as many as fit, and below them the answer."""
    names = [metric["name"] for metric in results["metrics"]]
    order = [name for name in names if name in results["margins"]]
    order += [name for name in names if name not in order]
    shown = len(order)
    while shown > 1 and _width(_score_table(results, order[:shown], LONGEST_IN_TERMINAL)) > columns:
        shown -= 1
    parts = [aligned(_score_table(results, order[:shown], LONGEST_IN_TERMINAL))]
    if shown < len(order):
        parts.append(f"{len(order) - shown} more metrics are in the report.")
    problems = [f"{name}: {why}" for name, why in results["problems"].items()]
    if problems:
        parts.append(
            "\n".join(["Without scores:", *problems[:5], *[f"and {len(problems) - 5} more"] * (len(problems) > 5)])
        )
    return "\n\n".join([*parts, textwrap.fill(results["conclusion"], columns)])


def aligned(table: Table) -> str:
    """A table in columns of spaces, its first line the header."""
    widths = [max(len(line[column]) for line in table) for column in range(len(table[0]))]
    lines = [" | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in table]
    return "\n".join([lines[0], "-+-".join("-" * width for width in widths), *lines[1:]])


def _width(table: Table) -> int:
    return max(len(line) for line in aligned(table).splitlines())


def _score_table(results: Results, metrics: Sequence[str], longest: int = LONGEST_REASON) -> Table:
    """Header and rows as text."""
    known = {metric["name"]: metric for metric in results["metrics"]}
    lines = [["model", "kind", "n", *([known[name]["label"] for name in metrics] or ["scores"])]]
    for row in results["rows"]:
        cells = [cell_text(row, known[name], longest) for name in metrics] or [_shortened(_reason(row), longest)]
        lines.append([row["name"], row["kind"], f"{row['models'] - len(row['problems'])} of {row['models']}", *cells])
    return lines


def cell_text(row: dict[str, Any], metric: dict[str, Any], longest: int = LONGEST_REASON) -> str:
    """A mean with its interval, or why there is none."""
    cell = row["cells"].get(metric["name"])
    if cell is None:
        return _shortened(_reason(row, metric["step"]), longest)
    text = number(cell["mean"], metric)
    if cell["half_width"] is not None:
        text += f" ± {number(cell['half_width'], metric)}"
    return text if cell["n"] == row["models"] else f"{text} (n={cell['n']})"


def _reason(row: dict[str, Any], step: str | None = None) -> str:
    """Why a row has no number: the step's problem, or that it was not asked for, or that it gave none."""
    found = [problem for name, problems in row["missing"].items() if step in (None, name) for problem in problems]
    if found:
        return found[0]
    return "no value" if step in row["steps"] else "-"


def _shortened(text: str, longest: int) -> str:
    return text if len(text) <= longest else text[: longest - 3] + "..."


def number(value: float, metric: dict[str, Any]) -> str:
    """One decimal for scores of 0 to 100, three for the others, whole numbers above a thousand."""
    return f"{value:.1f}" if metric["percent"] else f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3f}"


def markdown_table(table: Table) -> str:
    """A table in Markdown, its first line the header."""
    lines = ["| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in table]
    return "\n".join([lines[0], "|" + " --- |" * len(table[0]), *lines[1:]])


# ---------------------------------------------------------------------------------------------------------------------
# Markdown


def _markdown(results: Results, recipe: str) -> str:
    parts = [f"# Study {results['name']}", f"**{results['conclusion']}**"]
    if results["notes"]:
        parts.append("\n".join(f"- {note}" for note in results["notes"]))
    parts += [*_score_part(results), *_comparison_part(results)]
    parts += ["## Layer maps", *_map_part(results["maps"])]
    parts += _angle_part(results.get("angles"))
    parts += ["## Cost of training", markdown_table(_cost_table(results["runs"]))]
    if any(run.get("resumed_from_step") for run in results["runs"]):
        parts.append("A run that was resumed counts its last part's seconds and tokens.")
    if results["problems"]:
        parts += ["## Problems", "\n".join(f"- {name}: {why}" for name, why in results["problems"].items())]
    parts += ["## What was run", _run_part(results)]
    if recipe:
        parts.append(f"<details><summary>recipe.yaml</summary>\n\n```yaml\n{recipe.rstrip()}\n```\n\n</details>")
    return "\n\n".join(parts) + "\n"


def _score_part(results: Results) -> list[str]:
    """A table of scores per step."""
    steps = list(dict.fromkeys(metric["step"] for metric in results["metrics"]))
    parts = ["## Scores"]
    for step in steps:
        names = [metric["name"] for metric in results["metrics"] if metric["step"] == step]
        parts += [f"### {step}"] * (len(steps) > 1) + [markdown_table(_score_table(results, names))]
    if not steps:
        return [*parts, markdown_table(_score_table(results, []))]
    parts.append(
        "Mean over seeds ± half the 95 % t-interval of that mean; n: models without a problem of models planned. The intervals hold "
        "the differences between seeds, not the choice of test items. Every model's scores are in results.csv."
    )
    return parts


def _comparison_part(results: Results) -> list[str]:
    """The comparisons: those of the main metric and of the metrics with a margin in the open, the others folded."""
    if not results["comparisons"]:
        return ["## Comparisons", "None yet: it takes two strategies with a score for the same seed."]
    first = {results["primary"], *results["margins"]}
    main = [c for c in results["comparisons"] if c["metric"] in first]
    rest = [c for c in results["comparisons"] if c["metric"] not in first]
    parts = ["## Comparisons"]
    if main:
        parts.append(markdown_table(_comparison_table(results, main)))
    parts.append(
        "Differences are paired by seed; the interval and p are those of a paired t-test, the second p is that of two one-sided tests "
        "against the margin (TOST), both after Holm's correction over the strategies that are compared with the same one by the same "
        "metric. different: the first is below 0.05; equivalent: the second is; undecided: neither, which is no sign of equality. Seeds "
        "decide the verdict. The last columns are a second check: the same models on test items drawn anew (paired bootstrap)."
    )
    if rest:
        table = markdown_table(_comparison_table(results, rest))
        parts.append(f"<details><summary>The other metrics</summary>\n\n{table}\n\n</details>")
    return parts


def _comparison_table(results: Results, comparisons: Sequence[dict[str, Any]]) -> Table:
    known = {metric["name"]: metric for metric in results["metrics"]}
    head = [
        "metric",
        "strategy",
        "beside",
        "difference",
        "95 % interval",
        "seeds",
        "p different",
        "margin",
        "p equivalent",
    ]
    lines = [[*head, "verdict", "items", "95 % interval over items", "p over items"]]
    for c in comparisons:
        metric = known[c["metric"]]
        lines.append(
            [
                metric["label"],
                c["strategy"],
                c["reference"],
                signed(c["difference"], metric),
                _interval(c["interval"], metric),
                str(c["seeds"]),
                _p(c["p_different_holm"]),
                "" if c["margin"] is None else f"{c['margin']:g}",
                _p(c["p_equivalent_holm"]),
                c["verdict"],
                "" if c["items"] is None else str(c["items"]),
                _interval(c["items_interval"], metric),
                _p(c["items_p_holm"]),
            ]
        )
    return lines


def signed(value: float, metric: dict[str, Any]) -> str:
    """A difference: one more digit than the scores have, and always a sign."""
    return f"{value:+.2f}" if metric["percent"] else f"{value:+.4f}"


def _interval(ends: Sequence[float] | None, metric: dict[str, Any]) -> str:
    return "" if ends is None else f"{signed(ends[0], metric)} to {signed(ends[1], metric)}"


def _p(value: float | None) -> str:
    return "" if value is None else "< 0.001" if value < 0.001 else f"{value:.3f}"


def _map_part(maps: Sequence[dict[str, Any]]) -> list[str]:
    parts = []
    for found in maps:
        pairs = tuple((student, teacher) for student, teacher in found["pairs"])
        if found["student_blocks"] and found["teacher_blocks"]:
            picture = drawing(pairs, found["student_blocks"], found["teacher_blocks"])
        else:  # a model's config.json is not at hand, so its depth is not known
            picture = "\n".join(f"{student} <- {teacher}" for student, teacher in pairs)
        parts.append(f"**{found['strategy']}** ({', '.join(found['runs'])})\n\n```text\n{picture}\n```")
    return parts or ["No trained student with a layer map yet."]


def _angle_part(angles: dict[str, Any] | None) -> list[str]:
    """The angles between teacher blocks, where they were measured."""
    if angles is None:
        return []
    parts = ["## Angles between teacher blocks"]
    if angles["students"]:
        parts += [sentence(angles), markdown_table(angle_table(angles)), setting(angles)]
    if angles["problems"]:
        parts.append("\n".join(f"- {name}: {why}" for name, why in angles["problems"].items()))
    return parts


def _cost_table(runs: Sequence[dict[str, Any]]) -> Table:
    lines = [["run", "state", "ranks", "steps", "seconds", "tokens/s", "peak memory per rank (GiB)"]]
    for run in runs:
        state = run["state"]
        if state == "unfinished":
            state = f"unfinished, at step {run['last_step']}"
        values = ((run["world_size"], "d"), (run["steps"], "d"), (run["seconds"], ".0f"))
        values += ((run["tokens_per_second"], ",.0f"), (run["memory_gib"], ".2f"))
        lines.append([run["name"], state, *("" if value is None else format(value, how) for value, how in values)])
    return lines


def _run_part(results: Results) -> str:
    """Seeds, items, backends, versions, hardware and commit, as a list."""
    said = [f"- seeds: {', '.join(map(str, results['seeds'])) or 'none'}"]
    if results["items"]:
        said.append("- test items: " + ", ".join(f"{task} {plain(count)}" for task, count in results["items"].items()))
    for step, backends in results["backends"].items():
        parts = [f"{backend} ({len(names)} models)" for backend, names in backends.items()]
        said.append(f"- {step} ran on {', '.join(parts)}")
    for key in ("versions", "hardware", "commit"):
        said.append(f"- {key}: {plain(results[key]) or 'not known'}")
    return "\n".join(said)


def plain(value: Any) -> str:
    """A JSON value in words: `cpu EPYC, cores 2`; values that differ between models with a slash."""
    if isinstance(value, dict):
        return ", ".join(f"{name} {plain(inner)}" for name, inner in value.items() if inner not in (None, [], {}))
    if isinstance(value, list):
        return " / ".join(plain(inner) for inner in value)
    return "" if value is None else str(value)
