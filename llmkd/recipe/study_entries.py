"""The models of a study, each with its own recipe and the files of its results."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from llmkd.errors import InputError
from llmkd.files import read
from llmkd.recipe.recipe import Recipe

GENERATIONS, AGREEMENT, EVALUATIONS = "generations", "agreement", "evaluations"  # the folders of a study's results
CLASSIFICATIONS = "classifications"
RESULTS = (GENERATIONS, CLASSIFICATIONS, AGREEMENT, EVALUATIONS)
CE_ONLY: dict[str, Any] = {
    "matching.strategy": "none",
    "loss.kl": 0.0,
    "loss.hidden": 0.0,
    "loss.ce": 1.0,
    "loss.schedules": None,
    "stones": None,
}
STEPS = {
    "generation": "generation",
    "classification": "classification",
    "lm-eval": "evaluation",
    "agreement": "agreement",
}
"""What is asked of a model -> the key of a study's entry that names its file, in the order of the report's columns."""
Entry = dict[str, Any]


def manifest(recipe: Recipe) -> list[dict[str, Any]]:
    """Every row of the study's table: teacher, baselines, then strategies x seeds; paths are relative to the study's folder."""
    return [{**entry, **_results(recipe, entry)} for entry in _models(recipe)]


def _results(recipe: Recipe, entry: dict[str, Any]) -> dict[str, str | None]:
    """Where an entry's results will be; None for a step that the recipe does not ask for."""
    settings = recipe.evaluation
    asked = {
        "generation": GENERATIONS if settings.generation is not None else None,
        "classification": CLASSIFICATIONS if settings.classification is not None else None,
        "agreement": AGREEMENT if settings.agreement_rows and entry["kind"] != "teacher" else None,
        "evaluation": EVALUATIONS if settings.tasks else None,
    }
    return {step: folder and f"{folder}/{entry['name']}.json" for step, folder in asked.items()}


def _models(recipe: Recipe) -> list[dict[str, Any]]:
    made = recipe.finetune is not None
    entries = [
        _entry(
            "teacher",
            "teacher",
            None,
            None,
            "teacher/model" if made else recipe.teacher_path,
            "teacher" if made else None,
        )
    ]
    seeds = recipe.study.seeds
    if "undistilled" in recipe.study.baselines:
        if recipe.student.init == "checkpoint":
            entries.append(_entry("undistilled", "baseline", None, None, recipe.student.path or "", None))
        elif recipe.student.init == "random":
            entries += [
                _entry(f"undistilled-s{s}", "baseline", "undistilled", s, f"undistilled/s{s}", None) for s in seeds
            ]
        else:
            entries.append(_entry("undistilled", "baseline", "undistilled", None, "undistilled/copied", None))
    if "ce_only" in recipe.study.baselines:
        entries += [_student("baseline", "ce_only", seed) for seed in seeds]
    return entries + [_student("student", name, seed) for name in recipe.study.students for seed in seeds]


def _student(kind: str, strategy: str, seed: int) -> dict[str, Any]:
    name = f"{strategy}-s{seed}"
    return _entry(name, kind, strategy, seed, f"students/{name}/model", f"students/{name}")


def _entry(
    name: str, kind: str, strategy: str | None, seed: int | None, model: str, train: str | None
) -> dict[str, Any]:
    return {
        "name": name,
        "kind": kind,
        "strategy": strategy,
        "seed": seed,
        "model": model,
        "train": train,
    }


def entry_recipe(recipe: Recipe, entry: dict[str, Any]) -> Recipe:
    """The recipe of one student of a study."""
    changes = CE_ONLY if entry["strategy"] == "ce_only" else recipe.study.changes(entry["strategy"])
    if recipe.teacher.share_cache:
        changes = {**changes, "teacher.placement": "cache"}
    strategy = str(changes.get("matching.strategy", recipe.matching.strategy))
    return recipe.changed({**_only_for(recipe, strategy), **changes, "seed": entry["seed"]})


def _only_for(recipe: Recipe, strategy: str) -> dict[str, Any]:
    """Settings that belong to one strategy are dropped for the others of a study."""
    dropped: dict[str, Any] = {}
    if strategy != "explicit" and recipe.matching.pairs is not None:
        dropped["matching.pairs"] = None
    if strategy != "all_to_one" and recipe.matching.target_block is not None:
        dropped["matching.target_block"] = None
    if strategy != "in_order_random" and recipe.matching.redraw_every:
        dropped["matching.redraw_every"] = 0
    return dropped


def read_study(folder: Path) -> dict[str, Any]:
    """`study.json`. Raises InputError if the folder holds none."""
    study = read(folder / "study.json")
    if study is None:
        raise InputError(
            f"{folder}: no study here (no readable study.json); give a study's folder, e.g. runs/quickstart"
        )
    return study


def steps_asked(entry: Entry) -> list[str]:
    """The steps that a study asks of an entry."""
    return [step for step, key in STEPS.items() if entry.get(key)]
