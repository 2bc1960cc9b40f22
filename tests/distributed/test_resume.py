"""Stopped, killed and resumed runs end where an uninterrupted one does, to the bit."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from llmkd.errors import InputError
from llmkd.recipe.recipe import load_recipe
from llmkd.train import train
from llmkd.training import checkpoint, jobs
from tests.distributed.command import Command
from tests.distributed.runner import run_on_ranks
from tests.unit.training.test_validation import logged as logged_validations

OPTIONS = {
    "matching.strategy": "random",
    "student.init": "random",
    "student.hidden_size": 24,
    "student.num_attention_heads": 3,
    "student.num_key_value_heads": 1,
    "train.steps": 20,
    "train.save_every": 4,
    "data.validation.share": 0.2,
    "train.validate_every": 4,
}


def start_training(tiny: Path, folder: Path, options: dict[str, Any] | None = None) -> Command:
    """`llmkd train` on two ranks."""
    sets = [part for key, value in (options or OPTIONS).items() for part in ("--set", f"{key}={value}")]
    return Command("train", "--recipe", str(tiny / "recipe.yaml"), "--output", str(folder), "--ranks", "2", *sets)


def lines(folder: Path) -> list[dict[str, object]]:
    """What a run has logged of its steps."""
    file = folder / "metrics.jsonl"
    logged = [json.loads(line) for line in file.read_text().splitlines()] if file.is_file() else []
    return [line for line in logged if "validation" not in line]


def when_at_step(process: Command, folder: Path, step: int) -> None:
    """Wait until so many steps are logged."""
    deadline = time.monotonic() + 120
    while not any(line["step"] >= step for line in lines(folder)):  # type: ignore[operator]
        assert process.poll() is None and time.monotonic() < deadline, process.output()
        time.sleep(0.02)


def ranks_of(launcher: int) -> list[int]:
    """The ranks' processes, in order of rank: the children of the server that the launcher has started."""
    names, parents = {}, {}
    for process in Path("/proc").glob("[0-9]*"):
        try:
            status = dict(line.split(":\t", 1) for line in (process / "status").read_text().splitlines())
        except OSError:  # it has ended
            continue
        names[int(process.name)], parents[int(process.name)] = status["Name"], int(status["PPid"])
    found = {}
    for number, name in names.items():
        rank = re.fullmatch(r"llmkd rank (\d+)", name)
        if rank and parents.get(parents[number]) == launcher:
            found[int(rank[1])] = number
    return [found[rank] for rank in sorted(found)]


@pytest.fixture(scope="module")
def uninterrupted(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("uninterrupted")
    assert run_on_ranks(2, tiny / "recipe.yaml", {"run": OPTIONS}, folder) == {}
    return folder / "run"


def _assert_same(folder: Path, uninterrupted: Path) -> None:
    ours, theirs = (load_file(f / "model" / "model.safetensors") for f in (folder, uninterrupted))
    assert all(ours[key].equal(theirs[key]) for key in theirs)
    validations = [[{**line, "seconds": None} for line in logged_validations(run)] for run in (folder, uninterrupted)]
    assert validations[0] == validations[1] and [line["step"] for line in validations[0]] == [4, 8, 12, 16, 20]
    keys = ("step", "loss", "ce", "kl", "hidden", "pairs", "grad_norm", "learning_rate")
    assert [[line[k] for k in keys] for line in lines(folder)] == [
        [line[k] for k in keys] for line in lines(uninterrupted)
    ]


def test_stopped_killed_and_resumed_is_uninterrupted(tiny: Path, uninterrupted: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    process = start_training(tiny, folder)
    when_at_step(process, folder, 5)
    process.send_signal(signal.SIGTERM)
    code, out = process.finish()
    assert code == 0, out
    assert "stopped by SIGTERM after step" in out and "the same command resumes from it" in out
    assert not (folder / "model").exists()
    stopped_at = checkpoint.whole(folder / "checkpoints")[-1].name
    assert f"step-{lines(folder)[-1]['step']:08d}" == stopped_at

    process = start_training(tiny, folder)
    when_at_step(process, folder, 10)
    os.kill(ranks_of(process.pid)[-1], signal.SIGKILL)
    code, out = process.finish()
    assert code not in (0, 2) and f"resumed from {folder / 'checkpoints' / stopped_at}" in out, out
    assert not (folder / "model").exists()

    half = folder / "checkpoints" / "step-00000999.tmp"  # what a kill in the middle of saving leaves
    half.mkdir()
    (folder / "checkpoints" / "step-00000998").mkdir()  # and a folder without its last file is not whole either
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 9')
    assert run_on_ranks(2, tiny / "recipe.yaml", {folder.name: OPTIONS}, tmp_path) == {}
    assert "resumed from" in (tmp_path / "rank0.log").read_text()
    _assert_same(folder, uninterrupted)
    assert [p.name for p in checkpoint.whole(folder / "checkpoints")] == ["step-00000016", "step-00000020"]


def test_a_finished_run_is_not_run_again(
    tiny: Path, world: Any, uninterrupted: Path, caplog: pytest.LogCaptureFixture
) -> None:
    before = (uninterrupted / "model" / "model.safetensors").stat().st_mtime_ns
    recipe = load_recipe(tiny / "recipe.yaml").changed(OPTIONS)
    with caplog.at_level("INFO"):
        assert train(world, jobs.distil_job(world, recipe, uninterrupted))
    assert "already done" in caplog.text
    assert (uninterrupted / "model" / "model.safetensors").stat().st_mtime_ns == before


def test_checkpoint_of_another_recipe_is_refused(world: Any, uninterrupted: Path) -> None:
    folder = uninterrupted / "checkpoints"
    inputs = json.loads((checkpoint.whole(folder)[-1] / "state.json").read_text())["inputs"]
    newest = checkpoint.newest(world, folder, inputs)
    assert newest is not None and (newest.folder, newest.step, newest.world_size) == (folder / "step-00000020", 20, 2)
    assert newest.validations == tuple((line["step"], line["ce"]) for line in logged_validations(uninterrupted))
    with pytest.raises(InputError, match="train.learning_rate was 0.003, now 0.1"):
        checkpoint.newest(world, folder, {**inputs, "train.learning_rate": 0.1})


def _close(folder: Path, uninterrupted: Path, tolerance: float) -> None:
    ours, theirs = (load_file(f / "model" / "model.safetensors") for f in (folder, uninterrupted))
    for key, expected in theirs.items():
        change = (ours[key].float() - expected.float()).abs().max()
        assert change <= tolerance * max(1.0, float(expected.float().abs().max())), (key, change)


def test_resumed_on_another_number_of_ranks(tiny: Path, world: Any, uninterrupted: Path, tmp_path: Path) -> None:
    """What two ranks saved under ZeRO-3, projectors and Adam's states included, one rank goes on with."""
    shutil.copytree(uninterrupted / "checkpoints" / "step-00000016", tmp_path / "run" / "checkpoints" / "step-00000016")
    recipe = load_recipe(tiny / "recipe.yaml").changed(OPTIONS)
    assert train(world, jobs.distil_job(world, recipe, tmp_path / "run"))
    assert [line["step"] for line in lines(tmp_path / "run")] == [17, 18, 19, 20]
    _close(tmp_path / "run", uninterrupted, 1e-6)
    kept = sorted(p.name for p in (tmp_path / "run" / "checkpoints").iterdir())
    assert kept == ["step-00000016", "step-00000020"]  # nothing of the conversion is left


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 4])
def test_every_stage_is_resumed_on_another_number_of_ranks(tiny: Path, tmp_path: Path, ranks: int) -> None:
    scenarios = {}
    for stage, dtype in ((0, "float32"), *((s, d) for s in (1, 2, 3) for d in ("float32", "bfloat16"))):
        config = tiny / f"zero{stage}.json"
        changes = {"train.deepspeed": str(config), "train.dtype": dtype, "train.steps": 8, "train.save_every": 4}
        scenarios[f"{stage}-{dtype}"] = {**OPTIONS, **changes, "train.micro_batch_size": 2}
    assert run_on_ranks(2, tiny / "recipe.yaml", scenarios, tmp_path / "two") == {}
    for name in scenarios:
        saved = Path(name) / "checkpoints" / "step-00000004"
        shutil.copytree(tmp_path / "two" / saved, tmp_path / "other" / saved)
    assert run_on_ranks(ranks, tiny / "recipe.yaml", scenarios, tmp_path / "other") == {}
    for name in scenarios:
        _close(tmp_path / "other" / name, tmp_path / "two" / name, 1e-6 if name.endswith("float32") else 2**-7)
