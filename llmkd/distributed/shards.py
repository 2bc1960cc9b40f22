"""The shards of a checkpoint, as DeepSpeed writes them: loaded, merged for another number of ranks, read without an engine."""

from __future__ import annotations

import contextlib
import os
import pickle
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from llmkd.distributed import unpickling
from llmkd.distributed.engines import RATE, last_line
from llmkd.errors import InputError
from llmkd.processes import parent_variable

# isort: split
from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint  # after what sets the accelerator


def save_shards(engine: Any, folder: Path) -> None:
    """Write what is trained, with the optimizer's states; frozen parameters are left out (all ranks take part)."""
    frozen = _frozen(engine.module)

    def leave_out(module: nn.Module, state: dict[str, Any], prefix: str, metadata: object) -> None:
        for name in frozen:  # DeepSpeed leaves a shared parameter out under its first name alone
            state.pop(name, None)

    hook = engine.module.register_state_dict_post_hook(leave_out)
    try:
        options = {"save_latest": False, "exclude_frozen_parameters": bool(frozen)}
        engine.save_checkpoint(str(folder.parent), tag=folder.name, **options)
    finally:
        hook.remove()


def _frozen(module: nn.Module) -> set[str]:
    """The names of the parameters that are not trained; a shared one has several."""
    return {name for name, p in module.named_parameters(remove_duplicate=False) if not p.requires_grad}


def _load_trained(src: dict[str, Tensor], dst: nn.Module) -> None:
    """Load a module's state, which must hold all but what is frozen."""
    missing, unexpected = dst.load_state_dict(src, strict=False)
    if wrong := [*(set(missing) - _frozen(dst)), *unexpected]:
        raise RuntimeError(f"the checkpoint's parameters are not those that are trained, first {min(wrong)}")


def load_shards(engine: Any, folder: Path) -> None:
    """Load what `save_shards` or `merge_shards` wrote; frozen parameters stay as they are (all ranks take part)."""
    settings = [{key: group[key] for key in ("weight_decay", RATE)} for group in engine.optimizer.param_groups]
    with _plain_values(folder):
        loaded, _ = engine.load_checkpoint(str(folder.parent), tag=folder.name, custom_load_fn=_load_trained)
    if loaded is None:
        raise InputError(f"{folder}: DeepSpeed could not load it; remove {folder.parent} to resume from the one before")
    # From whole tensors DeepSpeed gives every group the first one's settings, so that norms would decay, and one tensor as the
    # count of steps, which each group would then count up.
    for group, own in zip(engine.optimizer.param_groups, settings, strict=True):
        group.update(own)
    for state in engine.optimizer.state.values():
        if isinstance(state.get("step"), Tensor):
            state["step"] = state["step"].clone()


def merge_shards(shards: Path, whole: Path) -> None:
    """Write a checkpoint's shards as whole tensors, which any number of ranks can load, into a folder of a new folder (rank 0 alone).

    DeepSpeed's own converter, in a process of its own. Without ZeRO there are no shards to merge.
    """
    shutil.rmtree(whole.parent, ignore_errors=True)
    whole.parent.mkdir()
    if not list(shards.glob("*_optim_states.pt")):
        shutil.copytree(shards, whole, copy_function=shutil.copyfile)
        return
    folders = ["--input_folder", str(shards), "--output_folder", str(whole)]
    workers = ["--num_extract_workers", "1", "--num_merge_workers", "1"]  # more would hold more of it in memory
    program = (  # without this file's own imports, which would take longer than DeepSpeed's
        "from llmkd.processes import end_with_parent; end_with_parent(); "
        f"import runpy, {unpickling.__name__}; runpy.run_module('deepspeed.checkpoint.ds_to_universal', run_name='__main__')"
    )
    process = subprocess.run(
        [sys.executable, "-c", program, *folders, *workers, "--inject_missing_state"],
        capture_output=True,
        text=True,
        env={**os.environ, **parent_variable()},
    )
    if process.returncode:
        shutil.rmtree(whole.parent, ignore_errors=True)
        raise InputError(
            f"{shards}: DeepSpeed could not merge its shards for another number of ranks ({last_line(process.stderr)}); "
            "resume with the number of ranks that wrote it"
        )


def saved_weights(shards: Path, prefix: str) -> dict[str, Tensor]:
    """The parameters of a checkpoint whose names start with the prefix, which is cut off; float32, on the CPU (any one process).

    The checkpoint's shards are read whole into memory, optimizer states included.
    """
    with _plain_values(shards):
        if list(shards.glob("*_optim_states.pt")):
            state: Any = get_fp32_state_dict_from_zero_checkpoint(str(shards.parent), tag=shards.name, lazy_mode=True)
        else:  # without ZeRO each rank's file holds whole tensors
            state = torch.load(shards / "mp_rank_00_model_states.pt", map_location="cpu", weights_only=True)["module"]
    kept = {name: tensor for name, tensor in state.items() if name.startswith(prefix)}
    return {name.removeprefix(prefix): tensor.contiguous().float().clone() for name, tensor in kept.items()}


@contextlib.contextmanager
def _plain_values(folder: Path) -> Iterator[None]:
    """Inside, a file of the folder that holds more than tensors, numbers and texts is an InputError."""
    try:
        yield
    except pickle.UnpicklingError as error:
        raise InputError(
            f"{folder}: its files hold Python objects that could run code, so llmkd did not write them and does not open them; use a "
            "checkpoint of your own run"
        ) from error
