"""How a student's blocks see the teacher's: angles before and after training, for every student of a study or for one run.

`angles(folder)` writes `folder/angles/<entry>.json`; what is there and made of the same models, rows and settings is not done
again. "Before" is the student as training began it, made anew from its recipe. The work is done in a process of its own, this file:
`python -m llmkd.evaluation.angles` reads its order from stdin as JSON and says a line per model.

Cost: per student one pass of the teacher over the rows and one of each of its two models (one "before" serves all students that
begin alike), and the cosines (llmkd.evaluation.angle_cosines). Memory: teacher, two students, and one batch's states of all teacher blocks.
"""

from __future__ import annotations

import json
import logging
import sys
import tempfile
import textwrap
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from llmkd.data.batches import Batch, Kind
from llmkd.data.other_families import collate_for, tokenize_for
from llmkd.data.rows import source_contents
from llmkd.distributed.engines import saved_weights
from llmkd.errors import InputError
from llmkd.evaluation.agreement import Task, held_out
from llmkd.evaluation.angle_cosines import BINS, pairs_of
from llmkd.evaluation.angle_files import FOLDER, WHEN, tokens_read
from llmkd.evaluation.angle_states import STACKS, TeacherStates, Viewpoint, look
from llmkd.evaluation.angle_students import Run, for_pairs, runs_of
from llmkd.evaluation.checks import held_out_data
from llmkd.evaluation.step import model_contents, one_sentence, up_to_date, written
from llmkd.files import digest, publish
from llmkd.inference import child
from llmkd.models.families import family, kind
from llmkd.models.folders import resolve
from llmkd.models.load import DTYPES, load_config, load_model, load_tokenizer
from llmkd.models.parts import Stack, tokens_of
from llmkd.provenance import versions
from llmkd.recipe.recipe import Recipe
from llmkd.student.distiller import make_projectors
from llmkd.training import checkpoint
from llmkd.training.initial import initial_student
from llmkd.training.jobs import read_rows

log = logging.getLogger("llmkd")

ROWS = 100  # where neither the call nor the recipe says
TOGETHER = 8  # of an encoder's rows, where the recipe's evaluation.batch_size is auto
FORM = "by stack"  # of the result files; those of another are made again


def angles(
    folder: Path, *, recipe: str | None = None, overrides: Sequence[str] = (), rows: int | None = None
) -> dict[str, Path]:
    """Angles of every trained student of a study's folder, or of the one in a training folder; the result files by name.

    The rows are the first of `evaluation.generation`'s source, of encoders `evaluation.classification`'s. A student that can't be looked
    from gets a file with `error` set, and is tried again at the next call. Raises InputError for a folder that is neither, and where the
    rows can't be had.
    """
    teacher, runs = runs_of(folder, recipe, overrides)
    first = runs[0].recipe
    section = held_out_section(kind(load_config(teacher, trust_remote_code=first.teacher.trust_remote_code)))
    if getattr(first.evaluation, section) is None:
        raise InputError(
            f"evaluation.{section}: the held-out rows are those of this section, which the recipe lacks; add it, e.g. "
            f"--set evaluation.{section}.source=held_out.jsonl"
        )
    rows = rows or first.evaluation.angles_rows or ROWS
    out = folder / FOLDER
    files = {run.name: out / f"{run.name}.json" for run in runs}
    made_with = json.dumps(versions("torch", "transformers"))
    shared = [FORM, str(rows), str(BINS), made_with, *model_contents(teacher)]
    orders = [{**run.as_json(), "fingerprint": digest([*shared, *_made_of(run, section)])} for run in runs]
    todo = [order for order in orders if not up_to_date(files[order["name"]], order["fingerprint"])]
    log.info("angles: %d of %d students are up to date", len(orders) - len(todo), len(orders))
    out.mkdir(parents=True, exist_ok=True)
    (out / "angles.log").unlink(missing_ok=True)
    while todo:
        order = {"jobs": todo, "teacher": str(teacher.resolve()), "rows": rows, "out": str(out.resolve())}
        code = child.run("llmkd.evaluation.angles", order, out / "angles.log", "angles")
        todo = [order for order in todo if not written(files[order["name"]], order["fingerprint"])]
        if todo:  # the process fell over one model: note it, and go on with the others
            error = f"the process that measures angles ended with code {code}; see {out / 'angles.log'}"
            _write(out, todo.pop(0), {"error": error})
    return files


def held_out_section(kind: Kind) -> Literal["generation", "classification"]:
    """The section of `evaluation` whose rows models of this kind look at."""
    return "classification" if kind == "encoder" else "generation"


def _made_of(run: Run, section: str) -> list[str]:
    """All that decides one student's angles, apart from the teacher and the number of rows. `section`: of `evaluation`, with the rows."""
    recipe = run.recipe
    rows = getattr(recipe.evaluation, section)
    data = recipe.data.model_dump(
        mode="json", include={"source", "name", "records_seed", "format", "max_length", "too_long"}
    )
    asked = rows.model_dump(mode="json", include={"source", "name", "split"})
    settings = [recipe.evaluation.dtype, recipe.evaluation.batch_size, recipe.train.dtype, recipe.seed]
    if recipe.matching.projector == "always":
        settings.append("projector_left_out is said")  # files from before it are made again
    sections = [recipe.student.model_dump(mode="json"), recipe.matching.model_dump(mode="json"), run.pairs]
    held = source_contents(rows.source or recipe.data.source, rows.split)
    start = recipe.student.path
    return [
        json.dumps([data, asked, settings, sections, held], sort_keys=True),
        *(model_contents(Path(start)) if start is not None and Path(start).is_dir() else []),
        *model_contents(run.train / "model"),
    ]


# --- The child process


@dataclass(frozen=True)
class Work:
    """What all students of a call share."""

    teacher_folder: Path
    teacher: TeacherStates
    batches: list[Batch]
    device: torch.device
    out: Path
    begun: dict[str, list[dict[str, Any]]]
    """What was seen from a starting model, by what that was made of."""


def main() -> int:
    """Measure the students of the order on stdin one after another; 2 if the order can't be followed."""
    order, say = child.listen()
    jobs, rows, out, folder = order["jobs"], order["rows"], Path(order["out"]), Path(order["teacher"])
    recipe = Run.of_json(jobs[0]).recipe
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        batches = _batches(recipe, folder, rows, out)
    except InputError as error:
        say(f"{child.REFUSAL}{error}")
        return 2
    model = _load(folder, recipe, recipe.teacher.trust_remote_code, device)
    work = Work(folder, TeacherStates(model), batches, device, out, {})
    for number, job in enumerate(jobs, start=1):
        say(f"{number}/{len(jobs)} {job['name']}: started")
        began = time.perf_counter()
        try:
            found = measure(Run.of_json(job), work)
        except Exception as error:  # whatever is wrong with one model must not cost the others their angles
            log.exception("%s", job["name"])
            found = {"error": str(error) if isinstance(error, InputError) else one_sentence(error)}
        seconds = time.perf_counter() - began
        _write(out, job, {**found, "seconds": seconds})
        say(f"{number}/{len(jobs)} {job['name']}: {found.get('error') or 'done'} ({seconds:.1f} s)")
    return 0


def _batches(recipe: Recipe, teacher: Path, rows: int, out: Path) -> list[Batch]:
    """The held-out rows in batches: an encoder's as it classifies them, others' as the comparison with the teacher reads them."""
    trust = recipe.teacher.trust_remote_code
    of = family(load_config(teacher, trust_remote_code=trust))
    tokenizer = load_tokenizer(teacher, trust_remote_code=trust)
    if of.kind != "encoder":
        settings = recipe.evaluation.model_copy(update={"agreement_rows": rows})
        return held_out(Task(teacher, settings, recipe.data, out, out, trust), tokenizer)[1]
    data = held_out_data(recipe).model_copy(update={"rows": rows})
    lengths: dict[str, Any] = dict(max_length=data.max_length, too_long=data.too_long)
    tokens = tokenize_for(of, read_rows(data), tokenizer, format=data.format, **lengths)
    size = recipe.evaluation.batch_size if isinstance(recipe.evaluation.batch_size, int) else TOGETHER
    parts = [range(start, min(start + size, len(tokens))) for start in range(0, len(tokens), size)]
    return [collate_for(of)([tokens[row] for row in part], pad_id=tokenizer.pad_token_id) for part in parts]


def measure(run: Run, work: Work) -> dict[str, Any]:
    """One student before and after its training: what its result file holds. Raises InputError where it sees nothing."""
    recipe = run.recipe
    trust = (recipe.student if recipe.student.init == "checkpoint" else recipe.teacher).trust_remote_code
    normed = recipe.matching.final_state == "normed"

    def viewpoint(folder: Path, projectors: dict[int, nn.Module] | None) -> Viewpoint:
        model = _load(folder, recipe, trust, work.device)
        return Viewpoint(model, work.teacher, normed_last=normed, projectors=projectors)

    width = int(load_config(run.train / "model", trust_remote_code=trust).hidden_size)
    projected = width != work.teacher.width
    step, trained = trained_projectors(run, width, work) if projected else (None, None)
    seen = {"after": viewpoint(run.train / "model", trained)}
    begin = _begin(run, projected)
    if begin not in work.begun:
        with tempfile.TemporaryDirectory(dir=work.out, prefix="initial-") as place:
            start = _start(recipe, work.teacher_folder, Path(place) / "model")
            seen["before"] = viewpoint(start, drawn_projectors(run, width, work) if projected else None)
    look(work.teacher, list(seen.values()), work.batches, work.device)
    found = {when: viewpoint.result() for when, viewpoint in seen.items()}
    if "before" in found:
        work.begun[begin] = found["before"]
    how = {"before": "as drawn from the recipe's seed", "after": f"trained, from {step}"} if projected else None
    depths = {"teacher_blocks": work.teacher.depths, "student_blocks": seen["after"].depths}
    stacks = []
    for number, stack in enumerate(work.teacher.stacks):
        both = {"before": work.begun[begin][number], "after": found["after"][number]}
        if both["after"]["blocks"]:  # a stack without a projector sees nothing
            blocks = {key: each[number] for key, each in depths.items()}
            about = {"stack": STACKS[stack.name], **_counts(work.batches, stack), **blocks}
            stacks.append({**about, "pairs": pairs_of(blocks["teacher_blocks"]), **both})
    return {
        "rows": sum(len(batch.input_ids) for batch in work.batches),
        "final_state": recipe.matching.final_state,
        "projector": how,
        "projector_left_out": bool(run.pairs) and not projected and recipe.matching.projects(width, width),
        "bins": BINS,
        "stacks": stacks,
    }


def _counts(batches: Sequence[Batch], stack: Stack) -> dict[str, int]:
    """How many tokens a stack reads, and how many positions with padding."""
    read = [tokens_of(batch, stack) for batch in batches]
    return {"tokens": sum(one.at.numel() for one in read), "positions": sum(one.attended.numel() for one in read)}


def _begin(run: Run, projected: bool) -> str:
    """What decides what a student's start sees, within one call."""
    recipe = run.recipe
    seed = recipe.seed if projected or recipe.student.init == "random" else None
    without = recipe.matching.unprojected(len(run.pairs))
    drawn = [run.pairs, recipe.matching.projector_bias, without] if projected else None
    shared = [recipe.student.model_dump(mode="json"), recipe.train.dtype, recipe.matching.final_state]
    return json.dumps([*shared, seed, drawn])


def _start(recipe: Recipe, teacher: Path, folder: Path) -> Path:
    """The folder of the model that training started from, made in `folder` if it is one of the recipe's making."""
    if recipe.student.init == "checkpoint":
        return resolve(recipe.student.path or "", "student.path")
    initial_student(recipe, teacher, folder)
    return folder


def _load(folder: Path, recipe: Recipe, trust: bool, device: torch.device) -> Any:
    dtype = DTYPES[recipe.evaluation.dtype]
    model: Any = load_model(folder, dtype=dtype, ds_config=None, attention="auto", trust_remote_code=trust)
    return model.to(device)


def drawn_projectors(run: Run, width: int, work: Work) -> dict[int, nn.Module]:
    """The projectors as training drew them, by student block; a block of several pairs has its first pair's."""
    return _by_block(run, _made(run, width, work), work)


def trained_projectors(run: Run, width: int, work: Work) -> tuple[str, dict[int, nn.Module]]:
    """(the checkpoint's name, its projectors by student block). Raises InputError where the run kept none."""
    where = f"its states are {width} wide and the teacher's {work.teacher.width}"
    saved = checkpoint.whole(run.train / "checkpoints")
    if not run.pairs or not saved:
        lacks = "the run matched no pair" if not run.pairs else f"no checkpoint is left in {run.train / 'checkpoints'}"
        raise InputError(
            f"{where}, and {lacks}, so no trained projector stands between them; train it again {for_pairs(run)}and keep its "
            "checkpoints, or give a student of the teacher's width"
        )
    weights = saved_weights(saved[-1] / checkpoint.TAG, "projectors.")
    if not weights:
        raise InputError(
            f"{where}, and {saved[-1]} holds no projector; train it again with a distance that has projectors, or give a student of "
            "the teacher's width"
        )
    made = _made(run, width, work)
    made.load_state_dict(weights)
    return f"{saved[-1].parent.name}/{saved[-1].name}", _by_block(run, made, work)


def _made(run: Run, width: int, work: Work) -> nn.ModuleList:
    """The projectors of the run's pairs as its recipe draws them, nn.Identity where a pair has none."""
    recipe, count = run.recipe, len(run.pairs)
    made = make_projectors(
        count,
        width,
        work.teacher.width,
        bias=recipe.matching.projector_bias,
        seed=recipe.seed,
        without=recipe.matching.unprojected(count),
    )
    assert made is not None, "the widths differ and there are pairs"
    return made


def _by_block(run: Run, made: nn.ModuleList, work: Work) -> dict[int, nn.Module]:
    """In float32, with the digits that training's dtype left them."""
    made = made.to(DTYPES[run.recipe.train.dtype]).to(work.device, torch.float32).requires_grad_(False)
    found: dict[int, nn.Module] = {}
    for (block, _), projector in zip(run.pairs, made, strict=True):
        if block >= 0 and not isinstance(projector, nn.Identity):  # not the embeddings'
            found.setdefault(block, projector)
    return found


def _write(out: Path, job: dict[str, Any], found: dict[str, Any]) -> None:
    """Publish a student's angles, in one line: histograms are long."""
    recipe = Run.of_json(job).recipe
    about = {key: job[key] for key in ("name", "kind", "strategy", "seed", "fingerprint")}
    settings = {
        "dtype": recipe.evaluation.dtype,
        "batch_size": recipe.evaluation.batch_size,
        **{
            name: section.model_dump(mode="json")
            for name in ("generation", "classification")
            if (section := getattr(recipe.evaluation, name)) is not None
        },
    }
    whole = {**about, "init": recipe.student.init, "error": None, **found, "settings": settings}
    whole["versions"] = versions("torch", "transformers")
    publish(out / f"{job['name']}.json", json.dumps(whole, allow_nan=False, separators=(",", ":")))


# --- In a terminal


def angles_text(files: dict[str, Path]) -> str:
    """A table of two lines per student, and what went wrong. Raises InputError if no student could be looked from."""
    found = [json.loads(file.read_text()) for file in files.values()]
    failed = [f"{one['name']}: {one['error']}" for one in found if one["error"] is not None]
    if len(failed) == len(found):
        raise InputError(failed[0])
    head = ["student", "init", "", "mean cos", "share > 0", "lowest pair", "paper_code", "with padding"]
    known = [one for one in found if one["error"] is None]
    parts = [(one, stack) for one in known for stack in one["stacks"]]
    named = any(stack["stack"] for _, stack in parts)
    lines = [[*head[:2], *["stack"] * named, *head[2:]]]
    for one, stack in parts:
        lines += [[one["name"], one["init"], *[stack["stack"]] * named, *_line(stack[when], when)] for when in WHEN]
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    rows = [" | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines]
    final = dict.fromkeys(one["final_state"] for one in known)
    teacher_blocks = " + ".join(str(stack["teacher_blocks"]) for stack in known[0]["stacks"])
    said = (
        f"cos(T_i - S, T_j - S) over {tokens_read(known[0])} of {known[0]['rows']} held-out rows, mean over student blocks and pairs "
        f"i < j of {teacher_blocks} teacher blocks; the last blocks' states are {' or '.join(final)}; paper_code: the mean "
        "of cos(T_first - S_first, T_last - S_first) as the paper's code takes it"
    )
    return "\n".join(
        [rows[0], "-+-".join("-" * width for width in widths), *rows[1:], "", textwrap.fill(said, 100), *failed]
    )


def _line(seen: dict[str, Any], when: str) -> list[str]:
    lowest = [value for block in seen["blocks"] for row in block["mean"] for value in row if value is not None]
    code = seen["paper_code"] or {}
    values = [
        average([block["mean_of_pairs"] for block in seen["blocks"]]),
        average([block["above_zero_of_pairs"] for block in seen["blocks"]]),
        min(lowest, default=None),
        code.get("tokens", {}).get("mean"),
        code.get("with_padding", {}).get("mean"),
    ]
    return [when, *("-" if value is None else f"{value:.3f}" for value in values)]


def average(values: Sequence[float | None]) -> float | None:
    """The mean of what there is."""
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


if __name__ == "__main__":
    sys.exit(main())
