"""Which students a folder holds, each with the recipe that trained it: a study's, or the one of a training folder."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from llmkd.errors import InputError
from llmkd.models.folders import resolve
from llmkd.recipe.inputs import input_text, training_inputs
from llmkd.recipe.recipe import Recipe, load_recipe
from llmkd.recipe.study_entries import entry_recipe, read_study

log = logging.getLogger("llmkd")

DECIDES = ("student.", "matching.", "train.dtype", "seed")  # how the keys begin by which a student's start is made anew


@dataclass(frozen=True)
class TrainedStudent:
    """One trained student: where it was trained, by which recipe, and with which pairs."""

    name: str
    kind: str
    strategy: str
    seed: int
    train: Path
    recipe: Recipe
    pairs: tuple[tuple[int, int], ...]


def students_of(folder: Path, recipe: str | None, overrides: Sequence[str]) -> tuple[Path, list[TrainedStudent]]:
    """(the teacher's folder, the trained students). Raises InputError for a folder without one.

    `recipe`: a file in place of the study's own recipe.yaml or the training folder's.
    """
    if (folder / "study.json").is_file():
        return _of_study(folder, recipe, overrides)
    if (folder / "model" / "llmkd.json").is_file():
        return _of_training(folder, recipe, overrides)
    if (folder / "llmkd.json").is_file():
        raise InputError(f"{folder}: a model's folder; give the training folder around it, {folder.resolve().parent}")
    if (folder / "checkpoints").is_dir():
        raise InputError(f"{folder}: its training has not ended, so there is no model yet; run its command again")
    raise InputError(
        f"{folder}: neither a study (no study.json) nor a student's training folder (no model/llmkd.json); give e.g. runs/quickstart "
        "or runs/quickstart/students/forward-s0"
    )


def _of_study(folder: Path, recipe: str | None, overrides: Sequence[str]) -> tuple[Path, list[TrainedStudent]]:
    """All trained students of a study, and cross-entropy alone; what is not trained yet is left out, and logged."""
    entries = read_study(folder).entries
    whole = load_recipe(recipe or folder / "recipe.yaml", overrides)
    students = []
    for entry in entries:
        if entry.train is None or entry.kind == "teacher":
            continue
        train = entry.run_folder(folder)
        if not (train / "model" / "llmkd.json").is_file():
            log.info("angles: %s has no model yet and is left out", entry.name)
            continue
        assert entry.strategy is not None and entry.seed is not None, "a student that is trained has both"
        students.append(_student(train, entry_recipe(whole, entry), entry.name, entry.kind, entry.strategy, entry.seed))
    if not students:
        raise InputError(f"{folder}: no student of this study has been trained yet; run llmkd study first")
    teacher = next(entry for entry in entries if entry.kind == "teacher")
    inside = folder / teacher.model
    if teacher.train is not None and inside.is_dir():  # so that a study may be moved
        return inside, students
    return resolve(whole.teacher_path, "teacher.path", whole.teacher.revision), students


def _of_training(folder: Path, recipe: str | None, overrides: Sequence[str]) -> tuple[Path, list[TrainedStudent]]:
    """The student of a training folder; one that lies in a study has that study's teacher."""
    name = folder.resolve().name
    meta = json.loads((folder / "model" / "llmkd.json").read_text())
    if not any(key.startswith("student.") for key in meta["inputs"]):
        raise InputError(
            f"{folder}: this run made a teacher, and angles are seen from a student; give a student's folder"
        )
    strategy, seed = meta["strategy"], meta["inputs"].get("seed", 0)
    own = load_recipe(_own_recipe(folder) if recipe is None else recipe, overrides)
    if recipe is not None:  # a run may have been given its strategy and seed on the command line
        own = own.changed({"matching.strategy": strategy, "seed": seed})
    student = _student(folder, own, name, "student", strategy, seed)
    study = folder.resolve().parent.parent
    if (study / "study.json").is_file() and any(entry.name == name for entry in read_study(study).entries):
        inside = study / "teacher" / "model"
        if own.teacher.path is None and inside.is_dir():
            return inside, [student]
    return resolve(own.teacher_path, "teacher.path", own.teacher.revision), [student]


def _student(train: Path, recipe: Recipe, name: str, kind: str, strategy: str, seed: int) -> TrainedStudent:
    """Raises InputError unless the recipe makes the student's start as its training did."""
    meta = json.loads((train / "model" / "llmkd.json").read_text())
    ours, theirs = training_inputs(recipe), meta["inputs"]
    for key in sorted(ours.keys() | theirs.keys()):
        if key.startswith(DECIDES) and not key.endswith(":contents") and ours.get(key) != theirs.get(key):
            before, now = input_text(theirs, key), input_text(ours, key)
            raise InputError(
                f"{train} was trained by another recipe: {key} was {before}, here it is {now}; give its own recipe by --recipe"
            )
    pairs = tuple((block, teacher_block) for block, teacher_block in meta["pairs"])
    return TrainedStudent(name, kind, strategy, seed, train, recipe, pairs)


def fix_for_pairs(student: TrainedStudent) -> str:
    """What a run that matched no pair must be given to match some; nothing for one that did."""
    if student.pairs:
        return ""
    recipe = student.recipe
    lacking = ["a strategy other than none"] * (recipe.matching.strategy == "none")
    lacking += ["loss.hidden above 0"] * (recipe.loss.hidden == 0)
    return f"with {' and '.join(lacking) or 'pairs'} "


def _own_recipe(folder: Path) -> Path:
    """The recipe that a run left beside its model."""
    file = folder / "recipe.yaml"
    if not file.is_file():
        raise InputError(
            f"{folder}: its recipe.yaml is not at hand; give the recipe that trained this student by --recipe"
        )
    return file
