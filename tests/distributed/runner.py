"""Real training runs in one process group, one after another."""

from __future__ import annotations

import json
import logging
import socket
import sys
from pathlib import Path
from typing import Any

from llmkd.starting import Process
from tests.distributed.warm import forked, warm_server


def run_on_ranks(
    ranks: int,
    recipe: Path,
    scenarios: dict[str, dict[str, Any]],
    output: Path,
    *,
    timeout: int = 600,
    module: str = "tests.distributed.runner",
) -> dict[str, str]:
    """Run every scenario (name -> recipe changes) on `ranks` gloo ranks into `output/<name>`; name -> error of those refused.

    A scenario with the change `only` = "cache" writes the recipe's cache and trains nothing. `module`: another with a `main()` like this
    one's.
    """
    output.mkdir(parents=True, exist_ok=True)
    tasks = output / "tasks.json"
    tasks.write_text(json.dumps({"recipe": str(recipe), "scenarios": scenarios, "output": str(output)}))
    codes = [process.wait(timeout=timeout) for process in start_ranks(ranks, module, tasks, output)]
    assert codes == [0] * ranks, "\n".join((output / f"rank{rank}.log").read_text()[-3000:] for rank in range(ranks))
    return json.loads((output / "refused.json").read_text())


def start_ranks(ranks: int, module: str, tasks: Path, output: Path, *, nodes: int = 1) -> list[Process]:
    """The module's `main()` on every rank, with TASKS as its argument; what rank N says goes to output/rankN.log.

    `nodes`: how many machines they take themselves to be on.
    """
    local = ranks // nodes
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    size = {
        "WORLD_SIZE": str(ranks),
        "LOCAL_WORLD_SIZE": str(local),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    for rank in range(ranks):  # all import at once
        warm_server(rank)
    return [
        forked(
            module,
            [str(tasks)],
            output / f"rank{rank}.log",
            rank=rank,
            variables={**size, "RANK": str(rank), "LOCAL_RANK": str(rank % local)},
            name=f"llmkd rank {rank}",
            group=True,
        )
        for rank in range(ranks)
    ]


def main() -> None:
    """Every rank's part of `run_on_ranks`."""
    from llmkd.distributed import ranks as distributed
    from llmkd.errors import InputError
    from llmkd.recipe.recipe import load_recipe
    from llmkd.train import Stopping, train
    from llmkd.training import jobs, write_cache

    work = json.loads(Path(sys.argv[1]).read_text())
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
