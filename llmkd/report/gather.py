"""From the files of a study to the numbers of its report: `gather(folder)` reads them, of a half-done study too.

A model has up to four steps: texts it generated, classified rows, lm-eval, and agreement with the teacher. A cell is a
number only where models were scored; what failed, or whose turn has not come, is named in `problems` and enters no mean.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import fmean
from typing import Any

from llmkd.evaluation.results import RESULT_CLASSES, GenerationResult, LmEvalResult, ScoredModel
from llmkd.recipe.study_entries import STEPS, StudyEntry, StudyFile, read_study
from llmkd.report.angles import study_angles
from llmkd.report.comparisons import ItemScores, comparisons
from llmkd.report.conclusion import conclusion, notes
from llmkd.report.files import (
    curve,
    layer_maps,
    read_log,
    read_rollouts,
    read_summary,
    read_validations,
    row_name,
    step_result,
    training_run,
)
from llmkd.report.results import Agreed, Cell, Metric, Results, Row
from llmkd.report.significance import half_width
from llmkd.rollouts.texts import Wrote

LOWER_IS_BETTER = re.compile(r"perplexity|bits_per_byte|brier|^ter$")  # lm-eval's, where the file does not say
OF_100 = ("bleu", "chrf", "ter")  # lm-eval's metrics that go from 0 to 100


@dataclass(frozen=True)
class Outcome:
    """One model: its scores by metric, and by step its result and its problem, where it has them."""

    entry: StudyEntry
    scores: dict[str, float] = field(default_factory=dict)
    problems: dict[str, str] = field(default_factory=dict)
    results: dict[str, ScoredModel] = field(default_factory=dict)

    @property
    def problem(self) -> str:
        """One sentence of all its problems."""
        return "; ".join(f"{step} {problem}" for step, problem in self.problems.items())


def outcome(folder: Path, entry: StudyEntry) -> Outcome:
    """Read one model's result files."""
    model = Outcome(entry)
    for step in entry.steps:
        result, problem = step_result(folder, entry, step)
        if problem is not None:
            model.problems[step] = problem
        if result is not None:
            model.results[step] = result
            for task, scores in result.tasks.items():
                model.scores.update({f"{task}/{name}": value for name, value in scores.items() if value is not None})
    return model


def gather(folder: Path, with_items: bool = True) -> Results:
    """All that the report holds; the tests over items, which take seconds, may be left out.

    Raises InputError if the folder holds no study.
    """
    study = read_study(folder)
    outcomes = [outcome(folder, entry) for entry in study.entries]
    results = _without_comparisons(folder, study, outcomes)
    scores = {outcome.entry.name: outcome.scores for outcome in outcomes}
    failed = {outcome.entry.name: outcome.problems for outcome in outcomes}
    items = ItemScores(folder, study.entries, scores, failed) if with_items else None
    results = replace(results, comparisons=comparisons(results, items))
    return replace(results, conclusion=conclusion(results), notes=notes(results))


def _without_comparisons(folder: Path, study: StudyFile, outcomes: Sequence[Outcome]) -> Results:
    trained = [entry for entry in study.entries if entry.train is not None]
    summaries = {entry.name: read_summary(entry.run_folder(folder)) for entry in trained}
    logs = {entry.name: read_log(folder, entry) for entry in trained}
    metrics = _metrics(outcomes)
    scored = [result for outcome in outcomes for result in outcome.results.values()]
    return Results(
        name=study.name,
        models=len(outcomes),
        scored=sum(not outcome.problems for outcome in outcomes),
        seeds=list(dict.fromkeys(entry.seed for entry in study.entries if entry.seed is not None)),
        reference=study.reference,
        margins=dict(study.margins),
        margins_history=list(study.margins_history),
        primary=_primary(study.margins, metrics),
        metrics=metrics,
        rows=_rows(outcomes),
        problems={outcome.entry.name: outcome.problem for outcome in outcomes if outcome.problems},
        items=agreed(result.items for result in scored),
        maps=layer_maps(folder, study.entries, summaries),
        runs=[training_run(entry, logs[entry.name], summaries[entry.name]) for entry in trained],
        curves={name: curve(log, summaries[name]) for name, log in logs.items() if log},
        validations={
            entry.name: found
            for entry in trained
            if (found := read_validations(folder, entry, summaries[entry.name])) is not None
        },
        rollouts={
            entry.name: found
            for entry in trained
            if (found := read_rollouts(folder, entry, summaries[entry.name])) is not None
        },
        teachers_texts=_each_once(Wrote(**s.teachers_texts) for s in summaries.values() if s.teachers_texts),
        angles=study_angles(folder, study.entries),
        backends=_backends(outcomes),
        conditions={step: _conditions(outcomes, step) for step in STEPS},
        versions=agreed([result.versions for result in scored] + [summary.versions for summary in summaries.values()]),
        hardware=agreed(summary.hardware for summary in summaries.values()),
        thoughts=_thoughts(outcomes),
        sources=max((s.sources for s in summaries.values()), key=lambda counts: sum(counts.values()), default={}),
        commit=", ".join(dict.fromkeys(s.commit for s in summaries.values() if s.commit)) or None,
    )


def _each_once(texts: Iterable[Wrote]) -> list[Wrote]:
    return list(dict.fromkeys(texts))


def _metrics(outcomes: Sequence[Outcome]) -> list[Metric]:
    """Every metric that a model has, step by step, with what it takes to show it."""
    higher: dict[str, bool] = {}  # lm-eval's metrics, where the files say so
    for result in (outcome.results.get("lm-eval") for outcome in outcomes):
        if isinstance(result, LmEvalResult):
            for task, directions in result.higher_is_better.items():
                higher |= {f"{task}/{metric}": better for metric, better in directions.items()}
    names = dict.fromkeys(name for outcome in outcomes for name in outcome.scores)
    metrics = [_metric(name, higher.get(name)) for name in names]
    return sorted(metrics, key=lambda metric: list(STEPS).index(metric.step))  # sorted is stable


def _metric(name: str, higher: bool | None) -> Metric:
    step, _, short = name.partition("/")
    if step not in STEPS:
        better = not LOWER_IS_BETTER.search(short) if higher is None else higher
        return Metric(name, name, better, short in OF_100, "lm-eval")
    label, higher, percent = RESULT_CLASSES[step].LABELS.get(short, (short, True, False))
    return Metric(name, label, higher, percent, step)


def _primary(margins: Mapping[str, float], metrics: Sequence[Metric]) -> str | None:
    """The study's main metric: the first that has a margin, which no other replaces; without margins the first there is."""
    names = [metric.name for metric in metrics]
    chosen = next(iter(margins), names[0] if names else None)
    return chosen if chosen in names else None


def _rows(outcomes: Sequence[Outcome]) -> list[Row]:
    """One row per strategy or baseline, its seeds together, in the study's order."""
    groups: dict[str, list[Outcome]] = {}
    for outcome in outcomes:
        groups.setdefault(row_name(outcome.entry), []).append(outcome)
    return [_row(name, members) for name, members in groups.items()]


def _row(name: str, members: Sequence[Outcome]) -> Row:
    first = members[0].entry
    metrics = dict.fromkeys(metric for member in members for metric in member.scores)
    missing = {step: [m.problems[step] for m in members if step in m.problems] for step in STEPS}
    return Row(
        name=name,
        kind=first.kind,
        models=len(members),
        seeds=[member.entry.seed for member in members if member.entry.seed is not None],
        problems=[f"{member.entry.name}: {member.problem}" for member in members if member.problems],
        missing={step: problems for step, problems in missing.items() if problems},
        steps=first.steps,
        cells={metric: _cell([member for member in members if metric in member.scores], metric) for metric in metrics},
    )


def _cell(members: Sequence[Outcome], metric: str) -> Cell:
    """Mean over the models that have the number, and the half width of its t-interval where there are two or more."""
    values = [member.scores[metric] for member in members]
    return Cell(fmean(values), half_width(values), len(values), values, [member.entry.seed for member in members])


# --- How it was measured


def _conditions(outcomes: Sequence[Outcome], step: str) -> Agreed:
    """What a step's models were scored with, and on how many items."""
    by_model = []
    for outcome in outcomes:
        result = outcome.results.get(step)
        if result is not None:
            values = {"backend": result.backend, "dtype": result.dtype, "versions": result.versions or None}
            known = {key: value for key, value in values.items() if value is not None}
            by_model.append({**known, "items": dict(result.items)})
    return agreed(by_model)


def _backends(outcomes: Sequence[Outcome]) -> dict[str, dict[str, list[str]]]:
    """Step -> backend -> the models that it ran."""
    backends: dict[str, dict[str, list[str]]] = {}
    for outcome in outcomes:
        for step, result in outcome.results.items():
            if result.backend is not None:
                backends.setdefault(step, {}).setdefault(result.backend, []).append(outcome.entry.name)
    return backends


def _thoughts(outcomes: Sequence[Outcome]) -> dict[str, int]:
    """Model -> how many of its texts had thoughts, if any had."""
    written = {outcome.entry.name: outcome.results.get("generation") for outcome in outcomes}
    return {
        name: result.thoughts
        for name, result in written.items()
        if isinstance(result, GenerationResult) and result.thoughts
    }


def agreed(mappings: Iterable[Mapping[str, Any]]) -> Agreed:
    """The union of mappings; a key on which they differ keeps all its values, in a list."""
    by_key: dict[str, list[Any]] = {}
    for mapping in mappings:
        for key, value in mapping.items():
            if value not in by_key.setdefault(key, []):
                by_key[key].append(value)
    return {key: values[0] if len(values) == 1 else values for key, values in by_key.items()}
