"""The processes that fork ranks: what is forked is like a process started by itself, and how it ends is told."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from tests.distributed import warm
from tests.distributed.runner import start_ranks
from tests.distributed.warm import WarmProcess


def main(file: Path) -> None:
    """Of a rank: what it finds, written beside the file; or a long sleep."""
    # not before the process that forks ranks imports them
    import numpy
    import torch

    if file.name == "sleep":
        time.sleep(600)
    found = {
        "rank": os.environ["RANK"],
        "mark": os.environ.get("LLMKD_TEST_MARK"),
        "threads": len(threading.enumerate()),
        "drawn": [random.random(), float(numpy.random.random()), float(torch.rand(1, dtype=torch.float64))],
        "group": torch.distributed.is_initialized(),
        "engine": "llmkd.train" in sys.modules,
        "hash": hash("a"),
    }
    print("printed by a rank")
    file.with_name(f"found{found['rank']}.json").write_text(json.dumps(found))


def start(ranks: int, file: Path) -> list[WarmProcess]:
    return start_ranks(ranks, "tests.distributed.test_warm", file, file.parent)


def test_a_forked_rank_begins_as_one_that_was_started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    marked, unmarked = tmp_path / "marked", tmp_path / "unmarked"
    for folder in (marked, unmarked):
        folder.mkdir()
    monkeypatch.setenv("LLMKD_TEST_MARK", "1")
    assert [process.wait(300) for process in start(2, marked / "x")] == [0, 0]
    monkeypatch.delenv("LLMKD_TEST_MARK")
    assert [process.wait(300) for process in start(2, unmarked / "x")] == [0, 0]
    draws = []
    for folder, mark in ((marked, "1"), (unmarked, None)):
        found = [json.loads((folder / f"found{rank}.json").read_text()) for rank in (0, 1)]
        hashes = {values.pop("hash") for values in found}
        assert len(hashes) == 2, "ranks that are started by themselves hash differently"
        draws += [values.pop("drawn") for values in found]
        common = {"mark": mark, "threads": 1, "group": False, "engine": True}
        assert found == [{"rank": rank, **common} for rank in "01"]
        assert (folder / "rank1.log").read_text() == "printed by a rank\n"
    assert all(len(set(values)) == 4 for values in zip(*draws, strict=True)), "no two ranks draw the same numbers"


def test_a_mistake_is_an_exit_code_and_a_traceback_in_the_log(tmp_path: Path) -> None:
    (process,) = start_ranks(1, "json", tmp_path / "x", tmp_path)
    assert process.wait(300) == 1
    assert "module 'json' has no attribute 'main'" in (tmp_path / "rank0.log").read_text()


def test_ranks_that_are_given_up_are_killed_and_the_next_ones_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(warm, "MODULES", ())  # they need not be warm
    monkeypatch.setattr(warm, "_processes", {})
    (late,) = start(1, tmp_path / "sleep")
    with pytest.raises(subprocess.TimeoutExpired):
        late.wait(0.1)
    (left,) = start(1, tmp_path / "sleep")  # by a test that has failed meanwhile
    (next_one,) = start(1, tmp_path / "x")
    assert next_one.wait(300) == 0 and (tmp_path / "found0.json").is_file()
    assert late.ended and left.ended and not next_one.ended
    next_one.kill()
