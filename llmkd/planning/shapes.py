"""A model's sizes, counted from its configuration on the meta device."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path

import torch
from huggingface_hub import hf_hub_download, try_to_load_from_cache
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from llmkd import hub
from llmkd.distributed.engines import parameter_count
from llmkd.errors import InputError, first_line, reason
from llmkd.models.architectures import new_config
from llmkd.models.families import kind
from llmkd.models.load import load_config, student_config, without_weights
from llmkd.models.lora import adapter_sizes, targeted
from llmkd.models.make import block_choice
from llmkd.models.parts import blocks, head, routers
from llmkd.models.stored import read_config
from llmkd.models.width import check_narrowed
from llmkd.recipe.recipe import Recipe
from llmkd.training.checks import check_unsharded, teacher_shape

log = logging.getLogger("llmkd")


@dataclass(frozen=True)
class Shapes:
    """Parameter counts of a causal language model, and the widths that decide what its blocks keep for the backward pass."""

    parameters: int
    embedding: int
    head: int
    largest_block: int
    depth: int
    hidden: int
    intermediate: int
    queries: int
    """Heads times head size."""
    keys: int
    """Key heads times head size."""
    heads: int
    vocabulary: int
    normed_queries: bool
    """Queries and keys pass a norm of their own, as in Qwen3."""
    each_block: tuple[int, ...]
    """Every block's parameters."""
    head_apart: bool
    """The head has weights of its own; else it is tied to the embeddings."""
    linear: int = 0
    """Weights of the blocks' linear maps, which can be kept in 4 bits."""
    largest_map: int = 0
    """Of these, the largest map's."""
    routed: int = 0
    """The experts that a token is rated for, over all routers."""


def shapes(config: PreTrainedConfig) -> Shapes:
    """Count a model's parameters on the meta device, tied weights once."""
    with torch.device("meta"):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config)
    stack = blocks(model)
    maps = [m.weight.numel() for block in stack for m in block.modules() if isinstance(m, nn.Linear)]
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    key_heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    return Shapes(
        parameters=parameter_count(model),
        embedding=parameter_count(model.get_input_embeddings()),
        head=parameter_count(head(model)),
        largest_block=max(parameter_count(block) for block in stack),
        depth=len(stack),
        hidden=config.hidden_size,
        intermediate=getattr(config, "intermediate_size", None) or 4 * config.hidden_size,
        queries=config.num_attention_heads * size,
        keys=key_heads * size,
        heads=config.num_attention_heads,
        vocabulary=config.vocab_size,
        normed_queries=any(name.endswith("q_norm.weight") for name, _ in stack[0].named_parameters()),
        each_block=tuple(parameter_count(block) for block in stack),
        head_apart=head(model).weight is not model.get_input_embeddings().weight,
        linear=sum(maps),
        largest_map=max(maps, default=0),
        routed=sum(config.num_experts for _ in routers(model)),
    )


@dataclass(frozen=True)
class Trained:
    """What of a student is trained, in numbers; projectors are trained beside it."""

    parameters: int
    """Its own weights, or its adapters."""
    frozen: int
    """The weights that adapters stand beside."""
    forward_only: int
    """Those of them that no gradient passes: the embeddings'."""
    largest: int
    """Of the module with the most trained numbers: a block, the embeddings, the head."""
    single: int
    """Of the largest trained parameter."""
    for_activations: int = 0
    """Numbers that a token leaves in a block's adapters for the backward pass."""
    quantized: int = 0
    """The weights, of the frozen, that are kept in 4 bits."""
    largest_map: int = 0
    """Those of the largest map among them."""


def trained_part(recipe: Recipe, config: PreTrainedConfig, shape: Shapes) -> Trained:
    """What the recipe trains of a student with this configuration. Raises InputError for adapters that find no place in it."""
    lora = recipe.student.lora
    if lora is None:
        single = max(shape.embedding, shape.head)
        return Trained(shape.parameters, 0, 0, max(shape.largest_block, single), single)
    check_unsharded("student.lora", lora, "train", recipe.train)
    model = without_weights(config)
    maps = targeted(model, lora.targets)
    sizes = {name: adapter_sizes(module, lora.rank, dora=lora.dora) for name, module in maps.items()}
    total = sum(map(sum, sizes.values()))
    inputs = sum(size[0] // lora.rank for size in sizes.values()) if lora.dropout else 0
    kept = (inputs + lora.rank * len(maps)) // shape.depth
    quantized = (0, 0) if lora.quantize == "none" else (shape.linear, shape.largest_map)
    single = max(map(max, sizes.values()))
    return Trained(total, shape.parameters, shape.embedding, total // shape.depth, single, kept, *quantized)


def teacher_config(recipe: Recipe) -> PreTrainedConfig:
    """The teacher's configuration: of its folder or hub name, of what `finetune` starts from, or of the recipe's `architecture`."""
    if recipe.teacher_start is None:
        return decoder_config(teacher_shape(recipe))
    start, _ = recipe.teacher_start
    settings = recipe.teacher
    try:
        return decoder_config(
            _model_config(start, settings.revision, "teacher.path", trust_remote_code=settings.trust_remote_code)
        )
    except _NotThere as error:
        if settings.architecture is None:
            raise InputError(f"{error}; write the shape under teacher.architecture to plan without it") from error
    log.warning("the hub did not give %s's config.json; planning with the recipe's teacher.architecture", start)
    return decoder_config(new_config(settings.architecture.model_dump()))


class _NotThere(InputError):
    """A model that is neither a folder nor given by the hub."""


def _model_config(name: str, revision: str | None, what: str, *, trust_remote_code: bool) -> PreTrainedConfig:
    """The configuration of a model: of a folder, compared with the weights where it holds some, or by its hub name."""
    folder = Path(name).expanduser()
    if folder.is_dir():
        if list(folder.glob("*.safetensors*")):
            return read_config(name, what, trust_remote_code=trust_remote_code)[1]
        return load_config(folder, trust_remote_code=trust_remote_code)
    file = _hub_file(name, revision, what)
    try:  # a model's own code is fetched by name
        source = name if trust_remote_code else file.parent
        return AutoConfig.from_pretrained(source, revision=revision, trust_remote_code=trust_remote_code)
    except Exception as error:  # a configuration's own checks raise errors of any kind
        raise InputError(f"{what}: transformers can't read the config.json of {name!r} ({reason(error)})") from error


def _hub_file(name: str, revision: str | None, what: str) -> Path:
    """A hub model's config.json: as it is here, else from the hub."""
    here = try_to_load_from_cache(name, "config.json", revision=revision)  # asks nobody, unlike local_files_only
    if isinstance(here, str):
        return Path(here)
    try:
        return Path(hub.fetch(lambda: hf_hub_download(name, "config.json", revision=revision)))
    except hub.OutOfReach as error:
        raise _NotThere(f"{what}: no folder {name!r} here, and {error}") from error
    except Exception as error:  # the hub client has a score of network errors; all mean the same to the user
        raise _NotThere(
            f"{what}: no folder {name!r} here, and the hub did not give its config.json ({first_line(error)})"
        ) from error


def decoder_config(config: PreTrainedConfig) -> PreTrainedConfig:
    """The configuration as it is. Raises InputError where it is not a decoder's."""
    if kind(config) != "decoder":
        raise InputError(
            f"llmkd plan counts a decoder's bytes, and the teacher is of type {config.model_type!r}; start the run itself"
        )
    return config


def initial_student_config(recipe: Recipe, teacher: PreTrainedConfig) -> PreTrainedConfig:
    """The student's configuration, as `llmkd.training.initial.initial_student` would write it; of blocks that are yet to be measured,
    with those of `spread`."""
    settings = recipe.student
    if settings.init == "checkpoint":
        assert settings.path is not None  # checked by Student
        return _model_config(settings.path, None, "student.path", trust_remote_code=settings.trust_remote_code)
    assert settings.blocks is not None
    if settings.narrows:
        check_narrowed(teacher, settings.width)
    chosen = block_choice(settings.planned_blocks, settings.blocks, teacher.num_hidden_layers)
    return student_config(teacher, chosen, settings.width)
