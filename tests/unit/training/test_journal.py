"""What a run's rank 0 shows while it trains."""

from __future__ import annotations

import contextlib
import gzip
import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from llmkd.recipe.recipe import load_recipe
from llmkd.train import train
from llmkd.training import jobs, journal
from llmkd.training.journal import Journal


def test_a_bar_moves_with_each_line_and_shows_loss_and_speed(
    tiny: Path, world: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On rank 0 alone."""
    shown: list[dict[str, Any]] = []
    moved: list[tuple[float, str]] = []

    @contextlib.contextmanager
    def progress(work: str, **how: Any) -> Iterator[Any]:
        shown.append({"work": work, **how})
        yield lambda more, note: moved.append((more, note))

    monkeypatch.setattr(journal, "progress", progress)
    changes = {"train.steps": 5, "train.warmup_steps": 0, "train.log_every": 2, "train.profile_steps": 1}
    job = jobs.distil_job(world, load_recipe(tiny / "recipe.yaml").changed(changes), tmp_path / "run")
    assert train(world, job)
    _check_parts(job.folder)
    _check_trace(job.folder)
    (bar,) = shown
    assert (bar["work"], bar["total"], bar["done"], bar["unit"], bar["shown"]) == (job.title, 5, 0, "steps", True)
    assert [more for more, _ in moved] == [2, 2, 1]
    assert all(note.startswith("loss ") and note.endswith(" tok/s") for _, note in moved)
    Journal(replace(world, rank=1, size=2), job, start_step=0, steps=5).close()
    assert shown[1]["shown"] is False


def _check_parts(run: Path) -> None:
    """A step's time is divided among its parts, all of it, in the lines and in the summary."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    summary = json.loads((run / "summary.json").read_text())
    for line in lines:
        parts = line["seconds_by_part"]
        assert parts.keys() == {"data", "teacher", "forward", "head", "backward", "optimizer"}
        assert sum(parts.values()) == pytest.approx(line["seconds_per_step"]) and min(parts.values()) > 0
    steps = [2, 2, 1]
    for part, seconds in summary["seconds_by_part"].items():
        assert seconds == pytest.approx(
            sum(n * line["seconds_by_part"][part] for n, line in zip(steps, lines, strict=True))
        )
    assert summary["teacher_seconds"] == summary["seconds_by_part"]["teacher"]


def _check_trace(run: Path) -> None:
    """One step is in it: all its products, and one step of the optimizer."""
    with gzip.open(run / "traces" / "rank-0.json.gz", "rt") as file:
        names = Counter(event.get("name") for event in json.load(file)["traceEvents"])
    assert names["aten::mm"] > 10 and names["aten::_fused_adamw_"] == 2  # matrices, vectors
