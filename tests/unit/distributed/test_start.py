"""Ranks that cannot meet: one sentence with the address and the cure, in the time that the recipe gives."""

from __future__ import annotations

import os
import socket
import sys
import time
from pathlib import Path

import pytest

from llmkd.distributed import ranks
from llmkd.distributed.ending import lost_rank, silent_ranks
from llmkd.distributed.joining import LostRank
from llmkd.distributed.ranks import start
from tests.distributed.warm import forked

MODULE = "tests.unit.distributed.test_start"


def main() -> None:
    """Of a rank: what it says where nobody joins in so many seconds."""
    try:
        start(int(sys.argv[1]))
    except LostRank as error:
        assert lost_rank(error) and silent_ranks() is None
        print(error)


def _alone(port: int, output: Path, **more: str) -> str:
    """What rank 0 of four says that nobody joins."""
    variables = {"RANK": "0", "WORLD_SIZE": "4", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), **more}
    errors = output.with_suffix(".errors")
    code = forked(MODULE, ["3"], output, errors, variables=variables).wait(300)
    assert code == 0, errors.read_text()
    return output.read_text()


@pytest.mark.parametrize("in_use", [True, False])
def test_ranks_that_do_not_meet_are_one_sentence(in_use: bool, tmp_path: Path) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        port = other.getsockname()[1]
        if in_use:
            other.listen()
            assert _alone(port, tmp_path / "said").startswith(
                f"another process of this machine uses port {port}: give the launcher another"
            )
            return
    start = f"the 4 ranks did not meet at 127.0.0.1:{port} within %d s (missing: 1-3): start a rank for each, see that every node"
    sentence = _alone(port, tmp_path / "said")
    assert sentence.startswith(start % 3) and sentence.count("\n") == 1
    assert (
        "reaches that address, and where nodes start that far apart set LLMKD_JOIN_SECONDS to more seconds" in sentence
    )
    assert _alone(port, tmp_path / "said", LLMKD_JOIN_SECONDS="1").startswith(
        start % 1
    )  # less than the recipe's timeout


def test_the_ranks_that_are_missing_are_named(tmp_path: Path) -> None:
    """Long before the recipe's timeout of half an hour; rank 0 tells it first, so that the launcher ends the others."""
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        port = other.getsockname()[1]
    variables = {"WORLD_SIZE": "5", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "LLMKD_JOIN_SECONDS": "10"}
    files = [tmp_path / rank for rank in "02"]
    began = time.monotonic()
    ranks = [
        forked(MODULE, ["1800"], file, tmp_path / "errors", variables={**variables, "RANK": file.name})
        for file in files
    ]
    assert [rank.wait(280) for rank in ranks] == [0, 0]
    assert time.monotonic() - began < 250
    sentences = [file.read_text() for file in files]
    assert "within 10 s (missing: 1, 3-4): start a rank for each" in sentences[0], sentences
    assert sentences[1].startswith("the 5 ranks did not meet at "), sentences


def test_a_rank_without_its_launchers_variables_is_refused(tmp_path: Path) -> None:
    assert forked(MODULE, ["3"], tmp_path / "said", variables={"RANK": "0"}).wait(300) == 1
    said = (tmp_path / "said").read_text()
    assert "InputError: RANK is set and WORLD_SIZE and MASTER_ADDR and MASTER_PORT not: start with" in said


@pytest.mark.parametrize(
    ("said", "threads"),
    [
        ({}, 12),
        ({"LOCAL_WORLD_SIZE": "2"}, 6),
        ({"LOCAL_WORLD_SIZE": "2", "LLMKD_RUNS": "3"}, 2),
        ({"LOCAL_WORLD_SIZE": "8", "LLMKD_RUNS": "3"}, 1),
        ({"LLMKD_RUNS": "3", "OMP_NUM_THREADS": "5"}, None),
    ],
)
def test_ranks_and_the_runs_beside_them_share_the_cores_unless_the_user_says_how(
    monkeypatch: pytest.MonkeyPatch, said: dict[str, str], threads: int | None
) -> None:
    for name in ("LOCAL_WORLD_SIZE", "LOCAL_SIZE", "LLMKD_RUNS", "OMP_NUM_THREADS"):
        monkeypatch.delenv(name, raising=False)
    for name, value in said.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(12)))
    given: list[int] = []
    monkeypatch.setattr("torch.set_num_threads", given.append)
    ranks._share_cores()
    assert given == ([] if threads is None else [threads])


@pytest.mark.parametrize("said", [None, "PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"])
def test_a_gpus_memory_is_one_that_grows_unless_the_user_says_how(
    monkeypatch: pytest.MonkeyPatch, said: str | None
) -> None:
    for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"):
        monkeypatch.delenv(name, raising=False)
    if said is not None:
        monkeypatch.setenv(said, "max_split_size_mb:64")
    ranks._let_segments_grow()
    found = {name: os.environ.pop(name, None) for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")}
    expected = {"PYTORCH_ALLOC_CONF": "expandable_segments:True"} if said is None else {said: "max_split_size_mb:64"}
    assert {name: value for name, value in found.items() if value is not None} == expected
