"""Training runs on ranks that keep each step's weights and gradients, for comparison."""

from __future__ import annotations

import functools
import sys
from typing import Any

from deepspeed.utils import safe_get_full_grad
from safetensors.torch import save_file

import llmkd.train  # noqa: F401  (what is changed below)
from llmkd.distributed.engines import whole_state
from llmkd.distributed.ranks import World
from llmkd.training.jobs import Job
from tests.distributed import runner


def keep(world: World, run: Any, job: Job, step: Any) -> None:
    """The optimizer's step, before which a batch's weights and gradients are kept (all ranks take part)."""
    if run.engine.is_gradient_accumulation_boundary():
        parameters = dict(run.module.model.named_parameters())
        gradients = {name: safe_get_full_grad(parameter) for name, parameter in parameters.items()}
        weights = whole_state(run.module.model, here=True)
        if world.is_main:
            kept = {"gradients": gradients, "weights": weights}
            for kind, tensors in kept.items():
                whole = {name: tensor.detach().clone().contiguous().cpu() for name, tensor in tensors.items()}
                save_file(whole, job.folder / f"{kind}-{run.engine.global_steps}.safetensors")
    step()


def main() -> None:
    """As `runner.main`, each run keeping what `keep` keeps."""
    loop: Any = sys.modules["llmkd.train"]
    prepare = loop.prepare

    def prepared(world: World, job: Job, *given: Any) -> Any:
        run = prepare(world, job, *given)
        run.engine.step = functools.partial(keep, world, run, job, run.engine.step)
        return run

    loop.prepare = prepared
    runner.main()
