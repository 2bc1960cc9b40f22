"""Weights on their way to the writers: a folder of this user's alone, in memory or else in the run's folder, and nothing left behind."""

from __future__ import annotations

import stat
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from llmkd.errors import InputError
from llmkd.rollouts import weights
from llmkd.rollouts.weights import Weights


@pytest.fixture
def memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "memory"
    folder.mkdir()
    monkeypatch.setattr(weights, "MEMORY", folder)
    return folder


@pytest.fixture
def handed(tiny: Path, tmp_path: Path) -> Weights:
    return Weights(AutoModelForCausalLM.from_pretrained(tiny / "teacher"), tmp_path / "run")


def test_weights_are_handed_over_in_memory(tiny: Path, world: Any, memory: Path, handed: Weights) -> None:
    folder = handed.hand_over(world)
    assert folder.parent == memory and stat.S_IMODE(folder.stat().st_mode) == 0o700
    ours, theirs = (load_file(place / "model.safetensors") for place in (folder, tiny / "teacher"))
    assert ours.keys() == theirs.keys() and all(ours[name].equal(theirs[name]) for name in ours)
    again = handed.hand_over(world)  # what a killed start left is removed
    assert not folder.exists() and [path.name for path in memory.iterdir()] == [again.name]
    handed.remove(again)
    assert not list(memory.iterdir())


def test_where_memory_has_no_room_the_run_s_folder_has(
    world: Any, memory: Path, handed: Weights, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(weights.shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    folder = handed.hand_over(world)
    assert folder.parent == tmp_path / "run" / "rollouts" and (folder / "config.json").is_file()
    assert not list(memory.iterdir())


def test_no_room_anywhere_is_one_sentence_and_leaves_nothing(
    world: Any, memory: Path, handed: Weights, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(handed.model, "save_pretrained", full)
    with pytest.raises(InputError, match="No space left|no room|full"):
        handed.hand_over(world)
    assert not list(memory.iterdir())
