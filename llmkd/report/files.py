"""The files of a study, read into values with names. A half-written file counts as not there."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from llmkd.evaluation.results import RESULT_CLASSES, GeneratedText, ScoredModel, Scores, read_items, read_result
from llmkd.files import read
from llmkd.recipe.study_entries import StudyEntry, read_study
from llmkd.report.results import Agreed

COSTS = ("steps", "seconds", "tokens", "tokens_per_second", "memory_gib", "world_size", "resumed_from_step")


def row_name(entry: StudyEntry) -> str:
    """The row of the report's tables that a model belongs to."""
    return entry.strategy or entry.name


def result_file(folder: Path, entry: StudyEntry, step: str) -> Path:
    """A model's result file of a step that is asked of it."""
    file = entry.result_file(step)
    assert file is not None, (entry.name, step)
    return folder / file


def items_file(folder: Path, entry: StudyEntry, step: str) -> Path:
    """The file of a step's lines, one per item."""
    return result_file(folder, entry, step).with_suffix(RESULT_CLASSES[step].ITEMS_SUFFIX)


def step_result(folder: Path, entry: StudyEntry, step: str) -> tuple[ScoredModel | None, str | None]:
    """A model's result of a step, and the problem if there is one: a step that failed for one task has the other tasks' scores."""
    file = result_file(folder, entry, step)
    result = read_result(file, RESULT_CLASSES[step])
    if result is None:
        return None, "unreadable result file" if file.is_file() else "not run"
    if result.error is None:
        return result, None
    return result if result.has_scores else None, f"failed: {result.error}"


@dataclass(frozen=True)
class GeneratedItem:
    """One prompt with what every model wrote, and how each scored."""

    item: int
    prompt: str
    references: list[str]
    outputs: dict[str, str] = field(default_factory=dict)
    scores: dict[str, Scores] = field(default_factory=dict)


def generations(folder: Path, limit: int = 200) -> list[GeneratedItem]:
    """The first `limit` items of the generation step. Raises InputError if the folder holds no study."""
    items: dict[int, GeneratedItem] = {}
    for entry in read_study(folder).entries:
        if "generation" not in entry.steps or step_result(folder, entry, "generation")[1] is not None:
            continue
        for line in read_items(items_file(folder, entry, "generation"), GeneratedText, limit):
            item = items.setdefault(line.item, GeneratedItem(line.item, line.prompt, line.references))
            item.outputs[entry.name] = line.text
            item.scores[entry.name] = line.scores
    return [items[number] for number in sorted(items)[:limit]]


@dataclass(frozen=True)
class Summary:
    """The summary.json that a finished run leaves. `costs`: steps, seconds and so on, by the names of a TrainingRun's fields."""

    pairs: list[list[int]] = field(default_factory=list)
    versions: dict[str, str] = field(default_factory=dict)
    hardware: Agreed = field(default_factory=dict)
    commit: str | None = None
    costs: Agreed = field(default_factory=dict)
    done: bool = False


def read_summary(training: Path) -> Summary:
    """A run's summary; empty while there is none."""
    values = read(training / "summary.json") or {}
    known = {key: values[key] for key in ("pairs", "versions", "hardware", "commit") if values.get(key) is not None}
    return Summary(**known, costs={key: values.get(key) for key in COSTS}, done=bool(values))


def depth(model: Path) -> int | None:
    """The number of blocks of a model folder, of an encoder-decoder those of both stacks; None if it is not at hand."""
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
