"""A folder in which one run works with all its ranks, and which every node must therefore see."""

from __future__ import annotations

import contextlib
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path

from llmkd.distributed.ranks import World, gather, on_main
from llmkd.errors import InputError
from llmkd.processes import LOCK, only_one_in

LOOKS_SECONDS = 30.0
"""How long a node looks for what another has just written: network file systems remember for a while what a folder held."""


@contextlib.contextmanager
def only_run_in(world: World, folder: Path) -> Iterator[None]:
    """Inside, no other run is in this folder, and every node sees it and may write there (all ranks take part)."""
    with contextlib.ExitStack() as held:
        on_main(world, lambda: held.enter_context(only_one_in(folder)))
        _check_shared(world, folder)
        yield


def _check_shared(world: World, folder: Path) -> None:
    """Raise InputError where a node does not see the lock that rank 0 holds, or may not write beside it (all ranks take part)."""
    if world.size == 1:
        return
    token = on_main(world, lambda: (folder / LOCK).read_text())
    sees = _sees(folder / LOCK, token, min(LOOKS_SECONDS, world.timeout.total_seconds() / 3))
    wrong = None if sees and os.access(folder, os.W_OK) else "may not write in it" if sees else "does not"
    answers = gather(world, None if wrong is None else (socket.gethostname(), wrong))
    for host, how in filter(None, answers):
        raise InputError(
            f"{folder}: rank 0 has this folder, and node {host} {how}; all nodes must share it: choose one on a network file system "
            "(`output` or `name` in the recipe, or --output of llmkd train), or mount it there"
        )


def _sees(file: Path, token: str, seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while True:
        with contextlib.suppress(OSError):
            os.listdir(file.parent)  # has an NFS client ask its server again
            if file.read_text() == token:
                return True
        if time.monotonic() > deadline:
            return False
        time.sleep(0.2)
