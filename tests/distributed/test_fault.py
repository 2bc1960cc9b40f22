"""A rank that dies or hangs in mid-step: the others name it and end within the timeout, and the same command goes on from there."""

from __future__ import annotations

import os
import re
import signal
import time
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from llmkd.recipe.recipe import load_recipe
from llmkd.train import train
from llmkd.training import jobs
from tests.distributed.test_resume import lines, ranks_of, start_training, when_at_step
from tests.tiny import quick

OPTIONS: dict[str, Any] = {
    "matching.strategy": "reverse",
    "teacher.placement": "pipeline",
    "train.steps": 12,
    "train.micro_batch_size": 2,
    "train.save_every": 2,
    "train.timeout_seconds": 15,
}
PATIENCE = 15 + 3 + 5 + 30 + 20
"""The timeout, the roll call, the launcher's waits, and room for a busy machine."""


def _struck(tiny: Path, folder: Path, *, step: int, victim: int, by: signal.Signals) -> str:
    """Start (or resume), strike one rank once so many steps are logged, and give back what the run said; it must end in time."""
    process = start_training(tiny, folder, OPTIONS)
    when_at_step(process, folder, step)
    os.kill(ranks_of(process.pid)[victim], by)
    began = time.monotonic()
    code, out = process.finish()
    assert time.monotonic() - began < PATIENCE and code not in (0, 2), out
    assert not (folder / "model").exists()
    return out


def _named(out: str, survivor: int, victim: int) -> None:
    said = re.search(
        rf"^Error: rank {survivor}: .*silent ranks: ([\d, ]+)\. The same command resumes", out, re.MULTILINE
    )
    assert said and said[1] == str(victim), out


def _finished(tiny: Path, world: Any, folder: Path, *, ranks: int) -> None:
    """Resume to the end, on as many ranks or on one, and compare with one uninterrupted run of one rank with a whole teacher."""
    if ranks == 1:
        assert train(world, jobs.distil_job(world, load_recipe(tiny / "recipe.yaml").changed(OPTIONS), folder))
    else:
        process = start_training(tiny, folder, OPTIONS)
        code, out = process.finish()
        assert code == 0 and "resumed from" in out, out
    assert [line["step"] for line in lines(folder)] == list(range(1, OPTIONS["train.steps"] + 1))
    whole = {**OPTIONS, **quick(tiny), "teacher.placement": "replicated"}
    recipe = load_recipe(tiny / "recipe.yaml").changed(whole)
    assert train(world, jobs.distil_job(world, recipe, folder.parent / "uninterrupted"))
    ours, theirs = (load_file(f / "model" / "model.safetensors") for f in (folder, folder.parent / "uninterrupted"))
    for key, expected in theirs.items():
        assert (ours[key] - expected).abs().max() <= 2e-6 * max(1.0, expected.abs().max()), key


def _alive(processes: list[int]) -> list[int]:
    return [process for process in processes if Path(f"/proc/{process}/stat").exists()]


def test_a_killed_launcher_takes_its_ranks_along_and_a_rerun_at_once_goes_on(
    tiny: Path, world: Any, tmp_path: Path
) -> None:
    """And a rank of the rerun that is killed is named by the other one; after both, one rank ends where nothing happened."""
    folder = tmp_path / "run"
    process = start_training(tiny, folder, OPTIONS)
    when_at_step(process, folder, 3)
    ranks = ranks_of(process.pid)
    assert len(ranks) == 2
    process.send_signal(signal.SIGKILL)
    reached = lines(folder)[-1]["step"]
    assert isinstance(reached, int) and reached < OPTIONS["train.steps"] - 4
    # At once, while they may still be ending; a step that the killed ranks were in may yet be logged, and is not the rerun's.
    out = _struck(tiny, folder, step=reached + 3, victim=1, by=signal.SIGKILL)
    assert "resumed from" in out
    assert _alive(ranks) == []
    _named(out, survivor=0, victim=1)
    _finished(tiny, world, folder, ranks=1)
    assert (
        not list(folder.glob("*.tmp"))
        and not list(folder.glob("checkpoints/*.tmp"))
        and not (folder / ".lock").exists()
    )


@pytest.mark.slow
def test_a_first_rank_that_hangs_is_named_in_time(tiny: Path, tmp_path: Path) -> None:
    """It holds the store in which the others look for each other, and takes their questions without an answer."""
    _named(_struck(tiny, tmp_path / "run", step=3, victim=0, by=signal.SIGSTOP), survivor=1, victim=0)


@pytest.mark.slow
def test_a_hanging_rank_and_a_killed_first_rank_are_named(tiny: Path, world: Any, tmp_path: Path) -> None:
    _named(_struck(tiny, tmp_path / "run", step=4, victim=1, by=signal.SIGSTOP), survivor=0, victim=1)
    _named(_struck(tiny, tmp_path / "run", step=8, victim=0, by=signal.SIGKILL), survivor=1, victim=0)
    _finished(tiny, world, tmp_path / "run", ranks=2)
