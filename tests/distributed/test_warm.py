"""Ranks forked by the servers of the tests: what each begins with, and how a mistake is told."""

from __future__ import annotations

import gc
import json
import random
import sys
import threading
from pathlib import Path

from tests.distributed.runner import start_ranks


def main() -> None:
    """Of a rank: what it finds, written beside the file."""
    # not before the server imports them
    import numpy
    import torch

    found = {
        "threads": len(threading.enumerate()),
        "cuda": torch.cuda.is_initialized(),
        "group": torch.distributed.is_initialized(),
        "engine": "llmkd.train" in sys.modules,
        "collects": gc.isenabled() and gc.get_freeze_count() > 100_000,
        "drawn": [random.random(), float(numpy.random.random()), float(torch.rand(1, dtype=torch.float64))],
        "hash": hash("a"),
    }
    print("printed by a rank")
    Path(f"{sys.argv[1]}.{found['hash']}").write_text(json.dumps(found))


def test_a_forked_rank_begins_as_one_that_was_started(tmp_path: Path) -> None:
    for time in range(2):
        processes = start_ranks(2, "tests.distributed.test_warm", tmp_path / f"found{time}", tmp_path)
        assert [process.wait(300) for process in processes] == [0, 0]
    found = [json.loads(file.read_text()) for file in sorted(tmp_path.glob("found*"))]
    assert len(found) == 4 and len({values.pop("hash") for values in found}) == 2, "each rank has a server of its own"
    draws = [values.pop("drawn") for values in found]
    assert all(len(set(values)) == 4 for values in zip(*draws, strict=True)), "no two ranks draw the same numbers"
    assert found == [{"threads": 1, "cuda": False, "group": False, "engine": True, "collects": True}] * 4
    assert (tmp_path / "rank1.log").read_text() == "printed by a rank\n"


def test_a_mistake_is_an_exit_code_and_a_traceback_in_the_log(tmp_path: Path) -> None:
    (process,) = start_ranks(1, "json", tmp_path / "x", tmp_path)
    assert process.wait(300) == 1
    assert "module 'json' has no attribute 'main'" in (tmp_path / "rank0.log").read_text()
