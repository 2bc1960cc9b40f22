"""What the files of a study say, as numbers: `gather(folder)` is a pure function of them, for a half-done study too.

A model has up to three steps: texts it generated, lm-eval, and agreement with the teacher. A cell is a number only where
models were scored; what failed or was not run is named in `problems` and enters no mean.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from math import isfinite
from pathlib import Path
from statistics import fmean
from typing import Any

from llmkd.evaluation.results import SCORED
from llmkd.files import read, read_lines
from llmkd.recipe.study_entries import STEPS, StudyEntry, read_study
from llmkd.report.angles import angle_findings
from llmkd.report.comparisons import comparisons
from llmkd.report.conclusion import conclusion, notes
from llmkd.report.files import ScoredEntry, found_before_failing, result
from llmkd.report.item_scores import ItemScores, no_items
from llmkd.report.significance import half_width

CURVE_POINTS = 200  # of one run; a longer curve is thinned
COST = ("steps", "seconds", "tokens", "tokens_per_second", "memory_gib", "world_size", "resumed_from_step")
LOWER_IS_BETTER = re.compile(r"perplexity|bits_per_byte|brier|^ter$")  # lm-eval's, where the file does not say
OF_100 = ("bleu", "chrf", "ter")  # lm-eval's metrics that go from 0 to 100


def gather(folder: Path, with_items: bool = True) -> dict[str, Any]:
    """All that the report says, as one JSON-like value; the tests over items, which take seconds, may be left out.

    Raises InputError if the folder holds no study.
    """
    study = read_study(folder)
    entries = [scored(folder, entry) for entry in study.entries]
    runs = [(entry, _summary(folder, entry)) for entry in entries if entry.train is not None]
    margins = dict(study.margins)
    metrics = _metrics(entries)
    rows = _rows(entries)
    results = {
        "name": study.name,
        "models": len(entries),
        "scored": sum(not entry.problems for entry in entries),
        "seeds": list(dict.fromkeys(entry.seed for entry in entries if entry.seed is not None)),
        "reference": study.reference,
        "margins": margins,
        "margins_history": list(study.margins_history),
        "primary": _primary(margins, metrics),
        "metrics": metrics,
        "rows": rows,
        "problems": {entry.name: _problem(entry) for entry in entries if entry.problems},
        "items": _agreed(entry.items for entry in entries),
        "maps": _maps(folder, entries, runs),
        "runs": [_run(folder, entry, summary) for entry, summary in runs],
        "curves": {entry.name: curve for entry, _ in runs if (curve := _curve(entry.run_folder(folder)))},
        "angles": angle_findings(folder, entries),
        "backends": _backends(entries),
        "conditions": {
            step: _agreed(entry.conditions[step] for entry in entries if step in entry.conditions) for step in STEPS
        },
        "versions": _agreed([e.versions for e in entries] + [summary.get("versions") or {} for _, summary in runs]),
        "hardware": _agreed(summary.get("hardware") or {} for _, summary in runs),
        "commit": ", ".join(dict.fromkeys(s["commit"] for _, s in runs if s.get("commit"))) or None,
    }
    items = ItemScores(folder, entries) if with_items else no_items
    results["comparisons"] = comparisons(rows, metrics, results["reference"], margins, items)
    return {**results, "conclusion": conclusion(results), "notes": notes(results)}


def scored(folder: Path, entry: StudyEntry) -> ScoredEntry:
    """One model's scores by metric, and by step the problem that there are none, what it was scored by and how."""
    made: dict[str, Any] = {"scores": {}, "problems": {}, "items": {}, "versions": {}, "conditions": {}, "lower": []}
    for step in entry.steps:
        found = result(folder, entry, step)
        if isinstance(found, str):
            made["problems"][step] = found
            found = found_before_failing(folder, entry, step)
        if found is None:
            continue
        tasks = found["tasks"] if step == "lm-eval" else {step: found["metrics"]}
        counted = found.get("items", found.get("rows"))
        items = counted if isinstance(counted, dict) else {step: counted} if counted is not None else {}
        made["scores"].update(
            {f"{t}/{m}": v for t, values in tasks.items() for m, v in values.items() if _is_number(v)}
        )
        made["items"].update(items)
        made["versions"].update(found.get("versions") or {})
        shared = {key: found[key] for key in ("backend", "dtype", "versions") if found.get(key) is not None}
        made["conditions"][step] = {**shared, "items": items}
        better = found.get("higher_is_better") or {}
        made["lower"] += [f"{t}/{m}" for t, known in better.items() for m, higher in known.items() if not higher]
        made["lower"] += [
            f"{t}/{m}" for t, values in tasks.items() for m in values if t not in better and LOWER_IS_BETTER.search(m)
        ]
    return ScoredEntry(**asdict(entry), **made)


def _problem(entry: ScoredEntry) -> str:
    """One sentence of all of a model's problems."""
    return "; ".join(f"{step} {problem}" for step, problem in entry.problems.items())


def _metrics(entries: Sequence[ScoredEntry]) -> list[dict[str, Any]]:
    """Every metric that a model has, step by step, with what it takes to show it."""
    lower = {name for entry in entries for name in entry.lower}
    names = dict.fromkeys(name for entry in entries for name in entry.scores)
    made = [_metric(name, name in lower) for name in names]
    return sorted(made, key=lambda metric: list(STEPS).index(metric["step"]))  # sorted is stable


def _metric(name: str, lower: bool) -> dict[str, Any]:
    step, _, short = name.partition("/")
    if step in SCORED:
        label, higher, percent = SCORED[step].LABELS.get(short, (short, True, False))
    else:
        label, higher, percent, step = name, not lower, short in OF_100, "lm-eval"
    return {"name": name, "label": label, "higher_is_better": higher, "percent": percent, "step": step}


def _primary(margins: dict[str, float], metrics: Sequence[dict[str, Any]]) -> str | None:
    """The study's main metric: the first that has a margin, which no other replaces; without margins the first there is."""
    names = [metric["name"] for metric in metrics]
    chosen = next(iter(margins), names[0] if names else None)
    return chosen if chosen in names else None


def _rows(entries: Sequence[ScoredEntry]) -> list[dict[str, Any]]:
    """One row per strategy or baseline, its seeds together, in the study's order."""
    groups: dict[str, list[ScoredEntry]] = {}
    for entry in entries:
        groups.setdefault(entry.strategy or entry.name, []).append(entry)
    rows = []
    for name, members in groups.items():
        names = dict.fromkeys(metric for member in members for metric in member.scores)
        missing = {step: [m.problems[step] for m in members if step in m.problems] for step in STEPS}
        rows.append(
            {
                "name": name,
                "kind": members[0].kind,
                "models": len(members),
                "seeds": [member.seed for member in members if member.seed is not None],
                "problems": [f"{member.name}: {_problem(member)}" for member in members if member.problems],
                "missing": {step: problems for step, problems in missing.items() if problems},
                "steps": members[0].steps,
                "cells": {metric: _cell([m for m in members if metric in m.scores], metric) for metric in names},
            }
        )
    return rows


def _cell(members: Sequence[ScoredEntry], metric: str) -> dict[str, Any]:
    """Mean over the models that have the number, and the half width of its t-interval where there are two or more."""
    values = [member.scores[metric] for member in members]
    return {
        "mean": fmean(values),
        "half_width": half_width(values),
        "n": len(values),
        "values": values,
        "seeds": [member.seed for member in members],
    }


# ---------------------------------------------------------------------------------------------------------------------
# Training runs


def _summary(folder: Path, entry: ScoredEntry) -> dict[str, Any]:
    return read(entry.run_folder(folder) / "summary.json") or {}


def _run(folder: Path, entry: ScoredEntry, summary: dict[str, Any]) -> dict[str, Any]:
    """What training an entry cost; or how far it has come."""
    run = {"name": entry.name, "strategy": entry.strategy, "seed": entry.seed}
    last = next((line["step"] for line in reversed(read_lines(entry.run_folder(folder) / "metrics.jsonl"))), None)
    state = "done" if summary else "not run" if last is None else "unfinished"
    return {**run, "state": state, "last_step": summary.get("steps", last), **{key: summary.get(key) for key in COST}}


def _curve(place: Path) -> list[dict[str, Any]]:
    """A run's loss and its parts by step, at most `CURVE_POINTS` of them with the first and the last."""
    lines = read_lines(place / "metrics.jsonl")
    if len(lines) > CURVE_POINTS:
        lines = [lines[round(i * (len(lines) - 1) / (CURVE_POINTS - 1))] for i in range(CURVE_POINTS)]
    return [
        {
            "step": line["step"],
            **{key: _finite(line.get(key)) for key in ("loss", "ce", "kl", "hidden")},
            "pairs": {name: _finite(value) for name, value in line.get("pairs", {}).items()},
            **_steered(line),
        }
        for line in lines
    ]


def _steered(line: dict[str, Any]) -> dict[str, float | None]:
    """What of a log line only some runs have: the temperature and weights that move, the stones' loss, the norms of parts' gradients."""
    found = {key: _finite(line[key]) for key in ("temperature", "stones") if key in line}
    found |= {f"weight of {part}": _finite(value) for part, value in line.get("weights", {}).items()}
    norms = {f"norm of {part}": value for part, value in line.get("norms", {}).items() if not isinstance(value, dict)}
    for kind in ("distances", "divergences"):
        norms |= {f"norm of {name}": value for name, value in line.get("norms", {}).get(kind, {}).items()}
    for stone, parts in line.get("norms", {}).get("stones", {}).items():
        norms |= {f"norm of {stone} {part}": value for part, value in parts.items()}
    return found | {name: _finite(value) for name, value in norms.items()}


def _maps(
    folder: Path, entries: Sequence[ScoredEntry], runs: Sequence[tuple[ScoredEntry, Any]]
) -> list[dict[str, Any]]:
    """Each strategy's map; one per seed where the seeds' maps differ."""
    teacher_blocks = next((_blocks(folder / e.model) for e in entries if e.kind == "teacher"), None)
    groups: dict[tuple[str, str], list[ScoredEntry]] = {}
    for entry, summary in runs:
        if summary.get("pairs"):
            groups.setdefault((entry.strategy or entry.name, json.dumps(summary["pairs"])), []).append(entry)
    return [
        {
            "strategy": strategy,
            "runs": [member.name for member in members],
            "pairs": [
                pair for pair in json.loads(pairs) if min(pair) >= 0
            ],  # of the embeddings there is nothing to draw
            "student_blocks": _blocks(folder / members[0].model),
            "teacher_blocks": teacher_blocks,
        }
        for (strategy, pairs), members in groups.items()
    ]


def _blocks(model: Path) -> int | None:
    """A model folder's number of blocks, of an encoder-decoder those of both; None if the folder is not at hand."""
    shape = read(model / "config.json") or {}
    for keys in (
        ("num_hidden_layers",),
        ("encoder_layers", "decoder_layers"),
        ("num_layers", "num_decoder_layers"),
        ("n_layers",),
    ):
        if all(isinstance(shape.get(key), int) for key in keys):
            return sum(shape[key] for key in keys)
    return None


def _backends(entries: Sequence[ScoredEntry]) -> dict[str, dict[str, list[str]]]:
    """Step -> backend -> the models that it ran."""
    found: dict[str, dict[str, list[str]]] = {}
    for entry in entries:
        for step, condition in entry.conditions.items():
            if "backend" in condition:
                found.setdefault(step, {}).setdefault(condition["backend"], []).append(entry.name)
    return found


def _agreed(values: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """The union of dicts; a key on which they differ keeps all its values."""
    found: dict[str, list[Any]] = {}
    for value in values:
        for key, item in value.items():
            if item not in found.setdefault(key, []):
                found[key].append(item)
    return {key: items[0] if len(items) == 1 else items for key, items in found.items()}


def _is_number(value: Any) -> bool:
    """A finite number: lm-eval gives none where it can't, and JSON's NaN is no score."""
    return isinstance(value, int | float) and not isinstance(value, bool) and isfinite(value)


def _finite(value: Any) -> float | None:
    return value if _is_number(value) else None
