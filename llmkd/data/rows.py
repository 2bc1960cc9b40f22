"""Rows of text: from files, folders, the hub, or the built-in task."""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from datasets import Dataset, Features, IterableDataset, Json, Value, load_dataset

from llmkd import hub
from llmkd.data import records
from llmkd.data.file_hashes import file_hash, keep
from llmkd.data.formats import COLUMNS
from llmkd.data.slices import sliced
from llmkd.data.splits import of_files
from llmkd.errors import InputError, first_line
from llmkd.files import fetched_by

LOADERS = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".csv": "csv"}
JsonRow = dict[str, Any]
MOST_RECORDS = 10_000_000
"""Rows of the built-in task; they are made in memory."""
TEXT_COLUMNS = tuple(column for column in COLUMNS if column != "label")
"""Columns of a CSV that stay text where all of their cells look like numbers or dates."""
HASHES = "hashes"
"""Beside the tokens, the folder of their sources' hashes."""
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
    else:
        _check_hub_name(source)
        data = _hub_rows(source, name, split)
    if rows is not None:
        data = data.select(range(min(rows, len(data))))
    if len(data) == 0:
        raise InputError(f"data.source: {source!r} (split {split!r}) has no rows; give data with some")
    return data


def _check_hub_name(source: str) -> None:
    """Raise InputError for the name of a file or folder that is not there."""
    if source.endswith((*LOADERS, ".gz")) or source.startswith((".", "/", "~")) or source.count("/") > 1:
        raise InputError(
            f"data.source: no file or folder {source!r}; give a .jsonl, .parquet or .csv, a folder of them, a hub "
            f"name, or records{fetched_by(source)}"
        )


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


def source_contents(source: str, split: str, hashes: Path | None = None) -> str | None:
    """A hash of a source's local files and of the slice that is taken of them; None for the built-in task and the hub.

    `hashes`: the folder in which the files' own may be kept (`llmkd.data.file_hashes`).
    """
    files = local_files(source, split)
    if not files:
        return None
    digest = hashlib.sha256(of_files(split)[1].encode())
    for file in files:
        digest.update(f"{file.name} {file_hash(file, hashes)} ".encode())
    return digest.hexdigest()[:16]


def keep_hashes(source: str, split: str, hashes: Path) -> None:
    """Keep what is known of a source's local files for later starts (`llmkd.data.file_hashes`)."""
    keep(local_files(source, split), hashes)


def stream_contents(source: str, split: str) -> str | None:
    """As `source_contents`, for files too large to read at each start: a hash of their names and sizes, and of each one's first MiB."""
    files = local_files(source, split)
    digest = hashlib.sha256()
    for file in files:
        with file.open("rb") as stream:
            digest.update(
                f"{file.name} {file.stat().st_size} {hashlib.sha256(stream.read(2**20)).hexdigest()} ".encode()
            )
    return digest.hexdigest()[:16] if files else None


def local_files(source: str, split: str) -> list[Path]:
    """The local files that a source's rows come from; none for the built-in task and the hub."""
    path = Path(source).expanduser()
    return [] if source == "records" or not path.exists() else _files(path, split)


def _files(path: Path, split: str) -> list[Path]:
    if not path.is_dir() and not path.is_file():
        raise InputError(f"data.source: {str(path)!r} is a device or a pipe; give a file, or a folder of files")
    of_split, _ = of_files(split)
    return _of_split(sorted(f for f in path.iterdir() if _kind(f)), path, of_split) if path.is_dir() else [path]


def _local_rows(path: Path, split: str, columns: Mapping[str, str]) -> Dataset:
    kind, files = _files_of_one_kind(path, split)
    with _readable(path, kind, files):
        rows = _json_rows(files) if kind == "json" else load_dataset(**_loading(kind, files, columns))
    return sliced(rows, split)


def _files_of_one_kind(path: Path, split: str) -> tuple[str, list[Path]]:
    """(the name of what loads them, the files of a split)."""
    files = _files(path, split)
    kinds = {_kind(f) for f in files}
    if len(kinds) != 1 or None in kinds:
        raise InputError(
            f"data.source: {str(path)!r} must be (or hold) files of one kind: {', '.join(LOADERS)}, each may end in .gz"
        )
    return str(kinds.pop()), files


def _loading(kind: str, files: list[Path], columns: Mapping[str, str]) -> dict[str, Any]:
    """What load_dataset is called with for these files."""
    # In a CSV an empty cell is an empty text, the words None and NA are words, and 007 is no number.
    own = [theirs for theirs, ours in columns.items() if ours in TEXT_COLUMNS]
    texts = [*(column for column in TEXT_COLUMNS if column not in columns), *own]
    converters = {"keep_default_na": False, "converters": dict.fromkeys(texts, str)}
    options: dict[str, Any] = converters if kind == "csv" else {}
    return {"path": kind, "data_files": {"rows": [str(f) for f in files]}, "split": "rows", **options}


@contextlib.contextmanager
def _readable(path: Path, kind: str, files: list[Path]) -> Iterator[None]:
    """Inside, what is wrong with the files is an InputError."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:  # datasets wraps every parser's own error
        if not any(f.stat().st_size for f in files) or "corresponds to no data" in str(error):
            raise InputError(f"data.source: {str(path)!r} has no rows; give data with some") from error
        reason = first_line(error.__cause__ or error)
        raise InputError(f"data.source: {str(path)!r} can't be read as {kind} ({reason}); correct the file") from error


def streamed_rows(source: str, *, name: str | None, split: str, columns: Mapping[str, str]) -> IterableDataset:
    """As `load_rows`, read while they are asked for and still under their own names (`renamed_row`); files are its shards."""
    path = Path(source).expanduser()
    if not path.exists():
        _check_hub_name(source)
        rows = _hub_rows(source, name, split, streaming=True)
    else:
        of_files(split, whole=True)
        kind, files = _files_of_one_kind(path, split)
        if kind == "json":
            rows = IterableDataset.from_generator(_objects, gen_kwargs={"files": [str(file) for file in files]})
        else:
            with _readable(path, kind, files):
                rows = load_dataset(**_loading(kind, files, columns), streaming=True)
    return rows


def renamed_row(row: JsonRow, columns: Mapping[str, str]) -> JsonRow:
    """A row with its columns called as the format calls them. Raises InputError as `renamed` does."""
    for theirs, ours in columns.items():
        if theirs not in row:
            raise InputError(
                f"data.columns: the row {json.dumps(row, default=str)[:80]} has no column {theirs!r}; write one of {', '.join(row)}"
            )
        if ours in row and ours not in columns:
            raise InputError(
                f"data.columns: {theirs} is to be {ours}, and the data has a column {ours} too; take one of them out of the data"
            )
    return {columns.get(key, key): value for key, value in row.items()}


def first_streamed_rows(
    source: str, *, name: str | None, split: str, columns: Mapping[str, str], count: int
) -> Dataset:
    """The first rows of a stream, in memory. Raises InputError where it has none."""
    rows = streamed_rows(source, name=name, split=split, columns=columns)
    first = [renamed_row(row, columns) for row in rows.take(count)]
    if not first:
        raise InputError(f"data.source: {source!r} (split {split!r}) has no rows; give data with some")
    if rows.features is not None:
        features = Features({columns.get(key, key): feature for key, feature in rows.features.items()})
        return Dataset.from_list(first, features=features)
    features = _features(first)
    return Dataset.from_list([_as_stored(row, features) for row in first], features=features)


def _json_rows(files: list[Path]) -> Dataset:
    """The objects of JSON files, each value as its file has it.

    The loader of datasets makes dates of texts, and gives a turn of a chat the keys that other turns have. Raises InputError that names the
    file and the line where a line is no UTF-8, no JSON or no object.
    """
    contents = hashlib.sha256()

    def hashed() -> Iterator[JsonRow]:
        for row in _objects([str(file) for file in files]):
            contents.update(json.dumps(row).encode())
            yield row

    features = _features(hashed())
    if not features:
        raise InputError(f"data.source: {str(files[0])!r} has no rows; give data with some")
    # datasets keeps what a generator gave, by its arguments: the contents are one of them
    return Dataset.from_generator(
        _encoded,
        features=features,
        gen_kwargs={"files": [str(file) for file in files], "features": features, "contents": contents.hexdigest()},
    )


def _features(rows: Iterable[JsonRow]) -> Features:
    """What holds the columns of these rows."""
    kinds: dict[str, set[type]] = {}
    for row in rows:
        for key, value in row.items():
            kinds.setdefault(key, set()).add(type(value))
    return Features({key: _feature(types - {type(None)}) for key, types in kinds.items()})


def _feature(types: set[type]) -> Value | Json:
    """What holds a column of these types: of one alone itself, of lists, objects or a mixture JSON."""
    (only,) = types if len(types) == 1 else (None,)
    names: dict[type | None, str] = {str: "string", bool: "bool", int: "int64", float: "float64"}
    return Value(names[only]) if only in names else Json()


def _encoded(files: list[str], features: Features, contents: str) -> Iterator[JsonRow]:
    """The rows as datasets takes them: a value of a Json column as JSON text."""
    for row in _objects(files):
        yield _as_stored(row, features)


def _as_stored(row: JsonRow, features: Features) -> JsonRow:
    whole = {**dict.fromkeys(features), **row}
    return whole | {key: json.dumps(whole[key]) for key, feature in features.items() if isinstance(feature, Json)}


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


def _hub_rows(source: str, name: str | None, split: str, **how: Any) -> Any:
    try:
        return hub.fetch(lambda: load_dataset(source, name, split=split, **how))
    except hub.OutOfReach as error:
        raise InputError(f"data.source: {source!r} is not a file here, and {error}") from error
    except Exception as error:  # the hub client has many network errors; all mean the same to the user
        raise InputError(
            f"data.source: {source!r} is not a file here and could not be loaded from the hub ({first_line(error)}); check the "
            "name, data.name and data.split, or give a local file"
        ) from error
