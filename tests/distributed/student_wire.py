"""What a rank sends for the student itself, counted where torch.distributed is called: `main` on every rank."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

from llmkd import train as loop
from llmkd.distributed import ranks
from llmkd.recipe.recipe import Recipe, load_recipe
from llmkd.training import jobs
from tests.wire_bytes import bytes_of


class StudentWire(TorchDispatchMode):
    """Inside, adds up what the rings of all collectives make this rank send: of weights and gradients, not of small values."""

    SMALL = 256

    def __init__(self) -> None:
        super().__init__()
        self.reduced = self.gathered = 0.0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(func)
        if name.startswith("c10d."):
            whole, share = max(map(bytes_of, args[:2])), (dist.get_world_size() - 1) / dist.get_world_size()
            if whole > self.SMALL:
                if "allreduce" in name:
                    self.reduced += 2 * share * bytes_of(args[0])
                elif "reduce_scatter" in name:
                    self.reduced += share * whole
                elif "reduce" in name:
                    self.reduced += share * bytes_of(args[0])
                elif "allgather" in name:
                    self.gathered += share * whole
        return func(*args, **(kwargs or {}))


def sent_per_step(world: Any, recipe: Recipe, folder: Path) -> dict[str, float]:
    """Bytes sent from the beginning of the second step to that of the third."""
    seen: list[tuple[float, float]] = []

    def counts(*of_step: Any) -> Any:  # the first thing that ranks do together in a step
        seen.append((wire.reduced, wire.gathered))
        return real(*of_step)

    with StudentWire() as wire, pytest.MonkeyPatch.context() as patch:
        real = loop._counts
        patch.setattr(loop, "_counts", counts)
        loop.train(world, jobs.distil_job(world, recipe, folder))
    (_, second, third) = seen
    return {"reduced": third[0] - second[0], "gathered": third[1] - second[1]}


def main() -> None:
    """Every rank's part: each scenario is the changes of a recipe; results go to rankN.json."""
    work = json.loads(Path(sys.argv[1]).read_text())
    ranks.quiet()
    world = ranks.start(60)
    found = {}
    for name, changes in work["scenarios"].items():
        recipe = load_recipe(work["recipe"]).changed(changes)
        found[name] = sent_per_step(world, recipe, Path(work["output"]) / name)
    (Path(work["output"]) / f"rank{world.rank}.json").write_text(json.dumps(found))
    ranks.stop()
