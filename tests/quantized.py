"""Models with weights in 4 bits, for tests: what they compute with, as plain folders."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from llmkd.models import load
from llmkd.models.four_bit import four_bit


def needs_bitsandbytes() -> None:
    """Skip a test, or a file of them, where the package is missing."""
    pytest.importorskip("bitsandbytes", reason="weights in 4 bits take bitsandbytes: pip install 'llmkd[bnb]'")


def plain_folder(folder: Path, copy: Path) -> Path:
    """A copy of a model folder with the weights, in float32, that the model computes with when its blocks' are kept in 4 bits."""
    model = load.load_model(folder, dtype=torch.float32, ds_config=None, attention="sdpa", quantize="nf4")
    shutil.copytree(folder, copy)
    weights = load_file(folder / "model.safetensors")
    maps = {f"{name}.weight": layer.weight.cpu() for name, layer in four_bit(model).items()}
    assert maps and maps.keys() < weights.keys()
    save_file({**weights, **maps}, copy / "model.safetensors", metadata={"format": "pt"})
    return copy
