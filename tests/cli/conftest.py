"""What the command tests share."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path
from typing import Any

import datasets.config
import pytest
import torch
import yaml

from llmkd import starting
from tests.in_process import in_process
from tests.tiny import recipe_values

MADE: dict[str, Any] = dict(vocab_size=320, hidden_size=32, intermediate_size=48, num_hidden_layers=6)
MADE |= dict(num_attention_heads=4, num_key_value_heads=2, head_dim=8, max_position_embeddings=64)


@pytest.fixture
def inside(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """The child's work in this process; the orders that it was given."""
    return in_process(monkeypatch)


@pytest.fixture
def _same_everywhere(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """No GPU, and what datasets keeps goes with the test; a process that is started fails it."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
    monkeypatch.setattr(starting, "get_ready", lambda: None)  # a server that has forked nothing yet
    monkeypatch.setattr(subprocess, "Popen", lambda *_, **__: pytest.fail("a process was started"))


@pytest.fixture(params=["there", "to be made"])
def file(request: pytest.FixtureRequest, tiny: Path, tmp_path: Path, _same_everywhere: None) -> Path:
    """A study's recipe, its teacher there, or to be made by it."""
    values = recipe_values(tiny)
    values |= {"output": str(tmp_path / "runs"), "study": {"strategies": ["forward"], "baselines": []}}
    values["evaluation"] = {"generation": {"source": "records", "items": 4, "max_new_tokens": 8}}
    if request.param == "there":
        shutil.copytree(tiny / "teacher", tmp_path / "teacher")
        values["teacher"]["path"] = str(tmp_path / "teacher")
    else:
        values["teacher"].pop("path")
        train = dict(steps=1, batch_size=8, micro_batch_size=4, learning_rate=0.1)
        values["finetune"] = {"architecture": MADE, "train": train}
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(values))
    return tmp_path / "study.yaml"
