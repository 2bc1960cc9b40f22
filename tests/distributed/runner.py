"""Real training runs in one process group, one after another."""

from __future__ import annotations

import json
import logging
import os
import socket
from pathlib import Path
from typing import Any

from tests.distributed.warm import WarmProcess, warm_process


def run_on_ranks(
    ranks: int, recipe: Path, scenarios: dict[str, dict[str, Any]], output: Path, *, timeout: int = 600
) -> dict[str, str]:
    """Run every scenario (name -> recipe changes) on `ranks` gloo ranks into `output/<name>`; name -> error of those refused.

    A scenario with the change `only` = "cache" writes the recipe's cache and trains nothing.
    """
    output.mkdir(parents=True, exist_ok=True)
    tasks = output / "tasks.json"
    tasks.write_text(json.dumps({"recipe": str(recipe), "scenarios": scenarios, "output": str(output)}))
    codes = [process.wait(timeout=timeout) for process in start_ranks(ranks, "tests.distributed.runner", tasks, output)]
    assert codes == [0] * ranks, "\n".join((output / f"rank{rank}.log").read_text()[-3000:] for rank in range(ranks))
    return json.loads((output / "refused.json").read_text())


def start_ranks(ranks: int, module: str, tasks: Path, output: Path) -> list[WarmProcess]:
    """`main(TASKS)` of the module on every rank; what rank N says goes to output/rankN.log."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    size = {
        "WORLD_SIZE": str(ranks),
        "LOCAL_WORLD_SIZE": str(ranks),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    processes = [warm_process(rank) for rank in range(ranks)]
    for rank, process in enumerate(processes):
        env = {**os.environ, **size, "RANK": str(rank), "LOCAL_RANK": str(rank)}
        process.start(module, tasks, env, output / f"rank{rank}.log")
    return processes


def main(tasks: Path) -> None:
    """Every rank's part of `run_on_ranks`."""
    from llmkd.distributed import ranks as distributed
    from llmkd.errors import InputError
    from llmkd.recipe.recipe import load_recipe
    from llmkd.train import Stopping, train
    from llmkd.training import jobs, write_cache

    work = json.loads(tasks.read_text())
    distributed.quiet()
    world = distributed.start(120)
    logging.basicConfig(level=logging.INFO, format="%(message)s", force=True)
    refused = {}
    for name, changes in work["scenarios"].items():
        print(f"=== {name}", flush=True)
        try:
            only = changes.pop("only", None)
            recipe = load_recipe(work["recipe"]).changed(changes)
            if only == "cache":
                assert write_cache.cache(world, recipe, Stopping())
                continue
            train(world, jobs.distil_job(world, recipe, Path(work["output"]) / name))
        except InputError as error:
            refused[name] = str(error)
    if world.is_main:
        (Path(work["output"]) / "refused.json").write_text(json.dumps(refused))
    distributed.stop()
