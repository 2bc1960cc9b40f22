"""The forms of blocks that a step's benchmark compares, each in a process of its own, whose memory is free afterwards."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence

FORMS = ("plain", "compiled", "liger", "liger-compiled")
"""As `train.compile` and `train.kernels` make them."""


def alone(arguments: Sequence[str], form: str) -> int:
    """Run `benchmarks.step` with these arguments and one form of blocks; its exit code."""
    print(f"## {form} blocks\n", flush=True)
    command = [sys.executable, "-m", "benchmarks.step", *without_forms(arguments), "--blocks", form]
    return subprocess.run(command).returncode


def without_forms(arguments: Sequence[str]) -> list[str]:
    """A command's arguments but for --blocks and its values."""
    kept, rest = list[str](), iter(arguments)
    for argument in rest:
        if argument == "--blocks":
            next(rest)
        elif not argument.startswith("--blocks="):
            kept.append(argument)
    return kept
