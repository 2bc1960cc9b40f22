"""Ranks that cannot meet: one sentence with the address and the cure, in the time that the recipe gives."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time

import pytest

CODE = """
from llmkd.distributed.ranks import LostRank, lost_rank, silent_ranks, start
try:
    start(3)
except LostRank as error:
    assert lost_rank(error) and silent_ranks() is None
    print(error)
"""


def _alone(port: int, **more: str) -> str:
    """What rank 0 of four says that nobody joins."""
    environment = {"RANK": "0", "WORLD_SIZE": "4", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), **more}
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
    start = f"the 4 ranks did not meet at 127.0.0.1:{port} within %d s (missing: 1-3): start a rank for each, see that every node"
    sentence = _alone(port)
    assert sentence.startswith(start % 3) and sentence.count("\n") == 1
    assert (
        "reaches that address, and where nodes start that far apart set LLMKD_JOIN_SECONDS to more seconds" in sentence
    )
    assert _alone(port, LLMKD_JOIN_SECONDS="1").startswith(start % 1)  # less than the recipe's timeout


def test_the_ranks_that_are_missing_are_named() -> None:
    """Long before the recipe's timeout of half an hour; rank 0 tells it first, so that the launcher ends the others."""
    code = CODE.replace("start(3)", "start(1800)")
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        port = other.getsockname()[1]
    environment = {**os.environ, "WORLD_SIZE": "5", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    began = time.monotonic()
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", code],
            env={**environment, "RANK": str(rank), "LLMKD_JOIN_SECONDS": "25"},
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in (0, 2)
    ]
    sentences = [rank.communicate(timeout=280)[0] for rank in ranks]
    assert time.monotonic() - began < 250
    assert "within 25 s (missing: 1, 3-4): start a rank for each" in sentences[0], sentences
    assert sentences[1].startswith("the 5 ranks did not meet at "), sentences


def test_a_rank_without_its_launchers_variables_is_refused() -> None:
    code = "from llmkd.distributed.ranks import start\nstart(3)"
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("MASTER_", "WORLD_"))}
    done = subprocess.run([sys.executable, "-c", code], env=environment | {"RANK": "0"}, capture_output=True, text=True)
    assert "InputError: RANK is set and WORLD_SIZE and MASTER_ADDR and MASTER_PORT not: start with" in done.stderr
