"""The models of a study, each with its own recipe and the files of its results."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, TypeAdapter, ValidationError

from llmkd.errors import InputError
from llmkd.files import digest, read, write_json
from llmkd.recipe.inputs import finetune_inputs, flat, training_inputs
from llmkd.recipe.options import Part
from llmkd.recipe.recipe import Recipe
from llmkd.recipe.scoring_steps import SCORING_STEPS

CE_ONLY: Mapping[str, object] = {
    "matching.strategy": "none",
    "loss.kl": 0.0,
    "loss.hidden": 0.0,
    "loss.ce": 1.0,
    "loss.schedules": None,
    "stones": None,
    "loss.own_divergence": None,
}
Kind = Literal["teacher", "baseline", "student"]
STEPS = {step.name: step.entry for step in SCORING_STEPS if step.entry is not None}
"""Scoring step -> the key of an entry in `study.json` that names its result file, in the order of the report's columns."""


def _inside(path: str) -> str:
    """The path. Raises ValueError for one that does not name a place in the study's folder."""
    if not Path(path).name or "\0" in path or Path(path).is_absolute() or ".." in Path(path).parts:
        raise ValueError(f"{path!r} names no place in the study's folder")
    return path


def _with_results(entry: Any) -> Any:
    """An entry as the file has it, with the result files' keys in one mapping; what is no entry, as it is."""
    if not isinstance(entry, dict):
        return entry
    return {**entry, "results": {step: entry[key] for step, key in STEPS.items() if entry.get(key) is not None}}


Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")]
"""A model's name is a part of file names."""
Inside = Annotated[str, AfterValidator(_inside)]
Margins = Mapping[str, Annotated[float, Field(gt=0, allow_inf_nan=False)]]
"""Metric -> the largest difference that counts as none."""


@dataclass(frozen=True, kw_only=True)
class StudyEntry:
    """One model of a study, as `study.json` lists it. Paths are relative to the study's folder."""

    name: Name
    kind: Kind
    strategy: Annotated[str, Field(min_length=1)] | None
    """Strategy, variant or baseline; None for the teacher and for a checkpoint as it is."""
    seed: Annotated[int, Field(ge=0)] | None
    model: Annotated[str, Field(min_length=1)]
    """The model's folder, or the hub name of a model that the study does not train."""
    train: Inside | None
    """The folder of its training run; None where it is not trained."""
    results: Mapping[str, Inside] = field(default_factory=dict)
    """Scoring step -> its result file, for each step in the recipe; in `study.json` each has its own key."""

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
class StatedMargins:
    """The study's margins as they stood at one time, and how many results there were by then."""

    margins: Margins
    results: Annotated[int, Field(ge=0)]


@dataclass(frozen=True)
class StudyFile:
    """`study.json`: a study's models, and what was decided before there were results."""

    name: str
    reference: str
    margins: Margins
    margins_history: Sequence[StatedMargins]
    """Every set of margins, with the number of result files there were when it was first written."""
    entries: Sequence[Annotated[StudyEntry, BeforeValidator(_with_results)]]

    def write(self, folder: Path) -> None:
        history = [asdict(stated) for stated in self.margins_history]
        entries = [entry.to_json() for entry in self.entries]
        write_json(folder / "study.json", {**vars(self), "margins_history": history, "entries": entries})


def read_study(folder: Path) -> StudyFile:
    """`study.json`, every field of it checked. Raises InputError if the folder holds none, or one of another form."""
    file = folder / "study.json"
    values = read(file)
    if values is None:
        raise InputError(
            f"{folder}: no study here (no readable study.json); give a study's folder, e.g. runs/quickstart"
        )
    if isinstance(values, dict):
        values = {"reference": "forward", "margins": {}, "margins_history": []} | {
            key: value for key, value in values.items() if value is not None
        }
    try:
        study = TypeAdapter(StudyFile).validate_json(json.dumps(values), strict=True)
        _check_entries(study.entries)
    except ValueError as error:
        raise InputError(
            f"{file}: not as llmkd writes it ({_problem(error)}); remove it, and run the study again, which writes it anew"
        ) from error
    return study


def _check_entries(entries: Sequence[StudyEntry]) -> None:
    """Raise ValueError where entries contradict themselves or each other."""
    names = [entry.name for entry in entries]
    for entry in entries:
        if names.count(entry.name) > 1:
            raise ValueError(f"two entries are called {entry.name}")
        if entry.train is not None or entry.strategy == "undistilled":
            _inside(entry.model)
        if entry.train is not None and entry.kind != "teacher" and (entry.strategy is None or entry.seed is None):
            raise ValueError(f"{entry.name} is trained, and has no strategy or no seed")


def _problem(error: ValueError) -> str:
    """The first fault and where it is."""
    if not isinstance(error, ValidationError):
        return str(error)
    first = error.errors()[0]
    return f"{'.'.join(map(str, first['loc'])) or 'the whole'}: {first['msg'].removeprefix('Value error, ')}"


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
    """The students before their first step: one per seed where the start is random, or measured on rows drawn by the seed."""
    if recipe.student.init == "checkpoint" and recipe.student.adapter is None:
        return [_entry(recipe, "undistilled", "baseline", model=recipe.student.path or "")]
    if recipe.student.init != "random" and not recipe.student.is_measured:
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


def shared_pass(recipe: Recipe) -> dict[str, Any]:
    """The keys that students must have alike to be trained in turn off one pass of the teacher: what decides their rows and their steps,
    and how the teacher is run. Flat and dotted; a teacher that is not there counts as any other."""
    # students without stones do not read how they are computed
    values = {
        **flat(recipe.model_dump(mode="json")),
        "stones.checkpoint": True,
        "the teacher's folder": recipe.teacher_path,
    }
    if recipe.stones is not None:
        values["stones.checkpoint"] = recipe.stones.checkpoint
    if not recipe.teacher.placed.has_weights:
        values["the cache's folder"] = str(recipe.cache_folder)
    sections = ("seed", "data", "teacher", "finetune", "cache", "rollouts")
    keys = (
        "the teacher's folder",
        "the cache's folder",
        "student.path",
        "student.init",
        "matching.final_state",
        "stones.checkpoint",
    )
    steps = ("steps", "epochs", "batch_size", "micro_batch_size", "validate_every", "compile", "kernels")
    wanted = (*keys, *(f"train.{key}" for key in steps))
    return {key: value for key, value in values.items() if key in wanted or key.split(".")[0] in sections}


def groups(recipe: Recipe, entries: Sequence[StudyEntry]) -> list[list[StudyEntry]]:
    """The students among these that are trained at once: of those that share a pass of the teacher, `study.together` at a time, which is
    a number by now."""
    count = recipe.study.together
    assert isinstance(count, int), count
    by_pass: dict[str, list[StudyEntry]] = {}
    for entry in entries:
        if entry.train is None or entry.kind == "teacher":
            continue
        alike = shared_pass(entry_recipe(recipe, entry)) if count > 1 else entry.name
        by_pass.setdefault(json.dumps(alike, sort_keys=True), []).append(entry)
    return [members[at : at + count] for members in by_pass.values() for at in range(0, len(members), count)]


def dealt(recipe: Recipe, entries: Sequence[StudyEntry], part: Part) -> list[StudyEntry]:
    """The models that one part of a study trains and scores: the first has the teacher, and the others are dealt out in turn, those
    that are trained at once together.

    A baseline that is made of what a student's training measures goes with that student, so that no part waits for another's.
    """
    teacher = [entry for entry in entries if entry.kind == "teacher"]
    measured = [entry for entry in entries if entry.strategy == "undistilled" and recipe.student.is_measured]
    others = [entry for entry in entries if entry not in teacher and entry not in measured]
    dealt_out = [*([entry] for entry in others if entry.train is None), *groups(recipe, others)]
    ours = [entry for group in dealt_out[part.number - 1 :: part.count] for entry in group]
    ours += [entry for entry in measured if measured_start(recipe, entries, entry) in ours]
    return [entry for entry in entries if entry in ours or (part.number == 1 and entry in teacher)]


def shared_by_parts(recipe: Recipe, entries: Sequence[StudyEntry]) -> str:
    """A hash of what all parts must agree about: how the teacher is made, how models are scored, and which models there are."""
    teacher = None if recipe.finetune is None else finetune_inputs(recipe)
    names = [entry.name for entry in entries]
    return digest(
        [json.dumps(teacher), json.dumps(names), recipe.teacher.model_dump_json(), recipe.evaluation.model_dump_json()]
    )


def measured_start(recipe: Recipe, entries: Sequence[StudyEntry], baseline: StudyEntry) -> StudyEntry:
    """The student of the study by whose training the blocks of this undistilled baseline, or their width, are measured: one of its seed
    that begins with the recipe's own student, teacher and rows.

    Raises InputError where every student of that seed begins otherwise.
    """
    ours = _start_inputs(recipe.changed({"seed": baseline.seed}))
    for entry in entries:
        if entry.train is None or entry.kind == "teacher" or entry.seed != baseline.seed:
            continue
        if _start_inputs(entry_recipe(recipe, entry)) == ours:
            return entry
    raise InputError(
        f"study.baselines: {baseline.name} has the {recipe.student.measured} when a student is trained, "
        "and all of the study begin with another student, teacher or rows than the recipe's own; add a strategy, or leave undistilled out"
    )


def _start_inputs(recipe: Recipe) -> dict[str, Any]:
    """The keys by which a student's start is made; where its teacher lives is none of them, nor are texts written during training."""
    rollouts = recipe.rollouts
    other = ("matching.", "loss.", "stones", "rollouts", "cache.", "teacher.placement")
    inputs = {key: value for key, value in training_inputs(recipe).items() if not key.startswith(other)}
    return {**inputs, "rollouts": None if rollouts is None else rollouts.of_teacher()}


def entry_recipe(recipe: Recipe, entry: StudyEntry) -> Recipe:
    """The recipe of one student of a study.

    Raises InputError where no student of the study reads an option that the recipe gives, or this one can't have what it asks for.
    """
    assert entry.strategy is not None, entry
    ce_only = {**CE_ONLY, "rollouts": None if recipe.rollouts is None else recipe.rollouts.of_teacher()}
    changes = dict(ce_only if entry.strategy == "ce_only" else recipe.study.changes(entry.strategy))
    if recipe.teacher.share_cache:
        changes["teacher.placement"] = "cache"
    recipe.matching.check_options(recipe.study_strategies)
    strategy = str(changes.get("matching.strategy", recipe.matching.strategy))
    changes |= {
        "seed": entry.seed,
        "study.variants": {},
        "study.reference": None,
    }  # which may not go with this student's keys
    try:
        return recipe.changed({**recipe.matching.without_others(strategy), **changes})
    except InputError as error:  # what a key of the whole recipe asks for, and this student can't have
        cure = "; or leave ce_only out of study.baselines" if entry.strategy == "ce_only" else ""
        raise InputError(f"{entry.name}: {str(error).removeprefix('the changed recipe: ')}{cure}") from error
