"""An exported student gives the logits it gave in training, and the sharded teacher is never whole on a rank."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import deepspeed
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from llmkd.distributed.compiled import check_asynchronous_io
from llmkd.distributed.ds_configs import teacher_ds_config
from llmkd.distributed.engines import frozen_engine, gathered
from llmkd.errors import InputError
from llmkd.models import load, parts
from llmkd.recipe.recipe import load_recipe
from llmkd.train import train
from llmkd.training import checkpoint, jobs


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_exported_student_gives_the_logits_it_gave_in_training(
    tiny: Path, world: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: str
) -> None:
    recipe = load_recipe(tiny / "recipe.yaml").changed(
        {"train.dtype": dtype, "train.micro_batch_size": 8, "teacher.dtype": dtype}
    )
    ids = torch.arange(4, 36).reshape(2, 16)
    seen: list[torch.Tensor] = []
    weights: dict[str, torch.Tensor] = {}
    export = checkpoint.export

    def watched(world: Any, model: Any, *args: Any, **options: Any) -> None:
        with gathered(list(model.parameters())):
            weights.update({name: p.detach().clone() for name, p in model.named_parameters()})
        with torch.no_grad():
            seen.append(model.eval()(input_ids=ids).logits)
        export(world, model, *args, **options)

    monkeypatch.setattr(checkpoint, "export", watched)
    assert train(world, jobs.distil_job(world, recipe, tmp_path / "run"))
    model: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model").eval()
    assert model.dtype == load.DTYPES[dtype] and model.config.use_cache
    assert all(torch.equal(parameter, weights[name]) for name, parameter in model.named_parameters())
    with torch.no_grad():
        logits = model(input_ids=ids).logits
    # The weights are equal to the bit; DeepSpeed replaces linear layers under ZeRO-3 by a product that rounds in another order.
    error = (logits - seen[0]).float().norm() / seen[0].float().norm()
    assert error < (0.01 if dtype == "bfloat16" else 1e-6)
    names = sorted(p.name for p in (tmp_path / "run" / "model").iterdir())
    assert names == [
        "README.md", "config.json", "generation_config.json", "llmkd.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json",
    ]  # fmt: skip
    assert AutoTokenizer.from_pretrained(tmp_path / "run" / "model").eos_token == "<eos>"
    assert (
        model.generation_config.eos_token_id
        == model.config.eos_token_id
        == AutoTokenizer.from_pretrained(tiny / "teacher").eos_token_id
    )


def test_rotary_frequencies_stay_float32_under_zero3(tiny: Path, world: Any) -> None:
    """zero.Init would round them to the model's dtype; compare with a model loaded without it."""
    plain = load.load_causal_lm(tiny / "teacher", dtype=torch.bfloat16, ds_config=None, attention="sdpa")
    sharded = load.load_causal_lm(
        tiny / "teacher",
        dtype=torch.bfloat16,
        ds_config=teacher_ds_config(2, "bfloat16", "none", block=1),
        attention="sdpa",
    )
    expected, found = (dict(m.named_buffers()) for m in (plain, sharded))
    assert expected and all(b.dtype == torch.float32 for b in expected.values())
    assert expected.keys() == found.keys() and all(torch.equal(expected[k], found[k]) for k in expected)


def test_zero3_teacher_never_holds_more_than_two_blocks_or_its_embeddings(tiny: Path, world: Any) -> None:
    """Weights whole, or on their way, are counted at every module that has some; the next block's fetching is part of it."""
    counted: Any = load.without_weights(load.load_config(tiny / "teacher"))
    stack: Any = parts.blocks(counted)
    block = sum(p.numel() for p in stack[0].parameters())
    ds = teacher_ds_config(2, "float32", "none", block=block)
    model: Any = load.load_causal_lm(tiny / "teacher", dtype=torch.float32, ds_config=ds, attention="sdpa")
    held: list[int] = []
    of_next: list[set[bool]] = []
    order: list[Any] = list(parts.blocks(model))

    def count(module: Any, *_: Any) -> None:
        here = [p for p in model.parameters() if p.ds_status.name != "NOT_AVAILABLE"]
        held.append(sum(p.ds_numel for p in here))
        if module in order[:-1]:
            coming = order[order.index(module) + 1]
            of_next.append({p.ds_status.name != "NOT_AVAILABLE" for p in coming.parameters()})

    engine = frozen_engine(parts.backbone(model), ds, order)
    for module in parts.backbone(model).modules():
        if list(module.parameters(recurse=False)) or module in order:
            module.register_forward_pre_hook(count)
    for _ in range(3):  # DeepSpeed learns the order in the first passes and fetches ahead in the next ones
        with torch.no_grad():
            engine(input_ids=torch.arange(8)[None])
    embedding = model.get_input_embeddings().weight.ds_numel
    assert len(held) > 3 * 9 * len(order) and all(fetched == {True} for fetched in of_next[-len(order) + 1 :])
    largest = max(p.numel() for p in stack.parameters())
    assert (
        max(held) <= 2 * block + largest and block < embedding < 2 * block
    )  # beside the embeddings it ends within a parameter
    assert sorted(held)[-4] <= 2 * block
    assert sum(p.ds_numel for p in model.parameters() if p.ds_status.name == "AVAILABLE") == 0


def test_nvme_without_a_compiler_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise RuntimeError("Unable to JIT load the async_io op")

    monkeypatch.setattr(deepspeed.ops.op_builder.AsyncIOBuilder, "load", refuse)
    with pytest.raises(
        InputError, match=r"^teacher\.offload: nvme needs .*apt-get install libaio-dev g\+\+.* or write cpu$"
    ):
        check_asynchronous_io("teacher.offload")
