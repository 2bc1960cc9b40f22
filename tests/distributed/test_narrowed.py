"""A student narrowed from its teacher: on any ranks and in any placement the same parts, resumed from them, exported, planned."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from llmkd import study
from llmkd.errors import InputError
from llmkd.models import make, width
from llmkd.planning.shapes import initial_student_config, shapes, teacher_config
from llmkd.recipe.recipe import load_recipe
from llmkd.recipe.study_entries import study_entries
from llmkd.train import train
from llmkd.training import initial, jobs
from tests.distributed.runner import run_on_ranks
from tests.distributed.test_measured_blocks import _batches
from tests.tiny import load, quick

SIZES = {"hidden_size": 24, "intermediate_size": 20, "num_attention_heads": 2, "num_key_value_heads": 2}
NARROW: dict[str, Any] = {f"student.{key}": size for key, size in SIZES.items()}
COMMON: dict[str, Any] = {"train.steps": 1, "train.warmup_steps": 0, "train.micro_batch_size": 4, **NARROW}
RUNS: dict[str, dict[str, Any]] = {
    "replicated": {},
    "zero3": {
        "teacher.placement": "zero3",
        "train.micro_batch_size": 2,
        "student.lora": {"rank": 2, "alpha": 4},
    },
    "pipeline": {"teacher.placement": "pipeline"},
    "influence": {"student.copy_blocks": "influence"},
    "packed": {"data.batching": "packed"},
}


@pytest.fixture(scope="module")
def runs(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Each of these runs on two ranks."""
    folder = tmp_path_factory.mktemp("narrowed")
    scenarios = {name: {**COMMON, **more} for name, more in RUNS.items()}
    assert run_on_ranks(2, tiny / "recipe.yaml", scenarios, folder) == {}
    return folder


def _job(world: Any, tiny: Path, folder: Path, **changes: Any) -> jobs.Job:
    return jobs.distil_job(
        world, load_recipe(tiny / "recipe.yaml").changed({**COMMON, **quick(tiny), **changes}), folder
    )


def _kept(run: Path) -> width.Kept:
    return width.Kept.of(json.loads((run / "width.json").read_text()))


def test_every_placement_and_any_number_of_ranks_keep_the_same(
    runs: Path, tiny: Path, world: Any, tmp_path: Path
) -> None:
    """Those that a plain pass over the teacher finds; other blocks, and other rows, keep others."""
    job = _job(world, tiny, tmp_path / "run")
    batches = _batches(world, job)
    initial.measure_width(world, job, batches)
    alone = _kept(job.folder)
    assert {name: _kept(runs / name) == alone for name in RUNS} == {
        name: name not in ("influence", "packed") for name in RUNS
    }
    teacher, blocks = load(tiny / "teacher"), [0, 3, 5]
    seen: dict[str, Any] = {}
    for name, module in teacher.named_modules():
        module.register_forward_hook(lambda m, args, out, name=name: seen.__setitem__(name, (args, out)))
    channels = torch.zeros(2, 3, 32)
    columns, heads = torch.zeros(3, 48), torch.zeros(3, 4)
    for batch in batches:
        for ids, attended in zip(batch.input_ids, batch.attended, strict=True):
            with torch.no_grad():
                teacher(ids[attended][None])
            for place, block in enumerate(blocks):
                of = f"model.layers.{block}."
                for number, norm in enumerate(width.NORMS):
                    channels[number, place] += seen[of + norm][1][0].abs().mean(0) ** 2
                columns[place] += seen[of + "mlp.down_proj"][0][0][0].abs().mean(0) ** 2
                heads[place] += seen[of + "self_attn.o_proj"][0][0][0].view(-1, 4, 8).norm(dim=-1).mean(0) ** 2
    score = channels.sqrt().sum((0, 1))
    assert alone.channels == tuple(sorted(score.topk(24).indices.tolist()))
    assert alone.columns == tuple(tuple(sorted(of.topk(20).indices.tolist())) for of in columns)
    assert alone.heads == tuple((int(of[:2].argmax()), 2 + int(of[2:].argmax())) for of in heads)
    assert alone.groups == ((0, 1),) * 3


@torch.no_grad()
def test_an_exported_student_is_loaded_as_any_other(runs: Path, tiny: Path, tmp_path: Path) -> None:
    for name in RUNS:
        model = AutoModelForCausalLM.from_pretrained(runs / name / "model", dtype=torch.float32)
        assert {key: getattr(model.config, key) for key in SIZES} == SIZES and model.config.head_dim == 8
        assert model(torch.arange(2, 9)[None]).logits.shape == (1, 7, 320)
    planned = load_recipe(tiny / "recipe.yaml").changed({**NARROW, "student.copy_blocks": "influence"})
    shape = shapes(initial_student_config(planned, teacher_config(planned)))
    assert shape.parameters == sum(p.numel() for p in model.parameters())


def test_a_run_is_made_of_these_parts_and_a_resumed_one_reads_them(
    tiny: Path, world: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the folder it began from is lost."""
    still = {"train.learning_rate": 1e-12, "train.final_learning_rate": 0.0, "train.weight_decay": 0.0}
    given = {"train.steps": 2, "train.save_every": 1, "train.keep_checkpoints": 9, **still}
    whole, again = tmp_path / "whole", tmp_path / "again"
    assert train(world, _job(world, tiny, whole, **given))
    kept = _kept(whole)
    ours, theirs = load_file(whole / "model/model.safetensors"), load_file(tiny / "teacher/model.safetensors")
    for place, block in enumerate((0, 3, 5)):
        name = "model.layers.{}.mlp.up_proj.weight"
        expected = theirs[name.format(block)][list(kept.columns[place])][:, list(kept.channels)]
        assert torch.allclose(ours[name.format(place)], expected, atol=1e-6)
        of = [8 * head + n for head in kept.heads[place] for n in range(8)]
        name = "model.layers.{}.self_attn.o_proj.weight"
        expected = theirs[name.format(block)][list(kept.channels)][:, of]
        assert torch.allclose(ours[name.format(place)], expected, atol=1e-6)
    shutil.copytree(whole / "checkpoints" / "step-00000001", again / "checkpoints" / "step-00000001")
    monkeypatch.setattr(initial, "measure_width", lambda *_: pytest.fail("it has been measured"))
    with pytest.raises(InputError, match=r"width.json: the parts of blocks that this run's student was made of are m"):
        train(world, _job(world, tiny, again, **given))
    assert not (again / "initial").exists()
    shutil.copy(whole / "width.json", again / "width.json")
    assert train(world, _job(world, tiny, again, **given))
    resumed = load_file(again / "model" / "model.safetensors")
    assert all(torch.equal(resumed[key], weight) for key, weight in ours.items())


def test_a_refused_start_leaves_no_record_of_its_parts(
    tiny: Path, world: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(initial, "initial_student", lambda *_: (_ for _ in ()).throw(InputError("the disk is full")))
    with pytest.raises(InputError, match="the disk is full"):
        train(world, _job(world, tiny, tmp_path / "run"))
    assert not (tmp_path / "run" / "width.json").exists()


def test_the_undistilled_students_of_a_study_have_the_parts_that_were_measured(
    runs: Path, tiny: Path, tmp_path: Path
) -> None:
    """One undistilled student for each seed, whose rows its parts were measured on."""
    given = {**NARROW, "student.copy_blocks": "influence", "output": str(tmp_path)}
    recipe = load_recipe(tiny / "recipe.yaml").changed({**given, "study": {"seeds": [3, 4], "strategies": ["forward"]}})
    blocks = json.loads((runs / "influence" / "blocks.json").read_text())["blocks"]
    for seed in (3, 4):
        run = recipe.folder / "students" / f"ce_only-s{seed}"
        run.mkdir(parents=True)
        for name in ("blocks.json", "width.json"):
            shutil.copy(runs / ("influence" if seed == 3 or name == "blocks.json" else "replicated") / name, run / name)
    study._write_undistilled(recipe, study_entries(recipe))
    for seed, of in ((3, "influence"), (4, "replicated")):
        make.copied_student(tiny / "teacher", blocks, tmp_path / f"s{seed}", dtype=torch.float32, kept=_kept(runs / of))
        ours, expected = (
            load_file(folder / "model.safetensors")
            for folder in (recipe.folder / "undistilled" / f"s{seed}", tmp_path / f"s{seed}")
        )
        assert (
            all(torch.equal(ours[key], tensor) for key, tensor in expected.items()) and ours.keys() == expected.keys()
        )
    made = recipe.folder / "undistilled" / "s3" / "model.safetensors"
    before = made.stat().st_ino, made.stat().st_mtime_ns
    study._write_undistilled(recipe, study_entries(recipe))
    assert (made.stat().st_ino, made.stat().st_mtime_ns) == before, "what is there is not made again"
    shutil.copy(runs / "replicated" / "width.json", recipe.folder / "students" / "ce_only-s3" / "width.json")
    study._write_undistilled(recipe, study_entries(recipe))
    assert (made.stat().st_ino, made.stat().st_mtime_ns) != before, "another width is made anew"


def test_a_teacher_that_can_not_be_narrowed_is_refused_before_anything_is_written(
    tiny: Path, world: Any, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match="student.hidden_size: 40 is more than the teacher's 32"):
        _job(world, tiny, tmp_path / "run", **{"student.hidden_size": 40})
    with pytest.raises(InputError, match="student.hidden_size: 40 is more than the teacher's 32"):
        recipe = load_recipe(tiny / "recipe.yaml").changed({"student.hidden_size": 40})
        initial_student_config(recipe, teacher_config(recipe))
    assert not (tmp_path / "run").exists()
    job = _job(world, tiny, tmp_path / "run")
    shutil.copytree(tiny / "teacher", tmp_path / "spoilt")
    weights = load_file(tmp_path / "spoilt" / "model.safetensors")
    weights["model.layers.3.mlp.up_proj.weight"][:] = torch.nan
    save_file(weights, tmp_path / "spoilt" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match="student.init: the teacher's activations were measured as no number; look"):
        initial.measure_width(world, replace(job, teacher=tmp_path / "spoilt"), _batches(world, job))
    assert not (tmp_path / "run").exists()
