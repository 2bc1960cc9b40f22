"""The report of a study: a pure function of the study's files, so it can be made at any time, of a half-done study too.

`report(folder)` writes `report.md` and `results.json`; `table_text(results)` is the same table for a terminal. A cell
is a number only where models were scored; what failed or was not run says so and enters no mean.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from itertools import combinations
from math import sqrt
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from llmkd.errors import InputError
from llmkd.layer_map import drawing

CONFIDENCE = 0.95
LONGEST_REASON = 60  # characters of a failure inside a table; the whole sentence stands below it


def report(folder: Path) -> Path:
    """Write `report.md` and `results.json` from a study's files and return the Markdown's path.

    Raises InputError if the folder holds no study.
    """
    results = gather(folder)
    recipe = folder / "recipe.yaml"
    _publish(folder / "results.json", json.dumps(results, indent=1, allow_nan=False))
    _publish(folder / "report.md", _markdown(results, recipe.read_text() if recipe.is_file() else ""))
    return folder / "report.md"


def gather(folder: Path) -> dict[str, Any]:
    """All that the report says, as one JSON-like value. Raises InputError if the folder holds no study."""
    study = _read(folder / "study.json")
    if study is None:
        raise InputError(
            f"{folder}: no study here (no readable study.json); give a study's folder, e.g. runs/quickstart"
        )
    entries = [{**entry, **_outcome(folder / entry["evaluation"])} for entry in study["entries"]]
    scored = [entry for entry in entries if entry["problem"] is None]
    results = {
        "name": study["name"],
        "models": len(entries),
        "scored": len(scored),
        "metrics": list(dict.fromkeys(metric for entry in scored for metric in entry["scores"])),
        "rows": _rows(entries),
        "problems": {entry["name"]: entry["problem"] for entry in entries if entry["problem"] is not None},
        "items": _agreed(entry["items"] for entry in scored),
        "versions": _agreed(entry["versions"] for entry in scored),
        "teacher_blocks": next((_blocks(folder / e["model"]) for e in entries if e["kind"] == "teacher"), None),
        "runs": [_run(folder, entry) for entry in entries if entry["train"] is not None],
    }
    return {**results, "conclusion": conclusion(results)}


# ---------------------------------------------------------------------------------------------------------------------
# From files to numbers


def _outcome(file: Path) -> dict[str, Any]:
    """One model's scores by `task/metric` (None where there is no number), or the problem that there are none."""
    found = _read(file)
    if found is None:
        problem = "unreadable evaluation file" if file.is_file() else "not run"
    elif found["error"] is not None:
        problem = f"failed: {found['error']}"
    else:
        problem = None
    if found is None or problem is not None:
        return {"problem": problem, "scores": {}, "items": {}, "versions": {}}
    scores = {f"{task}/{name}": value for task, values in found["tasks"].items() for name, value in values.items()}
    return {"problem": None, "scores": scores, "items": found.get("items", {}), "versions": found["versions"]}


def _rows(entries: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row per strategy or baseline, its seeds together, in the study's order."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for entry in entries:
        groups.setdefault(entry["strategy"] or entry["name"], []).append(entry)
    rows = []
    for name, members in groups.items():
        values: dict[str, list[float]] = {}
        for metric, value in (item for member in members for item in member["scores"].items()):
            if value is not None:  # lm-eval gave no finite number
                values.setdefault(metric, []).append(value)
        cells = {metric: _cell(there) for metric, there in values.items()}
        problems = [member["problem"] for member in members if member["problem"] is not None]
        seeds = [member["seed"] for member in members if member["seed"] is not None]
        rows.append(
            {
                "name": name,
                "kind": members[0]["kind"],
                "models": len(members),
                "seeds": seeds,
                "problems": problems,
                "cells": cells,
            }
        )
    return rows


def _cell(values: list[float]) -> dict[str, Any]:
    """Mean over the models that have the number, and the half width of its t-interval where there are two or more."""
    return {"mean": fmean(values), "half_width": half_width(values), "n": len(values), "values": values}


def half_width(values: Sequence[float]) -> float | None:
    """Half the 95 % interval of a mean, by Student's t with n-1 degrees of freedom; None below two values."""
    from scipy.stats import t

    if len(values) < 2:
        return None
    return float(t.ppf(0.5 + CONFIDENCE / 2, len(values) - 1)) * stdev(values) / sqrt(len(values))


def _run(folder: Path, entry: dict[str, Any]) -> dict[str, Any]:
    """What training an entry cost and which blocks it paired; or how far it has come."""
    place = folder / entry["train"]
    run: dict[str, Any] = {"name": entry["name"], "strategy": entry["strategy"], "state": "not run", "last_step": None}
    lines = (place / "metrics.jsonl").read_text().splitlines() if (place / "metrics.jsonl").is_file() else []
    if lines:
        run |= {"state": "unfinished", "last_step": _last_step(lines)}
    summary = _read(place / "summary.json")
    if summary is None:
        return run
    wanted = ("steps", "seconds", "tokens", "tokens_per_second", "memory_gib", "world_size", "resumed_from_step")
    run |= {"state": "done", "last_step": summary.get("steps"), **{key: summary.get(key) for key in wanted}}
    return {**run, "pairs": summary.get("pairs"), "blocks": _blocks(folder / entry["model"])}


def _blocks(model: Path) -> int | None:
    """A model folder's number of blocks; None if the folder is not at hand."""
    return (_read(model / "config.json") or {}).get("num_hidden_layers")


def _last_step(lines: Sequence[str]) -> int | None:
    for line in reversed(lines):
        try:
            return json.loads(line)["step"]
        except (ValueError, KeyError):  # the last line of a killed run may be half written
            continue
    return None


def _agreed(values: Any) -> dict[str, Any]:
    """The union of dicts; a key on which they differ keeps all its values."""
    found: dict[str, list[Any]] = {}
    for value in values:
        for key, item in value.items():
            if item not in found.setdefault(key, []):
                found[key].append(item)
    return {key: items[0] if len(items) == 1 else items for key, items in found.items()}


# ---------------------------------------------------------------------------------------------------------------------
# What can be said


def conclusion(results: dict[str, Any]) -> str:
    """What the first metric's scores allow to be said, and no more."""
    partial = ""
    if results["scored"] < results["models"]:
        partial = f"This report is partial: {results['scored']} of {results['models']} models have scores. "
    if not results["metrics"]:
        return f"{partial}Nothing can be concluded: no model has a score."
    metric = results["metrics"][0]
    compared = [row for row in results["rows"] if row["seeds"] and metric in row["cells"]]
    # An interval of width 0 is two seeds that tie by chance (a share of few items), not certainty: it is left out.
    repeated = [row for row in compared if row["cells"][metric]["half_width"]]
    if len(repeated) < 2:
        return (
            f"{partial}Nothing can be concluded about differences between strategies: it takes two strategies with "
            f"differing scores over at least two seeds each, and {len(repeated)} of {len(compared)} have them."
        )
    apart = []
    for one, other in combinations(repeated, 2):
        high, low = sorted((one, other), key=lambda row: row["cells"][metric]["mean"], reverse=True)
        if _bound(high, metric, -1) > _bound(low, metric, 1):
            apart.append(f"{high['name']} above {low['name']}")
    counts = sorted({row["cells"][metric]["n"] for row in repeated})
    seeds = f"{counts[0]} seeds" if len(counts) == 1 else f"{counts[0]} to {counts[-1]} seeds"
    said = f"the 95 % intervals over {seeds} of {', '.join(row['name'] for row in repeated)}"
    if apart:
        said += f" put {', '.join(apart)}; no other difference between them is shown"
    else:
        said += " overlap, so no difference between them is shown"
    return f"{partial}On {metric}, {said}.{_against_undistilled(results, repeated, metric)}"


def _against_undistilled(results: dict[str, Any], repeated: Sequence[dict[str, Any]], metric: str) -> str:
    """The untrained student is one fixed model: its number is compared with the intervals as it is."""
    row = next((row for row in results["rows"] if row["name"] == "undistilled" and not row["seeds"]), None)
    if row is None or metric not in row["cells"]:
        return ""
    value = row["cells"][metric]["mean"]
    above = [row["name"] for row in repeated if _bound(row, metric, -1) > value]
    return f" Intervals wholly above the undistilled student's {_number(value)}: {', '.join(above) or 'none'}."


def _bound(row: dict[str, Any], metric: str, side: int) -> float:
    return row["cells"][metric]["mean"] + side * row["cells"][metric]["half_width"]


# ---------------------------------------------------------------------------------------------------------------------
# Writing


def table_text(results: dict[str, Any]) -> str:
    """The table of scores for a terminal, and below it what can be concluded."""
    table = _score_table(results)
    widths = [max(len(line[column]) for line in table) for column in range(len(table[0]))]
    rule = ["-" * width for width in widths]
    lines = [" | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in table]
    return "\n".join([lines[0], "-+-".join(rule), *lines[1:], "", results["conclusion"]])


def _score_table(results: dict[str, Any]) -> list[list[str]]:
    """Header and rows as text."""
    tasks = {metric.partition("/")[0] for metric in results["metrics"]}
    heads = [metric if len(tasks) > 1 else metric.partition("/")[2] for metric in results["metrics"]]
    lines = [["model", "kind", "n", *(heads or ["scores"])]]
    for row in results["rows"]:
        cells = [_cell_text(row, metric) for metric in results["metrics"]] or [_reason(row)]
        lines.append([row["name"], row["kind"], f"{row['models'] - len(row['problems'])} of {row['models']}", *cells])
    return lines


def _cell_text(row: dict[str, Any], metric: str) -> str:
    cell = row["cells"].get(metric)
    if cell is None:
        return _reason(row)
    text = _number(cell["mean"])
    if cell["half_width"] is not None:
        text += f" ± {_number(cell['half_width'], like=cell['mean'])}"
    return text if cell["n"] == row["models"] else f"{text} (n={cell['n']})"


def _reason(row: dict[str, Any]) -> str:
    """Why a row has no number."""
    reason = row["problems"][0] if row["problems"] else "no value"
    return reason if len(reason) <= LONGEST_REASON else reason[: LONGEST_REASON - 3] + "..."


def _number(value: float, like: float | None = None) -> str:
    """Three decimals for what is small (accuracies), one for scores of 0 to 100; or as many as `like` gets."""
    return f"{value:.3f}" if abs(value if like is None else like) <= 1 else f"{value:.1f}"


def _markdown(results: dict[str, Any], recipe: str) -> str:
    parts = [f"# Study {results['name']}", results["conclusion"], "## Scores", _markdown_table(_score_table(results))]
    parts.append(
        "Mean over seeds ± half the 95 % t-interval of that mean. n: models scored of models planned. The intervals "
        "hold the differences between seeds, not the choice of test items."
    )
    if results["items"]:
        parts.append("Test items: " + ", ".join(f"{task} {count}" for task, count in results["items"].items()) + ".")
    if results["problems"]:
        parts += ["### Without scores", "\n".join(f"- {name}: {why}" for name, why in results["problems"].items())]
    parts += ["## Layer maps", *_maps(results["runs"], results["teacher_blocks"])]
    parts += ["## Cost of training", _markdown_table(_cost_table(results["runs"]))]
    if any(run.get("resumed_from_step") for run in results["runs"]):
        parts.append("A run that was resumed counts its last part's seconds and tokens.")
    versions = ", ".join(f"{package} {number}" for package, number in results["versions"].items())
    parts += ["## What was run", f"Evaluated with {versions}." if versions else "No evaluation yet."]
    if recipe:
        parts.append(f"<details><summary>recipe.yaml</summary>\n\n```yaml\n{recipe.rstrip()}\n```\n\n</details>")
    return "\n\n".join(parts) + "\n"


def _markdown_table(table: Sequence[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in table]
    return "\n".join([lines[0], "|" + " --- |" * len(table[0]), *lines[1:]])


def _maps(runs: Sequence[dict[str, Any]], teacher_blocks: int | None) -> list[str]:
    """Each strategy's drawing; one per seed where the seeds' maps differ."""
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for run in runs:
        if run.get("pairs"):
            groups.setdefault((run["strategy"], json.dumps(run["pairs"])), []).append(run)
    parts = []
    for (strategy, text), members in groups.items():
        pairs = tuple((student, teacher) for student, teacher in json.loads(text))
        if members[0]["blocks"] and teacher_blocks:
            picture = drawing(pairs, members[0]["blocks"], teacher_blocks)
        else:  # a model's config.json is not at hand, so its depth is not known
            picture = "\n".join(f"{student} <- {teacher}" for student, teacher in pairs)
        parts.append(f"**{strategy}** ({', '.join(run['name'] for run in members)})\n\n```text\n{picture}\n```")
    return parts or ["No trained student with a layer map yet."]


def _cost_table(runs: Sequence[dict[str, Any]]) -> list[list[str]]:
    lines = [["run", "state", "ranks", "steps", "seconds", "tokens/s", "peak memory per rank (GiB)"]]
    for run in runs:
        state = run["state"]
        if state == "unfinished":
            state = f"unfinished, at step {run['last_step']}"
        values = ((run.get("world_size"), "d"), (run.get("steps"), "d"), (run.get("seconds"), ".0f"))
        values += ((run.get("tokens_per_second"), ",.0f"), (run.get("memory_gib"), ".2f"))
        lines.append([run["name"], state, *("" if value is None else format(value, how) for value, how in values)])
    return lines


def _read(file: Path) -> Any:
    """A JSON file's value, or None if it is not there or not whole."""
    try:
        return json.loads(file.read_text())
    except (OSError, ValueError):
        return None


def _publish(file: Path, text: str) -> None:
    tmp = file.with_name(file.name + ".tmp")
    tmp.write_text(text)
    os.replace(tmp, file)
