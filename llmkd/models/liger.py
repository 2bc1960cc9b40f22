"""Liger's kernels in transformers' models: norms, rotary embeddings and gated MLPs, one kernel each.

liger-kernel replaces classes and a function in transformers' modules, for the whole process; what is loaded afterwards is made of them. A
later run of the same process that wants none, as a recipe that trains its teacher may have it, gets transformers' own back. Its losses
are not taken: llmkd's head has its own.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
from collections.abc import Iterable
from typing import Any, Literal

from transformers import PreTrainedConfig

from llmkd.errors import InputError

TYPES = ("gemma", "gemma3_text", "llama", "mistral", "olmo2", "qwen2", "qwen3", "smollm3")
"""Model types whose parts were compared with Liger's, as of 0.8.5. It replaces less of others, or more: where a head is rotated in part."""
LOSSES = {"cross_entropy": False, "fused_linear_cross_entropy": False}
_replaced: dict[str, dict[str, Any]] = {}
"""By model type, what stood in its module before."""


def check_liger(configs: Iterable[PreTrainedConfig], *, gpu: bool) -> None:
    """Raise InputError where Liger's kernels can't be had, or not for one of these models."""
    if not gpu:
        raise InputError("train.kernels: Liger's kernels run on GPUs alone, and there is none here; write none")
    if importlib.util.find_spec("liger_kernel") is None:
        raise InputError(
            "train.kernels: the package liger-kernel is not installed; run pip install 'llmkd[liger]', or write none"
        )
    for config in configs:
        if config.model_type not in TYPES:
            raise InputError(
                f"train.kernels: Liger's kernels have not been compared with a {config.model_type!r} model; write none, or take one of "
                f"{', '.join(TYPES)}"
            )


def use_kernels(kernels: Literal["liger", "none"], configs: Iterable[PreTrainedConfig]) -> None:
    """Have the models of these configurations that are loaded from now on made of Liger's parts, or of transformers' own."""
    if kernels == "none":
        for model_type in list(_replaced):
            vars(_module(model_type)).update(_replaced.pop(model_type))
        return
    for model_type in sorted({config.model_type for config in configs} - _replaced.keys()):
        module = _module(model_type)
        before = dict(vars(module))
        _apply(model_type)
        _replaced[model_type] = {name: value for name, value in before.items() if vars(module)[name] is not value}


def _apply(model_type: str) -> None:
    liger: Any = importlib.import_module("liger_kernel.transformers")
    apply = getattr(liger, f"apply_liger_kernel_to_{model_type}")
    gated = {"swiglu", "geglu"} & inspect.signature(apply).parameters.keys()
    apply(rope=True, rms_norm=True, **dict.fromkeys(gated, True), **LOSSES)


def _module(model_type: str) -> Any:
    name = model_type.removesuffix("_text")
    return importlib.import_module(f"transformers.models.{name}.modeling_{name}")
