"""Tokens on disk: rows are tokenized once, whoever trains on them, and read by memory map.

    <folder>/00000.arrow  00000.json  ...      a shard of rows as tokens, and what was written of it, last
             tokens.json  lengths.npy          all shards, written when all are there

The folder's name is a hash of all that decides its content. A killed tokenization goes on at the first shard that is not whole.
"""

from __future__ import annotations

import hashlib
import logging
import os
import uuid
from collections.abc import Callable, Mapping
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset, Features, List, Value
from datasets.table import MemoryMappedTable, concat_tables

from llmkd.data import shard_workers
from llmkd.data.arrays import is_saved, save
from llmkd.errors import InputError
from llmkd.files import read_checked, sha256, sync, write_checked
from llmkd.processes import StoppedWaiting, only_one_in
from llmkd.progress import progress

log = logging.getLogger("llmkd")

Columns = Mapping[str, list[Any]]
"""Some rows, column by column."""
Encode = Callable[[Columns, list[int]], Columns]
"""From rows and their numbers to tokens, with two columns that decide whether a row is kept: `whole` (its tokens before any truncation) and
`useful` (whether it has a token to train)."""

SHARD_ROWS = 16_384
LOOKED_AT = 1000
"""Rows whose lengths are told where none is short enough."""
VERIFIED = 8 * 2**30
"""Up to so many bytes the hashes of files with another time of change are compared at a start. Above, their sizes alone."""
_TYPES = {
    **dict.fromkeys(("input_ids", "source_ids", "target_ids"), List(Value("int32"))),
    "trained": List(Value("bool")),
    "segments": List(Value("int8")),
    "class": Value("int32"),
    "length": Value("int32"),
    "row": Value("int64"),
}


@dataclass(frozen=True)
class Written:
    """A shard, or all shards together."""

    read: int
    """Rows of text."""
    rows: int
    """Those of them that are kept."""
    tokens: int
    long: int
    """Rows of more than `max_length` tokens."""
    useless: int
    """Rows without a token to train."""


@dataclass(frozen=True)
class Shard:
    """What was written of a shard."""

    file: str
    bytes: int
    changed: int
    """The file's time of change, in nanoseconds: where it is another, the content is compared."""
    sha256: str
    written: Written


@dataclass(frozen=True)
class TokenFiles:
    """The tokens of a source, whole on disk."""

    folder: Path
    shards: tuple[Shard, ...]

    @property
    def total(self) -> Written:
        """Of all shards."""
        each = [asdict(shard.written) for shard in self.shards]
        return Written(**{key: sum(written[key] for written in each) for key in each[0]})

    @property
    def digest(self) -> str:
        """A hash of the content, the same wherever the same tokens were made."""
        return hashlib.sha256("".join(shard.sha256 for shard in self.shards).encode()).hexdigest()[:16]

    def rows(self) -> Dataset:
        """All rows, over their files."""
        files = [str(self.folder / shard.file) for shard in self.shards if shard.written.rows]
        # as one data set at once: one for each file, put together, takes four times as long
        return Dataset(concat_tables(list(map(MemoryMappedTable.from_file, files))), fingerprint=self.digest)

    def lengths(self) -> np.ndarray:
        """[rows] int32, over its file."""
        return np.load(self.folder / "lengths.npy", mmap_mode="r")


def made(
    folder: Path,
    source: Callable[[], tuple[Dataset, Encode]],
    *,
    max_length: int,
    too_long: str,
    identity: Mapping[str, Any],
    asked: Callable[[], bool] = lambda: False,
) -> TokenFiles | None:
    """The tokens in `folder`; what is missing or damaged of them is made, with all cores.

    `source` gives the rows of text and what makes tokens of them; it is called only where something is missing. Where another process makes
    the same tokens, they are waited for. None where it was `asked` to stop before all were there. Raises InputError for a row that can't be
    tokenized, and where no row is left.
    """
    if (files := opened(folder)) is None:
        try:
            with only_one_in(folder, float("inf"), asked):
                files = recorded(folder)  # another process may have made them meanwhile
                if files is None or _damaged(files):
                    files = _made(folder, source(), max_length, too_long, identity, asked)
        except StoppedWaiting:
            return None
    if files is not None:
        _announce(files.total, max_length, too_long)
    return files


def recorded(folder: Path) -> TokenFiles | None:
    """The tokens in `folder` as they were recorded when all were there."""
    about = read_checked(folder / "tokens.json")
    try:
        return None if about is None else TokenFiles(folder, tuple(_shard(values) for values in about["shards"]))
    except (TypeError, KeyError):  # as another version wrote it
        return None


def opened(folder: Path) -> TokenFiles | None:
    """The tokens in `folder`, if they are whole and as they were written; a damaged file is named."""
    files = recorded(folder)
    if files is None:
        return None
    for name in (damaged := _damaged(files)):
        log.warning("%s: not what was written; it is made again", folder / name)
    return None if damaged else files


def _damaged(files: TokenFiles) -> list[str]:
    """The files that are not what was written."""
    verified = sum(shard.bytes for shard in files.shards) <= VERIFIED
    shards = [shard.file for shard in files.shards if not _is_whole(files.folder, shard, verified=verified)]
    return shards if is_saved(files.folder / "lengths.npy") else [*shards, "lengths.npy"]


def _shard(values: Mapping[str, Any]) -> Shard:
    return Shard(**{**values, "written": Written(**values["written"])})


def _is_whole(folder: Path, shard: Shard, *, verified: bool = True) -> bool:
    file = folder / shard.file
    try:
        state = file.stat()
        if state.st_size != shard.bytes:
            return False
        return state.st_mtime_ns == shard.changed or not verified or sha256(file) == shard.sha256
    except OSError:
        return False


def _made(
    folder: Path,
    source: tuple[Dataset, Encode],
    max_length: int,
    too_long: str,
    identity: Mapping[str, Any],
    asked: Callable[[], bool],
) -> TokenFiles | None:
    """Tokenize the shards that are missing, each in a process of its own, as many at a time as there are cores."""
    rows, encode = source
    for leftover in folder.glob("tmp*"):
        leftover.unlink()
    count = -(-len(rows) // SHARD_ROWS)
    missing = [number for number in range(count) if recorded_shard(folder, number) is None]
    write = partial(_write_shard, folder, rows, encode, max_length, too_long)
    workers = min(len(os.sched_getaffinity(0)), len(missing))
    total = min(len(missing) * SHARD_ROWS, len(rows))
    if missing:
        with progress("tokenizing", total=total, unit="rows") as advance:
            try:
                for shard in shard_workers.written(write, missing, workers, asked):
                    advance(shard.written.read)
            except BrokenProcessPool as error:
                raise InputError(
                    f"{folder}: a process that made tokens was killed, most likely for want of memory; the same command goes on where it "
                    "stopped, with fewer processes if it may use fewer cores (taskset -c 0-3 ...)"
                ) from error
    shards = [shard for number in range(count) if (shard := recorded_shard(folder, number)) is not None]
    if len(shards) < count:
        return None
    files = TokenFiles(folder, tuple(shards))
    check_some(files.total, max_length, rows, encode)
    record(files, identity)
    return files


def record(files: TokenFiles, identity: Mapping[str, Any]) -> None:
    """Write down that all shards are there. `identity`: what decides them, as JSON."""
    lengths: Any = files.rows().data.column("length")
    save(files.folder / "lengths.npy", lengths.to_numpy().astype(np.int32))
    write_checked(
        files.folder / "tokens.json",
        {"identity": identity, **asdict(files.total), "shards": [asdict(shard) for shard in files.shards]},
    )


def record_shard(file: Path, written: Written) -> Shard:
    """Write down what a shard's file, which is in place, holds."""
    state = file.stat()
    shard = Shard(file.name, state.st_size, state.st_mtime_ns, sha256(file), written)
    write_checked(file.with_suffix(".json"), asdict(shard))
    return shard


def recorded_shard(folder: Path, number: int) -> Shard | None:
    """A shard that is there and whole."""
    about = read_checked(folder / f"{number:05d}.json")
    try:
        shard = None if about is None else _shard(about)
    except (TypeError, KeyError):  # as another version wrote it
        return None
    # the file beside the record, not that of a record which took its place
    return shard if shard is not None and shard.file == f"{number:05d}.arrow" and _is_whole(folder, shard) else None


def _write_shard(folder: Path, rows: Dataset, encode: Encode, max_length: int, too_long: str, number: int) -> Shard:
    """Tokenize the rows of a shard into its file, and record it."""
    first = number * SHARD_ROWS
    part = rows.select(range(first, min(first + SHARD_ROWS, len(rows))))
    dropped = {"long": 0, "useless": 0}

    def kept(columns: Columns, places: list[int]) -> Columns:
        return kept_rows(encode(columns, [first + place for place in places]), max_length, too_long, dropped)

    file = folder / f"{number:05d}.arrow"
    names = kept(part[:1], [0]).keys()
    dropped.update(long=0, useless=0)
    tokens = part.map(
        kept,
        batched=True,
        with_indices=True,
        remove_columns=part.column_names,
        features=Features({name: _TYPES[name] for name in names}),
        cache_file_name=str(file),
        load_from_cache_file=False,
        new_fingerprint=f"llmkd-{number}",  # it is written into the file: the same rows are the same bytes
    )
    lengths: Any = tokens.data.column("length")  # not tokens["length"], which is read row by row
    written = Written(len(part), len(tokens), int(lengths.to_numpy().sum()), **dropped)
    sync(file)
    return record_shard(file, written)


def kept_rows(encoded: Columns, max_length: int, too_long: str, dropped: dict[str, int]) -> Columns:
    """The rows that are trained on, without the columns that say so; the others are counted."""
    long, useful = np.array(encoded["whole"]) > max_length, np.array(encoded["useful"], dtype=bool)
    dropped["long"] += int(long.sum())
    dropped["useless"] += int((~useful).sum())
    places = np.flatnonzero(useful & (~long | (too_long == "truncate")))
    return {
        name: [values[place] for place in places] for name, values in encoded.items() if name not in ("whole", "useful")
    }


def mapped_rows(rows: Dataset, encode: Encode, *, max_length: int, too_long: str) -> Dataset:
    """As `made`, for few rows, in memory."""
    dropped = {"long": 0, "useless": 0}
    tokens = rows.map(
        lambda columns, numbers: kept_rows(encode(columns, numbers), max_length, too_long, dropped),
        batched=True,
        with_indices=True,
        remove_columns=rows.column_names,
        load_from_cache_file=False,
        new_fingerprint=uuid.uuid4().hex,  # datasets' own would be a hash of all that `encode` holds
    )
    total = Written(read=len(rows), rows=len(tokens), tokens=0, **dropped)
    check_some(total, max_length, rows, encode)
    _announce(total, max_length, too_long)
    return tokens


def check_some(total: Written, max_length: int, rows: Dataset, encode: Encode) -> None:
    """Raise InputError where no row is left, with how long the first ones are."""
    if total.rows:
        return
    first = rows[:LOOKED_AT]
    lengths = sorted(encode(first, list(range(len(next(iter(first.values()))))))["whole"])
    shortest, middle, longest = lengths[0], lengths[len(lengths) // 2], lengths[-1]
    which = "the rows" if len(lengths) == len(rows) else f"the first {len(lengths):,} rows"
    spread = f"{which} have {shortest:,} to {longest:,}, half of them up to {middle:,}"
    said = f"no row has a token to train within {max_length:,} tokens; {spread}"
    if longest <= max_length:
        raise InputError(
            f"data.max_length: {said}, so that none of these is too long: give rows with something to train"
        )
    cure = (
        f"{longest:,}, which is enough for all"
        if middle <= max_length
        else f"{middle:,}, enough for half, to {longest:,}, for all"
    )
    raise InputError(f"data.max_length: {said}; write {cure}")


def _announce(total: Written, max_length: int, too_long: str) -> None:
    if total.long or total.useless:
        log.info(
            "data: %d of %d rows are used; %d longer than %d tokens (%s), %d with nothing to train (dropped)",
            total.rows, total.read, total.long, max_length, "truncated" if too_long == "truncate" else "dropped", total.useless,
        )  # fmt: skip
