"""An on-policy step's texts, loss and gradients are those of GKD written out: a row at a time, in float64, from whole distributions."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from llmkd.layer_map import forward
from llmkd.recipe.recipe import Recipe, load_recipe
from llmkd.rollouts.texts import Text, read_round, round_file
from llmkd.rollouts.wanted import Schedule
from llmkd.training import initial
from tests.distributed.runner import run_on_ranks
from tests.tiny import assert_same_weights

ROOT = Path(__file__).parents[2]
STEPS = 2
GKD: dict[str, Any] = {
    # at one rank four micro-batches, at two ranks two
    "loss.ce": 0.0,
    "loss.divergence": "jsd",
    "rollouts": {"max_new_tokens": 20},
    "train.steps": STEPS,
    "train.warmup_steps": 0,
    "train.micro_batch_size": 2,
}
STAGES = (0, 3)
MAPS = ("forward", "none")
CASES = [(ranks, stage, strategy) for ranks in (1, 2) for stage in STAGES for strategy in MAPS]


def changes(tiny: Path, stage: int, strategy: str) -> dict[str, Any]:
    return {**GKD, "train.deepspeed": str(tiny / f"stage{stage}.json"), "matching.strategy": strategy}


@pytest.fixture(scope="module")
def runs(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every case's run, with each step's weights and gradients."""
    folder = tmp_path_factory.mktemp("gradients")
    for stage in STAGES:
        config = json.loads((ROOT / "ds_configs" / ("zero3.json" if stage == 3 else "zero2.json")).read_text())
        config["zero_optimization"]["stage"] = stage
        (tiny / f"stage{stage}.json").write_text(json.dumps(config))
    for ranks in (1, 2):
        scenarios = {f"{stage}-{strategy}": changes(tiny, stage, strategy) for stage in STAGES for strategy in MAPS}
        given = (tiny / "recipe.yaml", scenarios, folder / str(ranks))
        assert run_on_ranks(ranks, *given, module="tests.distributed.gradients") == {}
    return folder


@pytest.mark.parametrize(("ranks", "stage", "strategy"), CASES)
def test_texts_loss_and_gradients_are_those_of_gkd(
    tiny: Path, runs: Path, tmp_path: Path, ranks: int, stage: int, strategy: str
) -> None:
    recipe, run = (
        load_recipe(tiny / "recipe.yaml").changed(changes(tiny, stage, strategy)),
        runs / str(ranks) / f"{stage}-{strategy}",
    )
    initial.initial_student(recipe, tiny / "teacher", tmp_path / "initial")
    teacher, student = Plain(tiny / "teacher"), Plain(tmp_path / "initial")
    logged = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for step in range(STEPS):
        student.model.load_state_dict(load_file(run / f"weights-{step}.safetensors"))
        texts = written(run, step)
        assert len(texts) == recipe.train.batch_size
        for text, seed in zip(texts, seeds(recipe, step), strict=True):
            prompt, ids = text.prompt.tolist(), text.text.tolist()
            assert ids == drawn(student, prompt, seed, recipe, ended=text.ended)
        loss, gradients = gkd(recipe, teacher, student, texts, forward(3, 6) if strategy == "forward" else ())
        assert logged[step]["loss"] == pytest.approx(loss, rel=1e-6)
        ours = load_file(run / f"gradients-{step}.safetensors")
        # what rounding in fp32 leaves (1.1e-6 of them as one vector, 5e-6 of a single tensor)
        names = sorted(gradients)
        gap = (
            flat(ours[name].double() - gradients[name] for name in names).norm()
            / flat(map(gradients.get, names)).norm()
        )
        assert gap < 2e-6, gap
        assert_same_weights(ours, gradients, 1e-5)


def flat(tensors: Iterable[Any]) -> Tensor:
    return torch.cat([tensor.flatten() for tensor in tensors])


class Plain:
    """A model in float64, and its blocks' states."""

    def __init__(self, folder: Path) -> None:
        self.model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
        self._states: list[Tensor] = []
        for block in self.model.model.layers:
            block.register_forward_hook(lambda module, given, output: self._states.append(output))

    def read(self, ids: list[int]) -> tuple[Tensor, list[Tensor]]:
        """(probabilities [T, V] of what comes after each token, each block's states [T, H])."""
        self._states.clear()
        logits = self.model(torch.tensor([ids])).logits[0]
        return logits.softmax(-1), [state[0] for state in self._states]


def written(run: Path, step: int) -> list[Text]:
    """The texts of a round of one step."""
    file = round_file(run, step)
    found = read_round(file, pq.read_schema(file).metadata[b"llmkd.fingerprint"].decode())
    assert found is not None
    return found


def seeds(recipe: Recipe, step: int) -> list[int]:
    """What each text of a step is drawn by."""
    schedule = Schedule(1, 1.0, 1, recipe.seed, STEPS)
    return schedule.wanted(step, np.arange(recipe.train.batch_size)).seeds.tolist()


@torch.no_grad()
def drawn(student: Plain, prompt: list[int], seed: int, recipe: Recipe, *, ended: bool) -> list[int]:
    """A text, token by token: each is where the cumulative distribution passes a uniform number."""
    assert recipe.rollouts is not None
    most = min(recipe.rollouts.max_new_tokens, recipe.data.max_length - len(prompt))
    text: list[int] = []
    for uniform in np.random.default_rng(seed).random(recipe.rollouts.max_new_tokens)[:most]:
        cumulative = student.read(prompt + text)[0][-1].cumsum(0)
        text.append(int((cumulative > uniform * cumulative[-1]).nonzero()[0]))
        if text[-1] == student.model.config.eos_token_id:
            assert ended
            return text
    assert not ended
    return text


def gkd(
    recipe: Recipe, teacher: Plain, student: Plain, texts: list[Text], pairs: Any
) -> tuple[float, dict[str, Tensor]]:
    """(loss, each weight's gradient): the mean JSD over the written tokens (2306.13649, β = 1/2), and over the pairs the mean distance of
    the normed states of all tokens."""
    student.model.zero_grad()
    divergence = distance = torch.zeros((), dtype=torch.float64)
    trained = attended = 0
    for text in texts:
        if text.is_empty:
            continue
        begin, ids = len(text.prompt), [*text.prompt.tolist(), *text.text.tolist()]
        with torch.no_grad():
            p, theirs = teacher.read(ids)
        q, ours = student.read(ids)
        p, q = p[begin - 1 : -1], q[begin - 1 : -1]
        m = (p + q) / 2
        divergence = divergence + (p * (p / m).log() + q * (q / m).log()).sum() / 2
        for i, j in pairs:
            gap = torch.nn.functional.normalize(ours[i], dim=-1) - torch.nn.functional.normalize(theirs[j], dim=-1)
            distance = distance + gap.pow(2).sum()
        trained, attended = trained + len(text.text), attended + len(ids)
    loss = recipe.loss.kl * divergence / trained
    if pairs:
        loss = loss + recipe.loss.hidden * distance / (attended * len(pairs))
    loss.backward()
    return loss.item(), {name: weight.grad for name, weight in student.model.named_parameters()}
