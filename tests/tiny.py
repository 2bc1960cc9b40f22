"""A tiny teacher, uneven rows and a recipe for them; and the same training run written plainly, to compare with."""

from __future__ import annotations

import hashlib
import json
import random
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
import yaml
from datasets import Dataset
from transformers import AutoModelForCausalLM, Qwen3Config

from llmkd.data.batches import IGNORE, collate
from llmkd.data.order import Source
from llmkd.data.packing import packed_rows
from llmkd.data.rows import load_rows
from llmkd.data.tokenized import PackedSource, PackedTokens, Tokens
from llmkd.data.tokens import tokenize
from llmkd.files import ROOT
from llmkd.layer_map import EMBEDDING, forward, in_order_random
from llmkd.losses.schedules import learning_rate
from llmkd.models import load as models
from llmkd.models import make as making
from llmkd.recipe.models import Lora
from llmkd.recipe.recipe import Recipe
from llmkd.recipe.rollouts import Rollouts
from llmkd.rollouts.wanted import Schedule
from llmkd.student.distiller import make_projectors
from llmkd.training.pairs import pairs_of
from tests import definitions

BLOCKS = 6
WORDS = "red green blue small large old new river house tree stone bird wind light door road field gate".split()


def make(folder: Path) -> None:
    """Write teacher/, tied/ (a teacher whose head is its embeddings), rows.jsonl, recipe.yaml and `zero_stages` into the folder."""
    draw = random.Random(0)
    rows = []
    for _ in range(40):
        prompt = " ".join(draw.choices(WORDS, k=draw.randint(1, 9)))
        completion = " " + " ".join(draw.choices(WORDS, k=draw.randint(1, 14)))
        rows.append({"prompt": prompt, "completion": completion})
    (folder / "rows.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    tokenizer = making.new_tokenizer((r["prompt"] + r["completion"] for r in rows), 320)
    shape: dict[str, Any] = dict(
        vocab_size=320,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=BLOCKS,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=64,
        initializer_range=0.3,  # large enough that every block changes the state and the teacher's opinion is sharp
    )
    special = {"bos_token_id": None, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    config = Qwen3Config(**shape, **special)
    making.new_model(config, folder / "teacher", seed=3, dtype=torch.float32, tokenizer=tokenizer.save_pretrained)
    config = Qwen3Config(**shape, **special, tie_word_embeddings=True)
    making.new_model(config, folder / "tied", seed=3, dtype=torch.float32, tokenizer=tokenizer.save_pretrained)
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe_values(folder)))
    zero_stages(folder)


def zero_stages(folder: Path) -> None:
    """Write zero0.json to zero3.json: the DeepSpeed configuration `cpu` with each stage of ZeRO."""
    cpu = json.loads((ROOT / "ds_configs" / "cpu.json").read_text())
    for stage in range(4):
        zero = {**cpu["zero_optimization"], "stage": stage}
        (folder / f"zero{stage}.json").write_text(json.dumps({**cpu, "zero_optimization": zero}))


def quick(folder: Path) -> dict[str, Any]:
    """Changes for a run in this process that is about neither sharding nor accumulation, a third of the time; of a `zero_stages` folder."""
    return {"train.deepspeed": str(folder / "zero1.json"), "train.micro_batch_size": 8}


def tied_in_word(model: Path, folder: Path) -> Path:
    """A copy of a model with a head of its own whose config.json ties it to the embeddings."""
    shutil.copytree(model, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": True}))
    return folder


def recipe_values(folder: Path) -> dict[str, Any]:
    """The recipe of the tiny run; its last step has a rate too, and Adam's epsilon is large so that rounding noise is not blown up."""
    return {
        "name": "tiny",
        "output": str(folder / "runs"),
        "teacher": {"path": str(folder / "teacher"), "dtype": "float32"},
        "student": {"blocks": 3},
        "data": {"source": str(folder / "rows.jsonl"), "max_length": 64},
        "train": {
            "steps": 3,
            "batch_size": 8,
            "micro_batch_size": 4,
            "learning_rate": 0.003,
            "final_learning_rate": 0.001,
            "epsilon": 1e-3,
            "weight_decay": 0.1,
            "warmup_steps": 2,
            "clip": 0.5,
            "dtype": "float32",
            "deepspeed": "cpu",
            "log_every": 1,
            "head_chunk": 7,
        },
    }


def in_memory(data: Dataset, recipe: Recipe | None = None) -> Tokens | PackedTokens:
    """Tokenized rows as batches draw them; packed where the recipe says so."""
    lengths = np.array(data["length"])
    tokens = Tokens(data, (lengths,), (Source(0, len(data)),))
    if recipe is None or recipe.data.batching != "packed":
        return tokens
    width = recipe.data.max_length
    return PackedTokens(tokens, (PackedSource(*packed_rows(lengths, 0, tokens.sources[0], 0, width)),), width)


def rows_of_step(data: Dataset, recipe: Recipe, step: int = 0) -> list[Any]:
    """The rows of a step (from 0) of the recipe's run, one by one also where they are packed."""
    drawn, size = in_memory(data, recipe), recipe.train.batch_size
    window, place = divmod(step, drawn.window_steps(size))
    numbers = drawn.window(window, batch_size=size, seed=recipe.seed)[place]
    if isinstance(drawn, PackedTokens):
        numbers = np.concatenate([drawn.rows_of(int(number)) for number in numbers])
    return [data[int(number)] for number in numbers]


PlainRun = tuple[dict[str, torch.Tensor], list[dict[str, Any]]]
SPREAD = {
    "teacher": ("placement", "stages", "offload"),
    "train": ("deepspeed", "micro_batch_size", "activation_checkpointing"),
    "data": ("tokens",),
}
"""The keys that say how a run is spread, which a plain run does not read."""


def plain_run(recipe: Recipe, teacher_folder: Path, student_folder: Path) -> PlainRun:
    """The recipe's run in plain PyTorch: one process, whole batches, whole logits, `output_hidden_states`; (weights, losses).

    Computed once for all that differ only in how they are spread.
    """
    values = recipe.model_dump(mode="json")
    for section, keys in SPREAD.items():
        for key in keys:
            del values[section][key]
    models = [
        hashlib.sha256((f / "model.safetensors").read_bytes()).hexdigest() for f in (teacher_folder, student_folder)
    ]
    asked = json.dumps([values, models])
    if asked not in _plain_runs:
        _plain_runs[asked] = _plain_run(recipe, teacher_folder, student_folder)
    return _plain_runs[asked]


_plain_runs: dict[str, PlainRun] = {}


def _plain_run(recipe: Recipe, teacher_folder: Path, student_folder: Path) -> PlainRun:
    teacher, student = load(teacher_folder).eval(), load(student_folder).train()
    tokenizer = models.load_tokenizer(teacher_folder)
    rows = load_rows(recipe.data.source, name=None, split="train", rows=recipe.data.rows)
    data = tokenize(
        rows,
        tokenizer,
        row_format=recipe.data.row_format,
        max_length=recipe.data.max_length,
        too_long=recipe.data.too_long,
    )
    if recipe.rollouts is not None and recipe.rollouts.before_training:
        data = plain_by_teacher(recipe, data, teacher, tokenizer.eos_token_id)
    pairs = pairs_of(recipe, student.config.num_hidden_layers, teacher.config.num_hidden_layers)
    adapted = None if recipe.student.lora is None else with_adapters(student, recipe.student.lora, recipe.seed)
    widths = student.config.hidden_size, teacher.config.hidden_size
    scores = None
    if recipe.matching.strategy == "learned":  # in `pairs` a student block's pairs follow one another
        nearest = dict(forward(student.config.num_hidden_layers, teacher.config.num_hidden_layers))
        scores = torch.tensor([float(recipe.matching.start == "forward" and i == nearest[j]) for j, i in pairs])
        scores.requires_grad_()
    count = len(dict(pairs)) if recipe.matching.projects(*widths) else 0
    projectors = make_projectors(count, *widths, bias=recipe.matching.projector_bias, seed=recipe.seed)
    parameters = [*student.parameters(), *(projectors.parameters() if projectors is not None else [])]
    parameters = [p for p in parameters if p.requires_grad]
    optimizer = torch.optim.AdamW(
        [
            {"params": [p for p in parameters if p.ndim > 1], "weight_decay": recipe.train.weight_decay},
            {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
            {"params": [] if scores is None else [scores], "weight_decay": 0.0},
        ],
        lr=recipe.train.learning_rate,
        betas=recipe.train.betas,
        eps=recipe.train.epsilon,
    )
    assert recipe.train.steps is not None
    losses = []
    written: dict[int, list[Any]] = {}
    for step in range(recipe.train.steps):
        rows = rows_of_step(data, recipe, step)
        if recipe.rollouts is not None and recipe.rollouts.during_training:
            if step % recipe.rollouts.every == 0:
                written = plain_round(recipe, step, data, teacher, student, tokenizer.eos_token_id)
            rows = written[step]
        batch = collate(rows, pad_id=tokenizer.pad_token_id, packed=False)
        if recipe.matching.redraw_every:
            depths = student.config.num_hidden_layers, teacher.config.num_hidden_layers
            pairs = in_order_random(*depths, recipe.seed, step // recipe.matching.redraw_every)
        if recipe.loss.own_divergence is None:
            parts = plain_losses(recipe, teacher, student, projectors, pairs, batch, scores)
        else:
            parts = plain_losses_of_two(recipe, teacher, student, projectors, pairs, rows, tokenizer.pad_token_id)
        loss = (
            recipe.loss.ce * parts["ce"]
            + recipe.loss.kl * parts["kl"]
            + (recipe.loss.hidden * parts["hidden"] if pairs else 0)
        )
        if recipe.loss.router:
            parts["router"] = plain_balance(student, batch)
            loss = loss + recipe.loss.router * parts["router"]
        loss.backward()
        if recipe.train.clip:
            clipped = [*parameters, *([] if scores is None else [scores])]
            torch.nn.utils.clip_grad_norm_(clipped, recipe.train.clip)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(
                step,
                peak=recipe.train.learning_rate,
                final=recipe.train.final_learning_rate,
                warmup=recipe.train.warmup_steps,
                total=recipe.train.steps,
                shape=recipe.train.schedule,
            )
        optimizer.param_groups[-1]["lr"] *= recipe.matching.learning_rate / recipe.train.learning_rate
        optimizer.step()
        optimizer.zero_grad()
        losses.append({"loss": loss.item(), **{k: v.item() for k, v in parts.items()}})
        if scores is not None:
            shares = (scores.detach().view(student.config.num_hidden_layers, -1) / recipe.matching.temperature).softmax(
                1
            )
            losses[-1]["weights"] = shares.flatten().tolist()
    student = student if adapted is None else adapted.merge_and_unload()
    return {name: p.detach() for name, p in student.named_parameters()}, losses


def plain_balance(student: Any, batch: Any) -> torch.Tensor:
    """transformers' own loss of a Qwen3-MoE's routers, of each row alone, averaged over tokens."""
    from transformers.models.qwen3_moe.modeling_qwen3_moe import load_balancing_loss_func  # few tests need it

    total, shape = torch.zeros(()), student.config
    for ids, attended in zip(batch.input_ids, batch.attended, strict=True):
        logits = student(ids[attended][None], output_router_logits=True).router_logits
        value = load_balancing_loss_func(logits, shape.num_experts, shape.num_experts_per_tok)
        total = total + attended.sum() * value
    return total / batch.attended.sum()


def with_adapters(model: Any, lora: Lora, seed: int) -> Any:
    """peft's own model around this one, which is changed."""
    import peft  # heavy; few tests need it

    targets: Any = "all-linear" if lora.targets == "all_linear" else list(lora.targets)
    options: Any = {"r": lora.rank, "lora_alpha": lora.alpha, "use_rslora": lora.rslora, "use_dora": lora.dora}
    torch.manual_seed(seed)
    return peft.get_peft_model(model, peft.LoraConfig(target_modules=targets, **options))


def plain_round(
    recipe: Recipe, first: int, data: Dataset, teacher: Any, student: Any, eos: int
) -> dict[int, list[Any]]:
    """The rows of the steps of a round, the texts written token by token, each by a pass over all before it; by step."""
    how, steps = recipe.rollouts, recipe.train.steps
    assert how is not None and steps is not None
    schedule = Schedule(how.every, how.share, how.samples, recipe.seed, steps)
    by_step = {}
    for step in schedule.round_of(first):
        rows = list(rows_of_step(data, recipe, step))
        numbers = np.array(
            [row["row"] for row in rows]
        )  # in these data no row is left out, so they are also the rows' places
        wanted = schedule.wanted(step, numbers)
        for place, number, seed in zip(wanted.places, wanted.rows, wanted.seeds, strict=True):
            row = data[int(number)]
            prompt = row["input_ids"][: row["trained"].index(True) if True in row["trained"] else None]
            text = plain_text(how, prompt, int(seed), teacher, student, eos, recipe.data.max_length)
            trained = [False] * len(prompt) + [True] * len(text)
            rows[place] = {"input_ids": prompt + text, "trained": trained, "ended": text[-1] == eos}
        rows = [row for row in rows if row.get("ended", True) or how.truncated == "train"]
        by_step[step] = [row for row in rows if not row.get("ended") or sum(row["trained"]) > 1]  # not the empty ones
    return by_step


def plain_by_teacher(recipe: Recipe, data: Dataset, teacher: Any, eos: int) -> Dataset:
    """The rows with what the teacher writes in place of their completions, token by token."""
    how = recipe.rollouts
    assert how is not None and len(data) <= 1024
    wanted = Schedule(1, how.teachers_share, 1, 0, 1).wanted(0, np.arange(len(data)))
    seeds = dict(zip(wanted.rows.tolist(), wanted.seeds.tolist(), strict=True))
    rows: list[dict[str, Any]] = []
    for number, row in enumerate(map(dict, data)):
        if number in seeds:
            prompt = row["input_ids"][: row["trained"].index(True) if True in row["trained"] else None]
            text = plain_text(how, prompt, seeds[number], None, teacher, eos, recipe.data.max_length)
            ended = text[-1] == eos
            if text == [eos] or (not ended and how.truncated == "drop"):
                continue
            row["input_ids"], row["length"] = prompt + text, len(prompt + text)
            row["trained"] = [False] * len(prompt) + [True] * len(text)
        rows.append(row)
    return Dataset.from_list(rows, features=data.features)


@torch.no_grad()
def plain_text(
    how: Rollouts, prompt: list[int], seed: int, teacher: Any, student: Any, eos: int, longest: int
) -> list[int]:
    """What is written after a prompt: each token is where the cumulative distribution passes a uniform number."""
    text: list[int] = []
    for uniform in np.random.default_rng(seed).random(how.max_new_tokens):
        if len(prompt) + len(text) == longest:
            break
        ids = torch.tensor([prompt + text])
        share = student(ids).logits[0, -1].double().softmax(-1)
        if how.by == "mixed":
            share = how.alpha * teacher(ids).logits[0, -1].double().softmax(-1) + (1 - how.alpha) * share
        if how.temperature:
            share = share ** (1 / how.temperature)
            share = share / share.sum()
            if how.top_p < 1:
                order = share.argsort(descending=True)
                before = share[order].cumsum(0) - share[order]
                share[order[before >= how.top_p]] = 0.0
            token = int((share.cumsum(0) > uniform * share.sum()).nonzero()[0])
        else:
            token = int(share.argmax())
        text.append(token)
        if token == eos:
            break
    return text


def logged_part(line: dict[str, Any], part: str) -> float | None:
    """A part of the loss in a line of metrics.jsonl, with a weight in the loss or without; None where it was not computed."""
    return line.get(part, line.get("not_in_loss", {}).get(part))


def assert_same_weights(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor], tolerance: float) -> None:
    """The same tensors, each entry within `tolerance` times its tensor's largest."""
    assert ours.keys() == theirs.keys()
    for key, expected in theirs.items():
        change = (ours[key] - expected).abs().max() / expected.abs().max()
        assert change <= tolerance, (key, change)


def load(folder: Path) -> Any:
    """A model in plain transformers that remembers its last block's output."""
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="sdpa")
    model.model.layers[-1].register_forward_hook(lambda module, args, output: setattr(model, "raw_last_state", output))
    return model


def plain_losses(
    recipe: Recipe, teacher: Any, student: Any, projectors: Any, pairs: Any, batch: Any, scores: Any = None
) -> dict[str, torch.Tensor]:
    """Cross-entropy, divergence and hidden loss as their definitions read, from whole tensors. `scores`: of a learned map's pairs."""
    inputs = dict(input_ids=batch.input_ids, attention_mask=batch.attention_mask, output_hidden_states=True)
    with torch.no_grad():
        t = teacher(**inputs)
    s = student(**inputs)
    trained, attended = batch.targets != IGNORE, batch.attended
    ce = F.cross_entropy(s.logits.flatten(0, 1), batch.targets.flatten(), ignore_index=IGNORE)
    tau = recipe.loss.temperature
    where = attended if recipe.loss.kl_positions == "attended" else trained
    given = {key: value for key, value in recipe.loss.parameters.items() if value is not None}
    mix = recipe.loss.divergence
    per_token = sum(
        weight * definitions.divergence(name, s.logits[where], t.logits[where], tau, **given)
        for name, weight in ({mix: 1.0} if isinstance(mix, str) else mix).items()
    )
    assert isinstance(per_token, torch.Tensor)
    kl = per_token.mean().float()
    hidden = []
    if scores is not None:
        hidden, pairs = plain_mixed(recipe, teacher, student, t, s, projectors, pairs, scores), ()
    for number, (i, j) in enumerate(pairs):
        ours, theirs = _state(student, s, i, recipe), _state(teacher, t, j, recipe)
        if recipe.matching.compare == "differences" and number:
            ours = ours - _state(student, s, pairs[number - 1][0], recipe)
            theirs = theirs - _state(teacher, t, pairs[number - 1][1], recipe)
        if recipe.matching.distance == "logit_lens":
            read = [m.lm_head(m.model.norm(state)) for m, state in ((student, ours), (teacher, theirs))]
            hidden.append(definitions.divergence("jsd", *read, 1.0).view(ours.shape[:2]).float())
            continue
        ours = ours if projectors is None else projectors[number](ours)
        hidden.append((F.normalize(ours, dim=-1) - F.normalize(theirs, dim=-1)).pow(2).sum(-1))
    where = attended if recipe.matching.positions == "attended" else trained
    none = torch.zeros(())
    return {"ce": ce, "kl": kl, "hidden": torch.stack([h[where].mean() for h in hidden]).mean() if hidden else none}


def plain_mixed(
    recipe: Recipe, teacher: Any, student: Any, t: Any, s: Any, projectors: Any, pairs: Any, scores: torch.Tensor
) -> list[torch.Tensor]:
    """Each student block's distance [B, T] from its mixture of teacher blocks."""
    table = (scores.view(student.config.num_hidden_layers, -1) / recipe.matching.temperature).softmax(1)
    distances = []
    for i in range(len(table)):
        weights = table[i]
        blocks = [teacher_block for student_block, teacher_block in pairs if student_block == i]
        states = torch.stack([_state(teacher, t, block, recipe) for block in blocks])
        ours = _state(student, s, i, recipe)
        ours = ours if projectors is None else projectors[i](ours)
        theirs = (weights[:, None, None, None] * states).sum(0)
        apart = (F.normalize(ours, dim=-1) - F.normalize(theirs, dim=-1)).pow(2).sum(-1)
        distances.append(apart - recipe.matching.entropy * (weights * weights.log()).sum())
    return distances


def plain_losses_of_two(
    recipe: Recipe, teacher: Any, student: Any, projectors: Any, pairs: Any, rows: list[Any], pad_id: int
) -> dict[str, torch.Tensor]:
    """As `plain_losses`, of a step in which the student's own texts have a divergence of their own."""
    kinds = (
        ([row for row in rows if "ended" in row], recipe.loss.own_divergence),
        (
            [row for row in rows if "ended" not in row],
            recipe.loss.divergence,
        ),
    )
    means, trained, attended = [], [], []
    for of_kind, divergence in kinds:
        batch = collate(of_kind, pad_id=pad_id, packed=False)
        loss = recipe.loss.model_copy(update={"divergence": divergence, "own_divergence": None})
        means.append(plain_losses(recipe.model_copy(update={"loss": loss}), teacher, student, projectors, pairs, batch))
        trained.append(int((batch.targets != IGNORE).sum()))
        attended.append(int(batch.attended.sum()))
    counts = {"ce": trained, "kl": trained, "hidden": attended if recipe.matching.positions == "attended" else trained}
    return {
        part: torch.stack([mean[part] * n for mean, n in zip(means, of, strict=True)]).sum() / sum(of)
        for part, of in counts.items()
    }


def _state(model: Any, output: Any, block: int, recipe: Recipe) -> torch.Tensor:
    """`hidden_states` by block number; transformers gives the last one after the final norm, so the raw one is kept by `load`."""
    if block == EMBEDDING:
        return output.hidden_states[0]
    if block < model.config.num_hidden_layers - 1 or recipe.matching.final_state == "normed":
        return output.hidden_states[block + 1]
    return model.raw_last_state
