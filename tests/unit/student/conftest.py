"""Students that several of these tests look at."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from llmkd.models import make


@pytest.fixture(scope="module")
def narrow(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("narrow") / "student"
    shape = {"hidden_size": 24, "num_attention_heads": 3, "num_key_value_heads": 1}
    make.random_student(tiny / "teacher", 3, shape, folder, seed=0, dtype=torch.float32)
    return folder


@pytest.fixture(scope="module")
def copied(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("copied") / "student"
    make.copied_student(tiny / "teacher", [0, 2, 5], folder, dtype=torch.float32)
    return folder
