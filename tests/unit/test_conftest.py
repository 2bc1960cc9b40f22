"""Who sees a GPU: the tests marked so where they are asked for, in one process and in the workers of pytest-xdist."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from llmkd.files import ROOT

ASKING = """
import os, pytest

@pytest.mark.gpu
def test_on_the_gpu():
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "7" and "DS_ACCELERATOR" not in os.environ

def test_on_the_cpu():
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "" and os.environ["DS_ACCELERATOR"] == "cpu"
"""


@pytest.mark.parametrize("workers", ["0", "2"])
@pytest.mark.parametrize("asked", ["gpu", "not slow and not gpu"])
def test_a_gpu_is_seen_by_the_tests_that_are_marked_so_and_no_others(tmp_path: Path, workers: str, asked: str) -> None:
    (tmp_path / "test_asking.py").write_text(ASKING)
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers =\n    gpu: needs a GPU\n")
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("PYTEST_", "DS_ACCELERATOR"))}
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "tests.conftest", "-n", workers, "-m", asked, "test_asking.py"],
        cwd=tmp_path,
        env={**environment, "CUDA_VISIBLE_DEVICES": "7", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0 and "1 passed" in done.stdout, done.stdout + done.stderr
