"""The models of a study, each with its own recipe and the files of its results."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

from llmkd.errors import InputError
from llmkd.files import read, write_json
from llmkd.layer_map import STRATEGIES
from llmkd.recipe.objective import Matching
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
STEPS = {step.name: step.entry for step in SCORING_STEPS if step.entry is not None}
"""Scoring step -> the key of an entry in `study.json` that names its result file, in the order of the report's columns."""


@dataclass(frozen=True, kw_only=True)
class StudyEntry:
    """One model of a study, as `study.json` lists it. Paths are relative to the study's folder."""

    name: str
    kind: Literal["teacher", "baseline", "student"]
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
        own: dict[str, Any] = {key.name: value.get(key.name) for key in fields(cls) if key.name != "results"}
        return cls(**own, results={step: value[key] for step, key in STEPS.items() if value.get(key)})

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

    def result_file(self, step: str) -> str | None:
        """The file of a scoring step's result."""
        return self.results.get(step)


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
    return StudyFile(
        name=values["name"],
        reference=values.get("reference") or "forward",
        margins=values.get("margins") or {},
        margins_history=values.get("margins_history") or [],
        entries=[StudyEntry.from_json(entry) for entry in values["entries"]],
    )


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
    kind: Literal["teacher", "baseline", "student"],
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
    return recipe.changed({**_without_others(recipe.matching, strategy), **changes, "seed": entry.seed})


def _without_others(matching: Matching, strategy: str) -> dict[str, object]:
    """The options that only the study's other strategies read, each set back to its default."""
    if strategy not in STRATEGIES:  # refused by its name, once the recipe is changed
        return {}
    unread = matching.options.keys() - set(STRATEGIES[strategy].options)
    return {f"matching.{option}": Matching.model_fields[option].default for option in unread}
