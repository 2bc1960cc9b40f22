"""The files of a study, read into values with names. A half-written file counts as not there."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from math import isfinite
from pathlib import Path
from typing import Any, TypeVar

import yaml

from llmkd.errors import InputError
from llmkd.evaluation.results import RESULT_CLASSES, GeneratedText, ScoredModel, Scores, read_items, read_result
from llmkd.files import read, read_lines
from llmkd.layer_map import STRATEGIES
from llmkd.recipe.study_entries import StudyEntry, read_study
from llmkd.report.results import NOT_YET, Agreed, LayerMap
from llmkd.report.runs import Curve, LogLine, Rule, RunRollouts, RunValidations, ShownTexts, StepTimes, TrainingRun

COSTS = ("steps", "seconds", "tokens", "tokens_per_second", "memory_gib", "world_size", "resumed_from_step")
CURVE_POINTS = 200  # of one run; a longer curve is thinned
SHOWN_ROUNDS = 3  # whose texts are side by side: the first, the middle and the last
PARTS = ("loss", "ce", "kl", "hidden")
ROUNDS = ("length", "ended", "repetition")
MEASURED = ("ce", "perplexity", "kl", "agreement")
SUMMARY = (
    "pairs",
    "strategy",
    "versions",
    "hardware",
    "commit",
    "validation",
    "kept",
    "sources",
    "step",
    "rollouts",
    "teachers_texts",
    "teacher_seconds",
    "validation_seconds",
    "students_in_turn",
)
Value = TypeVar("Value")


def row_name(entry: StudyEntry) -> str:
    """The row of the report's tables that a model belongs to."""
    return entry.strategy or entry.name


def items_file(folder: Path, entry: StudyEntry, step: str) -> Path:
    """The file of a step's lines, one per item."""
    return (folder / entry.results[step]).with_suffix(RESULT_CLASSES[step].ITEMS_SUFFIX)


def step_result(folder: Path, entry: StudyEntry, step: str) -> tuple[ScoredModel | None, str | None]:
    """A model's result of a step, and the problem if there is one: a step that failed for one task has the other tasks' scores."""
    file = folder / entry.results[step]
    result = read_result(file, RESULT_CLASSES[step])
    if result is None:
        return None, "unreadable result file" if file.is_file() else NOT_YET
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
    strategy: str | None = None
    versions: dict[str, str] = field(default_factory=dict)
    hardware: Agreed = field(default_factory=dict)
    commit: str | None = None
    costs: Agreed = field(default_factory=dict)
    step: Agreed = field(default_factory=dict)
    """The times of its steps; empty where they were not taken."""
    done: bool = False
    validation: Agreed = field(default_factory=dict)
    kept: Agreed = field(default_factory=dict)
    sources: dict[str, int] = field(default_factory=dict)
    rollouts: Agreed = field(default_factory=dict)
    """The seconds that its texts took; empty where none were written."""
    teacher_seconds: float | None = None
    validation_seconds: float | None = None
    students_in_turn: int = 1
    teachers_texts: Agreed = field(default_factory=dict)
    """The fields of a `Wrote`; empty where the teacher wrote nothing before training."""

    @property
    def is_mixed(self) -> bool:
        """Whether a student block was compared once, with a mixture of the blocks that `pairs` gives it."""
        return self.strategy in STRATEGIES and STRATEGIES[self.strategy].is_mixed


def read_summary(training: Path) -> Summary:
    """A run's summary; empty while there is none."""
    values = read(training / "summary.json") or {}
    known = {key: values[key] for key in SUMMARY if values.get(key) is not None}
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


def read_log(folder: Path, entry: StudyEntry) -> list[LogLine]:
    """What a run logged: its loss, the loss's parts and whatever only some runs log, by step."""
    return [_log_line(line) for line in _lines(folder, entry) if "validation" not in line]


def read_validations(folder: Path, entry: StudyEntry, summary: Summary) -> RunValidations | None:
    """What a run measured on held-out rows while it was trained; None where it was not validated."""
    lines = [
        LogLine(
            line["step"],
            _finite({name: values[name] for name in MEASURED if name in values}),
            _finite(values.get("pairs", {})),
        )
        for line in _lines(folder, entry)
        if (values := line.get("validation")) is not None
    ]
    if not lines:
        return None
    return RunValidations(lines, Rule(**summary.validation) if summary.validation else None, summary.kept.get("step"))


def read_rollouts(folder: Path, entry: StudyEntry, summary: Summary) -> RunRollouts | None:
    """The texts that were written while a run was trained; None where there were none."""
    training = entry.run_folder(folder)
    rounds = [line for line in read_lines(training / "rollouts.jsonl") if isinstance(line.get("step"), int)]
    if not rounds:
        return None
    shown = [line for line in rounds if line.get("samples")]
    lines = [LogLine(line["step"] + 1, _finite({name: line.get(name) for name in ROUNDS})) for line in rounds]
    return RunRollouts(
        lines=list(thinned(lines, CURVE_POINTS)),
        rounds=len(rounds),
        texts=sum(line["texts"] for line in rounds),
        tokens=sum(line["tokens"] for line in rounds),
        own_kl=_own_kl(training / "recipe.yaml"),
        shown=[_shown(line) for line in thinned(shown, SHOWN_ROUNDS)],
        seconds=summary.rollouts.get("writing"),
        weights_seconds=summary.rollouts.get("weights"),
        teacher_seconds=summary.teacher_seconds,
        validation_seconds=summary.validation_seconds,
        of_seconds=summary.costs.get("seconds") if summary.rollouts else None,
    )


def _shown(line: Mapping[str, Any]) -> ShownTexts:
    prompts, texts = ([sample[part] for sample in line["samples"]] for part in ("prompt", "text"))
    return ShownTexts(line["step"] + 1, prompts, texts)


def written_recipe(file: Path) -> dict[str, Any]:
    """A recipe as llmkd wrote it into a folder; empty where there is none. Raises InputError for a damaged one."""
    try:
        values = yaml.safe_load(file.read_text()) if file.is_file() else {}
    except (ValueError, RecursionError, yaml.YAMLError):
        values = None
    if not isinstance(values, dict):
        raise InputError(f"{file}: it is not what llmkd wrote; put it back, or remove it: a study writes its own anew")
    return values


def _own_kl(file: Path) -> str | None:
    """What the log's `kl` is, as a run's recipe says: the divergence and its temperature; None if not of written texts alone."""
    recipe = written_recipe(file)
    rollouts, loss = recipe.get("rollouts") or {}, recipe.get("loss") or {}
    if rollouts.get("share") != 1 or not loss.get("kl"):
        return None
    divergence = loss.get("own_divergence") or loss["divergence"]
    if not isinstance(divergence, str):
        divergence = " + ".join(f"{weight} {name}" for name, weight in divergence.items())
    return f"{divergence} at temperature {loss['temperature']:g}"


def _lines(folder: Path, entry: StudyEntry) -> list[dict[str, Any]]:
    return [
        line for line in read_lines(entry.run_folder(folder) / "metrics.jsonl") if isinstance(line.get("step"), int)
    ]


def _log_line(line: Mapping[str, Any]) -> LogLine:
    apart = line.get("not_in_loss", {})
    parts = {part: line.get(part, apart.get(part)) for part in PARTS}
    parts |= {key: line[key] for key in ("temperature", "stones") if key in line}
    parts |= {f"weight of {part}": value for part, value in line.get("weights", {}).items()}
    norms = line.get("norms", {})
    by_name = {part: value for part, value in norms.items() if not isinstance(value, dict)}
    by_name |= {**norms.get("distances", {}), **norms.get("divergences", {})}
    for stone, values in norms.get("stones", {}).items():
        by_name |= {f"{stone} {part}": value for part, value in values.items()}
    parts |= {f"norm of {name}": value for name, value in by_name.items()}
    return LogLine(
        line["step"], _finite(parts), _finite(line.get("pairs", {})), tuple(apart), line.get("learned_map", {})
    )


def _finite(values: Mapping[str, object]) -> dict[str, float | None]:
    """The values with None for what is no finite number."""
    known = {name: v for name, v in values.items() if isinstance(v, int | float) and isfinite(v)}
    return {name: known.get(name) for name in values}


def training_run(entry: StudyEntry, log: Sequence[LogLine], summary: Summary) -> TrainingRun:
    """What training a model cost; or how far it has come."""
    last = log[-1].step if log else None
    state = "done" if summary.done else "not yet" if last is None else "unfinished"
    last_step = last if summary.costs.get("steps") is None else summary.costs["steps"]
    step = StepTimes(**summary.step) if summary.step else None
    return TrainingRun(
        entry.name,
        entry.strategy,
        entry.seed,
        state,
        last_step,
        **summary.costs,
        students_in_turn=summary.students_in_turn,
        step=step,
    )


def thinned(values: Sequence[Value], most: int) -> Sequence[Value]:
    """At most so many of the values: the first, the last, and as evenly spaced as can be between."""
    if len(values) <= most:
        return values
    return [values[round(place * (len(values) - 1) / (most - 1))] for place in range(most)]


def curve(log: Sequence[LogLine], summary: Summary) -> Curve:
    """A run's log, at most `CURVE_POINTS` lines of it with the first and the last.

    The log names the pairs in the order in which the summary has them as numbers, counted through all stacks; there is none before
    the run has ended.
    """
    names = list(log[-1].pairs)
    students = [student for student, _ in summary.pairs]
    students = list(dict.fromkeys(students)) if summary.is_mixed else students
    blocks = dict(zip(names, students, strict=True)) if len(names) == len(students) else {}
    return Curve(list(thinned(log, CURVE_POINTS)), blocks)


def layer_maps(folder: Path, entries: Iterable[StudyEntry], summaries: Mapping[str, Summary]) -> list[LayerMap]:
    """Each trained strategy's map, without the embeddings' pairs; one per seed where the seeds' maps differ. A learned map's weights are in
    the run's log."""
    teacher_blocks = None
    groups: dict[tuple[str, str], list[StudyEntry]] = {}
    for entry in entries:
        if entry.kind == "teacher":
            teacher_blocks = depth(folder / entry.model)
        if entry.name in summaries and summaries[entry.name].pairs and not summaries[entry.name].is_mixed:
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
