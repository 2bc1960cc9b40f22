"""The layer-selection paper's Qwen3 run: the first losses are those of its loss, adapters and optimizer, written plainly."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoModelForCausalLM, Qwen3Config

from llmkd.data.rows import load_rows
from llmkd.data.tokens import tokenize
from llmkd.models import make
from llmkd.models.load import load_tokenizer
from llmkd.recipe.recipe import Recipe, load_recipe
from llmkd.train import train
from llmkd.training import jobs
from llmkd.training.validation_rows import run_rows
from tests.tiny import WORDS, rows_of_step

STEPS, PEAK, WARMUP = 10, 3e-3, 4
COPIED = [0, 6, 11]
MATCHED = {"forward": [3, 7, 11], "reverse": [11, 7, 3], "all_to_one": [5, 5, 5]}
"""Student block -> teacher block, of 12: the code's table, the same in reverse, and its all-to-one (`hidden_states[12 // 2]`)."""


@pytest.fixture(scope="module")
def paper(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A teacher of 12 blocks, and rows of one length, of which as many tokens are trained: no token is padding, as in the paper's means."""
    folder = tmp_path_factory.mktemp("paper")
    rows = [
        {"prompt": " ".join(WORDS[(3 * n + k) % 18] for k in range(5)), "completion": f" {WORDS[n]} {WORDS[n - 1]}"}
        for n in range(18)
    ]
    tokenizer: Any = make.new_tokenizer(((row["prompt"] + row["completion"]) * 9 for row in rows), 400)
    shape = Qwen3Config(
        vocab_size=400,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=12,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=64,
        initializer_range=0.2,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    make.new_model(shape, folder / "teacher", seed=2, dtype=torch.float32, tokenizer=tokenizer.save_pretrained)
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def _recipe(paper: Path, strategy: str) -> Recipe:
    """The shipped recipe at a tiny size: its teacher is given, nothing is dropped out, nothing validated, ten steps of six rows."""
    train: dict[str, Any] = {
        "epochs": None,
        "steps": STEPS,
        "batch_size": 6,
        "learning_rate": PEAK,
        "warmup_steps": WARMUP,
    }
    train |= {
        "validate_every": 0,
        "keep": "last",
        "save_every": 0,
        "log_every": 1,
        "dtype": "float32",
        "deepspeed": "cpu",
    }
    changes = {f"train.{key}": value for key, value in train.items()}
    return load_recipe("papers/maps_qwen3_lora").changed(
        {
            **changes,
            "output": str(paper / "runs"),
            "finetune": None,
            "teacher.path": str(paper / "teacher"),
            "teacher.dtype": "float32",
            "teacher.architecture": None,
            "student.blocks": 3,
            "student.copy_blocks": COPIED,
            "student.lora.dropout": 0.0,
            "data.source": str(paper / "rows.jsonl"),
            "data.split": "train",
            "data.validation": None,
            "data.max_length": 64,
            "matching.strategy": strategy,
        }
    )


def _paper_loss(teacher: Any, student: Any, matched: list[int], ids: Tensor, trained: Tensor) -> Tensor:
    """CE + KL + 3 * hidden of a batch as the paper's code takes them: means over all positions, scaled by the share of real tokens."""
    mask = torch.ones_like(ids)
    with torch.no_grad():
        theirs = teacher(input_ids=ids, attention_mask=mask, output_hidden_states=True)
    labels = torch.where(trained, ids, -100)
    ours = student(input_ids=ids, attention_mask=mask, labels=labels, output_hidden_states=True)
    real = mask.sum() / mask.numel()
    log_student, share = F.log_softmax(ours.logits, dim=-1), F.softmax(theirs.logits, dim=-1)
    kl = F.kl_div(log_student, share, reduction="none").sum(-1).mean() * real
    s = torch.stack(ours.hidden_states[1:])
    t = torch.stack([theirs.hidden_states[block + 1] for block in matched])
    apart = (t / t.norm(dim=-1, keepdim=True) - s / s.norm(dim=-1, keepdim=True)) ** 2
    return ours.loss + kl + 3 * (apart.sum(-1).mean() * real)


def _paper_losses(recipe: Recipe, matched: list[int]) -> list[float]:
    """Ten steps of AdamW on peft's adapters, two batches of three rows accumulated in each; the loss of each step before its update."""
    teacher: Any = AutoModelForCausalLM.from_pretrained(recipe.teacher_path, dtype=torch.float32).eval()
    base: Any = copy.deepcopy(teacher)
    copied: list[Any] = [base.model.layers[block] for block in COPIED]
    for place, block in enumerate(copied):
        block.self_attn.layer_idx = place
    base.model.layers = torch.nn.ModuleList(copied)
    base.config.num_hidden_layers, base.config.layer_types = len(COPIED), base.config.layer_types[: len(COPIED)]
    base.config.use_cache = False
    torch.manual_seed(recipe.seed)
    adapters = peft.LoraConfig(
        r=128, lora_alpha=32, lora_dropout=0.0, target_modules="all-linear", task_type="CAUSAL_LM"
    )
    student = peft.get_peft_model(base, adapters).train()
    parameters = [p for p in student.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=PEAK, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0)
    tokenizer = load_tokenizer(Path(recipe.teacher_path))
    texts = load_rows(recipe.data.source, name=None, split="train", rows=None)
    data = tokenize(texts, tokenizer, row_format=recipe.data.row_format, max_length=64, too_long="drop")
    rows_alike = {(row["length"], sum(row["trained"])) for row in data.to_list()}
    assert len(rows_alike) == 1  # no padding, and halves of equal weight
    losses = []
    for step in range(STEPS):
        rows, total = rows_of_step(data, recipe, step), 0.0
        for half in (rows[:3], rows[3:]):
            ids, trained = (torch.tensor([row[key] for row in half]) for key in ("input_ids", "trained"))
            loss = _paper_loss(teacher, student, matched, ids, trained) / 2
            loss.backward()
            total += loss.item()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        left = (STEPS - 1 - step) / (STEPS - WARMUP)
        for group in optimizer.param_groups:
            group["lr"] = PEAK * min((step + 1) / WARMUP, left)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(total)
    return losses


@pytest.mark.parametrize("strategy", MATCHED)
def test_the_first_ten_losses_are_the_papers(paper: Path, world: Any, tmp_path: Path, strategy: str) -> None:
    recipe = _recipe(paper, strategy)
    expected = _paper_losses(recipe, MATCHED[strategy])
    assert train(world, jobs.distil_job(world, recipe, tmp_path / "run"))
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["loss"] for line in lines] == pytest.approx(expected, rel=1e-5)
    assert expected[-1] < 0.95 * expected[0]  # it learns, so that later losses depend on every update before them


def _shipped(paper: Path) -> Recipe:
    """The shipped recipe on the tiny teacher, validated every third step: data, validation and `keep: best` are as shipped."""
    train: dict[str, Any] = {"epochs": None, "steps": 9, "batch_size": 6, "warmup_steps": 2, "validate_every": 3}
    train |= {"save_every": 0, "log_every": 1, "dtype": "float32", "deepspeed": "cpu"}
    return load_recipe("papers/maps_qwen3_lora").changed(
        {
            **{f"train.{key}": value for key, value in train.items()},
            "output": str(paper / "shipped"),
            "finetune": None,
            "teacher.path": str(paper / "teacher"),
            "teacher.dtype": "float32",
            "teacher.architecture": None,
            "student.blocks": 3,
            "student.copy_blocks": COPIED,
            "data.max_length": 64,
            "matching.strategy": "forward",
        }
    )


def test_the_first_tenth_is_held_out_and_the_best_student_kept(
    paper: Path, world: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shipped = load_recipe("papers/maps_qwen3_lora")
    recipe = _shipped(paper)
    assert recipe.data.model_copy(update={"max_length": shipped.data.max_length}) == shipped.data
    assert (recipe.train.keep, recipe.train.keep_by) == ("best", "validation/ce")
    numbered = [{"prompt": f"{WORDS[n % 18]} {n}", "completion": f" {WORDS[n // 6]} {n}"} for n in range(100)]
    file = tmp_path / shipped.data.source
    file.parent.mkdir(parents=True)
    file.write_text("".join(json.dumps(row) + "\n" for row in numbered))
    monkeypatch.chdir(tmp_path)
    assert shipped.data.held_out is not None
    assert list(jobs.read_rows(shipped.data.held_out)) == numbered[:10]
    assert list(jobs.read_rows(shipped.data)) == numbered[10:]
    job = jobs.distil_job(world, recipe, tmp_path / "run")
    rows = run_rows(world, job, load_tokenizer(paper / "teacher"))
    assert rows.validation is not None and (rows.training.count, len(rows.validation)) == (90, 10)
    trained, validated = (
        {tuple(rows.all.row(int(n))["input_ids"].tolist()) for n in numbers} for numbers in (range(90), rows.validation)
    )
    assert len(trained) == 90 and len(validated) == 10 and not trained & validated
    assert train(world, job)
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    validated_ce = {line["step"]: line["validation"]["ce"] for line in lines if "validation" in line}
    assert list(validated_ce) == [3, 6, 9]
    kept = json.loads((tmp_path / "run" / "model" / "llmkd.json").read_text())["kept"]
    assert kept == {"step": min(validated_ce, key=lambda step: validated_ce[step]), "value": min(validated_ce.values())}
