"""A whole on-policy step, writing included: llmkd's by its backends and rounds against TRL's GKDTrainer, in one process.

python -W ignore -m benchmarks.rollouts [--repeat 5] [--write]

All have the same teacher and student, prompts, lengths, divergence (jsd) and engine (DeepSpeed), and a micro-batch that is the whole batch.
No text ends early: the models' end token can't be said. In a turn each contestant takes ten steps; the turns alternate.
"""

from __future__ import annotations

import gc
import json
import os
import random
import shlex
import string
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any, Protocol

import click
import datasets
import torch
import transformers
from transformers import AutoModelForCausalLM

from benchmarks import tables
from benchmarks.shapes import Row, Size, Work, as_batch, make_model
from benchmarks.trl_trainers import OnPolicy
from benchmarks.trl_trainers import version as trl_version
from llmkd.data.batches import Batch, Counts
from llmkd.distributed.ranks import World, quiet, start, stop
from llmkd.inference.vllm_setup import vllm_version
from llmkd.models.make import new_tokenizer
from llmkd.provenance import commit, hardware, versions
from llmkd.recipe.recipe import Recipe
from llmkd.rollouts.source import Rollouts, prompt_of
from llmkd.training import build
from llmkd.training.jobs import distil_job
from llmkd.training.prepare import PreparedRun, prepare
from llmkd.training.steps import Steps

SECTION = "On-policy steps"
TRL = "TRL GKDTrainer"
SIZE = Size(256, 768, 4, 2, 64, 8, 4, False, 16, 32, vocabulary=8192)
"""`rows` is the batch; `longest` the longest prompt's tokens."""
WRITTEN = 48
"""Tokens of every text."""
STEPS = 10
"""Of a turn, and of the longest round."""
KINDS: dict[str, dict[str, Any]] = {
    "llmkd, Hugging Face, every 1": {"backend": "hf", "every": 1},
    "llmkd, Hugging Face, every 10": {"backend": "hf", "every": 10},
    "llmkd, vLLM, every 10": {"backend": "vllm", "every": 10},
}


@dataclass(frozen=True)
class Turn:
    """Seconds of some steps, and what is known of them."""

    whole: float
    cpu: float
    """Of this process's CPU, which feels little of what else runs; what writes in a process of its own is not in it."""
    writing: float
    """Weights included."""
    weights: float
    """Handing the student's weights to what writes."""


class Clock:
    """Seconds of the wall and of this process's CPU since it was made."""

    def __init__(self) -> None:
        self._began = time.perf_counter(), time.process_time()

    def read(self) -> tuple[float, float]:
        return time.perf_counter() - self._began[0], time.process_time() - self._began[1]


class Contestant(Protocol):
    """One way to take on-policy steps."""

    def turn(self) -> Turn:
        """The next `STEPS` steps."""
        ...


class LlmkdRun:
    """A training run of llmkd that is asked for its steps."""

    def __init__(self, world: World, recipe: Recipe, folder: Path) -> None:
        self.run: PreparedRun = prepare(world, distil_job(world, recipe, folder))
        self._device = world.device
        self._steps = Steps(world, self.run.job, self.run.steps, start_step=0)
        self._batches: Iterator[list[Batch]] = self.run.batches()
        self._number = 0
        self.run.module.train()

    @property
    def rollouts(self) -> Rollouts:
        """What writes its texts."""
        rollouts = self.run.source.rollouts
        assert rollouts is not None, "the recipe has the section"
        return rollouts

    def turn(self) -> Turn:
        spent, clock = self.rollouts.spent, Clock()
        writing, weights = spent.writing, spent.weights
        for _ in range(STEPS):
            self._step()
        return Turn(*clock.read(), spent.writing - writing, spent.weights - weights)

    def _step(self) -> None:
        """As the training loop does it. Raises AssertionError where a text is not of full length."""
        micro_batches = next(self._batches)
        counts = Counts(*map(sum, zip(*(batch.counts for batch in micro_batches), strict=True)))
        assert counts.trained == self.run.job.train.batch_size * WRITTEN, "every text has its full length"
        self._number += 1
        settings = self._steps.settings(self._number, counts, len(micro_batches))
        self.run.set_rate(self._number)
        for number, batch in enumerate(micro_batches):
            batch = batch.to(self._device)
            result = self.run.engine(batch, self.run.signal(batch, settings), settings, number)
            self.run.engine.backward(result.loss, scale_wrt_gas=False)
            self.run.engine.step()

    def work(self, step: int) -> Work:
        """The prompts of a step (from 0), each with as many tokens behind it as will be written."""
        tokens, micro = self.rollouts.tokens, self.rollouts.micro
        window, place = divmod(step, tokens.window_steps(micro.batch_size))
        numbers = tokens.window(window, batch_size=micro.batch_size, seed=micro.seed)[place]
        prompts = [tuple(prompt_of(tokens.row(int(number))).tolist()) for number in numbers]
        rows = tuple(Row(prompt, (1,) * WRITTEN) for prompt in prompts)
        attended = sum(len(prompt) + WRITTEN for prompt in prompts)
        return Work(as_batch(rows), rows, trained=len(rows) * WRITTEN, attended=attended)


class TrlRun:
    """TRL's trainer with the same student, teacher, prompts and engine as a run of llmkd."""

    def __init__(self, world: World, like: LlmkdRun, recipe: Recipe) -> None:
        job = like.run.job
        assert job.teacher is not None
        student, teacher = (
            AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32) for folder in (job.initial, job.teacher)
        )
        teacher.eval().requires_grad_(False)
        ds_config = build.training_ds_config(world, recipe.train, 1, job.folder)
        self._like, self._number = like, 0
        self.trainer = OnPolicy(world, student, teacher, ds_config, like.work(0))

    def turn(self) -> Turn:
        works = [self._like.work(self._number + step) for step in range(STEPS)]
        self._number += STEPS
        writing, clock = self.trainer.writing, Clock()
        with self.trainer.turn() as step:
            for work in works:
                step(work)
                assert self.trainer.written.shape[1] == max(len(row.prompt) for row in work.rows) + WRITTEN
        return Turn(*clock.read(), self.trainer.writing - writing, 0.0)


def recipe_in(folder: Path, size: Size, steps: int) -> Recipe:
    """Write a teacher that never ends a text, and prompts; give the recipe that all runs share."""
    draw = random.Random(0)
    # a letter after a space becomes one token
    lengths = [draw.randint(size.longest // 4, size.longest) for _ in range(40 * size.rows)]
    prompts = [" ".join(draw.choices(string.ascii_letters, k=length)) for length in lengths]
    (folder / "rows.jsonl").write_text("".join(json.dumps({"prompt": p, "completion": " a"}) + "\n" for p in prompts))
    tokenizer = new_tokenizer(prompts, min(1024, size.vocabulary))
    whole = replace(size, longest=size.longest + WRITTEN)
    model: Any = make_model(whole, size.teacher_blocks, torch.float32, torch.device("cpu"), seed=0)
    end = tokenizer.eos_token_id
    with (
        torch.no_grad()
    ):  # one channel is 1 in every token's state, and the end token's logit is far below the others for it
        model.get_input_embeddings().weight[:, 0] = 1.0
        model.get_output_embeddings().weight[end] = 0.0
        model.get_output_embeddings().weight[end, 0] = -50.0
    model.config.eos_token_id = model.generation_config.eos_token_id = end
    model.save_pretrained(folder / "teacher")
    tokenizer.save_pretrained(folder / "teacher")
    return Recipe.model_validate({
        "name": "rollouts",
        "output": str(folder / "runs"),
        "teacher": {"path": str(folder / "teacher"), "dtype": "float32"},
        "student": {"blocks": size.student_blocks},
        "matching": {"strategy": "none"},
        "loss": {"ce": 0.0, "divergence": "jsd"},
        "data": {"source": str(folder / "rows.jsonl"), "max_length": whole.longest},
        "rollouts": {"max_new_tokens": WRITTEN, "batch_size": STEPS * size.rows},
        "train": {
            "steps": steps, "batch_size": size.rows, "micro_batch_size": size.rows, "learning_rate": 1e-9, "dtype": "float32",
            "deepspeed": "zero2",
        },
    })  # fmt: skip


def contestants(world: World, recipe: Recipe, folder: Path, only: Sequence[str]) -> dict[str, Contestant]:
    """All that can run here, or llmkd's backends and rounds of these alone, set up."""
    kinds = {name: how for name, how in KINDS.items() if how["backend"] != "vllm" or vllm_version() is not None}
    kinds = {name: how for name, how in kinds.items() if not only or any(part in name for part in only)}
    runs: dict[str, Any] = {
        name: LlmkdRun(world, recipe.changed({f"rollouts.{key}": value for key, value in how.items()}), folder / name)
        for name, how in kinds.items()
    }
    if trl_version() is not None:
        runs = {TRL: TrlRun(world, next(iter(runs.values())), recipe), **runs}
    return runs


def turns(runs: Mapping[str, Contestant], repeat: int) -> dict[str, list[Turn]]:
    """Each contestant's timed turns, after one that is not timed; each round begins with another contestant."""
    taken: dict[str, list[Turn]] = {name: [] for name in runs}
    names = list(runs)
    for number in range(repeat + 1):
        first = number % len(names)
        for name in (*names[first:], *names[:first]):
            gc.collect()
            turn = runs[name].turn()
            print(f"[{time.strftime('%H:%M:%S')}] {name}: {turn.whole:.2f} s", file=sys.stderr, flush=True)
            if number:
                taken[name].append(turn)
    return taken


def report(taken: Mapping[str, Sequence[Turn]], tokens: int) -> str:
    """The table, and each goal with its figure. `tokens`: written in a turn."""
    seconds = {name: [turn.whole for turn in found] for name, found in taken.items()}
    cpu = {name: [turn.cpu for turn in found] for name, found in taken.items() if "vLLM" not in name}
    rows, goals = [], []
    for name, found in taken.items():
        faster = tables.ratios(seconds, name, TRL) if TRL in taken else None
        faster_cpu = tables.ratios(cpu, name, TRL) if TRL in cpu and name in cpu else None
        weights = median(turn.weights / turn.whole for turn in found)
        shares = [
            median(turn.writing / turn.whole for turn in found), weights, median(1 - turn.writing / turn.whole for turn in found)
        ]  # fmt: skip
        rate = tables.spread([tokens / one for one in seconds[name]], 0)
        ratios = ["-" if values is None else tables.spread(values) for values in (faster, faster_cpu)]
        rows.append(
            [name, rate, f"{median(seconds[name]) / STEPS:.3f}", *ratios, *(f"{share:.1%}" for share in shares)]
        )
        if name != TRL and faster is not None:
            figure = median(faster)
            goals.append(f"- {_met(figure >= 1.5)}: tokens/s ≥ 1.5 × {TRL}: {figure:.2f} ({name})")
        if name.endswith("every 10"):
            goals.append(f"- {_met(weights <= 0.05)}: weights ≤ 5 % of the time: {weights:.1%} ({name})")
    by = f"÷ {TRL}"
    header = ["step", "tokens written/s", "s/step", by, f"{by}, CPU time", "writing", "of it weights", "the rest"]
    return tables.table(header, rows) + "\n\n" + "\n".join(goals)


def _met(is_met: bool) -> str:
    return "met" if is_met else "**not met**"


def facts(size: Size, command: str, load: float) -> str:
    """What was run, on what, from which commit."""
    machine = hardware()
    made = versions("torch", "deepspeed", "transformers", "accelerate", "trl", "vllm")
    return "\n".join([
        f"- command: `{command}`",
        f"- hardware: {machine['cpu']}, {machine['cores']} cores, {machine['memory_gib']} GiB, {torch.get_num_threads()} threads; "
        f"load at the start {load:.1f}",
        f"- commit: {commit()}; {', '.join(f'{name} {version}' for name, version in made.items())}",
        f"- models: Qwen3-shaped, width {size.hidden}, {size.teacher_blocks} -> {size.student_blocks} blocks, vocabulary "
        f"{size.vocabulary}, float32, random weights",
        f"- work: {size.rows} prompts of {size.longest // 4} to {size.longest} tokens a step, {WRITTEN} tokens written of each at "
        f"temperature 1; jsd; DeepSpeed `zero2`, 1 rank; a turn is {STEPS} steps",
    ])  # fmt: skip


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--repeat", default=5, show_default=True, help="Timed turns of each.")
@click.option("--write", is_flag=True, help="Put the table into benchmarks/RESULTS.md.")
@click.option("--only", multiple=True, help="Of llmkd's ways those whose name has this in it, e.g. 'every 10'.")
def main(repeat: int, write: bool, only: tuple[str, ...]) -> None:
    """Time whole on-policy steps of llmkd and of TRL in turns."""
    quiet()
    datasets.disable_progress_bars()
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    world, load = start(), os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        recipe = recipe_in(folder, SIZE, STEPS * (repeat + 1))
        taken = turns(contestants(world, recipe, folder, only), repeat)
        gc.collect()  # the runs are over: their writers' processes end now, not with the interpreter
        said = facts(SIZE, f"python -W ignore -m benchmarks.rollouts {shlex.join(sys.argv[1:])}".strip(), load)
        said += "\n\n" + report(taken, STEPS * SIZE.rows * WRITTEN)
        print(said, flush=True)
        if write:
            text = tables.RESULTS.read_text()
            title = "Writing, teacher, student and optimizer"
            tables.RESULTS.write_text(tables.put(text, SECTION, title, said))
    stop()


if __name__ == "__main__":
    main()
