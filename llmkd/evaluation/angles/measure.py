"""How a student's blocks see the teacher's: angles before and after training, for every student of a study or for one run.

`angles(folder)` writes `folder/angles/<entry>.json`. "Before" is the student as training began it, made anew from its recipe.

Cost: per student one pass of the teacher over the rows and one of each of its two models (one "before" serves all students that
begin alike), and the cosines (llmkd.evaluation.angles.cosines). Memory: teacher, two students, and one batch's states of all teacher
blocks.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path

import torch
from torch import nn

from llmkd.data.batches import Batch
from llmkd.data.rows import source_contents
from llmkd.errors import InputError
from llmkd.evaluation.angles.cosines import BINS, pairs_of
from llmkd.evaluation.angles.results import AngleResult, MeasuredAngles, StackAngles, StudentView
from llmkd.evaluation.angles.states import STACKS, StudentObserver, TeacherStates, observe
from llmkd.evaluation.angles.students import TrainedStudent, drawn_projectors, students_of, trained_projectors
from llmkd.evaluation.held_out import batches_of, classification_data, held_out_data, held_out_section, load_to_run
from llmkd.evaluation.places import weight_bytes
from llmkd.evaluation.results import Item
from llmkd.evaluation.step import Score, Step, model_hashes, run, serve
from llmkd.files import digest
from llmkd.inference.child import Say
from llmkd.models.families import kind
from llmkd.models.folders import resolve
from llmkd.models.load import load_config
from llmkd.models.parts import Stack, tokens_of
from llmkd.models.width import Kept
from llmkd.provenance import versions
from llmkd.recipe.recipe import Recipe
from llmkd.recipe.scoring_steps import ANGLES
from llmkd.training.initial import initial_student, kept_width, with_blocks

ROWS = 100  # where neither the call nor the recipe names a number
FORM = "by stack"  # of the result files; those of another are made again


@dataclass(frozen=True)
class Task:
    """What all students of a call share."""

    teacher: Path
    rows: int
    students: dict[str, TrainedStudent]
    """By name."""
    out: Path


def angles(
    folder: Path,
    *,
    recipe: str | None = None,
    overrides: Sequence[str] = (),
    rows: int | None = None,
    only: Collection[str] | None = None,
) -> dict[str, Path]:
    """Angles of every trained student of a study's folder, or of the one in a training folder; the result files by name.

    `only`: the names of the study's students that are asked for; default: all.

    The rows are the first of the source of `evaluation.generation`, for encoders of `evaluation.classification`; all else is as
    `step.run` says. Raises InputError for a folder that is neither, and for rows that can't be read.
    """
    teacher, students = students_of(folder, recipe, overrides)
    first = students[0].recipe
    section = held_out_section(kind(load_config(teacher, trust_remote_code=first.teacher.trust_remote_code)))
    if getattr(first.evaluation, section) is None:
        raise InputError(
            f"evaluation.{section}: the recipe has no such section, which names the held-out rows; add it, e.g. "
            f"--set evaluation.{section}.source=held_out.jsonl"
        )
    rows = rows or first.evaluation.angles_rows or ROWS
    packages = versions("torch", "transformers")
    shared = [FORM, str(rows), str(BINS), json.dumps(packages), *model_hashes(teacher)]
    unscored = [
        AngleResult(
            name=student.name,
            fingerprint=digest([*shared, *_made_of(student, section)]),
            kind=student.kind,
            strategy=student.strategy,
            seed=student.seed,
            init=student.recipe.student.init,
            settings=_settings(student.recipe),
            versions=packages,
        )
        for student in students
        if only is None or student.name in only
    ]
    out = folder / ANGLES.folder
    task = Task(teacher, rows, {student.name: student for student in students}, out)
    return run(STEP, unscored, task, out, weights=lambda result: _weights(task.students[result.name], teacher))


def _weights(student: TrainedStudent, teacher: Path) -> int:
    """The teacher's and those of the student before and after its training."""
    after = student.train / "model"
    return weight_bytes([teacher, after, after], student.recipe.evaluation.dtype)


def _settings(recipe: Recipe) -> dict[str, object]:
    """The recipe's settings that the angles depend on, as the result file shows them."""
    settings = recipe.evaluation
    rows = {
        name: section.model_dump(mode="json")
        for name, section in (("generation", settings.generation), ("classification", settings.classification))
        if section is not None
    }
    return {"dtype": settings.dtype, "batch_size": settings.batch_size, **rows}


def _made_of(student: TrainedStudent, section: str) -> list[str]:
    """All that decides one student's angles, but for the teacher and the number of rows, which come from `evaluation.<section>`."""
    recipe = student.recipe
    rows = getattr(recipe.evaluation, section)
    keys = {
        "source",
        "name",
        "split",
        "records_seed",
        "format",
        "columns",
        "template_options",
        "max_length",
        "too_long",
    }
    held_out = held_out_data(rows, recipe.data, None)
    data = held_out.model_dump(mode="json", include=keys)
    settings = [recipe.evaluation.dtype, recipe.evaluation.batch_size, recipe.train.dtype, recipe.seed]
    sections = [recipe.student.model_dump(mode="json"), recipe.matching.model_dump(mode="json"), student.pairs]
    held = source_contents(held_out.source, held_out.split)
    starts = [Path(start) for start in (recipe.student.path, recipe.student.adapter) if start is not None]
    return [
        json.dumps([data, settings, sections, held], sort_keys=True),
        *(line for start in starts if start.is_dir() for line in model_hashes(start)),
        *model_hashes(student.train / "model"),
    ]


# --- The child process


@dataclass(frozen=True)
class Work:
    """What one process measures all its students with."""

    task: Task
    teacher: TeacherStates
    batches: list[Batch]
    device: torch.device
    starts: dict[str, list[StudentView]] = field(default_factory=dict)
    """The views from starting models, by what those were made of."""


def prepare(task: Task, say: Say) -> Score[AngleResult]:
    """Load the rows and the teacher. Raises InputError where the rows can't be had."""
    recipe = next(iter(task.students.values())).recipe
    batches = _batches(recipe, task.teacher, task.rows)
    model = load_to_run(task.teacher, recipe.evaluation.dtype, trust_remote_code=recipe.teacher.trust_remote_code)
    return partial(score, work=Work(task, TeacherStates(model), batches, model.device))


def score(result: AngleResult, work: Work) -> tuple[AngleResult, list[Item]]:
    """One student before and after its training. Raises InputError where none of its blocks can be compared with the teacher's."""
    return replace(result, measured=measure(work.task.students[result.name], work)), []


def _batches(recipe: Recipe, teacher: Path, rows: int) -> list[Batch]:
    """The held-out rows in batches: an encoder's as it classifies them, others' as the comparison with the teacher reads them."""
    trust, generation = recipe.teacher.trust_remote_code, recipe.evaluation.generation
    if kind(load_config(teacher, trust_remote_code=trust)) == "encoder":
        data = classification_data(recipe).model_copy(update={"rows": rows})
    else:
        assert generation is not None
        data = held_out_data(generation, recipe.data, rows)
    return batches_of(data, teacher, recipe.evaluation, trust)[1]


def measure(student: TrainedStudent, work: Work) -> MeasuredAngles:
    """One student's angles before and after its training."""
    student, kept = (
        replace(student, recipe=with_blocks(student.recipe, student.train)),
        kept_width(student.recipe, student.train),
    )
    recipe = student.recipe
    trust = (recipe.student if recipe.student.init == "checkpoint" else recipe.teacher).trust_remote_code
    normed = recipe.matching.final_state == "normed"

    def observer(folder: Path, projectors: dict[int, nn.Module] | None) -> StudentObserver:
        model = load_to_run(folder, recipe.evaluation.dtype, trust_remote_code=trust)
        return StudentObserver(model, work.teacher, normed_last=normed, projectors=projectors)

    width = int(load_config(student.train / "model", trust_remote_code=trust).hidden_size)
    widths, projected = (width, work.teacher.width), width != work.teacher.width
    step, trained = trained_projectors(student, widths, work.device) if projected else (None, None)
    after = observer(student.train / "model", trained)
    start, observers = _start_key(student, kept, projected), [after]
    if start not in work.starts:
        with tempfile.TemporaryDirectory(dir=work.task.out, prefix="initial-") as place:
            folder = _start(recipe, work.task.teacher, Path(place) / "model", kept)
            drawn = drawn_projectors(student, widths, work.device) if projected else None
            observers.append(observer(folder, drawn))
    observe(work.teacher, observers, work.batches, work.device)
    if len(observers) > 1:
        work.starts[start] = observers[1].views()
    projector = {"before": "as drawn from the recipe's seed", "after": f"trained, from {step}"} if projected else None
    before_and_after = zip(work.teacher.stacks, work.starts[start], after.views(), after.depths, strict=True)
    return MeasuredAngles(
        rows=sum(len(batch.input_ids) for batch in work.batches),
        final_state=recipe.matching.final_state,
        projector=projector,
        projector_left_out=bool(student.pairs) and not projected and recipe.matching.projects(width, width),
        bins=BINS,
        stacks=[
            _stack_angles(work.batches, stack, depth, before, view)
            for stack, before, view, depth in before_and_after
            if view.blocks  # none of a stack without a projector
        ],
    )


def _stack_angles(
    batches: Sequence[Batch], stack: Stack, student_blocks: int, before: StudentView, after: StudentView
) -> StackAngles:
    read = [tokens_of(batch, stack) for batch in batches]
    return StackAngles(
        stack=STACKS[stack.name],
        tokens=sum(tokens.at.numel() for tokens in read),
        positions=sum(tokens.attended.numel() for tokens in read),
        teacher_blocks=len(stack.blocks),
        student_blocks=student_blocks,
        pairs=pairs_of(len(stack.blocks)),
        before=before,
        after=after,
    )


def _start_key(student: TrainedStudent, kept: Kept | None, projected: bool) -> str:
    """What decides the view from a student's start, within one call."""
    recipe = student.recipe
    seed = recipe.seed if projected or recipe.student.init == "random" else None
    without = recipe.matching.unprojected(len(student.pairs))
    drawn = [student.pairs, recipe.matching.projector_bias, without] if projected else None
    shared = [recipe.student.model_dump(mode="json"), recipe.train.dtype, recipe.matching.final_state]
    return json.dumps([*shared, seed, drawn, None if kept is None else asdict(kept)])


def _start(recipe: Recipe, teacher: Path, folder: Path, kept: Kept | None) -> Path:
    """The folder of the model that training started from, made in `folder` if it is one of the recipe's making."""
    if recipe.student.init == "checkpoint" and recipe.student.adapter is None:
        return resolve(recipe.student.path or "", "student.path")
    initial_student(recipe, teacher, folder, kept)
    return folder


STEP = Step(ANGLES, Task, AngleResult, prepare)


def main() -> int:
    """The process that scores models."""
    return serve(STEP)


if __name__ == "__main__":
    sys.exit(main())
