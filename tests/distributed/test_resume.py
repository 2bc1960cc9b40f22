"""Stopped, killed and resumed runs end where an uninterrupted one does, to the bit."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from llmkd import build, checkpoint
from llmkd.config import load_recipe
from llmkd.errors import InputError
from llmkd.train import train

OPTIONS = {
    "matching.strategy": "random",
    "student.init": "random",
    "student.hidden_size": 24,
    "student.num_attention_heads": 3,
    "student.num_key_value_heads": 1,
    "train.steps": 24,
    "train.micro_batch_size": 2,
    "train.save_every": 5,
}


def _start(tiny: Path, folder: Path) -> subprocess.Popen[str]:
    sets = [part for key, value in OPTIONS.items() for part in ("--set", f"{key}={value}")]
    command = ["train", "--recipe", str(tiny / "recipe.yaml"), "--output", str(folder), "--ranks", "2", *sets]
    code = "import sys; from llmkd.cli import main; main(sys.argv[1:])"
    return subprocess.Popen(
        [sys.executable, "-c", code, *command], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def _lines(folder: Path) -> list[dict[str, object]]:
    file = folder / "metrics.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.is_file() else []


def _when_at_step(process: subprocess.Popen[str], folder: Path, step: int) -> None:
    deadline = time.monotonic() + 120
    while not any(line["step"] >= step for line in _lines(folder)):  # type: ignore[operator]
        assert process.poll() is None and time.monotonic() < deadline, process.stdout.read() if process.stdout else ""
        time.sleep(0.02)


def _finish(process: subprocess.Popen[str]) -> str:
    out, _ = process.communicate(timeout=300)
    return out


@pytest.fixture(scope="module")
def uninterrupted(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("uninterrupted") / "run"
    process = _start(tiny, folder)
    out = _finish(process)
    assert process.returncode == 0, out
    return folder


def _assert_same(folder: Path, uninterrupted: Path) -> None:
    ours, theirs = (load_file(f / "model" / "model.safetensors") for f in (folder, uninterrupted))
    assert all(ours[key].equal(theirs[key]) for key in theirs)
    keys = ("step", "loss", "ce", "kl", "hidden", "pairs", "grad_norm", "learning_rate")
    assert [[line[k] for k in keys] for line in _lines(folder)] == [
        [line[k] for k in keys] for line in _lines(uninterrupted)
    ]


def test_stopped_killed_and_resumed_is_uninterrupted(tiny: Path, uninterrupted: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    process = _start(tiny, folder)
    _when_at_step(process, folder, 6)
    process.send_signal(signal.SIGTERM)
    out = _finish(process)
    assert process.returncode == 0, out
    assert "stopped by SIGTERM after step" in out and "goes on from there" in out
    assert not (folder / "model").exists()
    stopped_at = checkpoint.whole(folder / "checkpoints")[-1].name
    assert f"step-{_lines(folder)[-1]['step']:08d}" == stopped_at

    process = _start(tiny, folder)
    _when_at_step(process, folder, 16)
    ranks = [int(p) for p in subprocess.check_output(["pgrep", "-P", str(process.pid)], text=True).split()]
    os.kill(ranks[-1], signal.SIGKILL)
    out = _finish(process)
    assert process.returncode not in (0, 2) and f"resumed from {folder / 'checkpoints' / stopped_at}" in out, out
    assert not (folder / "model").exists()

    half = folder / "checkpoints" / "step-00000999.tmp"  # what a kill in the middle of saving leaves
    half.mkdir()
    (folder / "checkpoints" / "step-00000998").mkdir()  # and a folder without its last file is not whole either
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 9')
    process = _start(tiny, folder)
    out = _finish(process)
    assert process.returncode == 0 and "resumed from" in out, out
    _assert_same(folder, uninterrupted)
    assert [p.name for p in checkpoint.whole(folder / "checkpoints")] == ["step-00000020", "step-00000024"]


def test_a_finished_run_is_not_run_again(
    tiny: Path, world: Any, uninterrupted: Path, caplog: pytest.LogCaptureFixture
) -> None:
    before = (uninterrupted / "model" / "model.safetensors").stat().st_mtime_ns
    recipe = load_recipe(tiny / "recipe.yaml").changed(OPTIONS)
    with caplog.at_level("INFO"):
        assert train(world, build.distil_job(world, recipe, uninterrupted))
    assert "already done" in caplog.text
    assert (uninterrupted / "model" / "model.safetensors").stat().st_mtime_ns == before


def test_checkpoint_of_other_recipe_or_ranks_is_refused(uninterrupted: Path) -> None:
    folder = uninterrupted / "checkpoints"
    inputs = json.loads((checkpoint.whole(folder)[-1] / "state.json").read_text())["inputs"]
    assert checkpoint.newest(folder, inputs, 2) == (folder / "step-00000024", 24)
    with pytest.raises(InputError, match="train.learning_rate was 0.003, now 0.1"):
        checkpoint.newest(folder, {**inputs, "train.learning_rate": 0.1}, 2)
    with pytest.raises(InputError, match="written by 2 ranks, this run has 3"):
        checkpoint.newest(folder, inputs, 3)
