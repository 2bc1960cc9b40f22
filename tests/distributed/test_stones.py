"""Runs with stepping stones: however they are spread they are one plain PyTorch run; resumed, exported, sharded and refused ones."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import deepspeed
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from llmkd.data.batches import collate
from llmkd.data.formats import RowFormat
from llmkd.data.rows import load_rows
from llmkd.data.tokens import tokenize
from llmkd.distributed import ds_configs, engines
from llmkd.files import ROOT
from llmkd.losses.schedules import learning_rate
from llmkd.models import load as models
from llmkd.models import parts as model_parts
from llmkd.recipe.recipe import load_recipe
from llmkd.student.connectors import make_connectors
from llmkd.student.stepping_stones import drawn, shares
from llmkd.teachers import upper_blocks as upper
from llmkd.teachers.resident import ResidentTeacher
from llmkd.train import train
from llmkd.training import build, initial, jobs
from llmkd.training import pairs as recipe_map
from tests.distributed.runner import run_on_ranks
from tests.tiny import load, plain_losses, rows_of_step
from tests.unit.student.test_stepping_stones import plain_stones

NARROW = {
    "student.init": "random",
    "student.hidden_size": 24,
    "student.num_attention_heads": 3,
    "student.num_key_value_heads": 1,
}
ALONE = {"loss.ce": 0.0, "loss.kl": 0.0, "loss.hidden": 0.0}
ASKED: dict[str, dict[str, Any]] = {
    "beside": {"stones.kl": 0.7, "stones.ce": 0.4},
    "narrow_cross": {**NARROW, "stones.cross": 0.3, "loss.kl_positions": "attended", "stones.pairs": [[0, 2], [2, 5]]},
    "alone": {**NARROW, **ALONE, "stones.ce": 0.5},
    "one": {**NARROW, "stones.sample": "one"},
    "one_alone": {**ALONE, "stones.sample": "one"},
}
SHARDED = {"teacher.placement": "zero3"}
# How it is computed: none of it may matter. (what is asked, changes)
ONE_RANK: dict[str, tuple[str, dict[str, Any]]] = {
    "beside_zero0": ("beside", {"train.deepspeed": "zero0", "train.micro_batch_size": 8}),
    "cross_kept": ("narrow_cross", {"train.deepspeed": "zero2", "stones.checkpoint": False}),
    "one_packed": ("one", {"data.batching": "packed", "train.micro_batch_size": 2}),
}
TWO_RANKS: dict[str, tuple[str, dict[str, Any]]] = {
    "beside_sharded_packed_accumulated": (
        "beside",
        {**SHARDED, "data.batching": "packed", "train.micro_batch_size": 2},
    ),
    "cross_checkpointed": ("narrow_cross", {"train.activation_checkpointing": True}),
    "alone_zero2": ("alone", {**SHARDED, "train.deepspeed": "zero2"}),
    "one_alone_sharded": ("one_alone", {"train.micro_batch_size": 2, **SHARDED}),
}
SLOW: dict[str, tuple[str, dict[str, Any]]] = {
    "beside_sharded": ("beside", SHARDED),
    "cross_sharded": ("narrow_cross", {**SHARDED, "train.micro_batch_size": 1}),
    "alone_accumulated": ("alone", {"train.micro_batch_size": 2}),
    "one_sharded_offloaded": ("one", {**SHARDED, "teacher.offload": "cpu"}),
    "one_alone_zero1": ("one_alone", {"train.deepspeed": "zero1"}),
}


def _named(tiny: Path, scenarios: dict[str, tuple[str, dict[str, Any]]]) -> dict[str, dict[str, Any]]:
    named = {}
    for name, (asked, changes) in scenarios.items():
        changes = {**ASKED[asked], "stones.connector_batches": 3, **changes}
        if "train.deepspeed" in changes:
            changes["train.deepspeed"] = str(tiny / f"{changes['train.deepspeed']}.json")
        named[name] = changes
    return named


@pytest.fixture(scope="module")
def runs(tiny: Path, world: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All the runs above but the slow ones: in this process, and on two ranks."""
    output = tmp_path_factory.mktemp("stones")
    for name, changes in _named(tiny, ONE_RANK).items():
        recipe = load_recipe(tiny / "recipe.yaml").changed(changes)
        assert train(world, jobs.distil_job(world, recipe, output / name))
    assert run_on_ranks(2, tiny / "recipe.yaml", _named(tiny, TWO_RANKS), output) == {}
    return output


@pytest.fixture(scope="module")
def slow_runs(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The slow runs, on two ranks."""
    output = tmp_path_factory.mktemp("slow")
    assert run_on_ranks(2, tiny / "recipe.yaml", _named(tiny, SLOW), output) == {}
    return output


def _states(model: Any, block: int, batch: Any) -> torch.Tensor:
    kept: list[torch.Tensor] = []
    hook = model.model.layers[block].register_forward_hook(lambda m, a, output: kept.append(output))
    inputs = dict(attention_mask=batch.attention_mask, position_ids=batch.position_ids, use_cache=False)
    with torch.no_grad():
        model(input_ids=batch.input_ids, **inputs)
    hook.remove()
    return kept[0][batch.attended].double()


def plain_run(tiny: Path, changes: dict[str, Any], folder: Path) -> tuple[dict[str, Any], list[dict[str, float]]]:
    """(weights, what each step would log) in plain PyTorch: one process, whole batches, whole logits, connectors by lstsq."""
    recipe = load_recipe(tiny / "recipe.yaml").changed(changes)
    initial.initial_student(recipe, tiny / "teacher", folder)
    teacher, student = load(tiny / "teacher").eval().requires_grad_(False), load(folder).train()
    pairs, stones = (
        of(recipe, 3, teacher.config.num_hidden_layers) for of in (recipe_map.pairs_of, recipe_map.stones_of)
    )
    tokenizer = models.load_tokenizer(tiny / "teacher")
    data = tokenize(
        load_rows(recipe.data.source, name=None, split="train", rows=None),
        tokenizer,
        row_format=RowFormat(),
        max_length=recipe.data.max_length,
        too_long="drop",
    )
    batch_of = lambda step: collate(  # noqa: E731
        rows_of_step(data, recipe, step), pad_id=tokenizer.pad_token_id, packed=False
    )
    connectors: Any = make_connectors(len(stones), student.config.hidden_size, teacher.config.hidden_size)
    settings = recipe.stones
    assert settings is not None
    first = [batch_of(step) for step in range(settings.connector_batches)]
    for (s, t), connector in zip(stones, connectors, strict=True):
        ours, theirs = (
            torch.cat([_states(model, block, batch) for batch in first])
            for model, block in ((student, s), (teacher, t))
        )
        with torch.no_grad():
            connector.weight.copy_(torch.linalg.lstsq(ours, theirs).solution.T)
    width = student.config.hidden_size
    projectors = build.make_projectors(0 if width == 32 else len(pairs), width, 32, bias=False, seed=0)
    parameters = [*student.parameters(), *connectors.parameters(), *(projectors.parameters() if projectors else [])]
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": recipe.train.weight_decay},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=1.0, betas=recipe.train.betas, eps=recipe.train.epsilon)
    logged = []
    for step in range(recipe.train.steps or 0):
        parts = plain_losses(recipe, teacher, student, projectors, pairs, batch_of(step))
        own = recipe.loss.ce * parts["ce"] + recipe.loss.kl * parts["kl"] + recipe.loss.hidden * parts["hidden"]
        beside, found = _plain_stones(recipe, student, teacher, connectors, stones, batch_of(step), step)
        (own + beside).backward()
        for parameter in parameters:  # what gets no gradient is stepped with zeros, as an optimizer of flat shards does
            parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        nn.utils.clip_grad_norm_(parameters, recipe.train.clip)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(
                step,
                peak=recipe.train.learning_rate,
                final=recipe.train.final_learning_rate,
                warmup=recipe.train.warmup_steps,
                total=3,
                shape="cosine",
            )
        optimizer.step()
        optimizer.zero_grad()
        logged.append({"loss": (own + beside).item(), "stones": beside.item(), **found})
    return {name: p.detach() for name, p in student.named_parameters()}, logged


def _plain_stones(
    recipe: Any, student: Any, teacher: Any, connectors: Any, pairs: Any, batch: Any, step: int
) -> tuple[torch.Tensor, dict[str, float]]:
    settings = recipe.stones
    loss, parts = plain_stones(
        student,
        teacher,
        connectors,
        pairs,
        batch,
        weights=(settings.ce, settings.kl),
        cross=settings.cross,
        positions=recipe.loss.kl_positions,
    )
    chosen = list(range(len(pairs)))
    if settings.sample == "one":
        chosen = [drawn(len(pairs), recipe.seed, step)]
        loss = sum(shares(len(pairs))) * (settings.ce * parts[chosen[0]]["ce"] + settings.kl * parts[chosen[0]]["kl"])
    return loss, {f"stones/{pairs[n][0]}<{pairs[n][1]}/kl": parts[n]["kl"].item() for n in chosen}


@pytest.fixture(scope="module")
def plain(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """asked, batching -> (weights, logged) of the plain run, each computed once."""
    done: dict[tuple[str, str], Any] = {}

    def run(asked: str, batching: str) -> Any:
        if (asked, batching) not in done:
            changes = {**ASKED[asked], "stones.connector_batches": 3, "data.batching": batching}
            done[asked, batching] = plain_run(tiny, changes, tmp_path_factory.mktemp("initial") / "student")
        return done[asked, batching]

    return run


@pytest.mark.parametrize("name", [*ONE_RANK, *TWO_RANKS])
def test_however_it_is_spread_it_is_the_plain_run(runs: Path, plain: Any, name: str) -> None:
    _check(runs / name, plain, *{**ONE_RANK, **TWO_RANKS}[name])


@pytest.mark.slow
@pytest.mark.parametrize("name", SLOW)
def test_however_else_it_is_spread_it_is_the_plain_run(slow_runs: Path, plain: Any, name: str) -> None:
    _check(slow_runs / name, plain, *SLOW[name])


def _check(run: Path, plain: Any, asked: str, spread: dict[str, Any]) -> None:
    weights, expected = plain(asked, spread.get("data.batching", "grouped"))
    logged = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert len(logged) == len(expected) == 3
    for ours, theirs in zip(logged, expected, strict=True):
        for key, value in theirs.items():
            assert ours[key] == pytest.approx(value, rel=2e-5, abs=1e-6), (key, ours, theirs)
        assert {k for k in ours if k.endswith("/kl")} == {k for k in theirs if k.endswith("/kl")}
    trained = load_file(run / "model" / "model.safetensors")
    assert trained.keys() == weights.keys()  # an exported student holds no connector
    for key, value in weights.items():
        change = (trained[key] - value).abs().max()
        assert change <= 1e-6 * max(1.0, value.abs().max()), (key, change)


def test_the_stones_change_the_student(runs: Path, tiny: Path, tmp_path: Path) -> None:
    """Alone they train the lower blocks and leave the last norm, which no stone passes; the plain runs agree with them on both."""
    recipe = load_recipe(tiny / "recipe.yaml").changed(ASKED["alone"])
    initial.initial_student(recipe, tiny / "teacher", tmp_path / "student")
    before, after = (
        load_file(folder / "model.safetensors") for folder in (tmp_path / "student", runs / "alone_zero2" / "model")
    )
    moved = {key for key in before if (before[key] - after[key]).abs().max() > 1e-4}
    assert {key for key in before if key.startswith(("model.layers", "model.embed"))} <= moved
    assert "model.norm.weight" not in moved


# ---------------------------------------------------------------------------------------------------------------------
# One process


@pytest.mark.parametrize("sample", ["all", "one"])
def test_resumed_is_uninterrupted_to_the_bit(tiny: Path, world: Any, tmp_path: Path, sample: str) -> None:
    """Connectors and their optimizer states are in the checkpoint; they are not fitted again."""
    changes = {**ASKED["alone"], "loss.ce": 1.0, "stones.sample": sample, "train.steps": 6, "train.save_every": 3}
    changes["train.micro_batch_size"] = 8
    recipe = load_recipe(tiny / "recipe.yaml").changed(changes)
    assert train(world, jobs.distil_job(world, recipe, tmp_path / "whole"))
    part = Path("checkpoints") / "step-00000003"
    shutil.copytree(tmp_path / "whole" / part, tmp_path / "resumed" / part)
    assert train(world, jobs.distil_job(world, recipe, tmp_path / "resumed"))
    ours, theirs = (load_file(tmp_path / name / "model" / "model.safetensors") for name in ("resumed", "whole"))
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
    lines = [
        [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        for name in ("resumed", "whole")
    ]
    timed = ("tokens_per_second", "seconds_per_step", "seconds_by_part", "memory_gib")
    plain = [[{k: v for k, v in line.items() if k not in timed} for line in found] for found in lines]
    assert plain[0] == plain[1][3:]


# Without ZeRO a bfloat16 model is refused.
@pytest.mark.parametrize(
    ("stage", "dtype"), [(0, "float32"), *((s, d) for s in (1, 2, 3) for d in ("float32", "bfloat16"))]
)
def test_an_overwritten_weight_is_what_the_optimizer_goes_on_from(world: Any, stage: int, dtype: str) -> None:
    cpu = json.loads((ROOT / "ds_configs" / "cpu.json").read_text())
    config = ds_configs.complete_ds_config(
        {**cpu, "zero_optimization": {**cpu["zero_optimization"], "stage": stage}},
        world_size=1,
        micro_batch=1,
        accumulation=1,
        clip=0.0,
        dtype=dtype,
        nvme_path="",
    )
    module: Any = nn.Sequential(nn.Linear(5, 3, bias=False), nn.Linear(3, 3, bias=False)).to(models.DTYPES[dtype])
    made: Any = engines.engine(module, config, learning_rate=0.1, betas=(0.9, 0.9), epsilon=1e-8, weight_decay=0.0)
    torch.manual_seed(0)
    value = torch.randn(3, 5, dtype=torch.float64)
    engines.overwrite(world, module[0].weight, value)
    for group in made.optimizer.param_groups:
        group["lr"] = 0.0
    loss = made(torch.ones(1, 5, dtype=models.DTYPES[dtype])).float().sum()
    made.backward(loss)
    made.step()  # at rate 0: writes the fp32 copy over the weight
    with engines.gathered([module[0].weight]):
        assert torch.equal(module[0].weight.detach(), value.float().to(models.DTYPES[dtype]))
    if stage:
        full: Any = deepspeed.utils.safe_get_full_fp32_param(module[0].weight)
        assert torch.equal(full.view(3, 5), value.float())


def test_a_sharded_teacher_lends_one_block_at_a_time(tiny: Path, world: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the stones' passes, forward and for the gradient; nothing stays gathered."""
    counted: Any = model_parts.blocks(models.without_weights(models.load_config(tiny / "teacher")))
    block = sum(p.numel() for p in counted[0].parameters())
    ds = ds_configs.teacher_ds_config(2, "float32", "none", block=block)
    model: Any = models.load_causal_lm(tiny / "teacher", dtype=torch.float32, ds_config=ds, attention="sdpa")
    held: list[int] = []
    call = upper.functional_call

    def counting(*args: Any, **options: Any) -> Any:
        held.append(sum(p.ds_numel for p in model.parameters() if p.ds_status.name != "NOT_AVAILABLE"))
        return call(*args, **options)

    monkeypatch.setattr(upper, "functional_call", counting)
    teacher = ResidentTeacher(model, [], normed_last=False, ds_config=ds, stones=[0, 3])
    batch = collate([{"input_ids": list(range(2, 9)), "trained": [True] * 7}], pad_id=0, packed=False)
    signal = teacher.signals(batch)
    assert held == [] and signal.upper is not None
    leaf = torch.randn(1, 8, 32, requires_grad=True)
    for start in (0, 3):
        signal.upper(start, leaf, batch).sum().backward()
    assert len(held) == 2 * (6 + 3) and max(held) == block
    assert all(p.ds_status.name == "NOT_AVAILABLE" and p.grad is None for p in model.parameters())


@pytest.mark.slow
def test_ranks_that_do_not_divide_a_connector(tiny: Path, tmp_path: Path) -> None:
    changes = {**ASKED["alone"], "student.hidden_size": 25, "train.batch_size": 6, "train.micro_batch_size": 2}
    named = _named(tiny, {"run": ("alone", changes)})
    for ranks in (1, 3):
        assert run_on_ranks(ranks, tiny / "recipe.yaml", named, tmp_path / str(ranks)) == {}
    ours, theirs = (load_file(tmp_path / ranks / "run" / "model" / "model.safetensors") for ranks in ("3", "1"))
    for key, value in theirs.items():
        assert (ours[key] - value).abs().max() <= 1e-6 * max(1.0, value.abs().max()), key
