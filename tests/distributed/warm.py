"""The servers that fork the tests' ranks: one for each rank, since ranks that are started by themselves hash their strings differently.

The first rank's is also the one that `llmkd.starting` asks in this process.
The tests of studies start their ranks as users do, those of `llmkd train` and of faults too but for the imports (command.py).
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from llmkd import starting
from llmkd.forkserver import Order
from llmkd.starting import IMPORTS, Process, Server

MODULES = (
    *IMPORTS,
    "tests.distributed.runner",
    "tests.distributed.command",
    "tests.distributed.teachers",
    # what a run of the tests' models imports as it goes
    "transformers.models.qwen3.modeling_qwen3",
    "deepspeed.module_inject.auto_ep_layer",
    "deepspeed.runtime.superoffload.superoffload_stage3",
)


def warm_server(rank: int) -> Server:
    """The server that forks this rank, started where there is none for the environment as it is now."""
    if rank == 0:
        return starting.server()
    server, now = _servers.get(rank), starting.environment()
    if server is None or not server.fits(now):
        if server is not None:
            server.close()
        _servers[rank] = server = Server(now, MODULES)
    return server


def forked(
    module: str,
    arguments: list[str],
    output: Path,
    errors: Path | None = None,
    *,
    rank: int = 0,
    variables: Mapping[str, str] | None = None,
    name: str = "llmkd",
    group: bool = False,
) -> Process:
    """The module's `main()` in a fork of a rank's server; what it says goes to the file `output`, its stderr to `errors` if given."""
    order = Order(module, arguments, dict(variables or {}), os.getcwd(), name, group)
    server = warm_server(rank)
    output.write_text("")
    with open(os.devnull) as nothing, output.open("a") as said, (errors or output).open("a") as wrong:
        return server.start(order, (nothing.fileno(), said.fileno(), wrong.fileno()))


_servers: dict[int, Server] = {}
