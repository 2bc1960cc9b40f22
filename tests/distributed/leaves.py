"""Training runs that count their collectives, with blocks that ZeRO-3 gathers whole, or linear map by linear map."""

from __future__ import annotations

import functools
import json
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch.distributed import ProcessGroup

import llmkd.train  # noqa: F401  (what is changed below)
from llmkd.distributed import engines
from llmkd.distributed.ranks import World
from llmkd.files import ROOT
from llmkd.training.jobs import Job
from tests.distributed import runner

APART = "_apart"
"""Ends the name of a run whose blocks are gathered as DeepSpeed does by itself."""
COUNTED = {"gathers": ("all", "gather"), "reductions": ("reduce",)}
"""What the names of collectives hold, some of which another torch calls otherwise."""
_calls: Counter[str] = Counter()


def nothing_kept(folder: Path) -> str:
    """A DeepSpeed file after which no weight stays gathered from one block to another, not even a norm's."""
    cpu = json.loads((ROOT / "ds_configs" / "cpu.json").read_text())
    little = {"stage3_param_persistence_threshold": 0, "stage3_max_reuse_distance": 0, "stage3_max_live_parameters": 1}
    file = folder / "nothing_kept.json"
    file.write_text(json.dumps({**cpu, "zero_optimization": {**cpu["zero_optimization"], **little}}))
    return str(file)


def _counted(kind: str, call: Callable[..., Any]) -> Callable[..., Any]:
    def counting(*args: Any, **options: Any) -> Any:
        _calls[kind] += 1
        return call(*args, **options)

    return counting


def note(world: World, job: Job, steps: list[dict[str, float]], run: Any, step: Callable[[], None]) -> None:
    """The engine's step; after a batch's last, what this rank's process has done so far is added to leaves-RANK.json."""
    ends = run.engine.is_gradient_accumulation_boundary()
    step()
    if ends:
        steps.append({**_calls, "cpu_seconds": time.process_time()})
        (job.folder / f"leaves-{world.rank}.json").write_text(json.dumps(steps))


def main() -> None:
    """As `runner.main`; a run whose name ends with `APART` does without leaf modules."""
    for kind, parts in COUNTED.items():
        for name in [name for name in dir(ProcessGroup) if all(part in name for part in parts)]:
            setattr(ProcessGroup, name, _counted(kind, getattr(ProcessGroup, name)))
    loop: Any = sys.modules["llmkd.train"]
    prepare, mark = loop.prepare, engines.set_z3_leaf_module

    def prepared(world: World, job: Job, *given: Any) -> Any:
        engines.set_z3_leaf_module = (lambda module, flag: None) if job.folder.name.endswith(APART) else mark
        run = prepare(world, job, *given)
        run.engine.step = functools.partial(note, world, job, [], run, run.engine.step)
        return run

    loop.prepare = prepared
    runner.main()
