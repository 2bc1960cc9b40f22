"""Encoders that students and teachers start from: blocks copied, or a checkpoint without classes, with a new map to the classes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from llmkd.errors import InputError
from llmkd.families import AUTO_CLASSES, CLASSIFIERS
from llmkd.model_folders import copy_tokenizer, publish_folder
from llmkd.model_parts import blocks
from llmkd.models import load_config, load_model, quiet_about_unused, student_config


def copied_encoder(
    teacher: Path, chosen: Sequence[int], folder: Path, *, seed: int, dtype: torch.dtype, classifier: bool
) -> None:
    """As `copied_student`, of an encoder with classes: embeddings, the chosen blocks and the pooler, and with `classifier` the map to the
    classes too; what is not copied is drawn from the seed."""
    config = load_config(teacher)
    source = load_model(teacher, dtype=dtype, ds_config=None, attention="eager")
    small = student_config(config, chosen, {})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        student = AUTO_CLASSES["encoder"].from_config(small, dtype=dtype)
    given = source.state_dict()
    if not classifier:
        given = {name: tensor for name, tensor in given.items() if not name.startswith(f"{_classifier(config)}.")}
    old_blocks, new_blocks = blocks(source), blocks(student)
    prefix = blocks_name(source)
    given = {name: tensor for name, tensor in given.items() if not name.startswith(prefix)}
    missing = student.load_state_dict(given, strict=False).missing_keys
    allowed = (prefix,) if classifier else (prefix, f"{_classifier(config)}.")
    assert all(name.startswith(allowed) for name in missing), missing
    for new, old in zip(new_blocks, chosen, strict=True):
        new.load_state_dict(old_blocks[old].state_dict())
    publish_folder(folder, lambda tmp: (student.save_pretrained(tmp), copy_tokenizer(teacher, tmp)))


def new_classifier(start: Path, labels: Sequence[str], folder: Path, *, seed: int, dtype: torch.dtype) -> None:
    """Write an HF folder of an encoder checkpoint with a new map to these classes (and a pooler where it has none) from the seed."""
    config = load_config(start)
    config.id2label = dict(enumerate(labels))
    config.label2id = {label: number for number, label in enumerate(labels)}
    config.problem_type = "single_label_classification"
    options: dict[str, Any] = dict(use_safetensors=True, ignore_mismatched_sizes=True, output_loading_info=True)
    with torch.random.fork_rng(devices=[]), quiet_about_unused({"a head": "is new"}):
        torch.manual_seed(seed)
        fresh = AUTO_CLASSES["encoder"].from_config(config, dtype=dtype)
        model, info = AUTO_CLASSES["encoder"].from_pretrained(start, config=config, dtype=dtype, **options)
    lacking = [name for name in info["missing_keys"] if blocks_name(model) in name or "embeddings" in name]
    if lacking:
        raise InputError(
            f"{start}: its weights lack {len(lacking)} tensors of the model, first {min(lacking)!r}; give the whole weights"
        )
    made = dict(fresh.named_parameters())
    renewed = {name for name in made if name.startswith(f"{_classifier(config)}.")} | set(info["missing_keys"])
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name in renewed:
                parameter.copy_(made[name])
    publish_folder(folder, lambda tmp: (model.save_pretrained(tmp), copy_tokenizer(start, tmp)))


def _classifier(config: PreTrainedConfig) -> str:
    return CLASSIFIERS[config.model_type]


def blocks_name(model: PreTrainedModel) -> str:
    """What precedes the block number in a model's parameter names, e.g. `model.layers.`."""
    stack = blocks(model)
    return next(name for name, module in model.named_modules() if module is stack) + "."
