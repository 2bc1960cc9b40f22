"""The training loop, on one page, and its command.

deepspeed llmkd/train.py --strategy all_to_one [--recipe R] [--set key.sub=value]
torchrun --nproc-per-node 2 llmkd/train.py ...
python llmkd/train.py ...                        (one process)
"""

from __future__ import annotations

import sys
from pathlib import Path

if __name__ == "__main__":
    # run as a file: let `import llmkd` find the package, and keep its modules from shadowing others
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import json
import logging
import math
import os
import signal
import time
from typing import Any

import click
import datasets
import transformers

from llmkd import __version__
from llmkd.data.batches import announced
from llmkd.distributed.ranks import (
    World,
    barrier,
    lost_rank,
    on_main,
    quiet,
    silent_ranks,
    start,
    stop,
    sum_counts,
    tell_mistake,
)
from llmkd.errors import InputError
from llmkd.losses.objective import divisors, scales
from llmkd.provenance import commit, hardware, versions
from llmkd.recipe.options import train_options
from llmkd.recipe.recipe import Recipe, dump_recipe, load_recipe
from llmkd.training import build, checkpoint, initial, jobs, write_cache
from llmkd.training.jobs import Job
from llmkd.training.metrics import Journal, Meter, peak_memory_gib
from llmkd.training.pairs import pair_names
from llmkd.training.prepare import prepare
from llmkd.training.steps import Steering

log = logging.getLogger("llmkd")


def train(world: World, job: Job, stopping: Stopping | None = None) -> bool:
    """Run a job to its end, or until SIGTERM or SIGINT; True when the model is exported. The same call resumes. All ranks take part."""
    settings = job.train
    stopping = stopping or Stopping()
    if on_main(world, lambda: jobs.finished(job)):
        log.info("%s: already done, %s", job.title, job.folder / "model")
        return True
    run = prepare(world, job)
    job, student, module, teacher, steps = run.job, run.student, run.module, run.teacher, run.steps
    journal = Journal(
        world,
        job.folder,
        start_step=run.first,
        wandb_project=settings.wandb,
        recipe=job.inputs,
        run_name=f"{job.recipe.name}-{job.title}",
    )
    meter = Meter(world, job.weights, pair_names(job.pairs, job.encoders, redraws=job.redraws))
    steering = Steering(world, job, steps, start_step=run.first)

    totals = {"seconds": 0.0, "tokens": 0}
    values: dict[str, Any] = {}
    loader = run.rows(start_step=run.first, steps=steps)
    if teacher is not None:
        loader = announced(loader, teacher.expect)
    module.train()
    began = time.perf_counter()
    for step, micro_batches in enumerate(loader, start=run.first + 1):
        counts = [sum(c) for c in zip(*(batch.counts for batch in micro_batches), strict=True)]
        counts += [sum(batch.source_count for batch in micro_batches), int(stopping.asked)]
        trained, attended, source, asked_to_stop = sum_counts(world, counts)  # all ranks, on the CPU
        weights = steering.begin(step)
        steering.reweigh(module)
        by = divisors(weights, trained=trained, attended=attended, pairs=len(job.pairs))
        for group in student.optimizer.param_groups:
            group["lr"] = run.rate(step - 1)
        if job.redraws:
            build.rematch(job, step - 1, module, teacher)
        if module.stones is not None:
            counts_of = dict(trained=by.ce, compared=by.kl)
            module.stones.begin(step - 1, **counts_of, ranks=world.size, weight=steering.weight_of_stones)

        for number, batch in enumerate(micro_batches):
            batch = batch.to(world.device)
            signals = teacher.signals(batch) if teacher is not None else None
            loss, sums = student(
                batch,
                signals,
                scales(weights, by, world.size),
                attended / max(source, 1),
                **steering.options(number),
            )
            student.backward(loss, scale_wrt_gas=False)  # the sums are already divided by the whole batch's count
            student.step()
            meter.add(sums, weights)
            steering.heard(module, sums)
        meter.step(by, attended + source, weights)
        said = {**steering.values(), **steering.end(by)}
        if module.stones is not None and steering.reports:
            said["norms"]["stones"] = module.stones.norms(world)
        totals["tokens"] += attended + source

        saves = step == steps or asked_to_stop or (settings.save_every and step % settings.save_every == 0)
        if step % settings.log_every == 0 or saves or steering.reports:  # all ranks: one reduction
            values = {
                **meter.flush(),
                **said,
                "learning_rate": run.rate(step - 1),
                "grad_norm": float(student.get_global_grad_norm() or 0.0),
            }
            if module.stones is not None:
                values |= module.stones.flush(world)
                values["loss"] += values["stones"]
            journal.write(step, steps, values)
            if not math.isfinite(values["loss"]):
                raise InputError(
                    f"the loss is not a finite number at step {step}; lower train.learning_rate and start again from the last checkpoint"
                )
        if saves:  # all ranks: every rank writes its shards
            saved = checkpoint.save(
                world, student, job.folder / "checkpoints", step=step, inputs=job.inputs, keep=settings.keep_checkpoints
            )
            if asked_to_stop and step < steps:
                log.info(
                    "%s: stopped by %s after step %d; saved %s; the same command goes on from there",
                    job.title,
                    stopping.name,
                    step,
                    saved,
                )
                journal.close()
                return False
    totals["seconds"] = time.perf_counter() - began
    journal.close()
    _finish(world, job, module, steps=steps, first=run.first, totals=totals, values=values)
    return True


def _finish(
    world: World, job: Job, module: Any, *, steps: int, first: int, totals: dict[str, Any], values: dict[str, Any]
) -> None:
    """Export the student and write `summary.json` (all ranks take part)."""
    meta = {
        "llmkd": __version__,
        "inputs": job.inputs,
        "pairs": job.pairs,
        "strategy": job.recipe.matching.strategy,
        "steps": steps,
    }
    summary = {
        **meta,
        "world_size": world.size,
        "resumed_from_step": first,
        "seconds": totals["seconds"],
        "tokens": totals["tokens"],
        "tokens_per_second": totals["tokens"] / totals["seconds"] if totals["tokens"] else None,
        "memory_gib": values.get("memory_gib", peak_memory_gib()),  # a run of 0 steps has no values
        "last": values,
        "versions": versions("torch", "deepspeed", "transformers"),
        "hardware": hardware(),
        "commit": commit(),
    }
    checkpoint.export(
        world, module.model, job.folder / "model", tokenizer_from=job.initial, card=_card(job, steps), meta=meta
    )
    if world.is_main:
        (job.folder / "summary.json").write_text(json.dumps(summary, indent=1))
        initial.remove_initial(job)
    barrier(world)
    log.info("%s: done, %s", job.title, job.folder / "model")


def _card(job: Job, steps: int) -> str:
    """The exported model's README: what it is, and the recipe that made it."""
    pairs = ", ".join(pair_names(job.pairs, job.encoders, redraws=job.redraws)) or "none"
    return (
        f"# {job.recipe.name}: {job.title}\n\nTrained by llmkd {__version__}, {steps} steps.\n\n"
        f"- started from: {job.initial.name if job.initial.parent == job.folder else job.initial}\n"
        f"- teacher: {job.recipe.teacher_path if job.teacher else 'none'}\n"
        f"- layer map (student<teacher, 0-based blocks): {pairs}\n\n## Recipe\n\n```yaml\n{dump_recipe(job.recipe)}```\n"
    )


class Stopping:
    """Remembers SIGTERM and SIGINT until the step is over; the loop asks every rank, so one rank's signal stops all."""

    def __init__(self) -> None:
        self.asked = False
        self.name = "another rank's signal"
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._note)

    def _note(self, number: int, frame: object) -> None:
        if not self.asked:
            self.asked, self.name = True, signal.Signals(number).name
            log.info("%s: stopping after this step", self.name)


def student_folder(recipe: Recipe) -> Path:
    """Where a student of this recipe goes, in a study or alone."""
    return recipe.folder / "students" / f"{recipe.matching.strategy}-s{recipe.seed}"


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@train_options
@click.option("--teacher-only", is_flag=True, help="Make the recipe's teacher (its finetune section) and stop.")
@click.option("--cache-only", is_flag=True, help="Write the teacher's cache (teacher.placement: cache) and stop.")
@click.option("--trust-cache", is_flag=True, help="With --cache-only: hash it only where training would.")
@click.option("--local_rank", "--local-rank", type=int, default=0, hidden=True, help="Set by the deepspeed launcher.")
def command(
    recipe: str,
    overrides: tuple[str, ...],
    output: Path | None,
    teacher_only: bool,
    cache_only: bool,
    trust_cache: bool,
    local_rank: int,
) -> None:
    """Train one student (after its teacher, if the recipe makes one and it is not there yet). The same command resumes."""
    settings = load_recipe(recipe, overrides)
    os.environ.setdefault("LOCAL_RANK", str(local_rank))
    timeout = settings.train.timeout_seconds
    _quiet()
    world = start(timeout)
    logging.basicConfig(
        level=logging.INFO if world.is_main else logging.ERROR,
        format="%(asctime)s %(message)s",
        datefmt="%H:%M:%S",
        force=True,
    )
    stopping = Stopping()
    if settings.finetune is not None:
        train(world, jobs.finetune_job(world, settings, settings.folder / "teacher"), stopping)
    if cache_only and sum_counts(world, [int(stopping.asked)]) == [0]:
        write_cache.cache(world, settings, stopping, trusted=trust_cache)
    elif not teacher_only and sum_counts(world, [int(stopping.asked)]) == [0]:
        train(world, jobs.distil_job(world, settings, output or student_folder(settings)), stopping)
    stop()


def _quiet() -> None:
    """One log, ours: no progress bars and no chatter from the libraries below."""
    quiet()
    datasets.disable_progress_bars()
    transformers.utils.logging.disable_progress_bar()


def main() -> None:
    """Run the command; a user's mistake is one sentence from one rank and exit code 2 from all."""
    try:
        command(standalone_mode=False)
    except (InputError, click.ClickException) as error:
        sentence = error.format_message() if isinstance(error, click.ClickException) else str(error)
        tell_mistake(f"Error: {sentence}")
        _leave(2)
    except click.exceptions.Abort:
        _leave(130)
    except RuntimeError as error:
        if not lost_rank(error):
            raise
        silent = ", ".join(map(str, silent_ranks())) or "none, so one was too slow: see train.timeout_seconds"
        print(
            f"Error: rank {os.environ.get('RANK', '0')}: {str(error).splitlines()[0]}; silent ranks: {silent}. "
            "The same command goes on from the last checkpoint.",
            file=sys.stderr,
            flush=True,
        )
        _leave(1)


def _leave(code: int) -> None:
    """Exit at once: threads of the process group may still run, and the interpreter's own way out would abort on them."""
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    main()
