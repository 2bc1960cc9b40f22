"""What a step does to the device: it does not wait for it within a micro-batch, and keeps it busy. Run with `pytest -m gpu tests/gpu`."""

from __future__ import annotations

import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from llmkd.data.batches import collate
from llmkd.files import ROOT
from llmkd.models import load
from llmkd.teachers.resident import ResidentTeacher
from tests.passes import distiller, step_settings

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def gpu() -> torch.device:
    if not torch.cuda.is_available():
        pytest.fail("this test was asked for by -m gpu, and there is no CUDA device")
    return torch.device("cuda")


@pytest.mark.parametrize("packed", [False, True])
def test_a_micro_batch_never_waits_for_the_device(tiny: Path, gpu: torch.device, *, packed: bool) -> None:
    """CUDA's own check: any call that would wait raises."""

    def load_model() -> torch.nn.Module:
        model = load.load_causal_lm(tiny / "teacher", dtype=torch.bfloat16, ds_config=None, attention="auto")
        return model.to(gpu)  # type: ignore[arg-type]

    pairs = ((0, 1), (1, 3))
    teacher = ResidentTeacher(load_model(), [1, 3], normed_last=False, ds_config=None)  # type: ignore[arg-type]
    module = distiller(load_model(), pairs).to(gpu)  # type: ignore[arg-type]
    rows = [{"input_ids": list(range(2, 2 + n)), "trained": [False] * 2 + [True] * (n - 2)} for n in (9, 4, 6)]
    batch, settings = collate(rows, pad_id=0, packed=packed).pinned(), step_settings(pairs)

    def micro_batch() -> None:
        here = batch.to(gpu)
        module(here, teacher.signals(here), settings).loss.backward()

    micro_batch()  # libraries and the allocator start
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        micro_batch()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_a_step_keeps_the_device_busy() -> None:
    """A sixth of the speed of large products at least: more is a goal of the benchmark, less is a mistake."""
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    for _ in range(3):
        torch.mm(a, b)
    torch.cuda.synchronize()
    began = time.perf_counter()
    for _ in range(20):
        torch.mm(a, b)
    torch.cuda.synchronize()
    peak = 20 * 2 * 8192**3 / (time.perf_counter() - began) / 1e12
    del a, b
    torch.cuda.empty_cache()
    options = ["--size", "medium", "--deepspeed", "zero2", "--repeat", "3", "--peak-tflops", f"{peak:.0f}"]
    only = [part for name in ("unavoidable", "llmkd/forward") for part in ("--only", name)]
    command = [sys.executable, "-m", "benchmarks.step", *options, *only]
    said = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=100)
    assert said.returncode == 0, said.stderr[-2000:]
    share = re.search(r"per rank, ([0-9.]+)% of", said.stdout)
    assert share is not None, said.stdout[-2000:]
    assert float(share[1]) >= 100 / 6
