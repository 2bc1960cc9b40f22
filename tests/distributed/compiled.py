"""Training runs that count the graphs of their compiled blocks. A graph is run as PyTorch's own operations: no compiler is needed."""

from __future__ import annotations

import functools
import json
import sys
from typing import Any

import torch
import torch._dynamo as dynamo
from torch._dynamo.utils import counters

import llmkd.train  # noqa: F401  (what is changed below)
from llmkd.distributed.ranks import World
from llmkd.training import checks
from llmkd.training.jobs import Job
from tests.distributed import runner

TRACED = "traced"
"""The name of a run whose graphs are run as Dynamo traces them; those of others pass AOT autograd too, which takes twice the time."""


def main() -> None:
    """As `runner.main`; each run writes how many graphs there were after each of its steps' micro-batches into graphs-RANK.json."""
    compile_ = torch.compile
    checks.lacking_to_compile = lambda **options: None  # type: ignore[assignment]
    loop: Any = sys.modules["llmkd.train"]
    prepare = loop.prepare

    def prepared(world: World, job: Job, *given: Any) -> Any:
        backend = "eager" if job.folder.name == TRACED else "aot_eager"
        torch.compile = functools.partial(compile_, backend=backend)
        dynamo.reset()
        counters.clear()
        run = prepare(world, job, *given)
        graphs: list[dict[str, int]] = []
        step = run.engine.step

        def noting() -> None:
            step()
            breaks = sum(counters["graph_break"].values())
            graphs.append({"graphs": counters["stats"]["unique_graphs"], "breaks": breaks})
            (job.folder / f"graphs-{world.rank}.json").write_text(json.dumps(graphs))

        run.engine.step = noting
        return run

    loop.prepare = prepared
    runner.main()
