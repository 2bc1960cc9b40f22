"""What is done about a NaN or an infinity: nothing that holds one is saved or exported, and its cause is named with a cure that works."""

from __future__ import annotations

import math
from typing import Any

from torch import nn

from llmkd.distributed.engines import unusable_weights
from llmkd.distributed.ranks import World
from llmkd.errors import ANOTHER_FOLDER, FoundByAll, InputError
from llmkd.training.jobs import Job
from llmkd.training.metrics import Interval


def check_start(world: World, job: Job, model: nn.Module) -> None:
    """Raise InputError where the weights that a run starts from are not all finite (all ranks take part)."""
    if names := unusable_weights(world, model):
        if job.makes_teacher:
            cure = "give finetune another model"
        elif job.recipe.student.init == "checkpoint":
            cure = "give another student.path"
        else:
            cure = f"a student's weights are its teacher's: look into {job.recipe.teacher_path}"
        raise InputError(f"{job.initial}: {_listed(names)} before the first step; {cure}")


def check_weights(world: World, job: Job, model: nn.Module, step: int) -> None:
    """Raise FoundByAll where the weights after a step are not all finite; before they are saved or exported (all ranks take part)."""
    if names := unusable_weights(world, model):
        raise FoundByAll(f"after step {step} {_listed(names)}: the training has diverged; {_cure(job)}")


def check_gradient(job: Job, engine: Any, step: int) -> None:
    """Raise FoundByAll where the optimizer left a step out because a gradient was not finite, as DeepSpeed does on all ranks alike."""
    if engine.skipped_steps:
        raise FoundByAll(
            f"step {step}: a gradient holds a NaN or an infinity, so that step was left out; {_wider(job)}{_cure(job)}"
        )


def check_loss(world: World, job: Job, model: nn.Module, step: int, interval: Interval) -> None:
    """Raise FoundByAll that names the cause where the loss is not a finite number (all ranks take part)."""
    if math.isfinite(interval.loss):
        return
    check_weights(world, job, model, step)
    problem = f"the loss is {interval.loss} at step {step}, though the student's weights are finite"
    ce = interval.ce if interval.ce is not None else (interval.not_in_loss or {}).get("ce")
    if job.teacher is not None and (ce is None or math.isfinite(ce)):
        own = "" if ce is None else " and so is its own cross-entropy"
        raise FoundByAll(
            f"{problem}{own}: the teacher's states or logits are not; look for a NaN in the weights of "
            f"{job.recipe.teacher_path}, or write teacher.dtype: float32"
        )
    raise FoundByAll(f"{problem}: its states overflow {job.train.dtype}; {_wider(job)}{_cure(job)}")


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - 1} other parameters hold" if len(names) > 1 else " holds"
    return f"{names[0]}{more} a NaN or an infinity"


def _section(job: Job) -> str:
    return "finetune.train" if job.makes_teacher else "train"


def _wider(job: Job) -> str:
    """The cure of a larger range of numbers, where there is one."""
    return "" if job.train.dtype == "float32" else f"write {_section(job)}.dtype: float32, or "


def _cure(job: Job) -> str:
    section = _section(job)
    return (
        f"lower {section}.learning_rate or {section}.clip, and {ANOTHER_FOLDER} or remove {job.folder}, whose checkpoints go on with "
        "their own recipe only"
    )
