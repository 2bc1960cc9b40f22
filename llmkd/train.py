"""The training loop, on one page, and its command.

deepspeed llmkd/train.py --strategy all_to_one [--recipe R] [--set key.sub=value]
torchrun --nproc-per-node 2 llmkd/train.py ...
python llmkd/train.py ...                        (one process)
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

if __name__ == "__main__" and __spec__ is None:
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # else torch warns of a wait that fails by its stack
    # run as a file: let `import llmkd` find the package, and keep its modules from shadowing others
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import contextlib
import logging
from collections.abc import Callable, Generator, Sequence
from typing import TypeVar

import click
import datasets
import transformers

from llmkd.data.batches import Batch, Counts
from llmkd.distributed import checksums
from llmkd.distributed.ending import end_lost, leave, lost_rank, print_mistake, start_watch
from llmkd.distributed.engines import backward
from llmkd.distributed.ranks import World, on_main, quiet, start, stop, sum_counts
from llmkd.distributed.shared_folder import only_run_in
from llmkd.errors import FoundByAll, InputError, problem
from llmkd.processes import Stopping, end_with_parent
from llmkd.recipe.ds_config import check_ds_configs
from llmkd.recipe.options import train_options
from llmkd.recipe.recipe import Recipe, load_recipe
from llmkd.student.passes import PassResult, StepSettings
from llmkd.teachers.shared import Random, Student, Training, in_turn
from llmkd.training import build, checkpoint, checks, finite, initial, jobs, write_cache
from llmkd.training.jobs import Job
from llmkd.training.journal import Journal, Spent, made_with, model_card, model_meta
from llmkd.training.kept import Keeping
from llmkd.training.metrics import Interval, Meter
from llmkd.training.prepare import Lend, PreparedRun, Seats, own_teacher, prepare
from llmkd.training.steps import Steps
from llmkd.training.tokens import StoppedTokenizing
from llmkd.training.validation import Validator

log = logging.getLogger("llmkd")
T = TypeVar("T")


def train(world: World, job: Job, stopping: Stopping | None = None) -> bool:
    """Run a job to its end, or until SIGTERM or SIGINT; True when the model is exported. The same call resumes (all ranks take part)."""
    return train_in_turn(world, [job], stopping)


def train_in_turn(world: World, todo: Sequence[Job], stopping: Stopping | None = None) -> bool:
    """As `train`, for several students that learn from the same rows: a micro-batch each in turn, off one pass of one teacher.

    True when all are exported. Raises InputError for those that could not be trained, when the others are done.
    """
    stopping, before, several = stopping or Stopping(), Random(), len(todo) > 1
    undone, mistakes = _of_each(todo, lambda job: None if _is_done(world, job) else job, several=several)
    left = [job for job in undone if job is not None]
    seats = Seats()
    lend = own_teacher if len(left) < 2 else seats
    with contextlib.ExitStack() as held:

        def ready(job: Job) -> Student:
            held.enter_context(only_run_in(world, job.folder))
            before.restore()  # as if it were alone
            return _ready(world, job, stopping, lend, of=len(left))

        try:
            students, unready = _of_each(left, ready, several=several)
        except StoppedTokenizing:
            message = "%s: stopped by %s before all its rows were there; the same command goes on where it stopped"
            log.info(message, ", ".join(job.title for job in left), stopping.name)
            return False
        seats.load()
        in_turn(students)
    failed = [student for student in students if student.failed is not None]
    mistakes += [*unready, *(f"{s.name}: {s.failed}" if several else str(s.failed) for s in failed)]
    if mistakes:
        raise FoundByAll("; ".join(mistakes))
    return all(student.exported for student in students)


def _of_each(todo: Sequence[Job], work: Callable[[Job], T], *, several: bool) -> tuple[list[T], list[str]]:
    """What `work` gives for each job, and what is wrong with those of several jobs that it refuses, each by its name."""
    results, mistakes = [], []
    for job in todo:
        try:
            results.append(work(job))
        except FoundByAll as error:
            if not several:
                raise
            mistakes.append(f"{job.title}: {error}")
            log.info("%s; the others go on", mistakes[-1])
    return results, mistakes


def _ready(world: World, job: Job, stopping: Stopping, lend: Lend, *, of: int) -> Student:
    """A job's student, one of so many, ready to take its turns (all ranks take part)."""
    run = prepare(world, job, stopping, lend)
    return Student(job.title, run.first, _train(world, run, stopping, of))


def _is_done(world: World, job: Job) -> bool:
    if is_done := on_main(world, lambda: jobs.finished(job)):
        log.info("%s: already done, %s", job.title, job.folder / "model")
    return is_done


def _train(world: World, run: PreparedRun, stopping: Stopping, of: int) -> Training:
    """The training of one of so many students. It stops after each micro-batch for the others, and says how many steps are done."""
    job, settings = run.job, run.job.train
    run.begin()
    steps = Steps(world, job, run.steps, start_step=run.first)
    meter = Meter.of_job(world, job, run.clock)
    journal = Journal(world, job, start_step=run.first, steps=run.steps, of=of)
    validator, keeping = Validator(world, run, steps), Keeping(world, run)
    tokens, began, last = 0, run.clock.now(), None
    # a run that was killed while it was exported has nothing left to train
    left = () if keeping.is_over else run.batches()
    for step, micro_batches in enumerate(run.clock.timed(left, run.seconds_apart), start=run.first + 1):
        # every step (all ranks: their counts are added up on the CPU)
        counts, asked_to_stop = _counts(world, micro_batches, stopping)
        this = steps.settings(step, counts, len(micro_batches))
        run.set_rate(step)
        results = yield from _passes(run, micro_batches, this)
        # at the steps of a dynamic temperature (all ranks: one reduction)
        steps.follow(this, results)
        meter.add(this, results)
        tokens += this.counts.tokens
        # every validate_every steps and at the last: validate (all ranks: as many passes each, then one reduction)
        if run.validates(step):
            measured = yield from validator.validate(step)
            journal.write_validation(step, measured.values())
            keeping.note(step, measured)
        done = step == run.steps or keeping.is_over
        # before a round of texts, which may take long to write: stop if asked to meanwhile (all ranks: one reduction)
        asked_to_stop = asked_to_stop or (run.writes_after(step) and sum_counts(world, [int(stopping.asked)]) != [0])
        saves = done or asked_to_stop or (settings.save_every and step % settings.save_every == 0)
        # every log_every steps, at a save, where norms are reported, where DeepSpeed left the step out: log (all ranks: reductions)
        if step % settings.log_every == 0 or saves or this.report_norms or run.engine.skipped_steps:
            grad_norm = float(run.engine.get_global_grad_norm() or 0.0)
            last = meter.flush(steps.moving(this), learning_rate=run.rate(step - 1), grad_norm=grad_norm)
            journal.write(step, last, run.taken(step), run.written, run.learned_map)
            finite.check_loss(world, job, run.module, step, last)
            finite.check_gradient(job, run.engine, step)
        # every save_every steps, at the last and when asked to stop: save (all ranks: each writes its shards)
        if saves:
            finite.check_weights(world, job, run.module, step)
            also = settings.keep_checkpoints, keeping.noted, run.place, run.source.digests
            saved = checkpoint.save(world, run.engine, job.folder / "checkpoints", step, job.inputs, *also)
            keeping.tidy()
            if asked_to_stop and not done:
                message = "%s: stopped by %s after step %d and saved %s; the same command resumes from it"
                log.info(message, job.title, stopping.name, step, saved)
                journal.close()
                return False
        if done:
            break
        yield from run.others_turn(step)
    seconds = run.clock.now() - began
    spent = Spent(seconds, validator.seconds, run.writing_seconds(), tokens, run.clock.parts(), run.clock.cost())
    journal.close()
    # at the end: export (all ranks: weights are gathered one at a time; rank 0 writes)
    _finish(world, run, keeping, spent, last, of)
    return True


def _counts(world: World, micro_batches: Sequence[Batch], stopping: Stopping) -> tuple[Counts, bool]:
    """(the tokens of a step over all ranks, whether any rank is asked to stop) (all ranks take part)."""
    here = [sum(counts) for counts in zip(*(batch.counts for batch in micro_batches), strict=True)]
    *counts, asked = sum_counts(world, [*here, int(stopping.asked)])
    return Counts(*counts), bool(asked)


def _passes(
    run: PreparedRun, micro_batches: Sequence[Batch], settings: StepSettings
) -> Generator[int, None, list[PassResult]]:
    """A step's passes; other students have their turns between them."""
    results = []
    for number, batch in enumerate(micro_batches):
        results.append(_train_on(run, batch, settings, number))
        yield from run.others_turn(settings.step - 1)
    return results


def _train_on(run: PreparedRun, batch: Batch, settings: StepSettings, micro_batch: int) -> PassResult:
    """One micro-batch: the teacher's pass, the student's, the backward pass; after the step's last one the optimizer's step."""
    clock = run.clock
    clock.part("data")
    batch = batch.to(run.engine.device)
    clock.part("teacher")
    signal = run.signal(batch, settings)
    clock.part("forward")
    result: PassResult = run.engine(batch, signal, settings, micro_batch)
    clock.part("backward")
    backward(run.engine, result.loss)  # the sums are already divided by the whole batch's counts
    clock.part("optimizer")
    run.engine.step()
    return result._replace(loss=result.loss.detach())


def _finish(
    world: World, run: PreparedRun, keeping: Keeping, spent: Spent, last: Interval | None, students: int
) -> None:
    """Export the student and write `summary.json` (all ranks take part)."""
    job, kept, learned = run.job, keeping.kept, run.learned_map
    steps = keeping.noted[-1].step if keeping.is_over else run.steps
    meta = model_meta(job, steps, keeping)
    how = {"world_size": world.size, "resumed_from_step": run.first, "students_in_turn": students}
    summary = {**meta, **how, **spent.told(run, steps, last), "learned_map": learned, **made_with()}
    model = job.folder / "model"
    if kept is None:
        card = model_card(job, steps, learned)
        about = {"card": card, "meta": meta, **build.export_options(job)}
        checkpoint.export(world, run.module.model, model, tokenizer_from=job.initial, **about)
    else:
        keeping.publish(model, card=model_card(job, kept.step, learned), meta=meta)
        log.info("%s: exported is the student of step %d, the best by %s", job.title, kept.step, job.train.keep_by)
    on_main(world, lambda: initial.remove_initial(job, but_a_base=True))
    on_main(world, lambda: checksums.finish(job.folder, summary))  # a run that has a summary is finished
    on_main(world, keeping.remove)
    log.info("%s: done, %s", job.title, model)


def student_folder(recipe: Recipe) -> Path:
    """Where a student of this recipe goes, in a study or alone."""
    return recipe.folder / "students" / f"{recipe.matching.strategy}-s{recipe.seed}"


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@train_options
@click.option(
    "--beside",
    nargs=2,
    multiple=True,
    metavar="RECIPE OUTPUT",
    help="Train this student, too, in turn with the first and off the same pass of the teacher (any number of times).",
)
@click.option("--teacher-only", is_flag=True, help="Train the recipe's teacher (its finetune section) and stop.")
@click.option("--cache-only", is_flag=True, help="Write the teacher's cache (teacher.placement: cache) and stop.")
@click.option("--trust-cache", is_flag=True, help="With --cache-only: hash it only where training would.")
@click.option("--local_rank", "--local-rank", type=int, default=0, hidden=True, help="Set by the deepspeed launcher.")
def command(
    recipe: str,
    overrides: tuple[str, ...],
    output: Path | None,
    beside: tuple[tuple[str, str], ...],
    teacher_only: bool,
    cache_only: bool,
    trust_cache: bool,
    local_rank: int,
) -> None:
    """Train one student, after its teacher where the recipe makes one that is still missing. The same command resumes."""
    if beside and (teacher_only or cache_only):
        raise InputError(
            "--beside: it names a student to be trained; leave it out with --teacher-only and --cache-only"
        )
    settings = load_recipe(recipe, overrides)
    students = {output or student_folder(settings): settings, **{Path(out): load_recipe(name) for name, out in beside}}
    if len(students) <= len(beside):
        raise InputError("--beside: two students have one folder; give each an OUTPUT of its own")
    checks.check_in_turn({str(folder): student for folder, student in students.items()})
    os.environ.setdefault("LOCAL_RANK", str(local_rank))
    quiet()
    datasets.disable_progress_bars()
    transformers.utils.logging.disable_progress_bar()
    world = start(settings.train.timeout_seconds)
    start_watch(world.timeout)
    logging.basicConfig(
        level=logging.INFO if world.is_main else logging.ERROR,
        format="%(asctime)s %(message)s",
        datefmt="%H:%M:%S",
        force=True,
    )
    stopping = Stopping()
    for student in students.values():  # before a teacher is trained
        check_ds_configs(student, world.size)
    on_main(world, lambda: initial.merged_teacher(settings))
    if settings.finetune is not None:
        train(world, jobs.finetune_job(world, settings, settings.folder / "teacher"), stopping)
    if cache_only and sum_counts(world, [int(stopping.asked)]) == [0]:
        write_cache.cache(world, settings, stopping, trusted=trust_cache)
    elif not teacher_only and sum_counts(world, [int(stopping.asked)]) == [0]:
        train_in_turn(world, [jobs.distil_job(world, own, folder) for folder, own in students.items()], stopping)
    stop()


def main() -> None:
    """Run the command; a user's mistake is one sentence from one rank and exit code 2 from all."""
    end_with_parent()
    try:
        command(standalone_mode=False)
    except (InputError, click.ClickException) as error:
        sentence = error.format_message() if isinstance(error, click.ClickException) else str(error)
        print_mistake(sentence)
        leave(2)
    except click.exceptions.Abort:
        leave(130)
    except Exception as error:
        if (sentence := problem(error)) is not None:
            print_mistake(sentence)
            leave(2)
        if isinstance(error, RuntimeError) and lost_rank(error):
            end_lost(error)
        sys.excepthook(type(error), error, error.__traceback__)
        leave(1)


if __name__ == "__main__":
    main()
