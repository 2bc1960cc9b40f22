"""The files of a study, as they are read and written: half-written ones count as not there, and none is ever seen half."""

from __future__ import annotations

import json
from itertools import islice
from pathlib import Path
from typing import Any

from llmkd.errors import InputError

STEPS = {
    "generation": "generation",
    "classification": "classification",
    "lm-eval": "evaluation",
    "agreement": "agreement",
}
"""What is asked of a model -> the key of a study's entry that names its file, in the order of the report's columns."""
Entry = dict[str, Any]


def read_study(folder: Path) -> dict[str, Any]:
    """`study.json`. Raises InputError if the folder holds none."""
    study = read(folder / "study.json")
    if study is None:
        raise InputError(
            f"{folder}: no study here (no readable study.json); give a study's folder, e.g. runs/quickstart"
        )
    return study


def steps_asked(entry: Entry) -> list[str]:
    """The steps that a study asks of an entry."""
    return [step for step, key in STEPS.items() if entry.get(key)]


def result(folder: Path, entry: Entry, step: str) -> dict[str, Any] | str:
    """What a step found for an entry, or the problem that it found nothing."""
    file = folder / entry[STEPS[step]]
    found = read(file)
    if found is None:
        return "unreadable result file" if file.is_file() else "not run"
    return found if found["error"] is None else f"failed: {found['error']}"


def found_before_failing(folder: Path, entry: Entry, step: str) -> dict[str, Any] | None:
    """What a failed step has numbers for all the same (one faulty task costs the others nothing); None if for nothing."""
    found = read(folder / entry[STEPS[step]])
    return found if found and (found.get("tasks") or found.get("metrics")) else None


def details(folder: Path, entry: Entry, step: str) -> Path:
    """The file of a step's lines, one per item."""
    file = folder / entry[STEPS[step]]
    return file.with_suffix(".samples.jsonl" if step == "lm-eval" else ".jsonl")


def generations(folder: Path, limit: int = 200) -> list[dict[str, Any]]:
    """The first `limit` items with what every model wrote, and how it scored on each.

    {"item", "prompt", "references", "outputs": {entry: text}, "scores": {entry: {name: number}}}
    """
    items: dict[int, dict[str, Any]] = {}
    for entry in read_study(folder)["entries"]:
        if "generation" not in steps_asked(entry) or isinstance(result(folder, entry, "generation"), str):
            continue
        for line in read_lines(details(folder, entry, "generation"), limit):
            about = {key: line[key] for key in ("item", "prompt", "references")}
            item = items.setdefault(line["item"], {**about, "outputs": {}, "scores": {}})
            item["outputs"][entry["name"]] = line["text"]
            item["scores"][entry["name"]] = line.get("scores", {})
    return [items[number] for number in sorted(items)[:limit]]


def read(file: Path) -> Any:
    """A JSON file's value, or None if it is not there or not whole."""
    try:
        return json.loads(file.read_text())
    except (OSError, ValueError):
        return None


def read_lines(file: Path, limit: int | None = None) -> list[dict[str, Any]]:
    """The lines of a JSONL file, at most `limit`; a line that a killed process left half-written is left out."""
    found = []
    try:
        with file.open() as lines:
            for line in islice(lines, limit):
                try:
                    found.append(json.loads(line))
                except ValueError:
                    continue
    except OSError:
        return []
    return found
