"""What DeepSpeed compiles with the machine's C++ compiler at its first use: announced, and refused with the cure where it can't be."""

from __future__ import annotations

import importlib.util
import logging
import os
import shutil
import time
from pathlib import Path
from typing import Any

from llmkd.distributed.ranks import World  # noqa: F401  (sets the accelerator before DeepSpeed is imported)
from llmkd.errors import InputError

# isort: split
import deepspeed
import torch

log = logging.getLogger("llmkd")
STALE_SECONDS = 600
"""No compilation takes as long. For the lock of one that was killed torch would wait without end."""
POLL_SECONDS = 0.5


def check_cpu_adam() -> None:
    """Compile (once per machine) or load the optimizer of an offloaded student. Raises InputError where that is not possible."""
    key, other = "DeepSpeed configuration: an offloaded optimizer", "use a configuration without offload_optimizer"
    _check(
        deepspeed.ops.op_builder.CPUAdamBuilder(),
        key,
        f"install a C++ compiler (Debian: apt-get install g++ ninja-build), or {other}",
    )


def check_asynchronous_io(key: str) -> None:
    """Compile (once per machine) or load what reads and writes NVMe. Raises InputError where that is not possible."""
    what = f"{key}: nvme needs DeepSpeed's asynchronous I/O, which"
    if torch.cuda.is_available() and torch.version.cuda is not None and not _cuda_toolkit():
        raise InputError(
            f"{what} beside a GPU is compiled with the CUDA toolkit, and there is none at CUDA_HOME; install the toolkit of CUDA "
            f"{torch.version.cuda} and set CUDA_HOME to its folder, or write cpu"
        )
    packages = "libaio and a C++ compiler (Debian: apt-get install libaio-dev g++ ninja-build)"
    _check(deepspeed.ops.op_builder.AsyncIOBuilder(), what, f"install {packages}, or write cpu")


def _cuda_toolkit() -> bool:
    """Whether the CUDA toolkit is where torch's compilations look for it."""
    # here: it brings setuptools, which changes sys.path, and only offloaded runs need it
    from torch.utils import cpp_extension

    return cpp_extension.CUDA_HOME is not None and Path(cpp_extension.CUDA_HOME, "include").is_dir()


def _check(builder: Any, what: str, cure: str) -> None:
    # here: it brings setuptools, which changes sys.path, and only offloaded runs need it
    from torch.utils.cpp_extension import get_default_build_root

    root = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or get_default_build_root())
    _wait_for_others(root, builder.name)
    if shutil.which(os.environ.get("CXX", "c++")) is None:
        raise InputError(f"{what} is compiled on first use, and there is no C++ compiler; {cure}")
    if not list(root.glob(f"**/{builder.name}/*.so")):
        log.info("DeepSpeed compiles its %s, at the first use on a machine; that takes a minute or two", builder.name)
    try:
        builder.load(verbose=False)
    except Exception as error:  # a missing compiler, header or library, each with an error of its own
        reason = (str(error).strip().splitlines() or ["no reason given"])[-1]
        raise InputError(f"{what} is compiled on first use and could not be ({reason}); {cure}") from error


def _wait_for_others(root: Path, name: str) -> None:
    """Wait until no other process compiles `name`, whose lock a killed one leaves behind. Raises InputError where one is too old."""
    started = time.monotonic()
    announced: set[Path] = set()
    while locks := list(root.glob(f"**/{name}/lock")):
        for lock in locks:
            try:
                age = time.time() - lock.stat().st_mtime
            except FileNotFoundError:  # released meanwhile
                continue
            # the wait counts too: another machine's clock may be ahead
            if max(age, time.monotonic() - started) > STALE_SECONDS:
                raise InputError(
                    f"{lock}: left by a compilation that was killed, for which every later one waits; remove that file and start again"
                )
            if lock not in announced:
                log.info("waits for %s, made by another compilation; if none runs, remove it", lock)
                announced.add(lock)
        time.sleep(POLL_SECONDS)


def lacking_to_compile(*, gpu: bool = True) -> str | None:
    """What torch.compile needs for a GPU, or a CPU, and does not find on this machine; None where nothing is missing."""
    if not gpu:
        compilers = [os.environ["CXX"]] if os.environ.get("CXX") else ["g++", "clang++", "c++"]
        return None if any(map(shutil.which, compilers)) else "a C++ compiler (Debian: apt-get install g++)"
    if importlib.util.find_spec("triton") is None:
        return "Triton (pip install triton)"
    compilers = [os.environ["CC"]] if os.environ.get("CC") else ["gcc", "clang", "cc"]
    return None if any(map(shutil.which, compilers)) else "a C compiler (Debian: apt-get install gcc)"
