"""Weights on their way to the writers: lent to a model of this process, or in a folder of this user's alone, in memory or else in the
run's folder, and nothing left behind."""

from __future__ import annotations

import stat
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from llmkd.errors import InputError
from llmkd.rollouts import weights
from llmkd.rollouts.weights import InFolder, Lent


@pytest.fixture
def memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "memory"
    folder.mkdir()
    monkeypatch.setattr(weights, "MEMORY", folder)
    return folder


@pytest.fixture
def handed(tiny: Path, tmp_path: Path) -> InFolder:
    return InFolder(AutoModelForCausalLM.from_pretrained(tiny / "teacher"), tmp_path / "run")


def test_weights_are_handed_over_in_memory(tiny: Path, world: Any, memory: Path, handed: InFolder) -> None:
    left = memory / f"{handed.prefix}killed"  # by an earlier start of the run
    left.mkdir()
    with handed.handed_over(world) as folder:
        assert [*memory.iterdir()] == [folder] and stat.S_IMODE(folder.stat().st_mode) == 0o700
        ours, theirs = (load_file(place / "model.safetensors") for place in (folder, tiny / "teacher"))
        assert ours.keys() == theirs.keys() and all(ours[name].equal(theirs[name]) for name in ours)
    assert not list(memory.iterdir())


def test_where_memory_has_no_room_the_run_s_folder_has(
    world: Any, memory: Path, handed: InFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(weights.shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    with handed.handed_over(world) as folder:
        assert folder.parent == tmp_path / "run" / "rollouts" and (folder / "config.json").is_file()
    assert not list(memory.iterdir()) and not list((tmp_path / "run" / "rollouts").iterdir())


def test_no_room_anywhere_is_one_sentence_and_leaves_nothing(
    world: Any, memory: Path, handed: InFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(handed.model, "save_pretrained", full)
    with pytest.raises(InputError, match="No space left|no room|full"), handed.handed_over(world):
        pass
    assert not list(memory.iterdir())


@pytest.mark.parametrize("name", ["teacher", "tied"])
def test_a_student_lends_its_present_weights_and_takes_them_back(tiny: Path, world: Any, name: str) -> None:
    """Nothing is copied, nothing is held in between, and the model that writes is loaded once."""
    loads: list[Path] = []

    def load(folder: Path) -> Any:
        loads.append(folder)
        return AutoModelForCausalLM.from_pretrained(folder).eval()

    student = load(tiny / name)
    loads.clear()
    lent, ids = Lent(student, tiny / name, load), torch.arange(9)[None]
    for _ in range(2):
        with lent.handed_over(world) as folder, lent.writing() as model:
            assert folder == tiny / name and model is not student
            ours, theirs = model.get_input_embeddings().weight, student.get_input_embeddings().weight
            assert ours.data_ptr() == theirs.data_ptr()
            with torch.no_grad():
                assert torch.equal(model(ids).logits, student(ids).logits)
        assert not sum(parameter.numel() for parameter in model.parameters())
        with torch.no_grad():
            for parameter in student.parameters():
                parameter.mul_(1.1)  # it is trained
    assert loads == [tiny / name]
