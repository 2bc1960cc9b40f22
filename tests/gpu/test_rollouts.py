"""On a GPU: texts that the student writes during training, by Hugging Face and by vLLM beside it. Run with `pytest -m gpu tests/gpu`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from llmkd.distributed.launch import launch
from llmkd.inference.vllm_setup import vllm_version
from llmkd.recipe.recipe import load_recipe
from llmkd.training import initial
from tests.tiny import plain_run

pytestmark = pytest.mark.gpu
GREEDY = {"max_new_tokens": 16, "temperature": 0.0, "every": 2}


def run_on_gpus(tiny: Path, run: Path, changes: dict[str, Any]) -> list[dict[str, float]]:
    """The logged values of an on-policy run."""
    if not torch.cuda.is_available():
        pytest.fail("this test was asked for by -m gpu, and there is no CUDA device")
    sets = [part for key, value in changes.items() for part in ("--set", f"{key}={json.dumps(value)}")]
    ranks = min(torch.cuda.device_count(), 8)
    assert launch(ranks, ["--recipe", str(tiny / "recipe.yaml"), "--output", str(run), *sets]).code == 0
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("stage", ["zero2", "zero3"])
def test_hugging_faces_texts_teach_as_a_plain_loop_s_do(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: str
) -> None:
    """Greedy, in fp32: rounding may turn a text, but hardly in so few steps of so small a model."""
    monkeypatch.delenv("DS_ACCELERATOR", raising=False)
    changes = {
        "loss.ce": 0.0,
        "rollouts": {**GREEDY, "backend": "hf"},
        "train.deepspeed": stage,
        "train.micro_batch_size": 1,
    }
    logged = run_on_gpus(tiny, tmp_path / "run", changes)
    recipe = load_recipe(tiny / "recipe.yaml").changed({key: changes[key] for key in ("loss.ce", "rollouts")})
    initial.initial_student(recipe, tiny / "teacher", tmp_path / "student")
    _, losses = plain_run(recipe, tiny / "teacher", tmp_path / "student")
    for ours, theirs in zip(logged, losses, strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=5e-3)


@pytest.mark.skipif(vllm_version() is None, reason="vLLM is not installed: LLMKD_VLLM=1 bash scripts/environment.sh")
def test_vllm_writes_beside_the_training(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It sleeps between rounds, and says so where weights can't be taken in place; its texts are Hugging Face's, greedy in fp32."""
    monkeypatch.delenv("DS_ACCELERATOR", raising=False)
    logged = {}
    for backend in ("hf", "vllm"):
        changes = {"loss.ce": 0.0, "rollouts": {**GREEDY, "backend": backend}, "train.micro_batch_size": 1}
        logged[backend] = run_on_gpus(tiny, tmp_path / backend, changes)
    for ours, theirs in zip(logged["vllm"], logged["hf"], strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=5e-3)
    assert (tmp_path / "vllm" / "rollouts" / "writer-0.log").is_file()
