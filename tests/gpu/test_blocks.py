"""On a GPU: compiled blocks, and Liger's kernels, against blocks as they are. Run with `pytest -m gpu tests/gpu`."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from llmkd.distributed.launch import launch

pytestmark = pytest.mark.gpu


def _trained(tiny: Path, run: Path, changes: dict[str, Any]) -> list[dict[str, Any]]:
    """The lines of the log of a run on one GPU, its norms reported."""
    changes = {"train.dtype": "bfloat16", "teacher.dtype": "bfloat16", "loss.report_norms_every": 1, **changes}
    sets = [part for key, value in changes.items() for part in ("--set", f"{key}={value}")]
    assert launch(1, ["--recipe", str(tiny / "recipe.yaml"), "--output", str(run), *sets]).code == 0
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def _numbers(norms: dict[str, Any]) -> dict[str, float]:
    """The norms of a line, by name, those of pairs among them."""
    found: dict[str, float] = {}
    for name, value in norms.items():
        if isinstance(value, dict):
            found |= {f"{name} {part}": number for part, number in value.items()}
        elif value is not None:
            found[name] = value
    return found


@pytest.mark.parametrize("stage", ["zero2", "zero3"])
@pytest.mark.parametrize("key", ["train.compile=blocks", "train.kernels=liger"])
def test_losses_and_norms_are_those_of_blocks_as_they_are(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: str, key: str
) -> None:
    """In bf16 to 1 %. Liger's norm writes its gradient over the one that comes in: the report must have read that before."""
    if not torch.cuda.is_available():
        pytest.fail("this test was asked for by -m gpu, and there is no CUDA device")
    if key.endswith("liger") and importlib.util.find_spec("liger_kernel") is None:
        pytest.skip("liger-kernel is not installed")
    monkeypatch.delenv("DS_ACCELERATOR", raising=False)
    shared = {"train.deepspeed": stage, "teacher.placement": "zero3" if stage == "zero3" else "replicated"}
    shared |= {"train.activation_checkpointing": stage == "zero3", "matching.final_state": "normed"}
    name, _, value = key.partition("=")
    expected = _trained(tiny, tmp_path / "plain", shared)
    found = _trained(tiny, tmp_path / "other", {**shared, name: value})
    for ours, theirs in zip(found, expected, strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-2)
        norms, wanted = _numbers(ours["norms"]), _numbers(theirs["norms"])
        assert len(wanted) > 3 and norms == pytest.approx(wanted, rel=3e-2)
