"""Arrays on disk, each completely or not at all and with its hash, read by memory map."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from llmkd.files import sha256, write_text
from llmkd.processes import only_one_in


def save(file: Path, numbers: np.ndarray) -> None:
    """Write an array completely or not at all, and its hash."""
    tmp = file.with_name(f"{file.name}.tmp.npy")
    np.save(tmp, numbers)
    checksum = sha256(tmp)
    os.replace(tmp, file)
    write_text(file.with_suffix(".sha256"), checksum)


def is_saved(file: Path) -> bool:
    """Whether an array's file is what was written."""
    try:
        return file.with_suffix(".sha256").read_bytes() == sha256(file).encode()
    except OSError:
        return False


def saved(folder: Path, name: str, make: Callable[[], Sequence[np.ndarray]], count: int) -> list[np.ndarray]:
    """Arrays that belong to the tokens in `folder`, over their files; made where they are not there yet, or damaged."""
    files = [folder / f"{name}-{number}.npy" for number in range(count)]
    if not all(map(is_saved, files)):
        with only_one_in(folder, patience_seconds=float("inf")):  # of several nodes or runs
            if not all(map(is_saved, files)):
                for file, numbers in zip(files, make(), strict=True):
                    save(file, numbers)
    return [np.load(file, mmap_mode="r") for file in files]
