"""The models of a study, each with its own recipe and the files of its results."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, get_args

from llmkd.errors import InputError, first_line
from llmkd.files import read, write_json
from llmkd.recipe.recipe import Recipe
from llmkd.recipe.scoring_steps import SCORING_STEPS

CE_ONLY: Mapping[str, object] = {
    "matching.strategy": "none",
    "loss.kl": 0.0,
    "loss.hidden": 0.0,
    "loss.ce": 1.0,
    "loss.schedules": None,
    "stones": None,
}
Kind = Literal["teacher", "baseline", "student"]
NAME = r"[A-Za-z0-9][A-Za-z0-9_.-]*"
"""A model's name is a part of file names."""
STEPS = {step.name: step.entry for step in SCORING_STEPS if step.entry is not None}
"""Scoring step -> the key of an entry in `study.json` that names its result file, in the order of the report's columns."""


@dataclass(frozen=True, kw_only=True)
class StudyEntry:
    """One model of a study, as `study.json` lists it. Paths are relative to the study's folder."""

    name: str
    kind: Kind
    strategy: str | None
    """Strategy, variant or baseline; None for the teacher and for a checkpoint as it is."""
    seed: int | None
    model: str
    """The model's folder, or the hub name of a model that the study does not train."""
    train: str | None
    """The folder of its training run; None where it is not trained."""
    results: Mapping[str, str] = field(default_factory=dict)
    """Scoring step -> its result file, for each step in the recipe; in `study.json` each has its own key."""

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> StudyEntry:
        """An entry as the file has it. Raises ValueError for one that names a place outside of the study's folder."""
        own: dict[str, Any] = {key.name: value.get(key.name) for key in fields(cls) if key.name != "results"}
        entry = cls(**own, results={step: value[key] for step, key in STEPS.items() if value.get(key)})
        if not isinstance(entry.name, str) or not re.fullmatch(NAME, entry.name):
            raise ValueError(f"{entry.name!r} is no model's name")
        for path in (entry.train, *entry.results.values()):
            if path is not None and (not isinstance(path, str) or Path(path).is_absolute() or ".." in Path(path).parts):
                raise ValueError(f"{path!r} lies outside of the study's folder")
        if not isinstance(entry.model, str) or entry.kind not in get_args(Kind):
            raise ValueError(f"{entry.name} has no model, or is of no kind")
        return entry

    def to_json(self) -> dict[str, Any]:
        values = asdict(self)
        files = values.pop("results")
        return {**values, **{key: files.get(step) for step, key in STEPS.items()}}

    @property
    def steps(self) -> list[str]:
        """The scoring steps that this model takes."""
        return [step for step in STEPS if step in self.results]

    def run_folder(self, study: Path) -> Path:
        """The folder of its training run, in a study's folder."""
        assert self.train is not None, self.name
        return study / self.train


@dataclass(frozen=True)
class StudyFile:
    """`study.json`: a study's models, and what was decided before there were results."""

    name: str
    reference: str
    margins: Mapping[str, float]
    """Metric -> the largest difference that counts as none."""
    margins_history: Sequence[Mapping[str, Any]]
    """Every set of margins, with the number of result files there were when it was first written."""
    entries: Sequence[StudyEntry]

    def write(self, folder: Path) -> None:
        write_json(folder / "study.json", {**vars(self), "entries": [entry.to_json() for entry in self.entries]})


def read_study(folder: Path) -> StudyFile:
    """`study.json`. Raises InputError if the folder holds none."""
    values = read(folder / "study.json")
    if values is None:
        raise InputError(
            f"{folder}: no study here (no readable study.json); give a study's folder, e.g. runs/quickstart"
        )
    try:
        return StudyFile(
            name=str(values["name"]),
            reference=str(values.get("reference") or "forward"),
            margins={str(metric): float(within) for metric, within in (values.get("margins") or {}).items()},
            margins_history=list(values.get("margins_history") or []),
            entries=[StudyEntry.from_json(entry) for entry in values["entries"]],
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise InputError(
            f"{folder / 'study.json'}: not as llmkd writes it ({first_line(error)}); run the study again, which writes it and nothing else"
        ) from error


def study_entries(recipe: Recipe) -> list[StudyEntry]:
    """Every model of the study: teacher, baselines, then strategies x seeds."""
    seeds = recipe.study.seeds
    if recipe.finetune is None:
        entries = [_entry(recipe, "teacher", "teacher", model=recipe.teacher_path)]
    else:
        entries = [_entry(recipe, "teacher", "teacher", model="teacher/model", train="teacher")]
    if "undistilled" in recipe.study.baselines:
        entries += _undistilled(recipe)
    if "ce_only" in recipe.study.baselines:
        entries += [_student(recipe, "baseline", "ce_only", seed) for seed in seeds]
    return entries + [_student(recipe, "student", name, seed) for name in recipe.study.students for seed in seeds]


def _undistilled(recipe: Recipe) -> list[StudyEntry]:
    """The students before their first step: one per seed where the start is random."""
    if recipe.student.init == "checkpoint":
        return [_entry(recipe, "undistilled", "baseline", model=recipe.student.path or "")]
    if recipe.student.init == "teacher":
        return [_entry(recipe, "undistilled", "baseline", strategy="undistilled", model="undistilled/copied")]
    return [
        _entry(
            recipe, f"undistilled-s{seed}", "baseline", strategy="undistilled", seed=seed, model=f"undistilled/s{seed}"
        )
        for seed in recipe.study.seeds
    ]


def _student(recipe: Recipe, kind: Literal["baseline", "student"], strategy: str, seed: int) -> StudyEntry:
    name = f"{strategy}-s{seed}"
    train = f"students/{name}"
    return _entry(recipe, name, kind, strategy=strategy, seed=seed, model=f"{train}/model", train=train)


def _entry(
    recipe: Recipe,
    name: str,
    kind: Kind,
    *,
    model: str,
    strategy: str | None = None,
    seed: int | None = None,
    train: str | None = None,
) -> StudyEntry:
    results = {
        step.name: f"{step.folder}/{name}.json"
        for step in SCORING_STEPS
        if step.entry is not None and step.asked(recipe.evaluation) and (step.of_teacher or kind != "teacher")
    }
    return StudyEntry(name=name, kind=kind, strategy=strategy, seed=seed, model=model, train=train, results=results)


def entry_recipe(recipe: Recipe, entry: StudyEntry) -> Recipe:
    """The recipe of one student of a study. Raises InputError where no student of the study reads an option that the recipe gives."""
    assert entry.strategy is not None, entry
    changes = dict(CE_ONLY if entry.strategy == "ce_only" else recipe.study.changes(entry.strategy))
    if recipe.teacher.share_cache:
        changes["teacher.placement"] = "cache"
    recipe.matching.check_options(recipe.study_strategies)
    strategy = str(changes.get("matching.strategy", recipe.matching.strategy))
    return recipe.changed({**recipe.matching.without_others(strategy), **changes, "seed": entry.seed})
