"""Which students a folder holds, each with the recipe that trained it: a study's, or the one of a training folder.

And the projectors between a student's states and the teacher's, where their widths differ: as training drew them and as it left them.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from llmkd.distributed.checksums import damage, meta_of
from llmkd.distributed.shards import saved_weights
from llmkd.errors import InputError
from llmkd.layer_map import compared
from llmkd.models.folders import resolve
from llmkd.models.load import DTYPES
from llmkd.recipe.found import load_recipe_found, recipe_for
from llmkd.recipe.inputs import input_text, training_inputs
from llmkd.recipe.recipe import Recipe, load_recipe
from llmkd.recipe.study_entries import entry_recipe, read_study
from llmkd.student.distiller import make_projectors
from llmkd.training import checkpoint

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
    """What was compared: llmkd.layer_map.compared."""


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
    whole = recipe_for(folder, recipe, overrides)
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
    teacher = next((entry for entry in entries if entry.kind == "teacher"), None)
    if teacher is None:
        raise InputError(
            f"{folder / 'study.json'}: names no teacher; remove it, and run the study again, which writes it anew"
        )
    if not students:
        raise InputError(f"{folder}: no student of this study has been trained yet; run llmkd study first")
    inside = folder / teacher.model
    if teacher.train is not None and inside.is_dir():  # so that a study may be moved
        return inside, students
    return resolve(whole.teacher_path, "teacher.path", whole.teacher.revision), students


def _of_training(folder: Path, recipe: str | None, overrides: Sequence[str]) -> tuple[Path, list[TrainedStudent]]:
    """The student of a training folder; one that lies in a study has that study's teacher."""
    name = folder.resolve().name
    meta = meta_of(folder)
    if not any(key.startswith("student.") for key in meta["inputs"]):
        raise InputError(f"{folder}: a teacher's run, and angles are seen from a student; give a student's folder")
    strategy, seed = meta["strategy"], meta["inputs"].get("seed", 0)
    own = load_recipe_found(_own_recipe(folder), overrides) if recipe is None else load_recipe(recipe, overrides)
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
    meta = meta_of(train)
    ours, theirs = training_inputs(recipe), meta["inputs"]
    for key in sorted(ours.keys() | theirs.keys()):
        if key.startswith(DECIDES) and not key.endswith(":contents") and ours.get(key) != theirs.get(key):
            before, now = input_text(theirs, key), input_text(ours, key)
            raise InputError(
                f"{train} was trained by another recipe: {key} was {before}, here it is {now}; give its own recipe by --recipe"
            )
    pairs = tuple((block, teacher_block) for block, teacher_block in meta["pairs"])
    return TrainedStudent(name, kind, strategy, seed, train, recipe, compared(recipe.matching.strategy, pairs))


def _own_recipe(folder: Path) -> Path:
    """The recipe that a run left beside its model."""
    file = folder / "recipe.yaml"
    if not file.is_file():
        raise InputError(f"{folder}: has no recipe.yaml; give the recipe that trained this student by --recipe")
    return file


# --- Projectors

Widths = tuple[int, int]
"""Of the student's and of the teacher's states."""


def drawn_projectors(student: TrainedStudent, widths: Widths, device: torch.device) -> dict[int, nn.Module]:
    """The projectors as training drew them, by student block; a block of several pairs has its first pair's."""
    return _by_block(student, _drawn(student, widths), device)


def trained_projectors(
    student: TrainedStudent, widths: Widths, device: torch.device
) -> tuple[str, dict[int, nn.Module]]:
    """(the checkpoint's name, its projectors by student block). Raises InputError where the run kept none."""
    problem = f"its states are {widths[0]} wide and the teacher's {widths[1]}"
    saved = checkpoint.whole(student.train / "checkpoints")
    if not student.pairs or not saved:
        folder = student.train / "checkpoints"
        why = "the run matched no pair" if not student.pairs else f"no checkpoint is left in {folder}"
        raise InputError(
            f"{problem}, and {why}, so no trained projector stands between them; train it again {_fix_for_pairs(student)}and keep its "
            "checkpoints, or give a student of the teacher's width"
        )
    if (fault := damage(saved[-1])) is not None:
        raise InputError(f"{saved[-1]}: {fault}; put the file back, or train the student again")
    weights = saved_weights(saved[-1] / checkpoint.TAG, "projectors.")
    if not weights:
        raise InputError(
            f"{problem}, and {saved[-1]} holds no projector; train it again with a distance that has projectors, or give a student of "
            "the teacher's width"
        )
    projectors = _drawn(student, widths)
    projectors.load_state_dict(weights)
    return f"{saved[-1].parent.name}/{saved[-1].name}", _by_block(student, projectors, device)


def _drawn(student: TrainedStudent, widths: Widths) -> nn.ModuleList:
    """The projectors of the run's pairs as its recipe draws them, nn.Identity where a pair has none."""
    matching, count = student.recipe.matching, len(student.pairs)
    without = matching.unprojected(count)
    projectors = make_projectors(
        count, *widths, bias=matching.projector_bias, seed=student.recipe.seed, without=without
    )
    assert projectors is not None, "the widths differ and there are pairs"
    return projectors


def _by_block(student: TrainedStudent, projectors: nn.ModuleList, device: torch.device) -> dict[int, nn.Module]:
    """In float32, rounded as training's dtype rounded them."""
    projectors = projectors.to(DTYPES[student.recipe.train.dtype]).to(device, torch.float32).requires_grad_(False)
    by_block: dict[int, nn.Module] = {}
    for (block, _), projector in zip(student.pairs, projectors, strict=True):
        if block >= 0 and not isinstance(projector, nn.Identity):  # a negative block is the embeddings
            by_block.setdefault(block, projector)
    return by_block


def _fix_for_pairs(student: TrainedStudent) -> str:
    """What a run that matched no pair must be given to match some; nothing for one that did."""
    if student.pairs:
        return ""
    recipe = student.recipe
    lacking = ["a strategy other than none"] * (recipe.matching.strategy == "none")
    lacking += ["loss.hidden above 0"] * (recipe.loss.hidden == 0)
    return f"with {' and '.join(lacking) or 'pairs'} "
