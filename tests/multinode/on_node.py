"""A module's `main()` on a node of the tests: a fork that has its imports already moves there, which is quicker than a start from nothing.

It takes the node's network, host name and mounts, and stays a process of this machine by its number.
"""

from __future__ import annotations

import ctypes
import importlib
import json
import os
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from llmkd.files import ROOT
from llmkd.starting import Process
from tests.distributed.warm import forked, warm_server
from tests.multinode.nodes import PORT, Node

CLONE_NEWNS = 0x20000
SERVERS = 2
"""Of which ranks are forked: as many as the other tests have."""


def start_ranks(
    places: Sequence[Node],
    module: str,
    arguments: Sequence[str],
    logs: Path,
    only: Iterable[int] | None = None,
    **variables: str,
) -> list[Process]:
    """The module's `main()` on each rank's node, as a launcher starts it; what rank N says goes to logs/rankN.log.

    `only`: the ranks that are started at all.
    """
    logs.mkdir(parents=True, exist_ok=True)
    for server in range(SERVERS):  # all import at once
        warm_server(server)
    on_node, before = Counter(node.name for node in places), Counter[str]()
    local = []
    for node in places:
        local.append(before[node.name])
        before[node.name] += 1
    size = {"WORLD_SIZE": str(len(places)), "MASTER_ADDR": places[0].address, "MASTER_PORT": str(PORT)}
    return [
        forked(
            "tests.multinode.on_node",
            [str(places[rank].first), module, *arguments],
            logs / f"rank{rank}.log",
            rank=rank % SERVERS,
            variables={
                **size,
                "RANK": str(rank),
                "LOCAL_RANK": str(local[rank]),
                "LOCAL_WORLD_SIZE": str(on_node[places[rank].name]),
                **variables,
            },
            name=f"llmkd rank {rank}",
            group=True,
        )
        for rank in (range(len(places)) if only is None else only)
    ]


def run_on(places: Sequence[Node], recipe: Path, scenarios: dict[str, dict[str, Any]], output: Path) -> dict[str, str]:
    """As `tests.distributed.runner.run_on_ranks`, on these nodes."""
    output.mkdir(parents=True, exist_ok=True)
    tasks = output / "tasks.json"
    tasks.write_text(json.dumps({"recipe": str(recipe), "scenarios": scenarios, "output": str(output)}))
    ranks = start_ranks(places, "tests.distributed.runner", [str(tasks)], output)
    codes = [rank.wait(timeout=800) for rank in ranks]
    said = [(output / f"rank{rank}.log").read_text()[-3000:] for rank in range(len(ranks))]
    assert codes == [0] * len(ranks), "\n".join(said)
    return json.loads((output / "refused.json").read_text())


def main() -> None:
    """Of a rank: move, then do what it is for."""
    first, module, *arguments = sys.argv[1:]
    library = ctypes.CDLL(None, use_errno=True)
    # opened before the first move: a node has a /proc of its own, with other numbers
    for space in [Path(f"/proc/{first}/ns/{kind}").open() for kind in ("net", "uts", "mnt")]:
        with space:
            if library.setns(space.fileno(), 0):
                raise OSError(ctypes.get_errno(), f"can't enter {space.name}")
    # and for one that still has this machine's numbers, its /proc
    if library.unshare(CLONE_NEWNS) or library.mount(b"proc", b"/proc", b"proc", 0, None):
        raise OSError(ctypes.get_errno(), "can't mount /proc")
    os.chdir(ROOT)
    sys.argv[1:] = arguments
    importlib.import_module(module).main()
