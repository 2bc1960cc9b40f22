"""A whole step reads nothing of the device but what DeepSpeed's optimizer asks for: the gradient's norm, and whether it is finite."""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
from torch.utils._python_dispatch import TorchDispatchMode

from llmkd import train as loop
from llmkd.recipe.recipe import load_recipe
from llmkd.training import jobs
from tests.unit.student.test_device_reads import READS

PACKAGES = ("llmkd", "deepspeed", "transformers")


class ReadBy(TorchDispatchMode):
    """Counts the operations whose result the host waits for, by the package that asked for it."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket.__name__ in READS:
            frame = sys._getframe(1)
            while frame is not None and _package(frame) not in PACKAGES:
                frame = frame.f_back
            self.counts["others" if frame is None else _package(frame)] += 1
        return func(*args, **(kwargs or {}))


def _package(frame: FrameType) -> str:
    return str(frame.f_globals.get("__name__")).partition(".")[0]


@pytest.mark.parametrize("stage", [1, 3])
def test_only_the_optimizer_reads(tiny: Path, world: Any, tmp_path: Path, stage: int) -> None:
    """Between the beginnings of two steps that log nothing, with two micro-batches and matched pairs."""
    seen: list[Counter[str]] = []

    def counts(*of_step: Any) -> Any:  # the first thing in a step
        seen.append(Counter(reads.counts))
        return real(*of_step)

    changes = {
        "train.deepspeed": str(tiny / f"zero{stage}.json"),
        "train.micro_batch_size": 4,
        "train.log_every": 100,
        "train.steps": 4,
        "train.warmup_steps": 0,
    }
    recipe = load_recipe(tiny / "recipe.yaml").changed(changes)
    with ReadBy() as reads, pytest.MonkeyPatch.context() as patch:
        real = loop._counts
        patch.setattr(loop, "_counts", counts)
        assert loop.train(world, jobs.distil_job(world, recipe, tmp_path / "run"))
    of_step = seen[2] - seen[1]
    assert of_step.keys() <= {"deepspeed"}, of_step
    assert 0 < of_step["deepspeed"] <= 12
    assert reads.counts["llmkd"] > 0  # at the end it does read: the count is no count of nothing
