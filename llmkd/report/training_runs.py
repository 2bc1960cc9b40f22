"""What a study's training runs logged and cost, and which blocks they paired."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from math import isfinite
from pathlib import Path
from typing import Any, TypeVar

from llmkd.files import read_lines
from llmkd.layer_map import EMBEDDING
from llmkd.recipe.study_entries import StudyEntry
from llmkd.report.files import Summary, depth, row_name
from llmkd.report.results import Curve, LayerMap, LogLine, TrainingRun

CURVE_POINTS = 200  # of one run; a longer curve is thinned
PARTS = ("loss", "ce", "kl", "hidden")
Value = TypeVar("Value")


def read_log(folder: Path, entry: StudyEntry) -> list[LogLine]:
    """What a run logged: its loss, the loss's parts and whatever only some runs log, by step."""
    return [_log_line(line) for line in read_lines(entry.run_folder(folder) / "metrics.jsonl")]


def _log_line(line: Mapping[str, Any]) -> LogLine:
    parts = {part: line.get(part) for part in PARTS}
    parts |= {key: line[key] for key in ("temperature", "stones") if key in line}
    parts |= {f"weight of {part}": value for part, value in line.get("weights", {}).items()}
    norms = line.get("norms", {})
    by_name = {part: value for part, value in norms.items() if not isinstance(value, dict)}
    by_name |= {**norms.get("distances", {}), **norms.get("divergences", {})}
    for stone, values in norms.get("stones", {}).items():
        by_name |= {f"{stone} {part}": value for part, value in values.items()}
    parts |= {f"norm of {name}": value for name, value in by_name.items()}
    return LogLine(line["step"], _finite(parts), _finite(line.get("pairs", {})))


def _finite(values: Mapping[str, object]) -> dict[str, float | None]:
    """The values with None for what is no finite number."""
    return {
        name: value if isinstance(value, int | float) and isfinite(value) else None for name, value in values.items()
    }


def training_run(entry: StudyEntry, log: Sequence[LogLine], summary: Summary) -> TrainingRun:
    """What training a model cost; or how far it has come."""
    last = log[-1].step if log else None
    state = "done" if summary.done else "not run" if last is None else "unfinished"
    last_step = last if summary.costs.get("steps") is None else summary.costs["steps"]
    return TrainingRun(entry.name, entry.strategy, entry.seed, state, last_step, **summary.costs)


def thinned(values: Sequence[Value], most: int) -> Sequence[Value]:
    """At most so many of the values: the first, the last, and as evenly spaced as can be between."""
    if len(values) <= most:
        return values
    return [values[round(place * (len(values) - 1) / (most - 1))] for place in range(most)]


def curve(log: Sequence[LogLine], summary: Summary) -> Curve:
    """A run's log, at most `CURVE_POINTS` lines of it with the first and the last."""
    return Curve(list(thinned(log, CURVE_POINTS)), pair_blocks(list(log[-1].pairs), summary.pairs))


def pair_blocks(names: Sequence[str], pairs: Sequence[Sequence[int]]) -> dict[str, int]:
    """The student block of each logged pair, by the pair's name.

    The log names pairs in the order in which the summary has them as numbers, counted through all stacks. Before there is
    a summary, the names of models of one stack (`2<7`) hold those numbers; those of an encoder-decoder (`dec 2<7`) do
    not, since they are counted from the decoder's first block: its blocks are known when the run has ended.
    """
    if len(pairs) == len(names):
        return {name: student for name, (student, _) in zip(names, pairs, strict=True)}
    students = {name: name.partition("<")[0] for name in names}
    if not all(student.isdigit() or student == "e" for student in students.values()):
        return {}
    return {name: EMBEDDING if student == "e" else int(student) for name, student in students.items()}


def layer_maps(folder: Path, entries: Iterable[StudyEntry], summaries: Mapping[str, Summary]) -> list[LayerMap]:
    """Each trained strategy's map, without the embeddings' pairs; one per seed where the seeds' maps differ."""
    teacher_blocks = None
    groups: dict[tuple[str, str], list[StudyEntry]] = {}
    for entry in entries:
        if entry.kind == "teacher":
            teacher_blocks = depth(folder / entry.model)
        if entry.name in summaries and summaries[entry.name].pairs:
            groups.setdefault((row_name(entry), json.dumps(summaries[entry.name].pairs)), []).append(entry)
    return [
        LayerMap(
            strategy,
            [member.name for member in members],
            [pair for pair in json.loads(pairs) if min(pair) >= 0],
            depth(folder / members[0].model),
            teacher_blocks,
        )
        for (strategy, pairs), members in groups.items()
    ]
