"""Ranks that cannot meet: one sentence with the address and the cure, in the time that the recipe gives."""

from __future__ import annotations

import os
import socket
import subprocess
import sys

import pytest

CODE = """
from llmkd.distributed.ranks import LostRank, lost_rank, silent_ranks, start
try:
    start(3)
except LostRank as error:
    assert lost_rank(error) and silent_ranks() is None
    print(error)
"""


def _alone(port: int) -> str:
    """What rank 0 of two says that nobody joins."""
    environment = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    process = subprocess.run(
        [sys.executable, "-c", CODE], env={**os.environ, **environment}, capture_output=True, text=True, timeout=300
    )
    assert process.returncode == 0, process.stderr
    return process.stdout


@pytest.mark.parametrize("in_use", [True, False])
def test_ranks_that_do_not_meet_are_one_sentence(in_use: bool) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        port = other.getsockname()[1]
        if in_use:
            other.listen()
            assert _alone(port).startswith(
                f"another process of this machine uses port {port}: give the launcher another"
            )
            return
    sentence = _alone(port)
    assert (
        sentence.startswith(f"the 2 ranks did not meet at 127.0.0.1:{port} within 3 s (rank 0: ")
        and sentence.count("\n") == 1
    )
    assert "start a rank for each, and see that every node reaches that address" in sentence
