"""Folders of LoRA adapters, as peft has them: written, checked by their headers, added to the weights that they are for."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from llmkd.errors import InputError, first_line
from llmkd.files import read, write_folder, write_json
from llmkd.models.folders import copy_tokenizer
from llmkd.models.load import load_config, load_model, without_weights
from llmkd.models.lora import NAME, adapted, merge

CONFIG, WEIGHTS, PICKLED = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
READ = {"r", "lora_alpha", "use_rslora", "use_dora", "rank_pattern", "alpha_pattern", "fan_in_fan_out"}
"""The keys of adapter_config.json that say what an adapter adds."""
READ |= {"target_modules", "exclude_modules", "layers_to_transform", "layers_pattern"}
"""And where."""
WITHOUT_EFFECT = {"peft_type", "task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision"}
WITHOUT_EFFECT |= {"inference_mode", "lora_dropout", "megatron_core", "runtime_config", "qalora_group_size"}
STARTS = (True, False, "gaussian", "orthogonal")
"""Ways of `init_lora_weights` that leave the base's weights as they are."""
PREFIX = "base_model.model."
"""Before a tensor's name in the file."""
MERGE = (
    "merge it by peft's merge_and_unload where it was trained, save that model, and give its folder as the path alone"
)


def check_adapter(adapter: str, key: str, base: PreTrainedConfig, *, trust_remote_code: bool = False) -> None:
    """Raise InputError for a folder whose adapter can't be added to a model of this configuration; `key`: the recipe's."""
    _give(without_weights(base, trust_remote_code=trust_remote_code), _folder(adapter, key), key)


def write_merged(
    base: Path,
    adapter: str,
    folder: Path,
    *,
    key: str,
    dtype: torch.dtype,
    trust_remote_code: bool = False,
    meta: Mapping[str, object] | None = None,
) -> None:
    """Write a plain HF folder of a model with an adapter added to its weights, and `meta` as its `llmkd.json`.

    In the model's own dtype, or in `dtype` where that is wider; sums in float32. One model is in memory. Raises InputError as
    `check_adapter`, before anything is written.
    """
    from peft import set_peft_model_state_dict  # heavy; few recipes have an adapter

    source = _folder(adapter, key)
    wide = summed_dtype(load_config(base, trust_remote_code=trust_remote_code), dtype)
    model = load_model(base, dtype=wide, ds_config=None, attention="eager", trust_remote_code=trust_remote_code)
    _give(model, source, key)
    for name, parameter in model.named_parameters():
        if "lora_" in name:  # read as they are stored, whatever the model's dtype
            parameter.data = parameter.data.float()
    set_peft_model_state_dict(model, load_file(source / WEIGHTS), NAME)
    merge(model)

    def write(tmp: Path) -> None:
        copy_tokenizer(base, tmp)
        model.save_pretrained(tmp)
        if meta is not None:
            write_json(tmp / "llmkd.json", dict(meta))

    write_folder(folder, write)


def summed_dtype(base: PreTrainedConfig, dtype: torch.dtype) -> torch.dtype:
    """The dtype of a model with an adapter added that is used in `dtype`: the model's own, or that where it is wider."""
    return torch.promote_types(base.dtype if isinstance(base.dtype, torch.dtype) else torch.float32, dtype)


def adapter_tensors(model: PreTrainedModel, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a model's adapters, by peft's names in a file; `state`: the model's, by its own names."""
    from peft import get_peft_model_state_dict  # heavy; few recipes have adapters

    found = get_peft_model_state_dict(model, dict(state), adapter_name=NAME, save_embedding_layers=False)
    return {f"{PREFIX}{name}": tensor.contiguous() for name, tensor in found.items()}


def write_adapter(model: PreTrainedModel, tensors: Mapping[str, Tensor], folder: Path, *, base: str) -> None:
    """Write a decoder's adapters as peft does; `base`: the model that they are added to."""
    of_model: Any = model
    config = copy.copy(of_model.peft_config[NAME])
    config.base_model_name_or_path, config.task_type, config.inference_mode = base, "CAUSAL_LM", True
    folder.mkdir()
    config.save_pretrained(str(folder))
    save_file(dict(tensors), folder / WEIGHTS, metadata={"format": "pt"})


def _folder(adapter: str, key: str) -> Path:
    """The adapter's folder. Raises InputError where it is none, or where its weights are pickled or missing."""
    folder = Path(adapter).expanduser()
    if not (folder / CONFIG).is_file():
        problem = f"holds no {CONFIG}" if folder.is_dir() else "is no folder here"
        raise InputError(f"{key}: {adapter!r} {problem}; give a folder as peft's save_pretrained writes it")
    if not (folder / WEIGHTS).is_file():
        if (folder / PICKLED).is_file():
            raise InputError(
                f"{key}: {adapter!r} has its weights in {PICKLED}, a pickle, which may run code and is never loaded; load it with peft if "
                f"you trust it, and save it again, as {WEIGHTS}"
            )
        raise InputError(f"{key}: {adapter!r} holds no {WEIGHTS}; give a folder as peft's save_pretrained writes it")
    return folder


def _config(folder: Path, key: str) -> Any:
    """peft's configuration of the adapter. Raises InputError for a kind, or a key, that is more than a product added to linear maps."""
    from peft import LoraConfig  # heavy; few recipes have an adapter

    values = read(folder / CONFIG)
    if not isinstance(values, dict):
        raise InputError(f"{key}: {folder / CONFIG} is not JSON as peft writes it; copy the adapter again")
    if values.get("peft_type") != "LORA":
        raise InputError(
            f"{key}: {folder} is an adapter of type {values.get('peft_type')}, and only LORA is read; {MERGE}"
        )
    plain = LoraConfig().to_dict()
    for name, value in values.items():
        if name in READ | WITHOUT_EFFECT or value == plain.get(name):
            continue
        if name == "init_lora_weights" and value in STARTS:
            continue
        if name not in plain and not value:  # a key of another version of peft, unused
            continue
        raise InputError(f"{key}: {folder} has {name}: {value!r}, which is not read; {MERGE}")
    known = {name: value for name, value in values.items() if name in READ}
    return LoraConfig(**known)


def _give(model: PreTrainedModel, folder: Path, key: str) -> None:
    """Give a model adapters of this folder's shape, not its numbers. Raises InputError where the file holds other tensors than these."""
    from peft import get_peft_model_state_dict, inject_adapter_in_model  # heavy, as above

    config, is_meta = _config(folder, key), next(model.parameters()).is_meta
    other = f"{folder} is for another model than its path's"
    output = model.get_output_embeddings()
    try:
        with warnings.catch_warnings(action="ignore"):  # about tied weights, which are refused below
            inject_adapter_in_model(config, model, NAME, low_cpu_mem_usage=is_meta)
    except ValueError as error:  # the model lacks the maps, or LoRA has no place in one
        raise InputError(
            f"{key}: {other} ({first_line(error)}); give the path of the model that it was trained on"
        ) from error
    for name, layer in adapted(model).items():
        if not isinstance(layer.base_layer, nn.Linear | Conv1D):
            raise InputError(f"{key}: {folder} adapts {name}, which is no linear map; {MERGE}")
        if layer.base_layer is output and model.config.tie_word_embeddings:
            raise InputError(f"{key}: {folder} adapts {name}, whose weights are the embeddings' too; {MERGE}")
    wanted = get_peft_model_state_dict(model, adapter_name=NAME, save_embedding_layers=False)
    ours = {name: tuple(tensor.shape) for name, tensor in wanted.items()}
    with safe_open(folder / WEIGHTS, framework="pt") as stored:
        theirs = {name.removeprefix(PREFIX): tuple(stored.get_slice(name).get_shape()) for name in stored.keys()}  # noqa: SIM118
    if whole := [name for name in theirs if "lora_" not in name]:
        raise InputError(
            f"{key}: {folder} holds {whole[0]}, a whole tensor beside its adapters, which is not read; {MERGE}"
        )
    if differing := sorted(name for name in ours.keys() | theirs.keys() if ours.get(name) != theirs.get(name)):
        first = differing[0]
        has, needs = (
            f"has it as {list(shapes[first])}" if first in shapes else "lacks it" for shapes in (theirs, ours)
        )
        raise InputError(
            f"{key}: {other}: of its tensor {first} the file {has} and the model {needs}; give the path of the model that it was trained on"
        )
