"""The command line: every command parses, calls one function and prints its result.

Heavy imports are inside the commands, so that `--help` and a mistyped option need no torch.
"""

from __future__ import annotations

import json
import logging
import os
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from llmkd import __version__, starting
from llmkd.errors import InputError, storage_problem
from llmkd.processes import stopping
from llmkd.recipe.options import SET, SHARD, FiniteRange, OutputPath, Part, train_options

if TYPE_CHECKING:
    from llmkd.recipe.rollouts import Rollouts
    from llmkd.report.write import Report

log = logging.getLogger("llmkd")
STOPPED = "Stopped: all that is trained and scored so far is kept, and the same command goes on with the rest."
BLOCKS = click.IntRange(1, 4096)
RANKS = click.option(
    "--ranks",
    type=click.IntRange(min=1),
    help="Processes on this machine [default: one per GPU, else study.ranks].",
)


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="llmkd")  # by value: a clone need not be installed
def cli() -> None:
    """Distil large language models, with intermediate-layer matching as a measured choice."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")


@cli.command()
@click.option("--student-blocks", type=BLOCKS, required=True)
@click.option("--teacher-blocks", type=BLOCKS, required=True)
@click.option("--strategy", multiple=True, help="Only these strategies [default: all].")
@click.option("--seed", type=int, default=0, show_default=True, help="Of the random strategies.")
@click.option("--target-block", type=int, help="The one teacher block of all_to_one.")
@click.option(
    "--pair", "pairs", multiple=True, metavar="STUDENT:TEACHER", help="A pair of strategy explicit; may be repeated."
)
@click.option(
    "--stages",
    type=click.IntRange(min=1),
    help="Draw instead the stages of a pipelined teacher, and what each sends to whom.",
)
def maps(
    student_blocks: int,
    teacher_blocks: int,
    strategy: tuple[str, ...],
    seed: int,
    target_block: int | None,
    pairs: tuple[str, ...],
    stages: int | None,
) -> None:
    """Show which teacher block teaches which student block."""
    from llmkd.report.map_drawing import maps_text

    options = {"target_block": target_block, "pairs": [_pair(pair) for pair in pairs] or None}
    given = {key: value for key, value in options.items() if value is not None}
    click.echo(maps_text(strategy, student_blocks, teacher_blocks, seed=seed, options=given, stages=stages))


def _pair(text: str) -> tuple[int, int]:
    student, _, teacher = text.partition(":")
    if not re.fullmatch(r"[0-9]{1,6}:[0-9]{1,6}", text):
        raise InputError(f"--pair {text!r}: write STUDENT:TEACHER, e.g. --pair 0:3")
    return int(student), int(teacher)


@cli.command()
@train_options
@RANKS
def train(recipe: str, overrides: tuple[str, ...], output: Path | None, ranks: int | None) -> None:
    """Train one student on this machine's GPUs (or on CPU ranks). The same command resumes."""
    _launch(recipe, overrides, [] if output is None else ["--output", str(output)], ranks)


@cli.command()
@click.argument("recipe")
@SET
@RANKS
def finetune(recipe: str, overrides: tuple[str, ...], ranks: int | None) -> None:
    """Make the recipe's teacher (its finetune section) with cross-entropy alone."""
    from llmkd.recipe.recipe import load_recipe

    if load_recipe(recipe, overrides).finetune is None:
        raise InputError(f"recipe {recipe!r} has no finetune section, which says how to make a teacher; add one")
    _launch(recipe, overrides, ["--teacher-only"], ranks)


@cli.command()
@click.argument("recipe")
@click.option(
    "--output", type=OutputPath(), help="Folder of the cache; overrides cache.path [default: OUTPUT/NAME/cache]."
)
@SET
@RANKS
def cache(recipe: str, output: Path | None, overrides: tuple[str, ...], ranks: int | None) -> None:
    """Run the teacher once and keep its states on disk, for teacher.placement: cache. The same command resumes."""
    path = () if output is None else (f"cache.path={json.dumps(str(output))}",)
    _launch(recipe, (*overrides, *path), ["--cache-only"], ranks)


def _say_reading(recipe: str) -> None:
    log.info("reading recipe %s; what is imported for it takes some seconds", recipe)


def _launch(recipe: str, overrides: tuple[str, ...], options: list[str], ranks: int | None) -> None:
    _say_reading(recipe)
    from llmkd.distributed.launch import launch
    from llmkd.recipe.ds_config import check_ds_configs
    from llmkd.recipe.recipe import load_recipe

    settings = load_recipe(recipe, overrides)
    sets = [part for override in overrides for part in ("--set", override)]
    processes = _ranks(ranks, settings.rollouts) or settings.study.ranks
    check_ds_configs(settings, processes)
    sys.exit(launch(processes, ["--recipe", recipe, *options, *sets]).code)


def _ranks(asked: int | None, rollouts: Rollouts | None) -> int:
    """The ranks asked for, else one per GPU on which not only texts are written; 0 where there is neither."""
    import torch

    writing = 0 if rollouts is None else rollouts.gpus_among(os.environ.get("CUDA_VISIBLE_DEVICES"))
    gpus = max(0, torch.cuda.device_count() - writing)
    if asked and gpus and asked > gpus:
        own = f" beside {writing} that write (rollouts.devices)" if writing else ""
        raise InputError(f"--ranks {asked}: this machine has {gpus} GPUs{own}; write at most {gpus}")
    return asked or gpus


@cli.command()
@click.argument("recipe")
@SET
@RANKS
@SHARD
def study(recipe: str, overrides: tuple[str, ...], ranks: int | None, shard: Part) -> None:
    """Train strategies x seeds and the baselines, evaluate and report. What is done is not done again."""
    _say_reading(recipe)
    import datasets

    from llmkd.recipe.recipe import load_recipe

    datasets.disable_progress_bars()
    settings = load_recipe(recipe, overrides)
    starting.get_ready()  # its imports and those below take the same seconds
    from llmkd.study import Stopped
    from llmkd.study import study as run

    with stopping(STOPPED, terminated=0):
        try:
            available = _ranks(ranks, settings.rollouts) or settings.study.ranks
            _show(run(settings, ranks or min(available, settings.study.ranks), shard))
        except Stopped as stop:
            click.echo(STOPPED, err=True)
            if stop.mistakes:
                raise InputError("; ".join(stop.mistakes)) from None


@cli.command()
@click.argument("folder", type=click.Path(path_type=Path))
def report(folder: Path) -> None:
    """Write the report of a study's folder, whole or half done."""
    from llmkd.report.write import report as write_report

    _show(write_report(folder))


@cli.command()
@click.argument("folders", nargs=-1, required=True, metavar="RUN_A RUN_B [...]", type=click.Path(path_type=Path))
@click.option("--output", type=OutputPath(), help="The Markdown file [default: comparison.md beside RUN_A].")
def compare(folders: tuple[Path, ...], output: Path | None) -> None:
    """Set several studies side by side, and say what can't be compared."""
    from llmkd.report.across_studies import compare_studies

    file = output or folders[0].resolve().parent / "comparison.md"
    click.echo(compare_studies(folders, file))
    click.echo(f"\nComparison: {file}")


def _show(written: Report | None) -> None:
    from llmkd.report.write import terminal_text

    if written is not None:
        click.echo(f"{terminal_text(written.results)}\n\nReport: {written.page}")


@cli.command()
@click.argument("model", type=click.Path(path_type=Path))
@click.option(
    "--recipe", "-r", default="quickstart", show_default=True, help="Recipe whose evaluation section is used."
)
@click.option("--output", type=OutputPath(), help="Folder of the result [default: MODEL's parent/evaluations].")
@SET
def evaluate(model: Path, recipe: str, output: Path | None, overrides: tuple[str, ...]) -> None:
    """Score one HF folder by lm-eval with a recipe's tasks."""
    from llmkd.evaluation.lm_eval_step import evaluate as run
    from llmkd.models.folders import resolve
    from llmkd.recipe.recipe import load_recipe

    settings = load_recipe(recipe, overrides)
    folder = resolve(str(model), "MODEL")
    trusted = settings.teacher.trust_remote_code or settings.student.trust_remote_code
    place = output or folder.parent / "evaluations"
    with stopping(STOPPED):
        results = run([(folder.name, folder)], settings.evaluation, place, trust_remote_code=trusted)
    for path in results.values():
        click.echo(path.read_text())


@cli.command()
@click.argument("models", nargs=-1, required=True, metavar="MODEL_OR_STUDY...", type=click.Path(path_type=Path))
@click.option(
    "--recipe",
    "-r",
    help="Recipe whose data and evaluation sections are used [default: the study's own, else quickstart].",
)
@click.option(
    "--backend", type=click.Choice(["auto", "hf", "vllm"]), help="What runs the models; overrides the recipe's."
)
@click.option("--items", type=click.IntRange(min=1), help="Prompts; overrides the recipe's.")
@click.option(
    "--output",
    type=OutputPath(),
    help="Folder of the results [default: generations/ in the study or beside it].",
)
@SET
def generate(
    models: tuple[Path, ...],
    recipe: str | None,
    backend: str | None,
    items: int | None,
    output: Path | None,
    overrides: tuple[str, ...],
) -> None:
    """Let models continue held-out prompts, score the texts and show some. A study's folder stands for all its models."""
    from llmkd.evaluation.generation import generate as run
    from llmkd.evaluation.generation import models_of, summary
    from llmkd.recipe.found import recipe_for

    studies = [path for path in models if (path / "study.json").is_file()]
    named = {"backend": backend, "items": items}
    sets = [f"evaluation.generation.{key}={value}" for key, value in named.items() if value is not None]
    settings = recipe_for(studies[0] if studies else None, recipe, (*overrides, *sets))
    if settings.evaluation.generation is None:
        settings = settings.changed({"evaluation.generation": {}})
    place = output or (studies[0] if studies else models[0].resolve().parent) / "generations"
    trusted = settings.teacher.trust_remote_code or settings.student.trust_remote_code
    with stopping(STOPPED):
        results = run(models_of(models), settings.evaluation, settings.data, place, trust_remote_code=trusted)
    click.echo(summary(results))


@cli.command()
@click.argument("run", type=click.Path(path_type=Path))
@click.option("--recipe", "-r", help="Recipe that trained RUN [default: its recipe.yaml].")
@click.option(
    "--rows",
    type=click.IntRange(min=1),
    help="Held-out rows [default: evaluation.angles_rows of the recipe, else 100].",
)
@SET
def angles(run: Path, recipe: str | None, rows: int | None, overrides: tuple[str, ...]) -> None:
    """Measure the angles between teacher blocks as a student's blocks see them, before and after training.

    RUN is a study's folder or one student's training folder; the results are in RUN/angles.
    """
    from llmkd.evaluation.angles.measure import angles as measure
    from llmkd.evaluation.angles.results import angles_text

    with stopping(STOPPED):
        measured = measure(run, recipe=recipe, overrides=overrides, rows=rows)
    click.echo(angles_text(measured))


@cli.command()
@click.argument("recipe")
@click.option("--ranks", type=click.IntRange(min=1), required=True, help="GPUs the run would have.")
@click.option(
    "--device-gib",
    type=FiniteRange(min=0, max=10**6, min_open=True),
    help="Memory of one GPU, to recommend by  [default: of this machine's GPUs, and without any 80].",
)
@SET
def plan(recipe: str, ranks: int, device_gib: float | None, overrides: tuple[str, ...]) -> None:
    """Show the memory a run needs, other placements, and how many students fit."""
    from llmkd.planning.plan import whole_plan
    from llmkd.recipe.recipe import load_recipe

    click.echo(whole_plan(load_recipe(recipe, overrides), ranks, device_gib))


@cli.command()
@click.argument("recipe")
@click.option("--rows", type=click.IntRange(min=0), default=2, show_default=True, help="Rows to show.")
@SET
def doctor(recipe: str, rows: int, overrides: tuple[str, ...]) -> None:
    """Show what a recipe trains on, and what would spoil it."""
    import datasets

    from llmkd.planning.doctor import doctor_text, examine
    from llmkd.recipe.recipe import load_recipe

    datasets.disable_progress_bars()
    click.echo(doctor_text(*examine(load_recipe(recipe, overrides), rows)))


def main(arguments: list[str] | None = None) -> None:
    """Run a command; a user's mistake is one sentence and exit code 2."""
    try:
        cli(arguments, standalone_mode=False)
    except InputError as error:
        click.echo(f"Error: {error}", err=True)
        sys.exit(2)
    except click.ClickException as error:
        error.show()
        sys.exit(2)
    except click.exceptions.Abort:
        sys.exit(130)
    except Exception as error:
        problem = storage_problem(error)
        if problem is None:
            raise
        click.echo(f"Error: {problem}", err=True)
        sys.exit(2)
