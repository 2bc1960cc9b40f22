"""Rows of text: from files, folders, the hub, or the built-in task."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path
from typing import Any

from datasets import Dataset, load_dataset

from llmkd.data import records
from llmkd.errors import InputError, first_line
from llmkd.files import fetched_by

LOADERS = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".csv": "csv"}
SPLITS = ("train", "validation", "valid", "val", "dev", "test")


def load_rows(source: str, *, name: str | None, split: str, rows: int | None, records_seed: int = 0) -> Dataset:
    """The rows of the built-in task, of local files or of a hub data set. Raises InputError when there are none."""
    if source == "records":
        if rows is None:
            raise InputError("data.rows: the built-in task is endless; write how many rows to use, e.g. rows: 20000")
        examples = records.rows(split, records_seed, 0, rows)
        return Dataset.from_list([{key: e[key] for key in ("prompt", "completion")} for e in examples])
    path = Path(source).expanduser()
    if path.exists():
        data = _local_rows(path, split)
    elif source.endswith((*LOADERS, ".gz")) or source.startswith((".", "/", "~")) or source.count("/") > 1:
        raise InputError(
            f"data.source: no file or folder {source!r}; give a .jsonl, .parquet or .csv, a folder of them, a hub "
            f"name, or records{fetched_by(source)}"
        )
    else:
        data = _hub_rows(source, name, split)
    if rows is not None:
        data = data.select(range(min(rows, len(data))))
    if len(data) == 0:
        raise InputError(f"data.source: {source!r} (split {split!r}) has no rows; give data with some")
    return data


def source_contents(source: str, split: str) -> str | None:
    """A hash of the local files that a source's rows come from; None for the built-in task and the hub."""
    path = Path(source).expanduser()
    if source == "records" or not path.exists():
        return None
    digest = hashlib.sha256()
    for file in _files(path, split):
        with file.open("rb") as stream:
            digest.update(f"{file.name} {hashlib.file_digest(stream, 'sha256').hexdigest()} ".encode())
    return digest.hexdigest()[:16]


def _files(path: Path, split: str) -> list[Path]:
    return _of_split(sorted(f for f in path.iterdir() if _kind(f)), path, split) if path.is_dir() else [path]


def _local_rows(path: Path, split: str) -> Dataset:
    if not split.replace("_", "").isalnum():
        raise InputError(
            f"data.split: {split!r} is more than a name, which only the hub understands; use data.rows to take fewer"
        )
    files = _files(path, split)
    kinds = {_kind(f) for f in files}
    if len(kinds) != 1 or None in kinds:
        raise InputError(
            f"data.source: {str(path)!r} must be (or hold) files of one kind: {', '.join(LOADERS)}, each may end in .gz"
        )
    kind = str(kinds.pop())
    # In a CSV an empty cell is an empty text, and the words None and NA are words.
    options: dict[str, Any] = {"keep_default_na": False} if kind == "csv" else {}
    try:
        return load_dataset(kind, data_files={"rows": [str(f) for f in files]}, split="rows", **options)
    except Exception as error:  # datasets wraps every parser's own error
        if not any(f.stat().st_size for f in files) or "corresponds to no data" in str(error):
            raise InputError(f"data.source: {str(path)!r} has no rows; give data with some") from error
        reason = first_line(error.__cause__ or error)
        raise InputError(f"data.source: {str(path)!r} can't be read as {kind} ({reason}); correct the file") from error


def _of_split(files: list[Path], folder: Path, split: str) -> list[Path]:
    """The files of a folder; where one is named after a split (train.jsonl, test-0001.parquet), this split's alone."""

    def named(file: Path, word: str) -> bool:
        return re.search(rf"(^|[^a-z]){word}([^a-z]|$)", file.name.lower()) is not None

    if not any(named(file, word) for file in files for word in SPLITS):
        return files
    chosen = [file for file in files if named(file, split)]
    if not chosen:
        raise InputError(
            f"data.split: no file of {str(folder)!r} is named after {split!r} ({', '.join(f.name for f in files)}); "
            "write the name of one of these, or give one file as data.source"
        )
    return chosen


def _kind(file: Path) -> str | None:
    suffixes = [s for s in file.suffixes if s != ".gz"]
    return LOADERS.get(suffixes[-1]) if suffixes else None


def _hub_rows(source: str, name: str | None, split: str) -> Dataset:
    try:
        return load_dataset(source, name, split=split)
    except Exception as error:  # the hub client has many network errors; all mean the same to the user
        raise InputError(
            f"data.source: {source!r} is not a file here and could not be loaded from the hub ({first_line(error)}); check the "
            "name, data.name and data.split, or give a local file"
        ) from error
