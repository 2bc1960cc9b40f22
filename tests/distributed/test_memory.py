"""A GPU whose memory does not suffice, on one of two ranks: a sentence in place of a traceback, and the same command goes on."""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from llmkd import train
from tests.distributed.runner import run_on_ranks, start_ranks
from tests.distributed.test_resume import lines

OPTIONS: dict[str, Any] = {
    "matching.strategy": "reverse",
    "train.steps": 6,
    "train.save_every": 1,
    "train.timeout_seconds": 900,
    "train.micro_batch_size": 2,
}
SAYS = "CUDA out of memory. Tried to allocate 20.00 MiB. GPU 0 has a total capacity of 79.10 GiB of which 12.56 MiB is free."
PATIENCE = 300
"""Far less than the timeout, with room for a busy machine."""


def main() -> None:
    """A rank of `llmkd/train.py`, of which one is refused memory in one of its backward passes."""
    work = json.loads(Path(sys.argv[1]).read_text())
    sys.argv[1:] = work["arguments"]
    passes, backward = 0, train.backward

    def refused(*given: Any) -> None:
        nonlocal passes
        passes += 1
        if passes == work["pass"]:
            raise torch.OutOfMemoryError(SAYS)
        backward(*given)

    if int(os.environ["RANK"]) == work["rank"]:
        train.backward = refused
    train.main()


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_whose_gpu_has_no_more_memory_says_so_and_the_run_goes_on(rank: int, tiny: Path, tmp_path: Path) -> None:
    sets = [part for key, value in OPTIONS.items() for part in ("--set", f"{key}={value}")]
    arguments = ["--recipe", str(tiny / "recipe.yaml"), "--output", str(tmp_path / "run"), *sets]

    def started(strikes: int) -> tuple[list[int], list[str]]:
        work = {"arguments": arguments, "rank": rank, "pass": strikes}
        (tmp_path / "work.json").write_text(json.dumps(work))
        ranks = start_ranks(2, "tests.distributed.test_memory", tmp_path / "work.json", tmp_path)
        codes = [process.wait(timeout=600) for process in ranks]
        return codes, [(tmp_path / f"rank{number}.log").read_text() for number in range(2)]

    began = time.monotonic()
    codes, said = started(strikes=7)
    struck = lines(tmp_path / "run")[-1]["step"]
    assert codes[rank] == 2 and codes[1 - rank] in (1, 2) and time.monotonic() - began < PATIENCE, said
    [sentence] = [line for line in said[rank].splitlines() if line.startswith("Error: ")]
    assert sentence.startswith(f"Error: rank {rank} gets no more memory from its GPU ({SAYS[:-1]}): write a smaller")
    others = [line for line in said[1 - rank].splitlines() if line.startswith("Error: ")]
    assert len(others) == 1 and f"silent ranks: {rank}. The same command resumes" in others[0], said
    assert "Traceback" not in "".join(said), said
    assert isinstance(struck, int) and 1 <= struck < OPTIONS["train.steps"]
    codes, said = started(strikes=0)
    assert codes == [0, 0] and "resumed from" in said[0], said
    assert run_on_ranks(2, tiny / "recipe.yaml", {"undisturbed": OPTIONS}, tmp_path) == {}
    ours, theirs = (load_file(tmp_path / run / "model" / "model.safetensors") for run in ("run", "undisturbed"))
    assert ours.keys() == theirs.keys() and all(ours[key].equal(theirs[key]) for key in theirs)
