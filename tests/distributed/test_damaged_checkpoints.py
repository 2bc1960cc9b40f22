"""A checkpoint whose files are not what was written is named and never trained on; one from elsewhere runs no code."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from llmkd.distributed import checksums
from llmkd.distributed.shards import saved_weights
from llmkd.errors import InputError
from llmkd.recipe.recipe import load_recipe
from llmkd.train import train
from llmkd.training import checkpoint, jobs
from tests.distributed.runner import run_on_ranks
from tests.distributed.test_resume import OPTIONS

SHORT = {**OPTIONS, "train.steps": 4, "train.save_every": 2}
SHAPE = {
    "vocab_size": 320,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
}
TUNED = {
    "steps": 2,
    "batch_size": 8,
    "micro_batch_size": 4,
    "learning_rate": 0.01,
    "dtype": "float32",
    "deepspeed": "cpu",
}
MADE = {"teacher": {"dtype": "float32"}, "finetune.architecture": SHAPE, "finetune.train": TUNED}


@pytest.fixture(scope="module")
def checkpoints(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Steps 2 and 4 of a run on two ranks."""
    folder = tmp_path_factory.mktemp("damaged")
    assert run_on_ranks(2, tiny / "recipe.yaml", {"run": SHORT}, folder) == {}
    return folder / "run" / "checkpoints"


def _flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def _truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def _empty(file: Path) -> None:
    file.write_bytes(b"")


DAMAGES: list[Callable[[Path], None]] = [_flip, _truncate, _empty, Path.unlink]


def _inputs(checkpoints: Path) -> dict[str, object]:
    return json.loads((checkpoint.whole(checkpoints)[-1] / "state.json").read_text())["inputs"]


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_every_file_of_a_checkpoint_is_compared(
    world: Any, checkpoints: Path, tmp_path: Path, damage: Callable[[Path], None], caplog: pytest.LogCaptureFixture
) -> None:
    inputs = _inputs(checkpoints)
    newest = checkpoint.whole(checkpoints)[-1]
    names = sorted(str(file.relative_to(newest)) for file in newest.rglob("*") if file.is_file())
    assert (
        len(names) == 10
    )  # two ranks' model, optimizer and random states; state.json; checksums.json; two scripts of DeepSpeed's
    for number, name in enumerate(names):
        folder = tmp_path / str(number)
        shutil.copytree(checkpoints, folder)
        damage(folder / newest.name / name)
        caplog.clear()
        saved = checkpoint.newest(world, folder, inputs)
        assert saved is not None and saved.step == 2 and (folder / f"{newest.name}.damaged").is_dir()
        # a damaged list of checksums may blame the file whose sum it was
        assert name == checksums.FILE or f"{newest.name}: {name} " in caplog.text
        assert "going on from the checkpoint before it" in caplog.text
        damage(saved.folder / name)
        with pytest.raises(InputError, match="; there is no checkpoint before it: put the file back"):
            checkpoint.newest(world, folder, inputs)
        assert saved.folder.is_dir()


def test_a_file_that_the_run_did_not_write_is_named(world: Any, checkpoints: Path, tmp_path: Path) -> None:
    shutil.copytree(checkpoints, tmp_path / "run")
    for saved in checkpoint.whole(tmp_path / "run"):
        shutil.copy(saved / "rng-0.pt", saved / "shards" / "zero_pp_rank_2_mp_rank_00_model_states.pt")
    with pytest.raises(
        InputError, match="shards/zero_pp_rank_2_mp_rank_00_model_states.pt is not among the files that were written"
    ):
        checkpoint.newest(world, tmp_path / "run", _inputs(checkpoints))


def test_what_killed_runs_left_is_removed(world: Any, checkpoints: Path, tmp_path: Path) -> None:
    shutil.copytree(checkpoints, tmp_path / "run")
    for name in ("step-00000009.tmp", "step-00000002.whole.tmp", "step-00000001.old.tmp"):
        (tmp_path / "run" / name / "shards").mkdir(parents=True)
    saved = checkpoint.newest(world, tmp_path / "run", _inputs(checkpoints))
    assert saved is not None and saved.step == 4
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["step-00000002", "step-00000004"]


class Attack:
    """Makes a file when it is unpickled."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return os.mkdir, (str(self.file),)


def _forge(checkpoint_folder: Path, victim: Path, kind: str) -> None:
    """Put code into the files of a kind, with checksums that agree."""
    for file in (checkpoint_folder / "shards").glob(f"*{kind}_states.pt"):
        state = torch.load(file, map_location="cpu", weights_only=True)
        torch.save({**state, "more": Attack(victim)}, file)
    names = [path for path in checkpoint_folder.rglob("*") if path.is_file() and path.name != checksums.FILE]
    sums = {str(path.relative_to(checkpoint_folder)): checksums.sha256(path) for path in names}
    (checkpoint_folder / checksums.FILE).write_text(json.dumps(sums))
    assert checksums.damage(checkpoint_folder) is None


@pytest.mark.parametrize("kind", ["model", "optim"])
def test_a_checkpoint_from_elsewhere_runs_no_code(
    tiny: Path, world: Any, checkpoints: Path, tmp_path: Path, kind: str
) -> None:
    """Neither where `train` merges its shards for another number of ranks, nor where projectors are read from it."""
    victim, run = tmp_path / "victim", tmp_path / "run"
    shutil.copytree(checkpoints, run / "checkpoints")
    for saved in checkpoint.whole(run / "checkpoints"):
        _forge(saved, victim, kind)
    shards = checkpoint.whole(run / "checkpoints")[-1] / checkpoint.TAG
    with pytest.raises(InputError, match="hold Python objects that could run code"):
        saved_weights(shards, "projectors.")
    recipe = load_recipe(tiny / "recipe.yaml").changed(SHORT)
    with pytest.raises(InputError, match="could not merge its shards"):
        train(world, jobs.distil_job(world, recipe, run))
    assert not victim.exists()
    with pytest.raises(FileExistsError):  # the attack itself works
        victim.mkdir()
        pickle.loads(pickle.dumps(Attack(victim)))


def test_the_engine_opens_no_foreign_objects(tiny: Path, world: Any, tmp_path: Path) -> None:
    """On the number of ranks that wrote it, where DeepSpeed itself loads the files."""
    recipe = load_recipe(tiny / "recipe.yaml").changed({**SHORT, "train.warmup_steps": 0, "train.steps": 2})
    assert train(world, jobs.distil_job(world, recipe, tmp_path / "run"))
    shutil.rmtree(tmp_path / "run" / "model")
    for kind in ("model", "optim"):
        shutil.copytree(tmp_path / "run", tmp_path / kind)
        _forge(checkpoint.whole(tmp_path / kind / "checkpoints")[-1], tmp_path / "victim", kind)
        with pytest.raises(InputError, match="hold Python objects that could run code"):
            train(world, jobs.distil_job(world, recipe, tmp_path / kind))
        assert not (tmp_path / "victim").exists()


def test_a_kill_between_the_model_and_its_summary_is_made_good(tiny: Path, world: Any, tmp_path: Path) -> None:
    recipe = load_recipe(tiny / "recipe.yaml").changed({**SHORT, "train.warmup_steps": 0, "train.steps": 2})
    job, run = jobs.distil_job(world, recipe, tmp_path / "run"), tmp_path / "run"
    assert train(world, job)
    weights = (run / "model" / "model.safetensors").read_bytes()
    (run / "summary.json").unlink()
    assert train(world, job)
    assert json.loads((run / "summary.json").read_text())["steps"] == 2
    assert (run / "model" / "model.safetensors").read_bytes() == weights


def test_so_is_one_of_a_teacher_with_a_tokenizer_of_its_own(tiny: Path, world: Any, tmp_path: Path) -> None:
    """What it was trained on from the start is removed with its folder `initial`."""
    recipe = load_recipe(tiny / "recipe.yaml").changed({**SHORT, **MADE, "output": str(tmp_path)})
    job, run = jobs.finetune_job(world, recipe, tmp_path / "teacher"), tmp_path / "teacher"
    assert train(world, job) and not (run / "initial").exists() and not (run / "model" / "checksums.json").exists()
    model = {file.name: file.read_bytes() for file in (run / "model").iterdir()}
    for lost in ("summary.json", "model/llmkd.json"):
        (run / lost).unlink()
        assert train(world, job)
        assert (run / "summary.json").is_file() and not (run / "initial").exists()
        assert {file.name: file.read_bytes() for file in (run / "model").iterdir()} == model


def test_a_damaged_log_is_named_at_a_resume(
    world: Any, checkpoints: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """What came after the checkpoint is done again and may be anything."""
    shutil.copytree(checkpoints.parent, tmp_path / "run")
    log, said = tmp_path / "run" / "metrics.jsonl", "metrics.jsonl does not begin with what it held when"
    right = log.read_text()
    for text, named in {
        right: False,
        right + '{"step"': False,
        right.replace("1", "2", 1): True,
        right[:9]: True,
    }.items():
        log.write_text(text)
        caplog.clear()
        assert checkpoint.newest(world, tmp_path / "run" / "checkpoints", _inputs(checkpoints)) is not None
        assert (said in caplog.text) == named
    log.unlink()
    assert checkpoint.newest(world, tmp_path / "run" / "checkpoints", _inputs(checkpoints)) is not None
    assert said in caplog.text


def test_a_damaged_model_of_a_finished_run_is_refused_and_exported_again(
    tiny: Path, world: Any, tmp_path: Path
) -> None:
    recipe = load_recipe(tiny / "recipe.yaml").changed({**SHORT, "train.warmup_steps": 0, "train.steps": 2})
    job, model = jobs.distil_job(world, recipe, tmp_path / "run"), tmp_path / "run" / "model"
    assert train(world, job)
    weights = (model / "model.safetensors").read_bytes()
    _flip(model / "model.safetensors")
    with pytest.raises(
        InputError, match="model.safetensors is damaged: .* or remove .*/model to have the student exported"
    ):
        train(world, job)
    shutil.rmtree(model)
    assert train(world, job) and (model / "model.safetensors").read_bytes() == weights
    _truncate(tmp_path / "run" / "summary.json")
    assert train(world, job) and json.loads((tmp_path / "run" / "summary.json").read_text())["steps"] == 2
