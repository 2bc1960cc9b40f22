"""Provenance of a result: versions, hardware, memory and commit, written beside every number that is published."""

from __future__ import annotations

import os
import platform
import resource
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from llmkd import __version__


def versions(*packages: str) -> dict[str, str]:
    """Package -> installed version, llmkd's own first; a package that is not installed is left out."""
    installed = {"llmkd": __version__, "python": platform.python_version()}
    for package in packages:
        try:
            installed[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return installed


def hardware() -> dict[str, Any]:
    """This machine: processor, the cores this process may use, memory in GiB, and its GPUs."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {"cpu": _cpu(), "cores": len(os.sched_getaffinity(0)), "memory_gib": round(memory, 1), "gpus": gpus}


def card_bytes() -> int | None:
    """The memory of the smallest of this process's GPUs; None where there is none."""
    count = torch.cuda.device_count()
    return min((torch.cuda.get_device_properties(number).total_memory for number in range(count)), default=None)


def peak_memory_gib() -> float:
    """The most memory this process has held: the GPU allocator's peak, or on a CPU machine the resident set's."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, platform.machine())


def commit() -> str | None:
    """The git commit of this checkout, with `+` where files differ from it; None outside a checkout."""
    root = Path(__file__).resolve().parent.parent
    if not (root / ".git").exists():
        return None
    try:
        head = _git(root, "rev-parse", "--short=12", "HEAD")
        return head + ("+" if _git(root, "status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.CalledProcessError):  # git is not installed, or the checkout is another user's
        return None


def _git(root: Path, *arguments: str) -> str:
    command = ["git", "-C", str(root), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
