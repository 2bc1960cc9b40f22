"""Adapter folders: their sum with a base is peft's own, and what can't be added is one sentence with the cure."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from llmkd.errors import InputError
from llmkd.files import read
from llmkd.models.adapter_folders import check_adapter, write_merged
from llmkd.models.load import load_config

IDS = torch.arange(4, 28).view(2, 12)
KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "rslora": {"use_rslora": True, "lora_dropout": 0.1},
    "dora": {"use_dora": True, "target_modules": ["q_proj", "up_proj"]},
    "patterns": {"rank_pattern": {"q_proj": 3}, "alpha_pattern": {"down_proj": 9}, "layers_to_transform": [1, 4]},
    "head": {"target_modules": ["lm_head", "v_proj"]},
}


def _loaded(folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()


def written(base: Path, folder: Path, **options: Any) -> Path:
    """An adapter of the base as peft writes it, no number of it zero."""
    torch.manual_seed(1)
    targets = {"target_modules": ["q_proj", "k_proj", "o_proj", "down_proj"]}
    model = peft.get_peft_model(_loaded(base), peft.LoraConfig(**{"r": 4, "lora_alpha": 6, **targets, **options}))
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data += 0.1 * torch.randn_like(parameter)
    model.save_pretrained(str(folder), save_embedding_layers=False)
    return folder


@pytest.mark.parametrize("kind", KINDS)
def test_the_sum_is_pefts_own(tiny: Path, tmp_path: Path, kind: str) -> None:
    base, adapter = tiny / "teacher", written(tiny / "teacher", tmp_path / "adapter", **KINDS[kind])
    check_adapter(str(adapter), "teacher.adapter", load_config(base))
    options: Any = {"key": "teacher.adapter", "dtype": torch.float32, "meta": {"inputs": 1}}
    write_merged(base, str(adapter), tmp_path / "merged", **options)
    theirs: Any = peft.PeftModel.from_pretrained(_loaded(base), adapter).merge_and_unload()
    with torch.no_grad():
        ours, expected, before = (m(IDS).logits for m in (_loaded(tmp_path / "merged"), theirs, _loaded(base)))
    assert (ours - expected).norm() < 1e-6 * expected.norm() < 1e-3 * (before - expected).norm()
    names = load_file(base / "model.safetensors").keys()
    assert load_file(tmp_path / "merged" / "model.safetensors").keys() == names
    assert read(tmp_path / "merged" / "llmkd.json") == {"inputs": 1}
    assert (tmp_path / "merged" / "tokenizer.json").is_file()


def test_the_sum_of_a_model_with_biases_that_holds_its_weights_the_other_way_round(tmp_path: Path) -> None:
    torch.manual_seed(0)
    plain = GPT2LMHeadModel(GPT2Config(vocab_size=40, n_embd=16, n_layer=2, n_head=2, n_positions=32))
    plain.save_pretrained(tmp_path / "base")
    where: Any = {"target_modules": ["c_attn", "c_fc"], "fan_in_fan_out": True}
    adapter = written(tmp_path / "base", tmp_path / "adapter", **where)
    write_merged(tmp_path / "base", str(adapter), tmp_path / "merged", key="student.adapter", dtype=torch.float32)
    theirs: Any = peft.PeftModel.from_pretrained(_loaded(tmp_path / "base"), adapter).merge_and_unload()
    with torch.no_grad():
        ours, expected = _loaded(tmp_path / "merged")(IDS).logits, theirs(IDS).logits
    assert (ours - expected).norm() < 1e-6 * expected.norm()


def test_it_is_rounded_once_and_only_where_nothing_wider_is_asked_for(tiny: Path, tmp_path: Path) -> None:
    """A bfloat16 model's sum is that of float32 rounded; for a float32 teacher it stays float32."""
    _loaded(tiny / "teacher", torch.bfloat16).save_pretrained(tmp_path / "base")
    adapter = written(tiny / "teacher", tmp_path / "adapter")
    exact = peft.PeftModel.from_pretrained(_loaded(tmp_path / "base"), adapter).merge_and_unload()
    for dtype in (torch.bfloat16, torch.float32):
        folder = tmp_path / str(dtype)
        write_merged(tmp_path / "base", str(adapter), folder, key="teacher.adapter", dtype=dtype)
        weights = load_file(folder / "model.safetensors")
        assert {tensor.dtype for tensor in weights.values()} == {dtype}
        assert load_config(folder).dtype == dtype
        name = "model.layers.0.self_attn.q_proj.weight"
        expected = exact.get_parameter(name).detach()
        apart = (weights[name].float() - expected).abs()
        assert (apart <= (2**-8 if dtype == torch.bfloat16 else 1e-6) * expected.abs() + 1e-7).all()


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        (
            {"modules_to_save": ["lm_head"]},
            r"has modules_to_save: \['lm_head'\], which is not read; merge it by peft's",
        ),
        ({"bias": "all"}, r"has bias: 'all', which is not read; merge it"),
        ({"init_lora_weights": "pissa"}, r"has init_lora_weights: 'pissa', which is not read; merge it"),
        ({"peft_type": "LOHA"}, r"an adapter of type LOHA, and only LORA is read; merge it"),
        ({"of_tomorrow": 3}, r"has of_tomorrow: 3, which is not read; merge it"),
        ({"r": 5}, r"for another model than its path's: of its tensor \S+ the file has it as \[.*; give the path of"),
        ({"target_modules": ["query"]}, r"for another model than its path's \(.*\); give the path of the model"),
        ({"target_modules": ["q_proj"]}, r"for another model .* the file has it .* and the model lacks it; give"),
        ({"target_modules": ["embed_tokens"]}, r"adapts model\.embed_tokens, which is no linear map; merge it"),
    ],
    ids=lambda value: "-".join(map(str, next(iter(value.items())))) if isinstance(value, dict) else "",
)
def test_what_is_not_read_is_said(tiny: Path, tmp_path: Path, changes: dict[str, Any], sentence: str) -> None:
    adapter = written(tiny / "teacher", tmp_path / "adapter")
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps({**config, **changes}))
    with pytest.raises(InputError, match=rf"^teacher\.adapter: .*{sentence}"):
        check_adapter(str(adapter), "teacher.adapter", load_config(tiny / "teacher"))
    with pytest.raises(InputError, match=rf"^teacher\.adapter: .*{sentence}"):
        write_merged(tiny / "teacher", str(adapter), tmp_path / "merged", key="teacher.adapter", dtype=torch.float32)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter"]


def test_no_pickle_is_read(tiny: Path, tmp_path: Path) -> None:
    adapter = written(tiny / "teacher", tmp_path / "adapter")
    shape = load_config(tiny / "teacher")
    tensors = load_file(adapter / "adapter_model.safetensors")
    torch.save(tensors, adapter / "adapter_model.bin")
    (adapter / "adapter_model.safetensors").unlink()
    with pytest.raises(InputError, match=r"adapter_model\.bin, a pickle, .* never loaded; load it .* save it again"):
        check_adapter(str(adapter), "student.adapter", shape)
    (adapter / "adapter_model.bin").unlink()
    with pytest.raises(InputError, match=r"student\.adapter: .* holds no adapter_model\.safetensors; give a folder"):
        check_adapter(str(adapter), "student.adapter", shape)
    (adapter / "adapter_config.json").unlink()
    with pytest.raises(InputError, match=r"student\.adapter: .* holds no adapter_config\.json; give a folder"):
        check_adapter(str(adapter), "student.adapter", shape)
    with pytest.raises(InputError, match=r"student\.adapter: 'nowhere' is no folder here; give a folder"):
        check_adapter("nowhere", "student.adapter", shape)


def test_a_head_that_is_tied_to_the_embeddings(tiny: Path, tmp_path: Path) -> None:
    adapter = written(tiny / "teacher", tmp_path / "adapter", target_modules=["lm_head"])
    with pytest.raises(InputError, match=r"adapts lm_head, whose weights are the embeddings' too; merge it"):
        check_adapter(str(adapter), "teacher.adapter", load_config(tiny / "tied"))
    tensors = load_file(adapter / "adapter_model.safetensors")
    head = {
        "base_model.model.lm_head.base_layer.weight": torch.zeros(320, 32)
    }  # as peft writes it unless told otherwise
    save_file({**tensors, **head}, adapter / "adapter_model.safetensors")
    with pytest.raises(InputError, match=r"holds lm_head\.base_layer\.weight, a whole tensor .* is not read; merge it"):
        check_adapter(str(adapter), "teacher.adapter", load_config(tiny / "teacher"))
    save_file({}, adapter / "adapter_model.safetensors")
    with pytest.raises(InputError, match=r"of its tensor lm_head\.lora_A\.weight the file lacks it and the model has"):
        check_adapter(str(adapter), "teacher.adapter", load_config(tiny / "teacher"))
