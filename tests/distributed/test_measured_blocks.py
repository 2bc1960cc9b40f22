"""Blocks that are measured before a student is made of them: on any ranks and in any placement the same, and what plain models say."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from llmkd.data.batches import IGNORE, Batch, collate
from llmkd.errors import InputError
from llmkd.recipe.recipe import load_recipe
from llmkd.train import train
from llmkd.training import initial, jobs, prepare
from llmkd.training.tokens import tokens_of
from tests.distributed.runner import run_on_ranks
from tests.tiny import load, quick, rows_of_step

COMMON: dict[str, Any] = {"train.steps": 1, "train.warmup_steps": 0, "train.micro_batch_size": 4}
CE_ALONE = {"loss.kl": 0.0, "loss.hidden": 0.0, "loss.ce": 1.0, "matching.strategy": "none"}
TWO_RANKS: dict[str, dict[str, Any]] = {
    "influence": {},
    "influence_zero3": {"teacher.placement": "zero3"},
    "influence_pipeline": {"teacher.placement": "pipeline", "matching.strategy": "reverse"},
    "influence_packed": {"data.batching": "packed"},
    "perplexity": CE_ALONE,
    "perplexity_zero3": {"teacher.placement": "zero3", "matching.strategy": "nearest"},
}
"""A rule, and how the run of it differs from others."""


def _rule(name: str) -> str:
    return name.split("_")[0]


@pytest.fixture(scope="module")
def found(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What each run on two ranks has measured."""
    folder = tmp_path_factory.mktemp("measured")
    runs = {name: {**COMMON, **more, "student.copy_blocks": _rule(name)} for name, more in TWO_RANKS.items()}
    assert run_on_ranks(2, tiny / "recipe.yaml", runs, folder) == {}
    assert "keeps blocks" in (folder / "rank0.log").read_text()
    return {name: json.loads((folder / name / "blocks.json").read_text()) for name in runs}


def _job(world: Any, tiny: Path, folder: Path, rule: str, **changes: Any) -> jobs.Job:
    given = {**COMMON, **quick(tiny), "student.copy_blocks": rule, **changes}
    return jobs.distil_job(world, load_recipe(tiny / "recipe.yaml").changed(given), folder)


def _batches(world: Any, job: jobs.Job) -> list[Batch]:
    """The rows of the first steps, four a micro-batch."""
    assert job.tokenizer is not None
    data = tokens_of(world, job, initial.job_tokenizer(world, job, resuming=False))
    rows = [row for step in range(initial.MEASURED_STEPS) for row in rows_of_step(data.rows, job.recipe, step)]
    assert len({row["row"] for row in rows}) == len(rows) == 32
    return [collate(rows[n : n + 4], pad_id=0, packed=False) for n in range(0, 32, 4)]


def _measured(world: Any, job: jobs.Job) -> dict[str, Any]:
    initial.measure_blocks(world, job, _batches(world, job))
    return json.loads((job.folder / "blocks.json").read_text())


def _values(found: dict[str, Any]) -> list[float]:
    return found["influence"] if found["rule"] == "influence" else [one["ce"] for one in found["removed"]]


@torch.no_grad()
def _plain_influence(teacher: Path, batches: list[Batch]) -> list[float]:
    """1 - cos, token by token, of `output_hidden_states`."""
    model, sums, count = load(teacher), torch.zeros(6, dtype=torch.float64), 0
    for batch in batches:
        inputs = dict(input_ids=batch.input_ids, attention_mask=batch.attention_mask, output_hidden_states=True)
        states = [*model(**inputs).hidden_states[:-1], model.raw_last_state]
        for block in range(6):
            before, after = (states[n][batch.attended].double() for n in (block, block + 1))
            sums[block] += (1 - (before * after).sum(-1) / before.norm(dim=-1) / after.norm(dim=-1)).sum()
        count += int(batch.attended.sum())
    return (sums / count).tolist()


@torch.no_grad()
def _plain_ce(teacher: Path, batches: list[Batch], kept: list[int]) -> float:
    """Of a model that has these blocks alone, from its whole logits."""
    model, total, count = load(teacher), 0.0, 0
    model.model.layers = torch.nn.ModuleList(model.model.layers[block] for block in kept)
    for batch in batches:
        logits = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits
        total += F.cross_entropy(
            logits.flatten(0, 1), batch.targets.flatten(), ignore_index=IGNORE, reduction="sum"
        ).item()
        count += int((batch.targets != IGNORE).sum())
    return total / count


def test_every_placement_and_any_number_of_ranks_find_the_same(
    found: dict[str, Any], tiny: Path, world: Any, tmp_path: Path
) -> None:
    for rule in ("influence", "perplexity"):
        alone = _measured(world, _job(world, tiny, tmp_path / rule, rule))
        for name, one in found.items():
            if _rule(name) != rule or name == "influence_packed":  # whose first steps have other rows
                continue
            assert one["blocks"] == alone["blocks"] and one["rule"] == rule, name
            assert _values(one) == pytest.approx(_values(alone), rel=1e-5), name
        assert [r["block"] for r in found[rule].get("removed", ())] == [r["block"] for r in alone.get("removed", ())]
    assert found["influence"]["blocks"] not in ([0, 3, 5], found["perplexity"]["blocks"])
    packed = found["influence_packed"]
    assert packed["influence"] != found["influence"]["influence"] and len(packed["blocks"]) == 3


def test_influence_is_that_of_the_plain_model(found: dict[str, Any], tiny: Path, world: Any, tmp_path: Path) -> None:
    batches = _batches(world, _job(world, tiny, tmp_path / "run", "influence"))
    expected = _plain_influence(tiny / "teacher", batches)
    assert found["influence"]["influence"] == pytest.approx(expected, rel=1e-4)
    assert found["influence"]["blocks"] == sorted(sorted(range(6), key=lambda block: -expected[block])[:3])


def test_removal_is_that_of_plain_models_without_the_blocks(
    found: dict[str, Any], tiny: Path, world: Any, tmp_path: Path
) -> None:
    batches, kept = _batches(world, _job(world, tiny, tmp_path / "run", "perplexity")), list(range(6))
    for one in found["perplexity"]["removed"]:
        ce = {block: _plain_ce(tiny / "teacher", batches, [k for k in kept if k != block]) for block in kept}
        assert one["block"] == min(ce, key=lambda block: ce[block])
        assert one["ce"] == pytest.approx(ce[one["block"]], rel=1e-5)
        kept.remove(one["block"])
    assert found["perplexity"]["blocks"] == kept and len(kept) == 3


@pytest.mark.parametrize("rule", ["influence", "perplexity"])
def test_a_block_that_does_nothing_goes_first_and_of_two_the_deeper(
    tiny: Path, world: Any, tmp_path: Path, rule: str
) -> None:
    """On rows that a teacher likes best as it is: of a random one, a block may do harm."""
    teacher, job = tmp_path / "teacher", _job(world, tiny, tmp_path / "run", rule, **{"student.blocks": 4})
    shutil.copytree(tiny / "teacher", teacher)
    weights = load_file(teacher / "model.safetensors")
    for block in (1, 4):
        for output in ("self_attn.o_proj", "mlp.down_proj"):
            weights[f"model.layers.{block}.{output}.weight"].zero_()
    save_file(weights, teacher / "model.safetensors", metadata={"format": "pt"})
    batches = []
    for batch in _batches(world, job):
        with torch.no_grad():
            likeliest = load(teacher)(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits.argmax(-1)
        batches.append(replace(batch, targets=torch.where(batch.targets == IGNORE, IGNORE, likeliest)))
    initial.measure_blocks(world, replace(job, teacher=teacher), batches)
    measured = json.loads((job.folder / "blocks.json").read_text())
    assert measured["blocks"] == [0, 2, 3, 5]
    if rule == "influence":
        assert measured["influence"][1] == measured["influence"][4] == 0 < measured["influence"][0]
    else:
        whole = _plain_ce(teacher, batches, list(range(6)))
        assert [one["block"] for one in measured["removed"]] == [4, 1]
        assert [one["ce"] for one in measured["removed"]] == pytest.approx([whole, whole], rel=1e-6)


def test_a_run_is_made_of_the_blocks_and_a_resumed_one_reads_them(
    tiny: Path, world: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the folder it began from is lost."""
    still = {"train.learning_rate": 1e-12, "train.final_learning_rate": 0.0, "train.weight_decay": 0.0}
    given = {"train.steps": 2, "train.save_every": 1, "train.keep_checkpoints": 9, **still}
    whole, again = tmp_path / "whole", tmp_path / "again"
    assert train(world, _job(world, tiny, whole, "influence", **given))
    chosen = json.loads((whole / "blocks.json").read_text())["blocks"]
    ours, theirs = load_file(whole / "model/model.safetensors"), load_file(tiny / "teacher/model.safetensors")
    for place, block in enumerate(chosen):
        weight = "model.layers.{}.mlp.up_proj.weight"
        assert torch.allclose(ours[weight.format(place)], theirs[weight.format(block)], atol=1e-6)
    shutil.copytree(whole / "checkpoints" / "step-00000001", again / "checkpoints" / "step-00000001")
    monkeypatch.setattr(initial, "measure_blocks", lambda *_: pytest.fail("it has been measured"))
    with pytest.raises(InputError, match=r"blocks.json: the blocks that this run's student was made of are missing"):
        train(world, _job(world, tiny, again, "influence", **given))
    assert not (again / "initial").exists()
    shutil.copy(whole / "blocks.json", again / "blocks.json")
    assert train(world, _job(world, tiny, again, "influence", **given))
    resumed = load_file(again / "model" / "model.safetensors")
    assert all(torch.equal(resumed[key], weight) for key, weight in ours.items())


def test_rows_that_are_held_out_are_not_measured_on(
    tiny: Path, world: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Half of the 40 rows are validated on; the first steps have each of the others."""
    held_out = {"data.validation": {"share": 0.5}, "train.validate_every": 1}
    measure, seen = initial.measure_blocks, []
    monkeypatch.setattr(
        initial, "measure_blocks", lambda world, job, batches: (seen.extend(batches), measure(world, job, batches))
    )
    run = prepare.prepare(world, _job(world, tiny, tmp_path / "run", "influence", **held_out))

    def texts(batches: Iterable[Batch]) -> set[tuple[int, ...]]:
        return {
            tuple(ids[here].tolist()) for one in batches for ids, here in zip(one.input_ids, one.attended, strict=True)
        }

    assert len(texts(run.validation)) == len(texts(seen)) == 20
    assert not texts(run.validation) & texts(seen)


def test_what_can_not_be_measured_is_refused_and_nothing_is_left(
    tiny: Path, world: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = _job(world, tiny, tmp_path / "run", "perplexity")
    untrained = [
        replace(batch, targets=torch.full_like(batch.targets, IGNORE), trained_at=batch.trained_at[:0])
        for batch in _batches(world, job)
    ]
    with pytest.raises(
        InputError, match="no token of the first steps' rows is trained, so there is no perplexity; wri"
    ):
        initial.measure_blocks(world, job, untrained)
    shutil.copytree(tiny / "teacher", tmp_path / "spoilt")
    weights = load_file(tmp_path / "spoilt" / "model.safetensors")
    weights["model.layers.2.mlp.up_proj.weight"][:] = torch.nan
    save_file(weights, tmp_path / "spoilt" / "model.safetensors", metadata={"format": "pt"})
    for rule in ("influence", "perplexity"):
        spoilt = _job(world, tiny, tmp_path / "run", rule, **{"teacher.path": str(tmp_path / "spoilt")})
        with pytest.raises(InputError, match=f"student.copy_blocks: {rule} was measured as no number; look for a NaN"):
            train(world, spoilt)
    monkeypatch.setattr(initial, "initial_student", lambda *_: (_ for _ in ()).throw(InputError("the disk is full")))
    with pytest.raises(InputError, match="the disk is full"):
        train(world, _job(world, tiny, tmp_path / "run", "influence"))
    assert not (tmp_path / "run" / "blocks.json").exists()
