"""The checksums of a checkpoint's files: written last, compared before any file is opened.

    checkpoints/step-00000100/checksums.json      {"shards/….pt": SHA-256, "rng-0.pt": …, "state.json": …}

Every rank reads its share of the files, as it wrote its share of them. They guard against damage; that a file from elsewhere runs no
code when it is read is seen to in `llmkd.distributed.shards`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from llmkd.distributed.ranks import World, on_every_rank, on_main
from llmkd.files import read, sha256, write_json_durably

FILE = "checksums.json"


def write_checksums(world: World, folder: Path) -> None:
    """Hash all files of the folder and write down the sums (all ranks take part)."""
    names = on_main(world, lambda: sorted(_names(folder)))
    with ThreadPoolExecutor(1) as thread:
        own = names[world.rank :: world.size]
        shares = on_every_rank(world, thread, lambda: {name: sha256(folder / name) for name in own})
    if world.is_main:
        write_json_durably(folder / FILE, {name: value for share in shares for name, value in share.items()})


def damage(folder: Path, only: Iterable[str] | None = None) -> str | None:
    """The first fault of the folder's files, or of those named alone; None where all are as they were written (any one process)."""
    sums = read(folder / FILE)
    if not isinstance(sums, dict):
        return f"{FILE} is missing or damaged"
    if strange := sorted(_names(folder) - sums.keys()):
        return f"{strange[0]} is not among the files that were written"
    return _first_fault(folder, sums, sums if only is None else only)


def damage_by_shares(world: World, folder: Path) -> str | None:
    """`damage` of all files, each rank reading its share (all ranks take part)."""
    sums = on_main(world, lambda: read(folder / FILE))
    with ThreadPoolExecutor(1) as thread:
        own = sorted(sums)[world.rank :: world.size]
        faults = on_every_rank(world, thread, lambda: _first_fault(folder, sums, own))
    return next((fault for fault in faults if fault is not None), None)


def _names(folder: Path) -> set[str]:
    return {str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file() and file != folder / FILE}


def _first_fault(folder: Path, sums: Mapping[str, str], names: Iterable[str]) -> str | None:
    for name in names:
        try:
            if sha256(folder / name) != sums.get(name):
                return f"{name} is damaged: it does not hold what was written"
        except OSError as error:
            return f"{name} can't be read: {(error.strerror or 'unknown reason').lower()}"
    return None
