"""A study: strategies or other variants x seeds, and their baselines, trained, evaluated and reported; what is done is not done again.

runs/<name>/  recipe.yaml  study.json  teacher/  students/<strategy>-s<seed>/  generations/  agreement/  evaluations/  report.html
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path

from llmkd.distributed import checksums
from llmkd.distributed.launch import Ending, Launch, launch_each
from llmkd.errors import InputError
from llmkd.evaluation import agreement, classification, generation, lm_eval_step
from llmkd.evaluation.angles.measure import angles
from llmkd.evaluation.checks import check_scores
from llmkd.evaluation.held_out import check_evaluation, classification_data
from llmkd.evaluation.places import visible_devices
from llmkd.files import write_text
from llmkd.models.families import kind
from llmkd.models.folders import resolve
from llmkd.planning.in_turn import settled
from llmkd.planning.parts import WHOLE, note_teacher, wait_for_first, working_on
from llmkd.planning.run_checks import check_beside, check_pair_weights, check_trained, runs_at_once
from llmkd.planning.study_rows import StudyRows
from llmkd.recipe.ds_config import check_ds_configs
from llmkd.recipe.options import Part
from llmkd.recipe.recipe import Recipe, dump_recipe
from llmkd.recipe.scoring_steps import (
    AGREEMENT,
    ANGLES,
    CLASSIFICATION,
    GENERATION,
    LM_EVAL,
    SCORING_STEPS,
    ScoringStep,
)
from llmkd.recipe.study_entries import (
    StatedMargins,
    StudyEntry,
    StudyFile,
    dealt,
    entry_recipe,
    groups,
    measured_start,
    read_study,
    study_entries,
)
from llmkd.report.write import Report, report
from llmkd.text import counted
from llmkd.training import jobs
from llmkd.training.checkpoint import check_same
from llmkd.training.checks import check_in_turn, teacher_shape
from llmkd.training.initial import initial_student, kept_width, merged_teacher, with_blocks
from llmkd.training.write_cache import writing_recipe

log = logging.getLogger("llmkd")


class Stopped(Exception):
    """A signal ended the training of a student after its step; everything so far is saved, but for these mistakes that were made before."""

    def __init__(self, mistakes: Sequence[str] = ()) -> None:
        super().__init__("; ".join(mistakes))
        self.mistakes = list(mistakes)


def study(recipe: Recipe, ranks: int | None = None, part: Part = WHOLE) -> Report | None:
    """Run what is missing of a study, and write its report; None for one `part` of several, which machines that share its folder do.

    Raises InputError on bad input and where another process works in its folder, Stopped on a signal while a student is trained.
    """
    if not recipe.study.students:
        raise InputError("study.strategies: name at least one, e.g. [none, forward, reverse]")
    folder, ranks = recipe.folder, ranks or recipe.study.ranks
    if part != WHOLE and recipe.study.together == "auto":
        raise InputError(
            "study.together: the parts of a study need one number; write one that fits all (llmkd plan) in place of auto"
        )
    recipe, entries = settled(recipe, ranks), study_entries(recipe)
    log.info("study: checking what %d models need, before any is trained", len(entries))
    check(recipe, entries, ranks)
    with working_on(folder, part):
        return _study(recipe, entries, ranks, part)


def _study(recipe: Recipe, entries: Sequence[StudyEntry], ranks: int, part: Part) -> Report | None:
    folder, ours = recipe.folder, dealt(recipe, entries, part)
    trained = [entry for entry in ours if entry.train is not None and entry.kind != "teacher"]
    mistakes: list[str] = []
    if part.number > 1:
        wait_for_first(recipe, entries, part)
    else:
        write_text(folder / "recipe.yaml", dump_recipe(recipe))
        _study_file(recipe, entries).write(folder)
        _make_teacher(recipe, entries, ranks)
        if part != WHOLE:
            mistakes = _score(recipe, entries, [entry for entry in ours if entry.kind == "teacher"])
            note_teacher(recipe, entries)
    if not recipe.student.is_measured:  # else what they keep is found while students are trained
        _write_undistilled(recipe, entries, part)
    try:
        mistakes += _train(recipe, groups(recipe, trained), ranks)
    except Stopped as stop:
        raise Stopped([*mistakes, *stop.mistakes]) from None
    if recipe.student.is_measured:
        _write_undistilled(recipe, entries, part)
    there = [entry for entry in ours if entry not in trained or jobs.is_finished(entry.run_folder(folder))]
    mistakes += _score(recipe, entries, there)
    written = None
    if part == WHOLE:
        log.info("study: writing the report")
        written = report(folder)
    else:
        log.info("study: part %d/%d is done; when all are: llmkd report %s", *part, folder)
    if mistakes:
        others = "" if written is None else f" (the report of all else: {written.page})"
        raise InputError(f"{'; '.join(dict.fromkeys(mistakes))}{others}")
    return written


def _make_teacher(recipe: Recipe, entries: Sequence[StudyEntry], ranks: int) -> None:
    """Train the teacher where the study makes it, and write the cache where students share one and any of them is still to be trained."""
    merged_teacher(recipe)
    for entry in entries:
        if (
            entry.kind == "teacher"
            and entry.train is not None
            and not jobs.is_finished(entry.run_folder(recipe.folder))
        ):
            said = f"study: training the teacher on {counted(ranks, 'rank')}"
            one = Launch(ranks, _order(recipe, [entry]), said=said)
            _run_alone(one, "training teacher", "its last checkpoint")
    students = [entry.run_folder(recipe.folder) for entry in entries if entry.kind == "student"]
    if recipe.teacher.share_cache and not all(map(jobs.is_finished, students)):
        _cache(recipe, ranks)


def _score(recipe: Recipe, entries: Sequence[StudyEntry], ours: Sequence[StudyEntry]) -> list[str]:
    """Take every scoring step that the recipe asks for; the mistakes of those that can't be taken, which cost the others nothing."""
    settings, folder = recipe.evaluation, recipe.folder
    trust = recipe.teacher.trust_remote_code or recipe.student.trust_remote_code
    named = [(entry.name, _model(recipe, entry)) for entry in ours]
    teacher = next(_model(recipe, entry) for entry in entries if entry.kind == "teacher")
    students = [(entry.name, model) for entry, (_, model) in zip(ours, named, strict=True) if entry.kind != "teacher"]
    trained = [entry.name for entry in ours if entry.kind != "teacher" and entry.train is not None]
    generations = folder / GENERATION.folder
    take: dict[ScoringStep, Callable[[Path], object]] = {
        GENERATION: lambda out: generation.generate(named, settings, recipe.data, out, trust_remote_code=trust),
        CLASSIFICATION: lambda out: classification.classify(named, settings, classification_data(recipe), out),
        LM_EVAL: lambda out: lm_eval_step.evaluate(named, settings, out, trust_remote_code=trust),
        AGREEMENT: lambda out: agreement.agree(
            students, teacher, settings, recipe.data, generations, out, trust_remote_code=trust
        ),
        ANGLES: lambda _: angles(folder, rows=settings.angles_rows, only=trained),
    }
    mistakes = []
    for step in SCORING_STEPS:
        models = trained if step is ANGLES else named if step.of_teacher else students
        try:
            if models and step.asked(settings):
                take[step](folder / step.folder)
        except InputError as error:
            mistakes.append(str(error))
    return mistakes


def _study_file(recipe: Recipe, entries: Sequence[StudyEntry]) -> StudyFile:
    """What `study.json` holds. A margin counts only if it was set before the results: the history shows where one was not."""
    folder = recipe.folder
    margins = {margin.metric: margin.within for margin in recipe.study.margins}
    history = read_study(folder).margins_history if (folder / "study.json").is_file() else []
    if not history or history[-1].margins != margins:
        scored = [step for step in SCORING_STEPS if step.entry is not None]
        results = [file for step in scored for file in (folder / step.folder).glob("*.json")]
        if results and not history:
            log.warning(
                "study: %s is gone, and with it when margins were set: they count as set now", folder / "study.json"
            )
        history = [*history, StatedMargins(margins, len(results))]
    return StudyFile(recipe.name, recipe.study.compared_with, margins, history, entries)


def _train(recipe: Recipe, at_once: Sequence[Sequence[StudyEntry]], ranks: int) -> list[str]:
    """Train the students that are not done yet: those of a group in turn, and so many groups beside each other as the recipe says.

    The mistakes of those that could not be trained, which cost the others nothing. Raises Stopped on a signal, with those made before it.
    """
    launches, trained, runs = [], [], runs_at_once(recipe, ranks)
    for number, group in enumerate(at_once, start=1):
        left = [entry for entry in group if not jobs.is_finished(entry.run_folder(recipe.folder))]
        for entry in group:
            if entry not in left:
                log.info("study %d/%d: %s is done", number, len(at_once), entry.name)
        if left:
            names, file = ", ".join(entry.name for entry in left), recipe.folder / "logs" / f"{left[0].name}.log"
            said = f"study {number}/{len(at_once)}: training {names} on {counted(ranks, 'rank')}"
            said += f"; what they say goes to {file}" if runs > 1 else ""
            launches.append(Launch(ranks, _order(recipe, left), file if runs > 1 else None, said))
            trained.append(left)
    mistakes = []
    endings = _run(launches, runs)
    for one, left, ending in zip(launches, trained, endings, strict=True):
        undone = [entry for entry in left if not jobs.is_finished(entry.run_folder(recipe.folder))]
        if ending is not None and ending.code and not _is_stopped(ending):
            names = ", ".join(entry.name for entry in undone or left)
            mistakes.append(_failed(f"training {names}", ending.code, one.log, "the last checkpoint"))
    if any(ending is None or ending.stopped for ending in endings):
        raise Stopped(mistakes)
    return mistakes


def _failed(what: str, code: int, file: Path | None, resume_point: str) -> str:
    where = "above" if file is None else str(file)
    then = (
        "that is to be mended first, then the same command goes on"
        if code == 2
        else f"the same command resumes from {resume_point}"
    )
    return f"study: {what} ended with code {code} (see {where}); {then}"


def _order(recipe: Recipe, entries: Sequence[StudyEntry]) -> list[str]:
    """The arguments that train the teacher, or students in turn, each by a recipe file of its own."""
    arguments: list[str] = []
    for entry in entries:
        file = recipe.folder / "recipes" / f"{entry.name}.yaml"
        file.parent.mkdir(exist_ok=True)
        is_teacher, output = entry.kind == "teacher", str(entry.run_folder(recipe.folder))
        write_text(file, dump_recipe(recipe if is_teacher else entry_recipe(recipe, entry)))
        if arguments:
            arguments += ["--beside", str(file), output]
        else:
            arguments = ["--recipe", str(file), *(["--teacher-only"] if is_teacher else ["--output", output])]
    return arguments


def _cache(recipe: Recipe, ranks: int) -> None:
    """Write the one cache that teaches all students; what is already written is kept."""
    file = recipe.folder / "recipes" / "cache.yaml"
    file.parent.mkdir(exist_ok=True)
    write_text(file, dump_recipe(recipe))
    log.info("study: one cache for all students, %s", recipe.cache_folder)
    order = Launch(ranks, ["--recipe", str(file), "--cache-only", "--trust-cache"])
    _run_alone(order, "writing the teacher's cache", "what is written")


def _run(launches: Sequence[Launch], at_once: int = 1) -> list[Ending | None]:
    """How launches of a study ended, so many of them at a time, each on GPUs of its own where there are any."""
    gpus = [] if at_once == 1 or visible_devices() == ["cpu"] else visible_devices()
    return launch_each(launches, at_once, gpus)


def _is_stopped(ending: Ending | None) -> bool:
    """Whether a signal ended a launch or kept it from being started, and no mistake did."""
    # 130 and 143: a rank got the signal before it handled signals
    return ending is None or (ending.stopped and ending.code in (0, 130, 143))


def _run_alone(one: Launch, what: str, resume_point: str) -> None:
    """A launch without which a study can't go on. Raises Stopped, or InputError if a mistake ended it."""
    (ending,) = _run([one])
    if ending is None or _is_stopped(ending):
        raise Stopped
    if ending.code:
        raise InputError(_failed(what, ending.code, None, resume_point))


def _write_undistilled(recipe: Recipe, entries: Sequence[StudyEntry], part: Part = WHOLE) -> None:
    """The students before their first step, for the baseline."""
    for entry in dealt(recipe, entries, part):
        target = recipe.folder / entry.model
        if entry.strategy != "undistilled":
            continue
        seeded = recipe if entry.seed is None else recipe.changed({"seed": entry.seed})
        kept = None
        if recipe.student.is_measured:
            run = measured_start(recipe, entries, entry).run_folder(recipe.folder)
            seeded, kept = with_blocks(seeded, run), kept_width(seeded, run)
        decides = ("student.", "teacher.", "finetune.", "seed", "train.dtype")
        inputs = {k: v for k, v in jobs.student_inputs(seeded).items() if k.startswith(decides)}
        made_of = json.dumps(inputs if kept is None else {**inputs, "width": asdict(kept)})
        if not checksums.is_published(target, made_of):
            initial_student(seeded, resolve(recipe.teacher_path, "teacher.path", recipe.teacher.revision), target, kept)
            checksums.publish(target, made_of)


def _model(recipe: Recipe, entry: StudyEntry) -> Path:
    """Where an entry's model is: in the study's folder, or where the recipe reads it from."""
    inside = recipe.folder / entry.model
    if entry.train is not None or entry.strategy == "undistilled":
        return inside
    return resolve(entry.model, entry.name, recipe.teacher.revision if entry.kind == "teacher" else None)


def check(recipe: Recipe, entries: Sequence[StudyEntry], ranks: int) -> None:
    """Raise InputError, before anything is written, for what would stop the study hours later.

    Students that can't be trained, DeepSpeed files that can't be used, ranks that can't share the batch, tasks that do not exist, and
    models in the folder that another recipe made.
    """
    check_scores(recipe)
    teacher = teacher_shape(recipe)
    check_evaluation(recipe, kind(teacher))
    check_ds_configs(recipe, ranks)
    family = jobs.teacher_family(recipe, teacher)
    rows = StudyRows(family)
    rows.check_student(recipe, ranks)
    if recipe.finetune is not None:
        rows.check_teacher(recipe, ranks)
    check_pair_weights(recipe, entries, teacher)
    for entry in entries:
        if entry.strategy == "undistilled" and recipe.student.is_measured:
            measured_start(recipe, entries, entry)
    check_beside(recipe, ranks)
    for group in groups(recipe, entries):
        check_in_turn({entry.name: entry_recipe(recipe, entry) for entry in group})
    if recipe.teacher.share_cache:
        check_trained(writing_recipe(recipe), family, teacher, ranks)
    for entry in entries:
        if entry.train is None:
            continue
        if entry.kind == "teacher":
            inputs = jobs.teacher_inputs(recipe)
        else:
            own = entry_recipe(recipe, entry)
            check_ds_configs(own, ranks)  # a variant may have another file
            check_trained(own, family, teacher, ranks)
            rows.check_student(own, ranks)
            inputs = jobs.student_inputs(own)
        run = entry.run_folder(recipe.folder)
        if jobs.is_finished(run) or (run / "model" / "llmkd.json").is_file():
            check_same(jobs.meta_of(run)["inputs"], inputs, run)
