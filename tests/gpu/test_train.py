"""On GPUs: the same run as plain PyTorch's on a CPU, within bf16's and TF32's rounding. Run with `pytest -m gpu tests/gpu`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from llmkd.distributed.launch import launch
from llmkd.recipe.recipe import load_recipe
from llmkd.training import initial
from tests.quantized import plain_folder
from tests.tiny import plain_run

pytestmark = pytest.mark.gpu
IN_4_BITS = {"rank": 4, "alpha": 8, "quantize": "nf4"}


@pytest.mark.parametrize(
    ("stage", "placement", "dtype", "tolerance", "objective"),
    [
        ("zero2", "replicated", "float32", 1e-3, {}),
        ("zero3", "zero3", "float32", 1e-3, {}),
        ("zero3", "zero3", "bfloat16", 0.05, {}),
        ("zero3", "pipeline", "float32", 1e-3, {}),
        ("zero3", "cache", "float32", 1e-3, {}),
        ("zero2", "replicated", "float32", 1e-3, {"student.lora": {"rank": 4, "alpha": 8, "dora": True}}),
        ("zero3", "zero3", "bfloat16", 0.05, {"student.lora": {"rank": 4, "alpha": 8}}),
        ("zero2", "replicated", "float32", 1e-3, {"teacher.quantize": "nf4", "student.lora": IN_4_BITS}),
        ("zero2", "replicated", "bfloat16", 0.05, {"teacher.quantize": "nf4", "student.lora": IN_4_BITS}),
    ],
)
def test_losses_on_gpus_are_those_of_plain_pytorch(
    tiny: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    stage: str,
    placement: str,
    dtype: str,
    tolerance: float,
    objective: dict[str, Any],
) -> None:
    if not torch.cuda.is_available():
        pytest.fail("this test was asked for by -m gpu, and there is no CUDA device")
    monkeypatch.delenv("DS_ACCELERATOR", raising=False)
    changes: dict[str, Any] = {
        "train.deepspeed": stage,
        "train.dtype": dtype,
        "train.micro_batch_size": 1,
        "teacher.placement": placement,
        "teacher.dtype": dtype,
        **objective,
    }
    ranks = min(torch.cuda.device_count(), 8)
    if placement == "pipeline":
        changes["teacher.stages"] = min(ranks, 2)  # 6 blocks make no 8 stages
    if placement == "cache":
        changes |= {"cache.path": str(tmp_path / "cache"), "cache.dtype": dtype}
    sets = [part for key, value in changes.items() for part in ("--set", f"{key}={value}")]
    run = tmp_path / "run"
    if placement == "cache":
        assert launch(ranks, ["--recipe", str(tiny / "recipe.yaml"), "--cache-only", *sets]).code == 0
    assert launch(ranks, ["--recipe", str(tiny / "recipe.yaml"), "--output", str(run), *sets]).code == 0
    recipe = load_recipe(tiny / "recipe.yaml").changed(objective)
    initial.initial_student(recipe, tiny / "teacher", tmp_path / "student")
    teacher, start = tiny / "teacher", tmp_path / "student"
    if "teacher.quantize" in objective:  # unpacked on the GPU, and plain from there on
        teacher, start = plain_folder(teacher, tmp_path / "teacher"), plain_folder(start, tmp_path / "start")
        recipe = recipe.changed({"teacher.quantize": "none", "student.lora.quantize": "none"})
    _, losses = plain_run(recipe, teacher, start)
    logged = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for ours, theirs in zip(logged, losses, strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=tolerance)


@pytest.mark.parametrize("rule", ["influence", "perplexity"])
def test_measured_blocks_are_those_of_a_cpu(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rule: str
) -> None:
    if not torch.cuda.is_available():
        pytest.fail("this test was asked for by -m gpu, and there is no CUDA device")
    found = []
    for device in ("cuda", "cpu"):
        monkeypatch.delenv("DS_ACCELERATOR", raising=False)
        if device == "cpu":
            monkeypatch.setenv("DS_ACCELERATOR", "cpu")
            monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
        chosen = ["--set", f"student.copy_blocks={rule}", "--output", str(tmp_path / device)]
        assert launch(1, ["--recipe", str(tiny / "recipe.yaml"), *chosen]).code == 0
        found.append(json.loads((tmp_path / device / "blocks.json").read_text()))
    on_gpu, on_cpu = found
    assert on_gpu["blocks"] == on_cpu["blocks"]
    if rule == "influence":
        assert on_gpu["influence"] == pytest.approx(on_cpu["influence"], rel=1e-3)
    else:
        assert [one["block"] for one in on_gpu["removed"]] == [one["block"] for one in on_cpu["removed"]]
