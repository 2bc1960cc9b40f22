"""Rows of text: from files, folders, the hub, or the built-in task."""

from __future__ import annotations

import gzip
import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from datasets import Dataset, Features, Json, Value, load_dataset

from llmkd import hub
from llmkd.data import records
from llmkd.data.formats import COLUMNS
from llmkd.errors import InputError, first_line
from llmkd.files import fetched_by

LOADERS = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".csv": "csv"}
JsonRow = dict[str, Any]
MOST_RECORDS = 10_000_000
"""Rows of the built-in task; they are made in memory."""
TEXT_COLUMNS = tuple(column for column in COLUMNS if column != "label")
"""Columns of a CSV that stay text where all of their cells look like numbers or dates."""
SPLITS = ("train", "validation", "valid", "val", "dev", "test")


def load_rows(
    source: str,
    *,
    name: str | None,
    split: str,
    rows: int | None,
    records_seed: int = 0,
    columns: Mapping[str, str] | None = None,
) -> Dataset:
    """The rows of the built-in task, of local files or of a hub data set; `columns`: their own names -> new ones.

    Raises InputError when there are none.
    """
    columns = columns or {}
    return renamed(_loaded(source, name, split, rows, records_seed, columns), columns)


def _loaded(
    source: str, name: str | None, split: str, rows: int | None, records_seed: int, columns: Mapping[str, str]
) -> Dataset:
    if source == "records":
        if rows is None or rows > MOST_RECORDS:
            raise InputError(
                f"data.rows: the built-in task is endless; write how many rows to use, e.g. rows: 20000 (at most {MOST_RECORDS})"
            )
        examples = records.rows(split, records_seed, 0, rows)
        return Dataset.from_list([{key: e[key] for key in ("prompt", "completion")} for e in examples])
    path = Path(source).expanduser()
    if path.exists():
        data = _local_rows(path, split, columns)
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


def renamed(rows: Dataset, columns: Mapping[str, str]) -> Dataset:
    """The rows with the user's columns called as the format calls them.

    Raises InputError for a column that is not there, and for a new name that another column has already.
    """
    for theirs, ours in columns.items():
        if theirs not in rows.column_names:
            raise InputError(
                f"data.columns: the data has no column {theirs!r}, it has {', '.join(rows.column_names)}; write one of these"
            )
        if ours in rows.column_names and ours not in columns:
            raise InputError(
                f"data.columns: {theirs} is to be {ours}, and the data has a column {ours} too; take one of them out of the data"
            )
    return rows.rename_columns(dict(columns)) if columns else rows


def source_contents(source: str, split: str) -> str | None:
    """A hash of the local files that a source's rows come from; None for the built-in task and the hub."""
    files = local_files(source, split)
    if not files:
        return None
    digest = hashlib.sha256()
    for file in files:
        with file.open("rb") as stream:
            digest.update(f"{file.name} {hashlib.file_digest(stream, 'sha256').hexdigest()} ".encode())
    return digest.hexdigest()[:16]


def local_files(source: str, split: str) -> list[Path]:
    """The local files that a source's rows come from; none for the built-in task and the hub."""
    path = Path(source).expanduser()
    return [] if source == "records" or not path.exists() else _files(path, split)


def _files(path: Path, split: str) -> list[Path]:
    if not path.is_dir() and not path.is_file():
        raise InputError(f"data.source: {str(path)!r} is a device or a pipe; give a file, or a folder of files")
    return _of_split(sorted(f for f in path.iterdir() if _kind(f)), path, split) if path.is_dir() else [path]


def _local_rows(path: Path, split: str, columns: Mapping[str, str]) -> Dataset:
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
    try:
        if kind == "json":
            return _json_rows(files)
        # In a CSV an empty cell is an empty text, the words None and NA are words, and 007 is no number.
        own = [theirs for theirs, ours in columns.items() if ours in TEXT_COLUMNS]
        texts = [*(column for column in TEXT_COLUMNS if column not in columns), *own]
        converters = {"keep_default_na": False, "converters": dict.fromkeys(texts, str)}
        options: dict[str, Any] = converters if kind == "csv" else {}
        return load_dataset(kind, data_files={"rows": [str(f) for f in files]}, split="rows", **options)
    except InputError:
        raise
    except Exception as error:  # datasets wraps every parser's own error
        if not any(f.stat().st_size for f in files) or "corresponds to no data" in str(error):
            raise InputError(f"data.source: {str(path)!r} has no rows; give data with some") from error
        reason = first_line(error.__cause__ or error)
        raise InputError(f"data.source: {str(path)!r} can't be read as {kind} ({reason}); correct the file") from error


def _json_rows(files: list[Path]) -> Dataset:
    """The objects of JSON files, each value as its file has it.

    The loader of datasets makes dates of texts, and gives a turn of a chat the keys that other turns have. Raises InputError that names the
    file and the line where a line is no UTF-8, no JSON or no object.
    """
    kinds: dict[str, set[type]] = {}
    contents = hashlib.sha256()
    for row in _objects([str(file) for file in files]):
        contents.update(json.dumps(row).encode())
        for key, value in row.items():
            kinds.setdefault(key, set()).add(type(value))
    if not kinds:
        raise InputError(f"data.source: {str(files[0])!r} has no rows; give data with some")
    features = Features({key: _feature(types - {type(None)}) for key, types in kinds.items()})
    # datasets keeps what a generator gave, by its arguments: the contents are one of them
    return Dataset.from_generator(
        _encoded,
        features=features,
        gen_kwargs={"files": [str(file) for file in files], "features": features, "contents": contents.hexdigest()},
    )


def _feature(types: set[type]) -> Value | Json:
    """What holds a column of these types: of one alone itself, of lists, objects or a mixture JSON."""
    (only,) = types if len(types) == 1 else (None,)
    names: dict[type | None, str] = {str: "string", bool: "bool", int: "int64", float: "float64"}
    return Value(names[only]) if only in names else Json()


def _encoded(files: list[str], features: Features, contents: str) -> Iterator[JsonRow]:
    """The rows as datasets takes them: a value of a Json column as JSON text."""
    as_json = [key for key, feature in features.items() if isinstance(feature, Json)]
    for row in _objects(files):
        whole = {**dict.fromkeys(features), **row}
        yield whole | {key: json.dumps(whole[key]) for key in as_json}


def _objects(files: list[str]) -> Iterator[JsonRow]:
    """The objects of files with one in a line, or with one list of them."""
    for name in files:
        with (gzip.open if name.endswith(".gz") else open)(name, "rb") as lines:
            for number, line in enumerate(lines, start=1):
                where = f"data.source: {name!r}, line {number}"
                if number == 1 and line.lstrip().startswith(b"["):
                    values = _read(line + lines.read(), where)
                    yield from (_checked(value, f"data.source: {name!r}, row {n}") for n, value in enumerate(values))
                elif line.strip():
                    yield _checked(_read(line, where), where)


def _read(text: bytes, where: str) -> Any:
    try:
        return json.loads(text.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        byte = text[error.start]
        raise InputError(f"{where}: not UTF-8 text (the byte 0x{byte:02x}); save the file in that encoding") from error
    except (ValueError, RecursionError) as error:
        reason = error.msg if isinstance(error, json.JSONDecodeError) else first_line(error)
        raise InputError(f"{where}: not valid JSON ({reason}); correct the line") from error


def _checked(value: object, where: str) -> JsonRow:
    if isinstance(value, dict):
        return value
    raise InputError(
        f'{where}: a row is an object, this is {type(value).__name__}; write {{"prompt": ..., "completion": ...}}'
    )


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
        return hub.fetch(lambda: load_dataset(source, name, split=split))
    except hub.OutOfReach as error:
        raise InputError(f"data.source: {source!r} is not a file here, and {error}") from error
    except Exception as error:  # the hub client has many network errors; all mean the same to the user
        raise InputError(
            f"data.source: {source!r} is not a file here and could not be loaded from the hub ({first_line(error)}); check the "
            "name, data.name and data.split, or give a local file"
        ) from error
