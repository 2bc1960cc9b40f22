"""The files of a study, as they are read and written: half-written ones count as not there, and none is ever seen half."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmkd.files import read, read_lines
from llmkd.recipe.study_entries import StudyEntry, read_study


@dataclass(frozen=True, kw_only=True)
class ScoredEntry(StudyEntry):
    """A model of a study with its scores by metric, and by scoring step what it was scored on and how, or why there are no scores."""

    scores: dict[str, float]
    problems: dict[str, str]
    items: dict[str, Any]
    versions: dict[str, str]
    conditions: dict[str, Any]
    lower: list[str]
    """The metrics of which less is better."""


def _file(folder: Path, entry: StudyEntry, step: str) -> Path:
    file = entry.result_file(step)
    assert file is not None, (entry.name, step)
    return folder / file


def result(folder: Path, entry: StudyEntry, step: str) -> dict[str, Any] | str:
    """What a step found for an entry, or the problem that it found nothing."""
    file = _file(folder, entry, step)
    found = read(file)
    if found is None:
        return "unreadable result file" if file.is_file() else "not run"
    return found if found["error"] is None else f"failed: {found['error']}"


def found_before_failing(folder: Path, entry: StudyEntry, step: str) -> dict[str, Any] | None:
    """What a failed step has numbers for all the same (one faulty task costs the others nothing); None if for nothing."""
    found = read(_file(folder, entry, step))
    return found if found and (found.get("tasks") or found.get("metrics")) else None


def details(folder: Path, entry: StudyEntry, step: str) -> Path:
    """The file of a step's lines, one per item."""
    file = _file(folder, entry, step)
    return file.with_suffix(".samples.jsonl" if step == "lm-eval" else ".jsonl")


def generations(folder: Path, limit: int = 200) -> list[dict[str, Any]]:
    """The first `limit` items with what every model wrote, and how it scored on each.

    {"item", "prompt", "references", "outputs": {entry: text}, "scores": {entry: {name: number}}}
    """
    items: dict[int, dict[str, Any]] = {}
    for entry in read_study(folder).entries:
        if "generation" not in entry.steps or isinstance(result(folder, entry, "generation"), str):
            continue
        for line in read_lines(details(folder, entry, "generation"), limit):
            about = {key: line[key] for key in ("item", "prompt", "references")}
            item = items.setdefault(line["item"], {**about, "outputs": {}, "scores": {}})
            item["outputs"][entry.name] = line["text"]
            item["scores"][entry.name] = line.get("scores", {})
    return [items[number] for number in sorted(items)[:limit]]
