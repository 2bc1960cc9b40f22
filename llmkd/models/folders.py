"""HF model folders: finding them, fetching them, and noticing when one has changed."""

from __future__ import annotations

import functools
import hashlib
import json
import logging
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import constants, snapshot_download
from safetensors import SafetensorError, safe_open
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_checkpoint_conversion_mapping
from transformers.core_model_loading import WeightRenaming

from llmkd import hub
from llmkd.errors import InputError, first_line
from llmkd.files import fetched_by

log = logging.getLogger("llmkd")


def resolve(path: str, what: str, revision: str | None = None) -> Path:
    """The local folder of a model: a folder as it is, a hub name by download of its safetensors, tokenizer and configuration.

    Raises InputError when it is neither, when the hub can't be reached, or when it holds no safetensors.
    """
    folder = Path(path).expanduser()
    if not folder.is_dir():
        if folder.is_absolute() or path.startswith(".") or path.count("/") != 1:
            raise InputError(
                f"{what}: no folder {path!r}; give an HF model folder or a hub name such as Qwen/Qwen3-8B{fetched_by(path)}"
            )
        folder = _download(path, what, revision)
    if not (folder / "config.json").is_file() and (folder / "adapter" / "adapter_config.json").is_file():
        raise InputError(
            f"{what}: {path!r} holds adapters alone, and no model that they are added to; train it with student.lora.export: both or "
            "merged, or give a folder into which peft's merge_and_unload has added them to their model"
        )
    if not (folder / "config.json").is_file():
        raise InputError(f"{what}: {path!r} holds no config.json; give a folder written by save_pretrained")
    if not list(folder.glob("*.safetensors")):
        raise InputError(f"{what}: {path!r} holds no .safetensors file; convert it (pickled weights are never loaded)")
    _check_whole(folder, what)
    return folder


def folder_contents(folder: Path, *, weights_alone: bool = False) -> str:
    """A hash of a model folder: of each file's name, its size, and the parts that `_sample` reads, as a large model's bytes take minutes.

    `weights_alone`: of the weights and config.json, without the tokenizer.
    """
    digest = hashlib.sha256()
    files = [f for f in folder.iterdir() if f.suffix in (".safetensors", ".json", ".txt", ".model")]
    if weights_alone:
        files = [f for f in files if f.suffix == ".safetensors" or f.name == "config.json"]
    for file in sorted(files):
        digest.update(f"{file.name} {file.stat().st_size} ".encode())
        for part in _sample(file):
            digest.update(part)
    return digest.hexdigest()[:16]


def contents_of(paths: Mapping[str, str | None]) -> dict[str, str]:
    """`<key>:contents`, a hash of the folder, for each key whose path is a folder here; a hub's model is known by its name."""
    given = {key: Path(path).expanduser() for key, path in paths.items() if path is not None}
    return {f"{key}:contents": folder_contents(folder) for key, folder in given.items() if folder.is_dir()}


def _sample(file: Path) -> Iterator[bytes]:
    """All of a file up to 2 MiB; of a larger safetensors file its header and the first 64 KiB of every tensor, of another its two ends.

    A change elsewhere (some rows edited within a tensor) is not noticed; training changes every tensor's start.
    """
    size = file.stat().st_size
    with file.open("rb") as stream:
        if size <= 2 * 2**20:
            yield stream.read()
        elif file.suffix != ".safetensors":
            yield stream.read(2**20)
            stream.seek(-(2**20), os.SEEK_END)
            yield stream.read()
        else:  # eight bytes hold the length of the header, and the header each tensor's place behind it
            start = 8 + int.from_bytes(stream.read(8), "little")
            if start > size:
                raise InputError(f"{file} is not whole; download or copy the model again")
            header = stream.read(start - 8)
            yield header
            places = [value["data_offsets"] for name, value in json.loads(header).items() if name != "__metadata__"]
            for first, last in sorted(places):
                stream.seek(start + first)
                yield stream.read(min(last - first, 2**16))


def _check_whole(folder: Path, what: str) -> None:
    """Raise InputError if a file of weights is missing or cut short, or is a git-lfs pointer; only headers are read."""
    file = index = folder / "model.safetensors.index.json"
    try:
        files = set(tensor_files(folder).values()) if index.is_file() else folder.glob("*.safetensors")
        for file in sorted(files):
            with safe_open(file, framework="pt"):
                pass
    except (OSError, SafetensorError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(
            f"{what}: {file} is not whole ({first_line(error)}); download or copy the model again"
        ) from error


def _download(name: str, what: str, revision: str | None) -> Path:
    patterns = ["*.safetensors", "*.json", "*.txt", "*.model", "*.jinja", "*.py"]

    def take() -> Path:
        folder = Path(snapshot_download(name, revision=revision, allow_patterns=patterns))
        if constants.HF_HUB_OFFLINE and not list(folder.glob("*.safetensors")):
            raise FileNotFoundError("the cache holds a part of the model, without its weights")
        return folder

    try:
        folder = hub.fetch(take)
    except hub.OutOfReach as error:
        raise InputError(f"{what}: no folder {name!r} here, and {error}") from error
    except Exception as error:  # the hub client has a score of network errors; all mean the same to the user
        raise InputError(
            f"{what}: no folder {name!r} here, and the hub did not give it ({first_line(error)}); give the path of a "
            "local HF folder"
        ) from error
    if hub.last_problem() is not None:
        log.warning("%s: the hub can't be reached (%s); taking %s from its cache", what, hub.last_problem(), name)
    return folder


def copy_tokenizer(source: Path, folder: Path) -> None:
    """Copy everything of a model folder that is neither weights nor configuration: tokenizer, chat template, generation settings."""
    for file in source.iterdir():
        if (
            file.is_file()
            and file.suffix in (".json", ".txt", ".model", ".jinja", ".py")
            and file.name not in ("config.json", "llmkd.json", "checksums.json", "adapter_config.json")
            and ".index." not in file.name
        ):
            shutil.copyfile(file, folder / file.name)  # the bytes alone: who may read them is for the umask to say


def tensor_files(folder: Path) -> dict[str, Path]:
    """Tensor name -> the file that holds it."""
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        return {name: folder / file for name, file in json.loads(index.read_text())["weight_map"].items()}
    names: dict[str, Path] = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as tensors:
            names.update(dict.fromkeys(tensors.keys(), file))
    return names


def has_own_head(folder: Path, model: type[PreTrainedModel] | None) -> bool:
    """Whether the folder of a model with tied embeddings holds another head than its embeddings: transformers then unties the two."""
    ties = getattr(model, "_tied_weights_keys", None) or {}
    if not isinstance(ties, dict) or not list(folder.glob("*.safetensors")):
        return False
    files = tensor_files(folder)
    names = [_stored_names(pair, files, model) for pair in ties.items() if "embed_tokens" not in pair[0]]
    return any(
        head and source and not _same_tensor(_stamp(files[head]), head, _stamp(files[source]), source)
        for head, source in names
    )


def _stored_names(names: Sequence[str], files: Iterable[str], model: Any) -> list[str | None]:
    """What the files call tensors of a model, None for one that they lack: GPT-NeoX's lm_head is their embed_out."""
    mapping = get_checkpoint_conversion_mapping(model.__name__) or []
    renamings = [renaming for renaming in mapping if isinstance(renaming, WeightRenaming)]
    prefix = f"{model.base_model_prefix}."  # which files of the bare model lack
    stored: dict[str, str] = {}
    for file_name in files:
        name = file_name
        for renaming in renamings:
            name, _ = renaming.rename_source_key(name)
        stored[name] = stored[prefix + name] = file_name
    return [stored.get(name) for name in names]


def _stamp(file: Path) -> tuple[Path, int, int]:
    """A file and what tells that it has changed."""
    return file, file.stat().st_size, file.stat().st_mtime_ns


@functools.cache
def _same_tensor(file: tuple[Path, int, int], name: str, other: tuple[Path, int, int], other_name: str) -> bool:
    """Whether two stored matrices are equal, read 4,096 rows at a time."""
    with safe_open(file[0], framework="pt") as ours, safe_open(other[0], framework="pt") as theirs:
        one, two = ours.get_slice(name), theirs.get_slice(other_name)
        if one.get_shape() != two.get_shape():
            return False
        starts = range(0, one.get_shape()[0], 4096)
        return all(torch.equal(one[start : start + 4096], two[start : start + 4096]) for start in starts)
