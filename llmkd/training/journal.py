"""Where a run's numbers are written: the log, metrics.jsonl, TensorBoard, W&B if asked for, summary.json; and the model's card."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Mapping
from contextlib import ExitStack
from typing import NamedTuple

from llmkd import __version__
from llmkd.distributed.clocks import Part
from llmkd.distributed.ranks import World
from llmkd.files import forget_after
from llmkd.losses.objective import PARTS
from llmkd.progress import progress
from llmkd.provenance import commit, hardware, peak_memory_gib, versions
from llmkd.recipe.recipe import dump_recipe
from llmkd.text import escaped, fenced
from llmkd.training import build
from llmkd.training.jobs import Job
from llmkd.training.kept import Keeping
from llmkd.training.metrics import Interval, Values
from llmkd.training.prepare import PreparedRun

log = logging.getLogger("llmkd")
LEAST_SHARE = 0.005
"""Of a step's time, below which the log does not name a part of it; metrics.jsonl has all."""


def line(step: int, steps: int, interval: Interval) -> str:
    """One readable line of a log interval; `metrics.jsonl` has each pair's distance too."""
    text = f"step {step}/{steps} loss {interval.loss:.4f}"
    text += "".join(f" {part} {value:.4f}" for part in PARTS if (value := getattr(interval, part)) is not None)
    if interval.not_in_loss is not None:
        text += f" (not in the loss: {' '.join(f'{part} {value:.4f}' for part, value in interval.not_in_loss.items())})"
    if interval.norms is not None:
        norms = interval.norms
        text += " norms"
        text += "".join(f" {part}:{norm:.3g}" for part in PARTS if (norm := getattr(norms, part)) is not None)
        for named in (norms.distances, norms.divergences):
            text += "".join(f" {name}:{norm:.3g}" for name, norm in (named or {}).items())
        for stone, parts in (norms.stones or {}).items():
            text += f" {stone} " + " ".join(f"{part}:{norm:.3g}" for part, norm in parts.items())
    if interval.temperature is not None:
        text += f" temperature {interval.temperature:.3f}"
    if interval.stones is not None:
        text += f" stones {interval.stones:.4f}"
    text += f" grad {interval.grad_norm:.3f} lr {interval.learning_rate:.2e}"
    text += f" {interval.tokens_per_second:,.0f} tok/s {interval.memory_gib:.2f} GiB"
    shares = {part: seconds / interval.seconds_per_step for part, seconds in interval.seconds_by_part.items()}
    return text + "".join(f" {part}:{share:.0%}" for part, share in shares.items() if share >= LEAST_SHARE)


def likeliest(learned: Mapping[str, Mapping[str, float]]) -> str:
    """Of a learned map's weights, the teacher block that weighs most for each student block, and its weight."""
    text = ""
    for student, weights in learned.items():
        block = max(weights, key=lambda name: weights[name])
        text += f" {student}<{block}:{weights[block]:.2f}"
    return text and f" map{text}"


def validation_line(step: int, steps: int, values: Values) -> str:
    """One readable line of a validation."""
    shown = ("ce", "perplexity", "kl", "agreement")
    numbers = " ".join(f"{name} {values[name]:.4f}" for name in shown if name in values)
    pairs = values.get("pairs")
    if isinstance(pairs, dict):
        numbers += f" [{' '.join(f'{name}:{value:.4f}' for name, value in pairs.items())}]"
    return f"validation {step}/{steps} {numbers}"


class Journal:
    """Writes a run's values: one log line, `metrics.jsonl`, TensorBoard, and W&B if asked for. Only rank 0 writes.

    `of`: how many students take turns in this process; the log's lines of several begin with the run's name.
    """

    def __init__(self, world: World, job: Job, *, start_step: int, steps: int, of: int = 1) -> None:
        self._main, self._steps = world.is_main, steps
        self._named = f"{job.title}: " if of > 1 else ""
        self._done, self._open = start_step, ExitStack()
        bar = progress(
            job.title, total=steps, done=start_step, unit="steps", seconds=math.inf, shown=self._main and of == 1
        )  # a file has the lines
        self._advance = self._open.enter_context(bar)
        folder = job.folder
        if not self._main:
            return
        from torch.utils.tensorboard import SummaryWriter  # takes a second, and rank 0 alone needs it

        self._file = folder / "metrics.jsonl"
        forget_after(self._file, start_step)
        self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=start_step + 1)
        self._wandb = None
        if job.train.wandb is not None:
            import wandb  # type: ignore[import-not-found]  # an extra, which need not be installed

            name = f"{job.recipe.name}-{job.title}"
            self._wandb = wandb.init(
                project=job.train.wandb,
                name=name,
                dir=str(folder),
                config=job.inputs,
                id=name,
                resume="allow",
                reinit="create_new",  # students that take turns have a run each
            )

    def write(
        self,
        step: int,
        interval: Interval,
        taken: Mapping[str, int],
        written: Mapping[str, float],
        learned: Mapping[str, Mapping[str, float]],
    ) -> None:
        """Record the interval that ends with this step. `taken`: how many rows of each source of a mixture came until then; `written`: what
        the texts are like that the student wrote for this step; `learned`: the weights of a learned map."""
        if not self._main:
            return
        text = (
            self._named + line(step, self._steps, interval) + "".join(f" {name}:{rows}" for name, rows in taken.items())
        )
        log.info(text + likeliest(learned))
        self._advance(step - self._done, f"loss {interval.loss:.3f}, {interval.tokens_per_second:,.0f} tok/s")
        self._done = step
        further: Values = {
            "sources": {**taken},
            "rollouts": {**written},
            "learned_map": {student: {**weights} for student, weights in learned.items()},
        }
        self._record(step, {**interval.values(), **{name: values for name, values in further.items() if values}})

    def write_validation(self, step: int, values: Values) -> None:
        """Record a validation after this step, in a line of its own."""
        if self._main:
            log.info(self._named + validation_line(step, self._steps, values))
            self._record(step, {"validation": values})

    def _record(self, step: int, values: Values) -> None:
        with self._file.open("a") as file:
            file.write(json.dumps({"step": step, **values}) + "\n")
        flat = _flat(values)
        for key, value in flat.items():
            self._board.add_scalar(key, value, step)
        if self._wandb is not None:
            self._wandb.log(flat, step=step)

    def close(self) -> None:
        """Flush what is buffered."""
        self._open.close()
        if self._main:
            self._board.close()
            if self._wandb is not None:
                self._wandb.finish()


def _flat(values: Values, prefix: str = "") -> dict[str, float]:
    """Nested values by names with slashes."""
    flat: dict[str, float] = {}
    for key, value in values.items():
        flat |= _flat(value, f"{prefix}{key}/") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


class Spent(NamedTuple):
    """What the steps of this start of a run took."""

    seconds: float
    of_validation: float
    of_writing: float
    tokens: int
    by_part: Mapping[Part, float]
    of_a_step: Mapping[str, object] | None

    @property
    def of_training(self) -> float:
        """Seconds of the steps alone."""
        return self.seconds - self.of_validation - self.of_writing

    def told(self, run: PreparedRun, steps: int, last: Interval | None) -> dict[str, object]:
        """As summary.json has it, of a run of so many steps. `last`: None where none of them was logged."""
        return {
            "seconds": self.seconds,
            "validation_seconds": self.of_validation,
            "teacher_seconds": self.by_part.get("teacher", 0.0) + self.by_part.get("wire", 0.0),
            "seconds_by_part": {**self.by_part},
            "step": self.of_a_step,
            "tokens": self.tokens,
            "tokens_per_second": self.tokens / self.of_training if self.tokens else None,
            "memory_gib": peak_memory_gib() if last is None else last.memory_gib,  # a run of 0 steps has no interval
            "last": {} if last is None else last.values(),
            "sources": run.taken(steps),
            "rollouts": {**run.writing(self.seconds)},
            "teachers_texts": {**run.source.teachers_texts},
        }


def model_meta(job: Job, steps: int, keeping: Keeping) -> dict[str, object]:
    """What an exported model's llmkd.json says of its making."""
    meta: dict[str, object] = {
        "llmkd": __version__,
        "inputs": job.inputs,
        "pairs": job.pairs,
        "strategy": job.recipe.matching.strategy,
        "steps": steps,
    }
    if job.train.validate_every:
        kept = keeping.kept
        meta["validation"] = keeping.rule
        meta["kept"] = None if kept is None else {"step": kept.step, "value": kept.value}
    return meta


def made_with() -> dict[str, object]:
    """What a run was made with, as summary.json has it."""
    return {
        "versions": versions("torch", "deepspeed", "transformers"),
        "hardware": hardware(),
        "commit": commit(),
    }


def model_card(job: Job, steps: int, learned: Mapping[str, Mapping[str, float]]) -> str:
    """The exported model's README: what it is, and the recipe that made it. `learned`: the weights of a learned map at the last step."""
    mixed = likeliest(learned).removeprefix(" map ")
    weights = (
        f"- likeliest teacher blocks of the learned map at the last step, and their weights: {mixed}\n" if mixed else ""
    )
    lora = build.adapters(job)
    trained = "" if lora is None else f"- trained: adapters of rank {lora.rank} alone{_kept(lora.quantize)}\n"
    teacher = f"{job.recipe.teacher_path}{_kept(job.recipe.teacher.quantize)}" if job.teacher else "none"
    return (
        f"# {escaped(f'{job.recipe.name}: {job.title}')}\n\nTrained by llmkd {__version__}, {steps} steps.\n\n"
        f"- started from: {_start(job)}\n{trained}"
        f"- teacher: {teacher}\n"
        f"- layer map (student<teacher, 0-based blocks): {', '.join(job.names) or 'none'}\n{weights}"
        f"\n## Recipe\n\n{fenced(dump_recipe(job.recipe), 'yaml')}\n"
    )


def _kept(quantize: str) -> str:
    """How the weights of a model's blocks were kept in training, for the card."""
    return "" if quantize == "none" else f", the blocks' weights kept in 4 bits ({quantize})"


def _start(job: Job) -> str:
    """What a model was before its first step; the folder of one that the run made is gone, or only a base."""
    student, finetune = job.recipe.student, job.recipe.finetune
    if job.initial.parent != job.folder:
        return str(job.initial)
    if job.makes_teacher:
        assert finetune is not None
        return "a new model" if finetune.path is None else f"{finetune.path}, with new classes"
    if student.adapter is not None:
        return f"{student.path} with the adapters of {student.adapter}"
    return "copies of the teacher's blocks" if student.init == "teacher" else "random weights"
