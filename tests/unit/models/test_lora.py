"""Adapters on plain models: what they begin as, what they can become, and the plain weights that they amount to."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, MixtralConfig, MixtralForCausalLM, Qwen3Config, Qwen3ForCausalLM

from llmkd.errors import InputError
from llmkd.models.lora import adapt, adapted, adapter_sizes, merged, targeted

SMALL: dict[str, Any] = dict(
    vocab_size=40,
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=1,
)
OPTIONS: dict[str, Any] = dict(rank=4, alpha=6.0, dropout=0.0, targets="all_linear", rslora=False, dora=False, seed=1)
IDS = torch.arange(24).view(2, 12)


def _model(kind: str = "qwen3") -> Any:
    torch.manual_seed(0)
    if kind == "gpt2":  # its maps hold their weights the other way round, and have biases
        return GPT2LMHeadModel(GPT2Config(vocab_size=40, n_embd=16, n_layer=2, n_head=2, n_positions=32)).eval()
    return Qwen3ForCausalLM(Qwen3Config(**SMALL, head_dim=8)).eval()


@pytest.mark.parametrize("dora", [False, True])
def test_new_adapters_are_the_base_model(dora: bool) -> None:
    model = _model()
    before, plain = model(IDS).logits, {name: p.clone() for name, p in model.named_parameters()}
    adapt(model, **{**OPTIONS, "dora": dora})
    assert torch.allclose(model(IDS).logits, before, rtol=1e-6, atol=1e-6)
    assert type(model) is Qwen3ForCausalLM
    assert all("lora_" in name for name, p in model.named_parameters() if p.requires_grad)
    state = merged(model, dict(model.state_dict()))
    assert state.keys() == plain.keys()
    assert all(torch.allclose(state[name], plain[name], rtol=1e-6) for name in plain)


def test_adapters_are_drawn_from_the_seed_alone() -> None:
    models = [_model() for _ in range(3)]
    for model, seed, noise in zip(models, (1, 1, 2), (5, 6, 6), strict=True):
        torch.manual_seed(noise)
        adapt(model, **{**OPTIONS, "seed": seed})
    first, same, other = ([p for n, p in m.named_parameters() if "lora_A" in n] for m in models)
    assert all(torch.equal(a, b) and not torch.equal(a, c) for a, b, c in zip(first, same, other, strict=True))


@pytest.mark.parametrize("kind", ["qwen3", "gpt2"])
@pytest.mark.parametrize("options", [{}, {"dora": True}, {"rslora": True}], ids=str)
def test_merged_weights_give_the_adapted_models_logits(kind: str, options: dict[str, Any]) -> None:
    model, plain = _model(kind), _model(kind)
    adapt(model, **{**OPTIONS, **options})
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data += 0.1 * torch.randn_like(parameter)
    expected = model(IDS).logits
    assert (expected - plain(IDS).logits).norm() > 0.01 * expected.norm()
    plain.load_state_dict(merged(model, dict(model.state_dict())))
    assert (plain(IDS).logits - expected).norm() < 1e-5 * expected.norm()


def test_a_rank_as_large_as_the_width_reaches_any_weight() -> None:
    """From the A that is drawn, some B gives any change of the map: B = change A⁻¹ / scale."""
    model = _model().double()
    adapt(model, **{**OPTIONS, "rank": 16, "targets": ["q_proj"]})
    layer = model.model.layers[1].self_attn.q_proj
    wanted = torch.randn(16, 16, dtype=torch.float64)
    change = wanted - layer.base_layer.weight
    layer.lora_B["default"].weight.data = change @ torch.linalg.inv(layer.lora_A["default"].weight) / (6.0 / 16)
    found = merged(model, dict(model.state_dict()))["model.layers.1.self_attn.q_proj.weight"]
    assert torch.allclose(found, wanted, rtol=0, atol=1e-9)
    states = torch.randn(3, 16, dtype=torch.float64)
    assert torch.allclose(layer(states), states @ wanted.T, rtol=0, atol=1e-9)


def test_all_linear_maps_of_the_blocks_and_no_others() -> None:
    model = _model()
    names = set(targeted(model, "all_linear"))
    linear = {name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    assert len(names) == 14 and names == linear - {"lm_head"}
    some = targeted(model, ["q_proj", "down_proj"])
    assert set(some) == {n for n in names if n.endswith(("q_proj", "down_proj"))}
    planned = sum(sum(adapter_sizes(module, 4, dora=True)) for module in some.values())
    adapt(model, **{**OPTIONS, "targets": ["q_proj", "down_proj"], "dora": True})
    assert planned == sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert set(adapted(model)) == set(some)


def test_what_can_not_be_adapted_is_said() -> None:
    with pytest.raises(InputError, match=r"called 'query'; choose from down_proj, .*, v_proj, or write all_linear"):
        targeted(_model(), ["q_proj", "query"])
    experts = MixtralForCausalLM(MixtralConfig(**SMALL, num_local_experts=2))
    with pytest.raises(
        InputError, match=r"all_linear would leave out model\.layers\.0\.mlp\.\S+, a matrix that is no linear"
    ):
        targeted(experts, "all_linear")
    assert len(targeted(experts, ["q_proj"])) == 2


def test_the_first_block_has_an_input_that_asks_for_a_gradient() -> None:
    """Else torch would call a backward hook on the block before its adapters have their gradients."""
    model = _model()
    adapt(model, **OPTIONS)
    seen: list[bool] = []
    first = model.model.layers[0]
    first.register_full_backward_hook(
        lambda *_: seen.append(all(p.grad is not None for p in first.parameters() if p.requires_grad))
    )
    model(IDS).logits.sum().backward()
    assert seen == [True]
    with torch.no_grad():
        assert not copy.deepcopy(model)(IDS).logits.requires_grad
