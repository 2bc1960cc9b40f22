"""Liger's kernels: which functions are called for which model, what they replace, what is refused. On GPUs: tests/gpu/test_blocks.py."""

from __future__ import annotations

import importlib.util
import inspect
import sys
from collections.abc import Iterator
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from transformers import LlamaConfig, PreTrainedConfig, Qwen3Config, T5Config
from transformers.models.llama import modeling_llama
from transformers.models.qwen3 import modeling_qwen3

from llmkd.errors import InputError
from llmkd.models import liger
from llmkd.models.model_types import MODEL_TYPES


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[str, dict[str, Any]]]]:
    """In the place of liger-kernel, a module whose functions replace a norm, and note (model type, arguments)."""
    calls: list[tuple[str, dict[str, Any]]] = []
    made: Any = ModuleType("liger_kernel.transformers")

    def swiglu(model_type: str) -> Any:
        def apply(rope: bool = True, rms_norm: bool = True, swiglu: bool = True, **losses: bool) -> None:
            calls.append((model_type, {"rope": rope, "rms_norm": rms_norm, "gated": swiglu, **losses}))
            for module, name in ((modeling_llama, "LlamaRMSNorm"), (modeling_qwen3, "Qwen3RMSNorm")):
                if model_type in module.__name__:
                    setattr(module, name, SimpleNamespace)

        return apply

    def geglu(model_type: str) -> Any:
        def apply(rope: bool = True, rms_norm: bool = True, geglu: bool = True, **losses: bool) -> None:
            calls.append((model_type, {"rope": rope, "rms_norm": rms_norm, "gated": geglu, **losses}))

        return apply

    for model_type in liger.TYPES:
        make = geglu if model_type.startswith("gemma") else swiglu
        setattr(made, f"apply_liger_kernel_to_{model_type}", make(model_type))
    monkeypatch.setitem(sys.modules, "liger_kernel", ModuleType("liger_kernel"))
    monkeypatch.setitem(sys.modules, "liger_kernel.transformers", made)
    yield calls
    liger.use_kernels("none", [])


@pytest.mark.parametrize("model_type", liger.TYPES)
def test_each_type_gets_its_kernels_and_no_loss(stand_in: list[Any], model_type: str) -> None:
    liger.use_kernels("liger", [_config(model_type)])
    wanted = {
        "rope": True,
        "rms_norm": True,
        "gated": True,
        "cross_entropy": False,
        "fused_linear_cross_entropy": False,
    }
    assert stand_in == [(model_type, wanted)] and model_type in MODEL_TYPES


def test_both_models_are_patched_once_and_a_later_run_gets_transformers_own_back(stand_in: list[Any]) -> None:
    before = modeling_llama.LlamaRMSNorm, modeling_qwen3.Qwen3RMSNorm
    liger.use_kernels("none", [LlamaConfig()])
    assert stand_in == [] and (modeling_llama.LlamaRMSNorm, modeling_qwen3.Qwen3RMSNorm) == before
    for _ in range(2):
        liger.use_kernels("liger", [Qwen3Config()])
        liger.use_kernels("liger", [LlamaConfig(), Qwen3Config()])
    assert [name for name, _ in stand_in] == ["qwen3", "llama"]
    assert modeling_llama.LlamaRMSNorm is modeling_qwen3.Qwen3RMSNorm is SimpleNamespace  # type: ignore[comparison-overlap]
    liger.use_kernels("none", [])
    assert (modeling_llama.LlamaRMSNorm, modeling_qwen3.Qwen3RMSNorm) == before


@pytest.mark.parametrize(
    ("gpu", "installed", "config", "message"),
    [
        (False, True, Qwen3Config(), r"^train\.kernels: Liger's kernels run on GPUs alone.*; write none$"),
        (True, False, Qwen3Config(), r"^train\.kernels: the package liger-kernel is not installed; run pip install"),
        (True, True, T5Config(), r"^train\.kernels: .* compared with a 't5' model; write none, or take one of gemma, "),
    ],
)
def test_what_can_not_be_had_is_refused_with_the_cure(
    monkeypatch: pytest.MonkeyPatch, gpu: bool, installed: bool, config: PreTrainedConfig, message: str
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: installed or None)
    with pytest.raises(InputError, match=message):
        liger.check_liger([config], gpu=gpu)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: True)
    liger.check_liger([Qwen3Config(), LlamaConfig()], gpu=True)


def test_the_installed_package_has_these_functions() -> None:
    """Its own functions take what they are given, and what they replace comes back."""
    real = pytest.importorskip("liger_kernel.transformers", reason="liger-kernel is not installed")
    for model_type in liger.TYPES:
        taken = inspect.signature(getattr(real, f"apply_liger_kernel_to_{model_type}")).parameters.keys()
        assert {"rope", "rms_norm", *liger.LOSSES} <= taken and {"swiglu", "geglu"} & taken
    before, forward = modeling_qwen3.Qwen3RMSNorm, modeling_qwen3.Qwen3ForCausalLM.forward
    liger.use_kernels("liger", [_config(model_type) for model_type in liger.TYPES])
    assert "Liger" in modeling_qwen3.Qwen3RMSNorm.__name__ and "Liger" in modeling_qwen3.Qwen3MLP.__name__
    assert modeling_qwen3.Qwen3ForCausalLM.forward is forward  # the losses are llmkd's
    liger.use_kernels("none", [])
    assert modeling_qwen3.Qwen3RMSNorm is before


def _config(model_type: str) -> Any:
    return SimpleNamespace(model_type=model_type)
