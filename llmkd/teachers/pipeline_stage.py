"""One stage of a teacher: its blocks only; the tensors of the others are not read from the safetensors files."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedConfig

from llmkd.distributed.engines import parameter_count
from llmkd.errors import InputError
from llmkd.models.families import check_logits, model_type
from llmkd.models.folders import tensor_files
from llmkd.models.load import attention_implementation, load_config, student_config, without_weights
from llmkd.models.model_types import types_with
from llmkd.models.parts import backbone, blocks
from llmkd.teachers.pipeline_schedule import PipelineCut, cut_into_stages

log = logging.getLogger("llmkd")


def check_pipelined(config: PreTrainedConfig) -> None:
    """Raise InputError for a model type that has not been shown to be the sum of its stages."""
    check_logits(config)
    if not model_type(config).has_stages:
        raise InputError(
            f"teacher.placement: a {config.model_type!r} model has not been shown to work cut into stages; write zero3 or replicated "
            f"(pipeline is for {', '.join(types_with(lambda row: row.has_stages))})"
        )


def teacher_cut(config: PreTrainedConfig, stages: int, *, trust_remote_code: bool = False) -> PipelineCut:
    """The teacher's blocks cut into stages by their counted weights; no weight is made."""
    model = without_weights(config, trust_remote_code=trust_remote_code)
    costs = [parameter_count(block) for block in blocks(model)]
    return cut_into_stages(costs, stages, embedding=parameter_count(model.get_input_embeddings()))


def load_stage(
    folder: Path,
    part: range,
    *,
    dtype: torch.dtype,
    attention: str,
    device: torch.device,
    trust_remote_code: bool = False,
) -> nn.Module:
    """The backbone with these blocks only, frozen. Stage 0 takes `input_ids`, a later one `inputs_embeds`: the state before it.

    Its `last_hidden_state` is its last block's output, or the final state if that is the model's last block.
    """
    config = load_config(folder, trust_remote_code=trust_remote_code)
    check_pipelined(config)
    name, why = attention_implementation(attention, dtype, config)
    log.info("%s: stage of blocks %d to %d, attention %s (%s)", folder, part.start, part.stop - 1, name, why)
    small = student_config(config, part, {})
    with torch.device("meta"):  # no memory and no random number for what is read below
        model = AutoModelForCausalLM.from_config(
            small, dtype=dtype, attn_implementation=name, trust_remote_code=trust_remote_code
        )
    body: Any = backbone(model)
    if part.start > 0:
        body.embed_tokens = None
    if part.stop < config.num_hidden_layers:
        body.norm = nn.Identity()
    names = {name: _name_in_file(name, part) for name, _ in body.named_parameters()}
    read = read_tensors(folder, names.values(), dtype=dtype, device=device)
    body.load_state_dict({name: read[source] for name, source in names.items()}, strict=True, assign=True)
    # Computed, not read: float32 whatever the model's dtype.
    body.rotary_emb = type(body.rotary_emb)(config=small).to(device)
    body.config.use_cache = False
    return body.eval().requires_grad_(False)


def read_tensors(folder: Path, names: Iterable[str], *, dtype: torch.dtype, device: torch.device) -> dict[str, Tensor]:
    """These tensors of a model folder; no byte of another one is read. Raises InputError where one is missing."""
    files = tensor_files(folder)
    of_file: dict[Path, list[str]] = {}
    for name in names:
        if name not in files:
            raise InputError(
                f"{folder}: its weights lack the tensor {name!r}; give the whole weights, as save_pretrained writes them"
            )
        of_file.setdefault(files[name], []).append(name)
    read = {}
    for file, wanted in sorted(of_file.items()):
        with safe_open(file, framework="pt", device=str(device)) as stored:
            for name in wanted:
                read[name] = stored.get_tensor(name).to(dtype)
    return read


def _name_in_file(name: str, part: range) -> str:
    match = re.fullmatch(r"layers\.(\d+)\.(.*)", name)
    return f"model.layers.{part[int(match[1])]}.{match[2]}" if match else f"model.{name}"
