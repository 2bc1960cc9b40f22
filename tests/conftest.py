"""Shared fixtures: a tiny teacher on disk and rows of uneven length, made once per session."""

from __future__ import annotations

import gc
import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

asked = " ".join(sys.argv)
# The CPU tests stay on the CPU of a GPU machine. A worker of pytest-xdist has no such arguments: it inherits what was set here.
if "PYTEST_XDIST_WORKER" not in os.environ and ("gpu" not in asked or "not gpu" in asked):
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("HF_DATASETS_CACHE", tempfile.mkdtemp(prefix="llmkd-tests-"))


def pytest_configure() -> None:
    """Let the servers that fork ranks live as long as the session: pytest changes its own variables with each test, which no rank reads."""
    from llmkd import starting
    from tests.distributed import warm

    starting.IMPORTS = warm.MODULES
    whole = starting.environment
    starting.environment = lambda: {key: value for key, value in whole().items() if not key.startswith("PYTEST_")}


def pytest_collectstart() -> None:
    """Look for no garbage in what is imported: there is none, and it takes a quarter of that time."""
    gc.disable()


def pytest_collection_finish() -> None:
    """Nor later, when most of each search would go there; DeepSpeed has one made with each engine."""
    gc.freeze()
    gc.enable()


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `teacher/` (a random 6-block Qwen3 with a tokenizer), `rows.jsonl` and `recipe.yaml`."""
    from tests.tiny import make

    folder = tmp_path_factory.mktemp("tiny")
    make(folder)
    return folder


@pytest.fixture(scope="session")
def world() -> Iterator[Any]:
    """A process group of this one process."""
    from llmkd.distributed import ranks

    ranks.quiet()
    yield ranks.start(60)
    ranks.stop()
