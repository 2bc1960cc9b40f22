"""Copied blocks made narrower: what is measured, what stays by it, and what the model of these parts computes."""

from __future__ import annotations

import dataclasses
import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf

from llmkd.data.batches import collate
from llmkd.errors import InputError
from llmkd.models import load, make, parts, width
from llmkd.models.model_types import types_with
from tests.unit.models.test_load_and_make import CONFIGS, SMALL, new

KINDS: dict[str, Any] = {
    **{kind: CONFIGS[kind] for kind in types_with(lambda row: row.narrows)},
    "llama_biased": lambda: hf.LlamaConfig(**SMALL, attention_bias=True, mlp_bias=True),
    "qwen3_tied": lambda: hf.Qwen3Config(**SMALL, head_dim=16, tie_word_embeddings=True),
}
ROWS = [{"input_ids": [*range(2, 2 + n)], "trained": [True] * n} for n in (9, 3, 17, 1)]
IDS = torch.arange(2, 26)[None]


def save(model: Any, folder: Path) -> Path:
    model.save_pretrained(folder)
    make.new_tokenizer(["one two"], 300).save_pretrained(folder)
    return folder


def read(folder: Path) -> Any:
    return hf.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.double()(IDS).logits


def sums(model: Any, stack: list[int], batches: list[Any]) -> width.Sums:
    model.set_attn_implementation("sdpa")
    total = width.zero_sums(model.config, len(stack), torch.device("cpu"))
    blocks = parts.blocks(model)
    for batch in batches:
        with torch.no_grad(), width.measured([blocks[n] for n in stack], model.config.head_dim, batch, total):
            parts.final_state(model, batch)
    return total


def batches(*rows: list[Any], packed: bool = False) -> list[Any]:
    return [collate(some, pad_id=0, packed=packed) for some in rows]


def smaller(config: Any, **sizes: int) -> Any:
    return load.student_config(config, range(config.num_hidden_layers), sizes)


def everything(config: Any, stack: tuple[int, ...]) -> width.Kept:
    def each(count: int) -> tuple[tuple[int, ...], ...]:
        return (tuple(range(count)),) * len(stack)

    channels = tuple(range(config.hidden_size))
    counts = (config.num_attention_heads, config.num_key_value_heads, config.intermediate_size)
    return width.Kept(channels, *map(each, counts))


@pytest.mark.parametrize("kind", KINDS)
def test_keeping_all_is_the_same_file(kind: str, tmp_path: Path) -> None:
    """Of all units the rule keeps all, and the student's weights are the teacher's to the bit."""
    teacher, stack = new(KINDS[kind]()), (3, 1, 1)
    source = save(teacher, tmp_path / "teacher")
    kept = width.chosen(sums(teacher, list(stack), batches(ROWS)), teacher.config, teacher.config.num_key_value_heads)
    assert kept == everything(teacher.config, stack)
    for name, keep in (("whole", None), ("narrowed", kept)):
        make.copied_student(source, stack, tmp_path / name, dtype=torch.float32, kept=keep)
    ours, theirs = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("narrowed", "whole"))
    assert ours == theirs
    configs = [json.loads((tmp_path / name / "config.json").read_text()) for name in ("narrowed", "whole")]
    assert configs[0] == configs[1]


@pytest.mark.parametrize("kind", KINDS)
def test_dead_parts_go_and_the_model_computes_the_same(kind: str, tmp_path: Path) -> None:
    """A model of which some heads, columns and channels are zeros, in other places in each block.

    An RMSNorm divides by the root of the mean over all channels: without dead ones its output is smaller by sqrt(kept / all), which
    Minitron leaves as it is. With the norms' weights multiplied by the inverse the logits are the same.
    """
    teacher = new(KINDS[kind]())
    dead_channels = torch.tensor([0, 5, 6, 7, 13, 20, 30, 31])
    groups, columns, head_dim = [1, 0, 1, 0], [range(n, 48, 3) for n in (0, 1, 2, 0)], teacher.config.head_dim
    with torch.no_grad():
        teacher.get_input_embeddings().weight[:, dead_channels] = 0.0
        for block, group, dead in zip(parts.blocks(teacher), groups, columns, strict=True):
            of: Any = block
            silenced = (
                (of.self_attn.o_proj, dead_channels),
                (of.mlp.down_proj, dead_channels),
                (of.self_attn.v_proj, torch.arange(head_dim) + group * head_dim),
                (of.mlp.up_proj, torch.tensor(list(dead))),
            )
            for module, outputs in silenced:
                for tensor in module.parameters():
                    tensor[outputs] = 0.0
    source = save(teacher, tmp_path / "teacher")
    small = smaller(teacher.config, hidden_size=24, intermediate_size=32, num_attention_heads=2, num_key_value_heads=1)
    kept = width.chosen(sums(teacher, [0, 1, 2, 3], batches(ROWS)), small, 2)
    assert set(kept.channels) == set(range(32)) - set(dead_channels.tolist())
    assert kept.groups == ((0,), (1,), (0,), (1,)) and kept.heads == ((0, 1), (2, 3), (0, 1), (2, 3))
    assert [set(range(48)) - set(stay) for stay in kept.columns] == [set(dead) for dead in columns]
    make.copied_student(source, range(4), tmp_path / "student", dtype=torch.float32, kept=kept)
    student = read(tmp_path / "student")
    assert (student.config.hidden_size, student.config.head_dim) == (24, head_dim)
    expected = logits(read(source))
    assert (logits(student) - expected).abs().max() > 1e-3 * expected.abs().max()
    norms = [module for name, module in student.named_modules() if name.endswith(("layernorm", "model.norm"))]
    assert len(norms) == 2 * 4 + 1
    for norm in norms:
        norm.weight.data *= (32 / 24) ** 0.5
        norm.variance_epsilon *= 32 / 24
    error = (logits(student) - expected).abs().max() / expected.abs().max()
    assert error < 1e-5  # transformers' norms and softmax are in float32


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_measured_is_what_a_plain_pass_gives(kind: str) -> None:
    """Row by row in float64; batches, padding and packing change nothing."""
    model, stack = new(KINDS[kind]()), [2, 0]
    whole = sums(model, stack, batches(ROWS))
    for other in (batches(ROWS[:1], ROWS[1:]), batches(ROWS[2:], ROWS[:2], packed=True)):
        parted = sums(model, stack, other)
        assert all(torch.allclose(parted[name], values, rtol=1e-5, atol=1e-9) for name, values in whole.items())
    plain, seen = model.double(), {}
    for place, block in enumerate(stack):
        of: Any = parts.blocks(plain)[block]
        for name in width.NORMS:
            of.get_submodule(name).register_forward_hook(
                lambda m, args, out, key=(name, place): seen.__setitem__(key, out[0].abs().mean(0))
            )
        of.self_attn.o_proj.register_forward_hook(
            lambda m, args, out, key=(width.HEADS, place): seen.__setitem__(
                key, args[0][0].view(-1, 4, model.config.head_dim).square().sum(-1).sqrt().mean(0)
            )
        )
        of.mlp.down_proj.register_forward_hook(
            lambda m, args, out, key=(width.COLUMNS, place): seen.__setitem__(key, args[0][0].abs().mean(0))
        )
    expected = {name: torch.zeros_like(values) for name, values in whole.items()}
    for row in ROWS:
        with torch.no_grad():
            plain(torch.tensor([row["input_ids"]]))
        for (name, place), mean in seen.items():
            expected[name][place] += mean**2
    assert all(torch.allclose(whole[name], values, rtol=1e-4, atol=1e-9) for name, values in expected.items())


def test_what_stays_is_the_most_important_of_all_that_the_shape_allows() -> None:
    """Against every choice that there is; of equals the lower number."""
    torch.manual_seed(1)
    config = hf.Qwen3Config(**{**SMALL, "num_attention_heads": 9, "num_key_value_heads": 3}, head_dim=4)
    small = smaller(config, hidden_size=3, intermediate_size=2, num_attention_heads=4, num_key_value_heads=2)
    widths = {**dict.fromkeys(width.NORMS, 5), width.HEADS: 9, width.COLUMNS: 4}
    squares = {name: torch.rand(2, n, dtype=torch.float64) for name, n in widths.items()}
    squares[width.COLUMNS][1] = 0.5
    kept = width.chosen(squares, small, 3)
    score = sum(squares[name].sqrt().sum(0) for name in width.NORMS)
    assert isinstance(score, torch.Tensor)
    assert kept.channels == max(itertools.combinations(range(5), 3), key=lambda some: score[list(some)].sum())
    assert kept.columns[1] == (0, 1)
    for block in range(2):
        heads = squares[width.HEADS][block].sqrt()
        of_group = [list(itertools.combinations(range(3 * g, 3 * g + 3), 2)) for g in range(3)]
        shapes = [a + b for g, h in ((0, 1), (0, 2), (1, 2)) for a in of_group[g] for b in of_group[h]]
        assert kept.heads[block] == max(shapes, key=lambda some: heads[list(some)].sum())
        assert kept.groups[block] == tuple(sorted({head // 3 for head in kept.heads[block]}))
    assert width.Kept.of(json.loads(json.dumps(dataclasses.asdict(kept)))) == kept
    assert kept.sizes == {
        "hidden_size": 3, "intermediate_size": 2, "num_attention_heads": 4, "num_key_value_heads": 2
    }  # fmt: skip
    squares[width.COLUMNS][0, 1] = torch.nan
    with pytest.raises(InputError, match="activations were measured as no number; look for a NaN in its weights"):
        width.chosen(squares, small, 3)


@pytest.mark.parametrize(
    ("kind", "sizes", "sentence"),
    [
        (
            "olmo2",
            {"hidden_size": 16},
            "student.hidden_size: .*'olmo2' model can't be narrowed, only those of llama, mi",
        ),
        ("qwen3_moe", {"intermediate_size": 16}, "student.intermediate_size: .* leave it out, or write init: random"),
        ("qwen3", {"hidden_size": 33}, "student.hidden_size: 33 is more than the teacher's 32.*; write at most 32, or"),
        (
            "qwen3",
            {"num_key_value_heads": 1},
            "student.num_attention_heads: 4 heads on 1 key-value heads are 4 to each",
        ),
        ("llama", {"num_attention_heads": 3}, "student.num_key_value_heads: 3 attention heads can't share 2 key-value"),
    ],
)
def test_what_can_not_be_narrowed_is_refused(kind: str, sizes: dict[str, int], sentence: str) -> None:
    with pytest.raises(InputError, match=sentence):
        width.check_narrowed(CONFIGS[kind](), sizes)
        smaller(CONFIGS[kind](), **sizes)


def test_a_tensor_that_nobody_knows_is_refused() -> None:
    kept = everything(CONFIGS["qwen3"](), (0,))
    with pytest.raises(InputError, match=r"'model\.layers\.0\.mlp\.experts\.gate' is narrowed; leave the width out"):
        width.narrowed("model.layers.0.mlp.experts.gate", torch.zeros(4, 4), kept, 8)
