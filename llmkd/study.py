"""A study: strategies or other variants x seeds, and their baselines, trained, evaluated and reported; what is done is not done again.

runs/<name>/  recipe.yaml  study.json  teacher/  students/<strategy>-s<seed>/  generations/  agreement/  evaluations/  report.html
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from llmkd.config import Recipe, dump_recipe
from llmkd.errors import InputError
from llmkd.launch import launch
from llmkd.results import publish

log = logging.getLogger("llmkd")

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


class Stopped(Exception):
    """A signal ended the study between two steps; everything so far is saved."""


def study(recipe: Recipe, ranks: int | None = None) -> Path:
    """Run what is missing of a study and return the path of its report. Raises InputError on bad input, Stopped on a signal."""
    from llmkd.report import report
    from llmkd.study_checks import check

    if not recipe.study.students:
        raise InputError("study.strategies: name at least one, e.g. [none, forward, reverse]")
    folder = recipe.folder
    ranks = ranks or recipe.study.ranks
    entries = manifest(recipe)
    check(recipe, entries, ranks)
    folder.mkdir(parents=True, exist_ok=True)
    publish(folder / "recipe.yaml", dump_recipe(recipe))
    publish(folder / "study.json", json.dumps(_stated(recipe, entries), indent=1))

    runs = [entry for entry in entries if entry["train"] is not None]
    cached = not recipe.teacher.share_cache
    for number, entry in enumerate(runs, start=1):
        if (folder / entry["model"] / "llmkd.json").is_file():
            log.info("study %d/%d: %s is done", number, len(runs), entry["name"])
            continue
        if entry["kind"] == "student" and not cached:
            _cache(recipe, ranks)
            cached = True
        log.info("study %d/%d: training %s on %d ranks", number, len(runs), entry["name"], ranks)
        _launch(recipe, entry, ranks)
        if entry["kind"] == "teacher":
            _write_undistilled(recipe, entries)
    _write_undistilled(recipe, entries)
    mistakes = _score(recipe, entries)
    written = report(folder)
    if mistakes:
        raise InputError(f"{'; '.join(mistakes)} (the rest of the report is made: {written})")
    return written


def _score(recipe: Recipe, entries: Sequence[dict[str, Any]]) -> list[str]:
    """Have every model write, compare it with the teacher, run lm-eval; what one step can't do must not cost the others theirs."""
    from llmkd.agreement import agree
    from llmkd.angles import angles
    from llmkd.classification import classify
    from llmkd.evaluation import evaluate
    from llmkd.family_rules import held_out_data
    from llmkd.generation import generate

    settings, folder = recipe.evaluation, recipe.folder
    trust = recipe.teacher.trust_remote_code or recipe.student.trust_remote_code
    jobs = [(entry["name"], _model(recipe, entry)) for entry in entries]
    teacher = next(model for entry, (_, model) in zip(entries, jobs, strict=True) if entry["kind"] == "teacher")
    others = [job for entry, job in zip(entries, jobs, strict=True) if entry["kind"] != "teacher"]
    steps: list[Callable[[], object]] = []
    if settings.generation is not None:
        steps.append(lambda: generate(jobs, settings, recipe.data, folder / GENERATIONS, trust_remote_code=trust))
    if settings.agreement_rows:
        shared = (teacher, settings, recipe.data, folder / GENERATIONS, folder / AGREEMENT)
        steps.append(lambda: agree(others, *shared, trust_remote_code=trust))
    if settings.classification is not None:
        steps.append(lambda: classify(jobs, settings, held_out_data(recipe), folder / CLASSIFICATIONS))
    if settings.tasks:
        steps.append(lambda: evaluate(jobs, settings, folder / EVALUATIONS, trust_remote_code=trust))
    if settings.angles_rows:
        steps.append(lambda: angles(folder, rows=settings.angles_rows))
    mistakes = []
    for step in steps:
        try:
            step()
        except InputError as error:
            mistakes.append(str(error))
    return mistakes


def _stated(recipe: Recipe, entries: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """What `study.json` says: the table's rows, and the margins, with how many results there were when each was first said.

    A margin counts only if it was said before the results; the report tells where one was not.
    """
    margins = {margin.metric: margin.within for margin in recipe.study.margins}
    file = recipe.folder / "study.json"
    history = json.loads(file.read_text()).get("margins_history", []) if file.is_file() else []
    if not history or history[-1]["margins"] != margins:
        results = [f for step in RESULTS for f in (recipe.folder / step).glob("*.json")]
        history = [*history, {"margins": margins, "results": len(results)}]
    said = {"name": recipe.name, "reference": recipe.study.compared_with, "margins": margins}
    return {**said, "margins_history": history, "entries": list(entries)}


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


def _launch(recipe: Recipe, entry: dict[str, Any], ranks: int) -> None:
    """Train one entry; its whole recipe travels as a file."""
    file = recipe.folder / "recipes" / f"{entry['name']}.yaml"
    file.parent.mkdir(exist_ok=True)
    teacher = entry["kind"] == "teacher"
    publish(file, dump_recipe(recipe if teacher else entry_recipe(recipe, entry)))
    where = ["--teacher-only"] if teacher else ["--output", str(recipe.folder / entry["train"])]
    _run(ranks, ["--recipe", str(file), *where], f"training {entry['name']}", "its last checkpoint")


def _cache(recipe: Recipe, ranks: int) -> None:
    """Write the one cache that teaches all students; what there is of it already is kept."""
    file = recipe.folder / "recipes" / "cache.yaml"
    file.parent.mkdir(exist_ok=True)
    publish(file, dump_recipe(recipe))
    log.info("study: one cache for all students, %s", recipe.cache_folder)
    _run(
        ranks,
        ["--recipe", str(file), "--cache-only", "--trust-cache"],
        "writing the teacher's cache",
        "what is written",
    )


def _run(ranks: int, arguments: list[str], what: str, rest: str) -> None:
    """One launch of a study. Raises Stopped if a signal ended it, InputError if a mistake did."""
    ending = launch(ranks, arguments)
    if ending.stopped and ending.code in (0, 130, 143):  # 130 and 143: a rank was asked before it could listen
        raise Stopped
    if ending.code:
        raise InputError(
            f"study: {what} ended with code {ending.code} (see above); the same command goes on from {rest}"
        )


def _write_undistilled(recipe: Recipe, entries: Sequence[dict[str, Any]]) -> None:
    """The students as they are before the first step, for the baseline."""
    from llmkd.jobs import student_inputs
    from llmkd.model_folders import resolve
    from llmkd.starts import initial_student

    for entry in entries:
        target = recipe.folder / entry["model"]
        if entry["strategy"] != "undistilled":
            continue
        seeded = recipe if entry["seed"] is None else recipe.changed({"seed": entry["seed"]})
        decides = ("student.", "teacher.", "finetune.", "seed", "train.dtype")
        made_of = json.dumps({k: v for k, v in student_inputs(seeded).items() if k.startswith(decides)})
        if not (target / "llmkd.json").is_file() or (target / "llmkd.json").read_text() != made_of:
            initial_student(seeded, resolve(recipe.teacher_path, "teacher.path", recipe.teacher.revision), target)
            publish(target / "llmkd.json", made_of)


def _model(recipe: Recipe, entry: dict[str, Any]) -> Path:
    """Where an entry's model is: in the study's folder, or where the recipe reads it from."""
    inside = recipe.folder / entry["model"]
    if entry["train"] is not None or entry["strategy"] == "undistilled":
        return inside
    from llmkd.model_folders import resolve

    return resolve(entry["model"], entry["name"], recipe.teacher.revision if entry["kind"] == "teacher" else None)
