"""The files of a teacher's cache: which tensors a shard holds, how shards are written, checked and mapped into memory.

    cache/  manifest.json              what it holds, of what it was made, and of each shard its rows, size and SHA-256
            shard-00000.safetensors    the states of rows [first, last), token after token without padding, row after row

While it is being written, `plan.json` stands in for the manifest, each finished shard has its record in `shard-00000.json`, and a shard
that a signal cut short lies in `shard-00000.partial.safetensors`. Every file is written beside and put in place by one rename.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from llmkd.errors import InputError
from llmkd.files import checksum, sha256, sync, write_checked, write_json_durably
from llmkd.layer_map import EMBEDDING, OtherState, State
from llmkd.teachers.quantization import LARGEST, STORED

FORMAT = 1
IDS, LOG_PROBABILITIES, OFFSETS, DONE = "top_k.ids", "top_k.log_probabilities", "offsets", "done"
IDENTITY = {
    "teacher": "another teacher",
    "teacher.dtype": "a teacher in another dtype",
    "teacher.quantize": "a teacher whose blocks' weights were kept otherwise",
    "tokenizer": "another tokenizer",
    "data": "other data",
}
"""The inputs of a cache that have a fingerprint -> what a message calls one that differs."""


@dataclass(frozen=True)
class Contents:
    """What a cache holds of each token, and the inputs that it was made from."""

    identity: dict[str, str]
    """The fingerprints, by the keys of IDENTITY."""
    recipe: dict[str, object]
    """Recipe keys that help to say why a fingerprint differs."""
    rows: int
    tokens: int
    hidden: int
    dtype: str
    """A key of quantization.STORED."""
    blocks: tuple[int, ...]
    """The teacher's blocks, EMBEDDING for the embeddings' output."""
    final: bool
    """Whether the final state is there."""
    top_k: int | None
    """How many log-probabilities are there; None: none."""
    columns: int | None
    """Over how many tokens of the vocabulary they were normalised: those that both heads have."""


@dataclass(frozen=True)
class Shard:
    """The record of a finished shard."""

    file: str
    first: int
    last: int
    tokens: int
    bytes: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """A whole cache. The file also has, under `made`, the versions, the commit and the recipe's name of its writing."""

    contents: Contents
    shards: tuple[Shard, ...]


def state_name(state: State) -> str:
    """The tensor that holds this state of every token."""
    if isinstance(state, OtherState):
        return state.value
    return "embedding" if state == EMBEDDING else f"block.{state}"


def state_names(contents: Contents) -> list[str]:
    """The tensors of states [tokens, H], in a fixed order."""
    return [state_name(state) for state in (*contents.blocks, *([OtherState.FINAL] if contents.final else []))]


def layout(contents: Contents, tokens: int) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Name -> (shape, dtype) of all that a shard holds of so many tokens."""
    tensors: dict[str, tuple[tuple[int, ...], torch.dtype]] = {}
    for name in state_names(contents):
        tensors[name] = ((tokens, contents.hidden), STORED[contents.dtype])
        if contents.dtype in LARGEST:
            tensors[f"{name}.scale"] = ((tokens,), torch.float32)
    if contents.top_k is not None:
        tensors[IDS] = ((tokens, contents.top_k), torch.int32)
        # float32 whatever `dtype` is: the mass of all other tokens is 1 - Σ, which has no digits to lose.
        tensors[LOG_PROBABILITIES] = ((tokens, contents.top_k), torch.float32)
    return tensors


def sizes(contents: Contents) -> dict[str, int]:
    """Name -> bytes in the whole cache; a state's scales count with it."""
    total: Counter[str] = Counter()
    for name, (shape, dtype) in layout(contents, contents.tokens).items():
        key = "top_k" if name.startswith("top_k") else name.removesuffix(".scale")
        total[key] += torch.Size(shape).numel() * dtype.itemsize
    return dict(total)


def shard_ranges(lengths: Sequence[int], bytes_per_token: int, shard_bytes: int) -> list[tuple[int, int]]:
    """Row ranges [first, last) of shards of at most so many bytes, or of one row: the same on any number of ranks."""
    ranges, first, size = [], 0, 0
    for row, length in enumerate(lengths):
        here = length * bytes_per_token
        if size and size + here > shard_bytes:
            ranges.append((first, row))
            first, size = row, 0
        size += here
    return [*ranges, (first, len(lengths))]


# ---------------------------------------------------------------------------------------------------------------------
# Whether a cache fits a run


def unfit(have: Contents, want: Contents) -> str | None:
    """Why a cache that has `have` can't serve a run that needs `want`, as the predicate of a sentence about the cache; None if it can."""
    for key, name in IDENTITY.items():
        if have.identity.get(key) != want.identity.get(key):  # a key that few have is left out
            return f"was made of {name}{_named(key, have.recipe, want.recipe)}"
    if have.dtype != want.dtype and (state_names(want) or state_names(have)):
        return f"stores {have.dtype}, the recipe's cache.dtype is {want.dtype}"
    missing = [state_name(block) for block in want.blocks if block not in have.blocks]
    if missing:
        return f"holds {', '.join(state_names(have)) or 'no states'} and lacks {', '.join(missing)}"
    if want.final and not have.final:
        return "holds no final state, which the divergence (loss.kl) or the last pair (final_state: normed) needs"
    if want.top_k is not None and (have.top_k, have.columns) != (want.top_k, want.columns):
        stored = "no" if have.top_k is None else f"the {have.top_k} likeliest tokens' (of {have.columns})"
        return f"holds {stored} log-probabilities, the recipe asks for cache.top_k {want.top_k} (of {want.columns})"
    return None


def _named(key: str, have: Mapping[str, Any], want: Mapping[str, Any]) -> str:
    for name in sorted(have.keys() | want.keys()):
        if name.split(".")[0] == key.split(".")[0] and have.get(name) != want.get(name):
            return f" ({name} was {have.get(name)!r}, now {want.get(name)!r})"
    return ""


# ---------------------------------------------------------------------------------------------------------------------
# Writing


def shard_file(folder: Path, number: int, *, partial: bool = False) -> Path:
    """The file of a shard, or of its part that was done when a signal came."""
    return folder / f"shard-{number:05d}{'.partial' if partial else ''}.safetensors"


def write_shard(file: Path, tensors: dict[str, Tensor], rows: tuple[int, int]) -> None:
    """Write a shard and then its record; a file without a record does not count."""
    tmp = file.with_name(file.name + ".tmp")
    save_file(tensors, tmp)
    sync(tmp)
    tokens = int(tensors[OFFSETS][-1])
    shard = Shard(file.name, *rows, tokens, tmp.stat().st_size, sha256(tmp))
    os.replace(tmp, file)
    write_json_durably(file.with_suffix(".json"), asdict(shard))


def record(file: Path) -> Shard | None:
    """The record of a finished shard whose file is there in its size; None where there is none."""
    try:
        shard = Shard(**json.loads(file.with_suffix(".json").read_text()))
        return shard if file.stat().st_size == shard.bytes else None
    except (OSError, ValueError, TypeError):
        return None


def read_partial(file: Path) -> dict[str, Tensor] | None:
    """The tensors of an interrupted shard, if its file is as it was written."""
    shard = record(file)
    if shard is None or sha256(file) != shard.sha256:
        return None
    with safe_open(file, framework="pt") as tensors:
        return {name: tensors.get_tensor(name).clone() for name in tensors.keys()}  # noqa: SIM118 (no mapping)


def remove(file: Path) -> None:
    """Remove a shard's file and record, if they are there."""
    file.with_suffix(".json").unlink(missing_ok=True)
    file.unlink(missing_ok=True)


def finish(folder: Path, contents: Contents, shards: Sequence[Shard], made: Mapping[str, str | None]) -> None:
    """Publish the manifest over the shards' records, which are then no longer needed."""
    values = {"format": FORMAT, "contents": asdict(contents), "shards": [asdict(s) for s in shards], "made": dict(made)}
    write_checked(folder / "manifest.json", values)
    for shard in shards:
        (folder / shard.file).with_suffix(".json").unlink(missing_ok=True)
    (folder / "plan.json").unlink(missing_ok=True)


def reopen(folder: Path, manifest: Manifest, damaged: Sequence[Shard]) -> None:
    """Turn a whole cache back into one under way, without the damaged shards."""
    for shard in manifest.shards:
        file = folder / shard.file
        remove(file) if shard in damaged else write_json_durably(file.with_suffix(".json"), asdict(shard))
    write_plan(folder, manifest.contents, [(s.first, s.last) for s in manifest.shards])
    (folder / "manifest.json").unlink()


def write_plan(folder: Path, contents: Contents, ranges: Sequence[tuple[int, int]]) -> None:
    """Record what is being written here, so that an interrupted run can go on with it."""
    values = {"format": FORMAT, "contents": asdict(contents), "ranges": list(ranges)}
    write_checked(folder / "plan.json", values)


def read_plan(folder: Path) -> tuple[Contents, list[tuple[int, int]]] | None:
    """What is being written here; None where nothing is. Raises InputError as `read_manifest`."""
    file = folder / "plan.json"
    if not file.is_file():
        return None
    values = _as_written(file)
    return _contents(values["contents"]), [(first, last) for first, last in values["ranges"]]


# ---------------------------------------------------------------------------------------------------------------------
# Reading


def read_manifest(folder: Path) -> Manifest | None:
    """The manifest; None where there is none. Raises InputError for one that was changed or that another version wrote."""
    file = folder / "manifest.json"
    if not file.is_file():
        return None
    values = _as_written(file)
    return Manifest(_contents(values["contents"]), tuple(Shard(**s) for s in values["shards"]))


def _json(file: Path) -> dict[str, Any]:
    """A file of this format, still to be parsed."""
    try:
        values = json.loads(file.read_text())
        format_ = values["format"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{file}: can't be read; remove {file.parent} and run llmkd cache again") from error
    if format_ != FORMAT:
        raise InputError(
            f"{file}: is of format {format_}, this version of llmkd reads {FORMAT}; run llmkd cache again elsewhere"
        )
    return values


def _as_written(file: Path) -> dict[str, Any]:
    """As `_json`. Raises InputError also where the file is not as it was written."""
    values = _json(file)
    if values.pop("checksum", None) != checksum(values):
        raise InputError(f"{file}: was changed since it was written; remove {file.parent} and run llmkd cache again")
    return values


def _contents(values: Mapping[str, Any]) -> Contents:
    return Contents(**{**values, "blocks": tuple(values["blocks"])})


def problem(folder: Path, shard: Shard, contents: Contents) -> str | None:
    """What is wrong with a shard, from its size and its header; None if nothing is."""
    file = folder / shard.file
    if not file.is_file():
        return "is missing"
    if file.stat().st_size != shard.bytes:
        return f"has {file.stat().st_size} bytes where {shard.bytes} were written"
    expected = layout(contents, shard.tokens)
    try:
        with safe_open(file, framework="pt") as tensors:
            names = set(tensors.keys())
            shapes = {name: tuple(tensors.get_slice(name).get_shape()) for name in expected.keys() & names}
    except (OSError, SafetensorError) as error:
        return f"can't be opened ({error})"
    as_written = {OFFSETS, *expected} <= names and shapes == {name: shape for name, (shape, _) in expected.items()}
    return None if as_written else "has another header"


def changed(folder: Path, shard: Shard) -> str | None:
    """What is wrong with a shard's bytes; None if they are those that were written."""
    return None if sha256(folder / shard.file) == shard.sha256 else "does not have the checksum it was written with"


def changed_shards(folder: Path, shards: Sequence[Shard]) -> Iterator[tuple[Shard, str | None]]:
    """`changed` of each; several at a time, since hashing leaves the interpreter free."""
    with ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:
        yield from zip(shards, pool.map(lambda shard: changed(folder, shard), shards), strict=True)


def damage(folder: Path, shard: Shard, what: str) -> InputError:
    """The error for a shard that must not be trained on."""
    return InputError(
        f"{folder / shard.file}: {what}, so nothing is trained on it; run llmkd cache again with the same recipe, which makes the "
        "damaged shards anew and keeps the others"
    )


def mapped(folder: Path, shard: Shard, names: Sequence[str]) -> dict[str, Tensor]:
    """The shard's tensors over its file: no byte is read before it is used."""
    try:
        with safe_open(folder / shard.file, framework="pt") as tensors:
            return {name: tensors.get_tensor(name) for name in [OFFSETS, *names]}
    except (OSError, SafetensorError) as error:
        raise damage(folder, shard, f"can't be opened ({error})") from error
