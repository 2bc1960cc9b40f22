"""Weights in 4 bits against the definition of NF4, and maps that compute with them against plain ones."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import norm
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import GPT2Config, GPT2LMHeadModel, MixtralConfig, MixtralForCausalLM, Qwen2Config, Qwen2ForCausalLM

from llmkd.errors import InputError
from llmkd.models import load
from llmkd.models.four_bit import RUN, FourBit, check_installed, four_bit, kept_bytes, quantizable, quantize
from llmkd.models.lora import adapt, merged
from tests.quantized import needs_bitsandbytes

CPU = torch.device("cpu")
OPTIONS: dict[str, Any] = dict(rank=4, alpha=6.0, targets="all_linear", rslora=False, seed=1)
IDS = torch.arange(4, 36).view(2, 16)


def _levels() -> torch.Tensor:
    """QLoRA's NF4 (arXiv 2305.14314, section 3 and appendix E): quantiles of a normal distribution, eight of them positive, and a zero."""
    offset = (1 - 1 / (2 * 15) + 1 - 1 / (2 * 16)) / 2
    positive = norm.ppf(np.linspace(offset, 0.5, 9)[:-1])
    negative = -norm.ppf(np.linspace(offset, 0.5, 8)[:-1])
    levels = np.sort(np.concatenate([positive, [0.0], negative]))
    return torch.from_numpy(levels / levels.max())


def _plain(inputs: int = 96, outputs: int = 40, *, bias: bool = True) -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(inputs, outputs, bias=bias).requires_grad_(False)


def _model(tiny: Path, **options: Any) -> Any:
    where: dict[str, Any] = dict(dtype=torch.float32, ds_config=None, attention="sdpa")
    return load.load_model(tiny / "teacher", **where, **options).eval()


def test_a_weight_is_the_nearest_level_times_its_runs_magnitude() -> None:
    """The magnitudes, too, are rounded: to 8 bits, of what they differ from their mean by."""
    needs_bitsandbytes()
    plain = _plain(inputs=192, outputs=256)
    runs, kept = plain.weight.double().view(-1, RUN), FourBit(plain, CPU).weight.double().view(-1, RUN)
    largest = runs.abs().amax(1, keepdim=True)
    nearest = _levels()[(runs / largest)[..., None].sub(_levels()).abs().argmin(-1)]
    magnitudes = kept.abs().amax(1, keepdim=True)  # a level of ±1 is in each run: its largest number's
    differing = (kept - magnitudes * nearest).abs() > 1e-6
    assert differing.float().mean() < 1e-3  # a number in the middle of two levels
    spread = (largest - largest.mean()).view(-1, 256).abs().amax(1)
    error = (magnitudes - largest).view(-1, 256).abs().amax(1)
    assert (error <= 0.01 * spread).all() and error.max() > 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_its_product_is_that_of_its_plain_weight(dtype: torch.dtype) -> None:
    needs_bitsandbytes()
    plain = _plain().to(dtype)
    layer, states = FourBit(plain, CPU), torch.randn(3, 5, 96, dtype=dtype)
    reference = copy.deepcopy(plain)
    reference.weight.data = layer.weight.clone()
    found, expected = (states.clone().requires_grad_() for _ in range(2))
    ours, theirs = layer(found), reference(expected)
    assert torch.equal(ours, theirs) and ours.dtype == dtype
    seed = torch.randn_like(ours)
    ours.backward(seed)
    theirs.backward(seed)
    assert found.grad is not None and expected.grad is not None
    assert (found.grad.float() - expected.grad.float()).norm() <= 1e-6 * expected.grad.float().norm()
    again = states.clone().requires_grad_()
    checkpoint(layer, again, use_reentrant=False).backward(seed)  # type: ignore[union-attr]
    assert torch.equal(again.grad, found.grad)  # type: ignore[arg-type]
    assert 0.02 < (layer.weight - plain.weight).float().norm() / plain.weight.float().norm() < 0.2


def test_nothing_of_a_plain_weight_waits_for_the_backward_pass() -> None:
    needs_bitsandbytes()
    layer, kept = FourBit(_plain(), CPU), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        layer(torch.randn(3, 96, requires_grad=True))
    assert not kept


def test_what_is_kept_follows_no_change_of_dtype_and_is_in_no_state() -> None:
    needs_bitsandbytes()
    layer = FourBit(_plain(), CPU)
    before = layer.weight
    assert torch.equal(layer.to(torch.bfloat16).weight, before) and torch.equal(copy.deepcopy(layer).weight, before)
    assert set(layer.state_dict()) == {"bias"} == {name for name, _ in layer.named_parameters()}


def test_a_model_with_biases_computes_in_the_dtype_that_it_is_moved_to() -> None:
    needs_bitsandbytes()
    torch.manual_seed(0)
    shape: dict[str, Any] = dict(hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4)
    plain: Any = Qwen2ForCausalLM(Qwen2Config(vocab_size=320, num_key_value_heads=2, **shape)).eval()
    for name, parameter in plain.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(parameter)
    model = copy.deepcopy(plain)
    quantize(model, CPU)
    for name, layer in four_bit(model).items():
        plain.get_submodule(name).weight.data = layer.weight.clone()
    assert any(layer.bias is not None for layer in four_bit(model).values())
    for dtype in (torch.float32, torch.bfloat16):
        ours, theirs = (each.to(dtype)(input_ids=IDS, labels=IDS) for each in (model, plain))
        assert torch.equal(ours.logits, theirs.logits) and ours.logits.dtype == dtype
        found, expected = (
            torch.autograd.grad(out.loss, each.get_input_embeddings().weight)[0]
            for out, each in ((ours, model), (theirs, plain))
        )
        assert (found.float() - expected.float()).norm() <= 1e-6 * expected.float().norm()


def test_it_takes_what_is_planned() -> None:
    needs_bitsandbytes()
    layer = FourBit(_plain(inputs=320, outputs=512, bias=False), CPU)
    state = layer._state
    tables = state.code.nbytes + state.state2.code.nbytes + state.offset.nbytes
    held = layer._packed.nbytes + state.absmax.nbytes + state.state2.absmax.nbytes
    assert held == kept_bytes(320 * 512) < 0.517 * 320 * 512 and tables < 1200


def test_of_a_model_the_blocks_linear_maps_and_no_others(tiny: Path) -> None:
    needs_bitsandbytes()
    plain, model = _model(tiny), _model(tiny, quantize="nf4")
    linear = {name for name, module in plain.named_modules() if isinstance(module, nn.Linear)}
    assert set(four_bit(model)) == linear - {"lm_head"} and len(linear) == 6 * 7 + 1
    others = dict(model.named_parameters())
    assert all(torch.equal(others[name], p) for name, p in plain.named_parameters() if name in others)
    assert len(others) + len(four_bit(model)) == len(dict(plain.named_parameters()))
    for name, layer in four_bit(model).items():
        plain.get_submodule(name).weight.data = layer.weight
    with torch.no_grad():
        assert torch.equal(model(input_ids=IDS).logits, plain(input_ids=IDS).logits)
        exact = _model(tiny)(input_ids=IDS).logits
        assert (model(input_ids=IDS).logits - exact).norm() > 0.01 * exact.norm()


@pytest.mark.parametrize("options", [{}, {"dora": True}, {"targets": ["q_proj"]}], ids=str)
def test_adapters_stand_beside_it_and_are_added_to_what_it_computes_with(tiny: Path, options: dict[str, Any]) -> None:
    needs_bitsandbytes()
    model, plain = _model(tiny, quantize="nf4"), _model(tiny)
    with torch.no_grad():
        before = model(input_ids=IDS).logits
        adapt(model, **{**OPTIONS, "dropout": 0.0, "dora": False, **options})
        assert (model(input_ids=IDS).logits - before).norm() < 1e-5 * before.norm()
    assert all("lora_" in name for name, p in model.named_parameters() if p.requires_grad)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data += 0.1 * torch.randn_like(parameter)
    expected = model(input_ids=IDS).logits
    expected.square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters() if p.requires_grad)
    plain.load_state_dict(merged(model, {name: p.detach() for name, p in model.named_parameters()}), strict=True)
    with torch.no_grad():
        assert (plain(input_ids=IDS).logits - expected).norm() < 1e-5 * expected.norm()
    assert (expected - before).norm() > 0.01 * before.norm()


def test_a_weight_that_is_no_number_is_not_hidden(tiny: Path) -> None:
    needs_bitsandbytes()
    model = _model(tiny)
    model.model.layers[2].mlp.up_proj.weight.data[3, 4] = torch.nan
    with pytest.raises(InputError, match=r"layers\.2\.mlp\.up_proj: its weight holds a NaN .*; give a whole model"):
        quantize(model, CPU)


def test_blocks_with_other_matrices_are_refused() -> None:
    small: dict[str, Any] = dict(vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=2)
    experts = MixtralForCausalLM(
        MixtralConfig(**small, num_attention_heads=2, num_key_value_heads=1, num_local_experts=2)
    )
    gpt2 = GPT2LMHeadModel(GPT2Config(vocab_size=40, n_embd=16, n_layer=2, n_head=2, n_positions=32))
    for model, name in ((experts, r"layers\.0\.mlp\.\S+"), (gpt2, r"h\.0\.attn\.c_attn\.weight")):
        with pytest.raises(
            InputError, match=rf"teacher\.quantize: \S*{name} of a '\S+' model is no plain .*; write none"
        ):
            quantizable(model, "teacher.quantize")


def test_a_missing_package_is_named_with_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"teacher\.quantize: .* run pip install 'llmkd\[bnb\]', or write none"):
        check_installed("teacher.quantize")
