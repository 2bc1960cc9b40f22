"""A model's sizes, counted from its configuration on the meta device."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from llmkd.distributed.engines import parameter_count
from llmkd.errors import InputError
from llmkd.models.architectures import new_config
from llmkd.models.families import kind
from llmkd.models.load import load_config, student_config
from llmkd.models.make import block_choice
from llmkd.models.parts import blocks, head
from llmkd.recipe.recipe import Recipe
from llmkd.training.checks import teacher_shape

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


def shapes(config: PreTrainedConfig) -> Shapes:
    """Count a model's parameters on the meta device, tied weights once."""
    with torch.device("meta"):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config)
    stack = blocks(model)
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
    )


def teacher_config(recipe: Recipe) -> PreTrainedConfig:
    """The teacher's configuration: of its folder or hub name, of what `finetune` starts from, or of the recipe's `architecture`."""
    if recipe.teacher_start is None:
        return decoder_config(teacher_shape(recipe))
    start, _ = recipe.teacher_start
    if Path(start).is_dir():
        return decoder_config(load_config(Path(start), trust_remote_code=recipe.teacher.trust_remote_code))
    return decoder_config(_hub_config(start, recipe))


def decoder_config(config: PreTrainedConfig) -> PreTrainedConfig:
    """The configuration as it is. Raises InputError where it is not a decoder's."""
    if kind(config) != "decoder":
        raise InputError(
            f"llmkd plan counts a decoder's bytes, and the teacher is of type {config.model_type!r}; start the run itself"
        )
    return config


def _hub_config(name: str, recipe: Recipe) -> PreTrainedConfig:
    settings = recipe.teacher
    try:
        return AutoConfig.from_pretrained(
            name, revision=settings.revision, trust_remote_code=settings.trust_remote_code
        )
    except (OSError, ValueError) as error:
        if settings.architecture is None:
            raise InputError(
                f"teacher.path: no folder {name!r} here and the hub did not give its config.json; write the shape under "
                "teacher.architecture to plan without it"
            ) from error
    log.warning("the hub did not give %s's config.json; planning with the recipe's teacher.architecture", name)
    return decoder_config(new_config(settings.architecture.model_dump()))


def initial_student_config(recipe: Recipe, teacher: PreTrainedConfig) -> PreTrainedConfig:
    """The student's configuration, as `llmkd.training.initial.initial_student` would write it."""
    settings = recipe.student
    if settings.init == "checkpoint":
        assert settings.path is not None  # checked by Student
        if not Path(settings.path).is_dir():
            return AutoConfig.from_pretrained(settings.path, trust_remote_code=settings.trust_remote_code)
        return load_config(Path(settings.path), trust_remote_code=settings.trust_remote_code)
    assert settings.blocks is not None
    rule = settings.copy_blocks if settings.init == "teacher" else "spread"
    chosen = block_choice(rule, settings.blocks, teacher.num_hidden_layers)
    return student_config(teacher, chosen, settings.width)
