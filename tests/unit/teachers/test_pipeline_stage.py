"""Stages one after the other are the whole model, and each reads its own tensors alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf

from llmkd.data.batches import collate
from llmkd.errors import InputError
from llmkd.models import folders, load, parts
from llmkd.models.model_types import types_with
from llmkd.models.parts import output_state
from llmkd.teachers import pipeline_stage as stage
from llmkd.teachers.pipeline_schedule import cut_into_stages
from tests.unit.models.test_load_and_make import CONFIGS, SMALL, new

CPU = torch.device("cpu")
SLIDING: dict[str, Any] = dict(use_sliding_window=True, sliding_window=4, max_window_layers=1)
KINDS: dict[str, Any] = {
    **{kind: CONFIGS[kind] for kind in types_with(lambda row: row.has_stages)},
    "qwen2_sliding": lambda: hf.Qwen2Config(**SMALL, **SLIDING),
    "mistral_sliding": lambda: hf.MistralConfig(**SMALL, sliding_window=4),
    "llama_yarn": lambda: hf.LlamaConfig(
        **SMALL, rope_parameters=dict(rope_type="yarn", rope_theta=1e4, factor=2.0, original_max_position_embeddings=32)
    ),
}


def _rows(*lengths: int) -> list[dict[str, Any]]:
    draw = torch.Generator().manual_seed(1)
    return [{"input_ids": torch.randint(2, 64, (n,), generator=draw).tolist(), "trained": [True] * n} for n in lengths]


def _load(folder: Path, part: range) -> Any:
    return stage.load_stage(folder, part, dtype=torch.float32, attention="auto", device=CPU)


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_stages_one_after_the_other_are_the_whole_model(kind: str, tmp_path: Path) -> None:
    model = new(KINDS[kind]())
    model.save_pretrained(tmp_path)
    bodies = [_load(tmp_path, part) for part in (range(0, 1), range(1, 3), range(3, 4))]
    model.set_attn_implementation(load.attention_implementation("auto", torch.float32, model.config)[0])
    states: dict[int, torch.Tensor] = {}
    for number, block in enumerate(parts.blocks(model)):
        block.register_forward_hook(lambda module, args, output, n=number: states.update({n: output_state(output)}))
    for packed in (False, True):
        batch = collate(_rows(5, 1, 9), pad_id=0, packed=packed)
        common = parts.decoder_options(model.config, batch.packed)
        final = parts.backbone(model)(input_ids=batch.input_ids, **common).last_hidden_state
        state = bodies[0](input_ids=batch.input_ids, **common).last_hidden_state
        assert torch.equal(state, states[0])
        for body, last in ((bodies[1], states[2]), (bodies[2], final)):
            state = body(inputs_embeds=state, **common).last_hidden_state
            assert torch.equal(state, last)
        weight, bias = load.load_head(tmp_path, dtype=torch.float32)
        assert torch.equal(weight, parts.head(model).weight) and bias is None


def test_a_stage_reads_its_own_tensors_and_no_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = new(CONFIGS["qwen3"]())
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 3
    read: list[str] = []
    opened: set[str] = set()

    class Watched:
        def __init__(self, file: Path, **options: Any) -> None:
            opened.add(file.name)
            self._file = stage_safe_open(file, **options)

        def __enter__(self) -> Any:
            self._tensors = self._file.__enter__()
            return self

        def __exit__(self, *args: Any) -> None:
            self._file.__exit__(*args)

        def get_tensor(self, name: str) -> torch.Tensor:
            read.append(name)
            return self._tensors.get_tensor(name)

    stage_safe_open = stage.safe_open
    monkeypatch.setattr(stage, "safe_open", Watched)
    monkeypatch.setattr(load, "safe_open", Watched)
    files = folders.tensor_files(tmp_path)
    whole: list[str] = []
    for part in cut_into_stages([1] * 4, 3):
        read.clear()
        opened.clear()
        body = _load(tmp_path, part)
        own = {n for n in files if any(n.startswith(f"model.layers.{block}.") for block in part)}
        own |= {"model.embed_tokens.weight"} if part.start == 0 else set()
        own |= {"model.norm.weight"} if part.stop == 4 else set()
        assert sorted(read) == sorted(own) and opened == {files[name].name for name in own}
        assert sum(p.numel() for p in body.parameters()) == sum(model.state_dict()[name].numel() for name in own)
        whole += read
    read.clear()
    load.load_head(tmp_path, dtype=torch.float32)
    assert read == ["lm_head.weight"]
    assert sorted(whole + read) == sorted(files)  # together they are the model, and nothing is read twice


def test_a_model_that_is_not_known_to_be_the_sum_of_its_stages_is_refused(tmp_path: Path) -> None:
    """Gemma scales its embeddings in the model, not in the embedding module: a later stage would scale its state."""
    with pytest.raises(InputError, match=r"teacher\.placement: a 'gemma' model .* write zero3 or replicated"):
        stage.check_pipelined(CONFIGS["gemma"]())
    new(CONFIGS["gemma"]()).save_pretrained(tmp_path)
    with pytest.raises(InputError, match="gemma"):
        _load(tmp_path, range(0, 2))


def test_a_missing_tensor_is_named(tmp_path: Path) -> None:
    new(CONFIGS["qwen3"]()).save_pretrained(tmp_path)
    wanted = ["model.norm.weight", "model.layers.9.mlp.up_proj.weight"]
    with pytest.raises(InputError, match=r"lack the tensor 'model\.layers\.9\.mlp\.up_proj\.weight'"):
        stage.read_tensors(tmp_path, wanted, dtype=torch.float32, device=CPU)


def test_bfloat16_stages_keep_float32_rotary_frequencies(tmp_path: Path) -> None:
    model: Any = new(CONFIGS["qwen3"]())
    model.save_pretrained(tmp_path)
    body: Any = stage.load_stage(tmp_path, range(1, 3), dtype=torch.bfloat16, attention="sdpa", device=CPU)
    assert {p.dtype for p in body.parameters()} == {torch.bfloat16}
    assert torch.equal(body.rotary_emb.inv_freq, model.model.rotary_emb.inv_freq)
    assert not any(p.requires_grad or p.is_meta for p in body.parameters())


def test_the_cut_counts_the_teachers_own_weights() -> None:
    config = hf.Qwen3Config(**{**SMALL, "vocab_size": 4000, "num_hidden_layers": 7}, head_dim=8)
    assert [len(part) for part in stage.teacher_cut(config, 3)] == [1, 3, 3]
