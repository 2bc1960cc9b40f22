"""Checkpoints, each whole or absent, and the export of a trained student.

    checkpoints/step-00000100/      DeepSpeed's shards, `state.json`, `rng-<rank>.pt`, `checksums.json`, `stream-<rank>.json`

The shards hold what is trained; what is frozen beside adapters is read again from the folder that the run starts from.
`state.json` holds the step, the number of ranks, what was trained, the validations so far, and by what the logs so far are known; where
rows are streamed, `stream-<rank>.json` holds each rank's place in the stream.

A checkpoint is written under a name ending in .tmp and then renamed; so is an exported model. Whatever else ends in .tmp was left by a
killed run, and the next one removes it. A damaged checkpoint is renamed to end in .damaged, and never used.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import random
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel

from llmkd.distributed.checksums import damage, damage_by_shares, write_checksums
from llmkd.distributed.engines import whole_state
from llmkd.distributed.ranks import World, barrier, on_main
from llmkd.distributed.shards import load_shards, merge_shards, save_shards
from llmkd.errors import ANOTHER_FOLDER, InputError
from llmkd.files import file_record, sync, write_folder
from llmkd.models.adapter_folders import adapter_tensors, write_adapter
from llmkd.models.folders import copy_tokenizer
from llmkd.models.lora import merged
from llmkd.recipe.inputs import input_text

log = logging.getLogger("llmkd")

TAG = "shards"
TEMPERATURES = "temperature.jsonl"
"""In the run's folder: each change of a dynamic temperature with the two cross-entropies that led to it; a resumed run reads its
temperature here."""
LOGS = ("metrics.jsonl", "rollouts.jsonl", TEMPERATURES)


def save(
    world: World,
    engine: Any,
    folder: Path,
    step: int,
    inputs: Mapping[str, object],
    keep: int,
    validations: Sequence[tuple[int, float]] = (),
    stream: Mapping[str, object] | None = None,
    rows: Sequence[str] = (),
) -> Path:
    """Save a sharded checkpoint (all ranks take part), publish it, and remove all but the newest `keep`.

    `stream`: this rank's place in its stream, where rows are streamed; `rows`: otherwise a hash of each source's tokens.
    """
    final = folder / f"step-{step:08d}"
    tmp = final.with_name(final.name + ".tmp")
    if world.is_main:
        _remove_leftovers(folder)
        tmp.mkdir(parents=True)
    barrier(world)
    save_shards(engine, tmp / TAG)
    torch.save(_rng_state(), tmp / f"rng-{world.rank}.pt")
    if stream is not None:
        (tmp / f"stream-{world.rank}.json").write_text(json.dumps(stream))
    barrier(world)
    if world.is_main:
        state = {"step": step, "world_size": world.size, "inputs": inputs, "validations": validations, "rows": rows}
        state["logs"] = {log.name: file_record(log) for log in map(folder.parent.joinpath, LOGS) if log.is_file()}
        (tmp / "state.json").write_text(json.dumps(state, indent=1))
    barrier(world)
    write_checksums(world, tmp)
    on_main(world, lambda: _publish(tmp, final, keep))
    return final


def _publish(tmp: Path, final: Path, keep: int) -> None:
    _sync(tmp)
    shutil.rmtree(final, ignore_errors=True)
    os.replace(tmp, final)
    for old in whole(final.parent)[:-keep]:  # a half-removed one must not look whole
        os.replace(old, old.with_name(f"{old.name}.old.tmp"))
    _remove_leftovers(final.parent)


def whole(folder: Path) -> list[Path]:
    """The published checkpoints, oldest first."""
    return sorted(p for p in folder.glob("step-*") if re.fullmatch(r"step-\d{8}", p.name))


@dataclass(frozen=True)
class Saved:
    """A published checkpoint: its folder, the step after which it was written, and the number of ranks that wrote it."""

    folder: Path
    step: int
    world_size: int
    validations: tuple[tuple[int, float], ...] = ()
    """Each validation so far: its step, and what validations are compared by."""
    rows: tuple[str, ...] = ()
    """A hash of each source's tokens."""


def newest(world: World, folder: Path, inputs: Mapping[str, object]) -> Saved | None:
    """The newest checkpoint whose files are as they were written; damaged newer ones are set aside (all ranks take part).

    Raises InputError if another recipe wrote it, or if every checkpoint is damaged.
    """
    saved = on_main(world, lambda: _newest(folder, inputs))
    fault = None if saved is None else damage_by_shares(world, saved.folder)
    if saved is None or fault is None:
        return saved
    on_main(world, lambda: _set_aside(saved.folder, fault))
    return newest(world, folder, inputs)


def _newest(folder: Path, inputs: Mapping[str, object]) -> Saved | None:
    """The newest checkpoint with an undamaged state.json. Raises InputError if another recipe wrote it."""
    _remove_leftovers(folder)
    while checkpoints := whole(folder):
        last = checkpoints[-1]
        fault = damage(last, only=["state.json"])
        if fault is None:
            state = json.loads((last / "state.json").read_text())
            check_same(state["inputs"], inputs, last)
            for name, record in state.get("logs", {}).items():
                _check_log(folder.parent / name, record, last)
            validations = tuple((int(step), float(value)) for step, value in state.get("validations", ()))
            return Saved(last, int(state["step"]), int(state["world_size"]), validations, tuple(state.get("rows", ())))
        _set_aside(last, fault)
    return None


def _check_log(file: Path, record: Mapping[str, Any], saved: Path) -> None:
    """Warn where a log does not begin with what it held when a checkpoint was saved: it decides nothing, so the run goes on.

    Raises InputError for the log of temperatures, whose last line a run goes on from.
    """
    try:
        with file.open("rb") as stream:
            begins = hashlib.sha256(stream.read(record["bytes"])).hexdigest()
    except OSError:
        begins = None
    if begins != record["sha256"] and file.name == TEMPERATURES:
        raise InputError(
            f"{file}: it does not begin with what it held when {saved} was saved, and this run's temperature goes on from it; put it back, "
            f"or remove {saved.parent} to begin again"
        )
    if begins != record["sha256"]:
        message = "%s does not begin with what it held when %s was saved; steps up to it may be missing or wrong there, and in the report"
        log.warning(message, file, saved)


def _set_aside(checkpoint: Path, fault: str) -> None:
    """Rename a damaged checkpoint, so that the one before it is the newest. Raises InputError where there is none before it."""
    if len(whole(checkpoint.parent)) == 1:
        raise InputError(
            f"{checkpoint}: {fault}; there is no checkpoint before it: put the file back, or remove {checkpoint.parent} to start from "
            "the beginning"
        )
    aside = checkpoint.with_name(f"{checkpoint.name}.damaged")
    shutil.rmtree(aside, ignore_errors=True)
    os.replace(checkpoint, aside)
    log.warning("%s: %s; renamed to %s; going on from the checkpoint before it", checkpoint, fault, aside.name)


def _remove_leftovers(folder: Path) -> None:
    """Remove what killed runs left half-written or half-removed."""
    for path in folder.glob("step-*.tmp"):
        shutil.rmtree(path)


def check_same(theirs: Mapping[str, object], ours: Mapping[str, object], where: Path) -> None:
    """Raise InputError that names the first recipe key in which the checkpoint or model at `where` differs from this run."""
    for key in sorted(theirs.keys() | ours.keys()):
        if theirs.get(key) != ours.get(key):
            before, now = input_text(theirs, key), input_text(ours, key)
            raise InputError(
                f"{where} was made by another recipe: {key} was {before}, now {now}; put the recipe back, remove {where}, or "
                f"{ANOTHER_FOLDER}"
            )


def load(world: World, engine: Any, saved: Saved) -> None:
    """Put engine, optimizer and random generators back as they were (all ranks take part).

    On another number of ranks than wrote it, the engine's configuration must come from `distributed.ds_configs.on_other_ranks`, and the
    random generators stay as they are.
    """
    if saved.world_size == world.size:
        load_shards(engine, saved.folder / TAG)
        _set_rng_state(torch.load(saved.folder / f"rng-{world.rank}.pt", weights_only=True))
        return
    tmp = saved.folder.with_name(f"{saved.folder.name}.whole.tmp")
    on_main(world, lambda: merge_shards(saved.folder / TAG, tmp / TAG))
    load_shards(engine, tmp / TAG)
    barrier(world)
    if world.is_main:
        shutil.rmtree(tmp)


def check_rows(saved: Saved | None, rows: Sequence[str], texts: Sequence[Path] = ()) -> None:
    """Raise InputError where a resumed run's tokens (`rows`: a hash of each source's) are not those that it was trained on.

    `texts`: the folders of tokens that a teacher wrote.
    """
    if saved is not None and saved.rows and tuple(rows) != saved.rows:
        why = "a data set of the hub has another revision, or packages are others; put them back"
        if texts:
            why = (
                "the teacher's texts are others, as those are that vLLM draws again in place of a damaged or lost file; put a copy of the "
                f"old files into {', '.join(map(str, texts))}"
            )
        raise InputError(
            f"data: its tokens are not those that {saved.folder} was trained on (now {', '.join(rows)}, then {', '.join(saved.rows)}): "
            f"{why}, or remove {saved.folder.parent} to begin again"
        )


def stream_place(world: World, saved: Saved) -> dict[str, Any]:
    """This rank's place in its stream. Raises InputError on another number of ranks: each has its own share of the rows."""
    if saved.world_size != world.size:
        raise InputError(
            f"data.streaming: {saved.folder} was saved by {saved.world_size} ranks, each at its own place in the stream, and these are "
            f"{world.size}; start {saved.world_size} ranks, or remove {saved.folder.parent} to begin again"
        )
    return json.loads((saved.folder / f"stream-{world.rank}.json").read_text())


def _rng_state() -> dict[str, Any]:
    version, words, gauss = random.getstate()
    name, keys, *counters = np.random.get_state()  # type: ignore[misc]
    state = {
        "torch": torch.get_rng_state(),
        "python": (version, list(words), gauss),
        "numpy": (str(name), torch.from_numpy(np.asarray(keys).astype(np.int64)), *counters),
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def _set_rng_state(state: Mapping[str, Any]) -> None:
    torch.set_rng_state(state["torch"])
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words), gauss))
    name, keys, *counters = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), *counters))
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


def _sync(folder: Path) -> None:
    """Wait until a folder's files are on the disk, before it is renamed."""
    for file in filter(Path.is_file, folder.rglob("*")):
        sync(file)


def export(
    world: World,
    model: PreTrainedModel,
    folder: Path,
    *,
    tokenizer_from: Path,
    card: str,
    meta: Mapping[str, object],
    form: Literal["merged", "adapter", "both"] = "merged",
    base: str = "",
) -> None:
    """Write the student as a clean HF folder: safetensors, tokenizer, generation config, model card, `llmkd.json` (all ranks take part).

    Adapters are added to the weights, or are written in adapter/ of the folder in place of these, or both. `base`: what they are added to.
    """
    state = whole_state(model, here=world.is_main)
    apart = adapter_tensors(model, state) if state and form != "merged" else {}
    state = merged(model, state)

    def write(tmp: Path) -> None:
        copy_tokenizer(tokenizer_from, tmp)
        if form != "merged":
            write_adapter(model, apart, tmp / "adapter", base=base)
        if form != "adapter":
            _write_weights(model, state, tmp)
        (tmp / "README.md").write_text(card)
        (tmp / "llmkd.json").write_text(json.dumps(meta, indent=1))
        _sync(tmp)

    on_main(world, lambda: write_folder(folder, write))


def _write_weights(model: PreTrainedModel, state: dict[str, Tensor], folder: Path) -> None:
    model.config.use_cache = True
    model.save_pretrained(folder, state_dict=state)
    if model.can_generate() and not (folder / "generation_config.json").is_file():
        GenerationConfig.from_model_config(model.config).save_pretrained(folder)
    model.config.use_cache = False
