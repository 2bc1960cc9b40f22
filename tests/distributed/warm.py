"""The servers that fork the tests' ranks: one for each rank, since ranks that are started by themselves hash their strings differently.

The tests of studies start their ranks as users do, those of `llmkd train` and of faults too but for the imports (command.py).
"""

from __future__ import annotations

from llmkd import starting
from llmkd.starting import IMPORTS, Server

MODULES = (
    *IMPORTS,
    "tests.distributed.runner",
    "tests.distributed.command",
    "tests.distributed.teachers",
    # what a run of the tests' models imports as it goes
    "transformers.models.qwen3.modeling_qwen3",
)


def warm_server(rank: int) -> Server:
    """The server that forks this rank, started where there is none for the environment as it is now."""
    server, now = _servers.get(rank), starting.environment()
    if server is None or not server.fits(now):
        if server is not None:
            server.close()
        _servers[rank] = server = Server(now, MODULES)
    return server


_servers: dict[int, Server] = {}
