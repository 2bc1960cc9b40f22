"""The checksums of a checkpoint's files, compared before any of them is opened, and those of what a finished run leaves.

    checkpoints/step-00000100/checksums.json      {"shards/….pt": SHA-256, "rng-0.pt": …, "state.json": …}
    initial/checksums.json, best/step-…/checksums.json      as a checkpoint's, of the models that a run goes on with when it is resumed
    checksums.json                                {"model/model.safetensors": {"bytes": …, "changed": …, "sha256": …}, "metrics.jsonl": …}

Every rank reads its share of a checkpoint's files, as it wrote its share of them. They guard against damage; that a file from elsewhere
runs no code when it is read is seen to in `llmkd.distributed.shards`. Of a finished run rank 0 reads the files whose time of change is
another.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import logging
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from llmkd.distributed.ranks import World, on_every_rank, on_main
from llmkd.errors import InputError
from llmkd.files import (
    file_record,
    is_as_recorded,
    read,
    read_checked,
    sha256,
    write_checked,
    write_json_durably,
    write_text,
)
from llmkd.processes import LOCK, only_one_in

log = logging.getLogger("llmkd")

FILE = "checksums.json"
META, SUMMARY = "llmkd.json", "summary.json"
NOT_KEPT = (SUMMARY, FILE, "README.md")
"""Files of a finished run without a checksum of their own: a card is for people to edit."""


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


def damage_together(world: World, folder: Path) -> str | None:
    """`damage`, each rank reading its share of the files (all ranks take part)."""
    return on_main(world, lambda: damage(folder, only=())) or damage_by_shares(world, folder)


def damage_by_shares(world: World, folder: Path) -> str | None:
    """As `damage_together`, of a folder whose checksums are known to be there."""
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


def finish(run: Path, summary: Mapping[str, object]) -> None:
    """Publish `summary.json`, which a finished run has, after the checksums of it and of all that the run leaves beside checkpoints."""
    text = json.dumps(summary, indent=1, allow_nan=False, ensure_ascii=False)
    kept = [
        file
        for file in (*run.glob("[!.]*"), *(run / "model").rglob("*"))
        if file.is_file() and file.name not in NOT_KEPT
    ]
    sums = {str(file.relative_to(run)): file_record(file) for file in sorted(kept)}
    sums[SUMMARY] = {"bytes": len(text.encode()), "changed": 0, "sha256": hashlib.sha256(text.encode()).hexdigest()}
    write_checked(run / FILE, sums)
    write_text(run / SUMMARY, text)


def is_finished(run: Path) -> bool:
    """Whether a training folder holds all that a run leaves, as it left it: a kill may come between the model and the summary.

    Raises InputError for a damaged model. Other damaged files decide nothing any more, and are told.
    """
    if not (run / "model" / META).is_file() or not (run / SUMMARY).is_file():
        return False
    if (run / LOCK).is_file():  # its holder may have been killed after its work was done
        with contextlib.suppress(InputError), only_one_in(run, patience_seconds=0):
            pass
    sums = read_checked(run / FILE)
    if sums is None:
        if (run / FILE).exists():
            _tell(f"{run / FILE} is damaged, so that nothing of {run} is compared with what was written")
        sums = {}
    for name in (name for name, record in sums.items() if not is_as_recorded(run / name, record)):
        if name.startswith("model/"):
            raise _damaged(run / name, run)
        again = "; it is written again" if name == SUMMARY else "; what a report shows of it may be wrong"
        _tell(f"{run / name} is not what was written when the run ended{again}")
    if SUMMARY in sums:
        return is_as_recorded(run / SUMMARY, sums[SUMMARY])
    summary = read(run / SUMMARY)
    return isinstance(summary, dict) and "steps" in summary


def publish(folder: Path, about: str) -> None:
    """Publish a model folder's `llmkd.json` with this text, after the checksums of its other files."""
    files = [file for file in sorted(folder.rglob("*")) if file.is_file() and file.name not in (FILE, META)]
    write_checked(folder / FILE, {str(file.relative_to(folder)): file_record(file) for file in files})
    write_text(folder / META, about)


def is_published(folder: Path, about: str) -> bool:
    """Whether a model folder was published with this text and is as it was then; a damaged file is named."""
    sums = read_checked(folder / FILE)
    if sums is None or not (folder / META).is_file() or (folder / META).read_bytes() != about.encode():
        return False
    damaged = [name for name, record in sums.items() if not is_as_recorded(folder / name, record)]
    for name in damaged:
        _tell(f"{folder / name} is not what was written; the folder is made again")
    return not damaged


def meta_of(run: Path) -> dict[str, Any]:
    """What a finished run's model/llmkd.json says of its making. Raises InputError where it is damaged."""
    about = read(run / "model" / META)
    if not isinstance(about, dict) or not isinstance(about.get("inputs"), dict):
        raise _damaged(run / "model" / META, run)
    return about


def _damaged(file: Path, run: Path) -> InputError:
    return InputError(
        f"{file} is damaged: it is not what was written when the run ended; put it back, or remove {run / 'model'} to have the student "
        "exported again from the last checkpoint"
    )


@functools.cache
def _tell(sentence: str) -> None:
    """Once in a process: a study asks for its students more than once."""
    log.warning(sentence)
